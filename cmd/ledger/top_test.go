package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
)

// terminal is a real terminal, kept by tmux, with one program in it.
type terminal struct {
	t      *testing.T
	socket string
}

func (term *terminal) tmux(args ...string) string {
	term.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-S", term.socket, "-f", "/dev/null", "-u"}, args...)...)
	cmd.Env = append(os.Environ(), "TMUX=", "LANG=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		term.t.Fatalf("tmux %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (term *terminal) until(want ...string) string {
	term.t.Helper()
	end := time.Now().Add(30 * time.Second)
	for {
		screen := term.tmux("capture-pane", "-p")
		missing := ""
		for _, w := range want {
			if !strings.Contains(screen, w) {
				missing = w
			}
		}
		switch {
		case missing == "":
			return screen
		case time.Now().After(end):
			term.t.Fatalf("%q does not come:\n%s", missing, screen)
		}
		time.Sleep(20 * time.Millisecond) // tmux does not tell
	}
}

// TestTop: the program in a real terminal, at both sizes, as somebody would
// use it; and it leaves the terminal as it was.
func TestTop(t *testing.T) {
	if _, err := exec.LookPath("tmux"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("tmux is not installed: apt-get install tmux")
		}
		t.Log("tmux is not installed, so that no real terminal was tried (internal/top has the rest): apt-get install tmux")
		return
	}
	e := etcdtest.Start(t)
	l := &lab{dir: t.TempDir(), endpoint: e.Endpoint()}
	commands(t, map[string]string{"LEDGER_ENDPOINTS": e.Endpoint()})(0, "init")
	node := func(args ...string) {
		t.Helper()
		if err := l.onNode(time.Now, args...); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		node(fmt.Sprintf("worker-%d", i%2+1), "add", fmt.Sprintf("pod-%d", i))
	}
	// A socket's path has a limit that test directories may pass.
	dir, err := os.MkdirTemp("", "top")
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t, filepath.Join(dir, "s")}
	t.Cleanup(func() {
		exec.Command("tmux", "-S", term.socket, "kill-server").Run()
		os.RemoveAll(dir)
	})
	run := fmt.Sprintf("LEDGER_ENDPOINTS=%s LEDGER_CONFIG=%s LEDGER_POOL=prod LEDGER_SPACE=default ledger top; echo it ended with $?; exec sleep 1000", e.Endpoint(), empty(t))
	term.tmux("new-session", "-d", "-x", "80", "-y", "24", run)
	screen := term.until("✓ verified", "› default/prod", "10.22.0.0/28", "worker-1", "esc back")
	if n := len(strings.Split(strings.TrimRight(screen, "\n"), "\n")); n != 24 {
		t.Errorf("%d lines at a height of 24:\n%s", n, screen)
	}
	term.tmux("send-keys", "Enter")
	term.until("HISTORY", "shop/pod-0", "never held before")
	term.tmux("resize-window", "-x", "200", "-y", "60")
	term.tmux("send-keys", "1")
	term.until("LAST 5 MIN", "CHAIN/SEQ", "6 leased, 1 pool, 2 nodes")
	node("worker-1", "add", "fresh")
	term.until("shop/fresh", "7 leased")
	term.tmux("send-keys", "q")
	screen = term.until("it ended with 0")
	if strings.Contains(screen, "LAST 5 MIN") {
		t.Errorf("it leaves its picture behind:\n%s", screen)
	}
}

// TestTopRefuses: without a terminal it says what to use instead.
func TestTopRefuses(t *testing.T) {
	ledger := commands(t, map[string]string{"LEDGER_ENDPOINTS": "http://127.0.0.1:1"})
	contains(t, ledger(2, "top"), "ledger top needs a terminal", "'ledger show'")
}
