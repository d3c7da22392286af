package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// host is a machine as programs see it: its machine ID and its boot ID. It is a
// thread in a mount namespace of its own, which starts the machine's programs;
// with the thread they and the namespace end, however this process does.
type host struct {
	dir    string
	own    bool // machine and boot ID are its own, and not this machine's
	starts chan start
	ended  chan struct{}
}

type start struct {
	cmd *exec.Cmd
	err chan error
}

const bootID = "/proc/sys/kernel/random/boot_id"

// newHost makes a host whose files are below dir.
func newHost(dir string) (*host, error) {
	h := &host{dir: dir, own: os.Geteuid() == 0, starts: make(chan start), ended: make(chan struct{})}
	if h.own {
		if err := os.MkdirAll(filepath.Join(dir, "etc"), 0o755); err != nil {
			return nil, err
		}
		for _, name := range []string{"passwd", "group", "hosts", "resolv.conf", "nsswitch.conf"} {
			if b, err := os.ReadFile(filepath.Join("/etc", name)); err == nil {
				if err := os.WriteFile(filepath.Join(dir, "etc", name), b, 0o644); err != nil {
					return nil, err
				}
			}
		}
		if err := h.identify("none", "none"); err != nil {
			return nil, err
		}
	}
	ready := make(chan error)
	go h.loop(ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("a mount namespace for a machine: %w", err)
	}
	return h, nil
}

func (h *host) loop(ready chan<- error) {
	defer close(h.ended)
	runtime.LockOSThread() // for good: the thread ends with this goroutine
	if h.own {
		err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS)
		if err == nil {
			err = errors.Join(
				unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount(filepath.Join(h.dir, "boot"), bootID, "", unix.MS_BIND, ""),
				unix.Mount(filepath.Join(h.dir, "etc"), "/etc", "", unix.MS_BIND, ""))
		}
		if err != nil {
			ready <- err
			return
		}
	}
	ready <- nil
	for s := range h.starts {
		s.err <- s.cmd.Start()
	}
}

// identify sets the machine's ID and boot ID. Nothing may run on it.
func (h *host) identify(machine, boot string) error {
	if !h.own {
		return nil
	}
	return errors.Join(
		os.WriteFile(filepath.Join(h.dir, "etc", "machine-id"), []byte(machine+"\n"), 0o644),
		os.WriteFile(filepath.Join(h.dir, "boot"), []byte(boot+"\n"), 0o644))
}

// start starts a program on the host.
func (h *host) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr.Setpgid = true // an interrupt from the terminal is for us
	s := start{cmd, make(chan error)}
	h.starts <- s
	return <-s.err
}

// close ends the host and all that runs on it.
func (h *host) close() {
	close(h.starts)
	<-h.ended
}
