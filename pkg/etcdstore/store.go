// Package etcdstore is etcd as the other packages see it: the allocator's
// Store on one connection, and a Source that reads everything at one revision.
//
// # One connection
//
// A Store has at most one connection. It dials one endpoint itself, TLS
// handshake included, and hands that connection to the etcd client, which can
// make no other. So a commit goes where its view came from, or fails without
// having been sent; and what goes wrong in dialing is known by its cause instead
// of surfacing as an expired deadline.
//
// # Certificates
//
// Each connection, a Store's and those of NewClient's clients, reads certificates,
// key, CA and password anew. What is wrong with one is a TLSError, which names it
// with its dates and the clock; what is wrong with our own is known before anybody
// is dialed. A key or password that others can use is refused (internal/private).
//
// # Outcomes
//
// What an answer means for a commit stands in one table, outcomes. An answer that
// is not in it, a lost connection, an expired deadline and a lost leader leave the
// outcome unknown. A commit whose leader is lost is not waited for until the
// deadline: the answer to it would most likely never come.
package etcdstore

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
)

// Config is how etcd is reached.
type Config struct {
	Endpoints                 []string // http://host:port, https://host:port, host:port, unix:///path
	CAFile, CertFile, KeyFile string
	Username, Password        string
	PasswordFile              string        // read for each connection, instead of Password
	Exposed                   bool          // use KeyFile and PasswordFile although others can
	DialTimeout               time.Duration // for one endpoint; default 2 s
}

// Store is one connection to etcd. It is not safe for concurrent use.
type Store struct {
	cfg     Config
	next    int // endpoint to try next
	session *session
}

// session is one connection and the client on it.
type session struct {
	client   *clientv3.Client
	endpoint string
	conn     net.Conn
	tls      *handshake      // nil: plaintext
	term     uint64          // etcd's, when it was last read from
	dead     context.Context // done when the connection is
	die      context.CancelFunc
	cause    atomic.Pointer[error] // why the connection broke, where that has a name
}

// bound is ctx, ended also when the connection is: etcd's client would wait for
// another until the deadline, and there will be none.
func (s *session) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.dead, cancel)
	return ctx, func() { stop(); cancel() }
}

// why is the error of a request on the connection.
func (s *session) why(err error) error {
	if s.dead.Err() == nil {
		return explain(err)
	}
	if cause := s.cause.Load(); cause != nil {
		return *cause
	}
	return fmt.Errorf("the connection broke: %w", err)
}

// New returns a Store that has not connected yet.
func New(cfg Config) *Store {
	cfg.DialTimeout = cmp.Or(cfg.DialTimeout, dialTimeout)
	return &Store{cfg: cfg, next: rand.IntN(max(1, len(cfg.Endpoints)))}
}

// Close ends the connection.
func (s *Store) Close() error {
	if s.session == nil {
		return nil
	}
	err := s.session.client.Close()
	s.session.conn.Close() // gRPC takes it with the first request only
	s.session = nil
	return err
}

// Client is the etcd client on the connection, for reads beyond Store's. It
// connects if need be.
func (s *Store) Client(ctx context.Context) (*clientv3.Client, error) {
	if err := s.Connect(ctx); err != nil {
		return nil, err
	}
	return s.session.client, nil
}

// Connect dials the endpoints in turn until one answers.
func (s *Store) Connect(ctx context.Context) error {
	if s.session != nil && s.session.dead.Err() == nil {
		return nil
	}
	s.Close()
	if len(s.cfg.Endpoints) == 0 {
		return fmt.Errorf("%w: no endpoint is configured", allocator.ErrUnavailable)
	}
	var errs []error
	for range s.cfg.Endpoints {
		endpoint := s.cfg.Endpoints[s.next%len(s.cfg.Endpoints)]
		s.next++
		session, err := s.connect(ctx, endpoint)
		if err == nil {
			s.session = session
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", endpoint, err))
		if bad := (*TLSError)(nil); errors.As(err, &bad) && bad.Local {
			break // the others would have us say the same
		}
		if over(ctx) {
			break // no time is left for the others
		}
	}
	return fmt.Errorf("%w: %w", allocator.ErrUnavailable, errors.Join(errs...))
}

func (s *Store) connect(ctx context.Context, endpoint string) (*session, error) {
	password, err := s.cfg.password()
	if err != nil {
		return nil, err
	}
	conn, hs, err := dial(ctx, s.cfg, endpoint)
	if err != nil {
		return nil, err
	}
	se := &session{endpoint: endpoint, conn: conn, tls: hs}
	se.dead, se.die = context.WithCancel(context.Background())
	once := make(chan net.Conn, 1)
	once <- &watched{Conn: conn, session: se}
	se.client, err = clientv3.New(clientv3.Config{
		Endpoints: []string{"http://" + authority(endpoint)}, // TLS is done
		Username:  s.cfg.Username,
		Password:  password,
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(sendOnce), grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				se.die()
				return nil, allocator.ErrReconnected
			}
		})},
		DialTimeout: s.cfg.DialTimeout,
		Context:     context.WithoutCancel(ctx),
	})
	if err != nil {
		conn.Close()
		return nil, explain(err)
	}
	return se, nil
}

// watched notes when the connection is closed, and why: with TLS 1.3 a server
// judges our certificate after the handshake, so that its alert comes with the
// first read, and gRPC would drop it.
type watched struct {
	net.Conn
	session *session
	heard   atomic.Bool // something was read
}

func (w *watched) Close() error {
	if w.session.tls != nil && !w.heard.Load() {
		// gRPC closes when it cannot write any more. The alert that says why may
		// have come, and not have been read yet.
		_ = w.SetReadDeadline(time.Now().Add(lastWords))
		_, _ = w.Read(make([]byte, 1))
	}
	w.silent()
	w.session.die()
	return w.Conn.Close()
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	switch {
	case err != nil && w.session.tls != nil && strings.Contains(err.Error(), "remote error: tls:"):
		cause := w.session.tls.explain(err, w.session.endpoint)
		w.session.cause.Store(&cause)
	case n > 0 && b[0] != 0x15: // a TLS alert to a client that speaks plaintext is no answer
		w.heard.Store(true)
	case err != nil:
		w.silent()
	}
	return n, err
}

// lastWords is how long an alert may take that follows a handshake.
const lastWords = 200 * time.Millisecond

// silent notes what it most likely means that a connection ends before anything
// was said on it. An alert may get lost when the connection is reset.
func (w *watched) silent() {
	if w.heard.Load() {
		return
	}
	cause := errors.New("etcd closed the connection without an answer: if it speaks TLS here, use https:// and set caFile")
	if w.session.tls != nil {
		cause = w.session.tls.silence()
	}
	w.session.cause.CompareAndSwap(nil, &cause)
}

func authority(endpoint string) string {
	if u, err := url.Parse(endpoint); err == nil && u.Host != "" {
		return u.Host
	}
	if strings.HasPrefix(endpoint, "unix:") {
		return "localhost"
	}
	return endpoint
}

// Dial opens one connection to one endpoint, with the TLS handshake where it is
// https, and says in its error what is wrong: the name does not resolve, nobody
// listens, or, as a TLSError, a certificate has expired, is signed by an unknown
// authority or is for another name, the server wants a client certificate, or no
// TLS is spoken. What is wrong with our own files is known before it dials.
func Dial(ctx context.Context, cfg Config, endpoint string) (net.Conn, error) {
	conn, _, err := dial(ctx, cfg, endpoint)
	return conn, err
}

func dial(ctx context.Context, cfg Config, endpoint string) (net.Conn, *handshake, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(cfg.DialTimeout, dialTimeout))
	defer cancel()
	network, addr := "tcp", authority(endpoint)
	if path, ok := strings.CutPrefix(endpoint, "unix:"); ok {
		network, addr = "unix", strings.TrimPrefix(path, "//")
	}
	var hs *handshake
	if cfg.secure(endpoint) {
		var err error
		if hs, err = cfg.prepare(time.Now()); err != nil {
			return nil, nil, err
		}
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil || hs == nil {
		return conn, nil, err
	}
	if host, _, err := net.SplitHostPort(addr); err == nil {
		hs.config.ServerName = host
	}
	t := tls.Client(conn, hs.config)
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, nil, hs.explain(err, endpoint)
	}
	return t, hs, nil
}

// dialTimeout is how long one endpoint may take unless configured otherwise.
const dialTimeout = 2 * time.Second

// secure is whether TLS is spoken with an endpoint.
func (c Config) secure(endpoint string) bool {
	return strings.HasPrefix(endpoint, "https://") ||
		!strings.Contains(endpoint, "://") && !strings.HasPrefix(endpoint, "unix:") && (c.CAFile != "" || c.CertFile != "")
}

// TLS is what a handshake is made with, read from the certificate files as they
// are now.
func (c Config) TLS() (*tls.Config, error) {
	h, err := c.prepare(time.Now())
	if err != nil {
		return nil, err
	}
	return h.config, nil
}

// Serving is the certificate that etcd showed on this connection; false if there
// is none.
func (s *Store) Serving() (Cert, bool) {
	if s.session == nil {
		return Cert{}, false
	}
	return Serving(s.session.conn, s.session.endpoint)
}

// How long one read may take at one endpoint before the next is tried: little
// while there are others that have not been.
const (
	firstAttempt = time.Second
	attempt      = 3 * time.Second
)

// Read implements allocator.Store. It tries other endpoints until ctx is done. A
// member without a leader does not answer, be it from what it has: no commit
// could follow. That passes with an election, so it is waited for.
func (s *Store) Read(ctx context.Context, serializable bool, gets []allocator.Get) (*allocator.Reply, error) {
	ops := make([]clientv3.Op, 0, len(gets))
	for _, g := range gets {
		var opts []clientv3.OpOption
		if g.End != "" {
			opts = append(opts, clientv3.WithRange(g.End))
		}
		if g.Limit > 0 {
			opts = append(opts, clientv3.WithLimit(g.Limit))
		}
		if g.Since > 0 {
			opts = append(opts, clientv3.WithMinModRev(g.Since))
		}
		if serializable {
			opts = append(opts, clientv3.WithSerializable())
		}
		ops = append(ops, clientv3.OpGet(g.Key, opts...))
	}
	n := len(s.cfg.Endpoints)
	var last error // which says more than that time is up
	for tries, waits := 0, 0; ; tries++ {
		if err := s.Connect(ctx); err != nil {
			if last != nil && over(ctx) {
				err = last
			}
			return nil, err
		}
		may := attempt
		if tries < n-1 {
			may = firstAttempt
		}
		bctx, unbind := s.session.bound(ctx)
		actx, cancel := context.WithTimeout(bctx, may)
		resp, err := s.session.client.Txn(clientv3.WithRequireLeader(actx)).Then(ops...).Commit()
		cancel()
		unbind()
		if err == nil {
			s.session.term = resp.Header.RaftTerm
			return reply(resp), nil
		}
		if leaderless(last) && over(ctx) {
			return nil, last
		}
		if !transient(err) || ctx.Err() != nil {
			why := s.Explain(ctx, s.session.why(err))
			if errors.Is(why, ErrDenied) {
				return nil, why
			}
			return nil, fmt.Errorf("%w: %s: %w", allocator.ErrUnavailable, s.session.endpoint, why)
		}
		last = fmt.Errorf("%w: %s: %w", allocator.ErrUnavailable, s.session.endpoint, s.session.why(err))
		s.Close()
		if leaderless(err) {
			tries--
			if waits++; waits%n == 0 && !sleep(ctx, leaderPause) {
				return nil, last
			}
			continue
		}
		if tries >= 2*n {
			return nil, last
		}
	}
}

// Commit implements allocator.Store.
func (s *Store) Commit(ctx context.Context, txn allocator.Txn) (*allocator.Reply, error) {
	if s.session == nil || s.session.dead.Err() != nil {
		return nil, fmt.Errorf("%w: %w", allocator.ErrNotApplied, allocator.ErrReconnected)
	}
	var cmps []clientv3.Cmp
	for _, c := range txn.If {
		if c.End == "" {
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(c.Key), "=", c.Mod))
		} else {
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(c.Key).WithRange(c.End), "<", c.Mod+1))
		}
	}
	var ops []clientv3.Op
	for _, w := range txn.Then {
		switch {
		case !w.Delete:
			ops = append(ops, clientv3.OpPut(w.Key, string(w.Value)))
		case w.End != "":
			ops = append(ops, clientv3.OpDelete(w.Key, clientv3.WithRange(w.End)))
		default:
			ops = append(ops, clientv3.OpDelete(w.Key))
		}
	}
	// Half of what is left, so that a lost reply leaves time to find out.
	if end, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	ctx, unbind := s.session.bound(ctx)
	defer unbind()
	if len(txn.If) > 0 {
		var end context.CancelFunc
		ctx, end = s.session.leading(ctx, txn.If[0].Key)
		defer end()
	}
	resp, err := s.session.client.Txn(clientv3.WithRequireLeader(ctx)).If(cmps...).Then(ops...).Commit()
	if err == nil {
		return reply(resp), nil
	}
	endpoint := s.session.endpoint
	switch outcomeOf(err) {
	case decided:
		return nil, fmt.Errorf("%w: %s: %w", allocator.ErrDecided, endpoint, explain(err))
	case notHere:
		s.Close()
		return nil, fmt.Errorf("%w: %s: %w: %w", allocator.ErrNotApplied, endpoint, allocator.ErrReconnected, err)
	case notApplied:
		return nil, fmt.Errorf("%w: %s: %w", allocator.ErrNotApplied, endpoint, s.Explain(ctx, explain(err)))
	}
	why := s.session.why(err)
	if cause := context.Cause(ctx); errors.Is(cause, errLeaderLost) {
		why = cause
	}
	s.Close() // whatever comes next must not meet this connection's leftovers
	return nil, fmt.Errorf("%s: %w", endpoint, why)
}

// transient reports whether a read may succeed at another endpoint or again.
func transient(err error) bool {
	if stale(err) {
		return true
	}
	switch code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.OutOfRange:
		return false
	}
	return true
}

func code(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	return status.Code(err)
}

// explain says in plain words what etcd's client reports tersely.
func explain(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), code(err) == codes.DeadlineExceeded:
		return fmt.Errorf("etcd accepted the connection and did not answer in time (no leader, or a slow disk?): %w", err)
	case errors.Is(err, rpctypes.ErrNoSpace):
		return allocator.ErrNoSpace
	case leaderless(err):
		return fmt.Errorf("etcd has no leader here: an election is under way, or this member is cut off, or a majority of the members is down: %w", err)
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return fmt.Errorf("etcd does not accept username with the password of passwordFile: %w", err)
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return fmt.Errorf("etcd wants a user: set username and passwordFile, or a client certificate: %w", err)
	}
	return err
}

func reply(r *clientv3.TxnResponse) *allocator.Reply {
	out := &allocator.Reply{Cluster: r.Header.ClusterId, Revision: r.Header.Revision, Succeeded: r.Succeeded}
	for _, x := range r.Responses {
		rr := x.GetResponseRange()
		if rr == nil {
			continue
		}
		g := allocator.Range{More: rr.More, Count: rr.Count}
		for _, kv := range rr.Kvs {
			g.KVs = append(g.KVs, allocator.KV{Key: string(kv.Key), Value: kv.Value, Mod: kv.ModRevision})
		}
		out.Ranges = append(out.Ranges, g)
	}
	return out
}
