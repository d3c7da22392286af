package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/snapshot"
	"go.uber.org/zap"
	"go4.org/netipx"
	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"ledger": func() {
			a := newApp()
			if t := os.Getenv("CLOCK"); t != "" {
				a.now, a.boot = ticking(t), booted(t, os.Getenv("BOOT"), os.Getenv("UP"))
			}
			start(a)
		},
	})
}

// ticking is a clock that starts at a time and moves a microsecond a look, so
// that entries of one command differ.
func ticking(from string) func() time.Time {
	t, err := time.Parse(time.RFC3339, from)
	if err != nil {
		panic(err)
	}
	return func() time.Time {
		t = t.Add(time.Microsecond)
		return t
	}
}

// booted is the clock of a boot where the wall clock says now: it says up, or
// where that is empty it goes with the wall clock.
func booted(now, boot, up string) func() (leak.Moment, error) {
	wall, err := time.Parse(time.RFC3339, now)
	since := time.Duration(wall.Unix()) * time.Second
	if err == nil && up != "" {
		since, err = time.ParseDuration(up)
	}
	if err != nil {
		panic(err)
	}
	return func() (leak.Moment, error) { return leak.Moment{Boot: "boot-" + boot, Since: since, Wall: wall}, nil }
}

// TestScripts runs testdata/*.txt. Beside testscript's own commands there are
//
//	etcd …      one etcd of the script's own: see (*lab).etcd
//	node …      what the plugin would do on a node: see (*lab).node
//	clock TIME  what clocks say from here on, in RFC 3339; clock - is real time
//	boot ID UP  which boot of the machine this is from here on, and for how long it
//	            is up; without UP its clock goes with the other
//	made FILE   the file is written now, by that clock
//	status N C  runs a command that must exit with status N
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			l := &lab{dir: env.WorkDir}
			env.Values[labKey{}] = l
			env.Defer(l.close)
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			env.Setenv("LEDGER_OPERATOR_DIR", filepath.Join(env.WorkDir, "operator"))
			env.Setenv("LEDGER_CONFIG", filepath.Join(env.WorkDir, "config.json"))
			env.Setenv("TZ", "UTC")
			env.Setenv("GORACE", "atexit_sleep_ms=0") // else each command takes a second
			return writePrivate(filepath.Join(env.WorkDir, "config.json"), "{}")
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"etcd": func(ts *testscript.TestScript, neg bool, args []string) { of(ts).etcd(ts, neg, args) },
			"node": func(ts *testscript.TestScript, neg bool, args []string) { of(ts).node(ts, neg, args) },
			"clock": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Setenv("CLOCK", strings.TrimSuffix(args[0], "-"))
				if args[0] != "-" {
					ts.Setenv("CLOCK", args[0])
				}
			},
			"boot": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Setenv("BOOT", args[0])
				ts.Setenv("UP", strings.Join(args[1:], ""))
			},
			"made": func(ts *testscript.TestScript, _ bool, args []string) {
				now, err := time.Parse(time.RFC3339, ts.Getenv("CLOCK"))
				ts.Check(err)
				ts.Check(os.Chtimes(ts.MkAbs(args[0]), now, now))
			},
			"status": func(ts *testscript.TestScript, _ bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				var exit *exec.ExitError
				if code := 0; errors.As(err, &exit) {
					code = exit.ExitCode()
					if args[0] != fmt.Sprint(code) {
						ts.Fatalf("exit status %d, want %s", code, args[0])
					}
				} else if err != nil || args[0] != "0" {
					ts.Fatalf("%v, want exit status %s", err, args[0])
				}
			},
		},
	})
}

type labKey struct{}

func of(ts *testscript.TestScript) *lab { return ts.Value(labKey{}).(*lab) }

// lab is a script's etcd and nodes.
type lab struct {
	dir      string
	endpoint string // empty: the member's
	member   *etcdmember.Member
	client   *clientv3.Client
}

func writePrivate(file, text string) error { return os.WriteFile(file, []byte(text), 0o600) }

func (l *lab) close() {
	if l.client != nil {
		l.client.Close()
	}
	if l.member != nil {
		l.member.Close()
	}
}

var labKeys, _ = keyspace.New(keyspace.DefaultPrefix)

const patience = 30 * time.Second

// etcd start | stop | restart | snapshot FILE | restore FILE same|new | compact
//
//	etcd put KEY VALUE | del KEY | edit KEY OLD NEW | newer NODE|meta
//
// KEY is below the prefix, and may be a pattern of path.Match that one key fits;
// put takes it as it is.
func (l *lab) etcd(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("! etcd makes no sense")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	config := func() clientv3.Config {
		return clientv3.Config{Endpoints: []string{l.member.Endpoint()}, Logger: zap.NewNop(), DialTimeout: patience}
	}
	switch args[0] {
	case "start":
		o := etcdmember.Options{Dir: filepath.Join(l.dir, "etcd-data"), Token: l.dir, NoFsync: true}
		if len(args) > 1 {
			_, err := fmt.Sscan(args[1], &o.Quota)
			ts.Check(err)
		}
		m, err := etcdmember.Start(o)
		ts.Check(err)
		l.member = m
		ts.Setenv("LEDGER_ENDPOINTS", m.Endpoint())
		l.client, err = clientv3.New(config())
		ts.Check(err)
	case "stop":
		l.member.Stop()
	case "restart":
		ts.Check(l.member.Restart())
	case "snapshot":
		_, err := snapshot.SaveWithVersion(ctx, zap.NewNop(), config(), ts.MkAbs(args[1]))
		ts.Check(err)
	case "restore":
		token := l.member.Token()
		if args[2] == "new" {
			token += "-new"
		}
		ts.Check(l.member.Restore(ts.MkAbs(args[1]), token))
	case "compact":
		r, err := l.client.Get(ctx, "x")
		ts.Check(err)
		_, err = l.client.Compact(ctx, r.Header.Revision)
		ts.Check(err)
	case "put":
		_, err := l.client.Put(ctx, labKeys.Prefix()+args[1], args[2])
		ts.Check(err)
	case "del":
		_, err := l.client.Delete(ctx, l.find(ts, ctx, args[1]))
		ts.Check(err)
	case "edit":
		key := l.find(ts, ctx, args[1])
		r, err := l.client.Get(ctx, key)
		ts.Check(err)
		text := string(r.Kvs[0].Value)
		if !strings.Contains(text, args[2]) {
			ts.Fatalf("%s is %s, which does not hold %q", key, text, args[2])
		}
		_, err = l.client.Put(ctx, key, strings.Replace(text, args[2], args[3], 1))
		ts.Check(err)
	case "newer":
		if args[1] == "meta" {
			ts.Check(l.newerMeta(ctx))
		} else {
			ts.Check(l.newer(ctx, args[1]))
		}
	default:
		ts.Fatalf("etcd %s: no such thing", args[0])
	}
}

// newer extends a node's chain as a later version of the plugin might.
func (l *lab) newer(ctx context.Context, node string) error {
	return l.extend(ctx, entry.Writer{Kind: entry.KindNode, Name: node}, filepath.Join("nodes", node), func(_ int64, v *keyspace.Writer, signer note.Signer) ([]clientv3.Op, error) {
		stored, err := note.Sign(&note.Note{Text: "ipam-ledger/entry/v2\nanything goes\n"}, signer)
		v.Seq, v.Hash = v.Seq+1, entry.HashOf(stored)
		return []clientv3.Op{clientv3.OpPut(labKeys.Entry(entry.Writer{Kind: entry.KindNode, Name: node}, v.Chain, v.Seq), string(stored))}, err
	})
}

// newerMeta makes it a ledger of the next version, as that version's operator would.
func (l *lab) newerMeta(ctx context.Context) error {
	r, err := l.client.Get(ctx, labKeys.Meta())
	if err != nil {
		return err
	}
	var m keyspace.Meta
	if err := keyspace.Decode(r.Kvs[0].Value, &m); err != nil {
		return err
	}
	alice := entry.Writer{Kind: entry.KindOperator, Name: "alice@desk"}
	return l.extend(ctx, alice, "operator", func(revision int64, v *keyspace.Writer, signer note.Signer) ([]clientv3.Op, error) {
		m.Version++
		e := &entry.Entry{
			Op: entry.Meta, Chain: v.Chain, Seq: v.Seq + 1, Prev: v.Hash, Time: time.Now().UTC(), Revision: revision,
			Cluster: m.Cluster, EtcdCluster: m.EtcdCluster, Epoch: m.Epoch, State: string(m.State), Version: uint64(m.Version),
		}
		stored, hash, err := entry.Sign(e, signer)
		v.Seq, v.Hash = e.Seq, hash
		m.Entry = v.Head()
		return []clientv3.Op{
			clientv3.OpPut(labKeys.Entry(alice, v.Chain, v.Seq), string(stored)),
			clientv3.OpPut(labKeys.Meta(), string(keyspace.Encode(m))),
		}, err
	})
}

// extend commits what f makes of a writer's head, and the head.
func (l *lab) extend(ctx context.Context, w entry.Writer, dir string, f func(revision int64, v *keyspace.Writer, signer note.Signer) ([]clientv3.Op, error)) error {
	r, err := l.client.Get(ctx, labKeys.Writer(w))
	if err != nil {
		return err
	}
	var v keyspace.Writer
	if err := keyspace.Decode(r.Kvs[0].Value, &v); err != nil {
		return err
	}
	skey, err := os.ReadFile(filepath.Join(l.dir, dir, "key"))
	if err != nil {
		return err
	}
	signer, _, err := entry.ReadSigner(strings.TrimSpace(string(skey)))
	if err != nil {
		return err
	}
	ops, err := f(r.Header.Revision, &v, signer)
	if err != nil {
		return err
	}
	_, err = l.client.Txn(ctx).Then(append(ops, clientv3.OpPut(labKeys.Writer(w), string(keyspace.Encode(v))))...).Commit()
	return err
}

// find returns the one key that fits a pattern.
func (l *lab) find(ts *testscript.TestScript, ctx context.Context, pattern string) string {
	r, err := l.client.Get(ctx, labKeys.Prefix(), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	ts.Check(err)
	var found []string
	for _, kv := range r.Kvs {
		if ok, err := filepath.Match(labKeys.Prefix()+pattern, string(kv.Key)); err != nil {
			ts.Check(err)
		} else if ok {
			found = append(found, string(kv.Key))
		}
	}
	if len(found) != 1 {
		ts.Fatalf("%s fits %d keys: %q", pattern, len(found), found)
	}
	return found[0]
}

// node NAME add POD [ADDRESS] | del POD, for the network prod of 10.22.0.0/24
// (blocks of 16); NAME@SUBNET takes its addresses from another subnet. The container is called c-POD. The state directory is nodes/NAME.
func (l *lab) node(ts *testscript.TestScript, neg bool, args []string) {
	now := time.Now
	if t := ts.Getenv("CLOCK"); t != "" {
		now = ticking(t)
	}
	err := l.onNode(now, args...)
	switch {
	case neg && err == nil:
		ts.Fatalf("node %q did not fail", args)
	case neg:
		fmt.Fprintln(ts.Stderr(), err)
	default:
		ts.Check(err)
	}
}

func (l *lab) onNode(now func() time.Time, args ...string) error {
	name, subnet, ok := strings.Cut(args[0], "@")
	if !ok {
		subnet = "10.22.0.0/24"
	}
	prefix, err := netip.ParsePrefix(subnet)
	if err != nil {
		return err
	}
	dir, err := statedir.Open(filepath.Join(l.dir, "nodes", name))
	if err != nil {
		return err
	}
	endpoint := l.endpoint
	if endpoint == "" {
		endpoint = l.member.Endpoint()
	}
	store := etcdstore.New(etcdstore.Config{Endpoints: []string{endpoint}, DialTimeout: time.Second})
	defer func() {
		// gRPC closes a connection that it has used: also a refused command's,
		// which asked nothing.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if c, err := store.Client(ctx); err == nil {
			_, _ = c.Get(ctx, "x")
		}
		store.Close()
	}()
	w, err := allocator.NewWriter(allocator.Config{
		Writer: entry.Writer{Kind: entry.KindNode, Name: name}, Store: store, Dir: dir, Keys: labKeys, Now: now, Timeout: patience,
		Random: func() uint64 { return 0 },
	})
	if err != nil {
		return err
	}
	id := keyspace.AttachmentID{Node: name, Network: "prod", Container: "c-" + args[2], Interface: "eth0"}
	switch args[1] {
	case "add":
		last := netipx.PrefixLastIP(prefix).Prev()
		pool, err := allocator.NewPool("default", "prod", [][]keyspace.Range{{{
			Subnet: prefix, Start: prefix.Addr().Next(), End: last, Gateway: prefix.Addr().Next(),
		}}}, nil, false, 16, 0)
		if err != nil {
			return err
		}
		req := allocator.Request{ID: id, Pool: pool, Pod: "shop/" + args[2], PodUID: "uid-" + args[2]}
		for _, s := range args[3:] {
			ip, err := netip.ParseAddr(s)
			if err != nil {
				return err
			}
			req.Requested = append(req.Requested, ip)
		}
		_, err = w.Acquire(context.Background(), req)
		return err
	case "del":
		return w.Release(context.Background(), id, "")
	}
	return fmt.Errorf("node %s: no such thing", args[1])
}

// TestWhen: what people type as a time.
func TestWhen(t *testing.T) {
	a := newApp()
	now := time.Date(2025, 1, 15, 14, 0, 0, 0, time.UTC)
	a.now = func() time.Time { return now }
	for text, want := range map[string]time.Time{
		"":                               {},
		"now":                            now,
		"-2h":                            now.Add(-2 * time.Hour),
		"90m":                            now.Add(-90 * time.Minute),
		"2025-01-15T13:00:00Z":           now.Add(-time.Hour),
		"2025-01-15T14:00:00.5+01:00":    now.Add(-time.Hour + 500*time.Millisecond),
		"2025-01-15 13:00":               time.Date(2025, 1, 15, 13, 0, 0, 0, time.Local),
		"2025-01-15 13:00:07":            time.Date(2025, 1, 15, 13, 0, 7, 0, time.Local),
		"2025-01-15":                     time.Date(2025, 1, 15, 0, 0, 0, 0, time.Local),
		"2025-01-15T13:00:07.123456789Z": time.Date(2025, 1, 15, 13, 0, 7, 123456789, time.UTC),
	} {
		got, err := a.when("--at", text)
		if err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"yesterday", "12:00", "2025-13-01", "--2h"} {
		if got, err := a.when("--at", text); err == nil {
			t.Errorf("%q: %v, want an error", text, got)
		}
	}
}

// TestBound: neighbours' clocks, with the writer's own, bound a time, in
// whatever order they are.
func TestBound(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	n := func(s int) *neighbour {
		if s == 0 {
			return nil
		}
		return &neighbour{Time: at(s)}
	}
	for _, c := range []struct {
		before, own, after int
		earliest, latest   int // 0: none
		disagree           bool
	}{
		{10, 20, 30, 10, 30, false},
		{0, 20, 30, 0, 30, false},
		{10, 20, 0, 10, 0, false},
		{0, 20, 0, 0, 0, false},
		{25, 20, 30, 20, 30, true}, // the one before is ahead
		{10, 20, 15, 10, 20, true}, // the one after is behind
		{30, 20, 10, 10, 30, true}, // all are wrong
		{10, 40, 30, 10, 40, true}, // our own is ahead
	} {
		b := boundOf("acquired", &boundary{logged: &logged{Time: at(c.own)}, Before: n(c.before), After: n(c.after)})
		same := func(p *time.Time, s int) bool { return p == nil && s == 0 || p != nil && s != 0 && p.Equal(at(s)) }
		if !same(b.Earliest, c.earliest) || !same(b.Latest, c.latest) || b.Disagree != c.disagree {
			t.Errorf("%+v: got %v to %v, %v", c, b.Earliest, b.Latest, b.Disagree)
		}
		for _, in := range []int{c.earliest, c.latest} {
			if in != 0 && !b.holds(at(in)) {
				t.Errorf("%+v: %d should lie within", c, in)
			}
		}
		if c.earliest != 0 && b.holds(at(c.earliest-1)) || c.latest != 0 && b.holds(at(c.latest+1)) {
			t.Errorf("%+v: a time outside lies within", c)
		}
	}
}

// TestOperatorName: whatever user and host are called, the name can stand in an entry.
func TestOperatorName(t *testing.T) {
	name, err := operatorName()
	if err != nil {
		t.Fatal(err)
	}
	if err := entry.ValidateName("operator", name); err != nil {
		t.Error(err)
	}
	a := newApp()
	env := map[string]string{}
	a.env = func(k string) string { return env[k] }
	for _, step := range []struct{ set, want string }{
		{"HOME=/home/alice", "/home/alice/.local/state/ipam-ledger/alice@vm"},
		{"XDG_STATE_HOME=relative", "/home/alice/.local/state/ipam-ledger/alice@vm"},
		{"XDG_STATE_HOME=/state", "/state/ipam-ledger/alice@vm"},
		{"LEDGER_OPERATOR_DIR=/own", "/own"},
	} {
		k, v, _ := strings.Cut(step.set, "=")
		env[k] = v
		if got, err := a.operatorDir("alice@vm"); got != step.want || err != nil {
			t.Errorf("%s: %s, %v; want %s", step.set, got, err, step.want)
		}
	}
}

// TestJudge: errors and the exit statuses they stand for.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		err  error
		code int
		hint bool
	}{
		{usage("x"), exitUnknown, false},
		{refuse("do y", "x"), exitWrong, true},
		{wrong, exitWrong, false},
		{fmt.Errorf("a: %w", allocator.ErrIntegrity), exitWrong, false},
		{fmt.Errorf("a: %w", allocator.ErrConflict), exitWrong, false},
		{fmt.Errorf("a: %w", allocator.ErrNotFound), exitWrong, false},
		{fmt.Errorf("a: %w", allocator.ErrUnavailable), exitUnknown, true},
		{fmt.Errorf("a: %w", allocator.ErrUnknownOutcome), exitUnknown, true},
		{fmt.Errorf("a: %w", errNoLedger), exitUnknown, true},
		{errors.New("x"), exitUnknown, false},
	} {
		code, text, hint := judge(c.err)
		if code != c.code || (hint != "") != c.hint || (text == "") != (c.err == wrong) {
			t.Errorf("%v: %d, %q, %q", c.err, code, text, hint)
		}
	}
}

// TestCount: a number and its noun.
func TestCount(t *testing.T) {
	for want, got := range map[string]string{
		"1 address":   count(1, "address"),
		"2 addresses": count(2, "address"),
		"0 entries":   count(0, "entry"),
		"3 releases":  count(3, "release"),
		"2 keys":      count(2, "key"),
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestEveryCommandIsTried: each command has a script that calls it.
func TestEveryCommandIsTried(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b))
	}
	text := strings.Join(all, "\n")
	root := newApp().root()
	var paths []string
	for _, c := range root.Commands() {
		paths = append(paths, c.CommandPath())
		for _, sub := range c.Commands() {
			paths = append(paths, sub.CommandPath())
		}
	}
	if !slices.Contains(paths, "ledger recover node") {
		t.Fatalf("commands are %q", paths)
	}
	for _, p := range paths {
		if !strings.Contains(text, p) {
			t.Errorf("no script calls %q", p)
		}
	}
}
