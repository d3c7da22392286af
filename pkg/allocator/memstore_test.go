package allocator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// memStore is etcd in memory: revisions, transactions, old revisions to read
// from, and transactions that are under way and land later or never. It
// polices the contract: a transaction may not write a key twice, nor send one
// after its connection was replaced.
type memStore struct {
	mu       sync.Mutex
	cluster  uint64
	history  []memState // one for each revision that was ever current, oldest first
	inFlight []Txn      // sent, reply lost, not landed yet
}

type memState struct {
	revision int64
	keys     map[string]memKV
}

type memKV struct {
	value                []byte
	create, mod, version int64
}

func newMemStore() *memStore {
	return &memStore{cluster: 0xc1, history: []memState{{revision: 1, keys: map[string]memKV{}}}}
}

func (m *memStore) now() memState { return m.history[len(m.history)-1] }

func (s memState) get(g Get) Range {
	var r Range
	var names []string
	if g.End == "" {
		if _, ok := s.keys[g.Key]; ok {
			names = []string{g.Key}
		}
	} else {
		for k := range s.keys {
			if k >= g.Key && k < g.End {
				names = append(names, k)
			}
		}
		sort.Strings(names)
	}
	r.Count = int64(len(names))
	names = slices.DeleteFunc(names, func(k string) bool { return s.keys[k].mod < g.Since })
	for i, k := range names {
		if g.Limit > 0 && int64(i) == g.Limit {
			r.More = true
			break
		}
		r.KVs = append(r.KVs, KV{Key: k, Value: s.keys[k].value, Mod: s.keys[k].mod})
	}
	return r
}

func (s memState) holds(c Compare) bool {
	if c.End == "" {
		return s.keys[c.Key].mod == c.Mod
	}
	for k, kv := range s.keys {
		if k >= c.Key && k < c.End && kv.mod > c.Mod {
			return false
		}
	}
	return true
}

// apply does a transaction; the lock is held.
func (m *memStore) apply(txn Txn) bool {
	s := m.now()
	for _, c := range txn.If {
		if !s.holds(c) {
			return false
		}
	}
	next := memState{s.revision + 1, maps.Clone(s.keys)}
	written := map[string]bool{}
	for _, w := range txn.Then {
		if written[w.Key] {
			panic("a transaction writes " + w.Key + " twice")
		}
		written[w.Key] = true
		switch {
		case !w.Delete:
			old, ok := next.keys[w.Key]
			kv := memKV{w.Value, next.revision, next.revision, 1}
			if ok {
				kv.create, kv.version = old.create, old.version+1
			}
			next.keys[w.Key] = kv
		case w.End == "":
			delete(next.keys, w.Key)
		default:
			for k := range next.keys {
				if k >= w.Key && k < w.End {
					delete(next.keys, k)
				}
			}
		}
	}
	m.history = append(m.history, next)
	return true
}

// land lets what is under way arrive, one at a time.
func (m *memStore) land() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, txn := range m.inFlight {
		m.apply(txn)
	}
	m.inFlight = nil
}

// restore goes back to the state of n revisions ago. What was under way was
// under way to the old etcd and is gone.
func (m *memStore) restore(n int, newCluster bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.history = m.history[:max(1, len(m.history)-n)]
	m.inFlight = nil
	if newCluster {
		m.cluster++
	}
}

// fault is what happens to a connection's next commit.
type fault int

const (
	noFault     fault = iota
	refuse            // not applied, and says so
	loseApplied       // applied, reply lost
	loseLate          // not applied yet, reply lost
	loseNever         // never applied, reply lost
	killUnsent        // the process dies before sending
	killSent          // the process dies after sending, before it lands
	killApplied       // the process dies after it landed
	deafReads         // every read from here on fails, as do commits
	fullApplied       // applied, and the answer is that there is no space
	fullRefused       // not applied, with the same answer
	faultCount        //
)

var faultNames = [...]string{"none", "refuse", "lose-applied", "lose-late", "lose-never", "kill-unsent", "kill-sent", "kill-applied", "deaf", "full-applied", "full-refused"}

func (f fault) String() string { return faultNames[f] }

// killed is the panic that stands for SIGKILL.
type killed struct{}

// memConn is one process's connection to a memStore.
type memConn struct {
	m         *memStore
	lag       int                // serializable reads see the state so many revisions ago
	next      fault              // of the next commit
	between   func()             // runs once before the next commit arrives
	full      bool               // etcd has no space: no commit is done
	replied   func(*Reply)       // changes the reply of the next commit
	reads     int                // counted
	bytes     int                // of keys and values that were read
	deafAfter int                // reads that are answered; 0: all
	commits   int                // counted
	drop      func(Compare) bool // comparisons to leave out, to see that a test notices
}

var errFull = fmt.Errorf("%w: %w", ErrDecided, ErrNoSpace)

var errDeaf = fmt.Errorf("%w: deaf", ErrUnavailable)

func (c *memConn) Connect(context.Context) error { return nil }

func (c *memConn) Read(ctx context.Context, serializable bool, gets []Get) (*Reply, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if c.next == deafReads || c.deafAfter > 0 && c.reads >= c.deafAfter {
		return nil, errDeaf
	}
	if len(gets) > 128 {
		panic(fmt.Sprintf("etcd takes 128 operations, and these are %d", len(gets)))
	}
	c.reads++
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	at := len(c.m.history) - 1
	if serializable {
		at = max(0, at-c.lag)
	}
	s := c.m.history[at]
	r := &Reply{Cluster: c.m.cluster, Revision: s.revision}
	for _, g := range gets {
		a := s.get(g)
		for _, kv := range a.KVs {
			c.bytes += len(kv.Key) + len(kv.Value)
		}
		r.Ranges = append(r.Ranges, a)
	}
	return r, nil
}

func (c *memConn) Commit(ctx context.Context, txn Txn) (*Reply, error) {
	if f := c.between; f != nil {
		c.between = nil
		f()
	}
	if len(txn.If) > 128 || len(txn.Then) > 128 {
		panic(fmt.Sprintf("etcd takes 128 operations, and these are %d and %d", len(txn.If), len(txn.Then)))
	}
	if c.drop != nil {
		txn.If = slices.DeleteFunc(slices.Clone(txn.If), c.drop)
	}
	c.commits++
	f := c.next
	if f != deafReads {
		c.next = noFault
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.full {
		return nil, errFull
	}
	lost := errors.New("reply lost")
	switch f {
	case refuse:
		return nil, fmt.Errorf("%w: %w", ErrNotApplied, ErrReconnected)
	case loseApplied:
		c.m.apply(txn)
		return nil, lost
	case loseLate:
		c.m.inFlight = append(c.m.inFlight, txn)
		return nil, lost
	case loseNever:
		return nil, lost
	case deafReads:
		return nil, errors.New("deaf: outcome unknown")
	case fullApplied:
		c.m.apply(txn)
		return nil, errFull
	case fullRefused:
		return nil, errFull
	case killUnsent:
		panic(killed{})
	case killSent:
		c.m.inFlight = append(c.m.inFlight, txn)
		panic(killed{})
	case killApplied:
		c.m.apply(txn)
		panic(killed{})
	}
	ok := c.m.apply(txn)
	r := &Reply{Cluster: c.m.cluster, Revision: c.m.now().revision, Succeeded: ok}
	if f := c.replied; f != nil {
		c.replied = nil
		f(r)
	}
	return r, nil
}

// Source makes the store readable for the audit.

func (m *memStore) Snapshot() audit.Snapshot {
	return audit.Snapshot{Prefix: keyspace.DefaultPrefix, EtcdCluster: keyspace.EtcdClusterID(m.cluster), Revision: m.now().revision, Taken: time.Now()}
}

func (m *memStore) records(entries bool) []audit.Record {
	var out []audit.Record
	for k, kv := range m.now().keys {
		if strings.HasPrefix(k, testKeys.Chains()) == entries {
			out = append(out, audit.Record{Key: k, Value: kv.value, Create: kv.create, Mod: kv.mod, Version: kv.version})
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if entries && out[i].Mod != out[j].Mod {
			return out[i].Mod < out[j].Mod
		}
		return out[i].Key < out[j].Key
	})
	return out
}

func (m *memStore) State(_ context.Context, f func(audit.Record) error) error {
	for _, r := range m.records(false) {
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

func (m *memStore) Entries(_ context.Context, f func(audit.Record) error) error {
	for _, r := range m.records(true) {
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

var testKeys, _ = keyspace.New(keyspace.DefaultPrefix)

// finds wants verify to find one thing of a kind, and nothing else.
func (m *memStore) finds(t testing.TB, code audit.Code) {
	t.Helper()
	r, err := audit.Verify(context.Background(), m, audit.Options{AllSignatures: true, Workers: 1})
	if err != nil || r.FindingCount != 1 || r.ByCode[code] != 1 {
		t.Fatalf("verify: %+v, %v; want one %s", r.Findings, err, code)
	}
}

// check ends every test: I1 to I4 by replay.
func (m *memStore) check(t interface {
	Fatalf(string, ...any)
	Helper()
},
) {
	t.Helper()
	if len(m.now().keys) == 0 {
		return
	}
	r, err := audit.Verify(context.Background(), m, audit.Options{AllSignatures: true, Workers: 1})
	if err != nil {
		t.Fatalf("verify: %v", err)
	}
	if r.ExitCode() != 0 {
		t.Fatalf("verify found: %+v", r.Findings)
	}
}
