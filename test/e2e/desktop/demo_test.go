package desktop

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// The demo without a display tells its story, writes what it says it writes, and
// leaves nothing else.
func TestDemo(t *testing.T) {
	t.Parallel()
	// Beside other temporary files, and open to the user that sway runs as.
	tmp, err := os.MkdirTemp("", "demo-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	shots := filepath.Join("..", "..", "..", "bin", "screenshots", "demo")
	if err := os.MkdirAll(shots, 0o755); err != nil {
		shots = t.ArtifactDir()
	}
	c := exec.Command(filepath.Join(programs, "ledger-lab"), "desktop", "--headless", "--for", "2s", "--out", shots)
	c.Env = append(os.Environ(), "TMPDIR="+tmp, "LEDGER_PREFIX=/someone/elses/", "LEDGER_ENDPOINTS=http://127.0.0.1:1")
	out, err := c.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"$ ledger publish", "The block says: ipam batch", "VERIFY FAILED", "no process is left"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output lacks %q", want)
		}
	}
	for _, name := range []string{"bar.png", "bar-later.png", "desktop.png", "bar-tampered.png", "desktop-tampered.png"} {
		b, err := os.ReadFile(filepath.Join(shots, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if i, err := png.Decode(bytes.NewReader(b)); err != nil || i.Bounds().Dx() != 1024 {
			t.Errorf("%s: %v, want a picture 1024 wide", name, err)
		}
		if len(b) > 60<<10 {
			t.Errorf("%s has %d bytes", name, len(b))
		}
	}
	files, err := os.ReadDir(tmp)
	if err != nil || len(files) != 0 {
		t.Errorf("files are left: %v %v", files, err)
	}
	if left := processesWith(t, tmp); left != nil {
		t.Errorf("processes are left: %q", left)
	}
}

// processesWith are those whose environment or command line names something.
func processesWith(t *testing.T, text string) (found []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		// What cannot be read is gone, or another user's.
		env, _ := os.ReadFile(d + "/environ")
		line, _ := os.ReadFile(d + "/cmdline")
		if bytes.Contains(env, []byte(text)) || bytes.Contains(line, []byte(text)) {
			found = append(found, d+" "+string(line))
		}
	}
	return found
}

// On a desktop that is there the demo adds a bar of its own, and takes it away.
func TestDemoOnThisDesktop(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.until(func() error { return w.count("swaybar", 2) })
	c := w.desk.Command("ledger-lab", "desktop", "--for", "1s")
	out := &signalling{want: "The bar stays", seen: make(chan struct{})}
	locked := &logged{t: t, name: "demo"}
	t.Cleanup(locked.stop)
	c.Stdout, c.Stderr = struct{ io.Writer }{out}, locked
	p, err := w.desk.Start(c)
	w.must(err)
	w.until(func() error { return w.count("swaybar", 3) })
	w.until(func() error { // below the twin, which has nothing to say
		i, err := w.picture()
		if err == nil {
			if n := len(colours(rows(i, height-barHeight, height))); n < 12 {
				err = fmt.Errorf("no bar of the demo is drawn: %d colours", n)
			}
		}
		return err
	})
	w.keep("bar")
	w.until(func() error { // it also says what happens when somebody edits an entry
		if p.Ended() {
			return errors.New("the demo has ended")
		}
		i, err := w.picture()
		if err == nil {
			if n := colours(rows(i, height-barHeight, height))[color.RGBA{0x90, 0, 0, 0xff}]; n < 500 {
				err = fmt.Errorf("the demo's bar is not urgent: %d pixels are", n)
			}
		}
		return err
	})
	w.keep("tampered")
	select {
	case <-out.seen:
	case <-p.Done():
	}
	w.must(p.Signal(syscall.SIGINT))
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%s", &out.Buffer)
	w.must(w.count("swaybar", 2))
	w.must(w.count("ledger", 0))
	w.onlyOne()
	if left := stateFiles(t, w); left != nil {
		t.Errorf("the demo left %v among the user's states", left)
	}
}

// count reports that there are not n processes of a program.
func (w *world) count(program string, n int) error {
	if got := w.desk.Processes(program); len(got) != n {
		return fmt.Errorf("%d processes of %s, want %d: %v", len(got), program, n, got)
	}
	return nil
}

// Who interrupts the demo finds nothing left, either.
func TestDemoInterrupted(t *testing.T) {
	t.Parallel()
	tmp, err := os.MkdirTemp("", "demo-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	if err := os.Chmod(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(filepath.Join(programs, "ledger-lab"), "desktop", "--headless", "--for", "1h", "--out", filepath.Join(tmp, "out"))
	c.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "SWAYSOCK=") }), "TMPDIR="+tmp)
	out := &signalling{want: "3. Pods come and go", seen: make(chan struct{})}
	c.Stdout, c.Stderr = struct{ io.Writer }{out}, os.Stderr // without ReadFrom, which passes by Write
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill() }) // it has ended, or the test failed
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	select {
	case <-out.seen:
	case err := <-ended:
		t.Fatalf("ended: %v: %s", err, &out.Buffer)
	}
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-ended
	if got := c.ProcessState.ExitCode(); got != 143 {
		t.Errorf("exit status %d, want 143: %s", got, &out.Buffer)
	}
	if err := os.RemoveAll(filepath.Join(tmp, "out")); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(tmp)
	if err != nil || len(files) != 0 {
		t.Errorf("files are left: %v %v", files, err)
	}
	if left := processesWith(t, tmp); left != nil {
		t.Errorf("processes are left: %q", left)
	}
}

// signalling closes seen when some text was written.
type signalling struct {
	bytes.Buffer // not to be read from before the end
	want         string
	seen         chan struct{}
	done         bool
}

func (s *signalling) Write(b []byte) (int, error) {
	n, err := s.Buffer.Write(b)
	if !s.done && strings.Contains(s.String(), s.want) {
		s.done = true
		close(s.seen)
	}
	return n, err
}
