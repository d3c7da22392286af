package main

import (
	"bufio"
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
)

// commands returns what runs a command in this process, as alice.
func commands(t *testing.T, env map[string]string) func(want int, args ...string) string {
	env["LEDGER_OPERATOR_DIR"] = filepath.Join(t.TempDir(), "operator")
	return func(want int, args ...string) string {
		t.Helper()
		var both bytes.Buffer
		a := &app{in: strings.NewReader(""), out: bufio.NewWriter(&both), err: &both, now: time.Now, env: func(k string) string { return env[k] }}
		if code := a.run(t.Context(), append(args, "--as", "alice", "--config", empty(t))); code != want {
			t.Errorf("ledger %q: exit status %d, want %d\n%s", args, code, want, &both)
		}
		return both.String()
	}
}

func empty(t *testing.T) string {
	file := filepath.Join(t.TempDir(), "config.json")
	if err := writePrivate(file, "{}"); err != nil {
		t.Fatal(err)
	}
	return file
}

func contains(t *testing.T, out string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%q is not in\n%s", w, out)
		}
	}
}

// TestTLS: with the right files all goes well, and what is wrong with others is
// named, not "context deadline exceeded".
func TestTLS(t *testing.T) {
	e, files := etcdtest.StartTLS(t)
	_, strangers := etcdtest.StartTLS(t)
	env := map[string]string{"LEDGER_ENDPOINTS": e.Endpoint(), "LEDGER_CACERT": files.CA, "LEDGER_CERT": files.Cert, "LEDGER_KEY": files.Key}
	ledger := commands(t, env)
	ledger(0, "init")
	contains(t, ledger(0, "doctor"), "connected in", "certificate valid until", "client certificate")
	contains(t, ledger(0, "show", "--leases"), "running")
	contains(t, ledger(0, "verify"), "verified")

	env["LEDGER_CACERT"] = strangers.CA
	contains(t, ledger(1, "doctor"), "FAIL endpoint", "TLS: etcd's certificate is not signed by "+strangers.CA)
	contains(t, ledger(2, "freeze", "--reason", "x"), "error: etcd cannot be reached", "TLS: etcd's certificate is not signed by")
	env["LEDGER_CACERT"] = files.CA
	env["LEDGER_CERT"], env["LEDGER_KEY"] = strangers.Cert, strangers.Key
	contains(t, ledger(1, "doctor"), "FAIL endpoint", "TLS: etcd refuses client certificate "+strangers.Cert)
	env["LEDGER_CERT"], env["LEDGER_KEY"] = "", ""
	contains(t, ledger(2, "verify"), "which has no certificate (certFile is not set)")
	contains(t, ledger(2, "show", "--cacert", filepath.Join(t.TempDir(), "missing")), "--cacert: cannot read")
	delete(env, "LEDGER_CACERT")
	contains(t, ledger(2, "show", "--endpoints", strings.Replace(e.Endpoint(), "https", "http", 1), "--timeout", "1s"), "error: ")
}

// TestNoSpace: a full etcd is named by its cause, by all who meet it.
func TestNoSpace(t *testing.T) {
	e := etcdtest.Start(t, func(o *etcdmember.Options) { o.Quota = 4 << 20 })
	ledger := commands(t, map[string]string{"LEDGER_ENDPOINTS": e.Endpoint()})
	ledger(0, "init")
	c := e.Client(t)
	for i := 0; ; i++ {
		_, err := c.Put(t.Context(), "filler", strings.Repeat("x", 1<<20))
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if err != nil || i > 100 {
			t.Fatal(i, err)
		}
	}
	contains(t, ledger(2, "freeze", "--reason", "x"), "out of space (alarm NOSPACE)", "etcdctl alarm disarm")
	contains(t, ledger(1, "doctor"), "FAIL alarm", "NOSPACE")
	contains(t, ledger(0, "show"), "ALARM", "of the quota of 4.0 MiB")
	contains(t, ledger(0, "verify"), "verified")
}

// TestGrowth: days left come from the last day's entries of all chains.
func TestGrowth(t *testing.T) {
	e := etcdtest.Start(t)
	l := &lab{dir: t.TempDir()}
	env := map[string]string{"LEDGER_ENDPOINTS": e.Endpoint()}
	ledger := commands(t, env)
	ledger(0, "init")
	l.endpoint = e.Endpoint()
	at := func(ago time.Duration) func() time.Time {
		start := time.Now().Add(-ago)
		return func() time.Time { return start }
	}
	for i, ago := range []time.Duration{72 * time.Hour, 48 * time.Hour, 25 * time.Hour, 23 * time.Hour, 2 * time.Hour, time.Minute} {
		for _, node := range []string{"worker-1", "worker-2"} {
			if err := l.onNode(at(ago), node, "add", string(rune('a'+i))); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Three of each node, and the operator's two, are of the last day.
	contains(t, ledger(0, "show", "-o", "json"), `"entriesPerDay": 8,`, `"daysLeft": `)
	contains(t, ledger(0, "show"), "at the rate of the last day")
}
