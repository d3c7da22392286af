// Package ipctest gives tests a sway that passes ticks on, and that misbehaves
// when told to. It speaks the protocol on its own, so that it does not share the
// mistakes of the client it tests.
//
// It is gone when the test ends.
package ipctest

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Types of messages.
const (
	typeSubscribe = 2
	typeSendTick  = 10
	eventTick     = 0x80000007
	// EventUnknown is an event that clients have never heard of.
	EventUnknown = 0x8000004d
)

// Sway is a sway of which nothing but its ticks works.
type Sway struct {
	Path string

	t        testing.TB
	listener net.Listener
	mu       sync.Mutex
	conns    map[net.Conn]bool // true: subscribed
	mute     bool
	accepted int
	ticks    chan string
	done     sync.WaitGroup
}

// Start starts a sway at a socket in a directory of its own.
func Start(t testing.TB) *Sway {
	t.Helper()
	dir, err := os.MkdirTemp("", "sway") // t.TempDir is too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return StartAt(t, filepath.Join(dir, fmt.Sprintf("sway-ipc.%d.1.sock", os.Getuid())))
}

// StartAt starts a sway at a socket that does not exist.
func StartAt(t testing.TB, path string) *Sway {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &Sway{Path: path, t: t, listener: listener, conns: map[net.Conn]bool{}, ticks: make(chan string, 1<<12)}
	s.done.Go(s.accept)
	t.Cleanup(s.Stop)
	return s
}

// Stop ends the sway and removes its socket. It may be called twice.
func (s *Sway) Stop() {
	_ = s.listener.Close() // twice is an error of no interest
	s.Disconnect()
	s.done.Wait()
}

// Kill ends the sway as kill -9 does: its socket stays.
func (s *Sway) Kill() {
	s.listener.(*net.UnixListener).SetUnlinkOnClose(false)
	s.Stop()
}

// Disconnect ends all connections.
func (s *Sway) Disconnect() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_ = conn.Close() // its reader notices
	}
}

// Mute makes the sway read without answering, until it is called with false.
func (s *Sway) Mute(mute bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mute = mute
}

// Accepted is how many connections there have been.
func (s *Sway) Accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.accepted
}

// Connected is how many connections there are.
func (s *Sway) Connected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Subscribers is how many of them are subscribed to ticks.
func (s *Sway) Subscribers() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, subscribed := range s.conns {
		if subscribed {
			n++
		}
	}
	return n
}

// Ticks are the payloads that clients have sent.
func (s *Sway) Ticks() <-chan string { return s.ticks }

// Tick sends a tick to all subscribers.
func (s *Sway) Tick(payload string) {
	event, err := json.Marshal(map[string]any{"first": false, "payload": payload})
	if err != nil {
		s.t.Error(err)
	}
	s.Event(eventTick, event)
}

// Event sends any event to all subscribers.
func (s *Sway) Event(kind uint32, event []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn, subscribed := range s.conns {
		if subscribed {
			write(conn, kind, event)
		}
	}
}

func (s *Sway) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.accepted++
		s.conns[conn] = false
		s.mu.Unlock()
		s.done.Go(func() { s.serve(conn) })
	}
}

func (s *Sway) serve(conn net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
		_ = conn.Close() // it may be closed already
	}()
	for {
		var head [14]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return
		}
		payload := make([]byte, binary.NativeEndian.Uint32(head[6:]))
		if _, err := io.ReadFull(conn, payload); err != nil {
			return
		}
		s.mu.Lock()
		mute := s.mute
		s.mu.Unlock()
		if mute {
			continue
		}
		kind := binary.NativeEndian.Uint32(head[10:])
		switch kind {
		case typeSubscribe:
			s.mu.Lock()
			write(conn, kind, []byte(`{"success":true}`))
			write(conn, eventTick, []byte(`{"first":true,"payload":""}`))
			s.conns[conn] = true
			s.mu.Unlock()
		case typeSendTick:
			select {
			case s.ticks <- string(payload):
			default: // nobody counts them
			}
			s.Tick(string(payload))
			write(conn, kind, []byte(`{"success":true}`))
		default:
			write(conn, kind, []byte(`{"success":false}`))
		}
	}
}

func write(conn net.Conn, kind uint32, payload []byte) {
	message := append([]byte("i3-ipc"), make([]byte, 8)...)
	binary.NativeEndian.PutUint32(message[6:], uint32(len(payload)))
	binary.NativeEndian.PutUint32(message[10:], kind)
	_, _ = conn.Write(append(message, payload...)) // a client that left is no failure
}
