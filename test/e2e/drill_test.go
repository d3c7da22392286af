package e2e

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// rosterPod is a pod, by the word of the runtime that started it.
type rosterPod struct{ node, container string }

// roster is the test's own book of what runs on twenty machines.
type roster struct {
	*cluster
	w     network
	rnd   *mathrand.Rand
	nodes []*node

	mu    sync.Mutex
	pods  map[rosterPod]string // what ADD answered
	kills atomic.Int64
}

// atOnce is how many programs of a roster run at a time.
const atOnce = 4

// every runs f for each of list, some at a time, and ends the test if one failed.
func every[T any](t testing.TB, list []T, f func(T)) {
	t.Helper()
	var wg sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	for _, x := range list {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			f(x)
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func (r *roster) ip(p rosterPod) string {
	ips, err := resultIPs(r.pods[p])
	if err != nil || len(ips) != 1 {
		r.t.Fatalf("%v: %v, %v", p, ips, err)
	}
	return ips[0]
}

// add starts a pod and puts it down, unless its address is somebody's.
func (r *roster) add(n *node, container string, env ...string) {
	r.t.Helper()
	got := n.call("ADD", container, r.w, env...).ok()
	ips, err := resultIPs(got.stdout)
	if err != nil || len(ips) != 1 {
		r.t.Errorf("%s: %v, %v", got.what, ips, err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.pods {
		if r.ip(p) == ips[0] {
			r.t.Errorf("%s: was given %s, and %v has it", got.what, ips[0], p)
		}
	}
	r.pods[rosterPod{n.name, container}] = got.stdout
}

func (r *roster) del(p rosterPod) {
	r.t.Helper()
	r.mu.Lock()
	delete(r.pods, p)
	r.mu.Unlock()
	r.byName(p.node).call("DEL", p.container, r.w).ok()
}

func (r *roster) byName(name string) *node {
	for _, n := range r.nodes {
		if n.name == name {
			return n
		}
	}
	r.t.Fatalf("no node %s", name)
	return nil
}

// of are the pods of some nodes, in order.
func (r *roster) of(nodes ...*node) (out []rosterPod) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.pods {
		if slices.ContainsFunc(nodes, func(n *node) bool { return n.name == p.node }) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b rosterPod) int { return strings.Compare(a.node+"/"+a.container, b.node+"/"+b.container) })
	return out
}

func (r *roster) shuffled(pods []rosterPod) []rosterPod {
	r.rnd.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
	return pods
}

// agrees compares what etcd says is leased with the book. Nobody has the
// addresses of a pod that is gone, and each pod has what it was told.
func (r *roster) agrees(besides ...string) {
	r.t.Helper()
	got, want := map[string]string{}, map[string]string{}
	for ip, id := range r.leased() {
		if !slices.Contains(besides, id.Node) {
			got[ip.String()] = id.Node + "/" + id.Container
		}
	}
	for p := range r.pods {
		if !slices.Contains(besides, p.node) {
			want[r.ip(p)] = p.node + "/" + p.container
		}
	}
	if maps.Equal(got, want) {
		return
	}
	for ip, pod := range want {
		if got[ip] != pod {
			r.t.Errorf("%s has %s, and etcd says %q", pod, ip, got[ip])
		}
	}
	for ip, pod := range got {
		if want[ip] == "" {
			r.t.Errorf("%s is gone, and etcd says that it has %s", pod, ip)
		}
	}
}

// check asks, for each pod of the nodes and with what its runtime was told,
// whether it still has its addresses.
func (r *roster) check(nodes ...*node) int {
	r.t.Helper()
	pods := r.of(nodes...)
	every(r.t, pods, func(p rosterPod) {
		r.byName(p.node).call("CHECK", p.container, r.w.with(`"prevResult": `+r.pods[p])).ok()
	})
	return len(pods)
}

// scene is a cluster of twenty nodes, a backup of it, and what became of it
// afterwards: each drill begins with a copy.
type scene struct {
	*roster
	snapshot, copied string // the backup: a snapshot, and etcd's data directory
	token            string
}

// sceneNodes share sixteen blocks, so that some have addresses in others' blocks.
const sceneNodes = 20

func newScene(t *testing.T) *scene {
	t.Helper()
	began := time.Now()
	s := &scene{
		roster: &roster{cluster: newCluster(t), w: subnet("10.1.0.0/23"), rnd: random(t), pods: map[rosterPod]string{}},
		token:  rand.Text(),
	}
	for i := range sceneNodes {
		s.nodes = append(s.nodes, s.node(fmt.Sprintf("n%02d", i)))
	}
	quiet, joined := s.nodes[:2], s.nodes[sceneNodes-1]
	type start struct {
		n         *node
		container string
		env       []string
	}
	var starts []start
	for i := range 200 {
		starts = append(starts, start{s.nodes[i%(sceneNodes-1)], fmt.Sprint("a", i), nil})
	}
	every(t, starts, func(x start) { s.add(x.n, x.container) })

	s.snapshot, s.copied = filepath.Join(s.dir, "snapshot"), filepath.Join(s.dir, "copied")
	s.etcd.Snapshot(t, s.snapshot)
	s.etcd.Stop()
	copyDir(t, s.etcd.Dir(), s.copied)
	s.etcd.Restart(t)

	// What the backup does not have: on all nodes but two. A third of the pods
	// that come get an address that a pod on another node has given back.
	gone := s.shuffled(s.of(s.nodes[2:]...))[:50]
	freed := map[string]string{}
	for _, p := range gone {
		freed[s.ip(p)] = p.node
	}
	every(t, gone, s.del)
	starts = nil
	asked := slices.Sorted(maps.Keys(freed))
	for i := range 100 {
		x := start{n: s.nodes[2+s.rnd.IntN(sceneNodes-2)], container: fmt.Sprint("b", i)}
		if i < 5 {
			x.n = joined // a node that no backup knows
		} else if i < 25 {
			x.n = s.nodes[sceneNodes-2-i%2] // and the two that will be missing
		}
		if i >= 5 && len(asked) > 17 {
			if freed[asked[0]] == x.n.name {
				x.n = s.nodes[2+s.rnd.IntN(sceneNodes-2)]
			}
			x.env = []string{"CNI_ARGS=IP=" + asked[0]}
			asked = asked[1:]
		}
		starts = append(starts, x)
	}
	// Those that ask come first: the others take what is free.
	slices.SortStableFunc(starts, func(a, b start) int { return len(b.env) - len(a.env) })
	every(t, starts, func(x start) { s.add(x.n, x.container, x.env...) })
	s.agrees()
	if q := s.of(quiet...); len(q) == 0 || len(s.of(joined)) == 0 {
		t.Fatalf("the scene has no pod on quiet nodes, or none on the one that joined")
	}
	t.Logf("%d nodes, %d pods; since the backup 50 pods went and 100 came; %v", len(s.nodes), len(s.pods), time.Since(began).Round(time.Millisecond))
	return s
}

// again is a copy of the scene over another etcd, whose data is in dir.
func (s *scene) again(t *testing.T, dir, token string) *roster {
	t.Helper()
	e := etcdtest.Start(t, func(o *etcdmember.Options) { o.Dir, o.Token = dir, token })
	r := &roster{cluster: bareCluster(t, e), w: s.w, rnd: mathrand.New(mathrand.NewPCG(s.rnd.Uint64(), 0)), pods: maps.Clone(s.pods)}
	r.emptyConfig()
	copyDir(t, filepath.Join(s.dir, "operator"), filepath.Join(r.dir, "operator"))
	for _, n := range s.nodes {
		copyDir(t, n.state, filepath.Join(r.dir, n.name))
		r.nodes = append(r.nodes, r.node(n.name))
	}
	return r
}

// copyDir copies a directory as a careful operator would: nothing runs on it.
func copyDir(t testing.TB, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copying %s: %v\n%s", from, err, out)
	}
}

// etcdutl is etcd's own program, built once.
var etcdutl = sync.OnceValues(func() (string, error) {
	dir := filepath.Dir(plugin)
	build := exec.Command("go", "build", "-o", dir, "go.etcd.io/etcd/etcdutl/v3")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building etcdutl: %w\n%s", err, out)
	}
	return filepath.Join(dir, "etcdutl"), nil
})

// restoreSnapshot does what docs say, with the same program.
func restoreSnapshot(t testing.TB, file, dir, token string) {
	t.Helper()
	program, err := etcdutl()
	if err != nil {
		t.Fatal(err)
	}
	run(t, exec.Command(program, "snapshot", "restore", file, "--data-dir", dir, "--name", etcdmember.Name,
		"--initial-cluster", etcdmember.Name+"="+etcdmember.PeerURL, "--initial-advertise-peer-urls", etcdmember.PeerURL,
		"--initial-cluster-token", token)).ok()
}

// recovered is what 'ledger recover node -o json' says.
type recovered struct {
	Done      bool
	Before    bool
	Kept      int
	Unknown   int
	Ended     []keyspace.AttachmentID
	Asserted  []keyspace.AttachmentID
	Released  []keyspace.AttachmentID
	Conflicts []struct {
		Attachment keyspace.AttachmentID
		Leases     []keyspace.Lease
		Reason     string
	}
}

// conflicts are the addresses, and the attachments that say they hold them.
func (r *recovered) conflicts() map[string]rosterPod {
	out := map[string]rosterPod{}
	for _, c := range r.Conflicts {
		for _, l := range c.Leases {
			out[l.Address.Addr().String()] = rosterPod{c.Attachment.Node, c.Attachment.Container}
		}
	}
	return out
}

// recover runs 'ledger recover node' to its end.
func (n *node) recover(args ...string) *recovered {
	n.t.Helper()
	got := n.ledger(append([]string{"recover", "node", "-o", "json"}, args...)...)
	out := new(recovered)
	if err := json.Unmarshal([]byte(got.stdout), out); err != nil {
		n.t.Fatalf("%s: exit status %d: %v\n%s%s", got.what, got.exit, err, got.stdout, got.stderr)
	}
	if (got.exit == 0) != out.Done || out.Done == (len(out.Conflicts) > 0) {
		n.t.Errorf("%s: exit status %d, done %v, %d conflicts\n%s", got.what, got.exit, out.Done, len(out.Conflicts), got.stderr)
	}
	return out
}

// recoverKilled runs it with kills at random moments, then to its end. args are made
// anew for each run: a list that was looked at before is refused.
func (r *roster) recoverKilled(n *node, seed uint64, kills int, args func(*node) []string) *recovered {
	r.t.Helper()
	own := mathrand.New(mathrand.NewPCG(seed, 0))
	var mu sync.Mutex
	commits := n.watch(func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(own.Int64N(int64(3 * time.Millisecond)))
	})
	for i := range kills {
		after, on := time.Hour, []*trigger{commits}
		mu.Lock()
		if i%2 == 1 {
			after, on = time.Duration(own.Int64N(int64(100*time.Millisecond))), nil
		}
		mu.Unlock()
		if _, killed := runKilled(r.t, n.ledgerCommand(append([]string{"recover", "node"}, args(n)...)...), after, on...); killed {
			r.kills.Add(1)
		}
	}
	return n.recover(args(n)...)
}

// alone is recover node without a list.
func alone(*node) []string { return nil }

// killsEach is how often a node's recovery is killed.
func killsEach() int {
	if os.Getenv("IPAM_LEDGER_FULL") == "1" {
		return 12
	}
	return 3
}

// refuses checks that no node allocates, that a pod that goes is gone all the
// same, and that no node says it is itself to blame.
func (r *roster) refuses(says string, but ...rosterPod) (queued int) {
	t := r.t
	t.Helper()
	every(t, r.nodes, func(n *node) {
		n.call("ADD", "early", r.w).refused(codeIntegrity, says)
		n.forget("asked")
		n.call("STATUS", "", r.w).ok()
	})
	if stops := r.kvs(keys.Stops()); len(stops) == 0 {
		t.Error("nobody put a stop")
	}
	gone := slices.DeleteFunc(r.of(r.nodes...), func(p rosterPod) bool { return slices.Contains(but, p) })
	gone = r.shuffled(gone)[:10]
	every(t, gone, r.del)
	for _, n := range r.nodes {
		queued += n.queue()
	}
	if queued != len(gone) {
		t.Errorf("%d releases wait, want %d", queued, len(gone))
	}
	return queued
}

// recoverAll runs 'ledger recover node' on the nodes, killed at random, until
// no conflict is left but those with nodes that are not there.
func (r *roster) recoverAll(nodes []*node, args func(*node) []string) (left map[string]rosterPod, sum recovered) {
	t := r.t
	t.Helper()
	var mu sync.Mutex
	todo := nodes
	for round := 0; len(todo) > 0 && round < 2; round++ {
		var again []*node
		left = map[string]rosterPod{}
		type turn struct {
			n    *node
			seed uint64
		}
		var turns []turn
		for _, n := range todo {
			turns = append(turns, turn{n, r.rnd.Uint64()})
		}
		r.rnd.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
		every(t, turns, func(x turn) {
			kills := killsEach()
			if round > 0 {
				kills = 0
			}
			got := r.recoverKilled(x.n, x.seed, kills, args)
			mu.Lock()
			defer mu.Unlock()
			sum.Kept, sum.Unknown = sum.Kept+got.Kept, sum.Unknown+got.Unknown
			sum.Asserted, sum.Released = append(sum.Asserted, got.Asserted...), append(sum.Released, got.Released...)
			sum.Conflicts = append(sum.Conflicts, got.Conflicts...)
			if !got.Done {
				again = append(again, x.n)
			}
			maps.Copy(left, got.conflicts())
		})
		todo = again
	}
	return left, sum
}

// thaw ends the drill.
func (r *roster) thaw(without ...string) *reply {
	r.t.Helper()
	command, list := r.thawCommand(without...)
	cmd := command()
	cmd.Stdin = strings.NewReader(list)
	return run(r.t, cmd)
}

// thawCommand is the command, and what it reads.
func (r *roster) thawCommand(without ...string) (command func() *exec.Cmd, list string) {
	args := []string{"thaw", "--nodes", "-", "--reason", "the drill is done"}
	for _, n := range without {
		args = append(args, "--without", n)
	}
	for _, n := range r.nodes {
		list += "node/" + n.name + "\n"
	}
	return func() *exec.Cmd { return r.ledgerCommand(args...) }, list
}

// drain is each node's next contact.
func (r *roster) drain(nodes ...*node) {
	r.t.Helper()
	every(r.t, nodes, func(n *node) {
		n.forget("asked")
		n.call("STATUS", "", r.w).ok()
		n.isSettled()
	})
}

// goesOn starts new pods on the nodes.
func (r *roster) goesOn(round string, nodes ...*node) {
	r.t.Helper()
	every(r.t, append(slices.Clone(nodes), nodes...), func(n *node) { r.add(n, "new-"+round+"-"+rand.Text()) })
}

// TestDrill: twenty nodes, a backup, and what an operator does.
func TestDrill(t *testing.T) {
	s := newScene(t)
	t.Run("copied data directory", s.drillCopied)
	// The other is announced, while etcd still answers.
	s.ledger("freeze", "--reason", "a backup will be restored").ok()
	t.Run("etcdutl snapshot restore", s.drillSnapshot)
	t.Run("with the runtimes' lists", s.drillRuntime)
}

// drillSnapshot is the drill as docs tell it. One node never comes back, another
// a week later, when two of its addresses have been given to others.
func (s *scene) drillSnapshot(t *testing.T) {
	token, dir := "restored-"+rand.Text(), filepath.Join(t.TempDir(), "etcd")
	restoreSnapshot(t, s.snapshot, dir, token)
	r := s.again(t, dir, token)
	never, late := r.nodes[sceneNodes-3], r.nodes[sceneNodes-2]
	here := slices.DeleteFunc(slices.Clone(r.nodes), func(n *node) bool { return n == never || n == late })

	began := time.Now()
	queued := r.refuses("ledger recover")
	if f := r.ledger("freeze", "--reason", "too late"); f.exit != 1 || !strings.Contains(f.stderr, "recover start") {
		t.Errorf("a freeze after the restore: exit status %d\n%s", f.exit, f.stderr)
	}
	if f := r.thaw(); f.exit != 1 || !strings.Contains(f.stderr, "recover start") {
		t.Errorf("a thaw before the drill: exit status %d\n%s", f.exit, f.stderr)
	}
	interrupted(t, r.rnd, func() *exec.Cmd { return r.ledgerCommand("recover", "start", "--reason", "restored the backup") }, "").ok()
	left, sum := r.recoverAll(here, alone)

	// What is left is between a node that is here and one that is not: by the
	// backup the latter has what it gave back since.
	for ip, p := range left {
		if holder := r.leased()[netip.MustParseAddr(ip)]; holder.Node != never.name && holder.Node != late.name {
			t.Errorf("%v says that it holds %s, and etcd that %v does: none of the two is missing", p, ip, holder)
		}
	}
	f := r.thaw(never.name, late.name)
	if len(left) > 0 && f.exit != 1 {
		t.Errorf("thaw with %d conflicts open: exit status %d\n%s%s", len(left), f.exit, f.stdout, f.stderr)
	}
	for ip := range left {
		r.ledger("release", ip, "--yes", "--reason", "its node is not there, and another pod has it").ok()
	}
	every(t, here, func(n *node) {
		if got := n.recover(); !got.Done {
			t.Errorf("%s is not recovered: %v", n.name, got.Conflicts)
		}
	})
	if f := r.thaw(); f.exit != 1 || !strings.Contains(f.stderr, never.name+":") || !strings.Contains(f.stderr, late.name+":") {
		t.Errorf("thaw with nodes missing: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
	}
	command, list := r.thawCommand(never.name, late.name)
	interrupted(t, r.rnd, command, list).ok()
	took := time.Since(began)
	r.drain(here...)
	r.agrees(never.name, late.name)
	checked := r.check(here...)
	r.verify()
	t.Logf("%d nodes, %d releases queued, %d kills: %d kept, %d put back, %d released, %d conflicts (%d of them left for the operator), %d pods checked; %v",
		len(here), queued, r.kills.Load(), sum.Kept, len(sum.Asserted), len(sum.Released), len(sum.Conflicts), len(left), checked, took.Round(time.Millisecond))

	// The one that never comes back is removed: what it had is free.
	r.ledger("node", "remove", never.name, "--yes", "--reason", "scrapped").ok()
	for _, p := range r.of(never) {
		delete(r.pods, p)
	}
	r.agrees(late.name)
	if left := r.kvs(keys.NodeAttachments(never.name)); len(left) > 0 {
		t.Errorf("%s was removed, and holds %d addresses", never.name, len(left))
	}

	// A week goes by. Etcd does not know what the late node's newest pods have, and
	// gives it to others: two times because they ask for it, and by chance.
	known := r.leased()
	held := map[rosterPod]string{}
	var lost []rosterPod
	for _, p := range r.of(late) {
		if _, ok := known[netip.MustParseAddr(r.ip(p))]; !ok {
			lost = append(lost, p)
			held[p] = r.pods[p]
		}
	}
	if len(lost) < 2 {
		t.Fatalf("%s has %d pods that the backup does not have, want two", late.name, len(lost))
	}
	asked := []string{r.ip(lost[0]), r.ip(lost[1])}
	for _, p := range lost {
		delete(r.pods, p) // the book has no room for two
	}
	for i, ip := range asked {
		r.add(here[i], fmt.Sprint("second-", i), "CNI_ARGS=IP="+ip)
	}
	r.goesOn("first", here...)
	second := map[string]rosterPod{}
	for _, p := range r.of(here...) {
		second[r.ip(p)] = p
	}
	var both []rosterPod // whose address another has by now
	for _, p := range lost {
		r.pods[p] = held[p]
		if _, ok := second[r.ip(p)]; ok {
			both = append(both, p)
		}
	}

	late.age("contact", 7*24*time.Hour)
	late.call("ADD", "x", r.w).refused(codeIntegrity, "ledger recover node")
	late.forget("asked")
	late.call("STATUS", "", r.w).refused(codeIntegrity, "ledger recover node")
	got := r.recoverKilled(late, r.rnd.Uint64(), killsEach(), alone)
	if got.Done || len(got.Conflicts) != len(both) {
		t.Errorf("%s is back, and others have the addresses of %v: done %v, conflicts %v", late.name, both, got.Done, got.Conflicts)
	}
	late.call("ADD", "x", r.w).refused(codeIntegrity, "ledger recover node")
	// One of each two pods must go: by turns the late node's, and the other's.
	for i, p := range both {
		if i%2 == 0 {
			r.del(p)
		} else {
			r.del(second[r.ip(p)])
		}
	}
	if got := late.recover(); !got.Done {
		t.Errorf("%s is not recovered: %v", late.name, got.Conflicts)
	}
	r.drain(append(here, late)...)
	r.goesOn("late", late)
	r.agrees()
	r.check(append(here, late)...)
	t.Logf("%s came back with %d pods, %d of them lost by the restore; %d of these had their address given to another", late.name, len(r.of(late)), len(lost), len(both))
}

// drillCopied is a restore that nobody announced: a data directory that was
// copied is put back, and etcd has the cluster ID it had.
func (s *scene) drillCopied(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etcd")
	copyDir(t, s.copied, dir)
	r := s.again(t, dir, s.token)
	// A node that lost nothing cannot know, and hands out what another pod has.
	quiet, began := r.nodes[0], time.Now()
	known := r.leased()
	var lost rosterPod
	for _, p := range r.of(r.nodes[2:]...) {
		if _, ok := known[netip.MustParseAddr(r.ip(p))]; !ok {
			lost = p
			break
		}
	}
	quiet.call("ADD", "twice", r.w, "CNI_ARGS=IP="+r.ip(lost)).ok()
	// The first that misses an entry of its own stops them all.
	r.byName(lost.node).call("ADD", "x", r.w).refused(codeIntegrity, "gone back in time")
	queued := r.refuses("ledger recover", lost)
	r.ledger("freeze", "--reason", "etcd went back").ok()
	interrupted(t, r.rnd, func() *exec.Cmd { return r.ledgerCommand("recover", "start", "--reason", "somebody put a copy back") }, "").ok()
	left, sum := r.recoverAll(r.nodes, alone)
	if left[r.ip(lost)] != lost || len(left) != 1 {
		t.Errorf("two pods have %s, and the conflicts are %v", r.ip(lost), left)
	}
	if f := r.thaw(); f.exit != 1 || !strings.Contains(f.stderr, lost.node+":") {
		t.Errorf("thaw with a conflict: exit status %d\n%s%s", f.exit, f.stdout, f.stderr)
	}
	// One of the two must go.
	quiet.call("DEL", "twice", r.w).ok()
	quiet.recover()
	if got := r.byName(lost.node).recover(); !got.Done {
		t.Errorf("%s is not recovered: %v", lost.node, got.Conflicts)
	}
	r.thaw().ok()
	took := time.Since(began)
	r.drain(r.nodes...)
	r.agrees()
	checked := r.check(r.nodes...)
	t.Logf("%d nodes, %d releases queued, %d kills: %d kept, %d put back, %d released, %d conflicts (%d of them left for the operator), %d pods checked; %v",
		len(r.nodes), queued, r.kills.Load(), sum.Kept, len(sum.Asserted), len(sum.Released), len(sum.Conflicts), len(left), checked, took.Round(time.Millisecond))
	r.goesOn("after", r.nodes...)
	r.agrees()
}

// drillRuntime: what state directories say is not what runs. Some pods died and
// nobody said so, some holdings are lost, two nodes lost their whole state
// directory. The runtime's list puts that right.
func (s *scene) drillRuntime(t *testing.T) {
	token, dir := "restored-"+rand.Text(), filepath.Join(t.TempDir(), "etcd")
	restoreSnapshot(t, s.snapshot, dir, token)
	r := s.again(t, dir, token)
	known := map[rosterPod]bool{} // what etcd remembers, and the pod has still
	for ip, id := range r.leased() {
		if p := (rosterPod{id.Node, id.Container}); r.pods[p] != "" && r.ip(p) == ip.String() {
			known[p] = true
		}
	}
	began := time.Now()
	r.refuses("ledger recover")

	died := r.shuffled(r.of(r.nodes...))[:30]
	for _, p := range died {
		delete(r.pods, p)
	}
	lostDirs := r.nodes[4:6]
	var lostHoldings, unknown int
	for _, p := range r.shuffled(r.of(r.nodes...)) {
		gone := slices.Contains(lostDirs, r.byName(p.node))
		if !gone && known[p] && lostHoldings < 40 {
			d, err := statedir.Open(r.byName(p.node).state)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Unhold(keyspace.AttachmentID{Node: p.node, Network: "net", Container: p.container, Interface: "eth0"}); err != nil {
				t.Fatal(err)
			}
			lostHoldings++
		}
		if gone && !known[p] {
			// Neither etcd nor the machine knows what it has: it must be restarted.
			delete(r.pods, p)
			unknown++
		}
	}
	for _, n := range lostDirs {
		if err := os.RemoveAll(n.state); err != nil {
			t.Fatal(err)
		}
	}

	interrupted(t, r.rnd, func() *exec.Cmd { return r.ledgerCommand("recover", "start", "--reason", "restored the backup") }, "").ok()
	for _, n := range lostDirs {
		if f := n.ledger("recover", "node"); f.exit != 1 || !strings.Contains(f.stderr, "ledger node replace "+n.name) {
			t.Errorf("recover node without a state directory: exit status %d\n%s", f.exit, f.stderr)
		}
		r.ledger("node", "replace", n.name, "--reason", "its disk is new").ok()
	}
	// Half of the nodes ask their runtime, the others are given its list. A list
	// proves nothing by itself, but by the kills there is a second for some.
	lists := map[string]func() []string{}
	for i, n := range r.nodes {
		var ids []string
		for _, p := range r.of(n) {
			ids = append(ids, p.container)
		}
		more := []string{"--all", "--grace", "0s"}
		if i%2 == 0 {
			cri := "unix://" + serveSandboxes(t, ids)
			lists[n.name] = func() []string { return append([]string{"--cri", cri}, more...) }
			continue
		}
		file := filepath.Join(r.dir, n.name+".containers")
		lists[n.name] = func() []string {
			now := time.Now() // finer than a file's own
			err := os.WriteFile(file, []byte(strings.Join(ids, "\n")+"\n"), 0o600)
			if err := errors.Join(err, os.Chtimes(file, now, now)); err != nil {
				t.Error(err)
			}
			return append([]string{"--containers", file}, more...)
		}
	}
	list := func(n *node) []string { return lists[n.name]() }
	left, sum := r.recoverAll(r.nodes, list)
	// A node that lost its directory has again what the backup says it has, and was
	// recovered at once. What it gave back since is another's, and for the operator.
	for ip, p := range left {
		holder := r.leased()[netip.MustParseAddr(ip)]
		if r.pods[rosterPod{holder.Node, holder.Container}] != "" || !slices.Contains(lostDirs, r.byName(holder.Node)) {
			t.Errorf("%v says that it holds %s, and etcd that %v does, which is no dead pod of a node that lost its directory", p, ip, holder)
		}
		r.ledger("release", ip, "--yes", "--reason", "its pod is gone, and another has it").ok()
		r.byName(p.node).recover()
	}
	r.thaw().ok()
	took := time.Since(began)
	r.drain(r.nodes...)
	// What one list did not prove is for gc.
	every(t, r.nodes, func(n *node) {
		for range 2 {
			n.ledger(append([]string{"gc", "--yes"}, list(n)...)...).ok()
		}
	})
	r.agrees()
	checked := r.check(r.nodes...)
	t.Logf("%d nodes, %d pods died unnoticed, %d holdings and %d state directories lost (with them %d pods that the backup does not have), %d kills: %d kept, %d put back, %d released, %d pods checked; %v",
		len(r.nodes), len(died), lostHoldings, len(lostDirs), unknown, r.kills.Load(), sum.Kept, len(sum.Asserted), len(sum.Released), checked, took.Round(time.Millisecond))
	r.goesOn("after", r.nodes...)
	r.agrees()
}

// sandboxes is a container runtime that answers what sandboxes it has.
type sandboxes struct {
	runtimev1.UnimplementedRuntimeServiceServer
	ids []string
}

func (s *sandboxes) Version(context.Context, *runtimev1.VersionRequest) (*runtimev1.VersionResponse, error) {
	return &runtimev1.VersionResponse{RuntimeName: "test", RuntimeVersion: "1"}, nil
}

func (s *sandboxes) ListPodSandbox(context.Context, *runtimev1.ListPodSandboxRequest) (*runtimev1.ListPodSandboxResponse, error) {
	out := new(runtimev1.ListPodSandboxResponse)
	for _, id := range s.ids {
		out.Items = append(out.Items, &runtimev1.PodSandbox{Id: id, State: runtimev1.PodSandboxState_SANDBOX_READY})
	}
	return out, nil
}

// serveSandboxes returns the socket of such a runtime. Its path is short: the
// kernel takes no long ones.
func serveSandboxes(t testing.TB, ids []string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cri-")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimev1.RegisterRuntimeServiceServer(server, &sandboxes{ids: ids})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-ended
		os.RemoveAll(dir)
	})
	return socket
}
