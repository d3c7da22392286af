package cluster

import (
	"bufio"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdcluster/clustertest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// fill commits entries as fast as some nodes can, without processes.
func (w *world) fill(entries int) {
	w.t.Helper()
	const nodes = 4
	r := keyspace.Range{
		Subnet: netip.MustParsePrefix("10.9.0.0/24"), Start: netip.MustParseAddr("10.9.0.2"),
		End: netip.MustParseAddr("10.9.0.254"), Gateway: netip.MustParseAddr("10.9.0.1"),
	}
	pool, err := allocator.NewPool("default", "fill", [][]keyspace.Range{{r}}, nil, false, 0, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range nodes {
		name := fmt.Sprint("fill", i)
		dir, err := statedir.Open(filepath.Join(w.dir, name))
		if err != nil {
			w.t.Fatal(err)
		}
		store := etcdstore.New(etcdstore.Config{Endpoints: []string{w.etcd.Direct(i % w.etcd.Members())}})
		w.t.Cleanup(func() { store.Close() })
		writer, err := allocator.NewWriter(allocator.Config{Writer: entry.Writer{Kind: entry.KindNode, Name: name}, Store: store, Dir: dir, Keys: keys})
		if err != nil {
			w.t.Fatal(err)
		}
		wg.Go(func() {
			for k := range entries / nodes / 2 {
				id := keyspace.AttachmentID{Node: name, Network: "fill", Container: fmt.Sprint("c", k), Interface: "eth0"}
				if _, err := writer.Acquire(w.t.Context(), allocator.Request{ID: id, Pool: pool}); err != nil {
					w.t.Error(err)
					return
				}
				if err := writer.Release(w.t.Context(), id, ""); err != nil {
					w.t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if w.t.Failed() {
		w.t.FailNow()
	}
}

// compacter compacts everything, again and again.
type compacter struct {
	stop  chan struct{}
	ended chan int // how many times it did
}

func compacting(t testing.TB, client *clientv3.Client) *compacter {
	c := &compacter{make(chan struct{}), make(chan int, 1)}
	go func() {
		n := 0
		defer func() { c.ended <- n }()
		for {
			r, err := client.Get(t.Context(), "k")
			if err == nil {
				// Compacted to here already is an error, too.
				if _, err := client.Compact(t.Context(), r.Header.Revision); err == nil {
					n++
				}
			}
			select {
			case <-c.stop:
				return
			case <-t.Context().Done():
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return c
}

func (c *compacter) end() int {
	close(c.stop)
	return <-c.ended
}

// TestCompactedUnderVerify: a verification that etcd's compaction overtakes starts
// anew, or says that it could not check, and never finds what is not there.
func TestCompactedUnderVerify(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(o *etcdcluster.Options) { o.ClientLinks, o.NoFsync = true, true })
	w.fill(size(2000, 60_000))
	var direct []string
	for i := range w.etcd.Members() {
		direct = append(direct, w.etcd.Direct(i))
	}
	var nodes []*node
	for i := range 2 {
		nodes = append(nodes, w.node(fmt.Sprint("n", i), direct))
	}
	l := w.load(nodes) // so that there is always something to compact
	l.more(5)
	client := clustertest.Client(t, w.etcd, direct...)

	// The command is far away, so that its reading takes long.
	far := func(d time.Duration) {
		for i := range w.etcd.Members() {
			w.etcd.DelayClients(i, d)
		}
	}
	far(20 * time.Millisecond)
	began := time.Now()
	if r := w.ledger("verify"); r.exit != 0 {
		t.Errorf("exit status %d\n%s%s", r.exit, r.stdout, r.stderr)
	}
	t.Logf("undisturbed it takes %v", time.Since(began).Round(time.Millisecond))

	// Compacted until it notices, then left alone.
	const anew = "reading anew"
	for range size(2, 20) {
		c := compacting(t, client)
		cmd := w.ledgerCommand("verify")
		noticed := make(chan bool, 1)
		r, said := w.watched(cmd, func(line string) {
			if strings.Contains(line, anew) {
				select {
				case noticed <- true:
					c.end()
				default:
				}
			}
		})
		select {
		case <-noticed:
		default:
			c.end()
			t.Errorf("it did not notice the compaction:\n%s", said)
		}
		if r.exit != 0 {
			t.Errorf("exit status %d, want 0 after starting anew\n%s%s", r.exit, r.stdout, said)
		}
	}

	// Compacted all the time.
	outcomes := map[int]int{}
	c := compacting(t, client)
	for range size(3, 30) {
		r := w.ledger("verify")
		outcomes[r.exit]++
		switch r.exit {
		case 0:
		case 2:
			if !strings.Contains(r.stderr, "could not check") || !strings.Contains(r.stderr, "compacted") {
				t.Errorf("exit status 2, and no word of the compaction:\n%s%s", r.stdout, r.stderr)
			}
		default:
			t.Errorf("exit status %d, want 0 or 2\n%s%s", r.exit, r.stdout, r.stderr)
		}
	}
	n := c.end()
	t.Logf("compacted %d times while it ran: exit statuses %v", n, outcomes)
	far(0)
	l.end()
}

// watched runs a command and shows each line of its stderr as it comes.
func (w *world) watched(cmd *exec.Cmd, line func(string)) (r *reply, said string) {
	w.t.Helper()
	stderr, err := cmd.StderrPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	var stdout strings.Builder
	cmd.Stdout = &stdout
	r = &reply{began: time.Now()}
	if err := etcdcluster.Spawn(cmd); err != nil {
		w.t.Fatal(err)
	}
	timer := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	for s := bufio.NewScanner(stderr); s.Scan(); {
		said += s.Text() + "\n"
		line(s.Text())
	}
	_ = cmd.Wait() // its exit status is the answer
	r.stdout, r.exit, r.took = stdout.String(), cmd.ProcessState.ExitCode(), time.Since(r.began)
	return r, said
}
