package etcdcluster_test

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// TestRestore: all members go back to the snapshot, under another cluster ID, and
// behind the same URLs.
func TestRestore(t *testing.T) {
	c := clustertest.Start(t, func(o *etcdcluster.Options) { o.ClientLinks = true })
	all := clustertest.Client(t, c)
	put(t, all, "k", "before")
	file := filepath.Join(t.TempDir(), "snapshot")
	if err := c.Snapshot(t.Context(), clustertest.Leader(t, c), file); err != nil {
		t.Fatal(err)
	}
	put(t, all, "k", "after")
	was, err := c.Status(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Restore(file, ""); err == nil {
		t.Error("a restore without a token began")
	}
	if err := c.Restore(file, "another"); err != nil {
		t.Fatal(err)
	}
	clustertest.Wait(t, c)
	now, err := c.Status(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if now.Header.ClusterId == was.Header.ClusterId {
		t.Error("etcd's cluster ID is what it was")
	}
	for i := range c.Members() {
		sees(t, clustertest.Client(t, c, c.Endpoints()[i]), "k", "before")
	}
	put(t, all, "k", "again")
	if err := c.Defragment(t.Context(), 1); err != nil {
		t.Error(err)
	}

	// A slow link is felt by clients, and not between members.
	const slow = 200 * time.Millisecond
	one := clustertest.Client(t, c, c.Endpoints()[2])
	put(t, one, "k", "x")
	c.DelayClients(2, slow)
	if took := put(t, one, "k", "y"); took < 2*slow {
		t.Errorf("a put over a slow link took %v, want at least %v", took, 2*slow)
	}
	c.Heal(2)
}
