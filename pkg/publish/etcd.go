package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// Etcd is the Feed that reads the ledger in etcd: once in full, then by a watch
// from that revision on. It reads in full again where etcd compacted what the
// watch has not seen yet, or went back in time.
type Etcd struct {
	Store       etcdstore.Config
	Keys        keyspace.Keys
	VerifyEvery time.Duration // full verifications; 0: DefaultVerifyEvery
	Trusted     *audit.KeyRing
	Timeout     time.Duration // of one request; 0: 5 s

	// For tests.
	again time.Duration // least pause before a full verification that was asked for
	looks time.Duration // how often certificates are looked at; 0: lookEvery
}

// DefaultVerifyEvery is how often everything is verified.
const DefaultVerifyEvery = time.Hour

const (
	// grace is how long a connection may be away before the bars are told: the
	// client comes back from a blip by itself.
	grace = 1500 * time.Millisecond
	// retryFailed is how soon a verification is repeated that found something, or
	// could not check.
	retryFailed = 5 * time.Minute
	// lookEvery is how often certificates are looked at while nothing happens: so
	// soon is one that was replaced no longer warned of.
	lookEvery = 5 * time.Minute
)

// etcdFeed is a running Etcd.
type etcdFeed struct {
	*Etcd
	p   *Publisher
	out chan<- message

	have    bool   // a full read was passed on
	cluster uint64 // etcd's, of what was read
	at      int64  // all up to this revision was passed on
	up      bool   // in this session
	said    string // what was last logged of an outage

	look        chan struct{} // look at the certificates
	gap         chan struct{} // revisions went by unseen: verify in full
	next, began time.Time     // full verification
}

func (e *Etcd) run(ctx context.Context, p *Publisher, out chan<- message) {
	f := &etcdFeed{Etcd: e, p: p, out: out, look: make(chan struct{}, 1), gap: make(chan struct{}, 1)}
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { f.certificates(ctx) })
	wait := backoff{first: 250 * time.Millisecond, most: 10 * time.Second}
	for {
		f.up = false
		err := f.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if f.up {
			wait.reset()
			f.lookNow()
		}
		if text := err.Error(); f.up || text != f.said {
			p.Log.Warn("etcd is out of reach; trying again", "err", err)
			f.said = text
		}
		if pass(ctx, out, lost{f.why(ctx, err)}) != nil || wait.wait(ctx) != nil {
			return
		}
	}
}

func (e *Etcd) timeout() time.Duration {
	if e.Timeout == 0 {
		return 5 * time.Second
	}
	return e.Timeout
}

// dial makes a client that finds its way back by itself. Certificates are read
// anew for each of its connections.
func (e *Etcd) dial(ctx context.Context) (*clientv3.Client, error) {
	return etcdstore.NewClient(e.Store, clientv3.Config{
		DialTimeout: e.timeout(), DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second, Context: ctx,
	})
}

// probe is whether any endpoint answers and has a leader, and if none does,
// why: the client that goes on by itself would only say that time is up where
// etcd refuses a certificate, which it does after the handshake.
func (e *Etcd) probe(ctx context.Context) error {
	if len(e.Store.Endpoints) == 0 {
		return errors.New("no endpoint is configured")
	}
	ctx, cancel := context.WithTimeout(ctx, e.timeout())
	defer cancel()
	store := etcdstore.New(e.Store)
	defer store.Close()
	_, err := store.Read(ctx, true, []allocator.Get{{Key: e.Keys.Meta()}})
	return err
}

// certificates says which certificate ends first: those in the files, and those
// that the endpoints show. A connection that stands does not tell of a
// certificate that was replaced since, so each endpoint is asked for a handshake.
func (f *etcdFeed) certificates(ctx context.Context) {
	var last *state.Cert
	for {
		var cert *state.Cert
		if c := etcdstore.Earliest(f.Store.Look(ctx, time.Now())); c != nil {
			cert = &state.Cert{Kind: string(c.Kind), Until: c.NotAfter, Warn: c.NotAfter.Add(-etcdstore.WarnBefore)}
		}
		if !same(cert, last) {
			if pass(ctx, f.out, certified{cert}) != nil {
				return
			}
			last = cert
		}
		timer := time.NewTimer(cmp.Or(f.looks, lookEvery))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-f.look:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (f *etcdFeed) lookNow() {
	select {
	case f.look <- struct{}{}:
	default:
	}
}

func (f *etcdFeed) session(ctx context.Context) error {
	if err := f.probe(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, err := f.dial(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	cluster, at, err := f.ask(ctx, client)
	if err != nil {
		return err
	}
	rewound := ""
	if f.have && (cluster != f.cluster || at < f.at) {
		if f.have = false; cluster == f.cluster {
			rewound = fmt.Sprintf("etcd was at revision %d and is at %d now: it was put back to an earlier state", f.at, at)
		}
	}
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	verifying := false
	for {
		if !f.have {
			if err := f.load(ctx, client, rewound); err != nil {
				return err
			}
		} else if err := pass(ctx, f.out, reached{f.at}); err != nil {
			return err
		}
		if f.said != "" {
			f.p.Log.Info("etcd is back")
		}
		f.up, f.said, rewound = true, "", ""
		f.lookNow()
		if !verifying {
			verifying = true
			background.Go(func() { f.verifier(ctx, client) })
		}
		if err := f.follow(ctx, client); !errors.Is(err, etcdstore.ErrCompacted) {
			return err
		}
		f.p.Log.Info("etcd compacted what was not seen yet; reading anew")
		f.have = false
	}
}

// ask is a linearizable read of nothing: it tells whether the cluster has a
// quorum, which cluster it is, and where it is.
func (f *etcdFeed) ask(ctx context.Context, client *clientv3.Client) (cluster uint64, at int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.timeout())
	defer cancel()
	r, err := client.Get(ctx, f.Keys.Meta(), clientv3.WithCountOnly())
	if err != nil {
		return 0, 0, err
	}
	return r.Header.ClusterId, r.Header.Revision, nil
}

// load reads everything but entries at one revision.
func (f *etcdFeed) load(ctx context.Context, client *clientv3.Client, rewound string) error {
	cluster, _, err := f.ask(ctx, client)
	if err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		src, err := etcdstore.Open(ctx, client, f.Keys)
		if err != nil {
			return err
		}
		m := loaded{model: NewModel(f.Keys), check: newChecker(f.Keys, f.Trusted), at: src.Snapshot().Revision, rewound: rewound}
		now := f.p.now()
		err = src.State(ctx, func(r audit.Record) error {
			m.model.Put(r, now)
			m.check.load(r)
			return nil
		})
		if errors.Is(err, etcdstore.ErrCompacted) && tries < 3 {
			continue
		}
		if err != nil {
			return err
		}
		if err := pass(ctx, f.out, m); err != nil {
			return err
		}
		if f.at != 0 {
			select {
			case f.gap <- struct{}{}:
			default:
			}
		}
		f.have, f.cluster, f.at = true, cluster, m.at
		return nil
	}
}

var (
	errLost    = errors.New("the connection was lost")
	errRewound = errors.New("etcd is at an earlier revision than before")
)

// follow passes on what changes after f.at, until contact is lost.
func (f *etcdFeed) follow(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	// Watch returns when etcd has confirmed it, and that may never be.
	made := make(chan clientv3.WatchChan, 1)
	from := f.at + 1
	background.Go(func() {
		made <- client.Watch(clientv3.WithRequireLeader(ctx), f.Keys.Prefix(), clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
	})
	var events clientv3.WatchChan
	unmade := time.NewTimer(f.timeout())
	defer unmade.Stop()

	ready := make(chan bool)
	background.Go(func() {
		for conn := client.ActiveConnection(); ; {
			s := conn.GetState()
			select {
			case ready <- s == connectivity.Ready:
			case <-ctx.Done():
				return
			}
			if s == connectivity.Idle {
				conn.Connect()
			}
			if !conn.WaitForStateChange(ctx, s) {
				return
			}
		}
	})
	asked := make(chan error)
	least, cluster := f.at, f.cluster
	background.Go(func() {
		for sleep(ctx, f.p.Heartbeat) == nil {
			id, at, err := f.ask(ctx, client)
			if err == nil && (id != cluster || at < least) {
				err = errRewound
			}
			least = max(least, at)
			select {
			case asked <- err:
			case <-ctx.Done():
				return
			}
		}
	})
	away := time.NewTimer(time.Hour)
	away.Stop()
	defer away.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case ok := <-ready:
			if ok {
				away.Stop()
				f.lookNow() // another connection may be another certificate
			} else {
				away.Reset(grace)
			}
		case <-away.C:
			return errLost
		case events = <-made:
			unmade.Stop()
		case <-unmade.C:
			return fmt.Errorf("%w: the watch was not confirmed", context.DeadlineExceeded)
		case err := <-asked:
			if err != nil {
				return err
			}
		case w, ok := <-events:
			switch {
			case !ok:
				return errLost
			case w.CompactRevision > 0:
				return fmt.Errorf("%w (%d)", etcdstore.ErrCompacted, w.CompactRevision)
			case w.Err() != nil:
				return w.Err()
			case w.IsProgressNotify():
				f.at = max(f.at, w.Header.Revision)
				continue
			case len(w.Events) == 0:
				continue
			}
			m := changed{events: make([]Event, 0, len(w.Events))}
			for _, e := range w.Events {
				kv := e.Kv
				m.events = append(m.events, Event{
					audit.Record{Key: string(kv.Key), Value: kv.Value, Create: kv.CreateRevision, Mod: kv.ModRevision, Version: kv.Version, Lease: kv.Lease},
					e.Type == clientv3.EventTypeDelete,
				})
			}
			// The header's revision is etcd's own, and when a watch catches up
			// not all up to it has been sent yet.
			m.at = m.events[len(m.events)-1].Mod
			if err := pass(ctx, f.out, m); err != nil {
				return err
			}
			f.at = m.at
		}
	}
}

// verifier verifies everything: at the beginning, at intervals, and when
// something was found or went by unseen.
func (f *etcdFeed) verifier(ctx context.Context, client *clientv3.Client) {
	every, again := f.VerifyEvery, f.again
	if every == 0 {
		every = DefaultVerifyEvery
	}
	if again == 0 {
		again = time.Minute
	}
	for {
		timer := time.NewTimer(time.Until(f.next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-f.gap:
			f.soon(again)
			timer.Stop()
			continue
		case <-f.p.again:
			f.soon(again)
			timer.Stop()
			continue
		}
		if pass(ctx, f.out, verifying{}) != nil {
			return
		}
		f.began = time.Now()
		report, err := f.verify(ctx, client)
		if ctx.Err() != nil {
			return // the end, or contact is lost: the next session begins with it
		}
		pause := every - every/10 + rand.N(every/5+1)
		if err != nil || report.ExitCode() == audit.ExitFindings {
			pause = min(pause, retryFailed)
		}
		if err != nil {
			f.p.Log.Warn("the ledger could not be verified", "err", err)
		}
		f.next = time.Now().Add(pause)
		if pass(ctx, f.out, verified{report, err}) != nil {
			return
		}
		// It took more memory than all the rest, for a moment in an hour.
		debug.FreeOSMemory()
	}
}

// soon brings the next full verification forward, but not so far that one
// follows the other.
func (f *etcdFeed) soon(again time.Duration) {
	if t := f.began.Add(again); t.Before(f.next) {
		f.next = t
	}
}

func (f *etcdFeed) verify(ctx context.Context, client *clientv3.Client) (*audit.Report, error) {
	for tries := 0; ; tries++ {
		src, err := etcdstore.Open(ctx, client, f.Keys)
		if err != nil {
			return nil, err
		}
		r, err := audit.Verify(ctx, src, audit.Options{Keys: f.Trusted, Workers: 1})
		if errors.Is(err, etcdstore.ErrCompacted) && tries < 3 {
			continue
		}
		return r, err
	}
}

// why says in a few words why there is no contact. It names no address: that is
// for the log.
func (f *etcdFeed) why(ctx context.Context, err error) string {
	if perr := f.probe(ctx); perr != nil {
		err = perr
	}
	var op *net.OpError
	var dns *net.DNSError
	var sys syscall.Errno
	var tls *etcdstore.TLSError
	switch {
	case errors.As(err, &tls):
		return tls.Msg
	case errors.As(err, &dns):
		return "its name does not resolve"
	case errors.As(err, &sys):
		return sys.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &op) && op.Timeout():
		return "no answer in time"
	case errors.Is(err, rpctypes.ErrNoLeader):
		return "no leader"
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return "permission denied"
	case errors.Is(err, errLost), errors.Is(err, errRewound):
		return err.Error()
	}
	text := err.Error()
	if i := strings.Index(text, "TLS handshake: "); i >= 0 {
		text = text[i:]
	}
	// "TLS handshake: what is wrong: the cause, at length"
	parts := strings.SplitN(text, ": ", 4)
	return strings.Join(parts[:min(2, len(parts))], ": ")
}
