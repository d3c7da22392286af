package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
)

// TestLaggingMember: a node that knows only a member which lags, and sees the
// past in serializable reads, gets the right answer or a refusal.
func TestLaggingMember(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(o *etcdcluster.Options) { o.ClientLinks = true })
	leader := clustertest.Leader(t, w.etcd)
	lagging := (leader + 1) % 3
	well := []string{w.etcd.Endpoints()[leader], w.etcd.Endpoints()[3-leader-lagging]}
	alone := w.node("alone", w.etcd.Endpoints()[lagging:lagging+1], `"timeout": "3s"`)
	var nodes []*node
	for i := range 2 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), well))
	}
	alone.call("ADD", "before", 0).ok(t)

	// Its links are slow, so that it answers from the past, has a leader, and
	// passes commits on.
	l := w.load(append(nodes, alone), func(l *load) { l.workers, l.may = 1, tryAgain })
	l.more(10)
	slow := time.Now()
	w.etcd.Delay(lagging, 150*time.Millisecond)
	l.after(slow, size(60, 400))
	stale := w.behind(lagging, leader)
	w.etcd.Heal(lagging)

	// It is paused, and wakes up with a view that is long past.
	for range size(3, 20) {
		if err := w.etcd.Pause(lagging); err != nil {
			t.Fatal(err)
		}
		l.more(20)
		if err := w.etcd.Resume(lagging); err != nil {
			t.Fatal(err)
		}
		l.more(5)
	}

	// It is cut off: what it knows gets old.
	cut := time.Now()
	w.etcd.Cut(lagging)
	l.after(cut, 30)
	r := alone.call("ADD", "cut", 0)
	r.refused(t, codeTryAgain, "no leader", w.etcd.Endpoints()[lagging])
	if r := alone.call("DEL", "before", 0); r.exit != 0 {
		t.Errorf("DEL at a member that is cut off: %s%s", r.stdout, r.stderr)
	}
	if got := alone.files("queue"); got == 0 {
		t.Error("nothing is queued")
	}
	w.etcd.Heal(lagging)
	clustertest.Wait(t, w.etcd)
	l.more(10)
	alone.call("ADD", "cut", 0).ok(t)
	alone.call("DEL", "cut", 0).ok(t)
	l.end()
	t.Logf("while its links were slow it was up to %d revisions behind", stale)
}

// behind is by how many revisions one member is behind another now.
func (w *world) behind(member, other int) int64 {
	w.t.Helper()
	var at [2]int64
	for i, m := range []int{member, other} {
		st, err := w.etcd.Status(w.t.Context(), m)
		if err != nil {
			w.t.Fatal(err)
		}
		at[i] = st.Header.Revision
	}
	return at[1] - at[0]
}
