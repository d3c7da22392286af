package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// entryKey is the key of an entry of a writer's n-th chain.
func (l *ledger) entryKey(writer string, n int, seq uint64) string {
	return l.keys.Entry(l.writer(writer).Writer, chainID(fmt.Sprintf("%s#%d", writer, n)), seq)
}

// edit is a put by a plain client.
func (l *ledger) edit(key, from, to string) {
	v := l.value(key)
	if !bytes.Contains(v, []byte(from)) {
		l.t.Fatalf("%s has no %q:\n%s", key, from, v)
	}
	l.put(key, bytes.Replace(v, []byte(from), []byte(to), 1))
}

// forge changes a value and leaves no trace in etcd's revisions: somebody with
// the database file, or with an export.
func (l *ledger) forge(key string, f func([]byte) []byte) {
	v := f(l.value(key))
	if bytes.Equal(v, l.value(key)) {
		l.t.Fatalf("%s is as it was", key)
	}
	l.kv[key].Value = v
}

func (l *ledger) setHead(name string, f func(*keyspace.Writer)) {
	k := l.keys.Writer(l.writer(name).Writer)
	v := get[keyspace.Writer](l, k)
	f(&v)
	l.put(k, keyspace.Encode(v))
}

func (l *ledger) refOf(key string) entry.Ref {
	k, err := l.keys.Parse(key)
	if err != nil {
		l.t.Fatal(err)
	}
	return entry.Ref{Chain: k.Chain, Seq: k.Seq, Hash: entry.HashOf(l.value(key))}
}

// sign puts an entry in a place of its own choice, signed with a writer's key.
func (l *ledger) sign(w *testWriter, key string, e *entry.Entry) {
	stored, _, err := entry.Sign(e, w.signer)
	if err != nil {
		l.t.Fatal(err)
	}
	l.put(key, stored)
}

func (l *ledger) parsed(key string) *entry.Entry {
	e, err := entry.Parse(l.value(key))
	if err != nil {
		l.t.Fatal(err)
	}
	return e
}

func (l *ledger) ring(but ...string) *KeyRing {
	var b strings.Builder
	for k, r := range l.kv {
		if strings.HasPrefix(k, l.keys.Chains()) {
			if e, err := entry.Parse(r.Value); err == nil && e.Op == entry.Open && !slices.Contains(but, e.Key) {
				fmt.Fprintln(&b, e.Key)
			}
		}
	}
	ring, err := ParseKeys(strings.NewReader(b.String()))
	if err != nil {
		l.t.Fatal(err)
	}
	return ring
}

// An attack is a change made behind the ledger's back. The codes are all that
// verification finds, no more and no less.
type attack struct {
	name   string
	do     func(l *ledger)
	codes  []Code
	exit   int
	ring   bool // verify with the keys of before the attack
	notice string
}

const (
	nodeA, nodeB = "node/a", "node/b"
	ann          = "operator/ann@desk"
)

var attacks = []attack{
	{
		name: "row 1: edit a field of an entry",
		do:   func(l *ledger) { l.edit(l.entryKey(nodeB, 1, 3), "10.22.7.66", "10.22.7.99") },
		// The edited acquire is replayed as it reads now, and the live address is still the old one.
		codes: []Code{AllocNoEntry, BadSignature, HashMismatch, Rewritten, StateDiffers, StateMissing}, exit: 1,
		notice: "chains/node/b/",
	},
	{
		name:  "row 1: edit a field that the state does not show",
		do:    func(l *ledger) { l.edit(l.entryKey(nodeB, 1, 3), `trace "t"`, `trace "u"`) },
		codes: []Code{BadSignature, HashMismatch, Rewritten}, exit: 1,
	},
	{
		name: "row 1: edit without a trace in the revisions",
		do: func(l *ledger) {
			l.forge(l.entryKey(nodeB, 1, 3), func(b []byte) []byte { return bytes.Replace(b, []byte(`trace "t"`), []byte(`trace "u"`), 1) })
		},
		codes: []Code{BadSignature, HashMismatch}, exit: 1,
	},
	{
		name: "row 1: edit a tip",
		do: func(l *ledger) {
			l.forge(l.entryKey(nodeA, 2, 6), func(b []byte) []byte { return bytes.Replace(b, []byte("time 2026"), []byte("time 2025"), 1) })
		},
		// The release's hash is what the address, and the head, name.
		codes: []Code{BadSignature, HashMismatch, StateDiffers}, exit: 1,
	},
	{
		name: "row 2: drop an entry in the middle",
		do:   func(l *ledger) { l.del(l.entryKey(nodeB, 1, 5)) },
		// It rotated the key: nothing vouches for the next one.
		codes: []Code{Missing, UntrustedKey}, exit: 1, notice: "entry 5 is gone",
	},
	{
		name: "row 2: drop several entries in the middle",
		do: func(l *ledger) {
			l.del(l.entryKey(nodeB, 1, 4))
			l.del(l.entryKey(nodeB, 1, 5))
		},
		codes: []Code{Missing, AllocNoEntry, UntrustedKey}, exit: 1, notice: "entries 4 to 5 are gone",
	},
	{
		name: "row 2: drop the open",
		do:   func(l *ledger) { l.del(l.entryKey(nodeB, 1, 1)) },
		// Its epoch and key are gone with it.
		codes: []Code{Missing}, exit: 1,
	},
	{
		name:  "row 4: truncate a tail, and the head still names it",
		do:    func(l *ledger) { l.del(l.entryKey(nodeA, 2, 6)) },
		codes: []Code{Missing, StateDiffers, StateMissing}, exit: 1,
	},
	{
		name: "row 4: truncate a tail and put the head back: the live lease has no entry",
		do: func(l *ledger) {
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
			k := l.entryKey(nodeA, 2, 7)
			l.del(k)
			before := l.refOf(l.entryKey(nodeA, 2, 6))
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Seq, w.Hash = before.Seq, before.Hash })
		},
		codes: []Code{AllocNoEntry}, exit: 1,
	},
	{
		name: "row 4: put the head back alone",
		do: func(l *ledger) {
			before := l.refOf(l.entryKey(nodeA, 2, 5))
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Seq, w.Hash = before.Seq, before.Hash })
		},
		codes: []Code{HeadRollback}, exit: 1,
	},
	{
		name: "row 4: put the head back to an earlier chain",
		do: func(l *ledger) {
			before := l.refOf(l.entryKey(nodeA, 1, 6))
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Chain, w.Seq, w.Hash = before.Chain, before.Seq, before.Hash })
		},
		codes: []Code{HeadRollback}, exit: 1,
	},
	{
		name: "row 5: roll back and regrow in the middle, with the key",
		do: func(l *ledger) {
			k := l.entryKey(nodeA, 2, 3)
			e := l.parsed(k)
			e.Reason = "regrown"
			l.sign(l.writer(nodeA), k, e)
		},
		codes: []Code{Fork, Rewritten}, exit: 1,
	},
	{
		name: "row 6: forge a new chain of a writer",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			w.signer, w.vkey = testKey(l.t, w.Writer, "mallory")
			l.anew(w, 9)
			l.acquire(w, att("b", "c9"), "10.22.7.99")
		},
		codes: []Code{Fork, UntrustedKey}, exit: 1, ring: true,
	},
	{
		name: "row 6: forge a new writer",
		do: func(l *ledger) {
			l.acquire(l.writer("node/mallory"), att("mallory", "c9"), "10.22.7.99")
		},
		codes: []Code{UntrustedKey}, exit: 1, ring: true,
	},
	{
		name: "row 7: replay an old entry at the end",
		do: func(l *ledger) {
			old := l.value(l.entryKey(nodeA, 2, 3))
			k := l.entryKey(nodeA, 2, 7)
			l.put(k, old)
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Seq, w.Hash = 7, entry.HashOf(old) })
		},
		codes: []Code{Replay}, exit: 1,
	},
	{
		name: "row 7: replay an old entry in another's place",
		do: func(l *ledger) {
			old := l.value(l.entryKey(nodeA, 2, 3))
			l.put(l.entryKey(nodeA, 2, 4), old)
		},
		codes: []Code{Replay, Rewritten, StateMissing}, exit: 1,
	},
	{
		name: "row 8: move an entry to another chain",
		do: func(l *ledger) {
			old := l.value(l.entryKey(nodeB, 1, 3))
			l.put(l.entryKey(nodeA, 2, 7), old)
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Seq, w.Hash = 7, entry.HashOf(old) })
		},
		codes: []Code{BadSignature, WrongChain}, exit: 1,
	},
	{
		name: "row 8: bring a chain of another cluster",
		do: func(l *ledger) {
			l.cluster = "another"
			l.acquire(l.writer("node/c"), att("c", "c9"), "10.22.7.99")
		},
		codes: []Code{WrongChain}, exit: 1,
	},
	{
		name: "row 9: swap two entries",
		do: func(l *ledger) {
			k3, k4 := l.entryKey(nodeA, 2, 5), l.entryKey(nodeA, 2, 6)
			v3, v4 := l.value(k3), l.value(k4)
			l.put(k3, v4)
			l.put(k4, v3)
		},
		codes: []Code{HashMismatch, Order, Rewritten, StateDiffers}, exit: 1,
	},
	{
		name: "row 9: delete an entry and put it again, later",
		do: func(l *ledger) {
			k := l.entryKey(nodeB, 1, 3)
			v := l.value(k)
			l.del(k)
			l.put(k, v)
		},
		codes: []Code{Order, StateDiffers}, exit: 1,
	},
	{
		name: "row 10: rewrite a chain from its start without the key",
		do: func(l *ledger) {
			l.rewrite(nodeB, l.writer(nodeB).vkey, func(w *testWriter) { w.signer, _ = testKey(l.t, w.Writer, "mallory") })
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "row 10, 22: rewrite a chain from its start with a key of one's own",
		do: func(l *ledger) {
			l.rewrite(nodeB, "", func(w *testWriter) { w.signer, w.vkey = testKey(l.t, w.Writer, "mallory") })
		},
		codes: []Code{UntrustedKey}, exit: 1, ring: true,
	},
	{
		name:  "row 13: delete an allocation's address, keep the entry",
		do:    func(l *ledger) { l.del(l.keys.Address("default", netip.MustParseAddr("10.22.7.66"))) },
		codes: []Code{StateMissing}, exit: 1,
	},
	{
		name:  "row 13: delete a free address",
		do:    func(l *ledger) { l.del(l.keys.Address("default", netip.MustParseAddr("fd00::3"))) },
		codes: []Code{StateMissing}, exit: 1,
	},
	{
		name:  "row 13: delete an attachment",
		do:    func(l *ledger) { l.del(l.keys.Attachment(att("b", "c3"))) },
		codes: []Code{StateMissing}, exit: 1,
	},
	{
		name: "row 14: allocate without an entry",
		do: func(l *ledger) {
			a := att("b", "c9")
			ref := entry.Ref{Chain: chainID("x"), Seq: 1, Hash: entry.Hash{1}}
			l.put(l.keys.Address("default", netip.MustParseAddr("10.22.7.99")), keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: "prod", Holder: &a, Acquire: ref}))
		},
		codes: []Code{AllocNoEntry}, exit: 1,
	},
	{
		name: "row 14: attach and claim without an entry",
		do: func(l *ledger) {
			l.put(l.keys.Attachment(att("b", "c9")), l.value(l.keys.Attachment(att("b", "c3"))))
			p := netip.MustParsePrefix("10.22.9.0/26")
			l.put(l.keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: p}), keyspace.Encode(keyspace.Block{Node: "b", Claim: entry.Ref{Chain: chainID("x"), Seq: 1}}))
		},
		codes: []Code{AllocNoEntry}, exit: 1,
	},
	{
		name: "row 15: change who holds an address",
		do: func(l *ledger) {
			l.edit(l.keys.Address("default", netip.MustParseAddr("10.22.7.66")), `"container":"c3"`, `"container":"c9"`)
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "c9",
	},
	{
		name: "row 15: change who holds an address without a trace in the revisions",
		do: func(l *ledger) {
			l.forge(l.keys.Address("default", netip.MustParseAddr("10.22.7.66")), func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"container":"c3"`), []byte(`"container":"c9"`), 1)
			})
		},
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "row 15: free an address behind its holder's back",
		do: func(l *ledger) {
			ip := netip.MustParseAddr("10.22.7.66")
			free := get[keyspace.Address](l, l.keys.Address("default", netip.MustParseAddr("10.22.7.67")))
			l.put(l.keys.Address("default", ip), keyspace.Encode(free))
		},
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name:  "row 15: write the same value again",
		do:    func(l *ledger) { k := l.keys.Attachment(att("b", "c3")); l.put(k, l.value(k)) },
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "row 15: change a block, a pool, meta and a writer",
		do: func(l *ledger) {
			l.edit(l.keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: netip.MustParsePrefix("10.22.7.0/26")}), `"node":"a"`, `"node":"b"`)
			l.edit(l.keys.Pool("prod"), "10.22.0.0/16", "10.0.0.0/8")
			l.put(l.keys.Pool("gone"), []byte(`{"ranges":[]}`))
			l.edit(l.keys.Meta(), "running", "frozen")
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Closed = w.Head() })
			l.setHead(nodeB, func(w *keyspace.Writer) { w.Recover = w.Head() })
		},
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "row 13: delete a block, a pool, meta and a writer",
		do: func(l *ledger) {
			l.del(l.keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: netip.MustParsePrefix("10.22.7.0/26")}))
			l.del(l.keys.Pool("prod"))
			l.del(l.keys.Meta())
			l.del(l.keys.Writer(l.writer(nodeA).Writer))
		},
		codes: []Code{StateMissing}, exit: 1,
	},
	{
		name: "row 16: two holders across chains",
		do: func(l *ledger) {
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.66")
		},
		codes: []Code{DoubleAlloc}, exit: 1,
	},
	{
		name: "row 17: restore into another cluster without recover",
		do:   func(l *ledger) { l.etcd = "00000000000000ff" },

		codes: []Code{Rollback}, exit: 1,
	},
	{
		name: "row 18: a clock goes back",
		do: func(l *ledger) {
			l.now = l.now.Add(-time.Hour)
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
			l.now = l.now.Add(time.Hour)
		},
		codes: nil, exit: 0, notice: "CLOCK-SKEW",
	},
	{
		name: "row 22: substitute the key in the writer's head",
		do: func(l *ledger) {
			l.setHead(nodeA, func(w *keyspace.Writer) { _, w.Key = testKey(l.t, l.writer(nodeA).Writer, "mallory") })
		},
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "row 23: two contents for one place",
		do: func(l *ledger) {
			k := l.entryKey(nodeA, 2, 6)
			e := l.parsed(k)
			e.Seq, e.Reason = 4, "the other side"
			l.sign(l.writer(nodeA), l.entryKey(nodeA, 2, 7), e)
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Seq, w.Hash = 7, entry.HashOf(l.value(l.entryKey(nodeA, 2, 7))) })
		},
		codes: []Code{Equivocation}, exit: 1,
	},
	{
		name: "row 23: one chain under two writers",
		do: func(l *ledger) {
			l.put(l.keys.Entry(l.writer(nodeB).Writer, chainID("node/a#2"), 1), l.value(l.entryKey(nodeA, 2, 1)))
		},
		codes: []Code{Equivocation}, exit: 1,
	},
	{
		name: "row 24: strip a signature",
		do: func(l *ledger) {
			l.forge(l.entryKey(nodeB, 1, 5), func(b []byte) []byte { return b[:bytes.Index(b, []byte("\n— "))+1] })
		},
		codes: []Code{HashMismatch, Unsigned, UntrustedKey}, exit: 1,
	},
	{
		name:  "an entry that is none",
		do:    func(l *ledger) { l.forge(l.entryKey(nodeB, 1, 5), func([]byte) []byte { return []byte("hello") }) },
		codes: []Code{HashMismatch, Malformed, UntrustedKey}, exit: 1,
	},
	{
		name:  "a value that is none",
		do:    func(l *ledger) { l.put(l.keys.Attachment(att("b", "c3")), []byte(`{"space":`)) },
		codes: []Code{Malformed}, exit: 1,
	},
	{
		name: "values that say both",
		do: func(l *ledger) {
			k := l.keys.Address("default", netip.MustParseAddr("10.22.7.66"))
			v := get[keyspace.Address](l, k)
			v.Release = v.Acquire
			l.put(k, keyspace.Encode(v))
			k = l.keys.Address("default", netip.MustParseAddr("10.22.7.67"))
			v = get[keyspace.Address](l, k)
			v.Acquire = v.Release
			l.put(k, keyspace.Encode(v))
			l.put(l.keys.Address("default", netip.MustParseAddr("10.22.7.3")), []byte(`{"state":"mine","pool":"prod"}`))
			k = l.keys.Address("default", netip.MustParseAddr("10.22.7.2"))
			v = get[keyspace.Address](l, k)
			v.Cooldown = 60
			l.put(k, keyspace.Encode(v))
		},
		codes: []Code{Malformed}, exit: 1,
	},
	{
		name: "a value that spells an odd pod as it is, and one that makes fields of it",
		do: func(l *ledger) {
			raw := func(container, pod, escaped string) {
				l.pod = pod
				l.acquire(l.writer(nodeA), att("a", container), "10.22.7."+container[1:])
				l.forge(l.keys.Attachment(att("a", container)), func(b []byte) []byte {
					return bytes.Replace(b, []byte(escaped), []byte(pod), 1)
				})
			}
			raw("c10", "shop/a&b", `shop/a\u0026b`)
			raw("c11", `x","podUID":"y`, `x\",\"podUID\":\"y`)
		},
		codes: []Code{Malformed, StateDiffers}, exit: 1,
	},
	{
		name: "a stray key, a stray entry",
		do: func(l *ledger) {
			l.put(l.keys.Prefix()+"addresses/default/4/10.22.7.9", []byte("{}"))
			l.put(l.keys.Chains()+"node/a/x", []byte("{}"))
			l.put(l.entryKey(nodeA, 2, 9)+"0", l.value(l.entryKey(nodeA, 2, 1)))
		},
		codes: []Code{UnknownKey}, exit: 1,
	},
	{
		name: "an etcd lease on a key",
		do: func(l *ledger) {
			l.kv[l.entryKey(nodeA, 2, 3)].Lease = 7
			l.kv[l.keys.Attachment(att("b", "c3"))].Lease = 7
		},
		codes: []Code{LeasedKey}, exit: 1,
	},
	{
		name: "an entry of another node's lease",
		do: func(l *ledger) {
			l.release(l.writer(nodeA), att("b", "c3"))
		},
		codes: []Code{WrongNode}, exit: 1,
	},
	{
		name:  "a node acts as an operator",
		do:    func(l *ledger) { l.pool(l.writer(nodeA), "prod", "{}") },
		codes: []Code{WrongNode}, exit: 1,
	},
	{
		name: "a revision that is not before the commit",
		do: func(l *ledger) {
			l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Recover, Epoch: 1, Revision: l.rev + 1})
		},
		codes: []Code{Revision}, exit: 1,
	},
	{
		name: "a revision that goes back",
		do: func(l *ledger) {
			l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Recover, Epoch: 1, Revision: 50})
		},
		codes: []Code{Revision}, exit: 1,
	},
	{
		name:  "a key newer than what was read",
		do:    func(l *ledger) { l.kv[l.keys.Meta()].Mod += 1000 },
		codes: []Code{Revision, StateDiffers}, exit: 1,
	},
	{
		name: "an old epoch goes on after a recovery",
		do: func(l *ledger) {
			l.epoch = 2
			op := l.writer(ann)
			l.meta(op, keyspace.Running) // ends the operator's chain of epoch 1
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
		},
		codes: []Code{StaleEpoch}, exit: 1,
	},
	{
		name: "an epoch goes back",
		do: func(l *ledger) {
			l.epoch = 2
			op := l.writer(ann)
			l.meta(op, keyspace.Frozen)
			l.anew(op, 2)
			l.epoch = 1
			l.meta(op, keyspace.Frozen)
		},
		codes: []Code{Fork, StaleEpoch, StateDiffers}, exit: 1,
	},
	{
		name: "a recover entry of another epoch",
		do: func(l *ledger) {
			l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Recover, Epoch: 3})
		},
		codes: []Code{StaleEpoch}, exit: 1,
	},
	{
		name: "an attachment leases twice",
		do: func(l *ledger) {
			l.acquire(l.writer(nodeB), att("b", "c3"), "10.22.7.70")
		},
		codes: []Code{DoubleLease}, exit: 1,
	},
	{
		name: "an acquire that follows no release, and one that follows another",
		do: func(l *ledger) {
			delete(l.freed, "10.22.7.67")
			l.acquire(l.writer(nodeB), att("b", "c9"), "10.22.7.67")
			l.freed["10.22.7.71"] = l.freed["10.22.7.4"]
			l.acquire(l.writer(nodeB), att("b", "c10"), "10.22.7.71")
		},
		codes: []Code{BrokenHistory}, exit: 1,
	},
	{
		name: "a release of nothing",
		do: func(l *ledger) {
			e := l.releaseEntry(att("b", "c3"))
			e.Container = "c99"
			l.commit(l.writer(nodeB), e)
			l.kv[l.keys.Address("default", netip.MustParseAddr("10.22.7.66"))].Mod = l.rev
		},
		codes: []Code{AllocNoEntry, ReleaseNoHold}, exit: 1,
	},
	{
		name: "a release of other addresses",
		do: func(l *ledger) {
			e := l.releaseEntry(att("b", "c3"))
			e.Addresses = append(e.Addresses, entry.Address{IP: netip.MustParseAddr("10.22.7.200")})
			l.commit(l.writer(nodeB), e)
		},
		codes: []Code{ReleaseNoHold, AllocNoEntry}, exit: 1,
	},
	{
		name: "a block claimed twice, and one given back that is not had",
		do: func(l *ledger) {
			l.block(entry.Claim, l.writer(nodeB), "b", netip.MustParsePrefix("10.22.7.0/26"))
			l.block(entry.Unclaim, l.writer(nodeB), "b", netip.MustParsePrefix("10.22.8.0/26"))
		},
		codes: []Code{DoubleClaim, ReleaseNoHold}, exit: 1,
	},
	{
		name: "a closed chain goes on",
		do: func(l *ledger) {
			l.replace(l.writer(ann), l.writer(nodeA))
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
		},
		codes: []Code{Fork}, exit: 1,
	},
	{
		name: "a chain goes on after another has followed it",
		do: func(l *ledger) {
			old := *l.writer(nodeA)
			l.replace(l.writer(ann), l.writer(nodeA))
			l.anew(l.writer(nodeA), 3)
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
			l.append(&old, &entry.Entry{Op: entry.Recover, Epoch: 1})
		},
		codes: []Code{Fork}, exit: 1,
	},
	{
		name: "a chain closed where it does not end",
		do: func(l *ledger) {
			l.commit(l.writer(ann), &entry.Entry{Op: entry.Close, Writer: l.writer(nodeA).Writer, Closes: l.refOf(l.entryKey(nodeA, 2, 4))})
		},
		codes: []Code{Fork}, exit: 1,
	},
	{
		name: "a chain that is closed and not there",
		do: func(l *ledger) {
			l.commit(l.writer(ann), &entry.Entry{Op: entry.Close, Writer: entry.Writer{Kind: entry.KindNode, Name: "x"}, Closes: l.refOf(l.entryKey(nodeA, 2, 4))})
		},
		codes: []Code{Missing}, exit: 1,
	},
	{
		name: "a new chain that names another end",
		do: func(l *ledger) {
			l.replace(l.writer(ann), l.writer(nodeA))
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Hash[0]++ })
			l.anew(l.writer(nodeA), 3)
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9")
		},
		codes: []Code{Fork}, exit: 1,
	},
	{
		name: "a whole chain is gone",
		do: func(l *ledger) {
			for seq := uint64(1); seq <= 6; seq++ {
				l.del(l.entryKey(nodeA, 1, seq))
			}
		},
		codes: []Code{AllocNoEntry, BrokenHistory, Missing, ReleaseNoHold, StateDiffers}, exit: 1,
	},
	{
		name: "a rotation to another writer's key",
		do: func(l *ledger) {
			l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Rotate, Key: l.writer(nodeB).vkey})
		},
		codes: []Code{StateDiffers, UntrustedKey}, exit: 1,
	},
	{
		name: "signed with a key that is no longer in force",
		do: func(l *ledger) {
			w := l.writer(nodeB)
			w.signer, _ = testKey(l.t, w.Writer, nodeB)
			l.acquire(w, att("b", "c9"), "10.22.7.99")
			w.signer, _ = testKey(l.t, w.Writer, "b's second key")
			l.acquire(w, att("b", "c10"), "10.22.7.98")
		},
		codes: []Code{BadSignature}, exit: 1,
	},
	{
		name: "two addresses of one range for one interface",
		do: func(l *ledger) {
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.9", "10.22.7.10")
		},
		codes: []Code{DoubleLease}, exit: 1, notice: "(I2)",
	},
	{
		name:  "a network's own address",
		do:    func(l *ledger) { l.outside("10.22.9.0", 24) },
		codes: []Code{OutsidePool}, exit: 1, notice: "network's own",
	},
	{
		name:  "a broadcast address",
		do:    func(l *ledger) { l.outside("10.22.9.255", 24) },
		codes: []Code{OutsidePool}, exit: 1, notice: "broadcast",
	},
	{
		name:  "the broadcast address of a subnet of four",
		do:    func(l *ledger) { l.outside("10.22.9.7", 30) },
		codes: []Code{OutsidePool}, exit: 1, notice: "broadcast",
	},
	{
		name:  "an anycast address of routers",
		do:    func(l *ledger) { l.outside("fd00:9::", 126) },
		codes: []Code{OutsidePool}, exit: 1, notice: "anycast",
	},
	{
		name: "what has no such addresses",
		do: func(l *ledger) {
			l.outside("10.22.9.6", 31)
			l.outside("10.22.9.9", 31)
			l.outside("10.22.9.10", 32)
			l.outside("fd00:9::", 127)
			l.outside("fd00:8::ffff:ffff:ffff:ffff", 64)
		},
		codes: nil, exit: 0,
	},
	{
		name: "a gateway, and the gateway of another address of it, imported",
		do: func(l *ledger) {
			l.assert = entry.AssertImport
			own, x, y := addressIn("10.22.7.8"), addressIn("10.22.7.9"), addressIn("10.22.7.10")
			own.Gateway = own.IP
			l.acquireAt(l.writer(nodeA), att("a", "c9"), nil, own)
			y.Gateway, x.Range, y.Range = x.IP, netipx.IPRange{}, netipx.IPRange{}
			l.acquireAt(l.writer(nodeA), att("a", "c10"), nil, x, y)
		},
		codes: []Code{OutsidePool}, exit: 1, notice: "2 OUTSIDE-POOL",
	},
	{
		name: "an address before its cooldown is over",
		do: func(l *ledger) {
			a := l.cooled(60)
			l.now = l.now.Add(59*time.Second + 999*time.Millisecond - time.Nanosecond) // and the entry is a millisecond later
			l.acquire(l.writer(nodeB), a, "10.22.7.9")
		},
		codes: []Code{TooSoon}, exit: 1,
	},
	{
		name: "an address before its cooldown is over, by a clock that is behind",
		do: func(l *ledger) {
			a := l.cooled(24 * 60 * 60)
			l.now = l.now.Add(-23 * time.Hour)
			l.acquire(l.writer(nodeB), a, "10.22.7.9")
			l.now = l.now.Add(23 * time.Hour)
		},
		codes: []Code{TooSoon}, exit: 1,
	},
	{
		name: "an address as soon as its cooldown is over, or by a clock that is far behind, or asserted",
		do: func(l *ledger) {
			a := l.cooled(60)
			l.now = l.now.Add(60*time.Second - time.Millisecond)
			l.acquire(l.writer(nodeB), a, "10.22.7.9")
			l.release(l.writer(nodeB), a)
			a = l.cooled(60)
			l.now = l.now.Add(-time.Hour)
			l.acquire(l.writer(nodeB), a, "10.22.7.9")
			l.now = l.now.Add(time.Hour)
			l.release(l.writer(nodeB), a)
			a = l.cooled(60)
			l.assert = entry.AssertRecover
			l.acquire(l.writer(nodeB), a, "10.22.7.9")
		},
		codes: nil, exit: 0,
	},
	{
		name: "clear who closed a writer's chain",
		do: func(l *ledger) {
			l.replace(l.writer(ann), l.writer(nodeA))
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Closed = entry.Ref{} })
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "got closed nothing",
	},
	{
		name: "set who closed a writer's chain to an older close",
		do: func(l *ledger) {
			old := l.refOf(l.entryKey(ann, 1, 7)) // of node/a's first chain
			if e := l.parsed(l.entryKey(ann, 1, 7)); e.Op != entry.Close {
				l.t.Fatalf("entry 7 is op %s", e.Op)
			}
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Closed = old })
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "want closed nothing",
	},
	{
		name: "undo a whole close, which cannot be seen",
		do: func(l *ledger) {
			before := l.writer(ann).head
			l.replace(l.writer(ann), l.writer(nodeA))
			l.del(l.entryKey(ann, 1, before.Seq+1))
			l.setHead(ann, func(w *keyspace.Writer) { *w = before })
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Closed = entry.Ref{} })
		},
		codes: nil, exit: 0,
	},
	{
		name: "a removed writer that is only replaced",
		do: func(l *ledger) {
			l.closes(l.writer(ann), l.writer(nodeA), true)
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Removed = false })
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "removed",
	},
	{
		name: "name an older recover entry",
		do: func(l *ledger) {
			old := l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Recover, Epoch: 1})[0]
			l.commit(l.writer(nodeA), &entry.Entry{Op: entry.Recover, Epoch: 1})
			l.setHead(nodeA, func(w *keyspace.Writer) { w.Recover = old })
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "recovered",
	},
	{
		name:  "write meta again",
		do:    func(l *ledger) { k := l.keys.Meta(); l.put(k, l.value(k)) },
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "take a recovery to be over",
		do: func(l *ledger) {
			l.recovering = true
			l.meta(l.writer(ann), keyspace.Frozen)
			l.edit(l.keys.Meta(), `"recovering":true,`, ``)
		},
		codes: []Code{StateDiffers}, exit: 1, notice: "recovering",
	},
	{
		name: "put a chain's last entry again",
		do: func(l *ledger) {
			w := l.writer(nodeA)
			l.commit(w, &entry.Entry{Op: entry.Recover, Epoch: 1})
			k := l.keys.Entry(w.Writer, w.head.Chain, w.head.Seq)
			v := l.value(k)
			l.del(k)
			l.put(k, v)
		},
		codes: []Code{StateDiffers}, exit: 1,
	},
	{
		name: "a stop in another node's name",
		do: func(l *ledger) {
			l.put(l.keys.Stop("b"), keyspace.Encode(keyspace.Stop{Node: "a", Found: "revision went back", Time: l.now}))
		},
		codes: []Code{Malformed}, exit: 1,
	},
	{
		name:  "an op of a newer version, in a ledger that is of none",
		do:    func(l *ledger) { l.unknown(nodeB, "op acquire\n", "op transfer\n") },
		codes: []Code{AllocNoEntry, UnknownEntry}, exit: 1,
	},
	{
		name:  "an entry of a newer version, in a ledger that is of none",
		do:    func(l *ledger) { l.unknown(nodeB, "entry/v1\n", "entry/v2\n") },
		codes: []Code{AllocNoEntry, UnknownEntry}, exit: 1,
	},
	{
		name: "an op of a newer version hides nothing",
		do: func(l *ledger) {
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
			l.harmElsewhere()
		},
		codes: []Code{AllocNoEntry, DoubleAlloc, StateDiffers, StateMissing, UnknownEntry}, exit: 1,
	},
	{
		name:  "an op of a newer version, in a ledger of one",
		do:    func(l *ledger) { l.upgrade(); l.unknown(nodeB, "op acquire\n", "op transfer\n") },
		codes: nil, exit: 3, notice: "UNKNOWN-VERSION",
	},
	{
		name:  "an entry of a newer version, in a ledger of one",
		do:    func(l *ledger) { l.upgrade(); l.unknown(nodeB, "entry/v1\n", "entry/v2\n") },
		codes: nil, exit: 3, notice: "not judged, as entries that are not known may explain it: 2 ALLOC-NO-ENTRY",
	},
	{
		name:  "a ledger of a newer version",
		do:    func(l *ledger) { l.upgrade() },
		codes: nil, exit: 3, notice: "meta is of version 3",
	},
	{
		name: "a ledger of a newer version, and harm on other chains",
		do: func(l *ledger) {
			l.upgrade()
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
			l.harmElsewhere()
		},
		codes: []Code{DoubleAlloc, StateDiffers, StateMissing}, exit: 1,
	},
	{
		name: "an op of a newer version, before the ledger is of one",
		do: func(l *ledger) {
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
			l.upgrade()
		},
		codes: []Code{AllocNoEntry, UnknownEntry}, exit: 1,
	},
	{
		name: "a release of a newer version",
		do: func(l *ledger) {
			l.upgrade()
			l.release(l.writer(ann), att("b", "c3"))
			l.unknownLast(ann, "op release\n", "op transfer\n")
		},
		codes: nil, exit: 3, notice: "may explain it: 1 STATE-DIFFERS (",
	},
	{
		name: "a release of a newer version, and an acquire that follows it",
		do: func(l *ledger) {
			l.upgrade()
			l.release(l.writer(ann), att("b", "c3"))
			l.unknownLast(ann, "op release\n", "op transfer\n")
			l.freed["10.22.7.66"] = l.writer(ann).head.Head()
			l.acquire(l.writer(nodeA), att("a", "c9"), "10.22.7.66")
		},
		codes: nil, exit: 3, notice: "may explain it: 1 DOUBLE-ALLOC (chains/",
	},
	{
		name: "releases of a newer version by the node, and an acquire of its own",
		do: func(l *ledger) {
			l.upgrade()
			l.release(l.writer(nodeB), att("b", "c4"))
			l.unknownLast(nodeB, "op release\n", "op transfer\n")
			l.acquire(l.writer(nodeB), att("b", "c4"), "10.22.7.70")
			l.release(l.writer(nodeB), att("b", "c3"))
			l.unknownLast(nodeB, "op release\n", "op transfer\n")
			l.del(l.keys.Address("default", netip.MustParseAddr("10.22.7.66")))
		},
		codes: nil, exit: 3, notice: "may explain it: 1 DOUBLE-LEASE (chains/",
	},
	{
		name: "a key changed by an op of a newer version",
		do: func(l *ledger) {
			l.upgrade()
			w := l.writer(nodeB)
			_, vkey := testKey(l.t, w.Writer, "b's third key")
			l.commit(w, &entry.Entry{Op: entry.Rotate, Key: vkey})
			l.unknownLast(nodeB, "op rotate\n", "op enrol\n")
		},
		codes: nil, exit: 3, notice: "may explain it: 1 STATE-DIFFERS",
	},
	{
		name: "a ledger of a newer version, and a chain that is named as what is named nothing",
		do: func(l *ledger) {
			l.upgrade()
			w := l.writer("node/mallory")
			w.head.Chain = entry.ChainID{}
			l.acquire(w, att("mallory", "c9"), "10.22.7.99")
			l.unknownLast("node/mallory", "op acquire\n", "op transfer\n")
			l.harmElsewhere()
			l.freed["10.22.7.5"] = entry.Ref{}
			l.acquire(l.writer(nodeB), att("b", "c12"), "10.22.7.5")
		},
		codes: []Code{AllocNoEntry, BrokenHistory, DoubleAlloc, StateDiffers, StateMissing}, exit: 1,
	},
	{
		name: "meta alone says a newer version",
		do: func(l *ledger) {
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
			l.edit(l.keys.Meta(), `"version":2`, `"version":3,"more":true`)
		},
		codes: []Code{AllocNoEntry, Malformed, StateDiffers, UnknownEntry}, exit: 1, notice: "version 3",
	},
	{
		name: "a node says a newer version",
		do: func(l *ledger) {
			l.version = 3
			l.meta(l.writer(nodeB), keyspace.Running)
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
		},
		codes: []Code{AllocNoEntry, StateDiffers, UnknownEntry, WrongNode}, exit: 1,
	},
	{
		name: "meta takes a newer version back",
		do: func(l *ledger) {
			l.upgrade()
			l.unknown(nodeB, "op acquire\n", "op transfer\n")
			l.edit(l.keys.Meta(), `"version":3`, `"version":2`)
		},
		codes: []Code{AllocNoEntry, Malformed, StateDiffers, UnknownEntry}, exit: 1,
	},
}

// outside acquires an address of a subnet whose gateway and range are not known.
func (l *ledger) outside(ip string, bits int) {
	l.acquireAt(l.writer(nodeA), att("a", "c"+strings.ReplaceAll(ip, ":", "-")), nil, entry.Address{IP: netip.MustParseAddr(ip), Bits: bits})
}

// cooled has 10.22.7.9 released with a cooldown just now, and returns who held it.
func (l *ledger) cooled(seconds int64) keyspace.AttachmentID {
	a := att("b", "c9")
	l.cooldown = seconds
	l.acquire(l.writer(nodeB), a, "10.22.7.9")
	l.cooldown = 0
	l.release(l.writer(nodeB), a)
	return a
}

// harmElsewhere is a double allocation, an address deleted and a block edited, that
// have nothing to do with node b's chain.
func (l *ledger) harmElsewhere() {
	l.acquire(l.writer(nodeA), att("a", "c11"), "10.22.7.3")
	l.del(l.keys.Address("default", netip.MustParseAddr("10.22.7.4")))
	l.edit(l.keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: netip.MustParsePrefix("10.22.7.0/26")}), `"node":"a"`, `"node":"c"`)
}

// upgrade makes it a ledger of a newer version, whose meta has a field more.
func (l *ledger) upgrade() {
	l.version = keyspace.FormatVersion + 1
	l.meta(l.writer(ann), keyspace.Running)
	l.forge(l.keys.Meta(), func(b []byte) []byte { return append(b[:len(b)-1], `,"more":true}`...) })
}

// rewrite signs a writer's whole chain anew, consistently, its head included.
func (l *ledger) rewrite(name, vkey string, with func(*testWriter)) {
	w := l.writer(name)
	with(w)
	w.head.Seq, w.head.Hash = 0, entry.Hash{}
	var recover entry.Ref
	for seq := uint64(1); l.kv[l.entryKey(name, 1, seq)] != nil; seq++ {
		k := l.entryKey(name, 1, seq)
		r := l.kv[k]
		e := l.parsed(k)
		if e.Op == entry.Rotate {
			e.Op, e.Key, e.Epoch = entry.Recover, "", 1
		}
		if e.Op == entry.Open && vkey == "" {
			e.Key = w.vkey
		}
		e.Prev = w.head.Hash
		e.Seq = seq
		if e.Op == entry.Release { // the leases below were signed anew
			e.Acquire = l.refOf(l.entryKey(name, 1, e.Acquire.Seq))
		}
		stored, hash, err := entry.Sign(e, w.signer)
		if err != nil {
			l.t.Fatal(err)
		}
		old := l.refOf(k)
		r.Value = stored
		w.head.Seq, w.head.Hash = seq, hash
		if e.Op == entry.Recover {
			recover = w.head.Head()
		}
		for _, o := range l.kv { // whoever names the old entry names the new one
			if !strings.HasPrefix(o.Key, l.keys.Chains()) {
				o.Value = bytes.ReplaceAll(o.Value, []byte(old.String()), []byte(w.head.Head().String()))
			}
		}
	}
	k := l.keys.Writer(w.Writer)
	v := get[keyspace.Writer](l, k)
	v.Hash, v.Recover = w.head.Hash, recover
	e := l.parsed(l.entryKey(name, 1, 1))
	v.Key = e.Key
	l.put(k, keyspace.Encode(v))
}

// unknown commits an honest entry of a newer writer, with the state it makes, and
// one that follows it.
func (l *ledger) unknown(name, from, to string) {
	l.acquire(l.writer(name), att("b", "c9"), "10.22.7.99")
	l.unknownLast(name, from, to)
	l.acquire(l.writer(name), att("b", "c10"), "10.22.7.98")
}

// unknownLast makes a writer's last entry one of a newer version.
func (l *ledger) unknownLast(name, from, to string) {
	w := l.writer(name)
	k := l.keys.Entry(w.Writer, w.head.Chain, w.head.Seq)
	old := l.refOf(k)
	text, _, _ := bytes.Cut(l.value(k), []byte("\n\n"))
	text = append(bytes.Replace(text, []byte(from), []byte(to), 1), '\n')
	l.kv[k].Value = noteOf(l.t, w, string(text))
	w.head.Hash = l.refOf(k).Hash
	for _, r := range l.kv {
		if !strings.HasPrefix(r.Key, l.keys.Chains()) {
			r.Value = bytes.ReplaceAll(r.Value, []byte(old.String()), []byte(w.head.Head().String()))
		}
	}
	l.kv[l.keys.Writer(w.Writer)].Value = keyspace.Encode(w.head)
}

func TestAttacks(t *testing.T) {
	honest := story(t)
	seen := map[Code]bool{}
	for _, a := range slices.Concat(attacks, ruleAttacks) {
		t.Run(a.name, func(t *testing.T) {
			for _, all := range []bool{false, true} {
				l := honest.clone(t)
				o := Options{AllSignatures: all}
				if a.ring {
					o.Keys = l.ring()
				}
				a.do(l)
				r := l.verify(o)
				want := slices.Compact(slices.Sorted(slices.Values(a.codes)))
				if got := codesOf(r); !slices.Equal(got, want) || r.ExitCode() != a.exit {
					show(t, r)
					t.Fatalf("all signatures %v: codes %v, exit %d; want %v, exit %d", all, got, r.ExitCode(), want, a.exit)
				}
				for _, f := range r.Findings {
					seen[f.Code] = true
					if f.Where == "" || f.Detail == "" {
						t.Errorf("finding %+v does not say where or what", f)
					}
				}
				for _, f := range r.Warnings {
					seen[f.Code] = true
				}
				if r.Has(UnknownVersion) {
					seen[UnknownVersion] = true
				}
				var b strings.Builder
				r.Summary(&b)
				if a.notice != "" && !strings.Contains(b.String(), a.notice) {
					t.Errorf("summary lacks %q:\n%s", a.notice, b.String())
				}
				sameFromExport(t, l, o, r)
			}
		})
	}
	for _, change := range []func([]byte) []byte{
		func(b []byte) []byte { return append(b, 'x') },
		func(b []byte) []byte { b[bytes.LastIndex(b, []byte(`"crc32c":"`))+10] ^= 1; return b },
	} {
		e := exportOf(t, change(export(t, honest)))
		r, err := Verify(context.Background(), e, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Findings) != 1 || r.ExitCode() != 1 {
			show(t, r)
			t.Fatal("want one finding")
		}
		seen[r.Findings[0].Code] = true
	}
	for _, c := range Codes {
		if !seen[c.Code] {
			t.Errorf("no attack produces %s", c.Code)
		}
	}
	for c := range seen {
		if !strings.Contains(Explain(), "  "+string(c)+" ") {
			t.Errorf("Explain does not explain %s", c)
		}
	}
}

// export writes an export into memory, and exportOf opens one.
func export(t testing.TB, src Source) []byte {
	var buf bytes.Buffer
	if err := WriteExport(context.Background(), &buf, src); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func exportOf(t testing.TB, b []byte) *Export {
	path := filepath.Join(t.TempDir(), "export")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := OpenExport(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

// sameFromExport checks that an export of a ledger, tampered with or not,
// verifies as the ledger does.
func sameFromExport(t *testing.T, l *ledger, o Options, want *Report) {
	t.Helper()
	e := exportOf(t, export(t, l))
	for range 2 { // also when it is read a second time
		got, err := Verify(context.Background(), e, o)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := json.Marshal(want)
		b, _ := json.Marshal(got)
		if !bytes.Equal(a, b) {
			t.Fatalf("verify of the export differs:\n%s\n%s", a, b)
		}
	}
}
