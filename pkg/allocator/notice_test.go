package allocator

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Guarantees that nothing else in these tests holds by itself, one schedule each
// (test/mutate says what breaks them).

// fill leases whatever is free in a pool to pods of a node.
func (m *machine) fill(t testing.TB, p *Pool) {
	t.Helper()
	for i := 0; ; i++ {
		m.reconnect()
		if _, err := m.add(p, fmt.Sprint("fill", i)); errors.Is(err, ErrExhausted) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// twoBlocks is a pool of 10.22.0.0/28 and 10.22.0.16/28.
func twoBlocks(t testing.TB) *Pool {
	t.Helper()
	p, err := NewPool("default", "net", rangeSets("10.22.0.0/27"), nil, false, 16, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestLostReplySettled: what was sent and not answered cannot land after a later
// answer, wherever etcd goes away in between.
func TestLostReplySettled(t *testing.T) {
	failed := 0
	for reads := range 12 {
		w := newWorld(t, 1)
		w.init(t)
		n := w.nodes[0]
		n.mustAdd(t, mustPool(t, "10.22.0.0/24"), "a")
		other := mustPool(t, "10.23.0.0/24") // without a hint an ADD reads more than once
		n.conn.reads = 0
		n.conn.next, n.conn.deafAfter = loseLate, reads+1
		if _, err := n.add(other, "b"); err != nil {
			failed++
		}
		n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("b"), "") })
		w.store.land()
		if w.has(n, "b") != nil {
			t.Errorf("%d reads, then nothing: an ADD landed after its DEL was answered", reads+1)
		}
		w.store.check(t)
	}
	if failed < 4 {
		t.Errorf("only %d ADDs failed: this tests nothing", failed)
	}
}

// TestFirstCommitRefused: with the first commit of a chain under way, another that
// was refused, or never sent, says nothing of it.
func TestFirstCommitRefused(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.conn.next = killSent
	if _, err := n.add(p, "a"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	n.reconnect()
	n.conn.next = refuse
	if _, err := n.add(p, "b"); !errors.Is(err, ErrUnknownOutcome) {
		t.Fatal(err)
	}
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
	w.store.land()
	if w.has(n, "a") != nil {
		t.Error("the first commit landed after its DEL was answered")
	}
}

// TestOpensBehind: a node's chain is not opened in the epoch of a view that lags.
func TestOpensBehind(t *testing.T) {
	w, p, nodes := stage(t, 2, "10.22.0.0/24")
	n, fresh := nodes[0], nodes[1]
	n.mustAdd(t, p, "a")
	before := w.store.now().revision
	w.nodes = w.nodes[:1]
	w.drill(t)
	fresh.conn.lag = int(w.store.now().revision - before)
	if _, err := fresh.add(p, "b"); err != nil {
		t.Fatal(err)
	}
}

// TestReleaseLagging: an operator's release that finds nothing, by a member that lags,
// looks again.
func TestReleaseLagging(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	w.admin.conn.lag = 1
	if err := w.admin.run(func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("a"), entry.Ref{}, "test") }); err != nil {
		t.Fatal(err)
	}
	if w.has(n, "a") != nil {
		t.Error("it is leased yet")
	}
}

// TestQueuedNotAsserted: what a DEL has queued is not asserted by a drill, though an
// older lease of the same pod came back with the restore, and was ended.
func TestQueuedNotAsserted(t *testing.T) {
	for _, locked := range []bool{false, true} {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		n.mustAdd(t, p, "a")
		n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
		n.mustAdd(t, p, "a", netip.MustParseAddr("10.22.0.9"))
		n.conn.next = killUnsent
		if _, err := n.add(p, "b"); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		n.reconnect()
		n.conn.next = deafReads
		unlock := func() {}
		if locked { // the DEL only queues, and what is held stays
			var err error
			if unlock, err = n.writer().Dir.Lock(bg); err != nil {
				t.Fatal(err)
			}
		}
		err := n.run(func(x *Writer) error {
			if locked {
				x.LockTimeout = time.Millisecond
			}
			return x.Release(bg, n.attachment("a"), "")
		})
		unlock()
		if err != nil {
			t.Fatal(err)
		}
		w.store.restore(2, true)
		if r := w.drill(t)["n0"]; w.has(n, "a") != nil {
			t.Errorf("locked %v: the lease of a pod that is gone is back: %+v", locked, r)
		}
		w.store.check(t)
	}
}

// TestQueueFileGone: a release that was queued, and whose file was then damaged and
// moved away, is not asserted by a drill.
func TestQueueFileGone(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.conn.next = killUnsent // what became of this one the DEL has to find out first
	if _, err := n.add(p, "b"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	n.reconnect()
	n.conn.next = deafReads
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(n.dir, "queue")); err != nil {
		t.Fatal(err)
	}
	w.store.restore(1, true)
	if r := w.drill(t)["n0"]; w.has(n, "a") != nil {
		t.Errorf("the lease of a pod that is gone is back: %+v", r)
	}
}

// TestReplacedAndRestored: a node whose replacement a restore has taken back has a
// key that nothing vouches for. It is refused until it is replaced again.
func TestReplacedAndRestored(t *testing.T) {
	w, p, nodes := stage(t, 2, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	w.nodes[1].mustAdd(t, p, "b")
	before := w.store.now().revision
	if err := os.RemoveAll(n.dir); err != nil {
		t.Fatal(err)
	}
	replace := func(x *Writer) error {
		_, err := x.Replace(bg, Replacement{Writer: n.who}, "test")
		return err
	}
	w.admin.must(t, replace)
	n.mustAdd(t, p, "c")
	w.store.restore(int(w.store.now().revision-before), true)
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	n.reconnect()
	err := n.run(func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	if !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "'ledger node replace n0'") {
		t.Fatalf("recover node: %v", err)
	}
	w.admin.must(t, replace)
	r := w.drill(t)["n0"]
	if r == nil || !r.Done || w.has(n, "a") == nil || w.has(n, "c") == nil {
		t.Errorf("%+v; it has %v and %v", r, w.has(n, "a"), w.has(n, "c"))
	}
	n.mustAdd(t, p, "d")
}

// TestAnotherCluster: an etcd with another cluster ID is not allocated from, even by
// a node that has never been in one.
func TestAnotherCluster(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	w.store.restore(0, true)
	if _, err := w.nodes[0].add(mustPool(t, "10.22.0.0/24"), "a"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("ADD: %v", err)
	}
}

// TestAnotherLease: an address that names another lease of the same pod is not this
// lease's.
func TestAnotherLease(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	ips := n.mustAdd(t, p, "a")
	id := n.attachment("a")
	w.put(testKeys.Address("default", ips[0]), string(keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: "net", Holder: &id, Acquire: entry.Ref{Seq: 99}})))
	if err := n.run(func(x *Writer) error { return x.Check(bg, id, ips) }); !errors.Is(err, ErrIntegrity) {
		t.Errorf("CHECK: %v", err)
	}
}

// TestAddOverQueued: an ADD ends the queued release of its attachment first, which
// would end the new lease later.
func TestAddOverQueued(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.conn.next = deafReads
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	n.mustAdd(t, p, "a")
	n.must(t, func(x *Writer) error { _, err := x.Drain(bg); return err })
	if w.has(n, "a") == nil {
		t.Error("the release that was queued before ended the new lease")
	}
}

// TestReapOld: reaping a lease that has ended leaves what is held by the next.
func TestReapOld(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	old := w.has(n, "a").Acquire
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
	n.mustAdd(t, p, "a")
	n.must(t, func(x *Writer) error { _, err := x.Reap(bg, n.attachment("a"), old, "test"); return err })
	if n.writer().Dir.Holding(n.attachment("a")) == nil || w.has(n, "a") == nil {
		t.Error("the lease that runs is not held any more, or ended")
	}
}

// TestGCOneNetwork: GC of one network forgets nothing that is held in another.
func TestGCOneNetwork(t *testing.T) {
	_, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	id := n.attachment("a")
	id.Network = "other"
	n.must(t, func(x *Writer) error { _, err := x.Acquire(bg, Request{ID: id, Pool: p}); return err })
	n.must(t, func(x *Writer) error { _, err := x.GC(bg, "net", nil); return err })
	if n.writer().Dir.Holding(id) == nil {
		t.Error("it is not held any more")
	}
}

// TestDelWithoutLock: a DEL that cannot have the lock queues, and what is held is
// left to who has the lock.
func TestDelWithoutLock(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	id := n.attachment("a")
	unlock, err := n.writer().Dir.Lock(bg)
	if err != nil {
		t.Fatal(err)
	}
	n.must(t, func(x *Writer) error {
		x.LockTimeout = time.Millisecond
		return x.Release(bg, id, "")
	})
	held, err := os.ReadDir(filepath.Join(n.dir, "holdings")) // as the queue stands over it
	if err != nil || len(held) != 1 || !n.writer().Dir.IsQueued(id) {
		t.Errorf("queued %v, held %v: %v", n.writer().Dir.IsQueued(id), held, err)
	}
	unlock()
	n.must(t, func(x *Writer) error { return x.Probe(bg) })
	if w.has(n, "a") != nil {
		t.Error("its release waits on")
	}
}

// TestBorrowUpTo: the first address that was not read is asked for, not handed out.
func TestBorrowUpTo(t *testing.T) {
	p := mustPool(t, "10.22.0.0/24")
	k := newKnown()
	k.allBlocks = true
	for b := range p.Sets[0].unclaimed(newKnown()) {
		k.blocks[b] = knownBlock{"other", 1}
	}
	first, last := netip.MustParseAddr("10.22.0.1"), netip.MustParseAddr("10.22.0.99")
	k.covered = []netipx.IPRange{netipx.IPRangeFrom(first, last)}
	for ip := first; ip.Compare(last) <= 0; ip = ip.Next() {
		k.addrs[ip] = &leasedThen
	}
	got, n, err := plan(&question{pool: p, node: "n0"}, k)
	if err != nil || n == nil || n.addrs[0].From() != last.Next() {
		t.Fatalf("chose %v, needs %+v: %v", got, n, err)
	}
}

// TestEntryReplaced: another value where this node's last entry stood is an etcd
// that went back.
func TestEntryReplaced(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	n.mustAdd(t, p, "a")
	mark, err := n.writer().Dir.LoadMark()
	if err != nil {
		t.Fatal(err)
	}
	w.put(testKeys.Entry(n.who, mark.Chain, mark.Seq), "another")
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("ADD: %v", err)
	}
}

// TestEpochWentBack: nobody allocates in an epoch before the one that it has seen,
// whatever the revision.
func TestEpochWentBack(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	before := string(w.store.now().keys[testKeys.Meta()].value)
	n.mustAdd(t, p, "a")
	w.drill(t)
	n.mustAdd(t, p, "b")
	w.put(testKeys.Meta(), before)
	if _, err := n.add(p, "c"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("ADD: %v", err)
	}
}

// TestBrokenChain: a head whose entry names another one before it than the mark's is
// not followed, though this node's key signed it.
func TestBrokenChain(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	n.mustAdd(t, p, "a")
	mark, err := n.writer().Dir.LoadMark()
	if err != nil {
		t.Fatal(err)
	}
	skey, err := n.writer().Dir.Key()
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	e := &entry.Entry{Chain: mark.Chain, Seq: mark.Seq + 1, Prev: entry.HashOf([]byte("another")), Time: w.clock, Revision: mark.Revision, Op: entry.Recover, Epoch: 1}
	stored, hash, err := entry.Sign(e, signer)
	if err != nil {
		t.Fatal(err)
	}
	var head keyspace.Writer
	if err := keyspace.Decode(w.store.now().keys[testKeys.Writer(n.who)].value, &head); err != nil {
		t.Fatal(err)
	}
	head.Seq, head.Hash = e.Seq, hash
	w.put(testKeys.Entry(n.who, e.Chain, e.Seq), string(stored))
	w.put(testKeys.Writer(n.who), string(keyspace.Encode(head)))
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "does not follow") {
		t.Fatalf("ADD: %v", err)
	}
}

// TestOtherMachine: a state directory is used on the machine that made it, and on
// another it does not even fence.
func TestOtherMachine(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.conn.next = killUnsent // else there is nothing to fence
	if _, err := n.add(p, "b"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	before := w.store.now().revision
	n.reconnect()
	n.id = "another"
	if _, err := n.add(p, "c"); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "it was copied") {
		t.Fatalf("ADD: %v", err)
	}
	if w.store.now().revision != before {
		t.Error("a copy has fenced")
	}
}

// TestOpenedBefore: a state directory that was put back to when its chain was not
// open yet does not pass for one whose chain nobody has opened.
func TestOpenedBefore(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	image := filepath.Join(w.root, "image")
	w.step = func(at string) {
		if at == "enrolled" {
			w.step = nil
			if err := copyDir(n.dir, image); err != nil {
				t.Error(err)
			}
		}
	}
	for _, c := range []string{"a", "b"} { // each on its own chain
		n.mustAdd(t, p, c)
		w.admin.must(t, func(x *Writer) error { _, err := x.Replace(bg, Replacement{Writer: n.who}, "test"); return err })
	}
	if err := os.RemoveAll(n.dir); err != nil {
		t.Fatal(err)
	}
	if err := copyDir(image, n.dir); err != nil {
		t.Fatal(err)
	}
	n.must(t, func(x *Writer) error {
		x.Timeout = time.Second
		_, err := x.Acquire(bg, Request{ID: n.attachment("c"), Pool: p})
		return err
	})
}

// TestRecoverOtherAddress: a drill gives a pod the address that it has, and not the
// one that a restore brought back.
func TestRecoverOtherAddress(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
	want := n.mustAdd(t, p, "a", netip.MustParseAddr("10.22.0.9"))
	w.store.restore(2, true)
	r := w.drill(t)["n0"]
	if got := w.has(n, "a"); got == nil || addrsOf(got.Leases)[0] != want[0] {
		t.Errorf("it has %+v: %+v", got, r)
	}
}

// TestRecoverKilled: what a run of the drill asserted, before it was killed, and an
// operator ended since, stays ended.
func TestRecoverKilled(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	w.store.restore(1, true)
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	n.reconnect()
	commits := 0
	w.step = func(at string) {
		if at == "answered" {
			if commits++; commits == 2 { // the open, the assert
				panic(killed{})
			}
		}
	}
	if err := n.run(func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err }); !errors.Is(err, errKilled) || w.has(n, "a") == nil {
		t.Fatal(err)
	}
	w.step = nil
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("a"), entry.Ref{}, "test") })
	n.must(t, func(x *Writer) error {
		r, err := x.Recover(bg, nil, "test")
		if err == nil && (len(r.Ended) != 1 || len(r.Asserted) > 0) {
			t.Errorf("%+v", r)
		}
		return err
	})
	if w.has(n, "a") != nil {
		t.Error("what an operator ended is leased again")
	}
}

// TestThawWaits: a node that has begun to recover and not ended is waited for.
func TestThawWaits(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	n.must(t, func(x *Writer) error { _, _, err := x.Enter(bg); return err })
	thaw := func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0"}, nil, "test"); return err }
	if err := w.admin.run(thaw); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "n0: has conflicts") {
		t.Errorf("thaw: %v", err)
	}
	n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	w.admin.must(t, thaw)
}

// TestEpochNeverTwice: a restore to before a drill gets an epoch that nobody has seen.
func TestEpochNeverTwice(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	backup := w.store.now().revision
	w.drill(t)
	w.store.restore(int(w.store.now().revision-backup), true)
	w.admin.must(t, func(x *Writer) error {
		meta, began, err := x.RecoverStart(bg, 0, "test")
		if meta.Epoch != 3 || !began {
			t.Errorf("epoch %d, began %v", meta.Epoch, began)
		}
		return err
	})
}

// TestFullPoolRestored: a pool that was full before a restore need not be after it.
func TestFullPoolRestored(t *testing.T) {
	w := newWorld(t, 2)
	defer w.store.check(t)
	w.init(t)
	p, n, other := twoBlocks(t), w.nodes[0], w.nodes[1]
	other.mustAdd(t, p, "a", netip.MustParseAddr("10.22.0.9"))
	other.mustAdd(t, p, "b")
	n.mustAdd(t, p, "c")
	free := netip.MustParseAddr("10.22.0.30")
	for {
		ip := other.mustAdd(t, p, fmt.Sprint("d", w.store.now().revision))
		if ip[0] == netip.MustParseAddr("10.22.0.15") {
			break
		}
	}
	for ip := netip.MustParseAddr("10.22.0.17"); ip != free; ip = ip.Next() {
		n.mustAdd(t, p, ip.String(), ip)
	}
	backup := w.store.now().revision
	other.mustAdd(t, p, "lost", free)
	n.reconnect()
	if _, err := n.add(p, "e"); !errors.Is(err, ErrExhausted) || n.writer().Dir.Pool("default", "net") == nil {
		t.Fatalf("the pool is not full, or not remembered: %v", err)
	}
	other.must(t, func(x *Writer) error { return x.Release(bg, other.attachment("lost"), "") })
	w.store.restore(int(w.store.now().revision-backup), true)
	w.drill(t)
	wantAddrs(t, n.mustAdd(t, p, "f"), nil, free.String())
}

// TestFullPoolForgotten: with a block to claim, a pool is not remembered any more.
func TestFullPoolForgotten(t *testing.T) {
	w := newWorld(t, 2)
	defer w.store.check(t)
	w.init(t)
	p, n, other := twoBlocks(t), w.nodes[0], w.nodes[1]
	n.mustAdd(t, p, "a")
	other.mustAdd(t, p, "b")
	n.fill(t, p)
	if n.writer().Dir.Pool("default", "net") == nil {
		t.Fatal("a full pool is not remembered")
	}
	block := netip.MustParsePrefix("10.22.0.16/28")
	other.must(t, func(x *Writer) error { return x.Release(bg, other.attachment("b"), "") })
	for i := range 32 {
		if a := w.has(n, fmt.Sprint("fill", i)); a != nil && block.Contains(addrsOf(a.Leases)[0]) {
			n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment(fmt.Sprint("fill", i)), "") })
		}
	}
	w.admin.must(t, func(x *Writer) error {
		return x.Unclaim(bg, Claim{Block: keyspace.BlockID{Space: "default", Pool: "net", Prefix: block}}, "test")
	})
	if got := n.mustAdd(t, p, "c"); !block.Contains(got[0]) || n.writer().Dir.Pool("default", "net") != nil {
		t.Errorf("it got %v, and the pool is remembered: %v", got, n.writer().Dir.Pool("default", "net") != nil)
	}
}

// TestRemovedAndBack: a node that had nothing when it was removed, and comes back at
// once, keeps what it gets then.
func TestRemovedAndBack(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a", netip.MustParseAddr("10.22.0.9")) // claims nothing
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
	b, err := w.admin.writer().Belongings(bg, "n0")
	if err != nil || len(b.Leases)+len(b.Claims) > 0 {
		t.Fatalf("%+v: %v", b, err)
	}
	w.admin.must(t, func(x *Writer) error {
		x.step = func(at string) {
			if at == "settled" { // the close is done
				n.mustAdd(t, p, "c")
			}
		}
		_, err := x.End(bg, b, true, "gone")
		return err
	})
	if w.has(n, "c") == nil {
		t.Error("what it got on its new chain was ended")
	}
}

// TestUnclaimNamed: a block that was claimed anew since is not given back for its
// old claim.
func TestUnclaimNamed(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	var old Claim
	for i := range 2 {
		c := fmt.Sprint("c", i)
		n.mustAdd(t, p, c)
		n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment(c), "") })
		if i == 0 {
			b, err := w.admin.writer().Belongings(bg, "n0")
			if err != nil {
				t.Fatal(err)
			}
			old = b.Claims[0]
			w.admin.must(t, func(x *Writer) error { return x.Unclaim(bg, old, "test") })
		}
	}
	if err := w.admin.run(func(x *Writer) error { return x.Unclaim(bg, old, "test") }); !errors.Is(err, ErrNotFound) {
		t.Errorf("unclaim: %v", err)
	}
}
