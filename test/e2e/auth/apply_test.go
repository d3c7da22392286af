package auth

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
)

// TestEnable: authentication is turned on only by who will be able to turn it
// off, and not over the heads of others.
func TestEnable(t *testing.T) {
	t.Parallel()
	c := bare(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	enable := func(cn string, more ...string) *reply {
		t.Helper()
		return c.ledger(cn, append([]string{"auth", "apply", "--enable", "--yes", "--as", "alice"}, more...)...)
	}
	isOn := func() bool {
		t.Helper()
		s, err := c.root.AuthStatus(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s.Enabled
	}
	enable("operator:alice").fails(1).says("authentication stays off", `you are user "operator:alice"`, "you would be shut out")
	enable("").fails(1).says("authentication stays off", `you are user ""`)
	if _, err := c.root.Put(ctx, "/registry/pods/x", "y"); err != nil {
		t.Fatal(err)
	}
	enable("root").fails(1).says("authentication stays off", `"/registry/pods/x"`, "--shared")
	if _, err := c.root.UserRevokeRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	enable("root", "--shared").fails(1).says("no user root with the role root", "etcdctl user grant-role root root")
	if _, err := c.root.UserGrantRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	if isOn() {
		t.Fatal("authentication is on after refusals")
	}
	if len(c.roles()) > 0 {
		t.Errorf("roles %q were made though it was refused", c.roles())
	}
	enable("root", "--shared").ok().says("etcd's authentication is on")
	if !isOn() {
		t.Fatal("authentication is off")
	}
	enable("root").ok().says("nothing to be done")
	c.ledger("operator:alice", "init", "--as", "alice").ok()
	c.ledger("operator:alice", "auth", "apply", "--node", "a", "--yes").fails(1).says("only etcd's root may see and change roles", `"operator:alice"`)

	// Where etcd does not ask for certificates.
	plain := etcdtest.Start(t)
	k := plain.Client(t)
	if _, err := k.UserAdd(ctx, "root", "secret"); err != nil {
		t.Fatal(err)
	}
	if _, err := k.UserGrantRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	cmd := c.ledgerCommand("root", "auth", "apply", "--enable", "--yes", "--as", "alice")
	cmd.Env = slices.DeleteFunc(cmd.Env, func(s string) bool {
		return strings.HasPrefix(s, "LEDGER_C") && !strings.HasPrefix(s, "LEDGER_CONFIG") || strings.HasPrefix(s, "LEDGER_KEY")
	})
	cmd.Args = append(cmd.Args, "--endpoints", plain.Endpoint())
	run(t, cmd).fails(1).says("does not ask clients for a certificate", "--client-cert-auth")
}

func (c *cluster) roles() []string {
	c.Helper()
	r, err := c.root.RoleList(c.Context())
	if err != nil {
		c.Fatal(err)
	}
	return r.Roles
}

// TestRepair: whatever became of the roles, apply makes them what they should be,
// touches nobody else's, and what it takes away is gone at once.
func TestRepair(t *testing.T) {
	t.Parallel()
	c := start(t, "a", "b")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const p = "/ipam-ledger/v1/"
	a, mallory := c.client("node:a"), c.client("mallory")
	must(c.root.RoleAdd(ctx, "foreign"))
	must(c.root.RoleGrantPermission(ctx, "foreign", "/app/", "/app0", clientv3.PermissionType(clientv3.PermReadWrite)))
	must(c.root.UserAddWithOptions(ctx, "mallory", "", &clientv3.UserAddOptions{NoPassword: true}))
	must(c.root.UserGrantRole(ctx, "mallory", "foreign"))
	must(c.root.UserGrantRole(ctx, "mallory", p+"node/b"))
	must(c.root.UserGrantRole(ctx, "node:a", "foreign"))
	must(c.root.RoleAdd(ctx, p+"manager"))
	must(c.root.RoleGrantPermission(ctx, p+"node/a", p, p[:len(p)-1]+"0", clientv3.PermissionType(clientv3.PermReadWrite)))
	must(c.root.RoleGrantPermission(ctx, p+"node/a", p+"meta", "", clientv3.PermissionType(clientv3.PermReadWrite)))
	must(c.root.RoleRevokePermission(ctx, p+"node/a", p+"stops/", p+"stops0"))
	must(c.root.RoleDelete(ctx, p+"auditor/carol"))
	must(a.Get(ctx, p+"chains/node/b/x")) // it sees too much

	c.ledger("root", "auth", "plan", "--auditor", "carol").fails(1).says(
		"~ role  /ipam-ledger/v1/node/a\n      + read       /ipam-ledger/v1/meta\n      + read       /ipam-ledger/v1/stops/*\n      - readwrite  /ipam-ledger/v1/*\n",
		"+ role  /ipam-ledger/v1/auditor/carol\n~ user  auditor:carol\n      + role  /ipam-ledger/v1/auditor/carol\n",
		`! user "node:a", who is node/a, also has role "foreign", which is none of this ledger's: it is left alone`,
		`! role "/ipam-ledger/v1/node/b" is had by "mallory", "node:b": all can act as node/b`,
		`! role "/ipam-ledger/v1/manager" has a name of this ledger's and is none of its kinds: it is left alone`,
	)
	must(mallory.Get(ctx, p+"meta")) // mallory is node b so far
	c.ledger("root", "auth", "apply", "--auditor", "carol", "--cn", "node/b=node:b", "--yes").ok()
	c.ledger("root", "auth", "plan", "--auditor", "carol").ok().says("0 changes to be made")
	if _, err := a.Get(ctx, p+"chains/node/b/x"); !denied(err) {
		t.Errorf("node a reads b's chain after the repair: %v", err)
	}
	if _, err := a.Put(ctx, p+"meta", "x"); !denied(err) {
		t.Errorf("node a writes meta after the repair: %v", err)
	}
	if _, err := mallory.Get(ctx, p+"meta"); !denied(err) {
		t.Errorf("mallory is node b after the repair: %v", err)
	}
	must(mallory.Put(ctx, "/app/x", "y"))
	must(a.Put(ctx, "/app/x", "z"))
	if got := strings.Join(c.roles(), " "); !strings.Contains(got, "foreign") || !strings.Contains(got, p+"manager") {
		t.Errorf("others' roles are gone: %s", got)
	}

	// Another ledger in the same etcd.
	c.ledger("root", "auth", "apply", "--prefix", "/other/v1/", "--node", "a", "--yes").ok()
	if _, err := a.Get(ctx, "/other/v1/meta"); err != nil {
		t.Errorf("node a of the other ledger cannot read it: %v", err)
	}
	c.ledger("root", "auth", "revoke", "--prefix", "/other/v1/", "node/a", "--yes").ok().says(`user "node:a" keeps`)
	if _, err := a.Get(ctx, "/other/v1/meta"); !denied(err) {
		t.Errorf("the role is revoked and works: %v", err)
	}

	// Taken away, on a connection that stands.
	must(a.Get(ctx, p+"meta"))
	must(c.root.UserRevokeRole(ctx, "node:a", "foreign"))
	c.ledger("root", "auth", "revoke", "node/a", "--yes").ok()
	if _, err := a.Get(ctx, p+"meta"); !denied(err) {
		t.Errorf("node a is let in after revoke: %v", err)
	}
}

// TestRoleChangesUnderLoad: roles change all the time while nodes allocate, and
// nobody notices: what etcd refuses because roles changed meanwhile is sent again.
func TestRoleChangesUnderLoad(t *testing.T) {
	nodes := []string{"a", "b", "c", "d"}
	c := start(t, nodes...)
	refusals := staleRefusals(t)
	const pods, changes = 12, 300
	var work sync.WaitGroup
	var done atomic.Bool
	for _, name := range nodes {
		n := c.node(name, "node:"+name)
		work.Go(func() {
			for i := range pods {
				if r := n.call("ADD", fmt.Sprint("c", i)); r.exit != 0 {
					t.Errorf("%s: %s%s", r.what, r.stdout, r.stderr)
				}
				if i%3 == 0 {
					if r := n.call("DEL", fmt.Sprint("c", i)); r.exit != 0 || n.queue() > 0 {
						t.Errorf("%s: %d releases wait\n%s%s", r.what, n.queue(), r.stdout, r.stderr)
					}
				}
			}
		})
	}
	finished := make(chan struct{})
	go func() {
		work.Wait()
		done.Store(true)
		close(finished)
	}()
	// Changes of one role count for everybody: the revision is one for all.
	made := 0
	const p = "/ipam-ledger/v1/"
	for ; made < changes || !done.Load(); made++ {
		mode := clientv3.PermissionType(clientv3.PermReadWrite)
		if made%2 == 0 {
			mode = clientv3.PermissionType(clientv3.PermRead)
		}
		if _, err := c.root.RoleGrantPermission(t.Context(), p+"auditor/carol", p, p[:len(p)-1]+"0", mode); err != nil {
			t.Fatalf("change %d: %v", made, err)
		}
		if made%100 == 50 { // and as operators make them
			c.ledger("root", "auth", "apply", "--yes", "--node", fmt.Sprint("joins-", made)).ok()
		}
	}
	<-finished
	refusals = staleRefusals(t) - refusals
	t.Logf("%d role changes, %d pods added, %v requests refused as stale and sent again", made, pods*len(nodes), refusals)
	if refusals == 0 {
		t.Errorf("etcd refused nothing as stale in %d changes: nothing was tested", made)
	}
	c.ledger("root", "auth", "apply", "--yes").ok()
	if n := c.count(keys.Attachments()); n != int64(len(nodes)*pods*2/3) {
		t.Errorf("%d attachments, want %d", n, len(nodes)*pods*2/3)
	}
}

// staleRefusals counts the transactions that etcd refused as invalid, which a
// request is whose user's roles changed while it was under way.
func staleRefusals(t *testing.T) (n float64) {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			of := map[string]string{}
			for _, l := range m.GetLabel() {
				of[l.GetName()] = l.GetValue()
			}
			if of["grpc_method"] == "Txn" && of["grpc_code"] == "InvalidArgument" {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}
