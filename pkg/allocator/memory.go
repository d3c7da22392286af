package allocator

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// A pool without an unclaimed block is read whole, once: who borrows, or must say
// that it is full, has to know all of it. What was read is kept in the state
// directory with its revision, and the next call reads what was written since
// only. So an ADD in a full pool costs what changed, not what the pool holds.
//
// Nothing rests on what is remembered: a choice from it is compared in the commit,
// and a pool is called full on what one linearizable read adds to it. Address keys
// are never deleted, so that "written since" is all that changed; of claims, which
// are, the number is compared. It is forgotten where it may not be of this etcd:
// with another cluster ID, epoch or chain, and after a conflict that it may have
// caused.

// maxRemembered is how many addresses a pool has at most that is read whole.
const maxRemembered = 1 << 16

// maxStrays is how many bytes the names of keys that are no claims, and stand among a
// pool's claims, may have for it to be remembered.
const maxStrays = 4096

// small reports whether a pool may be read whole.
func (p *Pool) small() bool {
	var n uint64
	for i := range p.Sets {
		for _, r := range p.Sets[i].Spans() {
			if n += RangeSize(r); n > maxRemembered || RangeSize(r) > maxRemembered {
				return false
			}
		}
	}
	return true
}

// memory is all of a pool at one revision. It is not changed once made.
type memory struct {
	known    *known
	revision int64
}

// has reports whether the state of a range is remembered.
func (m *memory) has(r netipx.IPRange) bool {
	if m == nil {
		return false
	}
	_, missing := m.known.uncovered(r)
	return !missing
}

func (k *known) strayBytes() (n int) {
	for key := range k.strays {
		n += len(key)
	}
	return n
}

// into tells k what is remembered of a range.
func (m *memory) into(k *known, r netipx.IPRange) {
	if !m.has(r) {
		return
	}
	for ip := r.From(); ip.IsValid() && ip.Compare(r.To()) <= 0; ip = ip.Next() {
		if a, ok := m.known.addrs[ip]; ok {
			k.addrs[ip] = a
		}
	}
}

// stored is a memory in the state directory.
type stored struct {
	Etcd     string                     `json:"etcd"`
	Epoch    uint64                     `json:"epoch"`
	Chain    entry.ChainID              `json:"chain"`
	Spans    []netipx.IPRange           `json:"spans"`
	Revision int64                      `json:"revision"`
	Blocks   map[string]storedBlock     `json:"blocks"`           // by prefix
	Strays   []string                   `json:"strays,omitempty"` // keys among the claims that are none
	Leased   []netipx.IPRange           `json:"leased"`
	Others   map[netip.Addr]storedOther `json:"others"` // what else has a key
}

type storedBlock struct {
	Node string `json:"node"`
	Mod  int64  `json:"mod"`
}

type storedOther struct {
	Mod   int64  `json:"mod"`
	Value []byte `json:"value"`
}

// leasedThen is an address that was leased when it was read.
var leasedThen = knownAddress{value: keyspace.Address{State: keyspace.Leased}}

func (p *Pool) spans() (out []netipx.IPRange) {
	for i := range p.Sets {
		out = append(out, p.Sets[i].Spans()...)
	}
	return out
}

// reads are the ranges to read for all of a pool: its own, or where there are too
// many for one read, one for each range set.
func (p *Pool) reads() []netipx.IPRange {
	out := p.spans()
	if len(out) < maxReads {
		return out
	}
	out = nil
	for i := range p.Sets {
		spans := p.Sets[i].Spans() // in order
		out = append(out, netipx.IPRangeFrom(spans[0].From(), spans[len(spans)-1].To()))
	}
	return out
}

// recall reads what is remembered of a pool; nil if nothing is.
func (s *session) recall(q *question) *memory {
	if q.lost > 8 || s.mark == nil {
		return nil
	}
	b := s.Dir.Pool(q.pool.Space, q.pool.Name)
	var st stored
	if b == nil || json.Unmarshal(b, &st) != nil {
		return nil
	}
	if st.Etcd != s.mark.EtcdCluster || st.Epoch != s.mark.Epoch || st.Chain != s.mark.Chain || !slices.Equal(st.Spans, q.pool.spans()) || st.Revision < 1 {
		return nil
	}
	k := newKnown()
	k.allBlocks, k.covered = true, st.Spans
	for p, b := range st.Blocks {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			return nil
		}
		k.blocks[prefix] = knownBlock{b.Node, b.Mod}
	}
	for _, key := range st.Strays {
		k.strays[key] = true
	}
	n := uint64(0)
	for _, r := range st.Leased {
		if n += RangeSize(r); !r.IsValid() || n > maxRemembered {
			return nil
		}
		for ip := r.From(); ip.IsValid() && ip.Compare(r.To()) <= 0; ip = ip.Next() {
			k.addrs[ip] = &leasedThen
		}
	}
	for ip, o := range st.Others {
		k.addrs[ip] = &knownAddress{mod: o.Mod, raw: o.Value, bad: len(o.Value) == 0}
	}
	return &memory{k, st.Revision}
}

// whole reads all of a pool at one revision, linearizable, of what m remembers the
// changes only. It remembers the outcome if no block is unclaimed, and else forgets
// the pool: then a block is the better place to look.
func (s *session) whole(q *question, m *memory) (*known, error) {
	p := q.pool
	blocks := Get{Key: s.Keys.Blocks(p.Space, p.Name), End: keyspace.After(s.Keys.Blocks(p.Space, p.Name))}
	k := newKnown()
	gets := []Get{blocks}
	for _, r := range p.reads() {
		gets = append(gets, Get{Key: s.Keys.Address(p.Space, r.From()), End: s.Keys.Address(p.Space, r.To()) + "\x00"})
	}
	if m != nil {
		for i := range gets {
			gets[i].Since = m.revision + 1
		}
	}
	r, err := s.Store.Read(s.ctx, false, gets)
	if err != nil {
		return nil, err
	}
	if m != nil && r.Revision < m.revision {
		return s.whole(q, nil) // of another etcd
	}
	if m != nil {
		for b, c := range m.known.blocks {
			k.blocks[b] = c
		}
		for ip, a := range m.known.addrs {
			k.addrs[ip] = a
		}
		for key := range m.known.strays {
			k.strays[key] = true
		}
	}
	for _, a := range r.Ranges {
		s.take(k, a)
	}
	for _, kv := range r.Ranges[0].KVs {
		if _, err := s.Keys.Parse(kv.Key); err != nil {
			k.strays[kv.Key] = true
		}
	}
	if m != nil && int64(len(k.blocks)+len(k.strays)) != r.Ranges[0].Count {
		return s.whole(q, nil) // claims were given back since
	}
	k.allBlocks, k.covered = true, p.spans()
	s.keep(q, k, r.Revision)
	return k, nil
}

// keep remembers a pool, or forgets it.
func (s *session) keep(q *question, k *known, revision int64) {
	var b []byte
	full := true
	for i := range q.pool.Sets {
		for range q.pool.Sets[i].unclaimed(k) {
			full = false
			break
		}
	}
	if full && s.mark != nil && k.strayBytes() <= maxStrays {
		st := stored{
			Etcd: s.mark.EtcdCluster, Epoch: s.mark.Epoch, Chain: s.mark.Chain, Spans: q.pool.spans(), Revision: revision,
			Blocks: map[string]storedBlock{}, Others: map[netip.Addr]storedOther{}, Strays: slices.Sorted(maps.Keys(k.strays)),
		}
		for p, c := range k.blocks {
			st.Blocks[p.String()] = storedBlock{c.node, c.mod}
		}
		var leased netipx.IPSetBuilder
		for ip, a := range k.addrs {
			raw := a.raw
			if a == &leasedThen {
				leased.Add(ip)
				continue
			}
			if !a.load().bad && a.value.State == keyspace.Leased {
				leased.Add(ip)
				continue
			}
			if raw == nil && !a.bad {
				raw = keyspace.Encode(a.value)
			}
			st.Others[ip] = storedOther{a.mod, raw}
		}
		if set, err := leased.IPSet(); err == nil {
			st.Leased = set.Ranges()
			b, _ = json.Marshal(st)
		}
	}
	if err := s.Dir.SavePool(q.pool.Space, q.pool.Name, b); err != nil {
		s.Log.Warn("what is known of the pool was not kept", "err", err)
	}
}
