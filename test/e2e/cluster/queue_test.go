package cluster

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// TestQueueKilled: DELs during an outage are queued and done afterwards, however
// often the plugin is killed while it queues and while it drains.
func TestQueueKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rnd := random(t)
	var nodes []*node
	for i := range 4 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), nil, `"timeout": "700ms"`))
	}
	const pods = 10
	// each runs f on all nodes at once, with a source of its own.
	each := func(f func(n *node, own *rand.Rand)) {
		var wg sync.WaitGroup
		for _, n := range nodes {
			own := rand.New(rand.NewPCG(rnd.Uint64(), 0))
			wg.Go(func() { f(n, own) })
		}
		wg.Wait()
	}
	var mu sync.Mutex
	var killed, queueing, draining, typical int
	// done calls until a call is not killed, as a runtime does.
	done := func(n *node, own *rand.Rand, verb, pod string, kills *int) *reply {
		for {
			mu.Lock()
			after := time.Duration(1 + own.IntN(max(1, typical*5/4)))
			mu.Unlock()
			if own.IntN(3) == 0 {
				after = 0
			}
			r := n.call(verb, pod, after)
			mu.Lock()
			if r.killed {
				killed++
				*kills++
			} else if typical = (typical*7 + int(r.took)) / 8; typical == 0 {
				typical = int(r.took)
			}
			mu.Unlock()
			if !r.killed {
				return r
			}
		}
	}
	var refused atomic.Int64
	rounds, queued, kept := 0, 0, map[string]string{}
	for ; (queueing < size(40, 500) || draining < size(20, 300)) && !t.Failed(); rounds++ {
		leased := map[string]bool{}
		each(func(n *node, _ *rand.Rand) {
			for p := range pods {
				pod := fmt.Sprintf("r%d-%d", rounds, p)
				r := n.call("ADD", pod, 0)
				for r.exit != 0 && tryAgain(r.failure()) { // the deadline is short
					r = n.call("ADD", pod, 0)
				}
				ips, err := r.ips()
				if err != nil {
					t.Errorf("ADD %s on %s: %v: %s%s", pod, n.name, err, r.stdout, r.stderr)
					return
				}
				mu.Lock()
				for _, ip := range ips {
					leased[ip] = true
					if p == 0 { // one of each round stays
						kept[ip] = n.name + "/" + pod
					}
				}
				mu.Unlock()
			}
		})

		// The majority is gone: all members, and at times so that one is left,
		// which has no leader.
		away := []int{0, 1, 2}
		if rounds%4 == 1 {
			away = away[1:]
		}
		for _, i := range away {
			w.etcd.Kill(i)
		}
		each(func(n *node, own *rand.Rand) {
			for p := 1; p < pods; p++ {
				pod := fmt.Sprintf("r%d-%d", rounds, p)
				if r := done(n, own, "DEL", pod, &queueing); r.exit != 0 {
					t.Errorf("DEL %s on %s: %s%s", pod, n.name, r.stdout, r.stderr)
				}
			}
			if got := n.files("queue"); got != pods-1 {
				t.Errorf("%d releases wait on %s, want %d", got, n.name, pods-1)
			}
			mu.Lock()
			queued += pods - 1
			mu.Unlock()
			if got := n.files("holdings"); got != rounds+1 {
				t.Errorf("%d holdings on %s, want %d", got, n.name, rounds+1)
			}
		})
		for _, i := range away {
			if err := w.etcd.Restart(i); err != nil {
				t.Fatal(err)
			}
		}
		clustertest.Wait(t, w.etcd)

		// What drains: STATUS, a DEL of a pod that is not there, an ADD of a name
		// that waits in the queue.
		each(func(n *node, own *rand.Rand) {
			for n.files("queue") > 0 && !t.Failed() {
				switch own.IntN(3) {
				case 0:
					n.forget("asked")
					done(n, own, "STATUS", "", &draining)
				case 1:
					done(n, own, "DEL", "nobody", &draining)
				default:
					pod := fmt.Sprintf("r%d-%d", rounds, 1+own.IntN(pods-1))
					// Whether it failed or not, the runtime owes it a DEL.
					if r := done(n, own, "ADD", pod, &draining); r.exit != 0 {
						refused.Add(1)
						if f := r.failure(); !tryAgain(f) {
							t.Errorf("ADD %s on %s: code %d: %s", pod, n.name, f.Code, f.text())
						}
					}
					if r := done(n, own, "DEL", pod, &draining); r.exit != 0 {
						t.Errorf("DEL %s on %s: %s%s", pod, n.name, r.stdout, r.stderr)
					}
				}
			}
		})
		after := w.leased()
		for ip, who := range kept {
			if after[ip] != who {
				t.Errorf("%s is %s's, and etcd says %q", ip, who, after[ip])
			}
		}
		if len(after) != len(kept) {
			t.Errorf("%d addresses are leased, want %d: %v", len(after), len(kept), after)
		}
	}
	for _, n := range nodes {
		for r := range rounds {
			n.call("DEL", fmt.Sprintf("r%d-0", r), 0).ok(t)
		}
		n.ledger("queue", "flush").ok(t)
		for _, sub := range []string{"queue", "holdings"} {
			if k := n.files(sub); k > 0 {
				t.Errorf("%s: %d files are left in %s", n.name, k, sub)
			}
		}
	}
	if left := w.leased(); len(left) > 0 {
		t.Errorf("addresses are leased though every pod is gone: %v", left)
	}
	t.Logf("%d outages: %d DELs were queued and done, %d calls were killed while queueing and %d while draining; %d ADDs were refused while draining",
		rounds, queued, queueing, draining, refused.Load())
}
