package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// defaultTicks are etcd's own.
func defaultTicks(o *etcdcluster.Options) {
	o.Heartbeat, o.Election = 100*time.Millisecond, time.Second
}

// TestLeaderKilled: each time the leader is killed no ADD is lost, and the time
// without one is about etcd's election.
func TestLeaderKilled(t *testing.T) {
	for _, ticks := range []struct {
		name  string
		set   func(*etcdcluster.Options)
		kills int
	}{
		{"heartbeat 50 ms, election 500 ms", func(*etcdcluster.Options) {}, size(3, 20)},
		{"heartbeat 100 ms, election 1 s", defaultTicks, size(2, 20)},
	} {
		t.Run(ticks.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, ticks.set)
			var nodes []*node
			for i := range 3 {
				nodes = append(nodes, w.node(fmt.Sprint("n", i), nil))
			}
			l := w.load(nodes, func(l *load) { l.may = tryAgain })
			l.more(10)
			calm := l.gap(time.Time{})
			var gaps []time.Duration
			for range ticks.kills {
				leader := clustertest.Leader(t, w.etcd)
				at := time.Now()
				w.etcd.Kill(leader)
				l.after(at, 5)
				gaps = append(gaps, l.gap(at))
				if err := w.etcd.Restart(leader); err != nil {
					t.Fatal(err)
				}
				clustertest.Wait(t, w.etcd)
				l.more(5)
			}
			l.end()
			t.Logf("without an ADD when the leader is killed (%s), %s; before, at most %v", ticks.name, spread(gaps), calm.Round(time.Millisecond))
		})
	}
}
