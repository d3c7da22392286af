package etcdstore_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// TestSourceYieldsEveryKeyOnce: whatever lies below chains/ is read, once, in
// commit order: chains of writers whose names sort otherwise than their ranges,
// gaps in chains, strays, chains without a writer, and neighbours that were written
// again. What comes after the source was opened is not read.
func TestSourceYieldsEveryKeyOnce(t *testing.T) {
	e := etcdtest.Start(t)
	c := e.Client(t)
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	put := func(ops ...string) {
		t.Helper()
		for part := range slices.Chunk(ops, 100) {
			var txn []clientv3.Op
			for _, k := range part {
				txn = append(txn, clientv3.OpPut(k, "v"))
				if strings.HasPrefix(k, keys.Chains()) {
					want = append(want, k)
				}
			}
			if _, err := c.Txn(t.Context()).Then(txn...).Commit(); err != nil {
				t.Fatal(err)
			}
		}
	}
	chain := func(n byte) (id entry.ChainID) { id[0] = n; return id }
	for i, name := range []string{"a", "a-b", "a.b", "b", "zz"} {
		w := entry.Writer{Kind: entry.KindNode, Name: name}
		put(keys.Writer(w))
		for _, id := range []entry.ChainID{chain(byte(i)), chain(byte(100 + i))} {
			var entries []string
			for seq := range uint64(2500) {
				if seq%997 != 5 && (i != 3 || seq < 10 || seq > 2200) { // gaps, one longer than a page
					entries = append(entries, keys.Entry(w, id, seq+1))
				}
			}
			put(entries...)
		}
	}
	orphan := entry.Writer{Kind: entry.KindNode, Name: "m"} // its writer key is gone
	put(keys.Entry(orphan, chain(50), 1), keys.Entry(orphan, chain(50), 2), keys.Entry(orphan, chain(51), 1))
	put(keys.Chains()+"stray", keys.Chains()+"node/a/x", keys.Chains()+"node/a/0/1", keys.Chains()+"zzz/1")
	put(keys.Prefix()+"other", keys.Prefix()+"aaa", keys.Meta())

	expected := want
	a, zz := entry.Writer{Kind: entry.KindNode, Name: "a"}, entry.Writer{Kind: entry.KindNode, Name: "zz"}
	put(keys.Entry(a, chain(0), 10), keys.Entry(a, chain(0), 11))
	src, err := etcdstore.Open(context.Background(), c, keys)
	if err != nil {
		t.Fatal(err)
	}
	put(keys.Entry(zz, chain(4), 2501), keys.Entry(a, chain(60), 1), keys.Entry(a, chain(0), 20), keys.Prefix()+"later")
	want = expected
	var got []string
	mod := int64(0)
	if err := src.Entries(t.Context(), func(r audit.Record) error {
		if r.Mod < mod {
			return fmt.Errorf("%s of revision %d after revision %d", r.Key, r.Mod, mod)
		}
		mod = r.Mod
		got = append(got, strings.Clone(r.Key))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Fatalf("%d keys were read, %d are there", len(got), len(want))
	}
	state := 0
	if err := src.State(t.Context(), func(r audit.Record) error {
		if strings.HasPrefix(r.Key, keys.Chains()) {
			t.Errorf("%s is an entry", r.Key)
		}
		state++
		return nil
	}); err != nil || state != 8 {
		t.Fatalf("%d keys of state: %v", state, err)
	}
}

// TestSourceLargeValues: keys with values as large as etcd takes keep nobody from
// reading the rest: the pages become smaller.
func TestSourceLargeValues(t *testing.T) {
	e := etcdtest.Start(t)
	c := e.Client(t)
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("x", 1<<20)
	for i := range 12 {
		for _, key := range []string{fmt.Sprint(keys.Prefix(), "aaa", i), fmt.Sprint(keys.Chains(), "node/a/", i)} {
			if _, err := c.Put(t.Context(), key, large); err != nil {
				t.Fatal(err)
			}
		}
	}
	small, err := clientv3.New(clientv3.Config{Endpoints: c.Endpoints(), MaxCallRecvMsgSize: 3 << 20, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer small.Close()
	src, err := etcdstore.Open(t.Context(), small, keys)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	count := func(audit.Record) error { n++; return nil }
	if err := errors.Join(src.State(t.Context(), count), src.Entries(t.Context(), count)); err != nil || n != 24 {
		t.Fatalf("%d of 24 keys: %v", n, err)
	}
}
