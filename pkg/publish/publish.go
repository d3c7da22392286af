// Package publish keeps a summary of a ledger up to date and sends it to the bars
// of a desktop.
//
//	etcd ──full read, then a watch──> Model ──> state.State ──> sway's ticks
//	                                  checker, audit.Verify     state.json, stdout
//
// # Guarantees
//
// What is published is always a whole state, at most MaxRate a second and 16 KiB
// each, repeated at each heartbeat. An isolated change is sent at once. A state
// never supersedes a newer one: Epoch and Revision do not go back, also over a
// restart of the publisher and a rollback of etcd, which is a finding.
//
// The counts are those of the keys at Revision; while etcd is out of reach they
// are the last ones known, and Etcd says since when and why. One publisher sends
// for one source in one session (Lock).
//
// Verify.Result is "ok" only while the last full verification found nothing and
// nothing that was committed since contradicts it (checker); Verify.At is when
// that full verification read the ledger. A rewritten or deleted entry stays a
// finding until the publisher is started again, as the evidence may be gone.
//
// No address, pod name or content of the ledger leaves but in counts.
//
// # What can fail
//
// Run ends with its context, and with an error where there is nothing to publish
// to: stdout is closed, or the lock is another's. Whatever etcd or sway do, it
// goes on: both are tried again, with jittered and growing pauses.
package publish

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"slices"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// Config is what is published, and where to.
type Config struct {
	Source    string // the cluster's name; "": as the feed says
	Feed      Feed
	Heartbeat time.Duration // 0: state.DefaultHeartbeat

	// Where to. Print excludes the others.
	Print   io.Writer            // states as lines
	Dir     string               // for state.json and locks: $XDG_RUNTIME_DIR/ipam-ledger
	Sockets func() []string      // finds sways; nil: none
	Open    func(string) ipc.Bus // of a socket

	Log *slog.Logger // nil: none

	now func() time.Time // for tests
}

// Feed is where states come from: Etcd, or Command.
type Feed interface {
	// run sends messages until ctx ends.
	run(ctx context.Context, p *Publisher, out chan<- message)
}

// A message is one of these.
type message any

type (
	// loaded is a full read; the Model and checker are the receiver's from now on.
	loaded struct {
		model   *Model
		check   *checker
		at      int64  // revision
		rewound string // says that etcd went back in time, if it did
	}
	// changed is what one or several revisions changed, in order.
	changed struct {
		events []Event
		at     int64
	}
	// reached and lost are whether there is contact.
	reached struct{ at int64 }
	lost    struct{ why string }
	// verifying and verified are of full verifications.
	verifying struct{}
	verified  struct {
		report *audit.Report
		err    error
	}
	// certified is the certificate that ends first; nil: there is none.
	certified struct{ *state.Cert }
	// relayed is a whole state from another publisher.
	relayed struct{ *state.State }
)

// Event is one change of a key.
type Event struct {
	audit.Record // of a deleted key: Key and Mod
	Deleted      bool
}

// Publisher runs a Config.
type Publisher struct {
	Config

	model *Model
	check *checker
	state state.State // as last filled
	full  struct {
		result string
		at     time.Time
		mod    int64
		count  int64
		code   string
	}
	running bool
	ready   bool      // the feed has said something
	found   []finding // since, or lasting

	cadence cadence
	targets *targets
	printer *mailbox
	lock    *Lock
	hello   chan struct{}
	again   chan struct{} // asks the feed for a full verification
}

// sourceName is what a source may be called: it becomes part of file names.
var sourceName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// ValidSource reports whether a source may have a name.
func ValidSource(name string) error {
	if !sourceName.MatchString(name) {
		return fmt.Errorf("source %.100q: want 1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit", name)
	}
	return nil
}

// New returns a Publisher, which does nothing yet.
func New(c Config) (*Publisher, error) {
	if c.Source != "" {
		if err := ValidSource(c.Source); err != nil {
			return nil, err
		}
	}
	if c.Heartbeat == 0 {
		c.Heartbeat = state.DefaultHeartbeat
	}
	if c.Heartbeat < time.Second || c.Heartbeat > time.Hour {
		return nil, fmt.Errorf("heartbeat of %s: want 1s to 1h", c.Heartbeat)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.now == nil {
		// Wall time, for a monotonic clock stands still while the machine sleeps.
		c.now = func() time.Time { return time.Now().Round(0) }
	}
	p := &Publisher{Config: c, hello: make(chan struct{}, 1), again: make(chan struct{}, 1)}
	p.cadence.heartbeat = c.Heartbeat
	p.state = state.State{
		Heartbeat: int(c.Heartbeat / time.Second), Verify: state.Verify{Result: state.VerifyUnknown},
		Etcd: state.Etcd{Error: "not reached yet", Since: c.now()}, Pools: []state.Pool{},
	}
	p.full.result = state.VerifyUnknown
	return p, nil
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if p.Source != "" {
		if err := p.named(p.Source); err != nil {
			return err
		}
	}
	defer func() { p.lock.Release() }()
	if p.Print == nil && p.Sockets != nil {
		p.targets = newTargets(p)
		done := make(chan struct{})
		go func() { p.targets.run(ctx); close(done) }()
		defer func() { cancel(); <-done }()
	}
	printed := make(chan error, 1)
	if p.Print != nil {
		p.printer = newMailbox()
		done := make(chan struct{})
		go func() { printed <- p.print(ctx); close(done) }()
		defer func() { cancel(); <-done }()
	}
	feed := make(chan message)
	done := make(chan struct{})
	go func() { p.Feed.run(ctx, p, feed); close(done) }()
	defer func() { cancel(); <-done }()

	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-feed:
			if _, aside := m.(certified); !aside { // which says nothing of the ledger
				p.ready = true
			}
			if err := p.take(m); err != nil {
				return err
			}
		case err := <-printed:
			return err
		case <-p.hello:
			p.cadence.asked(p.now())
		case <-timer.C:
		}
		now := p.now()
		send, next := p.cadence.due(now)
		if send && p.ready && p.state.Source != "" {
			if err := p.send(now); err != nil {
				return err
			}
			_, next = p.cadence.due(now)
		}
		if p.model != nil {
			// A hold's end changes the counts though nothing happens.
			if t := p.model.NextChange(); !t.IsZero() && t.Before(next) {
				if !t.After(now) {
					p.cadence.changed(now)
					_, next = p.cadence.due(now)
				} else {
					next = t
				}
			}
		}
		// Timers stand still with the machine, too: look at the clock now and then.
		timer.Reset(min(max(time.Millisecond, next.Sub(now)), glance))
	}
}

// glance is how long a heartbeat may be late after the machine woke up.
const glance = 5 * time.Second

// named gives the source its name, takes its lock and what is known of it.
func (p *Publisher) named(source string) error {
	if err := ValidSource(source); err != nil {
		return err
	}
	p.state.Source = source
	if p.Print != nil || p.Dir == "" {
		return nil
	}
	lock, err := TakeLock(p.Dir, source)
	if err != nil {
		return err
	}
	p.lock = lock
	// What an earlier publisher knew. Bars know it too, and would take nothing
	// older; and if etcd is away it is better than nothing.
	if old := readState(p.Dir, source); old != nil {
		old.Etcd, old.Heartbeat, old.Verify, old.Cert = p.state.Etcd, p.state.Heartbeat, p.state.Verify, p.state.Cert
		if p.model == nil {
			p.state = *old
		} else {
			p.order(old.Epoch, old.Revision)
		}
	}
	return nil
}

// order makes the state no older than what was published already.
func (p *Publisher) order(epoch uint64, revision int64) {
	if epoch > p.state.Epoch {
		p.state.Epoch, p.state.Revision = epoch, revision
	} else if epoch == p.state.Epoch {
		p.state.Revision = max(p.state.Revision, revision)
	}
}

func (p *Publisher) take(m message) error {
	now := p.now()
	switch m := m.(type) {
	case loaded:
		m.model.Loaded(now, p.model)
		if p.check != nil {
			m.check.unjudged += p.check.unjudged
		}
		p.model, p.check = m.model, m.check
		if p.state.Source == "" {
			meta := p.model.Meta()
			if meta == nil {
				p.Log.Warn("there is no ledger: 'ledger init' makes one; with --source NAME the bar says so meanwhile")
				return nil
			}
			if err := p.named(nameOf(meta.Cluster)); err != nil {
				return err
			}
		}
		if m.rewound != "" {
			p.Log.Error("finding", "code", audit.Rollback, "detail", m.rewound)
			p.find(finding{audit.Finding{Code: audit.Rollback, Where: "meta", Revision: m.at, Detail: m.rewound}, true})
		}
		p.reach(now, m.at)
	case changed:
		for i := range m.events {
			e := &m.events[i]
			if e.Deleted {
				p.model.Delete(e.Key, now)
			} else {
				p.model.Put(e.Record, now)
			}
		}
		p.judge(m.events)
		if p.state.Source == "" && p.model.Meta() != nil {
			if err := p.named(nameOf(p.model.Meta().Cluster)); err != nil {
				return err
			}
		}
		p.reach(now, m.at)
	case reached:
		p.reach(now, m.at)
	case lost:
		p.running = false
		if p.state.Etcd.OK || p.state.Etcd.Error != m.why {
			if p.state.Etcd.OK {
				p.state.Etcd.Since = now
			}
			p.state.Etcd.OK, p.state.Etcd.Error = false, m.why
			p.cadence.changed(now)
		}
	case verifying:
		p.running = true
		p.cadence.changed(now)
	case verified:
		p.running = false
		p.conclude(m, now)
		p.cadence.changed(now)
	case certified:
		if !same(m.Cert, p.state.Cert) {
			p.state.Cert = m.Cert
			p.cadence.changed(now)
		}
	case relayed:
		return p.relay(m.State, now)
	}
	return nil
}

func same(a, b *state.Cert) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// nameOf is the name of a source that was given none.
func nameOf(cluster string) string { return cluster[:min(8, len(cluster))] }

func (p *Publisher) reach(now time.Time, at int64) {
	if !p.state.Etcd.OK {
		p.state.Etcd = state.Etcd{OK: true, Since: now}
	}
	if m := p.model.Meta(); m != nil {
		if m.Epoch > p.state.Epoch {
			p.state.Epoch, p.state.Revision = m.Epoch, 0
			// 'recover start' has dealt with it.
			p.found = slices.DeleteFunc(p.found, func(f finding) bool { return f.Code == audit.Rollback })
		}
	}
	p.state.Revision = max(p.state.Revision, at)
	p.cadence.changed(now)
}

// judge checks what was committed, a revision at a time.
func (p *Publisher) judge(events []Event) {
	for len(events) > 0 {
		n := 1
		for n < len(events) && events[n].Mod == events[0].Mod {
			n++
		}
		for _, f := range p.check.revision(events[:n]) {
			p.Log.Error("finding", "code", f.Code, "where", f.Where, "revision", f.Revision, "detail", f.Detail)
			p.find(f)
		}
		events = events[n:]
	}
}

// maxFound bounds what is remembered of findings; they are counted all the same.
const maxFound = 1000

// find takes down a finding and asks for a full verification, which says more.
func (p *Publisher) find(f finding) {
	if len(p.found) < maxFound {
		p.found = append(p.found, f)
	}
	select {
	case p.again <- struct{}{}:
	default:
	}
}

// conclude takes a full verification's result. What was found while committing
// is in it, unless it came later or its evidence is gone.
func (p *Publisher) conclude(v verified, now time.Time) {
	if v.err != nil {
		// An older result stays, with its time, which tells its age.
		if p.full.result == state.VerifyUnknown || p.full.result == state.VerifyError {
			p.full.result, p.full.at, p.full.code = state.VerifyError, now, ""
		}
		return
	}
	r := v.report
	p.full.at, p.full.mod, p.full.count, p.full.code = r.Taken, r.Revision, r.FindingCount, ""
	switch r.ExitCode() {
	case audit.ExitFindings:
		p.full.result = state.VerifyFailed
		if len(r.Findings) > 0 {
			p.full.code = string(r.Findings[0].Code)
		}
		for i := range min(3, len(r.Findings)) {
			p.Log.Error("verification", "finding", r.Findings[i].String())
		}
	case audit.ExitReduced:
		p.full.result = state.VerifyReduced
	default:
		p.full.result = state.VerifyOK
	}
	var keep []finding
	for _, f := range p.found {
		if f.Revision > r.Revision || f.lasting && r.FindingCount == 0 {
			keep = append(keep, f)
		}
	}
	p.found = keep
	if p.check != nil && r.FindingCount == 0 && len(r.Reduced) == 0 {
		p.check.unjudged = 0
	}
}

func (p *Publisher) verify() state.Verify {
	v := state.Verify{Result: p.full.result, At: p.full.at, Code: p.full.code, Findings: p.full.count, Running: p.running}
	if len(p.found) > 0 {
		if v.Result != state.VerifyFailed {
			v.Code = string(p.found[0].Code)
		}
		v.Result = state.VerifyFailed
		v.Findings += int64(len(p.found))
	}
	if v.Result == state.VerifyOK && p.check != nil && p.check.unjudged > 0 {
		v.Result = state.VerifyReduced
	}
	return v
}

// relay passes on a state that another publisher sent. Its clock is another
// machine's, so that the time of arrival stands for its time.
func (p *Publisher) relay(s *state.State, now time.Time) error {
	switch {
	case p.Source != "":
	case p.state.Source == "":
		if err := p.named(s.Source); err != nil {
			return err
		}
	case p.state.Source != s.Source:
		return fmt.Errorf("the command's states are of source %.64q now, and were of %q: give them one name with --source", s.Source, p.state.Source)
	}
	epoch, revision, source, heartbeat := p.state.Epoch, p.state.Revision, p.state.Source, p.state.Heartbeat
	p.state = *s
	p.state.Source, p.state.Heartbeat = source, heartbeat
	p.order(epoch, revision)
	p.cadence.changed(now)
	return nil
}

// send publishes the state as it is now.
func (p *Publisher) send(now time.Time) error {
	if p.model != nil {
		epoch := p.state.Epoch
		p.model.Fill(&p.state, now)
		p.state.Epoch = max(epoch, p.state.Epoch)
		p.state.Verify = p.verify()
	}
	p.state.At = now.Round(0)
	b, err := state.Encode(&p.state)
	if err != nil {
		return err
	}
	p.cadence.sent(now)
	if p.printer != nil {
		p.printer.put(append(b, '\n'))
		return nil
	}
	if p.targets != nil {
		p.targets.send(b)
	}
	if p.Dir != "" {
		if err := writeState(p.Dir, p.state.Source, b); err != nil {
			p.Log.Warn("the state file was not written", "err", err)
		}
	}
	return nil
}

// print writes states as lines, the latest where the reader is slow.
func (p *Publisher) print(ctx context.Context) error {
	for {
		b, err := p.printer.get(ctx)
		if err != nil {
			return nil // the end
		}
		if _, err := p.Print.Write(b); err != nil {
			return fmt.Errorf("writing a state: %w", err)
		}
	}
}

// say tells that a bar asked for the state.
func (p *Publisher) say() {
	select {
	case p.hello <- struct{}{}:
	default: // it will be answered
	}
}

// backoff is how long to wait before trying again: growing, and jittered so that
// many do not come back at once.
type backoff struct {
	first, most time.Duration
	next        time.Duration
}

func (b *backoff) reset() { b.next = 0 }

func (b *backoff) wait(ctx context.Context) error {
	b.next = min(max(b.first, 2*b.next), b.most)
	return sleep(ctx, b.next/2+rand.N(b.next/2+1))
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// pass sends a message unless ctx ends.
func pass(ctx context.Context, out chan<- message, m message) error {
	select {
	case out <- m:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mailbox holds the latest of what was put into it.
type mailbox struct{ c chan []byte }

func newMailbox() *mailbox { return &mailbox{make(chan []byte, 1)} }

// put is for one goroutine at a time.
func (m *mailbox) put(b []byte) {
	select {
	case <-m.c:
	default:
	}
	m.c <- b
}

func (m *mailbox) get(ctx context.Context) ([]byte, error) {
	select {
	case b := <-m.c:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
