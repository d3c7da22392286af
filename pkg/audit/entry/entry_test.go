package entry

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

var update = flag.Bool("update", false, "write testdata anew; the encoding of version 1 must not change")

// fixedKey is the key of a writer that a seed stands for.
func fixedKey(t testing.TB, w Writer, seed string) (note.Signer, note.Verifier, string) {
	t.Helper()
	sum := sha256.Sum256([]byte(seed))
	skey, vkey, err := note.GenerateKey(bytes.NewReader(append(sum[:], sum[:]...)), w.String())
	if err != nil {
		t.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		t.Fatal(err)
	}
	v, err := note.NewVerifier(vkey)
	if err != nil {
		t.Fatal(err)
	}
	return signer, v, vkey
}

var worker = Writer{KindNode, "worker-1"}

func hashOf(s string) (h Hash) { return sha256.Sum256([]byte(s)) }

func refOf(s string, seq uint64) Ref {
	h := hashOf(s)
	return Ref{Chain: ChainID(h[:16]), Seq: seq, Hash: hashOf(s + "!")}
}

// golden is one entry of each op, with all fields that it may have.
func golden(t testing.TB) map[string]*Entry {
	_, _, vkey := fixedKey(t, worker, "worker-1")
	_, _, next := fixedKey(t, worker, "worker-1's next")
	e := func(op Op, e Entry) *Entry {
		e.Op, e.Chain, e.Seq, e.Prev = op, ChainID(bytes.Repeat([]byte{0x5f}, 16)), 41, hashOf("entry 40")
		e.Time = time.Date(2026, 11, 20, 14, 3, 7, 123456789, time.UTC)
		e.Revision = 88213
		e.Reason = `why "so"`
		if op == Open {
			e.Seq, e.Prev = 1, Hash{}
		}
		return &e
	}
	held := Entry{
		Space: "default", Pool: "prod", Network: "prod-net", Container: "0b1f6dd3a8e7d1b4", Interface: "eth0", Node: "worker-1",
		Pod: "shop/cart-7d9f", PodUID: "6f9d0a0e-5d5b-4f3f-9a9b-0b1f6dd3a8e7", Trace: "4bf92f3577b34da6a3ce929d0e0e4736",
	}
	acquire, release := held, held
	acquire.Blocks = []netip.Prefix{netip.MustParsePrefix("10.22.7.0/26"), netip.MustParsePrefix("fd00::/122")}
	acquire.Cooldown, acquire.Assert = 90, AssertRecover
	acquire.Addresses = []Address{
		{
			IP: netip.MustParseAddr("10.22.7.14"), Bits: 24, Gateway: netip.MustParseAddr("10.22.7.1"),
			Range: netipx.MustParseIPRange("10.22.7.2-10.22.7.200"), After: refOf("a release", 17),
		},
		{IP: netip.MustParseAddr("fd00::14"), Bits: 64},
	}
	release.Addresses = []Address{{IP: netip.MustParseAddr("10.22.7.14")}, {IP: netip.MustParseAddr("fd00::14")}}
	release.Acquire = refOf("an acquire", 18446744073709551615)
	block := Entry{Space: "default", Pool: "prod", Blocks: []netip.Prefix{netip.MustParsePrefix("10.22.7.64/26")}, Node: "worker-1"}
	return map[string]*Entry{
		"open":        e(Open, Entry{Writer: worker, Key: vkey, Machine: "3d12f0", Cluster: "2f1c7d1e-0d8d-4a53-9a3c-2f1c7d1e0d8d", Epoch: 2, Predecessor: refOf("before", 40), Mark: refOf("before", 42)}),
		"rotate":      e(Rotate, Entry{Key: next}),
		"close":       e(Close, Entry{Writer: Writer{KindNode, "worker-2"}, Closes: refOf("another", 7), Remove: true}),
		"acquire":     e(Acquire, acquire),
		"release":     e(Release, release),
		"claim":       e(Claim, block),
		"unclaim":     e(Unclaim, block),
		"pool":        e(Pool, Entry{Pool: "prod", Spec: hashOf("{}")}),
		"pool-delete": e(Pool, Entry{Pool: "prod"}),
		"meta":        e(Meta, Entry{Cluster: "2f1c7d1e-0d8d-4a53-9a3c-2f1c7d1e0d8d", EtcdCluster: "cafe00000000beef", Epoch: 2, State: "frozen", Recovering: true, Version: 2}),
		"recover":     e(Recover, Entry{Epoch: 2}),
	}
}

// TestFrozen holds the encoding against testdata, byte by byte.
func TestFrozen(t *testing.T) {
	signer, verifier, _ := fixedKey(t, worker, "worker-1")
	for name, e := range golden(t) {
		t.Run(name, func(t *testing.T) {
			stored, hash, err := Sign(e, signer)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join("testdata", name+".entry")
			if *update {
				if err := os.WriteFile(path, stored, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(stored, want) {
				t.Fatalf("encoding changed:\n%s\nwant\n%s", stored, want)
			}
			if hash != HashOf(stored) || tlog.Hash(hash) != tlog.RecordHash(stored) {
				t.Error("the hash is not RFC 6962's leaf hash")
			}
			back, err := Parse(stored)
			if err != nil {
				t.Fatal(err)
			}
			if !back.Known() || !reflect.DeepEqual(back, e) {
				t.Errorf("parsed\n%+v, want\n%+v", back, e)
			}
			var into Entry
			if err := ParseInto(string(stored), &into); err != nil {
				t.Fatal(err)
			}
			into.Blocks, into.Addresses = append([]netip.Prefix(nil), into.Blocks...), append([]Address(nil), into.Addresses...)
			if !reflect.DeepEqual(&into, e) {
				t.Errorf("parsed into\n%+v, want\n%+v", &into, e)
			}
			if err := Verify(stored, verifier); err != nil {
				t.Error(err)
			}
			if _, err := note.Open(stored, note.VerifierList(verifier)); err != nil {
				t.Errorf("not a signed note: %v", err)
			}
			if _, other, _ := fixedKey(t, worker, "mallory"); Verify(stored, other) == nil {
				t.Error("another key's signature is accepted")
			}
			for i := range stored {
				for _, flip := range []byte{1, 0x20, 0x80} {
					bad := bytes.Clone(stored)
					bad[i] ^= flip
					if _, err := Parse(bad); err != nil {
						continue
					}
					if Verify(bad, verifier) == nil {
						t.Fatalf("byte %d ^ %#x: parsed and verified", i, flip)
					}
				}
			}
		})
	}
}

// TestOneSpelling changes how an entry is written and not what it says, or what
// no entry can say. Parse does not look at signatures, so it is the spelling
// that it refuses.
func TestOneSpelling(t *testing.T) {
	entries := map[string]string{}
	signer, _, _ := fixedKey(t, worker, "worker-1")
	for name, e := range golden(t) {
		stored, _, err := Sign(e, signer)
		if err != nil {
			t.Fatal(err)
		}
		entries[name] = string(stored)
	}
	replace := func(from, to string) func(string) string {
		return func(s string) string { return strings.Replace(s, from, to, 1) }
	}
	line := func(key string) func(string) string { // the line of a key
		return func(s string) string {
			i := strings.Index(s, "\n"+key+" ") + 1
			return s[i : i+strings.IndexByte(s[i:], '\n')+1]
		}
	}
	zero := Ref{}.String()
	for _, c := range []struct {
		name, entry string
		f           func(string) string
	}{
		{"extra signature", "acquire", func(s string) string { return s + s[strings.LastIndex(s, "— "):] }},
		{"no signature", "acquire", func(s string) string { return s[:strings.LastIndex(s, "— ")] }},
		{"no blank line", "acquire", replace("\n\n", "\n")},
		{"two blank lines", "acquire", replace("\n\n", "\n\n\n")},
		{"a blank line in the text", "acquire", replace("\nspace", "\n\nspace")},
		{"another dash", "acquire", replace("— ", "- ")},
		{"base64 with spare bits", "acquire", func(s string) string {
			c := s[len(s)-3]
			const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
			return s[:len(s)-3] + string(digits[strings.IndexByte(digits, c)+1]) + "=\n"
		}},
		{"base64 without padding", "acquire", func(s string) string { return s[:len(s)-2] + "\n" }},
		{"base64 with a line break", "acquire", func(s string) string { return s[:len(s)-10] + "\n" + s[len(s)-10:] }},
		{"base64 with a line break for padding", "acquire", func(s string) string { return s[:len(s)-2] + "\n\n" }},
		{"base64 of fewer bytes", "acquire", func(s string) string { return s[:len(s)-6] + "=\n" }},
		{"url base64", "acquire", func(s string) string {
			return s[:len(s)-93] + strings.NewReplacer("+", "-", "/", "_", "A", "-").Replace(s[len(s)-93:])
		}},
		{"name of another form", "acquire", replace("— node/worker-1 ", "— node+worker-1 ")},
		{"CRLF", "acquire", func(s string) string { return strings.ReplaceAll(s, "\n", "\r\n") }},
		{"one CRLF", "acquire", replace("space default\n", "space default\r\n")},
		{"trailing byte", "acquire", func(s string) string { return s + "\n" }},
		{"no last newline", "acquire", func(s string) string { return s[:len(s)-1] }},
		{"leading byte", "acquire", func(s string) string { return " " + s }},
		{"byte order mark", "acquire", func(s string) string { return "\ufeff" + s }},
		{"lines reordered", "acquire", func(s string) string {
			a, b := line("space")(s), line("pool")(s)
			return strings.Replace(s, a+b, b+a, 1)
		}},
		{"head lines reordered", "acquire", func(s string) string {
			a, b := line("seq")(s), line("prev")(s)
			return strings.Replace(s, a+b, b+a, 1)
		}},
		{"line twice", "acquire", func(s string) string { a := line("pool")(s); return strings.Replace(s, a, a+a, 1) }},
		{"unknown line", "acquire", replace("\npool", "\nponies 3\npool")},
		{"line of another op", "recover", replace("\nepoch", "\npool x\nepoch")},
		{"line missing", "acquire", func(s string) string { return strings.Replace(s, line("node")(s), "", 1) }},
		{"upper-case key", "acquire", replace("\npool", "\nPool")},
		{"two spaces", "acquire", replace("\npool ", "\npool  ")},
		{"tab", "acquire", replace("\npool ", "\npool\t")},
		{"trailing space", "acquire", replace("space default", "space default ")},
		{"empty value", "acquire", replace("space default", "space ")},
		{"no value", "acquire", replace("space default", "space")},
		{"+ number", "acquire", replace("seq 41", "seq +41")},
		{"leading zero", "acquire", replace("seq 41", "seq 041")},
		{"hex number", "acquire", replace("seq 41", "seq 0x29")},
		{"underscore number", "acquire", replace("revision 88213", "revision 88_213")},
		{"negative revision", "acquire", replace("revision 88213", "revision -1")},
		{"revision beyond int64", "acquire", replace("revision 88213", "revision 9223372036854775808")},
		{"seq beyond uint64", "acquire", replace("seq 41", "seq 18446744073709551616")},
		{"seq 0", "acquire", replace("seq 41", "seq 0")},
		{"seq 1 and no open", "acquire", replace("seq 41", "seq 1")},
		{"open and no seq 1", "open", replace("seq 1\n", "seq 2\n")},
		{"seq 1, as a first entry, and no open", "acquire", func(s string) string {
			s = strings.Replace(s, "seq 41", "seq 1", 1)
			return strings.Replace(s, line("prev")(s), "prev "+Hash{}.String()+"\n", 1)
		}},
		{"open as a later entry", "open", func(s string) string {
			s = strings.Replace(s, "seq 1\n", "seq 2\n", 1)
			return strings.Replace(s, line("prev")(s), "prev "+hashOf("x").String()+"\n", 1)
		}},
		{"prev of an open", "open", replace("prev 0", "prev 1")},
		{"epoch 0", "recover", replace("epoch 2", "epoch 0")},
		{"upper-case chain", "acquire", replace("chain 5f", "chain 5F")},
		{"upper-case prev", "acquire", func(s string) string {
			l := line("prev")(s)
			return strings.Replace(s, l, "prev "+strings.ToUpper(l[5:]), 1)
		}},
		{"short chain", "acquire", replace("chain 5f", "chain ")},
		{"upper-case reference", "release", func(s string) string {
			l := line("acquire")(s)
			return strings.Replace(s, l, "acquire "+strings.ToUpper(l[8:]), 1)
		}},
		{"reference's seq with zero", "open", replace("/40/", "/040/")},
		{"zero reference", "open", func(s string) string { l := line("mark")(s); return strings.Replace(s, l, "mark "+zero+"\n", 1) }},
		{"zero release", "acquire", replace("fd00::14/64 after -", "fd00::14/64 after "+zero)},
		{"no after", "acquire", replace("fd00::14/64 after -", "fd00::14/64")},
		{"after in a release", "release", replace("fd00::14", "fd00::14/64 after -")},
		{"zero spec elsewhere", "claim", replace("\nblock", "\nspec "+Hash{}.String()+"\nblock")},
		{"time in another zone", "acquire", replace("07.123456789Z", "07.123456789+00:00")},
		{"time of fewer digits", "acquire", replace("07.123456789Z", "07.12345678Z")},
		{"time with a lower-case t", "acquire", replace("20T14", "20t14")},
		{"second 60", "acquire", replace(":07.1", ":60.1")},
		{"hour 24", "acquire", replace("T14:", "T24:")},
		{"31 November", "acquire", replace("-11-20T", "-11-31T")},
		{"29 February", "acquire", replace("2026-11-20T", "2026-02-29T")},
		{"day 0", "acquire", replace("-11-20T", "-11-00T")},
		{"month 13", "acquire", replace("-11-20T", "-13-20T")},
		{"year 1969", "acquire", replace("2026-", "1969-")},
		{"unquoted text", "acquire", replace(`"eth0"`, "eth0")},
		{"quoted token", "acquire", replace("space default", `space "default"`)},
		{"escape for a letter", "acquire", replace(`"eth0"`, `"\u0065th0"`)},
		{"hex escape", "acquire", replace(`"eth0"`, `"\x65th0"`)},
		{"backquotes", "acquire", replace(`"eth0"`, "`eth0`")},
		{"single quotes", "acquire", replace(`"eth0"`, `'e'`)},
		{"raw UTF-8", "acquire", replace(`"eth0"`, `"ëth0"`)},
		{"raw control byte", "acquire", replace(`"eth0"`, "\"eth\x01\"")},
		{"raw DEL", "acquire", replace(`"eth0"`, "\"eth\x7f\"")},
		{"quote in quotes", "acquire", replace(`"eth0"`, `"et"h0"`)},
		{"open quote", "acquire", replace(`"eth0"`, `"eth0`)},
		{"lone quote", "acquire", replace(`"eth0"`, `"`)},
		{"empty text", "acquire", replace(`"eth0"`, `""`)},
		{"long IPv6", "acquire", replace("fd00::14/", "fd00:0:0:0:0:0:0:14/")},
		{"upper-case IPv6", "acquire", replace("fd00::14/", "FD00::14/")},
		{"mapped IPv4", "acquire", replace("10.22.7.14/", "::ffff:10.22.7.14/")},
		{"zone", "acquire", replace("fd00::14/", "fd00::14%eth0/")},
		{"IPv4 with zeros", "acquire", replace("10.22.7.14/", "10.22.07.14/")},
		{"no subnet", "acquire", replace("fd00::14/64 ", "fd00::14 ")},
		{"a subnet of 0 bits", "acquire", replace("fd00::14/64 ", "fd00::14/0 ")},
		{"a subnet of 33 bits", "acquire", replace("10.22.7.14/24 ", "10.22.7.14/33 ")},
		{"a subnet with zero", "acquire", replace("10.22.7.14/24 ", "10.22.7.14/024 ")},
		{"a subnet in a release", "release", replace("fd00::14", "fd00::14/64")},
		{"a gateway of the other family", "acquire", replace("gateway 10.22.7.1 ", "gateway fd00::1 ")},
		{"a gateway in another spelling", "acquire", replace("gateway 10.22.7.1 ", "gateway 10.22.7.01 ")},
		{"an empty gateway", "acquire", replace("gateway 10.22.7.1 ", "gateway  ")},
		{"a gateway after the range", "acquire", func(s string) string {
			return strings.Replace(s, "gateway 10.22.7.1 range 10.22.7.2-10.22.7.200 ", "range 10.22.7.2-10.22.7.200 gateway 10.22.7.1 ", 1)
		}},
		{"a range without the address", "acquire", replace("range 10.22.7.2-10.22.7.200", "range 10.22.7.20-10.22.7.200")},
		{"a range backwards", "acquire", replace("range 10.22.7.2-10.22.7.200", "range 10.22.7.200-10.22.7.2")},
		{"a range of one", "acquire", replace("range 10.22.7.2-10.22.7.200", "range 10.22.7.14")},
		{"a range of two families", "acquire", replace("range 10.22.7.2-10.22.7.200", "range 10.22.7.2-fd00::1")},
		{"cooldown 0", "acquire", replace("cooldown 90", "cooldown 0")},
		{"cooldown with zero", "acquire", replace("cooldown 90", "cooldown 090")},
		{"cooldown of more than a day", "acquire", replace("cooldown 90", "cooldown 86401")},
		{"assert", "acquire", replace("assert recover", "assert wish")},
		{"recovering no", "meta", replace("recovering yes", "recovering no")},
		{"version 0", "meta", replace("version 2", "version 0")},
		{"remove true", "close", replace("remove yes", "remove true")},
		{"address twice", "acquire", replace("fd00::14/64 ", "10.22.7.14/24 ")},
		{"host bits in a block", "claim", replace("10.22.7.64/26", "10.22.7.65/26")},
		{"block bits with zero", "claim", replace("10.22.7.64/26", "10.22.7.64/026")},
		{"long block", "acquire", replace("fd00::/122", "fd00:0::/122")},
		{"space in a name", "acquire", replace("space default", "space de fault")},
		{"slash in a name", "acquire", replace("space default", "space de/fault")},
		{"dot dot", "acquire", replace("space default", "space ..")},
		{"state", "meta", replace("state frozen", "state cold")},
		{"kind", "close", replace("writer node/", "writer pod/")},
		{"key's ID in upper case", "open", func(s string) string {
			l := line("key")(s)
			p := strings.SplitN(l, "+", 3)
			return strings.Replace(s, l, p[0]+"+"+strings.ToUpper(p[1])+"+"+p[2], 1)
		}},
		{"another's key", "open", replace("writer node/worker-1", "writer node/worker-2")},
		{"short key", "rotate", func(s string) string { l := line("key")(s); return strings.Replace(s, l, l[:len(l)-5]+"\n", 1) }},
		{"text only", "acquire", func(s string) string { return s[:strings.Index(s, "\n\n")+1] }},
		{"nothing", "acquire", func(string) string { return "" }},
		{"too long", "acquire", func(s string) string { return s + strings.Repeat("x", MaxSize) }},
	} {
		good := entries[c.entry]
		bad := c.f(good)
		if bad == good {
			t.Errorf("%s: nothing was changed", c.name)
		}
		e, err := Parse([]byte(bad))
		if err == nil {
			t.Errorf("%s: accepted: %+v", c.name, e)
		}
		var into Entry
		if err := ParseInto(bad, &into); err == nil || errors.Is(err, ErrVersion) {
			t.Errorf("%s: ParseInto accepts it: %v", c.name, err)
		}
	}
}

func TestUnknown(t *testing.T) {
	signer, v, _ := fixedKey(t, worker, "worker-1")
	stored, _, err := Sign(golden(t)["acquire"], signer)
	if err != nil {
		t.Fatal(err)
	}
	resign := func(from, to string) []byte {
		text, _, _ := bytes.Cut(stored, []byte("\n\n"))
		text = append(bytes.Replace(text, []byte(from), []byte(to), 1), '\n')
		b, err := note.Sign(&note.Note{Text: string(text)}, signer)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	op := resign("op acquire", "op transfer")
	e, err := Parse(op)
	if err != nil || e.Known() || e.Op != "transfer" || e.Seq != 41 || e.Prev != hashOf("entry 40") || e.Signature.Name != "node/worker-1" {
		t.Errorf("unknown op: %+v, %v", e, err)
	}
	if err := Verify(op, v); err != nil {
		t.Error(err)
	}
	newer := resign("entry/v1", "entry/v2")
	e, err = Parse(newer)
	if !errors.Is(err, ErrVersion) || e == nil || e.Known() || e.Signature.KeyID != v.KeyHash() {
		t.Errorf("newer version: %+v, %v", e, err)
	}
	if err := Verify(newer, v); err != nil {
		t.Error(err)
	}
	for _, bad := range [][]byte{
		resign("op acquire", "op trans/fer"), resign("op acquire\nspace default", "op transfer\n\nspace default"), resign("op acquire\nspace default", "op transfer\nspace"),
		resign("entry/v1\n", "entry/v2\n\n"), resign("ipam-ledger/entry/v1", "ipam-ledger/checkpoint/v1"), append(newer, '\n'), append(op, '\n'),
	} {
		if _, err := Parse(bad); err == nil || errors.Is(err, ErrVersion) {
			t.Errorf("accepted: %v\n%s", err, bad)
		}
	}
}

// TestLimits takes each field to its limit and one beyond.
func TestLimits(t *testing.T) {
	signer, _, _ := fixedKey(t, worker, "worker-1")
	for _, c := range []struct {
		field, op string
		limit     int
		set       func(*Entry, int)
	}{
		{"space", "acquire", MaxName, func(e *Entry, n int) { e.Space = strings.Repeat("x", n) }},
		{"pool", "acquire", MaxName, func(e *Entry, n int) { e.Pool = strings.Repeat("x", n) }},
		{"node", "acquire", MaxName, func(e *Entry, n int) { e.Node = strings.Repeat("x", n) }},
		{"network", "acquire", MaxNetwork, func(e *Entry, n int) { e.Network = strings.Repeat("x", n) }},
		{"container", "acquire", MaxContainer, func(e *Entry, n int) { e.Container = strings.Repeat("x", n) }},
		{"interface", "acquire", MaxInterface, func(e *Entry, n int) { e.Interface = strings.Repeat("\"", n) }},
		{"pod", "acquire", MaxPod, func(e *Entry, n int) { e.Pod = strings.Repeat("\x00", n) }},
		{"pod-uid", "acquire", MaxText, func(e *Entry, n int) { e.PodUID = strings.Repeat("é", n/2) + strings.Repeat("x", n%2) }},
		{"trace", "acquire", MaxText, func(e *Entry, n int) { e.Trace = strings.Repeat("x", n) }},
		{"reason", "acquire", MaxText, func(e *Entry, n int) { e.Reason = strings.Repeat("\xff", n) }},
		{"cluster", "meta", MaxName, func(e *Entry, n int) { e.Cluster = strings.Repeat("x", n) }},
		{"etcd-cluster", "meta", MaxName, func(e *Entry, n int) { e.EtcdCluster = strings.Repeat("x", n) }},
		{"writer", "close", MaxName, func(e *Entry, n int) { e.Writer.Name = strings.Repeat("x", n) }},
		{"addresses", "acquire", MaxAddresses, func(e *Entry, n int) {
			e.Addresses = nil
			for i := range n {
				e.Addresses = append(e.Addresses, Address{IP: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Bits: 8})
			}
		}},
		{"blocks", "claim", MaxBlocks, func(e *Entry, n int) {
			e.Blocks = nil
			for i := range n {
				e.Blocks = append(e.Blocks, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24))
			}
		}},
	} {
		e := golden(t)[c.op]
		c.set(e, c.limit)
		if _, _, err := Sign(e, signer); err != nil {
			t.Errorf("%s at its limit: %v", c.field, err)
		}
		e = golden(t)[c.op]
		c.set(e, c.limit+1)
		if _, _, err := Sign(e, signer); err == nil {
			t.Errorf("%s beyond its limit is signed", c.field)
		}
		text := e.appendText(nil)
		stored, err := note.Sign(&note.Note{Text: string(text)}, signer)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse(stored); err == nil {
			t.Errorf("%s beyond its limit is parsed", c.field)
		}
	}
}

// TestFields takes each op a field that it needs, and gives it one that it lacks.
func TestFields(t *testing.T) {
	signer, _, vkey := fixedKey(t, worker, "worker-1")
	set := []func(e *Entry, zero bool){}
	for _, f := range []struct {
		name string
		full any
	}{
		{"Writer", worker},
		{"Key", vkey},
		{"Machine", "m"},
		{"Cluster", "c"},
		{"EtcdCluster", "c"},
		{"Epoch", uint64(3)},
		{"State", "running"},
		{"Recovering", true},
		{"Version", uint64(2)},
		{"Predecessor", refOf("p", 1)},
		{"Mark", refOf("p", 2)},
		{"Closes", refOf("p", 3)},
		{"Remove", true},
		{"Space", "s"},
		{"Pool", "p"},
		{"Spec", hashOf("s")},
		{"Blocks", []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}},
		{"Addresses", []Address{{IP: netip.MustParseAddr("10.0.0.1")}}},
		{"Acquire", refOf("p", 4)},
		{"Cooldown", int64(5)},
		{"Assert", AssertImport},
		{"Network", "n"},
		{"Container", "c"},
		{"Interface", "i"},
		{"Node", "n"},
		{"Pod", "p"},
		{"PodUID", "u"},
		{"Trace", "t"},
		{"Reason", "r"},
	} {
		set = append(set, func(e *Entry, zero bool) {
			v := reflect.ValueOf(e).Elem().FieldByName(f.name)
			if zero {
				v.SetZero()
			} else {
				v.Set(reflect.ValueOf(f.full))
			}
		})
	}
	if len(set) != int(fieldCount) {
		t.Fatalf("%d fields of %d", len(set), fieldCount)
	}
	for name := range golden(t) {
		for f := range fieldCount {
			sh := shapes[golden(t)[name].Op]
			e := golden(t)[name]
			if f == fSpec && e.Op == Pool {
				continue // always there, zero once deleted
			}
			set[f](e, true)
			_, _, err := Sign(e, signer)
			if must := sh.must&(1<<f) != 0; must != (err != nil) {
				t.Errorf("%s without %s: %v", name, keys[f], err)
			}
			e = golden(t)[name]
			if sh.must&(1<<f) == 0 {
				set[f](e, false)
			}
			_, _, err = Sign(e, signer)
			if allowed := (sh.must|sh.may)&(1<<f) != 0; allowed != (err == nil) {
				t.Errorf("%s with %s: %v", name, keys[f], err)
			}
		}
	}
	if _, _, err := Sign(&Entry{Op: "ponies"}, signer); err == nil {
		t.Error("an unknown op is signed")
	}
	e := golden(t)["recover"]
	e.Time = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)
	if _, _, err := Sign(e, signer); err == nil {
		t.Error("the year 10000 is signed")
	}
	other, _, err := note.GenerateKey(zeroReader{}, "nobody")
	if err != nil {
		t.Fatal(err)
	}
	nobody, _ := note.NewSigner(other)
	if _, _, err := Sign(golden(t)["recover"], nobody); err == nil {
		t.Error("a signer that is no writer signs")
	}
}

// TestKeysWithPlus is for keys whose base64 holds the separator of a key's
// parts, as about half of all do.
func TestKeysWithPlus(t *testing.T) {
	plus := 0
	for i := range 200 {
		sum := sha256.Sum256(fmt.Append(nil, i))
		skey, vkey, err := note.GenerateKey(bytes.NewReader(append(sum[:], sum[:]...)), worker.String())
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(skey, "+") > 4 || strings.Count(vkey, "+") > 2 {
			plus++
		}
		signer, again, err := ReadSigner(skey)
		if err != nil || again != vkey {
			t.Fatalf("key %d: %q, want %q: %v", i, again, vkey, err)
		}
		e := golden(t)["open"]
		e.Key = vkey
		if _, _, err := Sign(e, signer); err != nil {
			t.Fatalf("key %d, %q: %v", i, vkey, err)
		}
	}
	if plus < 20 {
		t.Errorf("only %d keys of 200 hold a +", plus)
	}
	for _, bad := range []string{"", "PRIVATE+KEY+x", "PRIVATE+KEY+node/a+00000000+AAAA", base64.StdEncoding.EncodeToString(nil)} {
		if _, _, err := ReadSigner(bad); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
	if skey, err := NewKey(worker); err != nil {
		t.Error(err)
	} else if s, _, err := ReadSigner(skey); err != nil || s.Name() != "node/worker-1" {
		t.Error(s, err)
	}
	if _, err := NewKey(Writer{"pod", "x"}); err == nil {
		t.Error("a key for nobody")
	}
}

func TestRefs(t *testing.T) {
	r := refOf("x", 17)
	for _, s := range []string{r.String(), Ref{}.String()} {
		back, err := ParseRef(s)
		if err != nil || back.String() != s {
			t.Errorf("%q: %v, %v", s, back, err)
		}
	}
	var viaText Ref
	if b, err := r.MarshalText(); err != nil || viaText.UnmarshalText(b) != nil || viaText != r {
		t.Error("text of a reference")
	}
	if b, err := r.AppendText([]byte("x")); err != nil || string(b) != "x"+r.String() {
		t.Error("appended text of a reference")
	}
	good := r.String()
	for _, bad := range []string{"", "/", good + "0", good[1:], strings.ToUpper(good), strings.Replace(good, "/17/", "/017/", 1), strings.Replace(good, "/17/", "//", 1), strings.Replace(good, "/17/", "/-1/", 1), strings.Replace(good, "/17/", "_17_", 1)} {
		if _, err := ParseRef(bad); err == nil {
			t.Errorf("%q is a reference", bad)
		}
	}
	if c := NewChainID(); c == NewChainID() || len(c.String()) != 32 || len(c.Short()) != 8 {
		t.Error("chain IDs")
	}
	var h Hash
	if err := h.UnmarshalText([]byte(r.Hash.String())); err != nil || h != r.Hash || h.UnmarshalText([]byte("xyz")) == nil {
		t.Error("text of a hash")
	}
	for _, w := range []string{"node/a", "operator/ann@desk.example", "sealer/x_1"} {
		if p, err := ParseWriter(w); err != nil || p.String() != w {
			t.Errorf("%q: %v, %v", w, p, err)
		}
	}
	for _, w := range []string{"", "a", "node", "node/", "/a", "Node/a", "node/a/b", "node/a b", "node/.", "node/..", "node/é", "node/" + strings.Repeat("x", MaxName+1)} {
		if p, err := ParseWriter(w); err == nil {
			t.Errorf("%q is a writer: %v", w, p)
		}
	}
}

// FuzzParse holds the parser to its word: what it accepts has one spelling, is
// what Parse and ParseInto agree on, and parses to what can be written again.
func FuzzParse(f *testing.F) {
	signer, _, _ := fixedKey(f, worker, "worker-1")
	for _, e := range golden(f) {
		stored, _, err := Sign(e, signer)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(stored)
		f.Add(bytes.Replace(stored, []byte("entry/v1"), []byte("entry/v2"), 1))
		f.Add(bytes.Replace(stored, []byte("\nop "), []byte("\nop x"), 1))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var into Entry
		intoErr := ParseInto(string(b), &into)
		e, err := Parse(b)
		if (err == nil) != (intoErr == nil) || errors.Is(err, ErrVersion) != errors.Is(intoErr, ErrVersion) {
			t.Fatalf("Parse: %v; ParseInto: %v", err, intoErr)
		}
		if err != nil && !errors.Is(err, ErrVersion) {
			return
		}
		out := e.Signature.append(e.appendText(nil))
		if !bytes.Equal(out, b) {
			t.Fatalf("accepted\n%q, spelled\n%q", b, out)
		}
		if !e.Known() {
			return
		}
		if err := e.validate(); err != nil {
			t.Fatalf("accepted what cannot be signed: %v", err)
		}
	})
}

func BenchmarkParseInto(b *testing.B) {
	signer, _, _ := fixedKey(b, worker, "worker-1")
	stored, _, err := Sign(golden(b)["release"], signer)
	if err != nil {
		b.Fatal(err)
	}
	s := string(stored)
	b.SetBytes(int64(len(s)))
	b.ReportAllocs()
	var into Entry
	for b.Loop() {
		if err := ParseInto(s, &into); err != nil {
			b.Fatal(err)
		}
	}
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }
