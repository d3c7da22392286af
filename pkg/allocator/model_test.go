package allocator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// The model is a plain map: what each runtime was told its pods have. Whatever
// faults are drawn, an address that one runtime was told may not be told to
// another, and when all pods are gone, all addresses are free.

type model struct {
	t     *rapid.T
	w     *world
	pools []*Pool
	told  map[keyspace.AttachmentID][]netip.Addr
	space map[keyspace.AttachmentID]string // the address space of what it was told
	// gone are attachments whose DEL is owed: an ADD failed, or the machine
	// lost power. Runtimes call DEL for them, sooner or later.
	gone   map[keyspace.AttachmentID]bool
	frozen bool
	next   int
	// restored counts drills that are due: nothing may be allocated meanwhile.
	restored  bool
	replaced  map[string]bool // nodes that lost their state directory once, or got an old one
	old       []snapshot      // what was, for lists and decisions that are old when they are used
	ill       map[string]bool // nodes that may be refused until somebody follows the named way out
	colleague *machine        // another operator
	images    map[string]string
	base      time.Time
}

// snapshot is what an operator or a list saw at some time.
type snapshot struct {
	told       map[keyspace.AttachmentID][]netip.Addr
	dead       map[entry.Ref]bool // acquires whose pods are gone, which is for ever
	belongings []*Belongings
}

func (m *model) machineOf(id keyspace.AttachmentID) *machine {
	i := slices.IndexFunc(m.w.nodes, func(n *machine) bool { return n.who.Name == id.Node })
	return m.w.nodes[i]
}

// draw arms a fault, a lag and an interleaving for the next call on a machine.
func (m *model) draw(n *machine) {
	n.reconnect()
	n.conn.lag = rapid.SampledFrom([]int{0, 0, 1, 3, 20}).Draw(m.t, "lag")
	n.conn.next = fault(rapid.SampledFrom([]int{0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}).Draw(m.t, "fault"))
	m.w.step = nil
	if at := rapid.SampledFrom([]string{"", "", "", "", "keyed", "enrolled", "begun", "answered", "marked", "settled"}).Draw(m.t, "kill"); at != "" {
		m.w.step = func(s string) {
			if s == at {
				panic(killed{})
			}
		}
	}
	if rapid.IntRange(0, 3).Draw(m.t, "interleave") == 0 && len(m.w.nodes) > 1 {
		other := m.w.nodes[rapid.IntRange(0, len(m.w.nodes)-1).Draw(m.t, "other")]
		if other != n {
			c := m.container()
			n.conn.between = func() {
				step := m.w.step
				m.w.step = nil
				defer func() { m.w.step = step }()
				m.noteAdd(other, c, func() ([]netip.Addr, error) { return other.add(m.pools[0], c) })
			}
		}
	}
}

func (m *model) container() string {
	m.next++
	return fmt.Sprintf("c%d", m.next)
}

// noteAdd runs an ADD and takes its answer into the model.
func (m *model) noteAdd(n *machine, c string, add func() ([]netip.Addr, error)) {
	id := n.attachment(c)
	ips, err := add()
	switch {
	case err != nil:
		if _, ok := m.told[id]; !ok {
			m.gone[id] = true // the runtime will DEL
		}
		return
	case m.restored:
		m.t.Fatalf("%v was given %v by an etcd that went back in time", id, ips)
	case m.frozen:
		if had, ok := m.told[id]; !ok || !slices.Equal(had, ips) {
			m.t.Fatalf("%v was given %v by a frozen ledger", id, ips)
		}
	}
	if had, ok := m.told[id]; ok && !slices.Equal(had, ips) {
		m.t.Fatalf("%v had %v and was then told %v", id, had, ips)
	}
	var now keyspace.Attachment
	if err := keyspace.Decode(m.w.store.now().keys[testKeys.Attachment(id)].value, &now); err != nil {
		m.t.Fatalf("%v was told %v and is not in etcd: %v", id, ips, err)
	}
	m.space[id] = now.Space
	for other, held := range m.told {
		for _, ip := range ips {
			if other != id && m.space[other] == m.space[id] && slices.Contains(held, ip) {
				m.t.Fatalf("%v is held by %v and was given to %v", ip, other, id)
			}
		}
	}
	delete(m.gone, id)
	m.told[id] = ips
}

func (m *model) pick(from map[keyspace.AttachmentID]bool) (keyspace.AttachmentID, bool) {
	ids := slices.SortedFunc(maps.Keys(from), func(a, b keyspace.AttachmentID) int { return strings.Compare(a.String(), b.String()) })
	if len(ids) == 0 {
		return keyspace.AttachmentID{}, false
	}
	return ids[rapid.IntRange(0, len(ids)-1).Draw(m.t, "attachment")], true
}

func (m *model) live() map[keyspace.AttachmentID]bool {
	out := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		out[id] = true
	}
	for id := range m.gone {
		out[id] = true
	}
	return out
}

func (m *model) node() *machine {
	return m.w.nodes[rapid.IntRange(0, len(m.w.nodes)-1).Draw(m.t, "node")]
}

func (m *model) pool() *Pool { return rapid.SampledFrom(m.pools).Draw(m.t, "pool") }

func (m *model) add() {
	n, p := m.node(), m.pool()
	m.draw(n)
	c := m.container()
	m.noteAdd(n, c, func() ([]netip.Addr, error) { return n.add(p, c) })
}

func (m *model) addAgain() {
	ids := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		ids[id] = true
	}
	id, ok := m.pick(ids)
	if !ok {
		return
	}
	n := m.machineOf(id)
	m.draw(n) // also one that fails leaves the pod what it has
	m.noteAdd(n, id.Container, func() ([]netip.Addr, error) { return n.add(m.pools[0], id.Container) })
}

func (m *model) addRequested() {
	n, p := m.node(), m.pools[0]
	m.draw(n)
	c := m.container()
	ip := p.Sets[0].segments[0].From()
	for range rapid.IntRange(0, 6).Draw(m.t, "offset") {
		ip = ip.Next()
	}
	m.noteAdd(n, c, func() ([]netip.Addr, error) { return n.add(p, c, ip) })
}

func (m *model) del() {
	id, ok := m.pick(m.live())
	if !ok {
		return
	}
	n := m.machineOf(id)
	m.draw(n)
	if err := n.del(id.Container); err != nil {
		if !errors.Is(err, errKilled) {
			m.t.Fatalf("DEL of %v: %v", id, err)
		}
		// The runtime calls again; the pod's address may be free already.
		delete(m.told, id)
		m.gone[id] = true
		return
	}
	delete(m.told, id)
	delete(m.gone, id)
}

func (m *model) check() {
	ids := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		ids[id] = true
	}
	id, ok := m.pick(ids)
	if !ok || m.restored || m.ill[id.Node] {
		return
	}
	n := m.machineOf(id)
	n.reconnect()
	m.w.step = nil
	if err := n.run(func(w *Writer) error { return w.Check(context.Background(), id, m.told[id]) }); err != nil {
		m.t.Fatalf("CHECK of %v: %v", id, err)
	}
}

func (m *model) gc() {
	n := m.node()
	keep := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		keep[id] = true
	}
	m.draw(n)
	_ = n.run(func(w *Writer) error { _, err := w.GC(context.Background(), "net", keep); return err })
}

// reap: 'ledger gc', by the node or by an operator, ends the lease that it saw. A
// lease that came since stays, whatever happens on the way.
func (m *model) reap() {
	id, ok := m.pick(m.live())
	if !ok || m.restored {
		return
	}
	kv, ok := m.w.store.now().keys[testKeys.Attachment(id)]
	if !ok {
		return
	}
	var a keyspace.Attachment
	if err := keyspace.Decode(kv.value, &a); err != nil {
		m.t.Fatal(err)
	}
	by := m.machineOf(id)
	if rapid.Bool().Draw(m.t, "by an operator") {
		by = m.w.admin
	}
	stale := rapid.Bool().Draw(m.t, "of an earlier lease")
	if stale {
		a.Acquire.Seq++
	}
	m.draw(by)
	did, err := false, error(nil)
	rerr := by.run(func(w *Writer) error { did, err = w.Reap(context.Background(), id, a.Acquire, "test"); return err })
	switch {
	case stale && did:
		m.t.Fatalf("%v: a lease was ended that nobody named", id)
	case !stale && !did && rerr == nil:
		m.t.Fatalf("%v: its lease was not ended, and no error said so", id)
	case !stale:
		delete(m.told, id)
		m.gone[id] = true
	}
}

func (m *model) operatorRelease() {
	ids := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		ids[id] = true
	}
	id, ok := m.pick(ids)
	if !ok || m.restored {
		return
	}
	m.draw(m.w.admin)
	m.w.admin.conn.between = nil
	err := m.w.admin.run(func(w *Writer) error { return w.ReleaseLease(context.Background(), id, entry.Ref{}, "test") })
	// Operators release what is not there any more; whether or not this one got
	// an answer, the pod counts as gone.
	_ = err
	delete(m.told, id)
	m.gone[id] = true
}

func (m *model) unclaim() {
	state := m.w.store.now()
	var ids []keyspace.BlockID
	for k := range state.keys {
		if key, err := testKeys.Parse(k); err == nil && key.Kind == "blocks" {
			ids = append(ids, key.Block)
		}
	}
	if len(ids) == 0 || m.restored {
		return
	}
	slices.SortFunc(ids, func(a, b keyspace.BlockID) int { return strings.Compare(a.String(), b.String()) })
	m.draw(m.w.admin)
	_ = m.w.admin.run(func(w *Writer) error {
		return w.Unclaim(context.Background(), Claim{Block: rapid.SampledFrom(ids).Draw(m.t, "block")}, "test")
	})
}

func (m *model) land() { m.w.store.land() }

func (m *model) toggleFreeze() {
	if m.restored {
		return
	}
	m.draw(m.w.admin)
	m.w.admin.conn.between = nil
	if m.frozen {
		_ = m.w.admin.run(func(w *Writer) error { _, err := w.Thaw(context.Background(), nil, nil, "test"); return err })
	} else {
		_ = m.w.admin.run(func(w *Writer) error { _, err := w.Freeze(context.Background(), "test"); return err })
	}
	// What it is now, only etcd knows; and a commit under way may change it again.
	m.w.store.land()
	m.refreshFrozen()
}

func (m *model) refreshFrozen() {
	var meta keyspace.Meta
	if err := keyspace.Decode(m.w.store.now().keys[testKeys.Meta()].value, &meta); err != nil {
		m.t.Fatal(err)
	}
	m.frozen = meta.State == keyspace.Frozen
}

// powerLoss: all pods of the node are gone, files that were not synced are old,
// empty or torn, and what was sent may still land.
func (m *model) powerLoss() {
	n := m.node()
	n.boot++
	for _, id := range slices.Collect(maps.Keys(m.told)) {
		if id.Node == n.who.Name {
			delete(m.told, id)
			m.gone[id] = true
		}
	}
	for _, name := range []string{"mark", "blocks", "open"} {
		p := filepath.Join(n.dir, name)
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		switch rapid.SampledFrom([]string{"kept", "empty", "torn", "gone"}).Draw(m.t, name) {
		case "empty":
			b = nil
		case "torn":
			b = b[:len(b)/2]
		case "gone":
			if err := os.Remove(p); err != nil {
				m.t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(p, b, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	holdings, _ := filepath.Glob(filepath.Join(n.dir, "holdings", "*"))
	for _, p := range holdings {
		if err := os.Remove(p); err != nil {
			m.t.Fatal(err)
		}
	}
}

// reimage: the node comes back without its state directory, on another machine
// ID. It is refused until an operator replaces it.
func (m *model) reimage() {
	n := m.node()
	if m.restored || m.frozen {
		return
	}
	m.loseNode(n)
	n.id += "-new"
	n.reconnect()
	m.w.step = nil
	c := m.container()
	if value := m.writerOf(n); value != nil && value.Closed.IsZero() {
		if _, err := n.add(m.pools[0], c); !errors.Is(err, ErrIntegrity) {
			m.t.Fatalf("a re-imaged node answered %v", err)
		}
		m.gone[n.attachment(c)] = true
	}
	m.replace(n)
}

// copyDir copies a state directory, whose key nobody else may use.
func copyDir(from, to string) error {
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	if err := os.Chmod(filepath.Join(to, "key"), 0o600); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// writerOf is the value of the node's writer key, nil if there is none.
func (m *model) writerOf(n *machine) *keyspace.Writer {
	kv, ok := m.w.store.now().keys[testKeys.Writer(n.who)]
	if !ok {
		return nil
	}
	value := new(keyspace.Writer)
	if err := keyspace.Decode(kv.value, value); err != nil {
		m.t.Fatal(err)
	}
	return value
}

func (m *model) replace(n *machine) {
	m.replaced[n.who.Name] = true
	m.w.admin.reconnect()
	m.w.step = nil
	err := m.w.admin.run(func(w *Writer) error {
		_, err := w.Replace(context.Background(), Replacement{Writer: n.who}, "test")
		return err
	})
	if errors.Is(err, ErrNotFound) { // "move its state directory away"
		err = os.RemoveAll(n.dir)
	}
	if err != nil {
		m.t.Fatalf("replace %v: %v", n.who, err)
	}
}

// clone: a copy of the state directory on another machine is refused, harms
// nobody, and stops nobody.
func (m *model) clone() {
	n := m.node()
	if _, err := os.Stat(filepath.Join(n.dir, "mark")); err != nil || m.restored {
		return
	}
	other := &machine{w: m.w, who: n.who, dir: filepath.Join(m.w.root, "clone-of-"+n.who.Name), id: n.id + "-clone", boot: n.boot + 1000}
	other.reconnect()
	m.w.step = nil
	if err := os.RemoveAll(other.dir); err != nil {
		m.t.Fatal(err)
	}
	if err := copyDir(n.dir, other.dir); err != nil {
		m.t.Fatal(err)
	}
	dir, _ := statedir.Open(other.dir)
	mark, _ := dir.LoadMark()
	if mark == nil {
		return // a copy of a torn mark: nothing to recognise
	}
	if value := m.writerOf(n); value != nil && !value.Closed.IsZero() {
		return // whoever comes first takes the place
	}
	before := m.w.store.now().revision
	if _, err := other.add(m.pools[0], m.container()); !errors.Is(err, ErrIntegrity) {
		m.t.Fatalf("a cloned state directory was answered %v", err)
	}
	if after := m.w.store.now().revision; after != before {
		m.t.Fatalf("a cloned state directory wrote to etcd: revision %d, then %d", before, after)
	}
}

// restore takes etcd back, and then does the drill.
func (m *model) restore() {
	if m.restored {
		return
	}
	w := m.w
	w.step = nil
	// A node that allocates nothing notices nothing; let each commit once, so
	// that there is something to lose for some and nothing for others.
	depth := rapid.IntRange(1, 12).Draw(m.t, "depth")
	newCluster := rapid.Bool().Draw(m.t, "newCluster")
	before := w.store.now()
	w.store.restore(depth, newCluster)
	if _, ok := w.store.now().keys[testKeys.Meta()]; !ok {
		m.t.Fatal("restored to before init")
	}
	lost := before.revision > w.store.now().revision
	if !lost && !newCluster {
		return
	}
	// What nobody can notice before the first node with a newer mark has
	// contact is said in the documents; here all have contact.
	noticed := false
	for _, n := range w.nodes {
		n.reconnect()
		c := m.container()
		// A stop that is late must not land after the drill.
		n.conn.next = rapid.SampledFrom([]fault{noFault, noFault, loseLate, killSent}).Draw(m.t, "stop")
		err := n.run(func(x *Writer) error { return x.Probe(context.Background()) })
		_ = err
		if _, ok := w.store.now().keys[testKeys.Stop(n.who.Name)]; ok {
			noticed = true
		}
		_ = c
	}
	m.restored = noticed || newCluster
	if m.restored {
		for _, n := range w.nodes { // also those that lost nothing
			n.reconnect()
			c := m.container()
			if _, err := n.add(m.pools[0], c); err == nil {
				m.t.Fatalf("%v was given an address after a restore that was noticed", n.attachment(c))
			}
			m.gone[n.attachment(c)] = true
		}
	}
	m.drill()
}

// drill is recover start, recover node on each node until no conflict is left,
// and thaw; each step may be killed and is run again.
func (m *model) drill() {
	w, ctx := m.w, context.Background()
	admin := func(what string, f func(x *Writer) error) {
		for try := 0; ; try++ {
			w.admin.reconnect()
			if try == 0 {
				m.draw(w.admin)
				w.admin.conn.between = nil
			} else {
				w.step = nil
			}
			err := w.admin.run(f)
			if err == nil {
				return
			}
			if rapid.Bool().Draw(m.t, "something else in between") { // whatever became of it
				w.admin.reconnect()
				w.step = nil
				if _, err := w.admin.writer().Freeze(ctx, "test"); err != nil && !errors.Is(err, ErrUnknownOutcome) && !errors.Is(err, errRollback) {
					m.t.Fatalf("after %s failed: %v", what, err)
				}
			}
			if try == 5 {
				m.t.Fatalf("%s: %v", what, err)
			}
		}
	}
	w.step = nil
	epoch := uint64(0)
	for _, n := range append(slices.Clone(w.nodes), w.admin) {
		dir, _ := statedir.Open(n.dir)
		if mark, _ := dir.LoadMark(); mark != nil {
			epoch = max(epoch, mark.Epoch+1) // each refusal says it
		}
	}
	admin("recover start", func(x *Writer) error { _, _, err := x.RecoverStart(ctx, epoch, "test"); return err })
	// A node that does not take part, and comes back when all is over.
	var away *machine
	if len(w.nodes) > 1 && rapid.IntRange(0, 2).Draw(m.t, "away") == 0 {
		away = w.nodes[rapid.IntRange(0, len(w.nodes)-1).Draw(m.t, "who")]
	}
	// Another restore in the middle of the drill: it begins anew.
	again := -1
	if rapid.IntRange(0, 3).Draw(m.t, "again") == 0 {
		again = rapid.IntRange(0, len(w.nodes)-1).Draw(m.t, "at")
	}
	done, absent := map[string]bool{}, map[string]bool{}
	var last []any
	want := len(w.nodes)
	if away != nil {
		want--
		for _, id := range slices.Collect(maps.Keys(m.told)) {
			if id.Node == away.who.Name {
				delete(m.told, id) // its operator says that its pods are gone
				m.gone[id] = true
			}
		}
		state := w.store.now() // and so are their leases, or they would be in the way
		for k := range state.keys {
			if key, err := testKeys.Parse(k); err == nil && key.Kind == "attachments" && key.Attachment.Node == away.who.Name {
				admin("release", func(x *Writer) error {
					err := x.ReleaseLease(ctx, key.Attachment, entry.Ref{}, "its node is gone")
					if errors.Is(err, ErrNotFound) {
						return nil
					}
					return err
				})
			}
		}
	}
	// With the runtime's list, or by the holdings alone.
	var runs Runtime
	if rapid.Bool().Draw(m.t, "runtime's list") {
		runs = sandboxes{m}
	}
	for round := 0; len(done) < want; round++ {
		if round > 12 {
			m.t.Fatalf("the drill does not end: %v recovered: %+v", done, last)
		}
		if round == 3 { // two pods have one address: those that are to go do so now
			for id := range m.gone {
				if n := m.machineOf(id); n != away {
					n.reconnect()
					w.step = nil
					_ = n.del(id.Container)
				}
			}
		}
		for i, n := range w.nodes {
			if n == away {
				continue
			}
			if round == 0 && i == again {
				w.step = nil
				w.store.restore(rapid.IntRange(1, 8).Draw(m.t, "depth2"), rapid.Bool().Draw(m.t, "newCluster2"))
				m.drill()
				return
			}
			n.reconnect()
			w.step = nil
			if round == 0 {
				m.draw(n)
				n.conn.between = nil
			}
			r, err := m.recover(n, runs)
			if !done[n.who.Name] {
				last = append(last, n.who.Name, fmt.Sprintf("%+v", r), err)
			}
			last = last[max(0, len(last)-6):]
			switch {
			case err == nil && r.Done:
				done[n.who.Name] = true
			case errors.Is(err, ErrNotFound): // it never wrote: its operator leaves it out
				done[n.who.Name], absent[n.who.Name] = true, true
			case errors.Is(err, ErrIntegrity) && round > 0:
				m.replace(n) // its identity was lost before the restore
			case err != nil && round > 4:
				m.t.Fatalf("recover %v: %v", n.who, err)
			}
		}
	}
	var names []string
	var without []string
	for _, n := range w.nodes {
		if absent[n.who.Name] {
			continue
		}
		names = append(names, n.who.Name)
		if n == away {
			without = append(without, n.who.Name)
			admin("thaw without a node", func(x *Writer) error {
				if _, err := x.Thaw(ctx, names, nil, "test"); err == nil {
					m.t.Fatalf("thawed although %v has not recovered", n.who)
				}
				return nil
			})
		}
	}
	admin("thaw", func(x *Writer) error { _, err := x.Thaw(ctx, names, without, "test"); return err })
	w.store.land()
	m.restored = false
	m.refreshFrozen()
	if m.frozen {
		admin("thaw", func(x *Writer) error { _, err := x.Thaw(ctx, names, without, "test"); return err })
		m.refreshFrozen()
	}
	if away != nil {
		m.comeBack(away)
	}
	// A node that lost its state directory holds what etcd says, and one that was put
	// back what its image says, also where the restore brought it back: that is for GC
	// to find.
	state := w.store.now()
	for k := range state.keys {
		if key, err := testKeys.Parse(k); err == nil && key.Kind == "attachments" && m.told[key.Attachment] == nil && m.replaced[key.Attachment.Node] {
			m.gone[key.Attachment] = true
		}
	}
	// Nothing that a pod was told is lost.
	for id, ips := range m.told {
		for _, ip := range ips {
			var a keyspace.Address
			if err := keyspace.Decode(state.keys[testKeys.Address(m.space[id], ip)].value, &a); err != nil || a.State != keyspace.Leased || *a.Holder != id {
				m.t.Fatalf("after the drill %v of %v is %+v (%v)", ip, id, a, err)
			}
		}
	}
}

// sandboxes is a runtime that knows what runs, and by now what does not.
type sandboxes struct{ m *model }

func (s sandboxes) Knows(id keyspace.AttachmentID) bool { return s.m.told[id] != nil }

func (s sandboxes) Leaked(id keyspace.AttachmentID, _ entry.Ref) bool { return s.m.told[id] == nil }

// comeBack: a node that was left out is refused until it has recovered, even
// though the others allocate; what its pods had may be others' by then.
func (m *model) comeBack(n *machine) {
	n.reconnect()
	m.w.step = nil
	dir, _ := statedir.Open(n.dir)
	mark, merr := dir.LoadMark()
	value := m.writerOf(n)
	// Who never wrote, or was replaced and has no pods, has nothing to recover.
	wrote := (mark != nil || merr != nil || value != nil) && !(value != nil && !value.Closed.IsZero())
	for _, other := range m.w.nodes {
		if other != n {
			other.reconnect()
			c := m.container()
			m.noteAdd(other, c, func() ([]netip.Addr, error) { return other.add(m.pools[0], c) })
		}
	}
	c := m.container()
	if _, err := n.add(m.pools[0], c); wrote && err == nil {
		m.t.Fatalf("%v was left out of the drill and was answered", n.who)
	}
	m.gone[n.attachment(c)] = true
	for id := range m.gone {
		if id.Node == n.who.Name { // the runtime takes its pods down
			if err := n.del(id.Container); err != nil {
				m.t.Fatalf("DEL of %v: %v", id, err)
			}
		}
	}
	for try := range 4 {
		r, err := m.recover(n, nil)
		if err == nil && r.Done || errors.Is(err, ErrNotFound) {
			return
		}
		if try == 3 {
			m.t.Fatalf("%v cannot come back: %+v, %v", n.who, r, err)
		}
		if errors.Is(err, ErrIntegrity) {
			m.replace(n)
		}
	}
}

// recover is 'recover node'. What an entry has ended, no run of it brings back.
func (m *model) recover(n *machine, runs Runtime) (r *Recovery, err error) {
	dir, _ := statedir.Open(n.dir)
	held, _ := dir.Holdings()
	acquires := map[keyspace.AttachmentID]entry.Ref{}
	for _, h := range held {
		acquires[h.ID] = h.Value.Acquire
	}
	err = n.run(func(x *Writer) (err error) { r, err = x.Recover(context.Background(), runs, "test"); return err })
	if r == nil {
		return r, err
	}
	ended := map[entry.Ref]bool{}
	for _, e := range m.entries() {
		if e.Op == entry.Release {
			ended[e.Acquire] = true
		}
	}
	for _, id := range r.Asserted {
		if a := acquires[id]; ended[a] {
			m.t.Fatalf("%v was given back what it had by acquire %v, which an entry has ended", id, a)
		}
	}
	return r, err
}

// entries are those that stand in etcd now.
func (m *model) entries() (out []*entry.Entry) {
	for k, kv := range m.w.store.now().keys {
		if e, err := entry.Parse(kv.value); err == nil && strings.HasPrefix(k, testKeys.Chains()) {
			out = append(out, e)
		}
	}
	return out
}

// remember takes a list, and a decision about a node, to be used when it is old.
func (m *model) remember() {
	s := snapshot{told: maps.Clone(m.told), dead: map[entry.Ref]bool{}}
	alive := map[string]bool{}
	for id := range m.told {
		alive[id.String()] = true
	}
	for k, kv := range m.w.store.now().keys {
		key, err := testKeys.Parse(k)
		if err != nil || key.Kind != "chains" {
			continue
		}
		if e, err := entry.Parse(kv.value); err == nil && e.Op == entry.Acquire && !alive[e.Attachment()] {
			s.dead[entry.Ref{Chain: key.Chain, Seq: key.Seq, Hash: entry.HashOf(kv.value)}] = true
		}
	}
	m.w.admin.reconnect()
	for _, n := range m.w.nodes {
		if b, err := m.w.admin.writer().Belongings(context.Background(), n.who.Name); err == nil {
			s.belongings = append(s.belongings, b)
		}
	}
	if m.old = append(m.old, s); len(m.old) > 4 {
		m.old = m.old[1:]
	}
}

// oldList is a runtime's list that was made a while ago.
type oldList snapshot

func (l oldList) Knows(id keyspace.AttachmentID) bool { return l.told[id] != nil }

func (l oldList) Leaked(_ keyspace.AttachmentID, acquire entry.Ref) bool { return l.dead[acquire] }

// recoverAny: 'recover node' on any node at any time, with any list.
func (m *model) recoverAny() {
	if m.restored {
		return
	}
	var runs Runtime
	switch rapid.IntRange(0, 2).Draw(m.t, "list") {
	case 0:
		runs = sandboxes{m}
	case 1:
		if len(m.old) > 0 {
			runs = oldList(rapid.SampledFrom(m.old).Draw(m.t, "old list"))
		}
	}
	n := m.node()
	m.draw(n)
	_, _ = m.recover(n, runs)
}

// endNode: an operator drains or removes a node that lives, by what he saw a while
// ago, perhaps after a colleague did, and after it came back.
func (m *model) endNode() {
	if len(m.old) == 0 || m.restored {
		return
	}
	s := rapid.SampledFrom(m.old).Draw(m.t, "old decision")
	b := rapid.SampledFrom(s.belongings).Draw(m.t, "of")
	by := m.w.admin
	if rapid.Bool().Draw(m.t, "by a colleague") {
		by = m.colleague
	}
	remove := rapid.Bool().Draw(m.t, "remove")
	// The operator says that these pods are gone, and ends no others.
	for id := range maps.Clone(m.told) {
		if id.Node != b.Node {
			continue
		}
		var a keyspace.Attachment
		if kv, ok := m.w.store.now().keys[testKeys.Attachment(id)]; !ok || keyspace.Decode(kv.value, &a) != nil {
			m.t.Fatalf("%v is not in etcd", id)
		}
		if remove && b.Head != nil && a.Acquire.Chain == b.Head.Chain ||
			slices.ContainsFunc(b.Leases, func(l Belonging) bool { return l.ID == id && l.Value.Acquire == a.Acquire }) {
			delete(m.told, id)
			m.gone[id] = true
		}
	}
	m.draw(by)
	if remove {
		m.ill[b.Node] = true
	}
	before := maps.Clone(m.told)
	_ = by.run(func(w *Writer) error { _, err := w.End(context.Background(), b, remove, "test"); return err })
	// What it got on that chain while the operator was at it ends, too.
	for _, e := range m.entries() {
		id := keyspace.AttachmentID{Node: e.Node, Network: e.Network, Container: e.Container, Interface: e.Interface}
		if _, was := before[id]; !was && e.Op == entry.Acquire && remove && b.Head != nil && e.Chain == b.Head.Chain && m.told[id] != nil {
			delete(m.told, id)
			m.gone[id] = true
		}
	}
}

// leap: the clock jumps, by years.
func (m *model) leap() {
	const year = 365 * 24 * time.Hour
	m.w.clock = m.base.Add(rapid.SampledFrom([]time.Duration{0, time.Minute, -time.Minute, time.Hour, year, -year, 30 * year, -30 * year}).Draw(m.t, "to"))
}

// mend follows the ways out that refusals name, until the node allocates.
func (m *model) mend(n *machine) {
	ctx := context.Background()
	m.w.step = nil
	var says error
	var said []error
	for range 12 {
		said = append(said, says)
		n.reconnect()
		m.w.admin.reconnect()
		switch {
		case says == nil:
			c := m.container()
			_, err := n.add(m.pools[0], c)
			m.gone[n.attachment(c)] = true
			if err == nil || errors.Is(err, ErrExhausted) {
				if err := n.del(c); err != nil {
					m.t.Fatal(err)
				}
				delete(m.ill, n.who.Name)
				return
			}
			says = err
		case strings.Contains(says.Error(), "'ledger node remove "+n.who.Name+"'"):
			b, err := m.w.admin.writer().Belongings(ctx, n.who.Name)
			if err != nil {
				m.t.Fatal(err)
			}
			says = m.w.admin.run(func(w *Writer) error { _, err := w.End(ctx, b, true, "test"); return err })
		case strings.Contains(says.Error(), "'ledger node replace "+n.who.Name+"'"):
			m.replace(n)
			says = nil
		case strings.Contains(says.Error(), "'ledger recover node'"):
			r, err := m.recover(n, sandboxes{m})
			if says = err; err == nil && !r.Done {
				m.t.Fatalf("%v: recover: %+v", n.who, r)
			}
		default:
			m.t.Fatalf("%v: no way out: %v", n.who, says)
		}
	}
	m.t.Fatalf("%v: its ways out lead nowhere: %v", n.who, said)
}

// opened reports whether a node has a chain that goes on in its state directory.
func (m *model) opened(n *machine) bool {
	dir, _ := statedir.Open(n.dir)
	mark, err := dir.LoadMark()
	value := m.writerOf(n)
	return err == nil && mark != nil && value != nil && value.Chain == mark.Chain && value.Closed.IsZero() && value.Disputed == ""
}

// twin: a copy of the machine, with its machine ID, writes as the node. When both
// have, both are refused, until an operator says which is the node.
func (m *model) twin() {
	n := m.node()
	if m.restored || m.frozen || m.ill[n.who.Name] || !m.opened(n) {
		return
	}
	m.w.step = nil
	m.w.store.land()
	other := &machine{w: m.w, who: n.who, dir: filepath.Join(m.w.root, "twin-of-"+n.who.Name), id: n.id, boot: n.boot + 2000}
	other.reconnect()
	n.reconnect()
	if err := os.RemoveAll(other.dir); err != nil {
		m.t.Fatal(err)
	}
	if err := copyDir(n.dir, other.dir); err != nil {
		m.t.Fatal(err)
	}
	c := m.container()
	m.gone[n.attachment(c)] = true // the twin goes away with its pods
	if _, err := other.add(m.pools[0], c); err != nil {
		return // no room for it, so that it did not write
	}
	m.ill[n.who.Name] = true
	for _, x := range []*machine{n, other, n} {
		x.reconnect()
		c := m.container()
		m.gone[x.attachment(c)] = true
		if _, err := x.add(m.pools[0], c); !errors.Is(err, ErrIntegrity) {
			m.t.Fatalf("one of two machines that are %v was answered %v", n.who, err)
		}
	}
	m.replace(n)
}

// image and putBack: the machine is put back from an image of itself. Its pods are
// gone; the rest is as it was then.
func (m *model) image() {
	n := m.node()
	dir := filepath.Join(m.w.root, "image-of-"+n.who.Name)
	delete(m.images, n.who.Name)
	if err := os.RemoveAll(dir); err != nil {
		m.t.Fatal(err)
	}
	if err := copyDir(n.dir, dir); err != nil {
		return // it has none yet
	}
	m.images[n.who.Name] = dir
}

func (m *model) putBack() {
	n := m.node()
	from := m.images[n.who.Name]
	if from == "" || m.restored {
		return
	}
	m.loseNode(n)
	if err := copyDir(from, n.dir); err != nil {
		m.t.Fatal(err)
	}
	n.reconnect()
	m.ill[n.who.Name] = true
	m.replaced[n.who.Name] = true // what it remembers of its pods is old
}

// loseNode: the machine's pods are gone, and its state directory.
func (m *model) loseNode(n *machine) {
	for _, id := range slices.Collect(maps.Keys(m.told)) {
		if id.Node == n.who.Name {
			delete(m.told, id)
			m.gone[id] = true
		}
	}
	// With the state directory its queue is lost: those leases are for GC to find.
	dir, _ := statedir.Open(n.dir)
	queue, _ := dir.Queue()
	for _, q := range queue {
		m.gone[q.Attachment] = true
	}
	m.w.store.land() // a machine that is gone sends nothing more
	n.boot++
	if err := os.RemoveAll(n.dir); err != nil {
		m.t.Fatal(err)
	}
}

// spoil: somebody writes garbage into a key of the node's own, or deletes it. The
// way out that is named works, and leaves nothing for verify to find.
func (m *model) spoil() {
	n := m.node()
	if m.restored || m.frozen || m.ill[n.who.Name] || !m.opened(n) {
		return
	}
	m.w.step = nil
	m.w.store.land()
	n.reconnect()
	m.w.admin.reconnect()
	ids := map[keyspace.AttachmentID]bool{}
	for id := range m.told {
		if id.Node == n.who.Name {
			ids[id] = true
		}
	}
	key := testKeys.Writer(n.who)
	id, ok := m.pick(ids)
	attachment := ok && rapid.Bool().Draw(m.t, "an attachment")
	if attachment {
		key = testKeys.Attachment(id)
	}
	deleted := rapid.Bool().Draw(m.t, "deleted")
	// No backup is of the time in between.
	clean := len(m.w.store.history)
	defer func() { m.w.store.history = append(m.w.store.history[:clean], m.w.store.now()) }()
	m.w.store.mu.Lock()
	garbage := rapid.SampledFrom([]string{"garbage", "", "{}", "null"}).Draw(m.t, "garbage")
	m.w.store.apply(Txn{Then: []Write{{Key: key, Value: []byte(garbage), Delete: deleted}}})
	m.w.store.mu.Unlock()
	if !attachment {
		c := m.container()
		m.gone[n.attachment(c)] = true
		if _, err := n.add(m.pools[0], c); !errors.Is(err, ErrIntegrity) || !strings.Contains(err.Error(), "'ledger node replace "+n.who.Name+"'") {
			m.t.Fatalf("%v, whose head is spoilt, answers %v", n.who, err)
		}
		m.replace(n)
		m.ill[n.who.Name] = true
		return
	}
	delete(m.told, id)
	m.gone[id] = true
	err := m.w.admin.run(func(w *Writer) error {
		if deleted {
			return w.Lost(context.Background(), id, entry.Ref{}, "test")
		}
		return w.ReleaseLease(context.Background(), id, entry.Ref{}, "test")
	})
	if err != nil {
		m.t.Fatalf("%v, whose attachment is spoilt: %v", id, err)
	}
}

// queued reports whether the release of an attachment waits on its node.
func (m *model) queued(id keyspace.AttachmentID) bool {
	dir, _ := statedir.Open(m.machineOf(id).dir)
	return dir.IsQueued(id)
}

// invariants hold after every step.
func (m *model) invariants(t *rapid.T) {
	m.w.store.check(t)
	if m.restored {
		return
	}
	state := m.w.store.now()
	for k := range state.keys {
		if key, err := testKeys.Parse(k); err == nil && key.Kind == "attachments" && m.told[key.Attachment] == nil && !m.gone[key.Attachment] && !m.queued(key.Attachment) {
			t.Fatalf("%v is leased, and no runtime knows of it any more", key.Attachment)
		}
	}
	for id, ips := range m.told {
		var a keyspace.Attachment
		kv, ok := state.keys[testKeys.Attachment(id)]
		if !ok {
			t.Fatalf("%v was told %v and is not in etcd", id, ips)
		}
		if err := keyspace.Decode(kv.value, &a); err != nil || !slices.Equal(addrsOf(a.Leases), ips) {
			t.Fatalf("%v was told %v and etcd says %v (%v)", id, ips, a.Leases, err)
		}
	}
}

// finish lets all pods go and all faults end: nothing may leak, and no node may
// be left refused.
func (m *model) finish() {
	w, ctx := m.w, context.Background()
	w.step = nil
	w.store.land()
	m.refreshFrozen()
	if m.frozen {
		w.admin.reconnect()
		if err := w.admin.run(func(x *Writer) error { _, err := x.Thaw(ctx, nil, nil, "test"); return err }); err != nil {
			m.t.Fatalf("thaw: %v", err)
		}
	}
	for _, n := range w.nodes {
		m.mend(n)
	}
	for id := range m.live() {
		n := m.machineOf(id)
		n.reconnect()
		if err := n.del(id.Container); err != nil {
			m.t.Fatalf("DEL of %v: %v", id, err)
		}
	}
	for _, n := range w.nodes {
		n.reconnect()
		var left int
		if err := n.run(func(x *Writer) (err error) { left, err = x.Drain(ctx); return err }); err != nil || left > 0 {
			m.t.Fatalf("%v: %d releases wait on: %v", n.who, left, err)
		}
		if pending, _ := n.writer().Dir.Pending(); pending {
			m.t.Fatalf("%v: a commit's outcome is still not known", n.who)
		}
	}
	w.store.land() // nothing may be left that could still land
	for k, kv := range w.store.now().keys {
		key, err := testKeys.Parse(k)
		if err != nil {
			m.t.Fatal(err)
		}
		var a keyspace.Address
		switch key.Kind {
		case "attachments":
			m.t.Fatalf("%s leaked", k)
		case "addresses":
			if err := keyspace.Decode(kv.value, &a); err != nil || a.State != keyspace.Free {
				m.t.Fatalf("%s leaked: %s", k, kv.value)
			}
		}
	}
	w.clock = w.clock.Add(2 * time.Hour) // nothing is cooling any more
	for _, n := range w.nodes {
		c := m.container()
		if _, err := n.add(m.pools[0], c); m.pools[0].Strict && errors.Is(err, ErrExhausted) {
			continue // the others have all blocks
		} else if err != nil {
			m.t.Fatalf("%v cannot allocate after all is well: %v", n.who, err)
		}
		if err := n.del(c); err != nil {
			m.t.Fatal(err)
		}
	}
	w.store.check(m.t)
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(t, rapid.IntRange(1, 3).Draw(rt, "nodes"))
		w.seed = rapid.Uint64().Draw(rt, "seed")
		w.init(t)
		// The keys that restores may not undo.
		w.store.history = w.store.history[len(w.store.history)-1:]
		m := &model{
			t: rt, w: w, told: map[keyspace.AttachmentID][]netip.Addr{}, gone: map[keyspace.AttachmentID]bool{}, replaced: map[string]bool{}, space: map[keyspace.AttachmentID]string{},
			ill: map[string]bool{}, images: map[string]string{}, base: w.clock,
			colleague: w.machine(entry.Writer{Kind: entry.KindOperator, Name: "colleague@desk"}),
		}
		cooldown := rapid.SampledFrom([]time.Duration{0, 0, 3 * time.Millisecond, time.Hour}).Draw(rt, "cooldown")
		size := rapid.SampledFrom([]int{2, 4}).Draw(rt, "blockSize")
		small, err := NewPool("default", "net", rangeSets("10.22.0.0/28"), nil, rapid.Bool().Draw(rt, "strict"), size, cooldown)
		if err != nil {
			rt.Fatal(err)
		}
		dual, err := NewPool("default", "net", rangeSets("10.22.0.0/28", "fd00::/64"), nil, false, size, cooldown)
		if err != nil {
			rt.Fatal(err)
		}
		red, err := NewPool("red", "net", rangeSets("10.22.0.0/28"), nil, false, size, cooldown)
		if err != nil {
			rt.Fatal(err)
		}
		m.pools = []*Pool{small, dual, red}
		rt.Repeat(map[string]func(*rapid.T){
			"add":             func(*rapid.T) { m.add() },
			"add2":            func(*rapid.T) { m.add() },
			"addAgain":        func(*rapid.T) { m.addAgain() },
			"addRequested":    func(*rapid.T) { m.addRequested() },
			"del":             func(*rapid.T) { m.del() },
			"del2":            func(*rapid.T) { m.del() },
			"check":           func(*rapid.T) { m.check() },
			"gc":              func(*rapid.T) { m.gc() },
			"operatorRelease": func(*rapid.T) { m.operatorRelease() },
			"reap":            func(*rapid.T) { m.reap() },
			"unclaim":         func(*rapid.T) { m.unclaim() },
			"land":            func(*rapid.T) { m.land() },
			"freeze":          func(*rapid.T) { m.toggleFreeze() },
			"powerLoss":       func(*rapid.T) { m.powerLoss() },
			"reimage":         func(*rapid.T) { m.reimage() },
			"clone":           func(*rapid.T) { m.clone() },
			"restore":         func(*rapid.T) { m.restore() },
			"remember":        func(*rapid.T) { m.remember() },
			"recoverAny":      func(*rapid.T) { m.recoverAny() },
			"endNode":         func(*rapid.T) { m.endNode() },
			"leap":            func(*rapid.T) { m.leap() },
			"twin":            func(*rapid.T) { m.twin() },
			"image":           func(*rapid.T) { m.image() },
			"putBack":         func(*rapid.T) { m.putBack() },
			"spoil":           func(*rapid.T) { m.spoil() },
			"":                m.invariants,
		})
		m.finish()
	})
}

var _ = entry.KindNode
