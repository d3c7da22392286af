package allocator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
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
				if err := decodeMeta(kvs[0].Value, &meta); err != nil {
					return fmt.Errorf("%w: %s: %w", ErrIntegrity, s.Keys.Meta(), err)
				}
				return errMetaPresent
			}
			if kvs := r.Ranges[1].KVs; len(kvs) > 0 {
				return fmt.Errorf("%w: %s is absent, but %s is there: this is no empty ledger; restore the backup, or choose another prefix", ErrIntegrity, s.Keys.Meta(), kvs[0].Key)
			}
			if s.mark != nil && s.mark.Seq > 0 {
				return fmt.Errorf("%w: %s has written to cluster %s before, and below %s nothing is in this etcd: it was wiped, or is the wrong one; for another ledger than that set LEDGER_OPERATOR_DIR to a directory of its own (%s is that cluster's)",
					ErrIntegrity, s.Config.Writer, s.mark.Cluster, s.Keys.Prefix(), s.Dir.Path())
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
	_, err := s.commit(v, change{
		entries: []*entry.Entry{metaEntry(meta, reason)},
		writes: func(refs []entry.Ref) []Write {
			meta.Entry = refs[0]
			return append([]Write{{Key: s.Keys.Meta(), Value: keyspace.Encode(meta)}}, more...)
		},
	})
	return err
}

// metaEntry records all of meta.
func metaEntry(m *keyspace.Meta, reason string) *entry.Entry {
	return &entry.Entry{
		Op: entry.Meta, Cluster: m.Cluster, EtcdCluster: m.EtcdCluster, Epoch: m.Epoch, State: string(m.State),
		Recovering: m.Recovering, Version: uint64(m.Version), Reason: reason,
	}
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
	if err := decodeMeta(r.Ranges[0].KVs[0].Value, &meta); err != nil {
		return meta, fmt.Errorf("%w: %s: %w", ErrIntegrity, w.Keys.Meta(), err)
	}
	return meta, nil
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
// is, or nothing. A lease whose keys are spoilt is ended by what is on the record.
func (w *Writer) ReleaseLease(ctx context.Context, id keyspace.AttachmentID, acquire entry.Ref, reason string) error {
	return w.releaseLease(ctx, &session{Writer: w, anyState: true}, id, acquire, reason)
}

func (w *Writer) releaseLease(ctx context.Context, s *session, id keyspace.AttachmentID, acquire entry.Ref, reason string) error {
	return w.withSession(ctx, s, func(s *session) error {
		err := s.release(id, acquire, nil, reason)
		if errors.Is(err, errSpoilt) {
			return s.again(func() error { return s.releaseSpoilt(id, acquire, reason) })
		}
		return err
	})
}

// Lost ends the lease that acquire names, by which an address is held and its
// attachment is not: that has no key any more, as somebody deleted it, or another
// lease since. ErrNotFound says that the lease has ended.
func (w *Writer) Lost(ctx context.Context, id keyspace.AttachmentID, acquire entry.Ref, reason string) error {
	return w.withSession(ctx, &session{Writer: w, anyState: true}, func(s *session) error {
		return s.again(func() error { return s.releaseSpoilt(id, acquire, reason) })
	})
}

// releaseSpoilt ends a lease by its acquire entry, whatever stands in its keys: the
// attachment's is deleted, and each address is freed, where it does not name another
// lease. Without an acquire it is the node's last one for the attachment. Where that
// was ended before, or none is on the record, what stands there is no lease, and goes
// without an entry.
func (s *session) releaseSpoilt(id keyspace.AttachmentID, acquire entry.Ref, reason string) error {
	last := &leaseOnRecord{id: id, named: acquire, acquire: new(entry.Entry), released: map[entry.Ref]bool{}}
	record, err := s.readRecord(id.Node, last.take)
	if err != nil {
		return err
	}
	e, ref := last.acquire, last.ref
	attachment := s.Keys.Attachment(id)
	gets := []Get{{Key: attachment}}
	for _, a := range e.Addresses {
		gets = append(gets, Get{Key: s.Keys.Address(e.Space, a.IP)})
	}
	v, err := s.look(false, append(gets, record.since()...)...)
	if err != nil {
		return err
	}
	if err := s.refused(v); err != nil {
		return err
	}
	record.rest(v.extra[len(gets):])
	if last.ref != ref {
		return fmt.Errorf("%w: %v has acquired since", errAgain, id)
	}
	ended := last.ended()
	now := s.Now().UTC()
	c := change{time: now, compare: append(record.compare(v), Compare{Key: attachment, Mod: modAt(v.extra[0])})}
	present := len(v.extra[0].KVs) == 1
	if present {
		var other keyspace.Attachment
		present = decodeAttachment(v.extra[0].KVs[0].Value, &other) != nil || acquire.IsZero() && other.Acquire == ref || !acquire.IsZero() && other.Acquire == acquire
	}
	if ended && !present {
		return fmt.Errorf("lease of %v: %w", id, ErrNotFound)
	}
	var free []netip.Addr
	if !ended {
		out := &entry.Entry{
			Op: entry.Release, Space: e.Space, Pool: e.Pool, Acquire: ref, Reason: reason,
			Network: id.Network, Container: id.Container, Interface: id.Interface, Node: id.Node, Pod: e.Pod, PodUID: e.PodUID,
		}
		for i, a := range e.Addresses {
			out.Addresses = append(out.Addresses, entry.Address{IP: a.IP})
			r := v.extra[1+i]
			c.compare = append(c.compare, Compare{Key: s.Keys.Address(e.Space, a.IP), Mod: modAt(r)})
			var have keyspace.Address
			if len(r.KVs) == 1 && decodeAddress(r.KVs[0].Value, &have) == nil && (have.State != keyspace.Leased || have.Acquire != ref) {
				continue // it is another's, or free: leave it alone
			}
			free = append(free, a.IP)
		}
		c.entries = []*entry.Entry{out}
	}
	c.writes = func(refs []entry.Ref) (writes []Write) {
		if present {
			writes = append(writes, Write{Key: attachment, Delete: true})
		}
		for _, ip := range free {
			writes = append(writes, s.freeAddress(e.Space, ip, keyspace.Address{Pool: e.Pool, Release: refs[0], Since: now, Cooldown: e.Cooldown}))
		}
		return writes
	}
	_, err = s.commit(v, c)
	return err
}

func modAt(r Range) int64 {
	if len(r.KVs) == 0 {
		return 0
	}
	return r.KVs[0].Mod
}

// record is what a node and all operators have written, which tells what became of the
// node's leases and claims: none but the node makes them, and none but these ends them.
type record struct {
	s        *session
	node     entry.Writer
	revision int64 // all up to this one was read
	take     func(kv KV, e *entry.Entry, ref entry.Ref)
}

func (s *session) readRecord(node string, take func(kv KV, e *entry.Entry, ref entry.Ref)) (*record, error) {
	r := &record{s: s, node: entry.Writer{Kind: entry.KindNode, Name: node}, take: take}
	for _, prefix := range r.prefixes() {
		revision, err := s.entriesBelow(prefix, take)
		if err != nil {
			return nil, err
		}
		if r.revision == 0 || revision < r.revision {
			r.revision = revision
		}
	}
	return r, nil
}

func (r *record) prefixes() []string {
	return []string{r.s.Keys.Chains() + r.node.String() + "/", r.s.Keys.Chains() + string(entry.KindOperator) + "/"}
}

// since are the reads of what was written since, for a view to take along; rest takes
// in the answers. Then the record is that of the view's revision.
func (r *record) since() (gets []Get) {
	for _, p := range r.prefixes() {
		gets = append(gets, Get{Key: p, End: keyspace.After(p), Since: r.revision + 1})
	}
	return gets
}

func (r *record) rest(answers []Range) {
	for _, a := range answers {
		for _, kv := range a.KVs {
			r.s.takeEntry(kv, r.take)
		}
	}
}

// compare keeps a commit from being done once the record has grown since the view:
// each entry comes with a head.
func (r *record) compare(v *view) []Compare {
	node, operators := r.s.Keys.Writer(r.node), r.s.Keys.Writers()+string(entry.KindOperator)+"/"
	return []Compare{{Key: node, End: node + "\x00", Mod: v.revision}, {Key: operators, End: keyspace.After(operators), Mod: v.revision}}
}

// leaseOnRecord is the acquire of an attachment's lease: the one that is named, or the
// last; an empty entry if there is none.
type leaseOnRecord struct {
	id       keyspace.AttachmentID
	named    entry.Ref
	acquire  *entry.Entry
	ref      entry.Ref
	mod      int64
	released map[entry.Ref]bool
}

func (l *leaseOnRecord) take(kv KV, e *entry.Entry, r entry.Ref) {
	switch {
	case e == nil || e.Attachment() != l.id.String():
	case e.Op == entry.Release:
		l.released[e.Acquire] = true
	case e.Op == entry.Acquire && (l.named.IsZero() || r == l.named) && kv.Mod >= l.mod:
		l.acquire, l.ref, l.mod = e, r, kv.Mod
	}
}

// ended reports whether a release names it, or there is none.
func (l *leaseOnRecord) ended() bool { return l.ref.IsZero() || l.released[l.ref] }

// entries calls f with each entry of a writer's chains, chain by chain; with nil
// where it cannot be read. The chains may grow meanwhile.
func (s *session) entries(w entry.Writer, f func(kv KV, e *entry.Entry, ref entry.Ref)) error {
	_, err := s.entriesBelow(s.Keys.Chains()+w.String()+"/", f)
	return err
}

// entriesBelow is entries of all chains below a prefix. It returns the revision up to
// which nothing of them is missing.
func (s *session) entriesBelow(prefix string, f func(kv KV, e *entry.Entry, ref entry.Ref)) (revision int64, err error) {
	for from := prefix; ; {
		r, err := s.Store.Read(s.ctx, false, []Get{{Key: from, End: keyspace.After(prefix), Limit: followPage}})
		if err != nil {
			return 0, fmt.Errorf("reading the chains below %s: %w; --timeout gives it longer", prefix, err)
		}
		if revision == 0 {
			revision = r.Revision
		}
		kvs := r.Ranges[0].KVs
		for _, kv := range kvs {
			s.takeEntry(kv, f)
		}
		if !r.Ranges[0].More {
			return revision, nil
		}
		from = kvs[len(kvs)-1].Key + "\x00"
	}
}

func (s *session) takeEntry(kv KV, f func(kv KV, e *entry.Entry, ref entry.Ref)) {
	key, err := s.Keys.Parse(kv.Key)
	if err != nil {
		return
	}
	e, err := entry.Parse(kv.Value)
	if err != nil || e.Chain != key.Chain || e.Seq != key.Seq {
		e = nil
	}
	f(kv, e, entry.Ref{Chain: key.Chain, Seq: key.Seq, Hash: entry.HashOf(kv.Value)})
}

// Claim is a block with the claim that makes it a node's. Node is who has it by
// the record, where the key cannot be read; else it may be empty.
type Claim struct {
	Block keyspace.BlockID
	Claim entry.Ref // zero: whichever it is
	Node  string
}

// Unclaim gives a block back, if its claim is still the one that is named. It fails
// with ErrConflict while an address of it is leased.
func (w *Writer) Unclaim(ctx context.Context, c Claim, reason string) error {
	return w.with(ctx, unclaim(c, reason))
}

func unclaim(c Claim, reason string) func(s *session) error {
	b := c.Block
	return func(s *session) error {
		spoilt := error(nil)
		return s.again(func() error {
			byRecord := &claimOnRecord{node: c.Node, block: b}
			var r *record
			var since []Get
			if spoilt != nil && c.Node != "" {
				var err error
				if r, err = s.readRecord(c.Node, byRecord.take); err != nil {
					return err
				}
				since = r.since()
			}
			n := need{addrs: []netipx.IPRange{rangeOf(b.Prefix)}}
			k := newKnown()
			gets := append([]Get{{Key: s.Keys.Block(b)}}, s.gets(&Pool{Space: b.Space, Name: b.Pool}, &n, k)...)
			v, err := s.look(false, append(slices.Clone(gets), since...)...)
			if err != nil {
				return err
			}
			compare := []Compare{{Key: s.Keys.Block(b), Mod: modAt(v.extra[0])}}
			if r != nil {
				r.rest(v.extra[len(gets):])
			}
			if err := s.refused(v); err != nil {
				return err
			}
			var claim keyspace.Block
			kvs := v.extra[0].KVs
			if spoilt = errors.New("it is gone"); len(kvs) == 1 {
				spoilt = keyspace.Decode(kvs[0].Value, &claim)
			}
			switch {
			case spoilt != nil && c.Node != "" && r == nil:
				return fmt.Errorf("%w: by the record", errAgain)
			case spoilt != nil && c.Node != "":
				if byRecord.claimed <= byRecord.given {
					return fmt.Errorf("block %v: %w: by the record it is not %s's; 'ledger verify' says whose it is", b, ErrNotFound, c.Node)
				}
				claim, compare = byRecord.claim, append(compare, r.compare(v)...)
			case len(kvs) == 0:
				return fmt.Errorf("block %v: %w", b, ErrNotFound)
			case spoilt != nil:
				return fmt.Errorf("%w: %s: %w; 'ledger verify' says whose it is: give it back with --of NODE", ErrIntegrity, kvs[0].Key, spoilt)
			case c.Node != "" && c.Node != claim.Node:
				return fmt.Errorf("block %v: %w: it is %s's, not %s's", b, ErrNotFound, claim.Node, c.Node)
			}
			if !c.Claim.IsZero() && claim.Claim != c.Claim {
				return fmt.Errorf("block %v: %w: it has been claimed anew, by %s", b, ErrNotFound, claim.Node)
			}
			if err := s.learn(k, &n, v.extra[1:len(gets)]); err != nil {
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
				compare: append(compare, Compare{Key: addresses.Key, End: addresses.End, Mod: v.revision}), // none changed since
				writes:  func([]entry.Ref) []Write { return []Write{{Key: s.Keys.Block(b), Delete: true}} },
			})
			return err
		})
	}
}

// claimOnRecord is a node's claim of a block, by what it and operators wrote.
type claimOnRecord struct {
	node           string
	block          keyspace.BlockID
	claim          keyspace.Block
	claimed, given int64
}

func (c *claimOnRecord) take(kv KV, e *entry.Entry, ref entry.Ref) {
	switch b := c.block; {
	case e == nil || e.Space != b.Space || e.Pool != b.Pool || !slices.Contains(e.Blocks, b.Prefix):
	case e.Op == entry.Unclaim:
		c.given = max(c.given, kv.Mod)
	case e.Node == c.node && kv.Mod > c.claimed:
		c.claim, c.claimed = keyspace.Block{Node: c.node, Claim: ref}, kv.Mod
	}
}

// Replacement says which writer may start anew, and how.
type Replacement struct {
	Writer entry.Writer
	Chain  entry.ChainID // the one that was decided on; zero: whichever it has
	Remove bool          // what is leased on it is to end: not before all is, may the writer start anew
}

// Closed is what a Replace did, or found done.
type Closed struct {
	Last entry.Ref // the last entry of the chain that counts
	By   entry.Ref // the close
}

// Replace lets a writer that lost its identity open another chain: it closes
// the old one on this operator's chain. A head that is gone or cannot be read is
// made again from the chain's own end. ErrNotFound says that it has no chain,
// ErrConflict that it is another by now.
func (w *Writer) Replace(ctx context.Context, p Replacement, reason string) (out Closed, err error) {
	lost := p.Writer
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
			compare := []Compare{{Key: key, Mod: modAt(v.extra[0])}}
			var value keyspace.Writer
			if kvs := v.extra[0].KVs; len(kvs) == 0 || decodeHead(kvs[0].Value, &value) != nil {
				if value, err = s.chainEnd(lost); err != nil {
					if len(kvs) == 1 && errors.Is(err, ErrNotFound) {
						err = fmt.Errorf("%w: nothing goes with %s: delete it ('etcdctl del %[2]s')", err, key)
					}
					return err
				}
				compare = append(compare, Compare{Key: s.Keys.Entry(lost, value.Chain, value.Seq+1)})
			}
			if p.Chain != (entry.ChainID{}) && p.Chain != value.Chain {
				return fmt.Errorf("%w: %v has come back, on chain %s: look again", ErrConflict, lost, value.Chain)
			}
			out = Closed{value.Head(), value.Closed}
			if !value.Closed.IsZero() && value.Removed == p.Remove {
				return nil // done before
			}
			e := &entry.Entry{Op: entry.Close, Writer: lost, Closes: out.Last, Remove: p.Remove, Reason: reason}
			_, err = s.commit(v, change{
				entries: []*entry.Entry{e},
				compare: compare,
				writes: func(refs []entry.Ref) []Write {
					out.By = refs[0]
					value.Closed, value.Removed = refs[0], p.Remove
					return []Write{{Key: key, Value: keyspace.Encode(value)}}
				},
			})
			return err
		})
	})
	return out, err
}

// decodeHead reads a head. One that names no entry is none that a commit wrote.
func decodeHead(b []byte, w *keyspace.Writer) error {
	if err := keyspace.Decode(b, w); err != nil {
		return err
	}
	if w.Chain == (entry.ChainID{}) || w.Seq == 0 || w.Hash == (entry.Hash{}) {
		return errors.New("it names no entry")
	}
	return nil
}

// chainEnd makes the head of a writer's newest chain from its entries.
func (s *session) chainEnd(w entry.Writer) (keyspace.Writer, error) {
	var newest, head keyspace.Writer
	var opened, mod int64
	err := s.entries(w, func(kv KV, e *entry.Entry, ref entry.Ref) {
		if ref.Chain != head.Chain {
			head, opened = keyspace.Writer{}, kv.Mod
		}
		head.Chain, head.Seq, head.Hash = ref.Chain, ref.Seq, ref.Hash
		switch {
		case e == nil:
		case e.Op == entry.Open:
			head.Key, head.Machine, head.Epoch = e.Key, e.Machine, e.Epoch
		case e.Op == entry.Rotate:
			head.Key = e.Key
		case e.Op == entry.Recover:
			head.Recover = ref
		}
		if opened >= mod {
			newest, mod = head, opened
		}
	})
	if err == nil && mod == 0 {
		err = fmt.Errorf("%v has no chain, so nothing is to be replaced: %w", w, ErrNotFound)
	}
	return newest, err
}

// Import records leases that another IPAM made on this node. Each result is nil,
// or why it was not done: errors.Is ErrConflict where an address is another's,
// ErrBefore where it is recorded already, ErrEnded where it was, and has ended
// since: then it is not brought back. With dry nothing is done.
func (w *Writer) Import(ctx context.Context, leases []statedir.Holding, dry bool, reason string) ([]error, error) {
	ids := map[string]bool{}
	for _, l := range leases {
		ids[l.ID.String()] = true
	}
	// Who has had a lease, by the record up to head. The head is another where other
	// processes of this node wrote between two leases.
	var had map[string]bool
	var head entry.Ref
	read := func(s *session) error {
		if had != nil && s.mark != nil && s.mark.Ref() == head {
			return nil
		}
		found := map[string]bool{}
		err := s.entries(w.Config.Writer, func(_ KV, e *entry.Entry, _ entry.Ref) {
			if e != nil && e.Op == entry.Acquire && ids[e.Attachment()] {
				found[e.Attachment()] = true
			}
		})
		if err == nil {
			had = found
		}
		return err
	}
	out := make([]error, len(leases))
	for i, l := range leases {
		err := w.with(ctx, func(s *session) error {
			err := s.again(func() error {
				return s.importOne(l, func() (bool, error) { err := read(s); return had[l.ID.String()], err }, dry, reason)
			})
			if s.mark != nil {
				head = s.mark.Ref()
			}
			return err
		})
		if out[i] = err; err != nil && !errors.Is(err, ErrConflict) && !errors.Is(err, ErrBefore) && !errors.Is(err, ErrEnded) {
			return out[:i], fmt.Errorf("%v: %w", l.ID, err) // what is wrong now is wrong for all that follow
		}
	}
	return out, nil
}

// importOne is Import of one lease; had reports whether the attachment has had one.
func (s *session) importOne(l statedir.Holding, had func() (bool, error), dry bool, reason string) error {
	v, err := s.look(false, Get{Key: s.Keys.Attachment(l.ID)})
	if err != nil {
		return err
	}
	ended, err := had()
	if err != nil {
		return err
	}
	if kvs := v.extra[0].KVs; len(kvs) == 1 {
		var have keyspace.Attachment
		if err := decodeAttachment(kvs[0].Value, &have); err != nil {
			return spoilt(l.ID, kvs[0].Key, err)
		}
		if have.Space != l.Value.Space || !slices.Equal(addrsOf(have.Leases), addrsOf(l.Value.Leases)) {
			return fmt.Errorf("%w: %v holds %v, not %v", ErrConflict, l.ID, addrsOf(have.Leases), addrsOf(l.Value.Leases))
		}
		if dry {
			return ErrBefore
		}
		if err := s.remember(l.ID, have); err != nil {
			return err
		}
		return ErrBefore
	}
	if ended {
		return ErrEnded
	}
	s.dry = dry
	return s.assert(l, entry.AssertImport, reason)
}

// assert leases given addresses to an attachment: those of an import, or those
// that a restore lost. ErrConflict names another holder.
func (s *session) assert(h statedir.Holding, how, reason string) error {
	id, a := h.ID, h.Value
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
	if len(v.extra[0].KVs) == 1 {
		return fmt.Errorf("%w: %v has got a lease meanwhile", errAgain, id)
	}
	e := &entry.Entry{
		Op: entry.Acquire, Space: a.Space, Pool: a.Pool, Cooldown: a.Cooldown, Assert: how, Reason: reason, Pod: a.Pod, PodUID: a.PodUID,
		Network: id.Network, Container: id.Container, Interface: id.Interface, Node: id.Node,
	}
	compare := []Compare{{Key: attachment}}
	for i, l := range a.Leases {
		ip := l.Address.Addr()
		c, after := Compare{Key: s.Keys.Address(a.Space, ip)}, entry.Ref{}
		if kvs := v.extra[1+i].KVs; len(kvs) == 1 {
			var held keyspace.Address
			if err := decodeAddress(kvs[0].Value, &held); err != nil {
				return fmt.Errorf("%w: %v: %s: %w; 'ledger verify' says more", ErrConflict, ip, kvs[0].Key, err)
			}
			if held.State == keyspace.Leased {
				return fmt.Errorf("%w: %v is held by %v, and %v says it holds it", ErrConflict, ip, held.Holder, id)
			}
			c.Mod, after = kvs[0].Mod, held.Release
		}
		compare = append(compare, c)
		e.Addresses = append(e.Addresses, acquired(l, after))
	}
	if s.dry {
		return nil
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
		prepare: func(refs []entry.Ref) error {
			a.Acquire = refs[0]
			return s.Dir.Prepare(h.By(a))
		},
		writes: func(refs []entry.Ref) []Write {
			writes := append(s.putAddresses(a.Space, a.Pool, addrsOf(a.Leases), id, refs[0]), Write{Key: attachment, Value: keyspace.Encode(a)})
			return append(writes, s.putBlocks(claims, id.Node, refs[0])...)
		},
	})
	if err != nil {
		return err
	}
	return s.hold(id)
}
