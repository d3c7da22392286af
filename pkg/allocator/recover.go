package allocator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// The drill after a restore. Each step may be killed anywhere and run again.
//
//	RecoverStart   once: frozen, epoch + 1, etcd's new cluster ID
//	Recover        on each node: a new chain; what it no longer holds is
//	               released, what it holds is asserted; a recover entry ends it
//	Thaw           once: checks that no node is missing, then runs again

// RecoverStart freezes the ledger under a new epoch. The operator's own chain
// may have lost entries too: it opens a new one in the same transaction.
//
// The epoch is one more than any that the store or this operator has seen, and
// at least epoch: where nodes have seen later ones that the restored store has
// forgotten, they say which.
func (w *Writer) RecoverStart(ctx context.Context, epoch uint64, reason string) (keyspace.Meta, error) {
	var meta keyspace.Meta
	err := w.withSession(ctx, &session{Writer: w, restored: true, drill: true}, func(s *session) error {
		return s.again(func() error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			meta = v.meta
			meta.Epoch = max(meta.Epoch+1, epoch)
			meta.State, meta.Recovering = keyspace.Frozen, true
			meta.EtcdCluster = keyspace.EtcdClusterID(v.cluster)
			if s.mark != nil {
				meta.Epoch = max(meta.Epoch, s.mark.Epoch+1)
			}
			// The new chain is of the new epoch, and so is the mark.
			next := *v
			next.meta = meta
			if err := s.renew(&next); err != nil {
				return err
			}
			return s.putMeta(v, &meta, reason, nil)
		})
	})
	return meta, err
}

// renew puts aside the mark of before the restore and starts a chain that names it.
func (s *session) renew(v *view) error {
	var previous entry.Ref
	if s.mark != nil {
		if previous = s.mark.Ref(); s.mark.Seq == 0 {
			previous = s.mark.Previous // a drill that was killed here before
		}
	}
	skey, err := s.ownKey()
	if err != nil {
		return err
	}
	s.mark = nil // saveMark only raises the revision, and it went back
	return s.newMark(v, skey, previous, s.Config.Writer.Kind == entry.KindNode)
}

// Conflict is an address that this node holds and etcd says is another's.
type Conflict struct {
	Holding statedir.Holding
	Reason  string
}

// Recovery is what Recover did.
type Recovery struct {
	Epoch     uint64
	Released  []keyspace.AttachmentID
	Asserted  []keyspace.AttachmentID
	Kept      int
	Conflicts []Conflict
	Done      bool // the recover entry is written
}

// Recover brings this writer into the epoch of meta. For a node it releases
// what etcd says it holds and it does not, and asserts what it holds and etcd
// does not say. A conflict (another node, not recovered yet, has the address in
// the restored state) is listed, and the writer is not recovered until it is
// gone: run it again then. An operator has no holdings.
//
// What a node holds is in its state directory. With runs, which says whether the
// runtime knows an attachment, that is put right first: what is held and does not
// run is forgotten, and what runs and etcd leases to it is held, though the
// state directory was lost.
func (w *Writer) Recover(ctx context.Context, runs func(keyspace.AttachmentID) bool, reason string) (*Recovery, error) {
	out := new(Recovery)
	if err := w.enterEpoch(ctx, out); err != nil {
		return nil, err
	}
	if w.Config.Writer.Kind != entry.KindNode {
		out.Done = true
		return out, nil
	}
	var held map[keyspace.AttachmentID]keyspace.Attachment
	var live map[keyspace.AttachmentID]keyspace.Attachment
	// Each step takes the lock and its deadline anew. That pods come and go in
	// between is impossible: the ledger is frozen; where it has been thawed
	// without us, they are found by their holdings.
	drill := func(f func(s *session) error) error {
		return w.withSession(ctx, &session{Writer: w, drill: true}, f)
	}
	err := drill(func(s *session) error {
		hh, err := s.Dir.Holdings()
		if err != nil {
			return fmt.Errorf("%w: %w; move the named files away once you know what those pods hold ('ledger import' can assert it)", ErrState, err)
		}
		held = map[keyspace.AttachmentID]keyspace.Attachment{}
		for _, h := range hh {
			held[h.ID] = h.Value
		}
		if _, err := s.look(false); err != nil {
			return err
		}
		var unread []error
		if live, unread, err = s.nodeAttachments(); err != nil || len(unread) > 0 {
			return errors.Join(append(unread, err)...)
		}
		if runs == nil {
			return nil
		}
		for id := range held {
			if runs(id) {
				continue
			}
			// The holding goes first, as in letGo: dying here leaves a lease that
			// the next run releases.
			if err := s.Dir.Unhold(id); err != nil {
				return fmt.Errorf("%w: %w", ErrState, err)
			}
			delete(held, id)
		}
		for id, value := range live {
			if _, ok := held[id]; ok || !runs(id) {
				continue
			}
			if err := s.hold(id, value); err != nil {
				return err
			}
			held[id] = value
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, id := range sortedIDs(live) {
		if h, ok := held[id]; ok && h.Space == live[id].Space && slices.Equal(addrsOf(h.Leases), addrsOf(live[id].Leases)) {
			continue
		}
		err := drill(func(s *session) error {
			// What it holds instead, if anything, is asserted next: the holding stays.
			if err := s.release(id, entry.Ref{}, nil, "recover: not held any more"); err != nil {
				return err
			}
			if err := s.Dir.Dequeue(id); err != nil {
				return fmt.Errorf("%w: %w", ErrState, err)
			}
			return nil
		})
		if err != nil {
			return out, fmt.Errorf("releasing %v: %w", id, err)
		}
		out.Released = append(out.Released, id)
	}
	for _, id := range sortedIDs(held) {
		err := drill(func(s *session) error {
			return s.again(func() error { return s.assert(id, held[id], "recover: held since "+held[id].Acquire.String()) })
		})
		switch {
		case errors.Is(err, ErrConflict):
			out.Conflicts = append(out.Conflicts, Conflict{statedir.Holding{ID: id, Value: held[id]}, err.Error()})
		case err != nil:
			return out, fmt.Errorf("asserting %v: %w", id, err)
		default:
			if l, ok := live[id]; ok && slices.Equal(addrsOf(l.Leases), addrsOf(held[id].Leases)) {
				out.Kept++
			} else {
				out.Asserted = append(out.Asserted, id)
			}
		}
	}
	if len(out.Conflicts) > 0 {
		return out, nil
	}
	return out, drill(func(s *session) error {
		return s.again(func() error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			if v.writer != nil && !v.writer.Recover.IsZero() {
				out.Done = true
				return nil
			}
			_, err = s.commit(v, change{
				entries: []*entry.Entry{{Op: entry.Recover, Epoch: v.meta.Epoch, Reason: reason}},
				writer:  func(w *keyspace.Writer, refs []entry.Ref) { w.Recover = refs[0] },
			})
			out.Done = err == nil
			return err
		})
	})
}

// enterEpoch gives the writer a chain of meta's epoch.
func (w *Writer) enterEpoch(ctx context.Context, out *Recovery) error {
	return w.withSession(ctx, &session{Writer: w, restored: true, drill: true}, func(s *session) error {
		return s.again(func() error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			out.Epoch = v.meta.Epoch
			if id := keyspace.EtcdClusterID(v.cluster); id != v.meta.EtcdCluster {
				return fmt.Errorf("%w: etcd's cluster ID is %s and meta's %s: 'ledger recover start' comes first", ErrIntegrity, id, v.meta.EtcdCluster)
			}
			if s.mark == nil {
				if v.writer != nil {
					return fmt.Errorf("%w: %s exists, and this machine has no key for it; its way out: %s", ErrIntegrity, s.Keys.Writer(s.Config.Writer), s.wayOut())
				}
				return nil // a writer that never wrote has nothing to recover from
			}
			if s.mark.Epoch > v.meta.Epoch {
				return fmt.Errorf("%w: the ledger's epoch is %d, and %s has seen %d: 'ledger recover start --epoch %d' comes first", ErrIntegrity, v.meta.Epoch, s.Config.Writer, s.mark.Epoch, s.mark.Epoch+1)
			}
			if s.mark.Epoch == v.meta.Epoch && s.mark.EtcdCluster != v.meta.EtcdCluster {
				return fmt.Errorf("%w: %s has seen epoch %d in another etcd (%s): 'ledger recover start --epoch %d' comes first", ErrIntegrity, s.Config.Writer, s.mark.Epoch, s.mark.EtcdCluster, s.mark.Epoch+1)
			}
			if s.mark.Epoch < v.meta.Epoch {
				if err := s.renew(v); err != nil {
					return err
				}
			}
			// From here the new mark holds, and the usual checks apply.
			s.restored = false
			if v, err = s.look(false); errors.Is(err, errRollback) {
				return fmt.Errorf("%w; this restore came after the recovery to epoch %d: 'ledger recover start' comes first, once more", err, s.mark.Epoch)
			} else if err != nil {
				return err
			}
			if s.mark.Seq > 0 {
				return nil
			}
			_, err = s.commit(v, change{})
			return err
		})
	})
}

func sortedIDs(m map[keyspace.AttachmentID]keyspace.Attachment) []keyspace.AttachmentID {
	ids := make([]keyspace.AttachmentID, 0, len(m))
	for id := range m {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b keyspace.AttachmentID) int { return strings.Compare(a.String(), b.String()) })
	return ids
}

// Thaw ends freeze and recovery. After a recovery every node of nodes must have
// recovered, every node that etcd knows must be in nodes or in without, and
// stops/ is emptied. It changes nothing where one is missing, and names it.
func (w *Writer) Thaw(ctx context.Context, nodes, without []string, reason string) (changed bool, err error) {
	err = w.withSession(ctx, &session{Writer: w, drill: true}, func(s *session) error {
		return s.again(func() error {
			writers := s.Keys.Writers() + string(entry.KindNode) + "/"
			stops := Get{Key: s.Keys.Stops(), End: keyspace.After(s.Keys.Stops())}
			v, err := s.look(false, Get{Key: writers, End: keyspace.After(writers)}, stops)
			if err != nil {
				return err
			}
			if v.meta.State == keyspace.Running && len(v.stops) == 0 {
				return nil
			}
			if !v.meta.Recovering && len(v.stops) > 0 {
				return fmt.Errorf("%w: the cluster is stopped (%s): 'ledger recover start' comes first", ErrIntegrity, v.stops[0].Key)
			}
			if err := s.mayThaw(v, v.extra[0].KVs, nodes, without); err != nil {
				return err
			}
			for _, kv := range v.extra[1].KVs {
				var st keyspace.Stop
				_ = keyspace.Decode(kv.Value, &st)
				s.Log.Info("stop removed", "node", st.Node, "found", st.Found)
			}
			meta := v.meta
			meta.State, meta.Recovering = keyspace.Running, false
			changed = true
			e := &entry.Entry{
				Op: entry.Meta, Cluster: meta.Cluster, EtcdCluster: meta.EtcdCluster, Epoch: meta.Epoch, State: string(meta.State), Reason: reason,
			}
			_, err = s.commit(v, change{
				entries: []*entry.Entry{e},
				// A stop that came after the view is news: look again.
				compare: []Compare{{Key: stops.Key, End: stops.End, Mod: v.revision}, {Key: writers, End: keyspace.After(writers), Mod: v.revision}},
				writes: func(refs []entry.Ref) []Write {
					meta.Entry = refs[0]
					return []Write{
						{Key: s.Keys.Meta(), Value: keyspace.Encode(meta)},
						{Key: stops.Key, End: stops.End, Delete: true},
					}
				},
			})
			return err
		})
	})
	return changed && err == nil, err
}

// mayThaw names the nodes that are not ready.
func (s *session) mayThaw(v *view, writers []KV, nodes, without []string) error {
	seen := map[string]keyspace.Writer{}
	for _, kv := range writers {
		key, err := s.Keys.Parse(kv.Key)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrIntegrity, err)
		}
		var w keyspace.Writer
		if err := keyspace.Decode(kv.Value, &w); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrIntegrity, kv.Key, err)
		}
		seen[key.Writer.Name] = w
	}
	if !v.meta.Recovering && len(v.stops) == 0 {
		return nil // frozen and no more: nobody has to recover
	}
	var missing []string
	for _, n := range nodes {
		if slices.Contains(without, n) {
			continue
		}
		switch w, ok := seen[n]; {
		case !ok:
			missing = append(missing, n+": not in etcd; run 'ledger recover node' on it, or if it never had a pod leave it out of the list")
		case w.Epoch != v.meta.Epoch:
			missing = append(missing, fmt.Sprintf("%s: still in epoch %d, the ledger is in %d; run 'ledger recover node' on it", n, w.Epoch, v.meta.Epoch))
		case w.Recover.IsZero():
			missing = append(missing, n+": has conflicts or did not finish; run 'ledger recover node' on it again")
		}
	}
	for n, w := range seen {
		// One that was removed, or replaced and not seen since, comes back by a
		// chain of this epoch.
		if w.Closed.IsZero() && !slices.Contains(nodes, n) && !slices.Contains(without, n) {
			missing = append(missing, n+": is in etcd and neither in the list nor in --without")
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return fmt.Errorf("%w: not every node has recovered:\n  %s", ErrIntegrity, strings.Join(missing, "\n  "))
	}
	return nil
}
