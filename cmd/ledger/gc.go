package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/internal/cri"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
)

// runtimeList is where a node's list of sandboxes comes from.
type runtimeList struct{ cri, containers string }

func (r *runtimeList) flags(c *cobra.Command) {
	c.Flags().StringVar(&r.cri, "cri", "", "ask the container runtime at this CRI `endpoint`, as unix:///run/containerd/containerd.sock")
	c.Flags().StringVar(&r.containers, "containers", "", "read the IDs of all sandboxes of this node from `FILE` (- is standard input), one a line, as 'crictl pods -q' writes them")
}

func (r *runtimeList) given() bool { return r.cri != "" || r.containers != "" }

// criTimeout is for the runtime's answers.
const criTimeout = 30 * time.Second

// read returns the list, how the record calls it, and where it is from.
func (r *runtimeList) read(ctx context.Context, a *app) (leak.Containers, string, given, error) {
	if r.cri != "" && r.containers != "" {
		return nil, "", given{}, usage("--cri and --containers both say what runs: give one")
	}
	if r.cri != "" {
		ctx, cancel := context.WithTimeout(ctx, criTimeout)
		defer cancel()
		name, ids, err := cri.Sandboxes(ctx, r.cri)
		return ids, name, given{name: "--cri " + r.cri}, err
	}
	var ids leak.Containers
	from, err := a.given("--containers", r.containers, func(in io.Reader) (err error) {
		ids, err = readContainers(in)
		return err
	})
	if err != nil {
		return nil, "", given{}, err
	}
	// The list may come from a pipe whose other end failed.
	if len(ids) == 0 {
		return nil, "", given{}, usage("--containers %s lists no sandbox: all that this node holds would be released; where nothing runs, let --cri say so", r.containers)
	}
	return ids, "the list given", from, nil
}

// given is where a list is from.
type given struct {
	name string    // how it was given
	made time.Time // when its file was written; zero where there is none, as for a pipe
	sum  string    // SHA-256 of what was read
}

// given reads a file, or standard input for "-".
func (a *app) given(flag, file string, read func(io.Reader) error) (given, error) {
	out := given{name: flag + " " + file}
	in, err := a.open(file)
	if err != nil {
		return out, fmt.Errorf("%s: %w", out.name, err)
	}
	defer in.Close()
	opened := io.Reader(in)
	if file == "-" {
		opened = a.in
	}
	// Before it is read: what is written meanwhile is newer.
	if f, ok := opened.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			out.made = st.ModTime()
		}
	}
	sum := sha256.New()
	if err := read(io.TeeReader(in, sum)); err != nil {
		return out, fmt.Errorf("%s: %w", out.name, err)
	}
	out.sum = hex.EncodeToString(sum.Sum(nil))
	return out, nil
}

func readContainers(in io.Reader) (leak.Containers, error) {
	ids := leak.Containers{}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		id := strings.TrimSpace(lines.Text())
		if id == "" {
			continue
		}
		if strings.ContainsAny(id, " \t/{}\"") {
			return nil, fmt.Errorf("line %d: %.60q is no container ID; want one a line, as 'crictl pods -q --no-trunc' writes them", n, id)
		}
		if len(id) == 13 && isHex(id) {
			return nil, fmt.Errorf("line %d: %q is a shortened ID; want the whole ones ('crictl pods -q --no-trunc')", n, id)
		}
		ids[id] = true
	}
	return ids, lines.Err()
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

// open opens a file, or standard input for "-".
func (a *app) open(file string) (io.ReadCloser, error) {
	if file == "-" {
		return io.NopCloser(a.in), nil
	}
	return os.Open(file)
}

// collection is one run of 'ledger gc'.
type collection struct {
	runtime runtimeList
	pods    []string
	grace   time.Duration
	most    int
	all     bool
	wait    bool
	dry     bool
	shown   bool // dry because somebody looks on
	yes     bool
	reason  string
}

// What 'gc -o json' writes.
type collected struct {
	Source   string        `json:"source"` // what was asked
	Listed   int           `json:"listed"` // how many it has
	Known    int           `json:"known"`  // leases that are on the list
	Untold   int           `json:"untold"` // leases it says nothing about
	Dry      bool          `json:"dryRun"`
	Grace    string        `json:"grace"`
	Suspects []suspectLine `json:"suspects"`
	Blocks   []blockLine   `json:"blocks"` // of removed nodes
	Freed    int           `json:"freed"`
	Waiting  int           `json:"waiting"` // not on the list, and not for long enough
	Left     int           `json:"left"`    // leaked, and beyond --max
}

type suspectLine struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Leases     []keyspace.Lease      `json:"leases"`
	Pod        string                `json:"pod,omitempty"`
	PodUID     string                `json:"podUID,omitempty"`
	Since      time.Time             `json:"since"`
	State      string                `json:"state"` // waiting, leaked, freed, forgotten, changed, failed
	Error      string                `json:"error,omitempty"`

	ago time.Duration // since then
}

type blockLine struct {
	Block string `json:"block"`
	Node  string `json:"node"`
	State string `json:"state"` // unused, given back, failed
	Error string `json:"error,omitempty"`
}

func (a *app) gc() *cobra.Command {
	var g collection
	c := &cobra.Command{
		Use:   "gc --cri ENDPOINT | --containers FILE | --pods FILE",
		Short: "Free what no pod uses any more",
		Long: `Free the leases that nobody uses any more, because a DEL never came: the runtime
lost its state, or a node did not come back.

--cri asks this node's container runtime, --containers reads the runtime's list;
the command then acts as this node and frees what is leased on this node alone.
--pods reads the pods of the whole cluster, as kubectl writes them, and acts as an
operator; pods are told apart by their UID, static pods by that of their mirror's
annotations. Where several clusters share the ledger, give --pods once for each.

A lease is freed if it is not on the list in an observation, nor on a list that was
taken at least --grace later, and if it is still the same lease in the transaction
that ends it. So a first run frees nothing: it writes down what it saw, and a later
one (a timer's) goes on from there. --wait makes both observations in one run. Time
is that since the boot, and observations of an earlier boot do not count.

A list that cannot be read, is cut off or has no pod frees nothing, and neither does
one that was looked at before. A file is as old as its time of writing says, so make
it anew for each run; what comes from a pipe has no time, and is refused where it is
byte for byte that of the run before.

--cri and --containers leave leases alone that name no pod: they may be those of
another runtime, as nerdctl's or podman's. --all judges them, too.

--pods also gives back the blocks of nodes that were removed (or replaced, and have
not come back) in which nothing is leased.

On a terminal it only shows what it would do, unless --yes is given.`,
		Example: `  ledger gc --cri unix:///run/containerd/containerd.sock
  kubectl get pods --all-namespaces -o json >pods.json && ledger gc --pods pods.json`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,wide,json,yaml,name"),
	}
	g.runtime.flags(c)
	c.Flags().StringArrayVar(&g.pods, "pods", nil, "read all pods of the cluster from `FILE` (- is standard input)")
	c.Flags().DurationVar(&g.grace, "grace", 5*time.Minute, "for how long a lease must have been off the list: a `duration`")
	c.Flags().IntVar(&g.most, "max", 100, "free at most `N` leases in this run, and give at most as many blocks back")
	c.Flags().BoolVar(&g.all, "all", false, "judge leases that name no pod, too: only where no other runtime uses the ledger on this node, or where its sandboxes are on the list")
	c.Flags().BoolVar(&g.wait, "wait", false, "observe, wait for the grace period, observe again, and free (with --cri)")
	c.Flags().BoolVar(&g.dry, "dry-run", false, "show what would be done; free nothing and write nothing down")
	c.Flags().BoolVarP(&g.yes, "yes", "y", false, "do it, also on a terminal")
	c.Flags().StringVar(&g.reason, "reason", "", "why, for the record: `text` (what was observed is added)")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		switch {
		case g.runtime.given() == (len(g.pods) > 0):
			return usage("say who knows what exists: --cri or --containers for this node, or --pods for the whole cluster")
		case g.all && !g.runtime.given():
			return usage("--all needs --cri or --containers: a list of pods says nothing about what is no pod's")
		case g.grace < 0:
			return usage("--grace %v: want a time from 0", g.grace)
		case g.most < 1:
			return usage("--max %d: want 1 or more", g.most)
		case g.wait && g.runtime.cri == "":
			return usage("--wait needs --cri: another list would have to be made anew; run the command again instead")
		case g.dry && g.yes:
			return usage("--dry-run and --yes exclude each other")
		case len(g.reason) > maxGCReason:
			return usage("--reason has %d bytes: at most %d", len(g.reason), maxGCReason)
		}
		if (a.terminalIn || a.terminalOut) && !g.yes {
			g.dry, g.shown = true, !g.dry
		}
		return a.collect(cmd.Context(), &g)
	}
	return c
}

// maxGCReason leaves room for what is added.
const maxGCReason = 512

func (a *app) collect(ctx context.Context, g *collection) error {
	var w *allocator.Writer
	var done func()
	var err error
	source := "runtime"
	if g.runtime.given() {
		w, done, err = a.node(false)
	} else {
		source = "pods"
		w, done, err = a.operator()
	}
	if err != nil {
		return err
	}
	defer done()
	if err := w.Identity(); err != nil {
		return err
	}
	out, err := a.observe(ctx, g, w, source)
	if err == nil && g.wait && !g.dry && out.Waiting > 0 && out.Left == 0 {
		a.say("%s not on the list; looking again in %v", was(out.Waiting, "lease"), g.grace)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(g.grace):
		}
		freed := out.Freed
		if out, err = a.observe(ctx, g, w, source); out != nil {
			out.Freed += freed
		}
	}
	if out == nil {
		return err
	}
	return errors.Join(err, a.showCollected(out, g))
}

// survey is one look at the leases and at a list of what exists.
type survey struct {
	source string // how the record calls the list
	listed int
	list   leak.List
	at     leak.Moment
	leases []leak.Lease
	found  leak.Findings
}

// survey looks once, and unless it is a dry run notes what it saw for the next time:
// before anything is freed, so that a process that dies then has looked all the same.
func (a *app) survey(ctx context.Context, g *collection, w *allocator.Writer, source string) (*survey, error) {
	out := new(survey)
	// A list that bears no time is taken for as old as this: who makes one for a
	// pipe may have begun when we did.
	began, err := a.boot()
	if err != nil {
		return nil, err
	}
	// The leases first: what comes into being after this is on the list, or at
	// least not among them.
	if out.leases, err = a.leases(ctx, w, source == "runtime"); err != nil {
		return nil, err
	}
	look := leak.Look{Source: source}
	if look.At, err = a.boot(); err != nil {
		return nil, err
	}
	out.at = look.At
	var from []given
	if source == "runtime" {
		ids, name, it, err := g.runtime.read(ctx, a)
		if err != nil {
			return nil, err
		}
		out.list, from, out.listed, out.source = ids, []given{it}, len(ids), name
		if g.all {
			out.list = leak.All(ids)
		}
	} else {
		var pods *leak.Pods
		if pods, from, err = a.readPods(g.pods); err != nil {
			return nil, err
		}
		out.list, out.listed, out.source = pods, pods.Len(), "the list of pods"
	}
	for _, x := range from {
		taken := leak.Taken{Moment: began, Name: x.name, Sum: x.sum}
		if !x.made.IsZero() {
			if taken, err = leak.FromFile(x.name, x.sum, x.made, look.At); err != nil {
				return nil, &failure{err: err, hint: "set the clock right, or make the list anew", code: exitUnknown}
			}
		}
		look.Lists = append(look.Lists, taken)
	}
	var memory leak.Memory
	if out.found, memory, err = w.Dir.Suspects().Judge(look, out.leases, out.list, g.grace); err != nil {
		return nil, &failure{err: err, hint: "make the list anew, and into a file: its time counts, and what comes from a pipe has none", code: exitUnknown}
	}
	if !g.dry {
		err = w.Dir.SaveSuspects(memory)
	}
	return out, err
}

// observe looks once and frees what is proven leaked.
func (a *app) observe(ctx context.Context, g *collection, w *allocator.Writer, source string) (*collected, error) {
	seen, err := a.survey(ctx, g, w, source)
	if err != nil {
		return nil, err
	}
	found, leases := seen.found, seen.leases
	out := &collected{
		Source: seen.source, Listed: seen.listed, Known: found.Known, Untold: found.Untold,
		Dry: g.dry, Grace: g.grace.String(), Suspects: []suspectLine{}, Blocks: []blockLine{},
	}
	tried, failed, code := 0, 0, exitUnknown
	ended := map[keyspace.AttachmentID]bool{}
	for _, s := range found.Suspects {
		line := suspectLine{
			Attachment: s.ID, Leases: s.Value.Leases, Pod: s.Value.Pod, PodUID: s.Value.PodUID,
			Since: s.First.Wall.UTC(), State: "waiting", ago: seen.at.Since - s.First.Since,
		}
		switch {
		case !s.Leaked:
			out.Waiting++
		case g.dry:
			line.State = "leaked"
			ended[s.ID] = true
		case tried >= g.most || ctx.Err() != nil:
			line.State = "leaked"
			out.Left++
		default:
			tried++
			freed, err := w.Reap(ctx, s.ID, s.Value.Acquire, g.say(out.Source, s.Off))
			switch {
			case err != nil:
				line.State, line.Error = "failed", err.Error()
				failed++
				if c, _, _ := judge(err); c == exitWrong {
					code = exitWrong // refused, and not only out of reach
				}
			case freed:
				line.State = "freed"
				out.Freed++
				ended[s.ID] = true
			case s.Remembered:
				line.State = "forgotten"
			default:
				line.State = "changed" // gone, or another lease by now
			}
		}
		out.Suspects = append(out.Suspects, line)
	}
	err = ctx.Err()
	if failed > 0 {
		err = &failure{err: fmt.Errorf("%s could not be freed", count(failed, "lease")), hint: "nothing is lost: the next run tries again", code: code}
	}
	if source == "pods" && ctx.Err() == nil {
		still := slices.DeleteFunc(leases, func(l leak.Lease) bool { return ended[l.ID] })
		err = first(err, a.giveBack(ctx, g, w, still, out))
	}
	return out, err
}

// giveBack gives back the blocks of nodes whose chain an operator closed and that
// have not come back, where none of the leases is in them.
func (a *app) giveBack(ctx context.Context, g *collection, w *allocator.Writer, leases []leak.Lease, out *collected) error {
	type inSpace struct {
		space string
		ip    netip.Addr
	}
	leased := []inSpace{}
	for _, l := range leases {
		for _, x := range l.Value.Leases {
			leased = append(leased, inSpace{l.Value.Space, x.Address.Addr()})
		}
	}
	var unused []allocator.Claim
	err := a.lookUp(ctx, func(r *reader) error {
		// Heads and blocks of one revision: a node that came back before it has a
		// head that is not closed.
		closed := map[string]bool{}
		revision, err := r.eachAt(ctx, 0, r.keys.Writers()+string(entry.KindNode)+"/", func(k keyspace.Key, value []byte) error {
			var head keyspace.Writer
			closed[k.Writer.Name] = keyspace.Decode(value, &head) == nil && !head.Closed.IsZero()
			return nil
		})
		if err != nil {
			return err
		}
		_, err = r.eachAt(ctx, revision, r.keys.AllBlocks(), func(k keyspace.Key, value []byte) error {
			var claim keyspace.Block
			if keyspace.Decode(value, &claim) != nil || !closed[claim.Node] {
				return nil
			}
			if slices.ContainsFunc(leased, func(x inSpace) bool { return x.space == k.Block.Space && k.Block.Prefix.Contains(x.ip) }) {
				return nil
			}
			unused = append(unused, allocator.Claim{Block: k.Block, Claim: claim.Claim, Node: claim.Node})
			return nil
		})
		return err
	})
	if err != nil {
		return err
	}
	failed, code := 0, exitUnknown
	for _, b := range unused[:min(len(unused), g.most)] {
		line := blockLine{Block: b.Block.String(), Node: b.Node, State: "unused"}
		if !g.dry {
			// Unclaim compares that it is still this claim, and that no address of
			// the block changed since it saw none leased; not the head. So a node
			// that came back since may lose a claim of before in which it has no
			// lease, which costs it nothing but a new claim: its own commits
			// compare the key as well.
			reason := "gc: " + b.Node + " was removed or replaced"
			if g.reason != "" {
				reason = g.reason + "; " + reason
			}
			err := w.Unclaim(ctx, b, reason)
			line.State = "given back"
			switch {
			case errors.Is(err, allocator.ErrConflict), errors.Is(err, allocator.ErrNotFound):
				continue // leased meanwhile, or given back by somebody else
			case err != nil:
				line.State, line.Error = "failed", err.Error()
				failed++
				if c, _, _ := judge(err); c == exitWrong {
					code = exitWrong
				}
			}
		}
		out.Blocks = append(out.Blocks, line)
	}
	if failed > 0 {
		return &failure{err: fmt.Errorf("%s could not be given back", count(failed, "block")), hint: "nothing is lost: the next run tries again", code: code}
	}
	return nil
}

// readPods reads the lists of one cluster or of several.
func (a *app) readPods(files []string) (*leak.Pods, []given, error) {
	pods := new(leak.Pods)
	var from []given
	for _, file := range files {
		it, err := a.given("--pods", file, pods.Add)
		if err != nil {
			return nil, nil, err
		}
		from = append(from, it)
	}
	return pods, from, nil
}

// say is the reason on the record.
func (g *collection) say(source string, off time.Duration) string {
	s := fmt.Sprintf("gc: not known to %s for %v", source, off.Round(time.Second))
	if g.reason != "" {
		s = g.reason + "; " + s
	}
	return s
}

// leases lists what etcd has leased, on this writer's node or everywhere, and
// what the node remembers though etcd does not have it.
func (a *app) leases(ctx context.Context, w *allocator.Writer, own bool) ([]leak.Lease, error) {
	prefix := w.Keys.Attachments()
	if own {
		prefix = w.Keys.NodeAttachments(w.Config.Writer.Name)
	}
	r, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer r.store.Close()
	if err := r.haveLedger(); err != nil {
		return nil, err
	}
	out, err := a.attachments(ctx, r, prefix)
	if err != nil || !own {
		return out, err
	}
	held, err := w.Dir.Holdings()
	if err != nil {
		a.warn("%v", err) // what can be read is listed all the same
	}
	have := map[keyspace.AttachmentID]bool{}
	for _, l := range out {
		have[l.ID] = true
	}
	for _, h := range held {
		if !have[h.ID] {
			out = append(out, leak.Lease{ID: h.ID, Value: h.Value, Remembered: true})
		}
	}
	return out, nil
}

// pageSize is how many keys are read at a time.
const pageSize = 1000

// attachments reads the attachments below a prefix. What cannot be read is
// warned about and left out.
func (a *app) attachments(ctx context.Context, r *reader, prefix string) ([]leak.Lease, error) {
	var out []leak.Lease
	bad := 0
	err := r.each(ctx, prefix, func(k keyspace.Key, value []byte) error {
		l := leak.Lease{ID: k.Attachment}
		if keyspace.Decode(value, &l.Value) != nil {
			bad++
			return nil
		}
		out = append(out, l)
		return nil
	})
	if bad > 0 {
		a.warn("%s cannot be read and left alone; 'ledger verify' says more", count(bad, "attachment"))
	}
	return out, err
}

func (a *app) showCollected(v *collected, g *collection) error {
	if done, err := a.structured(v); done {
		return err
	}
	if a.output == "name" {
		for _, s := range v.Suspects {
			if s.State == "freed" || s.State == "leaked" {
				a.printf("%s\n", s.Attachment)
			}
		}
		return nil
	}
	if len(v.Suspects) > 0 {
		headers := []string{"ADDRESS", "POD", "ATTACHMENT", "OFF THE LIST", "STATE"}
		t := a.table(headers...)
		for _, s := range v.Suspects {
			id := s.Attachment
			if !a.wide() && len(id.Container) > 12 {
				id.Container = id.Container[:12] + "…"
			}
			off, state := span(s.ago), s.State
			switch s.State {
			case "waiting":
				if state = "waiting: " + span(g.grace-s.ago) + " to go"; s.ago >= g.grace {
					state = "waiting: for a list of later than this one"
				}
				if s.ago < time.Second {
					off = "just now"
				}
			case "leaked":
				if state = "leaked: to be freed"; !g.dry {
					state = "leaked: left for the next run"
				}
			case "failed":
				state = "failed: " + s.Error
			case "forgotten":
				state = "forgotten: etcd did not have it"
			case "changed":
				state = "changed meanwhile: left alone"
			}
			t.row(addressText(s.Leases), podText(s.Pod, s.PodUID), id.String(), off, state)
		}
		t.flush()
		a.printf("\n")
	}
	for _, b := range v.Blocks {
		text := map[string]string{"unused": "to be given back", "given back": "given back", "failed": "failed: " + b.Error}[b.State]
		a.printf("block %s of %s, which was removed or replaced: %s\n", printable(b.Block), printable(b.Node), printable(text))
	}
	a.printf("%s known to %s (%d listed)", was(v.Known, "lease"), printable(v.Source), v.Listed)
	if v.Untold > 0 {
		a.printf(", %d it says nothing about", v.Untold)
	}
	a.printf(": %d freed, %d waiting", v.Freed, v.Waiting)
	if v.Left > 0 {
		a.printf(", %d left for the next run (--max %d)", v.Left, g.most)
	}
	a.printf("\n")
	switch {
	case g.shown:
		a.printf("a dry run: nothing was freed or written down; --yes does it\n")
	case v.Dry:
		a.printf("a dry run: nothing was freed or written down\n")
	}
	return nil
}
