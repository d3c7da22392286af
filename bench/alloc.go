package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// What the allocator does without the cost of a process: many nodes in one
// process, each with its own state directory, chain and connection. Beside it
// the limit: the very transaction that an ADD commits, with the same comparisons
// and puts of the same sizes, sent bare by as many clients.

// podsOfNode is how many addresses a node takes before it gives them back: they
// fit one block, as a node's pods do.
const podsOfNode = 50

// fleet is nodes that allocate from one etcd.
type fleet struct {
	b     *bench
	etcd  *etcd
	keys  keyspace.Keys
	pool  *allocator.Pool
	nodes []*node
	last  *recorder // of node 0

	mu   sync.Mutex
	held map[netip.Addr]keyspace.AttachmentID
	dupl int
}

type node struct {
	name  string
	store *etcdstore.Store
	w     *allocator.Writer
	pods  []keyspace.AttachmentID
	next  int
	took  []float64
}

// recorder keeps the last transaction.
type recorder struct {
	allocator.Store
	txn allocator.Txn
}

func (r *recorder) Commit(ctx context.Context, txn allocator.Txn) (*allocator.Reply, error) {
	r.txn = txn
	return r.Store.Commit(ctx, txn)
}

func (b *bench) newFleet(e *etcd, n int) (*fleet, error) {
	f := &fleet{b: b, etcd: e, held: map[netip.Addr]keyspace.AttachmentID{}}
	var err error
	if f.keys, err = keyspace.New(keyspace.DefaultPrefix); err != nil {
		return nil, err
	}
	if err := b.initLedger(e); err != nil {
		return nil, err
	}
	subnet := netip.MustParsePrefix("10.0.0.0/8")
	first := subnet.Addr().Next()
	f.pool, err = allocator.NewPool(allocator.DefaultSpace, "bench", [][]keyspace.Range{{
		{Subnet: subnet, Start: first, End: netip.MustParseAddr("10.255.255.254"), Gateway: first},
	}}, nil, false, 0, 0)
	if err != nil {
		return nil, err
	}
	for i := range n {
		nd := &node{name: fmt.Sprintf("node-%02d", i), store: etcdstore.New(e.cfg)}
		f.nodes = append(f.nodes, nd)
		dir, err := statedir.Open(filepath.Join(e.dir+"-state", nd.name))
		if err != nil {
			return nil, err
		}
		var store allocator.Store = nd.store
		if i == 0 {
			f.last = &recorder{Store: nd.store}
			store = f.last
		}
		nd.w, err = allocator.NewWriter(allocator.Config{Writer: entry.Writer{Kind: entry.KindNode, Name: nd.name}, Store: store, Dir: dir, Keys: f.keys})
		if err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *fleet) close() {
	for _, n := range f.nodes {
		n.store.Close()
	}
}

func (f *fleet) add(n *node) error {
	n.next++
	name := fmt.Sprintf("%s-cart-%06d", n.name, n.next)
	id := keyspace.AttachmentID{Node: n.name, Network: "bench", Container: fmt.Sprintf("%064x", name)[:64], Interface: "eth0"}
	start := time.Now()
	a, err := n.w.Acquire(f.b.ctx, allocator.Request{ID: id, Pool: f.pool, Pod: "shop/" + name, PodUID: "6f9d0a0e-5d5b-4f3f-9a9b-0b1f6dd3a8e7"})
	if err != nil {
		return err
	}
	n.took = append(n.took, time.Since(start).Seconds())
	n.pods = append(n.pods, id)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range a.Leases {
		if other, taken := f.held[l.Address.Addr()]; taken && other != id {
			f.dupl++
		}
		f.held[l.Address.Addr()] = id
	}
	return nil
}

// del gives the node's oldest pod's address back.
func (f *fleet) del(n *node) error {
	id := n.pods[0]
	n.pods = n.pods[1:]
	f.mu.Lock()
	for ip, holder := range f.held { // from now on it may be somebody else's
		if holder == id {
			delete(f.held, ip)
			break
		}
	}
	f.mu.Unlock()
	if err := n.w.Release(f.b.ctx, id, ""); err != nil {
		return err
	}
	// Success may mean that it was queued.
	if n.w.Dir.IsQueued(id) {
		return fmt.Errorf("the release of %v was queued and not committed", id)
	}
	return nil
}

// each runs work on the first n nodes at once.
func (f *fleet) each(n int, work func(*node) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i, nd := range f.nodes[:n] {
		wg.Go(func() {
			if errs[i] = work(nd); errs[i] != nil {
				errs[i] = fmt.Errorf("%s: %w", nd.name, errs[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// outcome is one run's.
type outcome struct{ rate, p50, p99 float64 }

// allocate has n nodes allocate for a while, and give back what they took
// whenever they have podsOfNode, outside the time that counts.
func (f *fleet) allocate(n int, window time.Duration) (outcome, error) {
	var took []float64
	var spent time.Duration
	for spent < window {
		start := time.Now()
		deadline := start.Add(window - spent)
		err := f.each(n, func(nd *node) error {
			nd.took = nd.took[:0]
			for len(nd.pods) < podsOfNode && time.Now().Before(deadline) {
				if err := f.add(nd); err != nil {
					return err
				}
			}
			return nil
		})
		spent += time.Since(start)
		if err != nil {
			return outcome{}, err
		}
		for _, nd := range f.nodes[:n] {
			took = append(took, nd.took...)
		}
		if err := f.giveBack(n); err != nil {
			return outcome{}, err
		}
	}
	return summarise(took, spent), nil
}

func (f *fleet) giveBack(n int) error {
	return f.each(n, func(nd *node) error {
		for len(nd.pods) > 0 {
			if err := f.del(nd); err != nil {
				return err
			}
		}
		return nil
	})
}

func summarise(took []float64, spent time.Duration) outcome {
	return outcome{float64(len(took)) / spent.Seconds(), percentile(took, 0.5), percentile(took, 0.99)}
}

// bare is one client that sends nothing but the transaction.
type bare struct {
	f     *fleet
	store *etcdstore.Store
	id    int
	seq   int
	mods  map[string]int64
	took  []float64
}

const barePrefix = "/bare-ledger/v1/" // as long as keyspace.DefaultPrefix

// rename gives a key of the recorded ADD a name of this client's own, of the
// same length, below another prefix.
func (c *bare) rename(key string) string {
	rel := strings.TrimPrefix(key, c.f.keys.Prefix())
	kind, _, _ := strings.Cut(rel, "/")
	tail := ""
	switch kind {
	case "meta", "stops": // everybody's
	case "chains", "attachments": // new each time
		tail = fmt.Sprintf("%03d%08d", c.id, c.seq)
	case "addresses": // used again in turn
		tail = fmt.Sprintf("%03d.%03d", c.id, c.seq%podsOfNode)
	default:
		tail = fmt.Sprintf("%03d", c.id)
	}
	return barePrefix + rel[:len(rel)-len(tail)] + tail
}

// newBare connects a client and puts the keys that are compared and not
// written. Those that are everybody's it takes from the first client.
func (f *fleet) newBare(id int, like *allocator.Txn, first *bare) (*bare, error) {
	c := &bare{f: f, store: etcdstore.New(f.etcd.cfg), id: id, mods: map[string]int64{}}
	if err := c.store.Connect(f.b.ctx); err != nil {
		return c, err
	}
	for _, cmp := range like.If {
		key := c.rename(cmp.Key)
		if cmp.End != "" || cmp.Mod == 0 || slices.ContainsFunc(like.Then, func(w allocator.Write) bool { return w.Key == cmp.Key }) {
			continue
		}
		if first != nil && first.mods[key] != 0 {
			c.mods[key] = first.mods[key]
			continue
		}
		r, err := c.store.Commit(f.b.ctx, allocator.Txn{Then: []allocator.Write{{Key: key, Value: make([]byte, 200)}}})
		if err != nil {
			return c, err
		}
		c.mods[key] = r.Revision
	}
	return c, nil
}

func (c *bare) send(like *allocator.Txn) error {
	c.seq++
	var txn allocator.Txn
	for _, cmp := range like.If {
		key := c.rename(cmp.Key)
		if cmp.End != "" {
			txn.If = append(txn.If, allocator.Compare{Key: key, End: keyspace.After(key), Mod: cmp.Mod})
		} else {
			txn.If = append(txn.If, allocator.Compare{Key: key, Mod: c.mods[key]})
		}
	}
	for _, w := range like.Then {
		txn.Then = append(txn.Then, allocator.Write{Key: c.rename(w.Key), Value: w.Value})
	}
	start := time.Now()
	r, err := c.store.Commit(c.f.b.ctx, txn)
	if err != nil {
		return err
	}
	c.took = append(c.took, time.Since(start).Seconds())
	if !r.Succeeded {
		return fmt.Errorf("bare transaction %d of client %d failed its comparisons: bench compares what is not so", c.seq, c.id)
	}
	for _, w := range txn.Then {
		rel := strings.TrimPrefix(w.Key, barePrefix)
		if strings.HasPrefix(rel, "writers/") || strings.HasPrefix(rel, "addresses/") { // those that are written again
			c.mods[w.Key] = r.Revision
		}
	}
	return nil
}

func bareRun(clients []*bare, like *allocator.Txn, window time.Duration) (outcome, error) {
	errs := make([]error, len(clients))
	var wg sync.WaitGroup
	start := time.Now()
	for i, c := range clients {
		wg.Go(func() {
			c.took = c.took[:0]
			for errs[i] == nil && time.Since(start) < window {
				errs[i] = c.send(like)
			}
		})
	}
	wg.Wait()
	spent := time.Since(start)
	var took []float64
	for _, c := range clients {
		took = append(took, c.took...)
	}
	return summarise(took, spent), errors.Join(errs...)
}

func (b *bench) allocations() (err error) {
	e, err := b.startEtcd("etcd-allocator", true, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.stop()) }()
	most := slices.Max(b.nodes)
	f, err := b.newFleet(e, most)
	if err != nil {
		return err
	}
	defer f.close()
	b.note("allocator: warming up %d nodes", most)
	// Every node opens its chain and claims its block; then each takes what it
	// has held before, which is what a node in service does.
	for range 2 {
		if err := f.each(most, func(nd *node) error {
			for len(nd.pods) < podsOfNode {
				if err := f.add(nd); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		like := f.last.txn // its last commit was an ADD
		if err := f.giveBack(most); err != nil {
			return err
		}
		f.last.txn = like
	}
	like := f.last.txn
	var clients []*bare
	defer func() {
		for _, c := range clients {
			c.store.Close()
		}
	}()
	for i := range most {
		var first *bare
		if i > 0 {
			first = clients[0]
		}
		c, err := f.newBare(i, &like, first)
		clients = append(clients, c)
		if err != nil {
			return err
		}
	}

	ours, limit := make([][]outcome, len(b.nodes)), make([][]outcome, len(b.nodes))
	for run := range b.runs {
		b.note("allocator: run %d of %d, %v nodes", run+1, b.runs, b.nodes)
		for i, n := range b.nodes {
			o, err := f.allocate(n, b.window)
			if err != nil {
				return err
			}
			l, err := bareRun(clients[:n], &like, b.window)
			if err != nil {
				return err
			}
			ours[i], limit[i] = append(ours[i], o), append(limit[i], l)
		}
	}
	b.table.duplicates += f.dupl
	if err := b.checkLedger(e); err != nil {
		return err
	}

	pick := func(oo []outcome, f func(*outcome) float64) (out []float64) {
		for i := range oo {
			out = append(out, f(&oo[i]))
		}
		return out
	}
	rate, p50, p99 := func(o *outcome) float64 { return o.rate }, func(o *outcome) float64 { return o.p50 }, func(o *outcome) float64 { return o.p99 }
	rows := [][]string{{"nodes", "ADD/s", "p50 ms", "p99 ms", "bare txn/s", "p50 ms", "p99 ms", "ratio of rates"}}
	for i, n := range b.nodes {
		ratio := median(ratios(pick(ours[i], rate), pick(limit[i], rate)))
		rows = append(rows, []string{
			fmt.Sprint(n),
			number(median(pick(ours[i], rate))), millis(median(pick(ours[i], p50))), millis(median(pick(ours[i], p99))),
			number(median(pick(limit[i], rate))), millis(median(pick(limit[i], p50))), millis(median(pick(limit[i], p99))),
			number(ratio),
		})
		if n == most {
			b.table.claim(target{fmt.Sprintf("%d nodes, allocations against the bare transaction", n), ratio, 0.4, false, " x"})
		}
	}
	bytes := 0
	for _, w := range like.Then {
		bytes += len(w.Key) + len(w.Value)
	}
	b.table.section("Many nodes in one process, one etcd with fsync", rows,
		fmt.Sprintf("Bare: the transaction that an ADD commits, %d comparisons and %d puts of %d bytes, without the read before it,", len(like.If), len(like.Then), bytes),
		"signature, lock and state directory. Both have one connection a node; their processes' cores are etcd's, too.",
		fmt.Sprintf("Duplicates: %d, and verify agrees.", f.dupl))
	return nil
}

// growth is what pods that came and went leave in etcd.
func (b *bench) growth() (err error) {
	e, err := b.startEtcd("etcd-growth", false, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.stop()) }()
	nodes := min(16, slices.Max(b.nodes))
	f, err := b.newFleet(e, nodes)
	if err != nil {
		return err
	}
	defer f.close()
	each := (b.lifetime + nodes - 1) / nodes
	b.note("growth: %d pods come and go", each*nodes)
	used := func() (float64, error) {
		c, err := e.client(b.ctx)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		r, err := c.Get(b.ctx, f.keys.Meta())
		if err != nil {
			return 0, err
		}
		if _, err := c.Compact(b.ctx, r.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
			return 0, fmt.Errorf("compaction: %w", err)
		}
		if _, err := c.Defragment(b.ctx, e.endpoint); err != nil {
			return 0, fmt.Errorf("defragmentation: %w", err)
		}
		s, err := c.Status(b.ctx, e.endpoint)
		if err != nil {
			return 0, err
		}
		return float64(s.DbSize), nil
	}
	// Every address of every node's block has been used: what each leaves
	// behind, a free address, is not counted as growth.
	if err := f.each(nodes, func(nd *node) error {
		for range 64 {
			if err := f.add(nd); err != nil {
				return err
			}
			if err := f.del(nd); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	before, err := used()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := f.each(nodes, func(nd *node) error {
		for range each {
			if err := f.add(nd); err != nil {
				return err
			}
			if err := f.del(nd); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := used()
	if err != nil {
		return err
	}
	b.table.duplicates += f.dupl
	if err := b.checkLedger(e); err != nil {
		return err
	}
	pods := float64(each * nodes)
	b.table.section("What pods that came and went leave in etcd, after compaction and defragmentation", [][]string{
		{"pods", "before", "after", "bytes a pod", "per 100,000 ADD+DEL"},
		{number(pods), mebi(before), mebi(after), number((after - before) / pods), mebi((after - before) / pods * 100_000)},
	}, fmt.Sprintf("%s ADD and DEL, by %d nodes at once, without fsync, in %s; scaled to 100,000.", number(pods), nodes, took.Round(time.Second)))
	return nil
}
