package allocator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// world is a small cluster: an etcd, nodes with their machines and state
// directories, an operator.
type world struct {
	store *memStore
	root  string
	nodes []*machine
	admin *machine
	clock time.Time
	drop  func(Compare) bool
	step  func(string)
	seed  uint64 // of the nodes' random choices
}

// random is splitmix64, so that a failure can be repeated.
func (w *world) random() uint64 {
	w.seed += 0x9e3779b97f4a7c15
	z := w.seed
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// machine is a host with a state directory.
type machine struct {
	w    *world
	who  entry.Writer
	dir  string
	id   string // machine ID
	boot int
	conn *memConn
}

func newWorld(t testing.TB, nodes int) *world {
	w := &world{store: newMemStore(), root: t.TempDir(), clock: time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC)}
	w.admin = w.machine(entry.Writer{Kind: entry.KindOperator, Name: "admin@desk"})
	for i := range nodes {
		w.nodes = append(w.nodes, w.machine(entry.Writer{Kind: entry.KindNode, Name: fmt.Sprintf("n%d", i)}))
	}
	return w
}

func (w *world) machine(who entry.Writer) *machine {
	m := &machine{w: w, who: who, dir: filepath.Join(w.root, who.Name), id: "machine-" + who.Name}
	m.reconnect()
	return m
}

func (m *machine) reconnect() { m.conn = &memConn{m: m.w.store} }

// writer is a new process on the machine.
func (m *machine) writer() *Writer {
	dir, err := statedir.Open(m.dir)
	if err != nil {
		panic(err)
	}
	m.conn.drop = m.w.drop
	w, err := NewWriter(Config{
		Writer: m.who, Store: m.conn, Dir: dir, Keys: testKeys, Machine: m.id, Boot: fmt.Sprint("boot-", m.boot),
		Now:     func() time.Time { m.w.clock = m.w.clock.Add(time.Millisecond); return m.w.clock },
		Random:  m.w.random,
		Timeout: m.timeout(), LockTimeout: 10 * time.Second,
	})
	if err != nil {
		panic(err)
	}
	if m.w.step != nil {
		w.step = m.w.step
	}
	return w
}

// timeout is long, as nothing but a deaf etcd is waited for.
func (m *machine) timeout() time.Duration {
	if m.conn.next == deafReads || m.conn.deafAfter > 0 {
		return 20 * time.Millisecond
	}
	return 20 * time.Second
}

// errKilled says that the process did not live to answer.
var errKilled = errors.New("killed")

// run runs f as a process that may be killed.
func (m *machine) run(f func(w *Writer) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
			err = errKilled
		}
	}()
	return f(m.writer())
}

func (m *machine) add(p *Pool, container string, ips ...netip.Addr) (out []netip.Addr, err error) {
	err = m.run(func(w *Writer) error {
		a, err := w.Acquire(context.Background(), Request{ID: m.attachment(container), Pool: p, Requested: ips, Pod: "default/" + container})
		if err == nil {
			out = addrsOf(a.Leases)
		}
		return err
	})
	return out, err
}

func (m *machine) del(container string) error {
	return m.run(func(w *Writer) error {
		return w.Release(context.Background(), m.attachment(container), "")
	})
}

func (m *machine) attachment(container string) keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: m.who.Name, Network: "net", Container: container, Interface: "eth0"}
}

func (w *world) init(t testing.TB) {
	t.Helper()
	if err := w.admin.run(func(a *Writer) error { _, _, err := a.Init(context.Background(), "test"); return err }); err != nil {
		t.Fatal(err)
	}
}

func mustPool(t testing.TB, cidrs ...string) *Pool {
	t.Helper()
	p, err := NewPool("default", "net", rangeSets(cidrs...), nil, false, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// rangeSets makes one range set of each prefix, with host-local's defaults.
func rangeSets(cidrs ...string) (sets [][]keyspace.Range) {
	for _, c := range cidrs {
		p := netip.MustParsePrefix(c)
		r := keyspace.Range{Subnet: p, Start: p.Addr().Next(), Gateway: p.Addr().Next(), End: netipx.PrefixLastIP(p)}
		if p.Addr().Is4() {
			r.End = r.End.Prev()
		}
		sets = append(sets, []keyspace.Range{r})
	}
	return sets
}

func wantAddrs(t testing.TB, got []netip.Addr, err error, want ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

func TestFirstAddresses(t *testing.T) {
	w := newWorld(t, 2)
	defer w.store.check(t)
	w.init(t)
	p := mustPool(t, "10.22.0.0/16", "fd00::/64")
	a, b := w.nodes[0], w.nodes[1]
	got, err := a.add(p, "c1")
	wantAddrs(t, got, err, "10.22.0.2", "fd00::2")
	got, err = a.add(p, "c2")
	wantAddrs(t, got, err, "10.22.0.3", "fd00::3")
	got, err = b.add(p, "c3")
	wantAddrs(t, got, err, "10.22.0.64", "fd00::40")
	got, err = a.add(p, "c1")
	wantAddrs(t, got, err, "10.22.0.2", "fd00::2")
	if err := a.del("c1"); err != nil {
		t.Fatal(err)
	}
	if err := a.del("c1"); err != nil {
		t.Fatal(err)
	}
	// A released address is reused last.
	got, err = a.add(p, "c4")
	wantAddrs(t, got, err, "10.22.0.4", "fd00::4")
}

// TestRequests: a warm ADD and a warm DEL ask the store twice each.
func TestRequests(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	p := mustPool(t, "10.22.0.0/16", "fd00::/64")
	n := w.nodes[0]
	if _, err := n.add(p, "warm"); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		c := fmt.Sprint("c", i)
		n.conn.reads, n.conn.commits = 0, 0
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
		if n.conn.reads != 1 || n.conn.commits != 1 {
			t.Errorf("ADD: %d reads and %d commits, want 1 and 1", n.conn.reads, n.conn.commits)
		}
		n.conn.reads, n.conn.commits = 0, 0
		if err := n.del(c); err != nil {
			t.Fatal(err)
		}
		if n.conn.reads != 1 || n.conn.commits != 1 {
			t.Errorf("DEL: %d reads and %d commits, want 1 and 1", n.conn.reads, n.conn.commits)
		}
	}
}

func TestNotInitialised(t *testing.T) {
	w := newWorld(t, 1)
	if _, err := w.nodes[0].add(mustPool(t, "10.22.0.0/24"), "c"); !errors.Is(err, ErrNotInitialised) {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(w.nodes[0].dir, "key")); err == nil {
		t.Error("a key was made for a ledger that is not there")
	}
}
