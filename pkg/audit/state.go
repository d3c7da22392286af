package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// diff compares live keys with the outcome of a replay. Several workers use it
// at once: the replay is only read, but for the seen marks, and no two keys
// touch the same one, because ordered refuses a key that comes twice.
type diff struct {
	r     *replay
	count atomic.Int64

	mu      sync.Mutex // for what few keys touch
	reduced []string
	stops   []string
	later   map[Code][]Finding
	laters  map[Code]int64
	newer   bool // meta is of a newer version
}

func newDiff(r *replay) *diff {
	return &diff{r: r, later: map[Code][]Finding{}, laters: map[Code]int64{}}
}

// ordered passes on the records of a stream that come in key order.
func (d *diff) ordered(stream func(context.Context, func(Record) error) error) func(context.Context, func(Record) error) error {
	return func(ctx context.Context, f func(Record) error) error {
		var last []byte
		return stream(ctx, func(rec Record) error {
			d.count.Add(1)
			if rec.Key <= string(last) {
				d.r.log.add(&Finding{
					Code: Order, Where: strings.TrimPrefix(rec.Key, d.r.prefix), Revision: rec.Mod, order: math.MaxInt64, Detail: "live keys are not in key order, or one comes twice",
					Want: "after " + string(last), Got: rec.Key,
				})
				return nil
			}
			last = append(last[:0], rec.Key...)
			return f(rec)
		})
	}
}

func (d *diff) work(b *batch) {
	for i := range b.items[:b.n] {
		it := &b.items[i]
		it.keyBytes = b.buf[it.keyAt : it.valAt-1]
		it.key = view(it.keyBytes)
		it.val = b.buf[it.valAt:it.end:it.end]
		d.one(it)
	}
}

func (d *diff) finding(code Code, it *item, detail string, args ...any) *Finding {
	return &Finding{Code: code, Where: strings.TrimPrefix(it.key, d.r.prefix), Revision: it.mod, Detail: fmt.Sprintf(detail, args...), order: math.MaxInt64}
}

// report adds what is certain whatever else is read.
func (d *diff) report(f *Finding) { d.r.log.add(f) }

// judge takes down what rests on knowing every entry's and every value's
// meaning. Whether all are known is known in the end: finish decides.
func (d *diff) judge(f *Finding) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.laters[f.Code]++
	if len(d.later[f.Code]) < MaxFindings {
		d.later[f.Code] = append(d.later[f.Code], f.own())
	}
}

func (d *diff) decide() {
	l := d.r.log
	for code, list := range d.later {
		if d.newer || d.r.unknown > 0 {
			l.folded[code] += d.laters[code]
			continue
		}
		for i := range list {
			l.add(&list[i])
		}
		more := d.laters[code] - int64(len(list))
		l.count += more
		l.byCode[code] += more
	}
}

func (d *diff) one(it *item) {
	if it.lease != 0 {
		d.report(d.finding(LeasedKey, it, "etcd lease %x is attached: the key would vanish with it", it.lease))
	}
	if it.mod > d.r.snap.Revision {
		d.report(with(d.finding(Revision, it, "the key is newer than what was read"), fmt.Sprintf("%d or less", d.r.snap.Revision), fmt.Sprint(it.mod)))
	}
	if d.quick(it) {
		return
	}
	k, err := d.r.keys.Parse(it.key)
	if err == nil && k.Kind == "chains" {
		err = fmt.Errorf("key %q: an entry stands among the other keys", it.key)
	}
	if err != nil {
		d.judge(d.finding(UnknownKey, it, "%v", err))
		return
	}
	switch k.Kind {
	case "meta":
		err = d.meta(it)
	case "stops":
		err = d.stop(it, k.Name)
	case "pools":
		d.pool(it, k.Name)
	case "addresses":
		err = d.address(it, &k)
	case "attachments":
		err = d.attachment(it, &k)
	case "blocks":
		err = d.block(it, &k)
	case "writers":
		err = d.writer(it, &k)
	}
	if err != nil {
		d.judge(d.finding(Malformed, it, "%v", err))
	}
}

// quick is whether a key is that of a lease, and its value what the replay
// expects: nearly all are, and decoding them would take longest. Where it says
// no, the slow way has the last word.
func (d *diff) quick(it *item) bool {
	r := d.r
	rel, _ := strings.CutPrefix(it.key, r.prefix)
	if k, ok := strings.CutPrefix(rel, "attachments/"); ok && strings.Count(k, "/") == 3 {
		key := it.keyBytes[len(it.key)-len(k):]
		i := r.findAtt(key, maphash.Bytes(r.seed, key))
		if i == 0 || !r.sameAttachment(&r.atts[i], it) {
			return false
		}
		r.atts[i].seen = true
		return true
	}
	if k, ok := strings.CutPrefix(rel, "addresses/"); ok {
		space, k, _ := strings.Cut(k, "/")
		ip, ok := strings.CutPrefix(k, "4/")
		if !ok || len(ip) != len("010.022.007.014") {
			return false
		}
		var a [4]byte
		for i := range a {
			n := 0
			for _, c := range []byte(ip[4*i : 4*i+3]) {
				if c -= '0'; c > 9 {
					return false
				}
				n = 10*n + int(c)
			}
			if n > 255 || i < 3 && ip[4*i+3] != '.' {
				return false
			}
			a[i] = byte(n)
		}
		id, ok := r.findAddr(r.lookup(space), netip.AddrFrom4(a))
		if !ok || !r.sameAddress(&r.addrs[id], it) {
			return false
		}
		r.addrs[id].seen = true
		return true
	}
	return false
}

// sides writes down what differs, and nothing of what does not.
type sides struct{ want, got []string }

func (s *sides) add(what, want, got string) {
	if want != got {
		s.want = append(s.want, what+" "+orNothing(want))
		s.got = append(s.got, what+" "+orNothing(got))
	}
}

func (s *sides) mod(want, got int64) {
	if want != got {
		s.add("modified at revision", fmt.Sprint(want), fmt.Sprint(got))
	}
}

func (s *sides) judge(d *diff, it *item, detail string) {
	if len(s.want) > 0 {
		d.judge(with(d.finding(StateDiffers, it, "%s", detail), strings.Join(s.want, ", "), strings.Join(s.got, ", ")))
	}
}

func (d *diff) meta(it *item) error {
	r := d.r
	r.meta.seen = true
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(it.val, &v); err != nil {
		return fmt.Errorf("meta: %w", err)
	}
	if v.Version > keyspace.FormatVersion {
		d.mu.Lock()
		d.newer = true
		d.reduced = append(d.reduced, fmt.Sprintf("meta is of version %d, and this program knows %d: live keys may mean more than was checked; use a newer 'ledger'", v.Version, keyspace.FormatVersion))
		d.mu.Unlock()
		return nil
	}
	var m keyspace.Meta
	if err := keyspace.Decode(it.val, &m); err != nil {
		return err
	}
	if err := errors.Join(m.Validate(), asWritten(it.val, m)); err != nil {
		d.judge(d.finding(Malformed, it, "%v", err))
	}
	if r.snap.EtcdCluster != m.EtcdCluster {
		d.report(with(d.finding(Rollback, it, "this etcd is not the one that the ledger was made for: it was restored or copied without 'ledger recover'"), m.EtcdCluster, r.snap.EtcdCluster))
	}
	var s sides
	if !r.meta.set {
		s.add("meta", "", "one of cluster "+m.Cluster)
	} else {
		s.add("cluster", r.meta.cluster, m.Cluster)
		s.add("etcd cluster", r.meta.etcdCluster, m.EtcdCluster)
		s.add("epoch", fmt.Sprint(r.meta.epoch), fmt.Sprint(m.Epoch))
		s.add("state", r.meta.state, string(m.State))
		s.add("entry", r.meta.ref.String(), refOrNothing(m.Entry))
	}
	s.judge(d, it, "meta is not what its last entry says")
	return nil
}

// maxHint is how long a writer's hint which block is its may be.
const maxHint = 2*entry.MaxName + 64

// asWritten says whether a value is what this program writes, to the byte. No hash
// covers writers and meta, and their keys are written again and again: the
// revision of the last write tells nothing.
func asWritten(stored []byte, v any) error {
	if again := keyspace.Encode(v); !bytes.Equal(stored, again) {
		return fmt.Errorf("the value says what it should in another way than this program writes it: %d bytes instead of %d", len(stored), len(again))
	}
	return nil
}

func refOrNothing(r entry.Ref) string {
	if r.IsZero() {
		return ""
	}
	return r.String()
}

func (d *diff) stop(it *item, node string) error {
	var v keyspace.Stop
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stops = append(d.stops, fmt.Sprintf("nobody allocates: node %s stopped the cluster: %.500q", node, v.Found))
	return nil
}

func (d *diff) pool(it *item, name string) {
	sum := sha256.Sum256(it.val)
	p := d.r.pools[name]
	want := ""
	if p != nil {
		p.seen = true
		if p.spec != (entry.Hash{}) {
			want = p.spec.String()
		}
	}
	var s sides
	s.add("SHA-256", want, entry.Hash(sum).String())
	s.judge(d, it, "the pool's spec is not the one on the record")
}

func (d *diff) address(it *item, k *keyspace.Key) error {
	r := d.r
	id, known := r.findAddr(r.lookup(k.Space), k.IP)
	if known {
		r.addrs[id].seen = true
	}
	var v keyspace.Address
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	holder := ""
	if v.Holder != nil {
		holder = v.Holder.String()
	}
	switch {
	case v.State != keyspace.Leased && v.State != keyspace.Free:
		return fmt.Errorf("state %.80q: want leased or free", v.State)
	case v.State == keyspace.Leased && (v.Holder == nil || v.Acquire.IsZero() || !v.Release.IsZero() || v.HeldUntil != nil):
		return fmt.Errorf("a leased address has a holder and an acquire, and nothing else")
	case v.State == keyspace.Free && (v.Holder != nil || !v.Acquire.IsZero() || v.Release.IsZero()):
		return fmt.Errorf("a free address has a release, and no holder or acquire")
	}
	if v.State == keyspace.Leased && (!known || !r.addrs[id].leased) {
		want := "never held"
		if known {
			want = "free since " + r.addrs[id].ref.String()
		}
		d.judge(with(d.finding(AllocNoEntry, it, "the address is leased, and no entry says so"), want, fmt.Sprintf("held by %s by acquire %s, at revision %d", holder, v.Acquire, it.mod)))
		return nil
	}
	var s sides
	if !known {
		s.add("address", "never held", "free since "+v.Release.String())
	} else {
		a := &r.addrs[id]
		if a.leased {
			s.add("holder", string(r.atts[a.att].key), holder)
			s.add("acquire", a.ref.String(), refOrNothing(v.Acquire))
		} else {
			s.add("release", a.ref.String(), refOrNothing(v.Release))
		}
		s.add("pool", r.nameOr(a.pool), v.Pool)
		s.mod(a.mod, it.mod)
	}
	s.judge(d, it, "the address is not as its last entry left it")
	return nil
}

// sameAddress is whether a value is, byte for byte, what the replay expects. It
// saves decoding, and where it says no, the slow way has the last word.
func (r *replay) sameAddress(a *address, it *item) bool {
	if a.mod != it.mod || a.ref.IsZero() {
		return false
	}
	var buf [1024]byte
	w := append(buf[:0], `{"state":"`...)
	if !a.leased {
		w = append(w, `free","pool":"`...)
		w = append(w, r.name(a.pool)...)
		w = append(w, `","release":"`...)
		w = appendRef(w, &a.ref)
		w = append(w, `"}`...)
		return bytes.Equal(w, it.val)
	}
	p := bytes.SplitN(r.atts[a.att].key, []byte("/"), 4)
	if len(p) != 4 || !plain(p[3]) {
		return false
	}
	w = append(w, `leased","pool":"`...)
	w = append(w, r.name(a.pool)...)
	for i, name := range [...]string{`","holder":{"node":"`, `","network":"`, `","container":"`, `","interface":"`} {
		w = append(w, name...)
		w = append(w, p[i]...)
	}
	w = append(w, `"},"acquire":"`...)
	w = appendRef(w, &a.ref)
	w = append(w, `"}`...)
	return bytes.Equal(w, it.val)
}

// plain is whether JSON writes a text as it is.
func plain(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c >= 0x7f || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			return false
		}
	}
	return true
}

func appendRef(b []byte, r *entry.Ref) []byte {
	out, _ := r.AppendText(b)
	return out
}

func (r *replay) nameOr(id uint32) string {
	if id == 0 {
		return ""
	}
	return r.name(id)
}

func (d *diff) attachment(it *item, k *keyspace.Key) error {
	r := d.r
	key := it.keyBytes[len(r.prefix)+len("attachments/"):]
	i := r.findAtt(key, maphash.Bytes(r.seed, key))
	if i != 0 {
		r.atts[i].seen = true
	}
	var v keyspace.Attachment
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	if err := v.Validate(); err != nil {
		d.judge(d.finding(Malformed, it, "%v", err)) // what differs is said, too
	}
	if i == 0 {
		d.judge(with(d.finding(AllocNoEntry, it, "the attachment holds addresses, and no entry says so"), "no attachment", fmt.Sprintf("%v by acquire %s, at revision %d", leases(&v), refOrNothing(v.Acquire), it.mod)))
		return nil
	}
	a := &r.atts[i]
	var s sides
	if !slices.Equal(leases(&v), a.ips) {
		s.add("addresses", fmt.Sprint(a.ips), fmt.Sprint(leases(&v)))
	}
	s.add("acquire", a.acquire.String(), refOrNothing(v.Acquire))
	s.add("space", r.nameOr(a.space), v.Space)
	s.add("pool", r.nameOr(a.pool), v.Pool)
	s.mod(a.mod, it.mod)
	s.judge(d, it, "the attachment is not as its acquire left it")
	return nil
}

// sameAttachment is sameAddress for attachments. Subnet lengths, gateways and
// pods are not in the replay: of those it checks the form only.
func (r *replay) sameAttachment(a *attachment, it *item) bool {
	if a.mod != it.mod {
		return false
	}
	var buf [256]byte
	rest := it.val
	cut := func(s string) (ok bool) {
		if len(rest) < len(s) || string(rest[:len(s)]) != s {
			return false
		}
		rest = rest[len(s):]
		return true
	}
	while := func(ok func(byte) bool) bool {
		n := 0
		for n < len(rest) && ok(rest[n]) {
			n++
		}
		rest = rest[n:]
		return n > 0
	}
	digit := func(c byte) bool { return '0' <= c && c <= '9' }
	if !cut(`{"space":"`) || !cut(r.name(a.space)) || !cut(`","pool":"`) || !cut(r.name(a.pool)) || !cut(`","leases":[`) {
		return false
	}
	for i, ip := range a.ips {
		if i > 0 && !cut(",") {
			return false
		}
		if !cut(`{"address":"`) || !cut(view(ip.AppendTo(buf[:0]))) || !cut("/") || !while(digit) {
			return false
		}
		if cut(`","gateway":"`) && !while(func(c byte) bool { return digit(c) || 'a' <= c && c <= 'f' || c == '.' || c == ':' }) {
			return false
		}
		if !cut(`"}`) {
			return false
		}
	}
	if !cut(`],"acquire":"`) || !cut(view(appendRef(buf[:0], &a.acquire))) {
		return false
	}
	text := func(c byte) bool { return plain([]byte{c}) }
	if cut(`","pod":"`) && !while(text) || cut(`","podUID":"`) && !while(text) {
		return false
	}
	return cut(`"}`) && len(rest) == 0
}

func leases(v *keyspace.Attachment) []netip.Addr {
	out := make([]netip.Addr, 0, len(v.Leases))
	for _, l := range v.Leases {
		out = append(out, l.Address.Addr())
	}
	return out
}

func (d *diff) block(it *item, k *keyspace.Key) error {
	r := d.r
	var v keyspace.Block
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	b := r.blocks[blockKey{r.lookup(k.Block.Space), r.lookup(k.Block.Pool), k.Block.Prefix}]
	if b == nil {
		d.judge(with(d.finding(AllocNoEntry, it, "the block is claimed, and no entry says so"), "not claimed", fmt.Sprintf("%s's by %s", v.Node, refOrNothing(v.Claim))))
		return nil
	}
	b.seen = true
	var s sides
	s.add("node", r.name(b.node), v.Node)
	s.add("claim", b.claim.String(), refOrNothing(v.Claim))
	s.mod(b.mod, it.mod)
	s.judge(d, it, "the block is not as its claim left it")
	return nil
}

func (d *diff) writer(it *item, k *keyspace.Key) error {
	r := d.r
	var v keyspace.Writer
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	err := asWritten(it.val, v)
	for _, b := range v.Blocks {
		if len(b) > maxHint || strings.Count(b, "/") != 3 {
			err = fmt.Errorf("blocks has %.80q: want SPACE/POOL/PREFIX", b)
		}
	}
	if err != nil {
		d.judge(d.finding(Malformed, it, "%v", err))
	}
	name := k.Writer.String()
	w := r.writers[name]
	f := func(code Code, detail, want, got string) {
		x := with(d.finding(code, it, "%s", detail), want, got)
		x.Writer, x.Chain, x.Seq = name, v.Chain.String(), v.Seq
		d.report(x)
	}
	if w == nil {
		f(Missing, "the writer's head names a chain of which nothing is left", v.Head().String(), "")
		return nil
	}
	w.seen = true
	c := r.chains[v.Chain]
	switch {
	case c == nil || c.w != w:
		f(Missing, "the writer's head names a chain of which nothing is left", v.Head().String(), w.chain.tip().String())
		return nil
	case c != w.chain:
		f(HeadRollback, "the writer's head names an earlier chain than its last", w.chain.tip().String(), v.Head().String())
		return nil
	case v.Seq > c.seq:
		f(Missing, gone(c.seq+1, v.Seq)+" from the end of the chain", v.Head().String(), c.tip().String())
		return nil
	case v.Seq < c.seq:
		f(HeadRollback, "the writer's head names an older entry than the chain's last", c.tip().String(), v.Head().String())
		return nil
	case v.Hash != c.hash:
		detail := "the chain's last entry is not the one that the writer's head names: it was changed, or the head was"
		x := with(d.finding(HashMismatch, it, "%s", detail), v.Head().String(), c.tip().String())
		x.Where, x.Writer, x.Chain, x.Seq, x.Revision = c.keyOf(c.seq), name, c.id.String(), c.seq, c.mod
		d.report(x)
		return nil
	}
	var s sides
	if c.key != nil {
		s.add("key", c.keyText, v.Key)
	}
	if c.epoch != 0 {
		s.add("epoch", fmt.Sprint(c.epoch), fmt.Sprint(v.Epoch))
	}
	if !v.Closed.IsZero() && !slices.Contains(w.closes, v.Closed) {
		s.add("closed by", "", v.Closed.String())
	}
	if !v.Recover.IsZero() && !slices.Contains(w.recover, v.Recover) {
		s.add("recovered by", "", v.Recover.String())
	}
	s.judge(d, it, "the writer is not as its chain says")
	return nil
}

// finish finds what is on the record and not in the store.
func (d *diff) finish() {
	r := d.r
	missing := func(where, detail, want string) {
		d.judge(&Finding{Code: StateMissing, Where: where, Detail: detail, Want: want, order: math.MaxInt64})
	}
	if !r.meta.seen {
		want := "meta"
		if r.meta.set {
			want = fmt.Sprintf("cluster %s, epoch %d, %s, by %s", r.meta.cluster, r.meta.epoch, r.meta.state, r.meta.ref)
		}
		d.report(&Finding{Code: StateMissing, Where: "meta", Detail: "without it nobody allocates, and the ledger has no identity", Want: want, order: math.MaxInt64})
	}
	r.eachAddr(func(space string, ip netip.Addr, a *address) {
		if a.seen || a.ref.IsZero() {
			return
		}
		where := r.keys.Address(space, ip)[len(r.prefix):]
		if a.leased {
			missing(where, "the address is leased on the record, and its key is gone", fmt.Sprintf("held by %s by acquire %s", r.atts[a.att].key, a.ref))
		} else {
			missing(where, "the address was held before, and its key, which says until when and since which release it is free, is gone", "free since "+a.ref.String())
		}
	})
	for i := range r.atts {
		if a := &r.atts[i]; a.live && !a.seen {
			missing("attachments/"+string(a.key), "the attachment holds addresses on the record, and its key is gone", fmt.Sprintf("%v by acquire %s", a.ips, a.acquire))
		}
	}
	for k, b := range r.blocks {
		if !b.seen {
			where := r.keys.Block(keyspace.BlockID{Space: r.name(k.space), Pool: r.name(k.pool), Prefix: k.prefix})[len(r.prefix):]
			missing(where, "the block is claimed on the record, and its key is gone", fmt.Sprintf("%s's by %s", r.name(b.node), b.claim))
		}
	}
	for name, p := range r.pools {
		if !p.seen && p.spec != (entry.Hash{}) {
			missing("pools/"+name, "the pool is on the record, and its key is gone", "SHA-256 "+p.spec.String())
		}
	}
	for name, w := range r.writers {
		if !w.seen {
			d.report(&Finding{Code: StateMissing, Where: "writers/" + name, Writer: name, Chain: w.chain.id.String(), Seq: w.chain.seq, order: math.MaxInt64, Detail: "the writer has a chain, and its head is gone", Want: w.chain.tip().String()})
		}
	}
	d.decide()
	slices.Sort(d.stops)
	for _, s := range d.stops {
		r.log.note("%s", s)
	}
}
