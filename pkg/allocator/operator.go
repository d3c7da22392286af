package allocator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// What operators do. Each is one transaction with one entry on the operator's
// own chain, besides the open of that chain where it is the first.

// errMetaPresent ends an init that has been done before.
var errMetaPresent = errors.New("the ledger is initialised already")

// Init writes meta, once. It returns the cluster's meta and whether this call
// wrote it. Where meta is present it changes nothing and does not fail.
func (w *Writer) Init(ctx context.Context, reason string) (keyspace.Meta, bool, error) {
	var meta keyspace.Meta
	err := w.withSession(ctx, &session{Writer: w, init: true}, func(s *session) error {
		for {
			r, err := s.Store.Read(s.ctx, false, []Get{
				{Key: s.Keys.Meta()},
				{Key: s.Keys.Prefix(), End: keyspace.After(s.Keys.Prefix()), Limit: 1},
				{Key: s.Keys.Writer(s.Config.Writer)},
			})
			if err != nil {
				return err
			}
			if kvs := r.Ranges[0].KVs; len(kvs) == 1 {
				if err := keyspace.Decode(kvs[0].Value, &meta); err != nil {
					return fmt.Errorf("%w: %s: %w", ErrIntegrity, s.Keys.Meta(), err)
				}
				return errMetaPresent
			}
			if kvs := r.Ranges[1].KVs; len(kvs) > 0 {
				return fmt.Errorf("%w: %s is absent, but %s is there: this is no empty ledger; restore the backup, or choose another prefix", ErrIntegrity, s.Keys.Meta(), kvs[0].Key)
			}
			if s.mark != nil && s.mark.Seq > 0 {
				return fmt.Errorf("%w: %s has written to cluster %s before, and this etcd is empty: it was wiped or is the wrong one; for a new ledger move %s away",
					ErrIntegrity, s.Config.Writer, s.mark.Cluster, s.Dir.Path())
			}
			meta = keyspace.Meta{
				Version: keyspace.FormatVersion, Cluster: newUUID(), EtcdCluster: keyspace.EtcdClusterID(r.Cluster),
				Epoch: 1, State: keyspace.Running,
			}
			v := &view{revision: r.Revision, cluster: r.Cluster, meta: meta}
			if s.mark != nil {
				// An init that died may have sent its commit: this one is the same
				// ledger and chain, so that it does not matter which of them lands.
				meta.Cluster = s.mark.Cluster
				v.meta = meta
				m := *s.mark
				m.EtcdCluster, m.Epoch = meta.EtcdCluster, meta.Epoch
				if err := s.saveMark(m, r.Revision, true); err != nil {
					return err
				}
			}
			err = s.putMeta(v, &meta, reason, nil)
			if !errors.Is(err, errAgain) {
				return err
			}
		}
	})
	if errors.Is(err, errMetaPresent) {
		return meta, false, nil
	}
	return meta, err == nil, err
}

// newUUID is a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// putMeta commits a change of meta with its entry.
func (s *session) putMeta(v *view, meta *keyspace.Meta, reason string, more []Write) error {
	e := &entry.Entry{
		Op: entry.Meta, Cluster: meta.Cluster, EtcdCluster: meta.EtcdCluster, Epoch: meta.Epoch,
		State: string(meta.State), Reason: reason,
	}
	_, err := s.commit(v, change{
		entries: []*entry.Entry{e},
		writes: func(refs []entry.Ref) []Write {
			meta.Entry = refs[0]
			return append([]Write{{Key: s.Keys.Meta(), Value: keyspace.Encode(meta)}}, more...)
		},
	})
	return err
}

// Meta reads meta, without a lock or a check.
func (w *Writer) Meta(ctx context.Context) (keyspace.Meta, error) {
	var meta keyspace.Meta
	ctx, cancel := context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	if err := w.Store.Connect(ctx); err != nil {
		return meta, err
	}
	r, err := w.Store.Read(ctx, false, []Get{{Key: w.Keys.Meta()}})
	if err != nil {
		return meta, err
	}
	if len(r.Ranges[0].KVs) == 0 {
		return meta, fmt.Errorf("%w: %s is absent: run 'ledger init' once", ErrNotInitialised, w.Keys.Meta())
	}
	return meta, keyspace.Decode(r.Ranges[0].KVs[0].Value, &meta)
}

// again runs f with fresh views until it no longer asks for another.
func (s *session) again(f func() error) error {
	for tries := 0; ; tries++ {
		err := f()
		if !errors.Is(err, errAgain) {
			return err
		}
		if s.ctx.Err() != nil {
			return fmt.Errorf("%w: gave up after %d conflicts: %w", ErrUnavailable, tries+1, s.ctx.Err())
		}
		s.pause(tries)
	}
}

// Freeze keeps everybody from allocating until Thaw. Frozen already is success.
func (w *Writer) Freeze(ctx context.Context, reason string) (changed bool, err error) {
	err = w.withSession(ctx, &session{Writer: w, drill: true}, func(s *session) error {
		return s.again(func() error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			if v.meta.State == keyspace.Frozen {
				return nil
			}
			meta := v.meta
			meta.State = keyspace.Frozen
			changed = true
			return s.putMeta(v, &meta, reason, nil)
		})
	})
	return changed, err
}

// ReleaseLease ends the lease that acquire names, of any node's attachment, on
// this operator's chain, also while the ledger is frozen. ErrNotFound says that
// the attachment has none, or another by now. A zero acquire means whatever it
// is, or nothing.
func (w *Writer) ReleaseLease(ctx context.Context, id keyspace.AttachmentID, acquire entry.Ref, reason string) error {
	return w.withSession(ctx, &session{Writer: w, anyState: true}, func(s *session) error {
		return s.release(id, acquire, nil, reason)
	})
}

// Unclaim gives a block back. It fails with ErrConflict while an address of it
// is leased.
func (w *Writer) Unclaim(ctx context.Context, b keyspace.BlockID, reason string) error {
	return w.with(ctx, func(s *session) error {
		return s.again(func() error {
			set := RangeSet{segments: []segment{{IPRange: rangeOf(b.Prefix), bits: b.Prefix.Bits()}}}
			n := need{blocks: nil, addrs: set.within(b.Prefix)}
			pool := &Pool{Space: b.Space, Name: b.Pool}
			gets := append([]Get{{Key: s.Keys.Block(b)}}, s.gets(pool, &n)...)
			v, err := s.look(false, gets...)
			if err != nil {
				return err
			}
			if err := s.refused(v); err != nil {
				return err
			}
			if len(v.extra[0].KVs) == 0 {
				return fmt.Errorf("block %v: %w", b, ErrNotFound)
			}
			var claim keyspace.Block
			if err := keyspace.Decode(v.extra[0].KVs[0].Value, &claim); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrIntegrity, v.extra[0].KVs[0].Key, err)
			}
			k := newKnown()
			if err := s.learn(k, &n, v.extra[1:]); err != nil {
				return err
			}
			for ip, a := range k.addrs {
				if a.load().bad || a.value.State == keyspace.Leased {
					return fmt.Errorf("%w: %v of block %v is leased by %v", ErrConflict, ip, b, a.value.Holder)
				}
			}
			e := &entry.Entry{Op: entry.Unclaim, Space: b.Space, Pool: b.Pool, Node: claim.Node, Reason: reason}
			e.Blocks = append(e.Blocks, b.Prefix)
			addresses := gets[1]
			_, err = s.commit(v, change{
				entries: []*entry.Entry{e},
				compare: []Compare{
					{Key: s.Keys.Block(b), Mod: v.extra[0].KVs[0].Mod},
					{Key: addresses.Key, End: addresses.End, Mod: v.revision}, // none changed since
				},
				writes: func([]entry.Ref) []Write { return []Write{{Key: s.Keys.Block(b), Delete: true}} },
			})
			return err
		})
	})
}

// Replace lets a writer that lost its identity open another chain: it closes
// the old one on this operator's chain. ErrNotFound says that it has none.
func (w *Writer) Replace(ctx context.Context, lost entry.Writer, reason string) (closes entry.Ref, err error) {
	err = w.withSession(ctx, &session{Writer: w, anyState: true, drill: true}, func(s *session) error {
		if lost == s.Config.Writer {
			return fmt.Errorf("%w: %v cannot replace itself: another operator must (--as NAME)", ErrIntegrity, lost)
		}
		return s.again(func() error {
			key := s.Keys.Writer(lost)
			v, err := s.look(false, Get{Key: key})
			if err != nil {
				return err
			}
			if len(v.extra[0].KVs) == 0 {
				return fmt.Errorf("%v has no chain, so nothing is to be replaced: move its state directory away: %w", lost, ErrNotFound)
			}
			kv := v.extra[0].KVs[0]
			var value keyspace.Writer
			if err := keyspace.Decode(kv.Value, &value); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrIntegrity, key, err)
			}
			closes = value.Head()
			if !value.Closed.IsZero() {
				return nil // done before
			}
			e := &entry.Entry{Op: entry.Close, Writer: lost, Closes: closes, Reason: reason}
			_, err = s.commit(v, change{
				entries: []*entry.Entry{e},
				compare: []Compare{{Key: key, Mod: kv.Mod}},
				writes: func(refs []entry.Ref) []Write {
					value.Closed = refs[0]
					return []Write{{Key: key, Value: keyspace.Encode(value)}}
				},
			})
			return err
		})
	})
	return closes, err
}

// Import records a lease that host-local made on this node. The attachment's
// addresses must be nobody's, or its own already.
func (w *Writer) Import(ctx context.Context, id keyspace.AttachmentID, a keyspace.Attachment, reason string) error {
	return w.with(ctx, func(s *session) error {
		return s.again(func() error {
			return s.assert(id, a, reason)
		})
	})
}

// assert leases given addresses to an attachment: those of an import, or those
// that a restore lost. ErrConflict names another holder.
func (s *session) assert(id keyspace.AttachmentID, a keyspace.Attachment, reason string) error {
	attachment := s.Keys.Attachment(id)
	gets := append([]Get{{Key: attachment}}, s.addressGets(a.Space, a.Leases)...)
	// A restore takes claims back, too. Those that are remembered are made again
	// with the first lease in them, before another node takes the block.
	var blocks []keyspace.BlockID
	for _, p := range s.Dir.Blocks(a.Space, a.Pool) {
		if slices.ContainsFunc(addrsOf(a.Leases), p.Contains) {
			blocks = append(blocks, keyspace.BlockID{Space: a.Space, Pool: a.Pool, Prefix: p})
			gets = append(gets, Get{Key: s.Keys.Block(blocks[len(blocks)-1])})
		}
	}
	v, err := s.look(false, gets...)
	if err != nil {
		return err
	}
	if err := s.refused(v); err != nil {
		return err
	}
	if kvs := v.extra[0].KVs; len(kvs) == 1 {
		var have keyspace.Attachment
		if err := keyspace.Decode(kvs[0].Value, &have); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrIntegrity, attachment, err)
		}
		if have.Space == a.Space && slices.Equal(addrsOf(have.Leases), addrsOf(a.Leases)) {
			return s.hold(id, have)
		}
		return fmt.Errorf("%w: %v holds %v, not %v", ErrConflict, id, addrsOf(have.Leases), addrsOf(a.Leases))
	}
	e := &entry.Entry{
		Op: entry.Acquire, Space: a.Space, Pool: a.Pool, Reason: reason, Pod: a.Pod, PodUID: a.PodUID,
		Network: id.Network, Container: id.Container, Interface: id.Interface, Node: id.Node,
	}
	compare := []Compare{{Key: attachment}}
	for i, l := range a.Leases {
		ip := l.Address.Addr()
		c, after := Compare{Key: s.Keys.Address(a.Space, ip)}, entry.Ref{}
		if kvs := v.extra[1+i].KVs; len(kvs) == 1 {
			var held keyspace.Address
			if err := decodeAddress(kvs[0].Value, &held); err != nil {
				return fmt.Errorf("%w: %s: %w", ErrIntegrity, kvs[0].Key, err)
			}
			if held.State == keyspace.Leased {
				return fmt.Errorf("%w: %v is held by %v, and %v says it holds it", ErrConflict, ip, held.Holder, id)
			}
			c.Mod, after = kvs[0].Mod, held.Release
		}
		compare = append(compare, c)
		e.Addresses = append(e.Addresses, entry.Address{IP: ip, After: after})
	}
	var claims []keyspace.BlockID
	for i, b := range blocks {
		if len(v.extra[1+len(a.Leases)+i].KVs) == 0 {
			claims = append(claims, b)
			compare = append(compare, Compare{Key: s.Keys.Block(b)})
			e.Blocks = append(e.Blocks, b.Prefix)
		}
	}
	_, err = s.commit(v, change{
		entries: []*entry.Entry{e},
		compare: compare,
		writes: func(refs []entry.Ref) []Write {
			a.Acquire = refs[0]
			writes := append(s.putAddresses(a.Space, a.Pool, addrsOf(a.Leases), id, refs[0]), Write{Key: attachment, Value: keyspace.Encode(a)})
			return append(writes, s.putBlocks(claims, id.Node, refs[0])...)
		},
	})
	if err != nil {
		return err
	}
	return s.hold(id, a)
}
