package etcdcluster

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// startTimeout is how long a member may take until it answers.
const startTimeout = 30 * time.Second

// Options say how a cluster runs.
type Options struct {
	Dir     string // where members keep their data and logs; made if it is absent
	Members int    // 0: 3
	Token   string // initial cluster token; empty: a random one

	// Ticks. 0: 50 and 500 ms, short enough for tests. etcd's own defaults are
	// 100 ms and 1 s.
	Heartbeat, Election time.Duration

	Quota         int64  // bytes of the backend; 0: etcd's default
	SnapshotCount uint64 // 0: etcd's default. A member further behind gets a snapshot
	NoFsync       bool   // faster, and nothing that SlowDisk could slow down
	TLS           *TLS   // nil: plaintext
	ClientLinks   bool   // lead clients through forwarders
	Args          []string
	Log           io.Writer // also gets what the members log (warnings and worse); may be nil
}

// TLS are a server's files, which members use towards clients, whom they ask for
// a certificate, and towards each other. etcd reads certificate and key at each
// handshake, and CAFile when it starts. The certificate must be one for 127.0.0.1
// and for both sides.
type TLS struct{ CAFile, CertFile, KeyFile string }

// Cluster is a cluster that runs. Its methods may be called from several
// goroutines, but for one member by one at a time.
type Cluster struct {
	o       Options
	n       *network
	members []*member
}

// member is one member, whether its process runs or not.
type member struct {
	name         string
	client, peer string       // host:port where it listens
	hold         []*os.File   // these ports
	front        []*forwarder // peers', and clients' where they have one
	delay        atomic.Int64
	synced       atomic.Int64

	mu      sync.Mutex
	process *exec.Cmd // nil: killed or stopped
	exited  chan struct{}
	disk    *disk
	id      uint64
}

// Start starts a cluster and waits until all members answer.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if o.Dir == "" {
		return nil, errors.New("etcd cluster: no directory given")
	}
	if o.Members == 0 {
		o.Members = 3
	}
	if o.Token == "" {
		o.Token = rand.Text()
	}
	if o.Heartbeat == 0 {
		o.Heartbeat = 50 * time.Millisecond
	}
	if o.Election == 0 {
		o.Election = 10 * o.Heartbeat
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("etcd cluster: %w", err)
	}
	c := &Cluster{o: o, n: newNetwork(o.Members)}
	if err := c.start(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("etcd cluster: %w", err)
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	for i := range c.o.Members {
		c.members = append(c.members, &member{name: fmt.Sprint("m", i+1)})
	}
	// From here on there may be callers.
	for i, m := range c.members {
		for _, addr := range []*string{&m.client, &m.peer} {
			f, err := holdPort(addr)
			if err != nil {
				return fmt.Errorf("finding a free port: %w", err)
			}
			m.hold = append(m.hold, f)
		}
		f, err := forward(c.n, i, m.peer, c.caller)
		if err != nil {
			return err
		}
		m.front = append(m.front, f)
		if c.o.ClientLinks {
			if f, err = forward(c.n, i, m.client, func(net.Conn) int { return c.o.Members }); err != nil {
				return err
			}
			m.front = append(m.front, f)
		}
	}
	for i := range c.members {
		if err := c.Restart(i); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return c.Wait(ctx)
}

// holdPort binds a free port without listening on it. The member shares it
// (SO_REUSEPORT); while it is stopped, nobody else is given the port and
// connections to it are refused.
func holdPort(addr *string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "held port")
	if err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)); err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		f.Close()
		return nil, os.NewSyscallError("getsockname", err)
	}
	in, ok := sa.(*unix.SockaddrInet4)
	if !ok {
		f.Close()
		return nil, fmt.Errorf("%T is no IPv4 address", sa)
	}
	*addr = fmt.Sprintf("127.0.0.1:%d", in.Port)
	return f, nil
}

// caller is which member a connection comes from, -1 where none does.
func (c *Cluster) caller(conn net.Conn) int {
	socket := inode(conn)
	if socket == "" || socket == "0" {
		return -1
	}
	for i, m := range c.members {
		if p := m.running(); p != nil && has(p.Process.Pid, socket) {
			return i
		}
	}
	return -1
}

func (m *member) running() *exec.Cmd {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process
}

// Members is how many members there are.
func (c *Cluster) Members() int { return len(c.members) }

// Endpoints are the URLs for clients, one for each member, in order.
func (c *Cluster) Endpoints() []string {
	var out []string
	for _, m := range c.members {
		addr := m.client
		if len(m.front) > 1 {
			addr = m.front[1].Addr().String()
		}
		out = append(out, c.url(addr))
	}
	return out
}

// Direct is member i's URL for clients without any forwarder in front of it: it
// answers also where CutClients keeps clients away.
func (c *Cluster) Direct(i int) string { return c.url(c.members[i].client) }

func (c *Cluster) url(addr string) string {
	if c.o.TLS != nil {
		return "https://" + addr
	}
	return "http://" + addr
}

// Dir is member i's data directory.
func (c *Cluster) Dir(i int) string { return filepath.Join(c.o.Dir, c.members[i].name) }

// LogFile is where member i logs warnings and worse.
func (c *Cluster) LogFile(i int) string { return c.Dir(i) + ".log" }

// Pid is that of member i's process, 0 where it does not run.
func (c *Cluster) Pid(i int) int {
	if p := c.members[i].running(); p != nil {
		return p.Process.Pid
	}
	return 0
}

// Config is what a client of these endpoints needs, with the members' own
// certificate where they speak TLS.
func (c *Cluster) Config(endpoints ...string) (clientv3.Config, error) {
	cfg := clientv3.Config{Endpoints: endpoints, DialTimeout: startTimeout, Logger: zap.NewNop()}
	if t := c.o.TLS; t != nil {
		var err error
		var out *tls.Config
		if out, err = (transport.TLSInfo{TrustedCAFile: t.CAFile, CertFile: t.CertFile, KeyFile: t.KeyFile}).ClientConfig(); err != nil {
			return cfg, fmt.Errorf("etcd cluster: %w", err)
		}
		cfg.TLS = out
	}
	return cfg, nil
}

func (c *Cluster) args(i int) []string {
	m := c.members[i]
	var initial []string
	for _, x := range c.members {
		initial = append(initial, x.name+"="+c.url(x.front[0].Addr().String()))
	}
	args := []string{
		"--name=" + m.name, "--data-dir=" + c.Dir(i),
		"--listen-client-urls=" + c.url(m.client), "--advertise-client-urls=" + c.Endpoints()[i],
		"--listen-peer-urls=" + c.url(m.peer), "--initial-advertise-peer-urls=" + c.url(m.front[0].Addr().String()),
		"--initial-cluster=" + strings.Join(initial, ","), "--initial-cluster-token=" + c.o.Token,
		fmt.Sprintf("--heartbeat-interval=%d", c.o.Heartbeat.Milliseconds()), fmt.Sprintf("--election-timeout=%d", c.o.Election.Milliseconds()),
		"--socket-reuse-port=true", "--log-level=warn", "--log-outputs=stderr",
	}
	if c.o.Quota > 0 {
		args = append(args, fmt.Sprintf("--quota-backend-bytes=%d", c.o.Quota))
	}
	if c.o.SnapshotCount > 0 {
		args = append(args, fmt.Sprintf("--snapshot-count=%d", c.o.SnapshotCount))
	}
	if c.o.NoFsync {
		args = append(args, "--unsafe-no-fsync")
	}
	if t := c.o.TLS; t != nil {
		args = append(args,
			"--trusted-ca-file="+t.CAFile, "--cert-file="+t.CertFile, "--key-file="+t.KeyFile, "--client-cert-auth",
			"--peer-trusted-ca-file="+t.CAFile, "--peer-cert-file="+t.CertFile, "--peer-key-file="+t.KeyFile, "--peer-client-cert-auth")
	}
	return append(args, c.o.Args...)
}

// Restart starts member i on its data; one that runs is killed first. It does
// not wait for it: see Wait.
func (c *Cluster) Restart(i int) error {
	c.Kill(i)
	m := c.members[i]
	log, err := os.OpenFile(c.LogFile(i), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("member %s: %w", m.name, err)
	}
	defer log.Close()
	ours, theirs, err := socketpair()
	if err != nil {
		return fmt.Errorf("member %s: %w", m.name, err)
	}
	defer ours.Close()
	cmd := exec.Command("/proc/self/exe", c.args(i)...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "ETCD_") }), memberEnv+"=1")
	cmd.ExtraFiles = []*os.File{theirs} // listenerFD
	cmd.Stdout, cmd.Stderr = log, log
	if c.o.Log != nil {
		cmd.Stdout = io.MultiWriter(log, c.o.Log)
		cmd.Stderr = cmd.Stdout
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = Spawn(cmd)
	theirs.Close()
	if err != nil {
		return fmt.Errorf("member %s: %w", m.name, err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(exited)
	}()
	m.mu.Lock()
	m.process, m.exited = cmd, exited
	m.mu.Unlock()
	d, err := newDisk(ours, &m.delay, &m.synced)
	if err != nil && !errors.Is(err, errNotSlowable) {
		c.Kill(i)
		return fmt.Errorf("member %s: %w", m.name, c.logged(i, err))
	}
	m.mu.Lock()
	m.disk = d
	m.mu.Unlock()
	return nil
}

// Spawn starts a process that is killed when this one ends, however it does. The
// kernel sends the signal when the thread ends that made the process, so there is
// one that never does.
func Spawn(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	spawner.Do(func() {
		go func() {
			runtime.LockOSThread()
			for s := range spawns {
				s.err <- s.cmd.Start()
			}
		}()
	})
	s := start{cmd, make(chan error)}
	spawns <- s
	return <-s.err
}

type start struct {
	cmd *exec.Cmd
	err chan error
}

var (
	spawner sync.Once
	spawns  = make(chan start)
)

// logged adds the end of a member's log to an error.
func (c *Cluster) logged(i int, err error) error {
	b, rerr := os.ReadFile(c.LogFile(i))
	if rerr != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	// Of a panic what was logged before says more than the stack.
	if said := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !strings.HasPrefix(l, "{") }); len(said) > 0 {
		lines = said
	}
	return fmt.Errorf("%w; its log ends:\n%s", err, strings.Join(lines[max(0, len(lines)-10):], "\n"))
}

// Wait waits until each member that runs serves and follows a leader; one that is
// paused or cut off does not. It fails where one has ended by itself.
func (c *Cluster) Wait(ctx context.Context) error {
	for i, m := range c.members {
		for {
			m.mu.Lock()
			runs, exited := m.process != nil, m.exited
			m.mu.Unlock()
			if !runs {
				break
			}
			select {
			case <-exited:
				if m.running() == nil {
					continue // killed meanwhile
				}
				return fmt.Errorf("member %s: %w", m.name, c.logged(i, errors.New("it ended by itself")))
			default:
			}
			st, err := c.status(ctx, i)
			if err == nil && st.Leader != 0 {
				break
			}
			if ctx.Err() != nil {
				if err == nil {
					err = errors.New("it knows of no leader")
				}
				return fmt.Errorf("member %s does not serve: %w", m.name, c.logged(i, err))
			}
			_ = sleep(ctx, 20*time.Millisecond)
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// status asks a member about itself. The answer needs no leader and no quorum.
func (c *Cluster) status(ctx context.Context, i int) (*clientv3.StatusResponse, error) {
	cfg, err := c.Config(c.Direct(i))
	if err != nil {
		return nil, err
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	st, err := client.Status(ctx, c.Direct(i))
	if err != nil {
		return nil, err
	}
	m := c.members[i]
	m.mu.Lock()
	m.id = st.Header.MemberId
	m.mu.Unlock()
	return st, nil
}

// Status is what member i says of itself: revision, size, term, leader.
func (c *Cluster) Status(ctx context.Context, i int) (*clientv3.StatusResponse, error) {
	st, err := c.status(ctx, i)
	if err != nil {
		return nil, fmt.Errorf("member %s: %w", c.members[i].name, err)
	}
	return st, nil
}

// Leader is the member that leads a majority: a leader that was cut off may take
// itself for one a while longer. It waits until there is one.
func (c *Cluster) Leader(ctx context.Context) (int, error) {
	for {
		answers := make([]*clientv3.StatusResponse, len(c.members))
		var wg sync.WaitGroup
		for i, m := range c.members {
			if m.running() != nil {
				wg.Go(func() { answers[i], _ = c.status(ctx, i) })
			}
		}
		wg.Wait()
		votes := map[uint64]int{} // of those who are at the highest term
		var term uint64
		for _, st := range answers {
			if st != nil && st.RaftTerm > term {
				term = st.RaftTerm
				clear(votes)
			}
			if st != nil && st.RaftTerm == term {
				votes[st.Leader]++
			}
		}
		for i, st := range answers {
			if st != nil && st.RaftTerm == term && st.Leader == st.Header.MemberId && votes[st.Leader] > len(c.members)/2 {
				return i, nil
			}
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return -1, fmt.Errorf("etcd cluster: no member leads a majority: %w", err)
		}
	}
}

// Kill ends member i at once, as the loss of its machine but for what the
// system's cache still holds. Killing it twice is fine.
func (c *Cluster) Kill(i int) { c.end(i, syscall.SIGKILL) }

// Stop ends member i in order.
func (c *Cluster) Stop(i int) { c.end(i, syscall.SIGTERM) }

func (c *Cluster) end(i int, with syscall.Signal) {
	m := c.members[i]
	m.mu.Lock()
	p, exited, d := m.process, m.exited, m.disk
	m.process, m.disk = nil, nil
	m.mu.Unlock()
	if p == nil {
		return
	}
	_ = p.Process.Signal(with) // it may have ended
	t := time.NewTimer(10 * time.Second)
	defer t.Stop()
	select {
	case <-exited:
	case <-t.C:
		_ = p.Process.Kill()
		<-exited
	}
	if d != nil {
		d.close()
	}
}

// Pause stops member i without ending it: its connections stay, and say nothing.
func (c *Cluster) Pause(i int) error { return c.signal(i, syscall.SIGSTOP) }

// Resume ends Pause.
func (c *Cluster) Resume(i int) error { return c.signal(i, syscall.SIGCONT) }

func (c *Cluster) signal(i int, s syscall.Signal) error {
	p := c.members[i].running()
	if p == nil {
		return fmt.Errorf("member %s does not run", c.members[i].name)
	}
	if err := p.Process.Signal(s); err != nil {
		return fmt.Errorf("member %s: %w", c.members[i].name, err)
	}
	return nil
}

// Cut cuts member i off from the other members, in both directions.
func (c *Cluster) Cut(i int) { c.peers(i, func(l *link) { l.cut = true }) }

// Delay delays what passes between member i and the others, by d each way.
func (c *Cluster) Delay(i int, d time.Duration) { c.peers(i, func(l *link) { l.delay = d }) }

// CutLink cuts one direction of one link only.
func (c *Cluster) CutLink(from, to int) {
	c.n.change(func(links [][]link) { links[from][to].cut = true })
}

// CutClients keeps clients from member i; ClientLinks must be set.
func (c *Cluster) CutClients(i int) {
	c.n.change(func(links [][]link) {
		last := len(links) - 1
		links[i][last].cut, links[last][i].cut = true, true
	})
}

// Heal ends all that Cut, CutLink, CutClients, Delay and DelayClients did to
// member i.
func (c *Cluster) Heal(i int) {
	c.n.change(func(links [][]link) {
		for j := range links {
			links[i][j], links[j][i] = link{}, link{}
		}
	})
}

func (c *Cluster) peers(i int, f func(*link)) {
	c.n.change(func(links [][]link) {
		for j := range c.members {
			if j != i {
				f(&links[i][j])
				f(&links[j][i])
			}
		}
	})
}

// SlowDisk makes each fsync and fdatasync of member i take d longer, also after
// a restart; 0 ends it.
func (c *Cluster) SlowDisk(i int, d time.Duration) error {
	m := c.members[i]
	m.delay.Store(int64(d))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process != nil && m.disk == nil {
		return fmt.Errorf("member %s: %w", m.name, errNotSlowable)
	}
	return nil
}

// Synced is how many times member i has called fsync or fdatasync.
func (c *Cluster) Synced(i int) int64 { return c.members[i].synced.Load() }

// Close kills all members and closes all ports. Their data stays.
func (c *Cluster) Close() {
	for i := range c.members {
		c.Kill(i)
	}
	for _, m := range c.members {
		for _, f := range m.front {
			f.close()
		}
		for _, f := range m.hold {
			f.Close()
		}
	}
}
