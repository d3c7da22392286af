package allocator

import (
	"fmt"
	"math/bits"
	"net/netip"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// DefaultBlockSize is how many addresses a block of a large pool has.
const DefaultBlockSize = 64

// Pool is a pool made ready for planning: range sets without the addresses that
// are never handed out. It is immutable.
type Pool struct {
	Space, Name string
	Strict      bool          // no borrowing
	Cooldown    time.Duration // a released address is not handed out before this has passed
	Sets        []RangeSet
}

// RangeSet is alternatives that supply one address.
type RangeSet struct {
	segments []segment
	all      *netipx.IPSet // what the ranges span, for counting what is excluded
}

// segment is a run of addresses that may be handed out, all of one range.
type segment struct {
	netipx.IPRange
	span    netipx.IPRange // the range it is of
	subnet  netip.Prefix
	gateway netip.Addr
	bits    int // length of a block's prefix
}

// NewPool prepares ranges, completed by host-local's rules, for planning.
// blockSize 0 means the default; exclude may be nil. It fails where a range set
// has no address left.
func NewPool(space, name string, sets [][]keyspace.Range, exclude *netipx.IPSet, strict bool, blockSize int, cooldown time.Duration) (*Pool, error) {
	if err := entry.ValidateName("address space", space); err != nil {
		return nil, err
	}
	if err := entry.ValidateName("pool", name); err != nil {
		return nil, err
	}
	if blockSize < 0 || blockSize > 1024 || blockSize&(blockSize-1) != 0 {
		return nil, fmt.Errorf("block size %d: want a power of two, at most 1024", blockSize)
	}
	if len(sets) == 0 || len(sets) > entry.MaxAddresses {
		return nil, fmt.Errorf("pool %s has %d range sets: want 1 to %d", name, len(sets), entry.MaxAddresses)
	}
	if cooldown < 0 || cooldown > keyspace.MaxCooldown {
		return nil, fmt.Errorf("pool %s: cooldown %v: want 0 to %v", name, cooldown, keyspace.MaxCooldown)
	}
	p := &Pool{Space: space, Name: name, Strict: strict, Cooldown: cooldown}
	// A gateway is nobody's, whichever of the ranges it is in.
	var gateways []netip.Addr
	for _, ranges := range sets {
		for _, r := range ranges {
			gateways = append(gateways, r.Gateway)
		}
	}
	for i, ranges := range sets {
		set, err := newRangeSet(ranges, exclude, gateways, blockSize)
		if err != nil {
			return nil, fmt.Errorf("pool %s, range set %d: %w", name, i, err)
		}
		for j := range p.Sets {
			// An attachment has one address of each: it would get the same twice.
			if p.Sets[j].all.Overlaps(set.all) {
				return nil, fmt.Errorf("pool %s: range sets %d and %d overlap", name, j, i)
			}
		}
		p.Sets = append(p.Sets, *set)
	}
	return p, nil
}

// validateRange refuses what host-local's rules would not have made. Inline ranges
// come from there; named pools' come from etcd.
func validateRange(r *keyspace.Range, four bool) error {
	plain := func(ip netip.Addr) bool { return ip.IsValid() && !ip.Is4In6() && ip.Zone() == "" && ip.Is4() == four }
	span := netipx.IPRangeFrom(r.Start, r.End)
	switch {
	case !r.Subnet.IsValid() || !plain(r.Subnet.Addr()):
		return fmt.Errorf("subnet %v is none, or of another family than the others of its set", r.Subnet)
	case !span.IsValid():
		return fmt.Errorf("range %v-%v of %v is empty", r.Start, r.End, r.Subnet)
	case !plain(r.Start) || !plain(r.End) || !r.Subnet.Contains(r.Start) || !r.Subnet.Contains(r.End):
		return fmt.Errorf("range %v-%v is not in its subnet %v", r.Start, r.End, r.Subnet)
	case r.Gateway.IsValid() && !plain(r.Gateway):
		return fmt.Errorf("gateway %v is of another family than subnet %v", r.Gateway, r.Subnet)
	}
	return nil
}

func newRangeSet(ranges []keyspace.Range, exclude *netipx.IPSet, gateways []netip.Addr, blockSize int) (*RangeSet, error) {
	var set RangeSet
	var all netipx.IPSetBuilder
	for _, r := range ranges {
		if err := validateRange(&r, ranges[0].Subnet.Addr().Is4()); err != nil {
			return nil, err
		}
		span := netipx.IPRangeFrom(r.Start, r.End)
		all.AddRange(span)
		var b netipx.IPSetBuilder
		b.AddRange(span)
		b.Remove(r.Subnet.Masked().Addr()) // the network's own, in v6 the routers' anycast
		if r.Subnet.Addr().Is4() {
			b.Remove(netipx.PrefixLastIP(r.Subnet)) // broadcast
		}
		for _, g := range gateways {
			if g.IsValid() {
				b.Remove(g)
			}
		}
		if exclude != nil {
			b.RemoveSet(exclude)
		}
		free, err := b.IPSet()
		if err != nil {
			return nil, err
		}
		for _, s := range free.Ranges() {
			set.segments = append(set.segments, segment{s, span, r.Subnet, r.Gateway, blockBits(r.Subnet, blockSize)})
		}
	}
	if len(set.segments) == 0 {
		return nil, fmt.Errorf("no address is left after excluding network, broadcast, gateway and what the configuration excludes")
	}
	var err error
	set.all, err = all.IPSet()
	return &set, err
}

// blockBits is the length of a block's prefix: DefaultBlockSize addresses, in
// small subnets a sixteenth of them, but no less than four.
func blockBits(subnet netip.Prefix, size int) int {
	host := subnet.Addr().BitLen() - subnet.Bits()
	if size == 0 {
		size = DefaultBlockSize
		if host < 10 {
			size = max(4, 1<<host/16)
		}
	}
	return subnet.Addr().BitLen() - min(bits.Len(uint(size))-1, host)
}

// segmentOf finds the segment of an address.
func (s *RangeSet) segmentOf(ip netip.Addr) *segment {
	for i := range s.segments {
		if s.segments[i].Contains(ip) {
			return &s.segments[i]
		}
	}
	return nil
}

// spans reports whether an address lies in the ranges, handed out or not.
func (s *RangeSet) spans(ip netip.Addr) bool { return s.all.Contains(ip) }

func (g *segment) blockOf(ip netip.Addr) netip.Prefix {
	return netip.PrefixFrom(ip, g.bits).Masked()
}

func (g *segment) lease(ip netip.Addr) keyspace.Lease {
	return keyspace.Lease{Address: netip.PrefixFrom(ip, g.subnet.Bits()), Gateway: g.gateway, Range: g.span}
}

// hull returns the range from the first to the last address that the set may hand
// out of a prefix: one range to read, however many parts there are.
func (s *RangeSet) hull(p netip.Prefix) (netipx.IPRange, bool) {
	parts := s.within(p)
	if len(parts) == 0 {
		return netipx.IPRange{}, false
	}
	hull := parts[0]
	for _, r := range parts[1:] {
		from, to := hull.From(), hull.To()
		if r.From().Less(from) {
			from = r.From()
		}
		if to.Less(r.To()) {
			to = r.To()
		}
		hull = netipx.IPRangeFrom(from, to)
	}
	return hull, true
}

// within returns the parts of a prefix that the set may hand out.
func (s *RangeSet) within(p netip.Prefix) (parts []netipx.IPRange) {
	block := netipx.RangeOfPrefix(p)
	for i := range s.segments {
		if part, ok := intersect(s.segments[i].IPRange, block); ok {
			parts = append(parts, part)
		}
	}
	return parts
}

func intersect(a, b netipx.IPRange) (netipx.IPRange, bool) {
	from, to := a.From(), a.To()
	if from.Less(b.From()) {
		from = b.From()
	}
	if b.To().Less(to) {
		to = b.To()
	}
	r := netipx.IPRangeFrom(from, to)
	return r, r.IsValid()
}

// RangeSize is how many addresses a range has; it saturates at 2^64-1.
func RangeSize(r netipx.IPRange) uint64 {
	from, to := r.From().As16(), r.To().As16()
	var hi, lo [2]uint64
	for i, b := range [][16]byte{from, to} {
		for j := range 8 {
			hi[i] = hi[i]<<8 | uint64(b[j])
			lo[i] = lo[i]<<8 | uint64(b[8+j])
		}
	}
	d, borrow := bits.Sub64(lo[1], lo[0], 0)
	h, _ := bits.Sub64(hi[1], hi[0], borrow)
	if h != 0 || d == 1<<64-1 {
		return 1<<64 - 1
	}
	return d + 1
}

// Size is how many addresses the set may hand out; it saturates at 2^64-1.
func (s *RangeSet) Size() uint64 {
	var n uint64
	for i := range s.segments {
		m := RangeSize(s.segments[i].IPRange)
		if n+m < n {
			return 1<<64 - 1
		}
		n += m
	}
	return n
}

// excluded is how many addresses of the ranges are never handed out.
func (s *RangeSet) excluded() uint64 {
	var n uint64
	for _, r := range s.all.Ranges() {
		n += RangeSize(r)
	}
	return n - min(n, s.Size())
}

// cooldown is the pool's in whole seconds, rounded up.
func (p *Pool) cooldown() int64 { return int64((p.Cooldown + time.Second - 1) / time.Second) }

// Spans is what the set's ranges cover.
func (s *RangeSet) Spans() []netipx.IPRange { return s.all.Ranges() }

// PoolFromSpec prepares a named pool.
func PoolFromSpec(name string, spec *keyspace.Pool) (*Pool, error) {
	var cooldown time.Duration
	if spec.Cooldown != "" {
		var err error
		if cooldown, err = time.ParseDuration(spec.Cooldown); err != nil {
			return nil, fmt.Errorf("cooldown %q: %w", spec.Cooldown, err)
		}
	}
	exclude, err := ParseExclude(spec.Exclude)
	if err != nil {
		return nil, err
	}
	space := spec.Space
	if space == "" {
		space = DefaultSpace
	}
	return NewPool(space, name, spec.Ranges, exclude, spec.StrictAffinity, spec.BlockSize, cooldown)
}

// DefaultSpace is the address space of pools that name none.
const DefaultSpace = "default"

func rangeOf(p netip.Prefix) netipx.IPRange { return netipx.RangeOfPrefix(p) }

// ParseExclude reads what a pool's spec excludes: addresses, ranges and prefixes.
func ParseExclude(texts []string) (*netipx.IPSet, error) {
	var b netipx.IPSetBuilder
	for _, x := range texts {
		if p, err := netip.ParsePrefix(x); err == nil {
			b.AddPrefix(p.Masked())
		} else if ip, err := netip.ParseAddr(x); err == nil {
			b.Add(ip)
		} else if r, err := netipx.ParseIPRange(x); err == nil {
			b.AddRange(r)
		} else {
			return nil, fmt.Errorf("exclude %q is no address, range or prefix", x)
		}
	}
	return b.IPSet()
}
