package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// TestMinorityCut: while one member of three is cut off, first from its peers
// only, then from clients too, every ADD succeeds on the others, whichever
// endpoint a call tries first.
func TestMinorityCut(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(o *etcdcluster.Options) { o.ClientLinks = true })
	var nodes []*node
	for i := range 3 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), nil))
	}
	l := w.load(nodes)
	l.more(10)
	for _, of := range []struct {
		name    string
		leader  bool
		clients bool
	}{
		{"a follower, from its peers", false, false},
		{"a follower, from all", false, true},
		{"the leader, from its peers", true, false},
		{"the leader, from all", true, true},
	} {
		for range size(1, 5) {
			i := clustertest.Leader(t, w.etcd)
			if !of.leader {
				i = (i + 1) % w.etcd.Members()
			}
			at := time.Now()
			w.etcd.Cut(i)
			if of.clients {
				w.etcd.CutClients(i)
			}
			l.after(at, size(20, 60))
			worst, calls := l.worst("ADD", at)
			gap := l.gap(at)
			worstDel, dels := l.worst("DEL", at)
			healed := time.Now()
			w.etcd.Heal(i)
			clustertest.Wait(t, w.etcd)
			l.after(healed, 5)
			t.Logf("cut off: %s: none of %d ADDs failed, the slowest took %v, %v without one; slowest of %d DELs %v", of.name, calls, worst.Round(time.Millisecond), gap.Round(time.Millisecond), dels, worstDel.Round(time.Millisecond))
		}
	}
	l.end()
}
