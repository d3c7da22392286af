package allocator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// Request is what an attachment asks for.
type Request struct {
	ID        keyspace.AttachmentID
	Pool      *Pool        // nil: the named pool PoolName
	PoolName  string       // of a named pool, whose spec is read and compared
	Requested []netip.Addr // at most one for a range set
	Pod       string       // namespace/name
	PodUID    string
	Trace     string
	Reason    string
}

// drainLimit is how many queued releases one call tries at most, so that a long
// queue does not hold up a pod.
const drainLimit = 8

// Acquire gives an attachment one address of each range set of the pool, or
// none. Called again for an attachment that holds addresses it returns them.
//
// Errors: ErrExhausted, ErrNotAvailable, ErrNoPool, ErrIntegrity,
// ErrNotInitialised, ErrUnavailable, ErrNoSpace, ErrState. ErrUnknownOutcome
// means that the lease may exist; its release has been queued, and calling again
// is safe.
func (w *Writer) Acquire(ctx context.Context, req Request) (*keyspace.Attachment, error) {
	var out *keyspace.Attachment
	s := &session{Writer: w}
	s.gaveUp = func(err error) error { return s.orQueue(req.ID, err) }
	err := w.withSession(ctx, s, func(s *session) error {
		if err := s.drain(req.ID); err != nil {
			return err
		}
		var err error
		out, err = s.acquire(&req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// orQueue queues, while the lock is held, the release of an attachment whose
// acquire may have happened though the caller is told that it did not. What was
// answered before stays: its runtime knows of it, and will DEL.
func (s *session) orQueue(id keyspace.AttachmentID, err error) error {
	pending, perr := s.Dir.Pending()
	if !errors.Is(err, ErrUnknownOutcome) && !errors.Is(err, errCommitted) && !s.lost && !pending && perr == nil {
		return err
	}
	if s.Dir.Holding(id) != nil {
		return err
	}
	if qerr := s.Dir.Enqueue(statedir.Queued{Attachment: id, Time: s.Now().UTC(), Reason: "add failed"}); qerr != nil {
		return errors.Join(err, fmt.Errorf("%w: queueing the release: %w", ErrState, qerr))
	}
	return err
}

// errCommitted marks an error that came after the commit.
var errCommitted = errors.New("committed, then failed")

func (s *session) acquire(req *Request) (*keyspace.Attachment, error) {
	pool := req.Pool
	q := question{pool: pool, node: req.ID.Node, requested: req.Requested}
	if pool != nil {
		q.hints = s.Dir.Blocks(pool.Space, pool.Name)
	}
	for serializable := true; ; serializable = false {
		out, err := s.tryAcquire(req, q, serializable)
		if err == nil {
			return out, nil
		}
		switch {
		case errors.Is(err, errAgain):
			q.lost++
		case serializable && mayLag(err):
			// Only a linearizable view may say no.
		default:
			return nil, err
		}
		if s.ctx.Err() != nil {
			return nil, fmt.Errorf("%w: gave up after %d conflicts: %w", ErrUnavailable, q.lost, s.ctx.Err())
		}
		if q.lost > 2 {
			s.pause(q.lost)
		}
	}
}

// mayLag reports whether what went wrong may be due to a view that lags. A view that
// shows a rollback has been taken again already, and a commit's reply does not lag.
func mayLag(err error) bool {
	return !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrUnknownOutcome) && !errors.Is(err, errRollback)
}

func (s *session) tryAcquire(req *Request, q question, serializable bool) (*keyspace.Attachment, error) {
	attachment := s.Keys.Attachment(req.ID)
	gets := []Get{{Key: attachment}}
	if q.pool == nil {
		gets = append(gets, Get{Key: s.Keys.Pool(req.PoolName)})
	}
	// What the planner will ask for first, so that one read suffices.
	var first need
	k := newKnown()
	q.now, q.random = s.Now(), s.Random()
	if q.pool != nil {
		_, n, err := plan(&q, k)
		if err != nil {
			return nil, err // decided without reading: no view could change it
		}
		first, k.memory = *n, s.recall(&q)
		if k.memory != nil && first.allBlocks {
			first = need{} // that is read with all else
		}
		gets = append(gets, s.gets(q.pool, &first, k)...)
	}
	v, err := s.look(serializable, gets...)
	if err != nil {
		return nil, err
	}
	serializable = v.serializable
	if kvs := v.extra[0].KVs; len(kvs) == 1 {
		return s.existing(req, kvs[0], v)
	}
	if err := s.refused(v); err != nil {
		return nil, err
	}
	if h := s.Dir.Holding(req.ID); h != nil && s.confirm(req.ID, &h.Value) == nil {
		ip := h.Value.Leases[0].Address.Addr()
		return nil, fmt.Errorf("%w: %s is absent, and %v is leased to it: somebody deleted it; the pod's DEL ends the lease, and so does 'ledger release %v --space %s'",
			errSpoilt, attachment, ip, ip, h.Value.Space)
	}
	change := change{time: q.now, compare: []Compare{{Key: attachment}}}
	if q.pool == nil {
		p, mod, err := s.namedPool(req.PoolName, v.extra[1])
		if err != nil {
			return nil, err
		}
		q.pool, q.hints = p, s.Dir.Blocks(p.Space, p.Name)
		k.memory = s.recall(&q)
		change.compare = append(change.compare, Compare{Key: s.Keys.Pool(req.PoolName), Mod: mod})
	} else if err := s.learn(k, &first, v.extra[1:]); err != nil {
		return nil, err
	}
	choices, err := s.choose(&q, k, serializable, v.revision)
	if err != nil {
		return nil, err
	}

	value := keyspace.Attachment{Space: q.pool.Space, Pool: q.pool.Name, Cooldown: q.pool.cooldown(), Pod: req.Pod, PodUID: req.PodUID}
	e := &entry.Entry{
		Op: entry.Acquire, Space: q.pool.Space, Pool: q.pool.Name, Cooldown: value.Cooldown,
		Network: req.ID.Network, Container: req.ID.Container, Interface: req.ID.Interface, Node: req.ID.Node,
		Pod: req.Pod, PodUID: req.PodUID, Trace: req.Trace, Reason: req.Reason,
	}
	var claims []keyspace.BlockID
	hints := q.hints
	for _, c := range choices {
		value.Leases = append(value.Leases, c.lease)
		e.Addresses = append(e.Addresses, acquired(c.lease, c.after))
		change.compare = append(change.compare, Compare{Key: s.Keys.Address(q.pool.Space, c.ip), Mod: c.mod})
		block := keyspace.BlockID{Space: q.pool.Space, Pool: q.pool.Name, Prefix: c.block}
		switch {
		case c.claim && !slices.Contains(claims, block):
			claims = append(claims, block)
			e.Blocks = append(e.Blocks, c.block)
			change.compare = append(change.compare, Compare{Key: s.Keys.Block(block)})
		case c.own != 0:
			change.compare = append(change.compare, Compare{Key: s.Keys.Block(block), Mod: c.own})
		}
		if c.block.IsValid() {
			hints = append([]netip.Prefix{c.block}, slices.DeleteFunc(slices.Clone(hints), func(p netip.Prefix) bool { return p == c.block })...)
		}
	}
	change.entries = []*entry.Entry{e}
	change.prepare = func(refs []entry.Ref) error {
		value.Acquire = refs[0]
		return s.Dir.Prepare(statedir.Holding{ID: req.ID, Value: value})
	}
	change.writes = func(refs []entry.Ref) []Write {
		writes := s.putAddresses(q.pool.Space, q.pool.Name, addrsOf(value.Leases), req.ID, refs[0])
		writes = append(writes, Write{Key: attachment, Value: keyspace.Encode(value)})
		return append(writes, s.putBlocks(claims, req.ID.Node, refs[0])...)
	}
	if _, err := s.commit(v, change); err != nil {
		return nil, err
	}
	// A crash from here on leaves the lease without a holding; the runtime got
	// no answer and will DEL.
	if err := s.Dir.SaveBlocks(q.pool.Space, q.pool.Name, hints[:min(len(hints), maxHints)]); err != nil {
		s.Log.Warn("the hint which block to look at was not kept", "err", err)
	}
	return &value, s.hold(req.ID)
}

// maxHints is how many blocks are remembered to be looked at first.
const maxHints = 8

// acquired is an address as an acquire records it.
func acquired(l keyspace.Lease, after entry.Ref) entry.Address {
	return entry.Address{IP: l.Address.Addr(), Bits: l.Address.Bits(), Gateway: l.Gateway, Range: l.Range, After: after}
}

// hold puts in place the holding that was prepared before a commit.
func (s *session) hold(id keyspace.AttachmentID) error {
	if err := s.Dir.Hold(id); err != nil {
		return fmt.Errorf("%w: %w: %w", errCommitted, ErrState, err)
	}
	return nil
}

// remember notes what an attachment holds, where that needs no commit.
func (s *session) remember(id keyspace.AttachmentID, value keyspace.Attachment) error {
	if h := s.Dir.Holding(id); h != nil && h.Value.Space == value.Space && slices.Equal(addrsOf(h.Value.Leases), addrsOf(value.Leases)) {
		return s.note(h.By(value))
	}
	return s.note(statedir.Holding{ID: id, Value: value})
}

func (s *session) note(h statedir.Holding) error {
	err := s.Dir.Prepare(h)
	if err == nil {
		err = s.Dir.Hold(h.ID)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// choose plans, reading what the planner needs. revision is that of what is known.
//
// A choice may rest on reads at several revisions, as the commit compares each key
// of it. "Exhausted" may not: an address that goes from here to there, always free,
// would be missed in both places. So all of the pool is read at one revision.
func (s *session) choose(q *question, k *known, serializable bool, revision int64) ([]choice, error) {
	one, whole := true, false
	for {
		choices, n, err := plan(q, k)
		// A pool that is full is read at one revision, or to be remembered.
		exhausted := errors.Is(err, ErrExhausted) && !serializable && !whole && (!one || k.memory == nil && q.pool.small())
		if n == nil && !exhausted {
			return choices, err
		}
		if !whole && (exhausted || q.pool.small() && (n.limit > 0 || n.allBlocks && k.memory != nil)) {
			if k, err = s.whole(q, k.memory); err != nil {
				return nil, err
			}
			one, whole = true, true
			continue
		}
		r, err := s.Store.Read(s.ctx, serializable, s.gets(q.pool, n, k))
		if err != nil {
			return nil, err
		}
		one = one && r.Revision == revision
		revision = r.Revision
		if err := s.learn(k, n, r.Ranges); err != nil {
			return nil, err
		}
	}
}

// existing answers an ADD for an attachment that holds addresses.
func (s *session) existing(req *Request, kv KV, v *view) (*keyspace.Attachment, error) {
	if v.serializable {
		return nil, errors.New("must be read again, linearizable")
	}
	var a keyspace.Attachment
	if err := decodeAttachment(kv.Value, &a); err != nil {
		return nil, spoilt(req.ID, kv.Key, err)
	}
	if err := s.confirm(req.ID, &a); err != nil {
		return nil, err
	}
	for _, ip := range req.Requested {
		if !slices.Contains(addrsOf(a.Leases), ip) {
			return nil, fmt.Errorf("%w: %v was asked for, and %v holds %v already", ErrNotAvailable, ip, req.ID, addrsOf(a.Leases))
		}
	}
	return &a, s.remember(req.ID, a)
}

// confirm reads, linearizable, whether each address of an attachment names it.
func (s *session) confirm(id keyspace.AttachmentID, a *keyspace.Attachment) error {
	r, err := s.Store.Read(s.ctx, false, s.addressGets(a.Space, a.Leases))
	if err != nil {
		return err
	}
	_, err = s.leased(id, a, r.Ranges)
	return err
}

// leased checks that address keys say what the attachment says, and returns
// their mod_revisions.
func (s *session) leased(id keyspace.AttachmentID, a *keyspace.Attachment, answers []Range) ([]Compare, error) {
	var compare []Compare
	for i, l := range a.Leases {
		key := s.Keys.Address(a.Space, l.Address.Addr())
		var v keyspace.Address
		if len(answers[i].KVs) == 0 {
			return nil, spoilt(id, key, errors.New("it is absent, and the attachment holds it"))
		}
		kv := answers[i].KVs[0]
		if err := decodeAddress(kv.Value, &v); err != nil {
			return nil, spoilt(id, key, err)
		}
		if v.State != keyspace.Leased || *v.Holder != id || v.Acquire != a.Acquire {
			return nil, spoilt(id, key, errors.New("it names another lease than the attachment"))
		}
		compare = append(compare, Compare{Key: key, Mod: kv.Mod})
	}
	return compare, nil
}

// names reports whether one of the address keys that were read says that the attachment
// has it by its acquire.
func (s *session) names(id keyspace.AttachmentID, a *keyspace.Attachment, answers []Range) bool {
	return slices.ContainsFunc(answers[:min(len(a.Leases), len(answers))], func(r Range) bool {
		var v keyspace.Address
		return len(r.KVs) == 1 && decodeAddress(r.KVs[0].Value, &v) == nil && v.State == keyspace.Leased && *v.Holder == id && v.Acquire == a.Acquire
	})
}

func (s *session) namedPool(name string, r Range) (*Pool, int64, error) {
	if len(r.KVs) == 0 {
		return nil, 0, fmt.Errorf("%w: %q (%s is absent)", ErrNoPool, name, s.Keys.Pool(name))
	}
	var spec keyspace.Pool
	if err := keyspace.Decode(r.KVs[0].Value, &spec); err != nil {
		return nil, 0, fmt.Errorf("%w: %q: %w", ErrNoPool, name, err)
	}
	p, err := PoolFromSpec(name, &spec)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %q: %w", ErrNoPool, name, err)
	}
	return p, r.KVs[0].Mod, nil
}

// Release ends the lease of an attachment. That there is none is success. Where
// etcd or the ledger does not let it, the release is queued, which is success
// too: only where that fails does it return an error, ErrState.
func (w *Writer) Release(ctx context.Context, id keyspace.AttachmentID, reason string) error {
	s := &session{Writer: w}
	enqueue := func(err error) error {
		holds := s.left
		if h := w.Dir.Holding(id); holds == nil && h != nil {
			holds = &h.Value
		}
		// Where the node's name was changed, the pod is from before: etcd has it under
		// the name that the state directory remembers.
		if m, merr := w.Dir.LoadMark(); merr == nil && m != nil && id.Node == w.Config.Writer.Name {
			if was, ok := strings.CutPrefix(m.Writer, string(entry.KindNode)+"/"); ok {
				id.Node = was
			}
		}
		w.Log.Warn("release queued", "attachment", id.String(), "err", err)
		if err := w.Dir.Enqueue(statedir.Queued{Attachment: id, Time: w.Now().UTC(), Reason: reason, Holds: holds}); err != nil {
			return fmt.Errorf("%w: release of %v can be neither committed nor queued: %w", ErrState, id, err)
		}
		return nil
	}
	s.gaveUp = func(err error) error {
		if err := enqueue(err); err != nil {
			return err
		}
		// The runtime is told that it is gone, so a recovery must not bring it back.
		if err := w.Dir.Unhold(id); err != nil {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
		return nil
	}
	err := w.withSession(ctx, s, func(s *session) error {
		if err := s.letGo(id, reason); err != nil {
			return err
		}
		_ = s.drainSome(keyspace.AttachmentID{}) // what this was asked for is done
		return nil
	})
	if err != nil && !s.locked {
		// What is remembered is another's to change; the queue stands over it.
		return enqueue(err)
	}
	return err
}

// letGo releases what the runtime no longer has. The holding goes first: a crash
// in between leaves a lease without a holding, which a recovery releases, instead
// of a holding without a lease, which it would assert against the next holder.
func (s *session) letGo(id keyspace.AttachmentID, reason string) error {
	var guess *keyspace.Attachment
	if h := s.Dir.Holding(id); h != nil {
		guess = &h.Value // with this, one read suffices
	} else if q := s.Dir.Waiting(id); q != nil {
		guess = q.Holds
	}
	if err := s.Dir.Unhold(id); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	s.leaving, s.left = id, guess
	if err := s.release(id, entry.Ref{}, guess, reason); err != nil {
		return err
	}
	if err := s.Dir.Dequeue(id); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

// release commits the end of an attachment's lease: of the one that only names
// (ErrNotFound says that it is not there any more), or where only is zero of
// whatever it is. That there is none is read linearizable. guess is what it may
// hold, or nil.
func (s *session) release(id keyspace.AttachmentID, only entry.Ref, guess *keyspace.Attachment, reason string) error {
	for serializable, tries := true, 0; ; serializable = false {
		next, err := s.tryRelease(id, only, guess, reason, serializable)
		switch {
		case err == nil && next == nil:
			return nil
		case errors.Is(err, ErrNotFound) && tries > 0:
			return nil // a try whose reply was lost did it, or somebody else since
		case err == nil:
			guess = next // its addresses must be read too
		case errors.Is(err, errAgain):
			if tries++; tries > 2 {
				s.pause(tries)
			}
		case serializable && mayLag(err):
		default:
			return err
		}
		if s.ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, s.ctx.Err())
		}
	}
}

// tryRelease returns the attachment's value if it is not as guessed.
func (s *session) tryRelease(id keyspace.AttachmentID, only entry.Ref, guess *keyspace.Attachment, reason string, serializable bool) (*keyspace.Attachment, error) {
	attachment := s.Keys.Attachment(id)
	gets := []Get{{Key: attachment}}
	if guess != nil {
		gets = append(gets, s.addressGets(guess.Space, guess.Leases)...)
	}
	v, err := s.look(serializable, gets...)
	if err != nil {
		return nil, err
	}
	var a keyspace.Attachment
	if kvs := v.extra[0].KVs; len(kvs) == 1 {
		if err := decodeAttachment(kvs[0].Value, &a); err != nil {
			return nil, spoilt(id, attachment, err)
		}
	} else {
		if v.serializable {
			return nil, errors.New("must be read again, linearizable")
		}
		if !only.IsZero() {
			return nil, fmt.Errorf("lease %s of %v: %w", only, id, ErrNotFound)
		}
		if guess == nil {
			return nil, nil
		}
		if !s.names(id, guess, v.extra[1:]) {
			return nil, nil
		}
		if _, err := s.leased(id, guess, v.extra[1:]); err != nil {
			return nil, err
		}
		// No release deletes the key and leaves the addresses: somebody else did.
		s.Log.Warn("the key of an attachment that is released is gone, and its addresses are leased to it", "key", attachment)
		a = *guess
	}
	if !only.IsZero() && a.Acquire != only {
		return nil, fmt.Errorf("lease %s of %v: %w: it is lease %s now", only, id, ErrNotFound, a.Acquire)
	}
	if guess == nil || a.Space != guess.Space || !slices.Equal(addrsOf(a.Leases), addrsOf(guess.Leases)) {
		return &a, nil
	}
	if err := s.refused(v); err != nil {
		return nil, err
	}
	compare, err := s.leased(id, &a, v.extra[1:])
	if err != nil {
		return nil, err
	}
	e := &entry.Entry{
		Op: entry.Release, Space: a.Space, Pool: a.Pool, Acquire: a.Acquire,
		Network: id.Network, Container: id.Container, Interface: id.Interface, Node: id.Node,
		Pod: a.Pod, PodUID: a.PodUID, Reason: reason,
	}
	for _, ip := range addrsOf(a.Leases) {
		e.Addresses = append(e.Addresses, entry.Address{IP: ip})
	}
	now := s.Now().UTC()
	_, err = s.commit(v, change{
		entries: []*entry.Entry{e},
		time:    now,
		compare: append(compare, Compare{Key: attachment, Mod: modAt(v.extra[0])}),
		writes: func(refs []entry.Ref) []Write {
			writes := []Write{{Key: attachment, Delete: true}}
			for _, ip := range addrsOf(a.Leases) {
				writes = append(writes, s.freeAddress(a.Space, ip, keyspace.Address{Pool: a.Pool, Release: refs[0], Since: now, Cooldown: a.Cooldown}))
			}
			return writes
		},
	})
	return nil, err
}

// drain settles the queued release of id, if there is one, and some others.
func (s *session) drain(id keyspace.AttachmentID) error {
	if s.Dir.IsQueued(id) {
		if err := s.letGo(id, "queued release"); err != nil {
			return err
		}
	}
	return s.drainSome(id)
}

// drainSome tries some queued releases; one that cannot be settled now waits on. It
// fails only where it is not known what became of one: then nothing may be answered.
func (s *session) drainSome(but keyspace.AttachmentID) error {
	queue, err := s.Dir.Some(drainLimit)
	if err != nil {
		s.Log.Warn("some queued releases cannot be read", "err", err)
	}
	for _, q := range queue {
		if q.Attachment == but {
			continue
		}
		if err := s.drainOne(q); errors.Is(err, ErrUnknownOutcome) {
			return err
		} else if err != nil {
			break
		}
	}
	return nil
}

// drainOne settles a queued release, or sets it aside. It fails where the next one
// would fare no better.
func (s *session) drainOne(q statedir.Queued) error {
	err := s.letGo(q.Attachment, queuedReason(q))
	if err == nil {
		return nil
	}
	s.Log.Warn("a queued release waits on", "attachment", q.Attachment.String(), "err", err)
	if !errors.Is(err, errSpoilt) {
		return err
	}
	// What stands in etcd for this one keeps nobody else waiting.
	if err := s.Dir.SetAside(q.Attachment); err != nil {
		s.Log.Warn("a queued release cannot be set aside", "err", err)
	}
	return nil
}

func queuedReason(q statedir.Queued) string {
	return fmt.Sprintf("%s; queued %s", q.Reason, q.Time.Format(time.RFC3339))
}

// Drain settles queued releases, those set aside included, until none is left or
// one cannot be settled; it returns how many wait on.
func (w *Writer) Drain(ctx context.Context) (left int, err error) {
	_, err = w.drainAll(ctx, &session{Writer: w})
	queue, _ := w.Dir.Queue()
	return len(queue), err
}

// drainAll is Drain in sessions like the one that is given.
func (w *Writer) drainAll(ctx context.Context, like *session) (settled []keyspace.AttachmentID, err error) {
	queue, err := w.Dir.Queue()
	if err != nil {
		w.Log.Warn("the queue of releases cannot be read in full", "err", err)
	}
	// Each group takes the lock and its deadline anew: a long queue must not keep
	// pods of this node waiting.
	for group := range slices.Chunk(queue, drainLimit) {
		s := *like
		err := w.withSession(ctx, &s, func(s *session) error {
			v, err := s.look(false)
			if err != nil {
				return err
			}
			if err := s.refused(v); err != nil {
				return err
			}
			for _, q := range group {
				if !s.Dir.IsQueued(q.Attachment) {
					continue
				}
				if s.drainOne(q) != nil {
					break
				}
				if !s.Dir.IsQueued(q.Attachment) {
					settled = append(settled, q.Attachment)
				}
			}
			return nil
		})
		if err != nil {
			return settled, err
		}
	}
	return settled, nil
}

// Check reports ErrMismatch unless the attachment holds every one of ips and
// nothing else of its own is missing among them.
func (w *Writer) Check(ctx context.Context, id keyspace.AttachmentID, ips []netip.Addr) error {
	return w.with(ctx, func(s *session) error {
		v, err := s.look(false, Get{Key: s.Keys.Attachment(id)})
		if err != nil {
			return err
		}
		if len(v.extra[0].KVs) == 0 {
			return fmt.Errorf("%w: %v holds no address, and prevResult says %v", ErrMismatch, id, ips)
		}
		var a keyspace.Attachment
		if err := decodeAttachment(v.extra[0].KVs[0].Value, &a); err != nil {
			return spoilt(id, v.extra[0].KVs[0].Key, err)
		}
		if err := s.confirm(id, &a); err != nil {
			return err
		}
		for _, ip := range addrsOf(a.Leases) {
			if !slices.Contains(ips, ip) {
				return fmt.Errorf("%w: %v holds %v, which is not in prevResult's %v", ErrMismatch, id, ip, ips)
			}
		}
		return nil
	})
}

// GC releases what this node holds for a network and keep does not list. One
// release that fails does not keep the others from being tried.
func (w *Writer) GC(ctx context.Context, network string, keep map[keyspace.AttachmentID]bool) (released []keyspace.AttachmentID, err error) {
	node := w.Config.Writer.Name
	var ids, gone []keyspace.AttachmentID // what etcd has, and what only the node remembers
	// Each release takes the lock and the deadline anew: a long list must not
	// keep pods of this node waiting.
	err = w.with(ctx, func(s *session) error {
		prefix := s.Keys.NetworkAttachments(node, network)
		v, err := s.look(false, Get{Key: prefix, End: keyspace.After(prefix)})
		if err != nil {
			return err
		}
		if err := s.refused(v); err != nil {
			return err
		}
		for _, kv := range v.extra[0].KVs {
			key, err := s.Keys.Parse(kv.Key)
			if err != nil {
				s.Log.Warn("a key that nobody should have put there", "err", err)
				continue
			}
			if !keep[key.Attachment] {
				ids = append(ids, key.Attachment)
			}
		}
		// A pod whose lease an operator ended, or that a drill left out, is not in
		// etcd any more: a recovery must not bring it back.
		holdings, err := s.Dir.Holdings()
		if err != nil {
			s.Log.Warn("the holdings cannot be read in full", "err", err)
		}
		for _, h := range holdings {
			if h.ID.Node == node && h.ID.Network == network && !keep[h.ID] && !slices.Contains(ids, h.ID) {
				gone = append(gone, h.ID)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, id := range append(ids, gone...) {
		err := w.with(ctx, func(s *session) error {
			return s.letGo(id, "gc: unknown to the runtime")
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("releasing %v: %w", id, err))
			continue
		}
		if !slices.Contains(gone, id) {
			released = append(released, id)
		}
	}
	return released, errors.Join(errs...)
}

// Reap ends a lease that nobody uses any more: the one that acquire names, and
// no other that the attachment may have by then (its key is compared in the
// transaction). It reports whether it did; a lease that is gone is no error. Where
// the writer is the attachment's node, what the node remembers of it goes, too.
func (w *Writer) Reap(ctx context.Context, id keyspace.AttachmentID, acquire entry.Ref, reason string) (bool, error) {
	err := w.with(ctx, func(s *session) error {
		// First, as in letGo.
		if h := s.Dir.Holding(id); h != nil && h.Value.Acquire == acquire {
			if err := s.Dir.Unhold(id); err != nil {
				return fmt.Errorf("%w: %w", ErrState, err)
			}
		}
		s.leaving = id
		return s.release(id, acquire, nil, reason)
	})
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// Probe is STATUS's question: it fails for what is wrong with this writer
// alone, identity or chain (ErrIntegrity) or contact (ErrUnavailable), and not
// for what is cluster-wide. It drains the queue on the way.
func (w *Writer) Probe(ctx context.Context) error {
	wide := func(err error) error {
		w.Log.Warn("cluster-wide, so not this node's status", "err", err)
		return nil
	}
	return w.withSession(ctx, &session{Writer: w, settles: true}, func(s *session) error {
		// Who this is can be seen before it is known what became of all that was
		// sent, which an etcd that is full does not let be found out.
		unclean, err := s.unclean()
		if err != nil {
			return err
		}
		s.unsettled = unclean
		v, err := s.look(false)
		s.unsettled = false
		if errors.Is(err, errRollback) || errors.Is(err, errDrill) || errors.Is(err, ErrNotInitialised) {
			return wide(err)
		} else if err != nil {
			return err
		}
		if err := s.refused(v); err != nil {
			return wide(err)
		}
		if err := s.clean(); errors.Is(err, ErrNoSpace) {
			return wide(err)
		} else if err != nil {
			return err
		}
		if s.drainSome(keyspace.AttachmentID{}) != nil {
			return nil
		}
		if spoilt, _ := s.Dir.Spoilt(); len(spoilt) > 0 { // perhaps it has been mended
			_ = s.drainOne(spoilt[s.Random()%uint64(len(spoilt))])
		}
		return nil
	})
}

// Identity checks, without etcd, that the state directory is this writer's.
func (w *Writer) Identity() error {
	s := &session{Writer: w}
	if err := s.identify(); err != nil {
		return err
	}
	return s.broken
}

// pause waits a moment that grows with tries, or until the deadline.
func (s *session) pause(tries int) {
	d := time.Millisecond << min(tries, 7)
	d = d/2 + time.Duration(s.Random()%uint64(d))
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.ctx.Done():
	}
}
