package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A commit is lost without a word when the leader that it was passed on to is
// gone, and etcd's client would wait for it until the deadline. So after a while
// the member is asked, now and again, whether it has the leader it had.
const (
	glance = 250 * time.Millisecond
	// answers is how long the member may take for a read of what it has in memory.
	answers = 2 * time.Second
	// grace is for a commit that a new leader has inherited, and completes.
	grace = 500 * time.Millisecond
)

// errLeaderLost says why a commit was not waited for any longer.
var errLeaderLost = errors.New("etcd's leader was lost while the commit was under way")

// leaderPause is between two rounds of all endpoints while there is no leader.
const leaderPause = 50 * time.Millisecond

// leading is ctx, ended soon after the member on this connection has lost the
// leader that it had when it was last read from. key is one that the caller may
// read.
func (s *session) leading(ctx context.Context, key string) (context.Context, context.CancelFunc) {
	ctx, lose := context.WithCancelCause(ctx)
	term := s.term
	go func() {
		for {
			if !sleep(ctx, glance) {
				return
			}
			actx, cancel := context.WithTimeout(ctx, answers)
			// As a transaction: a read by itself would be repeated by the client.
			r, err := s.client.Txn(clientv3.WithRequireLeader(actx)).Then(clientv3.OpGet(key, clientv3.WithSerializable(), clientv3.WithCountOnly())).Commit()
			cancel()
			var cause error
			switch {
			case ctx.Err() != nil:
				return
			case err == nil && r.Header.RaftTerm == term:
				continue
			case err == nil:
				cause = fmt.Errorf("%w: its term went from %d to %d", errLeaderLost, term, r.Header.RaftTerm)
			case transient(err):
				cause = fmt.Errorf("%w: %w", errLeaderLost, err)
			default:
				return // it is not for us to know
			}
			if sleep(ctx, grace) {
				lose(cause)
			}
			return
		}
	}()
	return ctx, func() { lose(nil) }
}

// sleep reports whether the time has passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// over reports whether no time is left. Dialing fails at the deadline, and ctx
// ends a moment after it.
func over(ctx context.Context) bool {
	end, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && !time.Now().Before(end)
}

// leaderless reports whether the member answered that it has no leader. It says
// so before it does anything.
func leaderless(err error) bool { return errors.Is(err, rpctypes.ErrNoLeader) }
