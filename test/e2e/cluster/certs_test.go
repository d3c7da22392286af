package cluster

import (
	"bufio"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
)

// follower is a command that runs for long; its lines come as they are written.
type follower struct {
	t     testing.TB
	cmd   *exec.Cmd
	lines chan string
	mu    sync.Mutex
	said  strings.Builder // stderr
}

func (w *world) follow(args ...string) *follower {
	w.t.Helper()
	f := &follower{t: w.t, cmd: w.ledgerCommand(args...), lines: make(chan string, 1<<14)}
	stdout, err := f.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	f.cmd.Stderr = f
	if err := etcdcluster.Spawn(f.cmd); err != nil {
		w.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s := bufio.NewScanner(stdout)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			f.lines <- s.Text()
		}
		close(f.lines)
	}()
	w.t.Cleanup(func() {
		_ = f.cmd.Process.Kill()
		<-ended
		_ = f.cmd.Wait() // killed
		if w.t.Failed() {
			w.t.Logf("ledger %s said:\n%s", strings.Join(args, " "), f.text())
		}
	})
	return f
}

func (f *follower) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.said.Write(b)
}

func (f *follower) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.said.String()
}

// next is the next line that matters.
func (f *follower) next(what string, matters func(line string) bool) {
	f.t.Helper()
	for end := time.After(time.Minute); ; {
		select {
		case line, ok := <-f.lines:
			if !ok {
				f.t.Fatalf("it ended while waiting for %s:\n%s", what, f.text())
			}
			if matters(line) {
				return
			}
		case <-end:
			f.t.Fatalf("not within a minute: %s:\n%s", what, f.text())
		}
	}
}

// entry waits for an acquire of a pod, which must be the very next entry.
func (f *follower) entry(pod string) {
	f.t.Helper()
	f.next("the entry of "+pod, func(line string) bool {
		var e struct{ Op, Container, Bad string }
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Op != "acquire" || e.Container != pod || e.Bad != "" {
			f.t.Errorf("%q, want the acquire of %s (%v)", line, pod, err)
		}
		return true
	})
}

// leases waits for a published state in which so many pods have a lease, and
// etcd is reached.
func (f *follower) leases(n int) {
	f.t.Helper()
	f.next(fmt.Sprintf("a state with %d leases", n), func(line string) bool {
		var s struct {
			Etcd  struct{ OK bool }
			Pools []struct{ Leased int }
		}
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			f.t.Fatalf("%q: %v", line, err)
		}
		leased := 0
		for _, p := range s.Pools {
			leased += p.Leased
		}
		return s.Etcd.OK && leased == n
	})
}

// copies are files that are replaced while somebody uses them.
type copies struct{ etcdtest.Files }

func newCopies(t testing.TB, name string) *copies {
	dir := filepath.Join(t.TempDir(), name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return &copies{etcdtest.Files{CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}}
}

// put replaces certificate, key and what is trusted, one after the other, each
// in one step.
func (c *copies) put(t testing.TB, pair etcdtest.Files, trusted ...*etcdtest.Authority) {
	t.Helper()
	var bundle []byte
	for _, a := range trusted {
		b, err := os.ReadFile(a.File())
		if err != nil {
			t.Fatal(err)
		}
		bundle = append(bundle, b...)
	}
	replace := func(file string, b []byte) {
		if err := os.WriteFile(file+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	replace(c.CA, bundle)
	for from, to := range map[string]string{pair.Cert: c.Cert, pair.Key: c.Key} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		replace(to, b)
	}
}

// TestCertificatesReplaced: client's and members' certificates, and then their
// authority, are replaced while commands follow the ledger. They go on, no entry
// is missed or shown twice, and in the end the first certificate has expired and
// its authority is trusted by nobody.
func TestCertificatesReplaced(t *testing.T) {
	t.Parallel()
	old, fresh := etcdtest.NewAuthority(t), etcdtest.NewAuthority(t)
	server, client := newCopies(t, "server"), newCopies(t, "client")
	expires := time.Now().Add(12 * time.Second)
	first := old.Issue(t, "client", func(c *x509.Certificate) { c.NotAfter = expires })
	server.put(t, old.Issue(t, "server"), old)
	client.put(t, first, old)
	w := &world{t: t, dir: t.TempDir(), tls: &client.Files}
	w.etcd = clustertest.Start(t, func(o *etcdcluster.Options) {
		o.TLS = &etcdcluster.TLS{CAFile: server.CA, CertFile: server.Cert, KeyFile: server.Key}
	})
	w.begin()
	n := w.node("n1", nil)
	pods := 0
	add := func() string {
		pods++
		pod := fmt.Sprint("p", pods)
		n.call("ADD", pod, 0).ok(t)
		return pod
	}
	add()
	log := w.follow("log", "--follow", "-n", "0", "-o", "json", "--op", "acquire", "--timeout", "2s")
	publish := w.follow("publish", "--print", "--source", "test", "--heartbeat", "1s", "--timeout", "2s")
	publish.leases(pods)
	// It follows once it shows what is committed now.
	until(t, "log --follow shows something", func() bool {
		add()
		return len(log.lines) > 0
	})
	for len(log.lines) > 0 {
		<-log.lines
	}
	step := func(what string) {
		t.Helper()
		pod := add()
		log.next("the entry of "+pod, func(line string) bool { return strings.Contains(line, `"`+pod+`"`) })
		for range 2 {
			log.entry(add())
		}
		publish.leases(pods)
		if t.Failed() {
			t.Fatalf("failed after: %s", what)
		}
	}
	restart := func() {
		t.Helper()
		for i := range w.etcd.Members() {
			if err := w.etcd.Restart(i); err != nil {
				t.Fatal(err)
			}
			clustertest.Wait(t, w.etcd)
		}
	}
	step("the start")

	client.put(t, old.Issue(t, "client"), old)
	restart()
	step("another pair of the same authority")

	server.put(t, old.Issue(t, "server"), old, fresh)
	client.put(t, old.Issue(t, "client"), old, fresh)
	restart()
	step("both authorities are trusted by both sides")

	server.put(t, fresh.Issue(t, "server"), old, fresh)
	client.put(t, fresh.Issue(t, "client"), old, fresh)
	restart()
	step("both sides have certificates of the new one")

	server.put(t, fresh.Issue(t, "server"), fresh)
	client.put(t, fresh.Issue(t, "client"), fresh)
	restart()
	until(t, "the first certificate has expired", func() bool { return time.Now().After(expires) })
	restart()
	step("the old authority is trusted by nobody, and the first certificate has expired")

	// Who still has it is told so.
	for what, tls := range map[string]etcdtest.Files{"expired": first, "not signed by": old.Issue(t, "client")} {
		late := &world{t: t, etcd: w.etcd, dir: w.dir, tls: &tls}
		r := late.node("late", nil).call("ADD", "x", 0)
		if r.exit == 0 || !strings.Contains(r.failure().text(), what) {
			t.Errorf("nothing says %q: %s", what, r.failure().text())
		}
	}
	t.Logf("%d pods; log --follow reconnected %d times", pods, strings.Count(log.text(), "connecting again"))
}

// TestWatchNeverMade: a connection falls silent just when a watch is asked for.
// log --follow and publish notice, and make another.
func TestWatchNeverMade(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.node("n1", nil)
	n.call("ADD", "p1", 0).ok(t)
	for _, c := range []struct {
		name string
		args []string
		is   func(f *follower)
	}{
		{"log", []string{"log", "--follow", "-n", "0", "-o", "json", "--op", "acquire", "--timeout", "1s"}, func(f *follower) {
			f.next("an entry", func(line string) bool { return strings.Contains(line, `"late-log"`) })
		}},
		{"publish", []string{"publish", "--print", "--source", "test", "--heartbeat", "1s", "--timeout", "1s"}, func(f *follower) {
			f.leases(len(w.leased()) / 2)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMute(t, strings.TrimPrefix(w.etcd.Endpoints()[0], "http://"))
			f := (&world{t: t, etcd: w.etcd, dir: w.dir}).follow(append(c.args, "--endpoints", "http://"+m.Addr().String())...)
			until(t, "a watch was asked for in vain", func() bool { return m.muted.Load() >= 1 })
			m.calm.Store(true)
			n.call("ADD", "late-"+c.name, 0).ok(t)
			c.is(f)
		})
	}
}

// mute passes bytes on to etcd, and falls silent on a connection that asks for a
// watch, until it is calm.
type mute struct {
	net.Listener
	calm  atomic.Bool
	muted atomic.Int64
}

func newMute(t testing.TB, to string) *mute {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &mute{Listener: l}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	keep := func(c net.Conn) {
		mu.Lock()
		defer mu.Unlock()
		conns = append(conns, c)
	}
	wg.Go(func() {
		for {
			caller, err := l.Accept()
			if err != nil {
				return // closed
			}
			keep(caller)
			wg.Go(func() {
				defer caller.Close()
				etcd, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer etcd.Close()
				keep(etcd)
				wg.Go(func() {
					defer caller.Close()
					_, _ = io.Copy(caller, etcd)
				})
				m.requests(etcd, caller)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return m
}

// requests passes the frames of HTTP/2 on. A watch is the request that does not
// end with its first message: the first frame of data has no flag END_STREAM.
func (m *mute) requests(etcd io.Writer, caller io.Reader) {
	preface := make([]byte, 24)
	if _, err := io.ReadFull(caller, preface); err != nil {
		return
	}
	if _, err := etcd.Write(preface); err != nil {
		return
	}
	for silent := false; ; {
		head := make([]byte, 9)
		if _, err := io.ReadFull(caller, head); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(append([]byte{0}, head[:3]...))
		body := make([]byte, size)
		if _, err := io.ReadFull(caller, body); err != nil {
			return
		}
		const data, endStream = 0, 1
		if head[3] == data && size > 0 && head[4]&endStream == 0 && !m.calm.Load() && !silent {
			silent = true
			m.muted.Add(1)
		}
		if silent {
			continue
		}
		if _, err := etcd.Write(append(head, body...)); err != nil {
			return
		}
	}
}
