// Command ledger reads, checks and administers an IPAM ledger.
//
// It guarantees that stdout carries what was asked for and nothing else, that
// whatever changes the ledger is on the record under the caller's name, and
// that its exit status can be relied on: 0 fine, 1 something is wrong or was
// refused, 2 it could not be done or not be known, 3 (verify alone) verified
// with reduced coverage.
//
// Two identities write. Operators' commands extend the chain of
// operator/USER@HOST, whose key is in the caller's own state directory. Commands
// about a node (recover node, import, queue) act as that node, with its state
// directory, and so run on it, as root.
//
// Everything that reads a ledger reads it at one revision, from etcd or from an
// export (--from FILE), in commit order.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// version is set by the linker.
var version string

func main() { start(newApp()) }

// start runs a until it ends or a signal ends it.
func start(a *app) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		s := (<-signals).(syscall.Signal)
		signal.Stop(signals) // a second one ends the process at once
		cancel(interrupted{s})
	}()
	os.Exit(a.run(ctx, os.Args[1:]))
}

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.Signal.String() }

// app is one run of the command.
type app struct {
	in                                   io.Reader
	out                                  *bufio.Writer
	err                                  io.Writer
	terminalIn, terminalOut, terminalErr bool

	env  func(string) string
	now  func() time.Time
	boot func() (leak.Moment, error) // as statedir.Now

	flags  config.Settings // zero where a flag was not given
	file   string          // --config
	output string          // -o
	as     string          // --as
	loaded *config.Settings
}

func newApp() *app {
	return &app{
		in: os.Stdin, out: bufio.NewWriterSize(os.Stdout, 1<<16), err: os.Stderr,
		terminalIn: term.IsTerminal(int(os.Stdin.Fd())), terminalOut: term.IsTerminal(int(os.Stdout.Fd())), terminalErr: term.IsTerminal(int(os.Stderr.Fd())),
		env: os.Getenv, now: time.Now, boot: statedir.Now,
	}
}

// Exit statuses.
const (
	exitFine    = 0
	exitWrong   = 1
	exitUnknown = 2
)

// failure is an error with what else is to be said and the exit status it
// stands for. Without err nothing is left to say.
type failure struct {
	err  error
	hint string
	code int
}

func (f *failure) Error() string {
	if f.err == nil {
		return "failed"
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// wrong is an exit with status 1 after all has been said.
var wrong = &failure{code: exitWrong}

// usage is an error in what was typed.
func usage(format string, args ...any) error {
	return &failure{err: fmt.Errorf(format, args...), code: exitUnknown}
}

// refuse is an answer: no.
func refuse(hint, format string, args ...any) error {
	return &failure{err: fmt.Errorf(format, args...), hint: hint, code: exitWrong}
}

func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	err := root.ExecuteContext(ctx)
	var by interrupted
	if errors.As(context.Cause(ctx), &by) && err != nil {
		a.out.Flush()
		fmt.Fprintf(a.err, "ledger: %v\n", by)
		return 128 + int(by.Signal)
	}
	if ferr := a.out.Flush(); ferr != nil && err == nil {
		err = fmt.Errorf("writing the answer: %w", ferr)
	}
	if err == nil {
		return exitFine
	}
	code, text, hint := judge(err)
	if text != "" {
		a.complain("error", text)
	}
	if hint != "" {
		a.complain("hint", hint)
	}
	return code
}

// judge turns an error into an exit status, a text and a hint.
func judge(err error) (code int, text, hint string) {
	code, text = exitUnknown, err.Error()
	var f *failure
	if errors.As(err, &f) {
		code, hint = f.code, f.hint
		if f.err == nil {
			text = ""
		}
	} else {
		for _, e := range []error{allocator.ErrIntegrity, allocator.ErrConflict, allocator.ErrNotFound} {
			if errors.Is(err, e) {
				code = exitWrong
			}
		}
	}
	var c *types.Error // of pkg/config, made for the plugin
	if errors.As(err, &c) && c.Details != "" {
		text = c.Details
	}
	if hint == "" {
		switch {
		case errors.Is(err, etcdstore.ErrDenied):
			hint = "'ledger auth --help' says what each role may do"
		case errors.Is(err, allocator.ErrUnavailable):
			hint = "'ledger doctor' probes each endpoint; they come from --endpoints, LEDGER_ENDPOINTS, the configuration file, or ETCDCTL_ENDPOINTS"
		case errors.Is(err, allocator.ErrUnknownOutcome):
			hint = "it may have been done or not: run the same command again, which is safe"
		case errors.Is(err, errNoLedger), errors.Is(err, allocator.ErrNotInitialised) && !strings.Contains(text, "do not run"):
			hint = "'ledger init' makes a ledger; if there should be one, check --endpoints and --prefix, and do not run it"
		}
	}
	return code, text, hint
}

// complain writes to stderr; further lines are indented.
func (a *app) complain(what, text string) {
	text = strings.ReplaceAll(printableLines(strings.TrimRight(text, "\n")), "\n", "\n  ")
	text = strings.ReplaceAll(text, "\n    ", "\n  ") // was indented already
	a.out.Flush()                                     // what was said before comes before
	fmt.Fprintf(a.err, "ledger: %s: %s\n", what, text)
}

func (a *app) warn(format string, args ...any) { a.complain("warning", fmt.Sprintf(format, args...)) }

// say is talk, which goes to stderr.
func (a *app) say(format string, args ...any) {
	a.out.Flush()
	fmt.Fprintf(a.err, format+"\n", args...)
}

func (a *app) printf(format string, args ...any) { fmt.Fprintf(a.out, format, args...) }

const exitCodesText = `Exit codes of ledger:

  0  fine
  1  something is wrong, or the ledger refused: verify has findings, doctor a
     FAIL, auth plan changes, an address or attachment is not there, a conflict,
     a signature that does not hold, or you answered no
  2  it could not be done, or cannot be known: no connection, wrong usage, a
     file that cannot be read, an outcome that etcd did not confirm
  3  verify alone: verified, with reduced coverage (it says what was left out)

128 + N means that signal N ended it. The codes are the same with -o json.`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "ledger",
		Short: "Read, check and administer an IPAM ledger",
		Long: `ledger reads, checks and administers the ledger of pod addresses that the CNI
plugin ipam-ledger writes to etcd.

Where etcd is and how to get in comes from, the strongest first: flags, LEDGER_*
(LEDGER_ENDPOINTS, LEDGER_CACERT, LEDGER_CERT, LEDGER_KEY, LEDGER_USER,
LEDGER_PASSWORD_FILE, LEDGER_PREFIX, LEDGER_TIMEOUT, LEDGER_NODE,
LEDGER_STATE_DIR, LEDGER_CONFIG), the file /etc/ipam-ledger/config.json,
etcdctl's ETCDCTL_*, and last http://127.0.0.1:2379.

Exit status: 0 fine, 1 something is wrong or was refused, 2 could not be done,
3 verified with reduced coverage ('ledger help exit-codes').`,
		Version:           buildVersion(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              cobra.ArbitraryArgs,
		RunE:              a.group("a command"),
		PersistentPreRunE: a.checkOutput,
	}
	root.SetVersionTemplate("ledger {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return &failure{err: err, hint: "'" + cmd.CommandPath() + " --help' lists the flags", code: exitUnknown}
	})
	p := root.PersistentFlags()
	p.StringSliceVar(&a.flags.Endpoints, "endpoints", nil, "etcd's `URLs`, with commas between")
	p.StringVar(&a.flags.CAFile, "cacert", "", "`file` with the CA of etcd's certificate")
	p.StringVar(&a.flags.CertFile, "cert", "", "`file` with the client's certificate")
	p.StringVar(&a.flags.KeyFile, "key", "", "`file` with the client's key")
	p.StringVar(&a.flags.Username, "user", "", "etcd `user`")
	p.StringVar(&a.flags.PasswordFile, "password-file", "", "`file` with the user's password, mode 0600")
	p.StringVar(&a.flags.Prefix, "prefix", "", "`prefix` of all keys (default /ipam-ledger/v1/)")
	p.StringVar(&a.file, "config", "", "configuration `file`")
	p.DurationVar(&a.flags.Timeout, "timeout", 0, "how long one call to etcd may take (default 10s)")
	p.StringVar(&a.flags.Node, "node", "", "`name` of the node that a node's command acts as (default: this host's)")
	p.StringVar(&a.flags.StateDir, "state-dir", "", "the node's state `directory` (default /var/lib/ipam-ledger)")
	p.StringVarP(&a.output, "output", "o", "", "output `format`: table, wide, json, yaml or name")
	p.StringVar(&a.as, "as", "", "operator's `name` on the record (default USER@HOST)")
	_ = root.RegisterFlagCompletionFunc("output", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return strings.Split(cmd.Annotations[outputs], ","), cobra.ShellCompDirectiveNoFileComp
	})
	root.AddGroup(
		&cobra.Group{ID: "look", Title: "Look and check:"},
		&cobra.Group{ID: "act", Title: "Act, as an operator and on the record:"},
		&cobra.Group{ID: "node", Title: "On a node, as that node:"},
		&cobra.Group{ID: "more", Title: "More:"},
	)
	add := func(group string, cc ...*cobra.Command) {
		for _, c := range cc {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("look", a.show(), a.top(), a.publish(), a.ip(), a.log(), a.verify(), a.export(), a.keys(), a.doctor())
	add("act", a.init(), a.release(), a.unclaim(), a.gc(), a.freeze(), a.thaw(), a.recover(), a.nodeCommands(), a.auth())
	add("node", a.importCommand(), a.queue())
	add("more", a.versionCommand())
	root.SetHelpCommandGroupID("more")
	root.SetCompletionCommandGroupID("more")
	root.AddCommand(a.man(), &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: exitCodesText})
	return root
}

// group is what a command does that only has commands below it.
func (a *app) group(what string) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		hint := "'" + cmd.CommandPath() + " --help' lists them"
		if len(args) == 0 {
			if !cmd.HasParent() {
				return cmd.Help()
			}
			return &failure{err: fmt.Errorf("%s needs %s", cmd.CommandPath(), what), hint: hint, code: exitUnknown}
		}
		cmd.SuggestionsMinimumDistance = 2
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = "did you mean '" + cmd.CommandPath() + " " + near[0] + "'?"
		}
		return &failure{err: fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0]), hint: hint, code: exitUnknown}
	}
}

// args checks how many arguments a command got. want names them all.
func args(least, most int, want string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		if len(got) >= least && (most < 0 || len(got) <= most) {
			return nil
		}
		text := "takes no argument"
		if want != "" {
			text = "takes " + want
		}
		return &failure{
			err:  fmt.Errorf("%s %s, and got %s", cmd.CommandPath(), text, quoted(got)),
			hint: "'" + cmd.CommandPath() + " --help' shows how", code: exitUnknown,
		}
	}
}

func quoted(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	var out []string
	for _, s := range list {
		out = append(out, fmt.Sprintf("%q", s))
	}
	return strings.Join(out, " ")
}
