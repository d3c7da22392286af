package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/history"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

func (p *pod) attachment() keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: p.m.name, Network: network, Container: p.container, Interface: "eth0"}
}

// quiesce stops load and faults, restores etcd from the snapshot if one is
// given, and checks everything.
func (c *campaign) quiesce(ctx context.Context, round int, snapshot string, own *rand.Rand) error {
	c.calm.Lock() // each fault that is under way ends by itself
	defer c.calm.Unlock()
	c.gate.Lock()
	began := c.now()
	c.note("begins: check %d", round)
	err := errors.Join(c.well(ctx), c.disarm(ctx))
	if err == nil && snapshot != "" {
		if own.IntN(2) == 0 {
			// Else it is restored with releases queued and commits open.
			err = c.settle(ctx, round, true, own)
		} else {
			err = c.checkHistory(ctx, nil)
		}
		if err == nil {
			c.gate.Unlock()
			c.fault(ctx, "restore of the cluster, and the drill", func() error { return c.restore(ctx, snapshot, own) })
			for _, p := range c.early {
				p.m.rest(p)
			}
			c.early = nil
			c.gate.Lock()
		}
	}
	if err == nil && ctx.Err() == nil {
		err = c.settle(ctx, round, false, own)
	}
	c.gate.Unlock()
	c.note("ends: check %d", round)
	c.serves.pause(began, c.now())
	if err == nil {
		// For a while no fault: what fails now, fails for no reason.
		sleep(ctx, min(grace+3*time.Second, c.round/4))
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// every runs f for each machine, some at a time.
func (c *campaign) every(f func(m *machine) error) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	turn := make(chan struct{}, 4)
	for _, m := range c.machines {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			if err := f(m); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// settle brings everything to rest and compares. Nobody calls meanwhile. With
// remember pods that are gone are not forgotten: a snapshot has them.
func (c *campaign) settle(ctx context.Context, round int, remember bool, own *rand.Rand) error {
	var mu sync.Mutex
	err := c.every(func(m *machine) error {
		mu.Lock()
		own := rand.New(rand.NewPCG(own.Uint64(), 0))
		mu.Unlock()
		// What a runtime still owes.
		c.book.Lock()
		pods := slices.Clone(m.pods)
		c.book.Unlock()
		for _, p := range pods {
			if p.phase == live || ctx.Err() != nil {
				continue
			}
			m.del(p, own, kill{})
		}
		_, err := c.must(ctx, m, "", nil, "queue", "flush")
		return err
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	// A DEL that succeeded is a release, without any GC.
	now, err := c.leases(ctx)
	if err != nil {
		return err
	}
	c.book.Lock()
	for _, p := range c.book.pods {
		if ips, ok := now.attached[p.container]; ok && p.phase == gone {
			c.finding("%s on %s: its DEL succeeded, nothing waits, and etcd says that it has %v", p.container, p.m.name, ips)
		}
	}
	c.book.Unlock()
	if round%3 == 2 {
		if err := c.gcPods(ctx); err != nil {
			return err
		}
	}
	err = c.every(func(m *machine) error {
		mu.Lock()
		own := rand.New(rand.NewPCG(own.Uint64(), 0))
		mu.Unlock()
		// What runtimes forgot.
		if round%3 == 1 {
			if err := c.sweep(ctx, m); err != nil {
				return err
			}
		}
		for ctx.Err() == nil {
			r := m.callGC(own, kill{})
			if r.ok() {
				break
			}
			c.judge("GC", m, r)
			sleep(ctx, 200*time.Millisecond)
		}
		return nil
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	if now, err = c.leases(ctx); err == nil {
		c.compare(now)
		err = c.verify(ctx)
	}
	if err == nil {
		err = c.checkHistory(ctx, now)
	}
	if err != nil || ctx.Err() != nil {
		return err
	}
	c.begin(remember)
	sure, perhaps := c.book.holds()
	c.note("check %d: %d pods have their addresses, %d are unknown; %d addresses are leased", round, sure, perhaps, len(now.leased))
	return nil
}

// leased is what etcd says at one revision.
type leased struct {
	leased   map[netip.Addr]string // container
	attached map[string][]netip.Addr
	stops    int
	revision int64
}

// leases reads it.
func (c *campaign) leases(ctx context.Context) (*leased, error) {
	out := &leased{leased: map[netip.Addr]string{}, attached: map[string][]netip.Addr{}}
	var r *clientv3.TxnResponse
	for began := c.now(); ; {
		one, cancel := context.WithTimeout(ctx, 10*time.Second)
		var err error
		r, err = c.client.Txn(one).Then(
			clientv3.OpGet(c.keys.Addresses(), clientv3.WithPrefix()),
			clientv3.OpGet(c.keys.Attachments(), clientv3.WithPrefix()),
			clientv3.OpGet(c.keys.Stops(), clientv3.WithPrefix()),
		).Commit()
		cancel()
		if err == nil {
			break
		}
		if c.now()-began > time.Minute || ctx.Err() != nil {
			return nil, fmt.Errorf("reading what is leased: %w", err)
		}
	}
	out.revision = r.Header.Revision
	for _, kv := range r.Responses[0].GetResponseRange().Kvs {
		key, err := c.keys.Parse(string(kv.Key))
		var a keyspace.Address
		if err == nil {
			err = keyspace.Decode(kv.Value, &a)
		}
		if err != nil {
			return nil, err
		}
		if a.State == keyspace.Leased {
			out.leased[key.IP] = a.Holder.Container
		}
	}
	for _, kv := range r.Responses[1].GetResponseRange().Kvs {
		key, err := c.keys.Parse(string(kv.Key))
		var a keyspace.Attachment
		if err == nil {
			err = keyspace.Decode(kv.Value, &a)
		}
		if err != nil {
			return nil, err
		}
		var ips []netip.Addr
		for _, l := range a.Leases {
			ips = append(ips, l.Address.Addr())
		}
		out.attached[key.Attachment.Container] = ips
	}
	out.stops = len(r.Responses[2].GetResponseRange().Kvs)
	return out, nil
}

// compare compares etcd and the state directories with the book.
func (c *campaign) compare(now *leased) {
	c.book.Lock()
	defer c.book.Unlock()
	running := 0
	for _, p := range c.book.pods {
		if p.phase != live {
			if ips, ok := now.attached[p.container]; ok {
				c.finding("%s on %s is gone, and etcd says that it has %v: leaked", p.container, p.m.name, ips)
			}
			continue
		}
		running++
		if !slices.Equal(now.attached[p.container], p.ips) {
			c.finding("%s on %s was told %v, and etcd says %v", p.container, p.m.name, p.ips, now.attached[p.container])
		}
		for _, ip := range p.ips {
			if now.leased[ip] != p.container {
				c.finding("%s on %s was told %v, and etcd says that %q has it", p.container, p.m.name, ip, now.leased[ip])
			}
		}
	}
	for container := range now.attached {
		if p := c.book.pods[container]; p == nil {
			c.finding("etcd has an attachment of %q, which nobody started", container)
		}
	}
	for ip, container := range now.leased {
		if p := c.book.told[ip]; p == nil || p.container != container {
			c.finding("%v is leased to %q, which has it by nobody's word", ip, container)
		}
	}
	if len(now.leased) != 2*running || len(now.attached) != running {
		c.finding("%d pods run, and etcd has %d addresses leased and %d attachments", running, len(now.leased), len(now.attached))
	}
	if now.stops > 0 {
		c.finding("%d nodes have stopped the cluster", now.stops)
	}
	for _, m := range c.machines {
		c.isSettled(m)
	}
}

// isSettled looks at a state directory. The book is locked.
func (c *campaign) isSettled(m *machine) {
	d := c.dirOf(m)
	if open, err := d.Pending(); err != nil || open {
		c.finding("%s: a commit is open (%v)", m.name, err)
	}
	q, err := d.Queue()
	aside, serr := d.Spoilt()
	if err := errors.Join(err, serr); err != nil || len(q)+len(aside) > 0 {
		c.finding("%s: %d releases wait, %d are set aside (%v)", m.name, len(q), len(aside), err)
	}
	held, _ := d.Holdings() // a power loss may have torn those of pods that are gone
	have := map[string]bool{}
	for _, h := range held {
		have[h.ID.Container] = true
		if p := c.book.pods[h.ID.Container]; p == nil || p.phase != live {
			c.finding("%s remembers %s, which is gone", m.name, h.ID.Container)
		}
	}
	for _, p := range m.pods {
		if p.phase == live && !have[p.container] {
			c.finding("%s does not remember %s, which runs", m.name, p.container)
		}
	}
}

// verify runs 'ledger verify' over every signature.
func (c *campaign) verify(ctx context.Context) error {
	r, err := c.must(ctx, nil, "", func(r *reply) bool { return r.exit != 2 }, "verify", "--all-signatures", "-o", "json")
	if err != nil {
		return err
	}
	var report struct {
		FindingCount *int64
		Findings     []json.RawMessage
		Reduced      []string
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.FindingCount == nil {
		return fmt.Errorf("ledger verify: %w: %s", err, r.text())
	}
	if r.exit != 0 || *report.FindingCount != 0 || len(report.Reduced) > 0 {
		var lines []string
		for _, f := range report.Findings[:min(len(report.Findings), 10)] {
			lines = append(lines, string(f))
		}
		c.finding("ledger verify: exit status %d, %d findings, reduced by %v:\n%s", r.exit, *report.FindingCount, report.Reduced, strings.Join(lines, "\n"))
	}
	c.window.verified++
	c.window.verifyTook = max(c.window.verifyTook, r.ended-r.began)
	return nil
}

// window is the history since the last quiescent point.
type window struct {
	revision  int64 // up to which the record has been read
	had       map[netip.Addr]int32
	checked   int // windows
	ops       int // operations in them
	most      int // of one address in one window
	addresses int

	verified   int
	verifyTook time.Duration
	acquires   int // on the record, of all windows
	releases   int
}

// begin begins a window: what was is known, and pods that are gone are not
// looked at any more.
func (c *campaign) begin(remember bool) {
	c.book.Lock()
	defer c.book.Unlock()
	c.window.had = map[netip.Addr]int32{}
	for id, p := range c.book.pods {
		if p.phase != live {
			if !remember {
				delete(c.book.pods, id)
			}
			continue
		}
		p.told, p.seen, p.end, p.ended = nil, nil, -1, history.Never
		for _, ip := range p.ips {
			c.window.had[ip] = p.who
		}
	}
}

// checkHistory puts the window's history, address by address, before porcupine.
// What callers were told is theirs; what they were not told is read from the
// record. now is what etcd says in the end; nil: nobody knows.
func (c *campaign) checkHistory(ctx context.Context, now *leased) error {
	var g *clientv3.GetResponse
	for began := c.now(); ; {
		one, cancel := context.WithTimeout(ctx, 20*time.Second)
		var err error
		g, err = c.client.Get(one, c.keys.Chains()+string(entry.KindNode)+"/", clientv3.WithPrefix(), clientv3.WithMinCreateRev(c.window.revision+1))
		if err == nil {
			var op *clientv3.GetResponse
			op, err = c.client.Get(one, c.keys.Chains()+string(entry.KindOperator)+"/", clientv3.WithPrefix(), clientv3.WithMinCreateRev(c.window.revision+1), clientv3.WithMaxCreateRev(g.Header.Revision))
			if err == nil {
				g.Kvs = append(g.Kvs, op.Kvs...)
			}
		}
		cancel()
		if err == nil {
			break
		}
		if c.now()-began > time.Minute || ctx.Err() != nil {
			return fmt.Errorf("reading the record: %w", err)
		}
	}
	c.window.revision = g.Header.Revision
	c.book.Lock()
	defer c.book.Unlock()
	ops := map[netip.Addr][]history.Operation{}
	note := func(ip netip.Addr, kind history.Kind, p int32, call, ret time.Duration) {
		ops[ip] = append(ops[ip], history.Operation{Kind: kind, Who: p, Client: len(ops[ip]), Call: call, Return: ret})
	}
	for ip, who := range c.window.had {
		note(ip, history.Acquire, who, -2, -1)
	}
	for _, kv := range g.Kvs {
		e, err := entry.Parse(kv.Value)
		if err != nil {
			c.finding("%s: %v", kv.Key, err)
			continue
		}
		if e.Op != entry.Acquire && e.Op != entry.Release {
			continue
		}
		p := c.book.pods[e.Container]
		if p == nil {
			c.finding("%s: %v of %s, which nobody started or which was gone before", kv.Key, e.Op, e.Container)
			continue
		}
		if e.Op == entry.Acquire {
			c.window.acquires++
		} else {
			c.window.releases++
		}
		for _, a := range e.Addresses {
			switch {
			case e.Op == entry.Acquire:
				ret := p.ended
				for _, t := range p.told {
					if slices.Contains(t.ips, a.IP) {
						ret = min(ret, t.ret)
						break
					}
				}
				if p.begun < 0 {
					c.finding("%s: %s acquired %v, and nobody called ADD", kv.Key, e.Container, a.IP)
				}
				note(a.IP, history.Acquire, p.who, p.begun, ret)
			case p.end < 0:
				c.finding("%s: %s was released, and nobody asked for it (%s)", kv.Key, e.Container, e.Reason)
			default:
				note(a.IP, history.Release, p.who, p.end, p.ended)
			}
		}
	}
	for _, p := range c.book.pods {
		for _, s := range slices.Concat(p.told, p.seen) {
			for _, ip := range s.ips {
				note(ip, history.Held, p.who, s.call, s.ret)
			}
		}
	}
	end := c.now()
	who := map[string]int32{}
	for _, p := range c.book.pods {
		who[p.container] = p.who
	}
	for _, ip := range slices.SortedFunc(maps.Keys(ops), netip.Addr.Compare) {
		if now != nil {
			if holder, ok := now.leased[ip]; ok {
				note(ip, history.Held, who[holder], end, end+1)
			} else {
				note(ip, history.Free, 0, end, end+1)
			}
		}
		if err := history.Check(1, ops[ip], 30*time.Second); err != nil {
			c.finding("%v: %v", ip, err)
		}
		c.window.ops += len(ops[ip])
		c.window.most = max(c.window.most, len(ops[ip]))
	}
	c.window.checked++
	c.window.addresses += len(ops)
	return nil
}
