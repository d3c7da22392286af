package access

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

var keys, _ = keyspace.New(keyspace.DefaultPrefix)

func subject(t *testing.T, text string) Subject {
	t.Helper()
	s, err := ParseSubject(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestPermissions freezes what each role allows: a change of it is a decision.
func TestPermissions(t *testing.T) {
	const p = "/ipam-ledger/v1/"
	for name, want := range map[string][]string{
		"node/worker-1": {
			"readwrite " + p + "addresses/*",
			"readwrite " + p + "attachments/worker-1/*",
			"readwrite " + p + "blocks/*",
			"readwrite " + p + "chains/node/worker-1/*",
			"read " + p + "meta",
			"read " + p + "pools/*",
			"read " + p + "stops/*",
			"readwrite " + p + "stops/worker-1",
			"readwrite " + p + "writers/node/worker-1",
		},
		"operator/alice@desk": {
			"read " + p + "*",
			"readwrite " + p + "addresses/*",
			"readwrite " + p + "attachments/*",
			"readwrite " + p + "blocks/*",
			"readwrite " + p + "chains/operator/alice@desk/*",
			"readwrite " + p + "meta",
			"readwrite " + p + "pools/*",
			"readwrite " + p + "stops/*",
			"readwrite " + p + "writers/node/*",
			"readwrite " + p + "writers/operator/*",
		},
		"auditor/carol": {"read " + p + "*"},
		"sealer/main": {
			"read " + p + "*",
			"readwrite " + p + "chains/*",
			"readwrite " + p + "writers/sealer/main",
		},
	} {
		var got []string
		for _, x := range Permissions(keys, subject(t, name)) {
			got = append(got, x.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s may\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func TestNames(t *testing.T) {
	s := subject(t, "node/worker-1")
	if s.Role(keys) != "/ipam-ledger/v1/node/worker-1" || s.User() != "node:worker-1" {
		t.Errorf("role %q, user %q", s.Role(keys), s.User())
	}
	if got, ok := OfRole(keys, s.Role(keys)); !ok || got != s {
		t.Errorf("the role is %v's", got)
	}
	if got, ok := OfUser(s.User()); !ok || got != s {
		t.Errorf("the user is %v", got)
	}
	if f := s.Flags("w1.example"); f != "--node worker-1 --cn node/worker-1=w1.example" {
		t.Errorf("flags %q", f)
	}
	for _, bad := range []string{"", "node", "node/", "node/a/b", "node/a b", "reader/x", "/x", "node/..", "node/" + strings.Repeat("x", 129)} {
		if s, err := ParseSubject(bad); err == nil {
			t.Errorf("%q is %v", bad, s)
		}
	}
	for _, role := range []string{"root", "/other/v1/node/worker-1", "/ipam-ledger/v1/", "/ipam-ledger/v1/meta", "/ipam-ledger/v1/node/a/b"} {
		if s, ok := OfRole(keys, role); ok {
			t.Errorf("%q is the role of %v", role, s)
		}
	}
	for _, user := range []string{"root", "worker-1", "node:", "node:a b", ":x"} {
		if s, ok := OfUser(user); ok {
			t.Errorf("%q is the user of %v", user, s)
		}
	}
}

func TestAllows(t *testing.T) {
	pp := []Permission{
		{Key: "a/", End: "a0", Read: true},
		{Key: "a/x", Read: true, Write: true},
		{Key: "b/", End: "b0", Read: true, Write: true},
		{Key: "b0", End: "b1", Read: true},
		{Key: "z", End: "\x00", Write: true},
	}
	for _, c := range []struct {
		write    bool
		key, end string
		want     bool
	}{
		{false, "a/1", "", true},
		{true, "a/1", "", false},
		{true, "a/x", "", true},
		{true, "a/x", "a/x\x00", true},
		{true, "a/x", "a/y", false},
		{false, "a/", "a0", true},
		{false, "a/", "a1", false},
		{false, "b/", "b1", true}, // two that adjoin
		{true, "b/", "b1", false},
		{true, "zz", "", true},
		{false, "zz", "", false},
		{false, "", "", false},
	} {
		if got := Allows(pp, c.write, c.key, c.end); got != c.want {
			t.Errorf("write %v of [%q, %q): %v", c.write, c.key, c.end, got)
		}
	}
}

func ops(p Plan) (out []string) {
	for _, c := range p.Changes {
		text := string(c.Op)
		for _, s := range []string{c.User, c.Role} {
			if s != "" {
				text += " " + strings.TrimPrefix(s, keys.Prefix())
			}
		}
		if c.Permission != (Permission{}) {
			text += " " + strings.ReplaceAll(c.Permission.String(), keys.Prefix(), "")
		}
		out = append(out, text)
	}
	return out
}

func wantOps(t *testing.T, p Plan, want ...string) {
	t.Helper()
	if got := ops(p); !slices.Equal(got, want) {
		t.Errorf("changes\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func wantNote(t *testing.T, p Plan, parts ...string) {
	t.Helper()
	if !slices.ContainsFunc(p.Notes, func(n string) bool {
		return !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(n, part) })
	}) {
		t.Errorf("no note says %q: %q", parts, p.Notes)
	}
}

func empty() State { return State{Roles: map[string][]Permission{}, Users: map[string][]string{}} }

func carryOut(s *State, p Plan) {
	for _, c := range p.Changes {
		s.Apply(c)
	}
}

func TestMake(t *testing.T) {
	auditor, node := subject(t, "auditor/carol"), subject(t, "node/w1")
	have := empty()
	p := Make(keys, []Want{{Subject: auditor}}, have)
	wantOps(t, p, "add-role auditor/carol", "grant-permission auditor/carol read *", "add-user auditor:carol", "give-role auditor:carol auditor/carol")
	carryOut(&have, p)
	carryOut(&have, Make(keys, []Want{{node, "w1.example"}}, have))
	if p = Make(keys, nil, have); len(p.Changes) > 0 || p.Same != 2 || len(p.Notes) > 0 {
		t.Errorf("once more: %q %q, %d the same", ops(p), p.Notes, p.Same)
	}
	if roles := have.Users["w1.example"]; !slices.Equal(roles, []string{node.Role(keys)}) {
		t.Errorf("the user of another name has %q", roles)
	}
	if p = Make(keys, []Want{{Subject: node}}, have); len(p.Changes) > 0 {
		t.Errorf("who has the role keeps it: %q", ops(p))
	}

	// Too wide, too narrow, another mode.
	role := node.Role(keys)
	have.Roles[role] = slices.DeleteFunc(have.Roles[role], func(p Permission) bool { return p.Key == keys.Meta() })
	have.Roles[role] = append(have.Roles[role], Permission{Key: "\x00", End: "\x00", Read: true, Write: true})
	for i := range have.Roles[role] {
		if have.Roles[role][i].Key == keys.Pool("") {
			have.Roles[role][i].Write = true
		}
	}
	p = Make(keys, nil, have)
	wantOps(t, p, "grant-permission node/w1 read meta", "grant-permission node/w1 read pools/*", "revoke-permission node/w1 readwrite *")
	carryOut(&have, p)

	// The certificate's name changes.
	p = Make(keys, []Want{{node, "w1.new"}}, have)
	wantOps(t, p, "add-user w1.new", "give-role w1.new node/w1", "take-role w1.example node/w1")
	carryOut(&have, p)

	// What is not ours is named and left alone.
	have.Roles["other"], have.Roles[keys.Prefix()+"manager"] = nil, nil
	have.Users["w1.new"] = append(have.Users["w1.new"], "other", "root")
	have.Users["mallory"] = []string{auditor.Role(keys)}
	p = Make(keys, nil, have)
	wantOps(t, p)
	wantNote(t, p, "manager", "left alone")
	wantNote(t, p, "w1.new", "other", "left alone")
	wantNote(t, p, "w1.new", "root", "may do everything")
	wantNote(t, p, "auditor/carol", "mallory", "auditor:carol")
}

func TestRemove(t *testing.T) {
	have := empty()
	node, both := subject(t, "node/w1"), subject(t, "node/w2")
	carryOut(&have, Make(keys, []Want{{node, ""}, {both, ""}, {Subject{Auditor, "w2"}, "node:w2"}}, have))
	p := Remove(keys, []Subject{node, both, {Sealer, "none"}}, have)
	wantOps(t, p, "delete-role node/w1", "delete-user node:w1", "delete-role node/w2")
	wantNote(t, p, "node:w2", "keeps", "auditor/w2")
	wantNote(t, p, "sealer/none", "no role")
	// Cut short after the role: the rest is found.
	have.Apply(p.Changes[0])
	wantOps(t, Remove(keys, []Subject{node}, have), "delete-user node:w1")
}

// TestAnyStateConverges: from whatever state, and cut short anywhere, plans end
// where each role allows what it should, and on the way no subject that had a
// permission and keeps it is without it.
func TestAnyStateConverges(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	names := []string{"node/a", "node/b", "operator/o", "auditor/x", "sealer/s"}
	for range 300 {
		have := empty()
		have.Roles["stranger"] = []Permission{{Key: "x", Read: true}}
		for _, n := range names {
			s := subject(t, n)
			if r.IntN(2) == 0 {
				continue
			}
			var pp []Permission
			for _, p := range append(Permissions(keys, s), Permissions(keys, subject(t, names[r.IntN(len(names))]))...) {
				if r.IntN(3) > 0 && !slices.ContainsFunc(pp, func(q Permission) bool { return q.Key == p.Key && q.End == p.End }) {
					p.Write = r.IntN(2) == 0
					pp = append(pp, p)
				}
			}
			have.Roles[s.Role(keys)] = pp
			for i := range r.IntN(3) {
				u := fmt.Sprintf("%s-%d", s.User(), i)
				have.Users[u] = append(have.Users[u], s.Role(keys))
			}
		}
		var wants []Want
		for _, n := range names {
			if r.IntN(2) == 0 {
				w := Want{Subject: subject(t, n)}
				if r.IntN(2) == 0 {
					w.User = "cn-" + n
				}
				wants = append(wants, w)
			}
		}
		for len(Make(keys, wants, have).Changes) > 0 {
			p := Make(keys, wants, have)
			for _, c := range p.Changes[:1+r.IntN(len(p.Changes))] {
				before := map[string][]Permission{}
				maps.Copy(before, have.Roles)
				have.Apply(c)
				s, ours := OfRole(keys, c.Role)
				if c.Role != "" && !ours {
					t.Fatalf("%v touches what is not ours", c)
				}
				if c.Op == DeleteRole || c.Op == DeleteUser {
					t.Fatalf("%v deletes", c)
				}
				for _, want := range Permissions(keys, s) {
					if ours && slices.Contains(before[c.Role], want) && !slices.Contains(have.Roles[c.Role], want) {
						t.Fatalf("%v takes %v", c, want)
					}
				}
			}
		}
		for _, w := range wants {
			holders := holdersOf(w.Role(keys), have)
			if len(holders) == 0 || w.User != "" && !slices.Equal(holders, []string{w.User}) {
				t.Fatalf("%v: holders %q, want %q", w, holders, w.User)
			}
		}
		for role, pp := range have.Roles {
			sortPermissions(pp)
			if s, ok := OfRole(keys, role); ok && !slices.Equal(pp, Permissions(keys, s)) {
				t.Fatalf("%s: %v", role, pp)
			}
		}
		if len(have.Roles["stranger"]) != 1 {
			t.Fatal("a stranger's role was touched")
		}
	}
}
