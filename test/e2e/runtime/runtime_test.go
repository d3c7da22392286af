package runtime

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ipam-ledger/ipam-ledger/internal/containerd"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// TestKubelet: sixty sandboxes at once, then churn: no address twice, each pod
// reaches each other pod, and the pods stand in the ledger.
func TestKubelet(t *testing.T) {
	w := newWorld(t)
	began := time.Now()
	running := w.startAll(pods("web", 60))
	t.Logf("60 sandboxes run after %v", time.Since(began).Round(time.Millisecond))
	w.wantDistinct(running)
	w.wantLeased(running)
	w.reachEachOther(running)
	w.verify()

	// Churn: in mixed order some stop while others start.
	seed := [2]uint64{rand.Uint64(), rand.Uint64()}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed[0], seed[1]))
	fresh := pods("batch", 60*larger)
	began = time.Now()
	for len(fresh) > 0 {
		random.Shuffle(len(running), func(i, j int) { running[i], running[j] = running[j], running[i] })
		n := min(1+random.IntN(20), len(fresh))
		leaving, coming := running[:n], fresh[:n]
		running, fresh = slices.Clone(running[n:]), fresh[n:]
		started := make([]*sandbox, n)
		w.together(2*n, func(i int) (err error) {
			if i%2 == 0 {
				return w.stop(leaving[i/2].id)
			}
			started[i/2], err = w.start(coming[i/2])
			return err
		})
		running = append(running, started...)
		w.wantDistinct(running)
	}
	t.Logf("%d more came and as many left in %v", 60*larger, time.Since(began).Round(time.Millisecond))
	w.wantLeased(running)
	w.reachEachOther(running)
	w.verify()

	began = time.Now()
	w.stopAll(running)
	t.Logf("60 sandboxes are gone after %v", time.Since(began).Round(time.Millisecond))
	w.allFreed()
	w.onRecord(slices.Concat(pods("web", 60), pods("batch", 60*larger)))
}

// TestContainerdKilled: containerd is killed in the middle of a burst, twice, and
// the kubelet tries again. Nobody loses an address or gets another's; whatever
// then is leased without a pod, one gc frees.
func TestContainerdKilled(t *testing.T) {
	w := newWorld(t)
	all := pods("web", 30)
	for range larger {
		for _, acquired := range []int{len(all) / 6, len(all) * 2 / 3} {
			w.during(all, acquired, func() { w.KillContainerd(t) })
			w.StartContainerd(t)
		}
		running := w.syncAll(all)
		w.wantDistinct(running)
		w.reachEachOther(running)
		w.verify()
		leaked := len(w.extra(running))
		t.Logf("%d leases have no sandbox; gc freed %d", leaked, w.gc())
		w.wantLeased(running)
		if n := w.removeListed(); n != len(running) {
			t.Errorf("containerd had %d sandboxes, want %d", n, len(running))
		}
		w.allFreed()
	}
}

// during brings pods up, and as soon as so many addresses were acquired for them,
// it does something to the machine.
func (w *world) during(all []containerd.Pod, acquired int, do func()) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	watch := w.watchAcquires(ctx)
	<-watch // it stands
	var up atomic.Int32
	var burst sync.WaitGroup
	for _, p := range all {
		burst.Go(func() {
			if _, err := w.sync(p); err == nil {
				up.Add(1)
			}
		})
	}
	for n := 0; n < acquired; {
		r, ok := <-watch
		if !ok || r.Err() != nil {
			w.t.Fatalf("waiting for %d acquires, of which %d were seen: %v", acquired, n, r.Err())
		}
		for _, e := range r.Events {
			if e.IsCreate() {
				n++
			}
		}
	}
	do()
	burst.Wait()
	w.t.Logf("%d of %d sandboxes had been made", up.Load(), len(all))
	if int(up.Load()) == len(all) {
		w.t.Error("the burst was over before it could be disturbed")
	}
}

// TestNetnsGone: a sandbox whose network namespace is gone before it is stopped:
// its address is freed all the same.
func TestNetnsGone(t *testing.T) {
	w := newWorld(t)
	stays := w.startAll(pods("db", 1))
	gone := w.startAll(pods("web", 4))
	for i, s := range gone {
		removed, killed := i%2 == 1, i >= 2
		err := w.Do(func() error {
			if err := unix.Unmount(s.Netns, unix.MNT_DETACH); err != nil {
				return err
			}
			if removed { // else an ordinary, empty file remains
				if err := os.Remove(s.Netns); err != nil {
					return err
				}
			}
			if killed { // else the pod's processes still hold the namespace
				return exec.Command("sh", "-c", fmt.Sprintf("kill -9 %d", s.PID)).Run()
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	w.stopAll(gone)
	w.wantLeased(stays)
	w.reachEachOther(stays)
	w.stopAll(stays)
	w.allFreed()
}

// TestStatus: containerd asks STATUS, and says of the node what it hears.
func TestStatus(t *testing.T) {
	w := newWorld(t)
	w.wantReady()
	w.etcd.Stop()
	w.longWithoutContact(w.state())
	ready, message := w.networkReady()
	if ready {
		t.Error("etcd is gone for longer than statusGrace, and the network is ready")
	}
	for _, part := range []string{"etcd cannot be reached", "node " + nodeName, strings.TrimPrefix(w.etcd.Endpoint(), "http://"), "ledger doctor"} {
		if !strings.Contains(message, part) {
			t.Errorf("nothing says %q: %s", part, message)
		}
	}
	t.Log(message)
	w.etcd.Restart(t)
	w.longWithoutContact(w.state())
	w.wantReady()
}

// longWithoutContact sets a node's time stamps back: the next STATUS asks etcd,
// which it does twice a minute, and has not heard of it for longer than
// statusGrace.
func (w *world) longWithoutContact(state string) {
	w.t.Helper()
	d, err := statedir.Open(state)
	if err != nil {
		w.t.Fatal(err)
	}
	ago, err := statedir.Now()
	if err != nil {
		w.t.Fatal(err)
	}
	boot, err := os.ReadFile(filepath.Join(w.Dir, "boot-id"))
	if err != nil {
		w.t.Fatal(err)
	}
	ago.Boot, ago.Since = strings.TrimSpace(string(boot)), ago.Since-5*time.Minute
	for _, stamp := range []string{"asked", "contact"} {
		if err := d.Stamp(stamp, ago); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) networkReady() (bool, string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	ready, message, err := w.CRI().NetworkReady(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return ready, message
}

func (w *world) wantReady() {
	w.t.Helper()
	if ready, message := w.networkReady(); !ready {
		w.t.Errorf("the network is not ready: %s", message)
	}
}

// TestReboot: a power cut with pods running, and others about to. Where the
// runtime's disk survives, its DELs free what the pods had; where it does not, one
// gc does.
func TestReboot(t *testing.T) {
	for _, disk := range []string{"kept", "lost"} {
		t.Run("disk "+disk, func(t *testing.T) {
			w := newWorld(t)
			old, others := pods("web", 8*larger), pods("batch", 8*larger)
			before := w.startAll(old)
			w.during(others, 2, func() { w.PowerOff(t) })
			atCut := len(w.leases())
			if disk == "lost" {
				w.Wipe(t)
			}
			w.PowerOn(t)
			w.StartContainerd(t)
			after := w.syncAll(slices.Concat(old, others))
			w.wantDistinct(after)
			leaked := w.extra(after)
			t.Logf("at the power cut %d addresses were leased; without a sandbox are now %d", atCut, len(leaked))
			for _, s := range before {
				known := !slices.ContainsFunc(leaked, func(l lease) bool { return l.Attachment.Container == s.id })
				if known != (disk == "kept") {
					t.Errorf("%s of before the power cut: its lease is gone: %v", s, known)
				}
			}
			w.gc("--dry-run")
			if n := len(w.extra(after)); n != len(leaked) {
				t.Errorf("a dry run left %d leases without a sandbox, want all %d", n, len(leaked))
			}
			if freed := w.gc(); freed != len(leaked) {
				t.Errorf("gc freed %d leases, want %d", freed, len(leaked))
			}
			w.wantLeased(after)
			w.reachEachOther(after)
			for _, l := range w.log("--op", "release") {
				if disk == "lost" && (!strings.HasPrefix(l.Reason, "gc: ") || l.Node != nodeName || l.PodUID == "") {
					t.Errorf("the log says %+v, want a release by gc, with its pod", l)
				}
			}
			w.stopAll(after)
			w.allFreed()
		})
	}
}
