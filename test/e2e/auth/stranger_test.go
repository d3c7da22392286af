package auth

import (
	"context"
	"os"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestStrangers: who is not let in is told under which name he came, and what
// lets him in. A DEL is queued all the same.
func TestStrangers(t *testing.T) {
	t.Parallel()
	c := start(t, "a", "b")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, user := range []string{"idle", "half"} {
		if _, err := c.root.UserAddWithOptions(ctx, user, "", &clientv3.UserAddOptions{NoPassword: true}); err != nil {
			t.Fatal(err)
		}
	}
	// One that may read what an ADD reads, and write nothing.
	if _, err := c.root.UserGrantRole(ctx, "half", "/ipam-ledger/v1/auditor/carol"); err != nil {
		t.Fatal(err)
	}
	c.node("a", "node:a").call("ADD", "c1").ok()

	for _, s := range []struct {
		node, cn string
		want     []string
	}{
		{"x", "node:x", []string{`there is no user "node:x"`, "the name (CN) in ", "'ledger auth apply --node x'"}},
		{"x", "x.example.com", []string{`there is no user "x.example.com"`, "'ledger auth apply --node NODE --cn node/NODE=x.example.com'"}},
		{"x", "idle", []string{`user "idle"`, "has no role", "--cn node/NODE=idle"}},
		{"x", "half", []string{`user "half"`, "has /ipam-ledger/v1/auditor/carol, which does not cover it", "ledger auth plan"}},
		{"b", "node:a", []string{`user "node:a"`, "has /ipam-ledger/v1/node/a, which does not cover it: is this the right user?"}},
		{"x", "", []string{"has no name (CN), which is etcd's user"}},
	} {
		n := c.node(s.node, s.cn)
		want := append([]string{"etcd's roles do not allow this"}, s.want...)
		add := n.call("ADD", "c2")
		if add.refused(11, want...); strings.Contains(add.stdout, "cannot be reached") {
			t.Errorf("%s: etcd was reached, and it is said that it was not: %s", s.cn, add.stdout)
		}
		n.call("DEL", "c2").ok()
		if s.cn != "half" { // who sees all, and so that there is nothing to release
			if n.queue() != 1 {
				t.Errorf("%s: %d releases wait, want 1", s.cn, n.queue())
			}
			n.call("STATUS", "").refused(50, want[0])
			c.ledger(s.cn, "show").fails(2).says(want[:2]...).says("'ledger auth --help' says what each role may do")
			c.ledger(s.cn, "verify").fails(2).says(want[:2]...)
		}
		if s.node == "x" && s.cn != "half" {
			n.own("doctor").fails(1).says("FAIL", s.want[0])
		}
		if err := os.RemoveAll(n.state); err != nil {
			t.Fatal(err)
		}
	}

	// Let in, it works.
	x := c.node("x", "x.example.com")
	x.call("ADD", "c3").refused(11)
	c.ledger("root", "auth", "apply", "--yes", "--cn", "node/x=x.example.com").ok()
	x.call("ADD", "c3").ok()

	// By name and password, too, though certificates are what this is made for.
	if _, err := c.root.UserAdd(ctx, "y", "secret"); err != nil {
		t.Fatal(err)
	}
	c.ledger("root", "auth", "apply", "--yes", "--cn", "node/y=y").ok()
	word := func(w string) string {
		file := t.TempDir() + "/password"
		if err := os.WriteFile(file, []byte(w+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	c.ledger("nobody", "show", "--user", "y", "--password-file", word("wrong")).fails(2).says("does not accept")
	c.ledger("nobody", "show", "--user", "y", "--password-file", word("secret")).fails(2).says(`user "y" (by name and password) has /ipam-ledger/v1/node/y`)
}
