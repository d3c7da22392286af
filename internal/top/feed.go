package top

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

const (
	lastEntries = 200                    // read at the start
	gather      = 100 * time.Millisecond // changes are shown together this often at most
	pulse       = time.Second            // how often the connection is looked at
	ask         = 3                      // every how many pulses etcd is asked whether it is there
	answer      = 3 * time.Second        // how long it may take to say so
	longestWait = 5 * time.Second        // between two attempts to connect
	looks       = 5 * time.Minute        // how often certificates are looked at
	steps       = 50                     // of an address's history
)

// errNoLedger marks that etcd is there, and the ledger is not.
var errNoLedger = errors.New("there is no ledger")

// errAnew marks that what is known cannot be carried on and is read anew.
var errAnew = errors.New("reading anew")

// feed reads a ledger and follows it: one full read at a revision, then a watch
// from that revision. It sends what it learns; nothing waits for it.
type feed struct {
	cfg  etcdstore.Config
	keys keyspace.Keys
	// patience is for one request; a long reading may take long.
	patience time.Duration
	now      func() time.Time
	send     func(Event)

	at       int64 // revision up to which all was sent; 0: nothing is known
	cluster  uint64
	heads    *heads
	answered time.Time // when etcd answered last

	mu     sync.Mutex
	owners map[entry.ChainID]entry.Writer // of chains
}

// patient gives each read its own deadline.
type patient struct {
	clientv3.KV
	timeout time.Duration
}

func (p patient) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	return p.KV.Get(ctx, key, opts...)
}

// connect opens a connection and asks for meta by the store's own way, which
// names what is wrong with a certificate or a user.
func (f *feed) connect(ctx context.Context) (*etcdstore.Store, *clientv3.Client, *allocator.Reply, error) {
	store := etcdstore.New(f.cfg)
	ctx, cancel := context.WithTimeout(ctx, f.patience)
	defer cancel()
	reply, err := store.Read(ctx, false, []allocator.Get{{Key: f.keys.Meta()}})
	if err == nil {
		var client *clientv3.Client
		if client, err = store.Client(ctx); err == nil {
			client.KV = patient{client.KV, f.patience}
			return store, client, reply, nil
		}
	}
	store.Close()
	return nil, nil, nil, err
}

// run follows until ctx ends.
func (f *feed) run(ctx context.Context) {
	f.answered = f.now()
	for wait := gather; ; {
		began := f.at
		err := f.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if f.at > began {
			wait = gather
		}
		if errors.Is(err, errAnew) {
			f.at = 0
			f.send(Note{short(err)})
		} else {
			f.send(Lost{Since: f.answered, Cause: short(err), Answers: errors.Is(err, errNoLedger)})
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, longestWait)
	}
}

// short is an error in one line.
func short(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", "; ")
	for _, prefix := range []string{allocator.ErrUnavailable.Error() + ": ", errAnew.Error() + ": "} {
		text = strings.TrimPrefix(text, prefix)
	}
	return text
}

// session follows on one connection until that is lost.
func (f *feed) session(ctx context.Context) error {
	store, client, reply, err := f.connect(ctx)
	if err != nil {
		return err
	}
	defer store.Close()
	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	background.Go(func() { f.certificates(ctx) })
	f.answered = f.now()
	if len(reply.Ranges[0].KVs) == 0 {
		f.at = 0
		return fmt.Errorf("%w: %s is absent ('ledger init' makes one)", errNoLedger, f.keys.Meta())
	}
	if f.at > 0 && (reply.Cluster != f.cluster || reply.Revision < f.at) {
		f.at = 0
		f.send(Note{"etcd is not where it was: another cluster, or gone back in time; all was read anew"})
	}
	f.cluster = reply.Cluster
	if f.at == 0 {
		if err := f.load(ctx, client); err != nil {
			return err
		}
	}
	f.send(Found{})
	return f.follow(ctx, client)
}

// certificates tells which certificate ends first, in the files and as the
// endpoints show them now.
func (f *feed) certificates(ctx context.Context) {
	for {
		var ev Certificate
		if c := etcdstore.Earliest(f.cfg.Look(ctx, f.now())); c != nil {
			ev = Certificate{What: strings.TrimPrefix(c.Kind.String(), "etcd's "), Until: c.NotAfter, Warn: c.NotAfter.Add(-etcdstore.WarnBefore)}
			if c.Kind == etcdstore.EtcdCert {
				ev.What += " of etcd"
			}
		}
		if ctx.Err() != nil {
			return // it was not looked at to the end
		}
		f.send(ev)
		select {
		case <-ctx.Done():
			return
		case <-time.After(looks):
		}
	}
}

// load reads all that is live, and the last entries.
func (f *feed) load(ctx context.Context, client *clientv3.Client) error {
	src, err := etcdstore.Open(ctx, client, f.keys)
	if err != nil {
		return err
	}
	l, h := newLedger(f.keys), newHeads(f.keys)
	var writers []live
	err = src.State(ctx, func(r audit.Record) error {
		key, err := f.keys.Parse(r.Key)
		if err != nil {
			l.unreadable[r.Key] = true
			return nil
		}
		l.Apply(Change{key, r}, f.now())
		if key.Kind == "writers" {
			w := live{writer: key.Writer, mod: r.Mod}
			if keyspace.Decode(r.Value, &w.value) == nil {
				h.writer(&w.value)
				writers = append(writers, w)
			}
		}
		return nil
	})
	if errors.Is(err, etcdstore.ErrCompacted) {
		return fmt.Errorf("%w: %w", errAnew, err)
	} else if err != nil {
		return err
	}
	l.Revision = src.Snapshot().Revision
	last, err := f.last(ctx, client, h, writers, l.Revision)
	if err != nil {
		return err
	}
	f.heads, f.at, f.answered = h, l.Revision, f.now()
	f.mu.Lock()
	f.owners = map[entry.ChainID]entry.Writer{}
	for _, w := range writers {
		f.owners[w.value.Chain] = w.writer
	}
	f.mu.Unlock()
	f.send(Loaded{Ledger: l, Entries: last, At: f.now()})
	return nil
}

type live struct {
	writer entry.Writer
	value  keyspace.Writer
	mod    int64
}

// last reads the ledger's last entries: of the writers that committed last, the
// ends of their chains. To ask etcd for a range in the order of commits would
// have it sort all entries.
func (f *feed) last(ctx context.Context, client *clientv3.Client, h *heads, writers []live, rev int64) ([]Line, error) {
	slices.SortFunc(writers, func(a, b live) int { return cmp.Compare(b.mod, a.mod) })
	var out []Line
	for i := range writers {
		w := &writers[i]
		if len(out) >= lastEntries && out[len(out)-lastEntries].Commit > w.mod {
			break // nobody below has a later one
		}
		from := uint64(1)
		if w.value.Seq > lastEntries {
			from = w.value.Seq - lastEntries + 1
		}
		r, err := client.Get(ctx, f.keys.Entry(w.writer, w.value.Chain, from), clientv3.WithRange(keyspace.After(f.keys.Chain(w.writer, w.value.Chain))),
			clientv3.WithRev(rev), clientv3.WithLimit(lastEntries), clientv3.WithSerializable())
		if err != nil {
			return nil, fmt.Errorf("reading the last entries: %w", err)
		}
		var lines []Line
		for _, kv := range r.Kvs {
			key, err := f.keys.Parse(string(kv.Key))
			if err != nil {
				continue
			}
			lines = append(lines, newLine(key, record(kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version)))
		}
		out = append(out, h.tail(lines, &w.value)...)
		slices.SortStableFunc(out, func(a, b Line) int { return cmp.Compare(a.Commit, b.Commit) })
	}
	return out[max(0, len(out)-lastEntries):], nil
}

func record(key, value []byte, create, mod, version int64) audit.Record {
	return audit.Record{Key: string(key), Value: value, Create: create, Mod: mod, Version: version}
}

// follow sends what is committed after f.at.
func (f *feed) follow(ctx context.Context, client *clientv3.Client) error {
	// To open a watch waits for etcd, for ever if need be.
	opened := make(chan clientv3.WatchChan, 1)
	from := f.at + 1
	go func() {
		opened <- client.Watch(clientv3.WithRequireLeader(ctx), f.keys.Prefix(), clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify())
	}()
	var events clientv3.WatchChan
	glance := time.NewTicker(pulse)
	defer glance.Stop()
	beats, lost := 0, 0
	type pong struct {
		revision int64
		err      error
	}
	pongs := make(chan pong, 1)
	waiting := false
	var batch Changes
	var due <-chan time.Time
	flush := func() {
		if batch.Revision > 0 {
			f.send(batch)
		}
		batch, due = Changes{}, nil
	}
	defer flush()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case events = <-opened:
		case <-glance.C:
			// The client would try for ever to get its one connection back.
			if client.ActiveConnection().GetState() == connectivity.Ready {
				lost = 0
			} else if lost++; lost > 1 {
				return errors.New("the connection was lost")
			}
			// A peer that is gone without a word shows in no other way.
			if beats++; waiting || beats%ask != 0 {
				continue
			}
			waiting = true
			go func() {
				ctx, cancel := context.WithTimeout(ctx, answer)
				defer cancel()
				r, err := client.Get(ctx, f.keys.Meta(), clientv3.WithCountOnly())
				if err != nil {
					pongs <- pong{err: err}
					return
				}
				pongs <- pong{revision: r.Header.Revision}
			}()
		case p := <-pongs:
			waiting = false
			switch {
			case errors.Is(p.err, context.DeadlineExceeded):
				return fmt.Errorf("no answer within %v", answer)
			case p.err != nil:
				return p.err
			case p.revision < f.at:
				return fmt.Errorf("%w: etcd went back in time, from revision %d to %d", errAnew, f.at, p.revision)
			}
			f.answered = f.now()
		case <-due:
			flush()
		case w, ok := <-events:
			switch {
			case !ok:
				return errors.New("the watch ended")
			case w.CompactRevision > 0:
				return fmt.Errorf("%w: etcd compacted what was not seen yet", errAnew)
			case w.Err() != nil:
				return w.Err()
			}
			f.answered = f.now()
			if len(w.Events) == 0 { // progress
				f.at = max(f.at, w.Header.Revision)
				continue
			}
			for _, e := range w.Events {
				f.event(&batch, e)
			}
			// Not the header's: of a long backlog etcd sends a part at a time.
			f.at = max(f.at, w.Events[len(w.Events)-1].Kv.ModRevision)
			batch.Revision = f.at
			if due == nil {
				due = time.After(gather)
			}
		}
	}
}

func (f *feed) event(batch *Changes, e *clientv3.Event) {
	key, err := f.keys.Parse(string(e.Kv.Key))
	if err != nil {
		batch.Strange = append(batch.Strange, string(e.Kv.Key))
		return
	}
	switch {
	case key.Kind != "chains" && e.Type == clientv3.EventTypeDelete:
		batch.State = append(batch.State, Change{key, audit.Record{Key: string(e.Kv.Key)}})
	case key.Kind != "chains":
		batch.State = append(batch.State, Change{key, record(e.Kv.Key, e.Kv.Value, e.Kv.CreateRevision, e.Kv.ModRevision, e.Kv.Version)})
	case e.Type == clientv3.EventTypeDelete:
		batch.Findings = append(batch.Findings, f.heads.deleted(key, e.Kv.ModRevision))
	default:
		l, found := f.heads.take(key, record(e.Kv.Key, e.Kv.Value, e.Kv.CreateRevision, e.Kv.ModRevision, e.Kv.Version))
		batch.Entries, batch.Findings = append(batch.Entries, l), append(batch.Findings, found...)
	}
}

// verify checks the whole ledger, on a connection of its own.
func (f *feed) verify(ctx context.Context) Event {
	at := f.now()
	store, client, _, err := f.connect(ctx)
	if err != nil {
		return Verified{At: at, Err: short(err)}
	}
	defer store.Close()
	o := audit.Options{Workers: max(1, runtime.GOMAXPROCS(0)/2)}
	var told time.Time
	o.Progress = func(n int64) {
		if now := time.Now(); now.Sub(told) > gather {
			told = now
			f.send(Verifying{n})
		}
	}
	for tries := 0; ; tries++ {
		src, err := etcdstore.Open(ctx, client, f.keys)
		var r *audit.Report
		if err == nil {
			at = f.now()
			r, err = audit.Verify(ctx, src, o)
		}
		switch {
		case err == nil:
			return Verified{At: at, Report: r}
		case !errors.Is(err, etcdstore.ErrCompacted) || tries == 3:
			return Verified{At: at, Err: short(err)}
		}
	}
}

// history reads an address's own linked list, newest first: each acquire names
// the release before it, each release its acquire, by hash. So it costs a
// request an entry, however long the ledger is.
func (f *feed) history(ctx context.Context, at place, newest entry.Ref) Event {
	out := History{Space: at.space, IP: at.ip, Newest: newest}
	fail := func(err error) Event {
		out.Err = short(err)
		return out
	}
	store, client, _, err := f.connect(ctx)
	if err != nil {
		return fail(err)
	}
	defer store.Close()
	for ref := newest; !ref.IsZero(); {
		if len(out.Lines) == steps {
			out.More = true
			break
		}
		w, err := f.owner(ctx, client, ref.Chain)
		if err != nil {
			return fail(err)
		}
		key := keyspace.Key{Kind: "chains", Writer: w, Chain: ref.Chain, Seq: ref.Seq}
		r, err := client.Get(ctx, f.keys.Entry(w, ref.Chain, ref.Seq))
		if err != nil {
			return fail(err)
		}
		if len(r.Kvs) == 0 {
			return fail(fmt.Errorf("entry %s of %v is gone", ref.Short(), w))
		}
		kv := r.Kvs[0]
		l := newLine(key, record(kv.Key, kv.Value, kv.CreateRevision, kv.ModRevision, kv.Version))
		if kv.Version != 1 {
			l.Bad = fmt.Sprintf("it was rewritten at revision %d", kv.ModRevision)
		} else if l.Ref.Hash != ref.Hash && l.Bad == "" {
			l.Bad = "its hash is not the one by which it is named"
		}
		out.Lines = append(out.Lines, l)
		if ref = l.before(at.ip); !ref.IsZero() && slices.ContainsFunc(out.Lines, func(l Line) bool { return l.Ref.Chain == ref.Chain && l.Ref.Seq == ref.Seq }) {
			return fail(fmt.Errorf("entry %s is named as what came before itself", ref.Short()))
		}
	}
	return out
}

// owner is who extends a chain. Chains that are not extended any more are looked
// up once, by their keys alone.
func (f *feed) owner(ctx context.Context, client *clientv3.Client, c entry.ChainID) (entry.Writer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w, ok := f.owners[c]; ok {
		return w, nil
	}
	owners := map[entry.ChainID]entry.Writer{}
	for from, end := f.keys.Chains(), keyspace.After(f.keys.Chains()); ; {
		r, err := client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return entry.Writer{}, err
		}
		if len(r.Kvs) == 0 {
			break
		}
		key, err := f.keys.Parse(string(r.Kvs[0].Key))
		if err != nil {
			from = string(r.Kvs[0].Key) + "\x00"
			continue
		}
		owners[key.Chain] = key.Writer
		from = keyspace.After(f.keys.Chain(key.Writer, key.Chain))
	}
	f.owners = owners
	w, ok := owners[c]
	if !ok {
		return w, fmt.Errorf("chain %s is gone", c.Short())
	}
	return w, nil
}
