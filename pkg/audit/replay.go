package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// replay consumes entries in commit order. One goroutine uses it.
type replay struct {
	keys   keyspace.Keys
	prefix string
	ring   *KeyRing
	all    bool
	snap   Snapshot
	log    *findings
	second *moved // set in the second reading

	chains  map[entry.ChainID]*chain
	shadows map[string]bool // writer + chain: a chain ID that stands under another writer too
	writers map[string]*writer
	trusted map[string]bool // keys reached by rotation from pinned ones

	names     []string // interned space, pool, node names
	nameIDs   map[string]uint32
	subnets   []subnet // interned
	subnetIDs map[subnet]uint32

	addrs4  map[uint64]uint32 // space and IPv4 address -> addrs; most are, and it is faster
	addrs6  map[addrKey]uint32
	addrs   []address
	attIDs  map[uint64]uint32 // hash of the key -> first of its list
	atts    []attachment      // 0 is unused
	attFree uint32
	seed    maphash.Seed
	scratch []byte
	ids     []uint32

	blocks map[blockKey]*block
	pools  map[string]*pool

	// What stays of leases that a finding was about, until they are released.
	left   map[entry.Ref]uint32 // acquires of attachments that acquired again: into atts
	robbed map[robbed]bool      // what another acquired

	cluster   string
	meta      metaState
	entries   int64
	first     int64
	last      int64
	lastKey   []byte
	lastTime  int64
	lastTip   *chain
	unknown   int64
	unvouched int64 // entries whose signatures nothing vouches for
	leased    int64
	live      int64 // attachments

	// Gathered in the first reading: what a second one would put in its place.
	moved *moved
	again bool // it is worth a second reading
}

// moved are entries that do not stand where they were committed, and places
// whose hash the second reading takes down. It is small: beyond its limit
// entries are judged where they stand.
type moved struct {
	items []*item
	skip  map[int64]bool
	early []*item // rewritten in place, by the revision they were created in
	late  map[place][]*item
	used  map[*item]bool
	want  map[place]entry.Hash
	// named are the hashes that the successors of changed entries name.
	named map[place]entry.Hash
}

var maxMoved = 1 << 14

type place struct {
	chain entry.ChainID
	seq   uint64
}

type writer struct {
	name  string // kind/name
	kind  entry.Kind
	chain *chain // the newest
	seen  bool   // there is a live key
}

type chain struct {
	id     entry.ChainID
	w      *writer
	before *chain // the writer's chain before this one
	seq    uint64
	hash   entry.Hash
	stored []byte // of seq
	sigOf  entry.Signature
	parsed bool   // stored parsed
	signed uint64 // the last entry whose signature was asked for
	linked bool   // seq's content belongs at seq, so that the next entry's prev can be judged
	mod    int64
	rev    int64
	time   int64
	skewed bool
	put    int64 // when the writer's head was put last with an entry: at least then

	epoch     uint64 // 0 where the open is not there to say it
	ahead     int64  // the revision of an open of a later epoch than the cluster's: the next entry must begin that epoch
	opened    int64  // where the open stands in the stream
	machine   string
	closer    entry.Ref // another writer's close of exactly this chain
	removed   bool      // by closer
	recover   entry.Ref // the last
	unknown   bool      // it has entries of a newer version, and so had meta by then
	key       note.Verifier
	keyText   string
	keys      []note.Verifier
	trusted   bool
	keyless   bool // its open is of a newer version
	unsure    bool // something is gone or unreadable: a rotation may have been
	unvouched bool // and what follows is signed with another key
	closed    bool
	ended     bool // a later chain names this one
	stale     bool // reported
	extended  bool // reported
	missing   []seqRange
	strays    []stray
	names     [3]internCache
}

type internCache struct {
	s  string
	id uint32
}

type seqRange struct{ from, to uint64 }

// stray is an entry whose content belongs at another seq of the chain.
type stray struct {
	at, says uint64
	hash     entry.Hash
	mod      int64
	ord      int64
}

type addrKey struct {
	ip    netip.Addr
	space uint32
}

type address struct {
	ref      entry.Ref // the acquire, or the release
	mod      int64
	since    int64 // of the release, in seconds since 1970; and
	nanos    int32 // nanoseconds
	cooldown int32 // of the last lease, in seconds
	pool     uint32
	att      uint32
	leased   bool
	seen     bool
	unknown  bool // an entry that is not known may have released it
}

func (a *address) released() time.Time { return time.Unix(a.since, int64(a.nanos)).UTC() }

type attachment struct {
	text        []byte // key, pod, UID
	pod, uid    uint16 // where they start in text
	hash        uint64
	next        uint32
	space, pool uint32
	leases      []lease
	acquire     entry.Ref
	cooldown    int32
	mod         int64
	live, seen  bool
}

func (a *attachment) key() []byte { return a.text[:a.pod] }

func (a *attachment) says(pod, uid string) bool {
	return string(a.text[a.pod:a.uid]) == pod && string(a.text[a.uid:]) == uid
}

func (a *attachment) ips() []netip.Addr {
	out := make([]netip.Addr, 0, len(a.leases))
	for _, l := range a.leases {
		out = append(out, l.ip)
	}
	return out
}

// robbed is an address that was acquired while an acquire held it.
type robbed struct {
	acquire entry.Ref
	addr    uint32
}

type lease struct {
	ip     netip.Addr
	addr   uint32 // into addrs
	subnet uint32 // into subnets
}

// subnet is what of a lease many leases have in common.
type subnet struct {
	bits    int
	gateway netip.Addr
	span    netipx.IPRange
}

type blockKey struct {
	space, pool uint32
	prefix      netip.Prefix
}

type block struct {
	node  uint32
	claim entry.Ref
	mod   int64
	seen  bool
}

type pool struct {
	spec entry.Hash
	ref  entry.Ref
	mod  int64
	seen bool
}

// metaState is meta as its last entry says it.
type metaState struct {
	keyspace.Meta
	mod       int64
	set, seen bool
}

func newReplay(keys keyspace.Keys, snap Snapshot, o *Options, log *findings) *replay {
	return &replay{
		keys: keys, prefix: keys.Prefix(), ring: o.Keys, all: o.AllSignatures, snap: snap, log: log,
		chains: map[entry.ChainID]*chain{}, shadows: map[string]bool{}, writers: map[string]*writer{}, trusted: map[string]bool{},
		nameIDs: map[string]uint32{}, subnetIDs: map[subnet]uint32{}, addrs4: map[uint64]uint32{}, addrs6: map[addrKey]uint32{}, attIDs: map[uint64]uint32{}, atts: make([]attachment, 1),
		left: map[entry.Ref]uint32{}, robbed: map[robbed]bool{}, seed: maphash.MakeSeed(), blocks: map[blockKey]*block{}, pools: map[string]*pool{},
	}
}

// finding starts a finding about an entry.
func (r *replay) finding(code Code, it *item, detail string, args ...any) *Finding {
	f := &Finding{Code: code, Where: it.key, Writer: it.writer, Seq: it.seq, Revision: it.mod, Detail: fmt.Sprintf(detail, args...), order: it.ord}
	if it.badKey == nil {
		f.Chain = it.chain.String()
	}
	return f
}

// report adds a finding about an entry and has the entry's signature checked.
func (r *replay) report(b *batch, it *item, c *chain, f *Finding) {
	r.log.add(f)
	r.suspect(b, it, c)
}

// judge is report for what rests on the replay of earlier entries. Where the
// entry's chain, or one that it names, has entries of a newer version, those may
// explain it.
func (r *replay) judge(b *batch, it *item, c *chain, f *Finding) {
	unknown := c.unknown || r.unknownChain(it.e.Acquire.Chain)
	for i := range it.e.Addresses {
		unknown = unknown || r.unknownChain(it.e.Addresses[i].After.Chain)
	}
	if unknown {
		r.log.doubt(f)
		r.suspect(b, it, c)
		return
	}
	r.report(b, it, c, f)
}

// unknownChain is whether a reference is to a chain with entries of a newer
// version. What names nothing has the ID zero, whoever opens a chain of that name.
func (r *replay) unknownChain(id entry.ChainID) bool {
	c := r.chains[id]
	return c != nil && c.unknown && id != entry.ChainID{}
}

// namesUnknown is whether a live value, whatever it is, names an entry of a chain
// with entries of a newer version.
func (r *replay) namesUnknown(val []byte) bool {
	for text := range bytes.SplitSeq(val, []byte{'"'}) {
		if len(text) < len(entry.Ref{}.String()) || len(text) > 128 {
			continue
		}
		if ref, err := entry.ParseRef(string(text)); err == nil && r.unknownChain(ref.Chain) {
			return true
		}
	}
	return false
}

func (r *replay) suspect(b *batch, it *item, c *chain) {
	if c == nil || c.key == nil || it.err != nil && !errors.Is(it.err, entry.ErrVersion) {
		return
	}
	r.sign(b, it, c)
}

// ref is how other entries and live keys name an entry: by the hash it has, or
// in the second reading, where it was changed, by the one its successor names. So
// what rests on the entry is judged by what the entry says, and is not a finding
// merely because its bytes were changed.
func (r *replay) ref(it *item) entry.Ref {
	if r.second != nil {
		if h, ok := r.second.named[place{it.chain, it.seq}]; ok {
			return entry.Ref{Chain: it.chain, Seq: it.seq, Hash: h}
		}
	}
	return entry.Ref{Chain: it.chain, Seq: it.seq, Hash: it.hash}
}

// changed is whether an entry's bytes are not those that its successor names, which is
// a finding already: what it says is no measure for others.
func (r *replay) changed(e entry.Ref) bool {
	if r.second == nil {
		return false
	}
	_, ok := r.second.named[place{e.Chain, e.Seq}]
	return ok
}

// mod is the revision an entry was committed at: before it was written again,
// as far as etcd tells.
func (r *replay) mod(it *item) int64 {
	if r.second != nil && it.create < it.mod {
		return it.create
	}
	return it.mod
}

// batch replays a batch.
func (r *replay) batch(b *batch) {
	for i := range b.items[:b.n] {
		it := &b.items[i]
		if r.second == nil {
			if r.isMoved(it) {
				r.keep(it.clone(r.prefix, r.keys, b))
				continue
			}
		} else {
			if r.second.skip[it.ord] {
				continue
			}
			r.putBack(b, it)
		}
		r.commitOrder(it)
		r.entry(b, it)
	}
}

// isMoved is whether an entry was written again, or stands behind its
// successors in commit order.
func (r *replay) isMoved(it *item) bool {
	if it.badKey != nil || (r.moved != nil && len(r.moved.items) >= maxMoved) {
		return false
	}
	if it.create != it.mod || it.version != 1 {
		return true
	}
	c := r.chains[it.chain]
	return c != nil && c.w.name == it.writer && it.seq <= c.seq
}

func (r *replay) keep(it *item) {
	if r.moved == nil {
		r.moved = newMoved()
	}
	m := r.moved
	r.again = true
	m.items = append(m.items, it)
	m.skip[it.ord] = true
}

// nameBefore notes, in the first reading, the hash that an entry's successor names.
// Where the entry is only missing, nothing comes of it.
func (r *replay) nameBefore(p place, h entry.Hash) {
	if r.second != nil {
		return
	}
	if r.moved == nil {
		r.moved = newMoved()
	}
	if len(r.moved.named) < maxMoved {
		r.moved.named[p] = h
	}
}

// arrange prepares the second reading.
func (m *moved) arrange() {
	for _, it := range m.items {
		if it.create < it.mod {
			m.early = append(m.early, it)
		}
		p := place{it.chain, it.seq}
		m.late[p] = append(m.late[p], it)
		m.want[p] = entry.Hash{}
		if it.err == nil {
			m.want[place{it.chain, it.e.Seq}] = entry.Hash{}
		}
	}
	sort.SliceStable(m.early, func(i, j int) bool { return m.early[i].create < m.early[j].create })
}

// putBack replays, before it, the moved entries that belong before it.
func (r *replay) putBack(b *batch, it *item) {
	m := r.second
	for len(m.early) > 0 && m.early[0].create < it.mod {
		r.restore(b, m.early[0])
		m.early = m.early[1:]
	}
	if it.badKey != nil || len(m.late) == 0 {
		return
	}
	for {
		seq := uint64(1)
		if c := r.chains[it.chain]; c != nil {
			if c.w.name != it.writer {
				return
			}
			seq = c.seq + 1
		}
		if seq >= it.seq {
			return
		}
		late := m.late[place{it.chain, seq}]
		i := slices.IndexFunc(late, func(l *item) bool { return !m.used[l] && l.writer == it.writer })
		if i < 0 {
			return
		}
		r.replayMoved(b, late[i])
	}
}

// restore replays a moved entry if its place in its chain is due, after those
// before it.
func (r *replay) restore(b *batch, it *item) {
	if r.second.used[it] {
		return
	}
	r.putBack2(b, it)
	if c := r.chains[it.chain]; c != nil && (c.w.name != it.writer || c.seq+1 != it.seq) || c == nil && it.seq != 1 {
		return // a gap before it: its turn comes with its successor, or at the end
	}
	r.replayMoved(b, it)
}

func (r *replay) putBack2(b *batch, it *item) {
	early := r.second.early
	r.second.early = nil
	r.putBack(b, it)
	r.second.early = early
}

func (r *replay) replayMoved(b *batch, it *item) {
	r.second.used[it] = true
	if it.create == it.mod && it.version == 1 {
		r.log.add(r.finding(Order, it, "it was committed after entries that follow it in its chain: it was deleted and put again"))
	}
	r.entry(b, it)
}

// commitOrder checks that a source yields records in commit order.
func (r *replay) commitOrder(it *item) {
	if it.mod < r.last || it.mod == r.last && it.key <= string(r.lastKey) {
		r.log.add(&Finding{
			Code: Order, Where: it.key, Writer: it.writer, Seq: it.seq, Revision: it.mod, order: it.ord, Detail: "entries are not in commit order",
			Want: fmt.Sprintf("after revision %d, %s", r.last, r.lastKey), Got: fmt.Sprintf("revision %d", it.mod),
		})
		return
	}
	r.last = it.mod
	r.lastKey = append(r.lastKey[:0], it.key...)
}

// entry replays one entry in its place.
func (r *replay) entry(b *batch, it *item) {
	r.entries++
	if r.first == 0 || it.mod < r.first {
		r.first = it.mod
	}
	if it.badKey != nil {
		r.log.add(r.finding(UnknownKey, it, "%v", it.badKey))
		return
	}
	if r.second != nil {
		if h, ok := r.second.want[place{it.chain, it.seq}]; ok && h == (entry.Hash{}) {
			r.second.want[place{it.chain, it.seq}] = it.hash
		}
	}
	c := r.chainOf(b, it)
	if c == nil {
		return
	}
	if it.create != it.mod || it.version != 1 {
		r.report(b, it, c, with(r.finding(Rewritten, it, "the key was written %d times", it.version),
			fmt.Sprintf("version 1, created and modified at revision %d", it.create), fmt.Sprintf("version %d, modified at revision %d", it.version, it.mod)))
	}
	if it.lease != 0 {
		r.report(b, it, c, r.finding(LeasedKey, it, "etcd lease %x is attached: the entry would vanish with it", it.lease))
	}

	if c.key != nil && (c.unsure || it.seq > c.seq+1) && it.e.Signature.Name == c.w.name && it.e.Signature.KeyID != c.key.KeyHash() {
		// A rotation may be among what is gone, or not: nothing vouches for this key.
		r.log.add(with(r.finding(UntrustedKey, it, "after entries that are gone or cannot be read the chain goes on with a key that no entry gives it; signatures from here on are not checked"),
			keyName(c.key), sigName(&it.e.Signature)))
		c.key, c.unsure, c.unvouched = nil, false, true
	}
	if c.unvouched {
		r.unvouched++
	}
	if it.seq > c.seq+1 && it.err == nil && it.e.Chain == it.chain && it.e.Seq == it.seq {
		r.nameBefore(place{it.chain, it.seq - 1}, it.e.Prev)
	}
	if it.seq > c.seq+1 {
		c.missing = append(c.missing, seqRange{c.seq + 1, it.seq - 1})
		f := r.finding(Missing, it, "%s", gone(c.seq+1, it.seq-1))
		have := fmt.Sprintf("%d", it.seq)
		if c.seq > 0 {
			have = fmt.Sprintf("%d, %d", c.seq, it.seq)
		}
		r.report(b, it, c, with(f, fmt.Sprintf("seq %d", c.seq+1), "seq "+have))
		c.linked, c.unsure = false, true
	} else if it.seq <= c.seq {
		r.report(b, it, c, r.finding(Order, it, "it comes after seq %d of its chain", c.seq))
		return
	}

	var unknown bool
	switch {
	case it.err == nil:
		unknown = !it.e.Known()
	case errors.Is(it.err, entry.ErrVersion):
		unknown = true
	default:
		code := Malformed
		if isUnsigned(it.val) {
			code = Unsigned
		}
		r.log.add(r.finding(code, it, "%v", it.err))
		r.advance(c, it, false, true)
		c.unsure = true
		return
	}
	e := &it.e
	newer := it.err != nil // of a newer version: nothing but its signature is known
	linked := true
	if !newer {
		switch {
		case e.Chain != it.chain:
			r.report(b, it, c, with(r.finding(WrongChain, it, "it is an entry of another chain"), it.chain.String(), e.Chain.String()))
			linked = false
		case e.Seq != it.seq && r.signedByChain(c, it):
			c.strays = append(c.strays, stray{it.seq, e.Seq, it.hash, it.mod, it.ord})
			if r.second == nil {
				if r.moved == nil {
					r.moved = newMoved()
				}
				r.moved.want[place{it.chain, e.Seq}] = entry.Hash{}
				r.again = true
			}
			linked = false
		case e.Seq != it.seq:
			r.report(b, it, c, with(r.finding(Order, it, "it says another seq, and its signature does not hold"), fmt.Sprint(it.seq), fmt.Sprint(e.Seq)))
		}
	}
	if linked && !newer {
		r.link(b, c, it)
		if e.Revision >= it.mod || it.mod > r.snap.Revision {
			r.report(b, it, c, with(r.finding(Revision, it, "an entry is decided on before it is committed, and committed before it is read"),
				fmt.Sprintf("%d < commit %d <= %d", e.Revision, it.mod, r.snap.Revision), fmt.Sprintf("revision %d, commit %d", e.Revision, it.mod)))
		}
		if e.Revision < c.rev {
			r.report(b, it, c, with(r.finding(Revision, it, "the revision went back within the chain"), fmt.Sprintf("%d or more", c.rev), fmt.Sprint(e.Revision)))
		}
		r.clock(c, it)
	}
	if unknown {
		r.unknown++
		c.keyless = c.keyless || it.seq == 1
		f := r.finding(UnknownEntry, it, "this program knows the ledger's version, and in it no entry of this version or with this op")
		if r.meta.Version > keyspace.FormatVersion {
			c.unknown = true
			r.log.doubt(f)
		} else {
			r.log.add(f)
		}
		r.sign(b, it, c)
		r.advance(c, it, linked, true)
		return
	}
	if !linked || e.Seq != it.seq {
		// Changed bytes are named by the next entry's prev, a stray's are not.
		r.advance(c, it, linked, false)
		return
	}
	r.extend(b, c, it)
	r.advance(c, it, true, false)
}

// gone says which entries are missing.
func gone(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("entry %d is gone", from)
	}
	return fmt.Sprintf("entries %d to %d are gone", from, to)
}

func newMoved() *moved {
	return &moved{skip: map[int64]bool{}, late: map[place][]*item{}, used: map[*item]bool{}, want: map[place]entry.Hash{}, named: map[place]entry.Hash{}}
}

func with(f *Finding, want, got string) *Finding {
	f.Want, f.Got = want, got
	return f
}

// isUnsigned is whether stored bytes are an entry's text without a signature.
func isUnsigned(val []byte) bool {
	return bytes.HasPrefix(val, []byte("ipam-ledger/entry/v")) && !bytes.Contains(val, []byte("\n— "))
}

// chainOf finds or makes the chain of an entry's key; nil where the chain's ID
// belongs to another writer.
func (r *replay) chainOf(b *batch, it *item) *chain {
	if c := r.chains[it.chain]; c != nil {
		if c.w.name == it.writer {
			return c
		}
		id := it.writer + "/" + it.chain.String()
		if !r.shadows[id] {
			r.shadows[id] = true
			r.report(b, it, nil, with(r.finding(Equivocation, it, "a chain stands under two writers; its entries here are not replayed"), c.w.name, it.writer))
		}
		return nil
	}
	w := r.writer(it.writer)
	c := &chain{id: it.chain, w: w, before: w.chain, linked: true}
	r.chains[it.chain] = c
	w.chain = c
	return c
}

func (r *replay) writer(name string) *writer {
	w := r.writers[name]
	if w == nil {
		name = strings.Clone(name)
		kind, _, _ := strings.Cut(name, "/")
		w = &writer{name: name, kind: entry.Kind(kind)}
		r.writers[name] = w
	}
	return w
}

// advance makes it the chain's tip.
func (r *replay) advance(c *chain, it *item, linked, odd bool) {
	c.seq, c.hash, c.mod, c.put = it.seq, it.hash, it.mod, max(c.put, r.mod(it))
	c.stored = append(c.stored[:0], it.val...)
	c.parsed = it.err == nil || errors.Is(it.err, entry.ErrVersion)
	c.sigOf = it.e.Signature
	if c.parsed {
		c.sigOf.Name = c.w.name
		if it.e.Signature.Name != c.w.name {
			c.sigOf.Name = strings.Clone(it.e.Signature.Name)
		}
	}
	// The bytes of a malformed or unknown entry still have a hash that the
	// next one must name; those of a stray do not belong here.
	c.linked = linked || odd
	if it.err == nil && linked {
		c.rev, c.time = it.e.Revision, it.e.Time.UnixNano()
	}
}

// link checks that an entry names the bytes that stand before it. Where it does
// not, the signatures tell which of the two was changed.
func (r *replay) link(b *batch, c *chain, it *item) {
	if !c.linked || it.seq == 1 || it.e.Prev == c.hash {
		return
	}
	names := func(stored []byte, s *entry.Signature) bool { // a rotation is signed by the key before it
		return slices.ContainsFunc(c.keys, func(k note.Verifier) bool { return holds(stored, s, k, c.w.name) })
	}
	switch {
	case c.key == nil:
		r.log.add(with(r.finding(HashMismatch, it, "it names other bytes than entry %d has; without the chain's key it cannot be told which was changed", c.seq),
			c.hash.String(), it.e.Prev.String()))
	case !c.parsed || !names(c.stored, &c.sigOf):
		before := func(code Code, detail, want, got string) {
			r.log.add(&Finding{
				Code: code, Where: c.keyOf(c.seq), Writer: c.w.name, Chain: c.id.String(), Seq: c.seq, Revision: c.mod, order: it.ord,
				Detail: detail, Want: want, Got: got,
			})
		}
		r.nameBefore(place{c.id, c.seq}, it.e.Prev)
		r.again = true
		before(HashMismatch, fmt.Sprintf("its bytes are not those that entry %d names, and its signature does not hold: it was changed", it.seq), it.e.Prev.String(), c.hash.String())
		if c.parsed {
			before(BadSignature, notInForce, keyName(c.key), sigGot(&c.sigOf, c.key))
		}
	case !names(it.val, &it.e.Signature):
		r.report(b, it, c, with(r.finding(HashMismatch, it, "it names other bytes than entry %d has, and its signature does not hold: it was changed", c.seq),
			c.hash.String(), it.e.Prev.String()))
	default:
		r.report(b, it, c, with(r.finding(Fork, it, "it follows another entry %d than the one that stands before it, and both signatures hold: the chain was regrown with the key", c.seq),
			c.hash.String(), it.e.Prev.String()))
	}
}

const notInForce = "it is not signed by the key that was in force in its chain"

func (c *chain) keyOf(seq uint64) string {
	return "chains/" + c.w.name + "/" + c.id.String() + "/" + seqHex(seq)
}

func (c *chain) tip() entry.Ref { return entry.Ref{Chain: c.id, Seq: c.seq, Hash: c.hash} }

func seqHex(n uint64) string { return fmt.Sprintf("%016x", n) }

func keyName(k note.Verifier) string { return fmt.Sprintf("%s+%08x", k.Name(), k.KeyHash()) }

func sigName(s *entry.Signature) string {
	return fmt.Sprintf("%s+%08x", s.Name, s.KeyID)
}

// sigGot says whose signature there is where key's should be.
func sigGot(s *entry.Signature, key note.Verifier) string {
	if got := sigName(s); got != keyName(key) {
		return got
	}
	return "its signature over other bytes"
}

// holds is whether a signature is that of a writer's key over stored bytes.
func holds(stored []byte, s *entry.Signature, key note.Verifier, name string) bool {
	return s.Name == name && s.KeyID == key.KeyHash() && key.Verify(signedText(stored), s.Bytes[:])
}

func (r *replay) signedByChain(c *chain, it *item) bool {
	return slices.ContainsFunc(c.keys, func(k note.Verifier) bool { return holds(it.val, &it.e.Signature, k, c.w.name) })
}

// sign has an entry's signature checked, on some other goroutine.
func (r *replay) sign(b *batch, it *item, c *chain) {
	if n := len(b.sigs); c.key == nil || n > 0 && b.sigs[n-1].it == it {
		return
	}
	b.sigs = append(b.sigs, sigTask{it, c.key})
	c.signed = it.seq
}

// Clocks are never trusted; these are what a warning takes.
const (
	skewInChain = int64(time.Second)
	skewAcross  = int64(5 * time.Minute)
)

func (r *replay) clock(c *chain, it *item) {
	t := it.e.Time.UnixNano()
	if !c.skewed {
		var f *Finding
		switch {
		case c.time-t > skewInChain:
			f = with(r.finding(ClockSkew, it, "the writer's clock went back"), stamp(c.time)+" or later", stamp(t))
		case r.lastTip != nil && r.lastTip != c && r.lastTime-t > skewAcross:
			f = with(r.finding(ClockSkew, it, "its clock and that of %s, which committed before it, disagree", r.lastTip.w.name), stamp(r.lastTime)+" or later", stamp(t))
		case !r.snap.Taken.IsZero() && t-r.snap.Taken.UnixNano() > skewAcross:
			f = with(r.finding(ClockSkew, it, "the entry is from after this audit's own clock"), r.snap.Taken.UTC().Format(time.RFC3339)+" or earlier", stamp(t))
		}
		if f != nil {
			c.skewed = true
			r.log.warn(f)
		}
	}
	r.lastTime, r.lastTip = t, c
}

func stamp(ns int64) string { return time.Unix(0, ns).UTC().Format(time.RFC3339Nano) }

// extend replays an entry that stands where it belongs.
func (r *replay) extend(b *batch, c *chain, it *item) {
	e := &it.e
	if e.Op == entry.Open {
		r.open(b, c, it)
	}
	switch {
	case (c.closed || c.ended) && !c.extended:
		c.extended = true
		why := "after it was closed"
		if c.ended {
			why = "after another chain of the writer had followed it"
		}
		r.report(b, it, c, with(r.finding(Fork, it, "the chain goes on %s", why), fmt.Sprintf("entry %d is the last", c.seq), fmt.Sprintf("entry %d", it.seq)))
	case c.epoch != 0 && c.epoch < r.meta.Epoch && !c.stale && e.Op != entry.Open:
		c.stale = true
		r.report(b, it, c, with(r.finding(StaleEpoch, it, "the chain of an earlier epoch goes on after a recovery"), fmt.Sprintf("epoch %d", r.meta.Epoch), fmt.Sprintf("epoch %d", c.epoch)))
	}
	if c.key != nil {
		switch {
		case e.Signature.Name != c.w.name || e.Signature.KeyID != c.key.KeyHash():
			r.log.add(with(r.finding(BadSignature, it, notInForce), keyName(c.key), sigName(&e.Signature)))
		case r.all, e.Op == entry.Open, e.Op == entry.Rotate, e.Op == entry.Close, e.Op == entry.Meta, e.Op == entry.Recover:
			r.sign(b, it, c)
		}
	}
	if c.ahead != 0 && it.seq > 1 {
		if it.seq != 2 || e.Op != entry.Meta || e.Epoch != c.epoch || r.mod(it) != c.ahead {
			r.log.add(r.tooEarly(c))
		}
		c.ahead = 0
	}
	if e.Node != "" && c.w.kind != entry.KindOperator && (c.w.kind != entry.KindNode || e.Node != c.w.name[len("node/"):]) {
		r.report(b, it, c, with(r.finding(WrongNode, it, "it records what is another node's"), c.w.name, "node/"+e.Node))
	}
	switch e.Op {
	case entry.Rotate:
		r.rotate(b, c, it)
	case entry.Close:
		r.close(b, c, it)
	case entry.Acquire:
		r.nodeOnly(b, c, it)
		r.thawed(b, c, it)
		r.claim(b, c, it)
		r.acquire(b, c, it)
	case entry.Release:
		r.release(b, c, it)
	case entry.Claim:
		r.claim(b, c, it)
	case entry.Unclaim:
		r.unclaim(b, c, it)
	case entry.Pool:
		r.operatorOnly(b, c, it)
		r.pools[strings.Clone(e.Pool)] = &pool{spec: e.Spec, ref: r.ref(it), mod: r.mod(it)}
	case entry.Meta:
		r.metaEntry(b, c, it)
	case entry.Recover:
		r.nodeOnly(b, c, it)
		if e.Epoch != c.epoch {
			r.report(b, it, c, with(r.finding(StaleEpoch, it, "a recover entry of another epoch than its chain's"), fmt.Sprintf("epoch %d", c.epoch), fmt.Sprintf("epoch %d", e.Epoch)))
		}
		c.recover = r.ref(it)
	}
}

func (r *replay) operatorOnly(b *batch, c *chain, it *item) bool {
	if c.w.kind != entry.KindOperator {
		r.report(b, it, c, with(r.finding(WrongNode, it, "only an operator records %s", it.e.Op), "operator/…", c.w.name))
		return false
	}
	return true
}

func (r *replay) nodeOnly(b *batch, c *chain, it *item) {
	if c.w.kind != entry.KindNode {
		r.report(b, it, c, with(r.finding(WrongNode, it, "only a node records %s", it.e.Op), "node/…", c.w.name))
	}
}

// thawed judges an acquire by whether anybody may acquire: while the ledger is frozen
// a node may assert what it held before a restore, until its recover entry.
func (r *replay) thawed(b *batch, c *chain, it *item) {
	recovers := it.e.Assert == entry.AssertRecover
	switch {
	case recovers && !c.recover.IsZero():
		r.judge(b, it, c, with(r.finding(Frozen, it, "a node asserts what it held before a restore, and has recovered from that already"), "before "+c.recover.String(), r.ref(it).String()))
	case !recovers && r.meta.State == keyspace.Frozen:
		r.judge(b, it, c, with(r.finding(Frozen, it, "an address is acquired while nobody may"), "a ledger that is running", "frozen by "+r.meta.Entry.String()))
	}
}

// tooEarly is the finding about a chain of an epoch that it does not begin.
func (r *replay) tooEarly(c *chain) *Finding {
	return &Finding{
		Code: StaleEpoch, Where: c.keyOf(1), Writer: c.w.name, Chain: c.id.String(), Seq: 1, Revision: c.ahead, order: c.opened,
		Detail: "the chain is opened in a later epoch than the cluster's, and does not begin it",
		Want:   fmt.Sprintf("a meta entry of epoch %d, at revision %d", c.epoch, c.ahead), Got: "none",
	}
}

func (r *replay) open(b *batch, c *chain, it *item) {
	e := &it.e
	c.epoch, c.machine = e.Epoch, strings.Clone(e.Machine)
	if e.Writer.String() != c.w.name {
		r.report(b, it, c, with(r.finding(WrongChain, it, "the chain was opened by another writer"), c.w.name, e.Writer.String()))
	}
	switch {
	case r.cluster == "":
		r.cluster = strings.Clone(e.Cluster)
	case r.cluster != e.Cluster:
		r.report(b, it, c, with(r.finding(WrongChain, it, "the chain was opened in another cluster"), r.cluster, e.Cluster))
	}
	if e.Writer.String() == c.w.name {
		r.useKey(c, e.Key)
		c.trusted = r.ring == nil || r.ring.Contains(e.Key) || r.trusted[e.Key]
		if !c.trusted {
			r.report(b, it, c, with(r.finding(UntrustedKey, it, "the chain is opened with a key that is not among the trusted ones"), "a key of the key file", c.keyText))
		}
	}
	// Of a later epoch is only the operator's chain that begins it, in the same
	// transaction.
	switch {
	case e.Epoch > r.meta.Epoch && c.w.kind == entry.KindOperator:
		c.ahead, c.opened = r.mod(it), it.ord
	case e.Epoch != r.meta.Epoch:
		r.report(b, it, c, with(r.finding(StaleEpoch, it, "the chain is opened in another epoch than the cluster's"), fmt.Sprintf("epoch %d", r.meta.Epoch), fmt.Sprintf("epoch %d", e.Epoch)))
	}

	before := c.before
	if before == nil {
		if p := e.Predecessor; !p.IsZero() {
			r.report(b, it, c, with(r.finding(Missing, it, "the chain that it continues is gone"), p.String(), ""))
		}
	} else {
		before.ended = true
		tip := before.tip()
		switch {
		case e.Predecessor.Chain == before.id && e.Predecessor.Seq > before.seq:
			before.missing = append(before.missing, seqRange{before.seq + 1, e.Predecessor.Seq})
			r.report(b, it, c, with(r.finding(Missing, it, "%s of the chain that it continues", gone(before.seq+1, e.Predecessor.Seq)), e.Predecessor.String(), tip.String()))
		case e.Predecessor != tip:
			r.report(b, it, c, with(r.finding(Fork, it, "it does not continue the writer's chain %s where that ends", before.id.Short()), tip.String(), e.Predecessor.String()))
		case !before.closed && before.epoch >= e.Epoch:
			r.report(b, it, c, r.finding(Fork, it, "a second chain beside %s, which was not closed and is not of an earlier epoch", before.id.Short()))
		case before.closer.IsZero() && before.key != nil && e.Key != before.keyText:
			r.report(b, it, c, with(r.finding(Fork, it, "it continues %s with another key, and no operator closed that", before.id.Short()), before.keyText, e.Key))
		}
	}
	if m := e.Mark; !m.IsZero() {
		switch p := e.Predecessor; {
		case m.Chain != p.Chain:
			r.log.note("epoch %d: %s lost entries at a restore: it remembers chain %s up to %d", e.Epoch, c.w.name, m.Chain.Short(), m.Seq)
		case m.Seq > p.Seq:
			r.log.note("epoch %d: %s lost entries %d..%d of chain %s at a restore", e.Epoch, c.w.name, p.Seq+1, m.Seq, m.Chain.Short())
		case m.Seq == p.Seq && m.Hash != p.Hash:
			r.report(b, it, c, with(r.finding(Fork, it, "the writer remembers another entry %d than the store had at the restore", m.Seq), m.String(), p.String()))
		}
	}
}

func (r *replay) useKey(c *chain, vkey string) {
	vkey = strings.Clone(vkey)
	v, err := note.NewVerifier(vkey)
	if err != nil { // the entry's parser has checked it
		c.key = nil
		return
	}
	c.key, c.keyText = v, vkey
	c.keys = append(c.keys, v)
}

// had is whether the chain has had a key.
func (c *chain) had(vkey string) bool {
	v, err := note.NewVerifier(vkey)
	return err == nil && slices.ContainsFunc(c.keys, func(k note.Verifier) bool { return k.KeyHash() == v.KeyHash() })
}

func (r *replay) rotate(b *batch, c *chain, it *item) {
	name, _, _ := strings.Cut(it.e.Key, "+")
	if name != c.w.name {
		r.report(b, it, c, with(r.finding(UntrustedKey, it, "the new key is another writer's"), c.w.name, name))
		return
	}
	if c.had(it.e.Key) {
		r.report(b, it, c, with(r.finding(UntrustedKey, it, "the new key is one that the chain has had"), "another key", it.e.Key))
		return
	}
	r.useKey(c, it.e.Key)
	if c.trusted && r.ring != nil {
		r.trusted[c.keyText] = true
	}
}

func (r *replay) close(b *batch, c *chain, it *item) {
	e := &it.e
	if e.Writer.String() == c.w.name && e.Closes.Chain == c.id {
		if e.Closes.Seq != it.seq-1 || e.Closes.Hash != e.Prev {
			r.report(b, it, c, with(r.finding(Fork, it, "it closes its own chain at another entry than the one before it"),
				entry.Ref{Chain: c.id, Seq: it.seq - 1, Hash: e.Prev}.String(), e.Closes.String()))
		}
		c.closed = true
		return
	}
	r.operatorOnly(b, c, it)
	w := r.writers[e.Writer.String()]
	var t *chain
	if w != nil {
		t = w.chain
	}
	if t == nil || e.Closes != t.tip() {
		got := ""
		if t != nil {
			got = t.tip().String()
		}
		code := Fork
		if t == nil || t.id == e.Closes.Chain && t.seq < e.Closes.Seq {
			code = Missing
		}
		r.report(b, it, c, with(r.finding(code, it, "it closes the chain of %s where that does not end", e.Writer), e.Closes.String(), got))
		if t == nil || t.id != e.Closes.Chain {
			return
		}
	} else {
		t.closer, t.removed, t.put = r.ref(it), e.Remove, max(t.put, r.mod(it))
	}
	t.closed = true
}

func (r *replay) metaEntry(b *batch, c *chain, it *item) {
	e := &it.e
	if !r.operatorOnly(b, c, it) {
		return // a node's key changes nobody's version or epoch
	}
	if e.Epoch < r.meta.Epoch {
		r.report(b, it, c, with(r.finding(StaleEpoch, it, "the cluster's epoch went back"), fmt.Sprintf("%d or more", r.meta.Epoch), fmt.Sprint(e.Epoch)))
	}
	if r.cluster != "" && e.Cluster != r.cluster {
		r.report(b, it, c, with(r.finding(WrongChain, it, "the entry is about another cluster"), r.cluster, e.Cluster))
	}
	if e.Version < keyspace.FormatVersion {
		r.report(b, it, c, with(r.finding(UnknownEntry, it, "the ledger is of an older version than this program reads"), fmt.Sprint(keyspace.FormatVersion), fmt.Sprint(e.Version)))
	}
	r.meta.Meta = keyspace.Meta{
		Version: int(e.Version), Cluster: strings.Clone(e.Cluster), EtcdCluster: strings.Clone(e.EtcdCluster), Epoch: max(e.Epoch, r.meta.Epoch),
		State: keyspace.State(strings.Clone(e.State)), Recovering: e.Recovering, Entry: r.ref(it),
	}
	r.meta.mod, r.meta.set = r.mod(it), true
}

// intern numbers a name. The chain remembers what it named last: most chains
// name one space, pool and node only.
func (r *replay) intern(c *internCache, s string) uint32 {
	if c.s == s {
		return c.id
	}
	id, ok := r.nameIDs[s]
	if !ok {
		s = strings.Clone(s)
		r.names = append(r.names, s)
		id = uint32(len(r.names))
		r.nameIDs[s] = id
	}
	c.s, c.id = r.names[id-1], id
	return id
}

func (r *replay) name(id uint32) string { return r.names[id-1] }

// internSubnet numbers a subnet.
func (r *replay) internSubnet(a *entry.Address) uint32 {
	s := subnet{a.Bits, a.Gateway, a.Range}
	id, ok := r.subnetIDs[s]
	if !ok {
		id = uint32(len(r.subnets))
		r.subnets = append(r.subnets, s)
		r.subnetIDs[s] = id
	}
	return id
}

// lookup is intern that adds nothing: 0 for a name never seen.
func (r *replay) lookup(s string) uint32 { return r.nameIDs[s] }

// findAddr returns the number of an address that was ever named.
func (r *replay) findAddr(space uint32, ip netip.Addr) (id uint32, ok bool) {
	if ip.Is4() {
		id, ok = r.addrs4[key4(space, ip)]
	} else {
		id, ok = r.addrs6[addrKey{ip, space}]
	}
	return id, ok
}

func (r *replay) addr(space uint32, ip netip.Addr) uint32 {
	id, ok := r.findAddr(space, ip)
	if !ok {
		id = uint32(len(r.addrs))
		r.addrs = append(r.addrs, address{})
		if ip.Is4() {
			r.addrs4[key4(space, ip)] = id
		} else {
			r.addrs6[addrKey{ip, space}] = id
		}
	}
	return id
}

func key4(space uint32, ip netip.Addr) uint64 {
	a := ip.As4()
	return uint64(space)<<32 | uint64(binary.BigEndian.Uint32(a[:]))
}

// eachAddr calls f with every address that was ever named.
func (r *replay) eachAddr(f func(space string, ip netip.Addr, a *address)) {
	for k, id := range r.addrs4 {
		f(r.name(uint32(k>>32)), netip.AddrFrom4([4]byte{byte(k >> 24), byte(k >> 16), byte(k >> 8), byte(k)}), &r.addrs[id])
	}
	for k, id := range r.addrs6 {
		f(r.name(k.space), k.ip, &r.addrs[id])
	}
}

// attKey builds the key of an attachment in scratch.
func (r *replay) attKey(e *entry.Entry) []byte {
	k := append(r.scratch[:0], e.Node...)
	k = append(k, '/')
	k = append(k, e.Network...)
	k = append(k, '/')
	k = append(k, e.Container...)
	k = append(k, '/')
	k = append(k, e.Interface...)
	r.scratch = k
	return k
}

// findAtt returns the live attachment with a key, or 0.
func (r *replay) findAtt(key []byte, h uint64) uint32 {
	for i := r.attIDs[h]; i != 0; i = r.atts[i].next {
		if bytes.Equal(r.atts[i].key(), key) {
			return i
		}
	}
	return 0
}

func (r *replay) newAtt(key []byte, h uint64) uint32 {
	i := r.attFree
	if i != 0 {
		r.attFree = r.atts[i].next
	} else {
		i = uint32(len(r.atts))
		r.atts = append(r.atts, attachment{})
	}
	a := &r.atts[i]
	a.text, a.pod, a.hash, a.next, a.live = append(a.text[:0], key...), uint16(len(key)), h, r.attIDs[h], true
	r.attIDs[h] = i
	r.live++
	return i
}

// dropAtt forgets an attachment.
func (r *replay) dropAtt(i uint32) {
	r.unlist(i)
	r.atts[i].next, r.attFree = r.attFree, i
}

// leftBy is the attachment that acquired again after an acquire, 0 if none did.
func (r *replay) leftBy(acquire entry.Ref) uint32 {
	if len(r.left) == 0 {
		return 0
	}
	return r.left[acquire]
}

// unlist makes an attachment one that is not live.
func (r *replay) unlist(i uint32) {
	a := &r.atts[i]
	if r.attIDs[a.hash] == i {
		if a.next == 0 {
			delete(r.attIDs, a.hash)
		} else {
			r.attIDs[a.hash] = a.next
		}
	} else {
		p := r.attIDs[a.hash]
		for r.atts[p].next != i {
			p = r.atts[p].next
		}
		r.atts[p].next = a.next
	}
	a.live = false
	r.live--
}

func (r *replay) acquire(b *batch, c *chain, it *item) {
	e := &it.e
	space, pool := r.intern(&c.names[0], e.Space), r.intern(&c.names[1], e.Pool)
	key := r.attKey(e)
	h := maphash.Bytes(r.seed, key)
	i := r.findAtt(key, h)
	if i != 0 {
		r.judge(b, it, c, with(r.finding(DoubleLease, it, "attachment %s acquires while it holds a lease already", key), "no open acquire", r.atts[i].acquire.String()))
		r.unlist(i)
		r.left[r.atts[i].acquire] = i
	}
	i = r.newAtt(key, h)
	att := &r.atts[i]
	att.space, att.pool, att.acquire, att.cooldown, att.mod = space, pool, r.ref(it), int32(e.Cooldown), r.mod(it)
	att.text = append(append(att.text[:att.pod], e.Pod...), e.PodUID...)
	att.uid = att.pod + uint16(len(e.Pod))
	att.leases = att.leases[:0]
	for n := range e.Addresses {
		a := &e.Addresses[n]
		r.permitted(b, c, it, a)
		id := r.addr(space, a.IP)
		s := &r.addrs[id]
		switch {
		case s.leased:
			r.judge(b, it, c, with(r.finding(DoubleAlloc, it, "%s in space %s is acquired for %s while %s holds it", a.IP, e.Space, key, r.atts[s.att].key()),
				"held by "+s.ref.String(), "acquired by "+r.ref(it).String()))
			r.robbed[robbed{s.ref, id}] = true
			s.unknown = s.unknown || r.unknownChain(a.After.Chain)
		case a.After != s.ref:
			r.judge(b, it, c, with(r.finding(BrokenHistory, it, "the acquire of %s in space %s does not follow its last release", a.IP, e.Space), refText(s.ref), refText(a.After)))
		case e.Assert == "" && keyspace.Cooling(s.released(), e.Time, int64(s.cooldown)):
			r.judge(b, it, c, with(r.finding(TooSoon, it, "%s in space %s was released at %s with a cooldown of %d seconds", a.IP, e.Space, s.released().Format(time.RFC3339Nano), s.cooldown),
				fmt.Sprintf("a time at least %d seconds away", s.cooldown), e.Time.Format(time.RFC3339Nano)))
		}
		if !s.leased {
			r.leased++
		}
		s.leased, s.ref, s.mod, s.pool, s.att, s.cooldown = true, att.acquire, att.mod, pool, i, att.cooldown
		att.leases = append(att.leases, lease{a.IP, id, r.internSubnet(a)})
	}
}

// permitted judges an address by what its own acquire says.
func (r *replay) permitted(b *batch, c *chain, it *item, a *entry.Address) {
	addresses := it.e.Addresses
	outside := func(why string) {
		r.report(b, it, c, with(r.finding(OutsidePool, it, "%s is %s", a.IP, why), "an address that a pool hands out", fmt.Sprintf("%v/%d", a.IP, a.Bits)))
	}
	if why := keyspace.Reserved(a.IP, netip.PrefixFrom(a.IP, a.Bits)); why != "" {
		outside(why)
	}
	if slices.ContainsFunc(addresses, func(o entry.Address) bool { return o.Gateway == a.IP }) {
		outside("a gateway")
	}
	for i := range addresses {
		if o := &addresses[i]; o.IP != a.IP && o.Range.Contains(a.IP) {
			r.report(b, it, c, with(r.finding(DoubleLease, it, "%s is of the range that %s is of as well (I2)", a.IP, o.IP), "one address of "+o.Range.String(), fmt.Sprintf("%v and %v", o.IP, a.IP)))
			break
		}
	}
}

func refText(r entry.Ref) string {
	if r.IsZero() {
		return "never held"
	}
	return r.String()
}

func (r *replay) release(b *batch, c *chain, it *item) {
	e := &it.e
	space := r.intern(&c.names[0], e.Space)
	pool := r.intern(&c.names[1], e.Pool)
	key := r.attKey(e)
	ids := r.ids[:0]
	for n := range e.Addresses {
		ids = append(ids, r.addr(space, e.Addresses[n].IP))
	}
	r.ids = ids
	same := func(l lease, id uint32) bool { return l.addr == id }
	// The address knows who holds it, which is nearly always who releases it.
	i := r.addrs[ids[0]].att
	if a := &r.atts[i]; i == 0 || !a.live || !bytes.Equal(a.key(), key) {
		i = r.findAtt(key, maphash.Bytes(r.seed, key))
	}
	if l := r.leftBy(e.Acquire); l != 0 && bytes.Equal(r.atts[l].key(), key) && (i == 0 || r.atts[i].acquire != e.Acquire) {
		i = l
	}
	switch {
	case i == 0:
		r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "attachment %s holds nothing", key), "an open acquire", e.Acquire.String()))
	case r.atts[i].acquire != e.Acquire:
		r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "attachment %s holds by another acquire", key), r.atts[i].acquire.String(), e.Acquire.String()))
	case !r.changed(e.Acquire) && (r.atts[i].space != space || r.atts[i].pool != pool || !r.atts[i].says(e.Pod, e.PodUID)):
		r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "attachment %s holds in another space or pool, or for another pod", key),
			fmt.Sprintf("%s/%s %q", r.name(r.atts[i].space), r.name(r.atts[i].pool), r.atts[i].text[r.atts[i].pod:]), fmt.Sprintf("%s/%s %q", e.Space, e.Pool, e.Pod+e.PodUID)))
	case !slices.EqualFunc(r.atts[i].leases, ids, same):
		r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "attachment %s holds other addresses", key), fmt.Sprint(r.atts[i].ips()), fmt.Sprint(addresses(e))))
	}
	for n, id := range ids {
		s := &r.addrs[id]
		if !s.leased || s.ref != e.Acquire {
			if i != 0 && r.atts[i].acquire == e.Acquire && !r.robbed[robbed{e.Acquire, id}] {
				r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "%s in space %s is not held by that acquire", e.Addresses[n].IP, e.Space), refText(s.ref), e.Acquire.String()))
			}
			continue
		}
		s.leased, s.ref, s.mod, s.pool = false, r.ref(it), r.mod(it), pool
		s.since, s.nanos = e.Time.Unix(), int32(e.Time.Nanosecond())
		r.leased--
	}
	switch {
	case i == 0 || r.atts[i].acquire != e.Acquire:
	case r.atts[i].live:
		r.dropAtt(i)
	default:
		delete(r.left, e.Acquire)
	}
}

func addresses(e *entry.Entry) (out []netip.Addr) {
	for i := range e.Addresses {
		out = append(out, e.Addresses[i].IP)
	}
	return out
}

func (r *replay) claim(b *batch, c *chain, it *item) {
	e := &it.e
	for _, p := range e.Blocks {
		k := blockKey{r.intern(&c.names[0], e.Space), r.intern(&c.names[1], e.Pool), p}
		if had := r.blocks[k]; had != nil {
			r.judge(b, it, c, with(r.finding(DoubleClaim, it, "block %s of pool %s in space %s is claimed for %s while %s has it", p, e.Pool, e.Space, e.Node, r.name(had.node)),
				"held by "+had.claim.String(), "claimed by "+r.ref(it).String()))
		}
		r.blocks[k] = &block{node: r.intern(&c.names[2], e.Node), claim: r.ref(it), mod: r.mod(it)}
	}
}

func (r *replay) unclaim(b *batch, c *chain, it *item) {
	e := &it.e
	for _, p := range e.Blocks {
		k := blockKey{r.intern(&c.names[0], e.Space), r.intern(&c.names[1], e.Pool), p}
		had := r.blocks[k]
		if had == nil || r.name(had.node) != e.Node {
			got := "nobody's"
			if had != nil {
				got = r.name(had.node) + "'s"
			}
			r.judge(b, it, c, with(r.finding(ReleaseNoHold, it, "block %s of pool %s in space %s is given back for %s, which does not have it", p, e.Pool, e.Space, e.Node), e.Node+"'s", got))
			continue
		}
		delete(r.blocks, k)
	}
}

// finish replays what is left of the moved entries and names those that found
// no place.
func (r *replay) finish(b *batch) {
	if m := r.second; m != nil {
		for _, it := range m.early {
			r.restore(b, it)
		}
		left := slices.Clone(m.items)
		slices.SortStableFunc(left, func(x, y *item) int {
			switch {
			case x.seq < y.seq:
				return -1
			case x.seq > y.seq:
				return 1
			}
			return 0
		})
		for _, it := range left {
			if m.used[it] {
				continue
			}
			if c := r.chains[it.chain]; c == nil || c.w.name == it.writer && it.seq > c.seq {
				r.replayMoved(b, it)
				continue
			}
			m.used[it] = true
			r.entries++
			stands := m.want[place{it.chain, it.seq}]
			if c := r.chains[it.chain]; c.w.name != it.writer {
				r.chainOf(b, it)
			} else if stands == it.hash {
				r.log.add(r.finding(Replay, it, "the entry is there twice"))
			} else {
				r.report(b, it, c, with(r.finding(Equivocation, it, "two different entries for one place"), stands.String(), it.hash.String()))
			}
		}
	}
	var cc []*chain
	for _, c := range r.chains {
		cc = append(cc, c)
	}
	slices.SortFunc(cc, func(x, y *chain) int { return bytes.Compare(x.id[:], y.id[:]) })
	for _, c := range cc {
		if c.ahead != 0 {
			r.log.add(r.tooEarly(c))
		}
		r.strays(c)
	}
}

func (r *replay) keyless() (n int) {
	for _, c := range r.chains {
		if c.keyless {
			n++
		}
	}
	return n
}

// strays tells entries that change places from entries that stand twice.
func (r *replay) strays(c *chain) {
	for _, s := range c.strays {
		f := &Finding{
			Code: Order, Where: c.keyOf(s.at), Writer: c.w.name, Chain: c.id.String(), Seq: s.at, Revision: s.mod, order: s.ord,
			Want: fmt.Sprintf("seq %d", s.at), Got: fmt.Sprintf("seq %d", s.says),
		}
		swapped := slices.ContainsFunc(c.strays, func(o stray) bool { return o.at == s.says })
		empty := s.says > c.seq || slices.ContainsFunc(c.missing, func(m seqRange) bool { return m.from <= s.says && s.says <= m.to })
		var stands entry.Hash
		if r.second != nil {
			stands = r.second.want[place{c.id, s.says}]
		}
		switch {
		case swapped:
			f.Detail = "it is another entry of the chain, whose place holds another one again: they changed places"
		case empty:
			f.Detail = "it is another entry of the chain, whose own place is empty: it was moved"
		case stands == s.hash:
			f.Code = Replay
			f.Detail = fmt.Sprintf("it is a duplicate of entry %d", s.says)
		default:
			f.Code = Equivocation
			f.Detail = fmt.Sprintf("it is signed as entry %d, and so is another", s.says)
			f.Want, f.Got = stands.String(), s.hash.String()
		}
		r.log.add(f)
	}
}
