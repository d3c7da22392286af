package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// diff compares live keys with the outcome of a replay. Several workers use it
// at once: the replay is only read, but for the seen marks, and no two keys
// touch the same one, because ordered refuses a key that comes twice.
type diff struct {
	r     *replay
	count atomic.Int64

	newer bool // meta and its last entry are of a newer version
	mu    sync.Mutex
	notes []string
}

func newDiff(r *replay) *diff { return &diff{r: r} }

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
		it.chain = entry.ChainID{} // of a head, once it is read
		d.one(it)
	}
}

func (d *diff) finding(code Code, it *item, detail string, args ...any) *Finding {
	return &Finding{Code: code, Where: strings.TrimPrefix(it.key, d.r.prefix), Revision: it.mod, Detail: fmt.Sprintf(detail, args...), order: math.MaxInt64}
}

// report adds what is certain whatever else is read.
func (d *diff) report(f *Finding) { d.r.log.add(f) }

// judge adds what entries of a newer version may explain, if the value names an
// entry of a chain that has some.
func (d *diff) judge(it *item, f *Finding) {
	if d.r.unknownChain(it.chain) || d.r.namesUnknown(it.val) {
		d.r.log.doubt(f)
		return
	}
	d.report(f)
}

// malformed says what is wrong with a value.
func (d *diff) malformed(it *item, err error) {
	if err != nil {
		d.judge(it, d.finding(Malformed, it, "%v", err))
	}
}

func (d *diff) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.notes = append(d.notes, fmt.Sprintf(format, args...))
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
		d.judge(it, d.finding(UnknownKey, it, "%v", err))
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
	d.malformed(it, err)
}

// quick is whether a key is that of a lease, and its value what the replay
// expects: nearly all are, and decoding them would take longest. Where it says
// no, the slow way has the last word.
func (d *diff) quick(it *item) bool {
	r := d.r
	rel, ok := strings.CutPrefix(it.key, r.prefix)
	if !ok {
		return false
	}
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
		ip, ok := parseSpelled(k)
		if !ok {
			return false
		}
		id, ok := r.findAddr(r.lookup(space), ip)
		if !ok || !r.sameAddress(&r.addrs[id], it) {
			return false
		}
		r.addrs[id].seen = true
		return true
	}
	return false
}

// parseSpelled reads an address as a key has it, with its family before it. What
// it refuses is for package keyspace to judge.
func parseSpelled(k string) (netip.Addr, bool) {
	if ip, ok := strings.CutPrefix(k, "4/"); ok && len(ip) == len("010.022.007.014") {
		var a [4]byte
		for i := range a {
			n := 0
			for _, c := range []byte(ip[4*i : 4*i+3]) {
				if c -= '0'; c > 9 {
					return netip.Addr{}, false
				}
				n = 10*n + int(c)
			}
			if n > 255 || i < 3 && ip[4*i+3] != '.' {
				return netip.Addr{}, false
			}
			a[i] = byte(n)
		}
		return netip.AddrFrom4(a), true
	}
	if ip, ok := strings.CutPrefix(k, "6/"); ok && len(ip) == len("fd00:0000:0000:0000:0000:0000:0000:0007") {
		var a [16]byte
		for i := range a {
			at := 2*i + i/2
			hi, lo := hexDigit[ip[at]], hexDigit[ip[at+1]]
			if hi|lo > 15 || i%2 == 1 && i < 15 && ip[at+2] != ':' {
				return netip.Addr{}, false
			}
			a[i] = hi<<4 | lo
		}
		return netip.AddrFrom16(a), true
	}
	return netip.Addr{}, false
}

// sides writes down what differs, and nothing of what does not.
type sides struct{ want, got []string }

func (s *sides) add(what, want, got string) {
	if want != got {
		s.want = append(s.want, fmt.Sprintf("%s %.300s", what, orNothing(want)))
		s.got = append(s.got, fmt.Sprintf("%s %.300s", what, orNothing(got)))
	}
}

func (s *sides) mod(want, got int64) {
	s.add("modified at revision", fmt.Sprint(want), fmt.Sprint(got))
}

// fields adds the fields of two values of one type, by their names in JSON: all
// that the type has, so that a new field is compared as soon as the replay knows
// what to expect.
func (s *sides) fields(what string, want, got reflect.Value) {
	_, text := want.Interface().(encoding.TextMarshaler)
	_, says := want.Interface().(fmt.Stringer)
	switch {
	case want.Kind() == reflect.Struct && !text && !says:
		for i := range want.NumField() {
			name, _, _ := strings.Cut(want.Type().Field(i).Tag.Get("json"), ",")
			s.fields(strings.TrimPrefix(what+"."+name, "."), want.Field(i), got.Field(i))
		}
	case want.Kind() == reflect.Slice && want.Len() == got.Len():
		for i := range want.Len() {
			s.fields(fmt.Sprintf("%s[%d]", what, i), want.Index(i), got.Index(i))
		}
	default:
		s.add(what, textOf(want), textOf(got))
	}
}

// textOf is a field as people read it: no two values have the same.
func textOf(v reflect.Value) string {
	if v.IsZero() {
		return ""
	}
	switch x := v.Interface().(type) {
	case encoding.TextMarshaler:
		b, _ := x.MarshalText() // it was decoded, so it can be encoded
		return string(b)
	case fmt.Stringer:
		return x.String()
	}
	if v.Kind() == reflect.String {
		return v.String()
	}
	return string(keyspace.Encode(v.Interface()))
}

func (s *sides) judge(d *diff, it *item, detail string) {
	if len(s.want) > 0 {
		d.judge(it, with(d.finding(StateDiffers, it, "%s", detail), strings.Join(s.want, ", "), strings.Join(s.got, ", ")))
	}
}

// compare judges a live value by what the replay expects: field by field and, as
// JSON can say one thing in many ways, to the byte.
func compare[T any](d *diff, it *item, mod int64, want, got *T, detail string) {
	d.malformed(it, asWritten(it.val, got))
	var s sides
	s.fields("", reflect.ValueOf(want).Elem(), reflect.ValueOf(got).Elem())
	s.mod(mod, it.mod)
	s.judge(d, it, detail)
}

func (d *diff) meta(it *item) error {
	r := d.r
	r.meta.seen = true
	var m keyspace.Meta
	if err := json.Unmarshal(it.val, &m); err != nil {
		return fmt.Errorf("value %.60q: %.300s", it.val, err.Error())
	}
	d.newer = r.meta.Version > keyspace.FormatVersion && m.Version == r.meta.Version
	if !d.newer {
		d.malformed(it, errors.Join(m.Validate(), asWritten(it.val, m)))
	}
	if r.snap.EtcdCluster != m.EtcdCluster {
		d.report(with(d.finding(Rollback, it, "this etcd is not the one that the ledger was made for: it was restored or copied without 'ledger recover'"), m.EtcdCluster, r.snap.EtcdCluster))
	}
	var s sides
	if !r.meta.set {
		s.add("meta", "", "one of cluster "+m.Cluster)
	} else {
		s.fields("", reflect.ValueOf(r.meta.Meta), reflect.ValueOf(m))
		s.mod(r.meta.mod, it.mod)
	}
	s.judge(d, it, "meta is not what its last entry says")
	return nil
}

// asWritten says whether a value is what this program writes, to the byte.
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
	d.note("nobody allocates: node %s stopped the cluster: %.500q", node, v.Found)
	if v.Node != node {
		return fmt.Errorf("node %.200q: the key says %s", v.Node, node)
	}
	return asWritten(it.val, v)
}

func (d *diff) pool(it *item, name string) {
	sum := sha256.Sum256(it.val)
	var s sides
	want := ""
	if p := d.r.pools[name]; p != nil {
		p.seen = true
		if p.spec != (entry.Hash{}) {
			want = p.spec.String()
		}
		s.mod(p.mod, it.mod)
	}
	s.add("SHA-256", want, entry.Hash(sum).String())
	s.judge(d, it, "the pool's spec is not the one on the record")
}

func (d *diff) address(it *item, k *keyspace.Key) error {
	r := d.r
	id, known := r.findAddr(r.lookup(k.Space), k.IP)
	if known {
		r.addrs[id].seen = true
		r.addrs[id].unknown = r.addrs[id].unknown || r.namesUnknown(it.val)
	}
	var v keyspace.Address
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	switch {
	case v.State != keyspace.Leased && v.State != keyspace.Free:
		return fmt.Errorf("state %.80q: want leased or free", v.State)
	case v.State == keyspace.Leased && (v.Holder == nil || v.Acquire.IsZero() || !v.Release.IsZero() || !v.Since.IsZero() || v.Cooldown != 0):
		return fmt.Errorf("a leased address has a holder and an acquire, and nothing else")
	case v.State == keyspace.Free && (v.Holder != nil || !v.Acquire.IsZero() || v.Release.IsZero()):
		return fmt.Errorf("a free address has a release, and no holder or acquire")
	}
	switch {
	case v.State == keyspace.Leased && (!known || !r.addrs[id].leased):
		want := "never held"
		if known {
			want = "free since " + r.addrs[id].ref.String()
		}
		d.judge(it, with(d.finding(AllocNoEntry, it, "the address is leased, and no entry says so"), want, fmt.Sprintf("held by %.500s by acquire %s, at revision %d", v.Holder, v.Acquire, it.mod)))
	case !known:
		d.judge(it, with(d.finding(StateDiffers, it, "the address was held before, and no entry says so"), "never held", "free since "+v.Release.String()))
	default:
		a := &r.addrs[id]
		want := r.addressValue(a)
		compare(d, it, a.mod, &want, &v, "the address is not as its last entry left it")
	}
	return nil
}

// addressValue is the value that an address's key should have.
func (r *replay) addressValue(a *address) keyspace.Address {
	if !a.leased {
		return keyspace.Address{State: keyspace.Free, Pool: r.nameOr(a.pool), Release: a.ref, Since: a.released(), Cooldown: int64(a.cooldown)}
	}
	p := strings.SplitN(string(r.atts[a.att].key()), "/", 4)
	holder := &keyspace.AttachmentID{Node: p[0], Network: p[1], Container: p[2], Interface: p[3]}
	return keyspace.Address{State: keyspace.Leased, Pool: r.nameOr(a.pool), Holder: holder, Acquire: a.ref}
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
		w = append(w, `","since":"`...)
		w = a.released().AppendFormat(w, time.RFC3339Nano)
		w = appendCooldown(append(w, '"'), a.cooldown)
		return bytes.Equal(append(w, '}'), it.val)
	}
	p := bytes.SplitN(r.atts[a.att].key(), []byte("/"), 4)
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

func appendCooldown(b []byte, seconds int32) []byte {
	if seconds == 0 {
		return b
	}
	return strconv.AppendInt(append(b, `,"cooldown":`...), int64(seconds), 10)
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
	d.malformed(it, v.Validate()) // what differs is said, too
	if i == 0 {
		var ips []netip.Addr
		for _, l := range v.Leases {
			ips = append(ips, l.Address.Addr())
		}
		d.judge(it, with(d.finding(AllocNoEntry, it, "the attachment holds addresses, and no entry says so"), "no attachment", fmt.Sprintf("%.500s by acquire %s, at revision %d", fmt.Sprint(ips), refOrNothing(v.Acquire), it.mod)))
		return nil
	}
	a := &r.atts[i]
	want := r.attachmentValue(a)
	compare(d, it, a.mod, &want, &v, "the attachment is not as its acquire left it")
	return nil
}

// attachmentValue is the value that an attachment's key should have.
func (r *replay) attachmentValue(a *attachment) keyspace.Attachment {
	v := keyspace.Attachment{
		Space: r.nameOr(a.space), Pool: r.nameOr(a.pool), Acquire: a.acquire, Cooldown: int64(a.cooldown),
		Pod: string(a.text[a.pod:a.uid]), PodUID: string(a.text[a.uid:]),
	}
	for _, l := range a.leases {
		n := &r.subnets[l.subnet]
		v.Leases = append(v.Leases, keyspace.Lease{Address: netip.PrefixFrom(l.ip, n.bits), Gateway: n.gateway, Range: n.span})
	}
	return v
}

// sameAttachment is sameAddress for attachments.
func (r *replay) sameAttachment(a *attachment, it *item) bool {
	if a.mod != it.mod || !plain(a.text[a.pod:]) {
		return false
	}
	var buf [1024]byte
	w := append(buf[:0], `{"space":"`...)
	w = append(w, r.name(a.space)...)
	w = append(w, `","pool":"`...)
	w = append(w, r.name(a.pool)...)
	w = append(w, `","leases":[`...)
	for i, l := range a.leases {
		n := &r.subnets[l.subnet]
		if i > 0 {
			w = append(w, ',')
		}
		w = append(w, `{"address":"`...)
		w = l.ip.AppendTo(w)
		w = strconv.AppendInt(append(w, '/'), int64(n.bits), 10)
		if n.gateway.IsValid() {
			w = append(w, `","gateway":"`...)
			w = n.gateway.AppendTo(w)
		}
		if !n.span.IsZero() {
			w = append(w, `","range":"`...)
			w = n.span.AppendTo(w)
		}
		w = append(w, `"}`...)
	}
	w = append(w, `],"acquire":"`...)
	w = appendRef(w, &a.acquire)
	w = appendCooldown(append(w, '"'), a.cooldown)
	for _, t := range [...]struct {
		name string
		text []byte
	}{{`,"pod":"`, a.text[a.pod:a.uid]}, {`,"podUID":"`, a.text[a.uid:]}} {
		if len(t.text) > 0 {
			w = append(w, t.name...)
			w = append(w, t.text...)
			w = append(w, '"')
		}
	}
	return bytes.Equal(append(w, '}'), it.val)
}

func (d *diff) block(it *item, k *keyspace.Key) error {
	r := d.r
	var v keyspace.Block
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	b := r.blocks[blockKey{r.lookup(k.Block.Space), r.lookup(k.Block.Pool), k.Block.Prefix}]
	if b == nil {
		d.judge(it, with(d.finding(AllocNoEntry, it, "the block is claimed, and no entry says so"), "not claimed", fmt.Sprintf("%.300s's by %s", v.Node, refOrNothing(v.Claim))))
		return nil
	}
	b.seen = true
	want := keyspace.Block{Node: r.name(b.node), Claim: b.claim}
	compare(d, it, b.mod, &want, &v, "the block is not as its claim left it")
	return nil
}

func (d *diff) writer(it *item, k *keyspace.Key) error {
	r := d.r
	var v keyspace.Writer
	if err := keyspace.Decode(it.val, &v); err != nil {
		return err
	}
	name := k.Writer.String()
	it.chain = v.Chain
	if v.Disputed != "" {
		d.note("two machines write as %s: one found the other's entries on its chain; close the chain, and see which of the two is %s", name, k.Writer.Name)
	}
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
	want := v // its boot ID and what is disputed are in no entry
	if c.key != nil {
		want.Key = c.keyText
	}
	if c.epoch != 0 {
		want.Epoch, want.Machine = c.epoch, c.machine
	}
	want.Closed, want.Removed, want.Recover = c.closer, c.removed, c.recover
	// A fence and a machine that finds another one put the key without an entry.
	compare(d, it, max(c.put, it.mod), &want, &v, "the writer is not as its chain, and who closed that, say")
	return nil
}

// finish finds what is on the record and not in the store.
func (d *diff) finish() {
	r := d.r
	missing := func(unknown bool, where, detail, want string) {
		f := &Finding{Code: StateMissing, Where: where, Detail: detail, Want: want, order: math.MaxInt64}
		if unknown {
			r.log.doubt(f)
		} else {
			d.report(f)
		}
	}
	if !r.meta.seen {
		want := "meta"
		if r.meta.set {
			want = fmt.Sprintf("cluster %s, epoch %d, %s, by %s", r.meta.Cluster, r.meta.Epoch, r.meta.State, r.meta.Entry)
		}
		d.report(&Finding{Code: StateMissing, Where: "meta", Detail: "without it nobody allocates, and the ledger has no identity", Want: want, order: math.MaxInt64})
	}
	r.eachAddr(func(space string, ip netip.Addr, a *address) {
		if a.seen || a.ref.IsZero() {
			return
		}
		where, unknown := r.keys.Address(space, ip)[len(r.prefix):], r.unknownChain(a.ref.Chain)
		if a.leased {
			missing(unknown, where, "the address is leased on the record, and its key is gone", fmt.Sprintf("held by %s by acquire %s", r.atts[a.att].key(), a.ref))
		} else {
			missing(unknown, where, "the address was held before, and its key, which says until when and since which release it is free, is gone", "free since "+a.ref.String())
		}
	})
	for i := range r.atts {
		if a := &r.atts[i]; a.live && !a.seen {
			unknown := r.unknownChain(a.acquire.Chain) || slices.ContainsFunc(a.leases, func(l lease) bool { return r.addrs[l.addr].unknown })
			missing(unknown, "attachments/"+string(a.key()), "the attachment holds addresses on the record, and its key is gone", fmt.Sprintf("%v by acquire %s", a.ips(), a.acquire))
		}
	}
	for k, b := range r.blocks {
		if !b.seen {
			where := r.keys.Block(keyspace.BlockID{Space: r.name(k.space), Pool: r.name(k.pool), Prefix: k.prefix})[len(r.prefix):]
			missing(r.unknownChain(b.claim.Chain), where, "the block is claimed on the record, and its key is gone", fmt.Sprintf("%s's by %s", r.name(b.node), b.claim))
		}
	}
	for name, p := range r.pools {
		if !p.seen && p.spec != (entry.Hash{}) {
			missing(r.unknownChain(p.ref.Chain), "pools/"+name, "the pool is on the record, and its key is gone", "SHA-256 "+p.spec.String())
		}
	}
	for name, w := range r.writers {
		if !w.seen {
			d.report(&Finding{Code: StateMissing, Where: "writers/" + name, Writer: name, Chain: w.chain.id.String(), Seq: w.chain.seq, order: math.MaxInt64, Detail: "the writer has a chain, and its head is gone", Want: w.chain.tip().String()})
		}
	}
	r.log.decide(d.newer)
	slices.Sort(d.notes)
	for _, s := range d.notes {
		r.log.note("%s", s)
	}
}
