// Package clustertest gives tests an etcdcluster that is gone when they end.
// Whatever fails here ends the test with Fatal.
package clustertest

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
)

// timeout is for what a healthy cluster does at once.
const timeout = 30 * time.Second

// Start starts a cluster that lives as long as the test. TestMain must call
// etcdcluster.Main first. Where the test fails, the members' logs are shown.
func Start(t testing.TB, options ...func(*etcdcluster.Options)) *etcdcluster.Cluster {
	t.Helper()
	o := etcdcluster.Options{Dir: filepath.Join(t.TempDir(), "etcd")}
	for _, change := range options {
		change(&o)
	}
	c, err := etcdcluster.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		for i := range c.Members() {
			if b, err := os.ReadFile(c.LogFile(i)); err == nil && t.Failed() {
				t.Logf("member %d logged at last:\n%s", i, b[max(0, len(b)-1500):])
			}
		}
	})
	return c
}

// Client is a client of these endpoints, of all where none is named; it is
// closed when the test ends.
func Client(t testing.TB, c *etcdcluster.Cluster, endpoints ...string) *clientv3.Client {
	t.Helper()
	if len(endpoints) == 0 {
		endpoints = c.Endpoints()
	}
	cfg, err := c.Config(endpoints...)
	if err != nil {
		t.Fatal(err)
	}
	out, err := clientv3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	return out
}

// Leader is the member that leads, waited for.
func Leader(t testing.TB, c *etcdcluster.Cluster) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	l, err := c.Leader(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Wait waits until all members that run serve.
func Wait(t testing.TB, c *etcdcluster.Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}
