package auth

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestNodesLife: all that a node ever does, it does by its role alone.
func TestNodesLife(t *testing.T) {
	t.Parallel()
	c := start(t, "a", "b")
	a, b := c.node("a", "node:a"), c.node("b", "node:b")

	// The verbs.
	added := a.call("ADD", "c1").ok()
	if again := a.call("ADD", "c1").ok(); again.stdout != added.stdout {
		t.Errorf("ADD again: %s, was %s", again.stdout, added.stdout)
	}
	b.call("ADD", "c1").ok()
	a.call("CHECK", "c1", `"prevResult": `+added.stdout).ok()
	a.call("STATUS", "").ok()
	a.call("ADD", "c2").ok()
	a.call("GC", "", `"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]`).ok()
	if n := c.count(keys.NodeAttachments("a")); n != 1 {
		t.Errorf("%d attachments after GC, want 1", n)
	}
	a.call("DEL", "c1").ok()
	a.call("DEL", "c1").ok() // which finds nothing
	for i := range 20 {      // beyond its first block
		a.call("ADD", fmt.Sprint("more", i)).ok()
	}

	// A named pool, which an operator's client put there.
	alice := c.client("operator:alice")
	if _, err := alice.Put(t.Context(), keys.Pool("prod"), `{"ranges":[[{"subnet":"10.30.0.0/24","rangeStart":"10.30.0.2","rangeEnd":"10.30.0.200"}]]}`); err != nil {
		t.Fatal(err)
	}
	a.pool = "prod"
	a.call("ADD", "named").ok().says("10.30.0.2/24")
	a.call("DEL", "named").ok()
	a.pool = ""
	if _, err := alice.Delete(t.Context(), keys.Pool("prod")); err != nil { // it is on no record
		t.Fatal(err)
	}

	// What host-local knew.
	dir := filepath.Join(c.dir, "host-local")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "10.22.9.9"), []byte("old\r\neth0"), 0o644); err != nil {
		t.Fatal(err)
	}
	a.own("import", "host-local", dir, "--network", "net", "--subnet", "10.22.0.0/16").ok().says("1 attachment imported")

	// A release that waits; settled by 'queue flush', and by a verb.
	for _, settle := range []func(){
		func() { a.own("queue", "flush").ok().says("1 release settled") },
		func() { a.call("ADD", "next").ok() },
	} {
		a.call("ADD", "late").ok()
		c.etcd.Stop()
		a.call("DEL", "late").ok()
		if a.queue() != 1 {
			t.Errorf("%d releases wait, want 1", a.queue())
		}
		c.etcd.Restart(t)
		settle()
		if a.queue() != 0 {
			t.Errorf("%d releases wait on, want none", a.queue())
		}
	}

	// What the runtime does not know is freed.
	a.call("ADD", "leaked").ok()
	runs := filepath.Join(c.dir, "runs")
	for range 2 {
		if err := os.WriteFile(runs, []byte("next\nold\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// To the nanosecond; by itself it has the kernel's last tick.
		if err := os.Chtimes(runs, time.Time{}, time.Now()); err != nil {
			t.Fatal(err)
		}
		a.own("gc", "--containers", runs, "--all", "--grace", "0s", "--yes").ok()
	}
	if n := c.count(keys.NodeAttachments("a")); n != 2 {
		t.Errorf("%d attachments after gc, want 2", n)
	}

	// doctor sees what the node may see, and says that there is more.
	c.etcd.Restart(t) // so that no process of before holds anything
	a.own("doctor").ok().says("ok   role", "node/a: other nodes' attachments and chains are left out", "ok   holdings", "ok   chain")

	// etcd goes back: the node says so to all, and comes back.
	snapshot := filepath.Join(c.dir, "snapshot")
	c.etcd.Snapshot(t, snapshot)
	a.call("ADD", "lost").ok()
	c.etcd.Restore(t, snapshot, true)
	a.call("ADD", "x").refused(104, "gone back in time")
	if n := c.count(keys.Stop("a")); n != 1 {
		t.Errorf("%d stops of a, want 1", n)
	}
	b.call("ADD", "x").refused(104)
	c.ledger("operator:alice", "recover", "start", "--reason", "restored", "--as", "alice").ok()
	a.own("recover", "node").ok().says("1 put back")
	b.own("recover", "node").ok()
	list := filepath.Join(c.dir, "nodes")
	if err := os.WriteFile(list, []byte("a\nb\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.ledger("operator:alice", "thaw", "--nodes", list, "--as", "alice").ok()
	a.call("ADD", "x").ok()
	b.call("ADD", "x").ok()
}

// TestOperatorsCommands: all that operators do, they do by their role alone, and
// nothing of it by a node's or an auditor's.
func TestOperatorsCommands(t *testing.T) {
	t.Parallel()
	c := start(t, "a", "b")
	c.ledger("root", "auth", "apply", "--yes", "--operator", "bob").ok()
	alice := func(args ...string) *reply {
		t.Helper()
		return c.ledger("operator:alice", append(args, "--as", "alice")...)
	}
	a, b := c.node("a", "node:a"), c.node("b", "node:b")
	a.call("ADD", "c1").ok()
	a.call("ADD", "c2").ok()
	b.call("ADD", "c1").ok()

	for _, who := range []string{"auditor:carol", "node:a"} {
		c.ledger(who, "freeze", "--reason", "x", "--as", "eve").fails(2).says("etcd's roles do not allow this", fmt.Sprintf("%q", who))
	}
	alice("init").ok().says("nothing was changed")
	alice("freeze", "--reason", "x").ok()
	a.call("ADD", "c3").refused(104, "frozen")
	alice("thaw").ok()
	alice("release", "10.22.0.1", "--yes", "--reason", "x").fails(1)
	alice("release", "--attachment", "a/net/c1/eth0", "--yes", "--reason", "x").ok()
	alice("release", "--attachment", "a/net/c2/eth0", "--yes", "--reason", "x").ok()
	alice("unclaim", "default/net/10.22.0.0/28", "--reason", "x").ok()
	a.call("ADD", "c4").ok()

	// Who lost his state is let in again by another.
	if err := os.RemoveAll(b.state); err != nil {
		t.Fatal(err)
	}
	b.call("ADD", "c5").refused(104, "ledger node replace b")
	alice("node", "replace", "b", "--reason", "x").ok()
	b.call("ADD", "c5").ok()
	c.ledger("operator:bob", "freeze", "--reason", "x", "--as", "bob").ok()
	if err := os.RemoveAll(filepath.Join(c.dir, "state of bob")); err != nil {
		t.Fatal(err)
	}
	c.ledger("operator:bob", "thaw", "--as", "bob").fails(1).says("--operator bob")
	alice("node", "replace", "--operator", "bob", "--reason", "x").ok()
	c.ledger("operator:bob", "thaw", "--as", "bob").ok()

	// Nobody writes under another's name: the role covers one chain.
	c.ledger("operator:bob", "freeze", "--reason", "x", "--as", "mallory").fails(2).says("etcd's roles do not allow this", `user "operator:bob"`, "which does not cover it")

	// A pod that the cluster does not know. This one bears no UID, and stays.
	pods := filepath.Join(c.dir, "pods.json")
	if err := os.WriteFile(pods, []byte(`{"kind": "PodList", "items": [{"metadata": {"name": "x", "namespace": "y", "uid": "z"}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	alice("gc", "--pods", pods, "--grace", "0s", "--yes").ok()

	// A node that never comes back.
	alice("node", "list").ok().says("a", "b")
	alice("node", "remove", "b", "--reason", "burnt down", "--yes").ok()
	c.ledger("root", "auth", "revoke", "node/b", "--yes").ok().says("- role  /ipam-ledger/v1/node/b", "- user  node:b")
	b.call("ADD", "c6").refused(11, `there is no user "node:b"`, "ledger auth apply --node b")
	c.ledger("root", "auth", "plan").ok().says("0 changes to be made")
}

// TestAuditor: an auditor sees everything, by every command that looks.
func TestAuditor(t *testing.T) {
	t.Parallel()
	c := start(t, "a")
	a := c.node("a", "node:a")
	a.call("ADD", "c1").ok()
	carol := func(args ...string) *reply {
		t.Helper()
		return c.ledger("auditor:carol", args...).ok()
	}
	carol("verify", "--all-signatures").says("verified")
	carol("show", "--blocks", "--leases").says("10.22.0.2", "default/net/10.22.0.0/28")
	carol("log").says("acquire")
	carol("ip", "10.22.0.2").says("c1")
	carol("doctor", "--state-dir", a.state, "--node", "a").says("ok   ledger", "ok   chain")
	carol("keys", "export").says("node/a")
	file := filepath.Join(c.dir, "export")
	carol("export", file)
	carol("verify", "--from", file).says("verified")
	c.ledger("auditor:carol", "auth", "plan").fails(1).says("only etcd's root may see and change roles", `you are user "auditor:carol"`)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	p := c.ledgerCommand("auditor:carol", "publish", "--print", "--heartbeat", "1s")
	f := c.ledgerCommand("auditor:carol", "log", "--follow", "-o", "json")
	for _, x := range []struct {
		cmd  *exec.Cmd
		want string
	}{{p, `"verify":{"result":"ok"`}, {f, "c-followed"}} {
		x.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := x.cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		x.cmd.Stderr = &said
		if err := x.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop := context.AfterFunc(ctx, func() { x.cmd.Process.Kill() })
		if x.cmd == f {
			a.call("ADD", "c-followed").ok()
		}
		found := false
		for s := bufio.NewScanner(out); !found && s.Scan(); {
			found = strings.Contains(s.Text(), x.want)
		}
		stop()
		_ = x.cmd.Process.Kill()
		_ = x.cmd.Wait()
		if !found {
			t.Errorf("%v never said %s:\n%s", x.cmd.Args, x.want, said.String())
		}
	}
}
