package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// errNoLedger says that there is nothing below the prefix to read.
var errNoLedger = errors.New("there is no ledger")

// settings are read once, when the first connection is to be made.
func (a *app) settings() (*config.Settings, error) {
	if a.loaded == nil {
		s, err := config.LoadCommand(a.file, a.flags, a.env)
		if err != nil {
			return nil, err
		}
		a.loaded = &s
	}
	return a.loaded, nil
}

// etcd is how etcd is reached, and the keys below the prefix.
func (a *app) etcd() (etcdstore.Config, keyspace.Keys, error) {
	s, err := a.settings()
	if err != nil {
		return etcdstore.Config{}, keyspace.Keys{}, err
	}
	keys, err := keyspace.New(s.Prefix)
	if err != nil {
		return etcdstore.Config{}, keyspace.Keys{}, err
	}
	c := etcdstore.FromSettings(*s)
	c.DialTimeout = min(2*time.Second, s.Timeout)
	return c, keys, nil
}

// patient gives each read its own deadline: a long reading may take long, one
// request may not.
type patient struct {
	clientv3.KV
	timeout time.Duration
}

func (p patient) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	return p.KV.Get(ctx, key, opts...)
}

// reader is a connection to read by.
type reader struct {
	store  *etcdstore.Store
	client *clientv3.Client
	keys   keyspace.Keys
	found  bool // meta
}

// connect opens a connection to read by. Its owner closes its store.
func (a *app) connect(ctx context.Context) (*reader, error) {
	c, keys, err := a.etcd()
	if err != nil {
		return nil, err
	}
	r := &reader{store: etcdstore.New(c), keys: keys}
	ctx, cancel := context.WithTimeout(ctx, a.loaded.Timeout)
	defer cancel()
	if err := r.probe(ctx, a.loaded.Timeout); err != nil {
		r.store.Close()
		return nil, err
	}
	return r, nil
}

// probe asks for meta by the store's own way, which names what is wrong with a
// certificate, a user or a role; the client alone would say that time is up.
func (r *reader) probe(ctx context.Context, timeout time.Duration) error {
	reply, err := r.store.Read(ctx, false, []allocator.Get{{Key: r.keys.Meta()}})
	if err != nil {
		return err
	}
	r.found = len(reply.Ranges[0].KVs) > 0
	if r.client, err = r.store.Client(ctx); err != nil {
		return err
	}
	r.client.KV = patient{r.client.KV, timeout}
	return nil
}

// retries is how often a reading starts anew after etcd compacted its revision.
const retries = 3

// read runs f on the export that from names or, where it names none, on etcd at
// one revision; live is nil for an export. f runs again where etcd compacted
// the revision in between.
func (a *app) read(ctx context.Context, from string, f func(src audit.Source, live *reader) error) error {
	if from != "" {
		src, err := audit.OpenExport(from)
		if err != nil {
			return err
		}
		defer src.Close()
		return f(src, nil)
	}
	r, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer r.store.Close()
	for tries := 1; ; tries++ {
		src, err := etcdstore.Open(ctx, r.client, r.keys)
		if err != nil {
			return err
		}
		err = r.store.Explain(ctx, f(src, r))
		if !errors.Is(err, etcdstore.ErrCompacted) || tries > retries {
			return err
		}
		a.warn("%v; reading anew", err)
	}
}

// haveLedger fails where etcd holds no ledger: an empty answer would be taken
// for one.
func (r *reader) haveLedger() error {
	if !r.found {
		return fmt.Errorf("%w: %s is absent", errNoLedger, r.keys.Meta())
	}
	return nil
}

// chat writes what the allocator has to say to stderr.
type chat struct{ a *app }

func (c chat) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (c chat) WithAttrs([]slog.Attr) slog.Handler           { return c }
func (c chat) WithGroup(string) slog.Handler                { return c }

func (c chat) Handle(_ context.Context, r slog.Record) error {
	what := "note"
	if r.Level >= slog.LevelWarn {
		what = "warning"
	}
	var b strings.Builder
	b.WriteString(r.Message)
	sep := ": "
	r.Attrs(func(at slog.Attr) bool {
		fmt.Fprintf(&b, "%s%s %v", sep, at.Key, at.Value)
		sep = ", "
		return true
	})
	c.a.complain(what, b.String())
	return nil
}

// writer returns a Writer on its state directory; done closes its connection.
func (a *app) writer(w entry.Writer, dir string) (_ *allocator.Writer, done func(), err error) {
	c, keys, err := a.etcd()
	if err != nil {
		return nil, nil, err
	}
	d, err := statedir.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	store := etcdstore.New(c)
	out, err := allocator.NewWriter(allocator.Config{
		Writer: w, Store: store, Dir: d, Keys: keys, Cluster: a.loaded.ClusterID,
		Timeout: a.loaded.Timeout, LockTimeout: a.loaded.LockTimeout, Log: slog.New(chat{a}), Now: a.now,
	})
	if err != nil {
		return nil, nil, err
	}
	return out, func() { store.Close() }, nil
}

// operator is who an operator's command writes as.
func (a *app) operator() (_ *allocator.Writer, done func(), err error) {
	name := a.as
	if name == "" {
		if name, err = operatorName(); err != nil {
			return nil, nil, err
		}
	}
	if err := entry.ValidateName("operator's name (--as)", name); err != nil {
		return nil, nil, usage("%w", err)
	}
	dir, err := a.operatorDir(name)
	if err != nil {
		return nil, nil, err
	}
	return a.writer(entry.Writer{Kind: entry.KindOperator, Name: name}, dir)
}

// operatorName is USER@HOST, spelt as a writer's name can be.
func operatorName() (string, error) {
	who := strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil && u.Username != "" {
		who = u.Username
	}
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("this host's name, which stands on the record: %w; say who you are with --as NAME", err)
	}
	name := strings.Map(func(r rune) rune {
		if r < 0x80 && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._@-", r)) {
			return r
		}
		return '-'
	}, who+"@"+host)
	return name[:min(len(name), entry.MaxName)], nil
}

// operatorDir is where an operator's key and mark are.
func (a *app) operatorDir(name string) (string, error) {
	if dir := a.env("LEDGER_OPERATOR_DIR"); dir != "" {
		return filepath.Abs(dir)
	}
	if dir := a.env("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "ipam-ledger", name), nil
	}
	if home := a.env("HOME"); home != "" {
		return filepath.Join(home, ".local", "state", "ipam-ledger", name), nil
	}
	if os.Getuid() == 0 {
		return filepath.Join("/var/lib/ipam-ledger-operator", name), nil
	}
	return "", usage("HOME is not set, so there is no place for the operator's key: set LEDGER_OPERATOR_DIR")
}

// node is this node's Writer. Unless create is set, its state directory must be
// there: a mistyped one must not look like a new node's.
func (a *app) node(create bool) (_ *allocator.Writer, done func(), err error) {
	s, err := a.settings()
	if err != nil {
		return nil, nil, err
	}
	if s.Node == "" {
		return nil, nil, usage("this host's name cannot be a node's: name the node with --node")
	}
	if !create {
		if err := haveStateDir(s.StateDir); err != nil {
			return nil, nil, err
		}
	}
	return a.writer(entry.Writer{Kind: entry.KindNode, Name: s.Node}, s.StateDir)
}

func haveStateDir(path string) error {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &failure{
			err:  fmt.Errorf("state directory %s does not exist: no pod has got an address from ipam-ledger on this host", path),
			hint: "run this on the node, or name its state directory with --state-dir", code: exitUnknown,
		}
	case err != nil:
		return fmt.Errorf("state directory: %w", err)
	case !st.IsDir():
		return fmt.Errorf("state directory %s is no directory", path)
	}
	return nil
}
