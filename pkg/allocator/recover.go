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

// The drill after a restore. Each step may be killed anywhere and run again, and
// where there is nothing to do it does nothing.
//
//	RecoverStart   once: frozen, epoch + 1, etcd's new cluster ID
//	Recover        on each node: a new chain; what it no longer holds is
//	               released, what it holds is asserted; a recover entry ends it
//	Thaw           once: checks that no node is missing, then runs again

// RecoverStart freezes the ledger under a new epoch, and reports whether it did:
// a recovery that is under way in this etcd is not begun anew, unless epoch is
// beyond it. The operator's own chain may have lost entries too: it opens a new
// one in the same transaction.
//
// The epoch is one more than any that the store or this operator has seen, and
// at least epoch: where nodes have seen later ones that the restored store has
// forgotten, they say which.
func (w *Writer) RecoverStart(ctx context.Context, epoch uint64, reason string) (meta keyspace.Meta, began bool, err error) {
	err = w.withSession(ctx, &session{Writer: w, restored: true, drill: true}, func(s *session) error {
		return s.again(func() error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			meta = v.meta
			etcd := keyspace.EtcdClusterID(v.cluster)
			if meta.Recovering && meta.EtcdCluster == etcd && epoch <= meta.Epoch && (s.mark == nil || s.mark.Epoch <= meta.Epoch) {
				return nil
			}
			meta.Epoch = max(meta.Epoch+1, epoch)
			meta.State, meta.Recovering = keyspace.Frozen, true
			meta.EtcdCluster = etcd
			if s.mark != nil {
				meta.Epoch = max(meta.Epoch, s.mark.Epoch+1)
			}
			// The new chain is of the new epoch, and so is the mark.
			next := *v
			next.meta = meta
			before := statedir.Position{EtcdCluster: v.meta.EtcdCluster, Epoch: v.meta.Epoch}
			if err := s.renew(&next, &before); err != nil {
				return err
			}
			began = true
			if had := s.mark.Previous; v.writer != nil && had.Chain == v.writer.Chain && had.Seq > v.writer.Seq {
				s.Log.Warn("the restore lost entries of this operator: what they ended is leased again, or put back by its node; an export from before shows them",
					"chain", had.Chain.Short(), "from", v.writer.Seq+1, "to", had.Seq)
			}
			return s.putMeta(v, &meta, reason, nil)
		})
	})
	return meta, began && err == nil, err
}

// renew puts aside the mark of before the restore and starts a chain that names it;
// with a new key, if an operator closed the one before: it may have been for its key.
// before is where a writer without a mark goes back to, where v's epoch is not in etcd
// yet; nil: it is.
func (s *session) renew(v *view, before *statedir.Position) error {
	m := statedir.Mark{Position: statedir.Position{Recovering: s.Config.Writer.Kind == entry.KindNode}}
	if s.mark != nil && s.mark.Seq == 0 && v.writer != nil && v.writer.Chain == s.mark.Chain && v.writer.Key == s.vkey {
		// The chain was opened by a process that did not live to note it. Under another
		// key than ours it is closed, or an operator has to.
		if err := s.follow(v, Range{More: true}); err != nil {
			return err
		}
	}
	if m.Before = before; s.mark != nil {
		if before != nil {
			*before = s.mark.Position
		}
		if m.Previous = s.mark.Ref(); s.mark.Seq == 0 {
			m.Previous = s.mark.Previous // a drill that was killed here before
		}
	}
	key := s.ownKey
	if v.writer != nil && !v.writer.Closed.IsZero() {
		key = s.newKey
	}
	skey, err := key()
	if err != nil {
		return err
	}
	s.mark = nil // saveMark only raises the revision, and it went back
	return s.newMark(v, m, skey)
}

// Conflict is an address that this node holds and etcd says is another's.
type Conflict struct {
	Holding statedir.Holding
	Reason  string
}

// Recovery is what Recover did.
type Recovery struct {
	Epoch     uint64
	Before    bool // there was nothing to do: it was recovered before, or never had to be
	Released  []keyspace.AttachmentID
	Asserted  []keyspace.AttachmentID
	Ended     []statedir.Holding // held here, and ended on the record: let go
	Kept      int
	Conflicts []Conflict
	Done      bool // the recover entry is written
}

// Runtime is what the container runtime knows, taken from its list after this
// node entered the epoch.
type Runtime interface {
	// Knows reports whether the runtime lists the attachment's sandbox.
	Knows(id keyspace.AttachmentID) bool
	// Leaked reports whether a lease is proven to be nobody's any more, as package
	// leak proves it: one look at a list is no proof.
	Leaked(id keyspace.AttachmentID, acquire entry.Ref) bool
}

// Enter brings this node into the epoch of meta and reports whether it has yet to
// recover in it. It fails with ErrNotFound where this machine has never written:
// then it has nothing to recover, and must not become a node by it.
func (w *Writer) Enter(ctx context.Context) (meta keyspace.Meta, due bool, err error) {
	err = w.withSession(ctx, &session{Writer: w, restored: true, drill: true}, func(s *session) error {
		return s.again(func() error {
			meta, due, err = s.enterEpoch()
			return err
		})
	})
	return meta, due, err
}

// Recover brings this node into the epoch of meta: it releases what etcd says it
// holds and it does not, and asserts what it holds and etcd does not say. A
// conflict (another node, not recovered yet, has the address in the restored
// state) is listed, and the node is not recovered until it is gone: run it again
// then. A node that has recovered already, or never had to, is left as it is: its
// pods come and go, and nothing here could tell which lease is old.
//
// What a node holds is in its state directory. What was ended on the record since
// (by an operator, or by a process that died before it could forget) is not
// asserted again. With a runtime, what is proven to be leaked is let go, and what
// the runtime knows and etcd leases to it is held, though the state directory was
// lost.
func (w *Writer) Recover(ctx context.Context, runtime Runtime, reason string) (*Recovery, error) {
	out := new(Recovery)
	meta, due, err := w.Enter(ctx)
	if err != nil {
		return nil, err
	}
	out.Epoch = meta.Epoch
	if !due {
		out.Before, out.Done = true, true
		if meta.Recovering {
			// What a DEL has queued may be what another node waits for, and thaw for that.
			out.Released, err = w.drainAll(ctx, &session{Writer: w, drill: true})
		}
		return out, err
	}
	// Each step takes the lock and its deadline anew, and looks again at what it
	// acts on: in between a DEL may end what was listed, or an operator. An ADD
	// cannot: until the recover entry this node is refused.
	drill := func(f func(s *session) error) error {
		return w.withSession(ctx, &session{Writer: w, drill: true}, f)
	}
	var ids []keyspace.AttachmentID
	err = drill(func(s *session) error {
		if _, err := s.look(false); err != nil {
			return err
		}
		ids, err = s.bothSides(out)
		return err
	})
	if err != nil {
		return nil, err
	}
	// First all releases: what one pod gave back, another may have been given.
	for _, assert := range []bool{false, true} {
		for _, id := range ids {
			err := drill(func(s *session) error {
				return s.again(func() error { return s.recoverOne(id, assert, runtime, out) })
			})
			switch {
			case errors.Is(err, ErrConflict):
				if h := w.Dir.Holding(id); h != nil {
					out.Conflicts = append(out.Conflicts, Conflict{*h, err.Error()})
				}
			case err != nil:
				return out, fmt.Errorf("recovering %v: %w", id, err)
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
			if s.recovered(v) {
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

// bothSides lists what etcd says this node holds, and what it holds.
//
// Of two that hold one address the earlier was ended before the later could have
// it, though a restore may have lost the entry that says so.
func (s *session) bothSides(out *Recovery) ([]keyspace.AttachmentID, error) {
	held, err := s.Dir.Holdings()
	if err != nil {
		return nil, fmt.Errorf("%w: %w; move the named files away once you know what those pods hold ('ledger import' can assert it)", ErrState, err)
	}
	all, unread, err := s.nodeAttachments()
	if err != nil || len(unread) > 0 {
		return nil, errors.Join(append(unread, err)...)
	}
	latest := map[inSpace]entry.Ref{}
	for _, h := range held {
		for _, at := range places(&h.Value) {
			if a := h.Value.Acquire; latest[at].Chain != a.Chain || latest[at].Seq < a.Seq {
				latest[at] = a
			}
		}
	}
	for _, h := range held {
		a := h.Value.Acquire
		if slices.ContainsFunc(places(&h.Value), func(at inSpace) bool { return latest[at].Chain == a.Chain && latest[at].Seq > a.Seq }) {
			if err := s.Dir.Unhold(h.ID); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrState, err)
			}
			out.Ended = append(out.Ended, h)
			continue
		}
		all[h.ID] = h.Value
	}
	return sortedIDs(all), nil
}

// recoverOne settles one attachment: in the first round what is to be released, in
// the second what is to be asserted. Both sides are read anew.
func (s *session) recoverOne(id keyspace.AttachmentID, assert bool, runtime Runtime, out *Recovery) error {
	held, prepared := s.Dir.Holding(id), s.Dir.Prepared(id)
	gets := []Get{{Key: s.Keys.Attachment(id)}}
	var acquires []entry.Ref
	for _, h := range []*statedir.Holding{held, prepared} {
		if h != nil {
			acquires = append(acquires, h.Acquires()...)
		}
	}
	for _, a := range acquires {
		gets = append(gets, Get{Key: s.Keys.Entry(s.Config.Writer, a.Chain, a.Seq)})
	}
	if held != nil {
		gets = append(gets, s.addressGets(held.Value.Space, held.Value.Leases)...)
	}
	v, err := s.look(false, gets...)
	if err != nil {
		return err
	}
	if s.recovered(v) {
		return nil // by another process; from here on pods come and go
	}
	there := map[entry.Ref]*entry.Entry{} // those of the acquires that are in etcd
	for i, a := range acquires {
		if kvs := v.extra[1+i].KVs; len(kvs) == 1 && entry.HashOf(kvs[0].Value) == a.Hash {
			if e, err := entry.Parse(kvs[0].Value); err == nil {
				there[a] = e
			}
		}
	}
	if prepared != nil && there[prepared.Value.Acquire] != nil && there[prepared.Value.Acquire].Assert != "" && !s.Dir.IsQueued(id) {
		// A run of this drill asserted it, or an import, and did not live to note that.
		if err := s.hold(id); err != nil {
			return err
		}
		held = prepared
	}
	var live *keyspace.Attachment
	if kvs := v.extra[0].KVs; len(kvs) == 1 {
		live = new(keyspace.Attachment)
		if err := decodeAttachment(kvs[0].Value, live); err != nil {
			return spoilt(id, kvs[0].Key, err)
		}
	}
	forget := func() error {
		held = nil
		if err := s.Dir.Unhold(id); err != nil {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
		return nil
	}
	if runtime != nil {
		switch {
		case held != nil && runtime.Leaked(id, held.Value.Acquire), held == nil && live != nil && runtime.Leaked(id, live.Acquire):
			if err := forget(); err != nil {
				return err
			}
		case held == nil && live != nil && runtime.Knows(id) && !s.Dir.IsQueued(id):
			held = &statedir.Holding{ID: id, Value: *live}
		}
	}
	same := live != nil && held != nil && live.Space == held.Value.Space && slices.Equal(addrsOf(live.Leases), addrsOf(held.Value.Leases))
	if held != nil && live == nil && s.names(id, &held.Value, v.extra[1+len(acquires):]) {
		// No release leaves that. The pod's DEL, or 'ledger release ADDRESS', ends it.
		s.Log.Warn("the key of an attachment is gone, and its addresses are leased to it", "attachment", id.String())
		if assert {
			out.Kept++
		}
		return nil
	}
	// Its acquire is there: a restore has not taken it back, nor anything before it.
	// So where etcd does not lease to it by that acquire any more, an entry says so.
	if held != nil && !same && slices.ContainsFunc(held.Acquires(), func(a entry.Ref) bool { return there[a] != nil }) {
		out.Ended = append(out.Ended, *held)
		if err := forget(); err != nil {
			return err
		}
	}
	switch {
	case !assert && live != nil && !same:
		// What it holds instead, if anything, is asserted next: the holding stays. One
		// whose release waits goes first, as in letGo.
		if s.Dir.IsQueued(id) {
			if err := forget(); err != nil {
				return err
			}
		}
		if err := s.release(id, live.Acquire, live, "recover: not held any more"); errors.Is(err, ErrNotFound) {
			return nil // ended in between, by another
		} else if err != nil {
			return err
		}
		if err := s.Dir.Dequeue(id); err != nil {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
		out.Released = append(out.Released, id)
	case assert && held != nil && same:
		out.Kept++
		return s.note(held.By(*live))
	case assert && held != nil:
		if err := s.assert(*held, entry.AssertRecover, "recover: held since "+held.Value.Acquire.String()); err != nil {
			return err
		}
		out.Asserted = append(out.Asserted, id)
	}
	return nil
}

// recovered reports whether this writer's chain has its recover entry.
func (s *session) recovered(v *view) bool {
	return s.mark != nil && v.writer != nil && v.writer.Chain == s.mark.Chain && !v.writer.Recover.IsZero()
}

// enterEpoch gives the node a chain of meta's epoch, and reports whether it has yet
// to recover in it.
func (s *session) enterEpoch() (meta keyspace.Meta, due bool, err error) {
	v, err := s.look(false)
	if err != nil {
		return meta, false, err
	}
	meta = v.meta
	epoch := meta.Epoch
	if id := keyspace.EtcdClusterID(v.cluster); id != v.meta.EtcdCluster {
		return meta, false, fmt.Errorf("%w: etcd's cluster ID is %s and meta's %s: 'ledger recover start' comes first", ErrIntegrity, id, v.meta.EtcdCluster)
	}
	if s.mark == nil {
		if v.writer != nil {
			return meta, false, fmt.Errorf("%w: %s exists, and this machine has no key for it; its way out: %s", ErrIntegrity, s.Keys.Writer(s.Config.Writer), s.wayOut())
		}
		return meta, false, fmt.Errorf("%s has never written from state directory %s, so it has nothing to recover: %w", s.Config.Writer, s.Dir.Path(), ErrNotFound)
	}
	if s.mark.Epoch > epoch {
		return meta, false, fmt.Errorf("%w: the ledger's epoch is %d, and %s has seen %d: 'ledger recover start --epoch %d' comes first", ErrIntegrity, epoch, s.Config.Writer, s.mark.Epoch, s.mark.Epoch+1)
	}
	if s.mark.Epoch == epoch && s.mark.EtcdCluster != v.meta.EtcdCluster {
		return meta, false, fmt.Errorf("%w: %s has seen epoch %d in another etcd (%s): 'ledger recover start --epoch %d' comes first", ErrIntegrity, s.Config.Writer, s.mark.Epoch, s.mark.EtcdCluster, s.mark.Epoch+1)
	}
	if s.mark.Epoch < epoch {
		if err := s.mayComeBack(v); err != nil {
			return meta, false, err
		}
		if err := s.renew(v, nil); err != nil {
			return meta, false, err
		}
	}
	// From here the new mark holds, and the usual checks apply.
	s.restored = false
	if v, err = s.look(false); errors.Is(err, errRollback) {
		return meta, false, fmt.Errorf("%w; this restore came after the recovery to epoch %d: 'ledger recover start --epoch %d' comes first", err, s.mark.Epoch, s.mark.Epoch+1)
	} else if err != nil {
		return meta, false, err
	}
	if !s.mark.Recovering || s.recovered(v) {
		return meta, false, nil
	}
	if s.mark.Seq == 0 {
		_, err = s.commit(v, change{})
	}
	return meta, true, err
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
			_, err = s.commit(v, change{
				entries: []*entry.Entry{metaEntry(&meta, reason)},
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
			return fmt.Errorf("%w: %s: %w; its way out: 'ledger node replace %s'", ErrIntegrity, kv.Key, err, key.Writer.Name)
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
