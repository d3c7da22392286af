package main

import (
	"bufio"
	"bytes"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
)

// TestRemoveDecidedBefore: two operators look at the same node. The first removes it,
// and it comes back; what the second decided on is gone by then, so his yes ends
// nothing of what the node has got since.
func TestRemoveDecidedBefore(t *testing.T) {
	e := etcdtest.Start(t)
	l := &lab{dir: t.TempDir(), endpoint: e.Endpoint()}
	env := map[string]string{"LEDGER_ENDPOINTS": e.Endpoint()}
	ledger := commands(t, env)
	node := func(args ...string) {
		t.Helper()
		if err := l.onNode(time.Now, args...); err != nil {
			t.Fatal(err)
		}
	}
	ledger(0, "init")
	node("worker-1", "add", "a")

	// Bob is shown pod a, and asked.
	bobs := map[string]string{"LEDGER_ENDPOINTS": e.Endpoint(), "LEDGER_OPERATOR_DIR": filepath.Join(t.TempDir(), "bob")}
	answer, types := io.Pipe()
	asked, talk := io.Pipe()
	var out bytes.Buffer
	code := make(chan int, 1)
	go func() {
		a := &app{in: answer, out: bufio.NewWriter(&out), err: talk, terminalIn: true, now: time.Now, env: func(k string) string { return bobs[k] }}
		code <- a.run(t.Context(), []string{"node", "remove", "worker-1", "--reason", "scrapped", "--as", "bob", "--config", empty(t)})
		talk.Close()
	}()
	said := bufio.NewReader(asked)
	shown, err := said.ReadString('?')
	if err != nil {
		t.Fatal(shown, err)
	}
	contains(t, shown, "shop/a", "pods that still run there keep using their addresses", "remove?")

	// Meanwhile.
	contains(t, ledger(0, "node", "remove", "worker-1", "--reason", "scrapped", "--yes"), "released    1 attachment\n", "worker-1 is removed\n")
	dir := filepath.Join(l.dir, "nodes", "worker-1")
	if err := l.onNode(time.Now, "worker-1", "add", "early"); err == nil || !strings.Contains(err.Error(), "run 'ledger recover node' on it") {
		t.Errorf("a node that was removed: %v", err)
	}
	contains(t, ledger(0, "recover", "node", "--node", "worker-1", "--state-dir", dir), "ended     worker-1/prod/c-a/eth0")
	node("worker-1", "add", "b")

	// Bob says yes.
	go func() { _, _ = types.Write([]byte("y\n")) }()
	rest, err := io.ReadAll(said)
	if got := <-code; got != 1 || err != nil {
		t.Errorf("exit status %d, %v\n%s%s", got, err, &out, rest)
	}
	contains(t, string(rest), "error: conflict: node/worker-1 has come back, on chain ", "look again")
	contains(t, out.String(), "released    0 attachments\n", "given back  0 blocks\n")
	if strings.Contains(out.String(), "is removed") {
		t.Errorf("it says that it did it:\n%s", &out)
	}
	contains(t, ledger(0, "show", "--leases", "--blocks"), "shop/b", "default/prod/10.22.0.0/28")
	node("worker-1", "add", "c")
	contains(t, ledger(0, "verify"), "verified")
}
