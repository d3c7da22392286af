package top

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/charmbracelet/x/ansi"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

var update = flag.Bool("update", false, "write the golden views anew")

var noon = time.Date(2026, 11, 20, 14, 3, 7, 0, time.UTC)

// fixture is a model made by hand, with fixed times and names.
type fixture struct {
	t    *testing.T
	keys keyspace.Keys
	m    *Model
	led  *Ledger
	rev  int64
	log  []Line
	last map[netip.Addr]entry.Ref
	asks []Ask
}

func newFixture(t *testing.T, o Options) *fixture {
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		t.Fatal(err)
	}
	o.Now = noon
	f := &fixture{t: t, keys: keys, m: New(o), led: newLedger(keys), rev: 100, last: map[netip.Addr]entry.Ref{}}
	f.put(keys.Meta(), keyspace.Meta{Version: 1, Cluster: "5f0c3a8e-7d1b-4296-8c5f-3a8e7d1b4296", EtcdCluster: "00000000000000aa", Epoch: 1, State: keyspace.Running})
	return f
}

func (f *fixture) change(key string, v any) Change {
	f.t.Helper()
	k, err := f.keys.Parse(key)
	if err != nil {
		f.t.Fatal(err)
	}
	f.rev++
	r := audit.Record{Key: key, Create: f.rev, Mod: f.rev, Version: 1}
	if v != nil {
		r.Value = keyspace.Encode(v)
	}
	return Change{k, r}
}

func (f *fixture) put(key string, v any) { f.led.Apply(f.change(key, v), noon) }

func (f *fixture) block(pool, prefix, node string) {
	f.put(f.keys.Block(keyspace.BlockID{Space: "default", Pool: pool, Prefix: netip.MustParsePrefix(prefix)}), keyspace.Block{Node: node})
}

func chainOf(node string) (c entry.ChainID) {
	for i := range c {
		c[i] = byte(0x11*i) ^ node[len(node)-1]
	}
	return c
}

// line makes an entry that says what happened, without a signature: the model
// does not judge entries, the feed does.
func (f *fixture) line(op entry.Op, ago time.Duration, pool, node, pod, ip string) Line {
	seq := uint64(len(f.log) + 2)
	addr := netip.MustParseAddr(ip)
	ref := entry.Ref{Chain: chainOf(node), Seq: seq, Hash: entry.HashOf([]byte(fmt.Sprint(node, seq)))}
	e := &entry.Entry{
		Chain: ref.Chain, Seq: seq, Time: noon.Add(-ago), Op: op, Space: "default", Pool: pool,
		Addresses: []entry.Address{{IP: addr}}, Node: node, Network: pool, Container: "c-" + pod, Interface: "eth0", Pod: "shop/" + pod,
	}
	if op == entry.Release {
		e.Acquire = f.last[addr]
	} else {
		e.Addresses[0].After = f.last[addr]
	}
	f.last[addr] = ref
	l := Line{Ref: ref, Commit: f.rev, Writer: entry.Writer{Kind: entry.KindNode, Name: node}, Entry: e, Stored: []byte("ipam-ledger/entry/v1\nop " + string(op) + "\npod \"shop/" + pod + "\"\n")}
	f.log = append(f.log, l)
	return l
}

// lease makes an address leased, with its entry and attachment.
func (f *fixture) lease(pool, node, pod, ip string, ago time.Duration) (Line, []Change) {
	l := f.line(entry.Acquire, ago, pool, node, pod, ip)
	id := keyspace.AttachmentID{Node: node, Network: pool, Container: "c-" + pod, Interface: "eth0"}
	addr := netip.MustParseAddr(ip)
	subnet, gateway := 24, netip.MustParseAddr("10.22.0.1")
	if pool != "prod" {
		subnet, gateway = 26, netip.MustParseAddr("10.40.0.1")
	}
	return l, []Change{
		f.change(f.keys.Address("default", addr), keyspace.Address{State: keyspace.Leased, Pool: pool, Holder: &id, Acquire: l.Ref}),
		f.change(f.keys.Attachment(id), keyspace.Attachment{
			Space: "default", Pool: pool, Leases: []keyspace.Lease{{Address: netip.PrefixFrom(addr, subnet), Gateway: gateway}},
			Acquire: l.Ref, Pod: "shop/" + pod, PodUID: "uid-" + pod,
		}),
		f.change(f.keys.Writer(l.Writer), keyspace.Writer{Chain: l.Ref.Chain, Seq: l.Ref.Seq, Hash: l.Ref.Hash, Epoch: 1}),
	}
}

func (f *fixture) free(pool, node, pod, ip string, ago, hold time.Duration) (Line, []Change) {
	l := f.line(entry.Release, ago, pool, node, pod, ip)
	a := keyspace.Address{State: keyspace.Free, Pool: pool, Release: l.Ref}
	if hold > 0 {
		a.Since, a.Cooldown = noon, int64(hold/time.Second)
	}
	return l, []Change{
		f.change(f.keys.Address("default", netip.MustParseAddr(ip)), a),
		f.change(f.keys.Attachment(keyspace.AttachmentID{Node: node, Network: pool, Container: "c-" + pod, Interface: "eth0"}), nil),
	}
}

func (f *fixture) apply(_ Line, cc []Change) {
	for _, c := range cc {
		f.led.Apply(c, noon)
	}
}

// typical is what the golden views show.
func typical(t *testing.T, o Options) *fixture {
	f := newFixture(t, o)
	f.block("prod", "10.22.0.0/27", "worker-1")
	f.block("prod", "10.22.0.32/27", "worker-2")
	f.block("prod", "10.22.0.64/27", "worker-3")
	f.block("edge", "10.40.0.0/28", "worker-3")
	for i := range 20 {
		f.apply(f.lease("prod", "worker-1", fmt.Sprintf("cart-%02d", i), fmt.Sprintf("10.22.0.%d", 2+i), time.Duration(290-4*i)*time.Second))
	}
	for i := range 31 {
		f.apply(f.lease("prod", "worker-2", fmt.Sprintf("web-%02d", i), fmt.Sprintf("10.22.0.%d", 32+i), time.Duration(200-5*i)*time.Second))
	}
	f.apply(f.lease("prod", "worker-2", "web-31", "10.22.0.64", 40*time.Second)) // borrowed
	for i := range 3 {
		f.apply(f.free("prod", "worker-1", fmt.Sprintf("cart-%02d", 5*i), fmt.Sprintf("10.22.0.%d", 2+5*i), time.Duration(30-i)*time.Second, time.Minute))
	}
	f.apply(f.free("prod", "worker-1", "cart-03", "10.22.0.5", 20*time.Second, 0))
	for i := range 5 {
		f.apply(f.lease("edge", "worker-3", fmt.Sprintf("proxy-%d", i), fmt.Sprintf("10.40.0.%d", 2+i), time.Duration(19-i)*time.Second))
	}
	f.led.Revision = 482
	f.send(Loaded{Ledger: f.led, Entries: f.log, At: noon})
	f.send(Found{})
	f.send(Verified{At: noon.Add(-3 * time.Minute), Report: &audit.Report{
		Snapshot: audit.Snapshot{EtcdCluster: "00000000000000aa", Revision: 450, Taken: noon.Add(-3 * time.Minute)},
		Entries:  61, Chains: 4, Writers: 4, Leased: 53, Free: 4, Attachments: 53, Blocks: 4, Signatures: 8,
	}})
	return f
}

func (f *fixture) send(ev Event) { f.asks = append(f.asks, f.m.Update(ev)...) }

// keysOf presses keys, by their names.
func (f *fixture) press(keys ...string) {
	for _, k := range keys {
		text := ""
		if len([]rune(k)) == 1 {
			text = k
		}
		f.send(Key{k, text})
	}
}

func (f *fixture) view(w, h int) string {
	f.t.Helper()
	f.send(Resized{w, h})
	raw := f.m.View(w, h)
	check(f.t, raw, w, h)
	lines := strings.Split(ansi.Strip(raw), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	return strings.Join(lines, "\n") + "\n"
}

// check holds View to its promise: height lines, none wider than width.
func check(t testing.TB, view string, w, h int) {
	t.Helper()
	lines := strings.Split(view, "\n")
	if len(lines) != h {
		t.Errorf("%d lines for a height of %d", len(lines), h)
	}
	for i, l := range lines {
		if n := ansi.StringWidth(l); n > w {
			t.Errorf("line %d is %d cells wide of %d: %q", i, n, w, ansi.Strip(l))
		}
	}
}

func (f *fixture) golden(name string, w, h int) {
	f.t.Helper()
	got := f.view(w, h)
	file := filepath.Join("testdata", fmt.Sprintf("%s-%dx%d.golden", name, w, h))
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			f.t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			f.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		f.t.Fatalf("%v; go test ./internal/top -update writes it", err)
	}
	if got != string(want) {
		f.t.Errorf("%s differs (go test ./internal/top -update writes it anew):\n%s\nwant:\n%s", file, got, want)
	}
}

func (f *fixture) sees(want ...string) {
	f.t.Helper()
	v := f.view(f.m.width, f.m.height)
	for _, w := range want {
		if !strings.Contains(v, w) {
			f.t.Errorf("%q is not on the screen:\n%s", w, v)
		}
	}
}

// answer gives the history that was asked for last, from the fixture's log.
func (f *fixture) answer() {
	f.t.Helper()
	ask, ok := f.asks[len(f.asks)-1].(AskHistory)
	if !ok {
		f.t.Fatalf("asked for %#v", f.asks[len(f.asks)-1])
	}
	h := History{Space: ask.Space, IP: ask.IP, Newest: ask.Newest}
	for ref := ask.Newest; !ref.IsZero(); {
		for _, l := range f.log {
			if l.Ref == ref {
				h.Lines = append(h.Lines, l)
				ref = l.before(ask.IP)
				break
			}
		}
	}
	f.send(h)
}

func TestGolden(t *testing.T) {
	for _, size := range [][2]int{{80, 24}, {200, 60}} {
		w, h := size[0], size[1]
		t.Run(fmt.Sprintf("%dx%d", w, h), func(t *testing.T) {
			f := typical(t, Options{Plain: true})
			f.send(Resized{w, h})
			f.golden("pools", w, h)
			f.press("2")
			f.golden("nodes", w, h)
			f.press("3")
			f.golden("log", w, h)
			f.press("4")
			f.golden("verify", w, h)
			f.press("?")
			f.golden("help", w, h)
			f.press("1", "down", "enter")
			f.golden("map", w, h)
			f.press("right", "right", "enter") // 10.22.0.5, which was released
			f.answer()
			f.golden("address", w, h)
			f.press("enter")
			f.golden("entry", w, h)
		})
	}
	f := typical(t, Options{Plain: true, ASCII: true})
	f.press("down", "enter")
	f.golden("ascii", 80, 24)
}

// TestBad: what is wrong cannot be overlooked.
func TestBad(t *testing.T) {
	f := typical(t, Options{Plain: true})
	f.send(Tick{noon.Add(5 * time.Second)})
	f.send(Lost{Since: noon, Cause: "127.0.0.1:2379: connection refused"})
	f.send(Tick{noon.Add(3 * time.Minute)})
	f.send(Lost{Since: noon.Add(time.Minute), Cause: "no answer within 3s"})
	f.send(Changes{
		Revision: 490, State: []Change{f.change(f.keys.Stop("worker-2"), keyspace.Stop{Node: "worker-2", Found: "revision 480 where 512 was seen", Time: noon})},
		Findings: []audit.Finding{{Code: audit.Rewritten, Where: "chains/node/worker-1/aa/0000000000000003", Revision: 489, Detail: "it was rewritten at revision 489"}},
	})
	f.golden("bad", 80, 24)
	f.press("4")
	f.golden("findings", 80, 24)
	// A verification of a later revision that finds nothing has seen it, too.
	f.send(Verified{At: noon.Add(4 * time.Minute), Report: &audit.Report{Snapshot: audit.Snapshot{Revision: 495}, FindingCount: 1, Findings: []audit.Finding{{Code: audit.HashMismatch, Where: "x"}}}})
	f.sees("NOT VERIFIED: 2 findings", "HASH-MISMATCH", "REWRITTEN")
	f.send(Verified{At: noon.Add(4 * time.Minute), Report: &audit.Report{Snapshot: audit.Snapshot{Revision: 495}}})
	f.sees("✓ verified 14:07:07")
	f.send(Verified{At: noon.Add(5 * time.Minute), Err: "etcd is gone"})
	f.sees("could not be verified", "could not be checked: etcd is gone")
	f.send(Found{})
	if v := f.view(80, 24); strings.Contains(v, "unreachable") || !strings.Contains(v, "STOPPED by node worker-2") {
		t.Errorf("etcd is back:\n%s", v)
	}
}

// TestCertificate: the one that ends first is said in time, and no sooner.
func TestCertificate(t *testing.T) {
	f := typical(t, Options{Plain: true})
	said := func() bool { return strings.Contains(f.view(80, 24), "certificate") }
	until := noon.Add(20 * 24 * time.Hour)
	f.send(Certificate{What: "client certificate", Until: until, Warn: until.Add(-14 * 24 * time.Hour)})
	if said() {
		t.Errorf("twenty days before its end:\n%s", f.view(80, 24))
	}
	f.send(Tick{until.Add(-5*24*time.Hour - time.Minute)})
	f.sees("the client certificate ends in 5 days, at " + until.Format(time.DateTime) + ": renew it")
	f.send(Tick{until.Add(-90 * time.Minute)})
	f.sees("the client certificate ends in 1 h")
	f.send(Tick{until.Add(time.Hour)})
	f.sees("the client certificate ended at 14:03:07 (60 min ago): renew it")
	f.send(Certificate{})
	if said() {
		t.Errorf("it is gone:\n%s", f.view(80, 24))
	}
}

// TestBegin: nothing is said before it is known.
func TestBegin(t *testing.T) {
	f := newFixture(t, Options{Plain: true, Verify: true, Pool: "prod"})
	f.send(Resized{80, 24})
	f.sees("etcd: connecting", "reading the ledger", "not verified yet")
	f.send(Lost{Since: noon, Cause: "/ipam-ledger/v1/meta is absent ('ledger init' makes one)", Answers: true})
	f.sees("no ledger", "etcd answers: /ipam-ledger/v1/meta is absent")
	f.send(Lost{Since: noon, Cause: "connection refused"})
	f.sees("etcd unreachable since 14:03:07 (now): connection refused", "nothing was read so far")
	f.press("1", "2", "3", "4", "?", "esc", "enter", "/", "x", "enter", "c", "tab", "n")
	f.press("1", "enter", "esc")
	f.m.pages = []page{{kind: pagePools}, {kind: pageMap, pool: PoolID{"", "prod"}}}
	f.asks = nil
	f.send(Loaded{Ledger: f.led, At: noon})
	if len(f.asks) != 1 || f.asks[0] != (AskVerify{}) {
		t.Errorf("asked for %v, want a verification", f.asks)
	}
	f.sees("verifying: 0 entries", "there is no pool prod in this ledger so far")
	f.press("v")
	if len(f.asks) != 1 {
		t.Error("asked for a second verification while one runs")
	}
	// The pool appears.
	l, cc := f.lease("prod", "worker-1", "a", "10.22.0.2", 0)
	f.send(Changes{Revision: 200, State: cc, Entries: []Line{l}})
	f.sees("1 leased", "not claimed")
}

// TestDrillDown: by keys from the pools to an address, its history and an
// entry, and back.
func TestDrillDown(t *testing.T) {
	f := typical(t, Options{Plain: true})
	f.send(Resized{80, 24})
	f.press("down", "enter")
	f.sees("› default/prod", "10.22.0.0/27", "▶ 10.22.0.3  leased by shop/cart-01 on worker-1")
	f.press("/")
	for _, r := range "web-31" {
		f.press(string(r))
	}
	f.press("enter")
	f.sees("/web-31", "▶ 10.22.0.64  leased by shop/web-31 on worker-2", "◆", "block 10.22.0.64/27 of worker-3")
	f.press("enter")
	f.sees("10.22.0.64  leased by shop/web-31", "borrowed", "reading ...")
	f.answer()
	f.sees("never held before", "40 s so far")
	// It is released and leased anew while somebody looks: the history follows.
	l, cc := f.free("prod", "worker-2", "web-31", "10.22.0.64", 0, 0)
	f.send(Changes{Revision: 500, State: cc, Entries: []Line{l}})
	l, cc = f.lease("prod", "worker-3", "web-99", "10.22.0.64", 0)
	f.send(Changes{Revision: 501, State: cc, Entries: []Line{l}})
	f.answer()
	f.sees("10.22.0.64  leased by shop/web-99 on worker-3", "release shop/web-31", "acquire shop/web-31", "40 s")
	f.press("down", "down", "enter")
	f.sees("ENTRY", "of node/worker-2", `pod "shop/web-31"`, "hash ")
	f.press("esc", "esc")
	f.sees("› default/prod", "/web-31")
	f.press("esc")
	if f.m.filter != "" || f.m.page().kind != pageMap {
		t.Error("esc drops the filter first")
	}
	f.press("esc")
	if f.m.page().kind != pagePools {
		t.Error("esc leads back")
	}
	// A node's blocks, and an entry of the log.
	f.press("2", "down", "enter")
	f.sees("› worker-2", "1 block,", "10.22.0.32/27")
	f.press("3", "up", "up", "enter")
	f.sees("ENTRY ", "pod \"shop/")
	f.asks = nil
	f.press("q")
	if len(f.asks) != 1 || f.asks[0] != (Quit{}) {
		t.Errorf("q asks for %v", f.asks)
	}
}

// TestMoves: no key leaves the map, wherever the cursor is, and every address
// can be reached.
func TestMoves(t *testing.T) {
	f := typical(t, Options{Plain: true})
	f.block("prod", "10.22.0.128/25", "worker-4")
	f.apply(f.lease("prod", "worker-1", "stray", "10.22.0.100", 0))
	f.press("down", "enter")
	p := f.m.page()
	seen := map[netip.Addr]bool{}
	f.press("g")
	for range 400 {
		seen[p.at.ip] = true
		f.press("right")
	}
	if len(seen) != 3*32+32+128 {
		t.Errorf("%d addresses were reached, want 256", len(seen))
	}
	moves := []string{"up", "down", "left", "right", "tab", "shift+tab", "pgup", "pgdown", "home", "end", "n", "N", "g", "G"}
	r := rand.New(rand.NewPCG(1, 2))
	for _, size := range [][2]int{{80, 24}, {40, 12}, {200, 60}, {70, 30}} {
		f.send(Resized{size[0], size[1]})
		for range 300 {
			k := moves[r.IntN(len(moves))]
			f.press(k)
			tiles := f.m.tiles(p)
			i, j := f.m.on(p, tiles)
			if at := (place{tiles[i].space, tiles[i].at(j)}); at != p.at {
				t.Fatalf("after %s the cursor is on %v, which is not on the map", k, p.at)
			}
			f.sees("▶ " + p.at.ip.String())
		}
	}
	// What goes down comes up again.
	f.send(Resized{80, 24})
	f.press("g", "right", "right")
	from := p.at
	f.press("down", "down", "down", "up", "up", "up")
	if p.at != from {
		t.Errorf("down and up lead from %v to %v", from.ip, p.at.ip)
	}
}

// TestSizes: View keeps to its size whatever that is, on every page, with texts
// that try to break out.
func TestSizes(t *testing.T) {
	f := typical(t, Options{})
	evil := "evil\x1b[2J\r\n\u202e" + strings.Repeat("long", 100)
	l, cc := f.lease("prod", "worker-1", "evil", "10.22.0.22", 0)
	l.Entry.Pod = evil
	l.Bad = evil
	id := keyspace.AttachmentID{Node: "worker-1", Network: "prod", Container: "c-evil", Interface: "eth0"}
	cc = append(cc, f.change(f.keys.Attachment(id), keyspace.Attachment{Space: "default", Pool: "prod", Pod: evil}))
	f.send(Changes{Revision: 500, State: cc, Entries: []Line{l}, Strange: []string{evil}, Findings: []audit.Finding{{Code: "X", Where: evil, Detail: evil, Want: evil}}})
	f.send(Lost{Since: noon, Cause: evil})
	f.send(Note{evil})
	for _, dark := range []bool{true, false} {
		f.send(Background{dark})
		for _, keys := range [][]string{{"1"}, {"2"}, {"3"}, {"4"}, {"?"}, {"1", "down", "enter"}, {"c", "/", "e", "v", "enter", "enter"}, {"enter"}, {"esc", "esc", "esc", "2", "enter"}, {"3", "end", "enter"}} {
			f.press(keys...)
			for w := 1; w < 220; w += 13 {
				for h := 1; h < 64; h += 7 {
					f.send(Resized{w, h})
					v := f.m.View(w, h)
					check(t, v, w, h)
					if s := ansi.Strip(v); strings.ContainsAny(s, "\x1b\r\u202e") {
						t.Fatalf("a text from the ledger is drawn as it is: %q", s)
					}
				}
			}
		}
	}
}

// TestCounts: what is shown of a random history is what a full read of its end
// shows.
func TestCounts(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	f := newFixture(t, Options{Plain: true})
	f.send(Loaded{Ledger: f.led, At: noon})
	state := map[string]Change{f.keys.Meta(): f.change(f.keys.Meta(), f.led.meta)}
	for range 2000 {
		var cc []Change
		ip := fmt.Sprintf("10.22.0.%d", r.IntN(120))
		node, pod := fmt.Sprintf("worker-%d", r.IntN(3)), fmt.Sprintf("p%d", r.IntN(40))
		pool := []string{"prod", "edge"}[r.IntN(2)]
		switch r.IntN(6) {
		case 0, 1, 2:
			_, cc = f.lease(pool, node, pod, ip, 0)
		case 3, 4:
			_, cc = f.free(pool, node, pod, ip, 0, time.Duration(r.IntN(2))*time.Hour)
		case 5:
			n := 5 + r.IntN(2)
			p := netip.PrefixFrom(netip.MustParseAddr(ip), 32-n).Masked()
			key := f.keys.Block(keyspace.BlockID{Space: "default", Pool: pool, Prefix: p})
			cc = []Change{f.change(key, nil)}
			if r.IntN(3) > 0 {
				cc = []Change{f.change(key, keyspace.Block{Node: node})}
			}
		}
		for _, c := range cc {
			if c.Record.Value == nil {
				delete(state, c.Record.Key)
			} else {
				state[c.Record.Key] = c
			}
		}
		f.send(Changes{Revision: f.rev, State: cc})
	}
	again := newLedger(f.keys)
	for _, key := range sorted(state) {
		again.Apply(state[key], noon)
	}
	again.settle(noon)
	f.led.settle(noon)
	for _, p := range again.sorted() {
		q := f.led.pools[p.id]
		if q == nil || p.leased != q.leased || p.members != q.members || len(p.stray) != len(q.stray) || len(p.blocks) != len(q.blocks) || len(p.held) != len(q.held) {
			t.Errorf("pool %v: followed %+v, read %+v", p.id, q, p)
		}
		if int(p.sum.Leased) != p.leased || int(p.sum.Held) != len(p.held) {
			t.Errorf("pool %v: %d leased, %d held, and the bar says %d, %d", p.id, p.leased, len(p.held), p.sum.Leased, p.sum.Held)
		}
	}
	for id, b := range again.blocks {
		if c := f.led.blocks[id]; c == nil || c.leased != b.leased || c.node != b.node {
			t.Errorf("block %v: followed %+v, read %+v", id, c, b)
		}
	}
	for name, n := range again.nodes {
		if m := f.led.nodes[name]; m == nil || m.leased != n.leased || m.attachments != n.attachments || m.blocks != n.blocks || m.filled != n.filled || m.room != n.room || m.near != n.near {
			t.Errorf("node %s: followed %+v, read %+v", name, m, n)
		}
	}
}

// TestSamples: sparklines go back as far as the entries do, and the change is
// that of the window.
func TestSamples(t *testing.T) {
	f := typical(t, Options{Plain: true})
	p := f.led.pools[PoolID{"default", "prod"}]
	if by, ok := p.samples.change(); !ok || by != 48 {
		t.Errorf("change %d, %v; want 48", by, ok)
	}
	for i := 1; i <= 400; i++ {
		f.send(Tick{noon.Add(time.Duration(i) * time.Second)})
	}
	if by, ok := p.samples.change(); !ok || by != 0 {
		t.Errorf("after five quiet minutes: change %d, %v; want 0", by, ok)
	}
	if n := len(p.samples.list); n != int(window/step)+1 {
		t.Errorf("%d samples are kept", n)
	}
	if got := f.m.sparkline([]int{0, 1, 2, 3, 4, 5, 6, 7}, 31); strings.TrimSpace(got) != "▁▂▃▄▅▆▇█" || width(got) != 31 {
		t.Errorf("sparkline %q", got)
	}
}

// TestNoColour: with NO_COLOR nothing is coloured, and what colour says is said
// by signs, too; without, each background has its own colours.
func TestNoColour(t *testing.T) {
	sequence := regexp.MustCompile("\x1b\\[([0-9;]*)m")
	draw := func(o Options, dark bool) map[string]bool {
		f := typical(t, o)
		f.send(Background{dark})
		f.send(Resized{80, 24})
		seen := map[string]bool{}
		for _, keys := range [][]string{{"1"}, {"2"}, {"3"}, {"1", "down", "enter"}, {"c"}} {
			f.press(keys...)
			for _, s := range sequence.FindAllStringSubmatch(f.m.View(80, 24), -1) {
				seen[s[1]] = true
			}
		}
		return seen
	}
	for s := range draw(Options{Plain: true}, true) {
		if s != "" && s != "1" && s != "7" {
			t.Errorf("NO_COLOR, and there is %q", s)
		}
	}
	d, l := draw(Options{}, true), draw(Options{}, false)
	if !d["38;5;114"] || l["38;5;114"] || !l["38;5;28"] || d["38;5;28"] {
		t.Errorf("dark %v, light %v", d, l)
	}
}
