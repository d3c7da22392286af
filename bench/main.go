// Command bench measures what the project claims about speed, against what it
// is claimed to be compared with, on the machine it runs on.
//
//	go run ./bench           everything; at most ten minutes on two cores
//	go run ./bench -quick    the same in small, to see that it works
//
// README.md beside this file says what is claimed and how to read the output.
//
// # What it guarantees
//
// What is compared is measured in turn, so that a busy moment hits both sides;
// each number is the median of several runs, and a ratio is the median of the
// runs' own ratios. etcd runs in processes of its own. Everything talks over
// loopback. When it ends, also by a signal, its processes are gone and so are
// its files, which are all below one temporary directory.
//
// # What can fail
//
// It exits 1 when an address was handed out twice, when verify finds something,
// or when a run failed; 130 (143, …) when it was interrupted. A target that is
// missed is printed and is no failure: it may be the machine's.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/version"
	"golang.org/x/sys/unix"
)

// sizes say how much is measured.
type sizes struct {
	runs     int           // of everything; the median counts
	calls    int           // of each plugin and verb, one after the other, in a run
	bursts   int           // of sixteen calls at once, in a run
	nodes    []int         // at once, in one process
	window   time.Duration // of allocating, for each number of nodes, in a run
	ledgers  []shape       // to be verified
	patience time.Duration // with one verify, and with all from one etcd
	lifetime int           // pods that come and go, to see what is left in etcd
}

var (
	full = sizes{
		runs: 5, calls: 20, bursts: 3, nodes: []int{1, 4, 16, 64}, window: 1500 * time.Millisecond, patience: time.Minute, lifetime: 10_000,
		ledgers: []shape{
			{entries: 250_000, nodes: 100, pods: 30},
			{entries: 1_000_000, nodes: 100, pods: 30, etcd: true},
			{entries: 250_000, nodes: 1000, pods: 100},
			{entries: 1_000_000, nodes: 1000, pods: 100, etcd: true},
		},
	}
	quick = sizes{
		runs: 1, calls: 3, bursts: 1, nodes: []int{1, 4}, window: 300 * time.Millisecond, patience: time.Minute, lifetime: 300,
		ledgers: []shape{
			{entries: 5_000, nodes: 20, pods: 10},
			{entries: 10_000, nodes: 20, pods: 10, etcd: true},
		},
	}
)

// bench is one run of the program.
type bench struct {
	sizes
	ctx   context.Context
	dir   string
	table *report
	note  func(format string, args ...any) // progress, for people
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == childArg {
		os.Exit(child(os.Args[2:]))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.Signal.String() }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	small := flags.Bool("quick", false, "everything once and small, to see that it works; the numbers mean little")
	dir := flags.String("dir", "", "where the temporary directory is made (default: TMPDIR); its disk is what etcd's fsync is measured on")
	only := flags.String("only", "plugin,allocator,verify,growth", "parts to run")
	profile := flags.String("cpuprofile", "", "write a CPU profile of this process, which is the clients' side, to this file")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "bench: argument %q: there are none; -h lists the flags\n", flags.Arg(0))
		return 2
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	go func() {
		select {
		case s := <-signals:
			if s, ok := s.(syscall.Signal); ok {
				cancel(interrupted{s})
			}
		case <-ctx.Done():
		}
	}()

	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintf(stderr, "bench: -cpuprofile: %v\n", err)
			return 2
		}
		defer f.Close()
		defer pprof.StopCPUProfile()
	}
	b := &bench{sizes: full, ctx: ctx, table: &report{out: stdout}}
	if *small {
		b.sizes = quick
	}
	start := time.Now()
	b.note = func(format string, args ...any) {
		fmt.Fprintf(stderr, "bench: %4.0fs %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	err := b.all(*dir, *only)
	var by interrupted
	switch {
	case errors.As(context.Cause(ctx), &by):
		fmt.Fprintf(stderr, "bench: %v\n", by)
		return 128 + int(by.Signal)
	case err != nil:
		fmt.Fprintf(stderr, "bench: error: %v\n", err)
		return 1
	}
	b.table.summary(time.Since(start))
	if b.table.duplicates > 0 {
		return 1
	}
	return 0
}

func (b *bench) all(parent, only string) (err error) {
	parts := []struct {
		name string
		run  func() error
	}{{"plugin", b.plugins}, {"allocator", b.allocations}, {"verify", b.verifications}, {"growth", b.growth}}
	wanted := map[string]bool{}
	for p := range strings.SplitSeq(only, ",") {
		wanted[p] = true
	}
	for _, p := range parts {
		if wanted[p.name] {
			delete(wanted, p.name)
			wanted["run "+p.name] = true
		}
	}
	for p := range wanted {
		if !strings.HasPrefix(p, "run ") {
			return fmt.Errorf("-only: no part %q; there are plugin, allocator, verify, growth", p)
		}
	}
	if b.dir, err = os.MkdirTemp(parent, "ipam-ledger-bench-"); err != nil {
		return fmt.Errorf("making a temporary directory: %w; name another place with -dir", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.table.machine(b.runs, disk(b.dir))
	for _, p := range parts {
		if !wanted["run "+p.name] {
			continue
		}
		if err := p.run(); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// machine is the line that numbers mean nothing without.
func (r *report) machine(runs int, disk string) {
	var u unix.Utsname
	_ = unix.Uname(&u) // an empty release is all that can go wrong
	fmt.Fprintf(r.out, "ipam-ledger bench: %d cores (%s), %s/%s, Linux %s, %s, etcd %s; %s; load before %s; median of %d\n",
		runtime.GOMAXPROCS(0), cpuModel(), runtime.GOOS, runtime.GOARCH, unix.ByteSliceToString(u.Release[:]),
		runtime.Version(), version.Version, disk, load(), runs)
}

func cpuModel() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown processor"
}

// load is the machine's load average: other people's work is in the numbers, too.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}

// disk says what fsync costs where etcd's data is: on tmpfs it costs nothing,
// and numbers with fsync mean nothing.
func disk(dir string) string {
	f, err := os.CreateTemp(dir, "fsync")
	if err != nil {
		return "fsync not measured"
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var took []float64
	for range 20 {
		start := time.Now()
		if _, err := f.Write(make([]byte, 2048)); err != nil {
			return "fsync not measured"
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			return "fsync not measured"
		}
		took = append(took, time.Since(start).Seconds())
	}
	return fmt.Sprintf("fdatasync %s ms", millis(median(took)))
}
