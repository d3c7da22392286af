package etcdstore

import (
	"context"
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// sendOnce keeps etcd's client from sending a transaction again of which the
// first sending may have been applied, or may yet be: the second answer would be
// taken for the outcome of both. The client does so when it is the member, and
// not our context, that says that time is up or the request is cancelled. A member
// does when its own timeout (5 s and two elections) ends while it proposes.
//
// The client still sends again what was refused for its token or because roles
// changed, and what was not sent.
func sendOnce(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	if method != pb.KV_Txn_FullMethodName || ctx.Err() != nil {
		return err
	}
	switch status.Code(err) {
	case codes.Canceled:
		return fmt.Errorf("etcd ended the request: %w", context.Canceled)
	case codes.DeadlineExceeded:
		return fmt.Errorf("etcd ended the request: %w", context.DeadlineExceeded)
	}
	return err
}
