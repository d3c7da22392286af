package allocator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// Config is what a Writer is made of.
type Config struct {
	Writer      entry.Writer
	Store       Store
	Dir         *statedir.Dir
	Keys        keyspace.Keys
	Cluster     string        // our cluster ID, if it was configured: another's is refused
	Timeout     time.Duration // of a call, from the moment the lock is held; default 10 s
	LockTimeout time.Duration // for the lock; default 30 s
	Log         *slog.Logger  // default: none

	// For tests; the defaults are the system's.
	Machine, Boot string
	Now           func() time.Time
	Random        func() uint64
	step          func(string) // called between the steps of a commit
}

// Writer extends one chain: a node's, or an operator's. It is used by one
// goroutine at a time; several Writers on one state directory exclude each
// other by its lock.
type Writer struct {
	Config
}

// NewWriter returns a Writer. It reads and writes nothing yet.
func NewWriter(c Config) (*Writer, error) {
	if err := c.Writer.Validate(); err != nil {
		return nil, err
	}
	if c.Timeout == 0 {
		c.Timeout = 10 * time.Second
	}
	if c.LockTimeout == 0 {
		c.LockTimeout = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Machine == "" {
		c.Machine = statedir.MachineID()
	}
	if c.Boot == "" {
		c.Boot = statedir.BootID()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.step == nil {
		c.step = func(string) {}
	}
	if c.Random == nil {
		c.Random = rand.Uint64
	}
	return &Writer{c}, nil
}

// session is the time during which a Writer holds its lock.
type session struct {
	*Writer
	ctx    context.Context
	mark   *statedir.Mark // nil until the writer has an identity
	signer note.Signer
	verify note.Verifier
	vkey   string
	// broken says why this writer's identity cannot be used. Only an operator's
	// 'node replace', which a view shows, helps.
	broken error

	leaving keyspace.AttachmentID // whose lease is being ended: it is not held again
	left    *keyspace.Attachment  // what that was told it has, if it is known

	lost      bool // a commit's reply was lost; what became of it was found out
	unsettled bool // settle is not done: a look must not say that it is

	locked bool // the lock was had
	// gaveUp is called with the error of a session, while the lock is still held.
	// What it returns takes the error's place.
	gaveUp func(error) error
	// settles says that the session settles by itself what may have been sent.
	settles bool

	// restored exempts from the mark of before a restore; drill from frozen and
	// stops/; anyState from frozen, and in a drill from stops/, for operators'
	// releases.
	restored, drill, anyState bool
	init                      bool // there is no meta yet
	dry                       bool // an assert only looks
	guard                     *guard
}

// with connects, takes the lock, checks the identity and runs f. The deadline
// of f counts from the lock.
func (w *Writer) with(ctx context.Context, f func(s *session) error) error {
	return w.withSession(ctx, &session{Writer: w}, f)
}

func (w *Writer) withSession(ctx context.Context, s *session, f func(s *session) error) error {
	cctx, cancel := context.WithTimeout(ctx, w.Timeout)
	connectErr := w.Store.Connect(cctx)
	cancel()

	lctx, cancel := context.WithTimeout(ctx, w.LockTimeout)
	defer cancel()
	unlock, err := w.Dir.Lock(lctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	defer unlock()
	s.locked = true

	ctx, cancel = context.WithTimeout(ctx, w.Timeout)
	defer cancel()
	s.ctx = ctx
	err = s.run(connectErr, f)
	if err != nil && s.gaveUp != nil {
		err = s.gaveUp(err)
	}
	return err
}

// run is a session under the lock.
func (s *session) run(connectErr error, f func(s *session) error) error {
	// Who we are comes before all else: a copied state directory is refused
	// also while etcd is away.
	if err := s.identify(); err != nil {
		return err
	}
	if connectErr != nil {
		return errors.Join(s.broken, connectErr)
	}
	if !s.init && !s.settles {
		if err := s.clean(); err != nil {
			return err
		}
	}
	return f(s)
}

// clean settles what may have been sent and whose outcome is not known.
func (s *session) clean() error {
	unclean, err := s.unclean()
	if err != nil || !unclean {
		return err
	}
	// Who is not the writer must not touch its key, not even to fence.
	if err := s.mayFence(); err != nil {
		return err
	}
	return s.settle()
}

// mayFence refuses a writer whose identity is broken, unless an operator's
// 'node replace' lets it start anew.
func (s *session) mayFence() error {
	if s.broken == nil {
		return nil
	}
	key := s.Keys.Writer(s.Config.Writer)
	r, err := s.Store.Read(s.ctx, false, []Get{{Key: key}})
	if err != nil {
		return errors.Join(s.broken, err)
	}
	var w keyspace.Writer
	if kvs := r.Ranges[0].KVs; len(kvs) == 0 || keyspace.Decode(kvs[0].Value, &w) != nil || w.Closed.IsZero() {
		return s.broken
	}
	return nil
}

// unclean reports whether something may have been sent whose outcome nobody
// took down.
func (s *session) unclean() (bool, error) {
	pending, err := s.Dir.Pending()
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrState, err)
	}
	return pending || s.mark != nil && s.mark.Boot != s.Boot, nil
}

// identify loads who we are. It refuses a state directory that belongs to
// another writer or cluster; what 'node replace' can mend it notes in broken.
func (s *session) identify() error {
	mark, err := s.Dir.LoadMark()
	if errors.Is(err, statedir.ErrTorn) {
		s.broken = fmt.Errorf("%w: %w; its way out: %s", ErrIntegrity, err, s.wayOut())
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if mark == nil {
		return nil
	}
	if mark.Writer != s.Config.Writer.String() {
		return fmt.Errorf("%w: state directory %s belongs to %s, and this is %s: a writer's name cannot change; set it back, or use another state directory",
			ErrIntegrity, s.Dir.Path(), mark.Writer, s.Config.Writer)
	}
	if s.Cluster != "" && s.Cluster != mark.Cluster {
		return fmt.Errorf("%w: state directory %s belongs to cluster %s, and clusterID says %s", ErrIntegrity, s.Dir.Path(), mark.Cluster, s.Cluster)
	}
	s.mark = mark
	if mark.Machine != s.Machine {
		s.broken = fmt.Errorf("%w: state directory %s is machine %s's, and this is machine %s: it was copied; use an empty one, or if this machine is to be %s: %s",
			ErrIntegrity, s.Dir.Path(), mark.Machine, s.Machine, s.Config.Writer.Name, s.wayOut())
		return nil
	}
	skey, err := s.Dir.Key()
	if err == nil && skey == "" {
		err = fmt.Errorf("signing key of %s is gone from %s", s.Config.Writer, s.Dir.Path())
	}
	if err == nil {
		err = s.useKey(skey)
	}
	if err != nil {
		s.broken = fmt.Errorf("%w: %w; its way out: %s", ErrIntegrity, err, s.wayOut())
	}
	return nil
}

// wayOut is what an operator types for a writer whose identity is lost.
func (w *Writer) wayOut() string {
	if w.Config.Writer.Kind == entry.KindOperator {
		return "another operator's 'ledger node replace --operator " + w.Config.Writer.Name + "', or another name (--as NAME)"
	}
	return "'ledger node replace " + w.Config.Writer.Name + "'"
}

func (s *session) useKey(skey string) error {
	signer, vkey, err := entry.ReadSigner(skey)
	if err != nil {
		return fmt.Errorf("signing key in %s: %w", s.Dir.Path(), err)
	}
	if signer.Name() != s.Config.Writer.String() {
		return fmt.Errorf("signing key in %s is %s's, and this is %s", s.Dir.Path(), signer.Name(), s.Config.Writer)
	}
	verify, err := note.NewVerifier(vkey)
	if err != nil {
		return fmt.Errorf("signing key in %s: %w", s.Dir.Path(), err)
	}
	s.signer, s.verify, s.vkey = signer, verify, vkey
	return nil
}
