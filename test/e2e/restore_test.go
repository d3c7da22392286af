package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// runtimes is what the runtimes of all nodes know: which pod has which address.
type runtimes struct {
	*cluster
	w    network
	pods map[string]string // "node/container": address
}

func (r *runtimes) add(n *node, container string, env ...string) string {
	r.t.Helper()
	ips := n.call("ADD", container, r.w, env...).ips()
	pod := n.name + "/" + container
	for other, ip := range r.pods {
		if ip == ips[0] && other != pod {
			r.t.Errorf("%s was given to %s while %s has it", ip, pod, other)
		}
	}
	if had := r.pods[pod]; had != "" && had != ips[0] {
		r.t.Errorf("%s had %s, and now has %s", pod, had, ips[0])
	}
	r.pods[pod] = ips[0]
	return ips[0]
}

func (r *runtimes) del(n *node, container string) {
	r.t.Helper()
	n.call("DEL", container, r.w).ok()
	delete(r.pods, n.name+"/"+container)
}

// agree checks that etcd holds exactly what pods have.
func (r *runtimes) agree(besides ...string) {
	r.t.Helper()
	etcd := map[string]string{}
	for ip, id := range r.leased() {
		if !slices.Contains(besides, id.Node) {
			etcd[id.Node+"/"+id.Container] = ip.String() + "/24"
		}
	}
	pods := maps.Clone(r.pods)
	maps.DeleteFunc(pods, func(pod, _ string) bool {
		return slices.Contains(besides, strings.Split(pod, "/")[0])
	})
	if !maps.Equal(etcd, pods) {
		r.t.Errorf("etcd has %v, and pods %v", etcd, pods)
	}
}

// interrupted runs a command with a few kills half way, then to its end.
func interrupted(t testing.TB, rnd *rand.Rand, command func() *exec.Cmd, stdin string) *reply {
	t.Helper()
	for range 4 {
		cmd := command()
		cmd.Stdin = strings.NewReader(stdin)
		if r, killed := runKilled(t, cmd, time.Duration(rnd.Int64N(int64(40*time.Millisecond)))); !killed && r.exit == 0 {
			break
		}
	}
	cmd := command()
	cmd.Stdin = strings.NewReader(stdin)
	return run(t, cmd)
}

// TestRestore: nobody allocates from an etcd that went back in time, until the
// drill is done; then every pod has what it had.
func TestRestore(t *testing.T) {
	for _, x := range []struct {
		name     string
		newToken bool
		again    string // what comes after the first drill
	}{
		{"new token", true, ""},
		{"same token", false, ""},
		{"new token, twice", true, "same operator"},
		{"same token, twice", false, "same operator"},
		{"new token, twice, another operator", true, "another operator"},
		{"same token, twice, another operator", false, "another operator"},
	} {
		t.Run(x.name, func(t *testing.T) {
			rnd := random(t)
			r := &runtimes{cluster: newCluster(t), w: subnet("10.1.0.0/24"), pods: map[string]string{}}
			a, b, idle, out, late := r.node("a"), r.node("b"), r.node("idle"), r.node("out"), r.node("late")
			for i := range 3 {
				for _, n := range []*node{a, b, idle, out} {
					r.add(n, fmt.Sprint("p", i))
				}
			}
			r.del(a, "p2")
			file := filepath.Join(r.dir, "snapshot")
			r.etcd.Snapshot(t, file)
			// What the snapshot does not have: on all nodes but idle.
			r.add(a, "p3")
			moved := r.pods["a/p0"]
			r.del(a, "p0")
			r.add(b, "p3", "CNI_ARGS=IP="+strings.TrimSuffix(moved, "/24"))
			r.del(b, "p1")
			r.add(out, "p3")
			r.add(late, "p0")
			r.agree()

			r.etcd.Restore(t, file, x.newToken)
			if !x.newToken {
				// Nobody can know, until the first node with a newer mark asks.
				a.call("ADD", "new", r.w).refused(codeIntegrity, "gone back in time", "ledger recover")
			}
			for _, n := range []*node{idle, b, late, out, a} {
				n.call("ADD", "new", r.w).refused(codeIntegrity, "ledger recover")
				n.forget("asked")
				n.call("STATUS", "", r.w).ok()
			}
			if stops := r.kvs(keys.Stops()); len(stops) == 0 {
				t.Error("nobody put a stop")
			}
			r.node("fresh").call("ADD", "new", r.w).refused(codeIntegrity, "ledger recover")
			// A pod that goes now is gone.
			r.del(b, "p2")
			r.del(idle, "p2")
			if r.ledger("thaw").exit == 0 {
				t.Error("a thaw without a recovery succeeded")
			}
			r.drill(rnd, r.ledgerCommand, false, []*node{b, idle, late, a}, out, moved)

			// The one that was left out is out for itself alone.
			out.call("ADD", "new", r.w).refused(codeIntegrity, "ledger recover node")
			out.forget("asked")
			out.call("STATUS", "", r.w).refused(codeIntegrity, "ledger recover node")
			r.del(out, "p1")
			out.wantQueue(1)
			r.add(idle, "p9")
			interrupted(t, rnd, func() *exec.Cmd { return out.ledgerCommand("recover", "node") }, "").ok()
			r.add(out, "new")
			r.agree()
			for _, n := range []*node{a, b, idle, out, late} {
				n.isSettled()
			}
			r.verify()
			if x.again == "" || t.Failed() {
				return
			}

			// The same snapshot once more: the ledger forgets the first recovery.
			r.etcd.Restore(t, file, x.newToken)
			a.call("ADD", "again", r.w).refused(codeIntegrity, "ledger recover")
			for _, n := range []*node{idle, b, late, out, a} {
				n.call("ADD", "again", r.w).refused(codeIntegrity, "ledger recover")
			}
			r.del(a, "p1")
			operator := r.ledgerCommand
			if x.again == "another operator" {
				operator = func(args ...string) *exec.Cmd {
					cmd := r.ledgerCommand(append(args, "--as", "second@desk")...)
					cmd.Env = append(cmd.Env, "LEDGER_OPERATOR_DIR="+filepath.Join(r.dir, "second"))
					return cmd
				}
			}
			r.drill(rnd, operator, true, []*node{a, idle, late, b, out}, nil, "")
			r.agree()
			r.add(a, "last")
			r.agree()
			for _, n := range []*node{a, b, idle, out, late} {
				n.isSettled()
			}
		})
	}
}

// drill does what docs tell an operator to do, with kills half way. After a
// second restore nodes may have seen later epochs than the operator.
func (r *runtimes) drill(rnd *rand.Rand, operator func(...string) *exec.Cmd, twice bool, nodes []*node, without *node, conflict string) {
	t := r.t
	t.Helper()
	run(t, operator("freeze", "--reason", "restore"))
	start := func() *exec.Cmd { return operator("recover", "start", "--reason", "restored from the backup") }
	interrupted(t, rnd, start, "").ok()
	for range 3 {
		f := nodes[0].ledger("recover", "node")
		if f.exit == 0 || strings.Contains(f.stdout, "conflict") {
			break
		}
		if !twice {
			t.Errorf("recover node: %s", f.stderr)
		}
		// It has seen a later epoch than the restored ledger knows of, and says which.
		again := []string{"recover", "start", "--reason", "nodes have seen later epochs"}
		if m := regexp.MustCompile(`recover start --epoch (\d+)`).FindStringSubmatch(f.stderr); m != nil {
			again = append(again, "--epoch", m[1])
		}
		run(t, operator(again...)).ok()
	}
	for _, n := range nodes {
		n.call("ADD", "early", r.w).refused(codeIntegrity, "ledger")
		n.forget("asked")
		n.call("STATUS", "", r.w).ok()
	}
	var list []string
	for i, n := range nodes {
		list = append(list, "node/"+n.name)
		got := interrupted(t, rnd, func() *exec.Cmd { return n.ledgerCommand("recover", "node") }, "")
		if i == 0 && conflict != "" {
			// The other holder has not recovered yet.
			if got.exit != 1 || !strings.Contains(got.stdout, "conflict") || !strings.Contains(got.stdout, strings.TrimSuffix(conflict, "/24")) {
				t.Errorf("a conflict about %s: exit status %d\n%s%s", conflict, got.exit, got.stdout, got.stderr)
			}
			continue
		}
		got.ok()
	}
	thaw := func(args ...string) *reply {
		cmd := operator(append([]string{"thaw", "--nodes", "-"}, args...)...)
		cmd.Stdin = strings.NewReader(strings.Join(list, "\n") + "\n")
		return run(t, cmd)
	}
	if without != nil {
		list = append(list, "node/"+without.name)
		if f := thaw(); f.exit != 1 || !strings.Contains(f.stderr, without.name+":") || !strings.Contains(f.stderr, nodes[0].name+":") {
			t.Errorf("thaw with nodes missing: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
		}
	}
	for _, n := range nodes {
		n.ledger("recover", "node").ok()
	}
	if without == nil {
		thaw().ok()
	} else {
		// A node that nobody lists and etcd knows is not forgotten.
		whole := list
		list = list[1:]
		if f := thaw("--without", without.name); f.exit != 1 || !strings.Contains(f.stderr, nodes[0].name+":") {
			t.Errorf("thaw with a node forgotten: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
		}
		list = whole
		interrupted(t, rnd, func() *exec.Cmd { return operator("thaw", "--nodes", "-", "--without", without.name) }, strings.Join(list, "\n")).ok()
	}
	if stops := r.kvs(keys.Stops()); len(stops) > 0 {
		t.Errorf("stops are left: %v", stops)
	}
	var besides []string
	if without != nil {
		besides = []string{without.name}
	}
	r.agree(besides...)
	for pod, ip := range r.pods {
		name, container, _ := strings.Cut(pod, "/")
		for _, n := range nodes {
			if n.name == name {
				n.call("ADD", container, r.w).want(ip)
			}
		}
	}
	for i, n := range nodes {
		r.add(n, fmt.Sprint("after-", i))
	}
	var meta keyspace.Meta
	if err := keyspace.Decode(r.kvs(keys.Meta())[keys.Meta()], &meta); err != nil || meta.State != keyspace.Running || meta.Recovering {
		t.Errorf("meta: %+v, %v", meta, err)
	}
}

// TestSameEpoch: a second restore, with the same token, by an operator who does
// not know of the first recovery, leads to the epoch that nodes are in already.
// They must say what the way out is.
func TestSameEpoch(t *testing.T) {
	r := &runtimes{cluster: newCluster(t), w: subnet("10.1.0.0/24"), pods: map[string]string{}}
	a, b := r.node("a"), r.node("b")
	r.add(a, "p0")
	r.add(b, "p0")
	file := filepath.Join(r.dir, "snapshot")
	r.etcd.Snapshot(t, file)
	r.add(a, "p1")
	for i, operator := range []string{"first@desk", "second@desk"} {
		ledger := func(args ...string) *reply {
			cmd := r.ledgerCommand(append(args, "--as", operator)...)
			cmd.Env = append(cmd.Env, "LEDGER_OPERATOR_DIR="+filepath.Join(r.dir, operator))
			cmd.Stdin = strings.NewReader("a\nb\n")
			return run(t, cmd)
		}
		r.etcd.Restore(t, file, false)
		ledger("recover", "start", "--reason", "restored").ok()
		if i == 1 {
			// Once more is not begun anew: it is under way, for all that etcd can tell.
			if again := ledger("recover", "start", "--reason", "once more").ok(); !strings.Contains(again.stdout, "under way already, epoch 2") || !strings.Contains(again.stderr, "recover start --epoch 3") {
				t.Errorf("recover start once more: %s%s", again.stdout, again.stderr)
			}
			a.call("ADD", "x", r.w).refused(codeIntegrity)
			if f := a.ledger("recover", "node"); f.exit != 1 || !strings.Contains(f.stderr, "recover start --epoch 3") {
				t.Errorf("the node does not say that 'recover start' is its way out: %s", f.stderr)
			}
			ledger("recover", "start", "--epoch", "3", "--reason", "nodes have seen that epoch").ok()
		}
		a.ledger("recover", "node").ok()
		b.ledger("recover", "node").ok()
		ledger("thaw", "--nodes", "-").ok()
		r.add(a, fmt.Sprint("after-", i))
		r.add(b, fmt.Sprint("after-", i))
		r.agree()
	}
}

// TestConflict: two nodes that say they have one address are never both right.
func TestConflict(t *testing.T) {
	prepare := func(t *testing.T) (r *runtimes, a, b, idle *node) {
		r = &runtimes{cluster: newCluster(t), w: subnet("10.1.0.0/24"), pods: map[string]string{}}
		a, b, idle = r.node("a"), r.node("b"), r.node("idle")
		for _, n := range []*node{a, b, idle} {
			r.add(n, "p0")
		}
		file := filepath.Join(r.dir, "snapshot")
		r.etcd.Snapshot(t, file)
		moved := strings.TrimSuffix(r.pods["a/p0"], "/24")
		r.del(a, "p0")
		r.add(b, "p1", "CNI_ARGS=IP="+moved)
		r.etcd.Restore(t, file, true)
		b.call("ADD", "x", r.w).refused(codeIntegrity)
		r.ledger("recover", "start", "--reason", "test").ok()
		got := b.ledger("recover", "node", "-o", "json")
		if got.exit != 1 || !strings.Contains(got.stdout, `"done": false`) || !strings.Contains(got.stdout, moved) || !strings.Contains(got.stdout, "a/net/p0/eth0") {
			t.Errorf("a conflict about %s: exit status %d\n%s%s", moved, got.exit, got.stdout, got.stderr)
		}
		idle.ledger("recover", "node").ok()
		return r, a, b, idle
	}
	thaw := func(r *runtimes, without ...string) *reply {
		args := []string{"thaw", "--nodes", "-"}
		for _, n := range without {
			args = append(args, "--without", n)
		}
		cmd := r.ledgerCommand(args...)
		cmd.Stdin = strings.NewReader("a\nb\nidle\n")
		return run(t, cmd)
	}
	t.Run("left out", func(t *testing.T) {
		r, a, b, idle := prepare(t)
		if f := thaw(r, "a"); f.exit != 1 || !strings.Contains(f.stderr, "b:") {
			t.Errorf("thaw with a conflict open: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
		}
		thaw(r, "a", "b").ok()
		r.add(idle, "p1")
		for _, n := range []*node{a, b} {
			n.call("ADD", "x", r.w).refused(codeIntegrity, "ledger recover node")
			n.forget("asked")
			n.call("STATUS", "", r.w).refused(codeIntegrity, "ledger recover node")
		}
		r.del(b, "p0")
		b.wantQueue(1)
		if f := b.ledger("recover", "node"); f.exit != 1 {
			t.Errorf("the conflict is gone by itself: %s%s", f.stdout, f.stderr)
		}
		b.call("ADD", "x", r.w).refused(codeIntegrity, "ledger recover node")
		a.ledger("recover", "node").ok()
		b.ledger("recover", "node").ok()
		r.add(a, "p2")
		r.add(b, "p2")
		r.agree()
		a.isSettled()
		b.isSettled()
	})
	t.Run("gone for good", func(t *testing.T) {
		r, _, b, idle := prepare(t)
		r.ledger("release", strings.TrimSuffix(r.pods["b/p1"], "/24"), "--yes", "--reason", "a burnt down").ok()
		b.ledger("recover", "node").ok()
		thaw(r, "a").ok()
		r.add(b, "p2")
		r.add(idle, "p2")
		r.agree()
	})
	t.Run("pod deleted", func(t *testing.T) {
		r, _, b, idle := prepare(t)
		r.del(b, "p1")
		b.ledger("recover", "node").ok()
		thaw(r, "a").ok()
		r.add(b, "p2")
		r.add(idle, "p2")
		r.agree("a")
	})
}

// TestWiped: an empty etcd, or a ledger started anew, is not ours.
func TestWiped(t *testing.T) {
	c := newCluster(t)
	n, w := c.node("n1"), subnet("10.1.0.0/24")
	empty := filepath.Join(c.dir, "empty")
	n.call("ADD", "c1", w).ok()
	if _, err := c.etcd.Client(t).Delete(t.Context(), keys.Prefix(), clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "c2", w).refused(codeConfig, "wiped", "do not run 'ledger init'")
	n.call("DEL", "c1", w).ok()
	n.wantQueue(1)
	if r := c.ledger("init"); r.exit == 0 {
		t.Errorf("the operator of a ledger that was wiped began another: %s", r.stdout)
	}
	// Somebody else does it all the same.
	cmd := c.ledgerCommand("init", "--as", "second@desk")
	cmd.Env = append(cmd.Env, "LEDGER_OPERATOR_DIR="+empty)
	run(t, cmd).ok()
	n.call("ADD", "c2", w).refused(codeIntegrity, "cluster", n.state)
	n.forget("asked")
	n.call("STATUS", "", w).refused(codeIntegrity, "cluster")
	n.call("DEL", "c2", w).ok()
	if stops := c.kvs(keys.Stops()); len(stops) > 0 {
		t.Errorf("another ledger is no rollback: %v", stops)
	}
	if err := os.RemoveAll(n.state); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "c2", w).want("10.1.0.2/24")
}
