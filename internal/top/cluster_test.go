package top

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// cluster is an etcd with a ledger, and nodes that write to it as the plugin
// does.
type cluster struct {
	t    testing.TB
	etcd *etcdtest.Etcd
	cfg  etcdstore.Config
	keys keyspace.Keys
	now  func() time.Time
	dir  string

	writers map[string]*allocator.Writer
	pools   map[string]*allocator.Pool
}

func newCluster(t testing.TB, e *etcdtest.Etcd) *cluster {
	t.Helper()
	return newClusterOn(t, e, etcdstore.Config{Endpoints: []string{e.Endpoint()}})
}

func newClusterOn(t testing.TB, e *etcdtest.Etcd, cfg etcdstore.Config) *cluster {
	t.Helper()
	c := &cluster{t: t, etcd: e, cfg: cfg, keys: mustKeys(t), now: time.Now, dir: t.TempDir(), writers: map[string]*allocator.Writer{}, pools: map[string]*allocator.Pool{}}
	if _, _, err := c.writer(entry.Writer{Kind: entry.KindOperator, Name: "alice@test"}).Init(t.Context(), "test"); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *cluster) writer(w entry.Writer) *allocator.Writer {
	c.t.Helper()
	if have := c.writers[w.String()]; have != nil {
		return have
	}
	d, err := statedir.Open(filepath.Join(c.dir, w.Name))
	if err != nil {
		c.t.Fatal(err)
	}
	store := etcdstore.New(c.cfg)
	c.t.Cleanup(func() { store.Close() })
	out, err := allocator.NewWriter(allocator.Config{
		Writer: w, Store: store, Dir: d, Keys: c.keys, Now: func() time.Time { return c.now() }, Timeout: 30 * time.Second, Random: func() uint64 { return 0 },
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.writers[w.String()] = out
	return out
}

// pool makes a pool of one subnet with the gateway as its first address.
func (c *cluster) pool(name, subnet string, block int, hold time.Duration) *allocator.Pool {
	c.t.Helper()
	p := netip.MustParsePrefix(subnet)
	last := p.Addr().As4()
	for i, host := 3, 32-p.Bits(); host > 0; i, host = i-1, host-8 {
		last[i] |= byte(1<<min(8, host) - 1)
	}
	last[3]--
	pool, err := allocator.NewPool("default", name, [][]keyspace.Range{{{
		Subnet: p, Start: p.Addr().Next(), End: netip.AddrFrom4(last), Gateway: p.Addr().Next(),
	}}}, nil, false, block, hold)
	if err != nil {
		c.t.Fatal(err)
	}
	c.pools[name] = pool
	return pool
}

func attachment(node, network, pod string) keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: node, Network: network, Container: "c-" + pod, Interface: "eth0"}
}

func (c *cluster) add(node, network, pod string) netip.Addr {
	c.t.Helper()
	a, err := c.writer(entry.Writer{Kind: entry.KindNode, Name: node}).Acquire(context.Background(), allocator.Request{
		ID: attachment(node, network, pod), Pool: c.pools[network], Pod: "shop/" + pod, PodUID: "uid-" + pod,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return a.Leases[0].Address.Addr()
}

func (c *cluster) del(node, network, pod string) {
	c.t.Helper()
	if err := c.writer(entry.Writer{Kind: entry.KindNode, Name: node}).Release(context.Background(), attachment(node, network, pod), ""); err != nil {
		c.t.Fatal(err)
	}
}

// typical is what most tests look at: two pools, three nodes.
func (c *cluster) typical() {
	c.pool("prod", "10.22.0.0/24", 32, 0)
	c.pool("edge", "10.40.0.0/26", 16, 0)
	for i := range 20 {
		c.add("worker-1", "prod", fmt.Sprintf("cart-%02d", i))
	}
	for i := range 31 {
		c.add("worker-2", "prod", fmt.Sprintf("web-%02d", i))
	}
	for i := range 6 {
		c.del("worker-1", "prod", fmt.Sprintf("cart-%02d", 3*i))
		c.add("worker-3", "edge", fmt.Sprintf("proxy-%d", i))
	}
}

func mustKeys(t testing.TB) keyspace.Keys {
	t.Helper()
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func prefix() []clientv3.OpOption { return []clientv3.OpOption{clientv3.WithPrefix()} }
