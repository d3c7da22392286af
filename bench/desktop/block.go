package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/swaytest"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// blockHeartbeat is the publisher's.
const blockHeartbeat = state.DefaultHeartbeat

// block measures ledger-swaybar in a real swaybar on a headless sway: 20 pools, a
// heartbeat as the publisher sends it, and nothing else, for so long.
func block(ctx context.Context, dir string, idle time.Duration) error {
	if err := swaytest.Missing(); err != nil {
		return err
	}
	program := filepath.Join(dir, "ledger-swaybar")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", program, "./swaybar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building ledger-swaybar (run this in the repository): %w\n%s", err, out)
	}
	desk, err := swaytest.Start(swaytest.Options{
		Programs: []string{program},
		Config:   "bar {\n\tstatus_command ledger-swaybar\n}\n",
	})
	if err != nil {
		return err
	}
	defer desk.Close()
	send := func(rev int64) error {
		now := time.Now()
		s := &state.State{
			Source: "bench", Epoch: 1, Revision: rev, At: now, Heartbeat: int(blockHeartbeat / time.Second), Etcd: state.Etcd{OK: true, Since: now},
			Ledger: state.LedgerRunning, Verify: state.Verify{Result: state.VerifyOK, At: now.Truncate(time.Hour)}, Nodes: 100,
		}
		for i := range 20 {
			s.Pools = append(s.Pools, state.Pool{Space: "default", Name: fmt.Sprintf("pool-%02d", i), Capacity: 1000, Leased: uint64(30 * i)})
		}
		b, err := state.Encode(s)
		if err != nil {
			return err
		}
		return desk.Tick(b)
	}
	pid := 0
	for pid == 0 { // until the bar has started it
		if got := desk.Processes("ledger-swaybar"); len(got) > 0 {
			pid = got[0].PID
		} else if pause(ctx, 50*time.Millisecond); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	for range 2 { // it has drawn once, and settled
		if err := send(1); err != nil {
			return err
		}
		pause(ctx, 2*time.Second)
	}
	before, err := cpu(pid)
	if err != nil {
		return err
	}
	beats := int(idle / blockHeartbeat)
	for range beats {
		pause(ctx, blockHeartbeat)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := send(1); err != nil {
			return err
		}
	}
	pause(ctx, time.Second)
	after, err := cpu(pid)
	if err != nil {
		return err
	}
	rss, err := memory(pid, "VmRSS")
	if err != nil {
		return err
	}
	used := after - before
	table("\nledger-swaybar in swaybar, idle", []string{"for", "heartbeats", "CPU", "CPU in 10 min", "RSS"}, [][]string{{
		(time.Duration(beats) * blockHeartbeat).String(), fmt.Sprint(beats), ms(used), ms(used * time.Duration(10*time.Minute/blockHeartbeat) / time.Duration(max(1, beats))), rss,
	}})
	fmt.Printf("targets: 20 ms in 10 minutes, 10 MiB. Load at the end: %s\n", load())
	return nil
}
