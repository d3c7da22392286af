package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
)

// TestFollow: log --follow shows what is committed, each entry once, also over
// a lost connection and over a compaction of what it has not seen yet.
func TestFollow(t *testing.T) {
	l := &lab{dir: t.TempDir()}
	var err error
	if l.member, err = etcdmember.Start(etcdmember.Options{Dir: filepath.Join(l.dir, "etcd"), NoFsync: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	env := map[string]string{"LEDGER_ENDPOINTS": l.member.Endpoint(), "LEDGER_OPERATOR_DIR": filepath.Join(l.dir, "operator")}
	command := func(ctx context.Context, out, talk io.Writer, args ...string) int {
		a := &app{in: strings.NewReader(""), out: bufio.NewWriter(out), err: talk, now: time.Now, env: func(k string) string { return env[k] }}
		return a.run(ctx, args)
	}
	node := func(args ...string) {
		t.Helper()
		if err := l.onNode(time.Now, args...); err != nil {
			t.Fatal(err)
		}
	}
	var talk strings.Builder
	if code := command(t.Context(), io.Discard, &talk, "init", "--as", "alice"); code != 0 {
		t.Fatal(code, talk.String())
	}
	node("worker-1", "add", "a")
	node("worker-1", "add", "b")

	ctx, cancel := context.WithCancelCause(t.Context())
	r, w := io.Pipe()
	ended := make(chan int, 1)
	said := &strings.Builder{}
	go func() {
		ended <- command(ctx, w, said, "log", "--follow", "-n", "1", "-o", "json", "--op", "acquire,release", "--timeout", "2s")
		w.Close()
	}()
	lines := bufio.NewScanner(r)
	next := func(op, pod string) {
		t.Helper()
		if !lines.Scan() {
			t.Fatalf("it ended where %s of %s is due: %s", op, pod, said)
		}
		var e logged
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if string(e.Op) != op || e.Pod != "shop/"+pod || e.Bad != "" {
			t.Fatalf("got %s of %s (%s), want %s of %s", e.Op, e.Pod, e.Bad, op, pod)
		}
	}
	next("acquire", "b")
	node("worker-1", "add", "c")
	next("acquire", "c")
	node("worker-2", "add", "d") // a chain that was not there
	next("acquire", "d")

	// While it is away entries are committed, and etcd compacts them.
	l.member.Stop()
	if err := l.member.Restart(); err != nil {
		t.Fatal(err)
	}
	node("worker-1", "del", "a")
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{l.member.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	g, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Compact(t.Context(), g.Header.Revision); err != nil {
		t.Fatal(err)
	}
	node("worker-2", "del", "d")
	next("release", "a")
	next("release", "d")
	node("worker-1", "add", "e")
	next("acquire", "e")

	cancel(nil)
	if code := <-ended; code != 0 {
		t.Errorf("exit status %d: %s", code, said)
	}
	if lines.Scan() {
		t.Errorf("one line more: %s", lines.Text())
	}
}
