package allocator

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

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
	time    time.Time      // of the entries: the clock reading that the plan was made with
	compare []Compare
	prepare func(refs []entry.Ref) error // done before anything is sent; no commit where it fails
	writes  func(refs []entry.Ref) []Write
	writer  func(w *keyspace.Writer, refs []entry.Ref) // adjusts the writer's value
}

// maxBoots is how many boots a mark has at most: those in which the first commit of
// a chain was sent, and nobody could find out what became of it.
const maxBoots = 16

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
	if err := s.sameKey(v); err != nil {
		return nil, err
	}
	if opens {
		if v.writer == nil {
			if err := s.neverWrote(); err != nil {
				return nil, err
			}
		}
		all = append([]*entry.Entry{s.open(v)}, all...)
	}
	w := keyspace.Writer{
		Chain: s.mark.Chain, Seq: s.mark.Seq, Hash: s.mark.Hash, Key: s.vkey, Machine: s.Machine, Boot: s.Boot, Epoch: s.mark.Epoch,
	}
	if v.writer != nil && !opens {
		w.Recover = v.writer.Recover
	}
	if c.time.IsZero() {
		c.time = s.Now()
	}
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
		e.Time, e.Revision = c.time.UTC(), v.revision
		stored, hash, err := entry.Sign(e, s.signer)
		if err != nil {
			return nil, err
		}
		w.Seq, w.Hash = e.Seq, hash
		refs = append(refs, w.Head())
		key := s.Keys.Entry(s.Config.Writer, e.Chain, e.Seq)
		txn.If = append(txn.If, Compare{Key: key})
		txn.Then = append(txn.Then, Write{Key: key, Value: stored})
	}
	own := refs[len(refs)-len(c.entries):]
	if c.prepare != nil {
		if err := c.prepare(own); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	if c.writer != nil {
		c.writer(&w, own)
	}
	guarded, err := s.guard.compare(s)
	if err != nil {
		return nil, err
	}
	txn.If = append(append(txn.If, c.compare...), guarded...)
	txn.Then = append(txn.Then, Write{Key: s.Keys.Writer(s.Config.Writer), Value: keyspace.Encode(w)})
	if c.writes != nil {
		txn.Then = append(txn.Then, c.writes(own)...)
	}

	// Before the head can name this boot, the state directory does.
	if !slices.Contains(s.mark.Boots, s.Boot) {
		m := *s.mark
		m.Boots = append(slices.Clone(m.Boots), s.Boot)
		m.Boots = m.Boots[max(0, len(m.Boots)-maxBoots):]
		if err := s.saveMark(m, v.revision, true); err != nil {
			return nil, err
		}
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
		if serr := s.nothingSent(); serr != nil {
			return nil, serr
		}
		if errors.Is(err, ErrReconnected) {
			return nil, fmt.Errorf("%w: %w", errAgain, err)
		}
		return nil, err
	case errors.Is(err, ErrDecided):
		// Nothing of it is under way any more, so that no fence is needed, which
		// etcd would refuse, too: a linearizable read tells whether it was done.
		after, lerr := s.look(false)
		if lerr != nil {
			return nil, fmt.Errorf("%w: %w; finding out what became of it failed: %w", ErrUnknownOutcome, err, lerr)
		}
		if s.mark.Chain != w.Chain || s.mark.Seq < w.Seq || after.writerMod == v.writerMod {
			return nil, err
		}
		s.lost = true
		return nil, fmt.Errorf("%w: %w, and the commit was done", errAgain, err)
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
		if err := s.nothingSent(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: something changed in between", errAgain)
	}
	// The commit happened. Whoever dies here leaves a mark behind the head, and
	// "open"; the next one fences, follows the chain and moves the mark.
	if err := s.saveMark(s.mark.At(w.Seq, w.Hash), r.Revision, opens); err != nil {
		return nil, err
	}
	s.step("marked")
	if err := s.Dir.Settled(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	s.step("settled")
	return own, nil
}

// sameKey refuses to go on after what another key signed, unless an operator closed
// that: who verifies would have to believe it of anybody.
func (s *session) sameKey(v *view) error {
	w := v.writer
	if w == nil || !w.Closed.IsZero() || w.Key == s.vkey {
		return nil
	}
	return s.unfit(v, "its key is %.100q, this machine's is %q, and nobody closed its chain: a restore took back that this writer was replaced, or the key is of another directory", w.Key, s.vkey)
}

// neverWrote refuses to open a chain without a predecessor where there is one whose
// head is gone.
func (s *session) neverWrote() error {
	chains := s.Keys.Chains() + s.Config.Writer.String() + "/"
	r, err := s.Store.Read(s.ctx, false, []Get{{Key: chains, End: keyspace.After(chains), Limit: 1}})
	if err != nil {
		return err
	}
	if len(r.Ranges[0].KVs) > 0 {
		return s.headGone()
	}
	return nil
}

func (s *session) headGone() error {
	return fmt.Errorf("%w: %s is absent, and its chain is there; its way out: %s", ErrIntegrity, s.Keys.Writer(s.Config.Writer), s.wayOut())
}

// nothingSent notes that a commit was not done and never will be. What was sent
// before it may still be.
func (s *session) nothingSent() error {
	if s.unsettled {
		return nil
	}
	if err := s.Dir.Settled(); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// checkReply is whether a commit's reply comes from the etcd that the view came from.
func (s *session) checkReply(v *view, r *Reply) error {
	var found error
	switch {
	case r.Cluster != v.cluster:
		found = fmt.Errorf("%w: its cluster ID changed from %s to %s between a read and a commit", errRollback,
			keyspace.EtcdClusterID(v.cluster), keyspace.EtcdClusterID(r.Cluster))
	case r.Revision < v.revision || r.Succeeded && r.Revision <= v.revision:
		// No member is ahead of the cluster, so a commit comes after every view.
		found = fmt.Errorf("%w: its revision went from %d back to %d between a read and a commit", errRollback, v.revision, r.Revision)
	default:
		return nil
	}
	_, err := s.stop(found, v.metaMod)
	return err
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
	return s.newMark(v, statedir.Mark{}, skey)
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
	s.step("keyed")
	return skey, nil
}

// newMark starts a chain: a mark of seq 0 has no entry to miss. m has what is
// carried over from the one before.
func (s *session) newMark(v *view, m statedir.Mark, skey string) error {
	if err := s.useKey(skey); err != nil {
		return fmt.Errorf("%w: %w", ErrIntegrity, err)
	}
	s.broken = nil
	m.Writer, m.Machine, m.Cluster = s.Config.Writer.String(), s.Machine, v.meta.Cluster
	m.EtcdCluster, m.Epoch, m.Chain = v.meta.EtcdCluster, v.meta.Epoch, entry.NewChainID()
	m.Boot, m.Boots = s.Boot, []string{s.Boot}
	if m.Before != nil && m.Before.Chain == (entry.ChainID{}) { // it had no chain: this one will do
		m.Before.Chain = m.Chain
	}
	if v.writer != nil {
		m.Closed = v.writer.Closed
	}
	return s.saveMark(m, v.revision, true)
}

// startAnew gives a writer that an operator's close lets start again a new key
// and a new chain.
func (s *session) startAnew(v *view) error {
	if s.Config.Writer.Kind != entry.KindNode {
		skey, err := s.newKey()
		if err != nil {
			return err
		}
		s.Log.Warn("an operator replaced this writer: a new chain is opened", "closed", v.writer.Closed)
		return s.newMark(v, statedir.Mark{}, skey)
	}
	if err := s.mayComeBack(v); err != nil {
		return err
	}
	live, unread, err := s.nodeAttachments()
	if err != nil {
		return err
	}
	skey, err := s.newKey()
	if err != nil {
		return err
	}
	s.Log.Warn("an operator replaced this writer: a new chain is opened", "closed", v.writer.Closed)
	recovering := v.meta.Recovering
	if s.mark == nil || s.broken != nil || !recovering {
		// In a drill a state directory that is whole knows what is held, and what is not.
		if recovering, err = s.holdAgain(live, unread); err != nil {
			return err
		}
	}
	// In a drill every chain ends its part with a recover entry: thaw waits for it.
	return s.newMark(v, statedir.Mark{Position: statedir.Position{Recovering: recovering || v.meta.Recovering}}, skey)
}

// mayComeBack refuses a node that an operator is removing: before its last lease is
// ended it starts no chain. Nothing is added to its leases while the chain is closed,
// so that none can come back once all are gone.
func (s *session) mayComeBack(v *view) error {
	if v.writer == nil || !v.writer.Removed {
		return nil
	}
	live, unread, err := s.nodeAttachments()
	if err != nil {
		return err
	}
	if left := len(live) + len(unread); left > 0 {
		return fmt.Errorf("%w: %s was removed by an operator, and what it leased is not ended yet (%d left): 'ledger node remove %[2]s' ends it, or 'ledger node replace %[2]s' lets this machine have it again",
			ErrIntegrity, s.Config.Writer.Name, left)
	}
	return nil
}

// holdAgain notes what etcd says this node holds and its state directory does not
// know: it may have been lost under pods that run, which a recovery would release.
// Those of pods that are gone are for GC to find. Where the two disagree about an
// address, what the node remembers stands.
//
// It reports whether a recovery has to come first: pods that outlived the identity
// may hold what a restore has freed since, or what an operator has ended. A crash
// leaves some holdings; the next process does all of it again.
func (s *session) holdAgain(live map[keyspace.AttachmentID]keyspace.Attachment, unread []error) (recovering bool, err error) {
	for _, err := range unread {
		s.Log.Warn("an attachment that cannot be read is not held again", "err", err)
	}
	taken := map[inSpace]bool{}
	held, herr := s.Dir.Holdings()
	recovering = herr != nil
	for _, h := range held {
		if a, ok := live[h.ID]; !ok || a.Acquire != h.Value.Acquire {
			recovering = true
		}
		for _, at := range places(&h.Value) {
			taken[at] = true
		}
	}
	for _, id := range sortedIDs(live) {
		a := live[id]
		if id == s.leaving || s.Dir.IsQueued(id) || slices.ContainsFunc(places(&a), func(at inSpace) bool { return taken[at] }) {
			continue
		}
		if err := s.remember(id, a); err != nil {
			return false, err
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
		if err != nil { // no attachment's
			s.Log.Warn("a key that nobody should have put there", "err", err)
			continue
		}
		var a keyspace.Attachment
		if err := decodeAttachment(kv.Value, &a); err != nil {
			unread = append(unread, spoilt(key.Attachment, kv.Key, err))
			continue
		}
		live[key.Attachment] = a
	}
	return live, unread, nil
}

// open is the first entry of our chain.
func (s *session) open(v *view) *entry.Entry {
	e := &entry.Entry{Op: entry.Open, Writer: s.Config.Writer, Key: s.vkey, Machine: s.Machine, Cluster: v.meta.Cluster, Epoch: s.mark.Epoch}
	if v.writer != nil {
		e.Predecessor = v.writer.Head()
	}
	if s.mark.Previous != e.Predecessor {
		e.Mark = s.mark.Previous
	}
	return e
}

// settle makes a lost commit's outcome known: it fences and looks.
func (s *session) settle() (err error) {
	s.unsettled = true
	defer func() { s.unsettled = err != nil }()
	fenced, err := s.fence()
	if err != nil {
		return err
	}
	// Without a writer key there is nothing to put back, but the lost commit may
	// be the very one that opens the chain, and land after an answer was given.
	// Opening the chain here shuts it out, as it compares that key's absence.
	s.unsettled = !fenced
	v, err := s.look(false)
	if err != nil || fenced || s.mark == nil {
		return err
	}
	// Behind a restore, or a recovery that somebody began, it is shut out already: it
	// went to another etcd, or compares another meta.
	shut := s.restored && (s.mark.Epoch != v.meta.Epoch || s.mark.EtcdCluster != keyspace.EtcdClusterID(v.cluster))
	if v.writer == nil && s.mark.Seq == 0 && !shut {
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
	var put KV // back, by a fence whose answer did not say whether it was done
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
		switch {
		case put.Mod == 0:
		case put.Mod == kv.Mod:
			return false, fmt.Errorf("%w: an earlier commit's outcome is not known, and finding out failed: %w", ErrUnknownOutcome, last)
		case bytes.Equal(put.Value, kv.Value): // a commit changes the value, a fence does not
			return true, nil
		}
		put = KV{}
		r, err = s.Store.Commit(s.ctx, Txn{If: []Compare{{Key: key, Mod: kv.Mod}}, Then: []Write{{Key: key, Value: kv.Value}}})
		if err == nil && r.Succeeded {
			return true, nil
		}
		if last = err; errors.Is(err, ErrDecided) {
			put = kv
			continue
		}
		// A conflict is something sent earlier that landed just now.
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

// freeAddress is the write that frees an address.
func (s *session) freeAddress(space string, ip netip.Addr, a keyspace.Address) Write {
	a.State = keyspace.Free
	return Write{Key: s.Keys.Address(space, ip), Value: keyspace.Encode(a)}
}

// putBlocks are the writes that claim blocks for a node.
func (s *session) putBlocks(claims []keyspace.BlockID, node string, ref entry.Ref) []Write {
	var out []Write
	for _, b := range claims {
		out = append(out, Write{Key: s.Keys.Block(b), Value: keyspace.Encode(keyspace.Block{Node: node, Claim: ref})})
	}
	return out
}
