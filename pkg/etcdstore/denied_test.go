package etcdstore_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// answers is an etcd that refuses transactions until left is used up, and knows
// one user.
type answers struct {
	pb.UnimplementedKVServer
	pb.UnimplementedAuthServer
	left   atomic.Int64
	refuse error
	asked  atomic.Int64
	roles  []string
	last   atomic.Pointer[pb.TxnRequest]
	silent atomic.Bool
}

func (a *answers) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	a.asked.Add(1)
	a.last.Store(r)
	if a.silent.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if a.left.Add(-1) >= 0 {
		return nil, a.refuse
	}
	return &pb.TxnResponse{Header: &pb.ResponseHeader{ClusterId: 1, Revision: 7}, Succeeded: true}, nil
}

func (a *answers) Authenticate(context.Context, *pb.AuthenticateRequest) (*pb.AuthenticateResponse, error) {
	return &pb.AuthenticateResponse{Token: "t"}, nil
}

func (a *answers) UserGet(_ context.Context, r *pb.AuthUserGetRequest) (*pb.AuthUserGetResponse, error) {
	if r.Name != "node:known" {
		return nil, rpctypes.ErrGRPCUserNotFound
	}
	return &pb.AuthUserGetResponse{Roles: a.roles}, nil
}

func serve(t *testing.T, a *answers) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterKVServer(s, a)
	pb.RegisterAuthServer(s, a)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return "http://" + l.Addr().String()
}

// TestStaleRoles: what etcd refuses because roles changed meanwhile was not done.
// etcd's client sends it again a hundred times; after that, a read goes on over
// another connection, and a commit is to be planned again.
func TestStaleRoles(t *testing.T) {
	t.Parallel()
	a := &answers{refuse: rpctypes.ErrGRPCAuthOldRevision}
	s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}})
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	a.left.Store(101)
	if r, err := s.Read(ctx, false, []allocator.Get{{Key: "k"}}); err != nil || r.Revision != 7 {
		t.Fatalf("read: %v, %v", r, err)
	}
	if n := a.asked.Load(); n != 102 {
		t.Errorf("the read asked %d times, want 102", n)
	}
	a.left.Store(3)
	if _, err := s.Commit(ctx, allocator.Txn{Then: []allocator.Write{{Key: "k"}}}); err != nil {
		t.Errorf("a commit that was refused three times: %v", err)
	}
	a.left.Store(1000)
	_, err := s.Commit(ctx, allocator.Txn{Then: []allocator.Write{{Key: "k"}}})
	if !errors.Is(err, allocator.ErrNotApplied) || !errors.Is(err, allocator.ErrReconnected) {
		t.Errorf("a commit that is always refused: %v; want one that was not applied and may be planned again", err)
	}
	a.left.Store(0)
	if _, err := s.Read(ctx, false, []allocator.Get{{Key: "k"}}); err != nil {
		t.Errorf("read after it: %v", err)
	}
}

// TestDenied: what roles do not allow is not applied, and the error says who was
// denied it and what would help.
func TestDenied(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		user  string
		roles []string
		want  string
	}{
		{"node:new", nil, `there is no user "node:new" (by name and password); if this is the right one, an operator runs 'ledger auth apply --node new'`},
		{"other", nil, `'ledger auth apply --node NODE --cn node/NODE=other'`},
		{"node:known", nil, `user "node:known" (by name and password) has no role; an operator runs 'ledger auth apply --node known'`},
		{"node:known", []string{"x", "y"}, `has x, y, which does not cover it`},
	} {
		a := &answers{refuse: rpctypes.ErrGRPCPermissionDenied, roles: c.roles}
		s := etcdstore.New(etcdstore.Config{Endpoints: []string{serve(t, a)}, Username: c.user, Password: "p"})
		defer s.Close()
		a.left.Store(1)
		_, err := s.Read(t.Context(), false, []allocator.Get{{Key: "k"}})
		if !errors.Is(err, etcdstore.ErrDenied) || !errors.Is(err, allocator.ErrUnavailable) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("read as %s: %v, want %s", c.user, err, c.want)
		}
		if strings.Contains(err.Error(), allocator.ErrUnavailable.Error()) {
			t.Errorf("read as %s: etcd was reached: %v", c.user, err)
		}
		if _, err := s.Read(t.Context(), false, []allocator.Get{{Key: "k"}}); err != nil {
			t.Fatal(err)
		}
		a.left.Store(1)
		_, err = s.Commit(t.Context(), allocator.Txn{Then: []allocator.Write{{Key: "k"}}})
		if !errors.Is(err, etcdstore.ErrDenied) || !errors.Is(err, allocator.ErrNotApplied) || errors.Is(err, allocator.ErrReconnected) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("commit as %s: %v, want %s", c.user, err, c.want)
		}
	}
}
