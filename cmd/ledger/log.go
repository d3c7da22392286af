package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"
	"sigs.k8s.io/yaml"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// filter is which entries 'log' shows.
type filter struct {
	address       string
	prefix        netip.Prefix
	space, pod    string
	node, network string
	op            string
	since, until  string
	from, to      time.Time
	last          int
	follow        bool
	source        string
}

func (a *app) log() *cobra.Command {
	var f filter
	c := &cobra.Command{
		Use:   "log",
		Short: "The entries, in commit order",
		Long: `The entries of all chains, in the order in which etcd committed them.

TIME is the writer's own clock. The order does not rest on it: where it goes
back, clocks disagree. "10.22.0.3 +10.22.0.0/26" is an acquire that claimed the
block, too.

All conditions given must hold. --node NAME takes what concerns that node, and
what it wrote. The times in --since and --until are RFC 3339, or
"2006-01-02 15:04[:05]" or "2006-01-02" in local time, or a duration ago such as
-2h.

--follow shows the last 10 entries (-n: others), then waits for more until it is
interrupted, and connects again by itself.`,
		Example: `  ledger log --address 10.22.7.14
  ledger log --pod shop/cart-7d9f --since -24h
  ledger log --follow --node worker-1`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,wide,json,yaml,name"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(a, cmd); err != nil {
				return err
			}
			return a.runLog(cmd.Context(), &f)
		},
	}
	p := c.Flags()
	p.StringVar(&f.address, "address", "", "of this `address`, or of all of a prefix")
	p.StringVar(&f.space, "space", "", "of this address `space`")
	p.StringVar(&f.pod, "pod", "", "of this `pod`: NAMESPACE/NAME, or NAMESPACE/ for all of one")
	// --node is the global flag: here it is a condition.
	p.StringVar(&f.network, "network", "", "of this `network`")
	p.StringVar(&f.op, "op", "", "of this `op`: acquire, release, claim, …; several with commas")
	p.StringVar(&f.since, "since", "", "not before this `time`, by the writers' clocks")
	p.StringVar(&f.until, "until", "", "before this `time`, by the writers' clocks")
	p.IntVarP(&f.last, "lines", "n", -1, "the last `N` only")
	p.BoolVarP(&f.follow, "follow", "f", false, "wait for more")
	p.StringVar(&f.source, "from", "", "read an export `file` instead of etcd")
	return c
}

func (f *filter) check(a *app, cmd *cobra.Command) error {
	if f.address != "" {
		var err error
		if ip, ierr := netip.ParseAddr(f.address); ierr == nil && ip.Zone() == "" {
			ip = ip.Unmap()
			f.prefix = netip.PrefixFrom(ip, ip.BitLen())
		} else if f.prefix, err = netip.ParsePrefix(f.address); err != nil {
			return usage("--address %q is no address and no prefix", f.address)
		}
		f.prefix = f.prefix.Masked()
	}
	if f.pod != "" && !strings.Contains(f.pod, "/") {
		return usage("--pod %q: want NAMESPACE/NAME, or NAMESPACE/ for all of one", f.pod)
	}
	if f.follow && f.source != "" {
		return usage("--follow and --from: nothing is added to an export")
	}
	if f.follow && f.until != "" {
		return usage("--follow and --until: what is to come has not been yet")
	}
	ops := []string{"open", "rotate", "close", "acquire", "release", "claim", "unclaim", "pool", "meta", "recover"}
	for op := range strings.SplitSeq(f.op, ",") {
		if op = strings.TrimSpace(op); op != "" && !slices.Contains(ops, op) {
			return usage("--op %q: want one of %s", op, strings.Join(ops, ", "))
		}
	}
	if f.last < -1 {
		return usage("-n %d: want 0 or more", f.last)
	}
	if f.follow && f.last < 0 && f.since == "" {
		f.last = 10
	}
	f.node = a.flags.Node
	var err error
	if f.from, err = a.when("--since", f.since); err != nil {
		return err
	}
	f.to, err = a.when("--until", f.until)
	return err
}

func (f *filter) matches(e *entry.Entry) bool {
	switch {
	case f.space != "" && e.Space != f.space,
		f.network != "" && e.Network != f.network,
		f.node != "" && e.Node != f.node && !(e.Writer.Kind == entry.KindNode && e.Writer.Name == f.node) && e.Signature.Name != "node/"+f.node,
		f.op != "" && !f.hasOp(e),
		!f.from.IsZero() && e.Time.Before(f.from),
		!f.to.IsZero() && !e.Time.Before(f.to):
		return false
	}
	if f.pod != "" && e.Pod != f.pod && !(strings.HasSuffix(f.pod, "/") && strings.HasPrefix(e.Pod, f.pod)) {
		return false
	}
	if !f.prefix.IsValid() {
		return true
	}
	for _, at := range e.Addresses {
		if f.prefix.Contains(at.IP) {
			return true
		}
	}
	for _, b := range e.Blocks {
		if b.Overlaps(f.prefix) && (e.Op == entry.Claim || e.Op == entry.Unclaim) {
			return true
		}
	}
	return false
}

// hasOp reports whether an entry does one of --op. An acquire may claim blocks, too.
func (f *filter) hasOp(e *entry.Entry) bool {
	for op := range strings.SplitSeq(f.op, ",") {
		if op = strings.TrimSpace(op); op == string(e.Op) || op == string(entry.Claim) && e.Op == entry.Acquire && len(e.Blocks) > 0 {
			return true
		}
	}
	return false
}

// when reads a time that somebody typed; zero for none.
func (a *app) when(flag, s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if s == "now" {
		return a.now(), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	for _, layout := range []string{"2006-01-02 15:04:05.999999999", "2006-01-02 15:04", "2006-01-02T15:04:05", "2006-01-02T15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	if d, err := time.ParseDuration(strings.TrimPrefix(s, "-")); err == nil && d >= 0 {
		return a.now().Add(-d), nil
	}
	return time.Time{}, usage(`%s %q: want RFC 3339, "2006-01-02 15:04[:05]" in local time, or a duration ago such as -2h`, flag, s)
}

// printer shows entries one by one, as they come.
type printer struct {
	a *app
	t *table
}

func (p *printer) show(l *logged) error {
	a := p.a
	switch a.output {
	case "name":
		a.printf("%s\n", l.Entry)
	case "json":
		b, err := marshal(l, "")
		if err != nil {
			return err
		}
		_, err = a.out.Write(b)
		return err
	case "yaml":
		b, err := yaml.Marshal(l)
		if err != nil {
			return err
		}
		a.printf("---\n%s", b)
	default:
		if p.t == nil {
			if a.wide() {
				p.t = a.table("TIME", "OP", "WHAT", "POD", "NODE", "BY", "COMMIT", "ENTRY", "SPACE", "POOL", "NETWORK", "CONTAINER", "INTERFACE", "REASON")
			} else {
				p.t = a.table("TIME", "OP", "WHAT", "POD", "NODE", "BY", "ENTRY", "REASON")
			}
		}
		if a.wide() {
			p.t.row(stamp(l.Time), string(l.Op), l.what(), podText(l.Pod, l.PodUID), l.Node, l.Writer, fmt.Sprint(l.Commit), l.Entry.String(),
				l.Space, l.Pool, l.Network, l.Container, l.Interface, l.remark())
		} else {
			p.t.row(stamp(l.Time), string(l.Op), l.what(), podText(l.Pod, l.PodUID), l.Node, l.Writer, l.Entry.Short(), l.remark())
		}
	}
	return nil
}

// remark is the last column: what is wrong comes before why it was done.
func (l *logged) remark() string {
	if l.Bad == "" {
		return l.Reason
	}
	if l.Reason == "" {
		return "BAD: " + l.Bad
	}
	return "BAD: " + l.Bad + "; " + l.Reason
}

func (p *printer) flush() error {
	if p.t != nil {
		p.t.flush()
	}
	return p.a.out.Flush()
}

func (a *app) runLog(ctx context.Context, f *filter) error {
	p := &printer{a: a}
	var bad, shown int
	show := func(l *logged) error {
		if l.Bad != "" {
			bad++
		}
		return p.show(l)
	}
	var scanned *scan
	var at int64
	err := a.read(ctx, f.source, func(src audit.Source, live *reader) error {
		if live != nil {
			if err := live.haveLedger(); err != nil {
				return err
			}
		}
		s, err := newScan(src)
		if err != nil {
			return err
		}
		scanned, at = s, src.Snapshot().Revision
		var ring []*logged
		matched := 0
		err = s.each(ctx, src, f.matches, func(r audit.Record, e *entry.Entry, l *logged) error {
			if l == nil || !f.matches(e) || f.last == 0 {
				return nil
			}
			if f.last > 0 {
				if ring = append(ring, l); len(ring) > 2*f.last {
					ring = append(ring[:0], ring[len(ring)-f.last:]...)
				}
				return nil
			}
			if matched++; matched <= shown {
				return nil // before a compaction made us read anew
			}
			shown++
			return show(l)
		})
		if err != nil {
			return err
		}
		for _, l := range ring[max(0, len(ring)-max(0, f.last)):] {
			if err := show(l); err != nil {
				return err
			}
		}
		return nil
	})
	if ferr := p.flush(); err == nil {
		err = ferr
	}
	if err != nil {
		return err
	}
	if f.follow {
		return a.follow(ctx, f, p, scanned, at)
	}
	if err := scanned.finish(a); err != nil {
		return err
	}
	return a.spoilt(bad)
}

// spoilt ends an answer in which signatures or places do not hold.
func (a *app) spoilt(bad int) error {
	if bad == 0 {
		return nil
	}
	verb := "do not hold"
	if bad == 1 {
		verb = "does not hold"
	}
	a.warn("%s shown %s (BAD above); 'ledger verify' says more", count(bad, "entry"), verb)
	return wrong
}

// A watch's connection is looked at each glance; every probe-th time etcd is
// asked, as a peer that is gone without a word shows in no other way.
const (
	glance = time.Second
	probe  = 10
)

// follow shows what is committed after revision at, until ctx ends.
func (a *app) follow(ctx context.Context, f *filter, p *printer, s *scan, at int64) error {
	for wait := 100 * time.Millisecond; ; {
		began := at
		err := a.watch(ctx, f, p, s, &at)
		if ctx.Err() != nil {
			return nil // the normal end
		}
		if at > began {
			wait = 100 * time.Millisecond
		}
		if errors.Is(err, errWatchLost) {
			a.warn("%v; connecting again", err)
		} else if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// errWatchLost marks that a watch ended and another can go on where it was.
var errWatchLost = errors.New("the connection was lost")

// watch follows on one connection. at is moved to the last revision that is
// known to have been shown.
func (a *app) watch(ctx context.Context, f *filter, p *printer, s *scan, at *int64) error {
	r, err := a.connect(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errWatchLost, err)
	}
	defer r.store.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Watch returns when etcd has confirmed it, and that may never be.
	made := make(chan clientv3.WatchChan, 1)
	from := *at + 1
	go func() {
		made <- r.client.Watch(clientv3.WithRequireLeader(ctx), s.keys.Chains(), clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
	}()
	var events clientv3.WatchChan
	unmade := time.NewTimer(a.loaded.Timeout)
	defer unmade.Stop()
	ticker := time.NewTicker(glance)
	defer ticker.Stop()
	for ticks, lost := 1, 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case events = <-made:
			unmade.Stop()
		case <-unmade.C:
			return fmt.Errorf("%w: etcd did not confirm the watch within %v", errWatchLost, a.loaded.Timeout)
		case <-ticker.C:
			// The client would try for ever to get its one connection back.
			if r.client.ActiveConnection().GetState() == connectivity.Ready {
				lost = 0
			} else if lost++; lost > 1 {
				return errWatchLost
			}
			if ticks++; ticks%probe == 0 {
				if _, err := r.client.Get(ctx, s.keys.Meta(), clientv3.WithCountOnly()); err != nil {
					return fmt.Errorf("%w: %w", errWatchLost, err)
				}
			}
		case w, ok := <-events:
			switch {
			case !ok:
				return errWatchLost
			case w.CompactRevision > 0:
				// Entries stay when etcd compacts, so that they can be read.
				return a.catchUp(ctx, f, p, s, r, at)
			case w.Err() != nil:
				return fmt.Errorf("%w: %w", errWatchLost, w.Err())
			}
			for _, e := range w.Events {
				key := strings.TrimPrefix(string(e.Kv.Key), s.keys.Prefix())
				switch {
				case e.Type == clientv3.EventTypeDelete:
					a.warn("revision %d: entry %s was deleted", e.Kv.ModRevision, key)
					continue
				case e.Kv.Version != 1:
					a.warn("revision %d: entry %s was rewritten", e.Kv.ModRevision, key)
				}
				rec := audit.Record{Key: string(e.Kv.Key), Value: e.Kv.Value, Create: e.Kv.CreateRevision, Mod: e.Kv.ModRevision, Version: e.Kv.Version, Lease: e.Kv.Lease}
				if err := a.followOne(f, p, s, rec); err != nil {
					return err
				}
			}
			// While a watch catches up, the header is ahead of its events.
			if n := len(w.Events); n > 0 {
				*at = max(*at, w.Events[n-1].Kv.ModRevision)
			} else if w.IsProgressNotify() {
				*at = max(*at, w.Header.Revision)
			}
			if err := p.flush(); err != nil {
				return err
			}
		}
	}
}

func (a *app) followOne(f *filter, p *printer, s *scan, r audit.Record) error {
	bad := s.bad
	e, l, err := s.take(r, f.matches)
	if err != nil {
		return err
	}
	if s.bad > bad {
		a.warn("revision %d: entry %s cannot be read", r.Mod, strings.TrimPrefix(r.Key, s.keys.Prefix()))
		return nil
	}
	if l == nil || !f.matches(e) {
		return nil
	}
	return p.show(l)
}

// catchUp reads what a watch missed because etcd had compacted it.
func (a *app) catchUp(ctx context.Context, f *filter, p *printer, s *scan, r *reader, at *int64) error {
	src, err := etcdstore.Open(ctx, r.client, r.keys)
	if err != nil {
		return fmt.Errorf("%w: %w", errWatchLost, err)
	}
	err = src.Entries(ctx, func(rec audit.Record) error {
		if rec.Mod <= *at {
			return nil
		}
		return a.followOne(f, p, s, rec)
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errWatchLost, err)
	}
	*at = src.Snapshot().Revision
	return p.flush()
}
