package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

var (
	seed  = flag.Uint64("seed", 0, "seed of random tests; 0: another one each time")
	kills = flag.Int("kills", 600, "how many processes TestKill kills")
)

// random is a source whose seed the test prints.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// runKilled runs a process and kills it after a delay, or when on says so,
// unless it ends before.
func runKilled(t testing.TB, cmd *exec.Cmd, after time.Duration, on ...*trigger) (r *reply, killed bool) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Errorf("starting %v: %v", cmd.Args, err)
		return nil, true
	}
	timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	for _, tr := range on {
		defer tr.arm(cmd.Process)()
	}
	_ = cmd.Wait()
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	return &reply{t: t, what: strings.Join(cmd.Args, " "), stdout: stdout.String(), stderr: stderr.String(), exit: cmd.ProcessState.ExitCode(), took: time.Since(began)}, ws.Signaled()
}

// trigger kills when something happens in a node's state directory, so that
// kills also fall into the short time in which a commit is under way.
type trigger struct {
	sync.Mutex
	file  *os.File
	armed map[*os.Process]bool
	ended chan struct{}
}

// watch kills whoever is armed, after a moment, when a commit is about to be
// sent ("open" is written), was noted ("mark" is) or is done.
func (n *node) watch(delay func() time.Duration) *trigger {
	n.t.Helper()
	if err := os.MkdirAll(n.state, 0o700); err != nil {
		n.t.Fatal(err)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		n.t.Fatal(err)
	}
	tr := &trigger{file: os.NewFile(uintptr(fd), "inotify"), armed: map[*os.Process]bool{}, ended: make(chan struct{})}
	if _, err := unix.InotifyAddWatch(fd, n.state, unix.IN_CREATE|unix.IN_MODIFY|unix.IN_MOVED_TO); err != nil {
		n.t.Fatal(err)
	}
	go func() {
		defer close(tr.ended)
		b := make([]byte, 4096)
		for {
			k, err := tr.file.Read(b)
			if err != nil {
				return // closed
			}
			if !bytes.Contains(b[:k], []byte("open\x00")) && !bytes.Contains(b[:k], []byte("mark\x00")) {
				continue
			}
			tr.Lock()
			for p := range tr.armed {
				time.AfterFunc(delay(), func() { _ = p.Kill() })
			}
			clear(tr.armed)
			tr.Unlock()
		}
	}()
	n.t.Cleanup(func() {
		tr.file.Close()
		<-tr.ended
	})
	return tr
}

func (tr *trigger) arm(p *os.Process) (disarm func()) {
	tr.Lock()
	defer tr.Unlock()
	tr.armed[p] = true
	return func() {
		tr.Lock()
		defer tr.Unlock()
		delete(tr.armed, p)
	}
}

// told is what runtimes have been told of addresses that pods have now.
type told struct {
	sync.Mutex
	pods map[string]string // address: attachment
}

func (d *told) add(t testing.TB, pod string, ips []string) {
	d.Lock()
	defer d.Unlock()
	for _, ip := range ips {
		if other := d.pods[ip]; other != "" && other != pod {
			t.Errorf("%s was told to %s while %s has it", ip, pod, other)
		}
		d.pods[ip] = pod
	}
}

func (d *told) del(ips []string) {
	d.Lock()
	defer d.Unlock()
	for _, ip := range ips {
		delete(d.pods, ip)
	}
}

// storm is load: on each node some runtimes that add and delete pods, at random.
type storm struct {
	*cluster
	nodes         []*node
	workers, pods int // of each node; of each worker, at most
	w             network
	rnd           *rand.Rand
	more          func() bool
	// kill says when a call is to be killed, and before that how long one takes.
	kill func(own *rand.Rand, node int, typical time.Duration) (after time.Duration, on []*trigger)
	// mayFail says whether a call that was not killed may fail with a code.
	mayFail func(verb string, code int) bool
	each    func() // after each call; may be nil

	calls, killed, failed, added, typical atomic.Int64
	live                                  told
	left                                  [][]string // containers, by worker
}

// rage runs until there is to be no more.
func (s *storm) rage() {
	t := s.t
	t.Helper()
	type pod struct {
		name string
		ips  []string // nil: not told
	}
	s.typical.Store(int64(20 * time.Millisecond))
	s.live.pods = map[string]string{}
	s.left = make([][]string, len(s.nodes)*s.workers)
	var wg sync.WaitGroup
	for i, n := range s.nodes {
		for j := range s.workers {
			own := rand.New(rand.NewPCG(s.rnd.Uint64(), 0))
			wg.Go(func() {
				var have []*pod
				defer func() {
					for _, p := range have {
						s.left[i*s.workers+j] = append(s.left[i*s.workers+j], p.name)
					}
				}()
				for serial := 0; s.more() && !t.Failed(); serial++ {
					var p *pod
					verb, at := "ADD", -1
					if x := own.IntN(10); len(have) > 0 && (x < 5 || len(have) >= s.pods) {
						at = own.IntN(len(have))
						p = have[at]
						if x > 0 {
							verb = "DEL"
						}
					} else {
						p = &pod{name: fmt.Sprintf("w%d-%d", j, serial)}
						have = append(have, p)
					}
					if verb == "DEL" {
						s.live.del(p.ips)
						p.ips = nil
					}
					after, on := s.kill(own, i, time.Duration(s.typical.Load()))
					r, killed := runKilled(t, n.command(context.Background(), verb, p.name, s.w), after, on...)
					s.calls.Add(1)
					if s.each != nil {
						s.each()
					}
					if killed {
						s.killed.Add(1)
						continue // whether it was done is for the next call to find out
					}
					s.typical.Store((s.typical.Load()*7 + int64(r.took)) / 8)
					if r.exit != 0 {
						s.failed.Add(1)
						var f failure
						if err := json.Unmarshal([]byte(r.stdout), &f); err != nil || !s.mayFail(verb, f.Code) {
							t.Errorf("%s %s on %s: exit status %d\n%s%s", verb, p.name, n.name, r.exit, r.stdout, r.stderr)
						}
						continue
					}
					if verb == "DEL" {
						have = append(have[:at], have[at+1:]...)
						continue
					}
					ips, err := resultIPs(r.stdout)
					if err != nil || len(ips) != 2 {
						t.Errorf("ADD %s on %s: %v, %v\n%s", p.name, n.name, ips, err, r.stdout)
						continue
					}
					s.added.Add(1)
					if p.ips != nil && fmt.Sprint(p.ips) != fmt.Sprint(ips) {
						t.Errorf("%s on %s was told %v, and then %v", p.name, n.name, p.ips, ips)
					}
					p.ips = ips
					s.live.add(t, n.name+"/"+p.name, ips)
				}
			})
		}
	}
	wg.Wait()
	var acquired, released int
	for _, n := range s.nodes {
		acquired += len(n.entries(entry.Acquire))
		released += len(n.entries(entry.Release))
	}
	t.Logf("%d calls, %d killed, %d failed; %d ADDs answered, %d leases begun and %d ended in etcd; a call takes %v",
		s.calls.Load(), s.killed.Load(), s.failed.Load(), s.added.Load(), acquired, released, time.Duration(s.typical.Load()).Round(time.Millisecond))
}

// nothingIsLost checks, after the storm, that nothing is: pods have what they were
// told, DEL of every attachment frees everything, and nothing stays behind.
func (s *storm) nothingIsLost() {
	t := s.t
	t.Helper()
	s.verify()
	leased := map[string]string{}
	for ip, id := range s.leased() {
		leased[ip.String()] = id.Node + "/" + id.Container
	}
	for ip, pod := range s.live.pods {
		if leased[ip] != pod {
			t.Errorf("%s was told to %s, and etcd says %q", ip, pod, leased[ip])
		}
	}
	var wg sync.WaitGroup
	for i, pods := range s.left {
		wg.Go(func() {
			for _, p := range pods {
				if r, _ := runKilled(t, s.nodes[i/s.workers].command(context.Background(), "DEL", p, s.w), time.Hour); r.exit != 0 {
					t.Errorf("DEL %s: %s%s", p, r.stdout, r.stderr)
				}
			}
		})
	}
	wg.Wait()
	for _, n := range s.nodes {
		n.ledger("queue", "flush").ok()
		n.isSettled()
		if left := n.files("holdings"); len(left) > 0 {
			t.Errorf("%s: holdings are left: %v", n.name, left)
		}
	}
	s.wantLeased()
}

// dual is a pool of 253 addresses of each family.
var dual = network{ipam: `"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]`}

// TestKill: the plugin is killed at any instant, under load, and nothing is
// lost, doubled or left behind.
func TestKill(t *testing.T) {
	s := &storm{cluster: newCluster(t), workers: 2, pods: 9, w: dual, rnd: random(t)}
	var commits []*trigger
	for i := range 8 {
		n := s.node(fmt.Sprint("n", i))
		late := rand.New(rand.NewPCG(s.rnd.Uint64(), 0))
		s.nodes = append(s.nodes, n)
		commits = append(commits, n.watch(func() time.Duration { return time.Duration(late.Int64N(int64(3 * time.Millisecond))) }))
	}
	s.more = func() bool { return s.killed.Load() < int64(*kills) }
	s.mayFail = func(string, int) bool { return false }
	s.kill = func(own *rand.Rand, node int, typical time.Duration) (time.Duration, []*trigger) {
		switch own.IntN(6) {
		case 0:
			return time.Duration(own.Int64N(int64(20 * time.Millisecond))), nil
		case 1, 2:
			// Where processes share the processor, 20 ms is early.
			return time.Duration(own.Int64N(int64(typical) * 5 / 4)), nil
		case 3, 4:
			return time.Hour, commits[node : node+1]
		}
		return time.Hour, nil
	}
	s.rage()
	s.nothingIsLost()
}

// TestCut: connections to etcd break at any byte, so that requests are lost on
// the way there and replies on the way back.
func TestCut(t *testing.T) {
	s := &storm{cluster: newCluster(t), workers: 2, pods: 9, w: dual, rnd: random(t)}
	proxy := newProxy(t, strings.TrimPrefix(s.etcd.Endpoint(), "http://"), rand.New(rand.NewPCG(s.rnd.Uint64(), 0)))
	for i := range 4 {
		s.nodes = append(s.nodes, s.node(fmt.Sprint("n", i), fmt.Sprintf(`"etcd": {"endpoints": ["http://%s"]}, "timeout": "2s"`, proxy.Addr())))
	}
	s.more = func() bool { return s.calls.Load() < 300 }
	s.mayFail = func(verb string, code int) bool { return verb == "ADD" && code == codeTryAgain }
	s.kill = func(*rand.Rand, int, time.Duration) (time.Duration, []*trigger) { return time.Hour, nil }
	s.rage()
	t.Logf("%d of %d connections were cut", proxy.cut.Load(), proxy.all.Load())
	proxy.calm.Store(true)
	s.nothingIsLost()
}

// TestRestarts: etcd goes away and comes back under load.
func TestRestarts(t *testing.T) {
	s := &storm{cluster: newCluster(t), workers: 2, pods: 9, w: dual, rnd: random(t)}
	for i := range 4 {
		s.nodes = append(s.nodes, s.node(fmt.Sprint("n", i), `"timeout": "2s"`))
	}
	const restarts = 5
	var done atomic.Int64
	s.more = func() bool { return done.Load() < restarts }
	s.mayFail = func(verb string, code int) bool { return verb == "ADD" && code == codeTryAgain }
	s.kill = func(*rand.Rand, int, time.Duration) (time.Duration, []*trigger) { return time.Hour, nil }
	calls, raged, ended := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	s.each = func() {
		select {
		case calls <- struct{}{}:
		default: // etcd is being stopped or started
		}
	}
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			// Each time some calls of before, and some that find nobody.
			for range 12 {
				select {
				case <-calls:
				case <-raged:
					s.etcd.Restart(t)
					return
				}
			}
			if i%2 == 0 {
				s.etcd.Stop()
				continue
			}
			s.etcd.Restart(t)
			done.Add(1)
		}
	}()
	s.rage()
	close(raged)
	<-ended
	s.nothingIsLost()
}

// proxy passes bytes to etcd, and cuts connections.
type proxy struct {
	net.Listener
	to       string
	mu       sync.Mutex
	rnd      *rand.Rand
	calm     atomic.Bool
	all, cut atomic.Int64
	wg       sync.WaitGroup
}

func newProxy(t testing.TB, to string, rnd *rand.Rand) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, to: to, rnd: rnd}
	p.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.wg.Go(func() { p.pass(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	defer server.Close()
	p.all.Add(1)
	var most [2]int64 // bytes there and back; a call is about this long
	p.mu.Lock()
	for i := range most {
		if most[i] = p.rnd.Int64N(6000); p.calm.Load() || p.rnd.IntN(3) == 0 {
			most[i] = math.MaxInt64
		}
	}
	p.mu.Unlock()
	var wg sync.WaitGroup
	for i, pair := range [][2]net.Conn{{server, client}, {client, server}} {
		wg.Go(func() {
			if n, _ := io.CopyN(pair[0], pair[1], most[i]); n == most[i] {
				p.cut.Add(1)
			}
			client.Close()
			server.Close()
		})
	}
	wg.Wait()
}

func resultIPs(stdout string) (out []string, err error) {
	var r current.Result
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		return nil, err
	}
	for _, ip := range r.IPs {
		if ip == nil {
			return nil, errors.New("null among the addresses")
		}
		out = append(out, ip.Address.IP.String())
	}
	return out, nil
}
