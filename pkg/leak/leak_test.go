package leak

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// TestJudge: whatever is observed when, a lease is leaked only after two
// observations of that very lease that are a grace period apart, with none in between in
// which it was on the list.
func TestJudge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		grace := time.Duration(rapid.IntRange(0, 5).Draw(t, "grace")) * time.Minute
		start := time.Unix(1e9, 0)
		now := start
		var kept []Observation
		// What the model knows of each container: its lease, and since when that
		// has been off the list without a break.
		type truth struct {
			lease uint64
			off   map[string]time.Time
		}
		world := map[string]*truth{"a": {off: map[string]time.Time{}}, "b": {off: map[string]time.Time{}}}
		for range rapid.IntRange(1, 12).Draw(t, "runs") {
			now = now.Add(time.Duration(rapid.IntRange(0, 4).Draw(t, "later")) * time.Minute)
			source := rapid.SampledFrom([]string{"runtime", "pods"}).Draw(t, "source")
			var leases []Lease
			list := Containers{}
			for _, c := range []string{"a", "b"} {
				w := world[c]
				if rapid.IntRange(0, 4).Draw(t, "another lease") == 0 {
					w.lease++
					w.off = map[string]time.Time{}
				}
				if rapid.IntRange(0, 2).Draw(t, "listed") == 0 {
					list[c] = true
					delete(w.off, source)
				}
				leases = append(leases, Lease{ID: keyspace.AttachmentID{Container: c}, Value: keyspace.Attachment{Acquire: entry.Ref{Seq: w.lease + 1}}})
			}
			found := Judge(leases, list, source, kept, now, grace)
			if found.Known+len(found.Suspects) != len(leases) || found.Untold != 0 {
				t.Fatalf("%+v: not every lease is accounted for", found)
			}
			next := []Observation{}
			for _, o := range kept {
				if o.Source != source {
					next = append(next, o)
				}
			}
			for _, s := range found.Suspects {
				w := world[s.ID.Container]
				first, again := w.off[source]
				want := again && first.Before(now) && now.Sub(first) >= grace
				if s.Leaked != want {
					t.Fatalf("at %v: %s leaked: %v, want %v (off since %v)", now, s.ID.Container, s.Leaked, want, first)
				}
				if !again {
					w.off[source] = now
				}
				next = append(next, Observation{s.ID, s.Value.Acquire, source, s.Since})
			}
			kept = next
		}
	})
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
		{"", "u1", true, true}, // identity: uid
		{"", "", false, false}, // identity: none, or no pod at all
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
