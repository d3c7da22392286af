package top

import (
	"cmp"
	"fmt"
	"iter"
	"math"
	"net/netip"
	"slices"
	"time"
	"unique"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/publish"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// PoolID names a pool in an address space.
type PoolID struct{ Space, Name string }

func (p PoolID) String() string { return p.Space + "/" + p.Name }

// place is an address in an address space.
type place struct {
	space string
	ip    netip.Addr
}

// Change is one key that was put or deleted.
type Change struct {
	Key    keyspace.Key
	Record audit.Record // without a Value: deleted
}

// Ledger is what is live in a ledger: everything but its entries. It is kept up
// to date by Apply. The counts of pools are those of package publish, so that a
// bar and the dashboard never say two things. It costs some 900 bytes a lease.
type Ledger struct {
	Revision int64

	counts     *publish.Model
	sums       state.State // of counts, as of the last settle
	meta       *keyspace.Meta
	stops      map[string]keyspace.Stop
	specs      map[string]*spec
	pools      map[PoolID]*pool
	addresses  map[place]*address
	atts       map[keyspace.AttachmentID]keyspace.Attachment
	blocks     map[keyspace.BlockID]*block
	nodes      map[string]*node
	unreadable map[string]bool
	colours    map[string]int // of nodes, by when they were seen first
}

// spec is a named pool's.
type spec struct {
	id      PoolID
	never   []netip.Addr // gateways, networks' own and broadcast addresses
	exclude *netipx.IPSet
}

// pool is how a pool stands.
type pool struct {
	id      PoolID
	leased  int
	members int                      // address keys
	held    map[netip.Addr]time.Time // until when
	stray   map[netip.Addr]bool      // members that are in no claimed block
	blocks  []*block                 // by address
	lengths []int                    // of its blocks' prefixes, longest first
	never   map[netip.Addr]bool      // as leases show
	spec    *spec                    // nil: an inline pool
	samples samples
	sum     state.Pool
}

type address struct {
	state  keyspace.AddressState
	pool   PoolID
	holder keyspace.AttachmentID
	last   entry.Ref // the acquire of a lease, the release of a free address
	until  time.Time // held
}

type block struct {
	keyspace.BlockID
	node   string
	leased int
}

func (b *block) size() uint64 { return sizeOf(b.Prefix) }

type node struct {
	name                        string
	blocks, attachments, leased int
	room, filled                uint64 // addresses of its blocks, and those that are leased
	near                        bool   // all its blocks are nearly full
	writer                      *keyspace.Writer
}

func newLedger(keys keyspace.Keys) *Ledger {
	return &Ledger{
		counts: publish.NewModel(keys),
		stops:  map[string]keyspace.Stop{}, specs: map[string]*spec{}, pools: map[PoolID]*pool{},
		addresses: map[place]*address{}, atts: map[keyspace.AttachmentID]keyspace.Attachment{},
		blocks: map[keyspace.BlockID]*block{}, nodes: map[string]*node{}, unreadable: map[string]bool{}, colours: map[string]int{},
	}
}

// sizeOf is how many addresses a prefix has; it saturates.
func sizeOf(p netip.Prefix) uint64 {
	if host := p.Addr().BitLen() - p.Bits(); host < 64 {
		return 1 << host
	}
	return math.MaxUint64
}

func sum(a, b uint64) uint64 {
	if a+b < a {
		return math.MaxUint64
	}
	return a + b
}

// Apply takes one change of a key outside chains/. A value that cannot be read
// is counted, and what the key said before is forgotten.
func (l *Ledger) Apply(c Change, now time.Time) {
	if c.Record.Value == nil {
		l.counts.Delete(c.Record.Key, now)
	} else {
		l.counts.Put(c.Record, now)
	}
	name := c.Key.Kind + "/" + c.Key.Name
	var err error
	switch c.Key.Kind {
	case "meta":
		l.meta = nil
		if c.Record.Value != nil {
			v := new(keyspace.Meta)
			if err = keyspace.Decode(c.Record.Value, v); err == nil {
				l.meta = v
			}
		}
	case "stops":
		delete(l.stops, c.Key.Name)
		if c.Record.Value != nil {
			var v keyspace.Stop
			err = keyspace.Decode(c.Record.Value, &v)
			v.Node = c.Key.Name // one that cannot be read stops everybody, too
			l.stops[c.Key.Name] = v
		}
	case "pools":
		err = l.applySpec(c)
	case "addresses":
		name = fmt.Sprintf("addresses/%s/%v", c.Key.Space, c.Key.IP)
		err = l.applyAddress(c)
	case "attachments":
		name = "attachments/" + c.Key.Attachment.String()
		err = l.applyAttachment(c)
	case "blocks":
		name = "blocks/" + c.Key.Block.String()
		err = l.applyBlock(c)
	case "writers":
		name = "writers/" + c.Key.Writer.String()
		err = l.applyWriter(c)
	}
	delete(l.unreadable, name)
	if err != nil {
		l.unreadable[name] = true
	}
}

func (l *Ledger) pool(id PoolID) *pool {
	p := l.pools[id]
	if p == nil {
		p = &pool{id: id, held: map[netip.Addr]time.Time{}, stray: map[netip.Addr]bool{}, never: map[netip.Addr]bool{}}
		l.pools[id] = p
	}
	return p
}

// tidy forgets a pool that nothing speaks of any more.
func (l *Ledger) tidy(p *pool) {
	if p.members == 0 && len(p.blocks) == 0 && p.spec == nil {
		delete(l.pools, p.id)
	}
}

func (l *Ledger) node(name string) *node {
	n := l.nodes[name]
	if n == nil {
		n = &node{name: unique.Make(name).Value()}
		l.nodes[n.name] = n
	}
	return n
}

func (l *Ledger) applySpec(c Change) error {
	if old := l.specs[c.Key.Name]; old != nil {
		p := l.pool(old.id)
		p.spec = nil
		delete(l.specs, c.Key.Name)
		l.tidy(p)
	}
	if c.Record.Value == nil {
		return nil
	}
	var v keyspace.Pool
	if err := keyspace.Decode(c.Record.Value, &v); err != nil {
		return err
	}
	made, err := allocator.PoolFromSpec(c.Key.Name, &v)
	if err != nil {
		return err
	}
	s := &spec{id: PoolID{made.Space, c.Key.Name}}
	for _, set := range v.Ranges {
		for _, r := range set {
			s.never = append(s.never, reserved(r.Subnet.Masked(), r.Gateway)...)
		}
	}
	if s.exclude, err = allocator.ParseExclude(v.Exclude); err != nil {
		return err
	}
	l.specs[c.Key.Name] = s
	l.pool(s.id).spec = s
	return nil
}

// reserved are the addresses of a subnet that are never handed out.
func reserved(subnet netip.Prefix, gateway netip.Addr) []netip.Addr {
	out := []netip.Addr{subnet.Addr()}
	if subnet.Addr().Is4() {
		out = append(out, netipx.PrefixLastIP(subnet))
	}
	if gateway.IsValid() {
		out = append(out, gateway)
	}
	return out
}

// neverOf reports whether an address of a pool is never handed out, as far as
// that is known here.
func (p *pool) neverOf(ip netip.Addr) bool {
	return p.never[ip] || p.spec != nil && (slices.Contains(p.spec.never, ip) || p.spec.exclude.Contains(ip))
}

// count adds an address to what is counted, or takes it off.
func (l *Ledger) count(at place, a *address, by int) {
	p := l.pool(a.pool)
	p.members += by
	if by < 0 {
		delete(p.stray, at.ip)
	} else if l.blockOf(at, p) == nil {
		p.stray[at.ip] = true
	}
	switch {
	case a.state == keyspace.Leased:
		p.leased += by
		l.node(a.holder.Node).leased += by
		for b := range l.blocksOf(at, p) {
			b.leased += by
			l.node(b.node).filled += uint64(by) // a negative one wraps round, as it should
		}
	case by < 0:
		delete(p.held, at.ip)
	case !a.until.IsZero():
		p.held[at.ip] = a.until
	}
	if by < 0 {
		l.tidy(p)
	}
}

// blocksOf are the claimed blocks of a pool that an address is in: one, unless
// somebody claimed by other rules than ours.
func (l *Ledger) blocksOf(at place, p *pool) iter.Seq[*block] {
	return func(yield func(*block) bool) {
		for _, bits := range p.lengths {
			if bits > at.ip.BitLen() {
				continue
			}
			id := keyspace.BlockID{Space: at.space, Pool: p.id.Name, Prefix: netip.PrefixFrom(at.ip, bits).Masked()}
			if b := l.blocks[id]; b != nil && !yield(b) {
				return
			}
		}
	}
}

func (l *Ledger) blockOf(at place, p *pool) *block {
	for b := range l.blocksOf(at, p) {
		return b
	}
	return nil
}

func (l *Ledger) applyAddress(c Change) error {
	at := place{c.Key.Space, c.Key.IP}
	if old := l.addresses[at]; old != nil {
		delete(l.addresses, at)
		l.count(at, old, -1)
	}
	if c.Record.Value == nil {
		return nil
	}
	var v keyspace.Address
	if err := keyspace.Decode(c.Record.Value, &v); err != nil {
		return err
	}
	if v.State == keyspace.Leased && v.Holder == nil {
		return fmt.Errorf("leased by nobody")
	}
	at.space = unique.Make(at.space).Value()
	a := &address{state: v.State, pool: PoolID{at.space, unique.Make(v.Pool).Value()}, last: v.Release}
	if v.State == keyspace.Leased {
		a.last, a.holder = v.Acquire, *v.Holder
		a.holder.Node, a.holder.Network = unique.Make(a.holder.Node).Value(), unique.Make(a.holder.Network).Value()
		a.holder.Interface = unique.Make(a.holder.Interface).Value()
	} else if v.Cooldown != 0 {
		a.until = v.Until()
	}
	l.addresses[at] = a
	l.count(at, a, 1)
	return nil
}

func (l *Ledger) applyAttachment(c Change) error {
	id := c.Key.Attachment
	if _, ok := l.atts[id]; ok {
		delete(l.atts, id)
		l.node(id.Node).attachments--
	}
	if c.Record.Value == nil {
		return nil
	}
	var v keyspace.Attachment
	if err := keyspace.Decode(c.Record.Value, &v); err != nil {
		return err
	}
	v.Space, v.Pool = unique.Make(v.Space).Value(), unique.Make(v.Pool).Value()
	id.Node, id.Network = unique.Make(id.Node).Value(), unique.Make(id.Network).Value()
	l.atts[id] = v
	l.node(id.Node).attachments++
	p := l.pool(PoolID{v.Space, v.Pool})
	for _, lease := range v.Leases {
		for _, ip := range reserved(lease.Address.Masked(), lease.Gateway) {
			p.never[ip] = true
		}
	}
	return nil
}

func (l *Ledger) applyBlock(c Change) error {
	id := c.Key.Block
	p := l.pool(PoolID{id.Space, id.Pool})
	if old := l.blocks[id]; old != nil {
		delete(l.blocks, id)
		n := l.node(old.node)
		n.blocks--
		n.room -= old.size()
		n.filled -= uint64(old.leased)
		p.blocks = slices.DeleteFunc(p.blocks, func(b *block) bool { return b == old })
		l.measure(p)
		l.within(old, func(ip netip.Addr, a *address) {
			if a.pool == p.id && l.blockOf(place{id.Space, ip}, p) == nil {
				p.stray[ip] = true
			}
		})
		l.tidy(p)
	}
	if c.Record.Value == nil {
		return nil
	}
	var v keyspace.Block
	if err := keyspace.Decode(c.Record.Value, &v); err != nil {
		return err
	}
	b := &block{BlockID: id, node: unique.Make(v.Node).Value()}
	l.blocks[id] = b
	p = l.pool(p.id)
	i, _ := slices.BinarySearchFunc(p.blocks, b, compareBlocks)
	p.blocks = slices.Insert(p.blocks, i, b)
	l.measure(p)
	n := l.node(b.node)
	n.blocks++
	n.room = sum(n.room, b.size())
	l.within(b, func(ip netip.Addr, a *address) {
		if a.pool != p.id {
			return
		}
		delete(p.stray, ip)
		if a.state == keyspace.Leased {
			b.leased++
		}
	})
	n.filled += uint64(b.leased)
	return nil
}

func compareBlocks(a, b *block) int {
	return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
}

// measure takes what depends on all blocks of a pool.
func (l *Ledger) measure(p *pool) {
	p.lengths = p.lengths[:0]
	for _, b := range p.blocks {
		if !slices.Contains(p.lengths, b.Prefix.Bits()) {
			p.lengths = append(p.lengths, b.Prefix.Bits())
		}
	}
	slices.SortFunc(p.lengths, func(a, b int) int { return b - a })
}

// within calls f with each address of a block that has a key.
func (l *Ledger) within(b *block, f func(netip.Addr, *address)) {
	if b.size() > 1<<12 { // no writer claims blocks of that size
		for at, a := range l.addresses {
			if at.space == b.Space && b.Prefix.Contains(at.ip) {
				f(at.ip, a)
			}
		}
		return
	}
	for ip := b.Prefix.Addr(); ip.IsValid() && b.Prefix.Contains(ip); ip = ip.Next() {
		if a := l.addresses[place{b.Space, ip}]; a != nil {
			f(ip, a)
		}
	}
}

func (l *Ledger) applyWriter(c Change) error {
	if c.Key.Writer.Kind != entry.KindNode {
		return nil
	}
	n := l.node(c.Key.Writer.Name)
	n.writer = nil
	if c.Record.Value == nil {
		return nil
	}
	v := new(keyspace.Writer)
	if err := keyspace.Decode(c.Record.Value, v); err != nil {
		return err
	}
	n.writer = v
	return nil
}

// percent is how much of a pool is taken; -1 where that is not known.
func (p *pool) percent() float64 {
	if p.sum.Capacity == 0 {
		return -1
	}
	return min(100, float64(p.sum.Leased+p.sum.Held)/float64(p.sum.Capacity)*100)
}

// settle brings the sums up to date: after changes, and as holds run out.
func (l *Ledger) settle(now time.Time) {
	l.expire(now)
	l.counts.Fill(&l.sums, now)
	for _, p := range l.pools {
		p.sum = state.Pool{Space: p.id.Space, Name: p.id.Name}
	}
	for _, s := range l.sums.Pools {
		if p := l.pools[PoolID{s.Space, s.Name}]; p != nil {
			p.sum = s
		}
	}
	for _, n := range l.nodes {
		n.near = n.blocks > 0
	}
	for _, p := range l.pools {
		held := map[*block]int{}
		for ip := range p.held {
			if b := l.blockOf(place{p.id.Space, ip}, p); b != nil {
				held[b]++
			}
		}
		for _, b := range p.blocks {
			room := b.size()
			for ip := range p.never {
				if b.Prefix.Contains(ip) {
					room--
				}
			}
			if float64(b.leased+held[b]) < nearly*float64(room) {
				l.node(b.node).near = false
			}
		}
	}
}

// nearly is how full each block of a node is when the node is near exhaustion.
const nearly = 0.9

// expire ends the holds that are over.
func (l *Ledger) expire(now time.Time) {
	for _, p := range l.pools {
		for ip, until := range p.held {
			if !until.After(now) {
				delete(p.held, ip)
			}
		}
	}
}

// sorted are all pools by name, so that they stand still.
func (l *Ledger) sorted() []*pool {
	out := make([]*pool, 0, len(l.pools))
	for _, p := range l.pools {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *pool) int {
		return cmp.Or(cmp.Compare(a.id.Space, b.id.Space), cmp.Compare(a.id.Name, b.id.Name))
	})
	return out
}

// sortedNodes are all nodes by name.
func (l *Ledger) sortedNodes() []*node {
	out := make([]*node, 0, len(l.nodes))
	for _, n := range l.nodes {
		if n.writer != nil || n.blocks+n.attachments+n.leased > 0 {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b *node) int { return cmp.Compare(a.name, b.name) })
	return out
}

// colour numbers nodes, so that each has a colour of its own as long as there
// are enough. They keep it.
func (l *Ledger) colour(name string) int {
	if i, ok := l.colours[name]; ok {
		return i
	}
	for _, n := range l.sortedNodes() {
		if _, ok := l.colours[n.name]; !ok {
			l.colours[n.name] = len(l.colours)
		}
	}
	if _, ok := l.colours[name]; !ok {
		l.colours[name] = len(l.colours)
	}
	return l.colours[name]
}

// pod is who holds an address, as far as its attachment says.
func (l *Ledger) pod(a *address) string {
	att := l.atts[a.holder]
	return cmp.Or(att.Pod, att.PodUID)
}

// A sample is taken each step; together they are the window that sparklines show.
const (
	step   = 10 * time.Second
	window = 5 * time.Minute
)

// samples are how many addresses were leased, newest last, one a step.
type samples struct {
	at   time.Time // of the last
	list []int
}

// add notes the present count. Steps that were missed repeat the last one.
func (s *samples) add(now time.Time, n int) {
	now = now.Truncate(step)
	if len(s.list) == 0 {
		s.at, s.list = now, []int{n}
		return
	}
	last := s.list[len(s.list)-1]
	for i := 0; s.at.Before(now) && i < int(window/step); i++ {
		s.at = s.at.Add(step)
		s.list = append(s.list, last)
	}
	s.at = now
	s.list[len(s.list)-1] = n
	if most := int(window/step) + 1; len(s.list) > most {
		s.list = slices.Delete(s.list, 0, len(s.list)-most)
	}
}

// change is how the count moved within the window; ok is false while that is
// not known for any time at all.
func (s *samples) change() (n int, ok bool) {
	if len(s.list) < 2 {
		return 0, false
	}
	return s.list[len(s.list)-1] - s.list[0], true
}
