package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// counts are calls by verb and outcome.
type counts struct {
	sync.Mutex
	all                   map[string]map[string]int64
	called, failed, kills int64
}

func (c *campaign) count(verb, outcome string) {
	c.counts.Lock()
	defer c.counts.Unlock()
	if !strings.HasPrefix(verb, "ledger ") {
		c.counts.called++
		switch outcome {
		case "ok":
		case "killed":
			c.counts.kills++
		default:
			c.counts.failed++
		}
	}
	c.counts.addLocked(verb, outcome)
}

func (n *counts) add(verb, outcome string) {
	n.Lock()
	defer n.Unlock()
	n.addLocked(verb, outcome)
}

func (n *counts) addLocked(verb, outcome string) {
	if n.all == nil {
		n.all = map[string]map[string]int64{}
	}
	if n.all[verb] == nil {
		n.all[verb] = map[string]int64{}
	}
	n.all[verb][outcome]++
}

func (n *counts) calls() int64 {
	called, _, _ := n.sums()
	return called
}

func (n *counts) sums() (called, failed, killed int64) {
	n.Lock()
	defer n.Unlock()
	return n.called, n.failed, n.kills
}

// serves are when ADDs were answered, to tell how long none was.
type serves struct {
	sync.Mutex
	at     []time.Duration
	pauses []episode // while nobody called
}

func (c *campaign) served(r *reply) {
	c.serves.Lock()
	defer c.serves.Unlock()
	c.serves.at = append(c.serves.at, r.ended)
}

func (s *serves) len() int {
	s.Lock()
	defer s.Unlock()
	return len(s.at)
}

func (s *serves) pause(from, to time.Duration) {
	s.Lock()
	defer s.Unlock()
	s.pauses = append(s.pauses, episode{from: from, to: to})
}

// gap is the longest time without an answered ADD that touches an episode,
// pauses left out.
func (s *serves) gap(e episode) (most time.Duration) {
	s.Lock()
	defer s.Unlock()
	marks := slices.Sorted(slices.Values(s.at))
	i, _ := slices.BinarySearch(marks, e.from)
	for i = max(1, i); i < len(marks) && marks[i-1] < e.to; i++ {
		from, to := marks[i-1], marks[i]
		paused := false
		for _, p := range s.pauses {
			if p.from < to && p.to > from {
				paused = true
			}
		}
		if !paused {
			most = max(most, to-from)
		}
	}
	return most
}

// remains is what a soak leaves behind.
type remains struct {
	sync.Mutex
	samples     int
	rss         int64 // bytes, the most of a plugin process
	descriptors int
	residents   map[string]*resident
}

// resident is a process that lives as long as the campaign.
type resident struct {
	starts, samples        int
	rssFirst, rssLast, rss int64 // the last: the most
	fdsFirst, fdsLast, fds int
	lived                  time.Duration // the longest life
}

// sample looks at a process: its peak of memory so far, and its descriptors.
// (What wait4 says of a child's memory is at least what its parent had.)
func (s *remains) sample(pid int) {
	rss, fds, ok := look(pid, "VmHWM:")
	if !ok {
		return
	}
	s.Lock()
	defer s.Unlock()
	s.samples++
	s.rss, s.descriptors = max(s.rss, rss), max(s.descriptors, fds)
}

func look(pid int, what string) (rss int64, fds int, ok bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/status")
	if err != nil || strings.HasPrefix(string(b), "Name:\tcampaign") {
		return 0, 0, false
	}
	for line := range strings.Lines(string(b)) {
		if v, found := strings.CutPrefix(line, what); found {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			rss, ok = kb<<10, err == nil
		}
	}
	names, err := os.ReadDir(dir + "/fd")
	return rss, len(names), ok && err == nil
}

// residents keeps 'ledger log --follow' and 'ledger publish' running and looks at
// them; one that ends by itself is started again, and that is counted.
func (c *campaign) residents(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for name, args := range map[string][]string{
		"ledger publish":      {"publish", "--print", "--source", "campaign"},
		"ledger log --follow": {"log", "--follow", "-o", "json"},
	} {
		res := &resident{}
		c.remains.Lock()
		if c.remains.residents == nil {
			c.remains.residents = map[string]*resident{}
		}
		c.remains.residents[name] = res
		c.remains.Unlock()
		wg.Go(func() {
			for ctx.Err() == nil {
				c.reside(ctx, name, res, args)
				sleep(ctx, time.Second)
			}
		})
	}
}

func (c *campaign) reside(ctx context.Context, name string, res *resident, args []string) {
	cmd := c.ledger(ctx, nil, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	var tail strings.Builder
	cmd.Stderr = &tail
	began := c.now()
	if err := c.desk.start(cmd); err != nil {
		c.finding("%s: %v", name, err)
		return
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			c.remains.Lock()
			res.starts++
			res.lived = max(res.lived, c.now()-began)
			c.remains.Unlock()
			if ctx.Err() == nil {
				if name == "ledger publish" { // it lives through whatever becomes of etcd
					c.finding("%s ended after %v: %v: %s", name, c.now()-began, err, tail.String()[max(0, tail.Len()-500):])
				}
				c.note("%s ended after %v: %v: %s", name, c.now()-began, err, tail.String()[max(0, tail.Len()-500):])
			}
			return
		case <-time.After(2 * time.Second):
			rss, fds, ok := look(cmd.Process.Pid, "VmRSS:")
			if !ok {
				continue
			}
			c.remains.Lock()
			if res.samples++; res.samples == 3 { // it has settled in
				res.rssFirst, res.fdsFirst = rss, fds
			}
			res.rssLast, res.fdsLast = rss, fds
			res.rss, res.fds = max(res.rss, rss), max(res.fds, fds)
			c.remains.Unlock()
		}
	}
}

// report is what a campaign has to say in the end.
type report struct {
	c           *campaign
	took        time.Duration
	interrupted error // by what
	findings    []string
	kept        string

	size, inUse, compacted int64 // bytes of etcd: the file, before and after compaction
	acquires               int   // on the record
	entries                int
	stateFiles             int
	stateBytes             int64
	statePods              int
}

func (c *campaign) report(interrupted error) *report {
	r := &report{c: c, took: c.now(), interrupted: interrupted}
	c.mu.Lock()
	r.findings = slices.Clone(c.findings)
	c.mu.Unlock()
	if len(r.findings) == 0 && interrupted == nil {
		if err := c.measure(r); err != nil {
			fmt.Fprintf(c.log, "what the campaign leaves behind could not be measured: %v\n", err)
		}
	}
	return r
}

// measure looks at etcd and the state directories when all is over.
func (c *campaign) measure(r *report) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	g, err := c.client.Get(ctx, c.keys.Chains(), clientv3.WithPrefix())
	if err != nil {
		return err
	}
	for _, kv := range g.Kvs {
		r.entries++
		if e, err := entry.Parse(kv.Value); err == nil && e.Op == entry.Acquire {
			r.acquires++
		}
	}
	st, err := c.cluster.Status(ctx, 0)
	if err != nil {
		return err
	}
	r.size, r.inUse = st.DbSize, st.DbSizeInUse
	if _, err := c.client.Compact(ctx, g.Header.Revision, clientv3.WithCompactPhysical()); err != nil && !strings.Contains(err.Error(), "compacted") {
		return err
	}
	if err := c.cluster.Defragment(ctx, 0); err != nil {
		return err
	}
	if st, err = c.cluster.Status(ctx, 0); err != nil {
		return err
	}
	r.compacted = st.DbSize
	for _, m := range c.machines {
		files, bytes := usage(m.state)
		r.stateFiles, r.stateBytes = max(r.stateFiles, files), max(r.stateBytes, bytes)
	}
	r.statePods, _ = c.book.holds()
	return nil
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// write prints the report.
func (r *report) write(w io.Writer) {
	c := r.c
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight|tabwriter.TabIndent)
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
	end := "it went to its end"
	switch {
	case len(r.findings) > 0:
		end = "A FINDING ENDED IT"
	case r.interrupted != nil:
		end = fmt.Sprintf("it was interrupted (%v)", r.interrupted)
	}
	fmt.Fprintf(w, "campaign of %s over %d nodes and %d etcd members, seed %d: %s\n\n", clock(r.took), c.nodes, c.cluster.Members(), c.seed, end)

	fmt.Fprintf(t, "fault\ttimes\tcalls meanwhile\tADDs answered\tcalls refused\tcalls killed\tlongest without an ADD\t\n")
	var all int
	for _, name := range slices.Sorted(maps.Keys(c.faults.all)) {
		var s episode
		var gap time.Duration
		for _, e := range c.faults.all[name] {
			s.calls, s.answeredN, s.failed, s.killed = s.calls+e.calls, s.answeredN+e.answeredN, s.failed+e.failed, s.killed+e.killed
			gap = max(gap, c.serves.gap(e))
		}
		all += len(c.faults.all[name])
		longest := ms(gap)
		if gap == 0 {
			longest = "-"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\t%s\t\n", name, len(c.faults.all[name]), s.calls, s.answeredN, s.failed, s.killed, longest)
	}
	t.Flush()
	called, failed, killed := c.counts.sums()
	fmt.Fprintf(w, "%d faults, which overlap; %d calls of the plugin, %d ADDs answered, %d refused, %d killed; at most %s without an ADD, checks left out\n\n",
		all, called, c.serves.len(), failed, killed, ms(c.serves.gap(episode{to: r.took})))

	for _, verb := range slices.Sorted(maps.Keys(c.counts.all)) {
		var out []string
		for _, outcome := range slices.Sorted(maps.Keys(c.counts.all[verb])) {
			out = append(out, fmt.Sprintf("%s %d", outcome, c.counts.all[verb][outcome]))
		}
		fmt.Fprintf(t, "%s\t %s\n", verb, strings.Join(out, ", "))
	}
	t.Flush()

	win := &c.window
	fmt.Fprintf(w, "\nhistory: %d windows checked by porcupine, %d operations on %d addresses, at most %d on one; %d acquires and %d releases on the record\n",
		win.checked, win.ops, win.addresses, win.most, win.acquires, win.releases)
	if n := c.full.answered.Load(); n > 0 {
		fmt.Fprintf(w, "NOSPACE: of %d writes besides that a full etcd answered so %d were done all the same\n", n, c.full.done.Load())
	}
	fmt.Fprintf(w, "ledger verify --all-signatures: %d times, at most %s\n", win.verified, ms(win.verifyTook))
	if r.acquires > 0 {
		fmt.Fprintf(w, "etcd: %s on disk, %s in use; %s after compaction and defragmentation, with %d allocations and %d entries on the record: %s per 100,000 allocations, extrapolated\n",
			mib(r.size), mib(r.inUse), mib(r.compacted), r.acquires, r.entries, mib(r.compacted*100_000/int64(r.acquires)))
	}
	fmt.Fprintf(w, "plugin: at most %s of memory and %d descriptors, looked at once in %d of its processes\n", mib(c.remains.rss), c.remains.descriptors, c.remains.samples)
	if r.stateFiles > 0 {
		fmt.Fprintf(w, "state directories: at most %d files and %d bytes, with %d pods on %d nodes\n", r.stateFiles, r.stateBytes, r.statePods, c.nodes)
	}
	for _, name := range slices.Sorted(maps.Keys(c.remains.residents)) {
		p := c.remains.residents[name]
		fmt.Fprintf(w, "%s: started %d times, lived at most %s; %s and %d descriptors at first, %s and %d at last, at most %s and %d\n",
			name, p.starts, clock(p.lived), mib(p.rssFirst), p.fdsFirst, mib(p.rssLast), p.fdsLast, mib(p.rss), p.fds)
	}
	if !c.desk.own {
		fmt.Fprintf(w, "not root: machines have no machine ID and boot ID of their own, so no clone was tried\n")
	}
	if c.fixedDisk != nil {
		fmt.Fprintf(w, "no disk was slowed down: %v\n", c.fixedDisk)
	}
	fmt.Fprintf(w, "\nfindings: %d\n", len(r.findings))
	for _, f := range r.findings {
		fmt.Fprintf(w, "  %s\n", strings.ReplaceAll(f, "\n", "\n    "))
	}
	if r.kept != "" {
		fmt.Fprintf(w, "everything is kept in %s; what happened when: %s\n", r.kept, filepath.Join(r.kept, "journal"))
	}
	fmt.Fprintf(w, "to repeat the draws, though not the timing: go run ./test/campaign -for %v -nodes %d -seed %d\n", c.duration, c.nodes, c.seed)
}
