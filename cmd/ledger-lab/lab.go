package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cni "github.com/containernetworking/cni/pkg/types/100"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
)

const (
	network   = "lab"
	subnet    = "10.22.0.0/24"
	bridge    = "cni0"
	namespace = "shop"
)

// lab is an etcd and some nodes. Everything it has is undone by close.
type lab struct {
	dir    string // everything that is a file is below
	bin    string // ipam-ledger, ledger, bridge
	direct bool   // without namespaces: the plugin is executed directly
	etcd   *etcdmember.Member
	nodes  []*node
	undo   []func() error // last first
}

// node is what a machine is to the plugin: a name, a state directory, a
// namespace with a bridge, a runtime with its own cache.
type node struct {
	name string
	dir  string
	ns   *netns // nil in a direct lab
	list *libcni.NetworkConfigList
	cni  *libcni.CNIConfig
}

// pod is one container with one interface.
type pod struct {
	name string
	uid  string
	id   string // container ID
	node *node
	ns   *netns // nil in a direct lab
	ip   netip.Addr
}

// newLab makes the directory. What comes next is undone by close, also when it
// fails half way.
func newLab(bin string, direct bool) (*lab, error) {
	dir, err := os.MkdirTemp("", "ledger-lab-")
	if err != nil {
		return nil, fmt.Errorf("making the lab's directory: %w; set TMPDIR to a directory that is writable", err)
	}
	l := &lab{dir: dir, bin: bin, direct: direct}
	l.later(func() error { return os.RemoveAll(dir) })
	return l, nil
}

func (l *lab) later(f func() error) { l.undo = append(l.undo, f) }

// close undoes everything, last first, and goes on when something fails.
func (l *lab) close() error {
	var errs []error
	for _, f := range slices.Backward(l.undo) {
		errs = append(errs, guarded(f))
	}
	l.undo = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cleaning up: %w", err)
	}
	return nil
}

// start starts etcd and the nodes.
func (l *lab) start(names ...string) error {
	var err error
	l.etcd, err = etcdmember.Start(etcdmember.Options{
		Dir:     filepath.Join(l.dir, "etcd"),
		Token:   filepath.Base(l.dir),
		NoFsync: true, // its data never outlives the process
	})
	if err != nil {
		return err
	}
	l.later(func() error { l.etcd.Close(); return nil })
	if err := l.writeJSON(l.operatorConfig(), map[string]any{
		"etcd": map[string]any{"endpoints": []string{l.etcd.Endpoint()}},
	}); err != nil {
		return err
	}
	for i, name := range names {
		n, err := l.addNode(name)
		if err != nil {
			return fmt.Errorf("node %s: %w", name, err)
		}
		if l.direct || i == 0 {
			continue
		}
		// One flat network: the bridges are wired in a row.
		before := l.nodes[i-1]
		if err := wire(before.ns, "to-"+n.name, n.ns, "to-"+before.name, bridge); err != nil {
			return fmt.Errorf("wiring %s to %s: %w", before.name, n.name, err)
		}
	}
	return nil
}

func (l *lab) operatorConfig() string { return filepath.Join(l.dir, "operator", "config.json") }

// operatorDir is where the operator's key is.
func (l *lab) operatorDir() string { return filepath.Join(l.dir, "operator", "writer") }

func (l *lab) writeJSON(file string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("writing %s: %w", file, err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o600)
}

func (l *lab) addNode(name string) (*node, error) {
	n := &node{name: name, dir: filepath.Join(l.dir, name)}
	config := filepath.Join(n.dir, "config.json")
	if err := l.writeJSON(config, map[string]any{
		"etcd":     map[string]any{"endpoints": []string{l.etcd.Endpoint()}},
		"node":     name,
		"stateDir": filepath.Join(n.dir, "state"),
	}); err != nil {
		return nil, err
	}
	ipam := map[string]any{
		"type":       "ipam-ledger",
		"ranges":     [][]map[string]string{{{"subnet": subnet}}},
		"configFile": config,
	}
	plugin := map[string]any{"type": "bridge", "bridge": bridge, "ipam": ipam}
	if l.direct {
		plugin = map[string]any{"type": "ipam-ledger", "ipam": ipam}
	}
	file := n.conflist()
	if err := l.writeJSON(file, map[string]any{
		"cniVersion": "1.1.0",
		"name":       network,
		"plugins":    []any{plugin},
	}); err != nil {
		return nil, err
	}
	var err error
	if n.list, err = libcni.NetworkConfFromFile(file); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{l.bin}, filepath.Join(n.dir, "cache"), newRunner(l.direct))
	if !l.direct {
		if n.ns, err = newNetns(); err != nil {
			return nil, err
		}
		l.later(n.ns.close)
		if err := makeBridge(n.ns, bridge); err != nil {
			return nil, err
		}
		stop, err := relay(n.ns, strings.TrimPrefix(l.etcd.Endpoint(), "http://"))
		if err != nil {
			return nil, err
		}
		l.later(func() error { stop(); return nil })
	}
	l.nodes = append(l.nodes, n)
	return n, nil
}

func (n *node) conflist() string { return filepath.Join(n.dir, "net.d", "10-"+network+".conflist") }

// run runs f as a process on the node would: in its namespace, if it has one.
func (n *node) run(f func() error) error {
	if n.ns == nil {
		return guarded(f)
	}
	return n.ns.do(f)
}

// newPod makes a pod that has no network yet.
func (l *lab) newPod(name string, n *node) (*pod, error) {
	p := &pod{name: name, node: n, id: randomHex(32)}
	u := randomHex(16)
	p.uid = u[:8] + "-" + u[8:12] + "-4" + u[13:16] + "-a" + u[17:20] + "-" + u[20:]
	if !l.direct {
		var err error
		if p.ns, err = newNetns(); err != nil {
			return nil, fmt.Errorf("pod %s: %w", name, err)
		}
		l.later(p.gone)
	}
	return p, nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// gone ends the pod's namespace. A second time does nothing.
func (p *pod) gone() error {
	if p.ns == nil {
		return nil
	}
	ns := p.ns
	p.ns = nil
	return ns.close()
}

// runtime is what the kubelet's runtime tells plugins about a pod. A request
// for an address is made as some do: by IP= in CNI_ARGS.
func (p *pod) runtime(ip netip.Addr) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID: p.id,
		NetNS:       os.DevNull, // a direct plugin must not need one
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", namespace},
			{"K8S_POD_NAME", p.name},
			{"K8S_POD_INFRA_CONTAINER_ID", p.id},
			{"K8S_POD_UID", p.uid},
		},
	}
	if p.ns != nil {
		rt.NetNS = p.ns.path()
	}
	if ip.IsValid() {
		rt.Args = append(rt.Args, [2]string{"IP", ip.String()})
	}
	return rt
}

// add gives the pod its network; ip may ask for an address.
func (p *pod) add(ctx context.Context, ip netip.Addr) error {
	return p.node.run(func() error {
		r, err := p.node.cni.AddNetworkList(ctx, p.node.list, p.runtime(ip))
		if err != nil {
			return fmt.Errorf("ADD %s on %s: %w", p.name, p.node.name, err)
		}
		result, err := cni.NewResultFromResult(r)
		if err != nil {
			return fmt.Errorf("ADD %s on %s: reading the result: %w", p.name, p.node.name, err)
		}
		if len(result.IPs) != 1 {
			return fmt.Errorf("ADD %s on %s: %d addresses, want 1", p.name, p.node.name, len(result.IPs))
		}
		a, ok := netip.AddrFromSlice(result.IPs[0].Address.IP)
		if !ok {
			return fmt.Errorf("ADD %s on %s: address %v", p.name, p.node.name, result.IPs[0].Address)
		}
		p.ip = a.Unmap()
		return nil
	})
}

// check asks the plugins whether the pod still has what it was given.
func (p *pod) check(ctx context.Context) error {
	return p.node.run(func() error {
		if err := p.node.cni.CheckNetworkList(ctx, p.node.list, p.runtime(netip.Addr{})); err != nil {
			return fmt.Errorf("CHECK %s on %s: %w", p.name, p.node.name, err)
		}
		return nil
	})
}

// del takes the pod's network and ends it.
func (p *pod) del(ctx context.Context) error {
	return p.node.run(func() error {
		if err := p.node.cni.DelNetworkList(ctx, p.node.list, p.runtime(netip.Addr{})); err != nil {
			return fmt.Errorf("DEL %s on %s: %w", p.name, p.node.name, err)
		}
		return p.gone()
	})
}

// runner executes plugins for libcni, in an environment that does not depend on
// who runs the lab.
type runner struct {
	invoke.DefaultExec
	direct bool
}

func newRunner(direct bool) *runner {
	return &runner{DefaultExec: invoke.DefaultExec{RawExec: &invoke.RawExec{}}, direct: direct}
}

func (r *runner) ExecPlugin(ctx context.Context, plugin string, stdin []byte, env []string) ([]byte, error) {
	env = neutral(env)
	if r.direct {
		// Without namespaces the pod's cannot be another one than ours.
		env = append(env, "CNI_NETNS_OVERRIDE=1")
	}
	return r.RawExec.ExecPlugin(ctx, plugin, stdin, env)
}

// neutral leaves out what would point a program at somebody's real cluster.
func neutral(env []string) []string {
	return slices.DeleteFunc(slices.Clone(env), func(v string) bool {
		return strings.HasPrefix(v, "LEDGER_") || strings.HasPrefix(v, "ETCDCTL_") || strings.HasPrefix(v, "CNI_NETNS_OVERRIDE=")
	})
}

// ledgerEnv is what the ledger command is run with: an operator whose home is
// in the lab.
func (l *lab) ledgerEnv() []string {
	home := filepath.Join(l.dir, "operator")
	return append(neutral(os.Environ()),
		"LEDGER_CONFIG="+l.operatorConfig(),
		"LEDGER_ENDPOINTS="+l.etcd.Endpoint(),
		"LEDGER_OPERATOR_DIR="+l.operatorDir(),
		"HOME="+home,
		"XDG_CONFIG_HOME="+filepath.Join(home, "config"),
		"XDG_STATE_HOME="+filepath.Join(home, "state"),
		"XDG_DATA_HOME="+filepath.Join(home, "data"),
		"XDG_CACHE_HOME="+filepath.Join(home, "cache"),
	)
}

// ledger runs the ledger command and returns what it wrote and its exit code.
func (l *lab) ledger(ctx context.Context, args ...string) (string, int, error) {
	c := exec.CommandContext(ctx, filepath.Join(l.bin, "ledger"), args...)
	c.Env = l.ledgerEnv()
	// One buffer for both, as they would come on a terminal.
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	c.WaitDelay = 5 * time.Second
	err := c.Run()
	if cause := context.Cause(ctx); cause != nil {
		return out.String(), -1, cause
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return out.String(), exit.ExitCode(), nil
	}
	if err != nil {
		return out.String(), -1, fmt.Errorf("ledger %s: %w", strings.Join(args, " "), err)
	}
	return out.String(), 0, nil
}
