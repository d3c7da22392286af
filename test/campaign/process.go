package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	current "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// reply is how a program ended.
type reply struct {
	what           string
	stdout, stderr string
	exit           int
	killed         bool          // by us
	began, ended   time.Duration // since the campaign began
	code           int           // of a CNI error; 0: it succeeded
	said           string        // the error's text
	ips            []netip.Addr
}

func (r *reply) ok() bool { return !r.killed && r.exit == 0 }

// text is what a person reads of it.
func (r *reply) text() string {
	s := r.said
	if s == "" {
		s = strings.TrimSpace(r.stdout + "\n" + r.stderr)
	}
	return fmt.Sprintf("%s (%v to %v): exit status %d, code %d: %s", r.what, r.began.Round(time.Millisecond), r.ended.Round(time.Millisecond), r.exit, r.code, s)
}

// kill says when a process is to be killed: after a while, or when a commit is
// under way. The zero value is never.
type kill struct {
	after time.Duration
	on    *trigger
}

// run runs a program on a host.
func (c *campaign) run(h *host, cmd *exec.Cmd, k kill, lot float64, procs *processes) *reply {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	r := &reply{what: strings.Join(cmd.Args, " "), began: c.now()}
	if err := h.start(cmd); err != nil {
		r.ended, r.exit, r.said = c.now(), -1, "starting it: "+err.Error()
		return r
	}
	if procs != nil {
		procs.add(cmd.Process)
		defer procs.remove(cmd.Process)
	}
	if k.after > 0 {
		defer time.AfterFunc(k.after, func() { _ = cmd.Process.Kill() }).Stop()
	}
	if k.on != nil {
		defer k.on.arm(cmd.Process)()
	}
	if lot > 0 {
		// Looked at once, at some moment of its life.
		at := time.Duration(lot * 1.2 * float64(c.typical.Load()))
		defer time.AfterFunc(at, func() { c.remains.sample(cmd.Process.Pid) }).Stop()
	}
	_ = cmd.Wait() // how it ended is in its state
	ws, _ := cmd.ProcessState.Sys().(syscall.WaitStatus)
	r.ended, r.killed, r.exit = c.now(), ws.Signaled(), cmd.ProcessState.ExitCode()
	r.stdout, r.stderr = stdout.String(), stderr.String()
	if strings.Contains(r.stderr, "panic:") || strings.Contains(r.stderr, "DATA RACE") {
		c.finding("%s panicked:\n%s", r.what, r.stderr)
	}
	return r
}

// processes are those that run on a machine, to be killed with it.
type processes struct {
	sync.Mutex
	all map[*os.Process]bool
}

func (p *processes) add(x *os.Process) {
	p.Lock()
	defer p.Unlock()
	if p.all == nil {
		p.all = map[*os.Process]bool{}
	}
	p.all[x] = true
}

func (p *processes) remove(x *os.Process) {
	p.Lock()
	defer p.Unlock()
	delete(p.all, x)
}

func (p *processes) kill() {
	p.Lock()
	defer p.Unlock()
	for x := range p.all {
		_ = x.Kill() // it may have ended
	}
}

// call executes the plugin as a runtime does.
func (c *campaign) call(m *machine, verb, container, conf, args string, k kill, own *rand.Rand) *reply {
	cmd := exec.Command(filepath.Join(c.programs, "ipam-ledger"))
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + container, "CNI_NETNS=/var/run/netns/" + container,
		"CNI_IFNAME=eth0", "CNI_PATH=" + c.programs, "CNI_NETNS_OVERRIDE=1", "CNI_ARGS=" + args,
	}
	if os.Geteuid() == 0 {
		cmd.Dir = "/"
	}
	cmd.Stdin = strings.NewReader(conf)
	c.slots <- struct{}{}
	r := c.run(m.host, cmd, k, own.Float64(), &m.procs)
	<-c.slots
	r.what = fmt.Sprintf("%s %s on %s", verb, container, m.name)
	if r.killed {
		c.count(verb, "killed")
		return r
	}
	c.typical.Store((c.typical.Load()*15 + int64(r.ended-r.began)) / 16)
	c.reads(verb, r)
	outcome := "ok"
	if r.code != 0 {
		outcome = "code " + strconv.Itoa(r.code)
	}
	c.count(verb, outcome)
	return r
}

// reads reads a plugin's answer: stdout is empty or one document.
func (c *campaign) reads(verb string, r *reply) {
	if r.exit != 0 {
		var f struct {
			Code         int
			Msg, Details string
		}
		if err := json.Unmarshal([]byte(r.stdout), &f); err != nil || f.Code == 0 || f.Msg == "" {
			c.finding("%s: exit status %d and no error on stdout\n%s%s", r.what, r.exit, r.stdout, r.stderr)
		}
		r.code, r.said = f.Code, f.Msg+": "+f.Details
		return
	}
	if verb != "ADD" {
		if strings.TrimSpace(r.stdout) != "" {
			c.finding("%s: stdout is %q", r.what, r.stdout)
		}
		return
	}
	var res current.Result
	if err := json.Unmarshal([]byte(r.stdout), &res); err != nil || res.CNIVersion != "1.1.0" {
		c.finding("%s: no result on stdout: %v\n%s", r.what, err, r.stdout)
		return
	}
	for _, ip := range res.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		r.ips = append(r.ips, a.Unmap())
	}
	if len(r.ips) != 2 || !r.ips[0].Is4() || !r.ips[1].Is6() {
		c.finding("%s: addresses %v, want one of each family", r.what, r.ips)
	}
}

// ledger prepares the command. as is a machine whose node it acts as, or nil.
func (c *campaign) ledger(ctx context.Context, as *machine, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.programs, "ledger"), args...)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LEDGER_OPERATOR_DIR=" + filepath.Join(c.dir, "operator"), "LEDGER_CONFIG=" + filepath.Join(c.dir, "empty.json"),
		"LEDGER_ENDPOINTS=" + strings.Join(c.cluster.Endpoints(), ","),
	}
	if as != nil {
		cmd.Args = append(cmd.Args, "--node", as.name, "--state-dir", as.state)
	}
	return cmd
}

// trigger kills when something happens in a state directory, so that kills also
// fall into the short time in which a commit is under way.
type trigger struct {
	sync.Mutex
	file  *os.File
	armed map[*os.Process]bool
	ended chan struct{}
}

// watch kills whoever is armed, a moment after a commit is about to be sent
// ("open" is written), was noted ("mark" is) or is done.
func watch(dir string, own *rand.Rand) (*trigger, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	t := &trigger{file: os.NewFile(uintptr(fd), "inotify"), armed: map[*os.Process]bool{}, ended: make(chan struct{})}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MODIFY|unix.IN_MOVED_TO); err != nil {
		t.file.Close()
		return nil, fmt.Errorf("watching %s: %w", dir, err)
	}
	go func() {
		defer close(t.ended)
		b := make([]byte, 4096)
		for {
			k, err := t.file.Read(b)
			if err != nil {
				return // closed
			}
			if !bytes.Contains(b[:k], []byte("open\x00")) && !bytes.Contains(b[:k], []byte("mark\x00")) {
				continue
			}
			t.Lock()
			for p := range t.armed {
				time.AfterFunc(time.Duration(own.Int64N(int64(4*time.Millisecond))), func() { _ = p.Kill() })
			}
			clear(t.armed)
			t.Unlock()
		}
	}()
	return t, nil
}

func (t *trigger) arm(p *os.Process) (disarm func()) {
	t.Lock()
	defer t.Unlock()
	t.armed[p] = true
	return func() {
		t.Lock()
		defer t.Unlock()
		delete(t.armed, p)
	}
}

func (t *trigger) close() {
	t.file.Close()
	<-t.ended
}
