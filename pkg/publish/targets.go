package publish

import (
	"context"
	"sync"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// rescan is how often sways are looked for: one that starts has bars that say
// hello before anybody listens.
const rescan = 5 * time.Second

// targets are the sways that states are sent to.
type targets struct {
	p    *Publisher
	gone chan struct{}

	mu   sync.Mutex
	last []byte // sent
	all  map[string]*target
}

// target is one sway. A slow one gets the latest state, and holds up nobody.
type target struct {
	bus    ipc.Bus
	box    *mailbox
	cancel context.CancelFunc
	heard  time.Time // a tick: our own come back too
	joined bool
}

func newTargets(p *Publisher) *targets {
	return &targets{p: p, gone: make(chan struct{}, 1), all: map[string]*target{}}
}

// run serves all sways of the user until ctx ends.
func (t *targets) run(ctx context.Context) {
	var serving sync.WaitGroup
	defer serving.Wait()
	wait := backoff{first: rescan / 20, most: rescan}
	for {
		for _, path := range t.p.Sockets() {
			t.mu.Lock()
			if t.all[path] == nil {
				tctx, cancel := context.WithCancel(ctx)
				x := &target{bus: t.p.Open(path), box: newMailbox(), cancel: cancel, heard: t.p.now()}
				t.all[path] = x
				serving.Go(func() { t.serve(tctx, path, x) })
			}
			t.mu.Unlock()
		}
		timer := time.NewTimer(rescan)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-t.gone:
			timer.Stop()
			if wait.wait(ctx) != nil {
				return
			}
		case <-timer.C:
			wait.reset()
			t.watchdog()
		}
	}
}

// watchdog parts with sways whose ticks have ceased: our own states come back
// as ticks, so that silence is a broken stream.
func (t *targets) watchdog() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for path, x := range t.all {
		if t.p.now().Sub(x.heard) > 3*t.p.Heartbeat && t.last != nil {
			t.p.Log.Warn("no tick came back; connecting again", "sway", path)
			x.cancel()
		}
	}
}

func (t *targets) serve(ctx context.Context, path string, x *target) {
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		failed := false
		for {
			b, err := x.box.get(ctx)
			if err != nil {
				return
			}
			err = x.bus.Send(ctx, b)
			if err != nil && !failed && ctx.Err() == nil {
				t.p.Log.Warn("a state was not sent", "err", err)
			}
			failed = err != nil
		}
	}()
	err := x.bus.Ticks(ctx, func(payload []byte) { t.tick(path, x, payload) })
	t.mu.Lock()
	joined := x.joined
	t.mu.Unlock()
	if ctx.Err() == nil && joined {
		t.p.Log.Info("sway is gone", "sway", path, "err", err)
	}
	x.cancel()
	<-sent
	t.mu.Lock()
	delete(t.all, path)
	t.mu.Unlock()
	select {
	case t.gone <- struct{}{}:
	default:
	}
}

// tick is called for each tick; the first is empty and says: connected.
func (t *targets) tick(path string, x *target, payload []byte) {
	t.mu.Lock()
	x.heard = t.p.now()
	first := !x.joined
	x.joined = true
	if first && t.last != nil {
		x.box.put(t.last)
	}
	t.mu.Unlock()
	if first {
		t.p.Log.Info("publishing", "sway", path)
	}
	// States are large and ours, or another publisher's: no need to read them.
	if len(payload) == 0 || len(payload) > 256 {
		return
	}
	if kind, _, err := state.Decode(payload); err == nil && kind == state.TypeHello {
		t.p.say()
	}
}

// send gives a state to all.
func (t *targets) send(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = b
	for _, x := range t.all {
		if x.joined {
			x.box.put(b)
		}
	}
}
