package keyspace

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

var keys, _ = New(DefaultPrefix)

func TestKeys(t *testing.T) {
	chain, err := entry.ParseChainID("5f0c3a8e7d1b42960c5f3a8e7d1b4296")
	if err != nil {
		t.Fatal(err)
	}
	w := entry.Writer{Kind: entry.KindNode, Name: "worker-1"}
	for got, want := range map[string]string{
		keys.Meta():              "/ipam-ledger/v1/meta",
		keys.Stop("worker-1"):    "/ipam-ledger/v1/stops/worker-1",
		keys.Pool("prod"):        "/ipam-ledger/v1/pools/prod",
		keys.Writer(w):           "/ipam-ledger/v1/writers/node/worker-1",
		keys.Entry(w, chain, 41): "/ipam-ledger/v1/chains/node/worker-1/5f0c3a8e7d1b42960c5f3a8e7d1b4296/0000000000000029",
		keys.Address("default", netip.MustParseAddr("10.22.0.7")):                     "/ipam-ledger/v1/addresses/default/4/010.022.000.007",
		keys.Address("default", netip.MustParseAddr("fd00::7")):                       "/ipam-ledger/v1/addresses/default/6/fd00:0000:0000:0000:0000:0000:0000:0007",
		keys.Block(BlockID{"default", "prod", netip.MustParsePrefix("10.22.0.0/26")}): "/ipam-ledger/v1/blocks/default/prod/4/010.022.000.000-26",
		keys.Attachment(AttachmentID{"worker-1", "prod", "0b1f", "eth0"}):             "/ipam-ledger/v1/attachments/worker-1/prod/0b1f/eth0",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if _, err := keys.Parse(got); err != nil {
			t.Error(err)
		}
	}
}

// TestParseRefuses: one spelling a key, so that no key hides beside another.
func TestParseRefuses(t *testing.T) {
	for _, k := range []string{
		"", "/", "/other/meta", "meta/", "stops/", "stops/a/b", "stops/a b", "pools/", "pools/.", "unknown/x",
		"addresses/default/4/10.22.0.7", "addresses/default/4/010.022.000.256", "addresses/default/4/010.022.000.07x",
		"addresses/default/6/fd00::7", "addresses/default/6/FD00:0000:0000:0000:0000:0000:0000:0007",
		"addresses/default/6/010.022.000.007", "addresses/default/4/fd00:0000:0000:0000:0000:0000:0000:0007", "addresses//4/010.022.000.007",
		"addresses/default/6/0000:0000:0000:0000:0000:ffff:0a16:0007",
		"attachments/a/b/c", "attachments/a/b/c/d/e", "attachments/a//c/d",
		"blocks/default/prod/4/010.022.000.000", "blocks/default/prod/4/010.022.000.001-26", "blocks/default/prod/4/010.022.000.000-026",
		"blocks/default/prod/4/010.022.000.000-33", "blocks/default/prod/4/010.022.000.000--1", "blocks/default/prod/4/010.022.000.000-+26",
		"writers/node", "writers/pod/x", "writers/node/a b",
		"chains/node/a/5f0c/0000000000000001", "chains/node/a/5f0c3a8e7d1b42960c5f3a8e7d1b4296/1", "chains/node/a/5F0C3a8e7d1b42960c5f3a8e7d1b4296/0000000000000001",
		"chains/node/a/5f0c3a8e7d1b42960c5f3a8e7d1b4296/000000000000000A",
	} {
		if got, err := keys.Parse(DefaultPrefix + k); err == nil {
			t.Errorf("%q was parsed: %+v", k, got)
		}
	}
}

// TestOrder: a range of keys is a range of addresses.
func TestOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) netip.Addr {
			if rapid.Bool().Draw(t, "six") {
				return netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, name))).Unmap()
			}
			return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, name)))
		}
		a, b := draw("a"), draw("b")
		if got := strings.Compare(keys.Address("s", a), keys.Address("s", b)); got != a.Compare(b) {
			t.Fatalf("%v and %v compare %d, their keys %d", a, b, a.Compare(b), got)
		}
		k, err := keys.Parse(keys.Address("s", a))
		if err != nil || k.IP != a {
			t.Fatalf("%v came back as %v, %v", a, k.IP, err)
		}
	})
}

func TestAfter(t *testing.T) {
	for in, want := range map[string]string{"/a/": "/a0", "a\xff": "b", "\xff\xff": "\x00"} {
		if got := After(in); got != want {
			t.Errorf("After(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, p := range []string{"", "/", "x/", "/x", "/a//b/", "//", "/" + strings.Repeat("x", 300) + "/"} {
		if _, err := New(p); err == nil {
			t.Errorf("prefix %q was taken", p)
		}
	}
}

// TestDecodeIsStrict: a stray write is noticed instead of ignored.
func TestDecodeIsStrict(t *testing.T) {
	for _, v := range []string{``, `{`, `{"node":"a","claim":"x"}`, `{"node":"a","other":1}`, `{"node":"a"} {}`, `[]`, `{"node":1}`} {
		var b Block
		if err := Decode([]byte(v), &b); err == nil {
			t.Errorf("%q was read: %+v", v, b)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"meta", "addresses/default/4/010.022.000.007", "blocks/default/prod/4/010.022.000.000-26", "chains/node/a/5f0c3a8e7d1b42960c5f3a8e7d1b4296/0000000000000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		k, err := keys.Parse(DefaultPrefix + s)
		if err != nil {
			return
		}
		var again string
		switch k.Kind {
		case "meta":
			again = keys.Meta()
		case "stops":
			again = keys.Stop(k.Name)
		case "pools":
			again = keys.Pool(k.Name)
		case "addresses":
			again = keys.Address(k.Space, k.IP)
		case "attachments":
			again = keys.Attachment(k.Attachment)
		case "blocks":
			again = keys.Block(k.Block)
		case "writers":
			again = keys.Writer(k.Writer)
		case "chains":
			again = keys.Entry(k.Writer, k.Chain, k.Seq)
		}
		if again != DefaultPrefix+s {
			t.Fatalf("%q is spelled %q", s, again)
		}
	})
}
