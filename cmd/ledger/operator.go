package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
)

// reasonFlag adds --reason. Where it is needed, need says whether it is given.
func reasonFlag(c *cobra.Command) *string {
	return c.Flags().String("reason", "", "why, for the record: `text`")
}

// needReason wants a reason, and asks for it on a terminal.
func (a *app) needReason(ctx context.Context, reason *string) error {
	if strings.TrimSpace(*reason) == "" && a.terminalIn {
		*reason = a.line(ctx, "why? it goes on the record: ")
	}
	if strings.TrimSpace(*reason) == "" {
		return usage("say why with --reason TEXT: it goes on the record")
	}
	if len(*reason) > entry.MaxText {
		return usage("--reason has %d bytes: at most %d", len(*reason), entry.MaxText)
	}
	return nil
}

// asOperator runs f with the operator's Writer.
func (a *app) asOperator(f func(w *allocator.Writer) error) error {
	w, done, err := a.operator()
	if err != nil {
		return err
	}
	defer done()
	return f(w)
}

func (a *app) init() *cobra.Command {
	c := &cobra.Command{
		Use:   "init",
		Short: "Begin a ledger in an empty etcd (once)",
		Long: `Begin a ledger. Until this has been done nobody allocates, so that an etcd that
was wiped is not taken for a new one. Where there is a ledger nothing is changed,
and that is success.`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,json,yaml,name"),
	}
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.asOperator(func(w *allocator.Writer) error {
			meta, made, err := w.Init(cmd.Context(), *reason)
			if err != nil {
				return err
			}
			if a.output == "name" {
				a.printf("%s\n", meta.Cluster)
				return nil
			}
			if done, err := a.structured(struct {
				keyspace.Meta
				Made bool `json:"made"`
			}{meta, made}); done {
				return err
			}
			if made {
				a.printf("ledger of cluster %s begun by %s\n", meta.Cluster, w.Config.Writer)
			} else {
				a.printf("ledger of cluster %s is there already: epoch %d, %s; nothing was changed\n", meta.Cluster, meta.Epoch, meta.State)
			}
			return nil
		})
	}
	return c
}

func (a *app) freeze() *cobra.Command {
	c := &cobra.Command{
		Use:   "freeze --reason TEXT",
		Short: "Keep everybody from allocating",
		Long: `Keep nodes from allocating and releasing until 'ledger thaw'. Pods that run go on
running; new ones wait; releases are queued on their nodes. Operators can end
leases all the same ('ledger release', 'ledger node drain').`,
		Args: args(0, 0, ""),
	}
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.needReason(cmd.Context(), reason); err != nil {
			return err
		}
		return a.asOperator(func(w *allocator.Writer) error {
			changed, err := w.Freeze(cmd.Context(), *reason)
			if err != nil {
				return err
			}
			if changed {
				a.printf("frozen: nobody allocates until 'ledger thaw'\n")
			} else {
				a.printf("frozen already; nothing was changed\n")
			}
			return nil
		})
	}
	return c
}

func (a *app) thaw() *cobra.Command {
	var nodes string
	var without []string
	c := &cobra.Command{
		Use:   "thaw [--nodes FILE]",
		Short: "Let everybody allocate again",
		Long: `End freeze. After 'ledger recover start' it also ends the recovery: --nodes then
lists all nodes of the cluster, one a line ("-" is standard input; kubectl get
nodes -o name will do), each must have run 'ledger recover node' or be named in
--without, and the stops that nodes have put are removed. A node that is left out
must recover before it allocates again, and the addresses that it alone knows of
may be handed out to others.`,
		Example: `  ledger thaw
  kubectl get nodes -o name | ledger thaw --nodes - --without worker-7`,
		Args: args(0, 0, ""),
	}
	c.Flags().StringVar(&nodes, "nodes", "", "`file` with all nodes of the cluster, one a line")
	c.Flags().StringSliceVar(&without, "without", nil, "do not wait for this `node` (repeated)")
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		var list []string
		var err error
		if nodes != "" {
			if list, err = a.nodeList(nodes); err != nil {
				return err
			}
		}
		for _, n := range without {
			if err := entry.ValidateName("--without", n); err != nil {
				return usage("%w", err)
			}
		}
		return a.asOperator(func(w *allocator.Writer) error {
			meta, err := w.Meta(cmd.Context())
			if err != nil {
				return err
			}
			if meta.Recovering && nodes == "" {
				return refuse("kubectl get nodes -o name | ledger thaw --nodes -",
					"the ledger is recovering (epoch %d): --nodes FILE must list all nodes of the cluster, so that none is forgotten", meta.Epoch)
			}
			changed, err := w.Thaw(cmd.Context(), list, without, *reason)
			if err != nil {
				return err
			}
			if changed {
				a.printf("running: nodes allocate again\n")
			} else {
				a.printf("running already; nothing was changed\n")
			}
			return nil
		})
	}
	return c
}

// nodeList reads nodes' names, one a line, as kubectl prints them or bare.
func (a *app) nodeList(file string) ([]string, error) {
	in, err := a.open(file)
	if err != nil {
		return nil, fmt.Errorf("--nodes: %w", err)
	}
	defer in.Close()
	var out []string
	s := bufio.NewScanner(in)
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		line = strings.TrimPrefix(line, "node/")
		if err := entry.ValidateName("node", line); err != nil {
			return nil, usage("--nodes %s, line %d: %w; want one node a line", file, n, err)
		}
		if !slices.Contains(out, line) {
			out = append(out, line)
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("--nodes %s: %w", file, err)
	}
	if len(out) == 0 {
		return nil, usage("--nodes %s names no node", file)
	}
	return out, nil
}

func (a *app) recover() *cobra.Command {
	c := &cobra.Command{
		Use:   "recover",
		Short: "After etcd was restored from a backup",
		Long: `After etcd was restored from a backup, or went back in time in another way:

  1  ledger freeze --reason …            only before the restore, if etcd still answers
  2  restore etcd, with a new --initial-cluster-token
  3  ledger recover start --reason …     once
  4  ledger recover node                 on each node, as root
  5  ledger thaw --nodes FILE            with the list of all nodes

Each step may be repeated, the first until etcd is restored: afterwards it is
refused, and 'ledger recover start' freezes. Pods keep their addresses.`,
		RunE: a.group("start or node"), Args: cobra.ArbitraryArgs,
	}
	var epoch uint64
	start := &cobra.Command{
		Use:   "start --reason TEXT",
		Short: "Begin a recovery: freeze, and begin a new epoch",
		Long: `Begin a recovery, once etcd has been restored: the ledger is frozen, its epoch is
one more, and each node must run 'ledger recover node' before it allocates again.`,
		Args: args(0, 0, ""),
	}
	start.Flags().Uint64Var(&epoch, "epoch", 0, "at least this epoch, where a node says that it has seen a later one: `N`")
	startReason := reasonFlag(start)
	start.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.needReason(cmd.Context(), startReason); err != nil {
			return err
		}
		return a.asOperator(func(w *allocator.Writer) error {
			meta, began, err := w.RecoverStart(cmd.Context(), epoch, *startReason)
			if err != nil {
				return err
			}
			if !began {
				a.printf("a recovery is under way already, epoch %d; nothing was changed\n", meta.Epoch)
				a.say("if etcd was restored once more since: 'ledger recover start --epoch %d'", meta.Epoch+1)
				return nil
			}
			a.printf("frozen, epoch %d: now run 'ledger recover node' on each node, then 'ledger thaw --nodes FILE'\n", meta.Epoch)
			return nil
		})
	}
	node := &cobra.Command{
		Use:   "node",
		Short: "Bring this node into the new epoch (on the node, as root)",
		Long: `Bring this node into the epoch that 'ledger recover start' began: what etcd says
it holds and it does not is released, what it holds and etcd does not say is
put back. An address that it holds and etcd gives to another is a conflict: it is
listed, nothing is resolved, and the exit status is 1. Run it again once the other
node has recovered, too.

What it holds is in its state directory. What an operator, or anybody on the record,
has ended since is not put back. Where the directory was lost (after 'ledger node
replace'), ask the runtime with --cri or give its list with --containers: what it knows
keeps the address that etcd says it has. What it does not know is let go once that is
proven as for 'ledger gc': by two lists that are --grace apart. So while there are
conflicts run it again; where there is none the node is recovered at once, and 'ledger
gc' frees the rest later.

A node that is recovered already is left as it is, whatever runs on it.`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,json,yaml"),
	}
	nodeReason := reasonFlag(node)
	g := new(collection)
	g.runtime.flags(node)
	node.Flags().DurationVar(&g.grace, "grace", 5*time.Minute, "for how long a lease must have been off the list: a `duration`")
	node.Flags().BoolVar(&g.all, "all", false, "judge leases that name no pod, too: only where all sandboxes of this node are on the list")
	node.RunE = func(cmd *cobra.Command, _ []string) error {
		if g.grace < 0 {
			return usage("--grace %v: want a time from 0", g.grace)
		}
		return a.recoverNode(cmd.Context(), g, *nodeReason)
	}
	c.AddCommand(start, node)
	return c
}

// What 'recover node -o json' writes.
type recovered struct {
	Node      string                  `json:"node"`
	Epoch     uint64                  `json:"epoch"`
	Done      bool                    `json:"done"`
	Before    bool                    `json:"before"` // there was nothing to do
	Kept      int                     `json:"kept"`
	Unknown   int                     `json:"unknown"` // of these the runtime does not know, not for long enough yet
	Ended     []keyspace.AttachmentID `json:"ended"`   // what the record has ended, and the node still held
	Asserted  []keyspace.AttachmentID `json:"asserted"`
	Released  []keyspace.AttachmentID `json:"released"`
	Conflicts []recoveredConflict     `json:"conflicts"`
}

type recoveredConflict struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Leases     []keyspace.Lease      `json:"leases"`
	Reason     string                `json:"reason"`
}

// known is the runtime's list, with what is proven to be leaked by now.
type known struct {
	list   leak.List
	leaked map[keyspace.AttachmentID]entry.Ref
}

func (k *known) Knows(id keyspace.AttachmentID) bool {
	has, _ := k.list.Has(&leak.Lease{ID: id})
	return has
}

func (k *known) Leaked(id keyspace.AttachmentID, acquire entry.Ref) bool {
	return k.leaked[id] == acquire
}

const noNode = "run it on a node. A machine that never had a pod has nothing to recover: leave it out of the list for 'ledger thaw'"

// startsAnew refuses to make the state directory of a node that may not open a new
// chain: a mistyped directory, or a machine that is no node, is left as it is.
func (a *app) startsAnew(ctx context.Context, node, dir string) error {
	return a.lookUp(ctx, func(r *reader) error {
		var head keyspace.Writer
		w := entry.Writer{Kind: entry.KindNode, Name: node}
		found, err := r.value(ctx, r.keys.Writer(w), &head)
		switch {
		case errors.Is(err, allocator.ErrUnavailable):
			return err
		case !found && err == nil:
			return refuse(noNode, "%s has never written, and state directory %s does not exist: it has nothing to recover", w, dir)
		case err != nil || head.Closed.IsZero():
			return refuse("is it another one? Name it with --state-dir. If it was lost: 'ledger node replace "+node+"', by an operator, then this again",
				"%s has a chain, and its state directory %s does not exist", w, dir)
		}
		return nil
	})
}

func (a *app) recoverNode(ctx context.Context, g *collection, reason string) error {
	s, err := a.settings()
	if err != nil {
		return err
	}
	if _, err := os.Stat(s.StateDir); errors.Is(err, fs.ErrNotExist) && s.Node != "" {
		if err := a.startsAnew(ctx, s.Node, s.StateDir); err != nil {
			return err
		}
	}
	w, done, err := a.node(true)
	if err != nil {
		return err
	}
	defer done()
	_, due, err := w.Enter(ctx)
	if errors.Is(err, allocator.ErrNotFound) {
		return &failure{err: err, hint: noNode, code: exitWrong}
	} else if err != nil {
		return err
	}
	var runtime allocator.Runtime
	unknown := 0
	if due && g.runtime.given() {
		// Only now: what is leased to this node is from before, and no ADD adds to it.
		seen, err := a.survey(ctx, g, w, "runtime")
		if err != nil {
			return err
		}
		k := &known{seen.list, map[keyspace.AttachmentID]entry.Ref{}}
		for _, x := range seen.found.Suspects {
			if x.Leaked {
				k.leaked[x.ID] = x.Value.Acquire
			} else {
				unknown++
			}
		}
		runtime = k
	}
	r, rerr := w.Recover(ctx, runtime, reason)
	if r == nil {
		return rerr
	}
	v := recovered{
		Node: w.Config.Writer.Name, Epoch: r.Epoch, Done: r.Done, Before: r.Before, Kept: r.Kept, Unknown: unknown,
		Asserted: append([]keyspace.AttachmentID{}, r.Asserted...), Released: append([]keyspace.AttachmentID{}, r.Released...),
		Ended: []keyspace.AttachmentID{}, Conflicts: []recoveredConflict{},
	}
	for _, h := range r.Ended {
		v.Ended = append(v.Ended, h.ID)
	}
	for _, c := range r.Conflicts {
		v.Conflicts = append(v.Conflicts, recoveredConflict{c.Holding.ID, c.Holding.Value.Leases, c.Reason})
	}
	if done, err := a.structured(v); done {
		err = first(err, rerr)
		if err == nil && !v.Done {
			err = wrong
		}
		return err
	}
	for _, id := range v.Released {
		why := ""
		if v.Before {
			why = ": its release was queued"
		}
		a.printf("released  %s%s\n", id, why)
	}
	for _, id := range v.Asserted {
		a.printf("put back  %s\n", id)
	}
	for _, h := range r.Ended {
		a.printf("ended     %s: its lease of %s was ended on the record; a pod that still runs has no address of its own: delete it\n", h.ID, addressText(h.Value.Leases))
	}
	for _, c := range v.Conflicts {
		a.printf("%s  %s: %s\n", a.paint(red, "conflict"), c.Attachment, c.Reason)
	}
	if rerr != nil {
		return rerr
	}
	if v.Before {
		a.printf("%s, epoch %d: recovered already, or it never had to be: its leases stay as they are\n", v.Node, v.Epoch)
		return nil
	}
	a.printf("%s, epoch %d: %d kept, %d put back, %d released, %s\n", v.Node, v.Epoch, v.Kept, len(v.Asserted), len(v.Released), count(len(v.Conflicts), "conflict"))
	if unknown > 0 {
		how := "'ledger gc' frees them, once they are proven to be nobody's"
		if !v.Done {
			how = fmt.Sprintf("run this again in %v or later, with a list that was made then, to let them go", g.grace)
		}
		a.say("the runtime does not know %s of these: %s", count(unknown, "lease"), how)
	}
	if !v.Done {
		return refuse("if the other holder is a node that has not recovered yet, run 'ledger recover node' there, then here again; else delete one of the two pods and run it again on its node, or end the lease of one with 'ledger release'",
			"%s is not recovered: %s left", v.Node, count(len(v.Conflicts), "conflict"))
	}
	return nil
}

func (a *app) unclaim() *cobra.Command {
	c := &cobra.Command{
		Use:     "unclaim SPACE/POOL/PREFIX",
		Short:   "Give a block back that a node has claimed",
		Long:    "Give a block back, so that any node may claim it. It fails while an address of it is\nleased. 'ledger show --blocks' lists the blocks.",
		Example: "  ledger unclaim default/prod/10.22.7.64/26 --reason 'worker-3 is gone'",
		Args:    args(1, 1, "a block, SPACE/POOL/PREFIX"),
	}
	var node string
	c.Flags().StringVar(&node, "of", "", "the `node` whose block it is by the record, where its key cannot be read ('ledger verify' says whose)")
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if node != "" {
			if err := entry.ValidateName("--of", node); err != nil {
				return usage("%w", err)
			}
		}
		p := strings.SplitN(args[0], "/", 3)
		if len(p) != 3 {
			return usage("%q is no block: want SPACE/POOL/PREFIX, as 'ledger show --blocks' prints them", args[0])
		}
		prefix, err := netip.ParsePrefix(p[2])
		if err != nil || prefix != prefix.Masked() {
			return usage("%q is no block: %q is no prefix without host bits", args[0], p[2])
		}
		b := keyspace.BlockID{Space: p[0], Pool: p[1], Prefix: prefix}
		for i, what := range []string{"space", "pool"} {
			if err := entry.ValidateName(what, p[i]); err != nil {
				return usage("%q is no block: %w", args[0], err)
			}
		}
		return a.asOperator(func(w *allocator.Writer) error {
			err := w.Unclaim(cmd.Context(), allocator.Claim{Block: b, Node: node}, *reason)
			switch {
			case errors.Is(err, allocator.ErrNotFound) && node != "":
				return refuse("'ledger show --blocks' lists the blocks", "block %s is not %s's to give back", b, node)
			case errors.Is(err, allocator.ErrNotFound):
				return refuse("'ledger show --blocks' lists the blocks", "nobody has claimed block %s", b)
			case errors.Is(err, allocator.ErrConflict):
				return refuse("a block is given back once nothing in it is leased", "%w", err)
			case err != nil:
				return err
			}
			a.printf("block %s is nobody's\n", b)
			return nil
		})
	}
	return c
}

func (a *app) release() *cobra.Command {
	var space, attachment string
	var yes, dry bool
	c := &cobra.Command{
		Use:   "release ADDRESS | --attachment NODE/NETWORK/CONTAINER/INTERFACE",
		Short: "End the lease of an attachment by hand",
		Long: `End the lease of an attachment whose pod is gone, for instance with its node. All
addresses of the attachment are released. It shows them, and asks.

A pod that still runs does not notice: it goes on using the address, and the next
pod that gets it collides with it.`,
		Example: `  ledger release 10.22.7.14 --reason 'worker-3 burnt down'
  ledger release --attachment worker-3/prod/0b1f…/eth0 --reason '…' --yes`,
		Args: args(0, 1, "an address, or --attachment"),
	}
	c.Flags().StringVar(&space, "space", "default", "address `space` of ADDRESS")
	c.Flags().StringVar(&attachment, "attachment", "", "the `attachment` to release")
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.Flags().BoolVar(&dry, "dry-run", false, "show what would be released, and release nothing")
	reason := reasonFlag(c)
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if (len(args) == 1) == (attachment != "") {
			return usage("name either an address or, with --attachment, an attachment")
		}
		if !dry {
			if err := a.needReason(cmd.Context(), reason); err != nil {
				return err
			}
		}
		ctx := cmd.Context()
		var id keyspace.AttachmentID
		var value keyspace.Attachment
		var address keyspace.Address // that names it, where one was given
		var spoilt error             // what is wrong with the attachment's key
		err := a.lookUp(ctx, func(r *reader) (err error) {
			if attachment != "" {
				p := strings.Split(attachment, "/")
				if len(p) != 4 || slices.Contains(p, "") {
					return usage("--attachment %q: want NODE/NETWORK/CONTAINER/INTERFACE", attachment)
				}
				id = keyspace.AttachmentID{Node: p[0], Network: p[1], Container: p[2], Interface: p[3]}
			} else if address, err = a.heldAddress(ctx, r, args[0], space); err != nil {
				return err
			} else {
				id = *address.Holder
			}
			found, err := r.value(ctx, r.keys.Attachment(id), &value)
			switch {
			case errors.Is(err, allocator.ErrUnavailable):
				return err
			case err != nil:
				spoilt, value = err, keyspace.Attachment{}
			case !found && address.Holder == nil:
				return refuse("'ledger show --leases -o wide' lists them; where an address still names it: 'ledger release ADDRESS'", "attachment %v holds nothing", id)
			case !found:
				spoilt = errors.New("its key is gone, and the address still names it")
			case address.Holder != nil && address.Acquire != value.Acquire:
				spoilt, value = fmt.Errorf("it has another lease now, and the address still names acquire %s", address.Acquire), keyspace.Attachment{}
			}
			return nil
		})
		if err != nil {
			return err
		}
		var b bytes.Buffer
		fmt.Fprintf(&b, "attachment %s\n", id)
		if pod := podText(value.Pod, value.PodUID); pod != "" {
			fmt.Fprintf(&b, "pod        %s\n", printable(pod))
		}
		fmt.Fprintf(&b, "node       %s\n", id.Node)
		for _, l := range value.Leases {
			fmt.Fprintf(&b, "address    %s in space %s, pool %s\n", l.Address.Addr(), value.Space, value.Pool)
		}
		if spoilt != nil {
			fmt.Fprintf(&b, "spoilt     %s; the lease is ended by what is on the record\n", printable(spoilt.Error()))
		} else {
			fmt.Fprintf(&b, "acquired   by entry %s\n", value.Acquire)
		}
		if dry {
			a.printf("%s", b.String())
			a.printf("nothing was released (--dry-run)\n")
			return nil
		}
		if !yes {
			if !a.terminalIn {
				return usage("nobody to ask: standard input is no terminal; look with --dry-run, then say --yes")
			}
			a.say("%sa pod that still runs keeps using the address", b.String())
			if !a.ask(ctx, "release? [y/N] ") {
				return refuse("", "nothing was released")
			}
		}
		return a.asOperator(func(w *allocator.Writer) error {
			end := w.ReleaseLease
			if spoilt != nil && address.Holder != nil {
				end, value.Acquire = w.Lost, address.Acquire
			} else if spoilt != nil {
				// The lease that the record has now, and none that comes after.
				b, err := w.Belongings(ctx, id.Node)
				if err != nil {
					return err
				}
				for _, l := range b.Leases {
					if l.ID == id && l.Spoilt == nil {
						return refuse("look again", "the key of attachment %v can be read by now", id)
					} else if l.ID == id {
						value.Acquire = l.Value.Acquire
					}
				}
			}
			if err := end(ctx, id, value.Acquire, *reason); err != nil {
				return err
			}
			if spoilt != nil && address.Holder != nil {
				a.printf("released %s of %s\n", args[0], id)
			} else if spoilt != nil {
				a.printf("released %s\n", id)
			}
			for _, l := range value.Leases {
				a.printf("released %s of %s\n", l.Address.Addr(), id)
			}
			return nil
		})
	}
	return c
}

// ask waits for a y on the terminal, or for an end of it all.
func (a *app) ask(ctx context.Context, question string) bool {
	answer := strings.ToLower(a.line(ctx, question))
	return answer == "y" || answer == "yes"
}

// line asks on the terminal for a line; it is empty if it all ends before.
func (a *app) line(ctx context.Context, question string) string {
	fmt.Fprint(a.err, question)
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.in).ReadString('\n')
		answer <- line
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.err)
		return ""
	case line := <-answer:
		if line == "" {
			fmt.Fprintln(a.err)
		}
		return strings.TrimSpace(line)
	}
}

// lookUp runs f on a connection to an etcd that holds a ledger.
func (a *app) lookUp(ctx context.Context, f func(r *reader) error) error {
	r, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer r.store.Close()
	if err := r.haveLedger(); err != nil {
		return err
	}
	return r.store.Explain(ctx, f(r))
}

// value reads one key; false if it is absent.
func (r *reader) value(ctx context.Context, key string, v any) (bool, error) {
	g, err := r.client.Get(ctx, key)
	if err != nil {
		return false, fmt.Errorf("%w: reading %s: %w", allocator.ErrUnavailable, key, err)
	}
	if len(g.Kvs) == 0 {
		return false, nil
	}
	if err := keyspace.Decode(g.Kvs[0].Value, v); err != nil {
		return false, refuse("'ledger verify' says more", "%s: %w", key, err)
	}
	return true, nil
}

// heldAddress is the value of an address that somebody holds.
func (a *app) heldAddress(ctx context.Context, r *reader, address, space string) (v keyspace.Address, err error) {
	ip, err := parseAddress(address)
	if err != nil {
		return v, err
	}
	if err := entry.ValidateName("--space", space); err != nil {
		return v, usage("%w", err)
	}
	found, err := r.value(ctx, r.keys.Address(space, ip), &v)
	if errors.Is(err, allocator.ErrUnavailable) {
		return v, err
	} else if err != nil {
		return v, refuse("'ledger log --address "+ip.String()+" -o wide' says who has it by the record; then 'ledger release --attachment NODE/NETWORK/CONTAINER/INTERFACE'", "%w", err)
	}
	if found && v.State == keyspace.Leased && v.Holder != nil {
		return v, nil
	}
	v = keyspace.Address{}
	spaces, err := r.spaces(ctx)
	if err != nil {
		return v, err
	}
	for _, s := range spaces {
		var other keyspace.Address
		if ok, err := r.value(ctx, r.keys.Address(s, ip), &other); err == nil && ok && other.State == keyspace.Leased {
			return v, refuse("--space "+s, "nobody holds %v in space %s, but somebody does in space %s", ip, space, s)
		}
	}
	return v, refuse("'ledger ip "+ip.String()+"' shows its history", "nobody holds %v in space %s", ip, space)
}

// spaces leaps from one address space to the next.
func (r *reader) spaces(ctx context.Context) ([]string, error) {
	var out []string
	for from := r.keys.Addresses(); ; {
		g, err := r.client.Get(ctx, from, clientv3.WithRange(keyspace.After(r.keys.Addresses())), clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return nil, fmt.Errorf("%w: %w", allocator.ErrUnavailable, err)
		}
		if len(g.Kvs) == 0 {
			return out, nil
		}
		space, _, ok := strings.Cut(strings.TrimPrefix(string(g.Kvs[0].Key), r.keys.Addresses()), "/")
		if !ok {
			return nil, errors.New("a key below addresses/ is not in this format: run 'ledger verify'")
		}
		out = append(out, space)
		from = keyspace.After(r.keys.Addresses() + space + "/")
	}
}
