package main

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// FuzzImport reads host-local's files as somebody may have left them: whatever
// they hold, only what can stand in a key and an entry is imported, and each
// address once.
func FuzzImport(f *testing.F) {
	f.Add("10.1.0.2", "c1\neth0", "10.1.0.3", "c1\neth1", "eth0")
	f.Add("fd00::", "c1\neth0", "10.1.0.0", "c2\neth0", "eth0")
	f.Add("10.1.0.2", "c1\r\neth0\r\n", "fd00__2", "c1\neth0", "")
	f.Add("10.1.0.1", "", "10.1.0.255", "c1", "eth0")
	f.Add("fd00::2", "../c1\n\x1b[2J", "::ffff:10.1.0.2", "c1", "e\xff")
	f.Add("last_reserved_ip.0", "10.1.0.9", "10.1.0.2%eth0", "c 1\neth 0", "")
	f.Fuzz(func(t *testing.T, name1, text1, name2, text2, iface string) {
		dir := t.TempDir()
		for _, x := range [][2]string{{name1, text1}, {name2, text2}} {
			if filepath.Base(x[0]) != x[0] || os.WriteFile(filepath.Join(dir, x[0]), []byte(x[1]), 0o600) != nil {
				return // no name of a file
			}
		}
		four, six := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00::/64")
		sets := rangeSets{{{Subnet: four, Gateway: netip.MustParseAddr("10.1.0.1")}}, {{Subnet: six, Gateway: netip.MustParseAddr("fd00::1")}}}
		list, problems, err := readHostLocal(&imports{dir: dir, network: "net", iface: iface}, "n1", sets)
		if err != nil {
			t.Fatal(err)
		}
		if len(list)+len(problems) > 2 {
			t.Fatalf("%d attachments and %d problems of two files", len(list), len(problems))
		}
		seen := map[netip.Addr]bool{}
		for _, x := range list {
			if err := entry.ValidateAttachment(x.Attachment.Node, x.Attachment.Network, x.Attachment.Container, x.Attachment.Interface); err != nil {
				t.Fatal(err)
			}
			if x.Problem != "" {
				continue
			}
			v := keyspace.Attachment{Space: "default", Pool: "net", Leases: x.Leases, Acquire: entry.Ref{Seq: 1}}
			if err := v.Validate(); err != nil {
				t.Fatal(err)
			}
			for _, l := range x.Leases {
				ip := l.Address.Addr()
				if !four.Contains(ip) && !six.Contains(ip) || seen[ip] || ip == l.Gateway || keyspace.Reserved(ip, l.Address) != "" {
					t.Fatalf("%v would be imported", l)
				}
				seen[ip] = true
			}
		}
	})
}

// FuzzImportConf reads a network configuration for import.
func FuzzImportConf(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.0.0/24"}]]}}]}`))
	f.Add([]byte(`{"name":"net","ipam":{"subnet":"10.1.0.0/24"}}`))
	f.Add([]byte(`{"plugins":[null,{"ipam":7},{"ipam":{}}]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "conf")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if n, err := network(file, "net"); err == nil && (n.Name == "" || n.Named == (len(n.RangeSets) > 0)) {
			t.Fatalf("%+v", n)
		}
	})
}

// FuzzContainers reads the runtime's list: what is not on it gets released, so
// that half a name must never be taken for one.
func FuzzContainers(f *testing.F) {
	f.Add([]byte("c1\n c2 \r\n\n"))
	f.Add([]byte("0123456789abc\n"))
	f.Add([]byte("{\"items\":[]}"))
	f.Add([]byte(strings.Repeat("c", 70000)))
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := readContainers(bytes.NewReader(b))
		if err != nil {
			return
		}
		for id := range ids {
			if id == "" || strings.ContainsAny(id, " \t\n/") || !bytes.Contains(b, []byte(id)) {
				t.Fatalf("%q is taken for a container's ID", id)
			}
		}
	})
}

// FuzzPrintable: nothing that is stored reaches a terminal as a control character.
func FuzzPrintable(f *testing.F) {
	for _, s := range hostileTexts {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if out := printable(s); !utf8.ValidString(out) || strings.ContainsFunc(out, harmful) {
			t.Fatalf("%q is printed as %q", s, out)
		}
	})
}

// harmful is what must not reach a terminal: control characters, and those that
// turn the direction of writing round.
func harmful(r rune) bool {
	return unicode.IsControl(r) || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069' || r == '\u2028' || r == '\u2029'
}

var hostileTexts = []string{"shop/cart", "\x1b[2J", "\x9b2J", "\u009b2J", "a\tb", "a\nb", "a\rb", "\x7f", "\xff", "\u202eabc", "\u2066", "\u2028", "%s%n", "ok \"quoted\"", "\\"}

// TestHostileTexts: errors and warnings, which often quote what somebody else
// wrote, are as safe as tables.
func TestHostileTexts(t *testing.T) {
	for _, s := range hostileTexts {
		var stderr bytes.Buffer
		a := newApp()
		a.err = &stderr
		a.warn("key %s", s)
		a.complain("error", "first\nkey "+s)
		if out := strings.ReplaceAll(stderr.String(), "\n", ""); strings.ContainsFunc(out, harmful) {
			t.Errorf("%q is printed as %q", s, stderr.String())
		}
	}
}
