package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

const patience = 30 * time.Second

// cluster is an etcd with a ledger in it, and its writers.
type cluster struct {
	t      *testing.T
	etcd   *etcdtest.Etcd
	client *clientv3.Client
	dir    string
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, etcd: etcdtest.Start(t), dir: t.TempDir()}
	c.client = c.etcd.Client(t)
	c.admin(func(w *allocator.Writer) error { _, _, err := w.Init(t.Context(), "test"); return err })
	return c
}

func (c *cluster) config() etcdstore.Config {
	return etcdstore.Config{Endpoints: []string{c.etcd.Endpoint()}}
}

func (c *cluster) as(who entry.Writer, f func(w *allocator.Writer) error) {
	c.t.Helper()
	dir, err := statedir.Open(filepath.Join(c.dir, string(who.Kind), who.Name))
	if err != nil {
		c.t.Fatal(err)
	}
	store := etcdstore.New(c.config())
	defer store.Close()
	w, err := allocator.NewWriter(allocator.Config{Writer: who, Store: store, Dir: dir, Keys: keys})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := f(w); err != nil {
		c.t.Fatalf("%s: %v", who, err)
	}
}

func (c *cluster) admin(f func(w *allocator.Writer) error) {
	c.t.Helper()
	c.as(entry.Writer{Kind: entry.KindOperator, Name: "alice"}, f)
}

func node(name string) entry.Writer { return entry.Writer{Kind: entry.KindNode, Name: name} }

func (c *cluster) id(name, pod string) keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: name, Network: "prod", Container: pod, Interface: "eth0"}
}

// add gives a pod an address of 10.22.0.0/22, or of the prefix.
func (c *cluster) add(name string, pods ...string) {
	c.t.Helper()
	c.as(node(name), func(w *allocator.Writer) error {
		for _, pod := range pods {
			if _, err := w.Acquire(c.t.Context(), allocator.Request{ID: c.id(name, pod), Pool: inline(c.t, "prod", "10.22.0.0/22"), Pod: "shop/" + pod}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c *cluster) del(name string, pods ...string) {
	c.t.Helper()
	c.as(node(name), func(w *allocator.Writer) error {
		for _, pod := range pods {
			if err := w.Release(c.t.Context(), c.id(name, pod), ""); err != nil {
				return err
			}
		}
		return nil
	})
}

func inline(t testing.TB, name string, cidrs ...string) *allocator.Pool {
	t.Helper()
	var sets [][]keyspace.Range
	for _, s := range cidrs {
		p := netip.MustParsePrefix(s)
		r := keyspace.Range{Subnet: p, Start: p.Addr().Next(), End: netipx.PrefixLastIP(p), Gateway: p.Addr().Next()}
		if p.Addr().Is4() {
			r.End = r.End.Prev()
		}
		sets = append(sets, []keyspace.Range{r})
	}
	p, err := allocator.NewPool("default", name, sets, nil, false, 16, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// find returns the keys that start with a prefix.
func (c *cluster) find(prefix string) []string {
	c.t.Helper()
	r, err := c.client.Get(c.t.Context(), keys.Prefix()+prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		c.t.Fatal(err)
	}
	var out []string
	for _, kv := range r.Kvs {
		out = append(out, string(kv.Key))
	}
	return out
}

func (c *cluster) revision() int64 {
	c.t.Helper()
	r, err := c.client.Get(c.t.Context(), "x")
	if err != nil {
		c.t.Fatal(err)
	}
	return r.Header.Revision
}

func (c *cluster) put(key, value string) {
	c.t.Helper()
	if _, err := c.client.Put(c.t.Context(), key, value); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) get(key string) string {
	c.t.Helper()
	r, err := c.client.Get(c.t.Context(), key)
	if err != nil || len(r.Kvs) != 1 {
		c.t.Fatalf("%s: %v, %v", key, r, err)
	}
	return string(r.Kvs[0].Value)
}

func (c *cluster) compact() {
	c.t.Helper()
	if _, err := c.client.Compact(c.t.Context(), c.revision()); err != nil {
		c.t.Fatal(err)
	}
}

// watching is a publisher that runs, and what it printed.
type watching struct {
	t    *testing.T
	out  chan *state.State
	last *state.State
	log  *logged
	stop func() error
}

// logged collects what a publisher says.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// lines hands over what is printed, a document at a time.
type lines struct {
	t   *testing.T
	ctx context.Context
	out chan *state.State
}

func (l *lines) Write(b []byte) (int, error) {
	kind, s, err := state.Decode(bytes.TrimRight(b, "\n"))
	if err != nil || kind != state.TypeState || !bytes.HasSuffix(b, []byte("\n")) {
		l.t.Errorf("printed %q: %v", b, err)
		return len(b), nil
	}
	select {
	case l.out <- s:
	case <-l.ctx.Done():
	}
	return len(b), nil
}

func watch(t *testing.T, c Config) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	w := &watching{t: t, out: make(chan *state.State), log: new(logged)}
	c.Print = &lines{t, ctx, w.out}
	c.Log = slog.New(slog.NewTextHandler(w.log, nil))
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	w.stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() {
		if err := w.stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the publisher said:\n%s", w.log)
		}
	})
	return w
}

func (c *cluster) watch() *watching {
	return watch(c.t, Config{Source: "test", Heartbeat: time.Second, Feed: &Etcd{Store: c.config(), Keys: keys, again: time.Millisecond}})
}

// until waits for a state of which something is true.
func (w *watching) until(what string, ok func(s *state.State) bool) *state.State {
	w.t.Helper()
	if w.last != nil && ok(w.last) {
		return w.last
	}
	end := time.After(patience)
	for {
		select {
		case s := <-w.out:
			if w.last != nil && !s.Newer(w.last) {
				w.t.Fatalf("a state that bars would not take:\n%+v\nafter\n%+v", s, w.last)
			}
			if w.last = s; ok(s) {
				return s
			}
		case <-end:
			w.t.Fatalf("waited for: %s; the last state is %+v\n%s", what, w.last, w.log)
		}
	}
}

func verified1(s *state.State) bool {
	return s.Verify.Result == state.VerifyOK && !s.Verify.Running
}

// at waits for the state of etcd's present revision.
func (w *watching) at(c *cluster) *state.State {
	w.t.Helper()
	rev := c.revision()
	return w.until(fmt.Sprintf("revision %d", rev), func(s *state.State) bool { return s.Etcd.OK && s.Revision >= rev })
}

// recount counts what is in etcd, in another way than Model.
func (c *cluster) recount(now time.Time) map[string][3]uint64 {
	c.t.Helper()
	out := map[string][3]uint64{}
	r, err := c.client.Get(c.t.Context(), keys.Prefix(), clientv3.WithPrefix())
	if err != nil {
		c.t.Fatal(err)
	}
	for _, kv := range r.Kvs {
		k, err := keys.Parse(string(kv.Key))
		if err != nil {
			c.t.Fatal(err)
		}
		if k.Kind != "addresses" {
			continue
		}
		var a keyspace.Address
		if err := keyspace.Decode(kv.Value, &a); err != nil {
			c.t.Fatal(err)
		}
		n := out[a.Pool]
		switch {
		case a.State == keyspace.Leased:
			n[0]++
		case a.Cooling(now):
			n[1]++
		}
		out[a.Pool] = n
	}
	return out
}

// TestCounts: after random allocations and releases by several nodes, with etcd
// stopped, compacted and started in between, the counts are etcd's, and nothing
// that honest writers do is a finding.
func TestCounts(t *testing.T) {
	c := newCluster(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	c.put(keys.Pool("named"), string(keyspace.Encode(keyspace.Pool{Ranges: [][]keyspace.Range{{{
		Subnet: netip.MustParsePrefix("10.30.0.0/24"), Start: ip("10.30.0.1"), End: ip("10.30.0.254"), Gateway: ip("10.30.0.1"),
	}}}})))
	c.add("n0", "early-1", "early-2")
	w := c.watch()
	w.until("a verification", func(s *state.State) bool { return s.Verify.Result != state.VerifyUnknown })

	pods := map[keyspace.AttachmentID]bool{}
	for round := range 8 {
		for n := range 3 {
			name := fmt.Sprint("n", n)
			c.as(node(name), func(w *allocator.Writer) error {
				for range 12 {
					id := c.id(name, fmt.Sprint("p", random.IntN(30)))
					req := allocator.Request{ID: id, Pool: inline(t, "prod", "10.22.0.0/22", "fd00::/64")}
					switch random.IntN(4) {
					case 0:
						id.Network = "named"
						req = allocator.Request{ID: id, PoolName: "named"}
					case 1:
						if err := w.Release(t.Context(), id, "test"); err != nil {
							return err
						}
						delete(pods, id)
						continue
					}
					if _, err := w.Acquire(t.Context(), req); err != nil {
						return err
					}
					pods[id] = true
				}
				return nil
			})
		}
		switch round {
		case 2:
			c.etcd.Restart(t)
		case 3:
			c.admin(func(w *allocator.Writer) error {
				_, err := w.Freeze(t.Context(), "x")
				return err
			})
			w.until("frozen", func(s *state.State) bool { return s.Ledger == state.LedgerFrozen })
			c.admin(func(w *allocator.Writer) error { _, err := w.Thaw(t.Context(), nil, nil, "x"); return err })
			w.until("thawed", func(s *state.State) bool { return s.Ledger == state.LedgerRunning })
		case 4:
			for id := range pods {
				c.admin(func(w *allocator.Writer) error { return w.ReleaseLease(t.Context(), id, entry.Ref{}, "by hand") })
				delete(pods, id)
				break
			}
		}
	}
	w.at(c)
	now := time.Now().Add(time.Minute) // when no hold is left
	s := w.until("no address held", func(s *state.State) bool {
		for _, p := range s.Pools {
			if p.Held > 0 {
				return false
			}
		}
		return true
	})
	want := c.recount(now)
	for _, p := range s.Pools {
		n := want[p.Name]
		// The prod pool leases one of each family.
		if p.Name == "prod" {
			early := uint64(2)
			n[0] = (n[0]-early)/2 + early
		}
		if p.Leased != n[0] {
			t.Errorf("pool %s: %d leased, want %d", p.Name, p.Leased, n[0])
		}
		if want := map[string]uint64{"prod": 1021, "named": 253}[p.Name]; p.Capacity != want {
			t.Errorf("pool %s: capacity %d, want %d", p.Name, p.Capacity, want)
		}
	}
	if len(s.Pools) != 2 || s.Nodes != 3 || s.Ledger != state.LedgerRunning || s.Epoch != 1 {
		t.Errorf("%+v", s)
	}
	// A model that reads it once says the same.
	fresh := c.fresh()
	for i := range s.Pools {
		s.Pools[i].Trend = 0
	}
	if !reflect.DeepEqual(s.Pools, fresh.Pools) || s.Near != fresh.Near || s.Nodes != fresh.Nodes {
		t.Errorf("got  %+v\nwant %+v", s, fresh)
	}
	// The pool's spec was put without an entry, by this test: verify says so, and
	// nothing else was found.
	if got := strings.Count(w.log.String(), "msg=finding"); got != 0 {
		t.Errorf("%d findings:\n%s", got, w.log)
	}
}

func (c *cluster) fresh() *state.State {
	c.t.Helper()
	src, err := etcdstore.Open(c.t.Context(), c.client, keys)
	if err != nil {
		c.t.Fatal(err)
	}
	m := NewModel(keys)
	if err := src.State(c.t.Context(), func(r audit.Record) error { m.Put(r, time.Now()); return nil }); err != nil {
		c.t.Fatal(err)
	}
	return filled(m, time.Now())
}

// TestHonestOperators: what operators do is no finding either: replacing a node,
// giving a block back, the drill after a restore.
func TestHonestOperators(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a", "b")
	c.add("n2", "c")
	w := c.watch()
	w.until("verified", verified1)
	c.admin(func(w *allocator.Writer) error {
		_, err := w.Replace(t.Context(), allocator.Replacement{Writer: node("n1")}, "new machine")
		return err
	})
	c.recover("n1") // it holds addresses: a new chain takes them over
	c.add("n1", "d")
	c.del("n2", "c")
	blocks := c.find("blocks/")
	k, err := keys.Parse(blocks[len(blocks)-1])
	if err != nil {
		t.Fatal(err)
	}
	c.admin(func(w *allocator.Writer) error {
		return w.Unclaim(t.Context(), allocator.Claim{Block: k.Block}, "unused")
	})
	s := w.at(c)
	if !verified1(s) || s.Pools[0].Leased != 3 {
		t.Errorf("%+v", s)
	}

	// Restored, and recovered by the book.
	file := filepath.Join(t.TempDir(), "snapshot")
	c.etcd.Snapshot(t, file)
	c.add("n2", "lost-1", "lost-2", "lost-3")
	before := w.at(c)
	c.etcd.Restore(t, file, true)
	w.until("ROLLBACK", func(s *state.State) bool { return s.Etcd.OK && s.Verify.Code == string(audit.Rollback) })
	c.admin(func(w *allocator.Writer) error {
		if _, _, err := w.RecoverStart(t.Context(), 0, "restored"); err != nil {
			return err
		}
		return nil
	})
	s = w.until("epoch 2", func(s *state.State) bool { return s.Epoch == 2 })
	if s.Ledger != state.LedgerFrozen {
		t.Errorf("%+v", s)
	}
	c.recover("n1")
	c.recover("n2")
	c.admin(func(w *allocator.Writer) error {
		_, err := w.Thaw(t.Context(), []string{"n1", "n2"}, nil, "done")
		return err
	})
	s = w.at(c)
	if s.Pools[0].Leased != 6 || s.Ledger != state.LedgerRunning {
		t.Errorf("%+v, before %+v", s, before)
	}
	if n := strings.Count(w.log.String(), "msg=finding"); n != 0 {
		t.Errorf("%d findings:\n%s", n, w.log)
	}
}

func (c *cluster) recover(name string) {
	c.t.Helper()
	c.as(node(name), func(w *allocator.Writer) error {
		r, err := w.Recover(c.t.Context(), nil, "test")
		if err == nil && !r.Done {
			err = fmt.Errorf("not done: %+v", r)
		}
		return err
	})
}

// TestRolledBack: an etcd that went back in time under its own name is noticed,
// and bars go on taking the states.
func TestRolledBack(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a")
	file := filepath.Join(t.TempDir(), "snapshot")
	c.etcd.Snapshot(t, file)
	c.add("n1", "b", "d")
	w := c.watch()
	w.until("verified", verified1)
	high := w.at(c)
	c.etcd.Restore(t, file, false)
	w.until("ROLLBACK", func(s *state.State) bool {
		return s.Verify.Result == state.VerifyFailed && s.Verify.Code == string(audit.Rollback)
	})
	s := w.until("one lease", func(s *state.State) bool { return len(s.Pools) == 1 && s.Pools[0].Leased == 1 })
	if s.Revision < high.Revision {
		t.Errorf("revision %d after %d", s.Revision, high.Revision)
	}
}

// TestOutage: while etcd is away the bars are told why, and after it all goes
// on, also if it was compacted meanwhile.
func TestOutage(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a", "b")
	w := c.watch()
	w.until("verified", verified1)
	c.etcd.Stop()
	s := w.until("down", func(s *state.State) bool { return !s.Etcd.OK && s.Etcd.Error == "connection refused" })
	if s.Pools[0].Leased != 2 || s.Etcd.Since.IsZero() {
		t.Errorf("%+v", s)
	}
	beats := s.At
	w.until("a heartbeat while it is down", func(s *state.State) bool { return !s.Etcd.OK && s.At.After(beats) })
	c.etcd.Restart(t)
	c.add("n1", "d")
	s = w.at(c)
	if s.Pools[0].Leased != 3 || s.Etcd.Error != "" || s.Pools[0].Trend != 1 {
		t.Errorf("%+v", s)
	}

	if n := strings.Count(w.log.String(), "msg=finding"); n != 0 {
		t.Errorf("%d findings:\n%s", n, w.log)
	}
}

// TestCompacted: what etcd compacted while the publisher was cut off is read
// anew, and verified in full, since nobody saw it go by.
func TestCompacted(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a", "b")
	line := newLine(t, strings.TrimPrefix(c.etcd.Endpoint(), "http://"))
	w := watch(t, Config{Source: "test", Heartbeat: time.Second, Feed: &Etcd{
		Store: etcdstore.Config{Endpoints: []string{"http://" + line.Addr().String()}}, Keys: keys, again: time.Millisecond,
	}})
	first := w.until("verified", verified1)
	line.cut(true)
	w.until("down", func(s *state.State) bool { return !s.Etcd.OK })
	c.del("n1", "a")
	c.add("n2", "e", "f")
	c.compact()
	c.add("n2", "g")
	line.cut(false)
	s := w.at(c)
	if s.Pools[0].Leased != 4 || s.Nodes != 2 || s.Pools[0].Trend != 2 {
		t.Errorf("%+v", s)
	}
	if !strings.Contains(w.log.String(), "compacted") {
		t.Errorf("it was not compacted:\n%s", w.log)
	}
	w.until("verified again", func(s *state.State) bool { return verified1(s) && s.Verify.At.After(first.Verify.At) })
	if n := strings.Count(w.log.String(), "msg=finding"); n != 0 {
		t.Errorf("%d findings:\n%s", n, w.log)
	}
}

// line is a connection to etcd that can be cut.
type line struct {
	net.Listener
	to    string
	mu    sync.Mutex
	down  bool
	conns map[net.Conn]bool
}

func newLine(t *testing.T, to string) *line {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &line{Listener: listener, to: to, conns: map[net.Conn]bool{}}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); l.cut(true); all.Wait() })
	all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", l.to)
			l.mu.Lock()
			if err != nil || l.down {
				in.Close()
				if err == nil {
					out.Close()
				}
				l.mu.Unlock()
				continue
			}
			l.conns[in], l.conns[out] = true, true
			l.mu.Unlock()
			for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
				all.Go(func() {
					_, _ = io.Copy(p[0], p[1])
					p[0].Close()
					p[1].Close()
				})
			}
		}
	})
	return l
}

func (l *line) cut(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
	for c := range l.conns {
		c.Close()
	}
	clear(l.conns)
}

// TestTampering: whoever writes past the ledger is noticed at once, and what was
// seen is not forgotten when the evidence goes.
func TestTampering(t *testing.T) {
	for name, tc := range map[string]struct {
		code   audit.Code
		tamper func(c *cluster)
	}{
		"rewritten": {audit.Rewritten, func(c *cluster) {
			key := c.find("chains/node/n1/")[1]
			c.put(key, strings.Replace(c.get(key), "shop/a", "shop/z", 1))
		}},
		"rewritten and put back": {audit.Rewritten, func(c *cluster) {
			key := c.find("chains/node/n1/")[1]
			old := c.get(key)
			c.put(key, strings.Replace(old, "shop/a", "shop/z", 1))
			c.put(key, old)
		}},
		"deleted": {audit.Missing, func(c *cluster) {
			if _, err := c.client.Delete(c.t.Context(), c.find("chains/node/n1/")[2]); err != nil {
				c.t.Fatal(err)
			}
		}},
		"leased to another": {audit.AllocNoEntry, func(c *cluster) {
			key := c.find("addresses/")[0]
			c.put(key, strings.Replace(c.get(key), `"n1"`, `"n2"`, 1))
		}},
		"attachment without an entry": {audit.AllocNoEntry, func(c *cluster) {
			c.put(keys.Attachment(c.id("n1", "ghost")), c.get(keys.Attachment(c.id("n1", "a"))))
		}},
		"attachment deleted": {audit.StateMissing, func(c *cluster) {
			if _, err := c.client.Delete(c.t.Context(), keys.Attachment(c.id("n1", "a"))); err != nil {
				c.t.Fatal(err)
			}
		}},
		"frozen by hand": {audit.StateDiffers, func(c *cluster) {
			c.put(keys.Meta(), strings.Replace(c.get(keys.Meta()), "running", "frozen", 1))
		}},
		"head put back": {audit.HeadRollback, func(c *cluster) {
			key := keys.Writer(node("n1"))
			v := c.head()
			v.Seq--
			c.put(key, string(keyspace.Encode(v)))
		}},
		"an entry of nobody's": {audit.Malformed, func(c *cluster) {
			chain := c.find("chains/node/n1/")
			last := chain[len(chain)-1]
			k, err := keys.Parse(last)
			if err != nil {
				c.t.Fatal(err)
			}
			c.put(keys.Entry(k.Writer, k.Chain, k.Seq+1), "ipam-ledger/entry/v1\nnothing\n")
		}},
		"an entry again at another place": {audit.WrongChain, func(c *cluster) {
			chain := c.find("chains/node/n1/")
			last := chain[len(chain)-1]
			k, err := keys.Parse(last)
			if err != nil {
				c.t.Fatal(err)
			}
			c.put(keys.Entry(k.Writer, k.Chain, k.Seq+1), c.get(last))
		}},
		"signed by a stranger": {audit.BadSignature, func(c *cluster) { c.forge(false, func(*entry.Entry) {}) }},
		"another entry before it": {audit.HashMismatch, func(c *cluster) {
			c.forge(true, func(e *entry.Entry) { e.Prev[0]++ })
		}},
		"a gap": {audit.Missing, func(c *cluster) {
			c.forge(true, func(e *entry.Entry) { e.Seq++ })
		}},
		"from the future": {audit.Revision, func(c *cluster) {
			c.forge(true, func(e *entry.Entry) { e.Revision += 100 })
		}},
		"a chain that was not opened": {audit.Fork, func(c *cluster) {
			c.forge(true, func(e *entry.Entry) { e.Chain = entry.NewChainID() })
		}},
		"a second chain": {audit.Fork, func(c *cluster) {
			c.forge(true, func(e *entry.Entry) {
				_, vkey, err := entry.ReadSigner(c.key())
				if err != nil {
					c.t.Fatal(err)
				}
				*e = entry.Entry{
					Chain: entry.NewChainID(), Seq: 1, Time: e.Time, Revision: e.Revision,
					Op: entry.Open, Writer: node("n1"), Key: vkey, Cluster: c.meta().Cluster, Epoch: 1,
				}
			})
		}},
		"a stray key": {audit.UnknownKey, func(c *cluster) { c.put(keys.Prefix()+"stray/key", "x") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			c.add("n1", "a", "b")
			w := watch(t, Config{Source: "test", Heartbeat: time.Second, Feed: &Etcd{Store: c.config(), Keys: keys, again: time.Hour}})
			w.until("verified", verified1)
			tc.tamper(c)
			s := w.until("failed", func(s *state.State) bool { return s.Verify.Result == state.VerifyFailed })
			if s.Verify.Code != string(tc.code) || s.Verify.Findings < 1 {
				t.Errorf("%+v, want %s\n%s", s.Verify, tc.code, w.log)
			}
			if err := w.stop(); err != nil {
				t.Fatal(err)
			}
			// The full verification that follows does not take it back.
			w = c.watch()
			s = w.until("a result", func(s *state.State) bool { return s.Verify.Result != state.VerifyUnknown && !s.Verify.Running })
			if name != "rewritten and put back" && s.Verify.Result != state.VerifyFailed {
				t.Errorf("verification says %+v", s.Verify)
			}
		})
	}
}

// key is n1's signing key.
func (c *cluster) key() string {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "node", "n1", "key"))
	if err != nil {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func (c *cluster) meta() (m keyspace.Meta) {
	c.t.Helper()
	if err := keyspace.Decode([]byte(c.get(keys.Meta())), &m); err != nil {
		c.t.Fatal(err)
	}
	return m
}

// forge appends an entry to n1's chain, changed, with n1's own key or a
// stranger's, and moves the writer's head to it.
func (c *cluster) forge(own bool, change func(e *entry.Entry)) {
	c.t.Helper()
	v := c.head()
	skey, err := entry.NewKey(node("n1"))
	if err != nil {
		c.t.Fatal(err)
	}
	if own {
		skey = c.key()
	}
	signer, _, err := entry.ReadSigner(skey)
	if err != nil {
		c.t.Fatal(err)
	}
	e := &entry.Entry{
		Chain: v.Chain, Seq: v.Seq + 1, Prev: v.Hash, Time: time.Now(), Revision: c.revision(),
		Op: entry.Claim, Space: "default", Pool: "prod", Node: "n1", Blocks: []netip.Prefix{netip.MustParsePrefix("10.22.3.0/28")},
	}
	change(e)
	stored, _, err := entry.Sign(e, signer)
	if err != nil {
		c.t.Fatal(err)
	}
	c.append(v, e.Chain, e.Seq, stored)
}

func (c *cluster) head() (v keyspace.Writer) {
	c.t.Helper()
	if err := keyspace.Decode([]byte(c.get(keys.Writer(node("n1")))), &v); err != nil {
		c.t.Fatal(err)
	}
	return v
}

func (c *cluster) append(v keyspace.Writer, chain entry.ChainID, seq uint64, stored []byte) {
	c.t.Helper()
	v.Chain, v.Seq, v.Hash = chain, seq, entry.HashOf(stored)
	_, err := c.client.Txn(c.t.Context()).Then(
		clientv3.OpPut(keys.Entry(node("n1"), chain, seq), string(stored)),
		clientv3.OpPut(keys.Writer(node("n1")), string(keyspace.Encode(v))),
	).Commit()
	if err != nil {
		c.t.Fatal(err)
	}
}

// TestNewerEntry: an entry of a later version is no finding, and not "ok" either.
func TestNewerEntry(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a")
	w := watch(t, Config{Source: "test", Heartbeat: time.Second, Feed: &Etcd{Store: c.config(), Keys: keys, again: time.Hour}})
	w.until("verified", verified1)
	signer, _, err := entry.ReadSigner(c.key())
	if err != nil {
		t.Fatal(err)
	}
	stored, err := note.Sign(&note.Note{Text: "ipam-ledger/entry/v2\nanything goes\n"}, signer)
	if err != nil {
		t.Fatal(err)
	}
	v := c.head()
	c.append(v, v.Chain, v.Seq+1, stored)
	if s := w.at(c); s.Verify.Result != state.VerifyReduced || s.Verify.Findings != 0 {
		t.Errorf("%+v\n%s", s.Verify, w.log)
	}
}

// TestUntrustedKey: with pinned keys, a chain of another key is a finding.
func TestUntrustedKey(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a")
	var vkeys []string
	for _, who := range []entry.Writer{node("n1"), {Kind: entry.KindOperator, Name: "alice"}} {
		var v keyspace.Writer
		if err := keyspace.Decode([]byte(c.get(keys.Writer(who))), &v); err != nil {
			t.Fatal(err)
		}
		vkeys = append(vkeys, v.Key)
	}
	ring, err := audit.ParseKeys(strings.NewReader(strings.Join(vkeys, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	w := watch(t, Config{Source: "test", Heartbeat: time.Second, Feed: &Etcd{Store: c.config(), Keys: keys, Trusted: ring, again: time.Hour}})
	w.until("verified", verified1)
	c.add("n2", "b")
	s := w.until("failed", func(s *state.State) bool { return s.Verify.Result == state.VerifyFailed })
	if s.Verify.Code != string(audit.UntrustedKey) {
		t.Errorf("%+v", s.Verify)
	}
}

// TestFindingsLast: a rewrite that was undone stays a finding over full
// verifications that find nothing; what can be seen to be mended does not.
func TestFindingsLast(t *testing.T) {
	p := &Publisher{}
	p.now = time.Now
	rewrite := finding{audit.Finding{Code: audit.Rewritten, Revision: 10}, true}
	stray := finding{audit.Finding{Code: audit.UnknownKey, Revision: 11}, false}
	p.again = make(chan struct{}, 1)
	p.Config.Log = slog.New(slog.DiscardHandler)
	clean := func(rev int64) {
		p.conclude(verified{report: &audit.Report{Snapshot: audit.Snapshot{Revision: rev, Taken: noon}}}, noon)
	}
	want := func(result string, findings int64, code audit.Code) {
		t.Helper()
		if v := p.verify(); v.Result != result || v.Findings != findings || v.Code != string(code) {
			t.Errorf("%+v, want %s %d %s", v, result, findings, code)
		}
	}
	clean(5)
	want(state.VerifyOK, 0, "")
	p.find(rewrite)
	p.find(stray)
	want(state.VerifyFailed, 2, audit.Rewritten)
	clean(10)
	want(state.VerifyFailed, 2, audit.Rewritten)
	clean(12)
	want(state.VerifyFailed, 1, audit.Rewritten)
	report := &audit.Report{Snapshot: audit.Snapshot{Revision: 13}, FindingCount: 3, Findings: []audit.Finding{{Code: audit.HashMismatch}}}
	p.conclude(verified{report: report}, noon)
	want(state.VerifyFailed, 3, audit.HashMismatch)
	p.conclude(verified{err: errors.New("away")}, noon.Add(time.Hour))
	want(state.VerifyFailed, 3, audit.HashMismatch)
}

// TestCadence: at once when it was quiet, four a second at most, a heartbeat,
// and hellos answered together.
func TestCadence(t *testing.T) {
	c := cadence{heartbeat: 15 * time.Second}
	now := noon
	at := func(ms int) time.Time { return noon.Add(time.Duration(ms) * time.Millisecond) }
	step := func(ms int, want bool, nextMS int) {
		t.Helper()
		now = at(ms)
		send, next := c.due(now)
		if send != want {
			t.Fatalf("at %d ms: send %v", ms, send)
		}
		if send {
			c.sent(now)
			_, next = c.due(now)
		}
		if !next.Equal(at(nextMS)) {
			t.Fatalf("at %d ms: next after %v, want %d ms", ms, next.Sub(noon), nextMS)
		}
	}
	step(0, true, 15000) // the first
	c.changed(now)
	step(100, false, 250)
	step(250, true, 15250)
	step(1000, false, 15250)
	c.changed(now)
	step(1000, true, 16000) // quiet before: at once
	c.asked(now)
	c.asked(now)
	step(1050, false, 1100)
	step(1100, true, 16100)
	step(1200, false, 16100)
	c.asked(now)
	c.changed(now)
	step(1200, true, 16200)
	step(16199, false, 16200)
	step(16200, true, 31200)
	// A clock that went back is no reason to be silent.
	step(5000, true, 20000)

	// A storm.
	n := 0
	for ms := 20000; ms < 30000; ms += 10 {
		c.changed(at(ms))
		if send, _ := c.due(at(ms)); send {
			n++
			c.sent(at(ms))
		}
	}
	if n != 40 {
		t.Errorf("%d states in ten seconds, want 40", n)
	}
}

// TestOnePublisher: the second for a source says who has it; other sources run
// beside it.
func TestOnePublisher(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ipam-ledger")
	lock, err := TakeLock(dir, "prod")
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{Source: "prod", Dir: dir, Feed: &Command{Shell: "exit 0"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context()); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("process %d ", os.Getpid())) {
		t.Errorf("got %v", err)
	}
	other, err := TakeLock(dir, "dev")
	if err != nil {
		t.Fatal(err)
	}
	other.Release()
	lock.Release()
	if lock, err = TakeLock(dir, "prod"); err != nil {
		t.Fatal(err)
	}
	lock.Release()
	for _, bad := range []string{"", ".", "../x", "a/b", strings.Repeat("x", 65), "a b"} {
		if ValidSource(bad) == nil {
			t.Errorf("source %q was taken", bad)
		}
	}
}

// TestStateFile: a publisher that starts while etcd is away shows what the last
// one knew, and never an older revision than bars have seen.
func TestStateFile(t *testing.T) {
	c := newCluster(t)
	c.add("n1", "a")
	dir := filepath.Join(t.TempDir(), "ipam-ledger")
	publish := func(ok func(s *state.State) bool) *state.State {
		t.Helper()
		p, err := New(Config{Source: "prod", Dir: dir, Heartbeat: time.Second, Feed: &Etcd{Store: c.config(), Keys: keys}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		for ctx.Err() == nil {
			if s := readState(dir, "prod"); s != nil && ok(s) {
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				return s
			}
			time.Sleep(10 * time.Millisecond) // a file tells nobody that it changed
		}
		t.Fatalf("the state is %+v", readState(dir, "prod"))
		return nil
	}
	first := publish(func(s *state.State) bool { return verified1(s) && len(s.Pools) == 1 })
	for _, f := range []string{"state.json", "state-prod.json"} {
		if fi, err := os.Stat(filepath.Join(dir, f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, fi, err)
		}
	}
	c.etcd.Stop()
	s := publish(func(s *state.State) bool { return !s.Etcd.OK })
	if !s.Newer(first) || len(s.Pools) != 1 || s.Pools[0].Leased != 1 || s.Verify.Result != state.VerifyUnknown {
		t.Errorf("%+v after %+v", s, first)
	}
	// Another ledger under the same name.
	c.etcd = etcdtest.Start(t)
	s = publish(func(s *state.State) bool { return s.Etcd.OK })
	if !s.Newer(first) || s.Ledger != "" || len(s.Pools) != 0 {
		t.Errorf("%+v after %+v", s, first)
	}
}

// TestCommand: states come from a command's lines, which is run again when it
// ends.
func TestCommand(t *testing.T) {
	dir := t.TempDir()
	line, err := state.Encode(&state.State{
		Source: "far", Epoch: 1, Revision: 7, At: time.Now().Add(-48 * time.Hour), Heartbeat: 15, Etcd: state.Etcd{OK: true},
		Verify: state.Verify{Result: state.VerifyOK}, Pools: []state.Pool{{Space: "default", Name: "prod", Capacity: 10, Leased: 3}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "line"), append(line, '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := command(dir, "mkfifo", "go"); err != nil {
		t.Fatal(err)
	}
	w := watch(t, Config{Feed: &Command{Shell: "cd " + dir + "; echo Welcome; echo x >>runs; cat line; read _ <go; echo no route >&2; exit 7"}, Heartbeat: time.Second})
	s := w.until("its state", func(s *state.State) bool { return s.Etcd.OK })
	if s.Source != "far" || s.Revision != 7 || s.Stale(time.Now()) || s.Heartbeat != 1 || s.Pools[0].Leased != 3 {
		t.Errorf("%+v", s)
	}
	if err := os.WriteFile(filepath.Join(dir, "go"), []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	s = w.until("its end", func(s *state.State) bool { return !s.Etcd.OK })
	if s.Etcd.Error != "the command ended with exit status 7: no route" || s.Pools[0].Leased != 3 {
		t.Errorf("%+v", s)
	}
	w.until("its second run", func(s *state.State) bool { return s.Etcd.OK })
	b, err := os.ReadFile(filepath.Join(dir, "runs"))
	if err != nil || len(slices.DeleteFunc(b, func(c byte) bool { return c != 'x' })) != 2 {
		t.Errorf("runs: %q, %v", b, err)
	}
}

// TestCommandLimits: what is too long, or of another version, is refused.
func TestCommandLimits(t *testing.T) {
	for shell, want := range map[string]string{
		"head -c 20000 /dev/zero | tr '\\0' x; exec sleep 60":                      "a line of more than 16384 bytes",
		`echo '{"app":"ipam-ledger","v":99,"type":"state"}'; exec sleep 60`:        "state of another version",
		"exec no-such-command-anywhere":                                            "exit status 127",
		"echo one >&2; echo 'two\033[31m' >&2; exit 1":                             "exit status 1: two[31m",
		`echo '{"app":"ipam-ledger","v":1,"type":"hello"}'; echo '{}'; echo; exit`: "the command ended",
	} {
		w := watch(t, Config{Source: "far", Feed: &Command{Shell: shell}, Heartbeat: time.Second})
		s := w.until(want, func(s *state.State) bool { return s.Etcd.Error != "" && s.Etcd.Error != "not reached yet" })
		if s.Etcd.OK || !strings.Contains(s.Etcd.Error, want) {
			t.Errorf("%q: %+v, want %s", shell, s.Etcd, want)
		}
		if err := w.stop(); err != nil {
			t.Error(err)
		}
	}
}
