package allocator

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Belongings are what a node has in etcd, at one revision: what an operator who
// ends it all has decided on.
type Belongings struct {
	Node   string
	Head   *keyspace.Writer // nil: none, or one that cannot be read
	Spoilt error            // why the head cannot be read
	Chain  entry.ChainID    // that is decided on: the head's, or by the entries the newest; zero: none
	Leases []Belonging
	Claims []Claim
}

// Belonging is a lease of a node.
type Belonging struct {
	ID     keyspace.AttachmentID
	Value  keyspace.Attachment
	Spoilt error // why the value cannot be read
}

// Nothing reports whether etcd does not know the node.
func (b *Belongings) Nothing() bool {
	return b.Chain == (entry.ChainID{}) && b.Spoilt == nil && len(b.Leases) == 0 && len(b.Claims) == 0
}

// Belongings reads what a node has, without a lock or a check.
func (w *Writer) Belongings(ctx context.Context, node string) (*Belongings, error) {
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	if err := w.Store.Connect(ctx); err != nil {
		return nil, err
	}
	head := w.Keys.Writer(entry.Writer{Kind: entry.KindNode, Name: node})
	attachments, blocks := w.Keys.NodeAttachments(node), w.Keys.AllBlocks()
	r, err := w.Store.Read(ctx, false, []Get{
		{Key: w.Keys.Meta()}, {Key: head}, {Key: attachments, End: keyspace.After(attachments)}, {Key: blocks, End: keyspace.After(blocks)},
	})
	if err != nil {
		return nil, err
	}
	if len(r.Ranges[0].KVs) == 0 {
		return nil, fmt.Errorf("%w: %s is absent: run 'ledger init' once", ErrNotInitialised, w.Keys.Meta())
	}
	out := &Belongings{Node: node}
	if kvs := r.Ranges[1].KVs; len(kvs) == 1 {
		out.Head = new(keyspace.Writer)
		if err := decodeHead(kvs[0].Value, out.Head); err != nil {
			out.Head, out.Spoilt = nil, fmt.Errorf("%s: %w", head, err)
		}
	}
	s := &session{Writer: w, ctx: ctx}
	if out.Head != nil {
		out.Chain = out.Head.Chain
	} else if end, err := s.chainEnd(entry.Writer{Kind: entry.KindNode, Name: node}); err == nil {
		out.Chain = end.Chain
	} else if !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	for _, kv := range r.Ranges[2].KVs {
		key, err := w.Keys.Parse(kv.Key)
		if err != nil {
			continue // no attachment's: 'ledger verify' names it
		}
		b := Belonging{ID: key.Attachment}
		if b.Spoilt = decodeAttachment(kv.Value, &b.Value); b.Spoilt != nil {
			// By what is on the record, so that no later lease is taken for it.
			b.Value = keyspace.Attachment{}
			last := &leaseOnRecord{id: b.ID, acquire: new(entry.Entry), released: map[entry.Ref]bool{}}
			if _, err := s.readRecord(b.ID.Node, last.take); err != nil {
				return nil, err
			}
			b.Value.Acquire = last.ref
		}
		out.Leases = append(out.Leases, b)
	}
	for _, kv := range r.Ranges[3].KVs {
		key, err := w.Keys.Parse(kv.Key)
		var b keyspace.Block
		if err == nil && keyspace.Decode(kv.Value, &b) == nil && b.Node == node {
			out.Claims = append(out.Claims, Claim{Block: key.Block, Claim: b.Claim, Node: node})
		}
	}
	return out, nil
}

// Ended is what End did.
type Ended struct {
	Closed   entry.Ref // the last entry of the node's chain that counts
	Released []keyspace.AttachmentID
	Blocks   []keyspace.BlockID // given back
	Kept     []keyspace.BlockID // others hold addresses in them, or
	Back     bool               // the node came back before they were given back
}

// End releases every lease that a node had when its belongings were read, and gives
// its blocks back. With remove it closes the node's chain first, so that nothing
// the node still does adds to them: it may not start anew before its last lease is
// ended. It may be called again after it failed.
//
// A node that has come back since, on another chain, keeps what it got on that: only
// the chain that was decided on is closed (else ErrConflict), and only what was
// acquired or claimed before it was closed ends.
func (w *Writer) End(ctx context.Context, b *Belongings, remove bool, reason string) (*Ended, error) {
	out := new(Ended)
	all := *b
	var closed *guard
	if remove && b.Chain != (entry.ChainID{}) {
		node := entry.Writer{Kind: entry.KindNode, Name: b.Node}
		done, err := w.Replace(ctx, Replacement{Writer: node, Chain: b.Chain, Remove: true}, reason)
		out.Closed = done.Last
		if err != nil {
			return out, err
		}
		// What follows is done only while the node is closed by this very close.
		closed = &guard{w.Keys.Writer(node), done.By}
		// What it did on that chain until it was closed belongs to it, too.
		last, err := w.Belongings(ctx, b.Node)
		if err != nil {
			return out, err
		}
		for _, l := range last.Leases {
			if l.Value.Acquire.Chain == b.Chain && !slices.ContainsFunc(b.Leases, func(x Belonging) bool { return x.ID == l.ID && x.Value.Acquire == l.Value.Acquire }) {
				all.Leases = append(slices.Clone(all.Leases), l)
			}
		}
		for _, c := range last.Claims {
			if c.Claim.Chain == b.Chain && !slices.Contains(b.Claims, c) {
				all.Claims = append(slices.Clone(all.Claims), c)
			}
		}
	}
	for _, l := range all.Leases {
		err := w.releaseLease(ctx, &session{Writer: w, anyState: true, guard: closed}, l.ID, l.Value.Acquire, reason)
		if errors.Is(err, ErrNotFound) {
			continue
		} else if err != nil {
			return out, fmt.Errorf("releasing %v: %w", l.ID, err)
		}
		out.Released = append(out.Released, l.ID)
	}
	for i, c := range all.Claims {
		switch err := w.withSession(ctx, &session{Writer: w, anyState: true, guard: closed}, unclaim(c, reason)); {
		case errors.Is(err, ErrNotFound):
		case errors.Is(err, errGuarded):
			// All that it leased is ended, so that it may come back; its blocks are its own.
			out.Back = true
			for _, c := range all.Claims[i:] {
				out.Kept = append(out.Kept, c.Block)
			}
			return out, nil
		case errors.Is(err, ErrConflict):
			out.Kept = append(out.Kept, c.Block)
		case err != nil:
			return out, fmt.Errorf("giving block %v back: %w", c.Block, err)
		default:
			out.Blocks = append(out.Blocks, c.Block)
		}
	}
	return out, nil
}

// guard keeps a commit from being done once a head is no longer closed by a close:
// the node was let start anew, and may have.
type guard struct {
	key   string
	close entry.Ref
}

// errGuarded is the ErrConflict of a guard.
var errGuarded = fmt.Errorf("%w", ErrConflict)

// compare reads the head and returns what the commit compares.
func (g *guard) compare(s *session) ([]Compare, error) {
	if g == nil {
		return nil, nil
	}
	r, err := s.Store.Read(s.ctx, false, []Get{{Key: g.key}})
	if err != nil {
		return nil, err
	}
	var w keyspace.Writer
	if kvs := r.Ranges[0].KVs; len(kvs) != 1 || keyspace.Decode(kvs[0].Value, &w) != nil || w.Closed != g.close || !w.Removed {
		return nil, fmt.Errorf("%w: the node was let start anew meanwhile (%s): look again", errGuarded, g.key)
	}
	return []Compare{{Key: g.key, Mod: modAt(r.Ranges[0])}}, nil
}
