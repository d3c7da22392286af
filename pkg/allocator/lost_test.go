package allocator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// TestStateLost: pods that run on a node whose state directory was lost keep
// their addresses when the next drill asks what the node holds. One whose release
// waits does not come back.
func TestStateLost(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	p, n, ctx := mustPool(t, "10.22.0.0/24"), w.nodes[0], context.Background()
	for _, c := range []string{"a", "b", "gone"} {
		if _, err := n.add(p, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(n.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := n.add(p, "c"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("a node without its key: %v", err)
	}
	if err := n.del("gone"); err != nil {
		t.Fatal(err)
	}
	admin := func(f func(*Writer) error) {
		t.Helper()
		if err := w.admin.run(f); err != nil {
			t.Fatal(err)
		}
	}
	admin(func(x *Writer) error { _, err := x.Replace(ctx, Replacement{Writer: n.who}, "lost"); return err })
	if _, err := n.add(p, "c"); err != nil {
		t.Fatal(err)
	}
	admin(func(x *Writer) error { _, _, err := x.RecoverStart(ctx, 0, "a drill"); return err })
	var r *Recovery
	if err := n.run(func(x *Writer) (err error) { r, err = x.Recover(ctx, nil, "a drill"); return err }); err != nil {
		t.Fatal(err)
	}
	if !r.Done || r.Kept != 3 || len(r.Released) > 0 || len(r.Asserted) > 0 {
		t.Errorf("recovered: %+v", r)
	}
	admin(func(x *Writer) error { _, err := x.Thaw(ctx, []string{n.who.Name}, nil, "done"); return err })
	for c, want := range map[string]string{"a": "10.22.0.2", "b": "10.22.0.3"} {
		got, err := n.add(p, c)
		wantAddrs(t, got, err, want)
	}
	// Pods that died with the directory are for the runtime's GC.
	err := n.run(func(x *Writer) error {
		got, err := x.GC(ctx, "net", map[keyspace.AttachmentID]bool{n.attachment("a"): true, n.attachment("c"): true})
		if !slices.Equal(got, []keyspace.AttachmentID{n.attachment("b")}) {
			t.Errorf("GC released %v", got)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRenamed: a pod that goes while its node has another name is released when
// the name is set back.
func TestRenamed(t *testing.T) {
	w := newWorld(t, 1)
	defer w.store.check(t)
	w.init(t)
	p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
	if _, err := n.add(p, "a"); err != nil {
		t.Fatal(err)
	}
	was := n.who
	n.who = entry.Writer{Kind: entry.KindNode, Name: "renamed"}
	if _, err := n.add(p, "b"); !errors.Is(err, ErrIntegrity) {
		t.Fatalf("another name: %v", err)
	}
	if err := n.del("a"); err != nil {
		t.Fatal(err)
	}
	n.who = was
	if held, err := n.writer().Dir.Holdings(); err != nil || len(held) > 0 {
		t.Errorf("a pod that is gone is held: %v, %v", held, err)
	}
	if err := n.run(func(x *Writer) error { return x.Probe(context.Background()) }); err != nil {
		t.Fatal(err)
	}
	if _, ok := w.store.now().keys[testKeys.Attachment(n.attachment("a"))]; ok {
		t.Error("the release under another name was lost")
	}
}

// TestClaimLost: a block that was claimed after the backup is its node's again
// when the drill is done, and no other node claims it over its pods.
func TestClaimLost(t *testing.T) {
	w := newWorld(t, 2)
	defer w.store.check(t)
	w.init(t)
	p, err := NewPool("default", "net", rangeSets("10.22.0.0/24"), nil, true, 16, 0)
	if err != nil {
		t.Fatal(err)
	}
	a, b, ctx := w.nodes[0], w.nodes[1], context.Background()
	if _, err := b.add(p, "b0"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"a0", "a1"} {
		got, err := a.add(p, c)
		wantAddrs(t, got, err, map[string]string{"a0": "10.22.0.16", "a1": "10.22.0.17"}[c])
	}
	w.store.restore(2, true)
	for _, n := range w.nodes {
		n.reconnect()
	}
	w.admin.reconnect()
	run := func(n *machine, f func(*Writer) error) {
		t.Helper()
		if err := n.run(f); err != nil {
			t.Fatal(err)
		}
	}
	run(w.admin, func(x *Writer) error { _, _, err := x.RecoverStart(ctx, 0, "a drill"); return err })
	for _, n := range w.nodes {
		run(n, func(x *Writer) error { _, err := x.Recover(ctx, nil, "a drill"); return err })
	}
	run(w.admin, func(x *Writer) error {
		_, err := x.Thaw(ctx, []string{a.who.Name, b.who.Name}, nil, "done")
		return err
	})
	for i := range 20 {
		got, err := b.add(p, fmt.Sprint("later", i))
		if err != nil {
			t.Fatal(err)
		}
		if netip.MustParsePrefix("10.22.0.16/28").Contains(got[0]) {
			t.Fatalf("%v is in the block of another node's pods", got)
		}
	}
}

// TestReplyLost: wherever etcd goes away after a commit whose reply was lost, an
// ADD that fails leaves no lease without somebody who will end it. What was
// answered before stays.
func TestReplyLost(t *testing.T) {
	leased := 0
	for reads := range 12 {
		w := newWorld(t, 1)
		w.init(t)
		p, n := mustPool(t, "10.22.0.0/24"), w.nodes[0]
		if _, err := n.add(p, "a"); err != nil {
			t.Fatal(err)
		}
		for _, c := range []string{"b", "a"} {
			n.reconnect()
			n.conn.next, n.conn.deafAfter = loseApplied, reads+1
			_, err := n.add(p, c)
			id := n.attachment(c)
			_, there := w.store.now().keys[testKeys.Attachment(id)]
			dir := n.writer().Dir
			pending, _ := dir.Pending()
			switch queued := dir.IsQueued(id); {
			case c == "a" && (queued || !there):
				t.Errorf("%d reads, then nothing: the lease of a pod that runs is ended (%v)", reads+1, err)
			case c == "b" && err != nil && there && !queued && !pending:
				t.Errorf("%d reads, then nothing: ADD failed (%v), its lease is there, and no release waits", reads+1, err)
			case c == "b" && err != nil && there:
				leased++
			}
		}
		w.store.check(t)
	}
	if leased == 0 {
		t.Error("no ADD failed after its commit: this tests nothing")
	}
}
