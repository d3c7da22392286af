package allocator

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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

// spoilt is an errSpoilt with its way out.
func spoilt(id keyspace.AttachmentID, key string, err error) error {
	return fmt.Errorf("%w: %s: %w; 'ledger verify' says more, and 'ledger release --attachment %v' ends the lease", errSpoilt, key, err, id)
}

// tailPage is how many entries beyond the mark are read with a view, and
// followPage how many at a time where there are more (fewer in tests).
const tailPage = 64

var followPage int64 = 1024

// look takes a view. A serializable one that fails its checks may only lag, so
// it is taken again.
func (s *session) look(serializable bool, gets ...Get) (*view, error) {
	// Who opens a chain takes cluster and epoch from the view, for good.
	serializable = serializable && s.mark != nil && s.mark.Seq > 0
	v, err := s.lookOnce(serializable, gets)
	if err != nil && serializable && !errors.Is(err, ErrUnavailable) {
		v, err = s.lookOnce(false, gets)
	}
	for tries := 0; errors.Is(err, errRollback); tries++ {
		stopped, serr := s.stop(err, v.metaMod)
		if stopped || tries == 3 || s.ctx.Err() != nil {
			return v, serr
		}
		// Meta has changed since: a recovery may have begun, or ended.
		v, err = s.lookOnce(false, gets)
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
		base = append(base, s.tail(max(s.mark.Seq, 1), tailPage))
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
			return v, fmt.Errorf("%w: %s: %w", ErrIntegrity, s.Keys.Meta(), err)
		}
	}
	if kvs := r.Ranges[2].KVs; len(kvs) == 1 {
		v.writer, v.writerMod = new(keyspace.Writer), kvs[0].Mod
		if err := decodeHead(kvs[0].Value, v.writer); err != nil {
			return v, fmt.Errorf("%w: %s cannot be read: %w; its way out: %s", ErrIntegrity, kvs[0].Key, err, s.wayOut())
		}
	}
	var tail Range
	if s.mark != nil {
		tail = r.Ranges[3]
	}
	if s.mark != nil && s.mark.Before != nil && !v.serializable && s.broken == nil && (v.writer == nil || v.writer.Chain != s.mark.Chain) {
		// A 'recover start' that never came to etcd: nobody has seen that epoch, and
		// the chain of before goes on.
		if err := s.saveMark(s.mark.Back(), v.revision, true); err != nil {
			return v, err
		}
		return s.lookOnce(false, gets)
	}
	if s.mark != nil && s.mark.Seq == 0 && v.writer != nil && v.writer.Chain == s.mark.Chain && s.mark.Epoch < v.writer.Epoch && !v.serializable {
		// One that did come, after it was given up.
		m := *s.mark
		m.Epoch, m.EtcdCluster = v.writer.Epoch, v.meta.EtcdCluster
		if err := s.saveMark(m, v.revision, true); err != nil {
			return v, err
		}
	}
	if s.lateOperator(v) {
		if err := s.renew(v, nil); err != nil {
			return v, err
		}
		tail = Range{}
	}
	if err := s.checkCluster(v); err != nil {
		return v, err
	}
	if err := s.checkChain(v, tail); err != nil {
		return v, err
	}
	if err := s.checkRecovered(v); err != nil {
		return v, err
	}
	if !serializable && !s.unsettled {
		// Whatever was sent has been fenced, and what landed has been seen.
		return v, s.settled(v)
	}
	return v, nil
}

// tail is the read of our chain from seq on.
func (s *session) tail(seq uint64, limit int64) Get {
	return Get{
		Key: s.Keys.Entry(s.Config.Writer, s.mark.Chain, seq), End: keyspace.After(s.Keys.Chain(s.Config.Writer, s.mark.Chain)),
		Limit: limit,
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
	return fmt.Errorf("%w: %s has to recover first, or to settle a conflict: run 'ledger recover node' on it", kind, s.Config.Writer)
}

// lateOperator reports whether this is an operator's first command after a
// recovery that somebody else did: operators hold nothing, so that all they need
// is a chain of the new epoch. Also where that is the epoch's number in an etcd that
// was given up since.
func (s *session) lateOperator(v *view) bool {
	if s.Config.Writer.Kind == entry.KindNode || s.restored || v.serializable || s.broken != nil || s.mark == nil || s.mark.Cluster != v.meta.Cluster {
		return false
	}
	another := s.mark.EtcdCluster != v.meta.EtcdCluster && v.meta.EtcdCluster == keyspace.EtcdClusterID(v.cluster) && (v.writer == nil || v.writer.Epoch < v.meta.Epoch)
	return s.mark.Epoch < v.meta.Epoch || s.mark.Epoch == v.meta.Epoch && another
}

// checkChain is whether our chain is where we left it, or further by our own
// commits. It moves the mark to the head.
func (s *session) checkChain(v *view, tail Range) error {
	// Our chain is yet to be opened, after the writer's: that is of an earlier epoch, or
	// closed, and it was when this chain was begun. After another close it begins anew.
	opening := v.writer != nil && s.mark != nil && s.broken == nil && s.mark.Seq == 0 && len(tail.KVs) == 0 && s.mark.Chain != v.writer.Chain &&
		s.mark.Closed == v.writer.Closed && (!v.writer.Closed.IsZero() || v.writer.Epoch < s.mark.Epoch)
	anew := v.writer != nil && !v.writer.Closed.IsZero() && !opening
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
			return s.headGone()
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
		if opening {
			return nil
		}
		return s.unfit(v, "its chain is %s, and this machine's %s: another machine has taken its place", v.writer.Chain, s.mark.Chain)
	}
	if err := s.checkMachine(v); err != nil {
		return err
	}
	return s.follow(v, tail)
}

// checkMachine is whether the head was written from this state directory, and not
// from a copy of it: its boot is one that the directory has noted. Who finds
// another notes that in the head, so that both machines are refused.
func (s *session) checkMachine(v *view) error {
	w := v.writer
	if w.Disputed == "" {
		if slices.Contains(s.mark.Boots, w.Boot) {
			return nil
		}
		if v.serializable {
			return errors.New("must be read again, linearizable")
		}
		value := *w
		value.Disputed = s.Boot
		key := s.Keys.Writer(s.Config.Writer)
		if _, err := s.Store.Commit(s.ctx, Txn{If: []Compare{{Key: key, Mod: v.writerMod}}, Then: []Write{{Key: key, Value: keyspace.Encode(value)}}}); err != nil {
			s.Log.Warn("telling the other machine failed", "err", err)
		}
	}
	return s.unfit(v, "another machine, or a copy of this directory, has written as %s since (at boot %.80s, and this one has not had that): leave one of them running", s.Config.Writer, w.Boot)
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
			// A long way is gone in steps, so that a call that runs out of time
			// leaves the next one less of it.
			if err := s.moveMark(v, stored, seq, hash); err != nil {
				return err
			}
			r, err := s.Store.Read(s.ctx, false, []Get{s.tail(seq+1, followPage)})
			if err != nil {
				return fmt.Errorf("reading what %s has written since its mark: entry %d of %d; the next call goes on from there: %w", s.Config.Writer, seq, w.Seq, err)
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
	return s.moveMark(v, stored, seq, hash)
}

// moveMark moves the mark to an entry that descends from it by hash. The entry's
// signature covers, by the hashes, all that leads to it.
func (s *session) moveMark(v *view, stored []byte, seq uint64, hash entry.Hash) error {
	if seq == s.mark.Seq {
		return nil // these are the very bytes that we committed
	}
	if err := entry.Verify(stored, s.verify); err != nil {
		return s.unfit(v, "entry %d: %v", seq, err)
	}
	s.Log.Warn("commits happened whose process did not live to note them", "chain", s.mark.Chain, "from", s.mark.Seq+1, "to", seq)
	return s.saveMark(s.mark.At(seq, hash), v.revision, s.mark.Seq == 0)
}

// saveMark replaces the mark; revision is raised, never lowered. While the boot is
// not noted it is durable.
func (s *session) saveMark(m statedir.Mark, revision int64, durable bool) error {
	m.Revision = max(m.Revision, revision)
	if err := s.Dir.SaveMark(&m, durable || m.Boot != s.Boot); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	s.mark = &m
	return nil
}

// settled notes that nothing is under way any more.
func (s *session) settled(v *view) error {
	if s.mark != nil && s.mark.Boot != s.Boot {
		m := *s.mark
		m.Boot, m.Boots = s.Boot, []string{s.Boot}
		if v.writer != nil && v.writer.Chain == m.Chain && v.writer.Boot != s.Boot && slices.Contains(s.mark.Boots, v.writer.Boot) {
			m.Boots = append(m.Boots, v.writer.Boot)
		}
		if err := s.saveMark(m, v.revision, true); err != nil {
			return err
		}
	}
	if err := s.Dir.Settled(); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// stop tells all nodes that etcd has gone back in time: those that lost nothing
// would hand out the addresses of those that did. It compares the meta under which
// that was found, lest a late one lands after the recovery; where meta has changed
// since, it reports false.
func (s *session) stop(found error, metaMod int64) (bool, error) {
	err := fmt.Errorf("%w: %w; nobody allocates until 'ledger recover' is done", ErrIntegrity, found)
	if s.Config.Writer.Kind != entry.KindNode {
		return true, err
	}
	node := s.Config.Writer.Name
	r, serr := s.Store.Commit(s.ctx, Txn{
		If:   []Compare{{Key: s.Keys.Meta(), Mod: metaMod}},
		Then: []Write{{Key: s.Keys.Stop(node), Value: keyspace.Encode(keyspace.Stop{Node: node, Found: found.Error(), Time: s.Now().UTC()})}},
	})
	if serr != nil {
		return true, errors.Join(err, fmt.Errorf("telling the other nodes: %w", serr))
	}
	return r.Succeeded, err
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

// gets are the reads that answer a need. Of what k remembers only the changes are
// read.
func (s *session) gets(p *Pool, n *need, k *known) []Get {
	var out []Get
	for _, b := range n.blocks {
		out = append(out, Get{Key: s.Keys.Block(keyspace.BlockID{Space: p.Space, Pool: p.Name, Prefix: b})})
	}
	if n.allBlocks {
		out = append(out, Get{Key: s.Keys.Blocks(p.Space, p.Name), End: keyspace.After(s.Keys.Blocks(p.Space, p.Name))})
	}
	for _, r := range n.addrs {
		g := Get{Key: s.Keys.Address(p.Space, r.From()), End: s.Keys.Address(p.Space, r.To()) + "\x00", Limit: n.limit}
		if k.memory.has(r) {
			g.Since = k.memory.revision + 1
		}
		out = append(out, g)
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
		k.memory.into(k, r)
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
		s.take(k, a)
	}
	return nil
}

// take notes the claims and addresses of an answer.
func (s *session) take(k *known, a Range) {
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
				s.Log.Warn("a claim that cannot be read: 'ledger unclaim' gives the block back", "key", kv.Key, "err", err)
				b.Node = "?" // somebody's
			}
			k.blocks[key.Block.Prefix] = knownBlock{b.Node, kv.Mod}
		case "addresses":
			k.addrs[key.IP] = &knownAddress{mod: kv.Mod, raw: kv.Value, bad: len(kv.Value) == 0}
		}
	}
}

func decodeAddress(b []byte, a *keyspace.Address) error {
	if err := keyspace.Decode(b, a); err != nil {
		return err
	}
	switch {
	case a.State == keyspace.Leased && a.Holder != nil && !a.Acquire.IsZero() && a.Release.IsZero() && a.Since.IsZero() && a.Cooldown == 0:
	case a.State == keyspace.Free && a.Holder == nil && a.Acquire.IsZero() && !a.Release.IsZero() && a.Cooldown >= 0 && a.Cooldown <= entry.MaxCooldown:
	default:
		return fmt.Errorf("state %.80q does not go with its other fields", a.State)
	}
	return nil
}

func decodeMeta(b []byte, m *keyspace.Meta) error {
	var v struct {
		Version int `json:"version"`
	}
	if json.Unmarshal(b, &v) == nil && v.Version > 0 && v.Version != keyspace.FormatVersion {
		return fmt.Errorf("the ledger has format version %d, and this program reads and writes %d: use the version of the program that goes with it", v.Version, keyspace.FormatVersion)
	}
	if err := keyspace.Decode(b, m); err != nil {
		return fmt.Errorf("it cannot be read; 'ledger verify' says what it should be: %w", err)
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

// inSpace is an address in its address space: there it is unique.
type inSpace struct {
	space string
	ip    netip.Addr
}

// places are the addresses that an attachment has.
func places(a *keyspace.Attachment) (out []inSpace) {
	for _, ip := range addrsOf(a.Leases) {
		out = append(out, inSpace{a.Space, ip})
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
