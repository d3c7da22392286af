package entry

import (
	"crypto/ed25519"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
)

func BenchmarkParseInto(b *testing.B) {
	skey, _, err := note.GenerateKey(zeroReader{}, "node/worker-1")
	if err != nil {
		b.Fatal(err)
	}
	_ = ed25519.SeedSize
	s, err := note.NewSigner(skey)
	if err != nil {
		b.Fatal(err)
	}
	ref := Ref{Chain: ChainID{1}, Seq: 17, Hash: Hash{2}}
	e := &Entry{
		Chain: ChainID{1}, Seq: 41, Prev: Hash{3}, Time: time.Unix(1.8e9, 123456789), Revision: 88213, Op: Acquire,
		Space: "default", Pool: "prod", Addresses: []Address{{IP: netip.MustParseAddr("10.22.7.14"), After: ref}},
		Network: "prod", Container: "0b1f6dd3a8e7d1b42960c5f3a8e7d1b42960c5f3a8e7d1b42960c5f3a8e7d1b4", Interface: "eth0", Node: "worker-1",
		Pod: "shop/cart-7d9f", PodUID: "6f9d0a0e-5d5b-4f3f-9a9b-0b1f6dd3a8e7",
	}
	stored, _, err := Sign(e, s)
	if err != nil {
		b.Fatal(err)
	}
	str := string(stored)
	b.SetBytes(int64(len(stored)))
	b.ReportAllocs()
	var into Entry
	for b.Loop() {
		if err := ParseInto(str, &into); err != nil {
			b.Fatal(err)
		}
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }
