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

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// Schedules by which somebody who had not written it broke what is promised.

// stage is a ledger with some nodes and a pool; it is verified at the end.
func stage(t testing.TB, nodes int, cidr string) (*world, *Pool, []*machine) {
	w := newWorld(t, nodes)
	t.Cleanup(func() { w.store.check(t) })
	w.init(t)
	return w, mustPool(t, cidr), w.nodes
}

// operator is another operator, who has written.
func (w *world) operator(t testing.TB) *machine {
	b := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "b@desk"})
	b.must(t, freeze)
	b.must(t, thaw)
	return b
}

func freeze(x *Writer) error { _, err := x.Freeze(bg, "test"); return err }
func thaw(x *Writer) error   { _, err := x.Thaw(bg, nil, nil, "test"); return err }
func start(x *Writer) error  { _, _, err := x.RecoverStart(bg, 0, "test"); return err }
func recoverNode(x *Writer) error {
	_, err := x.Recover(bg, nil, "test")
	return err
}

func replaces(m *machine) func(x *Writer) error {
	return func(x *Writer) error { _, err := x.Replace(bg, Replacement{Writer: m.who}, "test"); return err }
}

// dies runs f as a process that is killed at the n-th step of a kind.
func (m *machine) dies(t testing.TB, step string, n int, f func(x *Writer) error) {
	t.Helper()
	m.reconnect()
	m.w.step = func(at string) {
		if at == step {
			if n--; n == 0 {
				panic(killed{})
			}
		}
	}
	defer func() { m.w.step = nil }()
	if err := m.run(f); !errors.Is(err, errKilled) {
		t.Fatalf("it was to die at %q: %v", step, err)
	}
}

// refuses runs f and wants an error that is an ErrIntegrity and says what.
func (m *machine) refuses(t testing.TB, what string, f func(x *Writer) error) {
	t.Helper()
	m.reconnect()
	if err := m.run(f); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), what) {
		t.Fatalf("%v; want a refusal that says %q", err, what)
	}
}

// adds is an ADD.
func (m *machine) adds(p *Pool, container string) func(x *Writer) error {
	return func(x *Writer) error {
		_, err := x.Acquire(bg, Request{ID: m.attachment(container), Pool: p, Pod: "default/" + container})
		return err
	}
}

func (w *world) key(m *machine) string {
	b, _ := os.ReadFile(filepath.Join(m.dir, "key"))
	return string(b)
}

// TestHeadOfNothing: after a restore that lost all of a writer's chain, and a reboot,
// no head is written that names an entry which is not there.
func TestHeadOfNothing(t *testing.T) {
	t.Run("node", func(t *testing.T) {
		w, p, nodes := stage(t, 2, "10.22.0.0/24")
		nodes[1].mustAdd(t, p, "o")
		before := len(w.store.history)
		nodes[0].mustAdd(t, p, "a")
		w.store.history = w.store.history[:before] // with the old token
		nodes[0].boot++
		nodes[0].reconnect()
		if err := nodes[0].run(recoverNode); err == nil {
			t.Error("recovered before a recovery began")
		}
		if _, ok := w.store.now().keys[testKeys.Writer(nodes[0].who)]; ok {
			t.Error("a head names no entry")
		}
		w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 2, "test"); return err })
		for _, n := range nodes {
			n.must(t, recoverNode)
		}
		w.admin.must(t, func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0", "n1"}, nil, "test"); return err })
	})
	t.Run("operator", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		nodes[0].mustAdd(t, p, "a")
		before := len(w.store.history)
		b := w.operator(t)
		w.store.history = w.store.history[:before]
		b.boot++
		b.must(t, start)
	})
}

// TestStartGoesBackWhole: a 'recover start' that does not come to etcd leaves its
// operator where he was, also where that was a chain yet to be opened.
func TestStartGoesBackWhole(t *testing.T) {
	t.Run("no space", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		nodes[0].mustAdd(t, p, "a")
		b := w.operator(t)
		w.drill(t)
		b.must(t, thaw) // it runs already
		b.reconnect()
		b.conn.full = true
		if err := b.run(start); !errors.Is(err, ErrNoSpace) {
			t.Fatal(err)
		}
		b.must(t, freeze)
		b.must(t, thaw)
	})
	t.Run("killed", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		nodes[0].mustAdd(t, p, "a")
		b := w.operator(t)
		w.drill(t)
		b.dies(t, "begun", 1, freeze)
		b.dies(t, "begun", 1, start)
		b.must(t, freeze)
		b.must(t, thaw)
	})
	t.Run("the etcd of before", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		nodes[0].mustAdd(t, p, "a")
		old, cluster := slices.Clone(w.store.history), w.store.cluster
		w.store.history, w.store.cluster = slices.Clone(old), cluster+1
		w.admin.dies(t, "begun", 1, start)
		w.store.history, w.store.cluster = old, cluster // it lost nothing
		nodes[0].mustAdd(t, p, "b")
		w.admin.must(t, freeze)
		w.admin.must(t, thaw)
	})
	t.Run("under way", func(t *testing.T) {
		w, _, _ := stage(t, 1, "10.22.0.0/24")
		w.admin.must(t, freeze)
		b := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "b@desk"})
		b.conn.next = killSent
		if err := b.run(start); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		b.dies(t, "enrolled", 1, start)
		b.must(t, freeze) // it is frozen
		w.store.land()
		var meta keyspace.Meta
		if err := keyspace.Decode(w.store.now().keys[testKeys.Meta()].value, &meta); err != nil || meta.Recovering {
			t.Errorf("a recovery begins after nothing was said to be under way: %+v, %v", meta, err)
		}
		b.must(t, freeze)
		b.must(t, start)
	})
}

// TestClosedForItsKey: a writer whose chain an operator closed goes on with a new key,
// whichever way it comes back.
func TestClosedForItsKey(t *testing.T) {
	for name, back := range map[string]func(t *testing.T, w *world, b *machine){
		"the first command after a drill": func(t *testing.T, w *world, b *machine) { w.drill(t); b.must(t, freeze) },
		"recover start":                   func(t *testing.T, _ *world, b *machine) { b.must(t, start) },
		"any command":                     func(t *testing.T, _ *world, b *machine) { b.must(t, freeze) },
	} {
		t.Run(name, func(t *testing.T) {
			w, p, nodes := stage(t, 1, "10.22.0.0/24")
			nodes[0].mustAdd(t, p, "a")
			b := w.operator(t)
			key := w.key(b)
			w.admin.must(t, replaces(b))
			back(t, w, b)
			if w.key(b) == key {
				t.Error("it goes on under the key that it was closed for")
			}
		})
	}
	t.Run("recover node", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		nodes[0].mustAdd(t, p, "a")
		key := w.key(nodes[0])
		w.admin.must(t, replaces(nodes[0]))
		w.drill(t)
		if w.key(nodes[0]) == key {
			t.Error("it goes on under the key that it was closed for")
		}
	})
}

// TestNewKeyKilled: a node that dies between its new key and the mark of its new chain
// comes back, though the chain before was opened by a process that did not live to
// note it.
func TestNewKeyKilled(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.conn.next = killApplied
	if _, err := n.add(p, "a"); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	w.admin.must(t, replaces(n))
	w.admin.must(t, start)
	n.dies(t, "keyed", 1, recoverNode)
	n.must(t, recoverNode)
}

// TestEndedOverRestores: what an operator ends in a drill stays ended, though an
// earlier drill had put it back by another acquire.
func TestEndedOverRestores(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "first")
	older := slices.Clone(w.store.history)
	n.mustAdd(t, p, "x")
	younger := slices.Clone(w.store.history)
	n.mustAdd(t, p, "y")
	w.store.history, w.store.cluster = older, w.store.cluster+1
	w.drill(t)
	if w.has(n, "x") == nil || w.has(n, "y") == nil {
		t.Fatal("not put back")
	}
	w.store.history, w.store.cluster = younger, w.store.cluster+1
	w.admin.must(t, start)
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("x"), entry.Ref{}, "x is to go") })
	n.must(t, recoverNode)
	if w.has(n, "x") != nil || w.has(n, "y") == nil {
		t.Errorf("x, which was ended on the record, has %v; y, which runs, has %v", w.has(n, "x"), w.has(n, "y"))
	}
	if got := n.writer().Dir.Holding(n.attachment("y")); len(got.Earlier) != 2 {
		t.Errorf("y is held by %v", got.Acquires())
	}
}

// TestKeptOverRestores: also what a drill keeps remembers by which acquires.
func TestKeptOverRestores(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "first")
	older := slices.Clone(w.store.history)
	n.mustAdd(t, p, "x")
	younger := slices.Clone(w.store.history)
	w.store.history, w.store.cluster = older, w.store.cluster+1
	w.drill(t)
	after := slices.Clone(w.store.history) // x by another acquire
	w.store.history, w.store.cluster = younger, w.store.cluster+1
	w.drill(t) // kept
	w.store.history, w.store.cluster = after, w.store.cluster+1
	w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(bg, 9, "test"); return err })
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("x"), entry.Ref{}, "x is to go") })
	n.must(t, recoverNode)
	if w.has(n, "x") != nil {
		t.Error("what was ended on the record is back")
	}
}

// TestImportKilled: a drill leaves an imported pod its lease, though the import died
// before it noted that.
func TestImportKilled(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "other")
	lease := func(c string, ip string) []statedir.Holding {
		return []statedir.Holding{{ID: n.attachment(c), Value: keyspace.Attachment{
			Space: "default", Pool: "net", Leases: []keyspace.Lease{p.Sets[0].segmentOf(netip.MustParseAddr(ip)).lease(netip.MustParseAddr(ip))},
		}}}
	}
	imports := func(l []statedir.Holding) func(x *Writer) error {
		return func(x *Writer) error { _, err := x.Import(bg, l, false, "test"); return err }
	}
	n.dies(t, "settled", 1, imports(lease("x", "10.22.0.99")))
	n.dies(t, "settled", 1, n.adds(p, "unanswered"))
	n.dies(t, "settled", 1, imports(lease("again", "10.22.0.98")))
	n.must(t, imports(lease("again", "10.22.0.98"))) // it is recorded: then it is remembered
	if n.writer().Dir.Holding(n.attachment("again")) == nil {
		t.Error("what is recorded already is not remembered")
	}
	n.dies(t, "settled", 1, imports(lease("ended", "10.22.0.97")))
	w.admin.must(t, start)
	calls := 0
	n.must(t, func(x *Writer) error {
		x.Store = &onConnect{x.Store, func() {
			if calls++; calls == 3 { // both sides are listed
				w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("ended"), entry.Ref{}, "test") })
			}
		}}
		return recoverNode(x)
	})
	if w.has(n, "x") == nil || w.has(n, "again") == nil || w.has(n, "unanswered") != nil || w.has(n, "ended") != nil {
		t.Errorf("imported: %v, %v; never answered: %v", w.has(n, "x"), w.has(n, "again"), w.has(n, "unanswered"))
	}
}

// TestRemoveAfterReplace: a node that was replaced, has noted its new chain and not
// opened it, is not let in by a removal that came after.
func TestRemoveAfterReplace(t *testing.T) {
	belongings := func(t *testing.T, w *world, n *machine) *Belongings {
		b, err := w.admin.writer().Belongings(bg, n.who.Name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ends := func(b *Belongings) func(x *Writer) error {
		return func(x *Writer) error { _, err := x.End(bg, b, true, "test"); return err }
	}
	probe := func(x *Writer) error { return x.Probe(bg) }
	t.Run("cut short", func(t *testing.T) {
		w, p, nodes := stage(t, 2, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		n.mustAdd(t, p, "b")
		w.admin.must(t, replaces(n))
		n.must(t, probe)
		b := belongings(t, w, n)
		w.admin.dies(t, "begun", 3, ends(b))
		n.refuses(t, "is not ended yet", n.adds(p, "c"))
		w.admin.must(t, ends(b))
	})
	t.Run("done", func(t *testing.T) {
		w, p, nodes := stage(t, 2, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		w.admin.must(t, replaces(n))
		n.must(t, probe)
		w.admin.must(t, ends(belongings(t, w, n)))
		n.refuses(t, "recover node", n.adds(p, "c"))
	})
	t.Run("in a drill", func(t *testing.T) {
		w, p, nodes := stage(t, 2, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		n.mustAdd(t, p, "b")
		w.admin.must(t, start)
		n.dies(t, "enrolled", 1, recoverNode)
		b := belongings(t, w, n)
		w.admin.dies(t, "begun", 3, ends(b))
		n.refuses(t, "is not ended yet", recoverNode)
		w.admin.must(t, ends(b))
	})
	t.Run("it lives and comes back", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		b := belongings(t, w, n)
		calls := 0
		w.admin.must(t, func(x *Writer) error {
			x.Store = &onConnect{x.Store, func() {
				if calls++; calls == 4 { // closed, looked at again, released
					n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
					n.mustAdd(t, p, "b")
					n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("b"), "") })
				}
			}}
			out, err := x.End(bg, b, true, "test")
			if err == nil && (!out.Back || len(out.Kept) != 1 || len(out.Released) != 1) {
				t.Errorf("%+v", out)
			}
			return err
		})
		n.mustAdd(t, p, "c")
	})
	t.Run("what it got until the close", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		b := belongings(t, w, n)
		n.mustAdd(t, p, "b")
		w.admin.must(t, ends(b))
		if w.has(n, "a") != nil || w.has(n, "b") != nil {
			t.Error("something of its closed chain is leased yet, and keeps it out")
		}
	})
}

// TestAttachmentGone: somebody deleted an attachment's key. The pod's ADD is refused,
// its DEL ends the lease, and so does an operator by the address.
func TestAttachmentGone(t *testing.T) {
	for _, by := range []string{"DEL", "operator"} {
		t.Run(by, func(t *testing.T) {
			w, p, nodes := stage(t, 1, "10.22.0.0/24")
			n := nodes[0]
			ip := n.mustAdd(t, p, "a")[0]
			acquire := w.has(n, "a").Acquire
			w.del(testKeys.Attachment(n.attachment("a")))
			n.refuses(t, fmt.Sprintf("'ledger release %v", ip), n.adds(p, "a"))
			if by == "DEL" {
				if err := n.del("a"); err != nil {
					t.Fatal(err)
				}
			} else {
				w.admin.must(t, func(x *Writer) error { return x.Lost(bg, n.attachment("a"), acquire, "test") })
			}
			n.mustAdd(t, p, "b", ip)
		})
	}
}

// TestLostOfAnother: what ends a lease by its address leaves another lease of the
// attachment alone, and is on the record; verify names what happened, once.
func TestLostOfAnother(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	first := n.mustAdd(t, p, "a")
	old := w.has(n, "a").Acquire
	w.del(testKeys.Attachment(n.attachment("a")))
	if err := os.RemoveAll(filepath.Join(n.dir, "holdings")); err != nil { // or it would be refused
		t.Fatal(err)
	}
	second := n.mustAdd(t, p, "a")
	lost := func(x *Writer) error { return x.Lost(bg, n.attachment("a"), old, "test") }
	w.admin.must(t, lost)
	w.admin.reconnect()
	if err := w.admin.run(lost); !errors.Is(err, ErrNotFound) {
		t.Errorf("ended twice: %v", err)
	}
	if a := w.has(n, "a"); a == nil || !slices.Equal(addrsOf(a.Leases), second) {
		t.Errorf("the lease that runs is %+v, want %v", a, second)
	}
	n.mustAdd(t, p, "b", first[0])
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	n.mustAdd(t, p, "c", second[0])
	w.store.finds(t, "DOUBLE-LEASE")
}

// TestReleaseOfRobbed: an attachment whose address somebody deleted, and another pod
// got, is released by an entry, and the other pod keeps the address.
func TestReleaseOfRobbed(t *testing.T) {
	w := newWorld(t, 1)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	ip := n.mustAdd(t, p, "a")[0]
	w.del(testKeys.Address("default", ip))
	n.mustAdd(t, p, "b", ip)
	n.refuses(t, "'ledger release --attachment n0/net/a/eth0'", func(x *Writer) error { return x.Check(bg, n.attachment("a"), []netip.Addr{ip}) })
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("a"), entry.Ref{}, "test") })
	if w.has(n, "a") != nil || w.has(n, "b") == nil {
		t.Errorf("a has %v, b has %v", w.has(n, "a"), w.has(n, "b"))
	}
	w.store.finds(t, "DOUBLE-ALLOC")
}

// TestOwnFullPool: a pool whose blocks are all a node's own is remembered as well, and
// so is one with a key among its claims that is none.
func TestOwnFullPool(t *testing.T) {
	for _, strict := range []bool{false, true} {
		w := newWorld(t, 1)
		w.init(t)
		p, err := NewPool("default", "net", rangeSets("10.22.0.0/24"), nil, strict, 16, 0)
		if err != nil {
			t.Fatal(err)
		}
		n, last := w.nodes[0], ""
		for i := 0; ; i++ {
			n.reconnect()
			if _, err := n.add(p, fmt.Sprint("c", i)); errors.Is(err, ErrExhausted) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			last = fmt.Sprint("c", i)
		}
		w.put(testKeys.Blocks("default", "net")+"stray", "x")
		for try := range 3 {
			n.reconnect()
			if _, err := n.add(p, "refused"); !errors.Is(err, ErrExhausted) {
				t.Fatal(err)
			}
			if try > 0 && (n.conn.reads > 6 || n.conn.bytes > 64<<10) {
				t.Errorf("strict %v, refused: %d reads, %d bytes", strict, n.conn.reads, n.conn.bytes)
			}
		}
		n.reconnect()
		if err := n.del(last); err != nil {
			t.Fatal(err)
		}
		n.reconnect()
		if _, err := n.add(p, "fits"); err != nil || n.conn.reads > 6 || n.conn.bytes > 64<<10 {
			t.Errorf("strict %v, the last one: %d reads, %d bytes, %v", strict, n.conn.reads, n.conn.bytes, err)
		}
	}
}

// TestRecoverByTwo: what another process of the drill has settled, and pods that came
// and went since, are left alone by one that listed them before.
func TestRecoverByTwo(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.mustAdd(t, p, "b")
	w.admin.must(t, start)
	calls := 0
	n.must(t, func(x *Writer) error {
		x.Store = &onConnect{x.Store, func() {
			if calls++; calls == 3 { // both sides are listed
				n.must(t, recoverNode)
				w.admin.must(t, func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0"}, nil, "test"); return err })
				if err := n.del("a"); err != nil {
					t.Fatal(err)
				}
				n.mustAdd(t, p, "c", netip.MustParseAddr("10.22.0.2"))
				if err := os.RemoveAll(filepath.Join(n.dir, "holdings")); err != nil { // as if the power had gone
					t.Fatal(err)
				}
			}
		}}
		_, err := x.Recover(bg, nil, "test")
		return err
	})
	if w.has(n, "a") != nil || w.has(n, "b") == nil || w.has(n, "c") == nil {
		t.Errorf("a %v, b %v, c %v", w.has(n, "a"), w.has(n, "b"), w.has(n, "c"))
	}
}

// TestKnownAndQueued: a runtime that knows a sandbox yet keeps no lease whose release
// waits.
func TestKnownAndQueued(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.reconnect()
	n.conn.next = deafReads
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, start)
	n.must(t, func(x *Writer) error { _, err := x.Recover(bg, everybody{}, "test"); return err })
	if w.has(n, "a") != nil || n.writer().Dir.Holding(n.attachment("a")) != nil {
		t.Errorf("a, which is to go, has %v", w.has(n, "a"))
	}
}

// everybody is a runtime that knows each sandbox.
type everybody struct{}

func (everybody) Knows(keyspace.AttachmentID) bool             { return true }
func (everybody) Leaked(keyspace.AttachmentID, entry.Ref) bool { return false }

// TestFirstCallIsDel: a replaced node without a state directory whose first call is a
// DEL remembers nothing of that pod.
func TestFirstCallIsDel(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	n.mustAdd(t, p, "b")
	if err := os.RemoveAll(n.dir); err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, replaces(n))
	n.reconnect()
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	dir := n.writer().Dir
	if w.has(n, "a") != nil || dir.Holding(n.attachment("a")) != nil || dir.Holding(n.attachment("b")) == nil {
		t.Errorf("a has %v; held: a %v, b %v", w.has(n, "a"), dir.Holding(n.attachment("a")), dir.Holding(n.attachment("b")))
	}
}

// TestReplacedByAnotherLease: a replaced node that remembers another lease than etcd
// has recovers before it allocates.
func TestReplacedByAnotherLease(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	h := n.writer().Dir.Holding(n.attachment("a"))
	h.Value.Acquire.Seq += 7
	if err := errors.Join(n.writer().Dir.Prepare(*h), n.writer().Dir.Hold(h.ID)); err != nil {
		t.Fatal(err)
	}
	w.admin.must(t, replaces(n))
	n.refuses(t, "'ledger recover node'", n.adds(p, "b"))
	n.must(t, recoverNode)
	n.mustAdd(t, p, "b")
}

// TestEpochOfAnotherEtcd: a node that has entered an epoch in one etcd, and opened
// nothing there, does not allocate from another one of the same epoch.
func TestEpochOfAnotherEtcd(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	old, cluster := slices.Clone(w.store.history), w.store.cluster
	w.store.history, w.store.cluster = slices.Clone(old), cluster+1
	w.admin.must(t, start)
	n.dies(t, "enrolled", 1, recoverNode)
	// The operator who did not know takes up another etcd of the same backup.
	w.store.history, w.store.cluster = old, cluster+2
	b := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "b@desk"})
	b.must(t, start)
	n.refuses(t, "epoch", n.adds(p, "b"))
	n.refuses(t, "'ledger recover start --epoch 3' comes first", recoverNode)
}

// beforeRead calls f before the n-th read.
type beforeRead struct {
	Store
	n int
	f func()
}

func (h *beforeRead) Read(ctx context.Context, serializable bool, gets []Get) (*Reply, error) {
	if h.n--; h.n == 0 {
		h.f()
	}
	return h.Store.Read(ctx, serializable, gets)
}

// TestEndedByTwo: what a colleague, or the pod's own DEL, ends or gives back while an
// operator reads the record, he does not put on it once more.
func TestEndedByTwo(t *testing.T) {
	lost := func(n *machine) func(x *Writer) error {
		return func(x *Writer) error { return x.Lost(bg, n.attachment("a"), entry.Ref{}, "test") }
	}
	for name, other := range map[string]func(t *testing.T, n, b *machine){
		"a colleague": func(t *testing.T, n, b *machine) { b.must(t, lost(n)) },
		"the DEL": func(t *testing.T, n, _ *machine) {
			n.must(t, func(x *Writer) error { return x.Release(bg, n.attachment("a"), "") })
		},
	} {
		for reads := 1; reads <= 3; reads++ { // of the node's chains, the operators', the view
			t.Run(fmt.Sprint(name, reads), func(t *testing.T) {
				w, p, nodes := stage(t, 1, "10.22.0.0/24")
				n := nodes[0]
				n.mustAdd(t, p, "a")
				b := w.operator(t)
				w.del(testKeys.Attachment(n.attachment("a")))
				w.admin.reconnect()
				err := w.admin.run(func(x *Writer) error {
					x.Store = &beforeRead{x.Store, reads, func() { other(t, n, b) }}
					return lost(n)(x)
				})
				if !errors.Is(err, ErrNotFound) {
					t.Errorf("%v, want %v", err, ErrNotFound)
				}
			})
		}
	}
	t.Run("robbed", func(t *testing.T) { // no key that is compared changes
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		ip := n.mustAdd(t, p, "a")[0]
		w.del(testKeys.Address("default", ip))
		n.mustAdd(t, p, "b", ip)
		w.del(testKeys.Attachment(n.attachment("a")))
		b := w.operator(t)
		w.admin.reconnect()
		w.admin.conn.between = func() { b.must(t, lost(n)) }
		if err := w.admin.run(lost(n)); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v, want %v", err, ErrNotFound)
		}
		w.store.finds(t, "DOUBLE-ALLOC")
	})
	t.Run("block", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		if err := n.del("a"); err != nil {
			t.Fatal(err)
		}
		b := w.operator(t)
		block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: n.writer().Dir.Blocks("default", "net")[0]}
		w.del(testKeys.Block(block))
		unclaim := func(x *Writer) error { return x.Unclaim(bg, Claim{Block: block, Node: "n0"}, "test") }
		w.admin.reconnect()
		w.admin.conn.between = func() { b.must(t, unclaim) }
		if err := w.admin.run(unclaim); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v, want %v", err, ErrNotFound)
		}
	})
}

// TestKeyedThenDrill: a writer that was closed, has its new key and died before it had
// more, comes back by a drill, though its first chain was opened by a process that did
// not live to note it; also where a restore takes the close back.
func TestKeyedThenDrill(t *testing.T) {
	t.Run("node", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.conn.next = killApplied
		if _, err := n.add(p, "a"); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		w.admin.must(t, replaces(n))
		n.dies(t, "keyed", 1, n.adds(p, "b"))
		w.admin.must(t, start)
		n.must(t, recoverNode)
	})
	t.Run("operator", func(t *testing.T) {
		w, _, _ := stage(t, 1, "10.22.0.0/24")
		b := w.machine(entry.Writer{Kind: entry.KindOperator, Name: "b@desk"})
		b.conn.next = killApplied
		if err := b.run(freeze); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		w.admin.must(t, replaces(b))
		b.dies(t, "keyed", 1, thaw)
		w.admin.must(t, start)
		b.must(t, thaw)
	})
	t.Run("restored", func(t *testing.T) {
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.conn.next = killApplied
		if _, err := n.add(p, "a"); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		before := slices.Clone(w.store.history)
		w.admin.must(t, replaces(n))
		n.dies(t, "keyed", 1, n.adds(p, "b"))
		w.store.history, w.store.cluster = before, w.store.cluster+1
		w.admin.must(t, start)
		n.refuses(t, "'ledger node replace n0'", recoverNode)
		w.admin.must(t, replaces(n))
		n.must(t, recoverNode)
	})
	t.Run("unnoticed", func(t *testing.T) { // with the old token, and the node lost nothing
		w, p, nodes := stage(t, 1, "10.22.0.0/24")
		n := nodes[0]
		n.mustAdd(t, p, "a")
		before := slices.Clone(w.store.history)
		w.admin.must(t, replaces(n))
		n.dies(t, "keyed", 1, n.adds(p, "b"))
		w.store.history = before
		n.refuses(t, "'ledger node replace n0'", n.adds(p, "c"))
	})
}

// TestReplacedInADrill: a node whose state directory is whole knows what is gone, also
// where a drill wants it replaced: the drill does not give it back.
func TestReplacedInADrill(t *testing.T) {
	w, p, nodes := stage(t, 2, "10.22.0.0/24")
	a, b := nodes[0], nodes[1]
	ip := a.mustAdd(t, p, "gone")[0]
	b.mustAdd(t, p, "other")
	old := slices.Clone(w.store.history)
	w.admin.must(t, replaces(a))
	a.mustAdd(t, p, "runs")
	a.reconnect()
	if err := a.del("gone"); err != nil {
		t.Fatal(err)
	}
	b.mustAdd(t, p, "took", ip)
	w.store.history, w.store.cluster = old, w.store.cluster+1
	w.admin.must(t, start)
	a.refuses(t, "'ledger node replace n0'", recoverNode)
	w.admin.must(t, replaces(a))
	for _, n := range nodes {
		n.must(t, func(x *Writer) error {
			r, err := x.Recover(bg, nil, "test")
			if err == nil && !r.Done {
				t.Errorf("%v: %+v", n.who, r)
			}
			return err
		})
	}
	if w.has(a, "gone") != nil || w.has(a, "runs") == nil || w.has(b, "took") == nil {
		t.Errorf("gone %v, runs %v, took %v", w.has(a, "gone"), w.has(a, "runs"), w.has(b, "took"))
	}
}

// TestAttachmentGoneLater: the lease of a pod whose attachment's key somebody deleted
// does not leak, whoever comes next.
func TestAttachmentGoneLater(t *testing.T) {
	drain := func(x *Writer) error { _, err := x.Drain(bg); return err }
	for name, next := range map[string]func(t *testing.T, w *world, n *machine){
		"a DEL that waits": func(t *testing.T, w *world, n *machine) {
			w.admin.must(t, freeze)
			n.reconnect()
			if err := n.del("a"); err != nil {
				t.Fatal(err)
			}
			w.admin.must(t, thaw)
			n.must(t, drain)
		},
		"a drill": func(t *testing.T, w *world, n *machine) {
			if r := w.drill(t)["n0"]; r.Kept != 1 || n.writer().Dir.Holding(n.attachment("a")) == nil {
				t.Errorf("the pod runs: %+v", r)
			}
			n.reconnect()
			if err := n.del("a"); err != nil {
				t.Fatal(err)
			}
		},
		"GC": func(t *testing.T, _ *world, n *machine) {
			n.must(t, func(x *Writer) error { _, err := x.GC(bg, "net", nil); return err })
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, p, nodes := stage(t, 1, "10.22.0.0/24")
			n := nodes[0]
			ip := n.mustAdd(t, p, "a")[0]
			w.del(testKeys.Attachment(n.attachment("a")))
			next(t, w, n)
			n.mustAdd(t, p, "b", ip)
		})
	}
	t.Run("half of it", func(t *testing.T) { // an operator has to
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24", "fd00::/64"), w.nodes[0]
		ips := n.mustAdd(t, p, "a")
		acquire := w.has(n, "a").Acquire
		w.del(testKeys.Attachment(n.attachment("a")))
		w.del(testKeys.Address("default", ips[0]))
		n.reconnect()
		if err := n.del("a"); err != nil || !n.writer().Dir.IsQueued(n.attachment("a")) {
			t.Errorf("%v; it does not wait", err)
		}
		w.admin.must(t, func(x *Writer) error { return x.Lost(bg, n.attachment("a"), acquire, "test") })
		n.must(t, drain)
		if n.writer().Dir.IsQueued(n.attachment("a")) {
			t.Error("it waits yet")
		}
		w.store.check(t)
	})
}

// TestRepeatedAddRemembers: an ADD that is repeated forgets no acquire by which the pod
// held what it has.
func TestRepeatedAddRemembers(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "first")
	older := slices.Clone(w.store.history)
	n.mustAdd(t, p, "x")
	younger := slices.Clone(w.store.history)
	w.store.history, w.store.cluster = older, w.store.cluster+1
	w.drill(t)
	n.mustAdd(t, p, "x")
	w.store.history, w.store.cluster = younger, w.store.cluster+1
	w.admin.must(t, start)
	w.admin.must(t, func(x *Writer) error { return x.ReleaseLease(bg, n.attachment("x"), entry.Ref{}, "x is to go") })
	n.must(t, recoverNode)
	if w.has(n, "x") != nil {
		t.Error("what was ended on the record is back")
	}
}

// TestHeadGoneThenDrill: a writer whose head is gone opens no second first chain in a
// drill; the way out that it names makes the head again.
func TestHeadGoneThenDrill(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	n := nodes[0]
	n.mustAdd(t, p, "a")
	b := w.operator(t)
	w.del(testKeys.Writer(n.who))
	w.del(testKeys.Writer(b.who))
	b.refuses(t, "its chain is there; its way out: another operator's", start)
	w.admin.must(t, start)
	n.refuses(t, "'ledger node replace n0'", recoverNode)
	w.admin.must(t, replaces(n))
	n.must(t, recoverNode)
	recovered := func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0"}, nil, "test"); return err }
	b.refuses(t, "its chain is there; its way out: another operator's", recovered)
	w.admin.must(t, replaces(b))
	b.must(t, recovered)
}

// TestOperatorOfAnotherEtcd: an operator who began a recovery in an etcd that was given
// up since goes on in the one that another operator began with.
func TestOperatorOfAnotherEtcd(t *testing.T) {
	w, p, nodes := stage(t, 1, "10.22.0.0/24")
	nodes[0].mustAdd(t, p, "a")
	b := w.operator(t)
	w.admin.must(t, freeze)
	w.admin.must(t, thaw)
	old := slices.Clone(w.store.history)
	w.store.history, w.store.cluster = slices.Clone(old), w.store.cluster+1
	b.must(t, start)
	w.store.history, w.store.cluster = slices.Clone(old), w.store.cluster+1
	w.admin.must(t, start)
	nodes[0].must(t, recoverNode)
	b.must(t, func(x *Writer) error { _, err := x.Thaw(bg, []string{"n0"}, nil, "test"); return err })
	b.must(t, freeze)
}
