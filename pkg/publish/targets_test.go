package publish

import (
	"context"
	"errors"
	"log/slog"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

func command(dir string, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	return cmd.Run()
}

// sways are the sways of a session, in memory.
type sways struct {
	mu  sync.Mutex
	all map[string]*fakeSway
}

type fakeSway struct {
	path string
	ctx  context.Context
	end  context.CancelFunc

	mu   sync.Mutex
	subs []chan []byte
	got  chan *state.State // states that were sent
	slow bool
}

func (s *sways) start(path string) *fakeSway {
	f := &fakeSway{path: path, got: make(chan *state.State, 1000)}
	f.ctx, f.end = context.WithCancel(context.Background())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[string]*fakeSway{}
	}
	s.all[path] = f
	return f
}

// stop leaves a stale socket behind unless clean.
func (s *sways) stop(f *fakeSway, clean bool) {
	f.end()
	if clean {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.all, f.path)
	}
}

func (s *sways) sockets() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path := range s.all {
		out = append(out, path)
	}
	return out
}

func (s *sways) open(path string) ipc.Bus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[path]
}

func (f *fakeSway) Path() string { return f.path }

var errGone = errors.New("connection refused")

func (f *fakeSway) Ticks(ctx context.Context, onTick func([]byte)) error {
	if f.ctx.Err() != nil {
		return errGone
	}
	in := make(chan []byte, 100)
	f.mu.Lock()
	f.subs = append(f.subs, in)
	f.mu.Unlock()
	onTick(nil)
	for {
		select {
		case b := <-in:
			onTick(b)
		case <-ctx.Done():
			return ctx.Err()
		case <-f.ctx.Done():
			return errGone
		}
	}
}

func (f *fakeSway) Send(ctx context.Context, b []byte) error {
	if f.ctx.Err() != nil {
		return errGone
	}
	if f.slow {
		<-ctx.Done()
		return ctx.Err()
	}
	if kind, s, err := state.Decode(b); err == nil && kind == state.TypeState {
		f.got <- s
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, in := range f.subs {
		select {
		case in <- b:
		default:
		}
	}
	return nil
}

func (f *fakeSway) wait(t *testing.T, what string) *state.State {
	t.Helper()
	select {
	case s := <-f.got:
		return s
	case <-time.After(patience):
		t.Fatalf("waited for: %s", what)
		return nil
	}
}

// puppet is a feed that does what a test says.
type puppet chan message

func (f puppet) run(ctx context.Context, _ *Publisher, out chan<- message) {
	for {
		select {
		case m := <-f:
			if pass(ctx, out, m) != nil {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// TestSways: all sways of a session get the states, also one that starts later
// or comes back; a hello is answered, a hundred are answered a few times; one
// that hangs holds up nobody.
func TestSways(t *testing.T) {
	var s sways
	feed := make(puppet)
	p, err := New(Config{
		Source: "prod", Dir: t.TempDir(), Feed: feed, Heartbeat: time.Hour, Sockets: s.sockets, Open: s.open, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	a, hung := s.start("a"), s.start("hung")
	hung.slow = true
	stale := s.start("stale")
	s.stop(stale, false)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	// Nothing is known yet, so nothing is said; a hello changes nothing.
	if err := a.Send(ctx, state.Hello()); err != nil {
		t.Fatal(err)
	}
	feed <- relayed{&state.State{Source: "x", Epoch: 1, Revision: 5, Etcd: state.Etcd{OK: true}}}
	if got := a.wait(t, "the first state"); got.Revision != 5 || got.Source != "prod" {
		t.Errorf("%+v", got)
	}
	for range 100 {
		if err := a.Send(ctx, state.Hello()); err != nil {
			t.Fatal(err)
		}
	}
	a.wait(t, "an answer")
	b := s.start("b") // is found, and told without asking
	b.wait(t, "the state for a sway that starts later")
	s.stop(a, true)
	a = s.start("a")
	a.wait(t, "the state for a sway that came back")
	if n := len(a.got); n > 5 {
		t.Errorf("%d states for a hundred hellos", n)
	}
	for i := range 50 {
		feed <- relayed{&state.State{Source: "x", Epoch: 1, Revision: int64(6 + i), Etcd: state.Etcd{OK: true}}}
	}
	for a.wait(t, "the last revision").Revision != 55 {
	}
	// A tick of another program, and one that is forged, are nothing to it.
	for _, text := range []string{"other", `{"app":"ipam-ledger","v":99}`, `{"app":"ipam-ledger"`} {
		if err := a.Send(ctx, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSilentSway: a sway of which no tick comes back is left and joined anew.
func TestSilentSway(t *testing.T) {
	var s sways
	p, err := New(Config{Source: "prod", Feed: make(puppet), Heartbeat: time.Second, Sockets: s.sockets, Open: s.open})
	if err != nil {
		t.Fatal(err)
	}
	now := noon
	p.now = func() time.Time { return now }
	targets := newTargets(p)
	canceled := false
	x := &target{cancel: func() { canceled = true }, heard: now, box: newMailbox()}
	targets.all["a"] = x
	targets.send([]byte("{}"))
	now = now.Add(3 * time.Second)
	targets.watchdog()
	if canceled {
		t.Error("left too early")
	}
	targets.tick("a", x, []byte("{}"))
	now = now.Add(3 * time.Second)
	targets.watchdog()
	if canceled {
		t.Error("left though a tick came")
	}
	now = now.Add(time.Second)
	targets.watchdog()
	if !canceled {
		t.Error("not left")
	}
}
