package allocator

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// A plan is made from what is known. Where that is not enough, the planner says
// what it needs to know, the caller reads it and asks again: the planner itself
// reads nothing, knows no clock, and answers alike when asked alike.

// known is what has been read of a pool.
type known struct {
	addrs     map[netip.Addr]*knownAddress
	covered   []netipx.IPRange // an address in here and not in addrs was never held
	blocks    map[netip.Prefix]knownBlock
	allBlocks bool            // a block that is not in blocks is not claimed
	strays    map[string]bool // keys among the claims that are none

	memory *memory // what this node remembers of the pool; nil: nothing
}

// knownAddress is an address that was held at least once. Its value is decoded
// when a choice depends on it: mostly there is one that was never held.
type knownAddress struct {
	mod   int64
	raw   []byte // not decoded yet
	value keyspace.Address
	bad   bool // the value does not decode: nobody's, and not to be handed out
}

func (a *knownAddress) load() *knownAddress {
	if a.raw != nil {
		a.bad = decodeAddress(a.raw, &a.value) != nil
		a.raw = nil
	}
	return a
}

type knownBlock struct {
	node string // "": not claimed
	mod  int64
}

func newKnown() *known {
	return &known{addrs: map[netip.Addr]*knownAddress{}, blocks: map[netip.Prefix]knownBlock{}, strays: map[string]bool{}}
}

// need is what a planner wants to know next.
type need struct {
	addrs     []netipx.IPRange
	limit     int64 // of keys, for each of addrs; 0: none
	blocks    []netip.Prefix
	allBlocks bool
}

// question is what an address is wanted for.
type question struct {
	pool      *Pool
	node      string
	requested []netip.Addr
	hints     []netip.Prefix // blocks to look at first
	now       time.Time
	lost      int    // conflicts lost so far
	random    uint64 // spreads choices after a loss
}

// choice is the answer for one range set, with all that it was decided on.
type choice struct {
	ip    netip.Addr
	lease keyspace.Lease
	mod   int64     // of the address's key, 0: never held
	after entry.Ref // the release it follows
	block netip.Prefix
	claim bool  // the block is claimed with this choice
	own   int64 // mod_revision of the claim it relies on, 0: none
}

// maxReads is how many ranges are read at a time at most: etcd does no more than
// 128 operations in one transaction.
const maxReads = 64

// borrowPage is how many address keys are read at a time when looking for an
// address to borrow.
const borrowPage = 1024

// spread is among how many candidates a choice is drawn after a loss.
const spread = 16

// plan chooses one address for each range set. It returns choices, or what it
// needs to know, or why there is no answer.
func plan(q *question, k *known) ([]choice, *need, error) {
	var choices []choice
	var needs need
	requested := slices.Clone(q.requested)
	for i := range q.pool.Sets {
		set := &q.pool.Sets[i]
		var c choice
		var n *need
		var err error
		if at := slices.IndexFunc(requested, set.spans); at >= 0 {
			c, n, err = q.requestedIn(set, requested[at], k)
			requested = slices.Delete(requested, at, at+1)
		} else {
			c, n, err = q.choose(set, k)
		}
		if err != nil {
			return nil, nil, err
		}
		if n != nil {
			needs.addrs = append(needs.addrs, n.addrs...)
			needs.blocks = append(needs.blocks, n.blocks...)
			needs.limit = max(needs.limit, n.limit)
			needs.allBlocks = needs.allBlocks || n.allBlocks
			continue
		}
		choices = append(choices, c)
	}
	if len(requested) > 0 {
		return nil, nil, fmt.Errorf("%w: %v is in no range of pool %s that still wants an address", ErrNotAvailable, requested[0], q.pool.Name)
	}
	if len(choices) < len(q.pool.Sets) {
		return nil, &needs, nil
	}
	return choices, nil, nil
}

// requestedIn is step 1: the address asked for.
func (q *question) requestedIn(set *RangeSet, ip netip.Addr, k *known) (choice, *need, error) {
	g := set.segmentOf(ip)
	if g == nil {
		return choice{}, nil, fmt.Errorf("%w: %v is a network, broadcast or gateway address or excluded in pool %s", ErrNotAvailable, ip, q.pool.Name)
	}
	one := netipx.IPRangeFrom(ip, ip)
	if _, ok := k.uncovered(one); ok {
		return choice{}, &need{addrs: []netipx.IPRange{one}}, nil
	}
	a, ok := k.addrs[ip]
	if !ok {
		return choice{ip: ip, lease: g.lease(ip)}, nil, nil
	}
	switch a.load(); {
	case a.bad:
		return choice{}, nil, fmt.Errorf("%w: the stored value of %v cannot be read; run 'ledger verify'", ErrNotAvailable, ip)
	case a.value.State == keyspace.Leased:
		holder := "another"
		if a.value.Holder != nil {
			holder = a.value.Holder.String()
		}
		return choice{}, nil, fmt.Errorf("%w: %v is held by %s", ErrNotAvailable, ip, holder)
	case a.value.Cooling(q.now):
		return choice{}, nil, fmt.Errorf("%w: %v is cooling: it was released at %s, and waits %d s", ErrNotAvailable, ip, a.value.Since.Format(time.RFC3339), a.value.Cooldown)
	}
	return choice{ip: ip, lease: g.lease(ip), mod: a.mod, after: a.value.Release}, nil, nil
}

// choose is steps 2 to 5.
func (q *question) choose(set *RangeSet, k *known) (choice, *need, error) {
	// 2. A block of ours: those we remember, then all.
	own := slices.Clone(q.hints)
	if k.allBlocks {
		own = append(own, k.claimedBy(q.node)...)
	}
	var unread need
	first := true
	for _, p := range own {
		hull, ok := set.hull(p)
		if !ok {
			continue
		}
		b, ok := k.blocks[p]
		if !ok && !k.allBlocks {
			unread.blocks, unread.addrs = append(unread.blocks, p), append(unread.addrs, hull)
			if first { // nearly always it has room; the others are read together
				break
			}
			continue
		}
		first = false
		if b.node != q.node {
			continue
		}
		c, n := q.inBlock(set, p, hull, k)
		if c.ip.IsValid() {
			c.own = b.mod
			return c, nil, nil
		}
		if n != nil && len(unread.addrs) < maxReads {
			unread.addrs = append(unread.addrs, n.addrs...)
		}
	}
	if len(unread.addrs) > 0 {
		return choice{}, &unread, nil
	}
	if !k.allBlocks {
		return choice{}, &need{allBlocks: true}, nil
	}
	// 3. A block that nobody has claimed, lowest first. Whoever lost a claim
	// skips some; if that leaves none, it skips none.
	skips := []int{0}
	if q.lost > 0 {
		skips = []int{int(q.random % spread), 0}
	}
	for _, skip := range skips {
		for p := range set.unclaimed(k) {
			if skip > 0 {
				skip--
				continue
			}
			hull, _ := set.hull(p)
			if c, n := q.inBlock(set, p, hull, k); n != nil || c.ip.IsValid() {
				c.claim = true
				return c, n, nil
			}
		}
	}
	return q.borrow(set, k)
}

// borrow is steps 4 and 5: an address in somebody else's block, or none.
func (q *question) borrow(set *RangeSet, k *known) (choice, *need, error) {
	want := 1
	if q.lost > 0 {
		want = spread
	}
	scan := !q.pool.Strict || set.Size() <= maxRemembered // with strictAffinity only to count
	var free []choice
	for i := range set.segments {
		g := &set.segments[i]
		gap, more := k.uncovered(g.IPRange)
		end := g.To()
		if more {
			end = gap.From().Prev()
		}
		for ip := g.From(); scan && !q.pool.Strict && ip.IsValid() && ip.Compare(end) <= 0; ip = ip.Next() {
			c := choice{ip: ip, lease: g.lease(ip)}
			a, ok := k.addrs[ip]
			if ok {
				c.mod, c.after = a.mod, a.load().value.Release
			}
			if !ok || a.free(q.now) {
				free = append(free, c)
				if len(free) == want {
					return free[q.random%uint64(want)], nil, nil
				}
			}
		}
		if more && scan {
			return choice{}, &need{addrs: []netipx.IPRange{gap}, limit: borrowPage}, nil
		}
	}
	if len(free) > 0 {
		return free[q.random%uint64(len(free))], nil, nil
	}
	return choice{}, nil, q.exhausted(set, k, scan)
}

// free reports whether an address that was held before may be handed out.
func (a *knownAddress) free(now time.Time) bool {
	return !a.load().bad && a.value.State == keyspace.Free && !a.value.Cooling(now)
}

// inBlock chooses in one block: the lowest that was never held, else the one
// whose release is longest ago, so that allocation goes round.
func (q *question) inBlock(set *RangeSet, p netip.Prefix, hull netipx.IPRange, k *known) (choice, *need) {
	if _, ok := k.uncovered(hull); ok {
		return choice{}, &need{addrs: []netipx.IPRange{hull}}
	}
	var best netip.Addr
	var oldest *knownAddress
	parts := set.within(p)
	for _, part := range parts {
		for ip := part.From(); ip.IsValid() && ip.Compare(part.To()) <= 0; ip = ip.Next() {
			_, ok := k.addrs[ip]
			if !ok {
				return choice{ip: ip, lease: set.segmentOf(ip).lease(ip), block: p}, nil
			}
		}
	}
	for _, part := range parts {
		for ip := part.From(); ip.IsValid() && ip.Compare(part.To()) <= 0; ip = ip.Next() {
			if a := k.addrs[ip]; (oldest == nil || a.mod < oldest.mod) && a.free(q.now) {
				best, oldest = ip, a
			}
		}
	}
	if !best.IsValid() {
		return choice{}, nil
	}
	return choice{ip: best, lease: set.segmentOf(best).lease(best), mod: oldest.mod, after: oldest.value.Release, block: p}, nil
}

func (q *question) exhausted(set *RangeSet, k *known, counted bool) error {
	var leased, cooling, bad int
	for ip, a := range k.addrs {
		if set.segmentOf(ip) == nil {
			continue
		}
		switch a.load(); {
		case a.bad:
			bad++
		case a.value.State == keyspace.Leased:
			leased++
		case a.value.Cooling(q.now):
			cooling++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "pool %s (%s)", q.pool.Name, rangesString(set.all.Ranges()))
	if counted {
		fmt.Fprintf(&b, ": %d addresses, %d leased, %d cooling, %d excluded", set.Size(), leased, cooling, set.excluded())
	} else {
		fmt.Fprintf(&b, ": %d addresses, %d excluded", set.Size(), set.excluded())
	}
	if bad > 0 {
		fmt.Fprintf(&b, ", %d unreadable (run 'ledger verify')", bad)
	}
	if q.pool.Strict {
		fmt.Fprintf(&b, "; strictAffinity is set, node %s has %d full blocks and none is unclaimed", q.node, len(k.claimedBy(q.node)))
	}
	return fmt.Errorf("%w: %s", ErrExhausted, b.String())
}

func rangesString(rr []netipx.IPRange) string {
	var s []string
	for _, r := range rr {
		s = append(s, r.String())
	}
	return strings.Join(s, ", ")
}

// uncovered returns the first part of r of which it is not known what it holds.
func (k *known) uncovered(r netipx.IPRange) (netipx.IPRange, bool) {
	from := r.From()
	for again := true; again; {
		again = false
		for _, c := range k.covered {
			if c.Contains(from) {
				if r.To().Compare(c.To()) <= 0 {
					return netipx.IPRange{}, false
				}
				from, again = c.To().Next(), true
			}
		}
	}
	return netipx.IPRangeFrom(from, r.To()), true
}

// claimedBy lists a node's blocks, in order.
func (k *known) claimedBy(node string) []netip.Prefix {
	var out []netip.Prefix
	for p, b := range k.blocks {
		if b.node == node {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, comparePrefix)
	return out
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// unclaimed yields the blocks that nobody has claimed, lowest first. It takes a
// step for each claimed block and none for the size of the range.
func (s *RangeSet) unclaimed(k *known) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		var last netip.Prefix
		for i := range s.segments {
			g := &s.segments[i]
			for ip := g.From(); ip.IsValid() && ip.Compare(g.To()) <= 0; {
				p := g.blockOf(ip)
				ip = netipx.PrefixLastIP(p).Next()
				if p == last {
					continue // two segments share it
				}
				last = p
				if k.blocks[p].node == "" {
					if !yield(p) {
						return
					}
				}
			}
		}
	}
}
