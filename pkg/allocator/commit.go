package allocator

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// errAgain means that the plan was not committed and that another, from a
// fresh view, may be.
var errAgain = errors.New("plan again")

// change is a plan: entries to append, and what else the transaction compares
// and writes. The values written name the entries, so they are made once the
// entries are signed.
type change struct {
	entries []*entry.Entry // the op's own fields; the rest is filled in
	compare []Compare
	writes  func(refs []entry.Ref) []Write
	writer  func(w *keyspace.Writer, refs []entry.Ref) // adjusts the writer's value
}

// maxHints is how many claims the writer's value lists, and maxHint how long one
// is at most. No hash covers them: what somebody else put there is not carried on.
const (
	maxHints = 8
	maxHint  = 2*entry.MaxName + 64
)

// commit signs and sends a change. It returns references to its entries;
// errAgain after a conflict or an outcome that turned out not to be this
// commit's; ErrUnknownOutcome where the outcome stays unknown, with the file
// "open" left behind for the next process.
func (s *session) commit(v *view, c change) ([]entry.Ref, error) {
	if err := s.enroll(v); err != nil {
		return nil, err
	}
	s.step("enrolled")
	all := c.entries
	opens := s.mark.Seq == 0
	if opens {
		all = append([]*entry.Entry{s.open(v)}, all...)
	}
	w := keyspace.Writer{Chain: s.mark.Chain, Seq: s.mark.Seq, Hash: s.mark.Hash, Machine: s.Machine, Epoch: s.mark.Epoch}
	if v.writer != nil {
		w.Blocks = slices.DeleteFunc(slices.Clone(v.writer.Blocks), func(b string) bool { return len(b) > maxHint })
		w.Blocks = w.Blocks[:min(len(w.Blocks), maxHints)]
		if !opens {
			w.Closed, w.Recover = v.writer.Closed, v.writer.Recover
		}
	}
	w.Key = s.vkey
	txn := Txn{If: []Compare{
		{Key: s.Keys.Meta(), Mod: v.metaMod},
		{Key: s.Keys.Writer(s.Config.Writer), Mod: v.writerMod},
	}}
	if !s.stopsExempt(v) {
		txn.If = append(txn.If, Compare{Key: s.Keys.Stops(), End: keyspace.After(s.Keys.Stops())})
	}
	var refs []entry.Ref
	for _, e := range all {
		e.Chain, e.Seq, e.Prev = w.Chain, w.Seq+1, w.Hash
		e.Time, e.Revision = s.Now().UTC(), v.revision
		stored, hash, err := entry.Sign(e, s.signer)
		if err != nil {
			return nil, err
		}
		w.Seq, w.Hash = e.Seq, hash
		refs = append(refs, w.Head())
		key := s.Keys.Entry(s.Config.Writer, e.Chain, e.Seq)
		txn.If = append(txn.If, Compare{Key: key})
		txn.Then = append(txn.Then, Write{Key: key, Value: stored})
		for _, b := range e.Blocks {
			w.Blocks = hint(w.Blocks, keyspace.BlockID{Space: e.Space, Pool: e.Pool, Prefix: b}, e.Op)
		}
	}
	own := refs[len(refs)-len(c.entries):]
	if c.writer != nil {
		c.writer(&w, own)
	}
	txn.If = append(txn.If, c.compare...)
	txn.Then = append(txn.Then, Write{Key: s.Keys.Writer(s.Config.Writer), Value: keyspace.Encode(w)})
	if c.writes != nil {
		txn.Then = append(txn.Then, c.writes(own)...)
	}

	// From here until Settled a crash leaves "open", and whoever comes next fences.
	if err := s.Dir.Begin(w.Hash); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	s.step("begun")
	r, err := s.Store.Commit(s.ctx, txn)
	s.step("answered")
	switch {
	case errors.Is(err, ErrNotApplied):
		if serr := s.Dir.Settled(); serr != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, serr)
		}
		if errors.Is(err, ErrReconnected) {
			return nil, fmt.Errorf("%w: %w", errAgain, err)
		}
		return nil, err
	case err != nil:
		s.Log.Warn("a commit's reply was lost", "err", err)
		s.lost = true
		if ferr := s.settle(); ferr != nil {
			return nil, ferr
		}
		// It is known now; a fresh view shows which it was.
		return nil, fmt.Errorf("%w: %w", errAgain, err)
	}
	if err := s.checkReply(v, r); err != nil {
		return nil, err // "open" stays: what this etcd says is not to be believed
	}
	if !r.Succeeded {
		if err := s.Dir.Settled(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, err)
		}
		return nil, fmt.Errorf("%w: something changed in between", errAgain)
	}
	// The commit happened. Whoever dies here leaves a mark behind the head, and
	// "open"; the next one fences, follows the chain and moves the mark.
	m := *s.mark
	m.Seq, m.Hash, m.Previous = w.Seq, w.Hash, entry.Ref{}
	if err := s.saveMark(m, r.Revision, opens); err != nil {
		return nil, err
	}
	s.step("marked")
	if err := s.Dir.Settled(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	s.step("settled")
	return own, nil
}

// checkReply is whether a commit's reply comes from the etcd that the view came from.
func (s *session) checkReply(v *view, r *Reply) error {
	if r.Cluster != v.cluster {
		return s.stop(fmt.Errorf("%w: its cluster ID changed from %s to %s between a read and a commit", errRollback,
			keyspace.EtcdClusterID(v.cluster), keyspace.EtcdClusterID(r.Cluster)))
	}
	// A view may come from a member that is ahead of none: the commit's
	// revision is never behind it.
	if r.Revision < v.revision || (r.Succeeded && r.Revision <= v.revision) {
		return s.stop(fmt.Errorf("%w: its revision went from %d back to %d between a read and a commit", errRollback, v.revision, r.Revision))
	}
	return nil
}

// enroll makes key and mark on first use, durably, before anything is sent.
func (s *session) enroll(v *view) error {
	if s.mark != nil {
		return nil
	}
	skey, err := s.ownKey()
	if err != nil {
		return err
	}
	return s.newMark(v, skey, entry.Ref{}, false)
}

// ownKey is the writer's key. It is made where there is none; one without a mark
// was made by a process that died in between.
func (s *session) ownKey() (string, error) {
	skey, err := s.Dir.Key()
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	if skey == "" {
		return s.newKey()
	}
	return skey, nil
}

func (s *session) newKey() (string, error) {
	skey, err := entry.NewKey(s.Config.Writer)
	if err != nil {
		return "", err
	}
	if err := s.Dir.SaveKey(skey); err != nil {
		return "", fmt.Errorf("%w: %w", ErrState, err)
	}
	return skey, nil
}

// newMark starts a chain: a mark of seq 0 has no entry to miss.
func (s *session) newMark(v *view, skey string, previous entry.Ref, recovering bool) error {
	if err := s.useKey(skey); err != nil {
		return fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	s.broken = nil
	return s.saveMark(statedir.Mark{
		Writer: s.Config.Writer.String(), Machine: s.Machine, Cluster: v.meta.Cluster, EtcdCluster: v.meta.EtcdCluster,
		Epoch: v.meta.Epoch, Chain: entry.NewChainID(), Revision: v.revision, Previous: previous, Recovering: recovering, Boot: s.Boot,
	}, v.revision, true)
}

// startAnew gives a writer that an operator's close lets start again a new key
// and a new chain.
func (s *session) startAnew(v *view) error {
	skey, err := s.newKey()
	if err != nil {
		return err
	}
	s.Log.Warn("an operator replaced this writer: a new chain is opened", "closed", v.writer.Closed)
	if s.Config.Writer.Kind != entry.KindNode {
		return s.newMark(v, skey, entry.Ref{}, false)
	}
	recovering, err := s.holdAgain()
	if err != nil {
		return err
	}
	return s.newMark(v, skey, entry.Ref{}, recovering)
}

// holdAgain notes what etcd says this node holds and its state directory does not
// know: it may have been lost under pods that run, which a recovery would release.
// Those of pods that are gone are for GC to find. Where the two disagree about an
// address, what the node remembers stands.
//
// It reports whether a recovery has to come first: pods that outlived the identity
// may hold what a restore has freed since. A crash leaves some holdings; the next
// process does all of it again.
func (s *session) holdAgain() (recovering bool, err error) {
	live, unread, err := s.nodeAttachments()
	if err != nil {
		return false, err
	}
	for _, err := range unread {
		s.Log.Warn("an attachment that cannot be read is not held again", "err", err)
	}
	type address struct {
		space string
		ip    netip.Addr
	}
	taken := map[address]bool{}
	held, herr := s.Dir.Holdings()
	recovering = herr != nil
	for _, h := range held {
		if a, ok := live[h.ID]; !ok || a.Acquire != h.Value.Acquire {
			recovering = true
		}
		for _, ip := range addrsOf(h.Value.Leases) {
			taken[address{h.Value.Space, ip}] = true
		}
	}
	for _, id := range sortedIDs(live) {
		a := live[id]
		if id == s.leaving || s.Dir.IsQueued(id) || slices.ContainsFunc(addrsOf(a.Leases), func(ip netip.Addr) bool { return taken[address{a.Space, ip}] }) {
			continue
		}
		if err := s.Dir.Hold(statedir.Holding{ID: id, Value: a}); err != nil {
			return false, fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	return recovering, nil
}

// nodeAttachments reads what etcd says this node holds, and what of it cannot be read.
func (s *session) nodeAttachments() (live map[keyspace.AttachmentID]keyspace.Attachment, unread []error, err error) {
	prefix := s.Keys.NodeAttachments(s.Config.Writer.Name)
	r, err := s.Store.Read(s.ctx, false, []Get{{Key: prefix, End: keyspace.After(prefix)}})
	if err != nil {
		return nil, nil, err
	}
	live = map[keyspace.AttachmentID]keyspace.Attachment{}
	for _, kv := range r.Ranges[0].KVs {
		key, err := s.Keys.Parse(kv.Key)
		var a keyspace.Attachment
		if err == nil {
			err = decodeAttachment(kv.Value, &a)
		}
		if err != nil {
			unread = append(unread, fmt.Errorf("%w: %s: %w", ErrIntegrity, kv.Key, err))
			continue
		}
		live[key.Attachment] = a
	}
	return live, unread, nil
}

// open is the first entry of our chain.
func (s *session) open(v *view) *entry.Entry {
	e := &entry.Entry{Op: entry.Open, Writer: s.Config.Writer, Key: s.vkey, Cluster: v.meta.Cluster, Epoch: s.mark.Epoch}
	if v.writer != nil {
		e.Predecessor = v.writer.Head()
	}
	if s.mark.Previous != e.Predecessor {
		e.Mark = s.mark.Previous
	}
	return e
}

// hint keeps the newest claims in a writer's value.
func hint(blocks []string, b keyspace.BlockID, op entry.Op) []string {
	out := slices.DeleteFunc(slices.Clone(blocks), func(s string) bool { return s == b.String() })
	if op != entry.Unclaim {
		out = append([]string{b.String()}, out...)
	}
	return out[:min(len(out), maxHints)]
}

// settle makes a lost commit's outcome known: it fences and looks.
func (s *session) settle() error {
	fenced, err := s.fence()
	if err != nil {
		return err
	}
	// Without a writer key there is nothing to put back, but the lost commit may
	// be the very one that opens the chain, and land after an answer was given.
	// Opening the chain here shuts it out, as it compares that key's absence.
	s.unsettled = !fenced
	v, err := s.look(false)
	s.unsettled = false
	if err != nil || fenced || s.mark == nil {
		return err
	}
	if v.writer == nil && !s.restored { // a restored ledger's meta has changed, which shuts it out too
		if _, err = s.commit(v, change{}); errors.Is(err, errAgain) {
			err = fmt.Errorf("%w: an earlier commit's outcome is not known, and opening the chain failed: %w", ErrUnknownOutcome, err)
		}
		return err
	}
	return s.settled(v)
}

// fence puts the writer key back unchanged under its own comparison. After that
// nothing that was sent earlier can land: every transaction compares the key's
// mod_revision. It reports false where there is no writer key yet.
func (s *session) fence() (bool, error) {
	var last error
	for tries := 0; ; tries++ {
		if s.ctx.Err() != nil {
			return false, fmt.Errorf("%w: an earlier commit's outcome is not known, and finding out failed: %w", ErrUnknownOutcome, errors.Join(last, s.ctx.Err()))
		}
		key := s.Keys.Writer(s.Config.Writer)
		r, err := s.Store.Read(s.ctx, false, []Get{{Key: key}})
		if err != nil {
			last = err
			s.pause(tries)
			continue
		}
		if len(r.Ranges[0].KVs) == 0 {
			return false, nil
		}
		kv := r.Ranges[0].KVs[0]
		r, err = s.Store.Commit(s.ctx, Txn{If: []Compare{{Key: key, Mod: kv.Mod}}, Then: []Write{{Key: key, Value: kv.Value}}})
		if err == nil && r.Succeeded {
			return true, nil
		}
		if errors.Is(err, ErrNoSpace) {
			return false, fmt.Errorf("%w: an earlier commit's outcome is not known, and finding out failed: %w", ErrUnknownOutcome, err)
		}
		// A conflict is something sent earlier that landed just now.
		last = err
		s.pause(tries)
	}
}

// putAddresses are the writes that lease addresses to an attachment.
func (s *session) putAddresses(space, pool string, ips []netip.Addr, id keyspace.AttachmentID, ref entry.Ref) []Write {
	var out []Write
	for _, ip := range ips {
		out = append(out, Write{
			Key:   s.Keys.Address(space, ip),
			Value: keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: pool, Holder: &id, Acquire: ref}),
		})
	}
	return out
}

// putBlocks are the writes that claim blocks for a node.
func (s *session) putBlocks(claims []keyspace.BlockID, node string, ref entry.Ref) []Write {
	var out []Write
	for _, b := range claims {
		out = append(out, Write{Key: s.Keys.Block(b), Value: keyspace.Encode(keyspace.Block{Node: node, Claim: ref})})
	}
	return out
}
