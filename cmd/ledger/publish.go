package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/publish"
	"github.com/ipam-ledger/ipam-ledger/swaybar/ipc"
	bar "github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

func (a *app) publish() *cobra.Command {
	var o struct {
		source, command, keys string
		print                 bool
		verify, heartbeat     time.Duration
	}
	c := &cobra.Command{
		Use:   "publish",
		Short: "Send the state of the pools to the bars of this desktop",
		Long: `Follow the ledger and tell the bars of this desktop (ledger-swaybar) how full the
pools are, whether the ledger verifies and how old that knowledge is. It runs
until it is ended, for every sway of this user, and lives through whatever
becomes of etcd and sway.

States go out over Sway IPC, where every program of the session can read them:
they hold counts and the names of pools, no address and no pod. They are also in
$XDG_RUNTIME_DIR/ipam-ledger/state-SOURCE.json, and the latest in state.json.

The whole ledger is verified at the start and at --verify-interval; what is
committed in between is checked as it comes.

The name of the source is the beginning of the cluster's ID. While etcd cannot be
reached nobody knows that: with --source NAME the bars are told of it from the
start. One publisher runs for a source; several run side by side.

Where only a bastion reaches etcd, --print writes the states as lines there, and
--from-command reads them here.`,
		Example: `  ledger publish --source prod
  ledger publish --source prod --from-command 'ssh bastion ledger publish --print'`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			talk := &speaker{w: a.err}
			cfg := publish.Config{Source: o.source, Heartbeat: o.heartbeat, Log: slog.New(talk)}
			if o.source != "" {
				if err := publish.ValidSource(o.source); err != nil {
					return usage("--source: %w", err)
				}
			}
			if o.heartbeat < time.Second || o.heartbeat > time.Hour {
				return usage("--heartbeat %s: want 1s to 1h", o.heartbeat)
			}
			if o.verify < 10*time.Second {
				return usage("--verify-interval %s: want 10s or more", o.verify)
			}
			if o.command != "" {
				for _, f := range []string{"verify-interval", "keys"} {
					if cmd.Flags().Changed(f) {
						return usage("--%s and --from-command: it belongs to the command, which verifies", f)
					}
				}
				cfg.Feed = &publish.Command{Shell: o.command}
			} else {
				e, err := a.publishFeed(o.keys)
				if err != nil {
					return err
				}
				e.VerifyEvery = o.verify
				cfg.Feed = e
			}
			if o.print {
				cfg.Print = &flushing{a}
			} else {
				dir := a.env("XDG_RUNTIME_DIR")
				if !filepath.IsAbs(dir) {
					return &failure{
						err: errors.New("XDG_RUNTIME_DIR is not set, so there is no session to publish to"), code: exitUnknown,
						hint: "run it in the desktop's session, as the same user; or with --print, which needs none",
					}
				}
				cfg.Dir, cfg.Sockets = filepath.Join(dir, "ipam-ledger"), ipc.Sockets
				cfg.Open = func(path string) ipc.Bus { return ipc.Open(path) }
			}
			p, err := publish.New(cfg)
			if err != nil {
				return err
			}
			err = p.Run(cmd.Context())
			if errors.Is(err, publish.ErrLocked) {
				return refuse("end it first; another cluster needs another --source", "%w", err)
			}
			return err // none where it was ended, which is the normal end
		},
	}
	f := c.Flags()
	f.StringVar(&o.source, "source", "", "`name` that the bars show (default: the first 8 digits of the cluster's ID)")
	f.DurationVar(&o.verify, "verify-interval", publish.DefaultVerifyEvery, "`time` between verifications of the whole ledger")
	f.StringVar(&o.keys, "keys", "", "trust only the keys in this `file` ('ledger keys export' makes one)")
	f.DurationVar(&o.heartbeat, "heartbeat", bar.DefaultHeartbeat, "`time` after which the state is repeated; bars take three of them for an end")
	f.BoolVar(&o.print, "print", false, "write the states to stdout, one JSON document a line, and nowhere else")
	f.StringVar(&o.command, "from-command", "", "read the states from the lines of this shell `command` instead of etcd")
	return c
}

// publishFeed reads the ledger in etcd.
func (a *app) publishFeed(keysFile string) (*publish.Etcd, error) {
	c, keys, err := a.etcd()
	if err != nil {
		return nil, err
	}
	if _, err := c.TLS(); err != nil { // a file that is not there will not come
		return nil, err
	}
	e := &publish.Etcd{Store: c, Keys: keys, Timeout: min(5*time.Second, a.loaded.Timeout)}
	if keysFile != "" {
		f, err := os.Open(keysFile)
		if err != nil {
			return nil, fmt.Errorf("--keys: %w", err)
		}
		defer f.Close()
		if e.Trusted, err = audit.ParseKeys(f); err != nil {
			return nil, fmt.Errorf("--keys %s: %w", keysFile, err)
		}
	}
	return e, nil
}

// flushing writes to stdout at once.
type flushing struct{ a *app }

func (f *flushing) Write(b []byte) (int, error) {
	n, err := f.a.out.Write(b)
	if err == nil {
		err = f.a.out.Flush()
	}
	return n, err
}

// speaker writes what a long-running command has to say to stderr, a line each.
// Unlike chat it may be used by many goroutines, and leaves stdout alone.
type speaker struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *speaker) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }
func (s *speaker) WithAttrs([]slog.Attr) slog.Handler           { return s }
func (s *speaker) WithGroup(string) slog.Handler                { return s }

func (s *speaker) Handle(_ context.Context, r slog.Record) error {
	what := "note"
	switch {
	case r.Level >= slog.LevelError:
		what = "FINDING"
	case r.Level >= slog.LevelWarn:
		what = "warning"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "ledger: %s: %s", what, r.Message)
	sep := ": "
	r.Attrs(func(at slog.Attr) bool {
		if at.Key == "err" {
			fmt.Fprintf(&b, ": %v", at.Value)
		} else {
			fmt.Fprintf(&b, "%s%s %v", sep, at.Key, at.Value)
		}
		sep = ", "
		return true
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := io.WriteString(s.w, printable(b.String())+"\n")
	return err
}
