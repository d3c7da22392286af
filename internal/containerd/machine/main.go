// Machine is process 1 of a machine of the tests: "machine DIR" is started in
// new PID, mount, network, IPC and UTS namespaces, and gives them what a machine
// has after it was switched on: a /proc of its own, an empty /run, DIR/var-lib as
// /var/lib, the boot ID in DIR/boot-id, a loopback that is up.
//
// Then it says "ready" and reaps what nobody else does, until its standard input
// ends: that happens also when the test's process is killed. With process 1 the
// kernel ends every other process of the machine; with them its mounts, network
// namespaces and interfaces are gone.
package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 2 || os.Getpid() != 1 {
		fail(fmt.Errorf("want one directory, and to be process 1 of a PID namespace"))
	}
	if err := setUp(os.Args[1]); err != nil {
		fail(err)
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	fmt.Println("ready")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // whatever ended it, it is over
		os.Exit(0)
	}()
	for range children {
		for {
			if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "machine:", err)
	os.Exit(1)
}

func setUp(dir string) error {
	for _, m := range []struct {
		from, to, kind string
		flags          uintptr
	}{
		// Nothing that is mounted from here on is seen outside.
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"run", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV},
		{filepath.Join(dir, "var-lib"), "/var/lib", "", unix.MS_BIND},
		{filepath.Join(dir, "boot-id"), "/proc/sys/kernel/random/boot_id", "", unix.MS_BIND},
	} {
		if err := unix.Mount(m.from, m.to, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mounting %q on %s: %w; this needs root", m.from, m.to, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("finding lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("setting lo up: %w", err)
	}
	return nil
}
