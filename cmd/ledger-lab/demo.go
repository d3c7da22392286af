package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// options say how the demo runs.
type options struct {
	bin    string
	keep   bool
	direct bool
	out    io.Writer
	colour bool
	after  func(step int) error // for tests: called after each step, nil otherwise
}

// demonstration is a demo on its way.
type demonstration struct {
	*page
	o       options
	lab     *lab
	pods    []*pod // those that are there
	made    int    // pods ever made
	left    netip.Addr
	was, is string // who had it, and who has it now
}

// demo tells the story, step by step, and cleans up whatever happens.
func demo(ctx context.Context, o options) (err error) {
	began := time.Now()
	d := &demonstration{page: &page{w: o.out, colour: o.colour}, o: o}
	why := error(nil)
	if o.direct {
		why = errors.New("--direct was given")
	} else {
		why = whyNoNamespaces()
	}
	programs := []string{"ipam-ledger", "ledger"}
	if why == nil {
		programs = append(programs, "bridge")
	}
	for _, p := range programs {
		if _, err := os.Stat(filepath.Join(o.bin, p)); err != nil {
			return fmt.Errorf("looking for %s: %w; build it with make", p, err)
		}
	}
	if d.lab, err = newLab(o.bin, why != nil); err != nil {
		return err
	}
	defer func() {
		cleaning := d.lab.close()
		if err == nil && cleaning == nil {
			d.farewell(time.Since(began))
			cleaning = d.err
		}
		err = errors.Join(err, cleaning)
	}()

	d.say("%s", d.paint("1", "ipam-ledger: three nodes, twelve pods, one etcd, all on this machine"))
	if why != nil {
		d.say("The plugin is executed directly, without network namespaces (%v). As root, pods are real.", why)
	} else {
		d.say("Nodes and pods are network namespaces; everything is below %s.", d.lab.dir)
	}
	for i, step := range []func(context.Context) error{
		d.begin, d.twelve, d.reach, d.comeAndGo, d.show, d.history, d.verify, d.tamper,
	} {
		err := guarded(func() error { return step(ctx) })
		if err == nil && o.after != nil {
			err = guarded(func() error { return o.after(i + 1) })
		}
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if err = errors.Join(err, d.err); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	if o.keep {
		return d.stay(ctx)
	}
	return nil
}

func (d *demonstration) begin(ctx context.Context) error {
	d.title("An etcd, three nodes, and a ledger",
		"a ledger begins only where an operator says so, so that an etcd that was wiped is never taken for a new one.")
	if err := d.lab.start("worker-1", "worker-2", "worker-3"); err != nil {
		return err
	}
	d.command("export LEDGER_ENDPOINTS=" + d.lab.etcd.Endpoint())
	_, err := d.ledger(ctx, 0, "init")
	return err
}

// ledger runs a ledger command before the reader's eyes. It must exit with want.
func (d *demonstration) ledger(ctx context.Context, want int, args ...string) (string, error) {
	d.command("ledger " + strings.Join(args, " "))
	out, code, err := d.lab.ledger(ctx, args...)
	if out != "" {
		d.say("%s", out)
	}
	if err != nil {
		return out, err
	}
	if code != want {
		return out, fmt.Errorf("ledger %s: exit status %d, want %d", strings.Join(args, " "), code, want)
	}
	return out, nil
}

func (d *demonstration) twelve(ctx context.Context) error {
	d.title("Twelve pods at the same moment, four on each node",
		"nodes that allocate at once never give the same address, and none waits for a lock of another.")
	for i := range 12 {
		p, err := d.lab.newPod(d.nextName(), d.lab.nodes[i%len(d.lab.nodes)])
		if err != nil {
			return err
		}
		d.pods = append(d.pods, p)
	}
	began := time.Now()
	if err := together(len(d.pods), func(i int) error { return d.pods[i].add(ctx, netip.Addr{}) }); err != nil {
		return err
	}
	took := time.Since(began)
	if err := d.distinct(); err != nil {
		return err
	}
	d.table()
	d.say("%d pods, %d addresses, none twice; all there after %d ms.", len(d.pods), len(d.pods), took.Milliseconds())
	return nil
}

func (d *demonstration) nextName() string {
	d.made++
	return fmt.Sprintf("web-%d", d.made)
}

// distinct returns an error if two pods have the same address.
func (d *demonstration) distinct() error {
	seen := map[netip.Addr]*pod{}
	for _, p := range d.pods {
		if q := seen[p.ip]; q != nil {
			return fmt.Errorf("%s on %s and %s on %s both have %s", q.name, q.node.name, p.name, p.node.name, p.ip)
		}
		seen[p.ip] = p
	}
	return nil
}

// table shows which pods are where.
func (d *demonstration) table() {
	for _, n := range d.lab.nodes {
		var line strings.Builder
		for _, p := range d.pods {
			if p.node == n {
				fmt.Fprintf(&line, "  %-6s %-13s", p.name, p.ip)
			}
		}
		d.say("%s%s", n.name, strings.TrimRight(line.String(), " "))
	}
}

func (d *demonstration) reach(ctx context.Context) error {
	if d.lab.direct {
		d.title("CHECK for every pod", "what etcd has is what each pod was given.")
		if err := d.checkAll(ctx); err != nil {
			return err
		}
		d.say("%d pods, %d times CHECK, no difference.", len(d.pods), len(d.pods))
		return nil
	}
	d.title("Every pod pings every other", "the addresses work: within a node and from node to node.")
	began := time.Now()
	n, err := d.pingAll(ctx, d.pods)
	if err != nil {
		return err
	}
	d.say("%d pings sent, %d answered, in %d ms.", n, n, time.Since(began).Milliseconds())
	return nil
}

func (d *demonstration) checkAll(ctx context.Context) error {
	return together(len(d.pods), func(i int) error { return d.pods[i].check(ctx) })
}

// pingAll lets the pods in from ping all others, and returns how often.
func (d *demonstration) pingAll(ctx context.Context, from []*pod) (int, error) {
	err := together(len(from), func(i int) error {
		var others []netip.Addr
		for _, p := range d.pods {
			if p != from[i] {
				others = append(others, p.ip)
			}
		}
		if err := ping(ctx, from[i].ns, i+1, others); err != nil {
			return fmt.Errorf("%s on %s: %w", from[i].name, from[i].node.name, err)
		}
		return nil
	})
	return len(from) * (len(d.pods) - 1), err
}

func (d *demonstration) comeAndGo(ctx context.Context) error {
	d.title("Four go, four others come",
		"a released address is used again last, or by who asks for it, and its earlier holder is not forgotten.")
	going := []*pod{d.pods[0], d.pods[1], d.pods[4], d.pods[8]}
	// Of the two on one node it is the later one whose address is asked for: the
	// entry of the earlier may also claim the node's block, and step 8 is easier
	// to read with an entry that does one thing.
	heir := going[1]
	if heir.ip.Less(going[2].ip) {
		heir = going[2]
	}
	d.left, d.was = heir.ip, heir.name
	if err := together(len(going), func(i int) error { return going[i].del(ctx) }); err != nil {
		return err
	}
	d.pods = slices.DeleteFunc(d.pods, func(p *pod) bool { return slices.Contains(going, p) })
	var coming []*pod
	for _, old := range going {
		p, err := d.lab.newPod(d.nextName(), old.node)
		if err != nil {
			return err
		}
		if old == heir {
			d.is = p.name
		}
		coming = append(coming, p)
	}
	err := together(len(coming), func(i int) error {
		var ask netip.Addr
		if coming[i].name == d.is {
			ask = d.left
		}
		return coming[i].add(ctx, ask)
	})
	if err != nil {
		return err
	}
	d.pods = append(d.pods, coming...)
	if err := d.distinct(); err != nil {
		return err
	}
	if i := slices.IndexFunc(coming, func(p *pod) bool { return p.name == d.is }); coming[i].ip != d.left {
		return fmt.Errorf("%s asked for %s and has %s", d.is, d.left, coming[i].ip)
	}
	d.table()
	d.say("Gone: %s. %s asked for %s, which %s had.", names(going), d.is, d.left, d.was)
	if d.lab.direct {
		return d.checkAll(ctx)
	}
	// The newcomers first: what they send tells their neighbours that the
	// address moved, also where the announcement of bridge came too early to be
	// forwarded (a new port may take the kernel a second).
	n, err := d.pingAll(ctx, coming)
	if err != nil {
		return err
	}
	others, err := d.pingAll(ctx, d.pods[:len(d.pods)-len(coming)])
	if err != nil {
		return err
	}
	d.say("%d pings sent, %d answered.", n+others, n+others)
	return nil
}

func names(pods []*pod) string {
	var s []string
	for _, p := range pods {
		s = append(s, p.name)
	}
	return strings.Join(s, ", ")
}

func (d *demonstration) show(ctx context.Context) error {
	d.title("What is in use", "the whole cluster is in one place, and etcd's growth can be seen coming.")
	_, err := d.ledger(ctx, 0, "show")
	return err
}

func (d *demonstration) history(ctx context.Context) error {
	d.title("Who has an address, and who had it before",
		"each change of holder is on the record, with the pod, the node and the entry that says so.")
	out, err := d.ledger(ctx, 0, "ip", d.left.String())
	if err != nil {
		return err
	}
	for _, pod := range []string{d.was, d.is} {
		if !strings.Contains(out, namespace+"/"+pod) {
			return fmt.Errorf("ledger ip %s does not name %s/%s", d.left, namespace, pod)
		}
	}
	_, err = d.ledger(ctx, 0, "log", "--address", d.left.String())
	return err
}

func (d *demonstration) verify(ctx context.Context) error {
	d.title("Does the record hold?",
		"every entry is there, signed and in its place, and the addresses in use are exactly what they add up to.")
	_, err := d.ledger(ctx, 0, "verify")
	return err
}

func (d *demonstration) tamper(ctx context.Context) error {
	d.title("Somebody edits one entry in etcd, behind the ledger's back",
		"whoever can write to etcd can change the record, but not unnoticed: verify names the entry.")
	config := clientv3.Config{Endpoints: []string{d.lab.etcd.Endpoint()}, Context: ctx, Logger: zap.NewNop()}
	c, err := clientv3.New(config)
	if err != nil {
		return fmt.Errorf("connecting to etcd: %w", err)
	}
	defer c.Close()
	key, stored, err := d.firstHolding(ctx, c)
	if err != nil {
		return err
	}
	before := "pod \"" + namespace + "/" + d.was + "\"\n"
	after := "pod \"" + namespace + "/nobody\"\n"
	forged := bytes.Replace(stored, []byte(before), []byte(after), 1)
	if bytes.Equal(forged, stored) {
		return fmt.Errorf("entry %s does not have the line %q", key, before)
	}
	if _, err := c.Put(ctx, key, string(forged)); err != nil {
		return fmt.Errorf("putting %s: %w", key, err)
	}
	d.command("etcdctl put " + key + " < forged")
	d.write(d.paint("31", "- "+strings.TrimSuffix(before, "\n")) + "\n" + d.paint("32", "+ "+strings.TrimSuffix(after, "\n")) + "\n")

	out, err := d.ledger(ctx, 1, "verify")
	if err != nil {
		return err
	}
	if !strings.Contains(out, strings.TrimPrefix(key, keyspaceOfLab.Prefix())) {
		return fmt.Errorf("ledger verify does not name the entry %s", key)
	}
	d.say("(exit status 1, as it should be)")
	return nil
}

var keyspaceOfLab = must(keyspace.New(keyspace.DefaultPrefix))

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// firstHolding finds the entry by which the address's first holder got it.
func (d *demonstration) firstHolding(ctx context.Context, c *clientv3.Client) (string, []byte, error) {
	prefix := keyspaceOfLab.Chains()
	r, err := c.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return "", nil, fmt.Errorf("reading entries: %w", err)
	}
	for _, kv := range r.Kvs {
		e, err := entry.Parse(kv.Value)
		if err != nil {
			return "", nil, fmt.Errorf("entry %s: %w", kv.Key, err)
		}
		if e.Op != entry.Acquire || e.Pod != namespace+"/"+d.was {
			continue
		}
		for _, a := range e.Addresses {
			if a.IP == d.left {
				return string(kv.Key), kv.Value, nil
			}
		}
	}
	return "", nil, fmt.Errorf("no entry below %s says that %s/%s had %s", prefix, namespace, d.was, d.left)
}

// stay leaves the lab up until ctx ends, and says what to type.
func (d *demonstration) stay(ctx context.Context) error {
	d.say("\n%s\n", d.paint("1", "The lab stays up until Ctrl-C. Type in another terminal:"))
	d.say("")
	d.say("  export PATH=%s:$PATH", d.lab.bin)
	d.say("  export LEDGER_CONFIG=%s LEDGER_OPERATOR_DIR=%s", d.lab.operatorConfig(), d.lab.operatorDir())
	d.say("  ledger show")
	d.say("  ledger ip %s", d.pods[0].ip)
	d.say("  ledger log --follow")
	d.say("  ledger verify             # still names the entry that step 8 edited")
	if !d.lab.direct {
		p, other := d.pods[0], d.pods[1]
		d.say("  nsenter --net=%s ip address          # inside %s, which is on %s", p.ns.path(), p.name, p.node.name)
		d.say("  nsenter --net=%s ping %s    # from %s to %s", p.ns.path(), other.ip, p.name, other.name)
		d.say("  nsenter --net=%s ip link             # on %s itself", p.node.ns.path(), p.node.name)
	}
	d.say("  less %s", d.lab.nodes[0].conflist())
	if d.err != nil {
		return d.err
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-d.lab.etcd.Failed():
		return fmt.Errorf("etcd at %s: %w", d.lab.etcd.Endpoint(), err)
	}
}

// farewell is said when everything is gone.
func (d *demonstration) farewell(took time.Duration) {
	what := "no process, namespace, bridge or file"
	if d.lab.direct {
		what = "no process or file"
	}
	d.say("\n%s", d.paint("1", fmt.Sprintf("Done in %.1f s; %s is left.", took.Seconds(), what)))
}
