package etcdstore

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// ErrCompacted says that etcd compacted the revision that was being read: take
// another snapshot.
var ErrCompacted = errors.New("etcd compacted the revision that was being read")

// Source reads everything below a prefix at one revision. Memory grows with the
// number of chains, each of which is read a page at a time, not with entries.
type Source struct {
	client   *clientv3.Client
	keys     keyspace.Keys
	snapshot audit.Snapshot
	within   [][2]string  // of State; nil: all
	most     atomic.Int64 // keys in a page; 0: as many as are asked for
}

// Within limits State to ranges of keys, each up to but not including its end:
// for a user whose role does not let it read all.
func (s *Source) Within(ranges [][2]string) { s.within = ranges }

// Open fixes the revision, read linearizable.
func Open(ctx context.Context, client *clientv3.Client, keys keyspace.Keys) (*Source, error) {
	r, err := client.Get(ctx, keys.Meta(), clientv3.WithCountOnly())
	if err != nil {
		return nil, explain(err)
	}
	return &Source{client: client, keys: keys, snapshot: audit.Snapshot{
		Prefix: keys.Prefix(), EtcdCluster: keyspace.EtcdClusterID(r.Header.ClusterId), Revision: r.Header.Revision, Taken: time.Now().UTC(),
	}}, nil
}

// Snapshot implements audit.Source.
func (s *Source) Snapshot() audit.Snapshot { return s.snapshot }

// statePage is how many keys outside chains/ are read at a time.
const statePage = 2000

// State implements audit.Source.
func (s *Source) State(ctx context.Context, f func(audit.Record) error) error {
	spans := s.within
	if spans == nil {
		spans = [][2]string{
			{s.keys.Prefix(), s.keys.Chains()},
			{keyspace.After(s.keys.Chains()), keyspace.After(s.keys.Prefix())},
		}
	}
	for _, span := range spans {
		for from := span[0]; ; {
			kvs, more, err := s.page(ctx, from, span[1], statePage)
			if err != nil {
				return err
			}
			for _, kv := range kvs {
				if err := f(record(kv)); err != nil {
					return err
				}
			}
			if !more {
				break
			}
			from = string(kvs[len(kvs)-1].Key) + "\x00"
		}
	}
	return nil
}

// page reads up to limit keys, and fewer where so many do not come in time: whoever
// may write can make each of them a megabyte long.
func (s *Source) page(ctx context.Context, from, end string, limit int64, opts ...clientv3.OpOption) ([]*mvccpb.KeyValue, bool, error) {
	opts = append(opts, clientv3.WithRange(end), clientv3.WithRev(s.snapshot.Revision), clientv3.WithSerializable())
	for {
		if most := s.most.Load(); most > 0 {
			limit = min(limit, most)
		}
		r, err := s.client.Get(ctx, from, append(opts, clientv3.WithLimit(limit))...)
		if errors.Is(err, rpctypes.ErrFutureRev) {
			// A member that lags has not seen the revision yet: ask linearizable.
			r, err = s.client.Get(ctx, from, append(opts[:len(opts)-1:len(opts)-1], clientv3.WithLimit(limit))...)
		}
		if err == nil {
			return r.Kvs, r.More, nil
		}
		late := errors.Is(err, context.DeadlineExceeded) || code(err) == codes.DeadlineExceeded || code(err) == codes.ResourceExhausted
		if limit == 1 || !late || ctx.Err() != nil {
			return nil, false, s.failed(err)
		}
		s.most.Store(max(1, limit/8))
	}
}

func (s *Source) failed(err error) error {
	if errors.Is(err, rpctypes.ErrCompacted) {
		return fmt.Errorf("%w (%d)", ErrCompacted, s.snapshot.Revision)
	}
	return explain(err)
}

func record(kv *mvccpb.KeyValue) audit.Record {
	return audit.Record{
		Key: string(kv.Key), Value: kv.Value,
		Create: kv.CreateRevision, Mod: kv.ModRevision, Version: kv.Version, Lease: kv.Lease,
	}
}

// Entries implements audit.Source. Within a chain, key order is commit order, so
// chains are merged; etcd itself would sort the whole range for each page. An
// entry that was written again, or deleted and put back, has a later revision
// than those after it: it is taken out of its chain and merged by itself, so that
// it does not hold up the others.
func (s *Source) Entries(ctx context.Context, f func(audit.Record) error) error {
	chains, err := s.chains(ctx)
	if err != nil {
		return err
	}
	page := uint64(min(1000, max(16, 30_000/max(1, len(chains)))))
	var h cursors
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// enter puts a chain into the merge at its next key, if it has one.
	enter := func(c *cursor) error {
		for {
			ok, err := c.advance(ctx)
			if err != nil || !ok {
				return err
			}
			displaced, err := c.displaced(ctx)
			if err != nil {
				return err
			}
			if !displaced {
				heap.Push(&h, c)
				return nil
			}
			heap.Push(&h, &cursor{kvs: c.kvs[:1:1]})
			c.kvs = c.kvs[1:]
		}
	}
	for _, span := range chains {
		c := &cursor{source: s, end: span[1], limit: page, next: make(chan fetched, 1)}
		c.fetch(ctx, span[0])
		if err := enter(c); err != nil {
			return err
		}
	}
	for len(h) > 0 {
		c := heap.Pop(&h).(*cursor)
		if err := f(record(c.kvs[0])); err != nil {
			return err
		}
		c.kvs = c.kvs[1:]
		if err := enter(c); err != nil {
			return err
		}
	}
	return nil
}

// chains finds the key ranges of all chains; a key that belongs to none is a range
// of its own. It looks at the first key of each writer's range and of the gaps
// between them, which are empty in a sound ledger, and behind each chain found:
// etcd counts a range to its end, however few of its keys are asked for, so that
// leaping through all of chains/ would cost its size at each leap.
func (s *Source) chains(ctx context.Context) ([][2]string, error) {
	var writers []string
	for from := s.keys.Writers(); ; {
		kvs, more, err := s.page(ctx, from, keyspace.After(s.keys.Writers()), statePage, clientv3.WithKeysOnly())
		if err != nil {
			return nil, err
		}
		for _, kv := range kvs {
			k, err := s.keys.Parse(string(kv.Key))
			if err != nil {
				continue // a finding, and not the name of a writer
			}
			writers = append(writers, s.keys.Chains()+k.Writer.String()+"/")
		}
		if !more {
			break
		}
		from = string(kvs[len(kvs)-1].Key) + "\x00"
	}
	slices.Sort(writers) // with the slash, "a-b/" comes before "a/"
	var spans [][2]string
	at := s.keys.Chains()
	for _, own := range writers {
		spans = append(spans, [2]string{at, own}, [2]string{own, keyspace.After(own)})
		at = keyspace.After(own)
	}
	spans = append(spans, [2]string{at, keyspace.After(s.keys.Chains())})

	var out [][2]string
	for len(spans) > 0 {
		var behind [][2]string
		for part := range slices.Chunk(spans, maxOps) {
			firsts, err := s.firsts(ctx, part)
			if err != nil {
				return nil, err
			}
			for i, first := range firsts {
				if first == "" {
					continue
				}
				next := first + "\x00"
				if k, err := s.keys.Parse(first); err == nil {
					next = min(keyspace.After(s.keys.Chain(k.Writer, k.Chain)), part[i][1])
				}
				out = append(out, [2]string{first, next})
				behind = append(behind, [2]string{next, part[i][1]})
			}
		}
		spans = behind
	}
	return out, nil
}

// maxOps is below etcd's --max-txn-ops of 128.
const maxOps = 100

// firsts reads the first key of each span, "" where there is none.
func (s *Source) firsts(ctx context.Context, spans [][2]string) ([]string, error) {
	ops := make([]clientv3.Op, len(spans))
	for i, span := range spans {
		ops[i] = clientv3.OpGet(span[0], clientv3.WithRange(span[1]), clientv3.WithRev(s.snapshot.Revision), clientv3.WithLimit(1), clientv3.WithKeysOnly())
	}
	r, err := s.client.Txn(ctx).Then(ops...).Commit()
	if err != nil {
		return nil, s.failed(err)
	}
	out := make([]string, len(spans))
	for i, x := range r.Responses {
		if kvs := x.GetResponseRange().Kvs; len(kvs) > 0 {
			out[i] = string(kvs[0].Key)
		}
	}
	return out, nil
}

// cursor walks one chain, a page ahead of its reader.
type cursor struct {
	source *Source
	end    string
	limit  uint64
	kvs    []*mvccpb.KeyValue
	next   chan fetched // nil: no more
}

type fetched struct {
	kvs  []*mvccpb.KeyValue
	more bool
	err  error
}

// fetch reads the next page. A chain's keys are consecutive, so the page has an
// end that etcd need not count beyond; where that leaves it short, the rest of
// the range is looked at.
func (c *cursor) fetch(ctx context.Context, from string) {
	go func() {
		var p fetched
		end := c.end
		if i := strings.LastIndexByte(from, '/') + 1; len(from) >= i+16 {
			if seq, err := strconv.ParseUint(from[i:i+16], 16, 64); err == nil && seq < 1<<63 {
				end = min(c.end, from[:i]+fmt.Sprintf("%016x", seq+c.limit+1))
			}
		}
		p.kvs, p.more, p.err = c.source.page(ctx, from, end, int64(c.limit))
		if p.err == nil && !p.more && end < c.end {
			if uint64(len(p.kvs)) >= c.limit-1 {
				p.more = true
			} else {
				rest := end
				var more []*mvccpb.KeyValue
				more, p.more, p.err = c.source.page(ctx, rest, c.end, int64(c.limit))
				p.kvs = append(p.kvs, more...)
			}
		}
		c.next <- p
	}()
}

// advance makes sure that there is a key to read; false at the end.
func (c *cursor) advance(ctx context.Context) (bool, error) {
	if len(c.kvs) > 0 {
		return true, nil
	}
	if c.next == nil {
		return false, nil
	}
	p := <-c.next
	if p.err != nil {
		return false, p.err
	}
	c.kvs = p.kvs
	if p.more {
		c.fetch(ctx, string(p.kvs[len(p.kvs)-1].Key)+"\x00")
	} else {
		c.next = nil
	}
	return len(c.kvs) > 0, nil
}

// displaced reports whether the key to read is later than one after it. Its
// place in the merge is then its own.
func (c *cursor) displaced(ctx context.Context) (bool, error) {
	if c.kvs[0].Version != 1 {
		return true, nil
	}
	if len(c.kvs) == 1 {
		last := c.kvs[0]
		c.kvs = nil
		more, err := c.advance(ctx)
		c.kvs = append([]*mvccpb.KeyValue{last}, c.kvs...)
		if err != nil || !more {
			return false, err
		}
	}
	return c.kvs[1].ModRevision < c.kvs[0].ModRevision, nil
}

type cursors []*cursor

func (h cursors) Len() int { return len(h) }
func (h cursors) Less(i, j int) bool {
	a, b := h[i].kvs[0], h[j].kvs[0]
	return cmp.Or(cmp.Compare(a.ModRevision, b.ModRevision), cmp.Compare(string(a.Key), string(b.Key))) < 0
}
func (h cursors) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *cursors) Push(x any)   { *h = append(*h, x.(*cursor)) }
func (h *cursors) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
