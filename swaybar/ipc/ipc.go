// Package ipc sends and receives ticks, the messages that sway passes on to
// whoever asked for them.
//
//	for _, path := range ipc.Sockets() {
//		bus := ipc.Open(path)
//		go bus.Ticks(ctx, onTick)
//		bus.Send(ctx, payload)
//	}
//
// # Guarantees
//
// Each call has a connection of its own, which is closed when the call returns,
// whatever happened; a call that fails leaves nothing behind that a later call
// could read. Send ends within SendTimeout. Ticks is told by its first call of
// onTick that it is connected, and ends where sway does not answer within
// AnswerTimeout. One Bus may be used from many goroutines, and one process may
// use many.
//
// # What can fail
//
// Ticks are lossy: sway drops a subscriber that reads too slowly, and tells
// nobody of a tick that was sent while he was away. A subscriber that hears
// nothing can not tell silence from a broken stream, so he should expect a
// heartbeat and start anew without it. Nothing is tried again here.
//
// Every program in the session may send any tick: payloads are untrusted.
//
// The protocol is spoken by go-sway, whose habits shape the code: a call that
// timed out leaves its reply to be read by the next (so no connection is used
// twice), a subscription leaks its socket unless its context ends (so each has
// one), an event that it does not know breaks the stream (so we ask for ticks
// alone), and the socket of a subscription can be named by $SWAYSOCK only (see
// subscribe).
package ipc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/joshuarubin/go-sway"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

const (
	// SendTimeout is how long Send takes at most.
	SendTimeout = 2 * time.Second
	// AnswerTimeout is how long Ticks waits for sway's answer.
	AnswerTimeout = 5 * time.Second
	// MaxPayload is the most bytes that Send sends. Sway never delivers a message
	// that does not fit its socket's buffer, and burns CPU until its sender leaves.
	MaxPayload = state.MaxSize
)

// ErrNoAnswer is a sway that accepts connections but does not answer.
var ErrNoAnswer = errors.New("no answer")

// Bus is a sway that passes ticks on.
type Bus interface {
	// Ticks calls onTick for each tick until the connection or the context ends,
	// which is always an error. The first call has a nil payload and says: connected;
	// later ones have at least one byte. Calls come one after the other, and while
	// one runs nothing is read: onTick must not block.
	Ticks(ctx context.Context, onTick func(payload []byte)) error
	// Send sends one tick to all subscribers, this process's own included.
	Send(ctx context.Context, payload []byte) error
	// Path is the socket.
	Path() string
}

// Sway is the Bus at a socket.
type Sway struct{ path string }

// Open returns the Bus at a socket, without connecting.
func Open(path string) *Sway { return &Sway{path} }

// Path is the socket.
func (s *Sway) Path() string { return s.path }

// Send sends one tick.
func (s *Sway) Send(ctx context.Context, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("tick of %d bytes: at most %d", len(payload), MaxPayload)
	}
	// The end of this context closes the connection.
	ctx, cancel := context.WithTimeout(ctx, SendTimeout)
	defer cancel()
	client, err := sway.New(ctx, sway.WithSocketPath(s.path))
	if err != nil {
		return fmt.Errorf("sway at %s: %w", s.path, err)
	}
	reply, err := client.SendTick(ctx, string(payload))
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("sway at %s: tick: %w within %s", s.path, ErrNoAnswer, SendTimeout)
	case err != nil:
		return fmt.Errorf("sway at %s: tick: %w", s.path, err)
	case !reply.Success:
		return fmt.Errorf("sway at %s: tick refused", s.path)
	}
	return nil
}

// Ticks subscribes to ticks.
func (s *Sway) Ticks(ctx context.Context, onTick func(payload []byte)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	unanswered := time.AfterFunc(AnswerTimeout, func() { cancel(ErrNoAnswer) })
	defer unanswered.Stop()

	err := subscribe(ctx, s.path, &handler{
		EventHandler: sway.NoOpEventHandler(),
		tick: func(e sway.TickEvent) {
			switch {
			case e.First:
				unanswered.Stop()
				onTick(nil)
			case e.Payload != "":
				onTick([]byte(e.Payload))
			}
		},
	})
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("sway at %s: %w", s.path, err)
}

type handler struct {
	sway.EventHandler
	tick func(sway.TickEvent)
}

func (h *handler) Tick(_ context.Context, e sway.TickEvent) { h.tick(e) }

// environment is held while $SWAYSOCK is not what the process was started with.
var environment sync.Mutex

// subscribe calls sway.Subscribe for a given socket. That reads the socket's
// path from $SWAYSOCK and nowhere else, so the variable is set, under a lock,
// until it has been read. When that is, the context tells: the first thing done
// to it is dialling, right after.
func subscribe(ctx context.Context, path string, h sway.EventHandler) error {
	environment.Lock()
	before, was := os.LookupEnv("SWAYSOCK")
	if err := os.Setenv("SWAYSOCK", path); err != nil {
		environment.Unlock()
		return fmt.Errorf("set $SWAYSOCK: %w", err)
	}
	restore := sync.OnceFunc(func() {
		if was {
			_ = os.Setenv("SWAYSOCK", before) // it was set before
		} else {
			_ = os.Unsetenv("SWAYSOCK")
		}
		environment.Unlock()
	})
	defer restore()
	return sway.Subscribe(&noticing{ctx, restore}, h, sway.EventTypeTick)
}

// noticing is a context that says when it is used.
type noticing struct {
	context.Context
	used func()
}

func (n *noticing) Deadline() (time.Time, bool) { n.used(); return n.Context.Deadline() }
func (n *noticing) Done() <-chan struct{}       { n.used(); return n.Context.Done() }
func (n *noticing) Err() error                  { n.used(); return n.Context.Err() }
func (n *noticing) Value(key any) any           { n.used(); return n.Context.Value(key) }

// Sockets lists the sockets of this user's sways that accept connections:
// $SWAYSOCK first, then the others in $XDG_RUNTIME_DIR, the newest first. A sway
// that was killed leaves its socket behind, so each is dialled.
func Sockets() []string {
	environment.Lock()
	own := strings.TrimSpace(os.Getenv("SWAYSOCK"))
	environment.Unlock()

	type socket struct {
		path string
		stat os.FileInfo
	}
	var all []socket
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = "/tmp" // as sway does
	}
	entries, _ := os.ReadDir(dir) // none where there is no such directory
	for _, entry := range entries {
		name, ours := strings.CutPrefix(entry.Name(), fmt.Sprintf("sway-ipc.%d.", os.Getuid()))
		if !ours || !strings.HasSuffix(name, ".sock") {
			continue
		}
		path := filepath.Join(dir, entry.Name())
		stat, err := os.Lstat(path)
		if err != nil || stat.Mode().Type() != os.ModeSocket {
			continue
		}
		// In /tmp anybody can make a socket of that name.
		if sys, ok := stat.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Getuid() {
			continue
		}
		all = append(all, socket{path, stat})
	}
	slices.SortFunc(all, func(a, b socket) int { return b.stat.ModTime().Compare(a.stat.ModTime()) })
	if stat, err := os.Stat(own); err == nil {
		all = slices.DeleteFunc(all, func(s socket) bool { return os.SameFile(s.stat, stat) })
		all = slices.Insert(all, 0, socket{own, stat})
	}

	var alive []string
	for _, s := range all {
		conn, err := net.DialTimeout("unix", s.path, 250*time.Millisecond)
		switch {
		case err == nil:
			_ = conn.Close() // nothing was written
		case !errors.Is(err, syscall.EAGAIN): // its queue is full: it is there, and busy
			continue
		}
		alive = append(alive, s.path)
	}
	return alive
}
