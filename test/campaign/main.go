// Campaign lets random faults loose on a ledger under load, for a given time, and
// checks all the while that nothing is doubled, lost or leaked:
//
//	go run ./test/campaign -for 10m -seed 1
//
// Twenty nodes, each with a state directory, a machine ID and a boot ID of its
// own, execute the real plugin as a runtime and a kubelet do, against a real etcd
// of three members. Meanwhile plugins are killed, members killed, paused, cut off
// and slowed down and filled up, machines lose their power, their disk or their
// pods, operators freeze, release, drain and remove, also at the wrong time, twice
// and by old lists, somebody damages keys, and the whole of etcd is restored from
// snapshots. Faults overlap.
//
// # What is checked
//
// Always: no address is told to a pod while another has it; an ADD that is
// repeated has the same answer; a DEL succeeds; whatever fails, fails with a code
// that the faults of the moment explain; nobody allocates while the ledger is
// frozen or etcd restored.
//
// At each quiescent point, about once a minute: etcd has leased exactly what
// runtimes were told; state directories agree; the history of every address is
// linearizable (package history); what was released was asked to be; and 'ledger
// verify --all-signatures' has nothing to say.
//
// It exits with 1 where one of this does not hold, and then keeps its directory;
// else everything is gone. The seed decides what is drawn, and not the timing.
package main

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
)

func main() {
	etcdcluster.Main()
	o := options{log: os.Stderr, drills: true}
	var only string
	flag.DurationVar(&o.duration, "for", 10*time.Minute, "how long")
	flag.Uint64Var(&o.seed, "seed", 0, "of what is drawn; 0: another one each time")
	flag.IntVar(&o.nodes, "nodes", 20, "how many nodes")
	flag.DurationVar(&o.round, "round", time.Minute, "load between two quiescent points")
	flag.DurationVar(&o.pause, "pause", 2*time.Second, "between two faults of one kind, on average")
	flag.StringVar(&only, "only", "", "kinds of faults, with commas between, as the table names them; empty: all")
	flag.BoolVar(&o.drills, "restores", true, "restore the cluster from snapshots")
	flag.Parse()
	if flag.NArg() > 0 || o.nodes < 1 || o.duration <= 0 || o.round <= 0 {
		fmt.Fprintln(os.Stderr, "campaign: want flags alone, a time, and one node or more; see -help")
		os.Exit(2)
	}
	if only != "" {
		o.only = strings.Split(only, ",")
	}
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	fmt.Fprintf(os.Stderr, "campaign of %v, seed %d\n", o.duration, o.seed)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	r, err := run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "campaign:", err)
		os.Exit(2)
	}
	r.write(os.Stdout)
	switch {
	case len(r.findings) > 0:
		os.Exit(1)
	case r.interrupted != nil:
		os.Exit(130)
	}
}
