package ipc_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc/ipctest"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// listen subscribes until the test ends or stop is called.
func listen(t *testing.T, path string) (ticks <-chan []byte, end <-chan error, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	received, ended := make(chan []byte, 1<<12), make(chan error, 1)
	go func() {
		ended <- ipc.Open(path).Ticks(ctx, func(payload []byte) { received <- payload })
	}()
	select {
	case payload := <-received:
		if payload != nil {
			t.Fatalf("first tick %q: want nil", payload)
		}
	case err := <-ended:
		t.Fatal(err)
	case <-time.After(10 * time.Second):
		t.Fatal("not connected within 10 s")
	}
	return received, ended, cancel
}

func TestTicks(t *testing.T) {
	s := ipctest.Start(t)
	ticks, end, stop := listen(t, s.Path)
	if err := ipc.Open(s.Path).Send(t.Context(), []byte("one")); err != nil {
		t.Fatal(err)
	}
	if got := <-ticks; string(got) != "one" {
		t.Errorf("got %q, want one", got)
	}
	s.Tick("") // somebody else's: nothing in it for us
	s.Tick("two")
	if got := <-ticks; string(got) != "two" {
		t.Errorf("got %q, want two", got)
	}
	stop()
	if err := <-end; !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

func TestEOF(t *testing.T) {
	s := ipctest.Start(t)
	_, end, _ := listen(t, s.Path)
	s.Disconnect()
	if err := <-end; !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want EOF", err)
	}
	s.Stop()
	if err := ipc.Open(s.Path).Ticks(t.Context(), func([]byte) {}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Ticks without a socket: %v", err)
	}
	if err := ipc.Open(s.Path).Send(t.Context(), []byte("x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Send without a socket: %v", err)
	}
}

// A sway that hangs is noticed, and the reply that it owes is not taken for that
// of the next call.
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	s := ipctest.Start(t)
	bus := ipc.Open(s.Path)
	s.Mute(true)
	var done sync.WaitGroup
	done.Go(func() {
		if err := bus.Ticks(t.Context(), func([]byte) {}); !errors.Is(err, ipc.ErrNoAnswer) {
			t.Errorf("Ticks: %v", err)
		}
	})
	if err := bus.Send(t.Context(), []byte("x")); !errors.Is(err, ipc.ErrNoAnswer) {
		t.Errorf("Send: %v", err)
	}
	s.Mute(false)
	if err := bus.Send(t.Context(), []byte("y")); err != nil {
		t.Errorf("Send after one without an answer: %v", err)
	}
	if got := <-s.Ticks(); got != "y" {
		t.Errorf("sent %q, want y", got)
	}
	done.Wait()
	eventually(t, "connections closed", func() bool { return s.Connected() == 0 })
}

func TestSendTooLarge(t *testing.T) {
	s := ipctest.Start(t)
	if err := ipc.Open(s.Path).Send(t.Context(), make([]byte, ipc.MaxPayload+1)); err == nil {
		t.Error("sent")
	}
	if n := s.Accepted(); n != 0 {
		t.Errorf("%d connections", n)
	}
	if err := ipc.Open(s.Path).Send(t.Context(), []byte(strings.Repeat("x", ipc.MaxPayload))); err != nil {
		t.Error(err)
	}
}

// An event that go-sway does not know breaks the stream. What we promise is that
// this stays in one connection, and that the connection can be ended.
func TestUnknownEvent(t *testing.T) {
	s := ipctest.Start(t)
	_, end, stop := listen(t, s.Path)
	s.Event(ipctest.EventUnknown, []byte(`{"change":"x"}`))
	s.Tick("lost")
	stop()
	<-end
	ticks, _, _ := listen(t, s.Path)
	s.Tick("found")
	if got := <-ticks; string(got) != "found" {
		t.Errorf("got %q", got)
	}
}

// Several sways in one process: each subscription reaches its own, although
// go-sway knows $SWAYSOCK only, and the variable is afterwards what it was.
func TestManySways(t *testing.T) {
	t.Setenv("SWAYSOCK", "/before")
	var sways []*ipctest.Sway
	for range 4 {
		sways = append(sways, ipctest.Start(t))
	}
	var done sync.WaitGroup
	for i := range 100 {
		done.Go(func() {
			s := sways[i%len(sways)]
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			bus, want := ipc.Open(s.Path), fmt.Sprint("to ", i)
			err := bus.Ticks(ctx, func(payload []byte) {
				switch string(payload) {
				case "":
					go func() {
						if err := bus.Send(ctx, []byte(want)); err != nil && ctx.Err() == nil {
							t.Error(err)
						}
					}()
				case want:
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if got := os.Getenv("SWAYSOCK"); got != "/before" {
		t.Errorf("SWAYSOCK=%q afterwards", got)
	}
	for _, s := range sways {
		if n := s.Accepted(); n != 50 { // 25 subscriptions, 25 ticks
			t.Errorf("%d connections, want 50", n)
		}
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A thousand reconnects, in each way a connection can end, leave no goroutine
// and no descriptor behind.
func TestNoLeak(t *testing.T) {
	s := ipctest.Start(t)
	bus := ipc.Open(s.Path)
	round := func(i int) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		err := bus.Ticks(ctx, func(payload []byte) {
			if payload != nil {
				return
			}
			switch i % 3 {
			case 0:
				cancel()
			case 1:
				s.Disconnect()
			case 2:
				s.Event(ipctest.EventUnknown, []byte("{}"))
				time.AfterFunc(time.Millisecond, cancel)
			}
		})
		if err == nil {
			t.Fatal("ended without an error")
		}
		if i%5 == 0 {
			if err := bus.Send(t.Context(), []byte("x")); err != nil {
				t.Fatal(err)
			}
			if err := ipc.Open(s.Path+"x").Ticks(t.Context(), func([]byte) {}); err == nil {
				t.Fatal("no socket, and no error")
			}
		}
	}
	round(0)
	settled := func() bool { return s.Connected() == 0 }
	eventually(t, "first round's connections closed", settled)
	goroutines, files := runtime.NumGoroutine(), descriptors(t)
	for i := range 1000 {
		round(i)
	}
	eventually(t, "connections closed", settled)
	eventually(t, "goroutines ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "descriptors closed", func() bool { return descriptors(t) <= files })
}

func TestSockets(t *testing.T) {
	dir, err := os.MkdirTemp("", "run")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	t.Setenv("XDG_RUNTIME_DIR", dir)
	t.Setenv("SWAYSOCK", "")
	if got := ipc.Sockets(); len(got) != 0 {
		t.Errorf("none: %q", got)
	}
	at := func(pid int, age time.Duration) *ipctest.Sway {
		s := ipctest.StartAt(t, filepath.Join(dir, fmt.Sprintf("sway-ipc.%d.%d.sock", os.Getuid(), pid)))
		if err := os.Chtimes(s.Path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
		return s
	}
	old, stale, recent := at(1, time.Hour), at(2, 0), at(3, time.Minute)
	stale.Kill()
	if _, err := os.Stat(stale.Path); err != nil {
		t.Fatal(err)
	}
	ipctest.StartAt(t, filepath.Join(dir, fmt.Sprintf("sway-ipc.%d.4.sock", os.Getuid()+1)))
	if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("sway-ipc.%d.5.sock", os.Getuid())), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(want ...string) {
		t.Helper()
		if got := ipc.Sockets(); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	check(recent.Path, old.Path)
	t.Setenv("SWAYSOCK", " "+old.Path+"\n")
	check(old.Path, recent.Path)
	t.Setenv("SWAYSOCK", stale.Path)
	check(recent.Path, old.Path)
	t.Setenv("SWAYSOCK", filepath.Join(dir, "absent"))
	check(recent.Path, old.Path)
	elsewhere := ipctest.Start(t)
	t.Setenv("SWAYSOCK", elsewhere.Path)
	check(elsewhere.Path, recent.Path, old.Path)
}
