package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

var update = flag.Bool("update", false, "write the golden files anew")

var noon = time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)

func healthy() *state.State {
	return &state.State{
		Source: "prod", Epoch: 1, Revision: 88213, At: noon.Add(-5 * time.Second), Heartbeat: 15,
		Etcd: state.Etcd{OK: true}, Ledger: state.LedgerRunning, Nodes: 3,
		Verify: state.Verify{Result: state.VerifyOK, At: noon.Add(-34 * time.Minute)},
		Pools: []state.Pool{
			{Space: "default", Name: "pods", Capacity: 254, Leased: 31, Trend: 4},
			{Space: "default", Name: "storage", Capacity: 62, Leased: 5, Held: 1},
		},
	}
}

func viewOf(states ...*state.State) *View {
	c := defaults()
	c.Format = formatWaybar // which shows the most
	v := &View{Config: &c, Link: Link{LinkUp, noon.Add(-time.Hour)}}
	for _, s := range states {
		v.Sources = append(v.Sources, Source{State: s, Received: s.At})
	}
	return v
}

// scenes are what a bar may have to show, with the time of each.
func scenes() []scene {
	with := func(change func(*state.State)) *View {
		s := healthy()
		change(s)
		return viewOf(s)
	}
	set := func(v *View, change func(*View)) *View {
		change(v)
		return v
	}
	pools := func(v *View) { v.Pools = true }
	result := func(r Result) *View {
		return set(viewOf(healthy()), func(v *View) { v.Results = []Result{r} })
	}
	link := func(s LinkState, age time.Duration, states ...*state.State) *View {
		return set(viewOf(states...), func(v *View) { v.Link = Link{s, noon.Add(-age)} })
	}
	cert := func(kind string, left time.Duration) *View {
		return with(func(s *state.State) {
			until := noon.Add(left)
			s.Cert = &state.Cert{Kind: kind, Until: until, Warn: until.Add(-14 * 24 * time.Hour)}
		})
	}
	second := healthy()
	second.Source = "staging"
	second.Pools = second.Pools[1:]
	return []scene{
		{"healthy", viewOf(healthy()), noon},
		{"healthy, for each pool", set(viewOf(healthy()), pools), noon},
		{"healthy, in ASCII", set(viewOf(healthy()), func(v *View) { v.Config.ASCII = true }), noon},
		{"healthy, without a label", set(viewOf(healthy()), func(v *View) { v.Config.Label = "" }), noon},
		{"two clusters", viewOf(healthy(), second), noon},
		{"two clusters, for each pool", set(viewOf(healthy(), second), pools), noon},
		{"one cluster of two stale", viewOf(with(func(s *state.State) { s.At = noon.Add(-time.Hour) }).Sources[0].State, second), noon},
		{"chosen pools", set(viewOf(healthy()), func(v *View) { v.Config.Pools = []string{"default/storage", "absent"} }), noon},
		{"more pools than fit", set(with(func(s *state.State) { s.More = 9 }), func(v *View) { v.Pools, v.Config.MaxPools = true, 1 }), noon},
		{"warning", with(func(s *state.State) { s.Pools[0].Leased, s.Pools[0].Held, s.Pools[0].Trend = 200, 12, -7 }), noon},
		{"critical", with(func(s *state.State) { s.Pools[1].Leased = 60 }), noon},
		{"critical, for each pool", set(with(func(s *state.State) { s.Pools[1].Leased, s.Near = 60, 2 }), pools), noon},
		{"no pools", with(func(s *state.State) { s.Pools = nil }), noon},
		{"unknown capacity", with(func(s *state.State) { s.Pools = s.Pools[:1]; s.Pools[0].Capacity = 0 }), noon},
		{"IPv6", with(func(s *state.State) { s.Pools[0] = state.Pool{Name: "six", Capacity: math.MaxUint64, Leased: 123456} }), noon},

		{"starting", link(LinkNew, 0), noon},
		{"waiting for sway", link(LinkNew, patience), noon},
		{"no sway", link(LinkAbsent, patience), noon},
		{"no sway, but a fresh file", link(LinkAbsent, time.Hour, healthy()), noon},
		{"connected, waiting", link(LinkUp, 0), noon},
		{"no publisher", link(LinkUp, patience), noon},
		{"no publisher of a source", set(link(LinkUp, patience), func(v *View) { v.Config.Source = "prod" }), noon},
		{"sway just lost", link(LinkLost, 0, healthy()), noon},
		{"sway lost", link(LinkLost, patience, healthy()), noon},
		{"sway lost for long", link(LinkLost, time.Hour, healthy()), noon.Add(time.Hour)},
		{"sway lost before any state", link(LinkLost, 7*time.Minute), noon},

		{"not yet stale", viewOf(healthy()), noon.Add(40 * time.Second)},
		{"just stale", viewOf(healthy()), noon.Add(40*time.Second + 1)},
		{"stale for minutes", viewOf(healthy()), noon.Add(10 * time.Minute)},
		{"stale for hours, for each pool", set(viewOf(healthy()), pools), noon.Add(5 * time.Hour)},
		{"stale for days", viewOf(healthy()), noon.Add(50 * time.Hour)},
		{"clock ahead, but silent", with(func(s *state.State) { s.At = noon.Add(time.Hour) }), noon.Add(time.Hour + 46*time.Second)},
		{"etcd unreachable", with(func(s *state.State) {
			s.Etcd = state.Etcd{Error: "connection refused", Since: noon.Add(-3 * time.Minute)}
		}), noon},
		{"etcd unreachable from the start", with(func(s *state.State) { s.Etcd, s.Pools, s.Ledger = state.Etcd{}, nil, "" }), noon},
		{"frozen", with(func(s *state.State) { s.Ledger = state.LedgerFrozen }), noon},
		{"stopped", with(func(s *state.State) { s.Ledger = state.LedgerStopped }), noon},
		{"stopped and stale", with(func(s *state.State) { s.Ledger = state.LedgerStopped }), noon.Add(time.Hour)},
		{"unknown ledger", with(func(s *state.State) { s.Ledger = "" }), noon},

		{"certificate far from its end", cert(state.CertClient, 30*24*time.Hour), noon},
		{"certificate from when on it is said", cert(state.CertClient, 14*24*time.Hour), noon},
		{"certificate ends in days", cert(state.CertClient, 5*24*time.Hour+time.Hour), noon},
		{"certificate ends in hours", cert(state.CertEtcd, 7*time.Hour), noon},
		{"certificate ends in minutes, for each pool", set(cert(state.CertCA, 7*time.Minute), pools), noon},
		{"certificate ended", cert(state.CertEtcd, 0), noon},
		{"certificate ended, and etcd refuses", set(cert(state.CertClient, -time.Hour), func(v *View) {
			v.Sources[0].State.Etcd = state.Etcd{Error: "the client certificate has expired", Since: noon.Add(-3 * time.Minute)}
		}), noon},
		{"certificate of another kind", cert("peer", time.Hour), noon},

		{"verified yesterday", with(func(s *state.State) { s.Verify.At = noon.Add(-20 * time.Hour) }), noon},
		{"verified long ago", with(func(s *state.State) { s.Verify.At = noon.Add(-80 * time.Hour) }), noon},
		{"never verified", with(func(s *state.State) { s.Verify = state.Verify{Result: state.VerifyUnknown} }), noon},
		{"verifying for the first time", with(func(s *state.State) { s.Verify = state.Verify{Result: state.VerifyUnknown, Running: true} }), noon},
		{"could not be verified", with(func(s *state.State) { s.Verify.Result = state.VerifyError }), noon},
		{"verified in part", with(func(s *state.State) { s.Verify.Result = state.VerifyReduced }), noon},
		{"verification of another word", with(func(s *state.State) { s.Verify.Result = "fine" }), noon},
		{"verification failed", with(func(s *state.State) {
			s.Verify = state.Verify{Result: state.VerifyFailed, At: noon, Findings: 3, Code: "HASH-MISMATCH"}
		}), noon},
		{"verification failed and stale", with(func(s *state.State) { s.Verify = state.Verify{Result: state.VerifyFailed} }), noon.Add(time.Hour)},
		{"verification failed, for each pool", set(with(func(s *state.State) { s.Verify = state.Verify{Result: state.VerifyFailed} }), pools), noon},

		{"click: verifying", result(Result{Source: "prod", Verify: true, Running: true, At: noon}), noon},
		{"click: verified", result(Result{Source: "prod", Verify: true, At: noon}), noon},
		{"click: verified, a while ago", result(Result{Source: "prod", Verify: true, At: noon.Add(-15 * time.Second)}), noon},
		{"click: failed, hours ago, and nobody looked since", set(with(func(s *state.State) { s.Verify.At = noon.Add(-9 * time.Hour) }), func(v *View) {
			v.Results = []Result{{Source: "prod", Verify: true, Status: 1, At: noon.Add(-5 * time.Hour)}}
		}), noon},
		{"click: failed, verified since", result(Result{Source: "prod", Verify: true, Status: 1, At: noon.Add(-time.Hour)}), noon},
		{"click: could not verify", result(Result{Source: "prod", Verify: true, Status: 2, At: noon}), noon},
		{"click: in part", result(Result{Source: "prod", Verify: true, Status: 3, At: noon}), noon},
		{"click: not found", result(Result{Source: "prod", Text: "foot: not found", At: noon}), noon},
		{"click: without a publisher", set(link(LinkUp, time.Hour), func(v *View) { v.Results = []Result{{Text: "foot: not found", At: noon}} }), noon},

		{"update the block", set(link(LinkUp, time.Hour), func(v *View) { v.Other, v.OtherAt = 2, noon }), noon},
		{"update the publisher", set(link(LinkUp, time.Hour), func(v *View) { v.Other, v.OtherAt = 0, noon }), noon},
		{"update, beside a good state", set(viewOf(healthy()), func(v *View) { v.Other, v.OtherAt = 2, noon }), noon},
		{"broken configuration", set(viewOf(healthy()), func(v *View) { v.Problem = "swaybar.toml: unknown key colours" }), noon},
		{"broken configuration, nothing known", set(link(LinkUp, 0), func(v *View) { v.Problem = "swaybar.toml: unknown key colours" }), noon},

		{"forged", with(func(s *state.State) {
			s.Source = "<span size='99999'>x\n\x1b[31m"
			s.Pools[0].Name = "a&b\u202edcba\n\u200b" + strings.Repeat("Z\u0301", 50)
			s.Pools[0].Space = `"];[{"full_text":"owned"}`
			s.Ledger = "running\n"
			s.Verify.Code = "\x00"
		}), noon},
	}
}

type scene struct {
	name string
	view *View
	now  time.Time
}

func TestRender(t *testing.T) {
	var b strings.Builder
	for _, s := range scenes() {
		line := Render(s.view, s.now)
		colors := newBar(s.view.Config, "", nil).colors
		fmt.Fprintf(&b, "== %s\n", s.name)
		for _, format := range formats {
			fmt.Fprintf(&b, "%-13s %s", format, encode(format, &line, colors))
		}
		if !line.Next.IsZero() {
			fmt.Fprintf(&b, "changes in    %s\n", line.Next.Sub(s.now))
		}
		b.WriteByte('\n')
	}
	const file = "testdata/render.golden"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.String(); got != string(want) {
		g, w := strings.Split(got, "\n"), strings.Split(string(want), "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Fatalf("line %d:\ngot  %s\nwant %s\n(after a change that is meant: go test ./swaybar -run TestRender -update)", i+1, g[i], w[i])
			}
		}
		t.Fatalf("%d lines, want %d", len(g), len(w))
	}
}

// What is not known is never shown as fine, and what failed is never hidden.
func TestHonest(t *testing.T) {
	for _, s := range scenes() {
		line := Render(s.view, s.now)
		full, _ := joined(&line)
		known := len(s.view.Sources) > 0
		for i := range s.view.Sources {
			src := &s.view.Sources[i]
			known = known && !src.stale(s.now) && src.State.Etcd.OK
			if src.State.Verify.Result == state.VerifyFailed && (!urgent(&line) || line.Worst() != Critical || !strings.Contains(full, "VERIFY FAILED")) {
				t.Errorf("%s: a failed verification is not urgent: %s", s.name, full)
			}
		}
		if !known && (line.Worst() < Unknown || line.Class == "normal") {
			t.Errorf("%s: is shown as %s, %s: %s", s.name, line.Worst(), line.Class, full)
		}
		if !known && len(s.view.Sources) < 2 && strings.Contains(full, "✓") {
			t.Errorf("%s: is shown as verified: %s", s.name, full)
		}
	}
}

// Next is when something else is shown, and nothing else is shown before.
func TestNext(t *testing.T) {
	for _, s := range scenes() {
		line := Render(s.view, s.now)
		before := string(encode(formatWaybar, &line, nil))
		now := s.now
		for range 20 {
			next := Render(s.view, now).Next
			if next.IsZero() {
				next = now.Add(1000 * time.Hour)
			}
			if !next.After(now) {
				t.Fatalf("%s: next %s is not after %s", s.name, next, now)
			}
			for _, at := range []time.Time{now.Add(next.Sub(now) / 3), now.Add(next.Sub(now) / 2), next.Add(-2 * time.Millisecond)} {
				if !at.After(now) {
					continue
				}
				line := Render(s.view, at)
				if got := string(encode(formatWaybar, &line, nil)); got != before {
					t.Fatalf("%s: at %s and not before %s is shown\n%s, but at %s\n%s", s.name, now, next, before, at, got)
				}
			}
			line := Render(s.view, next)
			before, now = string(encode(formatWaybar, &line, nil)), next
		}
	}
}

// wellFormed checks what a bar relies on, whatever is shown.
func wellFormed(t *testing.T, line *Line, colors map[Level]string) {
	t.Helper()
	markup := func(s string) string {
		t.Helper()
		var text strings.Builder
		for d := xml.NewDecoder(strings.NewReader("<x>" + s + "</x>")); ; {
			token, err := d.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatalf("markup %q: %v", s, err)
			}
			if e, is := token.(xml.StartElement); is && e.Name.Local != "x" {
				t.Fatalf("markup %q has an element %s", s, e.Name.Local)
			}
			if c, is := token.(xml.CharData); is {
				text.Write(c)
			}
		}
		return text.String()
	}
	plain := func(s string, lines bool) {
		t.Helper()
		if !utf8.ValidString(s) {
			t.Fatalf("not UTF-8: %q", s)
		}
		for _, c := range s {
			if !unicode.IsPrint(c) && (!lines || c != '\n') {
				t.Fatalf("%q in %q", c, s)
			}
		}
	}
	for _, format := range formats {
		b := encode(format, line, colors)
		if bytes.Count(b, []byte("\n")) != 1 || b[len(b)-1] != '\n' {
			t.Fatalf("%s: not one line: %q", format, b)
		}
		if len(b) > 64<<10 {
			t.Fatalf("%s: %d bytes", format, len(b))
		}
		strict := json.NewDecoder(bytes.NewReader(b))
		strict.DisallowUnknownFields()
		var err error
		switch format {
		case formatI3bar:
			var blocks []i3barBlock
			err = strict.Decode(&blocks)
			if len(blocks) == 0 {
				t.Fatal("no blocks")
			}
			for _, b := range blocks {
				if b.FullText == "" || b.Name == "" || b.Markup != "pango" || !isColor(b.Color) {
					t.Fatalf("block %+v", b)
				}
				plain(markup(b.FullText), false)
				plain(markup(b.ShortText), false)
				plain(b.Instance, false)
			}
		case formatWaybar:
			var w waybarLine
			err = strict.Decode(&w)
			plain(markup(w.Text), false)
			plain(markup(w.Tooltip), true)
			if len(w.Class) == 0 || w.Percentage < 0 || w.Percentage > 100 {
				t.Fatalf("%+v", w)
			}
		case formatI3statusRust:
			var l i3statusRustLine
			err = strict.Decode(&l)
			plain(markup(l.Text), false)
			plain(markup(l.ShortText), false)
			if !strings.Contains(" Idle Info Good Warning Critical ", " "+l.State+" ") {
				t.Fatalf("state %q", l.State)
			}
		default:
			plain(string(b[:len(b)-1]), false)
		}
		if err != nil {
			t.Fatalf("%s: %v: %s", format, err, b)
		}
	}
}

func TestWellFormed(t *testing.T) {
	for _, s := range scenes() {
		for _, s.view.Pools = range []bool{false, true} {
			line := Render(s.view, s.now)
			wellFormed(t, &line, newBar(s.view.Config, "", nil).colors)
		}
	}
}

// Whatever anybody in the session sends, the bar gets well-formed lines.
func FuzzRender(f *testing.F) {
	for _, s := range scenes() {
		for _, source := range s.view.Sources {
			b, err := state.Encode(source.State)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, int64(0))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, after int64) {
		_, s, err := state.Decode(b)
		if err != nil || s == nil {
			return
		}
		for _, pools := range []bool{false, true} {
			v := viewOf(s)
			v.Pools = pools
			line := Render(v, s.At.Add(time.Duration(after)))
			wellFormed(t, &line, nil)
		}
	})
}

func TestNumber(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0", 99999: "99999", 100000: "100k", 123456: "123k", 999499: "999k", 999500: "1.0M", 1 << 20: "1.0M", 9_949_999: "9.9M",
		9_950_000: "10M", 1 << 32: "4.3G", math.MaxUint64: "18E",
	} {
		if got := number(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"pods": "pods", " a\tb\nc ": "a b c", "a\x00\x1b[1m": "a\uFFFD\uFFFD[1m", "x\u202ey\u2028": "x\uFFFDy\uFFFD",
		"\xff": "\uFFFD", "12345678": "12345678", "123456789": "1234567…", "日本語日本語日本": "日本語日本語日本", "日本語日本語日本語": "日本語日本語日…",
	} {
		if got := clean(in, 8); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
