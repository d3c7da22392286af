package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dieWithParent has the kernel send SIGTERM when the process that started us is
// gone, and says whether it is gone already. What is set belongs to the thread,
// so it has to be the first one, which lives as long as the process: call it
// from main.
func dieWithParent() (gone bool, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	parent := os.Getppid()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGTERM), 0, 0, 0); err != nil {
		return false, fmt.Errorf("PR_SET_PDEATHSIG: %w", err)
	}
	return os.Getppid() != parent, nil
}

// readerGone returns when nobody reads from a pipe or terminal any more. We may
// not write for hours, so a failed write does not tell in time.
func readerGone(fd int) {
	for {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, -1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// alarm tells a wall clock's time. Go's timers stand still while the machine
// sleeps, and so would the age of what the bar shows.
type alarm struct {
	C    chan struct{}
	fd   int
	file *os.File
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	a := &alarm{make(chan struct{}, 1), fd, os.NewFile(uintptr(fd), "timer")}
	go a.read()
	return a, nil
}

func (a *alarm) read() {
	var b [8]byte
	for {
		_, err := a.file.Read(b[:])
		// Cancelled is a clock that was set, also by waking up: look at it again.
		if err != nil && !errors.Is(err, unix.ECANCELED) {
			return
		}
		select {
		case a.C <- struct{}{}:
		default:
		}
	}
}

// set has C tell at t, or never where t is zero. The earlier setting is gone,
// what it told may still be in C.
func (a *alarm) set(t time.Time) error {
	var spec unix.ItimerSpec
	if !t.IsZero() {
		spec.Value = unix.NsecToTimespec(max(1, t.UnixNano()))
	}
	err := unix.TimerfdSettime(a.fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &spec, nil)
	if errors.Is(err, unix.ECANCELED) { // the clock was set meanwhile; the timer is set, too
		select {
		case a.C <- struct{}{}:
		default:
		}
		return nil
	}
	return err
}

func (a *alarm) close() { _ = a.file.Close() } // a timer
