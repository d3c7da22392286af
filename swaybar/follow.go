package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// inbox hands over what arrives to the loop. It holds the latest of each kind,
// so that it stays small when much arrives, and putting never waits.
type inbox struct {
	ready chan struct{}

	mu sync.Mutex
	letter
}

type letter struct {
	states  []*state.State // the newest of each source
	files   []*state.State
	link    *Link
	other   *int // version of a document that we can not read
	clicks  []click
	scroll  int  // the last button
	toggle  bool // the view
	results []Result
}

func newInbox() *inbox { return &inbox{ready: make(chan struct{}, 1)} }

func (in *inbox) put(change func(*letter)) {
	in.mu.Lock()
	change(&in.letter)
	in.mu.Unlock()
	select {
	case in.ready <- struct{}{}:
	default: // the loop will look anyway
	}
}

func (in *inbox) take() letter {
	in.mu.Lock()
	defer in.mu.Unlock()
	taken := in.letter
	in.letter = letter{}
	return taken
}

// add keeps the newest state of each source.
func add(states []*state.State, s *state.State) []*state.State {
	for i, old := range states {
		if old.Source == s.Source {
			if s.Newer(old) {
				states[i] = s
			}
			return states
		}
	}
	if len(states) < maxSources {
		states = append(states, s)
	}
	return states
}

const (
	// helloWithin spreads the hellos of bars that start together; one is enough for
	// all.
	helloWithin = 30 * time.Millisecond
	// silence is how long no publisher may be heard before the connection is taken
	// for broken; it doubles while that does not help.
	silence, maxSilence = 3 * state.DefaultHeartbeat, 10 * time.Minute
	// A lost sway is looked for this often.
	minRetry, maxRetry = 100 * time.Millisecond, 15 * time.Second
)

var errSilent = errors.New("no publisher was heard for too long")

// follower keeps a subscription alive and puts what it hears into the inbox.
type follower struct {
	in      *inbox
	source  string // of which files are read; all where empty
	sockets func() []string
	open    func(path string) ipc.Bus
	runtime string // $XDG_RUNTIME_DIR
	silence time.Duration

	heard heard
	said  Link // the last
	ever  bool // connected
}

func (f *follower) run(ctx context.Context) {
	retry, wait := minRetry, f.silence
	for ctx.Err() == nil {
		sockets := f.sockets()
		if len(sockets) == 0 {
			f.lost(LinkAbsent)
		} else {
			heard, connected, err := f.listen(ctx, f.open(sockets[0]), wait)
			if connected {
				retry = minRetry
			}
			if errors.Is(err, errSilent) {
				if wait = f.silence; !heard {
					wait = min(2*wait, maxSilence)
				}
				continue // at once, and without a word
			}
			wait = f.silence
			f.lost(LinkLost)
		}
		f.readFiles()
		select {
		case <-ctx.Done():
		case <-time.After(retry/2 + rand.N(retry)):
		}
		retry = min(2*retry, maxRetry)
	}
}

// lost says that there is no connection, where that is new.
func (f *follower) lost(as LinkState) {
	if f.ever {
		as = LinkLost
	} else if as == LinkLost {
		as = LinkNew
	}
	if f.said.State == as {
		return
	}
	since := time.Now()
	if !f.ever {
		since = f.said.Since // we are as patient with a second way not to be connected
	}
	f.say(Link{as, since})
}

func (f *follower) say(link Link) {
	f.said, f.ever = link, f.ever || link.State == LinkUp
	f.in.put(func(l *letter) { l.link = &link })
}

// listen puts what one connection brings into the inbox, until it ends. It says
// whether a publisher was heard and whether sway answered.
func (f *follower) listen(ctx context.Context, bus ipc.Bus, wait time.Duration) (heard, connected bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(wait, func() { cancel(errSilent) })
	defer watchdog.Stop()

	// An error of a hello is one of the connection, which will end.
	hello := time.AfterFunc(time.Hour, func() { _ = bus.Send(ctx, state.Hello()) })
	defer hello.Stop()
	again := time.AfterFunc(time.Hour, func() { _ = bus.Send(ctx, state.Hello()) })
	defer again.Stop()

	err = bus.Ticks(ctx, func(payload []byte) {
		if payload == nil {
			connected = true
			hello.Reset(rand.N(helloWithin))
			again.Reset(patience)
			if f.said.State != LinkUp {
				f.say(Link{LinkUp, time.Now()})
			}
			return
		}
		kind, s, err := f.heard.decode(payload)
		switch {
		case errors.Is(err, state.ErrVersion):
			var head struct{ V int }
			_ = json.Unmarshal(payload, &head) // Decode has done the same
			f.in.put(func(l *letter) { l.other = &head.V })
		case err != nil: // nothing of ours
		case kind == state.TypeHello:
			hello.Stop() // the answer is for us, too
		default:
			heard = true
			again.Stop()
			watchdog.Reset(max(f.silence, 3*time.Duration(s.Heartbeat)*time.Second))
			f.in.put(func(l *letter) { l.states = add(l.states, s) })
		}
	})
	return heard, connected, err
}

// heard are the latest documents of sources. Idle clusters send the same again
// and again, with another time; this spares us to decode all of it.
type heard []struct {
	document []byte
	state    *state.State
}

func (h *heard) decode(b []byte) (string, *state.State, error) {
	for _, old := range *h {
		if s := repeated(old.document, old.state, b); s != nil {
			return state.TypeState, s, nil
		}
	}
	kind, s, err := state.Decode(b)
	if err != nil || s == nil {
		return kind, s, err
	}
	for i := range *h {
		if (*h)[i].state.Source == s.Source {
			(*h)[i].document, (*h)[i].state = b, s
			return kind, s, nil
		}
	}
	if len(*h) == maxSources {
		*h = (*h)[1:]
	}
	*h = append(*h, struct {
		document []byte
		state    *state.State
	}{b, s})
	return kind, s, nil
}

// repeated is the state of a document that differs from old in its time alone,
// and else nil.
func repeated(old []byte, s *state.State, b []byte) *state.State {
	const key, longest = `"at":"`, len(time.RFC3339Nano)
	i := bytes.Index(b, []byte(key)) + len(key)
	if i < len(key) || len(old) < i || !bytes.Equal(old[:i], b[:i]) {
		return nil
	}
	_, oldRest, _ := bytes.Cut(old[i:], []byte(`"`))
	text, rest, found := bytes.Cut(b[i:], []byte(`"`))
	if !found || len(text) > longest || !bytes.Equal(oldRest, rest) {
		return nil
	}
	at, err := time.Parse(time.RFC3339Nano, string(text))
	if err != nil || at.IsZero() {
		return nil
	}
	again := *s // the pools are shared, and nobody changes them
	again.At = at
	return &again
}

// readFiles reads what publishers have left in files, for as long as no tick
// says better.
func (f *follower) readFiles() {
	if f.runtime == "" {
		return
	}
	names, _ := filepath.Glob(filepath.Join(f.runtime, "ipam-ledger", "state*.json")) // of a bad pattern only
	for _, name := range names[:min(len(names), 2*maxSources)] {
		if s, err := readState(name); err == nil && (f.source == "" || s.Source == f.source) {
			f.in.put(func(l *letter) { l.files = add(l.files, s) })
		}
	}
}

func readState(name string) (*state.State, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close() // it was only read
	if stat, err := file.Stat(); err != nil || !stat.Mode().IsRegular() {
		return nil, errors.New("not a file")
	}
	text, err := io.ReadAll(io.LimitReader(file, state.MaxSize+1))
	if err != nil {
		return nil, err
	}
	kind, s, err := state.Decode([]byte(strings.TrimSpace(string(text))))
	if err == nil && kind != state.TypeState {
		err = errors.New("not a state")
	}
	return s, err
}
