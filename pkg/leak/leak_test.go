package leak

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// wall is what the wall clock of these tests starts at.
var wall = time.Date(2025, 1, 15, 14, 0, 0, 0, time.UTC)

// at is a moment of one boot, with a wall clock that is right.
func at(since time.Duration) Moment {
	return Moment{Boot: "boot", Since: since, Wall: wall.Add(since)}
}

// asked is a look at a list that was taken at that moment.
func asked(source string, now Moment) Look {
	return Look{Source: source, At: now, Lists: []Taken{{Moment: now, Name: "asked"}}}
}

// ofFile is a look at a file.
func ofFile(t *testing.T, now Moment, mtime time.Time) Look {
	t.Helper()
	list, err := FromFile("file", "sum", mtime, now)
	if err != nil {
		t.Fatal(err)
	}
	return Look{Source: "runtime", At: now, Lists: []Taken{list}}
}

// held is the lease of a container, the nth it has.
func held(container string, n uint64) Lease {
	return Lease{ID: keyspace.AttachmentID{Container: container}, Value: keyspace.Attachment{Acquire: entry.Ref{Seq: n}, PodUID: "uid"}}
}

// TestJudge: whatever is observed when, a lease is leaked as soon as there are two
// observations of that very lease that are a grace period apart, with none in between in
// which it was on the list, and not before.
func TestJudge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		grace := time.Duration(rapid.IntRange(0, 5).Draw(t, "grace")) * time.Minute
		var now time.Duration
		var memory Memory
		// What the model knows of each container: its lease, and since when that
		// has been off the list without a break.
		type truth struct {
			lease uint64
			off   map[string]time.Duration
		}
		world := map[string]*truth{"a": {off: map[string]time.Duration{}}, "b": {off: map[string]time.Duration{}}}
		for range rapid.IntRange(1, 12).Draw(t, "runs") {
			now += time.Duration(rapid.IntRange(0, 4).Draw(t, "later")) * time.Minute
			source := rapid.SampledFrom([]string{"runtime", "pods"}).Draw(t, "source")
			var leases []Lease
			list := Containers{}
			for _, c := range []string{"a", "b"} {
				w := world[c]
				if rapid.IntRange(0, 4).Draw(t, "another lease") == 0 {
					w.lease++
					w.off = map[string]time.Duration{}
				}
				if rapid.IntRange(0, 2).Draw(t, "listed") == 0 {
					list[c] = true
					delete(w.off, source)
				}
				leases = append(leases, held(c, w.lease+1))
			}
			found, next, err := memory.Judge(asked(source, at(now)), leases, list, grace)
			if err != nil {
				t.Fatal(err)
			}
			if found.Known+len(found.Suspects) != len(leases) || found.Untold != 0 {
				t.Fatalf("%+v: not every lease is accounted for", found)
			}
			for _, s := range found.Suspects {
				w := world[s.ID.Container]
				first, again := w.off[source]
				if want := again && now-first >= grace; s.Leaked != want {
					t.Fatalf("at %v: %s leaked: %v, want %v (off since %v)", now, s.ID.Container, s.Leaked, want, first)
				}
				if !again {
					w.off[source] = now
				}
			}
			memory = next
		}
	})
}

// host is a machine of TestLiving.
type host struct {
	boots  int
	booted time.Duration // when, in true time
	ahead  time.Duration // by how much its wall clock is ahead of true time
	files  []*file
}

// file is a list that was written on a host.
type file struct {
	made  time.Duration // in true time
	ahead time.Duration // of the host's wall clock then
	ids   Containers
}

func (h *host) now(name string, true time.Duration) Moment {
	return Moment{Boot: fmt.Sprint(name, " boot ", h.boots), Since: true - h.booted, Wall: wall.Add(true + h.ahead)}
}

// TestLiving: whatever lists are used in whatever order, however old they are,
// wherever the memory is moved, and whatever clocks say, no lease of what lives is
// ever leaked. The one list that is excepted is a file that was written while the
// clock was further ahead than in the observation and when the list was used.
func TestLiving(t *testing.T) {
	excepted, leaked := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		const grace = 5 * time.Minute
		var now time.Duration // true time
		pass := func() {
			now += rapid.SampledFrom([]time.Duration{0, time.Second, time.Minute, 2 * time.Minute, grace - time.Second, grace, time.Hour}).Draw(t, "later")
		}
		type sandbox struct {
			lease         Lease
			listed, ended time.Duration // ended: 0 while it lives
		}
		var all []*sandbox
		list := func() Containers {
			out := Containers{}
			for _, s := range all {
				if s.listed <= now && s.ended == 0 {
					out[s.lease.ID.Container] = true
				}
			}
			return out
		}
		hosts := map[string]*host{"A": {}, "B": {}}
		ahead := map[Moment]time.Duration{} // the error of the wall clock at each observation
		var memory Memory
		begun := uint64(0)
		begin := func() {
			begun++
			s := &sandbox{lease: held(fmt.Sprint("c", begun), begun)}
			s.listed = now + rapid.SampledFrom([]time.Duration{0, time.Minute, grace - time.Second}).Draw(t, "delay")
			all = append(all, s)
		}
		end := func() {
			if len(all) > 0 {
				if s := rapid.SampledFrom(all).Draw(t, "sandbox"); s.ended == 0 {
					s.ended = max(now, 1)
				}
			}
		}
		step := func() {
			switch rapid.IntRange(0, 4).Draw(t, "meanwhile") {
			case 0:
				begin()
			case 1:
				end()
			case 2:
				pass()
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"begin": func(*rapid.T) { begin() },
			"end":   func(*rapid.T) { end() },
			"pass":  func(*rapid.T) { pass() },
			"set clock": func(t *rapid.T) {
				h := hosts[rapid.SampledFrom([]string{"A", "B"}).Draw(t, "host")]
				h.ahead = rapid.SampledFrom([]time.Duration{0, time.Second, grace, time.Hour, -time.Hour, 90000 * time.Hour, -90000 * time.Hour}).Draw(t, "ahead")
			},
			"boot": func(t *rapid.T) {
				h := hosts[rapid.SampledFrom([]string{"A", "B"}).Draw(t, "host")]
				h.boots, h.booted = h.boots+1, now
			},
			"write": func(t *rapid.T) {
				h := hosts[rapid.SampledFrom([]string{"A", "B"}).Draw(t, "host")]
				h.files = append(h.files, &file{made: now, ahead: h.ahead, ids: list()})
			},
			"look": func(t *rapid.T) {
				name := rapid.SampledFrom([]string{"A", "B"}).Draw(t, "host")
				h := hosts[name]
				look := Look{Source: rapid.SampledFrom([]string{"runtime", "runtime", "pods"}).Draw(t, "source")}
				began := h.now(name, now)
				step()
				var leases []Lease
				for _, s := range all {
					leases = append(leases, s.lease)
				}
				step()
				look.At = h.now(name, now)
				step()
				var ids Containers
				var from *file
				how := rapid.SampledFrom([]string{"ask", "file", "pipe"}).Draw(t, "how")
				if how != "ask" && len(h.files) > 0 {
					from = rapid.SampledFrom(h.files).Draw(t, "file")
				}
				switch {
				case from == nil:
					ids = list()
					look.Lists = []Taken{{Moment: began}}
				case how == "file":
					ids = from.ids
					x, err := FromFile("file", fmt.Sprintf("%p", from), wall.Add(from.made+from.ahead), look.At)
					if err != nil {
						return
					}
					look.Lists = []Taken{x}
				default:
					// What is piped was made for it, or is what was looked at last.
					if m := memory.last(&Look{Source: look.Source, At: look.At, Lists: []Taken{{Moment: began}}}); m == nil || m.Lists[0].Sum != fmt.Sprintf("%p", from) {
						from = &file{made: now, ids: list()}
						h.files = append(h.files, from)
					}
					ids, look.Lists = from.ids, []Taken{{Moment: began, Sum: fmt.Sprintf("%p", from)}}
				}
				ahead[look.At] = h.ahead
				found, next, err := memory.Judge(look, leases, ids, grace)
				if err != nil {
					if from == nil {
						t.Fatalf("a list that was just asked for: %v", err)
					}
					return
				}
				for _, s := range found.Suspects {
					i := slices.IndexFunc(all, func(x *sandbox) bool { return x.lease.ID == s.ID })
					switch {
					case !s.Leaked:
					case all[i].ended > 0:
						leaked++
					case how == "file" && from != nil && from.ahead > max(ahead[s.First], h.ahead):
						excepted++
					default:
						t.Fatalf("%s lives, is leased since, and is leaked, by %s: first %+v, now %+v, lists %+v", s.ID, how, s.First, look.At, look.Lists)
					}
				}
				// Freed ones are leased no more.
				if rapid.Bool().Draw(t, "free") {
					for _, s := range found.Suspects {
						if s.Leaked {
							all = slices.DeleteFunc(all, func(x *sandbox) bool { return x.lease.ID == s.ID && x.ended > 0 })
						}
					}
				}
				if b, err := json.Marshal(next); err != nil || json.Unmarshal(b, &memory) != nil {
					t.Fatal(err)
				}
				if len(memory) > 2*maxBoots {
					t.Fatalf("%d looks are kept", len(memory))
				}
			},
		})
	})
	t.Logf("%d leases were leaked, %d by a file that was written while the clock was ahead", leaked, excepted)
}

// TestOldFile: a file proves nothing about what began after it, however often it is
// used, and is looked at once.
func TestOldFile(t *testing.T) {
	written := wall.Add(time.Minute)
	leases, none := []Lease{held("c", 1)}, Containers{"other": true}
	var memory Memory
	// The sandbox began after the file was written, and lives.
	found, memory, err := memory.Judge(ofFile(t, at(2*time.Minute), written), leases, none, time.Minute)
	if err != nil || found.Suspects[0].Leaked {
		t.Fatal(found, err)
	}
	_, _, err = memory.Judge(ofFile(t, at(time.Hour), written), leases, none, time.Minute)
	if err == nil || !strings.Contains(err.Error(), "file: the list is of 2025-01-15T14:01:00Z, and the last one that was looked at of 2025-01-15T14:01:00Z") {
		t.Fatalf("the same file again: %v", err)
	}
	// One that is newer, and was written before the grace was over.
	found, memory, err = memory.Judge(ofFile(t, at(time.Hour), written.Add(2*time.Minute-time.Second)), leases, none, time.Minute)
	if err != nil || found.Suspects[0].Leaked {
		t.Fatal(found, err)
	}
	found, _, err = memory.Judge(ofFile(t, at(2*time.Hour), written.Add(2*time.Minute)), leases, none, time.Minute)
	if err != nil || !found.Suspects[0].Leaked || found.Suspects[0].Off != time.Minute {
		t.Fatal(found, err)
	}
	// After the runtime was asked, too, a file has to be newer.
	_, memory, err = memory.Judge(asked("runtime", at(2*time.Hour)), leases, none, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err = memory.Judge(ofFile(t, at(3*time.Hour), wall.Add(time.Hour)), leases, none, time.Minute); err == nil {
		t.Fatal("a file that is older than the runtime's last answer")
	}
	// With several lists the oldest counts.
	look := ofFile(t, at(3*time.Hour), wall.Add(2*time.Hour+time.Second))
	look.Lists = append(look.Lists, Taken{Moment: look.At, Name: "-"})
	if found, _, err = memory.Judge(look, leases, none, time.Minute); err != nil || found.Suspects[0].Off != 2*time.Hour+time.Second-2*time.Minute {
		t.Fatal(found, err)
	}
}

// TestPipe: what bears no time is taken once.
func TestPipe(t *testing.T) {
	leases, none := []Lease{held("c", 1)}, Containers{"other": true}
	pipe := func(now Moment, sum string) Look {
		return Look{Source: "runtime", At: now, Lists: []Taken{{Moment: now, Name: "--containers -", Sum: sum}}}
	}
	_, memory, err := Memory(nil).Judge(pipe(at(0), "a"), leases, none, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = memory.Judge(pipe(at(time.Hour), "a"), leases, none, time.Minute)
	if err == nil || !strings.Contains(err.Error(), "--containers -: the list, read at 2025-01-15T15:00:00Z, is byte for byte the one that was looked at at 2025-01-15T14:00:00Z") {
		t.Fatal(err)
	}
	if found, _, err := memory.Judge(pipe(at(time.Hour), "b"), leases, none, time.Minute); err != nil || !found.Suspects[0].Leaked {
		t.Fatal(found, err)
	}
}

// TestClocks: what other boots and clocks that are set do to an observation.
func TestClocks(t *testing.T) {
	const year = 365 * 24 * time.Hour
	leases, none := []Lease{held("c", 1)}, Containers{"other": true}
	moment := func(boot string, since, ahead time.Duration) Moment {
		return Moment{Boot: boot, Since: since, Wall: wall.Add(since + ahead)}
	}
	file := func(now Moment, age time.Duration) Look { return ofFile(t, now, now.Wall.Add(-age)) }
	for name, c := range map[string]struct {
		first, second Look
		want          bool
	}{
		"the next boot":                 {asked("runtime", moment("1", time.Hour, 0)), asked("runtime", moment("2", 2*time.Hour, 0)), false},
		"no boot":                       {asked("runtime", moment("", time.Hour, 0)), asked("runtime", moment("", 2*time.Hour, 0)), false},
		"a machine that went back":      {asked("runtime", moment("1", time.Hour, 0)), asked("runtime", moment("1", time.Minute, 0)), false},
		"ahead by years":                {asked("runtime", moment("1", time.Hour, 0)), asked("runtime", moment("1", time.Hour+time.Minute, 9*year)), false},
		"ahead, asked":                  {asked("runtime", moment("1", time.Hour, 0)), asked("runtime", moment("1", time.Hour+5*time.Minute, 9*year)), true},
		"back by years, asked":          {asked("runtime", moment("1", time.Hour, 9*year)), asked("runtime", moment("1", time.Hour+5*time.Minute, 0)), true},
		"a file, ahead by years":        {file(moment("1", time.Hour, 0), 0), file(moment("1", time.Hour+time.Minute, 9*year), 0), false},
		"a file, ahead and long after":  {file(moment("1", time.Hour, 0), 0), file(moment("1", time.Hour+5*time.Minute, 9*year), 0), true},
		"a file, ahead and too soon":    {file(moment("1", time.Hour, 0), 0), file(moment("1", 2*time.Hour, 9*year), 59*time.Minute), false},
		"a file, back by years":         {file(moment("1", time.Hour, 9*year), 0), file(moment("1", time.Hour+5*time.Minute, 0), 0), false},
		"a file, back by a little":      {file(moment("1", time.Hour, time.Minute), 0), file(moment("1", time.Hour+5*time.Minute, 0), 0), false},
		"back by a little, and waiting": {file(moment("1", time.Hour, time.Minute), 0), file(moment("1", time.Hour+6*time.Minute, 0), 0), true},
		"a file of before the epoch":    {ofFile(t, moment("1", time.Hour, 0), time.Unix(-1<<40, 0)), asked("runtime", moment("1", 2*time.Hour, 0)), true},
	} {
		t.Run(name, func(t *testing.T) {
			_, memory, err := Memory(nil).Judge(c.first, leases, none, 5*time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := json.Marshal(memory); err != nil {
				t.Fatal(err)
			}
			found, memory, err := memory.Judge(c.second, leases, none, 5*time.Minute)
			if name == "a machine that went back" && found.Suspects[0].First != c.second.At {
				t.Fatalf("%+v is counted from a moment that has not been", found)
			}
			if err != nil && c.want || err == nil && found.Suspects[0].Leaked != c.want {
				t.Fatalf("%+v, %v; want leaked: %v", found, err, c.want)
			}
			if name == "no boot" || err != nil {
				return
			}
			// And then it goes on: a wrong clock of before holds nothing up.
			next := c.second.At
			for range 2 {
				next.Since, next.Wall = next.Since+time.Hour, next.Wall.Add(time.Hour)
				if found, memory, err = memory.Judge(ofFile(t, next, next.Wall), leases, none, 5*time.Minute); err != nil {
					t.Fatal(err)
				}
			}
			if !found.Suspects[0].Leaked {
				t.Fatalf("two hours later: %+v", found)
			}
		})
	}
	_, err := FromFile("--pods pods.json", "", wall.Add(time.Second), at(0))
	if err == nil || !strings.Contains(err.Error(), "--pods pods.json: the file is of 2025-01-15T14:00:01Z, and the clock says 2025-01-15T14:00:00Z") {
		t.Errorf("a file of the future: %v", err)
	}
}

// TestMemory: a memory that is moved between machines makes progress on each, does
// not grow, and forgets what a list on another machine had.
func TestMemory(t *testing.T) {
	leases, none := []Lease{held("c", 1), held("d", 1)}, Containers{"other": true}
	on := func(host int, since time.Duration) Look {
		return asked("pods", Moment{Boot: fmt.Sprint("host ", host), Since: since, Wall: wall})
	}
	var memory Memory
	judge := func(look Look, list List) Findings {
		t.Helper()
		found, next, err := memory.Judge(look, leases, list, 5*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		memory = next
		return found
	}
	for i := range 3 {
		judge(on(i, time.Hour), none)
	}
	judge(asked("runtime", at(0)), none)
	if found := judge(on(0, 2*time.Hour), none); !found.Suspects[0].Leaked || !found.Suspects[1].Leaked {
		t.Fatal(found)
	}
	// On host 1 there is c again.
	judge(on(1, 2*time.Hour), Containers{"c": true})
	if found := judge(on(0, 3*time.Hour), none); found.Suspects[0].Leaked || !found.Suspects[1].Leaked {
		t.Fatal(found)
	}
	for i := range 20 {
		judge(on(i, 3*time.Hour), none)
	}
	if len(memory) != maxBoots+1 { // and the runtime's
		t.Fatalf("%d looks are kept", len(memory))
	}
}

// TestContainers: a runtime's list says nothing about what is no pod's.
func TestContainers(t *testing.T) {
	list := Containers{"listed": true, "stopped": false}
	for _, c := range []struct {
		pod, uid, container string
		has, tells          bool
	}{
		{"shop/web", "u", "listed", true, true},
		{"shop/web", "u", "stopped", true, true},
		{"shop/web", "u", "gone", false, true},
		{"shop/web", "", "gone", false, true},
		{"", "u", "gone", false, true},
		{"", "", "listed", true, true},
		{"", "", "gone", false, false},    // nerdctl, or identity: none
		{"web", "", "gone", false, false}, // podman
	} {
		l := &Lease{ID: keyspace.AttachmentID{Container: c.container}, Value: keyspace.Attachment{Pod: c.pod, PodUID: c.uid}}
		if has, tells := list.Has(l); has != c.has || tells != c.tells {
			t.Errorf("%+v: %v, %v", c, has, tells)
		}
		if has, tells := All(list).Has(l); has != c.has || !tells {
			t.Errorf("%+v, all: %v, %v", c, has, tells)
		}
	}
}

// TestPods: whose lease is whose.
func TestPods(t *testing.T) {
	p := new(Pods)
	err := p.Add(strings.NewReader(`{"kind": "PodList", "metadata": {"resourceVersion": "7"}, "items": [
		{"metadata": {"namespace": "shop", "name": "web-0", "uid": "u1"}, "spec": {"nodeName": "n1"}},
		{"metadata": {"namespace": "kube-system", "name": "etcd-n1", "uid": "mirror", "annotations": {
			"kubernetes.io/config.mirror": "m2", "kubernetes.io/config.hash": "m1", "other": "u9"}}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		pod, uid   string
		has, tells bool
	}{
		{"shop/web-0", "u1", true, true},
		{"shop/web-0", "u2", false, true}, // the pod of that name before this one
		{"shop/web-0", "", true, true},    // identity without UID
		{"shop/web-1", "", false, true},
		{"", "u1", true, true},    // identity: uid
		{"", "", false, false},    // identity: none, or no pod at all
		{"web", "", false, false}, // podman's
		{"kube-system/etcd-n1", "m1", true, true},
		{"kube-system/etcd-n1", "m2", true, true},
		{"kube-system/etcd-n1", "mirror", true, true},
		{"kube-system/etcd-n1", "u9", false, true},
	} {
		has, tells := p.Has(&Lease{Value: keyspace.Attachment{Pod: c.pod, PodUID: c.uid}})
		if has != c.has || tells != c.tells {
			t.Errorf("%q, UID %q: %v, %v; want %v, %v", c.pod, c.uid, has, tells, c.has, c.tells)
		}
	}
}

// TestPartOfPods: what was not read to its end is not all pods, however sound.
func TestPartOfPods(t *testing.T) {
	p := new(Pods)
	err := p.Add(strings.NewReader(`{"kind": "PodList", "metadata": {"continue": "x"}, "items": [{"metadata": {"namespace": "shop", "name": "web-0", "uid": "u1"}}]}`))
	if err == nil || !strings.Contains(err.Error(), "metadata.continue is set") || p.Len() != 0 {
		t.Errorf("%d pods, %v", p.Len(), err)
	}
}

// TestNoPods: a list without a pod proves nothing.
func TestNoPods(t *testing.T) {
	for _, list := range []string{`{"kind": "PodList", "items": []}`, `{"kind": "List"}`, `{"kind": "List", "items": null}`} {
		if err := new(Pods).Add(strings.NewReader(list)); err == nil {
			t.Errorf("%s is believed", list)
		}
	}
}

// FuzzPods: whatever is read, a list is taken whole or not at all.
func FuzzPods(f *testing.F) {
	for _, s := range []string{
		`{"kind": "List", "items": [{"kind": "Pod", "metadata": {"namespace": "a", "name": "b", "uid": "c"}}]}`,
		`{"kind": "PodList", "items": [{"metadata": {"namespace": "a", "name": "b", "uid": "c", "annotations": {"kubernetes.io/config.hash": "d"}}}]}`,
		`{"kind": "PodList", "metadata": {"continue": "x"}, "items": [{}]}`,
		`{"kind": "List", "items": []} {}`, `{"kind": "Pod"}`, `[`, ``, `null`, `{"items": null}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p := new(Pods)
		if err := p.Add(strings.NewReader(s)); err != nil {
			if p.Len() != 0 || p.uids != nil {
				t.Fatalf("%v, and yet %d pods were taken", err, p.Len())
			}
			return
		}
		if p.Len() == 0 || len(p.uids) == 0 || p.uids[""] || p.names["/"] {
			t.Fatalf("taken without a pod: %+v", p)
		}
	})
}
