package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// options say what a campaign is.
type options struct {
	duration time.Duration // of load, checks and drills in all
	round    time.Duration // between two quiescent points
	seed     uint64
	nodes    int
	pause    time.Duration // between two faults of one hand, on average
	only     []string      // kinds of faults; empty: all
	drills   bool
	dir      string // below which everything is kept while it runs; empty: the system's
	programs string // where the plugin and the command are; empty: they are built
	log      io.Writer
	onLoad   func(*campaign) // called when the load begins; may be nil
}

// Of the plugin. Shorter than the defaults, so that more happens in a given time.
const (
	callTimeout = 4 * time.Second
	lockTimeout = 8 * time.Second
)

// atOnce is how many calls of the plugin run at a time.
const atOnce = 8

// CNI codes of the plugin (docs/errors.md).
const (
	codeTryAgain     = 11
	codeUnreachable  = 50
	codeExhausted    = 100
	codeNotAvailable = 101
	codeMismatch     = 103
	codeIntegrity    = 104
)

// campaign is one run.
type campaign struct {
	options
	cluster   *etcdcluster.Cluster
	client    *clientv3.Client
	keys      keyspace.Keys
	machines  []*machine
	clone     *host // where copies of state directories are tried
	desk      *host // where operators work
	fixedDisk error // why no disk can be slowed down
	start     time.Time
	end       context.CancelCauseFunc // after a finding

	book    *book
	slots   chan struct{}                         // how many programs run at a time
	gate    sync.RWMutex                          // runtimes hold it for reading around each call
	calm    sync.RWMutex                          // faults hold it for reading
	admin   sync.Mutex                            // one operator at a time
	whole   sync.Mutex                            // nobody has damaged a key that a backup would have
	quota   []string                              // an argument of members, which they get when they start
	early   []*pod                                // that an operator ended before the next drill
	full    struct{ answered, done atomic.Int64 } // writes that were answered NOSPACE
	storm   atomic.Int64                          // kill storms that rage
	typical atomic.Int64                          // how long a call takes

	excuses excuses
	frozen  struct { // since when nobody may allocate; -1: everybody may
		sync.Mutex
		since time.Duration
	}
	counts  counts
	faults  faultStats
	serves  serves
	remains remains
	window  window
	journal io.Writer // what happened, for who looks for the reason of a finding

	mu       sync.Mutex
	findings []string
	ended    bool // findings since are of processes that were killed
}

var errFinding = errors.New("a finding")

func (c *campaign) now() time.Duration { return time.Since(c.start) }

// random is a source of its own for a purpose.
func (c *campaign) random(purpose ...any) *rand.Rand {
	h := fnv.New64a()
	fmt.Fprintln(h, purpose...)
	return rand.New(rand.NewPCG(c.seed, h.Sum64()))
}

// note is for the journal.
func (c *campaign) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	fmt.Fprintf(c.journal, "%10.3f  %s\n", c.now().Seconds(), fmt.Sprintf(format, args...))
}

// finding is what must not be. The first ends the campaign.
func (c *campaign) finding(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	if c.ended {
		return
	}
	c.findings = append(c.findings, text)
	fmt.Fprintf(c.journal, "%10.3f  FINDING %s\n", c.now().Seconds(), text)
	fmt.Fprintf(c.log, "FINDING at %v: %s\n", c.now().Round(time.Millisecond), text)
	c.end(errFinding)
}

func (c *campaign) killRate() float64 {
	if c.storm.Load() > 0 {
		return 0.5
	}
	return 0.06
}

// run is the whole campaign. What it had to start is gone when it returns; the
// directory stays where there was a finding.
func run(ctx context.Context, o options) (_ *report, err error) {
	c := &campaign{options: o, start: time.Now(), book: newBook(), slots: make(chan struct{}, atOnce)}
	c.frozen.since = -1
	c.typical.Store(int64(60 * time.Millisecond))
	if c.keys, err = keyspace.New(keyspace.DefaultPrefix); err != nil {
		return nil, err
	}
	if c.dir, err = os.MkdirTemp(o.dir, "campaign-"); err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		if !keep {
			err = errors.Join(err, os.RemoveAll(c.dir))
		}
	}()
	ctx, c.end = context.WithCancelCause(ctx)
	defer c.end(nil)
	journal, err := os.Create(filepath.Join(c.dir, "journal"))
	if err != nil {
		return nil, err
	}
	defer journal.Close()
	c.journal = journal
	defer c.close()
	if err := c.prepare(ctx); err != nil {
		return nil, err
	}
	c.start = time.Now() // it begins now
	err = c.rage(ctx)
	if err != nil && len(c.findings) == 0 && context.Cause(ctx) == nil {
		c.finding("%v", err)
	}
	cause := context.Cause(ctx)
	if errors.Is(cause, errFinding) {
		cause = nil
	}
	r := c.report(cause)
	if keep = len(c.findings) > 0; keep {
		r.kept = c.dir
	}
	return r, nil
}

// prepare builds and starts what a campaign needs.
func (c *campaign) prepare(ctx context.Context) (err error) {
	if c.programs == "" {
		c.programs = filepath.Join(c.dir, "bin")
		if err := build(ctx, c.programs); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(c.dir, "empty.json"), []byte("{}"), 0o600); err != nil {
		return err
	}
	// etcd's own ticks.
	c.quota = []string{"--quota-backend-bytes=0"}
	c.cluster, err = etcdcluster.Start(ctx, etcdcluster.Options{
		Args: c.quota, Dir: filepath.Join(c.dir, "etcd"), ClientLinks: true, Heartbeat: 100 * time.Millisecond, Election: time.Second,
	})
	if err != nil {
		return err
	}
	c.fixedDisk = c.cluster.SlowDisk(0, 0)
	cfg, err := c.cluster.Config(c.cluster.Endpoints()...)
	if err != nil {
		return err
	}
	cfg.Logger = zap.NewNop()
	if c.client, err = clientv3.New(cfg); err != nil {
		return err
	}
	for _, h := range []struct {
		at   **host
		name string
	}{{&c.clone, "clone"}, {&c.desk, "desk"}} {
		if *h.at, err = newHost(filepath.Join(c.dir, "host", h.name)); err != nil {
			return err
		}
		if err := (*h.at).identify("machine-"+h.name, "boot-"+h.name); err != nil {
			return err
		}
	}
	for i := range c.nodes {
		m, err := c.newMachine(i)
		if err != nil {
			return err
		}
		c.machines = append(c.machines, m)
	}
	_, err = c.must(ctx, nil, "", nil, "init")
	return err
}

// build builds the plugin and the command into a directory.
func build(ctx context.Context, dir string) error {
	const module = "github.com/ipam-ledger/ipam-ledger/"
	tool := "/usr/local/go/bin/go" // where sudo drops it from PATH
	if p, err := exec.LookPath("go"); err == nil {
		tool = p
	}
	cmd := exec.CommandContext(ctx, tool, "build", "-buildvcs=false", "-o", dir+"/", module+"plugins/ipam-ledger", module+"cmd/ledger")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the programs (run this in the source tree): %w\n%s", err, out)
	}
	return nil
}

// close ends all that was started.
func (c *campaign) close() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	for _, m := range c.machines {
		if m.watch != nil {
			m.watch.close()
		}
		m.host.close()
	}
	for _, h := range []*host{c.clone, c.desk} {
		if h != nil {
			h.close()
		}
	}
	if c.client != nil {
		c.client.Close()
	}
	if c.cluster != nil {
		c.cluster.Close()
	}
}

// rage is load and faults, with quiescent points and drills in between.
func (c *campaign) rage(ctx context.Context) error {
	work, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for _, m := range c.machines {
		for i := range 2 {
			own := c.random("worker", m.name, i)
			wg.Go(func() { m.worker(work, own) })
		}
	}
	for _, hand := range hands {
		own := c.random("hand", hand.name)
		wg.Go(func() { c.inject(work, hand, own) })
	}
	wg.Go(func() { c.probe(work) })
	wg.Go(func() { c.progress(work) })
	wg.Go(func() { c.residents(work) })
	if c.onLoad != nil {
		c.onLoad(c)
	}
	own := c.random("rounds")
	for round := 1; ; round++ {
		left := c.duration - c.now()
		last := left < c.round*3/2
		load := c.round
		if last {
			load = max(left, c.round/4)
		}
		drill := c.drills && round%3 == 2 || c.drills && last && round < 3
		snapshot := ""
		if drill {
			before := time.Duration(own.Float64() * 0.8 * float64(load))
			sleep(ctx, before)
			if ctx.Err() == nil && own.IntN(2) == 0 {
				c.calm.RLock()
				c.fault(ctx, "release by an operator before a drill", func() error { return c.releaseEarly(ctx, own) })
				c.calm.RUnlock()
			}
			if ctx.Err() == nil {
				snapshot = filepath.Join(c.dir, fmt.Sprintf("snapshot-%d", round))
				if err := c.snapshot(ctx, snapshot); err != nil {
					return err
				}
			}
			load -= before
		}
		sleep(ctx, load)
		if ctx.Err() != nil {
			return nil
		}
		if err := c.quiesce(ctx, round, snapshot, own); err != nil {
			return err
		}
		if last || ctx.Err() != nil {
			return nil
		}
	}
}

// excuses are why a call may fail at the moment.
type excuses struct {
	sync.Mutex
	all []*excuse
}

type excuse struct {
	why      string
	codes    []int
	verbs    []string // nil: all
	m        *machine // nil: all
	from, to time.Duration
}

const notOver = time.Duration(1<<63 - 1)

// excuse lets calls fail with one of codes from now until over is called, and a
// while more: calls that began before end after.
func (c *campaign) excuse(why string, m *machine, codes ...int) (over func()) {
	return c.excuseVerbs(why, m, nil, codes...)
}

// excuseVerbs does so for some verbs alone.
func (c *campaign) excuseVerbs(why string, m *machine, verbs []string, codes ...int) (over func()) {
	e := &excuse{why, codes, verbs, m, c.now(), notOver}
	c.excuses.Lock()
	defer c.excuses.Unlock()
	c.excuses.all = append(slices.DeleteFunc(c.excuses.all, func(e *excuse) bool { return e.to < c.now()-2*time.Minute }), e)
	return func() {
		c.excuses.Lock()
		defer c.excuses.Unlock()
		e.to = c.now()
	}
}

// grace is how long trouble with etcd is felt after it is over: connections
// that have to be made anew, calls that queue up on a lock.
const grace = 2 * time.Second

func (c *campaign) excused(verb string, m *machine, code int, r *reply) bool {
	c.excuses.Lock()
	defer c.excuses.Unlock()
	for _, e := range c.excuses.all {
		to := e.to
		if code == codeTryAgain && to != notOver {
			to += grace
		}
		if slices.Contains(e.codes, code) && (e.m == nil || e.m == m) && (e.verbs == nil || slices.Contains(e.verbs, verb)) && e.from <= r.ended && to >= r.began {
			return true
		}
	}
	return false
}

// judge looks at a call that failed: the code must be one that what is going on
// explains, and the text must say something.
func (c *campaign) judge(verb string, m *machine, r *reply) {
	if r.killed || r.exit == 0 {
		return
	}
	c.note("%s", r.text())
	sure, perhaps := c.book.holds()
	earlier := *r // STATUS keeps an answer for a while
	earlier.began -= 5 * time.Second
	switch {
	case verb == "DEL":
	case r.code == codeNotAvailable && verb == "ADD" && strings.Contains(r.said, "10.1.0."):
		return // it asked for an address that another has
	case r.code == codeExhausted && verb == "ADD" && sure+perhaps >= poolSize-20:
		return
	case r.code == codeUnreachable && strings.Contains(r.said, "since this node started") && c.excused(verb, m, codeTryAgain, &earlier):
		return // there is no last contact to count from
	case c.excused(verb, m, r.code, r):
		return
	}
	c.finding("%s", r.text())
}

// mayAllocate looks at a call that was answered with an address, while nobody
// may have been allowed to.
func (c *campaign) mayAllocate(p *pod, r *reply) {
	c.frozen.Lock()
	defer c.frozen.Unlock()
	if c.frozen.since >= 0 && p.begun > c.frozen.since && len(p.told) == 1 {
		c.finding("%s: allocated %v while the ledger is frozen or recovering (since %v)", r.what, r.ips, c.frozen.since)
	}
}

// freeze says whether anybody may allocate.
func (c *campaign) setFrozen(on bool) {
	c.frozen.Lock()
	defer c.frozen.Unlock()
	c.frozen.since = -1
	if on {
		c.frozen.since = c.now()
	}
}

// probe watches whether etcd answers: where it does not, whatever the reason,
// calls may fail.
func (c *campaign) probe(ctx context.Context) {
	var over func()
	for ctx.Err() == nil {
		began := c.now()
		one, cancel := context.WithTimeout(ctx, time.Second)
		_, err := c.client.Get(one, c.keys.Meta())
		cancel()
		late := c.now()-began > 1500*time.Millisecond // the machine is busy with something else
		switch {
		case (err != nil || late) && over == nil:
			over = c.excuse("etcd does not answer", nil, codeTryAgain, codeUnreachable)
		case err == nil && !late && over != nil:
			over()
			over = nil
		}
		sleep(ctx, 100*time.Millisecond)
	}
	if over != nil {
		over()
	}
}

// must runs the command until it succeeds. It may fail where etcd is in trouble
// (exit status 2); a refusal that refused expects is an answer, too. as is whom
// it acts as; nil: an operator.
func (c *campaign) must(ctx context.Context, as *machine, stdin string, refused func(*reply) bool, args ...string) (*reply, error) {
	return c.mustWith(ctx, as, func() string { return stdin }, refused, args...)
}

// mustWith makes what the command reads anew for each run.
func (c *campaign) mustWith(ctx context.Context, as *machine, stdin func() string, refused func(*reply) bool, args ...string) (*reply, error) {
	own := c.random("must", c.now(), args)
	began := c.now()
	for {
		var k kill
		if own.IntN(8) == 0 {
			k.after = time.Duration(1 + own.Int64N(int64(80*time.Millisecond)))
		}
		var r *reply
		if as != nil {
			r = as.acts(ctx, k, stdin(), args...)
		} else {
			r = c.read(c.desk, c.ledger(ctx, nil, args...), k, stdin(), nil)
		}
		r.what = "ledger " + strings.Join(args, " ")
		if as != nil {
			r.what += " on " + as.name
		}
		if ctx.Err() != nil {
			return r, context.Cause(ctx)
		}
		what := "ledger " + args[0]
		switch {
		case r.killed:
			c.count(what, "killed")
			continue
		case r.exit == 0, refused != nil && refused(r):
			c.count(what, fmt.Sprint("exit ", r.exit))
			c.note("%s: exit status %d", r.what, r.exit)
			return r, nil
		}
		c.count(what, fmt.Sprint("exit ", r.exit))
		c.note("%s", r.text())
		if r.exit != 2 || !c.excused("", nil, codeTryAgain, r) {
			return r, fmt.Errorf("%s", r.text())
		}
		if c.now()-began > 90*time.Second {
			return r, fmt.Errorf("for 90 s now: %s", r.text())
		}
		sleep(ctx, 200*time.Millisecond)
	}
}

// read runs a command whose standard input is a file that was written now: 'ledger
// gc' goes by its time.
func (c *campaign) read(h *host, cmd *exec.Cmd, k kill, text string, procs *processes) *reply {
	f, err := os.CreateTemp("", "campaign")
	if err == nil {
		defer f.Close()
		err = errors.Join(os.WriteFile(f.Name(), []byte(text), 0o600), os.Chtimes(f.Name(), time.Time{}, time.Now()), os.Remove(f.Name()))
	}
	if err != nil {
		c.finding("what %v is to read: %v", cmd.Args, err)
	}
	cmd.Stdin = f
	return c.run(h, cmd, k, 0, procs)
}

// dirOf is the machine's state directory.
func (c *campaign) dirOf(m *machine) *statedir.Dir {
	d, err := statedir.Open(m.state)
	if err != nil {
		c.finding("%v", err)
	}
	return d
}

// progress writes a line every half a minute.
func (c *campaign) progress(ctx context.Context) {
	for {
		sleep(ctx, 30*time.Second)
		if ctx.Err() != nil {
			return
		}
		sure, perhaps := c.book.holds()
		fmt.Fprintf(c.log, "%s: %d calls, %d ADDs answered, %d pods run and %d come or go; %d faults; a call takes %v\n",
			clock(c.now()), c.counts.calls(), c.serves.len(), sure, perhaps, c.faults.total(), time.Duration(c.typical.Load()).Round(time.Millisecond))
	}
}

func clock(d time.Duration) string {
	return fmt.Sprintf("%02d:%02d", int(d.Minutes()), int(d.Seconds())%60)
}
