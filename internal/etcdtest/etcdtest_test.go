package etcdtest

import (
	"context"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
)

func put(t *testing.T, c *clientv3.Client, key, value string) *clientv3.PutResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	r, err := c.Put(ctx, key, value)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func get(t *testing.T, c *clientv3.Client, key string) (string, *clientv3.GetResponse) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	r, err := c.Get(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return "", r
	}
	return string(r.Kvs[0].Value), r
}

func TestRestartKeepsDataAndPort(t *testing.T) {
	e := Start(t)
	c := e.Client(t)
	put(t, c, "k", "v")
	before := e.Endpoint()
	e.Stop()
	e.Stop()
	if l, err := net.Listen("tcp", strings.TrimPrefix(before, "http://")); err == nil {
		l.Close()
		t.Error("the port is free for others while etcd is stopped")
	}
	if c, err := net.DialTimeout("tcp", strings.TrimPrefix(before, "http://"), time.Second); err == nil {
		c.Close()
		t.Error("a stopped etcd takes connections")
	}
	e.Restart(t)
	if e.Endpoint() != before {
		t.Errorf("endpoint %s, was %s", e.Endpoint(), before)
	}
	if v, _ := get(t, c, "k"); v != "v" {
		t.Errorf("k is %q after the restart", v)
	}
}

func TestTakenPortFails(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	m, err := etcdmember.Start(etcdmember.Options{Dir: t.TempDir(), Listen: l.Addr().String(), NoFsync: true})
	if err == nil {
		m.Close()
		t.Fatal("started on a port that is taken")
	}
	if !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("error does not name the address: %v", err)
	}
}

func TestSnapshotAndRestore(t *testing.T) {
	e := Start(t)
	c := e.Client(t)
	put(t, c, "k", "old")
	file := filepath.Join(t.TempDir(), "snapshot")
	e.Snapshot(t, file)
	put(t, c, "k", "new")
	_, now := get(t, c, "k")

	fork := e.StartFrom(t, file, false)
	v, r := get(t, fork.Client(t), "k")
	if v != "old" || r.Header.ClusterId != now.Header.ClusterId {
		t.Errorf("fork with the same token: k %q, cluster %x; want old, %x", v, r.Header.ClusterId, now.Header.ClusterId)
	}
	v, r = get(t, e.StartFrom(t, file, true).Client(t), "k")
	if v != "old" || r.Header.ClusterId == now.Header.ClusterId {
		t.Errorf("fork with a new token: k %q, cluster %x; want old and another cluster", v, r.Header.ClusterId)
	}
	if v, _ := get(t, c, "k"); v != "new" {
		t.Errorf("the first etcd has k %q, want new", v)
	}

	before := e.Endpoint()
	e.Restore(t, file, false)
	v, r = get(t, c, "k")
	if v != "old" || r.Header.ClusterId != now.Header.ClusterId || r.Header.Revision >= now.Header.Revision {
		t.Errorf("restored: k %q, cluster %x, revision %d", v, r.Header.ClusterId, r.Header.Revision)
	}
	e.Restore(t, file, true)
	v, r = get(t, c, "k")
	if v != "old" || r.Header.ClusterId == now.Header.ClusterId {
		t.Errorf("restored with a new token: k %q, cluster %x", v, r.Header.ClusterId)
	}
	if e.Endpoint() != before {
		t.Errorf("endpoint %s, was %s", e.Endpoint(), before)
	}
}

func TestTwoMembersAreTwoClusters(t *testing.T) {
	_, a := get(t, Start(t).Client(t), "k")
	_, b := get(t, Start(t).Client(t), "k")
	if a.Header.ClusterId == b.Header.ClusterId {
		t.Errorf("both have cluster ID %x", a.Header.ClusterId)
	}
}

func TestTLS(t *testing.T) {
	e, files := StartTLS(t)
	if !strings.HasPrefix(e.Endpoint(), "https://") {
		t.Errorf("endpoint %s", e.Endpoint())
	}
	for _, f := range []string{files.CA, files.Cert, files.Key} {
		if fi, err := os.Stat(f); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi, err)
		}
	}
	put(t, e.Client(t), "k", "v")
	e.Restart(t)
	if v, _ := get(t, e.Client(t), "k"); v != "v" {
		t.Errorf("k is %q", v)
	}
	file := filepath.Join(t.TempDir(), "snapshot")
	e.Snapshot(t, file)
	if v, _ := get(t, e.StartFrom(t, file, true).Client(t), "k"); v != "v" {
		t.Errorf("k is %q in the fork", v)
	}

	// Without a certificate nobody gets in.
	config := e.Config(t)
	config.TLS = config.TLS.Clone()
	config.TLS.GetClientCertificate, config.TLS.Certificates = nil, nil
	c, err := clientv3.New(config)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := c.Get(ctx, "k"); err == nil {
		t.Error("a client without a certificate was answered")
	}
}

func TestRequests(t *testing.T) {
	e := Start(t)
	c := e.Client(t)
	got := e.RequestsDuring(t, func() {
		put(t, c, "k", "v")
		get(t, c, "k")
		get(t, c, "k")
	})
	if want := map[string]float64{"KV/Put": 1, "KV/Range": 2}; !maps.Equal(got, want) {
		t.Errorf("requests %v, want %v", got, want)
	}
}
