package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/history"
)

var seed = flag.Uint64("seed", 0, "seed of the short campaign; 0: another one each time")

var programs string

func TestMain(m *testing.M) {
	etcdcluster.Main()
	dir, err := os.MkdirTemp("", "ipam-ledger-campaign-")
	if err == nil {
		programs, err = dir, build(context.Background(), dir)
	}
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// isEmpty checks that a campaign has cleaned up behind itself.
func isEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestShort is a campaign of some seconds, with a restore.
func TestShort(t *testing.T) {
	o := options{duration: 6 * time.Second, round: 4 * time.Second, seed: *seed, nodes: 5, pause: 400 * time.Millisecond, drills: true, dir: t.TempDir(), programs: programs, log: t.Output()}
	if os.Getenv("IPAM_LEDGER_FULL") == "1" {
		o.duration, o.round, o.nodes = 5*time.Minute, time.Minute, 20
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", o.seed)
	r, err := run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	r.write(&b)
	t.Log(b.String())
	if len(r.findings) > 0 {
		journal, _ := os.ReadFile(r.kept + "/journal")
		t.Fatalf("%d findings; the journal ends:\n%s", len(r.findings), journal[max(0, len(journal)-8192):])
	}
	c := r.c
	for _, verb := range []string{"ADD", "DEL"} {
		if c.counts.all[verb]["ok"] == 0 {
			t.Errorf("no %s succeeded: %v", verb, c.counts.all)
		}
	}
	if c.window.checked < 2 || c.window.ops == 0 || c.window.verified == 0 || r.acquires == 0 || c.faults.total() < 3 {
		t.Errorf("too little was done: %+v", c.window)
	}
	if len(c.faults.all["restore of the cluster, and the drill"]) == 0 {
		t.Error("the cluster was not restored")
	}
	isEmpty(t, o.dir)
}

// TestMistakes: each thing that operators do wrong, or that damages a key, once,
// under load, and both that only a drill has.
func TestMistakes(t *testing.T) {
	var want []kind
	for _, h := range hands {
		for _, k := range h.kinds {
			if h.name == "mistake" || strings.Contains(k.name, "living") || strings.HasPrefix(k.name, "head ") || strings.HasPrefix(k.name, "NOSPACE") {
				want = append(want, k)
			}
		}
	}
	o := options{duration: time.Second, round: time.Minute, seed: *seed, nodes: 3, pause: time.Minute, only: []string{"none"}, dir: t.TempDir(), programs: programs, log: t.Output()}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	t.Logf("repeat with -seed %d", o.seed)
	o.onLoad = func(c *campaign) {
		c.calm.RLock()
		defer c.calm.RUnlock()
		for _, k := range want {
			if len(c.findings) == 0 {
				c.fault(t.Context(), k.name, func() error { return k.do(c, t.Context(), c.random(k.name)) })
			}
		}
	}
	r, err := run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.findings) > 0 {
		journal, _ := os.ReadFile(r.kept + "/journal")
		t.Fatalf("%d findings; the journal ends:\n%s", len(r.findings), journal[max(0, len(journal)-8192):])
	}
	var b strings.Builder
	r.write(&b)
	for _, k := range want {
		if len(r.c.faults.all[k.name]) != 1 || !strings.Contains(b.String(), k.name) {
			t.Errorf("%s: %d times, or not in the report", k.name, len(r.c.faults.all[k.name]))
		}
	}
	if len(want) < 10 || r.c.full.answered.Load() == 0 || r.c.window.checked == 0 {
		t.Errorf("%d kinds, %d writes answered NOSPACE, %d windows checked", len(want), r.c.full.answered.Load(), r.c.window.checked)
	}
	isEmpty(t, o.dir)
}

// TestInterrupted: what was started is gone when a campaign is interrupted.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	out := &started{cancel: cancel}
	o := options{duration: time.Minute, round: time.Minute, seed: 1, nodes: 2, pause: 100 * time.Millisecond, dir: t.TempDir(), programs: programs, log: t.Output(), onLoad: out.loaded}
	r, err := run(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if r.interrupted == nil || len(r.findings) > 0 || r.took > 50*time.Second {
		t.Errorf("interrupted: %v, after %v, findings: %v", r.interrupted, r.took, r.findings)
	}
	if len(out.pids) != 3 {
		t.Fatalf("members %v, want three", out.pids)
	}
	for _, pid := range out.pids {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is left: %v", pid, err)
		}
	}
	isEmpty(t, o.dir)
}

// started interrupts a campaign that has begun.
type started struct {
	cancel func()
	pids   []int
}

func (s *started) loaded(c *campaign) {
	for i := range c.cluster.Members() {
		s.pids = append(s.pids, c.cluster.Pid(i))
	}
	s.cancel()
}

// bare is a campaign without anything that runs.
func bare() *campaign {
	c := &campaign{options: options{log: io.Discard}, book: newBook(), start: time.Now(), journal: &bytes.Buffer{}, end: func(error) {}}
	c.frozen.since = -1
	return c
}

// TestNotices: each thing that must not be is a finding.
func TestNotices(t *testing.T) {
	m := &machine{name: "n00"}
	v4, v6, other := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("10.1.0.3")
	has := func() *leased {
		return &leased{leased: map[netip.Addr]string{v4: "a", v6: "a"}, attached: map[string][]netip.Addr{"a": {v4, v6}}}
	}
	for name, spoil := range map[string]func(c *campaign, p *pod) *leased{
		"":                 func(*campaign, *pod) *leased { return has() },
		"a lost lease":     func(*campaign, *pod) *leased { l := has(); delete(l.leased, v4); return l },
		"a lost pod":       func(*campaign, *pod) *leased { return &leased{} },
		"another's lease":  func(*campaign, *pod) *leased { l := has(); l.leased[v4] = "b"; return l },
		"another address":  func(*campaign, *pod) *leased { l := has(); l.attached["a"] = []netip.Addr{other, v6}; return l },
		"a leak":           func(c *campaign, p *pod) *leased { c.book.doubt(p, 1, gone); return has() },
		"an unknown lease": func(*campaign, *pod) *leased { l := has(); l.leased[other] = "b"; return l },
		"an unknown pod":   func(*campaign, *pod) *leased { l := has(); l.attached["b"] = nil; return l },
		"a stop":           func(*campaign, *pod) *leased { l := has(); l.stops = 1; return l },
		"told twice": func(c *campaign, _ *pod) *leased {
			c.machines = nil
			q := c.book.add(m, "b", "b", "b")
			m.c = c
			m.answered(q, &reply{ips: []netip.Addr{v4, v6}}, nil)
			delete(c.book.pods, "b")
			return has()
		},
		"told otherwise": func(c *campaign, p *pod) *leased {
			m.c = c
			m.answered(p, &reply{ips: []netip.Addr{v4, v6}}, []netip.Addr{other, v6})
			return has()
		},
		"told while frozen": func(c *campaign, _ *pod) *leased {
			m.c = c
			c.frozen.since = 1
			q := c.book.add(m, "b", "b", "b")
			q.begun = 2
			m.answered(q, &reply{ips: []netip.Addr{other}}, nil)
			c.book.doubt(q, 3, gone)
			return has()
		},
		"a DEL that failed": func(c *campaign, _ *pod) *leased {
			defer c.excuse("etcd is away", nil, codeTryAgain)()
			c.judge("DEL", m, &reply{exit: 1, code: codeTryAgain, began: c.now(), ended: c.now()})
			return has()
		},
		"a code for no reason": func(c *campaign, _ *pod) *leased {
			defer c.excuse("etcd is away", nil, codeTryAgain)()
			c.judge("ADD", m, &reply{exit: 1, code: codeIntegrity, began: c.now(), ended: c.now()})
			return has()
		},
		"a STATUS that knows of the cluster": func(c *campaign, _ *pod) *leased {
			defer c.excuseVerbs("frozen", nil, []string{"ADD"}, codeIntegrity)()
			c.judge("STATUS", m, &reply{exit: 1, code: codeIntegrity, began: c.now(), ended: c.now()})
			return has()
		},
	} {
		c := bare()
		p := c.book.add(m, "a", "a", "a")
		c.book.tell(p, &reply{ips: []netip.Addr{v4, v6}})
		c.compare(spoil(c, p))
		if got := len(c.findings) > 0; got == (name == "") {
			t.Errorf("%s: findings %q", name, c.findings)
		}
	}
	c := bare()
	over := c.excuse("etcd is away", nil, codeTryAgain)
	c.judge("ADD", m, &reply{exit: 1, code: codeTryAgain, began: c.now(), ended: c.now()})
	over()
	if len(c.findings) > 0 || len(c.excuses.all) != 1 || c.excuses.all[0].to == notOver {
		t.Errorf("an ADD that etcd's absence explains: %q", c.findings)
	}
	if err := history.Check(1, []history.Operation{{Who: 1, Return: 1}, {Who: 2, Call: 2, Return: 3}}, time.Minute); err == nil {
		t.Error("two acquires of one address are a history")
	}
}
