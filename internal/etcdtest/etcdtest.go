// Package etcdtest gives tests a real etcd: one member in the test's own
// process, on loopback, in a temporary directory, gone when the test ends.
//
// It guarantees that members started here do not know each other (each has a
// cluster token of its own, so etcd's cluster IDs differ too), and that nothing
// is left running. It does not guarantee durability: there is no fsync, so
// tests of power loss have to damage files themselves.
//
// Whatever fails here ends the test with Fatal: a test without its store has
// nothing to say.
package etcdtest

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/snapshot"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
)

// timeout is for one request of this package.
const timeout = 30 * time.Second

// Etcd is a running etcd.
type Etcd struct {
	member    *etcdmember.Member
	tls       *Files
	authority *Authority
}

// Files are the paths of throw-away TLS files, each of mode 0600.
type Files struct{ CA, Cert, Key string }

// Start starts an etcd that lives as long as the test. Options change how it
// runs: func(o *etcdmember.Options) { o.Quota = 16 << 20 }.
func Start(t testing.TB, options ...func(*etcdmember.Options)) *Etcd {
	t.Helper()
	return start(t, nil, options)
}

// StartTLS starts an etcd that speaks TLS only and asks clients for a
// certificate. The files are a client's: the CA, its certificate and its key.
func StartTLS(t testing.TB, options ...func(*etcdmember.Options)) (*Etcd, Files) {
	t.Helper()
	ca := NewAuthority(t)
	server, client := ca.Issue(t, "server"), ca.Issue(t, "client")
	e := start(t, &client, append([]func(*etcdmember.Options){func(o *etcdmember.Options) {
		o.TLS = &etcdmember.TLS{CAFile: server.CA, CertFile: server.Cert, KeyFile: server.Key}
	}}, options...))
	e.authority = ca
	return e, client
}

// Authority is the one whose certificates it takes, where it speaks TLS.
func (e *Etcd) Authority() *Authority { return e.authority }

func start(t testing.TB, tls *Files, options []func(*etcdmember.Options)) *Etcd {
	t.Helper()
	o := etcdmember.Options{
		Dir:     filepath.Join(t.TempDir(), "etcd"),
		Token:   rand.Text(),
		NoFsync: true,
	}
	for _, change := range options {
		change(&o)
	}
	m, err := etcdmember.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return &Etcd{member: m, tls: tls}
}

// Endpoint is where it answers, with its scheme. It stays the same over Stop,
// Restart and Restore.
func (e *Etcd) Endpoint() string { return e.member.Endpoint() }

// Dir is its data directory, to copy while it is stopped.
func (e *Etcd) Dir() string { return e.member.Dir() }

// Stop stops it. Its data and its port stay.
func (e *Etcd) Stop() { e.member.Stop() }

// Restart stops it if it runs and starts it on the same data and port.
func (e *Etcd) Restart(t testing.TB) {
	t.Helper()
	if err := e.member.Restart(); err != nil {
		t.Fatal(err)
	}
}

// As makes Config and Client use another certificate from here on, such as that
// of a user of etcd.
func (e *Etcd) As(f Files) { e.tls = &f }

// Config is what a client needs to reach it.
func (e *Etcd) Config(t testing.TB) clientv3.Config {
	t.Helper()
	c := clientv3.Config{Endpoints: []string{e.Endpoint()}, DialTimeout: timeout, Logger: zap.NewNop()}
	if e.tls != nil {
		var err error
		if c.TLS, err = e.tls.config(); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (f *Files) config() (*tls.Config, error) {
	return transport.TLSInfo{TrustedCAFile: f.CA, CertFile: f.Cert, KeyFile: f.Key}.ClientConfig()
}

// Client is a client that is closed when the test ends.
func (e *Etcd) Client(t testing.TB) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(e.Config(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Snapshot saves a snapshot of it to the file, which must not exist.
func (e *Etcd) Snapshot(t testing.TB, file string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if _, err := snapshot.SaveWithVersion(ctx, zap.NewNop(), e.Config(t), file); err != nil {
		t.Fatalf("snapshot to %s: %v", file, err)
	}
}

// Restore puts it back to a snapshot, at the same endpoint: what a restored
// backup, or a rolled back disk, looks like to nodes. With the same token etcd
// keeps its cluster ID, with a new one it gets another.
func (e *Etcd) Restore(t testing.TB, file string, newToken bool) {
	t.Helper()
	if err := e.member.Restore(file, e.token(newToken)); err != nil {
		t.Fatal(err)
	}
}

// StartFrom starts a second etcd from a snapshot of this one, which goes on
// running if it does: a forked history.
func (e *Etcd) StartFrom(t testing.TB, file string, newToken bool) *Etcd {
	t.Helper()
	token, dir := e.token(newToken), filepath.Join(t.TempDir(), "etcd")
	if err := etcdmember.RestoreDir(file, dir, token); err != nil {
		t.Fatal(err)
	}
	fork := start(t, e.tls, []func(*etcdmember.Options){func(o *etcdmember.Options) {
		o.Dir, o.Token, o.TLS = dir, token, e.member.TLS()
	}})
	fork.authority = e.authority
	return fork
}

func (e *Etcd) token(another bool) string {
	if another {
		return rand.Text()
	}
	return e.member.Token()
}

// Requests counts the requests that were answered, by method ("KV/Range",
// "KV/Txn", …), from etcd's own metrics. All members of a process share these
// counters: what another test in parallel does is in them too.
func (e *Etcd) Requests(t testing.TB) map[string]float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatalf("gathering etcd's metrics: %v", err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			var service, method string
			for _, l := range m.GetLabel() {
				switch l.GetName() {
				case "grpc_service":
					service = strings.TrimPrefix(l.GetValue(), "etcdserverpb.")
				case "grpc_method":
					method = l.GetValue()
				}
			}
			if n := m.GetCounter().GetValue(); n != 0 {
				counts[service+"/"+method] += n
			}
		}
	}
	return counts
}

// RequestsDuring counts the requests that were answered while do ran, by
// method. A method that was not called is absent.
func (e *Etcd) RequestsDuring(t testing.TB, do func()) map[string]float64 {
	t.Helper()
	before := e.Requests(t)
	do()
	during := e.Requests(t)
	for method, n := range during {
		if during[method] = n - before[method]; during[method] == 0 {
			delete(during, method)
		}
	}
	return during
}
