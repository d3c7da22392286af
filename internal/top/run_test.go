package top

import (
	"context"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// long is how long a test waits for what must come.
const long = 30 * time.Second

// screen is a running dashboard, with what it drew last.
type screen struct {
	t    *testing.T
	keys io.Writer

	mu   sync.Mutex
	last string
	news chan struct{}
}

// start runs the dashboard as the command does, but for the terminal.
func start(t *testing.T, c *cluster, o Options) *screen {
	t.Helper()
	r, w := io.Pipe()
	s := &screen{t: t, keys: w, news: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background()) // it outlives the test's
	ended := make(chan error, 1)
	go func() {
		ended <- Run(ctx, Config{
			Etcd: etcdstore.Config{Endpoints: []string{c.etcd.Endpoint()}, DialTimeout: time.Second}, Keys: c.keys, Timeout: 5 * time.Second,
			Options: o, Input: r, Output: io.Discard, Clock: time.Now, options: []tea.ProgramOption{tea.WithWindowSize(80, 24)}, drawn: s.draw,
		})
	}()
	t.Cleanup(func() {
		s.press("q")
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("it ended with: %v", err)
			}
		case <-time.After(long):
			t.Error("q does not end it")
		}
		cancel()
		w.Close()
	})
	return s
}

func (s *screen) draw(view string) {
	s.mu.Lock()
	s.last = ansi.Strip(view)
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default:
	}
}

func (s *screen) now() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// until waits until all texts are on the screen.
func (s *screen) until(want ...string) {
	s.t.Helper()
	s.wait(strings.Join(want, ", "), func(v string) bool {
		for _, w := range want {
			if !strings.Contains(v, w) {
				return false
			}
		}
		return true
	})
}

func (s *screen) wait(what string, ok func(string) bool) {
	s.t.Helper()
	end := time.After(long)
	for !ok(s.now()) {
		select {
		case <-s.news:
		case <-end:
			s.t.Fatalf("waiting for %s:\n%s", what, s.now())
		}
	}
}

func (s *screen) press(bytes string) {
	if _, err := io.WriteString(s.keys, bytes); err != nil {
		s.t.Errorf("typing %q: %v", bytes, err)
	}
}

// TestEndToEnd: a real etcd, real writers, real key strokes.
func TestEndToEnd(t *testing.T) {
	e := etcdtest.Start(t)
	c := newCluster(t, e)
	c.typical()
	s := start(t, c, Options{Plain: true, Verify: true})
	s.until("✓ etcd", "✓ verified", "default/edge", "default/prod", "51 leased, 2 pools, 3 nodes", "shop/proxy-5", "running")

	// What is committed is there, and the newest entry is the last line.
	ip := c.add("worker-3", "prod", "late")
	s.until("52 leased", "shop/late")

	// Pools, map, address, history, entry; and back.
	s.press("\x1b[B\r")
	s.until("› default/prod", "10.22.0.32/27", "leased by shop/cart-")
	s.press("/late\r")
	s.until("▶ "+ip.String()+"  leased by shop/late on worker-3", "/late")
	s.press("\r")
	s.until("HISTORY", "never held before", "network   prod, interface eth0")
	c.del("worker-3", "prod", "late")
	s.until("free again", "release shop/late")
	s.press("\x1b[B\r")
	s.until("ENTRY ", `pod "shop/late"`, "op acquire")

	// etcd goes away: it is said, keys work, and nothing is lost when it is back.
	e.Stop()
	s.until("etcd unreachable since", "shown is revision")
	s.press("2")
	s.until("▶2 Nodes", `no node is called "late"`)
	s.press("\x1b")
	s.until("worker-1")
	s.press("?")
	s.until("KEYS")
	s.press("3")
	e.Restart(t)
	s.until("✓ etcd")
	c.add("worker-1", "prod", "after")
	s.until("shop/after")
	if strings.Contains(s.now(), "unreachable") {
		t.Errorf("etcd is back:\n%s", s.now())
	}

	// Somebody rewrites an entry: it is a finding at once, not at the next
	// verification; and that says it, too.
	client := e.Client(t)
	w := c.writers["node/worker-2"]
	got, err := client.Get(t.Context(), c.keys.Chains()+w.Writer.String()+"/", prefix()...)
	if err != nil || len(got.Kvs) < 5 {
		t.Fatal(err, len(got.Kvs))
	}
	kv := got.Kvs[4]
	if _, err := client.Put(t.Context(), string(kv.Key), strings.Replace(string(kv.Value), "shop/web", "shop/bew", 1)); err != nil {
		t.Fatal(err)
	}
	s.until("NOT VERIFIED: 1 finding, REWRITTEN", "BAD: it was rewritten")
	s.press("4v")
	s.until("FINDINGS", "HASH-MISMATCH")
}

// TestOpensPool: --pool opens a pool's page, also one that comes later.
func TestOpensPool(t *testing.T) {
	c := newCluster(t, etcdtest.Start(t))
	s := start(t, c, Options{Plain: true, Pool: "prod"})
	s.until("› prod", "there is no pool prod in this ledger so far", "not verified yet")
	c.typical()
	s.until("› default/prod", "10.22.0.0/27", "45 leased")
}

// sink takes what a feed sends.
type sink struct {
	t    *testing.T
	news chan Event
}

func newFeed(t *testing.T, c *cluster) (*feed, *sink) {
	s := &sink{t, make(chan Event, 1000)}
	return &feed{cfg: etcdstore.Config{Endpoints: []string{c.etcd.Endpoint()}}, keys: c.keys, patience: 5 * time.Second, now: time.Now, send: func(e Event) { s.news <- e }}, s
}

// next is the next event of a type.
func next[E any](s *sink) E {
	s.t.Helper()
	end := time.After(long)
	for {
		select {
		case e := <-s.news:
			if e, ok := e.(E); ok {
				return e
			}
		case <-end:
			var e E
			s.t.Fatalf("no %T came", e)
			return e
		}
	}
}

// follow runs a feed until the returned function is called.
func follow(t *testing.T, f *feed) func() {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.run(ctx)
	}()
	stop := func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// TestLast: the last entries are those of the commits, over all chains, and none
// is bad.
func TestLast(t *testing.T) {
	c := newCluster(t, etcdtest.Start(t))
	c.typical()
	f, s := newFeed(t, c)
	follow(t, f)
	l := next[Loaded](s)
	var all []string
	store, client, _, err := f.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	src, err := etcdstore.Open(t.Context(), client, c.keys)
	if err != nil {
		t.Fatal(err)
	}
	err = src.Entries(t.Context(), func(r audit.Record) error {
		all = append(all, entry.HashOf(r.Value).String())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	all = all[max(0, len(all)-lastEntries):]
	if len(l.Entries) != len(all) {
		t.Fatalf("%d entries, want %d", len(l.Entries), len(all))
	}
	for i := range l.Entries {
		if x := &l.Entries[i]; x.Ref.Hash.String() != all[i] || x.Bad != "" {
			t.Errorf("entry %d is %s (%s), want %s", i, x.Ref, x.Bad, all[i])
		}
	}
}

// TestHistory: an address's own linked list, also over a chain that nobody
// extends any more.
func TestHistory(t *testing.T) {
	c := newCluster(t, etcdtest.Start(t))
	c.pool("prod", "10.22.0.0/29", 4, 0)
	var ip netip.Addr
	for _, pod := range []string{"a", "b", "c", "d", "e"} { // .2 to .6 go round
		ip = c.add("worker-1", "prod", pod)
	}
	for range 30 {
		c.del("worker-1", "prod", "e")
		if got := c.add("worker-1", "prod", "e"); got != ip {
			t.Fatalf("got %v, want %v", got, ip)
		}
	}
	f, s := newFeed(t, c)
	follow(t, f)
	l := next[Loaded](s).Ledger
	at := place{"default", ip}
	f.mu.Lock()
	f.owners = map[entry.ChainID]entry.Writer{} // as if no writer extended it
	f.mu.Unlock()
	h := f.history(t.Context(), at, l.addresses[at].last).(History)
	if h.Err != "" || len(h.Lines) != steps || !h.More {
		t.Fatalf("%d entries, more %v: %s", len(h.Lines), h.More, h.Err)
	}
	for i, x := range h.Lines {
		want := []entry.Op{entry.Acquire, entry.Release}[i%2]
		if x.Bad != "" || x.Entry.Op != want || i > 0 && x.Commit >= h.Lines[i-1].Commit {
			t.Errorf("line %d: %s %s at %d", i, x.Entry.Op, x.Bad, x.Commit)
		}
	}
	other := place{"default", netip.MustParseAddr("10.22.0.2")}
	if h := f.history(t.Context(), other, l.addresses[other].last).(History); len(h.Lines) != 1 || h.More {
		t.Errorf("an address that was held once has %d entries", len(h.Lines))
	}
	// An entry of it is edited: it is not the one that is named.
	client := c.etcd.Client(t)
	kv := h.Lines[3]
	key := c.keys.Entry(kv.Writer, kv.Ref.Chain, kv.Ref.Seq)
	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if h := f.history(t.Context(), at, l.addresses[at].last).(History); !strings.Contains(h.Err, "is gone") || len(h.Lines) != 3 {
		t.Errorf("%d entries and %q, want 3 and that one is gone", len(h.Lines), h.Err)
	}
	if _, err := client.Put(t.Context(), key, strings.Replace(string(kv.Stored), "shop/e", "shop/x", 1)); err != nil {
		t.Fatal(err)
	}
	if h := f.history(t.Context(), at, l.addresses[at].last).(History); len(h.Lines) < 4 || !strings.Contains(h.Lines[3].Bad, "its hash is not") {
		t.Errorf("an edited entry passes: %+v", h.Err)
	}
	if found := next[Changes](s); len(found.Findings) == 0 || found.Findings[0].Code != audit.Missing {
		t.Errorf("a deletion is no finding: %+v", found.Findings)
	}
}

// TestAnew: what was compacted before it was seen, and an etcd that went back
// in time, are read anew; otherwise the watch goes on where it was.
func TestAnew(t *testing.T) {
	e := etcdtest.Start(t)
	c := newCluster(t, e)
	c.pool("prod", "10.22.0.0/24", 32, 0)
	c.add("worker-1", "prod", "a")
	file := filepath.Join(t.TempDir(), "snapshot")
	e.Snapshot(t, file)
	f, s := newFeed(t, c)
	stop := follow(t, f)
	next[Loaded](s)
	next[Found](s)
	c.add("worker-1", "prod", "b")
	if got := next[Changes](s); len(got.Entries) != 1 || got.Entries[0].Bad != "" || got.Entries[0].pod() != "shop/b" {
		t.Errorf("%+v", got)
	}
	stop()
	// In between something is committed: a resumed watch has it.
	c.add("worker-2", "prod", "c")
	stop = follow(t, f)
	got := next[Changes](s)
	for len(got.Entries) < 2 { // open, acquire
		more := next[Changes](s)
		got.Entries = append(got.Entries, more.Entries...)
	}
	if got.Entries[0].op() != "open" || got.Entries[1].pod() != "shop/c" || got.Entries[0].Bad+got.Entries[1].Bad != "" {
		t.Errorf("%+v", got.Entries)
	}
	stop()
	// And compacted.
	c.add("worker-2", "prod", "d")
	c.add("worker-2", "prod", "e")
	client := e.Client(t)
	g, err := client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Compact(t.Context(), g.Header.Revision); err != nil {
		t.Fatal(err)
	}
	follow(t, f)
	if n := next[Note](s); !strings.Contains(n.Text, "compacted") {
		t.Errorf("note %q", n.Text)
	}
	if l := next[Loaded](s); l.Ledger.pools[PoolID{"default", "prod"}].leased != 5 {
		t.Errorf("%d leased, want 5", l.Ledger.pools[PoolID{"default", "prod"}].leased)
	}
	next[Found](s)
	e.Restore(t, file, false)
	l := next[Loaded](s)
	if l.Ledger.pools[PoolID{"default", "prod"}].leased != 1 {
		t.Errorf("%d leased after the restore, want 1", l.Ledger.pools[PoolID{"default", "prod"}].leased)
	}
}

// TestNoLedger: an etcd without a ledger is not one that is out of reach, and
// the ledger is noticed when it comes.
func TestNoLedger(t *testing.T) {
	e := etcdtest.Start(t)
	f, s := newFeed(t, &cluster{etcd: e, keys: mustKeys(t)})
	follow(t, f)
	if l := next[Lost](s); !l.Answers || !strings.Contains(l.Cause, "is absent") {
		t.Errorf("%+v", l)
	}
	newCluster(t, e)
	next[Loaded](s)
	e.Stop()
	if l := next[Lost](s); l.Answers {
		t.Errorf("%+v", l)
	}
	if v := f.verify(t.Context()).(Verified); v.Err == "" {
		t.Error("verified without etcd")
	}
	if h := f.history(t.Context(), place{}, entry.Ref{Seq: 1}).(History); h.Err == "" {
		t.Error("a history without etcd")
	}
}
