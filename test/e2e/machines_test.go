package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// on moves the node to a machine, or boots it anew: its programs see that machine
// ID and that boot ID, in a mount namespace that ends with them.
func (n *node) on(machine, boot string) {
	n.t.Helper()
	etc := filepath.Join(n.dir, "etc-"+machine)
	if err := os.MkdirAll(etc, 0o755); err != nil {
		n.t.Fatal(err)
	}
	write := func(file string, b []byte) {
		if old, err := os.ReadFile(file); err == nil && bytes.Equal(old, b) {
			return // somebody may be reading it
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			n.t.Fatal(err)
		}
	}
	for _, name := range []string{"passwd", "group", "hosts", "resolv.conf", "nsswitch.conf"} {
		if b, err := os.ReadFile(filepath.Join("/etc", name)); err == nil {
			write(filepath.Join(etc, name), b)
		}
	}
	write(filepath.Join(etc, "machine-id"), []byte(machine+"\n"))
	id := filepath.Join(n.dir, "boot-"+boot)
	write(id, []byte(boot+"\n"))
	n.wrap = []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		n.wrap = append(n.wrap, "--map-root-user")
	}
	n.wrap = append(n.wrap, "sh", "-c", `mount --bind "$0" /proc/sys/kernel/random/boot_id && mount --bind "$1" /etc && shift && exec "$@"`, id, etc)
}

// there runs the command as this node on its machine.
func (n *node) there(args ...string) *reply {
	n.t.Helper()
	return run(n.t, n.thereCommand(args...))
}

func (n *node) thereCommand(args ...string) *exec.Cmd {
	cmd := n.ledgerCommand(args...)
	if len(n.wrap) == 0 {
		return cmd
	}
	argv := append(slices.Clone(n.wrap), cmd.Args...)
	wrapped := exec.Command(argv[0], argv[1:]...)
	wrapped.Env = cmd.Env
	return wrapped
}

// newRoster is a book of a few nodes.
func newRoster(t *testing.T, names ...string) *roster {
	r := &roster{cluster: newCluster(t), w: subnet("10.1.0.0/16"), rnd: random(t), pods: map[rosterPod]string{}}
	for _, name := range names {
		r.nodes = append(r.nodes, r.node(name))
	}
	return r
}

// lose is a machine that dies with its pods.
func (r *roster) lose(n *node) (lost []rosterPod) {
	lost = r.of(n)
	for _, p := range lost {
		delete(r.pods, p)
	}
	return lost
}

// gc is the runtime's GC: it lists the pods that run.
func (r *roster) gc(n *node) {
	r.t.Helper()
	var list []string
	for _, p := range r.of(n) {
		list = append(list, fmt.Sprintf(`{"containerID": %q, "ifname": "eth0"}`, p.container))
	}
	n.call("GC", "", r.w.with(`"cni.dev/valid-attachments": [`+strings.Join(list, ", ")+`]`)).ok()
}

// isAlone checks that a node's own trouble is nobody else's.
func (r *roster) isAlone(n *node, says ...string) {
	r.t.Helper()
	n.call("ADD", "refused", r.w).refused(codeIntegrity, says...)
	n.forget("asked")
	n.call("STATUS", "", r.w).refused(codeIntegrity, says...)
	if stops := r.kvs(keys.Stops()); len(stops) > 0 {
		r.t.Errorf("a node's own trouble stopped the cluster: %v", stops)
	}
}

// TestReimaged: a machine that was set up anew under its old name goes on once an
// operator has said so; what its dead pods had comes back by the runtime's GC.
func TestReimaged(t *testing.T) {
	r := newRoster(t, "a", "b")
	a, b := r.nodes[0], r.nodes[1]
	a.on("first", "boot-1")
	for i := range 3 {
		r.add(a, fmt.Sprint("p", i))
		r.add(b, fmt.Sprint("p", i))
	}
	if err := os.RemoveAll(a.state); err != nil {
		t.Fatal(err)
	}
	a.on("second", "boot-2")
	lost := r.lose(a)
	r.isAlone(a, "has no key", "ledger node replace a")
	if f := a.there("recover", "node"); f.exit != 1 || !strings.Contains(f.stderr, "ledger node replace a") {
		t.Errorf("recover node without a key: exit status %d\n%s", f.exit, f.stderr)
	}
	r.add(b, "p3")
	interrupted(t, r.rnd, func() *exec.Cmd { return r.ledgerCommand("node", "replace", "a", "--reason", "a new disk") }, "").ok()
	r.ledger("node", "replace", "a", "--reason", "once more").ok()
	r.add(a, "new")
	opens := a.entries(entry.Open)
	if len(opens) != 2 || !slices.ContainsFunc(opens, func(e *entry.Entry) bool { return !e.Predecessor.IsZero() }) {
		t.Errorf("a's new chain does not name the old one: %+v", opens)
	}
	if got := len(r.leased()); got != len(r.pods)+len(lost) {
		t.Errorf("%d addresses are leased, and %d pods run and %d died", got, len(r.pods), len(lost))
	}
	r.gc(a)
	r.agrees()
	a.isSettled()
}

// TestStateLost: the state directory is gone and the pods run on. They keep their
// addresses, also in the next drill.
func TestStateLost(t *testing.T) {
	r := newRoster(t, "a", "b")
	a := r.nodes[0]
	for i := range 3 {
		for _, n := range r.nodes {
			r.add(n, fmt.Sprint("p", i))
		}
	}
	if err := os.RemoveAll(a.state); err != nil {
		t.Fatal(err)
	}
	r.isAlone(a, "has no key", "ledger node replace a")
	// A pod that goes now is not forgotten.
	r.del(rosterPod{"a", "p0"})
	a.wantQueue(1)
	r.ledger("node", "replace", "a", "--reason", "somebody removed it").ok()
	r.add(a, "p3")
	r.agrees()
	r.ledger("recover", "start", "--reason", "a drill").ok()
	for _, n := range r.nodes {
		n.recover()
	}
	r.thaw().ok()
	r.agrees()
	r.check(r.nodes...)
	r.goesOn("after", r.nodes...)
	r.agrees()
}

// second is another machine of that name.
func (n *node) second() *node {
	n.t.Helper()
	s := &node{cluster: n.cluster, name: n.name, state: n.state + "-second", file: n.file + "-second"}
	s.configure()
	return s
}

// TestTwoMachines: the old machine was not gone. Whoever calls first after the
// replacement is the node; the other is refused, and nothing is doubled.
func TestTwoMachines(t *testing.T) {
	for _, first := range []string{"new", "old"} {
		t.Run(first+" machine first", func(t *testing.T) {
			r := newRoster(t, "a")
			old := r.nodes[0]
			old.on("old", "boot-1")
			r.add(old, "p0")
			r.add(old, "p1")
			anew := old.second()
			anew.on("new", "boot-2")
			r.isAlone(anew, "has no key", "ledger node replace a")
			r.ledger("node", "replace", "a", "--reason", "it looked dead").ok()
			if first == "new" {
				r.add(anew, "p2")
				r.isAlone(old, "another machine has taken its place", "ledger node replace a")
			} else {
				r.waysOn(old, "p2", "the old machine")
				r.isAlone(anew, "has no key", "ledger node replace a")
			}
			r.verify()
			// Pods on the machine that is refused can go, and the node's GC ends
			// what nobody has.
			if first == "new" {
				old.call("DEL", "p0", r.w).ok()
				old.call("DEL", "p1", r.w).ok()
				old.wantQueue(2)
				r.lose(old)
				r.pods[rosterPod{"a", "p2"}] = anew.call("ADD", "p2", r.w).ok().stdout
				r.gc(anew)
			}
			r.agrees()
		})
	}
}

// TestRenamed: a node's name is its identity. It is set back, or the node is
// drained and begins anew under the new name.
func TestRenamed(t *testing.T) {
	r := newRoster(t, "a", "b")
	a := r.nodes[0]
	for i := range 3 {
		r.add(a, fmt.Sprint("p", i))
	}
	r.add(r.nodes[1], "p0")
	a.configure(`"node": "z"`)
	r.isAlone(a, "belongs to node/a", "set it back")
	a.call("CHECK", "p1", r.w.with(`"prevResult": `+r.pods[rosterPod{"a", "p1"}])).refused(codeIntegrity, "belongs to node/a")
	if f := run(t, a.cluster.ledgerCommand("recover", "node", "--node", "z", "--state-dir", a.state)); f.exit != 1 || !strings.Contains(f.stderr, "belongs to node/a") {
		t.Errorf("recover node under another name: exit status %d\n%s", f.exit, f.stderr)
	}
	// A pod that goes meanwhile is not forgotten.
	r.del(rosterPod{"a", "p0"})
	a.wantQueue(1)

	// One way out: the old name.
	a.configure()
	r.drain(a)
	r.agrees()
	r.check(a)

	// The other: no pods, another state directory, and the old node removed.
	for _, p := range r.of(a) {
		r.del(p)
	}
	z := r.node("z")
	r.nodes = append(r.nodes, z)
	r.nodes = r.nodes[1:]
	r.add(z, "p0")
	r.ledger("node", "remove", "a", "--yes", "--reason", "its name is z now").ok()
	for key, value := range r.kvs(keys.AllBlocks()) {
		var block keyspace.Block
		if err := keyspace.Decode(value, &block); err != nil || block.Node == "a" {
			t.Errorf("%s is a's still (%v)", key, err)
		}
	}
	r.agrees()
	// Later drills need not name it.
	r.ledger("recover", "start", "--reason", "a drill").ok()
	for _, n := range r.nodes {
		n.recover()
	}
	r.thaw().ok()
	r.goesOn("after", r.nodes...)
	r.agrees()
}

// TestStale: a node remembers a pod that leaked, and whose lease an operator ended.
// Another pod has the address. A drill does not put back what the record has ended;
// after a GC there is nothing left to tell.
func TestStale(t *testing.T) {
	for _, x := range []struct {
		name string
		gc   bool
	}{{"remembered", false}, {"after a GC", true}} {
		t.Run(x.name, func(t *testing.T) {
			r := newRoster(t, "a", "b")
			a, b := r.nodes[0], r.nodes[1]
			r.add(a, "leaked")
			r.add(a, "p0")
			ip := r.ip(rosterPod{"a", "leaked"})
			delete(r.pods, rosterPod{"a", "leaked"})
			r.ledger("release", ip, "--yes", "--reason", "no DEL came").ok()
			r.add(b, "p0", "CNI_ARGS=IP="+ip)
			if x.gc {
				r.gc(a)
			}
			r.ledger("recover", "start", "--reason", "a drill").ok()
			if again := r.ledger("recover", "start", "--reason", "a drill").ok(); !strings.Contains(again.stdout, "under way already, epoch 2") {
				t.Errorf("recover start once more: %s", again.stdout)
			}
			b.recover()
			// A list that is cut off must not cost what runs its addresses.
			if f := run(t, a.ledgerCommand("recover", "node", "--containers", "-")); f.exit != 2 || !strings.Contains(f.stderr, "lists no sandbox") {
				t.Errorf("an empty list: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
			}
			got := a.recover()
			if !got.Done || got.Before || got.Kept != 1 || (len(got.Ended) == 0) != x.gc || len(got.Released) > 0 || len(got.Asserted) > 0 {
				t.Errorf("%+v: want it done, one pod kept, and the other let go (unless by the GC)", got)
			}
			// Whoever has recovered is left as it is, whatever a list says.
			cmd := a.ledgerCommand("recover", "node", "--containers", "-", "--grace", "0s")
			cmd.Stdin = strings.NewReader("another\n")
			if again := run(t, cmd).ok(); !strings.Contains(again.stdout, "recovered already") {
				t.Errorf("recover node once more: %s", again.stdout)
			}
			r.thaw().ok()
			r.agrees()
			r.check(a, b)
		})
	}
}

// TestCloned: a state directory on another machine is refused there. Where the
// clone has the machine's ID too, nobody can notice; nothing is doubled.
func TestCloned(t *testing.T) {
	clone := func(r *roster, of *node) *node {
		c := of.second()
		copyDir(r.t, of.state, c.state)
		return c
	}
	t.Run("another machine ID", func(t *testing.T) {
		r := newRoster(t, "a")
		a := r.nodes[0]
		a.on("first", "boot-1")
		r.add(a, "p0")
		c := clone(r, a)
		c.on("second", "boot-2")
		r.isAlone(c, "machine first", "this is machine second", "ledger node replace a")
		for _, args := range [][]string{{"recover", "node"}, {"queue", "flush"}} {
			c.call("DEL", "p0", r.w).ok()
			if f := c.there(args...); f.exit != 1 || !strings.Contains(f.stderr, "copied") {
				t.Errorf("%v on a clone: exit status %d\n%s", args, f.exit, f.stderr)
			}
		}
		c.call("GC", "", r.w.with(`"cni.dev/valid-attachments": []`)).refused(codeIntegrity, "copied")
		r.add(a, "p1")
		r.agrees()
		r.check(a)
		// Its way out: a name and a state directory of its own.
		if err := os.RemoveAll(c.state); err != nil {
			t.Fatal(err)
		}
		own := r.node("c")
		own.on("second", "boot-2")
		r.nodes = append(r.nodes, own)
		r.add(own, "p0")
		r.add(a, "p2")
		r.agrees()
	})
	t.Run("new hardware", func(t *testing.T) {
		r := newRoster(t, "a", "b")
		a := r.nodes[0]
		a.on("first", "boot-1")
		r.add(a, "p0")
		r.add(r.nodes[1], "p0")
		a.on("second", "boot-2") // with the first one's disk
		r.isAlone(a, "machine first", "ledger node replace a")
		if steps := r.waysOn(a, "p1", "a new board"); len(steps) == 0 || steps[0] != "ledger node replace" {
			t.Errorf("took %v", steps)
		}
		r.agrees()
		r.check(r.nodes...)
	})
	t.Run("the same machine ID", func(t *testing.T) {
		r := newRoster(t, "a")
		a := r.nodes[0]
		a.on("twin", "boot-1")
		r.add(a, "p0")
		c := clone(r, a)
		c.on("twin", "boot-2")
		// Both write at once. Each goes on until it finds that the other has written,
		// or that the other has found that.
		type start struct {
			n    *node
			name string
		}
		var starts []start
		for i := range 20 {
			starts = append(starts, start{a, fmt.Sprint("a", i)}, start{c, fmt.Sprint("c", i)})
		}
		own := map[rosterPod]*node{{"a", "p0"}: a}
		every(t, starts, func(x start) {
			got := x.n.call("ADD", x.name, r.w)
			if got.exit != 0 {
				got.refused(codeIntegrity, "copy of this directory", "ledger node replace a")
				x.n.call("DEL", x.name, r.w).ok() // the runtime gives the pod up
				return
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			p := rosterPod{"a", x.name}
			r.pods[p], own[p] = got.stdout, x.n
		})
		had := map[string]rosterPod{}
		for _, p := range r.of(a) {
			if q, ok := had[r.ip(p)]; ok {
				t.Errorf("%v and %v have %s", p, q, r.ip(p))
			}
			had[r.ip(p)] = p
		}
		r.isAlone(a, "copy of this directory", "ledger node replace a")
		r.isAlone(c, "copy of this directory", "ledger node replace a")
		r.agrees()
		r.verify()
		for _, n := range []*node{a, c} {
			if f := n.there("recover", "node"); f.exit != 1 || !strings.Contains(f.stderr, "ledger node replace a") {
				t.Errorf("recover node on one of two: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
			}
		}

		// The way out: the copy is switched off, and the other is the node. What the
		// copy had started is nobody's: the runtime's GC ends it.
		for p, n := range own {
			if n == c {
				delete(r.pods, p)
			}
		}
		r.waysOn(a, "p1", "the copy is off")
		r.isAlone(c, "another machine has taken its place", "ledger node replace a")
		r.gc(a)
		r.agrees()
		r.check(a)
		r.drain(a)
		a.isSettled()
	})
}

// TestPutBack: a machine that was put back from an image has an old state
// directory and an etcd that went on: its mark follows the chain.
func TestPutBack(t *testing.T) {
	r := newRoster(t, "a")
	a := r.nodes[0]
	a.on("first", "boot-1")
	r.add(a, "p0")
	r.add(a, "p1")
	image := a.state + "-image"
	copyDir(t, a.state, image)
	for i := range 80 { // more than is read at a time
		r.add(a, fmt.Sprint("q", i))
	}
	r.del(rosterPod{"a", "p0"})
	if err := os.RemoveAll(a.state); err != nil {
		t.Fatal(err)
	}
	copyDir(t, image, a.state)
	a.on("first", "boot-2")
	r.lose(a)
	r.add(a, "new")
	r.gc(a)
	r.agrees()
	a.isSettled()
}

// damage is what a power loss, or a bad disk, makes of a file.
var damages = []struct {
	name string
	do   func(b, older []byte) []byte // nil: the file is gone
}{
	{"missing", func(_, _ []byte) []byte { return nil }},
	{"empty", func(_, _ []byte) []byte { return []byte{} }},
	{"truncated", func(b, _ []byte) []byte { return b[:len(b)/3] }},
	{"torn", func(b, _ []byte) []byte {
		return append(slices.Clone(b[:len(b)/3]), make([]byte, len(b)-len(b)/3)...)
	}},
	{"zeros", func(b, _ []byte) []byte { return make([]byte, len(b)) }},
	{"a page of zeros", func(_, _ []byte) []byte { return make([]byte, 4096) }},
	{"a stale tail", func(b, _ []byte) []byte { return append(slices.Clone(b), bytes.Repeat([]byte("stale\n"), 100)...) }},
	{"older", func(_, older []byte) []byte { return older }},
}

// TestPowerLoss: whatever becomes of the files of a state directory, a node either
// goes on, or says what to do, and doing that is the end of it. Its pods died
// with the power: the runtime deletes them and starts others.
func TestPowerLoss(t *testing.T) {
	r := newRoster(t)
	// What a file's loss may cost: nothing; or an operator's replacement of the
	// node, which then asks for a recovery, as it held pods.
	const (
		nothing = ""
		replace = "ledger node replace,ledger recover node"
	)
	cases := []struct {
		files string // of the state directory, by pattern
		costs string
	}{
		{"open", nothing},
		{"mark", nothing},
		{"mark mark.synced", replace},
		{"key", replace},
		{"mark.synced", nothing},
		{"lock", nothing},
		{"contact", nothing},
		{"asked", nothing},
		{"blocks", nothing},
		{"queue/*.json", nothing},
		{"holdings/*.json", nothing},
		{"*", replace},
		{"* queue/*.json holdings/*.json", replace},
	}
	type trial struct {
		files, costs, damage string
		do                   func(b, older []byte) []byte
		n                    *node
	}
	var trials []*trial
	for i, c := range cases {
		for _, d := range damages {
			// The others are read as the first are: torn is torn.
			if os.Getenv("IPAM_LEDGER_FULL") != "1" && i > 3 && !slices.Contains([]string{"missing", "empty", "zeros"}, d.name) {
				continue
			}
			trials = append(trials, &trial{files: c.files, costs: c.costs, damage: d.name, do: d.do})
		}
	}
	for i, x := range trials {
		x.n = r.node(fmt.Sprintf("n%03d", i))
		x.n.on("m", "boot-1")
		x.n.on("m", "boot-2")
		r.nodes = append(r.nodes, x.n)
	}
	var mu sync.Mutex
	count := map[string]int{}
	every(t, trials, func(x *trial) {
		n, what := x.n, x.files+": "+x.damage
		n.on("m", "boot-1")
		r.add(n, "old")
		before := map[string][]byte{}
		for _, file := range n.stateFiles("*", "queue/*.json", "holdings/*.json") {
			before[file], _ = os.ReadFile(file)
		}
		r.add(n, "queued")
		r.del(rosterPod{n.name, "old"})
		r.add(n, "older")
		n.call("STATUS", "", r.w).ok()
		// One release waits, as if etcd had been away.
		d, err := statedir.Open(n.state)
		if err != nil {
			t.Fatal(err)
		}
		queued := keyspace.AttachmentID{Node: n.name, Network: "net", Container: "queued", Interface: "eth0"}
		if err := d.Enqueue(statedir.Queued{Attachment: queued, Time: time.Now().UTC()}); err != nil {
			t.Fatal(err)
		}
		if err := d.Unhold(queued); err != nil {
			t.Fatal(err)
		}
		files := n.stateFiles(strings.Fields(x.files)...)
		if len(files) == 0 {
			t.Errorf("%s: there is no such file", what)
		}
		changed := false
		for _, file := range files {
			was, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			now := x.do(was, before[file])
			if now == nil {
				err, changed = os.Remove(file), true
			} else if !bytes.Equal(was, now) {
				err, changed = os.WriteFile(file, now, 0o600), true
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !changed {
			return // nothing that can be older, or shorter
		}
		n.on("m", "boot-2")
		died := r.of(n)
		r.lose(n)

		n.forget("asked")
		steps := r.waysOn(n, "new", what)
		took := strings.Join(steps, ",")
		if took != nothing && took != x.costs && took != "ledger node replace" {
			t.Errorf("%s: took %q, want at most %q", what, took, x.costs)
		}
		mu.Lock()
		count[took]++
		mu.Unlock()
		n.forget("asked")
		n.call("STATUS", "", r.w).ok()
		for _, p := range append(died, rosterPod{n.name, "queued"}) {
			n.call("DEL", p.container, r.w).ok()
		}
		r.gc(n)
		if f := n.there("recover", "node"); f.exit != 0 {
			n.moveAway(f, what)
			n.there("recover", "node").ok()
		}
		n.isSettled()
		if left := n.files("holdings"); len(left) != 1 {
			t.Errorf("%s: %d holdings are left, want that of the new pod", what, len(left))
		}
		if left := n.files("queue"); len(left) != 0 {
			t.Errorf("%s: %d releases wait, want none", what, len(left))
		}
	})
	r.agrees()
	r.check(r.nodes...)
	if stops := r.kvs(keys.Stops()); len(stops) > 0 {
		t.Errorf("a node's own trouble stopped the cluster: %v", stops)
	}
	t.Logf("%d state directories damaged: %d nodes went on by themselves, the others after %v", count[""]+count["ledger node replace"]+count[replace], count[""], count)
}

// waysOn starts a pod, and does what the node says has to be done before.
func (r *roster) waysOn(n *node, container, what string) (steps []string) {
	r.t.Helper()
	for range 6 {
		got := n.call("ADD", container, r.w)
		if got.exit == 0 {
			break
		}
		said := got.refused(codeIntegrity).Details
		n.forget("asked")
		n.call("STATUS", "", r.w).refused(codeIntegrity)
		switch {
		case strings.Contains(said, "ledger node replace "+n.name):
			steps = append(steps, "ledger node replace")
			r.ledger("node", "replace", n.name, "--reason", what).ok()
		case strings.Contains(said, "ledger recover node"):
			steps = append(steps, "ledger recover node")
			if f := n.there("recover", "node"); f.exit != 0 {
				n.moveAway(f, what)
				n.there("recover", "node").ok()
			}
		default:
			r.t.Fatalf("%s: no way on is named: %s", what, said)
		}
	}
	r.add(n, container)
	return steps
}

// stateFiles are the files of the state directory that match.
func (n *node) stateFiles(patterns ...string) (out []string) {
	n.t.Helper()
	for _, p := range patterns {
		names, err := filepath.Glob(filepath.Join(n.state, p))
		if err != nil {
			n.t.Fatal(err)
		}
		for _, name := range names {
			if st, err := os.Stat(name); err == nil && st.Mode().IsRegular() {
				out = append(out, name)
			}
		}
	}
	return out
}

// moveAway does what the error says: it moves the holdings away that it names.
func (n *node) moveAway(f *reply, what string) {
	n.t.Helper()
	moved := 0
	for _, file := range n.files("holdings") {
		file = filepath.Join(n.state, "holdings", file)
		if !strings.Contains(f.stderr, file) {
			continue
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			n.t.Fatal(err)
		}
		moved++
	}
	if moved == 0 || !strings.Contains(f.stderr, "move the named files away") {
		n.t.Errorf("%s: recover node: exit status %d, and no file is named\n%s%s", what, f.exit, f.stdout, f.stderr)
	}
}

// TestPowerLosses: the power goes while commits are under way, again and again;
// what was not fsynced is old, torn or gone. No operator is needed.
func TestPowerLosses(t *testing.T) {
	r := newRoster(t, "a", "b")
	losses := 6
	if os.Getenv("IPAM_LEDGER_FULL") == "1" {
		losses = 150
	}
	type turn struct {
		n    *node
		seed uint64
	}
	var turns []turn
	for _, n := range r.nodes {
		n.on("m", "boot-0")
		turns = append(turns, turn{n, r.rnd.Uint64()})
	}
	every(t, turns, func(x turn) {
		n, own := x.n, mathrand.New(mathrand.NewPCG(x.seed, 0))
		var mu sync.Mutex
		commits := n.watch(func() time.Duration {
			mu.Lock()
			defer mu.Unlock()
			return time.Duration(own.Int64N(int64(3 * time.Millisecond)))
		})
		intN := func(k int) int {
			mu.Lock()
			defer mu.Unlock()
			return own.IntN(k)
		}
		for loss := range losses {
			n.on("m", fmt.Sprintf("boot-%s-%d", n.name, loss))
			for i := range 1 + intN(3) {
				r.add(n, fmt.Sprintf("p%d-%d", loss, i))
			}
			older := map[string][]byte{}
			for _, file := range n.stateFiles("mark", "open", "blocks", "holdings/*.json") {
				older[file], _ = os.ReadFile(file)
			}
			for i := range 1 + intN(3) {
				r.add(n, fmt.Sprintf("q%d-%d", loss, i))
			}
			if pods := r.of(n); intN(2) == 0 {
				r.del(pods[intN(len(pods))])
			}
			runKilled(t, n.command(t.Context(), "ADD", fmt.Sprintf("killed%d", loss), r.w), time.Hour, commits)
			// Off. What was not fsynced is what the disk had, or nothing.
			for _, file := range n.stateFiles("mark", "open", "blocks", "holdings/*.json") {
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if b = damages[intN(len(damages))].do(b, older[file]); b == nil {
					err = os.Remove(file)
				} else {
					err = os.WriteFile(file, b, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			// On. The runtime's pods are dead; it deletes some, and its GC the rest.
			n.on("m", fmt.Sprintf("boot-%s-%d-again", n.name, loss))
			died := r.of(n)
			r.mu.Lock()
			for _, p := range died {
				delete(r.pods, p)
			}
			r.mu.Unlock()
			r.add(n, fmt.Sprintf("new%d", loss))
			for _, p := range died[:intN(len(died)+1)] {
				n.call("DEL", p.container, r.w).ok()
			}
			r.gc(n)
		}
	})
	r.agrees()
	r.check(r.nodes...)
	for _, n := range r.nodes {
		n.isSettled()
	}
	t.Logf("%d times the power was lost", losses*len(r.nodes))
}
