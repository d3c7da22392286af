// Package runtime runs the plugin below the real containerd, which is driven
// over CRI as a kubelet drives it: many sandboxes at once, containerd killed
// among them, sandboxes whose network namespace is gone, a machine that loses
// its power. What CRI-O does and containerd does not, GC, is done with libcni.
//
// Whatever a test does, in the end 'ledger verify' must have nothing to say, no
// address may be leased, and nothing of the machine may be left.
package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/ipam-ledger/ipam-ledger/internal/containerd"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

const (
	nodeName = "worker-1"
	podNet   = "podnet"
	podCIDR  = "10.64.0.0/22"
)

// timeout is for one request of a kubelet, whose own is four minutes, too.
const timeout = 4 * time.Minute

var keys, _ = keyspace.New(keyspace.DefaultPrefix)

var (
	programs *containerd.Programs
	// full asks for more of the same: IPAM_LEDGER_FULL=1.
	full = os.Getenv("IPAM_LEDGER_FULL") == "1"
	// larger multiplies what a test does.
	larger = 1
)

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	if full {
		larger = 5
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			fmt.Fprintln(os.Stderr, "not root, so no containerd, which CI=true does not excuse")
			return 1
		}
		fmt.Fprintln(os.Stderr, "not root, so without containerd: sudo make test runs it")
		return 0
	}
	dir, err := os.MkdirTemp("", "ipam-ledger-runtime-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if programs, err = containerd.Build(dir); err != nil {
		fmt.Fprintln(os.Stderr, "building the programs:", err)
		return 1
	}
	return m.Run()
}

// world is an etcd with a ledger in it, and a machine with containerd that is a
// node of it.
type world struct {
	*containerd.Machine
	t      *testing.T
	etcd   *etcdtest.Etcd
	client *clientv3.Client
	dir    string
}

// newWorld makes them and starts containerd.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := bareWorld(t)
	w.StartContainerd(t)
	return w
}

// bareWorld makes them, without containerd.
func bareWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, etcd: etcdtest.Start(t), dir: t.TempDir()}
	w.client = w.etcd.Client(t)
	t.Cleanup(w.nothingOutside)
	t.Cleanup(w.verify)
	w.ledger("init").ok()
	w.node(nodeName, "/var/lib/ipam-ledger")
	w.Machine = containerd.New(t, programs, conflist(w.config(nodeName), bridge), strings.TrimPrefix(w.etcd.Endpoint(), "http://"))
	return w
}

// nothingOutside checks that the host has nothing that is a machine's. That the
// machine itself is gone, its end has checked.
func (w *world) nothingOutside() {
	if _, err := net.InterfaceByName("pods0"); err == nil {
		w.t.Error("the host has the machine's bridge")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte("/netns/cni-")) {
		w.t.Errorf("the host has a pod's network namespace (%v)", err)
	}
}

// bridge begins the configuration of the plugin that containerd calls, and that
// calls ours.
const bridge = `{"type": "bridge", "bridge": "pods0", "isGateway": true, `

// conflist is the network's configuration list with one plugin, of which plugin
// is the beginning.
func conflist(configFile, plugin string) string {
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "plugins": [%s"ipam": {"type": "ipam-ledger", "configFile": %q, "subnet": %q}}]}`,
		podNet, plugin, configFile, podCIDR)
}

func (w *world) config(node string) string { return filepath.Join(w.dir, node+".json") }

// node writes a node's configuration.
func (w *world) node(name, stateDir string) {
	w.t.Helper()
	text := fmt.Sprintf(`{"node": %q, "stateDir": %q, "statusGrace": "100ms", "timeout": "5s", "etcd": {"endpoints": [%q]}}`, name, stateDir, w.etcd.Endpoint())
	if err := os.WriteFile(w.config(name), []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// state is the node's state directory, as seen from here.
func (w *world) state() string { return filepath.Join(w.Dir, "var-lib", "ipam-ledger") }

// reply is what a process answered.
type reply struct {
	t              testing.TB
	what           string
	stdout, stderr bytes.Buffer
	exit           int
}

// ledgerCommand is the command as an operator calls it.
func (w *world) ledgerCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(programs.Dir, "ledger"), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LEDGER_OPERATOR_DIR=" + filepath.Join(w.dir, "operator"), "LEDGER_ENDPOINTS=" + w.etcd.Endpoint(), "LEDGER_CONFIG=" + w.empty()}
	return cmd
}

// empty is a configuration that says nothing, so that none of the host's is read.
func (w *world) empty() string {
	file := filepath.Join(w.dir, "empty.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}

func (w *world) ledger(args ...string) *reply {
	w.t.Helper()
	return w.run(w.ledgerCommand(args...), (*exec.Cmd).Start)
}

// onNode runs the command on the machine, as an operator of the node.
func (w *world) onNode(args ...string) *reply {
	w.t.Helper()
	cmd := w.ledgerCommand(append(args, "--config", w.config(nodeName))...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	return w.run(cmd, w.Start)
}

func (w *world) run(cmd *exec.Cmd, start func(*exec.Cmd) error) *reply {
	w.t.Helper()
	r := &reply{t: w.t, what: strings.Join(append([]string{"ledger"}, cmd.Args[1:]...), " ")}
	cmd.Stdout, cmd.Stderr = &r.stdout, &r.stderr
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("%s: %v", r.what, err)
	}
	r.exit = cmd.ProcessState.ExitCode()
	return r
}

// ok ends the test unless the process succeeded.
func (r *reply) ok() *reply {
	r.t.Helper()
	if r.exit != 0 {
		r.t.Fatalf("%s: exit status %d\n%s%s", r.what, r.exit, &r.stdout, &r.stderr)
	}
	return r
}

// verify is what each test ends with: exit status 0 means that nothing was found
// and that everything was looked at.
func (w *world) verify() {
	w.t.Helper()
	if r := w.ledger("verify", "--all-signatures"); r.exit != 0 {
		w.t.Errorf("ledger verify: exit status %d\n%s%s", r.exit, &r.stdout, &r.stderr)
	}
}

// lease is one that 'ledger show --leases' shows.
type lease struct {
	Address    netip.Addr
	Attachment keyspace.AttachmentID
	Pod        string
	PodUID     string
}

func (w *world) leases() []lease {
	w.t.Helper()
	var shown struct{ Leases []lease }
	r := w.ledger("show", "--leases", "-o", "json").ok()
	if err := json.Unmarshal(r.stdout.Bytes(), &shown); err != nil {
		w.t.Fatalf("%s: %v\n%s", r.what, err, &r.stdout)
	}
	return shown.Leases
}

// wantLeased checks that what is leased is what the sandboxes have.
func (w *world) wantLeased(running []*sandbox) {
	w.t.Helper()
	for _, l := range w.extra(running) {
		w.t.Errorf("no sandbox has %+v", l)
	}
}

// extra are the leases that no sandbox has. Each sandbox must have its own.
func (w *world) extra(running []*sandbox) (out []lease) {
	w.t.Helper()
	by := map[string]*sandbox{}
	for _, s := range running {
		by[s.id] = s
	}
	for _, l := range w.leases() {
		s := by[l.Attachment.Container]
		if s == nil {
			out = append(out, l)
			continue
		}
		delete(by, s.id)
		if l.Address != s.IP || l.Pod != s.pod.Namespace+"/"+s.pod.Name || l.PodUID != s.pod.UID ||
			(l.Attachment != keyspace.AttachmentID{Node: nodeName, Network: podNet, Container: s.id, Interface: "eth0"}) {
			w.t.Errorf("%s with %s: the ledger says %+v", s, s.IP, l)
		}
	}
	for _, s := range by {
		w.t.Errorf("%s: %s is leased by nobody", s, s.IP)
	}
	return out
}

// attachments counts the keys of attachments.
func (w *world) attachments() int64 {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	r, err := w.client.Get(ctx, keys.Attachments(), clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		w.t.Fatal(err)
	}
	return r.Count
}

// watchAcquires tells of each attachment that gets addresses from now on.
func (w *world) watchAcquires(ctx context.Context) clientv3.WatchChan {
	return w.client.Watch(ctx, keys.Attachments(), clientv3.WithPrefix(), clientv3.WithFilterDelete(), clientv3.WithCreatedNotify())
}

// sandbox is a pod that runs.
type sandbox struct {
	pod containerd.Pod
	id  string
	containerd.Network
}

func (s *sandbox) String() string {
	return fmt.Sprintf("%s/%s, attempt %d, sandbox %.12s", s.pod.Namespace, s.pod.Name, s.pod.Attempt, s.id)
}

// pods are n pods of a deployment.
func pods(deployment string, n int) (out []containerd.Pod) {
	for i := range n {
		out = append(out, containerd.Pod{Namespace: "shop", Name: fmt.Sprintf("%s-%d", deployment, i), UID: fmt.Sprintf("%s-uid-%d", deployment, i)})
	}
	return out
}

// start runs a pod's sandbox.
func (w *world) start(pod containerd.Pod) (*sandbox, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client := w.CRI()
	r, err := client.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod.Sandbox(w.CgroupParent())})
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", pod.Namespace, pod.Name, err)
	}
	s := &sandbox{pod: pod, id: r.GetPodSandboxId()}
	s.Network, err = client.Network(ctx, s.id)
	return s, err
}

// stop stops a sandbox and removes it.
func (w *world) stop(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	client := w.CRI()
	if _, err := client.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stopping sandbox %s: %w", id, err)
	}
	if _, err := client.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("removing sandbox %s: %w", id, err)
	}
	return nil
}

// startAll runs all pods at the same moment; each must succeed.
func (w *world) startAll(all []containerd.Pod) []*sandbox {
	w.t.Helper()
	out := make([]*sandbox, len(all))
	w.together(len(all), func(i int) (err error) {
		out[i], err = w.start(all[i])
		return err
	})
	return out
}

func (w *world) stopAll(all []*sandbox) {
	w.t.Helper()
	w.together(len(all), func(i int) error { return w.stop(all[i].id) })
}

// together runs f for 0 to n-1 at the same moment.
func (w *world) together(n int, f func(i int) error) {
	w.t.Helper()
	errs := make([]error, n)
	begin := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-begin
			errs[i] = f(i)
		})
	}
	close(begin)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		w.t.Fatal(err)
	}
}

// wantDistinct checks that no two sandboxes have one address.
func (w *world) wantDistinct(all []*sandbox) {
	w.t.Helper()
	by := map[netip.Addr]*sandbox{}
	for _, s := range all {
		if other := by[s.IP]; other != nil {
			w.t.Errorf("%s is the address of %s and of %s", s.IP, s, other)
		}
		by[s.IP] = s
	}
}

// gc frees, as the node's timer would, what containerd does not know any more,
// and says how many leases that were.
func (w *world) gc(args ...string) int {
	w.t.Helper()
	if len(args) == 0 {
		args = []string{"--wait", "--grace", "1s", "--yes"}
	}
	var done struct{ Freed *int }
	r := w.onNode(append([]string{"gc", "--cri", w.Endpoint(), "-o", "json"}, args...)...).ok()
	if err := json.Unmarshal(r.stdout.Bytes(), &done); err != nil || done.Freed == nil {
		w.t.Fatalf("%s: %v\n%s", r.what, err, &r.stdout)
	}
	return *done.Freed
}

// settled checks that nothing waits on the node: no release, no open commit.
func (w *world) settled() {
	w.t.Helper()
	d, err := statedir.Open(w.state())
	if err != nil {
		w.t.Fatal(err)
	}
	if open, err := d.Pending(); err != nil || open {
		w.t.Errorf("a commit is open (%v)", err)
	}
	if q, err := d.Queue(); err != nil || len(q) > 0 {
		w.t.Errorf("%d releases wait (%v)", len(q), err)
	}
}

// allFreed checks that nothing is leased and nothing waits.
func (w *world) allFreed() {
	w.t.Helper()
	w.wantLeased(nil)
	if n := w.attachments(); n > 0 {
		w.t.Errorf("%d attachments are left", n)
	}
	w.settled()
}

// logged is one line of 'ledger log -o json'.
type logged struct {
	Op, Network, Container, Interface, Node, Pod, PodUID, Reason string
}

func (w *world) log(args ...string) (out []logged) {
	w.t.Helper()
	r := w.ledger(append([]string{"log", "-n", "100000", "-o", "json"}, args...)...).ok()
	d := json.NewDecoder(&r.stdout)
	for d.More() {
		var l logged
		if err := d.Decode(&l); err != nil {
			w.t.Fatalf("%s: %v", r.what, err)
		}
		out = append(out, l)
	}
	return out
}

// onRecord checks that the log tells of one acquire and one release of each pod,
// by namespace, name and UID.
func (w *world) onRecord(all []containerd.Pod) {
	w.t.Helper()
	seen := map[logged]int{}
	for _, l := range w.log("--op", "acquire,release") {
		seen[logged{Op: l.Op, Pod: l.Pod, PodUID: l.PodUID, Network: l.Network, Interface: l.Interface, Node: l.Node}]++
	}
	for _, p := range all {
		for _, op := range []string{"acquire", "release"} {
			want := logged{Op: op, Pod: p.Namespace + "/" + p.Name, PodUID: p.UID, Network: podNet, Interface: "eth0", Node: nodeName}
			if seen[want] != 1 {
				w.t.Errorf("%d entries %+v, want 1", seen[want], want)
			}
			delete(seen, want)
		}
	}
	if len(seen) > 0 {
		w.t.Errorf("nobody wants these entries: %v", seen)
	}
}
