package allocator

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"
	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// answer plays the store for the planner: it reads what is needed from maps.
func answer(t *rapid.T, q *question, addrs map[netip.Addr]*knownAddress, blocks map[netip.Prefix]knownBlock) ([]choice, int, error) {
	k := newKnown()
	for reads := 0; ; reads++ {
		if reads > 500 {
			t.Fatalf("the planner does not come to an end")
		}
		choices, n, err := plan(q, k)
		if n == nil || err != nil {
			return choices, reads, err
		}
		for _, p := range n.blocks {
			k.blocks[p] = blocks[p]
		}
		if n.allBlocks {
			for p, b := range blocks {
				k.blocks[p] = b
			}
			k.allBlocks = true
		}
		for _, r := range n.addrs {
			to, count := r.To(), int64(0)
			var in []netip.Addr
			for ip := range addrs {
				if r.Contains(ip) {
					in = append(in, ip)
				}
			}
			sortAddrs(in)
			for _, ip := range in {
				if count++; n.limit > 0 && count > n.limit {
					to = ip.Prev()
					break
				}
				k.addrs[ip] = addrs[ip]
			}
			k.covered = append(k.covered, netipx.IPRangeFrom(r.From(), to))
		}
	}
}

func modOf(a *knownAddress) int64 {
	if a == nil {
		return 0
	}
	return a.mod
}

func sortAddrs(a []netip.Addr) {
	for i := range a {
		for j := i; j > 0 && a[j].Less(a[j-1]); j-- {
			a[j], a[j-1] = a[j-1], a[j]
		}
	}
}

// TestPlan: whatever is leased, held and claimed, the planner's choice is free,
// in a range, not excluded, and of the first kind that has one; and it says
// "exhausted" only if nothing is free for this node.
func TestPlan(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		subnet := netip.MustParsePrefix(rapid.SampledFrom([]string{"10.1.0.0/28", "10.1.0.0/27", "fd00::/123"}).Draw(t, "subnet"))
		strict := rapid.Bool().Draw(t, "strict")
		size := rapid.SampledFrom([]int{1, 2, 4, 8}).Draw(t, "blockSize")
		var b netipx.IPSetBuilder
		all := netipx.RangeOfPrefix(subnet)
		for ip := all.From(); all.Contains(ip); ip = ip.Next() {
			if rapid.IntRange(0, 9).Draw(t, "exclude") == 0 {
				b.Add(ip)
			}
		}
		exclude, _ := b.IPSet()
		pool, err := NewPool("default", "p", rangeSets(subnet.String()), exclude, strict, size, 0)
		if err != nil {
			return // all is excluded
		}
		set := &pool.Sets[0]
		now := time.Unix(1_000_000, 0)
		addrs, blocks := map[netip.Addr]*knownAddress{}, map[netip.Prefix]knownBlock{}
		free := map[netip.Addr]bool{}
		for ip := all.From(); all.Contains(ip); ip = ip.Next() {
			usable := set.segmentOf(ip) != nil
			if p := netip.PrefixFrom(ip, set.segments[0].bits).Masked(); p.Addr() == ip {
				if node := rapid.SampledFrom([]string{"", "me", "you"}).Draw(t, "claim"); node != "" {
					blocks[p] = knownBlock{node, 7}
				}
			}
			switch rapid.IntRange(0, 3).Draw(t, "state") {
			case 0:
				free[ip] = usable
			case 1:
				// Long ago, or by a clock that was years off, in either direction.
				since := now.Add(rapid.SampledFrom([]time.Duration{-time.Minute, time.Minute, -time.Hour, 1e4 * time.Hour, -1e6 * time.Hour}).Draw(t, "since"))
				addrs[ip] = &knownAddress{value: keyspace.Address{State: keyspace.Free, Since: since, Cooldown: 60}, mod: int64(rapid.IntRange(1, 50).Draw(t, "mod"))}
				free[ip] = usable
			case 2:
				// Within the cooldown of its release, or of one by a clock that was ahead.
				since := now.Add(time.Duration(rapid.IntRange(-59, 59).Draw(t, "since")) * time.Second)
				addrs[ip] = &knownAddress{value: keyspace.Address{State: keyspace.Free, Since: since, Cooldown: 60}, mod: 3}
			case 3:
				addrs[ip] = &knownAddress{value: keyspace.Address{State: keyspace.Leased, Holder: &keyspace.AttachmentID{}}, mod: 3}
			}
		}
		q := &question{pool: pool, node: "me", now: now, lost: rapid.IntRange(0, 3).Draw(t, "lost"), random: rapid.Uint64().Draw(t, "random")}
		if rapid.Bool().Draw(t, "hint") {
			q.hints = append(q.hints, netip.PrefixFrom(all.From(), set.segments[0].bits).Masked())
		}
		choices, _, err := answer(t, q, addrs, blocks)

		rank := func(ip netip.Addr) int {
			switch blocks[set.segmentOf(ip).blockOf(ip)].node {
			case "me":
				return 0
			case "":
				return 1
			}
			return 2
		}
		best := 3
		for ip, ok := range free {
			if ok {
				best = min(best, rank(ip))
			}
		}
		if strict && best == 2 {
			best = 3
		}
		if best == 3 {
			if !errors.Is(err, ErrExhausted) {
				t.Fatalf("nothing is free, and the answer is %v, %v", choices, err)
			}
			return
		}
		if err != nil {
			t.Fatalf("%d addresses are free, and the answer is %v", len(free), err)
		}
		c := choices[0]
		if !free[c.ip] || rank(c.ip) != best || c.mod != modOf(addrs[c.ip]) || c.claim != (best == 1) || (c.own != 0) != (best == 0) {
			t.Fatalf("chose %+v, which is free: %v, of kind %d, where kind %d has one", c, free[c.ip], rank(c.ip), best)
		}
	})
}

// TestHugeRange: nothing is linear in the size of an IPv6 range.
func TestHugeRange(t *testing.T) {
	for _, subnet := range []string{"fd00::/64", "fd00::/8", "2001:db8::/32"} {
		p := mustPool(t, subnet)
		blocks := map[netip.Prefix]knownBlock{}
		next := p.Sets[0].segments[0].From()
		for range 1000 { // the first thousand blocks are somebody's
			b := p.Sets[0].segments[0].blockOf(next)
			blocks[b] = knownBlock{"you", 1}
			next = netipx.PrefixLastIP(b).Next()
		}
		rapid.Check(t, func(rt *rapid.T) {
			choices, reads, err := answer(rt, &question{pool: p, node: "me"}, nil, blocks)
			if err != nil || choices[0].ip != next || reads > 3 {
				rt.Fatalf("%s: %v, %v after %d reads, want %v", subnet, choices, err, reads, next)
			}
		})
		if p.Sets[0].Size() < 1<<63 {
			t.Errorf("%s: size %d", subnet, p.Sets[0].Size())
		}
	}
}

// TestGatewayOfAnother: the gateway of one range set is handed out from no other.
func TestGatewayOfAnother(t *testing.T) {
	ip := netip.MustParseAddr
	p, err := NewPool("default", "net", [][]keyspace.Range{
		{{Subnet: netip.MustParsePrefix("10.0.0.0/8"), Start: ip("10.1.0.1"), End: ip("10.1.0.10"), Gateway: ip("10.0.0.1")}},
		{{Subnet: netip.MustParsePrefix("10.1.0.0/16"), Start: ip("10.1.0.20"), End: ip("10.1.0.30"), Gateway: ip("10.1.0.1")}},
	}, nil, false, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	got, err := w.nodes[0].add(p, "c1")
	wantAddrs(t, got, err, "10.1.0.2", "10.1.0.20")
}

func TestBlockBits(t *testing.T) {
	for _, c := range []struct {
		subnet string
		size   int
		want   int
	}{
		{"10.0.0.0/8", 0, 26},
		{"10.22.0.0/16", 0, 26},
		{"10.22.0.0/22", 0, 26},
		{"10.22.0.0/23", 0, 27},
		{"10.22.0.0/24", 0, 28},
		{"10.22.0.0/28", 0, 30},
		{"10.22.0.0/30", 0, 30},
		{"10.22.0.0/30", 1024, 30},
		{"10.22.0.0/16", 256, 24},
		{"10.22.0.0/16", 1, 32},
		{"fd00::/64", 0, 122},
		{"fd00::/126", 0, 126},
	} {
		if got := blockBits(netip.MustParsePrefix(c.subnet), c.size); got != c.want {
			t.Errorf("blockBits(%s, %d) = %d, want %d", c.subnet, c.size, got, c.want)
		}
	}
}

// TestExhaustedSaysWhy: an admin reads this at night.
func TestExhaustedSaysWhy(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	var b netipx.IPSetBuilder
	b.Add(netip.MustParseAddr("10.22.0.5"))
	exclude, _ := b.IPSet()
	p, err := NewPool("default", "net", rangeSets("10.22.0.0/29"), exclude, false, 0, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	n := w.nodes[0]
	for i := range 4 {
		if _, err := n.add(p, fmt.Sprint("c", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.del("c3"); err != nil {
		t.Fatal(err)
	}
	_, err = n.add(p, "c9")
	if !errors.Is(err, ErrExhausted) || !strings.Contains(err.Error(), "pool net (10.22.0.1-10.22.0.6): 4 addresses, 3 leased, 1 cooling, 2 excluded") {
		t.Fatalf("got %v", err)
	}
	w.clock = w.clock.Add(2 * time.Hour)
	got, err := n.add(p, "c9")
	wantAddrs(t, got, err, "10.22.0.6")
}

// TestGoingRound: a released address is reused last.
func TestGoingRound(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	p, err := NewPool("default", "net", rangeSets("10.22.0.0/28"), nil, false, 16, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := w.nodes[0]
	var last netip.Addr
	for i := range 40 {
		c := fmt.Sprint("c", i)
		got, err := n.add(p, c)
		if err != nil {
			t.Fatal(err)
		}
		want := netip.MustParseAddr("10.22.0.2")
		if last.IsValid() && last != netip.MustParseAddr("10.22.0.14") {
			want = last.Next()
		}
		if got[0] != want {
			t.Fatalf("turn %d: got %v after %v, want %v", i, got[0], last, want)
		}
		last = got[0]
		if err := n.del(c); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostile: what nobody should have put into etcd is not handed out, not
// overwritten, and named.
func TestHostile(t *testing.T) {
	for name, value := range map[string]string{
		"truncated": `{"state":"fr`, "unknown field": `{"state":"free","x":1}`, "free without release": `{"state":"free","pool":"net"}`,
		"no state": `{}`, "huge": `{"state":"` + strings.Repeat("x", 1<<20) + `"}`, "not JSON": "\x00\xff", "empty": "",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1)
			w.init(t)
			p := mustPool(t, "10.22.0.0/24")
			key := testKeys.Address("default", netip.MustParseAddr("10.22.0.2"))
			w.store.apply(Txn{Then: []Write{{Key: key, Value: []byte(value)}}})
			got, err := w.nodes[0].add(p, "c1")
			wantAddrs(t, got, err, "10.22.0.3")
			if _, err := w.nodes[0].add(p, "c2", netip.MustParseAddr("10.22.0.2")); !errors.Is(err, ErrNotAvailable) {
				t.Fatalf("got %v", err)
			}
			if string(w.store.now().keys[key].value) != value {
				t.Error("it was overwritten")
			}
		})
	}
}
