package top

import (
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

var sgr = regexp.MustCompile(`\x1b\[[0-9;:]*m`)

// safe checks that a view gives the terminal no orders but for colours.
func safe(t *testing.T, view string) {
	t.Helper()
	text := sgr.ReplaceAllString(view, "")
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool {
		return r < 0x20 && r != '\n' || r >= 0x7f && r < 0xa0 || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
	}) {
		t.Errorf("the view holds a control character:\n%q", text)
	}
}

// FuzzLedger puts any values at two keys of a ledger that the dashboard follows,
// and an entry with any names: every page is drawn, and is safe to draw.
func FuzzLedger(f *testing.F) {
	ref := entry.Ref{Seq: 1, Hash: entry.Hash{1}}.String()
	for _, x := range [][3]string{
		{"meta", "null", "shop/\x1b[2J"},
		{"meta", `{"version":1,"cluster":"\u001b[2J","etcdCluster":"x","epoch":0,"state":"\u202e"}`, "\xff\x9b2J"},
		{"stops/n", `{"node":"\u001b[2J","found":"\u001b]0;owned\u0007\nline\u202e"}`, "\u202e"},
		{"pools/prod", `{"ranges":[[{"subnet":"::/0","rangeStart":"::","rangeEnd":"ffff::","gateway":"::1"}]],"exclude":["::/1"]}`, ""},
		{"pools/prod", `{"ranges":[[{"subnet":"0.0.0.0/0","rangeStart":"0.0.0.0","rangeEnd":"255.255.255.255"}]]}`, "a\nb"},
		{"blocks/default/prod/4/000.000.000.000-0", `{"node":"\u001b[2J","claim":"` + ref + `"}`, strings.Repeat("x", 512)},
		{"blocks/default/prod/6/0000:0000:0000:0000:0000:0000:0000:0000-0", `{"node":"n","claim":"` + ref + `"}`, "\u0085"},
		{"addresses/default/4/010.022.000.002", `{"state":"leased","pool":"\u001b[2J","holder":{"node":"\u0007","network":"","container":"\n","interface":"\r"},"acquire":"` + ref + `"}`, "日本語"},
		{"addresses/default/4/010.022.000.003", `{"state":"free","pool":"prod","release":"` + ref + `","since":"9999-12-31T23:59:59Z","cooldown":86400}`, "\t"},
		{"attachments/worker-1/prod/c-cart-01/eth0", `{"space":"default","pool":"prod","leases":[{"address":""},{"address":"::ffff:1.2.3.4/1","gateway":"fe80::1%\u001b"}],"acquire":"` + ref + `","pod":"\u001b[2J"}`, "\x00"},
		{"writers/node/worker-1", `{"chain":"00000000000000000000000000000000","seq":0,"hash":"` + (entry.Hash{}).String() + `","machine":"\u001b[2J","boot":"\u001b"}`, "{{.}}"},
	} {
		f.Add(x[0], []byte(x[1]), "meta", []byte("{}"), x[2])
		f.Add(x[0], []byte(x[1]), x[0], []byte("\xff"), x[2])
	}
	f.Fuzz(func(t *testing.T, key1 string, value1 []byte, key2 string, value2 []byte, name string) {
		fx := typical(t, Options{Verify: true})
		line := fx.line(entry.Acquire, time.Second, "prod", "worker-1", "x", "10.22.0.9")
		line.Entry.Pod, line.Entry.PodUID, line.Entry.Interface, line.Entry.Reason = name, name, name, name
		line.Stored = []byte(name)
		ch := Changes{Revision: 999, Entries: []Line{line}, Strange: []string{name}, Findings: []audit.Finding{{Code: audit.StateDiffers, Where: name, Detail: name, Want: name, Got: name}}}
		for _, x := range []struct {
			key   string
			value []byte
		}{{key1, value1}, {key2, value2}} {
			k, err := fx.keys.Parse(fx.keys.Prefix() + x.key)
			if err != nil || k.Kind == "chains" {
				continue // the feed does not pass those on
			}
			fx.rev++
			if x.value == nil {
				x.value = []byte{}
			}
			ch.State = append(ch.State, Change{k, audit.Record{Key: fx.keys.Prefix() + x.key, Value: x.value, Create: fx.rev, Mod: fx.rev, Version: 1}})
		}
		fx.send(ch)
		for _, keys := range [][]string{nil, {"enter"}, {"enter"}, {"esc", "esc", "tab"}, {"enter"}, {"tab"}, {"enter"}, {"?"}} {
			fx.press(keys...)
			for _, size := range [][2]int{{100, 30}, {40, 12}} {
				view := fx.m.View(size[0], size[1])
				safe(t, view)
				check(t, view, size[0], size[1])
			}
		}
		fx.send(Tick{noon.Add(time.Hour)})
		safe(t, fx.m.View(100, 30))
	})
}
