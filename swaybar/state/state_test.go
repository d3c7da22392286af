package state_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

var at = time.Date(2026, 11, 20, 14, 3, 7, 0, time.UTC)

func full() *state.State {
	return &state.State{
		Source: "prod", Epoch: 1, Revision: 88213, At: at, Heartbeat: 15,
		Etcd: state.Etcd{OK: true}, Ledger: state.LedgerRunning,
		Verify: state.Verify{Result: state.VerifyOK, At: at}, Nodes: 3,
		Pools: []state.Pool{{Space: "default", Name: "pods", Capacity: 254, Leased: 31, Held: 2, Trend: -4}},
	}
}

// The document's spelling is what other programs rely on.
func TestEncode(t *testing.T) {
	b, err := state.Encode(full())
	if err != nil {
		t.Fatal(err)
	}
	want := `{"app":"ipam-ledger","v":1,"type":"state","source":"prod","epoch":1,"rev":88213,"at":"2026-11-20T14:03:07Z","hb":15,` +
		`"etcd":{"ok":true},"ledger":"running","verify":{"result":"ok","at":"2026-11-20T14:03:07Z"},"nodes":3,` +
		`"pools":[{"space":"default","name":"pods","cap":254,"leased":31,"held":2,"trend":-4}]}`
	if string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	if got := string(state.Hello()); got != `{"app":"ipam-ledger","v":1,"type":"hello"}` {
		t.Errorf("hello %s", got)
	}
	if kind, s, err := state.Decode(state.Hello()); kind != state.TypeHello || s != nil || err != nil {
		t.Errorf("hello decodes to %q, %v, %v", kind, s, err)
	}
}

// A member that a program does not know does not keep it from reading the rest:
// so a bar of before there was "cert" reads a state that has one, and today's
// reads tomorrow's.
func TestMembersAreAdded(t *testing.T) {
	s := full()
	s.Cert = &state.Cert{Kind: state.CertClient, Until: at.Add(240 * time.Hour), Warn: at.Add(-96 * time.Hour)}
	b, err := state.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	if want := `"cert":{"kind":"client","until":"2026-11-30T14:03:07Z","warn":"2026-11-16T14:03:07Z"}}`; !strings.HasSuffix(string(b), want) {
		t.Errorf("got %s, want at its end %s", b, want)
	}
	if _, got, err := state.Decode(b); err != nil || *got.Cert != *s.Cert {
		t.Errorf("%+v, %v", got, err)
	}
	later := strings.Replace(string(b), `"cert":`, `"morning":[{"x":1}],"cert":`, 1)
	if kind, got, err := state.Decode([]byte(later)); kind != state.TypeState || err != nil || got.Revision != s.Revision {
		t.Errorf("%q, %+v, %v", kind, got, err)
	}
	if _, got, err := state.Decode([]byte(strings.Replace(string(b), `,"cert":`, `,"x":`, 1))); err != nil || got.Cert != nil {
		t.Errorf("a state without: %+v, %v", got, err)
	}
}

// The fullest pools stay when not all fit, and no document is too large.
func TestEncodeCuts(t *testing.T) {
	for _, n := range []int{0, 1, 50, 500, 5000} {
		for _, width := range []int{1, 30, state.MaxText} {
			s := full()
			s.Pools, s.More = nil, 7
			for i := range n {
				s.Pools = append(s.Pools, state.Pool{
					Space: strings.Repeat("s", width), Name: fmt.Sprintf("%.*s", state.MaxText, fmt.Sprintf("%05d%s", i, strings.Repeat("n", width))),
					Capacity: uint64(n), Leased: uint64(i),
				})
			}
			b, err := state.Encode(s)
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > state.MaxSize {
				t.Errorf("%d pools: %d bytes", n, len(b))
			}
			_, got, err := state.Decode(b)
			if err != nil {
				t.Fatalf("%d pools: %v", n, err)
			}
			if len(got.Pools)+got.More != n+7 {
				t.Errorf("%d pools: %d and %d more", n, len(got.Pools), got.More)
			}
			for i := range got.Pools {
				if i > 0 && got.Pools[i].Percent() > got.Pools[i-1].Percent() {
					t.Errorf("%d pools: number %d is fuller than the one before", n, i)
				}
			}
			if k := len(got.Pools); k > 0 && k < n {
				first := state.Pool{Capacity: uint64(n), Leased: uint64(n - k - 1)} // that was cut
				if got.Pools[k-1].Percent() < first.Percent() {
					t.Errorf("%d pools: one of %d%% stays, one of %d%% does not", n, got.Pools[k-1].Percent(), first.Percent())
				}
			}
		}
	}
	s := full()
	s.Source, s.Etcd.Error = strings.Repeat("é", 200), strings.Repeat("日", 500)
	b, err := state.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	if _, got, err := state.Decode(b); err != nil || strings.ContainsRune(got.Source+got.Etcd.Error, '\uFFFD') {
		t.Errorf("long texts: %v", err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	change := func(f func(*state.State)) string {
		s := full()
		f(s)
		b, err := json.Marshal(struct {
			App  string `json:"app"`
			V    int    `json:"v"`
			Type string `json:"type"`
			*state.State
		}{state.App, state.Version, state.TypeState, s})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	long := strings.Repeat("x", state.MaxText+1)
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"nothing":             {"", state.ErrForeign},
		"no JSON":             {"reload", state.ErrForeign},
		"another's":           {`{"app":"other","v":1}`, state.ErrForeign},
		"array":               {`[1]`, state.ErrForeign},
		"newer":               {`{"app":"ipam-ledger","v":2,"type":"state"}`, state.ErrVersion},
		"newer, changed":      {`{"app":"ipam-ledger","v":2,"type":"state","pools":7}`, state.ErrVersion},
		"no version":          {`{"app":"ipam-ledger","type":"state"}`, state.ErrVersion},
		"other type":          {`{"app":"ipam-ledger","v":1,"type":"x"}`, state.ErrForeign},
		"too large":           {`{"app":"ipam-ledger","v":1,"type":"hello","x":"` + strings.Repeat("x", state.MaxSize) + `"}`, state.ErrForeign},
		"wrong type":          {`{"app":"ipam-ledger","v":1,"type":"state","rev":"x"}`, nil},
		"empty":               {`{"app":"ipam-ledger","v":1,"type":"state"}`, nil},
		"null":                {`{"app":"ipam-ledger","v":1,"type":"state","pools":null}`, nil},
		"no source":           {change(func(s *state.State) { s.Source = "" }), nil},
		"long source":         {change(func(s *state.State) { s.Source = long }), nil},
		"no time":             {change(func(s *state.State) { s.At = time.Time{} }), nil},
		"no heartbeat":        {change(func(s *state.State) { s.Heartbeat = 0 }), nil},
		"slow":                {change(func(s *state.State) { s.Heartbeat = math.MaxInt }), nil},
		"nameless pool":       {change(func(s *state.State) { s.Pools[0].Name = "" }), nil},
		"long pool":           {change(func(s *state.State) { s.Pools[0].Name = long }), nil},
		"long space":          {change(func(s *state.State) { s.Pools[0].Space = long }), nil},
		"long code":           {change(func(s *state.State) { s.Verify.Code = long }), nil},
		"long error":          {change(func(s *state.State) { s.Etcd.Error = long + long }), nil},
		"overflow":            {change(func(s *state.State) { s.Pools[0].Leased, s.Pools[0].Held = math.MaxUint64, 1 }), nil},
		"negative":            {change(func(s *state.State) { s.Nodes = -1 }), nil},
		"endless cert":        {change(func(s *state.State) { s.Cert = &state.Cert{Kind: "client"} }), nil},
		"cert of a long kind": {change(func(s *state.State) { s.Cert = &state.Cert{Kind: long, Until: at} }), nil},
		"warned too late":     {change(func(s *state.State) { s.Cert = &state.Cert{Until: at, Warn: at.Add(1)} }), nil},
		"negative more":       {change(func(s *state.State) { s.More = -1 }), nil},
	} {
		_, _, err := state.Decode([]byte(c.text))
		if err == nil || c.want != nil && !errors.Is(err, c.want) || c.want == nil && (errors.Is(err, state.ErrForeign) || errors.Is(err, state.ErrVersion)) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestNewer(t *testing.T) {
	old := full()
	if !old.Newer(nil) || old.Newer(old) {
		t.Error("than nothing, than itself")
	}
	for name, f := range map[string]func(s *state.State){
		"time":     func(s *state.State) { s.At = s.At.Add(1) },
		"revision": func(s *state.State) { s.Revision++; s.At = s.At.Add(-time.Hour) },
		"epoch":    func(s *state.State) { s.Epoch++; s.Revision = 1; s.At = s.At.Add(-time.Hour) },
	} {
		s := full()
		f(s)
		if !s.Newer(old) || old.Newer(s) {
			t.Errorf("by %s: %v and %v", name, s.Newer(old), old.Newer(s))
		}
	}
}

func TestStale(t *testing.T) {
	s := full()
	for after, want := range map[time.Duration]bool{-time.Hour: false, 0: false, 45 * time.Second: false, 45*time.Second + 1: true} {
		if got := s.Stale(at.Add(after)); got != want {
			t.Errorf("after %s: %v", after, got)
		}
	}
}

func TestPool(t *testing.T) {
	for _, c := range []struct {
		capacity, leased, held, free uint64
		percent                      int
	}{
		{0, 0, 0, 0, -1},
		{0, 5, 0, 0, -1},
		{254, 0, 0, 254, 0},
		{254, 127, 0, 127, 50},
		{254, 253, 0, 1, 99},
		{254, 200, 54, 0, 100},
		{254, 300, 0, 0, 100},
		{math.MaxUint64, 1 << 40, 0, math.MaxUint64 - 1<<40, 0},
		{math.MaxUint64, math.MaxUint64, 0, 0, 100},
	} {
		p := state.Pool{Capacity: c.capacity, Leased: c.leased, Held: c.held}
		if p.Free() != c.free || p.Percent() != c.percent {
			t.Errorf("%+v: free %d, %d%%", c, p.Free(), p.Percent())
		}
	}
}

// Whatever Decode accepts is within its bounds, and is written again the same.
func FuzzDecode(f *testing.F) {
	b, err := state.Encode(full())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(state.Hello())
	f.Add([]byte(`{"app":"ipam-ledger","v":2,"type":"state"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, s, err := state.Decode(b)
		if err != nil || kind == state.TypeHello {
			return
		}
		if len(b) > state.MaxSize || s.Source == "" || len(s.Pools) > state.MaxPools {
			t.Fatalf("accepted %d bytes, source %q, %d pools", len(b), s.Source, len(s.Pools))
		}
		for i := range s.Pools {
			if p := s.Pools[i].Percent(); p < -1 || p > 100 {
				t.Fatalf("%d%%", p)
			}
		}
		again, err := state.Encode(s)
		if err != nil {
			return // a year beyond 9999, or texts that escaping makes too large
		}
		if _, _, err := state.Decode(again); err != nil {
			t.Fatalf("%s: %v", again, err)
		}
	})
}
