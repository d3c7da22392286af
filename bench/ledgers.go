package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Ledgers to be verified: every entry signed by its node's key, in the order in
// which a cluster commits, with the live keys that they lead to. Nodes take
// turns; each fills up to its number of pods, then one goes and one comes.

// shape is a ledger's size.
type shape struct {
	entries int
	nodes   int
	pods    int // of each node, live at the end
	etcd    bool
}

func (s *shape) live() int { return s.nodes * s.pods }

// aTransaction is how many commits of the ledger are loaded into etcd at once.
// It bounds how far revisions of an export and of etcd drift apart: an entry's
// own revision must be less than both.
const aTransaction = 24

// ledger is an audit.Source that makes its entries while they are read. That
// can be done once; the live keys come after.
type ledger struct {
	shape
	keys    keyspace.Keys
	cluster string // etcd's
	start   time.Time
	nodes   []*genNode
	state   []audit.Record
}

type genNode struct {
	entry.Writer
	signer note.Signer
	head   keyspace.Writer
	mod    int64 // of head
	rng    *rand.Rand
	addrs  []genAddr
	oldest int // of the live ones, which follow each other in addrs
	live   int

	claims []audit.Record
	made   []audit.Record // of one commit
	err    error
}

type genAddr struct {
	ip      netip.Addr
	id      keyspace.AttachmentID
	lease   keyspace.Attachment
	address keyspace.Address
	mod     int64
}

func newGenLedger(s shape, etcdCluster string) (*ledger, error) {
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		return nil, err
	}
	return &ledger{shape: s, keys: keys, cluster: etcdCluster, start: time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC)}, nil
}

// commits is how many transactions follow the first, which is the operator's
// and has two entries, as has the first of each node.
func (l *ledger) commits() int { return l.entries - 2 - l.shape.nodes }

// Snapshot implements audit.Source.
func (l *ledger) Snapshot() audit.Snapshot {
	return audit.Snapshot{
		Prefix: l.keys.Prefix(), EtcdCluster: l.cluster, Revision: int64(2 + l.commits()), Taken: l.start.Add(24 * time.Hour),
	}
}

// State implements audit.Source.
func (l *ledger) State(_ context.Context, f func(audit.Record) error) error {
	for _, r := range l.state {
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

func newGenNode(l *ledger, w entry.Writer) (*genNode, error) {
	skey, err := entry.NewKey(w)
	if err != nil {
		return nil, err
	}
	n := &genNode{Writer: w, rng: rand.New(rand.NewPCG(uint64(len(l.nodes)), 1))}
	n.head = keyspace.Writer{Chain: entry.NewChainID(), Machine: strings.Repeat("0", 32), Epoch: 1}
	n.signer, n.head.Key, err = entry.ReadSigner(skey)
	return n, err
}

const genCluster = "2f1c7d1e-0d8d-4a53-9a3c-2f1c7d1e0d8d"

// Entries implements audit.Source.
func (l *ledger) Entries(ctx context.Context, f func(audit.Record) error) error {
	if l.nodes != nil {
		return errors.New("a generated ledger can be read once")
	}
	op, err := newGenNode(l, entry.Writer{Kind: entry.KindOperator, Name: "bench"})
	if err != nil {
		return err
	}
	meta := keyspace.Meta{Version: keyspace.FormatVersion, Cluster: genCluster, EtcdCluster: l.cluster, Epoch: 1, State: keyspace.Running}
	op.append(l, 0, &entry.Entry{Op: entry.Meta, Cluster: meta.Cluster, EtcdCluster: meta.EtcdCluster, Epoch: 1, State: string(meta.State), Version: uint64(meta.Version)})
	if op.err != nil {
		return op.err
	}
	meta.Entry = op.head.Head()
	if err := emit(op, f); err != nil {
		return err
	}

	// A node's addresses are a few more than its pods, as blocks are.
	spare := l.pods/8 + 2
	blocks := (l.pods + spare + 63) / 64
	for i := range l.shape.nodes {
		n, err := newGenNode(l, entry.Writer{Kind: entry.KindNode, Name: fmt.Sprintf("node-%04d", i)})
		if err != nil {
			return err
		}
		first := 64 * (1 + i*blocks)
		for j := range l.pods + spare {
			o := first + j
			n.addrs = append(n.addrs, genAddr{ip: netip.AddrFrom4([4]byte{10, byte(o >> 16), byte(o >> 8), byte(o)})})
		}
		l.nodes = append(l.nodes, n)
	}
	// A round is one commit of each node, signed on all cores.
	for done := 0; done < l.commits(); {
		if err := ctx.Err(); err != nil {
			return err
		}
		round := l.nodes[:min(len(l.nodes), l.commits()-done)]
		var wg sync.WaitGroup
		for part := range slices.Chunk(round, (len(round)+runtime.GOMAXPROCS(0)-1)/runtime.GOMAXPROCS(0)) {
			offset := done
			wg.Go(func() {
				for i, n := range part {
					n.step(l, 1+offset+i)
				}
			})
			done += len(part)
		}
		wg.Wait()
		for _, n := range round {
			if n.err != nil {
				return n.err
			}
			if err := emit(n, f); err != nil {
				return err
			}
		}
	}
	l.settle(op, &meta)
	return nil
}

func emit(n *genNode, f func(audit.Record) error) error {
	for _, r := range n.made {
		if err := f(r); err != nil {
			return err
		}
	}
	n.made = n.made[:0]
	return nil
}

// append makes commit number i of the ledger, with an open before it where it
// is the writer's first.
func (n *genNode) append(l *ledger, i int, e *entry.Entry) {
	n.mod = int64(2 + i)
	put := func(e *entry.Entry) {
		e.Chain, e.Seq, e.Prev = n.head.Chain, n.head.Seq+1, n.head.Hash
		e.Time, e.Revision = l.start.Add(time.Duration(i)*time.Millisecond), int64(1+i/aTransaction)
		stored, hash, err := entry.Sign(e, n.signer)
		if err != nil {
			n.err = err
			return
		}
		n.head.Seq, n.head.Hash = e.Seq, hash
		n.made = append(n.made, audit.Record{Key: l.keys.Entry(n.Writer, e.Chain, e.Seq), Value: stored, Create: n.mod, Mod: n.mod, Version: 1})
	}
	if n.head.Seq == 0 {
		put(&entry.Entry{Op: entry.Open, Writer: n.Writer, Key: n.head.Key, Machine: n.head.Machine, Cluster: genCluster, Epoch: 1})
	}
	put(e)
}

// step is the node's next commit: a pod comes, or the oldest goes.
func (n *genNode) step(l *ledger, i int) {
	const space, pool = "default", "prod"
	if n.live == l.pods {
		a := &n.addrs[n.oldest]
		n.oldest, n.live = (n.oldest+1)%len(n.addrs), n.live-1
		gone := &entry.Entry{
			Op: entry.Release, Space: space, Pool: pool, Acquire: a.lease.Acquire, Addresses: []entry.Address{{IP: a.ip}},
			Network: a.id.Network, Container: a.id.Container, Interface: a.id.Interface, Node: a.id.Node, Pod: a.lease.Pod, PodUID: a.lease.PodUID,
		}
		n.append(l, i, gone)
		a.address, a.mod = keyspace.Address{State: keyspace.Free, Pool: pool, Release: n.head.Head(), Since: gone.Time}, n.mod
		a.lease = keyspace.Attachment{}
		return
	}
	at := (n.oldest + n.live) % len(n.addrs)
	a := &n.addrs[at]
	n.live++
	x := func() uint64 { return n.rng.Uint64() }
	a.id = keyspace.AttachmentID{Node: n.Name, Network: "prod", Container: fmt.Sprintf("%016x%016x%016x%016x", x(), x(), x(), x()), Interface: "eth0"}
	a.lease = keyspace.Attachment{
		Space: space, Pool: pool, Pod: fmt.Sprintf("shop/cart-%09x-%05x", x()>>28, x()>>44),
		PodUID: fmt.Sprintf("%08x-%04x-4%03x-9%03x-%012x", x()>>32, x()>>48, x()>>52, x()>>52, x()>>16),
		Leases: []keyspace.Lease{{Address: netip.PrefixFrom(a.ip, 8), Gateway: netip.AddrFrom4([4]byte{10, 0, 0, 1})}},
	}
	lease := a.lease.Leases[0]
	e := &entry.Entry{
		Op: entry.Acquire, Space: space, Pool: pool,
		Addresses: []entry.Address{{IP: a.ip, Bits: lease.Address.Bits(), Gateway: lease.Gateway, After: a.address.Release}},
		Network:   a.id.Network, Container: a.id.Container, Interface: a.id.Interface, Node: a.id.Node, Pod: a.lease.Pod, PodUID: a.lease.PodUID,
	}
	claim := at%64 == 0 && a.mod == 0
	if claim {
		e.Blocks = []netip.Prefix{netip.PrefixFrom(a.ip, 26)}
	}
	n.append(l, i, e)
	ref := n.head.Head()
	a.lease.Acquire, a.mod = ref, n.mod
	a.address = keyspace.Address{State: keyspace.Leased, Pool: pool, Holder: &a.id, Acquire: ref}
	if claim {
		// Written once, so it is kept as it is to be read.
		b := keyspace.BlockID{Space: space, Pool: pool, Prefix: e.Blocks[0]}
		n.claims = append(n.claims, one(l.keys.Block(b), keyspace.Block{Node: n.Name, Claim: ref}, n.mod))
	}
}

func one(key string, v any, mod int64) audit.Record {
	return audit.Record{Key: key, Value: keyspace.Encode(v), Create: mod, Mod: mod, Version: 1}
}

// settle makes the live keys. A key that was written more than once says so
// nowhere but in its version, which nothing depends on.
func (l *ledger) settle(op *genNode, meta *keyspace.Meta) {
	l.state = append(l.state, one(l.keys.Meta(), meta, op.mod))
	for _, n := range append([]*genNode{op}, l.nodes...) {
		l.state = append(l.state, one(l.keys.Writer(n.Writer), n.head, n.mod))
		l.state = append(l.state, n.claims...)
		for i := range n.addrs {
			a := &n.addrs[i]
			if a.mod == 0 {
				continue
			}
			l.state = append(l.state, one(l.keys.Address("default", a.ip), a.address, a.mod))
			if a.address.State == keyspace.Leased {
				l.state = append(l.state, one(l.keys.Attachment(a.id), a.lease, a.mod))
			}
		}
	}
	slices.SortFunc(l.state, func(a, b audit.Record) int { return strings.Compare(a.Key, b.Key) })
}

// loadEtcd puts an export into an etcd that has never been written to. Only what a
// reader of the last revision sees is put: what a compacted etcd holds.
func loadEtcd(ctx context.Context, c *clientv3.Client, path string) error {
	x, err := audit.OpenExport(path)
	if err != nil {
		return err
	}
	defer x.Close()
	state := map[int64][]clientv3.Op{} // by the revision that wrote it
	if err := x.State(ctx, func(r audit.Record) error {
		state[r.Mod] = append(state[r.Mod], clientv3.OpPut(strings.Clone(r.Key), string(r.Value)))
		return nil
	}); err != nil {
		return err
	}
	var ops, next []clientv3.Op // of the transaction, of one commit
	var commits int
	var mod int64
	first := true
	send := func() error {
		if len(ops) == 0 {
			return nil
		}
		_, err := c.Txn(ctx).Then(ops...).Commit()
		ops, commits = ops[:0], 0
		return err
	}
	commit := func() error {
		next = append(next, state[mod]...)
		if commits == aTransaction || len(ops)+len(next) > 128 {
			if err := send(); err != nil {
				return err
			}
		}
		ops, next, commits = append(ops, next...), next[:0], commits+1
		if first {
			// What is at one revision is read in key order, and meta, an
			// operator's, must be read before the nodes' entries.
			first = false
			return send()
		}
		return nil
	}
	if err := x.Entries(ctx, func(r audit.Record) error {
		if r.Mod != mod && mod != 0 {
			if err := commit(); err != nil {
				return err
			}
		}
		mod = r.Mod
		next = append(next, clientv3.OpPut(strings.Clone(r.Key), string(r.Value)))
		return nil
	}); err != nil {
		return err
	}
	if err := commit(); err != nil {
		return err
	}
	return send()
}

func (b *bench) verifications() error {
	rows := [][]string{{"from", "entries", "live leases", "runs", "entries/s", "seconds", "peak memory"}}
	type peak struct {
		shape
		bytes float64
	}
	var peaks []peak
	for _, s := range b.ledgers {
		fromFile, fromEtcd, err := b.verifyShape(s)
		if err != nil {
			return fmt.Errorf("%d entries, %d leases: %w", s.entries, s.live(), err)
		}
		row := func(from string, vv []*verdict) (rate, memory float64) {
			var rates, seconds, peaks []float64
			for _, v := range vv {
				rates, seconds, peaks = append(rates, float64(v.Entries)/v.Seconds), append(seconds, v.Seconds), append(peaks, v.Peak)
			}
			rate, memory = median(rates), median(peaks)
			rows = append(rows, []string{from, number(float64(s.entries)), number(float64(vv[0].Leased)), fmt.Sprint(len(vv)), number(rate), number(median(seconds)), mebi(memory)})
			return rate, memory
		}
		rate, memory := row("export", fromFile)
		peaks = append(peaks, peak{s, memory})
		if s.etcd {
			if len(fromEtcd) > 0 {
				row("etcd", fromEtcd)
			} else {
				rows = append(rows, []string{"etcd", number(float64(s.entries)), number(float64(fromFile[0].Leased)), "0", "-", "more than " + number(b.patience.Seconds()), "-"})
			}
			b.table.claim(target{fmt.Sprintf("verify of an export, %s live leases, entries/s", number(float64(s.live()))), rate, 1_000_000, false, ""})
		}
	}
	for i := range peaks {
		for _, q := range peaks[i+1:] {
			if p := &peaks[i]; p.live() == q.live() && p.entries < q.entries {
				b.table.claim(target{
					fmt.Sprintf("memory for %s entries against %s, %s live leases", number(float64(q.entries)), number(float64(p.entries)), number(float64(p.live()))),
					q.bytes / p.bytes, 1.25, true, " x",
				})
			}
		}
	}
	b.table.section("Verify, the whole check, in a process of its own", rows,
		"In turn from export and etcd; from etcd fewer runs where all together would take more than a minute.",
		"Tips' signatures, all hashes and links, replay, comparison with the live keys; every verify found nothing wrong.",
		"An export is read from the page cache. Peak memory is VmHWM, the program's own pages included. etcd holds what a compacted one does.")
	return nil
}

// verifyShape makes one ledger and verifies it, in turn from its export and from etcd.
func (b *bench) verifyShape(s shape) (fromFile, fromEtcd []*verdict, err error) {
	id := "00000000cafebeef" // an export's etcd need not be there
	var c *clientv3.Client
	var e *etcd
	if s.etcd {
		if e, err = b.startEtcd("etcd-verify", false, nil); err != nil {
			return nil, nil, err
		}
		defer func() { err = errors.Join(err, e.stop()) }()
		if c, err = e.client(b.ctx); err != nil {
			return nil, nil, err
		}
		defer c.Close()
		m, err := c.MemberList(b.ctx)
		if err != nil {
			return nil, nil, err
		}
		id = keyspace.EtcdClusterID(m.Header.ClusterId)
	}
	b.note("verify: signing %d entries with %d live leases", s.entries, s.live())
	l, err := newGenLedger(s, id)
	if err != nil {
		return nil, nil, err
	}
	path := filepath.Join(b.dir, "ledger.export")
	defer os.Remove(path)
	if err := writeExport(b.ctx, path, l); err != nil {
		return nil, nil, err
	}
	l = nil // its memory is wanted elsewhere
	if s.etcd {
		b.note("verify: loading them into etcd")
		if err := loadEtcd(b.ctx, c, path); err != nil {
			return nil, nil, fmt.Errorf("loading etcd: %w", err)
		}
	}
	b.note("verify: %d runs", b.runs)
	left, slow := b.patience, false
	for range b.runs {
		v, err := b.verify("export", path)
		if err != nil {
			return nil, nil, err
		}
		fromFile = append(fromFile, v)
		if !s.etcd || slow {
			continue
		}
		start := time.Now()
		v, err = b.verify("etcd-ledger", e.endpoint)
		left -= time.Since(start)
		slow = left < time.Since(start) || errors.Is(err, errSlow)
		switch {
		case err == nil:
			fromEtcd = append(fromEtcd, v)
		case !errors.Is(err, errSlow):
			return nil, nil, err
		}
	}
	for _, v := range slices.Concat(fromFile, fromEtcd) {
		if v.Entries != int64(s.entries) {
			return nil, nil, fmt.Errorf("verify saw %d entries, and there are %d", v.Entries, s.entries)
		}
	}
	return fromFile, fromEtcd, nil
}

func writeExport(ctx context.Context, path string, src audit.Source) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriter(f)
	if err := audit.WriteExport(ctx, w, src); err != nil {
		return err
	}
	return w.Flush()
}
