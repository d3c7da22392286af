package publish

import (
	"cmp"
	"container/heap"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// Model counts what the live keys say. It is a pure function of the keys that
// were put and not deleted since: the order in which that happened, and how
// often, leave no trace but the trend. It is used by one goroutine at a time.
//
// A pool of both families is shown by the fuller one, for an address of each is
// needed and the sum would hide behind IPv6's plenty that IPv4 has run out.
//
// Memory is about 150 bytes a lease and does not grow with the number of changes
// ('make bench-desktop' measures it).
type Model struct {
	keys keyspace.Keys
	meta *keyspace.Meta
	stop map[string]bool // by node

	specs  map[string]*spec // by name
	ids    map[poolID]uint32
	pools  []*pool // of ids; one that has nothing any more stays, and is not shown
	spaces map[string]uint32
	addrs  map[addrKey]addrValue
	until  expiries
	now    int64 // the latest time that holds were judged by

	seed        maphash.Seed
	attachments map[uint64]uint32 // hash of the key: index of shapes
	shapeOf     map[string]uint32
	shapes      []shape

	writers map[string]bool // nodes with a chain

	live  bool // loaded: changes from now on make trends
	since time.Time
}

type poolID struct{ space, name string }

// spec is a named pool's, as far as it can be read.
type spec struct {
	id       poolID
	set      *netipx.IPSet // what may be handed out
	capacity [2]uint64     // as 'ledger show' counts it
}

// pool is one pool; what belongs to a family is in that.
type pool struct {
	id     poolID
	claims map[netip.Prefix]*claim
	// used counts the leased and held addresses of every aligned prefix of a
	// length that a claim has, claimed or not: so it does not matter whether a
	// block or its addresses are seen first.
	used   map[netip.Prefix]uint64
	shapes map[uint32]int // of live attachments
	fam    [2]family      // v4, v6

	dirty bool // capacities and claims' rooms are to be worked out again
	named bool
}

// claim is a block.
type claim struct {
	node string
	room uint64 // what may be handed out of it
}

type family struct {
	lengths      map[int]int // of claimed blocks' prefixes, with their number
	leased, held uint64
	capacity     uint64 // of an inline pool, what its blocks and leases show
	samples      []sample
}

// sample is how many addresses were leased from a time on.
type sample struct {
	at     time.Time
	leased uint64
}

// shape is what an attachment shows of its pool: subnets and gateways.
type shape struct {
	pool    uint32
	leases  []keyspace.Lease // addresses are masked
	present int              // attachments of this shape
}

type addrKey struct {
	ip    [16]byte
	space uint32
}

type addrValue struct {
	pool  uint32
	until uint32 // unix seconds: held until then; 0 free, leased
}

const leased = math.MaxUint32

// NewModel returns a Model of no keys.
func NewModel(keys keyspace.Keys) *Model {
	return &Model{
		keys: keys, stop: map[string]bool{}, specs: map[string]*spec{}, ids: map[poolID]uint32{}, spaces: map[string]uint32{},
		addrs: map[addrKey]addrValue{}, seed: maphash.MakeSeed(), attachments: map[uint64]uint32{}, shapeOf: map[string]uint32{},
		writers: map[string]bool{},
	}
}

// Loaded ends the loading: changes from now on make trends. Those of an earlier
// Model go on, where there is one.
func (m *Model) Loaded(now time.Time, old *Model) {
	m.live, m.since = true, now
	if old == nil || !old.live {
		return
	}
	m.since = old.since
	for id, i := range m.ids {
		j, ok := old.ids[id]
		for f := range 2 {
			p := &m.pools[i].fam[f]
			if ok {
				p.samples = slices.Clone(old.pools[j].fam[f].samples)
			}
			before := uint64(0)
			if ok {
				before = old.pools[j].fam[f].leased
			}
			p.note(now, m.since, before)
		}
	}
}

// Meta is the cluster's meta key, nil where there is none or it cannot be read.
func (m *Model) Meta() *keyspace.Meta { return m.meta }

// Put takes a key's new value. Keys and values that cannot be read count for
// nothing, except that a stop is a stop whatever it says. The record's memory
// is not kept.
func (m *Model) Put(r audit.Record, now time.Time) { m.change(r.Key, r.Value, now) }

// Delete takes a key's end.
func (m *Model) Delete(key string, now time.Time) { m.change(key, nil, now) }

func (m *Model) change(key string, value []byte, now time.Time) {
	rel, ok := strings.CutPrefix(key, m.keys.Prefix())
	if !ok || strings.HasPrefix(rel, "chains/") {
		return
	}
	k, err := m.keys.Parse(strings.Clone(key))
	if err != nil {
		return
	}
	switch k.Kind {
	case "meta":
		if m.meta = decode[keyspace.Meta](value); m.meta != nil && m.meta.Validate() != nil {
			m.meta = nil
		}
	case "stops":
		if delete(m.stop, k.Name); value != nil {
			m.stop[k.Name] = true
		}
	case "pools":
		m.spec(k.Name, decode[keyspace.Pool](value))
	case "addresses":
		m.address(k.Space, k.IP, decode[keyspace.Address](value), now)
	case "attachments":
		m.attachment(key, decode[keyspace.Attachment](value))
	case "blocks":
		m.block(k.Block, decode[keyspace.Block](value))
	case "writers":
		if k.Writer.Kind == entry.KindNode {
			if delete(m.writers, k.Writer.Name); value != nil {
				m.writers[k.Writer.Name] = true
			}
		}
	}
}

// decode returns nil where there is no value, or none that can be read.
func decode[T any](value []byte) *T {
	if value == nil {
		return nil
	}
	v := new(T)
	if keyspace.Decode(value, v) != nil {
		return nil
	}
	return v
}

func (m *Model) pool(space, name string) (uint32, *pool) {
	id := poolID{space, name}
	i, ok := m.ids[id]
	if !ok {
		i = uint32(len(m.pools))
		p := &pool{
			id:     poolID{strings.Clone(space), strings.Clone(name)},
			claims: map[netip.Prefix]*claim{}, used: map[netip.Prefix]uint64{}, shapes: map[uint32]int{}, dirty: true,
		}
		for f := range p.fam {
			p.fam[f].lengths = map[int]int{}
		}
		m.ids[p.id] = i
		m.pools = append(m.pools, p)
	}
	return i, m.pools[i]
}

func familyOf(ip netip.Addr) int {
	if ip.Is4() {
		return 0
	}
	return 1
}

func (m *Model) spec(name string, v *keyspace.Pool) {
	if old := m.specs[name]; old != nil {
		_, p := m.pool(old.id.space, name)
		p.dirty = true
		delete(m.specs, name)
	}
	if v == nil {
		return
	}
	ready, err := allocator.PoolFromSpec(name, v)
	if err != nil {
		return
	}
	var b netipx.IPSetBuilder
	for _, ranges := range v.Ranges {
		for _, r := range ranges {
			b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
		}
	}
	for _, ranges := range v.Ranges {
		for _, r := range ranges {
			special(&b, r.Subnet, r.Gateway)
		}
	}
	for _, x := range v.Exclude { // each has been read by PoolFromSpec
		if p, err := netip.ParsePrefix(x); err == nil {
			b.RemovePrefix(p.Masked())
		} else if ip, err := netip.ParseAddr(x); err == nil {
			b.Remove(ip)
		} else if r, err := netipx.ParseIPRange(x); err == nil {
			b.RemoveRange(r)
		}
	}
	set, err := b.IPSet()
	if err != nil {
		return
	}
	_, p := m.pool(ready.Space, name)
	p.dirty = true
	m.specs[name] = &spec{id: p.id, set: set}
	for i := range ready.Sets {
		if spans := ready.Sets[i].Spans(); len(spans) > 0 { // all of one family
			c := &m.specs[name].capacity[familyOf(spans[0].From())]
			*c = add(*c, ready.Sets[i].Size())
		}
	}
}

// special takes out what is never handed out: the network's own address (in v6
// the routers' anycast), broadcast, gateway.
func special(b *netipx.IPSetBuilder, subnet netip.Prefix, gateway netip.Addr) {
	b.Remove(subnet.Masked().Addr())
	if subnet.Addr().Is4() {
		b.Remove(netipx.PrefixLastIP(subnet))
	}
	if gateway.IsValid() {
		b.Remove(gateway)
	}
}

func (m *Model) address(space string, ip netip.Addr, v *keyspace.Address, now time.Time) {
	s, ok := m.spaces[space]
	if !ok {
		s = uint32(len(m.spaces))
		m.spaces[strings.Clone(space)] = s
	}
	key := addrKey{ip.As16(), s}
	old, had := m.addrs[key]
	if had {
		m.count(old, ip, -1, now)
		delete(m.addrs, key)
	}
	if v == nil || entry.ValidateName("pool", v.Pool) != nil {
		return
	}
	i, _ := m.pool(space, v.Pool)
	at := addrValue{pool: i}
	switch {
	case v.State == keyspace.Leased && v.Holder != nil:
		at.until = leased
	case v.State == keyspace.Free && v.Cooldown > 0 && v.Since.Sub(now) < v.Until().Sub(v.Since): // not by a clock that was far ahead
		// To the second, and never too early.
		at.until = uint32(min(max(0, v.Until().Add(time.Second-1).Unix()), leased-1))
		if int64(at.until) <= m.now {
			at.until = 0 // over
		} else {
			heap.Push(&m.until, expiry{at.until, key})
		}
	case v.State != keyspace.Free:
		return
	}
	m.addrs[key] = at
	m.count(at, ip, 1, now)
}

// count adds an address to its pool and blocks, or takes it away.
func (m *Model) count(v addrValue, ip netip.Addr, by int, now time.Time) {
	if v.until == 0 {
		return
	}
	p := m.pools[v.pool]
	f := &p.fam[familyOf(ip)]
	if v.until == leased {
		before := f.leased
		f.leased += uint64(by)
		if m.live {
			f.note(now, m.since, before)
		}
	} else {
		f.held += uint64(by)
	}
	for n := range f.lengths {
		p.use(netip.PrefixFrom(ip, n).Masked(), by)
	}
}

func (p *pool) use(b netip.Prefix, by int) {
	n := p.used[b] + uint64(by)
	if n == 0 {
		delete(p.used, b)
		return
	}
	p.used[b] = n
}

func (m *Model) block(id keyspace.BlockID, v *keyspace.Block) {
	if entry.ValidateName("space", id.Space) != nil || entry.ValidateName("pool", id.Pool) != nil {
		return
	}
	i, p := m.pool(id.Space, id.Pool)
	f := &p.fam[familyOf(id.Prefix.Addr())]
	n := id.Prefix.Bits()
	if _, had := p.claims[id.Prefix]; had {
		delete(p.claims, id.Prefix)
		if f.lengths[n]--; f.lengths[n] == 0 {
			delete(f.lengths, n)
			for b := range p.used {
				if b.Bits() == n && familyOf(b.Addr()) == familyOf(id.Prefix.Addr()) {
					delete(p.used, b)
				}
			}
		}
	}
	p.dirty = true
	if v == nil {
		return
	}
	p.claims[id.Prefix] = &claim{node: v.Node}
	if f.lengths[n]++; f.lengths[n] > 1 {
		return
	}
	// The first block of its length, which is rare: count its like anew.
	for key, at := range m.addrs {
		if at.pool != i || at.until == 0 {
			continue
		}
		if ip := netip.AddrFrom16(key.ip).Unmap(); familyOf(ip) == familyOf(id.Prefix.Addr()) {
			p.use(netip.PrefixFrom(ip, n).Masked(), 1)
		}
	}
}

func (m *Model) attachment(key string, v *keyspace.Attachment) {
	// The keys themselves would be most of the memory. That two of a hundred
	// thousand have one hash has a chance of one in four thousand million; it
	// would cost an inline pool a subnet, until the next full read.
	h := maphash.String(m.seed, key)
	if i, had := m.attachments[h]; had {
		delete(m.attachments, h)
		s := &m.shapes[i]
		if s.present--; s.present == 0 {
			delete(m.pools[s.pool].shapes, i)
			m.pools[s.pool].dirty = true
		}
	}
	if v == nil || entry.ValidateName("space", v.Space) != nil || entry.ValidateName("pool", v.Pool) != nil {
		return
	}
	name := v.Space + "/" + v.Pool
	leases := make([]keyspace.Lease, 0, len(v.Leases))
	for _, l := range v.Leases {
		l.Address = l.Address.Masked()
		if !l.Address.IsValid() {
			continue
		}
		leases = append(leases, l)
		name += " " + l.Address.String() + " " + l.Gateway.String()
	}
	i, ok := m.shapeOf[name]
	if !ok {
		pool, _ := m.pool(v.Space, v.Pool)
		i = uint32(len(m.shapes))
		m.shapes = append(m.shapes, shape{pool: pool, leases: leases})
		m.shapeOf[name] = i
	}
	m.attachments[h] = i
	s := &m.shapes[i]
	if s.present++; s.present == 1 {
		p := m.pools[s.pool]
		p.shapes[i] = 1
		p.dirty = true
	}
}

// settle works out what a pool may hand out. For an inline pool, whose ranges
// stand in the nodes' configurations, that is the subnets that its leases show,
// and never less than what is claimed.
func (m *Model) settle(p *pool) {
	if !p.dirty {
		return
	}
	p.dirty, p.named = false, false
	var set *netipx.IPSet
	if s := m.specs[p.id.name]; s != nil && s.id == p.id {
		p.named, set = true, s.set
		for f := range p.fam {
			p.fam[f].capacity = s.capacity[f]
		}
	} else {
		set = m.shown(p)
		for f := range p.fam {
			p.fam[f].capacity = sizeOf(set, f)
		}
	}
	ranges := set.Ranges()
	for block, c := range p.claims {
		c.room = 0
		span := netipx.RangeOfPrefix(block)
		first, _ := slices.BinarySearchFunc(ranges, span.From(), func(r netipx.IPRange, ip netip.Addr) int { return r.To().Compare(ip) })
		for _, r := range ranges[first:] {
			if span.To().Less(r.From()) {
				break
			}
			from, to := r.From(), r.To()
			if from.Less(span.From()) {
				from = span.From()
			}
			if span.To().Less(to) {
				to = span.To()
			}
			c.room = add(c.room, allocator.RangeSize(netipx.IPRangeFrom(from, to)))
		}
	}
}

// shown is what an inline pool's blocks and leases show of it.
func (m *Model) shown(p *pool) *netipx.IPSet {
	var b netipx.IPSetBuilder
	for block := range p.claims {
		b.AddPrefix(block)
	}
	for i := range p.shapes {
		for _, l := range m.shapes[i].leases {
			b.AddPrefix(l.Address)
		}
	}
	for i := range p.shapes {
		for _, l := range m.shapes[i].leases {
			special(&b, l.Address, l.Gateway)
		}
	}
	set, err := b.IPSet()
	if err != nil { // only of addresses that are none, and those were left out
		return new(netipx.IPSet)
	}
	return set
}

// sizeOf is how many addresses of a family a set has; it saturates.
func sizeOf(set *netipx.IPSet, fam int) (n uint64) {
	for _, r := range set.Ranges() {
		if familyOf(r.From()) == fam {
			n = add(n, allocator.RangeSize(r))
		}
	}
	return n
}

func add(a, b uint64) uint64 {
	if a+b < a {
		return math.MaxUint64
	}
	return a + b
}

// full reports whether at least 90 % of what may be handed out of a block is taken.
func (p *pool) full(block netip.Prefix) bool {
	return float64(p.used[block]) >= 0.9*float64(p.claims[block].room)
}

// The trend is the change over window, known to within step.
const (
	window = 5 * time.Minute
	step   = 5 * time.Second
)

// note takes down how many are leased now; before is how many were, since since
// if nothing else is known.
func (f *family) note(now, since time.Time, before uint64) {
	at := now.Truncate(step)
	if len(f.samples) == 0 {
		if f.leased == before {
			return
		}
		f.samples = append(f.samples, sample{since, before})
	}
	if last := &f.samples[len(f.samples)-1]; len(f.samples) > 1 && !at.After(last.at) {
		last.leased = f.leased
	} else {
		f.samples = append(f.samples, sample{at, f.leased})
	}
	for len(f.samples) > 1 && !f.samples[1].at.After(now.Add(-window)) {
		f.samples = f.samples[1:]
	}
}

func (f *family) trend(now time.Time) int64 {
	if len(f.samples) == 0 {
		return 0
	}
	then := f.samples[0]
	for _, s := range f.samples[1:] {
		if s.at.After(now.Add(-window)) {
			break
		}
		then = s
	}
	return int64(f.leased - then.leased)
}

// room is how many addresses a family has: never less than what is taken where
// its ranges are not known.
func (p *pool) room(f *family) uint64 {
	if p.named {
		return f.capacity
	}
	return max(f.capacity, f.leased+f.held)
}

// shownBy is the family that a pool is shown by: the fuller one.
func (p *pool) shownBy() *family {
	four, six := &p.fam[0], &p.fam[1]
	if p.room(four) == 0 || float64(six.leased+six.held)*float64(p.room(four)) > float64(four.leased+four.held)*float64(p.room(six)) {
		return six
	}
	return four
}

// expire frees what is held no longer.
func (m *Model) expire(now time.Time) {
	m.now = max(m.now, now.Unix())
	for len(m.until) > 0 && int64(m.until[0].until) <= m.now {
		e := heap.Pop(&m.until).(expiry)
		at, ok := m.addrs[e.key]
		if !ok || at.until != e.until {
			continue // it was leased since, or held anew
		}
		m.count(at, netip.AddrFrom16(e.key.ip).Unmap(), -1, now)
		m.addrs[e.key] = addrValue{pool: at.pool}
	}
}

// NextChange is when the next held address becomes free, which no event tells;
// zero if none is held.
func (m *Model) NextChange() time.Time {
	if len(m.until) == 0 {
		return time.Time{}
	}
	return time.Unix(int64(m.until[0].until), 0)
}

// Fill sets what the model knows of a state: all but Source, Revision, At,
// Heartbeat, Etcd and Verify.
func (m *Model) Fill(s *state.State, now time.Time) {
	m.expire(now)
	s.Epoch, s.Ledger = 0, ""
	if m.meta != nil {
		s.Epoch = m.meta.Epoch
		s.Ledger = state.LedgerRunning
		if m.meta.State != keyspace.Running {
			s.Ledger = state.LedgerFrozen
		}
	}
	if len(m.stop) > 0 {
		s.Ledger = state.LedgerStopped
	}
	s.Pools, s.More = []state.Pool{}, 0
	near := map[string]bool{} // nodes with blocks: all of them are nearly full
	for _, p := range m.pools {
		m.settle(p)
		for block, c := range p.claims {
			all, seen := near[c.node]
			near[c.node] = (all || !seen) && p.full(block)
		}
		if p.named || len(p.claims) > 0 || p.fam[0].leased+p.fam[0].held+p.fam[1].leased+p.fam[1].held > 0 {
			f := p.shownBy()
			s.Pools = append(s.Pools, state.Pool{
				Space: p.id.space, Name: p.id.name, Capacity: p.room(f), Leased: f.leased, Held: f.held, Trend: f.trend(now),
			})
		}
	}
	slices.SortFunc(s.Pools, func(a, b state.Pool) int {
		return cmp.Or(-cmp.Compare(a.Percent(), b.Percent()), cmp.Compare(a.Space, b.Space), cmp.Compare(a.Name, b.Name))
	})
	s.Near, s.Nodes = 0, len(m.writers)
	for node, all := range near {
		if all {
			s.Near++
		}
		if !m.writers[node] {
			s.Nodes++ // its chain is gone, its blocks are not
		}
	}
}

// expiry is when a held address becomes free.
type expiry struct {
	until uint32
	key   addrKey
}

type expiries []expiry

func (h expiries) Len() int           { return len(h) }
func (h expiries) Less(i, j int) bool { return h[i].until < h[j].until }
func (h expiries) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *expiries) Push(x any)        { *h = append(*h, x.(expiry)) }
func (h *expiries) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
