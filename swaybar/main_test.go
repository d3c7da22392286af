package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc/ipctest"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// The test's own binary is the block, and the commands that clicks run.
func TestMain(m *testing.M) {
	switch os.Getenv("SWAYBAR_TEST") {
	case "block":
		main()
	case "parent": // starts the block as a shell does, and tells its process ID
		cmd := exec.Command(os.Args[0], os.Args[1:]...)
		cmd.Env = append(os.Environ(), "SWAYBAR_TEST=block")
		cmd.Stdin, cmd.Stdout = os.Stdin, os.Stdout
		if err := cmd.Start(); err != nil {
			panic(err)
		}
		fmt.Fprintln(os.Stderr, cmd.Process.Pid)
		select {}
	}
	os.Exit(m.Run())
}

const within = 10 * time.Second

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}

// block is a running ledger-swaybar.
type block struct {
	*exec.Cmd
	t      *testing.T
	stdin  io.WriteCloser
	stdout io.ReadCloser
	lines  chan string
	ended  chan struct{}
	dir    string // $XDG_RUNTIME_DIR
	stderr bytes.Buffer
}

// runBlock starts a block. Settings are NAME=VALUE for its environment.
func runBlock(t *testing.T, sway *ipctest.Sway, config string, args ...string) *block {
	t.Helper()
	b := &block{t: t, lines: make(chan string, 1<<12), ended: make(chan struct{}), dir: t.TempDir()}
	file := filepath.Join(b.dir, "swaybar.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	b.Cmd = exec.Command(os.Args[0], append(args, "--config", file)...)
	b.Env = append(os.Environ(), "SWAYBAR_TEST=block", "XDG_RUNTIME_DIR="+b.dir, "TZ=UTC", "LEDGER_POOL=inherited", "SWAYSOCK=")
	if sway != nil {
		b.Env = append(b.Env, "SWAYSOCK="+sway.Path)
	}
	b.Stderr = &b.stderr
	var err error
	if b.stdin, err = b.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if b.stdout, err = b.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if b.Process != nil {
			_ = b.Process.Kill() // it may have ended
			<-b.ended
		}
	})
	return b
}

func (b *block) start() *block {
	b.t.Helper()
	if err := b.Start(); err != nil {
		b.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(b.stdout); s.Scan(); {
			b.lines <- s.Text()
		}
	}()
	go func() {
		<-read
		_ = b.Wait() // its status is in ProcessState
		close(b.ended)
	}()
	return b
}

// shows waits for a line that contains each of want.
func (b *block) shows(want ...string) string {
	b.t.Helper()
	timeout := time.After(within)
	var last string
	for {
		select {
		case last = <-b.lines:
			if !slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(last, w) }) {
				return last
			}
		case <-timeout:
			b.t.Fatalf("not shown within %s: %q; the last line is %s", within, want, last)
		case <-b.ended:
			b.t.Fatalf("ended: %s%s", b.ProcessState, b.stderr.String())
		}
	}
}

func (b *block) endsAtOnce() {
	b.t.Helper()
	select {
	case <-b.ended:
	case <-time.After(2 * time.Second):
		b.t.Fatal("still there after 2 s")
	}
}

// now is a healthy state of now.
func now() *state.State {
	s := healthy()
	s.At = time.Now()
	s.Verify.At = s.At
	return s
}

func publish(t *testing.T, sway *ipctest.Sway, s *state.State) {
	t.Helper()
	b, err := state.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	sway.Tick(string(b))
}

const verified = "✓"

func TestBlock(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "").start()
	if got := <-b.lines + "\n" + <-b.lines + "\n"; got != i3barHeader {
		t.Errorf("header %q", got)
	}
	b.shows("waiting")
	if got := <-sway.Ticks(); got != string(state.Hello()) {
		t.Errorf("said %q, want hello", got)
	}
	b.shows("no publisher")

	s := now()
	publish(t, sway, s)
	line := b.shows("pods 31/254 12%", verified)
	var blocks []i3barBlock
	if err := json.Unmarshal([]byte(strings.TrimPrefix(line, ",")), &blocks); err != nil {
		t.Errorf("%s: %v", line, err)
	}

	// An older state, one of another program, one too large, and one of a newer
	// version, which says so.
	old := now()
	old.Revision--
	old.Pools[0].Leased = 1
	publish(t, sway, old)
	sway.Tick("reload")
	sway.Tick(strings.Repeat("x", state.MaxSize+1))
	sway.Tick(`{"app":"ipam-ledger","v":2,"type":"state","source":"prod"}`)
	if line := b.shows("update ledger-swaybar"); !strings.Contains(line, "pods 31/254") {
		t.Errorf("beside it the old state is gone: %s", line)
	}

	// Restored: a lower revision, in a higher epoch.
	s = now()
	s.Epoch, s.Revision, s.Pools[0].Leased = 2, 5, 240
	publish(t, sway, s)
	b.shows("pods 240/254 94%", "#ebcb8b")

	s = now()
	s.Epoch, s.Etcd, s.Verify = 2, state.Etcd{Error: "refused"}, state.Verify{Result: state.VerifyFailed, Code: "FORK"}
	publish(t, sway, s)
	b.shows("VERIFY FAILED FORK", "etcd unreachable", `"urgent":true`)

	// Sway goes and comes back at the same socket.
	sway.Kill()
	b.shows("sway lost")
	if err := os.Remove(sway.Path); err != nil {
		t.Fatal(err)
	}
	back := ipctest.StartAt(t, sway.Path)
	if got := <-back.Ticks(); got != string(state.Hello()) {
		t.Errorf("said %q, want hello", got)
	}
	s.At, s.Etcd, s.Verify = time.Now(), state.Etcd{OK: true}, state.Verify{Result: state.VerifyOK, At: time.Now()}
	publish(t, back, s)
	if line := b.shows(verified); strings.Contains(line, "lost") {
		t.Errorf("still lost: %s", line)
	}

	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.endsAtOnce()
	if !b.ProcessState.Success() || b.stderr.Len() > 0 {
		t.Errorf("%s: %s", b.ProcessState, b.stderr.String())
	}
}

// A state of three heartbeats ago is stale without any tick, and a later one
// ends that, even if it looks older.
func TestBlockStale(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "").start()
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	s := now()
	s.Heartbeat, s.Epoch = 1, 9
	publish(t, sway, s)
	b.shows(verified)
	b.shows("stale")
	s = now()
	publish(t, sway, s)
	b.shows(verified)
}

// With a publisher that has left its state in a file the first line has it.
func TestBlockFile(t *testing.T) {
	t.Parallel()
	b := runBlock(t, nil, "", "--source", "prod", "--format", "text")
	if err := os.Mkdir(filepath.Join(b.dir, "ipam-ledger"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string]string{"state.json": "prod", "state-other.json": "other"} {
		s := now()
		s.Source = source
		text, err := state.Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(b.dir, "ipam-ledger", name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.dir, "ipam-ledger", "state-broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.start()
	if line := <-b.lines; !strings.HasPrefix(line, "ipam pods 31/254 12% ↑4 +1 pool "+verified) {
		t.Errorf("first line %q", line)
	}
}

func TestBlockGone(t *testing.T) {
	t.Parallel()
	t.Run("reader", func(t *testing.T) {
		t.Parallel()
		b := runBlock(t, ipctest.Start(t), "")
		b.Stdin, b.Stdout = nil, nil
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		b.Stdout = w
		b.stdout = io.NopCloser(strings.NewReader(""))
		b.start()
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(r)
		for lines.Scan() && !strings.Contains(lines.Text(), "no publisher") {
		}
		// Nothing more will be written for a long time.
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		b.endsAtOnce()
	})
	t.Run("parent", func(t *testing.T) {
		t.Parallel()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		parent := exec.Command(os.Args[0])
		parent.Env = append(os.Environ(), "SWAYBAR_TEST=parent", "SWAYSOCK=", "XDG_RUNTIME_DIR="+t.TempDir())
		parent.Stdout = w
		told, err := parent.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := parent.Start(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		var pid int
		if _, err := fmt.Fscan(told, &pid); err != nil {
			t.Error(err)
		}
		lines := bufio.NewReader(r)
		if _, err := lines.ReadString('\n'); err != nil { // the block is up
			t.Error(err)
		}
		if err := parent.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = parent.Wait() // killed
		done := make(chan struct{})
		go func() {
			_, _ = io.Copy(io.Discard, lines) // until the last writer is gone
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(2 * time.Second):
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Error("still there after 2 s")
		}
	})
}

// A bar that reads nothing does not slow the block down, and gets the newest
// line when it reads again.
func TestBlockSlowBar(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "view = 'pools'", "--format", "text")
	b.lines = make(chan string) // nobody reads
	b.start()
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	s := now()
	for range 2000 {
		s.Revision++
		s.At = time.Now()
		publish(t, sway, s)
	}
	s.Revision++
	s.Pools[0].Leased = 77
	publish(t, sway, s)
	b.shows("pods 77/254")
}

func clickOn(instance string, button int) string {
	b, err := json.Marshal(map[string]any{"name": i3barName, "instance": instance, "button": button, "event": 272, "x": 1, "y": 1})
	if err != nil {
		panic(err)
	}
	return "," + string(b) + "\n"
}

// command is a shell script as TOML.
func command(script string) string {
	b, err := json.Marshal([]string{"/bin/sh", "-c", script})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func TestClicks(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	told := filepath.Join(t.TempDir(), "told")
	tell := func(what string) string {
		return command(fmt.Sprintf(`[ "$(ps -o sid= $$ | tr -d ' ')" = $$ ] || echo no session of its own >>%[2]s; echo "%[1]s $LEDGER_SOURCE ${LEDGER_SPACE-none} ${LEDGER_POOL-none}" >>%[2]s`, what, told))
	}
	b := runBlock(t, sway, fmt.Sprintf("[clicks]\nleft = %s\nmiddle = %s\nright = %s\nresult_seconds = 1\n",
		tell("left"), command(`echo verified; exit $(cat `+told+`.status)`), tell("right"))).start()
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	s := now()
	s.Pools[0].Name = "$(touch x);pods"
	publish(t, sway, s)
	line := b.shows("pods")
	var blocks []i3barBlock
	if err := json.Unmarshal([]byte(strings.TrimPrefix(line, ",")), &blocks); err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if _, err := io.WriteString(b.stdin, text); err != nil {
			t.Fatal(err)
		}
	}
	says := func(want string) {
		t.Helper()
		eventually(t, want, func() bool {
			got, err := os.ReadFile(told)
			return err == nil && strings.HasSuffix(string(got), want+"\n")
		})
	}
	write("[\n" + clickOn(blocks[0].Instance, buttonLeft))
	says("left prod none none")
	write(clickOn(blocks[0].Instance, buttonRight))
	says("right prod default $(touch x);pods")

	verify := func(status string) {
		t.Helper()
		if err := os.WriteFile(told+".status", []byte(status), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(clickEvery) // faster clicks are one
		write(clickOn(blocks[0].Instance, buttonMiddle))
	}
	verify("0")
	b.shows("verifying")
	b.shows("verified now")
	verify("2")
	b.shows("could not verify")
	verify("3")
	b.shows("verified in part")
	verify("1")
	b.shows("VERIFY FAILED", `"urgent":true`)
	s.Verify.At, s.At = time.Now().Add(time.Second), time.Now()
	publish(t, sway, s)
	if line := b.shows(verified); strings.Contains(line, "FAILED") {
		t.Errorf("a later verification is not taken for one: %s", line)
	}

	write(clickOn(blocks[0].Instance, buttonUp))
	b.shows(`"instance":"prod/default/storage"`)
	write(clickOn("prod/default/storage", buttonDown))
	if line := b.shows("+1 pool"); strings.Contains(line, "storage") {
		t.Errorf("scrolled down: %s", line)
	}
	if err := b.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	b.shows("storage")
	if err := os.WriteFile(told+".status", []byte("0"), 0o600); err != nil {
		t.Fatal(err)
	}
	time.Sleep(clickEvery)
	if err := b.Process.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	b.shows("verified now", `"instance":"prod/default/storage"`)
}

func TestClickNotFound(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "[clicks]\nleft = ['no-such-terminal']\nmiddle = ['false']\nright = ['/bin/sh', '-c', 'exit 7']\nverify_seconds = 1\n").start()
	b.shows("no publisher")
	for button, want := range map[int]string{buttonLeft: "no-such-terminal: not found", buttonMiddle: "VERIFY FAILED", buttonRight: "sh: exit status 7"} {
		if _, err := io.WriteString(b.stdin, clickOn("", button)); err != nil {
			t.Fatal(err)
		}
		b.shows(want)
	}
}

// A thousand clicks are read at once, and open few windows; junk among them does
// no harm.
func TestClickFlood(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	told := filepath.Join(t.TempDir(), "told")
	b := runBlock(t, sway, "[clicks]\nleft = "+command("echo x >>"+told+"; exec sleep 60")+"\n").start()
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	began := time.Now()
	if _, err := io.WriteString(b.stdin, "[\n"+strings.Repeat("x", 1<<20)+"\n,{]\n\n,\n"+strings.Repeat(clickOn("", buttonLeft), 1000)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	publish(t, sway, now())
	b.shows(verified)
	eventually(t, "a window", func() bool { _, err := os.Stat(told); return err == nil })
	got, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(got, []byte("x")); n > maxWindows {
		t.Errorf("%d windows", n)
	}
	sleepers, err := exec.Command("pgrep", "-P", fmt.Sprint(b.Process.Pid)).Output()
	if err != nil {
		t.Fatal(err)
	}
	for pid := range strings.FieldsSeq(string(sleepers)) {
		if err := exec.Command("kill", pid).Run(); err != nil {
			t.Error(err)
		}
	}
}

// A verification that hangs is ended, at the latest with the block.
func TestVerifyEnds(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "[clicks]\nmiddle = ['sleep', '60']\nverify_seconds = 1\n").start()
	b.shows("no publisher")
	verify := func() string {
		t.Helper()
		if err := b.Process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		b.shows("verifying")
		var pid []byte
		eventually(t, "a child", func() bool {
			pid, _ = exec.Command("pgrep", "-P", fmt.Sprint(b.Process.Pid)).Output() // status 1: none
			return len(pid) > 0
		})
		return "/proc/" + strings.TrimSpace(string(pid))
	}
	gone := func(child string) {
		t.Helper()
		eventually(t, child+" is gone", func() bool { _, err := os.Stat(child); return err != nil })
	}
	child := verify()
	b.shows("took longer than 1s")
	gone(child)
	child = verify()
	if err := b.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.endsAtOnce()
	gone(child)
}

// A broken configuration is shown: a bar would not start us again.
func TestBrokenConfig(t *testing.T) {
	t.Parallel()
	sway := ipctest.Start(t)
	b := runBlock(t, sway, "[colours]\nnormal = '#000000'\n").start()
	b.shows("unknown key colours")
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	publish(t, sway, now())
	b.shows("unknown key colours", "pods 31/254")
}

// The block knows no etcd, and nothing else it does not need.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	const ours = "github.com/ipam-ledger/ipam-ledger/swaybar"
	allowed := []string{
		ours, ours + "/ipc", ours + "/state",
		"github.com/BurntSushi/toml", "github.com/BurntSushi/toml/internal",
		"github.com/joshuarubin/go-sway", "github.com/joshuarubin/lifecycle",
		"go.uber.org/multierr", "golang.org/x/sync/errgroup", "golang.org/x/sys/unix",
	}
	for path := range strings.FieldsSeq(string(out)) {
		if !slices.Contains(allowed, path) {
			t.Errorf("%s is linked in", path)
		}
	}
}

func TestReadClicks(t *testing.T) {
	var got []click
	readClicks(strings.NewReader("[\n"+clickOn("a", 1)+`{"name":"ipam-ledger","button":3}`+"\n"+clickOn(strings.Repeat("x", 5000), 1)+
		`,{"name":"other","button":1}`+"\n[],\n{}\n"+clickOn("b", 2)+clickOn("cut", 1)[:20]), func(c click) { got = append(got, c) })
	want := []click{{i3barName, "a", 1}, {i3barName, "", 3}, {i3barName, "b", 2}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestEnviron(t *testing.T) {
	base := []string{"HOME=/h", "PATH=/bin", "LEDGER_POOL=old", "LEDGER_SOURCE=old", "LEDGER_ENDPOINTS=x"}
	got := environ(base, "/opt", "prod", "", "a\x00b")
	if want := []string{"HOME=/h", "PATH=/bin:/opt", "LEDGER_ENDPOINTS=x", "LEDGER_SOURCE=prod"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if base[1] != "PATH=/bin" {
		t.Error("the base was changed")
	}
}

func TestAlarm(t *testing.T) {
	a, err := newAlarm()
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	for _, after := range []time.Duration{0, -time.Hour, 20 * time.Millisecond} {
		at := time.Now().Add(after)
		if err := a.set(at); err != nil {
			t.Fatal(err)
		}
		select {
		case <-a.C:
			if early := time.Until(at); early > time.Millisecond {
				t.Errorf("%s too early", early)
			}
		case <-time.After(within):
			t.Fatalf("after %s: no alarm", after)
		}
	}
	if err := a.set(time.Now().Add(30 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if err := a.set(time.Time{}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.C:
		t.Error("an alarm that was taken back")
	case <-time.After(60 * time.Millisecond):
	}
}

// Names that anybody can make up do not push those out that are alive, and do
// not grow without limit.
func TestSources(t *testing.T) {
	c := defaults()
	b := newBar(&c, "", nil)
	at := time.Now()
	send := func(source string) {
		s := now()
		s.Source, s.At = source, at
		b.accept(s, at, false)
	}
	send("prod")
	for i := range 1000 {
		send(fmt.Sprint("forged", i))
	}
	if n := len(b.view.Sources); n != maxSources {
		t.Errorf("%d sources", n)
	}
	names := func() (names []string) {
		for _, s := range b.view.Sources {
			names = append(names, s.State.Source)
		}
		return names
	}
	if got := names(); !slices.Contains(got, "prod") || !slices.IsSorted(got) {
		t.Errorf("sources %q", got)
	}
	at = at.Add(time.Minute)
	send("prod")
	for i := range 5 {
		send(fmt.Sprint("new", i))
	}
	if got := names(); !slices.Contains(got, "prod") || !slices.Contains(got, "new4") || !slices.IsSorted(got) {
		t.Errorf("sources %q", got)
	}
	// Of a file that is stale nothing is shown beside something else.
	old := now()
	old.Source = "history"
	b.accept(old, at.Add(time.Hour), true)
	if got := names(); slices.Contains(got, "history") {
		t.Errorf("sources %q", got)
	}
	at = at.Add(2 * forget)
	send("prod")
	send("last")
	if got := names(); !slices.Equal(got, []string{"last", "prod"}) {
		t.Errorf("sources %q", got)
	}
	b.view.Sources = nil
	b.accept(old, at, true)
	if got := names(); !slices.Equal(got, []string{"history"}) {
		t.Errorf("a stale file, and nothing else: %q", got)
	}
	send("prod")
	if got := names(); !slices.Equal(got, []string{"prod"}) {
		t.Errorf("sources %q", got)
	}
}

// A document that differs in its time alone is not decoded, and comes out the
// same.
func TestRepeated(t *testing.T) {
	s := healthy()
	first, err := state.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	try := func(change func(*state.State)) bool {
		t.Helper()
		again := healthy()
		change(again)
		b, err := state.Encode(again)
		if err != nil {
			t.Fatal(err)
		}
		_, want, err := state.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		got := repeated(first, s, b)
		if got != nil && !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		var h heard
		for _, b := range [][]byte{first, b, b, first} {
			if _, s, err := h.decode(b); err != nil || s.Source == "" {
				t.Errorf("%s: %v", b, err)
			}
		}
		return got != nil
	}
	if !try(func(s *state.State) { s.At = s.At.Add(15*time.Second + 7) }) {
		t.Error("a heartbeat is decoded")
	}
	for i, change := range []func(*state.State){
		func(s *state.State) { s.Source = "prod2" },
		func(s *state.State) { s.Source = `"at":"` },
		func(s *state.State) { s.Revision++ },
		func(s *state.State) { s.Etcd.OK = false },
		func(s *state.State) { s.Pools[1].Leased++ },
		func(s *state.State) { s.Verify.At = s.At },
	} {
		if try(change) {
			t.Errorf("change %d is not decoded", i)
		}
	}
	for _, b := range []string{"", `"at":"`, `"at":""`, string(first[:40]), strings.Replace(string(first), "2026-11", "2026-13", 1)} {
		if repeated(first, s, []byte(b)) != nil {
			t.Errorf("%q is not decoded", b)
		}
	}
}

// A stream that broke without a word is noticed: without heartbeats the block
// connects anew.
func TestWatchdog(t *testing.T) {
	sway := ipctest.Start(t)
	c := defaults()
	b := newBar(&c, "", nil)
	f := &follower{in: b.in, sockets: func() []string { return []string{sway.Path} }, open: openBus, silence: 50 * time.Millisecond}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { f.run(ctx); close(ended) }()
	eventually(t, "subscribed", func() bool { return sway.Subscribers() == 1 })
	sway.Event(ipctest.EventUnknown, []byte("{}")) // what follows is lost
	publish(t, sway, now())
	eventually(t, "another connection", func() bool { return sway.Accepted() >= 2 && sway.Subscribers() == 1 })
	eventually(t, "a state", func() bool { publish(t, sway, now()); return len(b.in.take().states) > 0 })
	cancel()
	<-ended
	eventually(t, "disconnected", func() bool { return sway.Connected() == 0 })
}
