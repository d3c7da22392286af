package cluster

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// TestStoreLosesLeader: a commit whose leader is gone is not waited for until the
// deadline, and its outcome is left open; a member without a leader answers no
// read, and the next endpoint does.
func TestStoreLosesLeader(t *testing.T) {
	t.Parallel()
	etcd := clustertest.Start(t, func(o *etcdcluster.Options) { o.ClientLinks = true })
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	leader := clustertest.Leader(t, etcd)
	connect := func(endpoints ...string) *etcdstore.Store {
		s := etcdstore.New(etcdstore.Config{Endpoints: endpoints})
		t.Cleanup(func() { s.Close() })
		return s
	}
	put := allocator.Txn{
		If:   []allocator.Compare{{Key: "k", Mod: 0}},
		Then: []allocator.Write{{Key: "k", Value: []byte("v")}},
	}
	gets := []allocator.Get{{Key: "k"}}
	on := connect(etcd.Endpoints()[leader])
	if _, err := on.Read(ctx, false, gets); err != nil {
		t.Fatal(err)
	}
	// The leader takes it, and can pass it on to nobody.
	etcd.Cut(leader)
	began := time.Now()
	_, err := on.Commit(ctx, put)
	if err == nil || errors.Is(err, allocator.ErrNotApplied) || !strings.Contains(err.Error(), "leader was lost") {
		t.Errorf("a commit at a leader that was cut off: %v; want an open outcome, and why", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v of the minute that it had", took)
	}
	for _, serializable := range []bool{true, false} {
		short, cancel := context.WithTimeout(ctx, time.Second)
		_, err := on.Read(short, serializable, gets)
		cancel()
		if err == nil || !errors.Is(err, allocator.ErrUnavailable) || !strings.Contains(err.Error(), "no leader") || !strings.Contains(err.Error(), etcd.Endpoints()[leader]) {
			t.Errorf("a read at a member without a leader (serializable: %v): %v; want one that says so, and names it", serializable, err)
		}
	}
	// Others serve, wherever one begins.
	clustertest.Leader(t, etcd)
	for range 6 {
		if _, err := connect(etcd.Endpoints()...).Read(ctx, true, gets); err != nil {
			t.Error(err)
		}
	}
	// A commit is refused before it is proposed, so that it is certain.
	etcd.Heal(leader)
	clustertest.Wait(t, etcd)
	follower := (clustertest.Leader(t, etcd) + 1) % etcd.Members()
	on = connect(etcd.Endpoints()[follower])
	if _, err := on.Read(ctx, false, gets); err != nil {
		t.Fatal(err)
	}
	etcd.Cut(follower)
	until(t, "the follower knows that it is cut off", func() bool {
		st, err := etcd.Status(ctx, follower)
		return err == nil && st.Leader == 0
	})
	if _, err := on.Commit(ctx, put); !errors.Is(err, allocator.ErrNotApplied) || !errors.Is(err, allocator.ErrReconnected) {
		t.Errorf("a commit at a member without a leader: %v; want one that was certainly not applied", err)
	}
}
