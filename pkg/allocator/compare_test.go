package allocator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// TestComparisons has, for each comparison of a transaction, an interleaving
// that it closes. Each case runs twice: as it is, when nothing may be wrong, and
// with that one comparison left out, when something must be. So a comparison
// that is dropped fails the first run, and a case that tests nothing fails the
// second.
func TestComparisons(t *testing.T) {
	ctx := context.Background()
	key := func(k string) func(Compare) bool { return func(c Compare) bool { return c.Key == k && c.End == "" } }
	span := func(k string) func(Compare) bool { return func(c Compare) bool { return c.Key == k && c.End != "" } }
	put := func(w *world, k string, v any) {
		w.store.mu.Lock()
		defer w.store.mu.Unlock()
		b, ok := v.([]byte)
		if !ok {
			b = keyspace.Encode(v)
		}
		w.store.apply(Txn{Then: []Write{{Key: k, Value: b}}})
	}
	get := func(w *world, k string) []byte { return w.store.now().keys[k].value }
	addr := func(s string) string { return testKeys.Address("default", netip.MustParseAddr(s)) }
	clean := func(w *world) error {
		r, err := audit.Verify(ctx, w.store, audit.Options{Workers: 1})
		if err != nil {
			return err
		}
		if r.ExitCode() != 0 {
			return fmt.Errorf("verify: %+v", r.Findings[0])
		}
		return nil
	}

	type scene struct {
		w    *world
		p    *Pool
		a, b *machine
	}
	for _, c := range []struct {
		name string
		drop func(Compare) bool
		run  func(t *testing.T, s *scene) error // what is wrong afterwards
	}{
		{"meta: frozen between view and commit", key(testKeys.Meta()), func(t *testing.T, s *scene) error {
			s.a.conn.between = func() {
				if err := s.w.admin.run(func(x *Writer) error { _, err := x.Freeze(ctx, "test"); return err }); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.a.add(s.p, "c1"); err == nil {
				return errors.New("allocated after the freeze")
			}
			return clean(s.w)
		}},
		{"stops: another node found a rollback between view and commit", span(testKeys.Stops()), func(t *testing.T, s *scene) error {
			s.a.conn.between = func() { put(s.w, testKeys.Stop("b"), keyspace.Stop{Node: "b", Found: "test"}) }
			if _, err := s.a.add(s.p, "c1"); err == nil {
				return errors.New("allocated after the stop")
			}
			return nil
		}},
		{"writer: a commit lands after its process died and another answered", key(testKeys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n0"})), func(t *testing.T, s *scene) error {
			s.a.conn.next = killSent
			if _, err := s.a.add(s.p, "c1"); !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			s.a.reconnect()
			if err := s.a.del("c1"); err != nil {
				t.Fatal(err)
			}
			s.w.store.land()
			if kv, ok := s.w.store.now().keys[testKeys.Attachment(s.a.attachment("c1"))]; ok {
				return fmt.Errorf("leaked: %s", kv.value)
			}
			return clean(s.w)
		}},
		{"fence: the lost commit lands between its read and its put", key(testKeys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n0"})), func(t *testing.T, s *scene) error {
			s.a.conn.next = killSent
			if _, err := s.a.add(s.p, "c1"); !errors.Is(err, errKilled) {
				t.Fatal(err)
			}
			s.a.reconnect()
			s.a.conn.between = s.w.store.land
			w := s.a.writer()
			w.Timeout = 200e6 // without the comparison it conflicts for ever
			_, _ = w.Acquire(ctx, Request{ID: s.a.attachment("c2"), Pool: s.p})
			return clean(s.w)
		}},
		{"entry: somebody puts one between view and commit", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Chains()) }, func(t *testing.T, s *scene) error {
			mark, err := s.a.writer().Dir.LoadMark()
			if err != nil {
				t.Fatal(err)
			}
			key, stray := testKeys.Entry(s.a.who, mark.Chain, mark.Seq+1), []byte("not an entry")
			s.a.conn.between = func() { put(s.w, key, stray) }
			w := s.a.writer()
			w.Timeout = 200e6
			_, _ = w.Acquire(ctx, Request{ID: s.a.attachment("c2"), Pool: s.p})
			if !slices.Equal(stray, get(s.w, key)) {
				return errors.New("an entry was rewritten (I4)")
			}
			return nil
		}},
		{"address: another node takes it between view and commit", func(c Compare) bool { return c.Key == addr("10.22.0.3") }, func(t *testing.T, s *scene) error {
			s.a.conn.between = func() {
				if _, err := s.b.add(s.p, "c2", netip.MustParseAddr("10.22.0.3")); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.a.add(s.p, "c1"); err != nil {
				t.Fatal(err)
			}
			return clean(s.w)
		}},
		{"address: taken and released in between", func(c Compare) bool { return c.Key == addr("10.22.0.3") }, func(t *testing.T, s *scene) error {
			s.a.conn.between = func() {
				if _, err := s.b.add(s.p, "c2", netip.MustParseAddr("10.22.0.3")); err != nil {
					t.Fatal(err)
				}
				if err := s.b.del("c2"); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := s.a.add(s.p, "c1"); err != nil {
				t.Fatal(err)
			}
			return clean(s.w)
		}},
		{"attachment: it appears between view and commit", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Attachments()) }, func(t *testing.T, s *scene) error {
			id := s.a.attachment("c1")
			theirs := keyspace.Encode(keyspace.Attachment{Space: "default", Pool: "elsewhere"})
			s.a.conn.between = func() { put(s.w, testKeys.Attachment(id), theirs) }
			_, _ = s.a.add(s.p, "c1")
			if !slices.Equal(theirs, get(s.w, testKeys.Attachment(id))) {
				return errors.New("an attachment was overwritten (I2)")
			}
			return nil
		}},
		{"attachment: it changes between view and release", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Attachments()) }, func(t *testing.T, s *scene) error {
			if _, err := s.a.add(s.p, "c1"); err != nil {
				t.Fatal(err)
			}
			id := s.a.attachment("c1")
			theirs := keyspace.Encode(keyspace.Attachment{Space: "default", Pool: "elsewhere"})
			s.a.conn.between = func() { put(s.w, testKeys.Attachment(id), theirs) }
			_ = s.a.del("c1")
			if !slices.Equal(theirs, get(s.w, testKeys.Attachment(id))) {
				return errors.New("an attachment that is not the one that was read was deleted")
			}
			return nil
		}},
		{"address: it changes between view and release", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Addresses()) }, func(t *testing.T, s *scene) error {
			ips, err := s.a.add(s.p, "c1")
			if err != nil {
				t.Fatal(err)
			}
			other := s.b.attachment("c9")
			theirs := keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: "net", Holder: &other, Acquire: entry.Ref{Seq: 9}})
			s.a.conn.between = func() { put(s.w, testKeys.Address("default", ips[0]), theirs) }
			_ = s.a.del("c1")
			if !slices.Equal(theirs, get(s.w, testKeys.Address("default", ips[0]))) {
				return errors.New("another's lease was freed")
			}
			return nil
		}},
		{"block: another node claims it between view and commit", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.AllBlocks()) }, func(t *testing.T, s *scene) error {
			fresh := s.w.machine(entry.Writer{Kind: entry.KindNode, Name: "fresh"})
			s.w.nodes = append(s.w.nodes, fresh)
			block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.0.16/28")}
			// The other takes another address of the same block.
			fresh.conn.between = func() {
				q := s.w.machine(entry.Writer{Kind: entry.KindNode, Name: "quick"})
				if _, err := q.add(s.p, "q1"); err != nil {
					t.Fatal(err)
				}
				if err := q.del("q1"); err != nil {
					t.Fatal(err)
				}
				// And the address it had goes elsewhere, so that only the claim is in the way.
				s.w.store.mu.Lock()
				delete(s.w.store.now().keys, testKeys.Address("default", netip.MustParseAddr("10.22.0.16")))
				s.w.store.mu.Unlock()
			}
			if _, err := fresh.add(s.p, "f1"); err != nil {
				t.Fatal(err)
			}
			var b keyspace.Block
			if err := keyspace.Decode(get(s.w, testKeys.Block(block)), &b); err != nil {
				t.Fatal(err)
			}
			if b.Node != "quick" {
				return fmt.Errorf("the claim of quick was overwritten by %s", b.Node)
			}
			return nil
		}},
		{"block: given back between view and commit", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.AllBlocks()) }, func(t *testing.T, s *scene) error {
			if err := s.a.del("c0"); err != nil {
				t.Fatal(err)
			}
			block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.0.0/28")}
			s.a.conn.between = func() {
				if err := s.w.admin.run(func(x *Writer) error { return x.Unclaim(ctx, Claim{Block: block}, "test") }); err != nil {
					t.Fatal(err)
				}
			}
			ips, err := s.a.add(s.p, "c1")
			if err != nil {
				t.Fatal(err)
			}
			if block.Prefix.Contains(ips[0]) && get(s.w, testKeys.Block(block)) == nil {
				return errors.New("allocated in a block that was given back as if it were claimed")
			}
			return clean(s.w)
		}},
		{"unclaim: an address of the block changes in between", func(c Compare) bool {
			return strings.HasPrefix(c.Key, testKeys.Addresses()) && c.End != ""
		}, func(t *testing.T, s *scene) error {
			if err := s.a.del("c0"); err != nil {
				t.Fatal(err)
			}
			block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.0.0/28")}
			s.w.admin.conn.between = func() {
				if _, err := s.a.add(s.p, "c1"); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.w.admin.run(func(x *Writer) error { return x.Unclaim(ctx, Claim{Block: block}, "test") }); err == nil {
				return errors.New("a block was given back with a lease in it")
			}
			return clean(s.w)
		}},
		{"unclaim: the claim changes in between", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.AllBlocks()) }, func(t *testing.T, s *scene) error {
			if err := s.a.del("c0"); err != nil {
				t.Fatal(err)
			}
			block := keyspace.BlockID{Space: "default", Pool: "net", Prefix: netip.MustParsePrefix("10.22.0.0/28")}
			theirs := keyspace.Encode(keyspace.Block{Node: "other", Claim: entry.Ref{Seq: 7}})
			s.w.admin.conn.between = func() { put(s.w, testKeys.Block(block), theirs) }
			_ = s.w.admin.run(func(x *Writer) error { return x.Unclaim(ctx, Claim{Block: block}, "test") })
			b := get(s.w, testKeys.Block(block))
			if b == nil { // the second try may take it, on the record of whose it is
				last := s.w.store.now()
				for k, kv := range last.keys {
					if e, err := entry.Parse(kv.value); err == nil && strings.HasPrefix(k, testKeys.Chains()) && e.Op == entry.Unclaim && e.Node != "other" {
						return errors.New("another's claim was deleted")
					}
				}
			}
			return nil
		}},
		{"pool: a named pool is edited between view and commit", func(c Compare) bool { return c.Key == testKeys.Pool("named") }, func(t *testing.T, s *scene) error {
			spec := keyspace.Pool{Ranges: rangeSets("10.99.0.0/24")}
			put(s.w, testKeys.Pool("named"), spec)
			s.a.conn.between = func() { put(s.w, testKeys.Pool("named"), keyspace.Pool{Ranges: rangeSets("10.98.0.0/24")}) }
			var out *keyspace.Attachment
			if err := s.a.run(func(x *Writer) (err error) {
				out, err = x.Acquire(ctx, Request{ID: s.a.attachment("c1"), PoolName: "named"})
				return err
			}); err != nil {
				t.Fatal(err)
			}
			if got := addrsOf(out.Leases)[0]; !netip.MustParsePrefix("10.98.0.0/24").Contains(got) {
				return fmt.Errorf("%v is of a pool that was edited before the commit", got)
			}
			return nil
		}},
		{"replace: the writer commits in between", func(c Compare) bool {
			return c.Key == testKeys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n0"})
		}, func(t *testing.T, s *scene) error {
			s.w.admin.conn.between = func() {
				drop := s.w.drop
				s.w.drop = nil
				defer func() { s.w.drop = drop }()
				if _, err := s.a.add(s.p, "c1"); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.w.admin.run(func(x *Writer) error { _, err := x.Replace(ctx, Replacement{Writer: s.a.who}, "test"); return err }); err != nil {
				t.Fatal(err)
			}
			return clean(s.w)
		}},
		{"import: another node takes the address in between", func(c Compare) bool { return c.Key == addr("10.22.0.9") }, func(t *testing.T, s *scene) error {
			s.a.conn.between = func() {
				if _, err := s.b.add(s.p, "c2", netip.MustParseAddr("10.22.0.9")); err != nil {
					t.Fatal(err)
				}
			}
			l := statedir.Holding{ID: s.a.attachment("old"), Value: keyspace.Attachment{Space: "default", Pool: "net", Leases: []keyspace.Lease{{Address: netip.MustParsePrefix("10.22.0.9/24")}}}}
			if err := s.a.run(func(x *Writer) error { _, err := x.Import(ctx, []statedir.Holding{l}, false, "test"); return err }); err != nil {
				t.Fatal(err)
			}
			return clean(s.w)
		}},
		{"import: the attachment appears in between", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Attachments()) }, func(t *testing.T, s *scene) error {
			id := s.a.attachment("old")
			theirs := keyspace.Encode(keyspace.Attachment{Space: "default", Pool: "elsewhere"})
			s.a.conn.between = func() { put(s.w, testKeys.Attachment(id), theirs) }
			l := statedir.Holding{ID: id, Value: keyspace.Attachment{Space: "default", Pool: "net", Leases: []keyspace.Lease{{Address: netip.MustParsePrefix("10.22.0.9/24")}}}}
			_ = s.a.run(func(x *Writer) error { _, err := x.Import(ctx, []statedir.Holding{l}, false, "test"); return err })
			if !slices.Equal(theirs, get(s.w, testKeys.Attachment(id))) {
				return errors.New("an attachment was overwritten (I2)")
			}
			return nil
		}},
		{"spoilt: the address goes to another in between", func(c Compare) bool { return c.Key == addr("10.22.0.2") }, func(t *testing.T, s *scene) error {
			id := s.a.attachment("c0")
			put(s.w, testKeys.Attachment(id), []byte("garbage"))
			put(s.w, addr("10.22.0.2"), []byte("garbage"))
			other := s.b.attachment("c9")
			theirs := keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: "net", Holder: &other, Acquire: entry.Ref{Seq: 9}})
			s.w.admin.conn.between = func() { put(s.w, addr("10.22.0.2"), theirs) }
			_ = s.w.admin.run(func(x *Writer) error { return x.ReleaseLease(ctx, id, entry.Ref{}, "test") })
			if !slices.Equal(theirs, get(s.w, addr("10.22.0.2"))) {
				return errors.New("another's lease was freed")
			}
			return nil
		}},
		{"spoilt: the attachment is mended in between", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Attachments()) }, func(t *testing.T, s *scene) error {
			id := s.a.attachment("c0")
			put(s.w, testKeys.Attachment(id), []byte("garbage"))
			theirs := []byte("other garbage")
			s.w.admin.conn.between = func() { put(s.w, testKeys.Attachment(id), theirs) }
			w := s.w.admin.writer()
			w.Timeout = 200e6
			tries := 0
			w.step = func(at string) {
				if at == "begun" {
					tries++
				}
			}
			_ = w.ReleaseLease(ctx, id, entry.Ref{}, "test")
			if tries < 2 {
				return errors.New("a value that nobody looked at was deleted")
			}
			return nil
		}},
		{"replace: the chain of a lost head goes on in between", func(c Compare) bool { return strings.HasPrefix(c.Key, testKeys.Chains()+"node/") }, func(t *testing.T, s *scene) error {
			key := testKeys.Writer(s.a.who)
			head := get(s.w, key)
			s.w.store.mu.Lock()
			delete(s.w.store.now().keys, key)
			s.w.store.mu.Unlock()
			s.w.admin.conn.between = func() {
				drop := s.w.drop
				s.w.drop = nil
				defer func() { s.w.drop = drop }()
				put(s.w, key, head)
				if _, err := s.a.add(s.p, "c1"); err != nil {
					t.Fatal(err)
				}
				s.w.store.mu.Lock()
				delete(s.w.store.now().keys, key)
				s.w.store.mu.Unlock()
			}
			if err := s.w.admin.run(func(x *Writer) error { _, err := x.Replace(ctx, Replacement{Writer: s.a.who}, "test"); return err }); err != nil {
				t.Fatal(err)
			}
			return clean(s.w)
		}},
		{"stop: a recovery begins in between", key(testKeys.Meta()), func(t *testing.T, s *scene) error {
			if _, err := s.a.add(s.p, "lost"); err != nil {
				t.Fatal(err)
			}
			s.w.store.restore(1, false)
			s.a.reconnect()
			drop := s.w.drop
			s.a.conn.between = func() {
				s.w.drop = nil
				s.w.admin.must(t, func(x *Writer) error { _, _, err := x.RecoverStart(ctx, 0, "test"); return err })
				s.w.drop = drop
			}
			_ = s.a.run(func(x *Writer) error { return x.Probe(ctx) })
			if get(s.w, testKeys.Stop(s.a.who.Name)) != nil {
				return errors.New("a stop of before the recovery stands in it")
			}
			return nil
		}},
		{"dispute: an operator replaces the node in between", func(c Compare) bool {
			return c.Key == testKeys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n0"})
		}, func(t *testing.T, s *scene) error {
			key := testKeys.Writer(s.a.who)
			head := get(s.w, key)
			put(s.w, key, []byte(strings.Replace(string(head), `"boot":"`, `"boot":"other-`, 1)))
			s.a.conn.between = func() {
				drop := s.w.drop
				s.w.drop = nil
				defer func() { s.w.drop = drop }()
				if err := s.w.admin.run(func(x *Writer) error { _, err := x.Replace(ctx, Replacement{Writer: s.a.who}, "test"); return err }); err != nil {
					t.Fatal(err)
				}
			}
			_ = s.a.run(func(x *Writer) error { return x.Probe(ctx) })
			var w keyspace.Writer
			if err := keyspace.Decode(get(s.w, key), &w); err != nil || w.Closed.IsZero() {
				return fmt.Errorf("an operator's close was overwritten: %+v (%v)", w, err)
			}
			return nil
		}},
		{"thaw: a stop comes in between", span(testKeys.Stops()), func(t *testing.T, s *scene) error {
			if err := s.w.admin.run(func(x *Writer) error { _, _, err := x.RecoverStart(ctx, 0, "test"); return err }); err != nil {
				t.Fatal(err)
			}
			names := []string{}
			for _, n := range s.w.nodes {
				if err := n.run(func(x *Writer) error { _, err := x.Recover(ctx, nil, "test"); return err }); err != nil {
					t.Fatal(err)
				}
				names = append(names, n.who.Name)
			}
			s.w.admin.conn.between = func() { put(s.w, testKeys.Stop("n1"), keyspace.Stop{Node: "n1", Found: "news"}) }
			seen := 0
			s.w.step = func(at string) {
				if at == "begun" {
					seen++
				}
			}
			_ = s.w.admin.run(func(x *Writer) error { _, err := x.Thaw(ctx, names, nil, "test"); return err })
			if seen < 2 {
				return errors.New("a stop that came after the view was deleted unseen")
			}
			return clean(s.w)
		}},
		{"thaw: a node changes in between", span(testKeys.Writers() + "node/"), func(t *testing.T, s *scene) error {
			if err := s.w.admin.run(func(x *Writer) error { _, _, err := x.RecoverStart(ctx, 0, "test"); return err }); err != nil {
				t.Fatal(err)
			}
			names := []string{}
			for _, n := range s.w.nodes {
				if err := n.run(func(x *Writer) error { _, err := x.Recover(ctx, nil, "test"); return err }); err != nil {
					t.Fatal(err)
				}
				names = append(names, n.who.Name)
			}
			late := s.w.machine(entry.Writer{Kind: entry.KindNode, Name: "late"})
			s.w.admin.conn.between = func() {
				var value keyspace.Writer
				_ = keyspace.Decode(get(s.w, testKeys.Writer(s.a.who)), &value)
				value.Epoch = 1
				put(s.w, testKeys.Writer(late.who), value)
			}
			if err := s.w.admin.run(func(x *Writer) error { _, err := x.Thaw(ctx, names, nil, "test"); return err }); err == nil {
				return errors.New("thawed without a node that is in etcd and has not recovered")
			}
			return nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, dropped := range []bool{false, true} {
				w := newWorld(t, 2)
				w.init(t)
				p, err := NewPool("default", "net", rangeSets("10.22.0.0/24"), nil, false, 16, 0)
				if err != nil {
					t.Fatal(err)
				}
				// Both nodes have chains; n0 holds 10.22.0.2 and the first block.
				if _, err := w.nodes[0].add(p, "c0"); err != nil {
					t.Fatal(err)
				}
				if _, err := w.nodes[1].add(p, "d0", netip.MustParseAddr("10.22.0.200")); err != nil {
					t.Fatal(err)
				}
				if dropped {
					w.drop = c.drop
				}
				err = c.run(t, &scene{w, p, w.nodes[0], w.nodes[1]})
				if dropped && err == nil {
					t.Error("nothing goes wrong without the comparison: this case tests nothing")
				}
				if !dropped && err != nil {
					t.Error(err)
				}
			}
		})
	}
}
