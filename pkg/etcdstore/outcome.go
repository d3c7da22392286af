package etcdstore

import (
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// outcome is what an answer of etcd other than a reply says about a commit.
type outcome int

const (
	unknown outcome = iota
	// notApplied: the commit has not been done and never will be.
	notApplied
	// notHere is notApplied for a reason that another view, perhaps of another
	// member, may be without.
	notHere
	// decided: the commit has been done or never will be. A linearizable read
	// tells which.
	decided
)

// outcomes are the answers that leave a commit's outcome known. Every other is
// unknown: an answer comes in here with the place in etcd's code that shows that
// etcd cannot have done the commit, and cannot do it later. The places are those
// of etcd 3.7.3, below server/; docs/etcd.md has the same table.
var outcomes = []struct {
	answer error
	means  outcome
}{
	// Before anything else is done: etcdserver/api/v3rpc/interceptor.go,
	// newUnaryInterceptor.
	{rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner), notHere},
	{rpctypes.ErrNoLeader, notHere},

	// Before it is proposed: etcdserver/api/v3rpc/key.go, checkTxnRequest and
	// checkIntervals.
	{rpctypes.ErrEmptyKey, notApplied},
	{rpctypes.ErrTooManyOps, notApplied},
	{rpctypes.ErrDuplicateKey, notApplied},

	// Before it is proposed: etcdserver/v3_server.go,
	// processInternalRaftRequestOnce; the token in auth/store.go, AuthInfoFromCtx.
	{rpctypes.ErrTooManyRequests, notApplied},
	{rpctypes.ErrRequestTooLarge, notApplied},
	{rpctypes.ErrInvalidAuthToken, notApplied},

	// When it is its turn, by every member, before the first write:
	// etcdserver/apply/auth.go, authApplierV3.Txn; auth/store.go, isOpPermitted.
	{rpctypes.ErrUserEmpty, notApplied},
	{rpctypes.ErrPermissionDenied, notApplied},
	{rpctypes.ErrAuthOldRevision, notHere}, // roles changed after it was proposed

	// To the client's asking for a new token, which it does once the commit was
	// refused for its old one: client/v3/retry_interceptor.go,
	// unaryClientInterceptor; auth/store.go, CheckPassword.
	{rpctypes.ErrAuthFailed, notApplied},

	// From three places: before it is proposed (etcdserver/api/v3rpc/quota.go,
	// quotaAlarmer.check); when it is its turn and the alarm is raised, not done, by
	// every member (etcdserver/apply/capped.go, applierV3Capped.Txn); when it is its
	// turn and the alarm is not raised yet, AFTER it was done
	// (etcdserver/apply/quota.go, quotaApplierV3.Txn).
	{rpctypes.ErrNoSpace, decided},
}

// outcomeOf is what an error of a transaction with writes says about it. The
// client must have sent it once: see sendOnce.
func outcomeOf(err error) outcome {
	for _, o := range outcomes {
		if errors.Is(err, o.answer) {
			return o.means
		}
	}
	return unknown
}
