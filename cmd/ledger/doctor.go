package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// check is one thing that doctor looked at.
type check struct {
	Name   string `json:"name"`
	Result string `json:"result"` // ok, warn, FAIL
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

const (
	ok   = "ok"
	warn = "warn"
	fail = "FAIL"
)

// From when on doctor warns.
const (
	fullShare = 0.8
	fullDays  = 14
	skewLimit = 2 * time.Second
	lockWait  = 2 * time.Second
	listed    = 5 // of many, so many are named
)

type doctor struct {
	*app
	checks []check
	now    time.Time
	cache  string
	conf   string
}

func (d *doctor) add(name, result, remedy, format string, args ...any) {
	d.checks = append(d.checks, check{name, result, fmt.Sprintf(format, args...), remedy})
}

func (a *app) doctor() *cobra.Command {
	var cache, conf string
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong, here and in etcd",
		Long: `Look for what is wrong: each endpoint with its certificate, etcd's room, the
ledger's state, clocks, and, on a node, its state directory, its queue, its key, how
it fits what etcd has, leases that nobody seems to use, network configurations that
the plugin would refuse, and nodes whose ranges differ. It changes nothing. Exit
status 1 if a check fails.`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,json,yaml"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			d := &doctor{app: a, now: a.now(), cache: cache, conf: conf}
			d.run(cmd.Context())
			if cmd.Context().Err() != nil {
				return cmd.Context().Err()
			}
			failed := slices.ContainsFunc(d.checks, func(c check) bool { return c.Result == fail })
			if done, err := a.structured(d.checks); done {
				if err != nil || !failed {
					return err
				}
				return wrong
			}
			d.show()
			if failed {
				return wrong
			}
			return nil
		},
	}
	c.Flags().StringVar(&cache, "cni-cache", "/var/lib/cni", "`directory` in which the runtime caches results")
	c.Flags().StringVar(&conf, "cni-conf", "/etc/cni/net.d", "`directory` of the network configurations")
	return c
}

func (d *doctor) show() {
	width := 0
	for _, c := range d.checks {
		width = max(width, len(c.Name))
	}
	for _, c := range d.checks {
		colour := map[string]string{ok: green, warn: yellow, fail: red}[c.Result]
		d.printf("%s %-*s  %s\n", d.paint(colour, fmt.Sprintf("%-4s", c.Result)), width, c.Name, strings.ReplaceAll(printableLines(c.Text), "\n", "\n  "))
		if c.Remedy != "" {
			d.printf("     %-*s  -> %s\n", width, "", c.Remedy)
		}
	}
}

func (d *doctor) run(ctx context.Context) {
	s, err := d.settings()
	if err != nil {
		_, text, _ := judge(err)
		d.add("configuration", fail, "correct it; 'ledger --help' says where it comes from", "%s", text)
		return
	}
	endpoint := d.endpoints(ctx)
	var st *state
	if endpoint != "" {
		st = d.ledger(ctx, endpoint)
	}
	if _, err := os.Stat(s.StateDir); err != nil && d.flags.StateDir == "" && d.flags.Node == "" && d.env("LEDGER_STATE_DIR") == "" {
		d.add("state directory", ok, "", "%s is not there: this host is no node, and what is a node's is left out", s.StateDir)
	} else {
		d.directory(ctx, st)
	}
	d.networks()
	if st != nil {
		d.drift(st)
	}
}

// endpoints probes each endpoint by itself, and returns one that works.
func (d *doctor) endpoints(ctx context.Context) (works string) {
	c, keys, err := d.etcd()
	if err != nil {
		d.add("etcd", fail, "", "%v", err)
		return ""
	}
	usable := d.certificates(c)
	skipped := 0
	for _, e := range c.Endpoints {
		name := "endpoint " + e
		if !usable && !strings.HasPrefix(e, "unix:") {
			skipped++
			continue
		}
		began := time.Now()
		conn, err := etcdstore.Dial(ctx, c, e)
		if err != nil {
			d.add(name, fail, remedyFor(err, "is etcd running there, and does a firewall let us through?"), "%s", tlsText(err))
			continue
		}
		took := time.Since(began)
		var cert string
		result, remedy := ok, ""
		if shown, is := etcdstore.Serving(conn, e); is {
			cert, result, remedy = d.standing(&shown)
			cert = ", certificate " + cert
		}
		conn.Close()
		one := c
		one.Endpoints = []string{e}
		store := etcdstore.New(one)
		sctx, cancel := context.WithTimeout(ctx, d.loaded.Timeout)
		func() {
			defer cancel()
			defer store.Close()
			r := &reader{store: store, keys: keys}
			if err := r.probe(sctx, d.loaded.Timeout); err != nil {
				remedy := remedyFor(err, "it can be reached, but not used: look at certificate, user and role, and whether it has a leader")
				d.add(name, fail, remedy, "%s", strings.TrimPrefix(tlsText(err), allocator.ErrUnavailable.Error()+": "+e+": "))
				return
			}
			s, err := status(sctx, r.client)
			if err != nil {
				d.add(name, fail, "", "it does not tell its status: %v", err)
				return
			}
			text := fmt.Sprintf("etcd %s, connected in %s%s", s.Version, span(took), cert)
			switch {
			case s.Leader == 0:
				d.add(name, fail, "the cluster has no quorum: look at its other members", "%s; it has no leader", text)
				return
			case s.IsLearner:
				d.add(name, warn, "take it off the endpoints: a learner refuses transactions", "%s; it is a learner", text)
				return
			}
			if works == "" {
				works = e
			}
			if strings.HasPrefix(e, "http://") && d.loaded.Username != "" && result == ok {
				result, remedy = warn, "use https"
				text += "; the password crosses the network unencrypted"
			}
			d.add(name, result, remedy, "%s", text)
		}()
	}
	if skipped > 0 {
		d.add("etcd", fail, "", "%s not asked: what is said above comes first", count(skipped, "endpoint"))
	}
	return works
}

// tlsText is an error without the remedy, which has its own place.
func tlsText(err error) string {
	var bad *etcdstore.TLSError
	if !errors.As(err, &bad) {
		return err.Error()
	}
	text := "TLS: " + bad.Detail
	if bad.Err != nil {
		text += " (" + bad.Err.Error() + ")"
	}
	return text
}

// remedyFor is what helps against an error, or what usually does.
func remedyFor(err error, usually string) string {
	var bad *etcdstore.TLSError
	if errors.As(err, &bad) {
		return bad.Remedy
	}
	return usually
}

// certificates looks at the files that handshakes are made with. It returns
// false where none can be made.
func (d *doctor) certificates(c etcdstore.Config) (usable bool) {
	_, err := c.TLS()
	var bad *etcdstore.TLSError
	if errors.As(err, &bad) {
		d.add(bad.Kind.String(), fail, bad.Remedy, "%s", tlsText(err))
	}
	certs, _ := c.Files(d.now) // what cannot be read was said
	for _, cert := range certs {
		if bad != nil && cert.Kind == bad.Kind {
			continue
		}
		text, result, remedy := d.standing(&cert)
		d.add(cert.Kind.String(), result, remedy, "%s (%s) %s", cert.Where, cert.Subject, text)
	}
	return err == nil
}

// standing says how long a certificate is valid, and what that calls for.
func (d *doctor) standing(c *etcdstore.Cert) (text, result, remedy string) {
	text = fmt.Sprintf("valid until %s (%s)", c.NotAfter.UTC().Format(time.DateOnly), daysLeft(c, d.now))
	switch c.Standing(d.now) {
	case etcdstore.Expired:
		return text, fail, "renew it"
	case etcdstore.NotYet:
		return text + ", and not before " + c.NotBefore.UTC().Format(time.DateTime), fail, "set the clock, or wait"
	case etcdstore.EndsSoon:
		return text, warn, "renew it soon"
	}
	return text, ok, ""
}

// daysLeft is how long a certificate is still valid, in words.
func daysLeft(c *etcdstore.Cert, now time.Time) string {
	switch n := c.Days(now); {
	case n < 0:
		return "expired"
	case n == 0:
		return "less than a day left"
	default:
		return count(n, "day") + " left"
	}
}

// ledger looks at what etcd holds; nil where that cannot be known.
func (d *doctor) ledger(ctx context.Context, endpoint string) *state {
	c, keys, err := d.etcd()
	if err != nil {
		return nil // was said
	}
	c.Endpoints = []string{endpoint}
	r := &reader{store: etcdstore.New(c), keys: keys}
	defer r.store.Close()
	cctx, cancel := context.WithTimeout(ctx, d.loaded.Timeout)
	defer cancel()
	if err := r.probe(cctx, d.loaded.Timeout); err != nil {
		d.add("etcd", fail, "", "%v", err)
		return nil
	}
	var st *state
	for range retries {
		var src *etcdstore.Source
		if src, err = etcdstore.Open(ctx, r.client, keys); err != nil {
			break
		}
		if st, err = readState(ctx, src); !errors.Is(err, etcdstore.ErrCompacted) {
			break
		}
	}
	if errors.Is(err, etcdstore.ErrDenied) {
		if own, oerr := d.ownState(ctx, r); oerr == nil {
			st, err = own, nil
		}
		err = r.store.Explain(ctx, err)
	}
	if err != nil {
		d.add("ledger", fail, "", "it cannot be read: %v", err)
		return nil
	}
	if st.meta == nil {
		d.add("ledger", fail, "run 'ledger init' once; if there was a ledger here, do not: etcd was wiped, or --endpoints or --prefix is wrong", "%s is absent", keys.Meta())
		return nil
	}
	d.meta(st)
	d.space(ctx, r, st)
	d.clocks(ctx, r, st)
	return st
}

func (d *doctor) meta(st *state) {
	m := st.meta
	text := fmt.Sprintf("cluster %s, epoch %d, %s, revision %d", m.Cluster, m.Epoch, m.State, st.snap.Revision)
	switch {
	case m.Version > keyspace.FormatVersion:
		d.add("ledger", fail, "upgrade this program", "%s; its format version is %d, and this program knows %d", text, m.Version, keyspace.FormatVersion)
	case d.loaded.ClusterID != "" && d.loaded.ClusterID != m.Cluster:
		d.add("ledger", fail, "wrong etcd, or wrong clusterID", "%s; clusterID says %s", text, d.loaded.ClusterID)
	case m.EtcdCluster != st.snap.EtcdCluster:
		d.add("ledger", fail, "see 'ledger recover --help'", "%s; it was written under etcd cluster %s and this is %s: etcd was restored or moved", text, m.EtcdCluster, st.snap.EtcdCluster)
	case m.Recovering:
		d.add("ledger", warn, "'ledger recover node' on each node, then 'ledger thaw --nodes FILE'", "%s; a recovery is under way: nobody allocates", text)
	case m.State != keyspace.Running:
		d.add("ledger", warn, "'ledger thaw'", "%s: nobody allocates", text)
	default:
		d.add("ledger", ok, "", "%s", text)
	}
	for _, s := range st.stops {
		if m.Recovering {
			d.add("stop", warn, "'ledger thaw --nodes FILE' removes it", "put by %s at %s: %s", s.Node, stamp(s.Time), s.Found)
			continue
		}
		d.add("stop", fail, "nobody allocates until etcd has been recovered: 'ledger recover --help'", "put by %s at %s: %s", s.Node, stamp(s.Time), s.Found)
	}
	if len(st.unreadable) > 0 {
		d.add("keys", fail, "run 'ledger verify'", "%s cannot be read, the first %s", count(len(st.unreadable), "key"), st.unreadable[0])
	}
}

func (d *doctor) space(ctx context.Context, r *reader, st *state) {
	e, err := d.room(ctx, r, st)
	if err != nil {
		d.add("etcd's room", warn, "", "%v", err)
		return
	}
	for _, alarm := range e.Alarms {
		d.add("alarm", fail, "NOSPACE: compact, defragment, 'etcdctl alarm disarm', or raise --quota-backend-bytes", "%s", alarm)
	}
	const remedy = "compact and defragment etcd, or raise --quota-backend-bytes"
	switch {
	case e.Quota > 0 && float64(e.InUse) > fullShare*float64(e.Quota):
		d.add("etcd's room", warn, remedy, "%s", e.text())
	case e.DaysLeft != nil && *e.DaysLeft < fullDays:
		d.add("etcd's room", warn, remedy, "%s", e.text())
	case e.Quota > 0 && e.Size > e.Quota*9/10:
		d.add("etcd's room", warn, "defragment etcd: the quota is one of the file", "%s", e.text())
	default:
		d.add("etcd's room", ok, "", "%s", e.text())
	}
}

// head is the last entry of a chain.
type head struct {
	writer string
	time   time.Time
	commit int64
}

// clocks compares the times of the chains' heads with the order of their
// commits, and with our own clock.
func (d *doctor) clocks(ctx context.Context, r *reader, st *state) {
	var heads []head
	for part := range slices.Chunk(st.writers, atOnce) {
		var ops []clientv3.Op
		for _, w := range part {
			ops = append(ops, clientv3.OpGet(r.keys.Entry(w.Writer, w.value.Chain, w.value.Seq)))
		}
		tctx, cancel := context.WithTimeout(ctx, d.loaded.Timeout)
		resp, err := r.client.Txn(tctx).Then(ops...).Commit()
		cancel()
		if err != nil {
			d.add("clocks", warn, "", "the chains' heads cannot be read: %v", err)
			return
		}
		for i, w := range part {
			for _, kv := range resp.Responses[i].GetResponseRange().Kvs {
				if e, err := entry.Parse(kv.Value); err == nil {
					heads = append(heads, head{w.Writer.String(), e.Time, kv.ModRevision})
				}
			}
		}
	}
	slices.SortFunc(heads, func(a, b head) int { return cmp.Compare(a.commit, b.commit) })
	bad := 0
	var latest head
	for _, h := range heads {
		if ahead := h.time.Sub(d.now); ahead > skewLimit {
			bad++
			d.add("clocks", warn, "look at NTP, there and here", "the last entry of %s is %s in the future of this host's clock", h.writer, span(ahead))
		}
		if behind := latest.time.Sub(h.time); behind > skewLimit {
			bad++
			d.add("clocks", warn, "look at NTP on both", "%s committed after %s, and by their clocks %s before it", h.writer, latest.writer, span(behind))
		}
		if h.time.After(latest.time) {
			latest = h
		}
	}
	if bad == 0 {
		d.add("clocks", ok, "", "the last entries of %s are in order, and none is in the future", count(len(heads), "chain"))
	}
}

// directory looks at this node's state directory and how it fits etcd.
func (d *doctor) directory(ctx context.Context, st *state) {
	s := d.loaded
	if err := haveStateDir(s.StateDir); err != nil {
		d.add("state directory", fail, "a node that never had a pod has none; else name it with --state-dir, or run this on the node as root", "%v", err)
		return
	}
	dir, err := statedir.Open(s.StateDir)
	if err != nil {
		d.add("state directory", fail, "run this as root; is the file system read-only or full?", "%v", err)
		return
	}
	d.add("state directory", ok, "", "%s, node %s", s.StateDir, s.Node)

	lctx, cancel := context.WithTimeout(ctx, lockWait)
	unlock, lerr := dir.Lock(lctx)
	cancel()
	if lerr != nil {
		d.add("lock", warn, "if it stays, look what that process waits for; the kernel gives the lock back when it ends", "held for more than %s%s", span(lockWait), lockedBy(filepath.Join(s.StateDir, "lock")))
	} else {
		defer unlock()
		d.add("lock", ok, "", "free")
	}

	queue, err := dir.Queue()
	switch {
	case err != nil:
		d.add("queue", fail, "move the named files away once you know what those pods held", "%v", err)
	case len(queue) == 0:
		d.add("queue", ok, "", "no release waits")
	default:
		d.add("queue", warn, "'ledger queue flush' settles them, or says why it cannot", "%s waiting, the oldest for %s", count(len(queue), "release"), span(d.now.Sub(queue[0].Time)))
	}
	if pending, err := dir.Pending(); err == nil && pending && lerr == nil {
		d.add("last commit", warn, "the next contact settles it by itself; 'ledger queue flush' is one", "a process ended before it knew its outcome")
	}

	w, done, err := d.node(false)
	if err != nil {
		d.add("identity", fail, "", "%v", err)
		return
	}
	defer done()
	if err := w.Identity(); err != nil {
		d.add("identity", fail, "", "%v", err)
		return
	}
	mark, err := dir.LoadMark()
	if err != nil {
		d.add("identity", fail, "", "%v", err)
		return
	}
	key, err := dir.Key()
	switch {
	case err != nil:
		d.add("key", fail, "", "%v", err)
		return
	case mark == nil && key == "":
		d.add("identity", ok, "", "no identity yet: this node's first pod makes one")
	case mark == nil:
		d.add("identity", warn, "", "there is a key and no mark: the first contact makes one")
	default:
		_, vkey, err := entry.ReadSigner(key)
		if err != nil {
			d.add("key", fail, "", "%v", err)
			return
		}
		d.add("key", ok, "", "mode 0600, %s", vkey)
	}
	if st == nil {
		return
	}
	d.chain(ctx, st, mark, key)
	if lerr == nil {
		d.holdings(st, dir)
	}
}

// lockedBy names the process that holds a lock, where the kernel tells.
func lockedBy(path string) string {
	fi, err := os.Stat(path)
	if err != nil {
		return ""
	}
	sys, isStat := fi.Sys().(*syscall.Stat_t)
	f, err := os.Open("/proc/locks")
	if err != nil || !isStat {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		p := strings.Fields(s.Text()) // 1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF
		if len(p) < 6 || p[1] != "FLOCK" || !strings.HasSuffix(p[5], fmt.Sprintf(":%d", sys.Ino)) {
			continue
		}
		name, _ := os.ReadFile("/proc/" + p[4] + "/comm")
		return fmt.Sprintf(" by process %s (%s)", p[4], strings.TrimSpace(string(name)))
	}
	return ""
}

// chain compares the mark with what etcd has. It only reads: a node's own verbs
// would stop the cluster at a rollback.
func (d *doctor) chain(ctx context.Context, st *state, mark *statedir.Mark, key string) {
	node := entry.Writer{Kind: entry.KindNode, Name: d.loaded.Node}
	var live *keyspace.Writer
	for i := range st.writers {
		if st.writers[i].Writer == node {
			live = &st.writers[i].value
		}
	}
	replace := "'ledger node replace " + node.Name + " --reason …', by an operator"
	const back = "etcd went back in time: 'ledger recover --help'"
	switch {
	case live == nil && slices.Contains(st.unreadable, strings.TrimPrefix(st.keys.Writer(node), st.keys.Prefix())):
		d.add("chain", fail, replace, "the head of %s cannot be read", node)
		return
	case mark == nil && live == nil:
		return
	case mark == nil:
		d.add("chain", fail, replace, "etcd has a chain of %s, and this state directory is new or was lost", node)
		return
	case mark.Cluster != st.meta.Cluster:
		d.add("chain", fail, "wrong etcd; or the ledger was started anew: then move the state directory away", "the state directory is of cluster %s", mark.Cluster)
		return
	case mark.Epoch < st.meta.Epoch:
		d.add("chain", fail, "run 'ledger recover node' here", "the ledger was recovered (epoch %d), and this node was not (epoch %d)", st.meta.Epoch, mark.Epoch)
		return
	case mark.Epoch > st.meta.Epoch || mark.EtcdCluster != st.meta.EtcdCluster:
		d.add("chain", fail, back, "this node has seen epoch %d in etcd cluster %s", mark.Epoch, mark.EtcdCluster)
		return
	case mark.Revision > st.snap.Revision:
		d.add("chain", fail, back, "this node has seen revision %d", mark.Revision)
		return
	case live == nil && mark.Seq == 0:
		d.add("chain", ok, "", "not opened yet")
		return
	case live == nil:
		if found, err := d.entryAt(ctx, node, mark.Ref()); err == nil && found == mark.Hash.String() {
			d.add("chain", fail, replace, "the head of %s is gone, and its chain is there", node)
			return
		}
		d.add("chain", fail, back, "etcd has no chain of %s, and entry %d was committed", node, mark.Seq)
		return
	case !live.Closed.IsZero() && live.Removed && st.tally(d.now).nodes[node.Name].attachments > 0:
		d.add("chain", fail, "'ledger node remove "+node.Name+"' once more; or "+replace+", if this machine is to have its leases again", "it was removed by an operator, and some of its leases are still to be ended")
		return
	case mark.Recovering && (mark.Seq == 0 || live.Chain == mark.Chain && live.Recover.IsZero()):
		d.add("chain", fail, "run 'ledger recover node' here", "its recovery has not ended: until then it refuses to allocate")
		return
	case !live.Closed.IsZero():
		d.add("chain", ok, "", "closed by an operator: the next contact opens another")
		return
	case live.Disputed != "":
		d.add("chain", fail, "see which of the two is "+node.Name+", take the other away, then "+replace, "two machines write as %s, or a copy of this directory does", node)
		return
	case live.Chain != mark.Chain && mark.Seq > 0:
		d.add("chain", fail, "another machine has taken its place; if it should not: "+replace, "etcd has chain %s, and this machine's is %s", live.Chain, mark.Chain)
		return
	case live.Chain == mark.Chain && live.Seq < mark.Seq:
		d.add("chain", fail, back, "its head in etcd is entry %d, and entry %d was committed", live.Seq, mark.Seq)
		return
	}
	if mark.Seq > 0 {
		found, err := d.entryAt(ctx, node, mark.Ref())
		if err != nil {
			d.add("chain", warn, "", "entry %d cannot be read: %v", mark.Seq, err)
			return
		}
		if found != mark.Hash.String() {
			d.add("chain", fail, "somebody changed etcd, or it went back in time: 'ledger verify'", "entry %d in etcd is not the one that this node committed: want %s, got %s", mark.Seq, mark.Hash, cmp.Or(found, "nothing"))
			return
		}
	}
	if key == "" {
		return // was said
	}
	text := fmt.Sprintf("chain %s, entry %d, epoch %d", live.Chain, live.Seq, live.Epoch)
	if live.Seq > mark.Seq && live.Chain == mark.Chain {
		d.add("chain", ok, "", "%s; the mark is at %d: the next contact moves it", text, mark.Seq)
		return
	}
	d.add("chain", ok, "", "%s, as the mark has it", text)
}

// entryAt is the hash of the entry that etcd has where one is said to be; empty
// where there is none.
func (d *doctor) entryAt(ctx context.Context, w entry.Writer, at entry.Ref) (hash string, err error) {
	err = d.lookUp(ctx, func(r *reader) error {
		g, err := r.client.Get(ctx, r.keys.Entry(w, at.Chain, at.Seq))
		if err == nil && len(g.Kvs) == 1 {
			hash = entry.HashOf(g.Kvs[0].Value).String()
		}
		return err
	})
	return hash, err
}

// holdings compares what this node's attachments were told with what etcd has.
func (d *doctor) holdings(st *state, dir *statedir.Dir) {
	node := d.loaded.Node
	list, err := dir.Holdings()
	if err != nil {
		d.add("holdings", fail, "move the named files away once you know what those pods hold", "%v", err)
		return
	}
	known := map[keyspace.AttachmentID]keyspace.Attachment{}
	for _, h := range list {
		known[h.ID] = h.Value
	}
	var leaks, gone, other []string
	live := 0
	for id, v := range st.attachments {
		if id.Node != node {
			continue
		}
		live++
		h, ok := known[id]
		switch {
		case !ok && !dir.IsQueued(id):
			leaks = append(leaks, id.String())
		case ok && !slices.EqualFunc(h.Leases, v.Leases, func(a, b keyspace.Lease) bool { return a.Address.Addr() == b.Address.Addr() }):
			other = append(other, id.String())
		}
	}
	for id := range known {
		if _, ok := st.attachments[id]; !ok {
			gone = append(gone, id.String())
		}
	}
	bad := false
	say := func(list []string, remedy, what string) {
		if len(list) > 0 {
			bad = true
			d.add("holdings", warn, remedy, "%s %s: %s", count(len(list), "attachment"), what, some(list))
		}
	}
	say(leaks, "if no such container runs: 'ledger release --attachment …'; the runtime's GC releases them, too", "in etcd and unknown to this node")
	say(gone, "released by an operator, or lost by etcd; if such a pod runs, delete it: its address may be given to another", "known to this node and not in etcd")
	say(other, "run 'ledger verify'", "with other addresses in etcd than the pods were told")
	if !bad {
		d.add("holdings", ok, "", "%s, the same here and in etcd", count(live, "attachment"))
	}
	d.cached(st, node)
}

func some(list []string) string {
	slices.Sort(list)
	if len(list) > listed {
		return strings.Join(list[:listed], ", ") + fmt.Sprintf(" and %d more", len(list)-listed)
	}
	return strings.Join(list, ", ")
}

// cached compares with the results that libcni keeps while a container is
// attached. A network of which it has none is kept elsewhere, and says nothing.
func (d *doctor) cached(st *state, node string) {
	files, err := os.ReadDir(filepath.Join(d.cache, "results"))
	if err != nil {
		return
	}
	have := map[string]bool{}
	for _, f := range files {
		have[f.Name()] = true
	}
	seen := map[string]bool{}
	missing := map[string][]string{}
	for id := range st.attachments {
		if id.Node != node {
			continue
		}
		if have[id.Network+"-"+id.Container+"-"+id.Interface] {
			seen[id.Network] = true
		} else {
			missing[id.Network] = append(missing[id.Network], id.String())
		}
	}
	for _, network := range sortedKeys(missing) {
		if seen[network] {
			list := missing[network]
			d.add("leaks", warn, "if no such container runs: 'ledger release --attachment …'", "%s of network %s without a result in %s: %s", count(len(list), "attachment"), network, d.cache, some(list))
		}
	}
}

// networks reads the configurations that name our plugin as its ADD would. Where
// there are none, this host is no node, or its networks are kept elsewhere.
func (d *doctor) networks() {
	files, err := os.ReadDir(d.conf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.add("networks", warn, "run this as root", "%v", err)
	}
	for _, f := range files {
		if !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(f.Name())) { // as for libcni
			continue
		}
		path := filepath.Join(d.conf, f.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			d.add("networks", warn, "run this as root", "%v", err)
			continue
		}
		list, _ := ipams(b) // what is no JSON is not ours
		for _, conf := range list {
			if ipam, ok := conf["ipam"].(map[string]any); ok && ipam["type"] == "ipam-ledger" {
				d.network(path, conf)
			}
		}
	}
}

func (d *doctor) network(path string, conf map[string]any) {
	name := fmt.Sprintf("network %v", conf["name"])
	b, err := json.Marshal(conf)
	if err != nil {
		return // it was made of JSON
	}
	n, err := config.LoadNetwork("ADD", b, "")
	var bad *types.Error
	switch {
	case errors.As(err, &bad):
		d.add(name, fail, "", "%s: %s", path, bad.Details)
	case err != nil:
		d.add(name, fail, "", "%s: %v", path, err)
	case len(n.Warnings) > 0:
		d.add(name, warn, "", "%s: %s", path, strings.Join(n.Warnings, "; "))
	default:
		d.add(name, ok, "", "%s", path)
	}
}

// drift finds nodes whose ranges for one pool differ, by the leases that they
// made.
func (d *doctor) drift(st *state) {
	type shape struct {
		subnet  netip.Prefix
		gateway netip.Addr
	}
	pools := map[poolID]map[shape][]string{}
	for id, v := range st.attachments {
		p := poolID{v.Space, v.Pool}
		if pools[p] == nil {
			pools[p] = map[shape][]string{}
		}
		for _, l := range v.Leases {
			s := shape{l.Address.Masked(), l.Gateway}
			if !slices.Contains(pools[p][s], id.Node) {
				pools[p][s] = append(pools[p][s], id.Node)
			}
		}
	}
	bad := false
	for p, shapes := range pools {
		var list []shape
		for s := range shapes {
			list = append(list, s)
		}
		slices.SortFunc(list, func(a, b shape) int {
			return cmp.Or(a.subnet.Addr().Compare(b.subnet.Addr()), cmp.Compare(a.subnet.Bits(), b.subnet.Bits()), a.gateway.Compare(b.gateway))
		})
		for i := 1; i < len(list); i++ {
			a, b := list[i-1], list[i]
			if !a.subnet.Overlaps(b.subnet) {
				continue
			}
			bad = true
			text := func(s shape) string {
				out := s.subnet.String()
				if s.gateway.IsValid() {
					out += " by " + s.gateway.String()
				}
				return fmt.Sprintf("%s (%s)", out, some(shapes[s]))
			}
			d.add("ranges", warn, "make the network's ranges the same on all nodes, or use a named pool", "leases of pool %s in space %s differ: %s and %s", p.name, p.space, text(a), text(b))
		}
	}
	if !bad {
		d.add("ranges", ok, "", "the leases of %s have the same subnets and gateways on all nodes", count(len(pools), "pool"))
	}
}
