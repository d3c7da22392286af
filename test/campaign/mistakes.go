package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// What operators do at the wrong time, twice, or with an old list, and keys that
// somebody has damaged.

// recoverIdle runs 'recover node' on a node that has nothing to recover, while its
// pods come and go: whatever the list, it changes nothing.
func (c *campaign) recoverIdle(ctx context.Context, own *rand.Rand, list string) error {
	m := c.machines[own.IntN(len(c.machines))]
	args, stdin := []string{"recover", "node", "--grace", "0s"}, ""
	switch list {
	case "fresh":
		args = append(args, "--containers", "-")
	case "old":
		file, err := c.listFile(m.name+".old", m.sandboxes(), time.Hour)
		if err != nil {
			return err
		}
		args = append(args, "--containers", file)
	}
	sleep(ctx, between(own, 0, time.Second))
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.off || ctx.Err() != nil {
		return nil
	}
	if list == "fresh" {
		stdin = m.sandboxes()
	}
	r := m.acts(ctx, kill{}, stdin, args...)
	r.what = "ledger " + strings.Join(args, " ") + " on " + m.name
	c.count("ledger recover", fmt.Sprint("exit ", r.exit))
	c.note("%s", r.text())
	switch {
	case ctx.Err() != nil, r.killed: // its machine was switched off
	case r.exit == 0 && strings.Contains(r.stdout, "recovered already"):
	case r.exit == 1 && (strings.Contains(r.stderr, "has never written") || c.excused("", m, codeIntegrity, r)):
	case r.exit == 2 && c.excused("", nil, codeTryAgain, r):
	default:
		return errors.New(r.text())
	}
	return nil
}

// listFile writes a list into a file that is that old.
func (c *campaign) listFile(name, text string, age time.Duration) (string, error) {
	file := filepath.Join(c.dir, name+".list")
	at := time.Now().Add(-age)
	return file, errors.Join(os.WriteFile(file, []byte(text), 0o600), os.Chtimes(file, at, at))
}

// staleLists gives gc a list twice, then an older one, then a new one. What runs
// keeps its addresses.
func (c *campaign) staleLists(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	flag, list := "--containers", m.sandboxes
	if own.IntN(2) == 0 {
		m, flag, list = nil, "--pods", c.podList
	} else if !c.wrote(m) {
		return nil
	}
	stale := func(r *reply) bool { return r.exit == 2 && strings.Contains(r.stderr, "says nothing new") }
	gc := func(file string) (*reply, error) {
		return c.must(ctx, m, "", stale, "gc", flag, file, "--yes", "--grace", "0s", "--reason", "a campaign")
	}
	file, err := c.listFile("stale", list(), 0)
	if err != nil {
		return err
	}
	for n, age := range []time.Duration{0, 0, time.Minute} {
		if age > 0 {
			at := time.Now().Add(-age)
			if err := os.Chtimes(file, at, at); err != nil {
				return err
			}
		}
		r, err := gc(file)
		if err != nil {
			return err
		}
		if n > 0 && r.exit == 0 {
			return fmt.Errorf("a list that was looked at before, or an older one, was taken: %s", r.text())
		}
		sleep(ctx, between(own, 0, 700*time.Millisecond))
	}
	_, err = c.mustWith(ctx, m, list, nil, "gc", flag, "-", "--yes", "--grace", "0s", "--reason", "a campaign")
	return err
}

// importAgain imports, from files as host-local's, pods that the ledger has, while
// some of them go: none is recorded a second time, and none comes back.
func (c *campaign) importAgain(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	dir := filepath.Join(c.dir, "host-local")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	files := map[string]string{}
	c.book.Lock()
	for _, p := range m.pods {
		for _, ip := range p.ips {
			files[ip.String()] = p.container
		}
	}
	c.book.Unlock()
	if len(files) == 0 {
		return nil
	}
	for name, container := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(container+"\r\neth0"), 0o600); err != nil {
			return err
		}
	}
	for range 2 {
		sleep(ctx, between(own, 0, 300*time.Millisecond))
		r, err := c.must(ctx, m, "", nil, "import", "host-local", dir, "--network", network, "--subnet", "10.1.0.0/24", "--subnet", "fd00::/64", "-o", "json", "--reason", "once more")
		if err != nil {
			return err
		}
		if strings.Contains(r.stdout, `"imported"`) {
			return fmt.Errorf("what was recorded before was imported: %s", r.text())
		}
	}
	return nil
}

// removeLiving removes a node that lives and goes on working meanwhile. What its
// pods have ends: its runtime takes them down. Then it does what its errors say.
func (c *campaign) removeLiving(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	if !c.wrote(m) {
		return nil
	}
	defer c.excuse("removed while it lives", m, codeIntegrity, codeMismatch)()
	c.endAll(m, true)
	_, err := c.must(ctx, nil, "", func(r *reply) bool {
		return strings.Contains(r.stderr, "etcd knows no node") || strings.Contains(r.stderr, "has come back")
	}, "node", "remove", m.name, "--yes", "--reason", "taken for dead")
	if err != nil {
		return err
	}
	sleep(ctx, between(own, 0, 2*time.Second))
	m.mu.Lock()
	defer m.mu.Unlock()
	c.endAll(m, false)
	return c.comeBack(ctx, m, own)
}

// endAll is before, and after, all that a machine's pods have may end. In between
// it may be told an address that it has lost by then.
func (c *campaign) endAll(m *machine, begins bool) {
	c.book.Lock()
	m.ends = begins
	pods := slices.Clone(m.pods)
	c.book.Unlock()
	for _, p := range pods {
		c.book.doubt(p, c.now(), ending)
	}
}

// damageHead spoils or deletes the head of a node that works; then the node does
// what its errors say.
func (c *campaign) damageHead(ctx context.Context, own *rand.Rand, deleted bool) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	c.whole.Lock() // no backup is taken of it
	defer c.whole.Unlock()
	m := c.machines[own.IntN(len(c.machines))]
	if !c.wrote(m) {
		return nil
	}
	defer c.excuse("its head is damaged", m, codeIntegrity)()
	key := c.keys.Writer(entry.Writer{Kind: entry.KindNode, Name: m.name})
	op := clientv3.OpDelete(key)
	if !deleted {
		op = clientv3.OpPut(key, []string{"", "\x00garbage\xff", `{"chain":"`, "{}", "null"}[own.IntN(5)])
	}
	there := false
	err := c.patient(ctx, "damaging "+key, func(one context.Context) error {
		r, err := c.client.Txn(one).If(clientv3.Compare(clientv3.Version(key), ">", 0)).Then(op).Commit()
		there = there || err == nil && r.Succeeded
		return err
	})
	if err != nil || ctx.Err() != nil {
		return err
	}
	sleep(ctx, between(own, 0, time.Second))
	m.mu.Lock()
	defer m.mu.Unlock()
	return c.comeBack(ctx, m, own)
}

// patient does something with etcd until it succeeds.
func (c *campaign) patient(ctx context.Context, what string, do func(ctx context.Context) error) error {
	for began := c.now(); ; {
		one, cancel := context.WithTimeout(ctx, 3*time.Second)
		err := do(one)
		cancel()
		if err == nil || ctx.Err() != nil {
			return nil
		}
		if c.now()-began > time.Minute {
			return fmt.Errorf("%s, for a minute: %w", what, err)
		}
		sleep(ctx, 200*time.Millisecond)
	}
}

// junk is what an etcd is filled up with.
const junk = "/campaign-junk/"

// fillUp starts the members anew with a quota that is almost used up, and uses it
// up while plugins commit: some commits are answered NOSPACE and done all the
// same. Either there is made space, or the quota is raised.
func (c *campaign) fillUp(ctx context.Context, own *rand.Rand) error {
	defer c.excuse("NOSPACE, and members that start anew", nil, codeTryAgain)()
	var size int64
	for i := range c.cluster.Members() {
		one, cancel := context.WithTimeout(ctx, 5*time.Second)
		st, err := c.cluster.Status(one, i)
		cancel()
		if err != nil {
			return nil // it is in trouble: another time
		}
		size = max(size, st.DbSize)
	}
	if err := c.withQuota(ctx, size+1<<20); err != nil {
		return err
	}
	c.useUp(ctx)
	sleep(ctx, between(own, time.Second, 4*time.Second))
	if own.IntN(2) == 0 {
		if err := c.makeRoom(ctx); err != nil {
			return err
		}
		sleep(ctx, between(own, 0, time.Second))
	}
	return errors.Join(c.withQuota(ctx, 0), c.makeRoom(ctx))
}

// withQuota starts one member after the other anew with a quota; 0 is etcd's own.
func (c *campaign) withQuota(ctx context.Context, bytes int64) error {
	c.quota[0] = fmt.Sprintf("--quota-backend-bytes=%d", bytes)
	for i := range c.cluster.Members() {
		if err := c.cluster.Restart(i); err != nil {
			return err
		}
		if err := c.well(ctx); err != nil {
			return err
		}
	}
	return nil
}

// useUp writes until etcd says that it is full, and looks what became of the
// writes to which it said so.
func (c *campaign) useUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	value := strings.Repeat("x", 16<<10)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := fmt.Sprintf("%s%d/%d/%d", junk, c.now(), w, i)
				_, err := c.client.Put(ctx, key, value)
				if !errors.Is(err, rpctypes.ErrNoSpace) {
					continue
				}
				c.full.answered.Add(1)
				if g, err := c.client.Get(ctx, key); err == nil && g.Count > 0 {
					c.full.done.Add(1)
				}
				return
			}
		})
	}
	wg.Wait()
}

// makeRoom is what the error says: compact, defragment, disarm.
func (c *campaign) makeRoom(ctx context.Context) error {
	err := c.patient(ctx, "deleting junk", func(one context.Context) error {
		r, err := c.client.Delete(one, junk, clientv3.WithPrefix())
		if err == nil {
			_, err = c.client.Compact(one, r.Header.Revision, clientv3.WithCompactPhysical())
		}
		if errors.Is(err, rpctypes.ErrCompacted) {
			err = nil // somebody else has
		}
		return err
	})
	for i := range c.cluster.Members() {
		one, cancel := context.WithTimeout(ctx, 10*time.Second)
		_ = c.cluster.Defragment(one, i) // it may be away
		cancel()
	}
	return errors.Join(err, c.disarm(ctx))
}

// releaseEarly ends, by an operator, leases that nodes remember, and keeps the
// runtimes from calling DEL before the drill is over.
func (c *campaign) releaseEarly(ctx context.Context, own *rand.Rand) error {
	c.admin.Lock()
	defer c.admin.Unlock()
	for range 1 + own.IntN(3) {
		p := c.pick(own)
		if p == nil {
			continue
		}
		c.early = append(c.early, p)
		if err := c.endByHand(ctx, p, own); err != nil {
			return err
		}
	}
	return nil
}
