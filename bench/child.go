package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The program executes itself for what must not share a process with the
// measuring: etcd, and a verify whose memory is to be seen.

const childArg = "child"

// child is the program in its hidden roles.
func child(args []string) int {
	// Ctrl-C goes to the whole terminal group. The parent decides when we end:
	// by closing our stdin, which its death does, too.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if len(args) != 2 {
		fmt.Fprintln(os.Stderr, "bench child: want a role and its argument; this is for bench itself")
		return 2
	}
	var err error
	switch role, arg := args[0], args[1]; role {
	case "etcd":
		err = etcdChild(arg)
	case "export", "etcd-ledger":
		go func() {
			io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is all that matters
			os.Exit(1)
		}()
		err = verifyChild(role, arg)
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench child: %v\n", err)
		return 1
	}
	return 0
}

// etcdChild runs a member until stdin ends.
func etcdChild(arg string) error {
	var o etcdmember.Options
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	m, err := etcdmember.Start(o)
	if err != nil {
		return err
	}
	defer m.Close()
	if _, err := fmt.Println(m.Endpoint()); err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // its end is all that matters
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case err := <-m.Failed():
		return err
	}
}

// self is this program, to be executed in another role.
func self(ctx context.Context, role, arg string) (*exec.Cmd, io.Closer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, nil, fmt.Errorf("finding this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, exe, childArg, role, arg)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	return cmd, stdin, err
}

// etcd is a member in a process of its own.
type etcd struct {
	endpoint string
	dir      string
	cfg      etcdstore.Config
	cmd      *exec.Cmd
	stdin    io.Closer
}

// startEtcd starts a member that answers when this returns. Its end is stop's.
func (b *bench) startEtcd(name string, fsync bool, tls *tlsFiles) (*etcd, error) {
	e := &etcd{dir: filepath.Join(b.dir, name)}
	o := etcdmember.Options{Dir: e.dir, NoFsync: !fsync, Quota: 8 << 30}
	if tls != nil {
		o.TLS = &etcdmember.TLS{CAFile: tls.ca, CertFile: tls.serverCert, KeyFile: tls.serverKey}
	}
	arg, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	// Not ended by the context: the member is to close its files in order.
	if e.cmd, e.stdin, err = self(context.WithoutCancel(b.ctx), "etcd", string(arg)); err != nil {
		return nil, err
	}
	stdout, err := e.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := e.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting etcd: %w", err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("etcd in %s did not start: %w", e.dir, err), e.stop())
	}
	e.endpoint = strings.TrimSpace(line)
	e.cfg = etcdstore.Config{Endpoints: []string{e.endpoint}}
	if tls != nil {
		e.cfg.CAFile, e.cfg.CertFile, e.cfg.KeyFile = tls.ca, tls.clientCert, tls.clientKey
	}
	return e, nil
}

// stop ends the member, and removes its data.
func (e *etcd) stop() error {
	e.stdin.Close()
	slow := time.AfterFunc(20*time.Second, func() { e.cmd.Process.Kill() }) //nolint:errcheck // it may be gone already
	defer slow.Stop()
	err := e.cmd.Wait()
	if err != nil {
		err = fmt.Errorf("etcd in %s: %w", e.dir, err)
	}
	return errors.Join(err, os.RemoveAll(e.dir))
}

// client is a plain client of a member that speaks plaintext. A Store's client
// has one connection, and maintenance calls dial another.
func (e *etcd) client(ctx context.Context) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{Endpoints: e.cfg.Endpoints, Context: ctx, Logger: zap.NewNop()})
}

// verdict is what a verify in another process found.
type verdict struct {
	Seconds  float64
	Entries  int64
	Leased   int64
	Peak     float64 // bytes of memory, at most
	Findings int64
	First    string // finding
	Exit     int
}

// errSlow says that a verify was given up.
var errSlow = errors.New("it takes too long")

// verify verifies a ledger in another process: role export with a path, or
// etcd-ledger with an endpoint.
func (b *bench) verify(role, arg string) (*verdict, error) {
	ctx, cancel := context.WithTimeoutCause(b.ctx, b.patience, errSlow)
	defer cancel()
	cmd, stdin, err := self(ctx, role, arg)
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	out, err := cmd.Output()
	if err != nil {
		if errors.Is(context.Cause(ctx), errSlow) {
			err = errSlow
		}
		return nil, fmt.Errorf("verify of %s: %w", arg, err)
	}
	var v verdict
	if err := json.Unmarshal(out, &v); err != nil {
		return nil, fmt.Errorf("verify of %s: %w", arg, err)
	}
	if v.Exit != audit.ExitVerified {
		return nil, fmt.Errorf("verify of %s exits %d with %d findings, the first: %s", arg, v.Exit, v.Findings, v.First)
	}
	return &v, nil
}

func verifyChild(role, arg string) error {
	start := time.Now()
	v, err := verifyHere(context.Background(), role, etcdstore.Config{Endpoints: []string{arg}}, arg)
	if err != nil {
		return err
	}
	v.Seconds = time.Since(start).Seconds()
	if v.Peak, err = peakMemory(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(v)
}

func verifyHere(ctx context.Context, role string, cfg etcdstore.Config, path string) (*verdict, error) {
	var src audit.Source
	if role == "export" {
		e, err := audit.OpenExport(path)
		if err != nil {
			return nil, err
		}
		defer e.Close()
		src = e
	} else {
		store := etcdstore.New(cfg)
		defer store.Close()
		c, err := store.Client(ctx)
		if err != nil {
			return nil, err
		}
		keys, err := keyspace.New(keyspace.DefaultPrefix)
		if err != nil {
			return nil, err
		}
		if src, err = etcdstore.Open(ctx, c, keys); err != nil {
			return nil, err
		}
	}
	r, err := audit.Verify(ctx, src, audit.Options{})
	if err != nil {
		return nil, err
	}
	v := &verdict{Entries: r.Entries, Leased: r.Leased, Findings: r.FindingCount, Exit: r.ExitCode()}
	if len(r.Findings) > 0 {
		v.First = r.Findings[0].String()
	} else if len(r.Reduced) > 0 {
		v.First = r.Reduced[0]
	}
	return v, nil
}

// checkLedger verifies an etcd that was allocated from.
func (b *bench) checkLedger(e *etcd) error {
	v, err := verifyHere(b.ctx, "etcd-ledger", e.cfg, "")
	if err != nil {
		return err
	}
	if v.Exit != audit.ExitVerified {
		return fmt.Errorf("verify exits %d with %d findings, the first: %s", v.Exit, v.Findings, v.First)
	}
	return nil
}

// peakMemory is the most memory that this process had resident.
func peakMemory() (float64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(v), "kB")), 64)
			return n * 1024, err
		}
	}
	return 0, errors.New("/proc/self/status has no VmHWM")
}
