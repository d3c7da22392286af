package etcdstore_test

import (
	"reflect"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// commit commits and returns the revision.
func commit(t *testing.T, s *etcdstore.Store, txn allocator.Txn) int64 {
	t.Helper()
	r, err := s.Commit(t.Context(), txn)
	if err != nil || !r.Succeeded {
		t.Fatalf("%+v, %v", r, err)
	}
	return r.Revision
}

func put(key string) allocator.Txn {
	return allocator.Txn{Then: []allocator.Write{{Key: key, Value: []byte("v")}}}
}

// TestRead: keys have the revision they were written at last. Limit and Since leave
// keys out, and the count has them; it shows a key that was deleted, as Since does
// not.
func TestRead(t *testing.T) {
	s := connect(t, etcdtest.Start(t))
	rev := map[string]int64{}
	for _, k := range []string{"p/1", "p/2", "p/3", "p/4", "q", "p/1"} {
		rev[k] = commit(t, s, put(k))
	}
	commit(t, s, allocator.Txn{Then: []allocator.Write{{Key: "p/2", Delete: true}}})

	get := func(limit, since int64) allocator.Get {
		return allocator.Get{Key: "p/", End: "p0", Limit: limit, Since: since}
	}
	for _, c := range []struct {
		get   allocator.Get
		keys  []string
		more  bool
		count int64
	}{
		{get(0, 0), []string{"p/1", "p/3", "p/4"}, false, 3},
		{get(2, 0), []string{"p/1", "p/3"}, true, 3},
		{get(0, rev["p/4"]), []string{"p/1", "p/4"}, false, 3},
		{get(0, rev["p/4"]+1), []string{"p/1"}, false, 3},
		{get(1, rev["p/4"]), []string{"p/1"}, true, 3},
		{get(0, rev["p/1"]+1), nil, false, 3}, // p/2 was deleted
		{allocator.Get{Key: "p/1"}, []string{"p/1"}, false, 1},
		{allocator.Get{Key: "p/2"}, nil, false, 0},
	} {
		for _, serializable := range []bool{false, true} {
			r, err := s.Read(t.Context(), serializable, []allocator.Get{{Key: "q"}, c.get})
			if err != nil {
				t.Fatal(err)
			}
			want := allocator.Range{More: c.more, Count: c.count}
			for _, k := range c.keys {
				want.KVs = append(want.KVs, allocator.KV{Key: k, Value: []byte("v"), Mod: rev[k]})
			}
			if !reflect.DeepEqual(r.Ranges[1], want) {
				t.Errorf("%+v: %+v, want %+v", c.get, r.Ranges[1], want)
			}
		}
	}
}

// TestCompareRange: a range may have the revision that was read, and no later one;
// with 0 it has no keys.
func TestCompareRange(t *testing.T) {
	s := connect(t, etcdtest.Start(t))
	commit(t, s, put("p/1"))
	rev := commit(t, s, put("p/2"))
	for _, c := range []struct {
		key, end string
		mod      int64
		want     bool
	}{
		{"p/", "p0", rev, true},
		{"p/", "p0", rev + 1, true},
		{"p/", "p0", rev - 1, false},
		{"p/", "p0", 0, false},
		{"o/", "o0", 0, true},
		{"p/2", "", rev, true},
		{"p/2", "", rev + 1, false},
		{"p/2", "", 0, false},
		{"p/3", "", 0, true},
	} {
		txn := put("other")
		txn.If = []allocator.Compare{{Key: c.key, End: c.end, Mod: c.mod}}
		if r, err := s.Commit(t.Context(), txn); err != nil || r.Succeeded != c.want {
			t.Errorf("%+v: %+v, %v", c, r, err)
		}
	}
}

// TestSerializable: only a read that may be answered from what the member has is
// asked for so.
func TestSerializable(t *testing.T) {
	t.Parallel()
	a := new(answers)
	s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}})
	defer s.Close()
	for _, want := range []bool{false, true, false} {
		if _, err := s.Read(t.Context(), want, []allocator.Get{{Key: "k"}, {Key: "p/", End: "p0"}}); err != nil {
			t.Fatal(err)
		}
		for i, op := range a.last.Load().Success {
			if got := op.GetRequestRange().Serializable; got != want {
				t.Errorf("range %d: serializable %v, want %v", i, got, want)
			}
		}
	}
}
