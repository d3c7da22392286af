package allocator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// What was found when the core was attacked, one schedule each. The model draws
// most of them too; here each stands by itself.

var bg = context.Background()

func (m *machine) must(t testing.TB, f func(x *Writer) error) {
	t.Helper()
	m.reconnect()
	if err := m.run(f); err != nil {
		t.Fatal(err)
	}
}

// drill is a whole drill in which every node recovers once.
func (w *world) drill(t testing.TB) map[string]*Recovery {
	t.Helper()
	out := map[string]*Recovery{}
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	var names []string
	for _, n := range w.nodes {
		n.must(t, func(x *Writer) (err error) { out[n.who.Name], err = x.Recover(bg, nil, "test"); return err })
		names = append(names, n.who.Name)
	}
	w.admin.must(t, func(x *Writer) error { _, err := x.Thaw(bg, names, nil, "test"); return err })
	return out
}

func (w *world) has(m *machine, container string) *keyspace.Attachment {
	kv, ok := w.store.now().keys[testKeys.Attachment(m.attachment(container))]
	if !ok {
		return nil
	}
	a := new(keyspace.Attachment)
	if err := keyspace.Decode(kv.value, a); err != nil {
		panic(err)
	}
	return a
}

// nobody is a runtime that knows no sandbox, and by now takes all for leaked.
type nobody struct{}

func (nobody) Knows(keyspace.AttachmentID) bool             { return false }
func (nobody) Leaked(keyspace.AttachmentID, entry.Ref) bool { return true }

// TestRecoverAgain: on a node that has recovered, or never had to, 'recover node'
// changes nothing, whatever the list says.
func TestRecoverAgain(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	for round := range 2 {
		if _, err := n.add(p, fmt.Sprint("c", round)); err != nil {
			t.Fatal(err)
		}
		before := w.store.now().revision
		for _, runtime := range []Runtime{nil, nobody{}} {
			var r *Recovery
			n.must(t, func(x *Writer) (err error) { r, err = x.Recover(bg, runtime, "again"); return err })
			if !r.Before || !r.Done || w.store.now().revision != before {
				t.Fatalf("round %d: %+v, and revision %d became %d", round, r, before, w.store.now().revision)
			}
		}
		w.drill(t)
	}
}

// TestRecoverBetween: what a DEL ends while 'recover node' is under way stays ended,
// though it was listed before and the DEL did not get the lock.
func TestRecoverBetween(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	for _, c := range []string{"a", "b"} {
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
	}
	w.store.restore(2, true) // both are lost
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	n.reconnect()
	asserted := 0
	var r *Recovery
	err := n.run(func(x *Writer) (err error) {
		x.step = func(at string) {
			if at == "settled" {
				asserted++
			}
			if at == "settled" && asserted == 2 { // the open, then a; b is listed
				del := n.writer()
				del.LockTimeout = time.Millisecond
				if err := del.Release(bg, n.attachment("b"), ""); err != nil {
					t.Error(err)
				}
			}
		}
		r, err = x.Recover(bg, nil, "test")
		return err
	})
	if err != nil || !r.Done || !slices.Equal(r.Asserted, []keyspace.AttachmentID{n.attachment("a")}) || w.has(n, "b") != nil {
		t.Fatalf("%+v, %v; b holds %+v", r, err, w.has(n, "b"))
	}
}

// TestEndedStaysEnded: what an operator has ended is not put back by a drill that
// has the entry; and what the restore has lost together with its end, is.
func TestEndedStaysEnded(t *testing.T) {
	for _, lost := range []int{0, 2} { // revisions: the release, and the acquire before it
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		for _, c := range []string{"a", "b"} {
			if _, err := n.add(p, c); err != nil {
				t.Fatal(err)
			}
		}
		w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("b"), entry.Ref{}, "test") })
		w.store.restore(lost, true)
		r := w.drill(t)[n.who.Name]
		if lost == 0 && (len(r.Ended) != 1 || len(r.Asserted) != 0 || w.has(n, "b") != nil) {
			t.Errorf("the operator's release is undone: %+v", r)
		}
		if lost > 0 && (len(r.Ended) != 0 || len(r.Asserted) != 1 || w.has(n, "b") == nil) {
			t.Errorf("a lease that the restore lost is not put back: %+v", r)
		}
		if held, _ := n.writer().Dir.Holdings(); len(held) != 1+len(r.Asserted) {
			t.Errorf("%d are held", len(held))
		}
		w.store.check(t)
	}
}

// TestHeldTwice: of two pods of a node that remember one address the later has it,
// also where the restore lost all that happened to it.
func TestHeldTwice(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	ip := netip.MustParseAddr("10.22.0.9")
	if _, err := n.add(p, "first", ip); err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("first"), entry.Ref{}, "test") })
	if _, err := n.add(p, "second", ip); err != nil {
		t.Fatal(err)
	}
	w.store.restore(2, true)
	r := w.drill(t)[n.who.Name]
	if len(r.Conflicts) > 0 || w.has(n, "first") != nil || w.has(n, "second") == nil {
		t.Fatalf("%+v", r)
	}
}

// TestNoSpace: an answer that there is no space says nothing of the commit.
func TestNoSpace(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	for i, c := range []string{"a", "b"} { // the second on an open chain
		n.reconnect()
		n.conn.next = fullApplied
		got, err := n.add(p, c)
		wantAddrs(t, got, err, fmt.Sprintf("10.22.0.%d", 2+i))
	}
	n.reconnect()
	n.conn.full = true
	_, err := n.add(p, "c")
	pending, _ := n.writer().Dir.Pending()
	if !errors.Is(err, ErrNoSpace) || errors.Is(err, ErrUnknownOutcome) || pending || n.writer().Dir.IsQueued(n.attachment("c")) {
		t.Fatalf("refused: %v, pending %v", err, pending)
	}
	w.admin.reconnect()
	w.admin.conn.next = fullApplied
	if err := w.admin.run(func(x *Writer) error { _, err := x.Freeze(bg, "test"); return err }); err != nil {
		t.Fatalf("the ledger was frozen, and freeze says %v", err)
	}
}

// TestNoSpaceFences: with what was sent before not known, "no space" is no answer:
// DEL queues, ADD says so, STATUS is the cluster's matter, and all goes on after.
func TestNoSpaceFences(t *testing.T) {
	for _, what := range []string{"a chain", "no chain"} {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		if what == "a chain" {
			if _, err := n.add(p, "a"); err != nil {
				t.Fatal(err)
			}
		}
		n.conn.next = killSent
		if _, err := n.add(p, "b"); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		full := func() { n.reconnect(); n.conn.full = true }
		full()
		if _, err := n.add(p, "c"); !errors.Is(err, ErrNoSpace) || n.conn.commits > 3 {
			t.Errorf("%s: ADD answers %v after %d commits", what, err, n.conn.commits)
		}
		full()
		if err := n.run(func(x *Writer) error { return x.Probe(bg) }); err != nil {
			t.Errorf("%s: STATUS answers %v", what, err)
		}
		full()
		if err := n.del("b"); err != nil || !n.writer().Dir.IsQueued(n.attachment("b")) {
			t.Errorf("%s: DEL answers %v", what, err)
		}
		if pending, _ := n.writer().Dir.Pending(); !pending {
			t.Errorf("%s: what was sent counts as settled", what)
		}
		w.store.land()
		n.must(t, func(x *Writer) error { return x.Probe(bg) })
		for _, c := range []string{"b", "c"} {
			if w.has(n, c) != nil {
				t.Errorf("%s: %s leaked", what, c)
			}
		}
		w.store.check(t)
	}
}

// TestOldMark: a mark far behind the head is followed in steps: a call that cannot
// come to the end leaves the next one less to do.
func TestOldMark(t *testing.T) {
	defer func(n int64) { followPage = n }(followPage)
	followPage = 16
	_, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	if _, err := n.add(p, "first"); err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		c := fmt.Sprint("c", i)
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
		if err := n.del(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(n.dir, "mark")); err != nil { // the synced one stands in
		t.Fatal(err)
	}
	for calls := 1; ; calls++ {
		n.reconnect()
		n.conn.deafAfter = 5
		_, err := n.add(p, "late")
		if err == nil {
			break
		}
		if calls > 10 || !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "the next call goes on from there") {
			t.Fatalf("call %d: %v", calls, err)
		}
	}
}

// TestForgedHead: entries beyond the mark are ours by signature, and not by hashes
// alone.
func TestForgedHead(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	mark, err := n.writer().Dir.LoadMark()
	if err != nil {
		t.Fatal(err)
	}
	skey, err := entry.NewKey(n.who)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	e := &entry.Entry{Chain: mark.Chain, Seq: mark.Seq + 1, Prev: mark.Hash, Time: w.clock, Revision: mark.Revision, Op: entry.Recover, Epoch: 1}
	stored, hash, err := entry.Sign(e, signer)
	if err != nil {
		t.Fatal(err)
	}
	var head keyspace.Writer
	if err := keyspace.Decode(w.store.now().keys[testKeys.Writer(n.who)].value, &head); err != nil {
		t.Fatal(err)
	}
	head.Seq, head.Hash = e.Seq, hash
	w.store.mu.Lock()
	w.store.apply(Txn{Then: []Write{
		{Key: testKeys.Entry(n.who, e.Chain, e.Seq), Value: stored}, {Key: testKeys.Writer(n.who), Value: keyspace.Encode(head)},
	}})
	w.store.mu.Unlock()
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "not signed by") {
		t.Fatalf("a head that another key signed: %v", err)
	}
}

// TestLateStop: a stop that was sent before the drill does not land after it.
func TestLateStop(t *testing.T) {
	w, p, nodes := stage(t, 2, "10.22.0.0/24")
	n := nodes[0]
	for _, x := range w.nodes {
		if _, err := x.add(p, "a-"+x.who.Name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.add(p, "lost"); err != nil {
		t.Fatal(err)
	}
	w.store.restore(1, false)
	n.reconnect()
	n.conn.next = loseLate
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) {
		t.Fatal(err)
	}
	sent := slices.Clone(w.store.inFlight)
	if len(sent) != 1 {
		t.Fatalf("%d are under way", len(sent))
	}
	w.drill(t)
	w.store.inFlight = sent
	w.store.land()
	for _, x := range w.nodes {
		x.reconnect()
		if _, err := x.add(p, "after-"+x.who.Name); err != nil {
			t.Errorf("a stop of before the drill: %v", err)
		}
	}
}

// TestNewBoot: what was sent in an earlier boot cannot land after the first answer
// of this one, though the file that says so went with the power.
func TestNewBoot(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	n.conn.next = killSent
	if _, err := n.add(p, "b"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	n.boot++
	n.reconnect()
	if err := os.Remove(filepath.Join(n.dir, "open")); err != nil {
		t.Fatal(err)
	}
	if err := n.del("b"); err != nil {
		t.Fatal(err)
	}
	w.store.land()
	if w.has(n, "b") != nil {
		t.Fatal("a commit of the boot before landed after its DEL was answered")
	}
}

// TestFirstCommit: a node's very first commit cannot land after a DEL found nothing,
// as there is no writer key yet to fence.
func TestFirstCommit(t *testing.T) {
	for _, f := range []fault{killSent, loseLate} {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		n.conn.next = f
		_, _ = n.add(p, "a")
		n.reconnect()
		if err := n.del("a"); err != nil {
			t.Fatal(err)
		}
		w.store.land()
		if w.has(n, "a") != nil {
			t.Errorf("%v: the first commit landed after its DEL was answered", f)
		}
		w.store.check(t)
	}
}

// TestLaggingViews: what is answered without a commit is read linearizable.
func TestLaggingViews(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	for _, c := range []string{"warm", "a"} {
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
	}
	// An operator ended it, and a member that lags has not heard of that.
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("a"), entry.Ref{}, "test") })
	n.reconnect()
	n.conn.lag = 1
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	if w.has(n, "a") == nil {
		t.Error("a repeated ADD was answered with a lease that had ended")
	}
	// It is leased, and a member that lags does not know it yet.
	n.reconnect()
	n.conn.lag = 1
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	if w.has(n, "a") != nil {
		t.Error("a DEL found nothing, by a member that lags")
	}
}

// TestReplyOfAnother: a commit's reply that comes from another etcd, or from
// before the view, is not believed.
func TestReplyOfAnother(t *testing.T) {
	for name, after := range map[string]func(w *world, r *Reply){
		"cluster":  func(_ *world, r *Reply) { r.Cluster++ },
		"revision": func(_ *world, r *Reply) { r.Revision = 1 },
	} {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		if _, err := n.add(p, "a"); err != nil {
			t.Fatal(err)
		}
		n.conn.replied = func(r *Reply) { after(w, r) }
		_, err := n.add(p, "b")
		if !errors.Is(err, ErrIntegrity) || !n.writer().Dir.IsQueued(n.attachment("b")) {
			t.Errorf("%s: %v, queued %v", name, err, n.writer().Dir.IsQueued(n.attachment("b")))
		}
		if _, ok := w.store.now().keys[testKeys.Stop(n.who.Name)]; !ok {
			t.Errorf("%s: the others were not told", name)
		}
	}
}

// TestGoneBack: an etcd that lost no entry of this node's, and whose revision went
// back, has gone back in time.
func TestGoneBack(t *testing.T) {
	w := newWorld(t, 2)
	w.init(t)
	p := mustPool(t, "10.22.0.0/24")
	a, b := w.nodes[0], w.nodes[1]
	if _, err := b.add(p, "b"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	a.boot++ // notes the revision that it sees
	if _, err := b.add(p, "b2"); err != nil {
		t.Fatal(err)
	}
	a.must(t, func(x *Writer) error { return x.Probe(bg) })
	w.store.restore(2, false) // the fence, and b2
	a.reconnect()
	if _, err := a.add(p, "a2"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("an etcd that went back is believed: %v", err)
	}
}

// TestHoldingFirst: a holding goes before its release is committed, or a recovery
// would assert it against the next holder.
func TestHoldingFirst(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	for name, end := range map[string]func(x *Writer) error{
		"DEL": func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") },
		"reap": func(x *Writer) error {
			_, err := x.Reap(bg, n.attachment("a"), w.has(n, "a").Acquire, "test")
			return err
		},
	} {
		n.reconnect()
		if _, err := n.add(p, "a"); err != nil {
			t.Fatal(err)
		}
		n.conn.next = killApplied
		if err := n.run(end); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		if n.writer().Dir.Holding(n.attachment("a")) != nil {
			t.Errorf("%s: its lease has ended, and it is held", name)
		}
	}
}

// TestUnderTheLock: what a call that failed leaves for others it leaves under the
// lock, so that no later ADD of the same attachment comes in between.
func TestUnderTheLock(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	check := func(x *Writer) {
		now := x.Now
		x.Now = func() time.Time { // of the queued release
			ctx, cancel := context.WithTimeout(bg, 5*time.Millisecond)
			defer cancel()
			if unlock, err := x.Dir.Lock(ctx); err == nil {
				unlock()
				t.Error("a release is queued without the lock")
			}
			return now()
		}
	}
	n.conn.next = deafReads
	if err := n.run(func(x *Writer) error { check(x); return x.Release(bg, n.attachment("a"), "") }); err != nil {
		t.Fatal(err)
	}
	n.must(t, func(x *Writer) error { return x.Probe(bg) }) // nothing waits
	n.reconnect()
	n.conn.next, n.conn.deafAfter = loseApplied, 1
	if err := n.run(func(x *Writer) error {
		check(x)
		_, err := x.Acquire(bg, Request{ID: n.attachment("b"), Pool: p})
		return err
	}); err == nil || !n.writer().Dir.IsQueued(n.attachment("b")) {
		t.Fatalf("%v, queued %v", err, n.writer().Dir.IsQueued(n.attachment("b")))
	}
}

// TestSpoiltQueue: releases that cannot be done cost a call no more than a few.
func TestSpoiltQueue(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/16"), w.nodes[0]
	for i := range 100 {
		c := fmt.Sprint("c", i)
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
		if err := n.writer().Dir.Enqueue(statedir.Queued{Attachment: n.attachment(c), Reason: "test"}); err != nil {
			t.Fatal(err)
		}
		w.store.mu.Lock()
		w.store.apply(Txn{Then: []Write{{Key: testKeys.Attachment(n.attachment(c)), Value: []byte("garbage")}}})
		w.store.mu.Unlock()
	}
	for i := range 20 {
		n.reconnect()
		if _, err := n.add(p, fmt.Sprint("late", i)); err != nil {
			t.Fatal(err)
		}
		if most := 2*drainLimit + 4; n.conn.reads > most {
			t.Fatalf("ADD %d made %d reads: at most %d", i, n.conn.reads, most)
		}
	}
	if n.conn.reads > 2 {
		t.Errorf("once they are set aside an ADD makes %d reads", n.conn.reads)
	}
	// Mended, they are found again.
	for i := range 100 {
		w.admin.must(t, func(x *Writer) error {
			return x.ReleaseLease(bg, n.attachment(fmt.Sprint("c", i)), entry.Ref{}, "test")
		})
	}
	n.must(t, func(x *Writer) error {
		if left, err := x.Drain(bg); err != nil || left > 0 {
			t.Errorf("%d are left: %v", left, err)
		}
		return nil
	})
	w.store.check(t)
}

// TestRemovedWhileItLives: a removed node that lives is refused until its last lease
// is ended, and what it gets after that no operator ends who decided before.
func TestRemovedWhileItLives(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	other := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "other@desk"})
	for _, c := range []string{"a", "b"} {
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
	}
	decided, err := other.writer().Belongings(bg, n.who.Name)
	if err != nil {
		t.Fatal(err)
	}
	// The first operator is killed after the first release.
	commits := 0
	w.step = func(at string) {
		if at == "begun" {
			if commits++; commits == 3 { // close, release, …
				panic(killed{})
			}
		}
	}
	b, err := w.admin.writer().Belongings(bg, n.who.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.admin.run(func(x *Writer) error { _, err := x.End(bg, b, true, "test"); return err }); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	w.step = nil
	if _, err := n.add(p, "c"); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "'ledger node remove "+n.who.Name+"'") {
		t.Fatalf("a node that is being removed: %v", err)
	}
	w.admin.must(t, func(x *Writer) error { _, err := x.End(bg, b, true, "test"); return err })
	n.must(t, func(x *Writer) error {
		r, err := x.Recover(bg, nil, "test")
		if err == nil && (len(r.Ended) != 2 || !r.Done) {
			t.Errorf("recovered: %+v", r)
		}
		return err
	})
	if _, err := n.add(p, "c"); err != nil {
		t.Fatalf("it came back: %v", err)
	}
	// The other operator carries out what he decided while it had a and b.
	other.reconnect()
	if err := other.run(func(x *Writer) error { _, err := x.End(bg, decided, true, "test"); return err }); !errors.Is(err, ErrConflict) {
		t.Errorf("removing a node that has come back: %v", err)
	}
	if w.has(n, "c") == nil {
		t.Error("the lease of a node that came back was ended by an older decision")
	}
}

// TestReplaceAfterRemove: a removal that nobody finished is taken back by a replace.
func TestReplaceAfterRemove(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, func(x *Writer) error {
		_, err := x.Replace(bg, Replacement{Writer: n.who, Remove: true}, "test")
		return err
	})
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) {
		t.Fatal(err)
	}
	w.admin.must(t, func(x *Writer) error { _, err := x.Replace(bg, Replacement{Writer: n.who}, "test"); return err })
	if _, err := n.add(p, "b"); err != nil {
		t.Fatal(err)
	}
	if w.has(n, "a") == nil {
		t.Error("a replaced node lost a lease")
	}
}

// TestScattered: a block with many holes is one range to read.
func TestScattered(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	var holes netipx.IPSetBuilder
	for i := range 127 {
		holes.Add(netip.AddrFrom4([4]byte{10, 22, 0, byte(2 * i)}))
	}
	exclude, err := holes.IPSet()
	if err != nil {
		t.Fatal(err)
	}
	p, err := NewPool("default", "net", rangeSets("10.22.0.0/16"), exclude, false, 256, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if _, err := w.nodes[0].add(p, fmt.Sprint("c", i)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStartKilled: a 'recover start' that never came to etcd leaves its operator
// able to do everything else; a second one under way changes nothing.
func TestStartKilled(t *testing.T) {
	for _, at := range []string{"enrolled", "begun", "unsent", "sent"} {
		for _, first := range []bool{false, true} {
			w := newWorld(t, 1)
			w.init(t)
			by := w.admin
			if first { // it is his first command
				by = w.machine(entry.Writer{Kind: entry.KindOperator, Name: "new@desk"})
			}
			by.reconnect()
			switch at {
			case "unsent":
				by.conn.next = killUnsent
			case "sent":
				by.conn.next = killSent
			default:
				w.step = func(s string) {
					if s == at {
						panic(killed{})
					}
				}
			}
			start := func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err }
			if err := by.run(start); !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			w.step = nil
			by.must(t, func(x *Writer) error { _, err := x.Freeze(bg, "test"); return err })
			w.store.land()
			by.must(t, start)
			var meta, again keyspace.Meta
			_ = keyspace.Decode(w.store.now().keys[testKeys.Meta()].value, &meta)
			by.must(t, func(x *Writer) (err error) {
				var began bool
				again, began, err = x.RecoverStart(bg, 0, "test")
				if began {
					t.Errorf("%s: a recovery that is under way was begun anew", at)
				}
				return err
			})
			if meta.Epoch != 2 || again.Epoch != 2 || !meta.Recovering {
				t.Errorf("%s: epoch %d, then %d, recovering %v", at, meta.Epoch, again.Epoch, meta.Recovering)
			}
			w.store.check(t)
		}
	}
}

// TestManyBoots: a machine that boots again and again is itself, whether it commits
// in a boot or not, and whatever of its files a power loss tears.
func TestManyBoots(t *testing.T) {
	_, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		n.boot++
		n.reconnect()
		if i%3 == 1 {
			if err := os.WriteFile(filepath.Join(n.dir, "mark"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if i%10 == 9 { // otherwise it only says that it is well
			c := fmt.Sprint("c", i)
			n.conn.next = []fault{killSent, killApplied, noFault}[i/10]
			if _, err := n.add(p, c); err != nil && !errors.Is(err, errKilled) {
				t.Fatalf("boot %d: %v", i, err)
			}
			n.reconnect()
			if err := n.del(c); err != nil || n.writer().Dir.IsQueued(n.attachment(c)) {
				t.Fatalf("boot %d: DEL: %v", i, err)
			}
		}
		if err := n.run(func(x *Writer) error { return x.Probe(bg) }); err != nil {
			t.Fatalf("boot %d: %v", i, err)
		}
	}
}

// TestImportAgain: an import brings nothing back that has ended, and says what was
// recorded before. A dry run finds what a real one would.
func TestImportAgain(t *testing.T) {
	w := newWorld(t, 2)
	defer w.store.check(t)
	w.init(t)
	a, b := w.nodes[0], w.nodes[1]
	lease := func(c, ip string) statedir.Holding {
		return statedir.Holding{ID: a.attachment(c), Value: keyspace.Attachment{
			Space: "default", Pool: "net", Leases: []keyspace.Lease{{Address: netip.MustParsePrefix(ip + "/24")}},
		}}
	}
	if _, err := b.add(mustPool(t, "10.22.0.0/24"), "theirs", netip.MustParseAddr("10.22.0.30")); err != nil {
		t.Fatal(err)
	}
	all := []statedir.Holding{lease("one", "10.22.0.10"), lease("two", "10.22.0.20"), lease("three", "10.22.0.30")}
	for i, x := range []struct {
		dry  bool
		want []error
	}{
		{true, []error{nil, nil, ErrConflict}},
		{false, []error{nil, nil, ErrConflict}},
		{true, []error{ErrBefore, ErrEnded, ErrConflict}},
		{false, []error{ErrBefore, ErrEnded, ErrConflict}},
	} {
		if i == 2 {
			if err := a.del("two"); err != nil {
				t.Fatal(err)
			}
		}
		before := w.store.now().revision
		a.must(t, func(w *Writer) error {
			got, err := w.Import(bg, all, x.dry, "test")
			for j := range got {
				if !errors.Is(got[j], x.want[j]) || x.want[j] == nil && got[j] != nil {
					t.Errorf("import %d of %v: %v, want %v", i, all[j].ID, got[j], x.want[j])
				}
			}
			return err
		})
		if x.dry && w.store.now().revision != before {
			t.Error("a dry run wrote")
		}
	}
	if w.has(a, "two") != nil || w.has(a, "one") == nil {
		t.Error("an import brought back what had ended, or lost what it had recorded")
	}
}

// onConnect calls f before each connection, which is before the lock.
type onConnect struct {
	Store
	f func()
}

func (c *onConnect) Connect(ctx context.Context) error {
	c.f()
	return c.Store.Connect(ctx)
}

// TestImportBetween: a pod that gets its address and goes while its node imports is
// not brought back.
func TestImportBetween(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	a, p := w.nodes[0], mustPool(t, "10.22.0.0/24")
	two := netip.MustParseAddr("10.22.0.20")
	lease := func(c string, ip netip.Addr) statedir.Holding {
		return statedir.Holding{ID: a.attachment(c), Value: keyspace.Attachment{
			Space: "default", Pool: "net", Leases: []keyspace.Lease{{Address: netip.PrefixFrom(ip, 24)}},
		}}
	}
	calls := 0
	a.must(t, func(x *Writer) error {
		x.Store = &onConnect{x.Store, func() {
			if calls++; calls == 2 {
				a.mustAdd(t, p, "two", two)
				if err := a.del("two"); err != nil {
					t.Fatal(err)
				}
			}
		}}
		got, err := x.Import(bg, []statedir.Holding{lease("one", netip.MustParseAddr("10.22.0.10")), lease("two", two)}, false, "test")
		if err == nil && (got[0] != nil || !errors.Is(got[1], ErrEnded)) {
			t.Errorf("%v, want nil and %v", got, ErrEnded)
		}
		return err
	})
	if calls != 2 {
		t.Errorf("%d connections", calls)
	}
}

// TestFullPool: once a node knows a pool, an ADD in it that is full, or nearly so,
// costs what changed since: at most six reads and 64 KiB, also when it is refused.
func TestFullPool(t *testing.T) {
	for _, strict := range []bool{false, true} {
		w := newWorld(t, 2)
		w.init(t)
		p, err := NewPool("default", "net", rangeSets("10.22.0.0/18"), nil, strict, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		n, other := w.nodes[0], w.nodes[1]
		if _, err := n.add(p, "mine"); err != nil {
			t.Fatal(err)
		}
		// All else is somebody's, but ten addresses of the last block.
		at := w.store.now()
		who := other.attachment("crowd")
		span := p.Sets[0].segments[0]
		for ip := span.From(); ip.Compare(span.To()) <= 0; ip = ip.Next() {
			key := testKeys.Address("default", ip)
			if _, ok := at.keys[key]; !ok && !netip.MustParsePrefix("10.22.63.240/29").Contains(ip) {
				v := keyspace.Address{State: keyspace.Leased, Pool: "net", Holder: &who, Acquire: entry.Ref{Seq: 1}}
				at.keys[key] = memKV{keyspace.Encode(v), at.revision, at.revision, 1}
			}
			block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: span.blockOf(ip)}
			if _, ok := at.keys[testKeys.Block(block)]; !ok {
				at.keys[testKeys.Block(block)] = memKV{keyspace.Encode(keyspace.Block{Node: other.who.Name, Claim: entry.Ref{Seq: 1}}), at.revision, at.revision, 1}
			}
		}
		add := func(c string) error {
			n.reconnect()
			_, err := n.add(p, c)
			return err
		}
		cost := func(what string) {
			t.Helper()
			t.Logf("strict %v, %s: %d reads, %d bytes", strict, what, n.conn.reads, n.conn.bytes)
			if n.conn.reads > 6 || n.conn.bytes > 64<<10 {
				t.Errorf("strict %v, %s: %d reads and %d bytes", strict, what, n.conn.reads, n.conn.bytes)
			}
		}
		if err := add("first"); (err != nil) != strict { // this one reads it whole
			t.Fatal(err)
		}
		for i := 1; i < 8 && !strict; i++ {
			if err := add(fmt.Sprint("c", i)); err != nil {
				t.Fatal(err)
			}
			cost("nearly full")
		}
		for range 3 {
			if err := add("refused"); !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "leased") {
				t.Fatal(err)
			}
			cost("refused")
		}
		if strict {
			continue
		}
		// One goes, on another node, and its address is found.
		if err := n.del("c3"); err != nil {
			t.Fatal(err)
		}
		if err := add("again"); err != nil {
			t.Fatal(err)
		}
		cost("one free")
		// A block is given back: that is seen too, though deletions leave no trace.
		w.store.mu.Lock()
		for ip := netip.MustParseAddr("10.22.5.0"); netip.MustParsePrefix("10.22.5.0/26").Contains(ip); ip = ip.Next() {
			w.store.apply(Txn{Then: []Write{{Key: testKeys.Address("default", ip), Value: keyspace.Encode(keyspace.Address{State: keyspace.Free, Pool: "net", Release: entry.Ref{Seq: 2}})}}})
		}
		w.store.apply(Txn{Then: []Write{{Key: testKeys.Block(keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.5.0/26")}), Delete: true}}})
		w.store.mu.Unlock()
		if err := add("claims"); err != nil {
			t.Fatal(err)
		}
		var b keyspace.Block
		if err := keyspace.Decode(w.store.now().keys[testKeys.Block(keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.5.0/26")})].value, &b); err != nil || b.Node != n.who.Name {
			t.Errorf("a block that was given back was not claimed: %v, %v", b, err)
		}
		if n.writer().Dir.Pool("default", "net") == nil && n.conn.reads > 6 {
			t.Errorf("%d reads", n.conn.reads)
		}
	}
}

// put is what a plain client writes.
func (w *world) put(key, value string) {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	w.store.apply(Txn{Then: []Write{{Key: key, Value: []byte(value)}}})
}

func (w *world) del(key string) {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	w.store.apply(Txn{Then: []Write{{Key: key, Delete: true}}})
}

func (m *machine) mustAdd(t testing.TB, p *Pool, container string, ips ...netip.Addr) []netip.Addr {
	t.Helper()
	m.reconnect()
	got, err := m.add(p, container, ips...)
	if err != nil {
		t.Fatalf("ADD %s: %v", container, err)
	}
	return got
}

// TestRecoverSpaces: an address is one's own in its address space only: a drill ends
// no lease for a pod that has the same address in another.
func TestRecoverSpaces(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	n := w.nodes[0]
	for i, space := range []string{"red", "blue"} {
		p, err := NewPool(space, "net", rangeSets("10.22.0.0/24"), nil, false, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		wantAddrs(t, n.mustAdd(t, p, fmt.Sprint("c", i)), nil, "10.22.0.2")
	}
	if r := w.drill(t)["n0"]; r.Kept != 2 || len(r.Released)+len(r.Ended) > 0 {
		t.Fatalf("%+v", r)
	}
}

// TestRecoverFences: 'recover node' settles what was sent like any other call, also
// where there is no drill.
func TestRecoverFences(t *testing.T) {
	for _, reboot := range []bool{false, true} {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		n.conn.next = killSent
		if _, err := n.add(p, "c1"); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		if reboot {
			n.boot++
		}
		n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
		if err := n.del("c1"); err != nil {
			t.Fatal(err)
		}
		w.store.land()
		if w.has(n, "c1") != nil {
			t.Errorf("reboot %v: an ADD landed after its DEL was answered", reboot)
		}
		n.mustAdd(t, p, "c2")
		w.store.check(t)
	}
}

// TestEndSpoilt: who decided on a node whose head was garbage, or gone, closes the
// chain that it had then, and none that it came back on.
func TestEndSpoilt(t *testing.T) {
	for _, back := range []bool{false, true} {
		for _, gone := range []bool{false, true} {
			w := newWorld(t, 1)
			w.init(t)
			p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
			other := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "other@desk"})
			n.mustAdd(t, p, "c1")
			w.store.mu.Lock()
			w.store.apply(Txn{Then: []Write{{Key: testKeys.Writer(n.who), Value: []byte("garbage"), Delete: gone}}})
			w.store.mu.Unlock()
			decided, err := other.writer().Belongings(bg, "n0")
			if err != nil {
				t.Fatal(err)
			}
			if back {
				w.admin.must(t, func(x *Writer) error { _, err := x.Replace(bg, Replacement{Writer: n.who}, "mend"); return err })
				n.mustAdd(t, p, "c2")
			}
			other.reconnect()
			err = other.run(func(x *Writer) error { _, err := x.End(bg, decided, true, "gone"); return err })
			switch {
			case back && (!errors.Is(err, ErrConflict) || w.has(n, "c2") == nil || w.has(n, "c1") == nil):
				t.Errorf("gone %v: it came back: %v", gone, err)
			case !back && (err != nil || w.has(n, "c1") != nil):
				t.Errorf("gone %v: %v", gone, err)
			}
			if !back {
				w.store.check(t)
			}
		}
	}
}

// TestRemovedDrill: a drill lets no node in that is being removed; and who removes
// one ends nothing of it once it was let in.
func TestRemovedDrill(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	other := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "other@desk"})
	n.mustAdd(t, p, "c1")
	b, err := w.admin.writer().Belongings(bg, "n0")
	if err != nil {
		t.Fatal(err)
	}
	w.admin.reconnect()
	err = w.admin.run(func(x *Writer) error {
		commits := 0
		x.step = func(at string) {
			if at != "enrolled" {
				return
			}
			if commits++; commits < 2 { // the close is done; the release is about to be
				return
			}
			x.step = func(string) {}
			other.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
			n.reconnect()
			if err := n.run(func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err }); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "'ledger node remove n0'") {
				t.Errorf("a node that is being removed recovers: %v", err)
			}
			other.must(t, func(x *Writer) error { _, err := x.Replace(bg, Replacement{Writer: n.who}, "it stays"); return err })
			n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
			other.must(t, func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0"}, nil, "test"); return err })
		}
		_, err := x.End(bg, b, true, "gone")
		return err
	})
	if !errors.Is(err, ErrConflict) || w.has(n, "c1") == nil {
		t.Fatalf("the removal went on after the node was let in: %v", err)
	}
	n.mustAdd(t, p, "c2")
}

// TestStrayKey: a key that nobody should have put there is no attachment, and wedges
// neither a drill nor the return of a removed node.
func TestStrayKey(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	n.mustAdd(t, p, "c1")
	w.put(testKeys.NodeAttachments("n0")+"stray", "x")
	w.drill(t)
	b, err := w.admin.writer().Belongings(bg, "n0")
	if err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, func(x *Writer) error { _, err := x.End(bg, b, true, "gone"); return err })
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("c1"), "") })
	n.mustAdd(t, p, "c2")
}

// TestBootsWithoutACommit: boots in which the first commit was tried in vain do not
// fill the mark.
func TestBootsWithoutACommit(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	n.conn.next = killUnsent
	if _, err := n.add(p, "c1"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	for i := range 60 {
		n.reconnect()
		n.conn.full = i < 59
		err := n.run(func(x *Writer) error {
			x.Boot = fmt.Sprintf("0a2b4c6d-0000-4000-8000-%012d", i)
			_, err := x.Acquire(bg, Request{ID: n.attachment("c2"), Pool: p})
			return err
		})
		if i < 59 && !errors.Is(err, ErrNoSpace) || i == 59 && err != nil {
			t.Fatalf("boot %d: %v", i, err)
		}
	}
}

// TestRecoverStartLate: a 'recover start' that lands while its operator gives it up
// wedges nobody.
func TestRecoverStartLate(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	b := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "b@desk"})
	b.conn.next = killSent
	if err := b.run(func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err }); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	b.reconnect()
	b.conn.between = w.store.land // as the next command opens the chain
	_ = b.run(func(x *Writer) error { _, err := x.Freeze(bg, "test"); return err })
	b.must(t, func(x *Writer) error { _, err := x.Freeze(bg, "test"); return err })
}

// TestRecoverStartTwice: a 'recover start' that came to etcd, and whose operator died
// before noting that, is followed by another, also by one that dies before it is sent.
// He says of no chain that he lost it.
func TestRecoverStartTwice(t *testing.T) {
	start := func(epoch uint64) func(x *Writer) error {
		return func(x *Writer) error { _, _, err := x.RecoverStart(bg, epoch, "test"); return err }
	}
	for _, dies := range []bool{true, false} {
		w, _, _ := stage(t, 1, "10.22.0.0/24")
		w.admin.conn.next = killApplied
		if err := w.admin.run(start(0)); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		if dies {
			w.admin.dies(t, "begun", 1, start(7))
			w.admin.must(t, freeze)
		}
		w.admin.must(t, start(7))
		for _, kv := range w.store.now().keys {
			if e, err := entry.Parse(kv.value); err == nil && !e.Mark.IsZero() {
				t.Errorf("a chain is opened by a writer that says it lost %s", e.Mark)
			}
		}
	}
}

// TestTwinByRecover: a twin that wrote first is noticed, whatever the original does
// first after its boot.
func TestTwinByRecover(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	n.mustAdd(t, p, "c1")
	twin := &machine{w: w, who: n.who, dir: filepath.Join(w.root, "twin"), id: n.id, boot: 2000}
	if err := copyDir(n.dir, twin.dir); err != nil {
		t.Fatal(err)
	}
	twin.mustAdd(t, p, "t1")
	n.boot++
	n.reconnect()
	_ = n.run(func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	if _, err := n.add(p, "c2"); !errors.Is(err, ErrIntegrity) {
		t.Errorf("it writes on behind its twin: %v", err)
	}
	twin.reconnect()
	if _, err := twin.add(p, "t2"); !errors.Is(err, ErrIntegrity) {
		t.Errorf("the twin writes on: %v", err)
	}
}

// TestQueueStarves: files that are no releases keep none waiting.
func TestQueueStarves(t *testing.T) {
	_, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "c1")
	n.conn.next = deafReads
	if err := n.del("c1"); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		for _, name := range []string{"x%d.json.new", "x%d.json"} {
			if err := os.WriteFile(filepath.Join(n.dir, "queue", fmt.Sprintf(name, i)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 10 {
		n.must(t, func(x *Writer) error { return x.Probe(bg) })
	}
	if n.writer().Dir.IsQueued(n.attachment("c1")) {
		t.Error("its release waits on")
	}
}

// TestFrozenDrain: what a frozen ledger keeps from being done, 'recover node' does not
// do either; in a drill it does.
func TestFrozenDrain(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "c1")
	w.admin.must(t, func(x *Writer) error { _, err := x.Freeze(bg, "an audit"); return err })
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("c1"), "") })
	n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	if w.has(n, "c1") == nil {
		t.Error("a frozen ledger was written to")
	}
	w.admin.must(t, func(x *Writer) error { _, err := x.Thaw(bg, nil, nil, "test"); return err })
	n.mustAdd(t, p, "c2")
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 0, "test"); return err })
	n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("c2"), "") })
	n.must(t, func(x *Writer) error { _, err := x.Recover(bg, nil, "test"); return err })
	if w.has(n, "c2") != nil {
		t.Error("what a DEL has queued in a drill waits on, and others for it")
	}
}

// TestUnclaimByRecord: a claim that cannot be read is given back for whose it is by
// the record, and for nobody else.
func TestUnclaimByRecord(t *testing.T) {
	w, p, nodes := stage(t, 2, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "c1")
	w.nodes[1].mustAdd(t, p, "d1")
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("c1"), "") })
	b, err := w.admin.writer().Belongings(bg, "n0")
	if err != nil {
		t.Fatal(err)
	}
	block := b.Claims[0].Block
	unclaim := func(node string) error {
		w.admin.reconnect()
		return w.admin.run(func(x *Writer) error { return x.Unclaim(bg, Claim{Block: block, Node: node}, "test") })
	}
	w.put(testKeys.Block(block), "garbage")
	if err := unclaim(""); !errors.Is(err, ErrIntegrity) {
		t.Errorf("given back for nobody: %v", err)
	}
	if err := unclaim("n1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("given back for another: %v", err)
	}
	if err := unclaim("n0"); err != nil {
		t.Fatal(err)
	}
	// Claimed again, and the key deleted.
	n.mustAdd(t, p, "c2")
	n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("c2"), "") })
	w.del(testKeys.Block(block))
	for _, node := range []string{"", "n1"} {
		if err := unclaim(node); !errors.Is(err, ErrNotFound) {
			t.Errorf("given back for %q: %v", node, err)
		}
	}
	if err := unclaim("n0"); err != nil {
		t.Fatal(err)
	}
	if err := unclaim("n0"); !errors.Is(err, ErrNotFound) {
		t.Errorf("given back twice: %v", err)
	}
}
