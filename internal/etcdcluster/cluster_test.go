package etcdcluster_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

func TestMain(m *testing.M) {
	etcdcluster.Main()
	if dir := os.Getenv("ETCDCLUSTER_TEST_DIR"); dir != "" {
		leaveAlone(dir)
	}
	os.Exit(m.Run())
}

func put(t *testing.T, c *clientv3.Client, key, value string) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	began := time.Now()
	for {
		_, err := c.Put(ctx, key, value)
		if err == nil {
			return time.Since(began)
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// sees waits until a member's own copy of a key, which may lag, is a value.
func sees(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		r, err := c.Get(ctx, key, clientv3.WithSerializable())
		if err == nil && len(r.Kvs) == 1 && string(r.Kvs[0].Value) == value {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("it does not see %s = %s: %v", key, value, err)
		}
	}
}

func TestKill(t *testing.T) {
	c := clustertest.Start(t)
	all := clustertest.Client(t, c)
	put(t, all, "k", "0")
	for i := range 3 {
		l := clustertest.Leader(t, c)
		pid := c.Pid(l)
		c.Kill(l)
		c.Kill(l)
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Fatalf("process %d is still there: %v", pid, err)
		}
		if now := clustertest.Leader(t, c); now == l {
			t.Fatalf("member %d leads though it was killed", l)
		}
		addr := strings.TrimPrefix(c.Direct(l), "http://")
		if conn, err := net.DialTimeout("tcp", addr, time.Second); err == nil {
			conn.Close()
			t.Error("a member that was killed takes connections")
		}
		put(t, all, "k", fmt.Sprint(i))
		if err := c.Restart(l); err != nil {
			t.Fatal(err)
		}
		clustertest.Wait(t, c)
		sees(t, clustertest.Client(t, c, c.Endpoints()[l]), "k", fmt.Sprint(i))
	}
	// Without a majority nobody leads.
	c.Kill(0)
	c.Stop(1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if l, err := c.Leader(ctx); err == nil {
		t.Errorf("member %d alone leads", l)
	}
}

func TestCutAndHeal(t *testing.T) {
	c := clustertest.Start(t, func(o *etcdcluster.Options) { o.ClientLinks = true })
	all := clustertest.Client(t, c)
	put(t, all, "k", "before")
	old := clustertest.Leader(t, c)
	on := clustertest.Client(t, c, c.Endpoints()[old])
	sees(t, on, "k", "before")
	c.Cut(old)
	// Once it knows, it says so itself; until then it can commit nothing.
	now := clustertest.Leader(t, c)
	for now == old {
		now = clustertest.Leader(t, c)
	}
	other := clustertest.Client(t, c, c.Endpoints()[now])
	put(t, other, "k", "after")
	sees(t, on, "k", "before") // stale, and answering
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	if _, err := on.Get(ctx, "k"); err == nil {
		t.Error("a linearizable read at a member that is cut off was answered")
	}
	cancel()
	c.CutClients(old)
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	if _, err := on.Get(ctx, "k", clientv3.WithSerializable()); err == nil {
		t.Error("a member that is cut off from clients, too, answered")
	}
	cancel()
	c.Heal(old)
	clustertest.Wait(t, c)
	sees(t, on, "k", "after")

	// One direction: who is not heard cannot lead.
	l := clustertest.Leader(t, c)
	for i := range c.Members() {
		if i != l {
			c.CutLink(l, i)
		}
	}
	for clustertest.Leader(t, c) == l {
	}
	c.Heal(l)
	clustertest.Wait(t, c)
}

func TestPause(t *testing.T) {
	c := clustertest.Start(t)
	l := clustertest.Leader(t, c)
	if err := c.Pause(l); err != nil {
		t.Fatal(err)
	}
	for clustertest.Leader(t, c) == l {
	}
	put(t, clustertest.Client(t, c), "k", "v")
	if err := c.Resume(l); err != nil {
		t.Fatal(err)
	}
	sees(t, clustertest.Client(t, c, c.Endpoints()[l]), "k", "v")
}

func TestSlowDiskAndDelay(t *testing.T) {
	c := clustertest.Start(t)
	all := clustertest.Client(t, c, c.Endpoints()[clustertest.Leader(t, c)])
	put(t, all, "k", "v")
	const slow = 100 * time.Millisecond
	for i := range c.Members() {
		if err := c.SlowDisk(i, slow); err != nil {
			t.Fatal(err)
		}
	}
	before := c.Synced(0)
	if took := put(t, all, "k", "w"); took < slow {
		t.Errorf("a put on slow disks took %v, want at least %v", took, slow)
	}
	if c.Synced(0) == before {
		t.Error("nothing was synced")
	}
	for i := range c.Members() {
		if err := c.SlowDisk(i, 0); err != nil {
			t.Fatal(err)
		}
		c.Delay(i, 0)
	}
	put(t, all, "k", "x")
	for i := range c.Members() {
		c.Delay(i, slow)
	}
	if took := put(t, all, "k", "y"); took < 2*slow {
		t.Errorf("a put over slow links took %v, want at least %v", took, 2*slow)
	}
}

func TestEndsBySelfIsSaid(t *testing.T) {
	_, err := etcdcluster.Start(t.Context(), etcdcluster.Options{Dir: filepath.Join(t.TempDir(), "etcd"), Args: []string{"--wal-dir=/proc/none"}})
	if err == nil || !strings.Contains(err.Error(), "/proc/none") {
		t.Errorf("error %v, want one that says what the member said", err)
	}
}

// leaveAlone starts a cluster, says which processes it has, and never ends it.
func leaveAlone(dir string) {
	c, err := etcdcluster.Start(context.Background(), etcdcluster.Options{Dir: dir})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := c.Pause(2); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(c.Pid(0), c.Pid(1), c.Pid(2))
	select {}
}

// TestMembersDieWithTheirProgram: no member outlives a program that was killed,
// not even one that is paused.
func TestMembersDieWithTheirProgram(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "ETCDCLUSTER_TEST_DIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := etcdcluster.Spawn(cmd); err != nil {
		t.Fatal(err)
	}
	var pids [3]int
	_, err = fmt.Fscan(out, &pids[0], &pids[1], &pids[2])
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatalf("it did not say which processes it started: %v", err)
	}
	for _, pid := range pids {
		for end := time.Now().Add(10 * time.Second); syscall.Kill(pid, 0) == nil && !isZombie(pid); {
			if time.Now().After(end) {
				t.Fatalf("process %d outlives the program that started it", pid)
			}
		}
	}
}

// isZombie reports whether a process is dead and only waits to be noticed, which
// is up to whoever adopted it.
func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := strings.Cut(string(b), ") ")
	return err == nil && strings.HasPrefix(state, "Z")
}
