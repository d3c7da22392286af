package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"time"
)

// snapshot saves the state of a member, while the load goes on.
func (c *campaign) snapshot(ctx context.Context, file string) error {
	c.whole.Lock()
	defer c.whole.Unlock()
	var err error
	for i := range 100 {
		one, cancel := context.WithTimeout(ctx, 20*time.Second)
		err = c.cluster.Snapshot(one, i%c.cluster.Members(), file)
		cancel()
		if err == nil || ctx.Err() != nil {
			return nil
		}
		sleep(ctx, 200*time.Millisecond)
	}
	return fmt.Errorf("no member gives a snapshot: %w", err)
}

// restore takes the whole cluster back to a snapshot, sees that nobody
// allocates, and does what docs/restore.md says. The load goes on until the
// drill begins.
func (c *campaign) restore(ctx context.Context, snapshot string, own *rand.Rand) error {
	if own.IntN(2) == 0 { // the backup does not know of it
		c.fault(ctx, "release by an operator before a drill", func() error { return c.releaseEarly(ctx, own) })
	}
	overEtcd := c.excuse("etcd is restored", nil, codeTryAgain, codeUnreachable)
	over := c.excuseVerbs("restored", nil, []string{"ADD", "GC", "CHECK"}, codeIntegrity)
	defer over()
	if own.IntN(2) == 0 { // announced, while etcd still answers
		if _, err := c.must(ctx, nil, "", nil, "freeze", "--reason", "a backup will be restored"); err != nil {
			overEtcd()
			return err
		}
	}
	c.gate.Lock() // so that nobody is half way through a call that etcd answered before
	err := c.cluster.Restore(snapshot, fmt.Sprintf("restored-%d-%d", c.seed, c.now()))
	c.setFrozen(true)
	c.gate.Unlock()
	if err == nil {
		err = errors.Join(c.well(ctx), c.disarm(ctx)) // an alarm is in the snapshot, too
	}
	overEtcd()
	if err != nil {
		return err
	}
	sleep(ctx, between(own, 500*time.Millisecond, 4*time.Second))
	c.gate.Lock()
	defer c.gate.Unlock()
	if ctx.Err() != nil {
		return nil
	}

	// One node may be missing: its machine is dead, and comes back later.
	var away *machine
	if own.IntN(2) == 0 {
		away = c.machines[own.IntN(len(c.machines))]
		away.powerOff(forgotten)
		defer away.powerOn()
	}
	refused := func(r *reply) bool { return r.exit == 1 && strings.Contains(r.stderr, "recover") }
	if _, err := c.must(ctx, nil, "", refused, "freeze", "--reason", "a drill"); err != nil {
		return err
	}
	if err := c.recoverStart(ctx, nil); err != nil {
		return err
	}
	if err := c.recoverNodes(ctx, away, own); err != nil {
		return err
	}
	var list []string
	var without []string
	for _, m := range c.machines {
		if m == away {
			// It may be that the restored etcd does not know of it.
			without = append(without, "--without", m.name)
		}
		if m == away || c.wrote(m) {
			list = append(list, "node/"+m.name)
		}
	}
	c.setFrozen(false)
	_, err = c.must(ctx, nil, strings.Join(list, "\n")+"\n", nil, append([]string{"thaw", "--nodes", "-", "--reason", "the drill is done"}, without...)...)
	if err != nil {
		return err
	}
	// The history begins anew: of the old record a part is lost.
	now, err := c.leases(ctx)
	if err != nil {
		return err
	}
	c.window.revision = now.revision
	c.rebegin(now)
	if away != nil {
		over := c.excuse("left out of the drill", away, codeIntegrity)
		defer over()
		away.boot()
		return c.comeBack(ctx, away, own)
	}
	return nil
}

// wrote reports whether the machine's node has ever committed.
func (c *campaign) wrote(m *machine) bool {
	mark, err := c.dirOf(m).LoadMark()
	return err != nil || mark != nil
}

var laterEpoch = regexp.MustCompile(`recover start --epoch (\d+)`)

// recoverStart begins the recovery; after is what a node said that has seen a
// later epoch.
func (c *campaign) recoverStart(ctx context.Context, after *reply) error {
	args := []string{"recover", "start", "--reason", "restored a backup"}
	if after != nil {
		if m := laterEpoch.FindStringSubmatch(after.stderr); m != nil {
			args = append(args, "--epoch", m[1])
		}
	}
	_, err := c.must(ctx, nil, "", nil, args...)
	return err
}

// startTwice begins a recovery that has begun.
func (c *campaign) startTwice(ctx context.Context) {
	c.fault(ctx, "recover start twice in a drill", func() error {
		r, err := c.must(ctx, nil, "", nil, "recover", "start", "--reason", "once more")
		if err == nil && !strings.Contains(r.stdout, "under way already") {
			return fmt.Errorf("it was begun anew: %s", r.text())
		}
		return err
	})
}

// nodeTwice runs 'recover node' on a node that has recovered in this drill, with a
// list that has none of its pods.
func (c *campaign) nodeTwice(ctx context.Context, m *machine) {
	c.fault(ctx, "recover node twice in a drill", func() error {
		r, err := c.must(ctx, m, "another\n", nil, "recover", "node", "--containers", "-", "--grace", "0s")
		if err == nil && !strings.Contains(r.stdout, "recovered already") {
			return fmt.Errorf("it recovered once more: %s", r.text())
		}
		return err
	})
}

// recoverNodes runs 'recover node' everywhere until no conflict is left. Some
// nodes are given their runtime's list.
func (c *campaign) recoverNodes(ctx context.Context, away *machine, own *rand.Rand) error {
	done, sure := map[*machine]bool{}, map[*machine]bool{}
	var mu sync.Mutex
	for round, twice := 0, own.IntN(3); ctx.Err() == nil; round++ {
		if round == min(twice, 1) { // before any node, or once most are done
			c.startTwice(ctx)
		}
		var conflicts []string
		var again *reply
		err := c.every(func(m *machine) error {
			mu.Lock()
			skip := m == away || done[m]
			byList := sure[m] || own.IntN(2) == 0
			proves, twice := sure[m] || own.IntN(2) == 0, own.IntN(4) == 0
			mu.Unlock()
			if skip {
				return nil
			}
			args := []string{"recover", "node"}
			if byList {
				args = append(args, "--containers", "-")
				if proves {
					args = append(args, "--grace", "0s")
				}
			}
			r, err := c.must(ctx, m, m.sandboxes(), func(r *reply) bool {
				return r.exit == 1 || strings.Contains(r.stderr, "move the named files away")
			}, args...)
			if err != nil || ctx.Err() != nil {
				return err
			}
			if r.exit == 0 && twice {
				c.nodeTwice(ctx, m)
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case r.exit == 0:
				done[m] = true
			case strings.Contains(r.stderr, "recover start"):
				again = r
			case strings.Contains(r.stderr, "move the named files away"):
				if m.moveAway(r) == 0 {
					return fmt.Errorf("no file that can be moved away is named: %s", r.text())
				}
			case strings.Contains(r.stderr, "ledger node replace "+m.name):
				_, err := c.must(ctx, nil, "", nil, "node", "replace", m.name, "--reason", "it has no chain that the backup knows")
				return err
			case strings.Contains(r.stdout, "conflict"):
				conflicts = append(conflicts, r.stdout)
			default:
				return errors.New(r.text())
			}
			return nil
		})
		if err != nil {
			return err
		}
		if again != nil {
			if err := c.recoverStart(ctx, again); err != nil {
				return err
			}
			clear(done)
		}
		want := len(c.machines)
		if away != nil {
			want--
		}
		if len(done) == want {
			if round < min(twice, 1) { // or when all are
				c.startTwice(ctx)
			}
			return nil
		}
		if round >= 2 && len(conflicts) > 0 {
			// What is left is held, by the backup, by a node that is not here, or by a
			// pod that is gone.
			for _, text := range conflicts {
				if err := c.settleConflicts(ctx, text, away, done, sure, own); err != nil {
					return err
				}
			}
		}
		if round > 12 {
			return fmt.Errorf("after %d rounds %d of %d nodes have recovered; conflicts: %s", round, len(done), want, strings.Join(conflicts, "\n"))
		}
	}
	return nil
}

var conflictLine = regexp.MustCompile(`conflict: (\S+) is held by ([^/\s]+)(/\S+), and ([^/\s]+)(/\S+) says`)

// settleConflicts does what docs/restore.md says. The leases of a node that is not
// here are ended. Of two nodes that are here one has a pod that is gone: its
// runtime deletes it, or has forgotten it, which its list proves. Who is to recover
// once more is not done; who is sure does so by lists.
func (c *campaign) settleConflicts(ctx context.Context, text string, away *machine, done, sure map[*machine]bool, own *rand.Rand) error {
	found := conflictLine.FindAllStringSubmatch(text, -1)
	if len(found) == 0 {
		return fmt.Errorf("a conflict that names nobody: %s", text)
	}
	// what a pod is now, by an attachment without its node.
	what := func(path string) (*pod, phase) {
		c.book.Lock()
		defer c.book.Unlock()
		part := strings.Split(path, "/")
		if p := c.book.pods[part[min(2, len(part)-1)]]; p != nil {
			return p, p.phase
		}
		return nil, forgotten
	}
	for _, m := range found {
		if _, err := netip.ParseAddr(m[1]); err != nil {
			return fmt.Errorf("%w: %s", err, text)
		}
		holder, is := what(m[3])
		claimant, says := what(m[5])
		switch {
		case away != nil && m[2] == away.name, is == forgotten:
			if _, err := c.must(ctx, nil, "", func(r *reply) bool { return strings.Contains(r.stderr, "holds nothing") },
				"release", "--attachment", m[2]+m[3], "--yes", "--reason", "its pod is gone"); err != nil {
				return err
			}
		case is != live:
			holder.m.del(holder, own, kill{})
			delete(done, holder.m)
		case says == live:
			c.finding("a conflict between pods that run: %s", text)
			return nil
		case says != forgotten:
			claimant.m.del(claimant, own, kill{})
		default:
			for _, x := range c.machines {
				if x.name == m[4] {
					sure[x] = true
				}
			}
		}
	}
	return nil
}

// rebegin begins the history anew from what etcd says, where pods may come and go
// by calls that were made before.
func (c *campaign) rebegin(now *leased) {
	c.book.Lock()
	defer c.book.Unlock()
	c.window.had = map[netip.Addr]int32{}
	for ip, container := range now.leased {
		p := c.book.pods[container]
		if p == nil {
			continue // of a node that is not here, from before the snapshot
		}
		c.window.had[ip] = p.who
	}
	for _, p := range c.book.pods {
		p.told, p.seen = nil, nil
	}
}
