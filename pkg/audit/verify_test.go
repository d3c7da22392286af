package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

func TestHonest(t *testing.T) {
	l := story(t)
	for _, all := range []bool{false, true} {
		for _, ring := range []*KeyRing{nil, l.ring()} {
			var last int64
			r := l.verify(Options{AllSignatures: all, Keys: ring, Workers: 3, Progress: func(n int64) { last = n }})
			if r.ExitCode() != ExitVerified || len(r.Warnings) > 0 || len(r.Notes) > 0 {
				show(t, r)
				t.Fatalf("exit %d", r.ExitCode())
			}
			if last != r.Entries || r.Pinned != (ring != nil) || r.Leased != 3 || r.Free != 4 || r.Attachments != 3 || r.Blocks != 2 || r.Chains != 4 || r.Writers != 3 {
				t.Errorf("progress %d, report %+v", last, r)
			}
			if all && r.Signatures != r.Entries {
				t.Errorf("checked %d signatures of %d", r.Signatures, r.Entries)
			}
			if r.First != 101 || r.Last != r.Revision {
				t.Errorf("covered %d to %d of %d", r.First, r.Last, r.Revision)
			}
			sameFromExport(t, l, Options{AllSignatures: all, Keys: ring}, r)
		}
	}
}

func TestNothing(t *testing.T) {
	l := newLedger(t)
	if r, err := Verify(context.Background(), l, Options{}); err == nil || !strings.Contains(err.Error(), "nothing below") {
		t.Fatalf("Verify of nothing: %+v, %v", r, err)
	}
	l.put(l.keys.Meta(), keyspace.Encode(keyspace.Meta{Version: keyspace.FormatVersion, Cluster: l.cluster, EtcdCluster: l.etcd, Epoch: 1, State: keyspace.Running}))
	r := l.verify(Options{})
	if got := codesOf(r); !slices.Equal(got, []Code{StateDiffers}) {
		t.Fatalf("meta alone: %v", got)
	}
}

// restored is the ledger after a restore of an old copy and the recover drill.
func restored(t *testing.T, l, old *ledger, epoch uint64) *ledger {
	r := old.clone(t)
	r.epoch, r.etcd, r.now = epoch, fmt.Sprintf("%016x", epoch), l.now
	op := r.writer(ann)
	r.anew(op, int(epoch)*10)
	r.meta(op, keyspace.Frozen)
	for _, name := range []string{nodeA, nodeB} {
		w := r.writer(name)
		*w = *l.writer(name) // a node keeps its key and its mark
		w.mark = w.head.Head()
		r.anew(w, int(epoch)*10)
		if v := get[keyspace.Writer](r, r.keys.Writer(w.Writer)); v.Head() == w.mark {
			w.mark = entry.Ref{}
		}
		// what it no longer holds, and what it holds
		for k, h := range r.held {
			if "node/"+h.att.Node == name && l.held[k] == nil {
				r.release(w, h.att)
			}
		}
		for k, h := range l.held {
			if "node/"+h.att.Node == name && r.held[k] == nil {
				r.assert = entry.AssertRecover
				r.acquire(w, h.att, h.ips[0].String())
				r.assert = ""
			}
		}
		r.commit(w, &entry.Entry{Op: entry.Recover, Epoch: epoch})
		r.commit(w, &entry.Entry{Op: entry.Recover, Epoch: epoch}) // run again
	}
	r.meta(op, keyspace.Running)
	return r
}

// TestRestore is the recover drill, twice, the second time to before the first.
func TestRestore(t *testing.T) {
	first := story(t)
	l := first.clone(t)
	l.acquire(l.writer(nodeA), att("a", "c20"), "10.22.7.20")
	l.release(l.writer(nodeB), att("b", "c3"))
	l.acquire(l.writer(nodeB), att("b", "c21"), "10.22.7.66")

	second := restored(t, l, first, 2)
	r := second.verify(Options{AllSignatures: true, Keys: first.ring()})
	if r.ExitCode() != 0 || r.Epoch != 2 || len(r.Notes) != 2 || !strings.Contains(strings.Join(r.Notes, "\n"), "epoch 2: node/a lost entries 7..7 of chain") {
		show(t, r)
		t.Fatalf("after one restore: exit %d, epoch %d, notes %q", r.ExitCode(), r.Epoch, r.Notes)
	}
	second.acquire(second.writer(nodeA), att("a", "c22"), "10.22.7.30")
	third := restored(t, second, first, 3)
	r = third.verify(Options{AllSignatures: true})
	if r.ExitCode() != 0 || r.Epoch != 3 || !strings.Contains(strings.Join(r.Notes, "\n"), "remembers chain") {
		show(t, r)
		t.Fatalf("after two restores: exit %d", r.ExitCode())
	}
}

// TestStops is a stopped cluster: no finding, but said.
func TestStops(t *testing.T) {
	l := story(t)
	l.put(l.keys.Stop("b"), keyspace.Encode(keyspace.Stop{Node: "b", Found: "revision went back", Time: l.now}))
	r := l.verify(Options{})
	if r.ExitCode() != 0 || len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "node b") {
		t.Fatalf("exit %d, notes %q", r.ExitCode(), r.Notes)
	}
}

// TestRotatedPinned opens a chain with a key that only a rotation vouches for.
func TestRotatedPinned(t *testing.T) {
	l := story(t)
	ring := l.ring()
	b := l.writer(nodeB)
	if ring.Contains(b.vkey) {
		t.Fatal("the rotated key is in the ring")
	}
	l.commit(b, &entry.Entry{Op: entry.Close, Writer: b.Writer, Closes: b.head.Head()})
	l.anew(b, 2)
	l.acquire(b, att("b", "c30"), "10.22.7.90")
	if r := l.verify(Options{Keys: ring}); r.ExitCode() != 0 {
		show(t, r)
		t.Fatal("a key reached by rotation is not trusted")
	}
}

// TestRotatedUntrusted: a key that nobody trusts makes no other one trusted.
func TestRotatedUntrusted(t *testing.T) {
	l := story(t)
	ring := l.ring()
	m := l.writer("node/mallory")
	signer, vkey := testKey(t, m.Writer, "mallory's second key")
	l.commit(m, &entry.Entry{Op: entry.Rotate, Key: vkey})
	m.signer, m.vkey = signer, vkey
	l.commit(m, &entry.Entry{Op: entry.Close, Writer: m.Writer, Closes: m.head.Head()})
	l.anew(m, 2)
	l.acquire(m, att("mallory", "c30"), "10.22.7.90")
	r := l.verify(Options{Keys: ring})
	if len(r.Findings) != 2 || r.Findings[0].Code != UntrustedKey || r.Findings[1].Code != UntrustedKey {
		show(t, r)
		t.Fatal("want both of its chains to be opened with a key that is not trusted, and nothing else")
	}
}

// TestFlipEveryByte changes each byte of three entries, one at a time.
func TestFlipEveryByte(t *testing.T) {
	honest := story(t)
	for _, at := range []struct {
		writer string
		n      int
		seq    uint64
	}{{nodeB, 1, 3}, {nodeA, 2, 6}, {nodeA, 2, 1}} {
		l := honest.clone(t)
		k := l.entryKey(at.writer, at.n, at.seq)
		good := l.value(k)
		for i := range good {
			l.kv[k].Value[i] ^= 1 << (i % 8)
			r, err := Verify(context.Background(), l, Options{Workers: 1})
			if err != nil || r.ExitCode() != ExitFindings {
				t.Fatalf("byte %d of %s: %v, %+v", i, k, err, r)
			}
			if !slices.ContainsFunc(r.Findings, func(f Finding) bool { return strings.HasSuffix(k, f.Where) }) {
				show(t, r)
				t.Fatalf("byte %d of %s: no finding names the entry", i, k)
			}
			l.kv[k].Value[i] = good[i]
		}
	}
}

// TestRandomTampering changes entries at random; whatever that makes, it is found.
func TestRandomTampering(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	honest := story(t)
	for i := range 300 {
		l := honest.clone(t)
		var kk []string
		for k := range l.kv {
			kk = append(kk, k)
		}
		slices.Sort(kk)
		entries := slices.DeleteFunc(slices.Clone(kk), func(k string) bool { return !strings.HasPrefix(k, l.keys.Chains()) })
		one := func(of []string) string { return of[rng.IntN(len(of))] }
		a, b := one(entries), one(entries)
		for b == a {
			b = one(entries)
		}
		var what string
		switch op := rng.IntN(7); op {
		case 0:
			what = "drop " + a
			l.del(a)
		case 1:
			what = "swap " + a + " and " + b
			va, vb := l.value(a), l.value(b)
			l.put(a, vb)
			l.put(b, va)
		case 2:
			what = "swap without trace " + a + " and " + b
			l.kv[a].Value, l.kv[b].Value = l.kv[b].Value, l.kv[a].Value
		case 3:
			what = "copy " + a + " over " + b
			l.forge(b, func([]byte) []byte { return l.value(a) })
		case 4:
			what = "put again " + a
			l.put(a, l.value(a))
		case 5:
			k := one(kk)
			what = "delete " + k
			l.del(k)
		case 6:
			what = "drop both " + a + ", " + b
			l.del(a)
			l.del(b)
		}
		r, err := Verify(context.Background(), l, Options{})
		if err != nil || r.ExitCode() != ExitFindings {
			t.Fatalf("seed %d, %d: %s: %v, %+v", seed, i, what, err, r)
		}
	}
}

// TestMany reads many batches, with more findings than are listed.
func TestMany(t *testing.T) {
	l := busy(t, 3000, 200)
	if r := l.verify(Options{}); r.ExitCode() != 0 || r.Leased == 0 {
		show(t, r)
		t.Fatal("an honest ledger")
	}
	r := l.verify(Options{AllSignatures: true}) // most signatures are nonsense
	if int64(len(r.Findings)) != MaxFindings || r.FindingCount < 2500 || r.ByCode[BadSignature] != r.FindingCount || r.Signatures != r.Entries {
		t.Fatalf("%d listed of %d findings, %d signatures", len(r.Findings), r.FindingCount, r.Signatures)
	}
	// More is moved than is kept.
	defer func(n int) { maxMoved = n }(maxMoved)
	maxMoved = 4
	moved := l.clone(t)
	for n := range 20 {
		k := moved.entryKey(fmt.Sprintf("node/n%d", n), 1, 5)
		moved.put(k, moved.value(k))
	}
	r = moved.verify(Options{})
	if r.ExitCode() != 1 || !r.Has(Rewritten) {
		t.Fatalf("exit %d", r.ExitCode())
	}
}

// failing is a source that fails, or that is cut short by its reader.
type failing struct {
	*ledger
	after  int
	state  bool
	err    error
	cancel context.CancelFunc
}

func (f *failing) count(entries bool, g func(Record) error) func(Record) error {
	n := 0
	return func(r Record) error {
		if n++; n > f.after && f.state != entries {
			if f.cancel != nil {
				f.cancel()
			} else {
				return f.err
			}
		}
		return g(r)
	}
}

func (f *failing) Entries(ctx context.Context, g func(Record) error) error {
	return f.yield(true, f.count(true, g))
}

func (f *failing) State(ctx context.Context, g func(Record) error) error {
	return f.yield(false, f.count(false, g))
}

func TestSourceFails(t *testing.T) {
	l := busy(t, 3000, 200)
	broken := errors.New("compacted away")
	for _, state := range []bool{false, true} {
		for _, after := range []int{0, 1, 100, 300} {
			r, err := Verify(context.Background(), &failing{ledger: l, after: after, state: state, err: broken}, Options{})
			if !errors.Is(err, broken) || r != nil {
				t.Errorf("state %v, after %d: %v, %v", state, after, r, err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			r, err = Verify(ctx, &failing{ledger: l, after: after, state: state, cancel: cancel}, Options{})
			if !errors.Is(err, context.Canceled) || r != nil {
				t.Errorf("state %v, cancelled after %d: %v, %v", state, after, r, err)
			}
			cancel()
		}
	}
	l.keys = keyspace.Keys{}
	if _, err := Verify(context.Background(), l, Options{}); err == nil {
		t.Error("no prefix: no error")
	}
}

// TestNoEtcdClient keeps verification usable, and auditable, without etcd.
func TestNoEtcdClient(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range bytes.Lines(out) {
		if bytes.HasPrefix(dep, []byte("go.etcd.io/")) || bytes.HasPrefix(dep, []byte("google.golang.org/grpc")) {
			t.Errorf("pkg/audit imports %s", dep)
		}
	}
}

func TestParseKeys(t *testing.T) {
	l := newLedger(t)
	a, b := l.writer(nodeA).vkey, l.writer(nodeB).vkey
	ring, err := ParseKeys(strings.NewReader("# ours\n\n" + a + "\r\n  " + b + "  \n"))
	if err != nil || !ring.Contains(a) || !ring.Contains(b) || ring.Contains("x") || ring.Len() != 2 {
		t.Fatalf("%v, %v", ring, err)
	}
	name, rest, _ := strings.Cut(a, "+")
	for _, bad := range []string{
		"", "# none\n", "x", name, name + "+" + strings.ToUpper(rest), a + "=", "other/x+" + rest, "node/b+" + rest,
		a + " " + b, strings.Repeat("x", 5000), a[:len(a)-1],
	} {
		if _, err := ParseKeys(strings.NewReader(bad)); err == nil {
			t.Errorf("%.60q is accepted", bad)
		}
	}
	if _, err := ParseKeys(strings.NewReader(a + "\n" + "x\n")); err == nil || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("error does not name the line: %v", err)
	}
}
