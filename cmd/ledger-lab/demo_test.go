package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// programs is where the programs that the demo runs were built.
var programs string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ledger-lab-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs = dir
	const module = "github.com/ipam-ledger/ipam-ledger/"
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/",
		module+"plugins/ipam-ledger", module+"cmd/ledger", module+"cmd/ledger-lab",
		"github.com/containernetworking/plugins/plugins/main/bridge")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %v\n%s", build, err, out)
		return 1
	}
	return m.Run()
}

// surroundings are what the lab must leave as they were.
type surroundings struct{ interfaces, mounts, namespaces, running, files []string }

func look(t *testing.T, tmp string) surroundings {
	t.Helper()
	var s surroundings
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		s.interfaces = append(s.interfaces, l.Name)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " nsfs ") {
			s.mounts = append(s.mounts, line)
		}
	}
	// Namespaces that this process holds: by a descriptor, or a thread in one.
	held := map[string]bool{}
	for _, pattern := range []string{"/proc/self/fd/*", "/proc/self/task/*/ns/net"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			if to, err := os.Readlink(p); err == nil && strings.HasPrefix(to, "net:[") {
				held[to] = true
			}
		}
	}
	for n := range held {
		s.namespaces = append(s.namespaces, n)
	}
	slices.Sort(s.namespaces)
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range exes {
		if to, err := os.Readlink(e); err == nil && strings.HasPrefix(to, programs+"/") {
			s.running = append(s.running, e+" "+to)
		}
	}
	entries, err := os.ReadDir(tmp)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		s.files = append(s.files, e.Name())
	}
	return s
}

// nothingLeft gives the lab a directory for its files, and returns a function
// that fails the test unless everything is as it was before.
func nothingLeft(t *testing.T) (check func()) {
	t.Helper()
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	before := look(t, tmp)
	return func() {
		t.Helper()
		after := look(t, tmp)
		for _, c := range []struct {
			what          string
			before, after []string
		}{
			{"interfaces", before.interfaces, after.interfaces},
			{"mounts of namespaces", before.mounts, after.mounts},
			{"namespaces held", before.namespaces, after.namespaces},
			{"processes", before.running, after.running},
			{"files", before.files, after.files},
		} {
			if !slices.Equal(c.before, c.after) {
				t.Errorf("%s were %q, are %q", c.what, c.before, c.after)
			}
		}
	}
}

// kinds are the kinds of lab that this machine can have. Only who may not make
// namespaces gets the direct one alone.
func kinds(t *testing.T) map[string]bool {
	t.Helper()
	k := map[string]bool{"direct": true}
	if err := whyNoNamespaces(); err == nil {
		k["namespaces"] = false
	} else if os.Getenv("CI") == "true" {
		t.Fatalf("no network namespaces, which CI=true does not excuse: %v", err)
	}
	return k
}

func TestDemo(t *testing.T) {
	for name, direct := range kinds(t) {
		t.Run(name, func(t *testing.T) {
			check := nothingLeft(t)
			// Somebody's real cluster must not be drawn in.
			t.Setenv("LEDGER_PREFIX", "/someone/elses/")
			t.Setenv("LEDGER_ENDPOINTS", "http://127.0.0.1:1")
			t.Setenv("ETCDCTL_USER", "root:secret")
			var out bytes.Buffer
			err := demo(t.Context(), options{bin: programs, direct: direct, out: &out})
			t.Logf("%s", &out)
			if err != nil {
				t.Fatal(err)
			}
			check()
			for _, want := range []string{
				"none twice", "$ ledger init", "$ ledger show", "$ ledger ip 10.22.0.",
				"$ ledger log", "$ ledger verify", "exit status 1, as it should be", "is left.",
			} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the output lacks %q", want)
				}
			}
			if n := strings.Count(out.String(), "\n   Proves: "); n != 8 {
				t.Errorf("%d steps say what they prove, want 8", n)
			}
			if strings.Contains(out.String(), "\x1b[") {
				t.Error("colours without a terminal")
			}
		})
	}
}

// However the demo ends, it cleans up.
func TestDemoCleansUp(t *testing.T) {
	errTest := errors.New("a test wants this step to fail")
	for name, direct := range kinds(t) {
		for _, end := range []struct {
			name string
			step int
			run  func(cancel context.CancelCauseFunc) error
			want string
		}{
			{"failure", 1, func(context.CancelCauseFunc) error { return errTest }, "step 1: " + errTest.Error()},
			{"panic", 2, func(context.CancelCauseFunc) error { panic("a test panics") }, "step 2: panic: a test panics"},
			{"interrupt", 4, func(cancel context.CancelCauseFunc) error {
				cancel(interrupted{syscall.SIGINT})
				return nil
			}, "interrupted: interrupt"},
		} {
			t.Run(name+"/"+end.name, func(t *testing.T) {
				check := nothingLeft(t)
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				var out bytes.Buffer
				err := demo(ctx, options{bin: programs, direct: direct, out: &out, after: func(step int) error {
					if step != end.step {
						return nil
					}
					return end.run(cancel)
				}})
				if err == nil || !strings.Contains(err.Error(), end.want) {
					t.Errorf("error %v, want %q", err, end.want)
				}
				if strings.Contains(out.String(), "is left.") {
					t.Error("says goodbye as if all was well")
				}
				check()
			})
		}
	}
}

// A namespace whose function panics is left and can still be closed.
func TestPanicInNamespace(t *testing.T) {
	if kinds(t)["direct"] && len(kinds(t)) == 1 {
		t.Log("no network namespaces here")
		return
	}
	check := nothingLeft(t)
	n, err := newNetns()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.do(func() error { panic("inside") }); err == nil || !strings.Contains(err.Error(), "panic: inside") {
		t.Errorf("error %v", err)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
	check()
}

// process is a ledger-lab that runs.
type process struct {
	cmd   *exec.Cmd
	lines chan string
	errs  bytes.Buffer
}

func start(t *testing.T, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(filepath.Join(programs, "ledger-lab"), args...), lines: make(chan string, 1000)}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.Stderr = &p.errs
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(p.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
	})
	t.Cleanup(func() {
		if p.cmd.ProcessState == nil {
			_ = p.cmd.Process.Kill() // it may have ended by itself
			_ = p.cmd.Wait()         // says that it was killed
		}
		wg.Wait()
	})
	return p
}

// line waits for a line that matches and returns it.
func (p *process) line(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	timeout := time.After(time.Minute)
	for {
		select {
		case l, ok := <-p.lines:
			if !ok {
				_ = p.cmd.Wait() // for the whole of stderr
				t.Fatalf("ended without a line like %q; stderr: %s", pattern, &p.errs)
			}
			if m := re.FindStringSubmatch(l); m != nil {
				return m
			}
		case <-timeout:
			t.Fatalf("no line like %q in a minute", pattern)
		}
	}
}

// end sends a signal and returns the exit status.
func (p *process) end(t *testing.T, s os.Signal) int {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	for range p.lines { // to the end, so that Wait finds the pipe read
	}
	if err := p.cmd.Wait(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}
	return p.cmd.ProcessState.ExitCode()
}

func TestSignals(t *testing.T) {
	for _, c := range []struct {
		name   string
		args   []string
		wait   string
		signal syscall.Signal
		want   int
	}{
		{"interrupted", []string{"demo"}, `^2\. Twelve`, syscall.SIGINT, 130},
		{"terminated", []string{"demo", "--direct"}, `^4\. `, syscall.SIGTERM, 143},
		{"kept", []string{"demo", "--keep"}, `ledger verify  `, syscall.SIGINT, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			check := nothingLeft(t)
			p := start(t, c.args...)
			p.line(t, c.wait)
			if got := p.end(t, c.signal); got != c.want {
				t.Errorf("exit status %d, want %d; stderr: %s", got, c.want, &p.errs)
			}
			check()
		})
	}
}

// Who closes the pipe ends the demo, and it cleans up as always.
func TestClosedPipe(t *testing.T) {
	check := nothingLeft(t)
	c := exec.Command(filepath.Join(programs, "ledger-lab"), "demo", "--direct")
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReaderSize(out, 16).ReadString('\n'); err != nil {
		t.Error(err)
	}
	out.Close()
	if err := c.Wait(); err == nil || c.ProcessState.ExitCode() != 128+int(syscall.SIGPIPE) {
		t.Errorf("ended with %v, want exit status 141", err)
	}
	check()
}

func TestMissingProgram(t *testing.T) {
	check := nothingLeft(t)
	err := demo(t.Context(), options{bin: t.TempDir(), direct: true, out: &bytes.Buffer{}})
	if err == nil || !strings.Contains(err.Error(), "ipam-ledger") || !strings.Contains(err.Error(), "make") {
		t.Errorf("error %v names neither the program nor the remedy", err)
	}
	check()
}

func TestEtcdCommand(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	for _, want := range []string{"", "value"} {
		p := start(t, "etcd", "--dir", dir, "--listen", "127.0.0.1:0")
		endpoint := p.line(t, `^    export LEDGER_ENDPOINTS=(http://127\.0\.0\.1:[0-9]+)$`)[1]
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		r, err := c.Get(ctx, "key")
		if err != nil {
			t.Fatal(err)
		}
		if got := len(r.Kvs) > 0; got != (want != "") {
			t.Errorf("the key is there: %v, want %q", got, want)
		}
		if _, err := c.Put(ctx, "key", "value"); err != nil {
			t.Fatal(err)
		}
		cancel()
		c.Close()
		if got := p.end(t, syscall.SIGTERM); got != 0 {
			t.Errorf("exit status %d, want 0; stderr: %s", got, &p.errs)
		}
	}
}
