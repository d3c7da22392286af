package etcdstore_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// TestSentOnce: a commit that etcd may have applied is not sent again by etcd's
// client, which would take the second answer for the outcome of both.
func TestSentOnce(t *testing.T) {
	t.Parallel()
	for _, first := range []error{status.Error(codes.DeadlineExceeded, "context deadline exceeded"), rpctypes.ErrGRPCCanceled} {
		a := &answers{refuse: first}
		s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}})
		defer s.Close()
		if _, err := s.Read(t.Context(), false, []allocator.Get{{Key: "k"}}); err != nil {
			t.Fatal(err)
		}
		a.asked.Store(0)
		a.left.Store(1)
		_, err := s.Commit(t.Context(), allocator.Txn{Then: []allocator.Write{{Key: "k"}}})
		if err == nil || errors.Is(err, allocator.ErrNotApplied) {
			t.Errorf("%v, then a reply: %v, want an open outcome", first, err)
		}
		if n := a.asked.Load(); n != 1 {
			t.Errorf("%v: sent %d times", first, n)
		}
	}
}

// TestSilence: a commit that is not answered leaves half of the time to find out what
// became of it, and nothing more is asked over its connection.
func TestSilence(t *testing.T) {
	t.Parallel()
	a := &answers{}
	s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}})
	defer s.Close()
	if _, err := s.Read(t.Context(), false, []allocator.Get{{Key: "k"}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	a.silent.Store(true)
	txn := allocator.Txn{Then: []allocator.Write{{Key: "k"}}}
	if _, err := s.Commit(ctx, txn); err == nil || errors.Is(err, allocator.ErrNotApplied) {
		t.Errorf("%v, want an open outcome", err)
	}
	if ctx.Err() != nil {
		t.Error("no time is left to find out")
	}
	a.silent.Store(false)
	if _, err := s.Commit(ctx, txn); !errors.Is(err, allocator.ErrReconnected) {
		t.Errorf("a commit over the connection that was silent: %v", err)
	}
}
