package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	cni "github.com/containernetworking/cni/pkg/types/100"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// What a container runtime sees: a process for each ADD and DEL. Each plugin is
// one node, so that calls at once meet in its lock, as they do in host-local's.

const (
	module    = "github.com/ipam-ledger/ipam-ledger/plugins/ipam-ledger"
	hostLocal = "github.com/containernetworking/plugins/plugins/ipam/host-local"

	// The node holds this many leases before anything is measured. host-local
	// reads its leases one by one, so it never has more than fifty.
	held = 30
	many = 16 // calls at once
)

// subject is a plugin with its configuration.
type subject struct {
	name string
	exe  string
	conf []byte
	etcd *etcd // nil: host-local

	mu   sync.Mutex
	ips  map[netip.Addr]string // who holds what
	dupl int
}

// samples are one number a run.
type samples struct{ add, del, addMany, delMany, start []float64 }

func (b *bench) plugins() (err error) {
	b.note("building the plugins")
	bin := filepath.Join(b.dir, "bin")
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return err
	}
	build := exec.CommandContext(b.ctx, goTool(), "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin+"/", module, hostLocal)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building the plugins: %w: %s", err, out)
	}
	tls, err := makeTLS(b.dir)
	if err != nil {
		return err
	}
	local := &subject{name: "host-local", exe: filepath.Join(bin, "host-local")}
	local.conf = netConf(map[string]any{"type": "host-local", "dataDir": filepath.Join(b.dir, "host-local")})
	subjects := []*subject{local}
	for _, s := range []struct {
		name string
		tls  *tlsFiles
	}{{"plaintext", nil}, {"mTLS", tls}} {
		e, err := b.startEtcd("etcd-"+s.name, false, s.tls)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, e.stop()) }()
		if err := b.initLedger(e); err != nil {
			return err
		}
		sub := &subject{name: "ipam-ledger, " + s.name, exe: filepath.Join(bin, "ipam-ledger"), etcd: e}
		// As on a node: credentials and the node's name are in a file of their own.
		file := filepath.Join(b.dir, s.name+".json")
		settings := map[string]any{"node": "bench", "stateDir": filepath.Join(b.dir, "state-"+s.name), "etcd": etcdSettings(&e.cfg)}
		if err := os.WriteFile(file, mustJSON(settings), 0o600); err != nil {
			return err
		}
		sub.conf = netConf(map[string]any{"type": "ipam-ledger", "configFile": file})
		subjects = append(subjects, sub)
	}
	for _, s := range subjects {
		s.ips = map[netip.Addr]string{}
		for i := range held {
			if _, err := b.call(s, "ADD", fmt.Sprint("held", i)); err != nil {
				return err
			}
		}
	}

	b.note("plugins: %d runs of %d calls and %d times %d at once", b.runs, b.calls, b.bursts, many)
	got := make([]samples, len(subjects))
	for run := range b.runs {
		if err := b.pluginRun(run, subjects, got); err != nil {
			return err
		}
	}
	for _, s := range subjects {
		b.table.duplicates += s.dupl
		if s.etcd == nil {
			continue
		}
		if err := b.checkLedger(s.etcd); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	b.pluginReport(subjects, got)
	return nil
}

// pluginRun takes turns call by call, beginning with another one each time.
func (b *bench) pluginRun(run int, subjects []*subject, got []samples) error {
	turns := func(n int, f func(i, which int) error) error {
		for i := range n {
			for j := range subjects {
				if err := f(i, (i+j)%len(subjects)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	one := func(verb string, into func(*samples) *[]float64) error {
		took := make([][]float64, len(subjects))
		err := turns(b.calls, func(i, which int) error {
			d, err := b.call(subjects[which], verb, fmt.Sprintf("run%d-%d", run, i))
			took[which] = append(took[which], d.Seconds())
			return err
		})
		for i := range subjects {
			p := into(&got[i])
			*p = append(*p, median(took[i]))
		}
		return err
	}
	for _, step := range []struct {
		verb string
		into func(*samples) *[]float64
	}{
		{"VERSION", func(s *samples) *[]float64 { return &s.start }},
		{"ADD", func(s *samples) *[]float64 { return &s.add }},
		{"DEL", func(s *samples) *[]float64 { return &s.del }},
	} {
		if err := one(step.verb, step.into); err != nil {
			return err
		}
	}
	add, del := make([][]float64, len(subjects)), make([][]float64, len(subjects))
	err := turns(b.bursts, func(i, which int) error {
		id := fmt.Sprintf("run%d-burst%d", run, i)
		for _, v := range []struct {
			verb string
			took [][]float64
		}{{"ADD", add}, {"DEL", del}} {
			d, err := b.atOnce(subjects[which], v.verb, id)
			if err != nil {
				return err
			}
			v.took[which] = append(v.took[which], d.Seconds())
		}
		return nil
	})
	for i := range subjects {
		got[i].addMany = append(got[i].addMany, median(add[i]))
		got[i].delMany = append(got[i].delMany, median(del[i]))
	}
	return err
}

// atOnce is the time from the first start to the last end of calls at once.
func (b *bench) atOnce(s *subject, verb, id string) (time.Duration, error) {
	errs := make([]error, many)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range many {
		wg.Go(func() { _, errs[i] = b.call(s, verb, fmt.Sprintf("%s-%d", id, i)) })
	}
	wg.Wait()
	return time.Since(start), errors.Join(errs...)
}

// call executes the plugin as a runtime does and checks what it answers.
func (b *bench) call(s *subject, verb, name string) (time.Duration, error) {
	id := fmt.Sprintf("%064x", name)[:64] // of the length that runtimes use
	cmd := exec.CommandContext(b.ctx, s.exe)
	cmd.Stdin = bytes.NewReader(s.conf)
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_IFNAME=eth0", "CNI_PATH=" + filepath.Dir(s.exe),
		// There is no namespace to enter: this is an IPAM plugin.
		"CNI_NETNS=/proc/self/ns/net", "CNI_NETNS_OVERRIDE=1",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=" + name + ";K8S_POD_UID=6f9d0a0e-5d5b-4f3f-9a9b-0b1f6dd3a8e7",
	}
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if verb == "DEL" {
		s.release(id) // before it is asked for: from then on it may be somebody else's
	}
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil {
		return 0, fmt.Errorf("%s %s %s: %w: %s %s", s.name, verb, name, err, &out, &stderr)
	}
	if verb == "ADD" {
		return took, s.acquired(id, out.Bytes())
	}
	return took, nil
}

func (s *subject) acquired(id string, stdout []byte) error {
	r, err := cni.NewResult(stdout)
	if err != nil {
		return fmt.Errorf("%s ADD: %w", s.name, err)
	}
	res, ok := r.(*cni.Result)
	if !ok || len(res.IPs) != 1 {
		return fmt.Errorf("%s ADD: want one address, got %s", s.name, stdout)
	}
	ip, ok := netip.AddrFromSlice(res.IPs[0].Address.IP)
	if !ok {
		return fmt.Errorf("%s ADD: address %v is none", s.name, res.IPs[0].Address)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, taken := s.ips[ip]; taken {
		s.dupl++
	}
	s.ips[ip] = id
	return nil
}

func (s *subject) release(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ip, holder := range s.ips {
		if holder == id {
			delete(s.ips, ip)
		}
	}
}

func (b *bench) pluginReport(subjects []*subject, got []samples) {
	rows := [][]string{{"median ms", "ADD", "ratio", "DEL", "ratio", "16 ADD at once", "ratio", "16 DEL at once", "ratio", "VERSION"}}
	for i, s := range subjects {
		g, base := &got[i], &got[0]
		row := []string{s.name}
		for _, c := range []struct{ own, base []float64 }{
			{g.add, base.add}, {g.del, base.del}, {g.addMany, base.addMany}, {g.delMany, base.delMany},
		} {
			row = append(row, millis(median(c.own)), number(median(ratios(c.own, c.base))))
		}
		rows = append(rows, append(row, millis(median(g.start))))
	}
	b.table.section("Whole processes, one node, against host-local", rows,
		fmt.Sprintf("A process for each call, started as a runtime does; %d leases held before. \"At once\": until the last of 16 has ended.", held),
		"VERSION is what starting the process alone takes. etcd: one member in a process of its own, without fsync.")
	add := func(i int) float64 { return median(ratios(got[i].add, got[0].add)) }
	burst := func(i int) float64 { return median(ratios(got[i].addMany, got[0].addMany)) }
	b.table.claim(target{"ADD, plaintext, against host-local", add(1), 3.5, true, " x"})
	b.table.claim(target{"ADD, mTLS, against host-local", add(2), 5, true, " x"})
	b.table.claim(target{"16 ADD at once, plaintext, against host-local", burst(1), 4, true, " x"})
	b.table.claim(target{"16 ADD at once, mTLS, against host-local", burst(2), 4, true, " x"})
}

// initLedger is 'ledger init'.
func (b *bench) initLedger(e *etcd) error {
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		return err
	}
	dir, err := statedir.Open(e.dir + "-operator")
	if err != nil {
		return err
	}
	store := etcdstore.New(e.cfg)
	defer store.Close()
	w, err := allocator.NewWriter(allocator.Config{Writer: entry.Writer{Kind: entry.KindOperator, Name: "bench"}, Store: store, Dir: dir, Keys: keys})
	if err != nil {
		return err
	}
	_, _, err = w.Init(b.ctx, "bench")
	return err
}

func netConf(ipam map[string]any) []byte {
	ipam["ranges"] = [][]map[string]string{{{"subnet": "10.22.0.0/22"}}}
	return mustJSON(map[string]any{"cniVersion": "1.0.0", "name": "bench", "type": "bridge", "ipam": ipam})
}

func etcdSettings(c *etcdstore.Config) map[string]any {
	m := map[string]any{"endpoints": c.Endpoints}
	if c.CAFile != "" {
		m["caFile"], m["certFile"], m["keyFile"] = c.CAFile, c.CertFile, c.KeyFile
	}
	return m
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // maps of strings cannot fail
		panic(err)
	}
	return b
}

// goTool is go, also where sudo dropped its directory from PATH.
func goTool() string {
	if p, err := exec.LookPath("go"); err == nil {
		return p
	}
	return "/usr/local/go/bin/go"
}
