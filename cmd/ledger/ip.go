package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// tenure is one attachment's hold on an address, as the entries have it.
type tenure struct {
	Acquire *boundary `json:"acquire"`
	Release *boundary `json:"release"` // null: held still
}

// boundary is an entry that begins or ends a tenure, with its neighbours in
// commit order that other writers wrote: their clocks bound this one's.
type boundary struct {
	*logged
	Before *neighbour `json:"before"` // null: no other writer committed before
	After  *neighbour `json:"after"`  // null: nor after
}

type neighbour struct {
	Writer string    `json:"writer"`
	Time   time.Time `json:"time"`
	Commit int64     `json:"commit"`
	Entry  entry.Ref `json:"entry"`
}

// history is what the entries say of an address in one space.
type history struct {
	Address netip.Addr        `json:"address"`
	Space   string            `json:"space"`
	Live    *keyspace.Address `json:"live"` // what etcd's key says; null: it is absent
	Differs string            `json:"differs,omitempty"`
	Tenures []*tenure         `json:"tenures"` // oldest first, by commit
	Strays  []*boundary       `json:"strays,omitempty"`

	boundaries []*boundary
}

// chronicle gathers the histories of an address in one pass.
type chronicle struct {
	ip          netip.Addr
	space       string // "": all
	bySpace     map[string]*history
	last, other *neighbour // the latest entry, and the latest by another writer than that
	waiting     []*boundary
	rewritten   int // entries whose commits cannot be placed any more
}

func (a *app) chronicle(ctx context.Context, src audit.Source, ip netip.Addr, space string) (*chronicle, *scan, error) {
	s, err := newScan(src)
	if err != nil {
		return nil, nil, err
	}
	c := &chronicle{ip: ip, space: space, bySpace: map[string]*history{}}
	check := func(e *entry.Entry) bool { return c.concerns(e) }
	err = src.Entries(ctx, func(r audit.Record) error {
		e, l, err := s.take(r, check)
		if err != nil || e == nil {
			return err
		}
		c.see(r, e)
		if l != nil && c.concerns(e) {
			c.add(l)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	err = src.State(ctx, func(r audit.Record) error {
		if !strings.HasPrefix(r.Key, s.keys.Addresses()) {
			return nil
		}
		k, err := s.keys.Parse(strings.Clone(r.Key))
		if err != nil || k.IP != ip || space != "" && k.Space != space {
			return nil
		}
		h := c.in(k.Space)
		h.Live = new(keyspace.Address)
		if err := keyspace.Decode(r.Value, h.Live); err != nil {
			h.Differs = "the live key cannot be read"
		}
		return nil
	})
	for _, h := range c.bySpace {
		h.pair()
		h.compare()
	}
	return c, s, err
}

func (c *chronicle) concerns(e *entry.Entry) bool {
	if e.Op != entry.Acquire && e.Op != entry.Release || c.space != "" && e.Space != c.space {
		return false
	}
	return slices.ContainsFunc(e.Addresses, func(at entry.Address) bool { return at.IP == c.ip })
}

func (c *chronicle) in(space string) *history {
	h := c.bySpace[space]
	if h == nil {
		h = &history{Address: c.ip, Space: space, Tenures: []*tenure{}}
		c.bySpace[space] = h
	}
	return h
}

// see notes every entry as a possible neighbour.
func (c *chronicle) see(r audit.Record, e *entry.Entry) {
	if e.Time.IsZero() {
		return // of a newer version
	}
	if r.Version != 1 {
		c.rewritten++
		return
	}
	n := &neighbour{
		Writer: e.Signature.Name, Time: e.Time, Commit: r.Mod,
		Entry: entry.Ref{Chain: e.Chain, Seq: e.Seq, Hash: entry.HashOf(r.Value)},
	}
	c.waiting = slices.DeleteFunc(c.waiting, func(b *boundary) bool {
		if b.Writer == n.Writer || n.Commit <= b.Commit {
			return false
		}
		b.After = n
		return true
	})
	if c.last != nil && c.last.Writer != n.Writer {
		c.other = c.last
	}
	c.last = n
}

// add takes an entry that concerns the address, after see.
func (c *chronicle) add(l *logged) {
	b := &boundary{logged: l}
	// A rewritten entry holds up those that follow it in its chain, so that they
	// may come too late.
	for _, n := range []*neighbour{c.last, c.other} {
		if n != nil && n.Writer != l.Writer && n.Commit < l.Commit {
			b.Before = n
			break
		}
	}
	h := c.in(l.Space)
	h.boundaries = append(h.boundaries, b)
	if b.Rewritten == 0 {
		c.waiting = append(c.waiting, b)
	}
}

// pair makes tenures of acquires and releases. A rewritten entry came late; it
// is put back to where it was committed.
func (h *history) pair() {
	slices.SortStableFunc(h.boundaries, func(a, b *boundary) int { return cmp.Compare(a.Commit, b.Commit) })
	for _, b := range h.boundaries {
		if b.Op == entry.Acquire {
			h.Tenures = append(h.Tenures, &tenure{Acquire: b})
			continue
		}
		// The newest that is open and has the place that the release names.
		i := len(h.Tenures) - 1
		for ; i >= 0; i-- {
			if t := h.Tenures[i]; t.Release == nil && t.Acquire.Entry.Chain == b.Acquire.Chain && t.Acquire.Entry.Seq == b.Acquire.Seq {
				t.Release = b
				break
			}
		}
		if i < 0 {
			h.Strays = append(h.Strays, b)
		}
	}
}

// now is who holds the address by the entries.
func (h *history) now() *tenure {
	if n := len(h.Tenures); n > 0 && h.Tenures[n-1].Release == nil {
		return h.Tenures[n-1]
	}
	return nil
}

// compare says where the live key and the entries are not of one opinion.
func (h *history) compare() {
	t := h.now()
	switch {
	case h.Differs != "":
	case len(h.Strays) > 0:
		h.Differs = fmt.Sprintf("entry %s releases what no entry here acquired", h.Strays[0].Entry.Short())
	case h.Live == nil && len(h.Tenures) > 0:
		h.Differs = "the live key is absent"
	case h.Live == nil:
	case h.Live.State == keyspace.Leased && t == nil:
		h.Differs = fmt.Sprintf("the live key says that %v holds it, and no entry does", h.Live.Holder)
	case h.Live.State == keyspace.Leased && h.Live.Acquire != t.Acquire.Entry:
		h.Differs = fmt.Sprintf("the live key names another acquire: %s", h.Live.Acquire)
	case h.Live.State == keyspace.Free && t != nil:
		h.Differs = "the live key says that it is free"
	}
	for i := 0; i+1 < len(h.Tenures) && h.Differs == ""; i++ {
		if h.Tenures[i].Release == nil {
			h.Differs = fmt.Sprintf("entry %s acquired it while it was held", h.Tenures[i+1].Acquire.Entry.Short())
		}
	}
}

func (h *history) bad() (n int) {
	for _, t := range h.Tenures {
		for _, b := range []*boundary{t.Acquire, t.Release} {
			if b != nil && b.Bad != "" {
				n++
			}
		}
	}
	return n
}

func (a *app) ip() *cobra.Command {
	var space, at, from string
	c := &cobra.Command{
		Use:   "ip ADDRESS",
		Short: "Who holds an address, and who held it before",
		Long: `Who holds an address, and who held it before: pod, node and the entries that
say so. The signatures of those entries are checked.

--at TIME answers who held it then, with the entries that prove it. Their times
are their writers' clocks, which may be wrong; what is certain is the order of
commits. So the nearest entries before and after by other writers are shown,
whose clocks bound it, and where TIME lies within that uncertainty it is said.
TIME is RFC 3339, or "2006-01-02 15:04[:05]" in local time, or a duration ago such as -2h.`,
		Example: `  ledger ip 10.22.7.14
  ledger ip 10.22.7.14 --at "2026-11-17 14:03"
  ledger ip 10.22.7.14 --at -2h --from ledger.export`,
		Args:        args(1, 1, "an address"),
		Annotations: formats("table,wide,json,yaml,name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ip, err := parseAddress(args[0])
			if err != nil {
				return err
			}
			t, err := a.when("--at", at)
			if err != nil {
				return err
			}
			if space != "" {
				if err := entry.ValidateName("--space", space); err != nil {
					return usage("%w", err)
				}
			}
			return a.runIP(cmd.Context(), ip, space, t, from)
		},
	}
	c.Flags().StringVar(&space, "space", "", "in this address `space` (default: in all)")
	c.Flags().StringVar(&at, "at", "", "who held it at this `time`")
	c.Flags().StringVar(&from, "from", "", "read an export `file` instead of etcd")
	return c
}

func parseAddress(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		return ip, usage("%q is no IP address", s)
	}
	return ip.Unmap(), nil
}

func (a *app) runIP(ctx context.Context, ip netip.Addr, space string, at time.Time, from string) error {
	var c *chronicle
	var s *scan
	var snap audit.Snapshot
	err := a.read(ctx, from, func(src audit.Source, live *reader) (err error) {
		if live != nil {
			if err := live.haveLedger(); err != nil {
				return err
			}
		}
		snap = src.Snapshot()
		c, s, err = a.chronicle(ctx, src, ip, space)
		return err
	})
	if err != nil {
		return err
	}
	if !at.IsZero() && at.After(snap.Taken) {
		return usage("--at %s: the ledger was read as of %s, and what comes later is not known", stamp(at), stamp(snap.Taken))
	}
	var list []*history
	for _, name := range sortedKeys(c.bySpace) {
		list = append(list, c.bySpace[name])
	}
	if at.IsZero() {
		err = a.showHistories(ip, space, list)
	} else {
		err = a.showAt(ip, space, list, at)
	}
	if err != nil && !errors.Is(err, wrong) {
		return err
	}
	bad := 0
	for _, h := range list {
		bad += h.bad()
		if h.Differs != "" {
			a.warn("%v in space %s: %s; run 'ledger verify'", ip, h.Space, h.Differs)
			err = wrong
		}
	}
	if c.rewritten > 0 {
		a.warn("%s rewritten in etcd, so that the order of commits around them is lost; 'ledger verify' says more", was(c.rewritten, "entry"))
		err = wrong
	}
	return cmp.Or(a.spoilt(bad), s.finish(a), err)
}

func inSpace(space string) string {
	if space == "" {
		return "any space"
	}
	return "space " + space
}

func (a *app) showHistories(ip netip.Addr, space string, list []*history) error {
	if list == nil {
		list = []*history{}
	}
	if done, err := a.structured(list); done || err != nil {
		return err
	}
	if a.output == "name" {
		for _, h := range list {
			if t := h.now(); t != nil {
				a.printf("%s\n", t.attachment())
			}
		}
		return nil
	}
	if len(list) == 0 {
		a.printf("%v was never held in %s\n", ip, inSpace(space))
	}
	for i, h := range list {
		if i > 0 {
			a.printf("\n")
		}
		where := ""
		if h.Space != "default" || len(list) > 1 {
			where = " in space " + h.Space
		}
		switch t := h.now(); {
		case t != nil:
			l := t.Acquire
			a.printf("%v%s is held by %s on %s since %s%s\n", ip, where, l.holder(), l.Node, stamp(l.Time), a.doubt(t))
		case len(h.Tenures) == 0 && h.Live == nil:
			a.printf("%v%s was never held\n", ip, where)
		case h.Live != nil && h.Live.Cooling(a.now()):
			a.printf("%v%s is free, and not to be handed out before %s\n", ip, where, stamp(h.Live.Until()))
		default:
			a.printf("%v%s is free\n", ip, where)
		}
		if len(h.Tenures) == 0 {
			continue
		}
		a.printf("\n")
		headers := []string{"FROM", "TO", "POD", "NODE", "ENTRY", "RELEASE"}
		if a.wide() {
			headers = []string{"FROM", "TO", "POD", "NODE", "NETWORK", "CONTAINER", "INTERFACE", "POOL", "COMMIT", "ENTRY", "RELEASED BY", "RELEASE"}
		}
		headers = append(headers, "REMARK")
		t := a.table(headers...)
		for _, x := range slices.Backward(h.Tenures) {
			l := x.Acquire
			to, by, release, remark := "now", "", "", ""
			if x.Release != nil {
				to, by, release = stamp(x.Release.Time), x.Release.Writer, a.refText(x.Release.Entry)
				remark = x.Release.Reason
			}
			for _, b := range []*boundary{x.Release, x.Acquire} {
				if b != nil && b.Bad != "" {
					remark = "BAD: entry " + b.Entry.Short() + ": " + b.Bad
				}
			}
			if a.wide() {
				t.row(stamp(l.Time), to, podText(l.Pod, l.PodUID), l.Node, l.Network, l.Container, l.Interface, l.Pool, fmt.Sprint(l.Commit), l.Entry.String(), by, release, remark)
			} else {
				t.row(stamp(l.Time), to, podText(l.Pod, l.PodUID), l.Node, a.refText(l.Entry), release, remark)
			}
		}
		t.flush()
	}
	return nil
}

func (t *tenure) attachment() string {
	l := t.Acquire
	return printable(keyspace.AttachmentID{Node: l.Node, Network: l.Network, Container: l.Container, Interface: l.Interface}.String())
}

// doubt says in the first line what must not be overlooked.
func (a *app) doubt(t *tenure) string {
	if t.Acquire.Bad != "" || t.Release != nil && t.Release.Bad != "" {
		return " (" + a.paint(red, "NOT VERIFIED") + ": see below)"
	}
	return ""
}

// holder is the pod, or what else is known of who holds an address.
func (l *logged) holder() string {
	switch {
	case l.Pod != "":
		return printable(l.Pod)
	case l.PodUID != "":
		return "pod " + printable(l.PodUID)
	}
	return "container " + l.Container
}

// What 'ip --at -o json' writes.
type answer struct {
	Address netip.Addr `json:"address"`
	Space   string     `json:"space"`
	At      time.Time  `json:"at"`
	// Holders by the writers' clocks: usually one or none.
	Holders []*tenure `json:"holders"`
	// Previous and Next stand beside the time if nobody held it.
	Previous  *tenure  `json:"previous,omitempty"`
	Next      *tenure  `json:"next,omitempty"`
	Certain   bool     `json:"certain"` // At lies outside all bounds of clocks
	Uncertain []string `json:"uncertain,omitempty"`
	Bounds    []bound  `json:"bounds"`
}

// bound is between what times a boundary can have been, by all clocks near it.
type bound struct {
	What     string     `json:"what"` // acquired, released
	Entry    entry.Ref  `json:"entry"`
	Own      time.Time  `json:"own"`      // its writer's clock
	Earliest *time.Time `json:"earliest"` // null: no other clock says
	Latest   *time.Time `json:"latest"`
	Disagree bool       `json:"clocksDisagree,omitempty"` // its own clock is outside of what the others say

	rewritten int64
}

func boundOf(what string, b *boundary) bound {
	out := bound{What: what, Entry: b.Entry, Own: b.Time, rewritten: b.Rewritten}
	if b.Before != nil {
		out.Disagree = b.Before.Time.After(b.Time)
		out.Earliest = earlier(b.Before.Time, b.Time)
	}
	if b.After != nil {
		out.Disagree = out.Disagree || b.After.Time.Before(b.Time)
		if b.Before != nil && b.After.Time.Before(*out.Earliest) {
			out.Earliest = earlier(b.After.Time, *out.Earliest)
		}
		latest := later(b.After.Time, b.Time)
		if b.Before != nil {
			latest = later(b.Before.Time, *latest)
		}
		out.Latest = latest
	}
	return out
}

func earlier(a, b time.Time) *time.Time {
	if b.Before(a) {
		a = b
	}
	return &a
}

func later(a, b time.Time) *time.Time {
	if b.After(a) {
		a = b
	}
	return &a
}

// holds reports whether a time lies within the bound.
func (b *bound) holds(t time.Time) bool {
	return (b.Earliest == nil || !t.Before(*b.Earliest)) && (b.Latest == nil || !t.After(*b.Latest))
}

func (h *history) at(t time.Time) *answer {
	out := &answer{Address: h.Address, Space: h.Space, At: t, Holders: []*tenure{}, Bounds: []bound{}}
	for _, x := range h.Tenures {
		switch {
		case x.Acquire.Time.After(t):
			if out.Next == nil {
				out.Next = x
			}
		case x.Release == nil || x.Release.Time.After(t):
			out.Holders = append(out.Holders, x)
		default:
			out.Previous = x
		}
	}
	// Every boundary that may lie on the other side of the time counts, also one
	// of a tenure that is not the answer.
	seen := func(what string, b *boundary, always bool) {
		bd := boundOf(what, b)
		in := bd.holds(t)
		if in {
			out.Uncertain = append(out.Uncertain, fmt.Sprintf("the time lies within the uncertainty of entry %s, by which %s %s it: %s; on which side of it only the clock of %s says",
				b.Entry.Short(), b.holder(), what, bd.text(), b.Writer))
		}
		if in || always {
			out.Bounds = append(out.Bounds, bd)
		}
	}
	for _, x := range h.Tenures {
		isAnswer := slices.Contains(out.Holders, x)
		seen("acquired", x.Acquire, isAnswer || len(out.Holders) == 0 && x == out.Next)
		if x.Release != nil {
			seen("released", x.Release, isAnswer || len(out.Holders) == 0 && x == out.Previous)
		}
	}
	if len(out.Holders) > 0 {
		out.Previous, out.Next = nil, nil
	}
	if len(out.Holders) > 1 {
		out.Uncertain = append(out.Uncertain, "by the writers' clocks more than one held it at that time: their clocks disagree; by order of commits they held it one after the other")
	}
	out.Certain = len(out.Uncertain) == 0
	return out
}

func (a *app) showAt(ip netip.Addr, space string, list []*history, at time.Time) error {
	answers := []*answer{}
	for _, h := range list {
		answers = append(answers, h.at(at))
	}
	if done, err := a.structured(answers); done || err != nil {
		return err
	}
	if a.output == "name" {
		for _, w := range answers {
			for _, t := range w.Holders {
				a.printf("%s\n", t.attachment())
			}
		}
		return nil
	}
	if len(answers) == 0 {
		a.printf("at %s nobody held %v: it was never held in %s\n", stamp(at), ip, inSpace(space))
	}
	for i, w := range answers {
		if i > 0 {
			a.printf("\n")
		}
		where := ""
		if w.Space != "default" || len(answers) > 1 {
			where = " in space " + w.Space
		}
		if len(w.Holders) == 0 {
			a.printf("at %s nobody held %v%s\n", stamp(at), ip, where)
			if w.Previous != nil {
				a.printf("\nbefore that it was held by %s on %s%s\n", w.Previous.Acquire.holder(), w.Previous.Acquire.Node, a.doubt(w.Previous))
				a.proof("acquired", w.Previous.Acquire)
				a.proof("released", w.Previous.Release)
			}
			if w.Next != nil {
				a.printf("\nafter that it was held by %s on %s%s\n", w.Next.Acquire.holder(), w.Next.Acquire.Node, a.doubt(w.Next))
				a.proof("acquired", w.Next.Acquire)
			}
		}
		for _, t := range w.Holders {
			l := t.Acquire
			a.printf("at %s %v%s was held by %s on %s%s\n", stamp(at), ip, where, l.holder(), l.Node, a.doubt(t))
			a.printf("  attachment %s\n", t.attachment())
			if l.Pod != "" && l.PodUID != "" {
				a.printf("  pod UID    %s\n", printable(l.PodUID))
			}
			a.proof("acquired", t.Acquire)
			if t.Release != nil {
				a.proof("released", t.Release)
			} else {
				a.printf("\n  not released: it is held still\n")
			}
		}
		a.printf("\n")
		if w.Certain {
			a.printf("certain: by every clock near these entries the answer is the same\n")
		}
		for _, u := range w.Uncertain {
			a.printf("%s: %s\n", a.paint(yellow, "uncertain"), u)
		}
	}
	return nil
}

// proof shows an entry that proves an answer, and what bounds its time.
func (a *app) proof(what string, b *boundary) {
	a.printf("\n  %s   %s by the clock of %s\n", what, exact(b.Time), b.Writer)
	a.printf("    entry    %s\n", b.Entry)
	signature := "verified, key " + b.Signed
	if b.Bad != "" {
		signature = a.paint(red, "NOT VERIFIED") + ": " + b.Bad
	}
	a.printf("    commit   revision %d, signature %s\n", b.Commit, signature)
	if b.Reason != "" {
		a.printf("    reason   %s\n", printable(b.Reason))
	}
	if b.Before != nil {
		a.printf("    after    %s by the clock of %s (revision %d, entry %s)\n", exact(b.Before.Time), b.Before.Writer, b.Before.Commit, b.Before.Entry.Short())
	}
	if b.After != nil {
		a.printf("    before   %s by the clock of %s (revision %d, entry %s)\n", exact(b.After.Time), b.After.Writer, b.After.Commit, b.After.Entry.Short())
	}
	bd := boundOf(what, b)
	a.printf("    bound    %s\n", bd.text())
	if bd.Disagree {
		a.printf("    %s\n", a.paint(yellow, "clocks disagree: the writer's own is outside of what its neighbours say"))
	}
}

// text says what clocks near the boundary, its own among them, allow.
func (b *bound) text() string {
	switch {
	case b.rewritten > 0:
		return fmt.Sprintf("lost, as the entry was rewritten at revision %d", b.rewritten)
	case b.Earliest == nil && b.Latest == nil:
		return "no other clock bounds it: nobody else committed before or after"
	case b.Earliest == nil:
		return fmt.Sprintf("not later than %s; nobody else committed before", exact(*b.Latest))
	case b.Latest == nil:
		return fmt.Sprintf("not earlier than %s; nobody else has committed since", exact(*b.Earliest))
	}
	return fmt.Sprintf("from %s to %s (%s)", exact(*b.Earliest), exact(*b.Latest), span(b.Latest.Sub(*b.Earliest)))
}
