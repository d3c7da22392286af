// Command desktop measures what the desktop's part of ipam-ledger costs, with
// the real programs in processes of their own:
//
//	publisher   ledger publish at 1,000, 10,000 and 100,000 leases: the full read,
//	            memory, CPU when idle and under change, and the time from a commit
//	            in etcd to the line that tells of it
//	block       ledger-swaybar in a real swaybar: CPU while nothing happens, memory
//
// How long a commit takes to the bar itself is printed by
// go test -v -run CommitToLine ./test/e2e/desktop.
//
// It says what it measured, on what, and nothing else: figures of a busy machine
// are that machine's.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "etcd" { // this program in another role
		if err := etcdChild(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench etcd:", err)
			os.Exit(1)
		}
		return
	}
	leases := flag.String("leases", "1000,10000,100000", "numbers of leases, with commas between")
	idle := flag.Duration("idle", 20*time.Second, "how long a publisher is watched while nothing happens")
	blockIdle := flag.Duration("block-idle", 10*time.Minute, "how long the block is watched while nothing happens; 0: not at all")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, *leases, *idle, *blockIdle)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-desktop:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, leases string, idle, blockIdle time.Duration) error {
	dir, err := os.MkdirTemp("", "bench-desktop-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(dir, "ledger"), "./cmd/ledger")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building ledger (run this in the repository): %w\n%s", err, out)
	}
	fmt.Printf("%s %s/%s, %d CPUs, load %s\n\n", runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), load())
	var rows [][]string
	for s := range strings.SplitSeq(leases, ",") {
		if s == "" {
			continue // -leases "": the block alone
		}
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil || n < 1 || n > 1_000_000 {
			return fmt.Errorf("-leases %q: want numbers of 1 to 1000000", leases)
		}
		row, err := publisher(ctx, dir, n, idle)
		if err != nil {
			return fmt.Errorf("%d leases: %w", n, err)
		}
		rows = append(rows, row)
	}
	if len(rows) > 0 {
		table("ledger publish", publisherHeader, rows)
		fmt.Printf(`
full read: from its start to the first line with all leases. CPU: user and system, of the publisher alone.
peak: VmHWM over its life, the verification at its start included; RSS: after that verification.
per 1,000 changes: leases taken and given back by a node as fast as that goes, with what checking each entry costs.
latency: from etcd's reply to the writer to the line on stdout, of isolated changes; sway and the bar come after that.
load at the end: %s
`, load())
	}
	if blockIdle > 0 {
		return block(ctx, dir, blockIdle)
	}
	return nil
}

func table(title string, header []string, rows [][]string) {
	fmt.Println(title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, r := range append([][]string{header}, rows...) {
		fmt.Fprintln(w, strings.Join(r, "\t")+"\t")
	}
	w.Flush()
}

func load() string {
	b, _ := os.ReadFile("/proc/loadavg")
	return string(bytes.Join(bytes.Fields(b)[:min(3, len(bytes.Fields(b)))], []byte(" ")))
}

// memory is a figure of /proc/PID/status, in MiB.
func memory(pid int, name string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return fmt.Sprintf("%.1f MiB", kb/1024), err
		}
	}
	return "", fmt.Errorf("no %s in /proc/%d/status", name, pid)
}

// cpu is the time that a process has used, to the nanosecond.
func cpu(pid int) (time.Duration, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(tasks) == 0 {
		return 0, fmt.Errorf("/proc/%d/task has no schedstat", pid)
	}
	var sum time.Duration
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			return 0, err
		}
		ns, err := strconv.ParseInt(strings.Fields(string(b))[0], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

func quantile(dd []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(dd))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
