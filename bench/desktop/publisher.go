package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

var publisherHeader = []string{"leases", "full read", "its CPU", "verified after", "peak", "RSS", "idle CPU/min", "CPU/1,000 changes", "latency p50", "p95"}

const (
	podsOfNode = 100
	isolated   = 40 // changes whose latency is measured
	churn      = 500
)

// etcdChild runs a member until stdin ends.
func etcdChild(dir string) error {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	m, err := etcdmember.Start(etcdmember.Options{Dir: dir, NoFsync: true, Quota: 8 << 30})
	if err != nil {
		return err
	}
	defer m.Close()
	fmt.Println(m.Endpoint())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startEtcd runs a member in a process of its own.
func startEtcd(ctx context.Context, dir string) (endpoint string, stop func(), err error) {
	exe, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.Command(exe, "etcd", dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() { stdin.Close(); _ = cmd.Wait() }
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		stop()
		return "", nil, fmt.Errorf("etcd did not start: %w", err)
	}
	return strings.TrimSpace(line), stop, nil
}

// publisher measures one number of leases.
func publisher(ctx context.Context, dir string, leases int, idle time.Duration) (row []string, err error) {
	dir = filepath.Join(dir, fmt.Sprint(leases))
	endpoint, stop, err := startEtcd(ctx, filepath.Join(dir, "etcd"))
	if err != nil {
		return nil, err
	}
	defer stop()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop(), DialTimeout: 10 * time.Second})
	if err != nil {
		return nil, err
	}
	defer client.Close()
	keys, err := keyspace.New(keyspace.DefaultPrefix)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%d leases: writing the ledger\n", leases)
	if err := fill(ctx, client, keys, endpoint, dir, leases); err != nil {
		return nil, err
	}

	fmt.Fprintf(os.Stderr, "%d leases: measuring\n", leases)
	began := time.Now()
	cmd := exec.Command(filepath.Join(filepath.Dir(dir), "ledger"), "publish", "--print", "--source", "bench", "--endpoints", endpoint)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		err = errors.Join(err, cmd.Wait())
	}()
	pid := cmd.Process.Pid
	type told struct {
		*state.State
		at time.Time
	}
	lines := make(chan told, 1000)
	go func() {
		defer close(lines)
		r := bufio.NewScanner(stdout)
		r.Buffer(nil, state.MaxSize+1)
		for r.Scan() {
			at := time.Now()
			if _, s, err := state.Decode(r.Bytes()); err == nil && s != nil {
				lines <- told{s, at}
			}
		}
	}()
	until := func(ok func(s *state.State) bool) (told, error) {
		end := time.After(5 * time.Minute)
		for {
			select {
			case l, more := <-lines:
				if !more {
					return l, errors.New("the publisher ended")
				}
				if ok(l.State) {
					return l, nil
				}
			case <-end:
				return told{}, errors.New("the publisher did not come so far in five minutes")
			case <-ctx.Done():
				return told{}, ctx.Err()
			}
		}
	}
	first, err := until(func(s *state.State) bool { return len(s.Pools) > 0 && s.Pools[0].Leased == uint64(leases) })
	if err != nil {
		return nil, err
	}
	reading, err := cpu(pid)
	if err != nil {
		return nil, err
	}
	checked, err := until(func(s *state.State) bool { return s.Verify.Result != state.VerifyUnknown && !s.Verify.Running })
	if err != nil {
		return nil, err
	}
	if checked.Verify.Result != state.VerifyOK {
		return nil, fmt.Errorf("the ledger does not verify: %+v", checked.Verify)
	}
	pause(ctx, 3*time.Second) // its garbage is given back
	peak, err := memory(pid, "VmHWM")
	if err != nil {
		return nil, err
	}
	rss, err := memory(pid, "VmRSS")
	if err != nil {
		return nil, err
	}
	before, err := cpu(pid)
	if err != nil {
		return nil, err
	}
	pause(ctx, idle)
	after, err := cpu(pid)
	if err != nil {
		return nil, err
	}
	perMinute := time.Duration(float64(after-before) * float64(time.Minute) / float64(idle))

	// A stop is seen by all and needs no entry.
	var latencies []time.Duration
	for i := range isolated {
		want, op := state.LedgerStopped, clientv3.OpPut(keys.Stop("bench"), "{}")
		if i%2 == 1 {
			want, op = state.LedgerRunning, clientv3.OpDelete(keys.Stop("bench"))
		}
		if _, err := client.Do(ctx, op); err != nil {
			return nil, err
		}
		replied := time.Now()
		l, err := until(func(s *state.State) bool { return s.Ledger == want })
		if err != nil {
			return nil, err
		}
		latencies = append(latencies, max(0, l.at.Sub(replied)))
		pause(ctx, 300*time.Millisecond)
	}

	before, err = cpu(pid)
	if err != nil {
		return nil, err
	}
	err = as(ctx, endpoint, dir, entry.Writer{Kind: entry.KindNode, Name: "churn"}, keys, func(w *allocator.Writer) error {
		subnet := netip.MustParsePrefix("10.0.0.0/8")
		pool, err := allocator.NewPool("default", "prod", [][]keyspace.Range{{{
			Subnet: subnet, Start: netip.MustParseAddr("10.250.0.0"), End: netip.MustParseAddr("10.250.255.255"), Gateway: netip.MustParseAddr("10.0.0.1"),
		}}}, nil, false, 0, 0)
		if err != nil {
			return err
		}
		id := keyspace.AttachmentID{Node: "churn", Network: "prod", Container: "c", Interface: "eth0"}
		for range churn {
			if _, err := w.Acquire(ctx, allocator.Request{ID: id, Pool: pool, Pod: "shop/churn"}); err != nil {
				return err
			}
			if err := w.Release(ctx, id, ""); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	pause(ctx, time.Second)
	if after, err = cpu(pid); err != nil {
		return nil, err
	}
	perThousand := time.Duration(float64(after-before) * 1000 / (2 * churn))
	return []string{
		fmt.Sprint(leases), ms(first.at.Sub(began)), ms(reading), ms(checked.at.Sub(began)), peak, rss,
		ms(perMinute), ms(perThousand), ms(quantile(latencies, 0.5)), ms(quantile(latencies, 0.95)),
	}, ctx.Err()
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func as(ctx context.Context, endpoint, dir string, who entry.Writer, keys keyspace.Keys, f func(w *allocator.Writer) error) error {
	d, err := statedir.Open(filepath.Join(dir, who.Name))
	if err != nil {
		return err
	}
	store := etcdstore.New(etcdstore.Config{Endpoints: []string{endpoint}})
	defer store.Close()
	w, err := allocator.NewWriter(allocator.Config{Writer: who, Store: store, Dir: d, Keys: keys})
	if err != nil {
		return err
	}
	return f(w)
}

// fill writes a ledger of leases: nodes of a hundred pods each, every entry
// signed and in its place, thirty leases in a transaction.
func fill(ctx context.Context, c *clientv3.Client, keys keyspace.Keys, endpoint, dir string, leases int) error {
	var meta keyspace.Meta
	err := as(ctx, endpoint, dir, entry.Writer{Kind: entry.KindOperator, Name: "bench"}, keys, func(w *allocator.Writer) (err error) {
		meta, _, err = w.Init(ctx, "bench")
		return err
	})
	if err != nil {
		return err
	}
	gateway := netip.MustParseAddr("10.0.0.1")
	for n := 0; n*podsOfNode < leases; n++ {
		who := entry.Writer{Kind: entry.KindNode, Name: fmt.Sprintf("node-%04d", n)}
		skey, err := entry.NewKey(who)
		if err != nil {
			return err
		}
		head := keyspace.Writer{Chain: entry.NewChainID(), Machine: strings.Repeat("0", 32), Epoch: 1}
		signer, vkey, err := entry.ReadSigner(skey)
		if err != nil {
			return err
		}
		head.Key = vkey
		var ops []clientv3.Op
		add := func(e *entry.Entry) error {
			e.Chain, e.Seq, e.Prev, e.Time, e.Revision = head.Chain, head.Seq+1, head.Hash, time.Now(), 2
			stored, hash, err := entry.Sign(e, signer)
			if err != nil {
				return err
			}
			head.Seq, head.Hash = e.Seq, hash
			ops = append(ops, clientv3.OpPut(keys.Entry(who, e.Chain, e.Seq), string(stored)))
			return nil
		}
		send := func() error {
			ops = append(ops, clientv3.OpPut(keys.Writer(who), string(keyspace.Encode(head))))
			_, err := c.Txn(ctx).Then(ops...).Commit()
			ops = ops[:0]
			return err
		}
		if err := add(&entry.Entry{Op: entry.Open, Writer: who, Key: vkey, Cluster: meta.Cluster, Epoch: meta.Epoch}); err != nil {
			return err
		}
		for i := range min(podsOfNode, leases-n*podsOfNode) {
			o := 64*(1+2*n) + i
			ip := netip.AddrFrom4([4]byte{10, byte(o >> 16), byte(o >> 8), byte(o)})
			id := keyspace.AttachmentID{Node: who.Name, Network: "prod", Container: fmt.Sprintf("%064x", o), Interface: "eth0"}
			pod, uid := fmt.Sprintf("shop/cart-%09x-%05x", o, i), fmt.Sprintf("%08x-0000-4000-8000-%012x", n, o)
			e := &entry.Entry{
				Op: entry.Acquire, Space: "default", Pool: "prod", Addresses: []entry.Address{{IP: ip}},
				Network: id.Network, Container: id.Container, Interface: id.Interface, Node: id.Node, Pod: pod, PodUID: uid,
			}
			if i%64 == 0 {
				e.Blocks = []netip.Prefix{netip.PrefixFrom(ip, 26)}
			}
			if err := add(e); err != nil {
				return err
			}
			for _, b := range e.Blocks {
				block := keyspace.BlockID{Space: "default", Pool: "prod", Prefix: b}
				ops = append(ops, clientv3.OpPut(keys.Block(block), string(keyspace.Encode(keyspace.Block{Node: who.Name, Claim: head.Head()}))))
			}
			ops = append(ops,
				clientv3.OpPut(keys.Address("default", ip), string(keyspace.Encode(keyspace.Address{State: keyspace.Leased, Pool: "prod", Holder: &id, Acquire: head.Head()}))),
				clientv3.OpPut(keys.Attachment(id), string(keyspace.Encode(keyspace.Attachment{
					Space: "default", Pool: "prod", Acquire: head.Head(), Pod: pod, PodUID: uid, Leases: []keyspace.Lease{{Address: netip.PrefixFrom(ip, 8), Gateway: gateway}},
				}))))
			if len(ops) > 90 {
				if err := send(); err != nil {
					return err
				}
			}
		}
		if err := send(); err != nil {
			return err
		}
	}
	return nil
}
