// Package auth runs the real plugin and the real command against an etcd that
// asks everybody for a certificate and lets nobody do more than his role says:
// what each role lets its owner do, and what it does not, though he talks to
// etcd himself.
//
// But where a test attacks, its ledger must verify in the end: each cluster
// checks that for itself, as an auditor.
package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/internal/programs"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The programs under test, built by TestMain.
var plugin, command string

func TestMain(m *testing.M) {
	os.Exit(programs.Main(m, &plugin, &command))
}

var keys, _ = keyspace.New(keyspace.DefaultPrefix)

const patience = time.Minute

// cluster is an etcd, and certificates of those who talk to it.
type cluster struct {
	*testing.T
	etcd *etcdtest.Etcd
	dir  string
	mu   sync.Mutex
	has  map[string]etcdtest.Files // by common name
	root *clientv3.Client
	// spoilt says that the ledger was attacked and need not verify.
	spoilt bool
}

// bare starts an etcd with a user root and authentication off.
func bare(t *testing.T) *cluster {
	t.Helper()
	e, _ := etcdtest.StartTLS(t)
	c := &cluster{T: t, etcd: e, dir: t.TempDir(), has: map[string]etcdtest.Files{}}
	e.As(c.files("root"))
	c.root = e.Client(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := c.root.UserAddWithOptions(ctx, "root", "", &clientv3.UserAddOptions{NoPassword: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.root.UserGrantRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	return c
}

// start is bare with authentication on, roles for operator alice, auditor carol
// and some nodes, and a ledger that alice began.
func start(t *testing.T, nodes ...string) *cluster {
	t.Helper()
	c := bare(t)
	args := []string{"auth", "apply", "--enable", "--yes", "--as", "alice", "--auditor", "carol"}
	for _, n := range nodes {
		args = append(args, "--node", n)
	}
	c.ledger("root", args...).ok().says("etcd's authentication is on")
	c.ledger("operator:alice", "init", "--as", "alice").ok()
	t.Cleanup(func() {
		if !c.spoilt {
			c.ledger("auditor:carol", "verify", "--all-signatures").ok().says("verified")
		}
	})
	return c
}

// files are a certificate with a name and its key, issued once.
func (c *cluster) files(cn string) etcdtest.Files {
	c.mu.Lock()
	defer c.mu.Unlock()
	f, ok := c.has[cn]
	if !ok {
		f = c.etcd.Authority().Issue(c.T, cn)
		c.has[cn] = f
	}
	return f
}

// client talks to etcd by a certificate, past all of the ledger's programs.
func (c *cluster) client(cn string) *clientv3.Client {
	c.Helper()
	f := c.files(cn)
	own := *c.etcd
	own.As(f)
	config := own.Config(c.T)
	config.Logger = zap.NewNop()
	out, err := clientv3.New(config)
	if err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() { out.Close() })
	return out
}

// reply is what a process answered.
type reply struct {
	*testing.T
	what, stdout, stderr string
	exit                 int
}

func run(t *testing.T, cmd *exec.Cmd) *reply {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("running %v: %v", cmd.Args, err)
	}
	r := &reply{T: t, what: strings.Join(cmd.Args, " "), stdout: stdout.String(), stderr: stderr.String(), exit: cmd.ProcessState.ExitCode()}
	if strings.Contains(r.stdout+r.stderr, "panic") {
		t.Errorf("%s panicked:\n%s%s", r.what, r.stdout, r.stderr)
	}
	return r
}

// ok ends the test unless the process succeeded.
func (r *reply) ok() *reply {
	r.Helper()
	if r.exit != 0 {
		r.Fatalf("%s: exit status %d\n%s%s", r.what, r.exit, r.stdout, r.stderr)
	}
	return r
}

// fails ends the test unless the process ended with this status.
func (r *reply) fails(exit int) *reply {
	r.Helper()
	if r.exit != exit {
		r.Fatalf("%s: exit status %d, want %d\n%s%s", r.what, r.exit, exit, r.stdout, r.stderr)
	}
	return r
}

// says checks that each of parts was said, on stdout or stderr.
func (r *reply) says(parts ...string) *reply {
	r.Helper()
	for _, p := range parts {
		if !strings.Contains(r.stdout+r.stderr, p) {
			r.Errorf("%s does not say %q:\n%s%s", r.what, p, r.stdout, r.stderr)
		}
	}
	return r
}

// refused checks a CNI error: its code, and what it says.
func (r *reply) refused(code int, parts ...string) {
	r.Helper()
	var f struct {
		Code         int
		Msg, Details string
	}
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil || r.exit == 0 {
		r.Errorf("%s: exit status %d, and no CNI error: %v\n%s%s", r.what, r.exit, err, r.stdout, r.stderr)
		return
	}
	if f.Code != code {
		r.Errorf("%s: code %d, want %d: %s: %s", r.what, f.Code, code, f.Msg, f.Details)
	}
	for _, p := range parts {
		if !strings.Contains(f.Msg+": "+f.Details, p) {
			r.Errorf("%s does not say %q: %s: %s", r.what, p, f.Msg, f.Details)
		}
	}
}

// ledger runs the command with a certificate. Each operator (--as) has a state
// directory of his own, as on a machine of his own.
func (c *cluster) ledger(cn string, args ...string) *reply {
	c.Helper()
	return run(c.T, c.ledgerCommand(cn, args...))
}

func (c *cluster) ledgerCommand(cn string, args ...string) *exec.Cmd {
	f, as := c.files(cn), cn
	if i := slices.Index(args, "--as"); i >= 0 {
		as = args[i+1]
	}
	file := filepath.Join(c.dir, "empty.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		c.Fatal(err)
	}
	cmd := exec.Command(command, args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LEDGER_CONFIG=" + file, "LEDGER_ENDPOINTS=" + c.etcd.Endpoint(),
		"LEDGER_CACERT=" + f.CA, "LEDGER_CERT=" + f.Cert, "LEDGER_KEY=" + f.Key,
		"LEDGER_OPERATOR_DIR=" + filepath.Join(c.dir, "state of "+as),
	}
	return cmd
}

// node is a machine with a certificate, a configuration file and a state directory.
type node struct {
	*cluster
	name, cn, state, file string
	pool                  string // a named one; "": an inline range
}

// node makes one; cn is the name in its certificate.
func (c *cluster) node(name, cn string) *node {
	c.Helper()
	n := &node{cluster: c, name: name, cn: cn, state: filepath.Join(c.dir, name), file: filepath.Join(c.dir, name+".json")}
	f := c.files(cn)
	text := fmt.Sprintf(`{"node": %q, "stateDir": %q, "etcd": {"endpoints": [%q], "caFile": %q, "certFile": %q, "keyFile": %q}}`,
		name, n.state, c.etcd.Endpoint(), f.CA, f.Cert, f.Key)
	if err := os.WriteFile(n.file, []byte(text), 0o600); err != nil {
		c.Fatal(err)
	}
	return n
}

// call runs the plugin for the network net of 10.22.0.0/16, in small blocks; more
// are further members of the configuration.
func (n *node) call(verb, container string, more ...string) *reply {
	n.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, plugin)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + container, "CNI_NETNS=/var/run/netns/x",
		"CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(plugin), "CNI_NETNS_OVERRIDE=1",
	}
	from := `"subnet": "10.22.0.0/16", "blockSize": 16`
	if n.pool != "" {
		from = fmt.Sprintf(`"pool": %q`, n.pool)
	}
	text := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "net", "type": "bridge", "ipam": {"type": "ipam-ledger", "configFile": %q, %s}`, n.file, from)
	for _, m := range more {
		text += ", " + m
	}
	cmd.Stdin = strings.NewReader(text + "}")
	r := run(n.T, cmd)
	r.what = fmt.Sprintf("%s %s on %s as %s", verb, container, n.name, n.cn)
	return r
}

// own runs the command as this node, with its certificate.
func (n *node) own(args ...string) *reply {
	n.Helper()
	return n.ledger(n.cn, append(args, "--node", n.name, "--state-dir", n.state)...)
}

// queue is how many releases wait on the node.
func (n *node) queue() int {
	n.Helper()
	files, err := os.ReadDir(filepath.Join(n.state, "queue"))
	if err != nil && !os.IsNotExist(err) {
		n.Fatal(err)
	}
	k := 0
	for _, f := range files {
		if strings.HasSuffix(f.Name(), ".json") {
			k++
		}
	}
	return k
}

// count is how many keys there are below a prefix.
func (c *cluster) count(prefix string) int64 {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := c.root.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		c.Fatal(err)
	}
	return r.Count
}
