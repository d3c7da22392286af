// Package etcdmember runs one etcd member inside this process: the store of
// the lab and of the tests. It guarantees that
//
//   - Start returns when the member answers, or fails and leaves nothing running;
//   - it listens on loopback unless told otherwise, and keeps its port (also one
//     that was chosen for it) over Stop and Restart;
//   - Stop returns when the member has let go of its data directory.
//
// What can fail: the port is taken, the directory is not writable or belongs to
// another member. It is no way to run etcd for a cluster: one member has no
// quorum to lose and no copy to fall back on.
//
// It imports etcd's server and nothing of this project.
package etcdmember

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// The member's name and peer address, for who restores a snapshot by other means
// than Restore. Nobody joins it, so they are constant; with the token they decide
// etcd's cluster ID.
const (
	Name    = "lab"
	PeerURL = "http://127.0.0.1:0"
)

// startTimeout is how long a member may take until it answers.
const startTimeout = 30 * time.Second

// Options say how a member runs.
type Options struct {
	Dir     string // data directory, made if it is absent
	Listen  string // host:port; empty or port 0: a port of 127.0.0.1 that is free
	Token   string // initial cluster token; empty: etcd's default
	NoFsync bool   // faster, and loses data with the power
	Quota   int64  // bytes of the backend; 0: etcd's default
	TLS     *TLS   // nil: plaintext
}

// TLS are the files of a member that asks each client for a certificate.
type TLS struct{ CAFile, CertFile, KeyFile string }

// Member is a member that runs, or ran and can be restarted.
type Member struct {
	opts   Options
	listen string // host:port with the port that was found
	hold   *os.File
	etcd   *embed.Etcd
}

// Start starts a member in o.Dir and waits until it answers.
func Start(o Options) (*Member, error) {
	if o.Dir == "" {
		return nil, errors.New("etcd member: no data directory given")
	}
	if o.Listen == "" {
		o.Listen = "127.0.0.1:0"
	}
	if o.Token == "" {
		o.Token = "etcd-cluster"
	}
	host, port, err := net.SplitHostPort(o.Listen)
	if err != nil {
		return nil, fmt.Errorf("etcd member: listen address %q: %w; want host:port", o.Listen, err)
	}
	m := &Member{opts: o, listen: o.Listen}
	if port == "0" {
		if m.hold, m.listen, err = holdPort(host); err != nil {
			return nil, fmt.Errorf("etcd member: finding a free port of %s: %w", host, err)
		}
	}
	if err := m.start(); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// holdPort binds a free port without listening on it. The member shares it
// (SO_REUSEPORT); while it is stopped, nobody else is given the port and
// connections to it are refused.
func holdPort(host string) (*os.File, string, error) {
	addr, err := net.ResolveTCPAddr("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, "", err
	}
	if addr.IP == nil {
		return nil, "", errors.New("no host given; want 127.0.0.1 or another address of this machine")
	}
	family, sa := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: [16]byte(addr.IP.To16())})
	if ip4 := addr.IP.To4(); ip4 != nil {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte(ip4)}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, "", os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "held port of "+host)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
		f.Close()
		return nil, "", os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, sa); err != nil {
		f.Close()
		return nil, "", os.NewSyscallError("bind", err)
	}
	if sa, err = unix.Getsockname(fd); err != nil {
		f.Close()
		return nil, "", os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		addr.Port = sa.Port
	case *unix.SockaddrInet6:
		addr.Port = sa.Port
	}
	return f, addr.String(), nil
}

func (m *Member) start() error {
	c := embed.NewConfig()
	c.Name = Name
	c.Dir = m.opts.Dir
	c.InitialClusterToken = m.opts.Token
	c.UnsafeNoFsync = m.opts.NoFsync
	c.QuotaBackendBytes = m.opts.Quota
	c.EnableGRPCGateway = false
	// A single member waits for nobody's vote: short ticks make it ready sooner.
	c.TickMs, c.ElectionMs = 10, 100
	// A slow disk is no news here, and on stderr it would be in the demo's way.
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	// Only a port that we hold is shared: a fixed one that is taken must fail.
	c.SocketOpts.ReusePort = m.hold != nil
	peer, err := url.Parse(PeerURL)
	if err != nil {
		return fmt.Errorf("etcd member: %w", err)
	}
	client, err := url.Parse(m.Endpoint())
	if err != nil {
		return fmt.Errorf("etcd member: listen address %q: %w", m.listen, err)
	}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.InitialCluster = c.InitialClusterFromName(Name)
	if t := m.opts.TLS; t != nil {
		c.ClientTLSInfo = transport.TLSInfo{
			CertFile: t.CertFile, KeyFile: t.KeyFile,
			TrustedCAFile: t.CAFile, ClientCertAuth: true,
		}
	}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return fmt.Errorf("etcd member on %s with data in %s: %w", m.listen, m.opts.Dir, err)
	}
	failed := time.NewTimer(startTimeout)
	defer failed.Stop()
	select {
	case <-e.Server.ReadyNotify():
		m.etcd = e
		return nil
	case err = <-e.Err():
	case <-failed.C:
		err = fmt.Errorf("not ready after %v", startTimeout)
	}
	e.Close()
	return fmt.Errorf("etcd member on %s with data in %s: %w", m.listen, m.opts.Dir, err)
}

// Endpoint is where the member answers, with its scheme.
func (m *Member) Endpoint() string {
	if m.opts.TLS != nil {
		return "https://" + m.listen
	}
	return "http://" + m.listen
}

// Dir is the member's data directory.
func (m *Member) Dir() string { return m.opts.Dir }

// TLS are the files the member uses, nil if it speaks plaintext.
func (m *Member) TLS() *TLS { return m.opts.TLS }

// Token is the cluster token the member was started with.
func (m *Member) Token() string { return m.opts.Token }

// Failed reports what made the member stop by itself. Nothing comes after Stop.
func (m *Member) Failed() <-chan error {
	if m.etcd == nil {
		return nil
	}
	return m.etcd.Err()
}

// Stop stops the member and keeps its data and its port. Open watches get a few
// seconds to end. Stopping twice is fine.
func (m *Member) Stop() {
	if m.etcd != nil {
		m.etcd.Close()
		m.etcd = nil
	}
}

// Restart stops the member if it runs and starts it on the same data and port.
func (m *Member) Restart() error {
	m.Stop()
	return m.start()
}

// Close stops the member and gives up its port. Its data stays.
func (m *Member) Close() {
	m.Stop()
	if m.hold != nil {
		m.hold.Close()
		m.hold = nil
	}
}

// Restore stops the member and starts it again, on the same port, with what is
// in the snapshot file: etcd goes back in time. A new token makes etcd's
// cluster ID another one, as a careful operator would; the same token keeps it.
// The data it had goes to a directory beside it, ending in ".before-N".
func (m *Member) Restore(file, token string) error {
	m.Stop()
	if err := setAside(m.opts.Dir); err != nil {
		return fmt.Errorf("restoring %s: %w", file, err)
	}
	if err := RestoreDir(file, m.opts.Dir, token); err != nil {
		return err
	}
	m.opts.Token = token
	return m.start()
}

func setAside(dir string) error {
	for n := 1; ; n++ {
		to := fmt.Sprintf("%s.before-%d", strings.TrimRight(dir, string(filepath.Separator)), n)
		if _, err := os.Lstat(to); err == nil {
			continue
		} else if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return os.Rename(dir, to)
	}
}

// RestoreDir makes the data directory dir from a snapshot file, as "etcdutl
// snapshot restore" does. Start it with the same token.
func RestoreDir(file, dir, token string) error {
	err := snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
		SnapshotPath:        file,
		Name:                Name,
		OutputDataDir:       dir,
		PeerURLs:            []string{PeerURL},
		InitialCluster:      Name + "=" + PeerURL,
		InitialClusterToken: token,
	})
	if err != nil {
		return fmt.Errorf("restoring %s into %s: %w", file, dir, err)
	}
	return nil
}
