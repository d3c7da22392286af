package statedir

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
)

func open(t *testing.T) *Dir {
	t.Helper()
	d, err := Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mark(seq uint64) *Mark {
	return &Mark{Writer: "node/a", Machine: "m", Cluster: "c", Position: Position{Epoch: 1, Seq: seq}, Revision: int64(10 * seq), Boot: "b"}
}

// TestTornMark: whatever a power loss makes of the file that is not synced, the
// synced one stands in; where both are gone, nothing is guessed.
func TestTornMark(t *testing.T) {
	d := open(t)
	if m, err := d.LoadMark(); m != nil || err != nil {
		t.Fatalf("a new directory has mark %v, %v", m, err)
	}
	must(t, d.SaveMark(mark(1), true))
	must(t, d.SaveMark(mark(5), false))
	whole, err := os.ReadFile(d.file("mark"))
	must(t, err)
	padding := len(whole) - len(strings.TrimRight(string(whole), "\n"))
	for n := range len(whole) - padding {
		must(t, os.WriteFile(d.file("mark"), whole[:n], 0o600))
		if m, err := d.LoadMark(); err != nil || m.Seq != 1 {
			t.Fatalf("torn at %d: %v, %v", n, m, err)
		}
	}
	for i := range len(whole) - padding {
		b := []byte(string(whole))
		b[i] ^= 0x20
		must(t, os.WriteFile(d.file("mark"), b, 0o600))
		if m, err := d.LoadMark(); err != nil || m.Seq != 1 {
			t.Fatalf("byte %d flipped: %v, %v", i, m, err)
		}
	}
	must(t, os.WriteFile(d.file("mark"), whole, 0o600))
	if m, err := d.LoadMark(); err != nil || m.Seq != 5 {
		t.Fatalf("whole again: %v, %v", m, err)
	}
	must(t, os.WriteFile(d.file("mark"), nil, 0o600))
	must(t, os.WriteFile(d.file("mark.synced"), nil, 0o600))
	if _, err := d.LoadMark(); !errors.Is(err, ErrTorn) || !strings.Contains(err.Error(), "mark.synced") {
		t.Fatalf("both torn: %v", err)
	}
}

// TestOpenTail: whatever is left of open counts until it is settled, and then no
// more, also where a power loss made the file longer than it is.
func TestOpenTail(t *testing.T) {
	d := open(t)
	for _, left := range []string{"", "-", strings.Repeat("-", 64), strings.Repeat("\x00", 4096), strings.Repeat("stale\n", 100)} {
		must(t, os.WriteFile(d.file("open"), []byte(left), 0o600))
		if pending, err := d.Pending(); err != nil || !pending {
			t.Errorf("%d bytes %.8q: pending is %v, %v", len(left), left, pending, err)
		}
		must(t, d.Settled())
		if pending, err := d.Pending(); err != nil || pending {
			t.Errorf("%d bytes %.8q, settled: pending is %v, %v", len(left), left, pending, err)
		}
		must(t, d.Begin(entry.HashOf([]byte("x"))))
		if pending, err := d.Pending(); err != nil || !pending {
			t.Errorf("%d bytes %.8q, begun: pending is %v, %v", len(left), left, pending, err)
		}
	}
}

func TestKeyMode(t *testing.T) {
	d := open(t)
	if k, err := d.Key(); k != "" || err != nil {
		t.Fatal(k, err)
	}
	must(t, d.SaveKey("secret"))
	if k, err := d.Key(); k != "secret" || err != nil {
		t.Fatal(k, err)
	}
	must(t, os.Chmod(d.file("key"), 0o640))
	if _, err := d.Key(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Fatalf("got %v", err)
	}
}

// TestLock: one at a time, given up at the deadline, and not lost by giving up.
func TestLock(t *testing.T) {
	d := open(t)
	unlock, err := d.Lock(t.Context())
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := d.Lock(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), d.file("lock")) {
		t.Fatalf("got %v", err)
	}
	got := make(chan error, 1)
	go func() {
		second, err := d.Lock(context.Background())
		if err == nil {
			second()
		}
		got <- err
	}()
	unlock()
	must(t, <-got)
}

func TestQueueAndHoldings(t *testing.T) {
	d := open(t)
	a := keyspace.AttachmentID{Node: "a", Network: "n", Container: "1", Interface: "eth0"}
	b := a
	b.Container = "2"
	now := time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC)
	must(t, d.Enqueue(Queued{Attachment: b, Time: now.Add(time.Second), Reason: "r"}))
	must(t, d.Enqueue(Queued{Attachment: a, Time: now}))
	must(t, d.Enqueue(Queued{Attachment: a, Time: now}))
	q, err := d.Queue()
	must(t, err)
	if len(q) != 2 || q[0].Attachment != a || q[1].Attachment != b || !d.IsQueued(a) {
		t.Fatalf("queue is %+v", q)
	}
	must(t, d.Dequeue(a))
	must(t, d.Dequeue(a))
	if d.IsQueued(a) || !d.IsQueued(b) {
		t.Fatal("the wrong one was taken off the queue")
	}

	h := Holding{ID: a, Value: keyspace.Attachment{Space: "default", Pool: "p", Acquire: entry.Ref{Seq: 3}, Leases: []keyspace.Lease{{Address: netip.MustParsePrefix("10.0.0.2/24")}}}}
	must(t, d.Prepare(h))
	if d.Holding(a) != nil {
		t.Fatal("a holding that was only prepared is held")
	}
	must(t, d.Hold(h.ID))
	if got := d.Holding(a); got == nil || got.Value.Leases[0] != h.Value.Leases[0] {
		t.Fatalf("holding is %+v", got)
	}
	if d.Holding(b) != nil {
		t.Fatal("a holding out of nothing")
	}
	// A file of a killed process is no holding; a torn one is not passed over.
	must(t, os.WriteFile(d.file("holdings/x.json.new"), []byte("{"), 0o600))
	if all, err := d.Holdings(); err != nil || len(all) != 1 {
		t.Fatalf("%+v, %v", all, err)
	}
	must(t, os.WriteFile(d.file("holdings/torn.json"), []byte("{"), 0o600))
	if all, err := d.Holdings(); err == nil || len(all) != 1 || !strings.Contains(err.Error(), "torn.json") {
		t.Fatalf("%+v, %v", all, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	if _, err := Open(filepath.Join(file, "state")); err == nil || !strings.Contains(err.Error(), file) {
		t.Fatalf("got %v", err)
	}
}

// TestStamps: a stamp is of this boot's clock, or none.
func TestStamps(t *testing.T) {
	d := open(t)
	if ago, ok := d.Since("asked"); ok {
		t.Fatalf("a new directory was asked %v ago", ago)
	}
	now, err := Now()
	must(t, err)
	if later, err := Now(); err != nil || later.Boot != BootID() || later.Since < now.Since || now.Since <= 0 {
		t.Fatalf("%+v, then %+v, %v", now, later, err)
	}
	must(t, d.Touch("asked"))
	if ago, ok := d.Since("asked"); !ok || ago < 0 {
		t.Fatalf("touched %v ago, %v", ago, ok)
	}
	before := now
	before.Since -= time.Hour
	must(t, d.Stamp("asked", before))
	if ago, ok := d.Since("asked"); !ok || ago < time.Hour {
		t.Fatalf("set an hour back: %v, %v", ago, ok)
	}
	// The file's own time is nothing.
	for _, at := range []time.Time{time.Unix(0, 0), now.Wall.AddDate(9, 0, 0)} {
		must(t, os.Chtimes(d.file("asked"), at, at))
		if ago, ok := d.Since("asked"); !ok || ago < time.Hour {
			t.Fatalf("with a file of %v: %v, %v", at, ago, ok)
		}
	}
	future, other := now, before
	future.Since += 24 * time.Hour
	other.Boot = "another"
	for _, at := range []leak.Moment{future, other} {
		must(t, d.Stamp("asked", at))
		if ago, ok := d.Since("asked"); ok {
			t.Errorf("%+v: %v ago", at, ago)
		}
	}
	must(t, d.Stamp("asked", before))
	whole, err := os.ReadFile(d.file("asked"))
	must(t, err)
	for i := range whole {
		for _, b := range [][]byte{whole[:i], append(whole[:i:i], make([]byte, len(whole)-i)...)} {
			must(t, os.WriteFile(d.file("asked"), b, 0o600))
			if ago, ok := d.Since("asked"); ok {
				t.Errorf("%q: %v ago", b, ago)
			}
		}
	}
	// It is written over what was there.
	must(t, os.WriteFile(d.file("asked"), []byte(strings.Repeat("x", 300)), 0o600))
	must(t, d.Touch("asked"))
	if _, ok := d.Since("asked"); !ok {
		t.Error("touched, and there is no stamp")
	}
}

// TestSuspects: what is kept of observations comes back as it was; what cannot be
// read is nothing.
func TestSuspects(t *testing.T) {
	d := open(t)
	now, err := Now()
	must(t, err)
	lease := leak.Lease{ID: keyspace.AttachmentID{Node: "a", Network: "n", Container: "1", Interface: "eth0"}}
	lease.Value.Pod = "shop/web"
	look := leak.Look{Source: "runtime", At: now, Lists: []leak.Taken{{Moment: now, Name: "-", Sum: "s"}}}
	_, memory, err := leak.Memory(nil).Judge(look, []leak.Lease{lease}, leak.Containers{}, time.Minute)
	must(t, err)
	must(t, d.SaveSuspects(memory))
	if got := d.Suspects(); !reflect.DeepEqual(got, memory) {
		t.Errorf("got %+v, want %+v", got, memory)
	}
	for _, spoilt := range []string{"", "[", `[{"attachment": {}, "since": "2025-01-15T14:00:00Z"}]`} {
		must(t, os.WriteFile(d.file("suspects"), []byte(spoilt), 0o600))
		if got := d.Suspects(); len(got) > 0 {
			t.Errorf("%q is %+v", spoilt, got)
		}
	}
}

// TestQueueOverHolding: while a release waits, what it is about is not held, also
// where who queued it could not have the lock to forget it.
func TestQueueOverHolding(t *testing.T) {
	d := open(t)
	a := keyspace.AttachmentID{Node: "a", Network: "n", Container: "1", Interface: "eth0"}
	h := Holding{ID: a, Value: keyspace.Attachment{Space: "default", Pool: "p", Acquire: entry.Ref{Seq: 3}, Leases: []keyspace.Lease{{Address: netip.MustParsePrefix("10.0.0.2/24")}}}}
	must(t, d.Prepare(h))
	if p := d.Prepared(a); p == nil || p.Value.Acquire != h.Value.Acquire || d.Holding(a) != nil {
		t.Fatalf("prepared: %+v, held: %+v", p, d.Holding(a))
	}
	must(t, d.Hold(a))
	if d.Prepared(a) != nil || d.Holding(a) == nil {
		t.Fatal("what was prepared is not held")
	}
	must(t, d.Enqueue(Queued{Attachment: a}))
	for _, aside := range []bool{false, true} {
		if aside {
			must(t, d.SetAside(a))
		}
		if all, err := d.Holdings(); err != nil || len(all) != 0 || d.Holding(a) != nil || !d.IsQueued(a) {
			t.Fatalf("set aside %v: %+v is held though its release waits (%v)", aside, all, err)
		}
	}
	must(t, d.Dequeue(a))
	if d.IsQueued(a) || d.Holding(a) == nil {
		t.Fatal("a settled release still stands over the holding")
	}
}

// TestSome: what is spoilt in the queue keeps nobody waiting, and is not lost.
func TestSome(t *testing.T) {
	d := open(t)
	for i := range 20 {
		must(t, d.Enqueue(Queued{Attachment: keyspace.AttachmentID{Node: "a", Network: "n", Container: string(rune('a' + i)), Interface: "eth0"}}))
	}
	for i := range 20 {
		must(t, os.WriteFile(d.file(filepath.Join("queue", "0"+string(rune('a'+i))+".json")), []byte("{"), 0o600))
	}
	seen := map[keyspace.AttachmentID]bool{}
	for range 20 {
		some, _ := d.Some(4)
		if len(some) > 4 {
			t.Fatalf("%d of at most 4", len(some))
		}
		for _, q := range some {
			seen[q.Attachment] = true
			must(t, d.SetAside(q.Attachment))
		}
	}
	if some, err := d.Some(4); len(some) > 0 || err != nil || len(seen) != 20 {
		t.Fatalf("%d of 20 were seen, %d are left (%v)", len(seen), len(some), err)
	}
	if q, err := d.Queue(); len(q) != 20 || err == nil {
		t.Fatalf("%d of 20 releases are left, and of those that cannot be read it says %v", len(q), err)
	}
}
