package allocator

import (
	"errors"
	"fmt"
	"net/netip"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// view is what one read found, checked against the mark.
type view struct {
	revision     int64
	cluster      uint64
	serializable bool

	meta      keyspace.Meta
	metaMod   int64
	stops     []KV             // at most one
	writer    *keyspace.Writer // nil: no chain yet
	writerMod int64
	extra     []Range // answers to the caller's gets
}

// errRollback marks that etcd has gone back in time.
var errRollback = errors.New("etcd has gone back in time")

// errDrill marks that a recovery is under way and this writer's turn has not come.
var errDrill = fmt.Errorf("%w while a recovery is under way", ErrIntegrity)

// errSpoilt marks that what stands in etcd for one attachment is not what an
// acquire left there: others can be released all the same.
var errSpoilt = fmt.Errorf("%w", ErrIntegrity)

// tailPage is how many entries beyond the mark are read at a time.
const tailPage = 64

// look takes a view. A serializable one that fails its checks may only lag, so
// it is taken again.
func (s *session) look(serializable bool, gets ...Get) (*view, error) {
	// Who opens a chain takes cluster and epoch from the view, for good.
	serializable = serializable && s.mark != nil && s.mark.Seq > 0
	v, err := s.lookOnce(serializable, gets)
	if err != nil && serializable {
		v, err = s.lookOnce(false, gets)
	}
	if errors.Is(err, errRollback) {
		err = s.stop(err)
	}
	return v, err
}

func (s *session) lookOnce(serializable bool, gets []Get) (*view, error) {
	base := []Get{
		{Key: s.Keys.Meta()},
		{Key: s.Keys.Stops(), End: keyspace.After(s.Keys.Stops()), Limit: 1},
		{Key: s.Keys.Writer(s.Config.Writer)},
	}
	if s.mark != nil {
		base = append(base, s.tail(max(s.mark.Seq, 1)))
	}
	r, err := s.Store.Read(s.ctx, serializable, append(base, gets...))
	if err != nil {
		return nil, err
	}
	v := &view{
		revision: r.Revision, cluster: r.Cluster, serializable: serializable,
		stops: r.Ranges[1].KVs, extra: r.Ranges[len(base):],
	}
	if kvs := r.Ranges[0].KVs; len(kvs) == 1 {
		v.metaMod = kvs[0].Mod
		if err := decodeMeta(kvs[0].Value, &v.meta); err != nil {
			return nil, fmt.Errorf("%w: %s cannot be read (a newer version's?): %w", ErrIntegrity, s.Keys.Meta(), err)
		}
	}
	if kvs := r.Ranges[2].KVs; len(kvs) == 1 {
		v.writer, v.writerMod = new(keyspace.Writer), kvs[0].Mod
		if err := keyspace.Decode(kvs[0].Value, v.writer); err != nil {
			return nil, fmt.Errorf("%w: %s cannot be read: %w; its way out: %s", ErrIntegrity, kvs[0].Key, err, s.wayOut())
		}
	}
	var tail Range
	if s.mark != nil {
		tail = r.Ranges[3]
	}
	if s.lateOperator(v) {
		if err := s.renew(v); err != nil {
			return nil, err
		}
		tail = Range{}
	}
	if err := s.checkCluster(v); err != nil {
		return nil, err
	}
	if err := s.checkChain(v, tail); err != nil {
		return nil, err
	}
	if err := s.checkRecovered(v); err != nil {
		return nil, err
	}
	if !serializable && !s.unsettled {
		// Whatever was sent has been fenced, and what landed has been seen.
		return v, s.settled(v)
	}
	return v, nil
}

// tail is the read of our chain from seq on.
func (s *session) tail(seq uint64) Get {
	return Get{
		Key: s.Keys.Entry(s.Config.Writer, s.mark.Chain, seq), End: keyspace.After(s.Keys.Chain(s.Config.Writer, s.mark.Chain)),
		Limit: tailPage,
	}
}

// checkCluster is whether this is our etcd, at our epoch.
func (s *session) checkCluster(v *view) error {
	if v.metaMod == 0 {
		if s.mark != nil && s.mark.Seq > 0 {
			return fmt.Errorf("%w: %s is absent, but %s has committed %d entries: this etcd was wiped or is the wrong one (or the prefix is); do not run 'ledger init', restore the backup and see 'ledger recover'",
				ErrNotInitialised, s.Keys.Meta(), s.Config.Writer, s.mark.Seq)
		}
		return fmt.Errorf("%w: %s is absent: run 'ledger init' once", ErrNotInitialised, s.Keys.Meta())
	}
	if v.meta.Version > keyspace.FormatVersion {
		return fmt.Errorf("%w: the ledger has format version %d, and this program writes %d: upgrade it", ErrIntegrity, v.meta.Version, keyspace.FormatVersion)
	}
	if s.Cluster != "" && s.Cluster != v.meta.Cluster {
		return fmt.Errorf("%w: this etcd holds cluster %s, and clusterID says %s", ErrIntegrity, v.meta.Cluster, s.Cluster)
	}
	if s.mark != nil && s.mark.Cluster != v.meta.Cluster {
		return fmt.Errorf("%w: this etcd holds cluster %s, and state directory %s belongs to cluster %s; it is the wrong etcd, or the ledger was started anew: then move the state directory away",
			ErrIntegrity, v.meta.Cluster, s.Dir.Path(), s.mark.Cluster)
	}
	if id := keyspace.EtcdClusterID(v.cluster); id != v.meta.EtcdCluster && !s.restored {
		return fmt.Errorf("%w: its cluster ID is %s, and the ledger was written under %s: it was restored or moved; see 'ledger recover start'", errRollback, id, v.meta.EtcdCluster)
	}
	if s.restored {
		return nil
	}
	if s.mark != nil && s.mark.Epoch < v.meta.Epoch {
		kind := ErrIntegrity
		if v.meta.State == keyspace.Frozen {
			kind = errDrill
		}
		return fmt.Errorf("%w: the ledger was recovered (epoch %d) and %s has not been (epoch %d): run 'ledger recover node' on it",
			kind, v.meta.Epoch, s.Config.Writer, s.mark.Epoch)
	}
	if s.mark != nil && s.mark.Epoch == v.meta.Epoch && s.mark.EtcdCluster != v.meta.EtcdCluster {
		return fmt.Errorf("%w: epoch %d was that of etcd cluster %s, and is now that of %s", errRollback, v.meta.Epoch, s.mark.EtcdCluster, v.meta.EtcdCluster)
	}
	if s.mark != nil && s.mark.Epoch > v.meta.Epoch {
		return fmt.Errorf("%w: its epoch is %d, and %s has seen %d", errRollback, v.meta.Epoch, s.Config.Writer, s.mark.Epoch)
	}
	if s.mark != nil && v.revision < s.mark.Revision {
		return fmt.Errorf("%w: its revision is %d, and %s has seen %d", errRollback, v.revision, s.Config.Writer, s.mark.Revision)
	}
	return nil
}

// checkRecovered is whether a recovery that this node began has come to its end.
// Until then it may hold what is another's.
func (s *session) checkRecovered(v *view) error {
	if s.mark == nil || !s.mark.Recovering || s.drill || s.restored || v.writer != nil && v.writer.Chain == s.mark.Chain && !v.writer.Recover.IsZero() {
		return nil
	}
	kind := ErrIntegrity
	if v.meta.State == keyspace.Frozen {
		kind = errDrill
	}
	return fmt.Errorf("%w: the recovery of %s has not ended (a conflict?): run 'ledger recover node' on it again", kind, s.Config.Writer)
}

// lateOperator reports whether this is an operator's first command after a
// recovery that somebody else did: operators hold nothing, so that all they need
// is a chain of the new epoch.
func (s *session) lateOperator(v *view) bool {
	return s.Config.Writer.Kind != entry.KindNode && !s.restored && !v.serializable && s.broken == nil &&
		s.mark != nil && s.mark.Cluster == v.meta.Cluster && s.mark.Epoch < v.meta.Epoch
}

// checkChain is whether our chain is where we left it, or further by our own
// commits. It moves the mark to the head.
func (s *session) checkChain(v *view, tail Range) error {
	anew := v.writer != nil && !v.writer.Closed.IsZero() && (s.mark == nil || s.broken != nil || s.mark.Chain == v.writer.Chain)
	if s.restored {
		if anew && (s.mark == nil || s.broken != nil) {
			return s.startAnew(v)
		}
		return s.broken
	}
	if s.mark != nil && s.mark.Seq > 0 {
		at := s.mark.Ref()
		if len(tail.KVs) == 0 || tail.KVs[0].Key != s.Keys.Entry(s.Config.Writer, at.Chain, at.Seq) {
			return fmt.Errorf("%w: entry %s, which %s committed, is absent", errRollback, at, s.Config.Writer)
		}
		if h := entry.HashOf(tail.KVs[0].Value); h != at.Hash {
			return fmt.Errorf("%w: entry %d of chain %s has hash %s, and %s committed %s", errRollback, at.Seq, at.Chain, h, s.Config.Writer, at.Hash)
		}
	}
	if v.writer == nil {
		if s.mark != nil && (s.mark.Seq > 0 || len(tail.KVs) > 0) {
			return fmt.Errorf("%w: %s is absent, and its chain is there; its way out: %s", ErrIntegrity, s.Keys.Writer(s.Config.Writer), s.wayOut())
		}
		return s.broken
	}
	if anew {
		// An operator said that this writer may start anew.
		if v.serializable {
			return errors.New("must be read again, linearizable")
		}
		return s.startAnew(v)
	}
	if s.broken != nil {
		return s.broken
	}
	if s.mark == nil {
		return fmt.Errorf("%w: %s exists, and this machine has no key for it: state directory %s is new or lost; its way out: %s",
			ErrIntegrity, s.Keys.Writer(s.Config.Writer), s.Dir.Path(), s.wayOut())
	}
	if v.writer.Chain != s.mark.Chain {
		// Our chain is yet to be opened after the writer's.
		if s.mark.Seq == 0 && (!v.writer.Closed.IsZero() || v.writer.Epoch < s.mark.Epoch) {
			return nil
		}
		return s.unfit(v, "its chain is %s, and this machine's %s: another machine has taken its place", v.writer.Chain, s.mark.Chain)
	}
	return s.follow(v, tail)
}

func (s *session) unfit(v *view, format string, args ...any) error {
	return fmt.Errorf("%w: %s does not fit state directory %s: %s; its way out: %s", ErrIntegrity,
		s.Keys.Writer(s.Config.Writer), s.Dir.Path(), fmt.Sprintf(format, args...), s.wayOut())
}

// follow walks from the mark to the head by hash, and moves the mark.
func (s *session) follow(v *view, tail Range) error {
	w := v.writer
	seq, hash, revision := s.mark.Seq, s.mark.Hash, int64(0)
	if w.Seq < seq {
		return s.unfit(v, "its head is entry %d, and entry %d was committed", w.Seq, seq)
	}
	kvs := tail.KVs
	var head *entry.Entry
	var stored []byte
	if seq > 0 {
		stored = kvs[0].Value
		kvs = kvs[1:]
	}
	for seq < w.Seq {
		if len(kvs) == 0 {
			if !tail.More {
				return s.unfit(v, "its head is entry %d, and the chain ends at %d", w.Seq, seq)
			}
			r, err := s.Store.Read(s.ctx, false, []Get{s.tail(seq + 1)})
			if err != nil {
				return err
			}
			tail = r.Ranges[0]
			kvs = tail.KVs
			continue
		}
		if kvs[0].Key != s.Keys.Entry(s.Config.Writer, s.mark.Chain, seq+1) {
			return s.unfit(v, "entry %d is missing", seq+1)
		}
		stored = kvs[0].Value
		e, err := entry.Parse(stored)
		if err != nil {
			return s.unfit(v, "entry %d: %v", seq+1, err)
		}
		if e.Chain != s.mark.Chain || e.Seq != seq+1 || e.Prev != hash || e.Revision < revision {
			return s.unfit(v, "entry %d does not follow entry %d", seq+1, seq)
		}
		seq, hash, revision = e.Seq, entry.HashOf(stored), e.Revision
		kvs = kvs[1:]
	}
	if hash != w.Hash {
		return s.unfit(v, "its head hash is %s, and entry %d has %s", w.Hash, seq, hash)
	}
	// Entry and head change in one transaction. Every commit compares that the next
	// entry is absent, and would be tried until the deadline.
	if len(kvs) > 0 && kvs[0].Key == s.Keys.Entry(s.Config.Writer, s.mark.Chain, seq+1) {
		return s.unfit(v, "its head is entry %d, and entry %d is there, which no commit of this writer made", seq, seq+1)
	}
	if seq == s.mark.Seq {
		return nil // these are the very bytes that we committed
	}
	// The head's signature covers, by the hashes, all that leads to it.
	if err := entry.Verify(stored, s.verify); err != nil {
		return s.unfit(v, "head, entry %d: %v", seq, err)
	}
	var err error
	if head, err = entry.Parse(stored); err != nil {
		return s.unfit(v, "head, entry %d: %v", seq, err)
	}
	s.Log.Warn("a commit happened whose process did not live to note it", "chain", s.mark.Chain, "seq", seq, "op", head.Op)
	m := *s.mark
	first := m.Seq == 0
	m.Seq, m.Hash, m.Previous = seq, hash, entry.Ref{}
	return s.saveMark(m, v.revision, first)
}

// saveMark replaces the mark; revision is raised, never lowered.
func (s *session) saveMark(m statedir.Mark, revision int64, durable bool) error {
	m.Revision = max(m.Revision, revision)
	durable = durable || m.Boot != s.Boot
	m.Boot = s.Boot
	if err := s.Dir.SaveMark(&m, durable); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	s.mark = &m
	return nil
}

// settled notes that nothing is under way any more.
func (s *session) settled(v *view) error {
	if s.mark != nil && s.mark.Boot != s.Boot {
		if err := s.saveMark(*s.mark, v.revision, true); err != nil {
			return err
		}
	}
	if err := s.Dir.Settled(); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// stop tells all nodes that etcd has gone back in time: those that lost nothing
// would hand out the addresses of those that did.
func (s *session) stop(found error) error {
	err := fmt.Errorf("%w: %w; nobody allocates until 'ledger recover' is done", ErrIntegrity, found)
	if s.Config.Writer.Kind != entry.KindNode {
		return err
	}
	node := s.Config.Writer.Name
	put := Write{Key: s.Keys.Stop(node), Value: keyspace.Encode(keyspace.Stop{Node: node, Found: found.Error(), Time: s.Now().UTC()})}
	if _, serr := s.Store.Commit(s.ctx, Txn{Then: []Write{put}}); serr != nil {
		return errors.Join(err, fmt.Errorf("telling the other nodes: %w", serr))
	}
	return err
}

// stopsExempt reports whether this may be done though a node stopped the
// cluster: the drill itself, and in it what operators release to end a conflict.
func (s *session) stopsExempt(v *view) bool {
	return s.drill || s.anyState && v.meta.Recovering
}

// refused says why nothing may be acquired, or nil.
func (s *session) refused(v *view) error {
	if s.stopsExempt(v) {
		return nil
	}
	if len(v.stops) > 0 {
		var st keyspace.Stop
		if keyspace.Decode(v.stops[0].Value, &st) != nil {
			st.Found = "its value cannot be read, and a stop is a stop"
		}
		return fmt.Errorf("%w: %.300q stopped the cluster: %.1000q; see 'ledger recover'", ErrIntegrity, v.stops[0].Key, st.Found)
	}
	if v.meta.State != keyspace.Running && !s.anyState {
		return fmt.Errorf("%w: the ledger is %s; an operator ends that with 'ledger thaw'", ErrIntegrity, v.meta.State)
	}
	return nil
}

// gets are the reads that answer a need.
func (s *session) gets(p *Pool, n *need) []Get {
	var out []Get
	for _, b := range n.blocks {
		out = append(out, Get{Key: s.Keys.Block(keyspace.BlockID{Space: p.Space, Pool: p.Name, Prefix: b})})
	}
	if n.allBlocks {
		out = append(out, Get{Key: s.Keys.Blocks(p.Space, p.Name), End: keyspace.After(s.Keys.Blocks(p.Space, p.Name))})
	}
	for _, r := range n.addrs {
		out = append(out, Get{Key: s.Keys.Address(p.Space, r.From()), End: s.Keys.Address(p.Space, r.To()) + "\x00", Limit: n.limit})
	}
	return out
}

// learn takes in the answers to gets.
func (s *session) learn(k *known, n *need, answers []Range) error {
	for _, b := range n.blocks {
		k.blocks[b] = knownBlock{}
	}
	k.allBlocks = k.allBlocks || n.allBlocks
	i := len(answers) - len(n.addrs)
	for j, r := range n.addrs {
		a := answers[i+j]
		to := r.To()
		if a.More {
			// Up to the last key that can be read: a stray one may end the page.
			var last keyspace.Key
			err := errors.New("no key")
			for i := len(a.KVs) - 1; i >= 0 && err != nil; i-- {
				last, err = s.Keys.Parse(a.KVs[i].Key)
			}
			if err != nil {
				return fmt.Errorf("%w: %d keys from %.300q on are not ours: %w; run 'ledger verify'", ErrIntegrity, len(a.KVs), a.KVs[0].Key, err)
			}
			to = last.IP
		}
		k.covered = append(k.covered, netipx.IPRangeFrom(r.From(), to))
	}
	for _, a := range answers {
		for _, kv := range a.KVs {
			key, err := s.Keys.Parse(kv.Key)
			if err != nil {
				s.Log.Warn("a key that nobody should have put there", "err", err)
				continue
			}
			switch key.Kind {
			case "blocks":
				var b keyspace.Block
				err := keyspace.Decode(kv.Value, &b)
				if err == nil {
					err = entry.ValidateName("node", b.Node)
				}
				if err != nil {
					s.Log.Warn("a claim that cannot be read", "key", kv.Key, "err", err)
					b.Node = "?" // somebody's
				}
				k.blocks[key.Block.Prefix] = knownBlock{b.Node, kv.Mod}
			case "addresses":
				k.addrs[key.IP] = &knownAddress{mod: kv.Mod, raw: kv.Value, bad: len(kv.Value) == 0}
			}
		}
	}
	return nil
}

func decodeAddress(b []byte, a *keyspace.Address) error {
	if err := keyspace.Decode(b, a); err != nil {
		return err
	}
	switch {
	case a.State == keyspace.Leased && a.Holder != nil && !a.Acquire.IsZero() && a.Release.IsZero() && a.HeldUntil == nil:
	case a.State == keyspace.Free && a.Holder == nil && a.Acquire.IsZero() && !a.Release.IsZero():
	default:
		return fmt.Errorf("state %.80q does not go with its other fields", a.State)
	}
	return nil
}

func decodeMeta(b []byte, m *keyspace.Meta) error {
	if err := keyspace.Decode(b, m); err != nil {
		return err
	}
	return m.Validate()
}

// decodeAttachment reads an attachment's value, and refuses one that an ADD could
// not answer with or a release could not end.
func decodeAttachment(b []byte, a *keyspace.Attachment) error {
	if err := keyspace.Decode(b, a); err != nil {
		return err
	}
	return a.Validate()
}

// addressGets reads the keys of an attachment's addresses.
func (s *session) addressGets(space string, leases []keyspace.Lease) []Get {
	var out []Get
	for _, l := range leases {
		out = append(out, Get{Key: s.Keys.Address(space, l.Address.Addr())})
	}
	return out
}

func addrsOf(leases []keyspace.Lease) []netip.Addr {
	var out []netip.Addr
	for _, l := range leases {
		out = append(out, l.Address.Addr())
	}
	return out
}
