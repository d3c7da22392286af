// Package cluster runs the real plugin and the real command against a real etcd
// of three members that is shot at: leaders killed, members cut off, disks slow
// or full, revisions compacted, certificates replaced. All the while runtimes on
// several nodes add and delete pods.
//
// Whatever happens, no two pods may have one address, no pod may lose its own,
// each refusal must say what is wrong, and in the end 'ledger verify' must have
// nothing to say.
//
// With IPAM_LEDGER_FULL=1 the same tests do more of the same.
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/internal/programs"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The programs under test, built by TestMain.
var plugin, command string

var (
	full = os.Getenv("IPAM_LEDGER_FULL") == "1"
	seed = flag.Uint64("seed", 0, "seed of random tests; 0: another one each time")
)

// size is how much of it is done.
func size(usual, more int) int {
	if full {
		return more
	}
	return usual
}

func TestMain(m *testing.M) {
	etcdcluster.Main()
	flag.Parse()
	// What these tests do most of the time is wait for elections.
	if p := flag.Lookup("test.parallel"); p.Value.String() == p.DefValue {
		if err := p.Value.Set("4"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(programs.Main(m, &plugin, &command))
}

var keys, _ = keyspace.New(keyspace.DefaultPrefix)

// random is a source whose seed the test prints.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// world is an etcd cluster with a ledger in it.
type world struct {
	t    testing.TB
	etcd *etcdcluster.Cluster
	dir  string
	tls  *etcdtest.Files // a client's; nil: plaintext
}

// newWorld starts an etcd cluster and initialises the ledger. When the test
// ends, the ledger must verify.
func newWorld(t testing.TB, options ...func(*etcdcluster.Options)) *world {
	t.Helper()
	w := &world{t: t, etcd: clustertest.Start(t, options...), dir: t.TempDir()}
	w.begin()
	return w
}

func (w *world) begin() {
	w.t.Helper()
	if r := w.ledger("init"); r.exit != 0 {
		w.t.Fatalf("ledger init: %s%s", r.stdout, r.stderr)
	}
	w.t.Cleanup(w.verify)
}

// node is a machine with a configuration file and a state directory of its own.
type node struct {
	*world
	name, state, file string
}

// node makes a node that knows these endpoints, all where none is named.
// settings are further members of its configuration file.
func (w *world) node(name string, endpoints []string, settings ...string) *node {
	w.t.Helper()
	n := &node{world: w, name: name, state: filepath.Join(w.dir, name), file: filepath.Join(w.dir, name+".json")}
	if endpoints == nil {
		endpoints = w.etcd.Endpoints()
	}
	e := map[string]any{"endpoints": endpoints}
	if w.tls != nil {
		e["caFile"], e["certFile"], e["keyFile"] = w.tls.CA, w.tls.Cert, w.tls.Key
	}
	members := map[string]any{"node": name, "stateDir": n.state, "etcd": e}
	for _, s := range settings {
		var more map[string]any
		if err := json.Unmarshal([]byte("{"+s+"}"), &more); err != nil {
			w.t.Fatalf("%s: %v", s, err)
		}
		for k, v := range more {
			members[k] = v
		}
	}
	if err := os.WriteFile(n.file, keyspace.Encode(members), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return n
}

// network is what every node configures: a pool of both families.
const network = `{"cniVersion": "1.1.0", "name": "net", "type": "bridge", "ipam": {"type": "ipam-ledger", "configFile": %q,
	"ranges": [[{"subnet": "10.1.0.0/22"}], [{"subnet": "fd00::/64"}]]%s}`

// reply is what a process answered.
type reply struct {
	stdout, stderr string
	exit           int
	killed         bool
	began          time.Time
	took           time.Duration
}

// call runs the plugin; after some time, if that is not 0, it is killed.
func (n *node) call(verb, pod string, after time.Duration, more ...string) *reply {
	n.t.Helper()
	cmd := exec.Command(plugin)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + pod, "CNI_NETNS=/var/run/netns/" + pod,
		"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(plugin), "CNI_NETNS_OVERRIDE=1",
	}
	cmd.Stdin = strings.NewReader(fmt.Sprintf(network, n.file, strings.Join(more, "")+"}"))
	return run(n.t, cmd, after)
}

func run(t testing.TB, cmd *exec.Cmd, after time.Duration) *reply {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	r := &reply{began: time.Now(), exit: -1}
	if err := etcdcluster.Spawn(cmd); err != nil {
		t.Errorf("running %v: %v", cmd.Args, err)
		return r
	}
	// What hangs is killed, too, and is a failure then.
	limit := 2 * time.Minute
	if after > 0 {
		limit = after
	}
	timer := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	r.killed = !timer.Stop() && cmd.ProcessState.ExitCode() == -1
	r.took = time.Since(r.began)
	r.stdout, r.stderr, r.exit = stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
	var status *exec.ExitError
	if err != nil && !errors.As(err, &status) || r.killed && after == 0 {
		t.Errorf("running %v took %v: %v\n%s%s", cmd.Args, r.took, err, r.stdout, r.stderr)
	}
	if strings.Contains(r.stderr+r.stdout, "panic") {
		t.Errorf("%v panicked:\n%s%s", cmd.Args, r.stdout, r.stderr)
	}
	return r
}

// failure is a CNI error.
type failure struct {
	Msg, Details string
	Code         int
}

func (f failure) text() string { return f.Msg + ": " + f.Details }

func (r *reply) failure() (f failure) {
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil {
		f.Msg = fmt.Sprintf("no error on stdout, and exit status %d: %q %q", r.exit, r.stdout, r.stderr)
	}
	return f
}

// ips are the addresses of a result.
func (r *reply) ips() (out []string, err error) {
	var res current.Result
	if err := json.Unmarshal([]byte(r.stdout), &res); err != nil {
		return nil, err
	}
	for _, ip := range res.IPs {
		out = append(out, ip.Address.IP.String())
	}
	if len(out) != 2 {
		return nil, fmt.Errorf("%d addresses, want 2: %s", len(out), r.stdout)
	}
	return out, nil
}

// ok ends the test unless the process succeeded.
func (r *reply) ok(t testing.TB) *reply {
	t.Helper()
	if r.exit != 0 {
		t.Fatalf("exit status %d\n%s%s", r.exit, r.stdout, r.stderr)
	}
	return r
}

// refused checks that a call failed with a code and that its text says each part.
func (r *reply) refused(t testing.TB, code int, parts ...string) {
	t.Helper()
	f := r.failure()
	if r.exit == 0 || f.Code != code {
		t.Errorf("exit status %d, code %d; want code %d\n%s%s", r.exit, f.Code, code, r.stdout, r.stderr)
	}
	for _, p := range parts {
		if !strings.Contains(f.text(), p) {
			t.Errorf("nothing says %q: %s", p, f.text())
		}
	}
}

// codeTryAgain is "try again later" of the specification.
const codeTryAgain = 11

// ledgerCommand is the command as the test's operator.
func (w *world) ledgerCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(command, args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LEDGER_OPERATOR_DIR=" + filepath.Join(w.dir, "operator"),
		"LEDGER_ENDPOINTS=" + strings.Join(w.etcd.Endpoints(), ","), "LEDGER_CONFIG=" + w.emptyConfig(),
	}
	if w.tls != nil {
		cmd.Env = append(cmd.Env, "LEDGER_CACERT="+w.tls.CA, "LEDGER_CERT="+w.tls.Cert, "LEDGER_KEY="+w.tls.Key)
	}
	return cmd
}

// emptyConfig is a configuration file that says nothing, so that none of the
// machine's is read.
func (w *world) emptyConfig() string {
	file := filepath.Join(w.dir, "empty.json")
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	return file
}

func (w *world) ledger(args ...string) *reply {
	w.t.Helper()
	return run(w.t, w.ledgerCommand(args...), 0)
}

func (n *node) ledger(args ...string) *reply {
	n.t.Helper()
	return n.world.ledger(append(args, "--node", n.name, "--state-dir", n.state)...)
}

// verify is what each test ends with.
func (w *world) verify() {
	w.t.Helper()
	if r := w.ledger("verify", "--all-signatures"); r.exit != 0 {
		w.t.Errorf("ledger verify: exit status %d\n%s%s", r.exit, r.stdout, r.stderr)
	}
}

// leased are the addresses that etcd says are leased, with who has them.
func (w *world) leased() map[string]string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cfg, err := w.etcd.Config(w.etcd.Endpoints()...)
	if err != nil {
		w.t.Fatal(err)
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	defer client.Close()
	r, err := client.Get(ctx, keys.Addresses(), clientv3.WithPrefix())
	if err != nil {
		w.t.Fatal(err)
	}
	out := map[string]string{}
	for _, kv := range r.Kvs {
		key, err := keys.Parse(string(kv.Key))
		if err != nil {
			w.t.Fatal(err)
		}
		var a keyspace.Address
		if err := keyspace.Decode(kv.Value, &a); err != nil {
			w.t.Fatalf("%s: %v", kv.Key, err)
		}
		if a.State == keyspace.Leased {
			out[key.IP.String()] = a.Holder.Node + "/" + a.Holder.Container
		}
	}
	return out
}

// files are how many a part of the node's state directory holds; a process that
// was killed may leave others, which nobody reads.
func (n *node) files(sub string) (count int) {
	n.t.Helper()
	names, err := os.ReadDir(filepath.Join(n.state, sub))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, f := range names {
		if strings.HasSuffix(f.Name(), ".json") {
			count++
		}
	}
	return count
}

// forget removes a time stamp.
func (n *node) forget(stamp string) {
	n.t.Helper()
	if err := os.Remove(filepath.Join(n.state, stamp)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
}

// until waits for a condition; what says what it is.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}
