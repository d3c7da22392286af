package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// ledger is a store in memory that the tests write honest ledgers into, and
// then tamper with. It is a Source.
type ledger struct {
	t       testing.TB
	keys    keyspace.Keys
	rev     int64
	kv      map[string]*Record
	writers map[string]*testWriter
	cluster string
	etcd    string
	epoch   uint64
	now     time.Time
	held    map[string]*holding // attachment -> what it holds
	freed   map[string]entry.Ref
	cheap   bool // sign with nonsense what is neither checked nor a tip

	// Of the next acquires and meta entries.
	pod, assert string
	cooldown    int64
	recovering  bool
	version     int
}

type testWriter struct {
	entry.Writer
	signer note.Signer
	vkey   string
	head   keyspace.Writer
	opened bool
	mark   entry.Ref // for the next open
}

type holding struct {
	att      keyspace.AttachmentID
	space    string
	pool     string
	ips      []netip.Addr
	acquire  entry.Ref
	cooldown int64
	pod, uid string
}

const testCluster = "2f1c7d1e-0d8d-4a53-9a3c-2f1c7d1e0d8d"

func newLedger(t testing.TB) *ledger {
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	return &ledger{
		t: t, keys: keys, rev: 100, kv: map[string]*Record{}, writers: map[string]*testWriter{},
		cluster: testCluster, etcd: "cafe00000000beef", epoch: 1, now: time.Date(2026, 11, 20, 14, 0, 0, 123456789, time.UTC),
		held: map[string]*holding{}, freed: map[string]entry.Ref{}, pod: "shop/cart-7d9f", version: keyspace.FormatVersion,
	}
}

// clone is an independent copy, to be tampered with.
func (l *ledger) clone(t testing.TB) *ledger {
	c := *l
	c.t = t
	c.kv = map[string]*Record{}
	for k, r := range l.kv {
		cp := *r
		c.kv[k] = &cp
	}
	c.writers = map[string]*testWriter{}
	for k, w := range l.writers {
		cp := *w
		c.writers[k] = &cp
	}
	c.held, c.freed = maps.Clone(l.held), maps.Clone(l.freed)
	return &c
}

// Snapshot implements Source.
func (l *ledger) Snapshot() Snapshot {
	return Snapshot{Prefix: l.keys.Prefix(), EtcdCluster: l.etcd, Revision: l.rev, Taken: l.now.Add(time.Second)}
}

func (l *ledger) yield(entries bool, f func(Record) error) error {
	var rr []*Record
	for k, r := range l.kv {
		if strings.HasPrefix(k, l.keys.Chains()) == entries {
			rr = append(rr, r)
		}
	}
	slices.SortFunc(rr, func(a, b *Record) int {
		if entries && a.Mod != b.Mod {
			return int(a.Mod - b.Mod)
		}
		return strings.Compare(a.Key, b.Key)
	})
	for _, r := range rr {
		if err := f(*r); err != nil {
			return err
		}
	}
	return nil
}

// State implements Source.
func (l *ledger) State(_ context.Context, f func(Record) error) error { return l.yield(false, f) }

// Entries implements Source.
func (l *ledger) Entries(_ context.Context, f func(Record) error) error { return l.yield(true, f) }

// put and del are what a plain client does, one transaction each.
func (l *ledger) put(key string, value []byte) {
	l.rev++
	l.putAt(key, value)
}

func (l *ledger) putAt(key string, value []byte) {
	old := l.kv[key]
	r := &Record{Key: key, Value: value, Create: l.rev, Mod: l.rev, Version: 1}
	if old != nil {
		r.Create, r.Version, r.Lease = old.Create, old.Version+1, old.Lease
	}
	l.kv[key] = r
}

func (l *ledger) del(key string) {
	if l.kv[key] == nil {
		l.t.Fatalf("no key %s", key)
	}
	l.rev++
	delete(l.kv, key)
}

func (l *ledger) value(key string) []byte {
	r := l.kv[key]
	if r == nil {
		l.t.Fatalf("no key %s", key)
	}
	return bytes.Clone(r.Value)
}

// get decodes a live value.
func get[T any](l *ledger, key string) (v T) {
	if err := keyspace.Decode(l.value(key), &v); err != nil {
		l.t.Fatal(err)
	}
	return v
}

func testKey(t testing.TB, w entry.Writer, seed string) (note.Signer, string) {
	sum := sha256.Sum256([]byte(seed))
	skey, vkey, err := note.GenerateKey(bytes.NewReader(append(sum[:], sum[:]...)), w.String())
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	return signer, vkey
}

func chainID(s string) (c entry.ChainID) {
	sum := sha256.Sum256([]byte(s))
	copy(c[:], sum[:])
	return c
}

func (l *ledger) writer(name string) *testWriter {
	w := l.writers[name]
	if w == nil {
		ew, err := entry.ParseWriter(name)
		if err != nil {
			l.t.Fatal(err)
		}
		w = &testWriter{Writer: ew}
		w.signer, w.vkey = testKey(l.t, ew, name)
		w.head = keyspace.Writer{Chain: chainID(name + "#1"), Machine: "m-" + ew.Name}
		l.writers[name] = w
	}
	return w
}

// nonsense signs with bytes that are no signature.
type nonsense struct {
	note.Signer
	rng *rand.Rand
}

func (n nonsense) Sign([]byte) ([]byte, error) {
	b := make([]byte, 64)
	for i := range b {
		b[i] = byte(n.rng.Uint32())
	}
	return b, nil
}

var testRNG = rand.New(rand.NewPCG(1, 2))

// append signs one entry and puts it behind the writer's head, without a
// transaction of its own.
func (l *ledger) append(w *testWriter, e *entry.Entry) entry.Ref {
	l.now = l.now.Add(time.Millisecond)
	e.Chain, e.Seq, e.Prev = w.head.Chain, w.head.Seq+1, w.head.Hash
	if e.Time.IsZero() {
		e.Time = l.now
	}
	if e.Revision == 0 {
		e.Revision = l.rev - 1
	}
	signer := w.signer
	if l.cheap && e.Op != entry.Open && e.Op != entry.Meta {
		signer = nonsense{w.signer, testRNG}
	}
	stored, hash, err := entry.Sign(e, signer)
	if err != nil {
		l.t.Fatal(err)
	}
	w.head.Seq, w.head.Hash = e.Seq, hash
	l.putAt(l.keys.Entry(w.Writer, e.Chain, e.Seq), stored)
	return w.head.Head()
}

// commit appends entries in one transaction, an open before them where the
// writer has none, and writes the head.
func (l *ledger) commit(w *testWriter, ee ...*entry.Entry) (refs []entry.Ref) {
	l.rev++
	if !w.opened {
		w.opened = true
		e := &entry.Entry{Op: entry.Open, Writer: w.Writer, Key: w.vkey, Machine: w.head.Machine, Cluster: l.cluster, Epoch: l.epoch, Mark: w.mark}
		if old, ok := l.kv[l.keys.Writer(w.Writer)]; ok {
			var v keyspace.Writer
			if err := keyspace.Decode(old.Value, &v); err != nil {
				l.t.Fatal(err)
			}
			e.Predecessor = v.Head()
		}
		w.head.Seq, w.head.Hash, w.head.Epoch, w.head.Key = 0, entry.Hash{}, l.epoch, w.vkey
		l.append(w, e)
	}
	for _, e := range ee {
		refs = append(refs, l.append(w, e))
		switch e.Op {
		case entry.Rotate:
			w.head.Key = e.Key
		case entry.Recover:
			w.head.Recover = refs[len(refs)-1]
		}
	}
	l.putAt(l.keys.Writer(w.Writer), keyspace.Encode(w.head))
	return refs
}

func (l *ledger) meta(w *testWriter, state keyspace.State) entry.Ref {
	e := &entry.Entry{Op: entry.Meta, Cluster: l.cluster, EtcdCluster: l.etcd, Epoch: l.epoch, State: string(state), Recovering: l.recovering, Version: uint64(l.version)}
	ref := l.commit(w, e)[0]
	l.putAt(l.keys.Meta(), keyspace.Encode(keyspace.Meta{
		Version: l.version, Cluster: l.cluster, EtcdCluster: l.etcd, Epoch: l.epoch, State: state, Recovering: l.recovering, Entry: ref,
	}))
	return ref
}

func att(node, container string) keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: node, Network: "prod", Container: container, Interface: "eth0"}
}

func (l *ledger) acquire(w *testWriter, a keyspace.AttachmentID, ips ...string) entry.Ref {
	return l.acquireIn(w, a, nil, ips...)
}

func (l *ledger) acquireIn(w *testWriter, a keyspace.AttachmentID, blocks []netip.Prefix, ips ...string) entry.Ref {
	var aa []entry.Address
	for _, s := range ips {
		aa = append(aa, addressIn(s))
	}
	return l.acquireAt(w, a, blocks, aa...)
}

// addressIn is an address as our pools hand it out.
func addressIn(ip string) entry.Address {
	a := entry.Address{IP: netip.MustParseAddr(ip)}
	if a.IP.Is4() {
		a.Bits, a.Gateway, a.Range = 8, netip.MustParseAddr("10.0.0.1"), netipx.MustParseIPRange("10.0.0.2-10.255.255.254")
	} else {
		a.Bits, a.Range = 64, netipx.MustParseIPRange("fd00::2-fd00::ffff")
	}
	return a
}

func (l *ledger) acquireAt(w *testWriter, a keyspace.AttachmentID, blocks []netip.Prefix, aa ...entry.Address) entry.Ref {
	e := &entry.Entry{
		Op: entry.Acquire, Space: "default", Pool: "prod", Blocks: blocks, Cooldown: l.cooldown, Assert: l.assert,
		Node: a.Node, Network: a.Network, Container: a.Container, Interface: a.Interface, Pod: l.pod, PodUID: "u-" + a.Container, Trace: "t",
	}
	h := &holding{att: a, space: e.Space, pool: e.Pool, cooldown: e.Cooldown, pod: e.Pod, uid: e.PodUID}
	v := keyspace.Attachment{Space: e.Space, Pool: e.Pool, Cooldown: e.Cooldown, Pod: e.Pod, PodUID: e.PodUID}
	for _, ea := range aa {
		ea.After = l.freed[ea.IP.String()]
		e.Addresses = append(e.Addresses, ea)
		h.ips = append(h.ips, ea.IP)
		v.Leases = append(v.Leases, keyspace.Lease{Address: netip.PrefixFrom(ea.IP, ea.Bits), Gateway: ea.Gateway, Range: ea.Range})
	}
	ref := l.commit(w, e)[0]
	h.acquire, v.Acquire = ref, ref
	l.held[a.String()] = h
	for _, ip := range h.ips {
		l.putAt(l.keys.Address(e.Space, ip), keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: e.Pool, Holder: &a, Acquire: ref}))
	}
	l.putAt(l.keys.Attachment(a), keyspace.Encode(v))
	l.claimed(e, ref)
	return ref
}

func (l *ledger) claimed(e *entry.Entry, ref entry.Ref) {
	for _, p := range e.Blocks {
		l.putAt(l.keys.Block(keyspace.BlockID{Space: e.Space, Pool: e.Pool, Prefix: p}), keyspace.Encode(keyspace.Block{Node: e.Node, Claim: ref}))
	}
}

func (l *ledger) releaseEntry(a keyspace.AttachmentID) *entry.Entry {
	h := l.held[a.String()]
	e := &entry.Entry{
		Op: entry.Release, Space: h.space, Pool: h.pool, Acquire: h.acquire,
		Node: a.Node, Network: a.Network, Container: a.Container, Interface: a.Interface, Pod: h.pod, PodUID: h.uid,
	}
	for _, ip := range h.ips {
		e.Addresses = append(e.Addresses, entry.Address{IP: ip})
	}
	return e
}

func (l *ledger) release(w *testWriter, a keyspace.AttachmentID) entry.Ref {
	h := l.held[a.String()]
	e := l.releaseEntry(a)
	ref := l.commit(w, e)[0]
	v := keyspace.Address{State: keyspace.Free, Pool: h.pool, Release: ref, Since: e.Time, Cooldown: h.cooldown}
	for _, ip := range h.ips {
		l.putAt(l.keys.Address(h.space, ip), keyspace.Encode(v))
		l.freed[ip.String()] = ref
	}
	delete(l.kv, l.keys.Attachment(a))
	delete(l.held, a.String())
	return ref
}

func (l *ledger) block(op entry.Op, w *testWriter, node string, p netip.Prefix) {
	e := &entry.Entry{Op: op, Space: "default", Pool: "prod", Blocks: []netip.Prefix{p}, Node: node}
	ref := l.commit(w, e)[0]
	if op == entry.Claim {
		l.claimed(e, ref)
	} else {
		delete(l.kv, l.keys.Block(keyspace.BlockID{Space: e.Space, Pool: e.Pool, Prefix: p}))
	}
}

func (l *ledger) pool(w *testWriter, name, spec string) {
	e := &entry.Entry{Op: entry.Pool, Pool: name}
	if spec != "" {
		e.Spec = sha256.Sum256([]byte(spec))
	}
	l.commit(w, e)
	if spec != "" {
		l.putAt(l.keys.Pool(name), []byte(spec))
	} else {
		delete(l.kv, l.keys.Pool(name))
	}
}

// replace is 'node replace': an operator closes a writer's chain.
func (l *ledger) replace(op, w *testWriter) { l.closes(op, w, false) }

func (l *ledger) closes(op, w *testWriter, remove bool) {
	v := get[keyspace.Writer](l, l.keys.Writer(w.Writer))
	v.Closed = l.commit(op, &entry.Entry{Op: entry.Close, Writer: w.Writer, Closes: v.Head(), Remove: remove, Reason: "node lost"})[0]
	v.Removed = remove
	w.head = v
	l.putAt(l.keys.Writer(w.Writer), keyspace.Encode(v))
}

// anew lets a writer open its n-th chain with its next commit.
func (l *ledger) anew(w *testWriter, n int) {
	w.opened = false
	w.head = keyspace.Writer{Chain: chainID(fmt.Sprintf("%s#%d", w.Writer, n)), Machine: w.head.Machine}
}

// story is a small ledger in which everything happens once: all ops, two
// families, operators' releases, rotation, replacement, a restore.
func story(t testing.TB) *ledger {
	l := newLedger(t)
	op, a, b := l.writer("operator/ann@desk"), l.writer("node/a"), l.writer("node/b")
	l.meta(op, keyspace.Running)
	l.pool(op, "prod", `{"ranges":[[{"subnet":"10.22.0.0/16"}]]}`)
	l.pool(op, "gone", `{"ranges":[]}`)
	l.pool(op, "gone", "")
	l.acquireIn(a, att("a", "c1"), []netip.Prefix{netip.MustParsePrefix("10.22.7.0/26")}, "10.22.7.2")
	l.cooldown = 60
	l.acquire(a, att("a", "c2"), "10.22.7.3", "fd00::3")
	l.cooldown = 0
	l.block(entry.Claim, b, "b", netip.MustParsePrefix("10.22.7.64/26"))
	l.pod = "shop/\"cart\" & more" // legal, and JSON escapes it
	l.acquire(b, att("b", "c3"), "10.22.7.66")
	l.release(a, att("a", "c1"))
	l.acquire(b, att("b", "c4"), "10.22.7.2") // borrowed
	l.release(a, att("a", "c2"))
	l.acquire(a, att("a", "c5"), "10.22.7.4")
	l.release(op, att("a", "c5")) // by hand
	signer, vkey := testKey(t, b.Writer, "b's second key")
	l.commit(b, &entry.Entry{Op: entry.Rotate, Key: vkey})
	b.signer, b.vkey = signer, vkey
	l.acquire(b, att("b", "c6"), "10.22.7.67")
	l.release(b, att("b", "c6"))
	l.replace(op, a)
	l.anew(a, 2)
	a.signer, a.vkey = testKey(t, a.Writer, "a's second key")
	l.now = l.now.Add(time.Minute)
	l.acquire(a, att("a", "c7"), "10.22.7.3")
	l.block(entry.Claim, a, "a", netip.MustParsePrefix("10.22.7.128/26"))
	l.block(entry.Unclaim, a, "a", netip.MustParsePrefix("10.22.7.128/26"))
	l.acquire(a, att("a", "c8"), "10.22.7.5")
	l.release(a, att("a", "c8"))
	return l
}

func (l *ledger) verify(o Options) *Report {
	l.t.Helper()
	r, err := Verify(context.Background(), l, o)
	if err != nil {
		l.t.Fatalf("Verify: %v", err)
	}
	return r
}

func codesOf(r *Report) []Code {
	out := slices.Collect(maps.Keys(r.ByCode))
	slices.Sort(out)
	return out
}

func show(t testing.TB, r *Report) {
	t.Helper()
	var b strings.Builder
	if err := r.Summary(&b); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + b.String())
}

// noteOf signs any text with a writer's key.
func noteOf(t testing.TB, w *testWriter, text string) []byte {
	b, err := note.Sign(&note.Note{Text: text}, w.signer)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
