// Package e2e runs the real plugin and the real command against a real etcd, as
// a runtime and an operator do: environment and configuration in, one JSON
// document out, processes killed, etcd stopped, filled up and restored.
//
// Whatever a test does, in the end 'ledger verify' must have nothing to say:
// each cluster checks that for itself when its test ends.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"
	cniversion "github.com/containernetworking/cni/pkg/version"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/internal/programs"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// The programs under test, built by TestMain.
var plugin, command string

func TestMain(m *testing.M) {
	os.Exit(programs.Main(m, &plugin, &command))
}

var keys, _ = keyspace.New(keyspace.DefaultPrefix)

// cluster is an etcd with a ledger in it.
type cluster struct {
	t    testing.TB
	etcd *etcdtest.Etcd
	dir  string
	// ipamEtcd is what configurations say of etcd, besides its endpoint.
	ipamEtcd string
	// unverified says why etcd cannot be verified in the end.
	unverified bool
}

// newCluster starts an etcd and initialises the ledger.
func newCluster(t testing.TB, options ...func(*etcdmember.Options)) *cluster {
	t.Helper()
	c := bareCluster(t, etcdtest.Start(t, options...))
	c.ledger("init").ok()
	return c
}

func bareCluster(t testing.TB, e *etcdtest.Etcd) *cluster {
	c := &cluster{t: t, etcd: e, dir: t.TempDir()}
	t.Cleanup(func() {
		if !c.unverified {
			c.verify()
		}
	})
	return c
}

// node is a machine with a configuration file and a state directory of its own.
type node struct {
	*cluster
	name, state, file string
	// wrap is put before the plugin's path: a program that executes it.
	wrap []string
}

// node makes a node; settings are further members of its configuration file.
func (c *cluster) node(name string, settings ...string) *node {
	c.t.Helper()
	n := &node{cluster: c, name: name, state: filepath.Join(c.dir, name), file: filepath.Join(c.dir, name+".json")}
	n.configure(settings...)
	return n
}

// configure writes the configuration file anew. A member that is given replaces
// the fixture's.
func (n *node) configure(settings ...string) {
	n.t.Helper()
	members := map[string]json.RawMessage{}
	for _, s := range append([]string{
		fmt.Sprintf(`"node": %q`, n.name),
		fmt.Sprintf(`"stateDir": %q`, n.state),
		fmt.Sprintf(`"etcd": {"endpoints": [%q]%s}`, n.etcd.Endpoint(), n.ipamEtcd),
	}, settings...) {
		if err := json.Unmarshal([]byte("{"+s+"}"), &members); err != nil {
			n.t.Fatalf("%s: %v", s, err)
		}
	}
	if err := os.WriteFile(n.file, keyspace.Encode(members), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// network is a network configuration.
type network struct {
	version string // default 1.1.0
	name    string // default "net"
	ipam    string // members of ipam, beside type and configFile
	more    string // members beside ipam
}

func subnet(prefix string) network { return network{ipam: fmt.Sprintf(`"subnet": %q`, prefix)} }

func (w network) json(n *node) string {
	if w.version == "" {
		w.version = "1.1.0"
	}
	if w.name == "" {
		w.name = "net"
	}
	comma := func(s string) string {
		if s == "" {
			return ""
		}
		return ", " + s
	}
	return fmt.Sprintf(`{"cniVersion": %q, "name": %q, "type": "bridge"%s, "ipam": {"type": "ipam-ledger", "configFile": %q%s}}`,
		w.version, w.name, comma(w.more), n.file, comma(w.ipam))
}

func (w network) with(more string) network {
	w.more = more
	return w
}

// reply is what a process answered.
type reply struct {
	t              testing.TB
	what           string
	version        string
	stdout, stderr string
	exit           int
	took           time.Duration
}

// command prepares a call of the plugin; env is added to or replaces what a
// runtime sets.
func (n *node) command(ctx context.Context, verb, container string, w network, env ...string) *exec.Cmd {
	argv := append(slices.Clone(n.wrap), plugin)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + container, "CNI_NETNS=/var/run/netns/" + container,
		"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(plugin), "CNI_NETNS_OVERRIDE=1",
	}, env...)
	cmd.Stdin = strings.NewReader(w.json(n))
	return cmd
}

// call runs the plugin. However it ends, stdout must be empty or one JSON
// document, and nothing may have panicked.
func (n *node) call(verb, container string, w network, env ...string) *reply {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r := run(n.t, n.command(ctx, verb, container, w, env...))
	r.what = fmt.Sprintf("%s %s on %s", verb, container, n.name)
	if r.version = w.version; r.version == "" {
		r.version = "1.1.0"
	}
	r.isClean()
	return r
}

func (r *reply) isClean() {
	r.t.Helper()
	d := json.NewDecoder(strings.NewReader(r.stdout))
	var doc map[string]any
	if err := d.Decode(&doc); err != nil && err != io.EOF {
		r.t.Errorf("%s: stdout is not JSON: %v\n%s", r.what, err, r.stdout)
	}
	if _, err := d.Token(); err != io.EOF {
		r.t.Errorf("%s: stdout holds more than one document:\n%s", r.what, r.stdout)
	}
	if strings.Contains(r.stderr, "panic") || strings.Contains(r.stdout, "panic") {
		r.t.Errorf("%s panicked:\n%s%s", r.what, r.stdout, r.stderr)
	}
}

func run(t testing.TB, cmd *exec.Cmd) *reply {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("running %v: %v", cmd.Args, err)
	}
	return &reply{t: t, what: strings.Join(cmd.Args, " "), stdout: stdout.String(), stderr: stderr.String(), exit: cmd.ProcessState.ExitCode(), took: time.Since(began)}
}

// ok ends the test unless the process succeeded.
func (r *reply) ok() *reply {
	r.t.Helper()
	if r.exit != 0 {
		r.t.Fatalf("%s: exit status %d\n%s%s", r.what, r.exit, r.stdout, r.stderr)
	}
	return r
}

// result is the answer of an ADD, which must be one of the version asked for.
func (r *reply) result() *current.Result {
	r.t.Helper()
	r.ok()
	var form struct{ CNIVersion string }
	if err := json.Unmarshal([]byte(r.stdout), &form); err != nil || form.CNIVersion != r.version {
		r.t.Fatalf("%s: result is of version %q, want %q (%v):\n%s", r.what, form.CNIVersion, r.version, err, r.stdout)
	}
	res, err := cniversion.NewResult(r.version, []byte(r.stdout))
	if err != nil {
		r.t.Fatalf("%s: %v\n%s", r.what, err, r.stdout)
	}
	out, err := current.NewResultFromResult(res)
	if err != nil {
		r.t.Fatalf("%s: %v\n%s", r.what, err, r.stdout)
	}
	return out
}

// ips are the addresses of a result.
func (r *reply) ips() (out []string) {
	r.t.Helper()
	for _, ip := range r.result().IPs {
		out = append(out, ip.Address.String())
	}
	return out
}

// want ends the test unless these are the addresses of the result, in order.
func (r *reply) want(ips ...string) {
	r.t.Helper()
	if got := r.ips(); !slices.Equal(got, ips) {
		r.t.Fatalf("%s: got %v, want %v", r.what, got, ips)
	}
}

// failure is a CNI error.
type failure struct {
	CNIVersion, Msg, Details string
	Code                     int
}

// refused checks that the call failed with a code, and that its details say
// each of parts.
func (r *reply) refused(code int, parts ...string) failure {
	r.t.Helper()
	var f failure
	if r.exit == 0 {
		r.t.Errorf("%s: succeeded, want code %d %v\n%s%s", r.what, code, parts, r.stdout, r.stderr)
		return f
	}
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil {
		r.t.Errorf("%s: exit status %d and no error on stdout: %v\n%s%s", r.what, r.exit, err, r.stdout, r.stderr)
		return f
	}
	if f.Code != code {
		r.t.Errorf("%s: code %d, want %d: %s: %s", r.what, f.Code, code, f.Msg, f.Details)
	}
	for _, p := range parts {
		if !strings.Contains(f.Msg+": "+f.Details, p) {
			r.t.Errorf("%s: nothing says %q: %s: %s", r.what, p, f.Msg, f.Details)
		}
	}
	if strings.Contains(f.Details, "\n") {
		r.t.Errorf("%s: details have a line break: %q", r.what, f.Details)
	}
	return f
}

// ledger runs the command as the test's operator.
func (c *cluster) ledger(args ...string) *reply {
	c.t.Helper()
	return run(c.t, c.ledgerCommand(args...))
}

func (c *cluster) ledgerCommand(args ...string) *exec.Cmd {
	cmd := exec.Command(command, args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LEDGER_OPERATOR_DIR=" + filepath.Join(c.dir, "operator"),
		"LEDGER_ENDPOINTS=" + c.etcd.Endpoint(), "LEDGER_CONFIG=" + c.emptyConfig(),
	}
	return cmd
}

// emptyConfig is a configuration file that says nothing, so that none of the
// machine's is read.
func (c *cluster) emptyConfig() string {
	file := filepath.Join(c.dir, "empty.json")
	if b, err := os.ReadFile(file); err == nil && string(b) == "{}" {
		return file // another command may be reading it
	}
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return file
}

// ledger runs the command as this node.
func (n *node) ledger(args ...string) *reply {
	n.t.Helper()
	return run(n.t, n.ledgerCommand(args...))
}

func (n *node) ledgerCommand(args ...string) *exec.Cmd {
	return n.cluster.ledgerCommand(append(args, "--node", n.name, "--state-dir", n.state)...)
}

// verify is what each test ends with.
func (c *cluster) verify() {
	c.t.Helper()
	r := c.ledger("verify", "-o", "json", "--all-signatures")
	var report struct {
		FindingCount *int64
		Findings     []json.RawMessage
		Reduced      []string
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.FindingCount == nil {
		c.t.Errorf("ledger verify: exit status %d: %v\n%s%s", r.exit, err, r.stdout, r.stderr)
		return
	}
	if r.exit != 0 || *report.FindingCount > 0 || len(report.Reduced) > 0 {
		c.t.Errorf("ledger verify: exit status %d, %d findings:\n%s", r.exit, *report.FindingCount, bytes.Join(raws(report.Findings), []byte("\n")))
	}
}

func raws(in []json.RawMessage) (out [][]byte) {
	for _, r := range in {
		out = append(out, r)
	}
	return out
}

// kvs reads all keys below a prefix.
func (c *cluster) kvs(prefix string) map[string][]byte {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, err := clientv3.New(c.etcd.Config(c.t))
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.Close()
	r, err := client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		c.t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, kv := range r.Kvs {
		out[string(kv.Key)] = kv.Value
	}
	return out
}

// entries are all entries of a node's chains with an op, in the order of their keys.
func (n *node) entries(op entry.Op) (out []*entry.Entry) {
	n.t.Helper()
	kvs := n.kvs(keys.Chains() + "node/" + n.name + "/")
	var names []string
	for k := range kvs {
		names = append(names, k)
	}
	slices.Sort(names)
	for _, k := range names {
		e, err := entry.Parse(kvs[k])
		if err != nil {
			n.t.Fatalf("%s: %v", k, err)
		}
		if e.Op == op {
			out = append(out, e)
		}
	}
	return out
}

// leased are the addresses that etcd says are leased, by attachment.
func (c *cluster) leased() map[netip.Addr]keyspace.AttachmentID {
	c.t.Helper()
	out := map[netip.Addr]keyspace.AttachmentID{}
	for k, v := range c.kvs(keys.Addresses()) {
		key, err := keys.Parse(k)
		if err != nil {
			c.t.Fatal(err)
		}
		var a keyspace.Address
		if err := keyspace.Decode(v, &a); err != nil {
			c.t.Fatalf("%s: %v", k, err)
		}
		if a.State == keyspace.Leased {
			out[key.IP] = *a.Holder
		}
	}
	return out
}

// wantLeased compares what is leased with addresses.
func (c *cluster) wantLeased(ips ...string) {
	c.t.Helper()
	got := []string{}
	for ip := range c.leased() {
		got = append(got, ip.String())
	}
	slices.Sort(got)
	slices.Sort(ips)
	if !slices.Equal(got, ips) {
		c.t.Errorf("leased: %v, want %v", got, ips)
	}
	if n := len(c.kvs(keys.Attachments())); len(ips) == 0 && n > 0 {
		c.t.Errorf("%d attachments are left, want none", n)
	}
}

// queue is how many releases wait on the node.
func (n *node) queue() int {
	n.t.Helper()
	return len(n.files("queue"))
}

// files are those of a part of the state directory that count: a process that
// was killed may leave others, which nobody reads.
func (n *node) files(sub string) (out []string) {
	n.t.Helper()
	names, err := os.ReadDir(filepath.Join(n.state, sub))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, f := range names {
		if strings.HasSuffix(f.Name(), ".json") {
			out = append(out, f.Name())
		}
	}
	return out
}

func (n *node) wantQueue(want int) {
	n.t.Helper()
	if got := n.queue(); got != want {
		n.t.Errorf("%d releases wait on %s, want %d", got, n.name, want)
	}
}

// age sets a time stamp of the state directory so far back from now, in this boot.
func (n *node) age(stamp string, by time.Duration) {
	n.t.Helper()
	at, err := statedir.Now()
	if err == nil {
		at.Since -= by
		err = n.stateDir().Stamp(stamp, at)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// stateDir is the state directory.
func (n *node) stateDir() *statedir.Dir {
	n.t.Helper()
	d, err := statedir.Open(n.state)
	if err != nil {
		n.t.Fatal(err)
	}
	return d
}

// forget removes a time stamp.
func (n *node) forget(stamp string) {
	n.t.Helper()
	if err := os.Remove(filepath.Join(n.state, stamp)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
}

// isSettled checks that nothing stands in the way of the next call: the lock is
// free, no commit is open, no release waits.
func (n *node) isSettled() {
	n.t.Helper()
	d := n.stateDir()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if unlock, err := d.Lock(ctx); err != nil {
		n.t.Errorf("%s: %v", n.name, err)
	} else {
		unlock()
	}
	if open, err := d.Pending(); err != nil || open {
		n.t.Errorf("%s: a commit is open (%v)", n.name, err)
	}
	if q, err := d.Queue(); err != nil || len(q) > 0 {
		n.t.Errorf("%s: %d releases wait (%v)", n.name, len(q), err)
	}
}
