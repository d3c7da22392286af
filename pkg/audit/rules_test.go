package audit

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// forged lets a writer's next commits have signatures that are none.
func (l *ledger) forged(w *testWriter, do func()) {
	honest := w.signer
	w.signer = nonsense{honest, testRNG}
	do()
	w.signer = honest
}

// nextEpoch is a recovery that an operator began and ended.
func (l *ledger) nextEpoch() {
	l.epoch++
	op := l.writer(ann)
	l.anew(op, 100*int(l.epoch))
	l.meta(op, keyspace.Running)
}

// mallory gives a writer another key than its own.
func (l *ledger) mallory(w *testWriter) { w.signer, w.vkey = testKey(l.t, w.Writer, "mallory") }

// ruleAttacks break one rule of the replay each, with entries that are signed and
// chained as they should be but for that.
var ruleAttacks = []attack{
	{
		name: "rotate to a key of one's own, without the key in force",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			signer, vkey := testKey(l.t, w.Writer, "mallory")
			l.forged(w, func() { l.commit(w, &entry.Entry{Op: entry.Rotate, Key: vkey}) })
			w.signer, w.vkey = signer, vkey
			l.acquire(w, att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "rotate to the key in force",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.commit(w, &entry.Entry{Op: entry.Rotate, Key: w.vkey})
		},
		codes: []Code{UntrustedKey}, exit: 1,
	},
	{
		name: "a close that nobody signed, in a chain that goes on",
		do: func(l *ledger) {
			op := l.writer(ann)
			l.forged(op, func() { l.closes(op, l.writer(nodeB), true) })
			l.meta(op, keyspace.Running)
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "a meta that nobody signed, in a chain that goes on",
		do: func(l *ledger) {
			op := l.writer(ann)
			l.forged(op, func() { l.meta(op, keyspace.Frozen) })
			l.meta(op, keyspace.Running)
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "a recover that nobody signed, in a chain that goes on",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.forged(w, func() { l.commit(w, &entry.Entry{Op: entry.Recover, Epoch: 1}) })
			l.acquire(w, att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "a node opens a chain of an epoch that is not yet",
		do: func(l *ledger) {
			l.replace(l.writer(ann), l.writer(nodeB))
			l.anew(l.writer(nodeB), 9)
			l.epoch = 2
			l.acquire(l.writer(nodeB), att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{StaleEpoch}, exit: 1, notice: "opened in another epoch",
	},
	{
		name: "a node opens a chain of an epoch that is over",
		do: func(l *ledger) {
			l.nextEpoch()
			l.replace(l.writer(ann), l.writer(nodeB))
			l.anew(l.writer(nodeB), 9)
			l.epoch = 1
			l.commit(l.writer(nodeB))
		},
		codes: []Code{StaleEpoch}, exit: 1, notice: "opened in another epoch",
	},
	{
		name: "an operator's second chain, of an epoch that never began",
		do: func(l *ledger) {
			w := l.writer(ann)
			l.mallory(w)
			l.anew(w, 66)
			l.epoch = 1 << 40
			l.release(w, att("b", "c4"))
			l.closes(w, l.writer(nodeB), true)
		},
		codes: []Code{Fork, StaleEpoch}, exit: 1, notice: "does not begin it",
	},
	{
		name: "the same with the stolen key, and the keys pinned",
		do: func(l *ledger) {
			w := l.writer(ann)
			l.anew(w, 66)
			l.epoch = 2
			l.release(w, att("b", "c4"))
		},
		codes: []Code{StaleEpoch}, exit: 1, ring: true,
	},
	{
		name: "an operator opens a chain of a later epoch, and no more",
		do: func(l *ledger) {
			l.anew(l.writer(ann), 66)
			l.epoch = 2
			l.commit(l.writer(ann))
		},
		codes: []Code{StaleEpoch}, exit: 1, notice: "does not begin it",
	},
	{
		name: "an operator's chain begins another epoch than its own",
		do: func(l *ledger) {
			w := l.writer(ann)
			l.anew(w, 66)
			l.epoch = 3
			l.commit(w) // and not in the same transaction
			l.meta(w, keyspace.Running)
		},
		codes: []Code{StaleEpoch}, exit: 1, notice: "does not begin it",
	},
	{
		name: "after a recovery anybody is the operator who has not written since",
		do: func(l *ledger) {
			w := l.writer("operator/bob")
			l.commit(w)
			l.nextEpoch()
			l.mallory(w)
			l.anew(w, 66)
			l.release(w, att("b", "c4"))
		},
		codes: []Code{Fork}, exit: 1, notice: "with another key",
	},
	{
		name: "after a recovery anybody is the node that was left out",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.nextEpoch()
			l.mallory(w)
			l.anew(w, 66)
			l.acquire(w, att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Fork}, exit: 1, notice: "with another key",
	},
	{
		name: "a chain that closed itself is followed by one with another key",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.commit(w, &entry.Entry{Op: entry.Close, Writer: w.Writer, Closes: w.head.Head()})
			l.mallory(w)
			l.anew(w, 66)
			l.acquire(w, att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Fork}, exit: 1, notice: "with another key",
	},
	{
		name: "a chain closes itself at another entry than the one before",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			at := w.head.Head()
			at.Seq--
			l.commit(w, &entry.Entry{Op: entry.Close, Writer: w.Writer, Closes: at})
		},
		codes: []Code{Fork}, exit: 1,
	},
	{
		name:  "a node closes another's chain",
		do:    func(l *ledger) { l.closes(l.writer(nodeB), l.writer(nodeA), false) },
		codes: []Code{WrongNode}, exit: 1,
	},
	{
		name: "a writer's whole first chain is gone",
		do: func(l *ledger) {
			w := l.writer("node/z")
			l.commit(w)
			first := l.keys.Entry(w.Writer, w.head.Chain, 1)
			l.nextEpoch()
			l.anew(w, 2)
			l.commit(w)
			l.del(first)
		},
		codes: []Code{Missing}, exit: 1, notice: "the chain that it continues is gone",
	},
	{
		name: "a writer remembers another entry than the one that it continues",
		do: func(l *ledger) {
			w := l.writer("node/z")
			l.commit(w)
			w.mark = w.head.Head()
			w.mark.Hash[0] ^= 1
			l.nextEpoch()
			l.anew(w, 2)
			l.commit(w)
		},
		codes: []Code{Fork}, exit: 1, notice: "remembers another entry",
	},
	{
		name: "the epoch goes back within a chain",
		do: func(l *ledger) {
			l.nextEpoch()
			l.epoch = 1
			l.meta(l.writer(ann), keyspace.Running)
		},
		codes: []Code{StaleEpoch, StateDiffers}, exit: 1, notice: "the cluster's epoch went back",
	},
	{
		name: "meta of another cluster",
		do: func(l *ledger) {
			l.cluster = strings.Replace(testCluster, "2", "3", 1)
			l.meta(l.writer(ann), keyspace.Running)
		},
		codes: []Code{WrongChain}, exit: 1,
	},
	{
		name: "meta of an older version",
		do: func(l *ledger) {
			l.version = keyspace.FormatVersion - 1
			l.meta(l.writer(ann), keyspace.Running)
		},
		codes: []Code{UnknownEntry}, exit: 1,
	},
	{
		name: "a release by another acquire",
		do: func(l *ledger) {
			e := l.releaseEntry(att("b", "c4"))
			e.Acquire = l.held[att("b", "c3").String()].acquire
			l.commit(l.writer(nodeB), e)
		},
		codes: []Code{ReleaseNoHold}, exit: 1, notice: "holds by another acquire",
	},
	{
		name: "a release of some of what an attachment holds",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.acquire(w, att("b", "c9"), "10.22.7.99", "fd00::99")
			e := l.releaseEntry(att("b", "c9"))
			e.Addresses = e.Addresses[:1]
			ref := l.commit(w, e)[0]
			l.putAt(l.keys.Address("default", e.Addresses[0].IP), keyspace.Encode(keyspace.Address{State: keyspace.Free, Pool: e.Pool, Release: ref, Since: e.Time}))
			delete(l.kv, l.keys.Attachment(att("b", "c9")))
		},
		codes: []Code{ReleaseNoHold}, exit: 1, notice: "holds other addresses",
	},
	{
		name: "a release that says another pod",
		do: func(l *ledger) {
			e := l.releaseEntry(att("b", "c4"))
			e.Pod = "kube-system/other"
			ref := l.commit(l.writer(nodeB), e)[0]
			l.putAt(l.keys.Address("default", e.Addresses[0].IP), keyspace.Encode(keyspace.Address{State: keyspace.Free, Pool: e.Pool, Release: ref, Since: e.Time}))
			delete(l.kv, l.keys.Attachment(att("b", "c4")))
		},
		codes: []Code{ReleaseNoHold}, exit: 1, notice: "another space or pool",
	},
	{
		name: "a release that says another pool",
		do: func(l *ledger) {
			e := l.releaseEntry(att("b", "c4"))
			e.Pool = "nosuch"
			ref := l.commit(l.writer(nodeB), e)[0]
			l.putAt(l.keys.Address("default", e.Addresses[0].IP), keyspace.Encode(keyspace.Address{State: keyspace.Free, Pool: e.Pool, Release: ref, Since: e.Time}))
			delete(l.kv, l.keys.Attachment(att("b", "c4")))
		},
		codes: []Code{ReleaseNoHold}, exit: 1, notice: "another space or pool",
	},
	{
		name: "an attachment acquires twice, and both are released: one finding",
		do: func(l *ledger) {
			w, a := l.writer(nodeB), att("b", "c9")
			l.acquire(w, a, "10.22.7.90")
			e := l.releaseEntry(a)
			l.acquire(w, a, "10.22.7.91")
			l.release(w, a)
			l.acquire(w, att("b", "c10"), "10.22.7.92") // in the place where it was
			ref := l.commit(w, e)[0]
			l.putAt(l.keys.Address("default", e.Addresses[0].IP), keyspace.Encode(keyspace.Address{State: keyspace.Free, Pool: e.Pool, Release: ref, Since: e.Time}))
		},
		codes: []Code{DoubleLease}, exit: 1,
	},
	{
		name: "an address is acquired twice, and the first lease released: one finding",
		do: func(l *ledger) {
			w, a := l.writer(nodeB), att("b", "c9")
			l.acquire(w, a, "10.22.7.90")
			l.acquire(w, att("b", "c10"), "10.22.7.90")
			l.commit(w, l.releaseEntry(a))
			delete(l.kv, l.keys.Attachment(a))
		},
		codes: []Code{DoubleAlloc}, exit: 1,
	},
	{
		name:  "the pod of an acquire is edited, whose release says the true one",
		do:    func(l *ledger) { l.edit(l.entryKey(nodeA, 1, 2), "shop/cart-7d9f", "shop/mine-7d9f") },
		codes: []Code{BadSignature, HashMismatch, Rewritten}, exit: 1,
	},
	{
		name: "another's block is given back",
		do: func(l *ledger) {
			l.commit(l.writer(ann), &entry.Entry{Op: entry.Unclaim, Space: "default", Pool: "prod", Blocks: []netip.Prefix{netip.MustParsePrefix("10.22.7.64/26")}, Node: "a"})
		},
		codes: []Code{ReleaseNoHold}, exit: 1,
	},
	{
		name: "an acquire while the ledger is frozen",
		do: func(l *ledger) {
			l.meta(l.writer(ann), keyspace.Frozen)
			l.acquire(l.writer(nodeB), att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Frozen}, exit: 1,
	},
	{
		name: "an import while the ledger is frozen",
		do: func(l *ledger) {
			l.meta(l.writer(ann), keyspace.Frozen)
			l.assert = entry.AssertImport
			l.acquire(l.writer(nodeB), att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Frozen}, exit: 1,
	},
	{
		name: "a node that has recovered asserts what it held before",
		do: func(l *ledger) {
			l.commit(l.writer(nodeB), &entry.Entry{Op: entry.Recover, Epoch: 1})
			l.assert = entry.AssertRecover
			l.acquire(l.writer(nodeB), att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Frozen}, exit: 1, notice: "has recovered",
	},
	{
		name:  "an operator's acquire",
		do:    func(l *ledger) { l.acquire(l.writer(ann), att("b", "c9"), "10.22.7.99") },
		codes: []Code{WrongNode}, exit: 1,
	},
	{
		name:  "an operator's recover",
		do:    func(l *ledger) { l.commit(l.writer(ann), &entry.Entry{Op: entry.Recover, Epoch: 1}) },
		codes: []Code{WrongNode}, exit: 1,
	},
	{
		name: "an entry is deleted, and the chain goes on with a key of one's own",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			l.commit(w, &entry.Entry{Op: entry.Recover, Epoch: 1})
			l.del(l.keys.Entry(w.Writer, w.head.Chain, w.head.Seq))
			l.mallory(w)
			w.head.Key, w.head.Recover = w.vkey, entry.Ref{}
			l.release(w, att("b", "c4"))
		},
		codes: []Code{Missing, UntrustedKey}, exit: 1, ring: true, notice: "1 entries after a gap",
	},
	{
		name: "a stop in another spelling",
		do: func(l *ledger) {
			l.put(l.keys.Stop("a"), []byte(`{"node":"a", "found":"x","time":"2026-11-20T14:00:00Z"}`))
		},
		codes: []Code{Malformed}, exit: 1, notice: "another way",
	},
	{
		name:  "a pool that was deleted stands again",
		do:    func(l *ledger) { l.put(l.keys.Pool("gone"), []byte(`{"ranges":[]}`)) },
		codes: []Code{StateDiffers}, exit: 1, notice: "SHA-256 nothing",
	},
}

// TestOneHidesNobody: a writer with more findings than are listed hides nothing that
// others have done.
func TestOneHidesNobody(t *testing.T) {
	l := story(t)
	w := l.writer("node/m")
	l.commit(w)
	for range MaxFindings + 100 {
		l.rev++
		stored := noteOf(t, w, fmt.Sprintf("ipam-ledger/entry/v1\nchain %s\nseq %d\nprev %s\ntime 2026-11-20T14:03:07.123456789Z\nrevision %d\nop x\n", w.head.Chain, w.head.Seq+1, w.head.Hash, l.rev-1))
		w.head.Seq, w.head.Hash = w.head.Seq+1, entry.HashOf(stored)
		l.putAt(l.keys.Entry(w.Writer, w.head.Chain, w.head.Seq), stored)
	}
	l.put(l.keys.Writer(w.Writer), keyspace.Encode(w.head))
	for _, ip := range []string{"10.22.7.66", "10.22.7.2"} {
		l.del(l.keys.Address("default", netip.MustParseAddr(ip)))
	}
	r := l.verify(Options{})
	missing := 0
	for _, f := range r.Findings {
		if f.Code == StateMissing {
			missing++
		}
	}
	if missing != 2 || len(r.Findings) != MaxFindings || r.FindingCount != MaxFindings+102 || r.ByCode[UnknownEntry] != MaxFindings+100 {
		t.Errorf("%d of %d findings are listed, %d of what is missing: %v", len(r.Findings), r.FindingCount, missing, r.ByCode)
	}
}

// TestKeysOnce: an entry with a bad signature costs a check with each key that the
// chain has had, and not with each rotation.
func TestKeysOnce(t *testing.T) {
	l := story(t)
	w := l.writer(nodeB)
	for range 50 {
		l.commit(w, &entry.Entry{Op: entry.Rotate, Key: w.vkey})
	}
	r := newReplay(l.keys, l.Snapshot(), &Options{}, newFindings())
	b := &batch{}
	var n int64
	if err := l.Entries(context.Background(), func(rec Record) error { b.add(n, &rec); n++; return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range b.items[:b.n] {
		b.items[i].parseEntry(r.prefix, l.keys, b.buf)
	}
	r.batch(b)
	if c := r.writers[nodeB].chain; len(c.keys) != 2 {
		t.Errorf("%d keys, want its first and its second", len(c.keys))
	}
}

// TestDoubtsCounted: findings that wait for the ledger's version are counted also
// where they are too many to be kept.
func TestDoubtsCounted(t *testing.T) {
	l := newFindings()
	for i := range MaxFindings + 500 {
		l.doubt(&Finding{Code: DoubleAlloc, Where: fmt.Sprint(i)})
	}
	l.decide(false)
	if l.count != MaxFindings+500 || l.byCode[DoubleAlloc] != MaxFindings+500 || len(l.list) != MaxFindings {
		t.Errorf("count %d, by code %d, listed %d", l.count, l.byCode[DoubleAlloc], len(l.list))
	}
}

// TestLongKeys: a finding is no longer than a screen, whatever the key.
func TestLongKeys(t *testing.T) {
	l := story(t)
	l.put(l.keys.Prefix()+strings.Repeat("x", 1<<20), []byte("x"))
	for _, f := range l.verify(Options{}).Findings {
		if n := len(f.Where) + len(f.Detail); n > 3*maxText {
			t.Errorf("a finding of %d bytes", n)
		}
	}
}

// altered is a ledger whose live keys are others.
type altered struct {
	*ledger
	live []Record
}

func (x altered) State(_ context.Context, f func(Record) error) error {
	for _, r := range x.live {
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

// TestHostileExport: exports that no etcd could have.
func TestHostileExport(t *testing.T) {
	l := story(t)
	live := func() (out []Record) {
		_ = l.State(context.Background(), func(r Record) error { out = append(out, r); return nil })
		return out
	}
	bare := func(kind string) []Record {
		var out, without []Record
		for _, r := range live() {
			if rel := strings.TrimPrefix(r.Key, l.keys.Prefix()); strings.HasPrefix(rel, kind) {
				r.Key = rel
				without = append(without, r)
			} else {
				out = append(out, r)
			}
		}
		return append(out, without...)
	}
	for _, c := range []struct {
		name string
		live func() []Record
		want Code
	}{
		{"addresses without the prefix", func() []Record { return bare("addresses/") }, UnknownKey},
		{"attachments without the prefix", func() []Record { return bare("attachments/") }, UnknownKey},
		{"a live key twice", func() []Record { all := live(); return slices.Insert(all, 1, all[0]) }, Order},
	} {
		r, err := Verify(context.Background(), exportOf(t, export(t, altered{l, c.live()})), Options{})
		if err != nil || r.ByCode[c.want] == 0 {
			t.Errorf("%s: %+v, %v; want %s", c.name, r, err, c.want)
		}
	}
	whole := export(t, l)
	z := bytes.LastIndexByte(whole, 'Z')
	more := append(bytes.Clone(whole), "\nanything at all"...)
	more[z+8] += byte(len(more) - len(whole))
	fewer := bytes.Clone(whole)
	digit := bytes.LastIndex(fewer, []byte(`"state":`)) + len(`"state":`)
	fewer[digit] = '1' + ('9'-fewer[digit])%2 + 7 // 8 or 9, whichever it was not
	for name, b := range map[string][]byte{"bytes after the JSON of frame Z": more, "another count in frame Z": fewer} {
		r, err := Verify(context.Background(), exportOf(t, b), Options{})
		if err != nil || r.FindingCount != 1 || r.ByCode[ArchiveCorrupt] != 1 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

// TestMadeUpWritersHideNobody: each kind of finding has its share of the list.
func TestMadeUpWritersHideNobody(t *testing.T) {
	l := story(t)
	for i := range MaxFindings {
		w := entry.Writer{Kind: entry.KindNode, Name: fmt.Sprint("x", i)}
		l.put(l.keys.Entry(w, chainID(w.Name), 1), []byte("garbage"))
	}
	l.acquire(l.writer(nodeB), att("b", "thief1"), "10.9.9.9")
	l.acquire(l.writer(nodeB), att("b", "thief2"), "10.9.9.9")
	if r := l.verify(Options{}); !slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Code == DoubleAlloc }) || len(r.Findings) != MaxFindings {
		t.Errorf("%d listed, and none is the DOUBLE-ALLOC: %v", len(r.Findings), r.ByCode)
	}
}
