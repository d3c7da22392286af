package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

func (a *app) nodeCommands() *cobra.Command {
	c := &cobra.Command{
		Use:   "node",
		Short: "Nodes: list them; drain, remove or replace one",
		Long: `Nodes as etcd knows them. For a machine that never comes back: 'remove'. For one
that comes back without its state directory: 'replace'.`,
		RunE: a.group("list, drain, remove or replace"), Args: cobra.ArbitraryArgs,
	}
	c.AddCommand(a.nodeListing(), a.nodeDrain(), a.nodeRemove(), a.nodeReplace())
	return c
}

func (a *app) nodeReplace() *cobra.Command {
	var operator bool
	c := &cobra.Command{
		Use:   "replace NODE --reason TEXT",
		Short: "Let a node that lost its key or state open a new chain",
		Long: `Let a node that refuses with code 104 for its identity or its chain (reinstalled,
state directory lost, copied or damaged) open a new chain. The old chain is closed
at its present head: nothing that is added to it counts any more. The leases that
etcd has for the node stay.

Make sure that no second machine runs under that name.`,
		Args: args(1, 1, "a node's name"),
	}
	c.Flags().BoolVar(&operator, "operator", false, "NODE is an operator's name, not a node's")
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if err := a.needReason(cmd.Context(), reason); err != nil {
			return err
		}
		lost := entry.Writer{Kind: entry.KindNode, Name: args[0]}
		if operator {
			lost.Kind = entry.KindOperator
		}
		if err := lost.Validate(); err != nil {
			return usage("%w", err)
		}
		return a.asOperator(func(w *allocator.Writer) error {
			ref, err := w.Replace(cmd.Context(), allocator.Replacement{Writer: lost}, *reason)
			if err != nil {
				return err
			}
			a.printf("%s may open a new chain; its old one, %s, ends at entry %d\n", lost, ref.Last.Chain, ref.Last.Seq)
			return nil
		})
	}
	return c
}

// What 'node list -o json' writes.
type listedNode struct {
	Node        string    `json:"node"`
	State       string    `json:"state"`
	Epoch       uint64    `json:"epoch,omitempty"`
	Head        entry.Ref `json:"head,omitzero"`
	Last        time.Time `json:"lastEntry,omitzero"` // the node's clock
	Attachments int       `json:"attachments"`
	Blocks      int       `json:"blocks"`
	Machine     string    `json:"machine,omitempty"`
	Stop        string    `json:"stop,omitempty"`
}

func (a *app) nodeListing() *cobra.Command {
	c := &cobra.Command{
		Use:   "list",
		Short: "List the nodes that etcd knows, and when each last wrote",
		Long: `List the nodes that etcd knows: those that have written, hold something, or
stopped the cluster. LAST ENTRY is the time of the node's last entry by the node's own
clock; a node on which no pod comes or goes writes nothing.`,
		Args: args(0, 0, ""), Annotations: formats("table,wide,json,yaml,name"),
	}
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		var nodes []listedNode
		err := a.lookUp(ctx, func(r *reader) (err error) {
			nodes, err = a.listNodes(ctx, r)
			return err
		})
		if err != nil {
			return err
		}
		if done, err := a.structured(nodes); done {
			return err
		}
		if a.output == "name" {
			for _, n := range nodes {
				a.printf("%s\n", n.Node)
			}
			return nil
		}
		if len(nodes) == 0 {
			a.say("no node has written yet")
			return nil
		}
		headers := []string{"NODE", "ATTACHMENTS", "BLOCKS", "LAST ENTRY", "AGE", "EPOCH", "STATE"}
		if a.wide() {
			headers = append(headers, "HEAD", "MACHINE")
		}
		t := a.table(headers...)
		for _, n := range nodes {
			age, epoch := "", ""
			if !n.Last.IsZero() {
				age = span(max(0, a.now().Sub(n.Last)))
			}
			if n.Epoch > 0 {
				epoch = fmt.Sprint(n.Epoch)
			}
			row := []string{n.Node, fmt.Sprint(n.Attachments), fmt.Sprint(n.Blocks), stamp(n.Last), age, epoch, n.State}
			if n.Stop != "" {
				row[6] = n.State + ", STOPPED the cluster: " + n.Stop
			}
			if a.wide() {
				row = append(row, a.refText(n.Head), n.Machine)
			}
			t.row(row...)
		}
		t.flush()
		return nil
	}
	return c
}

func (a *app) listNodes(ctx context.Context, r *reader) ([]listedNode, error) {
	var meta keyspace.Meta
	if _, err := r.value(ctx, r.keys.Meta(), &meta); err != nil {
		return nil, err
	}
	nodes := map[string]*listedNode{}
	node := func(name string) *listedNode {
		if nodes[name] == nil {
			nodes[name] = &listedNode{Node: name, State: "no chain"}
		}
		return nodes[name]
	}
	heads := map[string]string{} // key of the head entry: node
	err := r.each(ctx, r.keys.Writers()+string(entry.KindNode)+"/", func(k keyspace.Key, value []byte) error {
		n := node(k.Writer.Name)
		var w keyspace.Writer
		if err := keyspace.Decode(value, &w); err != nil {
			n.State = "head unreadable: 'ledger node replace' makes it anew"
			return nil
		}
		n.Head, n.Epoch, n.Machine = w.Head(), w.Epoch, w.Machine
		heads[r.keys.Entry(k.Writer, w.Chain, w.Seq)] = n.Node
		n.State = standing(&w, meta.Epoch, meta.Recovering)
		return nil
	})
	if err == nil {
		err = r.each(ctx, r.keys.Attachments(), func(k keyspace.Key, _ []byte) error {
			node(k.Attachment.Node).Attachments++
			return nil
		})
	}
	if err == nil {
		err = r.each(ctx, r.keys.AllBlocks(), func(_ keyspace.Key, value []byte) error {
			var b keyspace.Block
			if keyspace.Decode(value, &b) == nil {
				node(b.Node).Blocks++
			}
			return nil
		})
	}
	if err == nil {
		err = r.each(ctx, r.keys.Stops(), func(k keyspace.Key, value []byte) error {
			st := keyspace.Stop{Found: "unreadable"}
			_ = keyspace.Decode(value, &st)
			node(k.Name).Stop = st.Found
			return nil
		})
	}
	if err == nil {
		err = r.last(ctx, heads, nodes)
	}
	if err != nil {
		return nil, err
	}
	out := []listedNode{}
	for _, n := range nodes {
		out = append(out, *n)
	}
	slices.SortFunc(out, func(a, b listedNode) int { return strings.Compare(a.Node, b.Node) })
	return out, nil
}

// standing is what a node's head says about it.
func standing(w *keyspace.Writer, epoch uint64, recovering bool) string {
	switch {
	case !w.Closed.IsZero() && w.Removed:
		return "removed"
	case !w.Closed.IsZero():
		return "replaced: opens a new chain at its next contact"
	case w.Disputed != "":
		return "REFUSED: two machines write as it ('ledger verify')"
	case w.Epoch < epoch:
		return fmt.Sprintf("not recovered: in epoch %d", w.Epoch)
	case recovering && w.Recover.IsZero():
		return "recovering"
	}
	return "ok"
}

// last reads the heads' times, many at a time.
func (r *reader) last(ctx context.Context, heads map[string]string, nodes map[string]*listedNode) error {
	const atATime = 100 // below etcd's 128 operations a transaction
	var keys []string
	for k := range heads {
		keys = append(keys, k)
	}
	for chunk := range slices.Chunk(keys, atATime) {
		var ops []clientv3.Op
		for _, k := range chunk {
			ops = append(ops, clientv3.OpGet(k))
		}
		t, err := r.client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return fmt.Errorf("%w: reading the nodes' last entries: %w", allocator.ErrUnavailable, err)
		}
		for i, x := range t.Responses {
			for _, kv := range x.GetResponseRange().Kvs {
				if e, err := entry.Parse(kv.Value); err == nil {
					nodes[heads[chunk[i]]].Last = e.Time
				}
			}
		}
	}
	return nil
}

// each calls f for each key below a prefix that this program could have
// written, at one revision.
func (r *reader) each(ctx context.Context, prefix string, f func(k keyspace.Key, value []byte) error) error {
	_, err := r.eachAt(ctx, 0, prefix, f)
	return err
}

// eachAt is each at a revision, and says which that was; 0 is the newest.
func (r *reader) eachAt(ctx context.Context, revision int64, prefix string, f func(k keyspace.Key, value []byte) error) (int64, error) {
	for from := prefix; ; {
		g, err := r.client.Get(ctx, from, clientv3.WithRange(keyspace.After(prefix)), clientv3.WithLimit(pageSize), clientv3.WithRev(revision))
		if err != nil {
			return revision, fmt.Errorf("%w: reading %s: %w", allocator.ErrUnavailable, prefix, err)
		}
		if revision == 0 {
			revision = g.Header.Revision
		}
		for _, kv := range g.Kvs {
			k, err := r.keys.Parse(string(kv.Key))
			if err != nil {
				continue // 'ledger verify' names it
			}
			if err := f(k, kv.Value); err != nil {
				return revision, err
			}
		}
		if !g.More {
			return revision, nil
		}
		from = string(g.Kvs[len(g.Kvs)-1].Key) + "\x00"
	}
}

// farewell is what drain and remove share.
type farewell struct {
	node   string
	remove bool
	yes    bool
	dry    bool
	reason string
}

func (f *farewell) flags(c *cobra.Command) *string {
	c.Flags().BoolVarP(&f.yes, "yes", "y", false, "do not ask")
	c.Flags().BoolVar(&f.dry, "dry-run", false, "show what would be done, and do nothing")
	return reasonFlag(c)
}

func (a *app) nodeDrain() *cobra.Command {
	var f farewell
	c := &cobra.Command{
		Use:   "drain NODE --reason TEXT",
		Short: "Release all that a node holds, and give its blocks back",
		Long: `Release every lease of a node whose pods are gone, and give its blocks back, so
that other nodes may use them. The node keeps its identity. It shows what there is, and
asks.

Pods that still run there do not notice: they go on using their addresses, and the next
pods that get them collide with them.`,
		Args: args(1, 1, "a node's name"), Annotations: formats("table,json,yaml"),
	}
	reason := f.flags(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		f.node, f.reason = args[0], *reason
		return a.sayFarewell(cmd.Context(), &f)
	}
	return c
}

func (a *app) nodeRemove() *cobra.Command {
	f := farewell{remove: true}
	c := &cobra.Command{
		Use:   "remove NODE --reason TEXT",
		Short: "Remove a machine that never comes back",
		Long: `Close a node's chain, release every lease it has, and give its blocks back: for a
machine that never comes back. What it wrote stays on the record. It shows what there
is, and asks. Run it again if it was cut short.

If it does come back, what it signs with its old chain is refused, and it answers 104
while a lease of it is still to be ended. With pods that it remembers it answers 104 until
'ledger recover node' has been run on it, which lists those whose leases were ended here;
without, it opens a new chain at its next pod.`,
		Args: args(1, 1, "a node's name"), Annotations: formats("table,json,yaml"),
	}
	reason := f.flags(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		f.node, f.reason = args[0], *reason
		return a.sayFarewell(cmd.Context(), &f)
	}
	return c
}

// What 'node drain' and 'node remove' write with -o json.
type farewelled struct {
	Node     string                  `json:"node"`
	Closed   entry.Ref               `json:"closed,omitzero"` // the last entry of its chain that counts
	Released []keyspace.AttachmentID `json:"released"`
	Blocks   []string                `json:"blocks"` // given back
	Kept     []string                `json:"kept"`   // blocks in which others hold addresses, or
	Back     bool                    `json:"back"`   // the node came back before they were given back
}

func (a *app) sayFarewell(ctx context.Context, f *farewell) error {
	w := entry.Writer{Kind: entry.KindNode, Name: f.node}
	if err := w.Validate(); err != nil {
		return usage("%w", err)
	}
	if !f.dry {
		if err := a.needReason(ctx, &f.reason); err != nil {
			return err
		}
	}
	var has *allocator.Belongings
	var last time.Time
	err := a.asOperator(func(op *allocator.Writer) (err error) {
		if has, err = op.Belongings(ctx, f.node); err != nil || has.Head == nil {
			return err
		}
		return a.lookUp(ctx, func(r *reader) error {
			n := &listedNode{}
			err := r.last(ctx, map[string]string{r.keys.Entry(w, has.Head.Chain, has.Head.Seq): f.node}, map[string]*listedNode{f.node: n})
			last = n.Last
			return err
		})
	})
	if err != nil {
		return err
	}
	if has.Nothing() {
		return refuse("'ledger node list' lists the nodes", "etcd knows no node %s", f.node)
	}
	what := "drain"
	if f.remove {
		what = "remove"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "node         %s\n", f.node)
	if !last.IsZero() {
		fmt.Fprintf(&b, "last entry   %s, %s ago by its clock\n", stamp(last), span(a.now().Sub(last)))
	}
	if has.Spoilt != nil {
		fmt.Fprintf(&b, "head         cannot be read: %s\n", printable(has.Spoilt.Error()))
	}
	fmt.Fprintf(&b, "attachments  %d\n", len(has.Leases))
	for i, l := range has.Leases {
		if i == 10 {
			fmt.Fprintf(&b, "             and %d more\n", len(has.Leases)-i)
			break
		}
		if l.Spoilt != nil {
			fmt.Fprintf(&b, "             %s, which cannot be read\n", l.ID)
			continue
		}
		fmt.Fprintf(&b, "             %s  %s\n", printable(addressText(l.Value.Leases)), printable(podText(l.Value.Pod, l.Value.PodUID)))
	}
	fmt.Fprintf(&b, "blocks       %d\n", len(has.Claims))
	if f.dry {
		a.printf("%snothing was done (--dry-run)\n", b.String())
		return nil
	}
	if !f.yes {
		if !a.terminalIn {
			return usage("nobody to ask: standard input is no terminal; look with --dry-run, then say --yes")
		}
		a.say("%spods that still run there keep using their addresses", strings.TrimSuffix(b.String(), "\n")+"\n")
		if !a.ask(ctx, what+"? [y/N] ") {
			return refuse("", "nothing was done")
		}
	}
	out := farewelled{Node: f.node, Released: []keyspace.AttachmentID{}, Blocks: []string{}, Kept: []string{}}
	err = a.asOperator(func(op *allocator.Writer) error {
		ended, err := op.End(ctx, has, f.remove, f.reason)
		out.Closed, out.Released = ended.Closed, append(out.Released, ended.Released...)
		for _, b := range ended.Blocks {
			out.Blocks = append(out.Blocks, b.String())
		}
		for _, b := range ended.Kept {
			out.Kept = append(out.Kept, b.String())
		}
		out.Back = ended.Back
		return err
	})
	if done, serr := a.structured(out); done {
		return first(err, serr)
	}
	switch {
	case !out.Closed.IsZero():
		a.printf("closed      chain %s at entry %d\n", out.Closed.Chain, out.Closed.Seq)
	case f.remove && err == nil:
		a.printf("closed      nothing: %s has no chain\n", f.node)
	}
	a.printf("released    %s\n", count(len(out.Released), "attachment"))
	a.printf("given back  %s\n", count(len(out.Blocks), "block"))
	for _, b := range out.Kept {
		why := "others hold addresses of it; 'ledger unclaim' gives it back later"
		if out.Back {
			why = "it came back meanwhile, or others hold addresses of it"
		}
		a.printf("kept        block %s: %s\n", b, why)
	}
	if err != nil {
		return err
	}
	if out.Back {
		a.printf("%s was removed, lives, and came back: what it had before is ended\n", f.node)
		return nil
	}
	a.printf("%s is %s\n", f.node, map[bool]string{true: "removed", false: "drained"}[f.remove])
	return nil
}

func addressText(leases []keyspace.Lease) string {
	var out []string
	for _, l := range leases {
		out = append(out, l.Address.Addr().String())
	}
	return strings.Join(out, " ")
}
