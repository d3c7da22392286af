package main

import (
	"context"
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// state is all that is live in a ledger: everything but its entries.
type state struct {
	snap        audit.Snapshot
	keys        keyspace.Keys
	meta        *keyspace.Meta
	stops       []keyspace.Stop
	specs       map[string]*keyspace.Pool
	addresses   []liveAddress
	attachments map[keyspace.AttachmentID]keyspace.Attachment
	blocks      []liveBlock
	writers     []liveWriter
	unreadable  []string
}

type liveAddress struct {
	space string
	ip    netip.Addr
	keyspace.Address
}

type liveBlock struct {
	keyspace.BlockID
	keyspace.Block
}

type liveWriter struct {
	entry.Writer
	value keyspace.Writer
}

// readState reads the live keys. Those that cannot be read are listed, never
// passed over.
func readState(ctx context.Context, src audit.Source) (*state, error) {
	keys, err := keyspace.New(src.Snapshot().Prefix)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	st := &state{snap: src.Snapshot(), keys: keys, specs: map[string]*keyspace.Pool{}, attachments: map[keyspace.AttachmentID]keyspace.Attachment{}}
	err = src.State(ctx, func(r audit.Record) error {
		if err := st.take(r); err != nil {
			st.unreadable = append(st.unreadable, strings.Clone(strings.TrimPrefix(r.Key, keys.Prefix())))
		}
		return nil
	})
	return st, err
}

func (st *state) take(r audit.Record) error {
	k, err := st.keys.Parse(strings.Clone(r.Key)) // its parts are kept
	if err != nil {
		return err
	}
	switch k.Kind {
	case "meta":
		st.meta = new(keyspace.Meta)
		err = keyspace.Decode(r.Value, st.meta)
	case "stops":
		s := keyspace.Stop{}
		err = keyspace.Decode(r.Value, &s)
		s.Node = k.Name // also one that cannot be read stops everybody
		st.stops = append(st.stops, s)
	case "pools":
		p := new(keyspace.Pool)
		if err = keyspace.Decode(r.Value, p); err == nil {
			st.specs[k.Name] = p
		}
	case "addresses":
		at := liveAddress{space: k.Space, ip: k.IP}
		if err = keyspace.Decode(r.Value, &at.Address); err == nil && at.State == keyspace.Leased && at.Holder == nil {
			err = fmt.Errorf("leased by nobody")
		}
		if err == nil {
			st.addresses = append(st.addresses, at)
		}
	case "attachments":
		var v keyspace.Attachment
		if err = keyspace.Decode(r.Value, &v); err == nil {
			st.attachments[k.Attachment] = v
		}
	case "blocks":
		b := liveBlock{BlockID: k.Block}
		if err = keyspace.Decode(r.Value, &b.Block); err == nil {
			st.blocks = append(st.blocks, b)
		}
	case "writers":
		w := liveWriter{Writer: k.Writer}
		if err = keyspace.Decode(r.Value, &w.value); err == nil {
			st.writers = append(st.writers, w)
		}
	}
	return err
}

// held reports whether a free address may not be handed out yet.
func (at *liveAddress) held(now time.Time) bool {
	return at.Cooling(now)
}

// use is how a pool, a block or a node stands.
type use struct {
	leased, held, freed uint64
}

func (u *use) add(at *liveAddress, now time.Time) {
	switch {
	case at.State == keyspace.Leased:
		u.leased++
	case at.held(now):
		u.held++
	default:
		u.freed++
	}
}

type poolID struct{ space, name string }

// poolUse is a pool as far as it can be known here: an inline pool's ranges
// stand in the nodes' configurations, so that only its claimed blocks show.
type poolUse struct {
	use
	inBlocks use // of the addresses in claimed blocks
	blocks   int
	claimed  *big.Int
	total    *big.Int // nil: not known
}

type blockUse struct {
	liveBlock
	use
	borrowed uint64 // leased by attachments of other nodes
}

type nodeUse struct {
	attachments, leased int
	blocks              int
	writer              *keyspace.Writer
}

// tally is the use of everything.
type tally struct {
	pools  map[poolID]*poolUse
	blocks []*blockUse
	nodes  map[string]*nodeUse
}

func (st *state) tally(now time.Time) *tally {
	t := &tally{pools: map[poolID]*poolUse{}, nodes: map[string]*nodeUse{}}
	pool := func(space, name string) *poolUse {
		p := t.pools[poolID{space, name}]
		if p == nil {
			p = &poolUse{claimed: new(big.Int)}
			t.pools[poolID{space, name}] = p
		}
		return p
	}
	node := func(name string) *nodeUse {
		n := t.nodes[name]
		if n == nil {
			n = new(nodeUse)
			t.nodes[name] = n
		}
		return n
	}
	for name, spec := range st.specs {
		p, err := allocator.PoolFromSpec(name, spec)
		if err != nil {
			continue
		}
		total := new(big.Int)
		for i := range p.Sets {
			total.Add(total, new(big.Int).SetUint64(p.Sets[i].Size()))
		}
		pool(p.Space, name).total = total
	}
	find := map[keyspace.BlockID]*blockUse{}
	lengths := map[poolID][]int{}
	for _, b := range st.blocks {
		u := &blockUse{liveBlock: b}
		t.blocks = append(t.blocks, u)
		find[b.BlockID] = u
		id := poolID{b.Space, b.Pool}
		if !slices.Contains(lengths[id], b.Prefix.Bits()) {
			lengths[id] = append(lengths[id], b.Prefix.Bits())
		}
		p := pool(b.Space, b.Pool)
		p.blocks++
		p.claimed.Add(p.claimed, addressesIn(b.Prefix))
		node(b.Node).blocks++
	}
	for i := range st.addresses {
		at := &st.addresses[i]
		p := pool(at.space, at.Pool)
		p.add(at, now)
		if at.State == keyspace.Leased {
			node(at.Holder.Node).leased++
		}
		for _, bits := range lengths[poolID{at.space, at.Pool}] {
			if bits > at.ip.BitLen() {
				continue
			}
			b := find[keyspace.BlockID{Space: at.space, Pool: at.Pool, Prefix: netip.PrefixFrom(at.ip, bits).Masked()}]
			if b == nil {
				continue
			}
			p.inBlocks.add(at, now)
			b.add(at, now)
			if at.State == keyspace.Leased && at.Holder.Node != b.Node {
				b.borrowed++
			}
			break
		}
	}
	for id := range st.attachments {
		node(id.Node).attachments++
	}
	for i := range st.writers {
		if w := &st.writers[i]; w.Kind == entry.KindNode {
			node(w.Name).writer = &w.value
		}
	}
	return t
}

// addressesIn is how many addresses a prefix has.
func addressesIn(p netip.Prefix) *big.Int {
	return new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits()))
}

// free is what is left of n addresses.
func free(n *big.Int, u *use) *big.Int {
	left := new(big.Int).Sub(n, new(big.Int).SetUint64(u.leased+u.held))
	if left.Sign() < 0 {
		return new(big.Int)
	}
	return left
}

// number shortens numbers that only say "plenty".
func number(n *big.Int) string {
	if n == nil {
		return ""
	}
	if n.BitLen() <= 40 {
		return n.String()
	}
	return fmt.Sprintf("~2^%d", n.BitLen()-1)
}
