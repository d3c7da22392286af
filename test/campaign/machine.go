package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// machine is a node: a host, a state directory, a configuration, and the pods
// that its runtime knows.
type machine struct {
	c           *campaign
	name        string
	host        *host
	state, file string
	boots, sets int // how often it was booted and set up

	// A call holds mu for reading, who switches the machine off for writing.
	mu    sync.RWMutex
	off   bool // switched off; the workers wait
	procs processes
	watch *trigger

	pods   []*pod // that the runtime knows; c.book's lock
	ends   bool   // somebody ends all that it has; c.book's lock
	serial int
}

const podsEach = 6

func (c *campaign) newMachine(i int) (*machine, error) {
	m := &machine{c: c, name: fmt.Sprintf("n%02d", i)}
	m.state, m.file = filepath.Join(c.dir, "state", m.name), filepath.Join(c.dir, m.name+".json")
	if err := os.MkdirAll(m.state, 0o700); err != nil {
		return nil, err
	}
	var err error
	if m.host, err = newHost(filepath.Join(c.dir, "host", m.name)); err != nil {
		return nil, err
	}
	// Each node has another member at the head of its list.
	all := c.cluster.Endpoints()
	all = append(all[i%len(all):], all[:i%len(all)]...)
	return m, errors.Join(m.identify(), m.rewatch(), m.configure(m.file, m.state, all))
}

func (m *machine) configure(file, state string, endpoints []string) error {
	b, err := json.Marshal(map[string]any{
		"node": m.name, "stateDir": state, "etcd": map[string]any{"endpoints": endpoints},
		"timeout": callTimeout.String(), "lockTimeout": lockTimeout.String(),
	})
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

func (m *machine) identify() error {
	return m.host.identify(fmt.Sprintf("machine-%s-%d", m.name, m.sets), fmt.Sprintf("boot-%s-%d", m.name, m.boots))
}

func (m *machine) rewatch() error {
	if m.watch != nil {
		m.watch.close()
	}
	var err error
	m.watch, err = watch(m.state, m.c.random("watch", m.name, m.sets))
	return err
}

// The pool: fewer addresses than all nodes' blocks would have, so that nodes
// borrow from each other.
const (
	network   = "net"
	poolSize  = 253
	blockBits = 28
)

func conf(file, more string) string {
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "type": "bridge"%s, "ipam": {"type": "ipam-ledger", "configFile": %q,
		"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]], "blockSize": 16}}`, network, more, file)
}

func (p *pod) args() string {
	s := "IgnoreUnknown=1;K8S_POD_NAMESPACE=campaign;K8S_POD_NAME=" + p.name + ";K8S_POD_UID=" + p.uid
	if p.asked.IsValid() {
		s += ";IP=" + p.asked.String()
	}
	return s
}

func prevResult(ips []netip.Addr) string {
	var out []string
	for _, ip := range ips {
		bits := 24
		if ip.Is6() {
			bits = 64
		}
		out = append(out, fmt.Sprintf(`{"address": "%s/%d"}`, ip, bits))
	}
	return `"prevResult": {"cniVersion": "1.1.0", "ips": [` + strings.Join(out, ", ") + `]}`
}

// worker is a part of a node's kubelet and runtime.
func (m *machine) worker(ctx context.Context, own *rand.Rand) {
	for ctx.Err() == nil {
		m.c.gate.RLock()
		m.mu.RLock()
		worked := false
		if !m.off && ctx.Err() == nil {
			m.act(own)
			worked = true
		}
		m.mu.RUnlock()
		m.c.gate.RUnlock()
		pause := time.Duration(own.Int64N(int64(20 * time.Millisecond)))
		if !worked {
			pause = 50 * time.Millisecond // its machine is off
		}
		sleep(ctx, pause)
	}
}

// act makes one call, as a runtime or a kubelet would.
func (m *machine) act(own *rand.Rand) {
	c := m.c
	p, verb := m.choose(own)
	var k kill
	if own.Float64() < c.killRate() {
		switch own.IntN(3) {
		case 0:
			k.after = 1 + time.Duration(own.Float64()*1.3*float64(c.typical.Load()))
		default:
			k.on = m.watch
		}
	}
	switch verb {
	case "STATUS":
		if own.IntN(3) == 0 { // as if it had not asked for half a minute
			_ = os.Remove(filepath.Join(m.state, "asked"))
		}
		c.judge(verb, m, c.call(m, verb, "", conf(m.file, ""), "", k, own))
	case "GC":
		m.gc(own, k)
	case "ADD":
		m.add(p, own, k)
	case "DEL":
		m.del(p, own, k)
	case "CHECK":
		m.check(p, own, k)
	}
}

// choose draws a pod and what is to be done with it.
func (m *machine) choose(own *rand.Rand) (*pod, string) {
	b := m.c.book
	b.Lock()
	defer b.Unlock()
	var idle, waiting []*pod
	for _, p := range m.pods {
		switch {
		case p.busy:
		case p.phase == live:
			idle = append(idle, p)
		default:
			waiting = append(waiting, p)
		}
	}
	take := func(from []*pod, verb string) (*pod, string) {
		p := from[own.IntN(len(from))]
		p.busy = true
		return p, verb
	}
	if len(waiting) > 0 && own.IntN(4) > 0 {
		p, _ := take(waiting, "")
		if p.phase == adding && own.IntN(2) == 0 {
			return p, "ADD"
		}
		return p, "DEL"
	}
	switch x := own.IntN(100); {
	case x < 4:
		return nil, "STATUS"
	case x < 5:
		return nil, "GC"
	case len(idle) > 0 && x < 9:
		return take(idle, "CHECK")
	case len(idle) > 0 && x < 14:
		return take(idle, "ADD")
	case len(idle) > 0 && (x < 50 || len(m.pods) >= podsEach):
		return take(idle, "DEL")
	case len(m.pods) >= podsEach+3:
		return nil, "STATUS"
	}
	m.serial++
	container := fmt.Sprintf("%s-%06d", m.name, m.serial)
	b.Unlock()
	p := b.add(m, container, fmt.Sprintf("pod-%d", m.serial), "uid-"+container)
	b.Lock()
	if len(b.freed) > 0 && own.IntN(12) == 0 {
		p.asked = b.freed[own.IntN(len(b.freed))]
	}
	m.pods = append(m.pods, p)
	p.busy = true
	return p, "ADD"
}

func (m *machine) rest(p *pod) {
	b := m.c.book
	b.Lock()
	defer b.Unlock()
	p.busy = false
	if p.phase == gone || p.phase == forgotten {
		m.pods = slices.DeleteFunc(m.pods, func(x *pod) bool { return x == p })
	}
}

// add starts a pod, or asks once more for one that runs.
func (m *machine) add(p *pod, own *rand.Rand, k kill) {
	c := m.c
	defer m.rest(p)
	had, end, again := p.ips, p.end, p.phase == live
	if again {
		// An ADD that fails says that the pod has failed.
		c.book.doubt(p, c.now(), live)
	}
	if p.begun < 0 {
		p.begun = c.now()
	}
	r := c.call(m, "ADD", p.container, conf(m.file, ""), p.args(), k, own)
	switch {
	case r.ok():
		m.answered(p, r, had)
		if again {
			c.book.kept(p, end)
		}
	case r.killed:
		c.book.doubt(p, r.began, adding)
	default:
		c.judge("ADD", m, r)
		to := adding
		if own.IntN(2) == 0 || p.asked.IsValid() {
			to = ending
		}
		c.book.doubt(p, r.began, to)
	}
}

func (m *machine) answered(p *pod, r *reply, had []netip.Addr) {
	c := m.c
	c.served(r)
	if other, ip := c.book.tell(p, r); other != nil {
		c.finding("%s: was told %v, which %s on %s has", r.what, ip, other.container, other.m.name)
	}
	if had != nil && !slices.Equal(had, r.ips) {
		c.finding("%s: had %v, and was then told %v", r.what, had, r.ips)
	}
	if p.asked.IsValid() && r.ips[0] != p.asked {
		c.finding("%s: asked for %v, and was told %v", r.what, p.asked, r.ips[0])
	}
	c.mayAllocate(p, r)
}

// del ends a pod.
func (m *machine) del(p *pod, own *rand.Rand, k kill) {
	c := m.c
	defer m.rest(p)
	c.book.doubt(p, c.now(), ending)
	r := c.call(m, "DEL", p.container, conf(m.file, ""), p.args(), k, own)
	switch {
	case r.ok():
		m.deleted(p, r)
	case !r.killed:
		c.judge("DEL", m, r)
	}
}

// deleted takes down that a DEL succeeded: if nothing is queued it is released.
func (m *machine) deleted(p *pod, r *reply) {
	queued := m.queued(p)
	m.c.book.Lock()
	defer m.c.book.Unlock()
	p.phase = gone
	if !queued {
		p.ended = r.ended
	} else {
		m.c.counts.add("DEL", "queued")
	}
}

// check asks whether a pod has what it was told.
func (m *machine) check(p *pod, own *rand.Rand, k kill) {
	c := m.c
	defer m.rest(p)
	c.book.Lock()
	ips := p.ips
	c.book.Unlock()
	if len(ips) == 0 {
		return
	}
	r := c.call(m, "CHECK", p.container, conf(m.file, prevResult(ips)), p.args(), k, own)
	if !r.ok() && !r.killed {
		c.judge("CHECK", m, r)
	}
	if r.ok() {
		c.book.Lock()
		defer c.book.Unlock()
		p.seen = append(p.seen, sighting{r.began, r.ended, ips})
	}
}

// gc gives the plugin the list of what runs. Runtimes do nothing else meanwhile.
func (m *machine) gc(own *rand.Rand, k kill) {
	m.mu.RUnlock()
	defer m.mu.RLock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.off {
		return
	}
	m.c.judge("GC", m, m.callGC(own, k))
}

func (m *machine) callGC(own *rand.Rand, k kill) *reply {
	list := []string{}
	for _, id := range m.containers() {
		list = append(list, fmt.Sprintf(`{"containerID": %q, "ifname": "eth0"}`, id))
	}
	return m.c.call(m, "GC", "", conf(m.file, `"cni.dev/valid-attachments": [`+strings.Join(list, ", ")+`]`), "", k, own)
}

// containers are those that the runtime knows.
func (m *machine) containers() []string {
	m.c.book.Lock()
	defer m.c.book.Unlock()
	var out []string
	for _, p := range m.pods {
		out = append(out, p.container)
	}
	return out
}

// sandboxes is the runtime's list, one ID a line. There is always one without an
// address, as nodes have pods of the host's network.
func (m *machine) sandboxes() string {
	return strings.Join(append(m.containers(), "of-the-host-s-network"), "\n") + "\n"
}

// queued reports whether a release of the pod waits on the node.
func (m *machine) queued(p *pod) bool {
	return m.c.dirOf(m).IsQueued(p.attachment())
}

// files are those of a part of the state directory that count.
func (m *machine) files(patterns ...string) (out []string) {
	for _, p := range patterns {
		names, _ := filepath.Glob(filepath.Join(m.state, p)) // the patterns are ours
		for _, name := range names {
			if st, err := os.Stat(name); err == nil && st.Mode().IsRegular() {
				out = append(out, name)
			}
		}
	}
	return out
}

// powerOff kills what runs on the machine and keeps it off; the caller then owns
// it until powerOn. The pods are gone; with to forgotten, their runtime will not
// remember them.
func (m *machine) powerOff(to phase) (lost []*pod) {
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // also what is only being started
		defer close(done)
		for {
			m.procs.kill()
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	m.mu.Lock()
	close(stop)
	<-done
	m.off = true
	b := m.c.book
	b.Lock()
	lost = slices.Clone(m.pods)
	b.Unlock()
	for _, p := range lost {
		b.doubt(p, m.c.now(), to)
	}
	if to == forgotten {
		b.Lock()
		m.pods = nil
		b.Unlock()
	}
	return lost
}

// boot starts the machine anew; powerOn lets its workers work again.
func (m *machine) boot() {
	m.boots++
	if err := m.identify(); err != nil {
		m.c.finding("%s: %v", m.name, err)
	}
}

func (m *machine) powerOn() {
	m.off = false
	m.mu.Unlock()
}

// acts runs the command as this node on this machine.
func (m *machine) acts(ctx context.Context, k kill, stdin string, args ...string) *reply {
	return m.c.read(m.host, m.c.ledger(ctx, m, args...), k, stdin, &m.procs)
}

// copyDir copies a directory on which nothing works.
func copyDir(from, to string) error {
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying %s: %w: %s", from, err, out)
	}
	return nil
}

// sleep waits, unless the campaign ends before.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// usage is what a directory has.
func usage(dir string) (files int, bytes int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // a file that goes meanwhile counts for nothing
		}
		if st, err := d.Info(); err == nil {
			files++
			bytes += st.Size()
		}
		return nil
	})
	return files, bytes
}
