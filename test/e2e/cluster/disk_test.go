package cluster

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// TestSlowDisk: with a slow disk under one member, then under the leader, then
// under all, calls get slow and stay right. With one so slow that no leader
// lasts, ADDs are refused with the cause, and DELs queued.
func TestSlowDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, defaultTicks)
	var nodes []*node
	for i := range 3 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), nil, `"timeout": "4s"`))
	}
	l := w.load(nodes, func(l *load) { l.may = tryAgain })
	l.more(10)
	for _, on := range []struct {
		name  string
		which func(leader int) []int
		delay time.Duration
		adds  int
	}{
		{"a follower's", func(leader int) []int { return []int{(leader + 1) % 3} }, 200 * time.Millisecond, size(20, 200)},
		{"the leader's", func(leader int) []int { return []int{leader} }, 200 * time.Millisecond, size(10, 100)},
		{"every member's", func(int) []int { return []int{0, 1, 2} }, 200 * time.Millisecond, size(10, 100)},
		{"every member's", func(int) []int { return []int{0, 1, 2} }, 2 * time.Second, 0},
	} {
		slow := on.which(clustertest.Leader(t, w.etcd))
		began := time.Now()
		for _, i := range slow {
			if err := w.etcd.SlowDisk(i, on.delay); err != nil {
				t.Fatal(err)
			}
		}
		if on.adds > 0 {
			l.after(began, on.adds)
		} else {
			l.endedSince(began, size(4, 60)) // in whichever way
		}
		add, adds := l.worst("ADD", began)
		del, dels := l.worst("DEL", began)
		t.Logf("%s fsync takes %v longer: the slowest of %d ADDs took %v, of %d DELs %v", on.name, on.delay,
			adds, add.Round(time.Millisecond), dels, del.Round(time.Millisecond))
		for _, i := range slow {
			if err := w.etcd.SlowDisk(i, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.end()
}

// TestNoSpace: when etcd is full under load, ADD says so, DEL does not wait for
// it, and what it queued is done once there is space again.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(o *etcdcluster.Options) { o.Quota = 8 << 20 })
	var nodes []*node
	for i := range 3 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), nil))
	}
	l := w.load(nodes, func(l *load) {
		l.may = func(f failure) bool {
			return tryAgain(f) && strings.Contains(f.text(), "out of space") && strings.Contains(f.text(), "NOSPACE") &&
				strings.Contains(f.text(), "defragment") && strings.Contains(f.text(), "alarm disarm")
		}
	})
	l.more(20)
	client := clustertest.Client(t, w.etcd)
	junk := strings.Repeat("x", 1<<20)
	for i := 0; ; i++ {
		_, err := client.Put(t.Context(), fmt.Sprint("/junk/", i), junk)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if err != nil || i > 64 {
			t.Fatalf("filling etcd: %d, %v", i, err)
		}
	}
	isFull := time.Now()
	refused := func() (n int) {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range l.calls {
			if c.code != 0 && c.began.After(isFull) {
				n++
			}
		}
		return n
	}
	until(t, "ADDs are refused, and DELs queued on each node", func() bool {
		if t.Failed() {
			return true
		}
		time.Sleep(5 * time.Millisecond)
		for _, n := range nodes {
			if n.files("queue") == 0 {
				return false
			}
		}
		return refused() >= size(10, 100)
	})
	slowest, dels := l.worst("DEL", isFull)
	for _, n := range nodes {
		n.forget("asked")
		n.call("STATUS", "", 0).ok(t) // a full etcd is cluster-wide
	}

	// What the error says is what helps.
	r, err := client.Delete(t.Context(), "/junk/", clientv3.WithPrefix())
	if err == nil {
		_, err = client.Compact(t.Context(), r.Header.Revision, clientv3.WithCompactPhysical())
	}
	for _, endpoint := range w.etcd.Endpoints() {
		if err == nil {
			_, err = client.Defragment(t.Context(), endpoint)
		}
	}
	if err == nil {
		_, err = client.AlarmDisarm(t.Context(), &clientv3.AlarmMember{})
	}
	if err != nil {
		t.Fatal(err)
	}
	l.more(20)
	until(t, "what was queued is done", func() bool {
		time.Sleep(5 * time.Millisecond)
		for _, n := range nodes {
			if n.files("queue") > 0 {
				return t.Failed()
			}
		}
		return true
	})
	t.Logf("%d ADDs were refused for want of space, and %d DELs succeeded, the slowest in %v", refused(), dels, slowest.Round(time.Millisecond))
	l.end()
}
