package top

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// large is a ledger of n leases on a hundred nodes, in blocks of 64.
func large(b *testing.B, n int) (*Model, *Ledger, []Change) {
	b.Helper()
	keys := mustKeys(b)
	var cc []Change
	put := func(key string, v any) {
		k, err := keys.Parse(key)
		if err != nil {
			b.Fatal(err)
		}
		cc = append(cc, Change{k, audit.Record{Key: key, Value: keyspace.Encode(v), Version: 1}})
	}
	for i := range n {
		ip := offset(netip.MustParseAddr("10.0.0.2"), uint64(i))
		id := keyspace.AttachmentID{Node: fmt.Sprintf("worker-%d", i/64%100), Network: "prod", Container: fmt.Sprintf("%064x", i), Interface: "eth0"}
		ref := entry.Ref{Chain: entry.ChainID{1}, Seq: uint64(i), Hash: entry.Hash{1}}
		put(keys.Address("default", ip), keyspace.Address{State: keyspace.Leased, Pool: "prod", Holder: &id, Acquire: ref})
		put(keys.Attachment(id), keyspace.Attachment{
			Space: "default", Pool: "prod", Pod: fmt.Sprintf("shop/cart-%08x-%d", i, i),
			Leases: []keyspace.Lease{{Address: netip.PrefixFrom(ip, 8), Gateway: netip.MustParseAddr("10.0.0.1")}}, Acquire: ref,
		})
		if i%64 == 0 {
			put(keys.Block(keyspace.BlockID{Space: "default", Pool: "prod", Prefix: netip.PrefixFrom(ip, 26).Masked()}), keyspace.Block{Node: id.Node})
		}
	}
	l := newLedger(keys)
	for _, c := range cc {
		l.Apply(c, noon)
	}
	m := New(Options{Now: noon, Pool: "prod"})
	m.Update(Loaded{Ledger: l, At: noon})
	m.Update(Resized{200, 60})
	return m, l, cc
}

// BenchmarkLarge: what a ledger of 100,000 leases costs, to hold, to draw and to
// change.
func BenchmarkLarge(b *testing.B) {
	const n = 100_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	m, l, cc := large(b, n)
	_ = cc[0]
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			l := newLedger(mustKeys(b))
			for _, c := range cc {
				l.Apply(c, noon)
			}
		}
	})
	b.Run("change", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			m.Update(Changes{Revision: int64(i), State: cc[i%1000 : i%1000+1]})
		}
	})
	b.Run("map", func(b *testing.B) {
		for b.Loop() {
			_ = m.View(200, 60)
		}
	})
	b.Run("filter", func(b *testing.B) {
		m.filter = "cart-0000"
		for b.Loop() {
			_ = m.View(200, 60)
		}
		m.filter = ""
	})
	m.Update(Key{"esc", ""})
	b.Run("pools", func(b *testing.B) {
		for b.Loop() {
			_ = m.View(200, 60)
		}
	})
	cc = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Logf("%d leases: %d bytes each", n, (after.HeapAlloc-before.HeapAlloc)/n)
	runtime.KeepAlive(l)
}
