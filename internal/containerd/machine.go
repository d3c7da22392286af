// Package containerd gives tests a machine with the real containerd on it:
// built from its module, on runc, with its own directories, socket and CNI
// configuration.
//
// It guarantees that
//
//   - a machine has PID, mount, network, IPC and UTS namespaces of its own: what
//     containerd, its shims, runc and CNI plugins do is done in there, at the
//     paths they use by default, and the host sees none of it: no interface, no
//     mount, no file in /run or /var/lib, no rule of a firewall;
//   - whatever ends a machine (the test, PowerOff, a test process that is
//     killed) ends every process on it, as a power cut would;
//   - when a test ends, it has checked that nothing of its machines is left.
//
// What stays over PowerOff and PowerOn is a machine's disk: /var/lib and
// whatever of the host's file system its programs write to. The boot ID is
// another one each time.
//
// It needs root, a kernel with namespaces and cgroups, and runc. What fails
// ends the test with Fatal.
package containerd

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// timeout is for one step: a start, an end, a request.
const timeout = time.Minute

// Machine is a machine that is on, or off and can be switched on.
type Machine struct {
	// Dir is the machine's directory. Programs on the machine see it, too.
	Dir string

	programs *Programs
	cgroup   string
	relays   []string
	cmd      *exec.Cmd // process 1
	stdin    io.Closer
	ns       []namespace
	closers  []io.Closer // of what listens on the machine's loopback
	running  sync.WaitGroup

	containerd *exec.Cmd
	ended      chan struct{} // closed when containerd has ended
	client     *Client
}

type namespace struct {
	kind string
	flag int
	file *os.File
	id   string
}

// New makes a machine and switches it on. The CNI configuration list is the one
// it has; each of relays is a host:port of the host's loopback that answers on
// the machine's, too.
func New(t testing.TB, p *Programs, conflist string, relays ...string) *Machine {
	t.Helper()
	// Not t.TempDir: containerd's socket has to fit into the 107 bytes of a path.
	dir, err := os.MkdirTemp("", "ipam-ledger-machine-")
	if err != nil {
		t.Fatal(err)
	}
	m := &Machine{Dir: dir, programs: p, cgroup: "ipam-ledger-" + strings.ToLower(rand.Text()[:8]), relays: relays}
	if m.client, err = dial(m.Endpoint()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.PowerOff(t)
		m.client.conn.Close()
		if t.Failed() {
			t.Logf("what containerd complained of last:\n%s", tail(m.log(), 30))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for _, d := range []string{"var-lib", "cni/conf", "cni/cache"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.write(t, "cni/conf/10-net.conflist", conflist)
	m.write(t, "containerd.toml", m.config())
	m.PowerOn(t)
	return m
}

func (m *Machine) write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.Dir, file), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// config is what an operator's /etc/containerd/config.toml would be.
func (m *Machine) config() string {
	return fmt.Sprintf(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
  address = %q

[plugins."io.containerd.cri.v1.images"]
  snapshotter = %q
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q

[plugins."io.containerd.cri.v1.runtime"]
  # Of no concern here, and not every machine that runs tests allows it.
  disable_apparmor = true
  restrict_oom_score_adj = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = %q
    use_internal_loopback = true
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = %q
      SystemdCgroup = false
`, m.socket(), snapshotter(m.Dir), image, m.programs.Dir, filepath.Join(m.Dir, "cni/conf"), m.programs.runc)
}

// snapshotter is overlayfs where dir's file system can carry it: an overlay
// itself cannot.
func snapshotter(dir string) string {
	probe := filepath.Join(dir, "probe")
	defer os.RemoveAll(probe)
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if os.MkdirAll(filepath.Join(probe, d), 0o700) != nil {
			return "native"
		}
	}
	options := fmt.Sprintf("lowerdir=%s/lower,upperdir=%s/upper,workdir=%s/work", probe, probe, probe)
	merged := filepath.Join(probe, "merged")
	if unix.Mount("overlay", merged, "overlay", 0, options) != nil {
		return "native"
	}
	if unix.Unmount(merged, unix.MNT_DETACH) != nil {
		return "native"
	}
	return "overlayfs"
}

func (m *Machine) socket() string { return filepath.Join(m.Dir, "containerd.sock") }
func (m *Machine) log() string    { return filepath.Join(m.Dir, "containerd.log") }

// Endpoint is containerd's, as --cri and crictl want it.
func (m *Machine) Endpoint() string { return "unix://" + m.socket() }

// PowerOn switches the machine on. Containerd is not started yet.
func (m *Machine) PowerOn(t testing.TB) {
	t.Helper()
	id := rand.Text()
	m.write(t, "boot-id", strings.ToLower(fmt.Sprintf("%s-%s-%s\n", id[:8], id[8:12], id[12:24])))
	cmd := exec.Command(filepath.Join(m.programs.Dir, "machine"), m.Dir)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("switching on a machine: %v", err)
	}
	m.cmd, m.stdin = cmd, in
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("switching on a machine: %q (%v)", line, err)
	}
	// The mount namespace comes last: after it, paths are the machine's.
	for _, n := range []namespace{{kind: "pid", flag: unix.CLONE_NEWPID}, {kind: "net", flag: unix.CLONE_NEWNET}, {kind: "mnt", flag: unix.CLONE_NEWNS}} {
		path := fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, n.kind)
		if n.id, err = os.Readlink(path); err != nil {
			t.Fatal(err)
		}
		if n.file, err = os.Open(path); err != nil {
			t.Fatal(err)
		}
		m.ns = append(m.ns, n)
	}
	server := &http.Server{Handler: m.programs.registry}
	l := m.listen(t, registryAddr)
	m.running.Go(func() { _ = server.Serve(l) }) // ends when it is closed
	m.closers = append(m.closers, server)
	for _, addr := range m.relays {
		m.closers = append(m.closers, relay(m.listen(t, addr), addr))
	}
}

func (m *Machine) listen(t testing.TB, addr string) (l net.Listener) {
	t.Helper()
	err := m.Do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatalf("listening on %s of the machine: %v", addr, err)
	}
	return l
}

// PowerOff is a power cut: every process of the machine is killed, and its
// memory, mounts and network are gone. Its disk stays. It checks that, and that
// nothing is left outside.
func (m *Machine) PowerOff(t testing.TB) {
	t.Helper()
	if m.cmd == nil {
		return
	}
	_ = m.cmd.Process.Kill() // it may have ended by itself
	for _, c := range m.closers {
		_ = c.Close() // what was served there is lost either way
	}
	m.running.Wait()
	_ = m.cmd.Wait() // says: killed
	_ = m.stdin.Close()
	if m.containerd != nil {
		<-m.ended
	}
	for _, n := range m.ns {
		if who := holders(n.kind, n.id); len(who) > 0 {
			t.Errorf("the machine is off, and its %s namespace is still held by %v", n.kind, who)
		}
		_ = n.file.Close() // not before: its ID would be free for another
	}
	if err := removeCgroups(m.cgroup); err != nil {
		t.Error(err)
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), m.Dir) {
		t.Errorf("mounts below %s are left (%v)", m.Dir, err)
	}
	m.cmd, m.ns, m.closers, m.containerd = nil, nil, nil, nil
}

// holders are the processes that are in a namespace.
func holders(kind, id string) (out []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/task/*/ns/" + kind)
	for _, f := range files {
		if in, err := os.Readlink(f); err == nil && in == id {
			out = append(out, f)
		}
	}
	return out
}

// removeCgroups removes the machine's, of which no process is left.
func removeCgroups(name string) error {
	var errs []error
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		tops, _ := filepath.Glob(pattern + name)
		for _, top := range tops {
			errs = append(errs, removeCgroup(top))
		}
	}
	return errors.Join(errs...)
}

// removeCgroup removes a cgroup and those below it. Its files are the kernel's.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// The kernel may take a moment to count a killed process out.
	for deadline := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("removing cgroup %s: %w", dir, err)
		}
	}
}

// Wipe loses all that the runtime has on disk, while the machine is off or
// containerd is dead: as after a new installation.
func (m *Machine) Wipe(t testing.TB) {
	t.Helper()
	for _, d := range []string{"containerd", "cni"} {
		if err := os.RemoveAll(filepath.Join(m.Dir, "var-lib", d)); err != nil {
			t.Fatal(err)
		}
	}
}

// Do runs f on the machine, on a thread of its own: paths, sockets and the
// programs that f starts are the machine's. f must not start goroutines that
// need to be there.
func (m *Machine) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The runtime cannot end the main thread: it would stay there.
			defer runtime.UnlockOSThread()
			done <- m.Do(f)
			return
		}
		done <- m.enter(f) // the thread is locked, so it ends with the goroutine
	}()
	return <-done
}

func (m *Machine) enter(f func() error) error {
	// The kernel asks for that before it lets a thread into a mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	for _, n := range m.ns {
		if err := unix.Setns(int(n.file.Fd()), n.flag); err != nil {
			return fmt.Errorf("entering the machine's %s namespace: %w", n.kind, err)
		}
	}
	return f()
}

// Start starts a program on the machine; it dies with it.
func (m *Machine) Start(cmd *exec.Cmd) error {
	if err := m.Do(cmd.Start); err != nil {
		return fmt.Errorf("starting %s on the machine: %w", cmd.Path, err)
	}
	return nil
}

// StartContainerd starts containerd and waits until CRI answers and the image is
// there.
func (m *Machine) StartContainerd(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(m.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(m.programs.tools, "containerd"), "--config", filepath.Join(m.Dir, "containerd.toml"))
	cmd.Env = []string{"PATH=" + m.programs.tools + ":" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = log, log
	if err := m.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	m.containerd, m.ended = cmd, ended
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(ended)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	go func() {
		select {
		case <-ended:
			cancel() // nothing will answer
		case <-ctx.Done():
		}
	}()
	if err := m.client.ready(ctx); err != nil {
		t.Fatalf("containerd does not answer: %v\n%s", err, tail(m.log(), 30))
	}
}

// KillContainerd kills containerd alone. Its shims and the pods live on, and so
// do the CNI plugins it is waiting for.
func (m *Machine) KillContainerd(t testing.TB) {
	t.Helper()
	if err := m.containerd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-m.ended
}

// CRI is containerd's interface for a kubelet. It connects anew when containerd
// was started anew.
func (m *Machine) CRI() *Client { return m.client }

// CgroupParent is where the machine's pods belong.
func (m *Machine) CgroupParent() string { return "/" + m.cgroup }

// relay makes addr of the host's loopback answer to l's connections.
func relay(l net.Listener, addr string) io.Closer {
	r := &relaying{l: l, conns: map[net.Conn]bool{}}
	r.all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return // closed
			}
			out, err := net.DialTimeout("tcp", addr, timeout)
			if err != nil {
				// Refused there is refused here, as well as it can be said now.
				_ = in.(*net.TCPConn).SetLinger(0)
				in.Close()
				continue
			}
			r.join(in, out)
			r.join(out, in)
		}
	})
	return r
}

type relaying struct {
	l     net.Listener
	all   sync.WaitGroup
	mu    sync.Mutex
	conns map[net.Conn]bool
	done  bool
}

// join copies from one side to the other until either is closed.
func (r *relaying) join(from, to net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done {
		from.Close()
		return
	}
	r.conns[from] = true
	r.all.Go(func() {
		_, _ = io.Copy(to, from) // whatever ended it, the connection is over
		from.Close()
		to.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.conns, from)
	})
}

// Close ends the listening and all connections.
func (r *relaying) Close() error {
	err := r.l.Close()
	r.mu.Lock()
	r.done = true
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.all.Wait()
	return err
}

// tail is the end of a log, without what is no complaint.
func tail(file string, lines int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := slices.DeleteFunc(strings.SplitAfter(string(b), "\n"), func(line string) bool {
		return strings.Contains(line, " level=info ") || strings.Contains(line, " level=debug ")
	})
	return strings.Join(all[max(0, len(all)-lines):], "")
}
