package publish

import (
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

var (
	keys, _ = keyspace.New(keyspace.DefaultPrefix)
	noon    = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	someRef = entry.Ref{Chain: entry.ChainID{1}, Seq: 7, Hash: entry.Hash{2}}
)

func put(m *Model, at time.Time, key string, v any) {
	m.Put(audit.Record{Key: key, Value: keyspace.Encode(v)}, at)
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func lease(m *Model, at time.Time, pool, address, gateway string) {
	p := netip.MustParsePrefix(address)
	id := keyspace.AttachmentID{Node: "n1", Network: pool, Container: "c" + p.Addr().String(), Interface: "eth0"}
	put(m, at, keys.Address("default", p.Addr()), keyspace.Address{State: keyspace.Leased, Pool: pool, Holder: &id, Acquire: someRef})
	put(m, at, keys.Attachment(id), keyspace.Attachment{
		Space: "default", Pool: pool, Leases: []keyspace.Lease{{Address: p, Gateway: ip(gateway)}}, Acquire: someRef,
	})
}

func free(m *Model, at time.Time, pool, address string, held time.Duration) {
	v := keyspace.Address{State: keyspace.Free, Pool: pool, Release: someRef}
	if held > 0 {
		v.Since, v.Cooldown = at, int64(held/time.Second)
	}
	put(m, at, keys.Address("default", ip(address)), v)
	m.Delete(keys.Attachment(keyspace.AttachmentID{Node: "n1", Network: pool, Container: "c" + address, Interface: "eth0"}), at)
}

func claimed(m *Model, at time.Time, pool, prefix, node string) {
	put(m, at, keys.Block(keyspace.BlockID{Space: "default", Pool: pool, Prefix: netip.MustParsePrefix(prefix)}), keyspace.Block{Node: node, Claim: someRef})
}

func filled(m *Model, now time.Time) *state.State {
	s := new(state.State)
	m.Fill(s, now)
	return s
}

func onePool(t *testing.T, m *Model, now time.Time) state.Pool {
	t.Helper()
	s := filled(m, now)
	if len(s.Pools) != 1 {
		t.Fatalf("pools: %+v", s.Pools)
	}
	return s.Pools[0]
}

// TestInlineCapacity: an inline pool is as large as its leases and blocks show.
func TestInlineCapacity(t *testing.T) {
	m := NewModel(keys)
	want := func(c uint64) {
		t.Helper()
		if p := onePool(t, m, noon); p.Capacity != c {
			t.Errorf("capacity %d, want %d", p.Capacity, c)
		}
	}
	claimed(m, noon, "prod", "10.22.0.0/26", "n1")
	want(64)
	lease(m, noon, "prod", "10.22.0.2/24", "10.22.0.1")
	want(253) // no network, broadcast, gateway
	lease(m, noon, "prod", "10.22.0.3/24", "10.22.0.1")
	want(253)
	lease(m, noon, "prod", "10.22.4.3/24", "10.22.4.1") // another node's subnet
	want(506)
	claimed(m, noon, "prod", "10.99.0.0/26", "n2") // claimed outside of what leases show
	want(570)
	for _, a := range []string{"10.22.0.2", "10.22.0.3", "10.22.4.3"} {
		free(m, noon, "prod", a, 0)
	}
	want(128)
}

// TestNamedCapacity: a named pool is as large as its spec, used or not.
func TestNamedCapacity(t *testing.T) {
	m := NewModel(keys)
	spec := keyspace.Pool{
		Ranges: [][]keyspace.Range{{{
			Subnet: netip.MustParsePrefix("10.1.0.0/24"), Start: ip("10.1.0.0"), End: ip("10.1.0.255"), Gateway: ip("10.1.0.1"),
		}}},
		Exclude: []string{"10.1.0.10-10.1.0.19"},
	}
	put(m, noon, keys.Pool("named"), spec)
	if p := onePool(t, m, noon); p.Capacity != 243 || p.Name != "named" || p.Space != "default" {
		t.Errorf("%+v", p)
	}
	spec.Space = "red"
	put(m, noon, keys.Pool("named"), spec)
	if p := onePool(t, m, noon); p.Space != "red" {
		t.Errorf("%+v", p)
	}
	// Of both families the fuller is shown; v6's plenty does not hide v4.
	spec.Space, spec.Exclude = "", nil
	spec.Ranges = append(spec.Ranges, []keyspace.Range{{Subnet: netip.MustParsePrefix("fd00::/48"), Start: ip("fd00::1"), End: ip("fd00:0:0:ffff:ffff:ffff:ffff:ffff")}})
	put(m, noon, keys.Pool("named"), spec)
	lease(m, noon, "named", "10.1.0.2/24", "10.1.0.1")
	lease(m, noon, "named", "fd00::2/48", "fd00::1")
	lease(m, noon, "named", "fd00::3/48", "fd00::1")
	if p := onePool(t, m, noon); p.Capacity != 253 || p.Leased != 1 {
		t.Errorf("%+v", p)
	}
	spec.Ranges = spec.Ranges[1:]
	put(m, noon, keys.Pool("named"), spec)
	free(m, noon, "named", "10.1.0.2", 0)
	if p := onePool(t, m, noon); p.Capacity != math.MaxUint64 || p.Leased != 2 || p.Percent() != 0 {
		t.Errorf("%+v", p)
	}
	m.Delete(keys.Pool("named"), noon)
	free(m, noon, "named", "fd00::2", 0)
	free(m, noon, "named", "fd00::3", 0)
	if s := filled(m, noon); len(s.Pools) != 0 {
		t.Errorf("%+v", s.Pools)
	}
}

// TestHeld: an address is held until its time, which no event tells.
func TestHeld(t *testing.T) {
	m := NewModel(keys)
	lease(m, noon, "prod", "10.22.0.2/24", "10.22.0.1")
	lease(m, noon, "prod", "10.22.0.3/24", "10.22.0.1")
	free(m, noon, "prod", "10.22.0.3", 90*time.Second)
	if p := onePool(t, m, noon.Add(89*time.Second)); p.Leased != 1 || p.Held != 1 {
		t.Errorf("%+v", p)
	}
	if next := m.NextChange(); !next.Equal(noon.Add(90 * time.Second)) {
		t.Errorf("next change %v", next)
	}
	if p := onePool(t, m, noon.Add(90*time.Second)); p.Leased != 1 || p.Held != 0 {
		t.Errorf("%+v", p)
	}
	if next := m.NextChange(); !next.IsZero() {
		t.Errorf("next change %v", next)
	}
}

// TestTrend: the change of the last five minutes, also across a full read.
func TestTrend(t *testing.T) {
	m := NewModel(keys)
	for i := range 10 {
		lease(m, noon, "prod", fmt.Sprintf("10.22.0.%d/24", 10+i), "10.22.0.1")
	}
	m.Loaded(noon, nil)
	want := func(after time.Duration, n int64) {
		t.Helper()
		if p := onePool(t, m, noon.Add(after)); p.Trend != n {
			t.Errorf("after %s: trend %d, want %d", after, p.Trend, n)
		}
	}
	want(time.Second, 0)
	for i := range 5 {
		lease(m, noon.Add(time.Minute), "prod", fmt.Sprintf("10.22.0.%d/24", 30+i), "10.22.0.1")
	}
	want(time.Minute, 5)
	free(m, noon.Add(2*time.Minute), "prod", "10.22.0.10", 0)
	want(2*time.Minute, 4)
	want(5*time.Minute, 4)
	want(6*time.Minute+step, -1)
	want(7*time.Minute+step, 0)

	again := NewModel(keys)
	for i := range 20 {
		lease(again, noon, "prod", fmt.Sprintf("10.22.0.%d/24", 10+i), "10.22.0.1")
	}
	again.Loaded(noon.Add(3*time.Minute), m)
	m = again
	want(3*time.Minute, 10)
	want(9*time.Minute, 0)
	// A pool that was not there before came from nothing.
	lease(m, noon.Add(9*time.Minute), "late", "10.44.0.2/24", "10.44.0.1")
	for _, p := range filled(m, noon.Add(9*time.Minute)).Pools {
		if want := map[string]int64{"late": 1}[p.Name]; p.Trend != want {
			t.Errorf("%+v, want trend %d", p, want)
		}
	}
}

// TestNear: a node is near exhaustion when all its blocks are.
func TestNear(t *testing.T) {
	m := NewModel(keys)
	put(m, noon, keys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n1"}), keyspace.Writer{})
	put(m, noon, keys.Writer(entry.Writer{Kind: entry.KindOperator, Name: "alice"}), keyspace.Writer{})
	claimed(m, noon, "prod", "10.22.0.0/28", "n1")
	claimed(m, noon, "prod", "10.22.0.16/28", "n2")
	for i := range 11 {
		lease(m, noon, "prod", fmt.Sprintf("10.22.0.%d/24", 2+i), "10.22.0.1")
	}
	check := func(near int) {
		t.Helper()
		if s := filled(m, noon); s.Nodes != 2 || s.Near != near {
			t.Errorf("%d of %d nodes near, want %d", s.Near, s.Nodes, near)
		}
	}
	check(0) // 11 of the 14 that may be handed out
	lease(m, noon, "prod", "10.22.0.13/24", "10.22.0.1")
	lease(m, noon, "prod", "10.22.0.14/24", "10.22.0.1")
	check(1)
	claimed(m, noon, "prod", "10.22.0.32/28", "n1")
	check(0)
}

func TestLedgerState(t *testing.T) {
	m := NewModel(keys)
	if s := filled(m, noon); s.Ledger != "" || s.Epoch != 0 {
		t.Errorf("%+v", s)
	}
	meta := keyspace.Meta{Version: keyspace.FormatVersion, Cluster: "c", EtcdCluster: "00000000000000aa", Epoch: 3, State: keyspace.Running}
	put(m, noon, keys.Meta(), meta)
	if s := filled(m, noon); s.Ledger != state.LedgerRunning || s.Epoch != 3 {
		t.Errorf("%+v", s)
	}
	meta.State = keyspace.Frozen
	put(m, noon, keys.Meta(), meta)
	if s := filled(m, noon); s.Ledger != state.LedgerFrozen {
		t.Errorf("%+v", s)
	}
	m.Put(audit.Record{Key: keys.Stop("n1"), Value: []byte("not JSON")}, noon)
	if s := filled(m, noon); s.Ledger != state.LedgerStopped {
		t.Errorf("%+v", s)
	}
	m.Delete(keys.Stop("n1"), noon)
	m.Delete(keys.Meta(), noon)
	if s := filled(m, noon); s.Ledger != "" {
		t.Errorf("%+v", s)
	}
}

// TestHistoryLeavesNoTrace: however the keys came to be what they are, the
// counts are those of a model that reads them once.
func TestHistoryLeavesNoTrace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m, live, now := NewModel(keys), map[string]any{}, noon
		pools := []string{"a", "b"}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(0, 4000).Draw(t, "ms")) * time.Millisecond)
			pool := rapid.SampledFrom(pools).Draw(t, "pool")
			o := rapid.IntRange(0, 40).Draw(t, "host")
			addr := netip.AddrFrom4([4]byte{10, 0, byte(o / 20), byte(o)})
			if rapid.Bool().Draw(t, "six") {
				addr = netip.AddrFrom16([16]byte{0xfd, 15: byte(o)})
			}
			key, v := "", any(nil)
			switch rapid.IntRange(0, 4).Draw(t, "what") {
			case 0, 1:
				key = keys.Address(rapid.SampledFrom([]string{"default", "red"}).Draw(t, "space"), addr)
				switch rapid.IntRange(0, 3).Draw(t, "state") {
				case 0:
					v = keyspace.Address{State: keyspace.Leased, Pool: pool, Holder: &keyspace.AttachmentID{Node: "n"}, Acquire: someRef}
				case 1:
					since := now.Add(-time.Duration(rapid.IntRange(0, 65).Draw(t, "ago")) * time.Second)
					v = keyspace.Address{State: keyspace.Free, Pool: pool, Release: someRef, Since: since, Cooldown: 60}
				case 2:
					v = keyspace.Address{State: keyspace.Free, Pool: pool, Release: someRef}
				}
			case 2:
				key = keys.Attachment(keyspace.AttachmentID{Node: "n", Network: pool, Container: fmt.Sprint(o), Interface: "eth0"})
				if rapid.Bool().Draw(t, "there") {
					v = keyspace.Attachment{Space: "default", Pool: pool, Acquire: someRef, Leases: []keyspace.Lease{{
						Address: netip.PrefixFrom(addr, rapid.IntRange(16, 30).Draw(t, "bits")), Gateway: addr,
					}}}
				}
			case 3:
				p := netip.PrefixFrom(addr, addr.BitLen()-rapid.IntRange(2, 5).Draw(t, "block")).Masked()
				key = keys.Block(keyspace.BlockID{Space: "default", Pool: pool, Prefix: p})
				if rapid.Bool().Draw(t, "there") {
					v = keyspace.Block{Node: rapid.SampledFrom([]string{"n", "o"}).Draw(t, "node"), Claim: someRef}
				}
			case 4:
				key = keys.Pool(pool)
				if rapid.Bool().Draw(t, "there") {
					v = keyspace.Pool{Space: rapid.SampledFrom([]string{"", "red"}).Draw(t, "space"), Ranges: [][]keyspace.Range{{{
						Subnet: netip.MustParsePrefix("10.0.0.0/22"), Start: ip("10.0.0.2"), End: ip("10.0.1.200"), Gateway: ip("10.0.0.1"),
					}}}}
				}
			}
			if v == nil {
				m.Delete(key, now)
				delete(live, key)
			} else {
				put(m, now, key, v)
				live[key] = v
			}
			if rapid.IntRange(0, 9).Draw(t, "look") == 0 {
				filled(m, now)
			}
		}
		fresh := NewModel(keys)
		var order []string
		for key := range live {
			order = append(order, key)
		}
		slices.Sort(order)
		for _, key := range order {
			put(fresh, now, key, live[key])
		}
		if got, want := filled(m, now), filled(fresh, now); !reflect.DeepEqual(got, want) {
			t.Fatalf("got  %+v\nwant %+v", got, want)
		}
	})
}

// TestStrayValues: what anybody wrote into etcd never keeps a state from the bars.
func TestStrayValues(t *testing.T) {
	m := NewModel(keys)
	put(m, noon, keys.Address("default", ip("10.0.0.1")), keyspace.Address{State: keyspace.Leased, Pool: "", Holder: new(keyspace.AttachmentID)})
	put(m, noon, keys.Address("default", ip("10.0.0.2")), keyspace.Address{State: keyspace.Leased, Pool: string(make([]byte, 5000)), Holder: new(keyspace.AttachmentID)})
	put(m, noon, keys.Address("default", ip("10.0.0.3")), keyspace.Address{State: "odd", Pool: "p"})
	m.Put(audit.Record{Key: keys.Address("default", ip("10.0.0.4")), Value: []byte("{")}, noon)
	m.Put(audit.Record{Key: keys.Prefix() + "blocks/a b/\x00/4/010.000.000.000-26", Value: keyspace.Encode(keyspace.Block{Node: "n"})}, noon)
	m.Put(audit.Record{Key: keys.Prefix() + "odd"}, noon)
	m.Put(audit.Record{Key: "elsewhere"}, noon)
	put(m, noon, keys.Attachment(keyspace.AttachmentID{Node: "n", Network: "p", Container: "c", Interface: "i"}), keyspace.Attachment{Space: "", Pool: "/"})
	put(m, noon, keys.Pool("p"), keyspace.Pool{Ranges: [][]keyspace.Range{{{}}}})
	s := filled(m, noon)
	if len(s.Pools) != 0 {
		t.Errorf("%+v", s.Pools)
	}
}
