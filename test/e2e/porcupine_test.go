package e2e

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/history"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

const addresses = 5 // .2 to .6 of a /29

// flaky is a connection whose replies get lost: the commit was done, was not,
// or is done later, when the caller has gone on or given up.
type flaky struct {
	allocator.Store
	rnd    *rand.Rand
	give   context.CancelFunc // ends the call, so that its outcome stays unknown
	behind allocator.Store    // another connection, by which things arrive late
	late   []late
	wait   sync.WaitGroup
	mu     sync.Mutex // of behind
}

// late is a transaction that arrives after a number of further requests.
type late struct {
	txn   allocator.Txn
	after int
}

func (f *flaky) Read(ctx context.Context, serializable bool, gets []allocator.Get) (*allocator.Reply, error) {
	f.arrive(1)
	return f.Store.Read(ctx, serializable, gets)
}

func (f *flaky) Commit(ctx context.Context, txn allocator.Txn) (*allocator.Reply, error) {
	f.arrive(1)
	switch f.rnd.IntN(24) {
	case 0: // lost on the way there
	case 1: // lost on the way back
		_, _ = f.Store.Commit(ctx, txn)
	case 2:
		f.late = append(f.late, late{txn, f.rnd.IntN(6)})
	default:
		return f.Store.Commit(ctx, txn)
	}
	if f.rnd.IntN(2) == 0 {
		f.give()
	}
	return nil, errors.New("reply lost by the test")
}

// arrive lets what is late arrive, while the next requests are under way.
func (f *flaky) arrive(n int) {
	var wait []late
	for _, l := range f.late {
		if l.after -= n; l.after >= 0 {
			wait = append(wait, l)
			continue
		}
		f.wait.Go(func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if f.behind.Connect(ctx) == nil {
				_, _ = f.behind.Commit(ctx, l.txn)
			}
		})
	}
	f.late = wait
}

// TestLinearizable: many writers at one small pool, whose histories must be
// those of a set of addresses, taken and freed one at a time.
func TestLinearizable(t *testing.T) {
	c := newCluster(t)
	const writers, generations, rounds = 9, 4, 20
	prefix := netip.MustParsePrefix("10.1.0.0/29")
	p, err := allocator.NewPool("default", "net", [][]keyspace.Range{{{
		Subnet: prefix, Start: netip.MustParseAddr("10.1.0.1"), End: netip.MustParseAddr("10.1.0.6"), Gateway: netip.MustParseAddr("10.1.0.1"),
	}}}, nil, false, 2, 0)
	if err != nil {
		t.Fatal(err)
	}
	rnd, began := random(t), time.Now()
	var all []*historian
	for i := range writers {
		h := &historian{node: fmt.Sprint("w", i), client: i, pool: p, began: began}
		if h.dir, err = statedir.Open(filepath.Join(c.dir, h.node)); err != nil {
			t.Fatal(err)
		}
		cfg := etcdstore.Config{Endpoints: []string{c.etcd.Endpoint()}}
		direct, behind := etcdstore.New(cfg), etcdstore.New(cfg)
		h.flaky = &flaky{Store: direct, rnd: rand.New(rand.NewPCG(rnd.Uint64(), 0)), behind: behind}
		t.Cleanup(func() {
			h.flaky.arrive(math.MaxInt)
			h.flaky.wait.Wait()
			direct.Close()
			behind.Close()
		})
		h.Writer, err = allocator.NewWriter(allocator.Config{Writer: entry.Writer{Kind: entry.KindNode, Name: h.node}, Store: h.flaky, Dir: h.dir, Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
	// All addresses are free again after each generation, so each is a history
	// of its own.
	for range generations {
		var wg sync.WaitGroup
		for _, h := range all {
			wg.Go(func() { h.live(t, rounds) })
		}
		wg.Wait()
		var ops []history.Operation
		for _, h := range all {
			ops = append(ops, h.history(t, c.node(h.node))...)
			h.lives = nil
		}
		var exhausted int
		for _, op := range ops {
			if op.Kind == history.Exhausted {
				exhausted++
			}
		}
		t.Logf("%d operations, %d times exhausted", len(ops), exhausted)
		if err := history.Check(addresses, ops, time.Minute); err != nil {
			t.Error(err)
		}
		c.wantLeased()
		if t.Failed() {
			return
		}
	}
}

// historian is a writer that takes down what it did.
type historian struct {
	*allocator.Writer
	flaky  *flaky
	dir    *statedir.Dir
	pool   *allocator.Pool
	node   string
	client int
	serial int
	began  time.Time
	lives  []life
}

// life is what is known of one attachment. Where the acquire's outcome was not
// answered, whether and with what address it was done is read from the record;
// it was done, if at all, before the release was known to be.
type life struct {
	container                     string
	who                           int32 // a number of its own among all writers'
	address                       int   // -1: not answered
	exhausted                     bool
	acquire, acquired             time.Duration
	release /* first */, released time.Duration
}

// history is what the lives so far were for the pool.
func (h *historian) history(t *testing.T, n *node) (out []history.Operation) {
	onRecord := map[string]int{}
	for _, e := range n.entries(entry.Acquire) {
		if _, twice := onRecord[e.Container]; twice {
			t.Errorf("%s acquired twice", e.Container)
		}
		onRecord[e.Container] = index(e.Addresses[0].IP)
	}
	for _, l := range h.lives {
		recorded, ok := onRecord[l.container]
		op := history.Operation{Kind: history.Acquire, Address: l.address, Who: l.who, Client: h.client, Call: l.acquire, Return: l.acquired}
		switch {
		case l.exhausted:
			if ok {
				t.Errorf("%s was told that the pool is exhausted, and acquired %d", l.container, recorded)
			}
			op.Kind, op.Address, op.Who = history.Exhausted, 0, 0
			out = append(out, op)
			continue
		case l.address < 0 && !ok:
			continue // it never was
		case l.address < 0:
			op.Address, op.Return = recorded, l.released
		case !ok || recorded != l.address:
			t.Errorf("%s was told %d, and the record says %d (%v)", l.container, l.address, recorded, ok)
		}
		out = append(out, op, history.Operation{
			Kind: history.Release, Address: recorded, Who: l.who, Client: h.client, Call: l.release, Return: l.released,
		})
	}
	return out
}

func index(ip netip.Addr) int { return int(ip.As4()[3]) - 2 }

func (h *historian) call(do func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	h.flaky.give = cancel
	return do(ctx)
}

// live acquires and releases for a number of rounds.
func (h *historian) live(t *testing.T, rounds int) {
	for range rounds {
		h.serial++
		l := life{container: fmt.Sprint("c", h.serial), who: int32(h.client*1000 + h.serial), address: -1}
		id := keyspace.AttachmentID{Node: h.node, Network: "net", Container: l.container, Interface: "eth0"}
		var a *keyspace.Attachment
		l.acquire = time.Since(h.began)
		err := h.call(func(ctx context.Context) (err error) {
			a, err = h.Acquire(ctx, allocator.Request{ID: id, Pool: h.pool})
			return err
		})
		l.acquired = time.Since(h.began)
		l.exhausted = errors.Is(err, allocator.ErrExhausted)
		if err == nil {
			l.address = index(a.Leases[0].Address.Addr())
		}
		// Until it is known to be released: what is queued is not yet.
		l.release = time.Since(h.began)
		for again := !l.exhausted; again; again = h.dir.IsQueued(id) {
			if err := h.call(func(ctx context.Context) error { return h.Release(ctx, id, "") }); err != nil {
				t.Errorf("release of %v: %v", id, err)
				return
			}
		}
		l.released = time.Since(h.began)
		h.lives = append(h.lives, l)
	}
}

// between runs a function before and after each view, which reads meta first.
type between struct {
	allocator.Store
	before, after func()
}

func (b *between) Read(ctx context.Context, serializable bool, gets []allocator.Get) (*allocator.Reply, error) {
	if gets[0].Key != keys.Meta() {
		return b.Store.Read(ctx, serializable, gets)
	}
	b.before()
	defer b.after()
	return b.Store.Read(ctx, serializable, gets)
}

// TestExhaustedAtOnce: a pool that always has a free address is never exhausted,
// though that address is always another one by the time it is looked at.
func TestExhaustedAtOnce(t *testing.T) {
	c := newCluster(t)
	p, err := allocator.NewPool("default", "net", [][]keyspace.Range{{{
		Subnet: netip.MustParsePrefix("10.1.0.0/29"), Start: netip.MustParseAddr("10.1.0.1"), End: netip.MustParseAddr("10.1.0.6"), Gateway: netip.MustParseAddr("10.1.0.1"),
	}}}, nil, false, 4, 0) // blocks .2 .3 and .4 .5 .6
	if err != nil {
		t.Fatal(err)
	}
	hooks := &between{before: func() {}, after: func() {}}
	writer := func(node string) *allocator.Writer {
		dir, err := statedir.Open(filepath.Join(c.dir, node))
		if err != nil {
			t.Fatal(err)
		}
		store := etcdstore.New(etcdstore.Config{Endpoints: []string{c.etcd.Endpoint()}})
		t.Cleanup(func() { store.Close() })
		cfg := allocator.Config{Writer: entry.Writer{Kind: entry.KindNode, Name: node}, Store: store, Dir: dir, Keys: keys}
		if node == "a" {
			hooks.Store = store
			cfg.Store = hooks
		}
		w, err := allocator.NewWriter(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	a, b := writer("a"), writer("b")
	serial := 0
	acquire := func(w *allocator.Writer, requested ...netip.Addr) (keyspace.AttachmentID, error) {
		serial++
		id := keyspace.AttachmentID{Node: w.Config.Writer.Name, Network: "net", Container: fmt.Sprint("c", serial), Interface: "eth0"}
		_, err := w.Acquire(t.Context(), allocator.Request{ID: id, Pool: p, Requested: requested})
		return id, err
	}
	third, sixth := netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("10.1.0.6")
	var holder keyspace.AttachmentID
	for _, x := range []struct {
		w  *allocator.Writer
		ip []netip.Addr
	}{{a, nil}, {b, nil}, {b, nil}, {b, []netip.Addr{third}}} {
		if holder, err = acquire(x.w, x.ip...); err != nil {
			t.Fatal(err)
		}
	}
	// One of .3 and .6 is free at any time, and never both are held.
	at := third
	move := func(to netip.Addr) {
		if at == to {
			return
		}
		if err := b.Release(t.Context(), holder, ""); err != nil {
			t.Error(err)
		}
		if holder, err = acquire(b, to); err != nil {
			t.Error(err)
		}
		at = to
	}
	moves := 0
	hooks.before = func() {
		if moves++; moves <= 3 { // it cannot be expected to chase for ever
			move(third)
		}
	}
	hooks.after = func() { move(sixth) }
	if _, err := acquire(a); err != nil {
		t.Errorf("one address is free at any time, and: %v", err)
	}
}
