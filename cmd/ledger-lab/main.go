// Command ledger-lab is a cluster on one machine, to see ipam-ledger work
// before trusting it with one.
//
//	ledger-lab demo            the whole story in one go, then nothing is left
//	ledger-lab demo --keep     the same, and the lab stays up until Ctrl-C
//	ledger-lab desktop         the state of a cluster in a bar of Sway
//	ledger-lab etcd --dir DIR  one etcd member in the foreground
//
// It guarantees that whatever it made is gone when it ends, also when a step
// fails, panics or is interrupted: network namespaces are held by this process
// alone and die with it, bridges and pairs of interfaces live inside them, and
// files are below one temporary directory. Nothing is made in the namespace it
// was started in. Only a SIGKILL can leave something: that directory.
//
// It exits 0 when every step showed what it claims to show, 130 (143, …) when
// it was interrupted, and 1 otherwise.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the linker.
var version string

func main() { os.Exit(run(os.Args[1:])) }

// interrupted is the cause of a context that a signal ended.
type interrupted struct{ syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.Signal.String() }

func run(args []string) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 1)
	// SIGPIPE is among them so that "ledger-lab demo | head" cleans up, too.
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	go func() {
		s := <-signals
		// A second one ends the process at once. Not so SIGPIPE: what is still
		// written must not keep us from cleaning up.
		signal.Reset(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		if s, ok := s.(syscall.Signal); ok {
			cancel(interrupted{s})
		}
	}()

	root := rootCommand()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var by interrupted
	switch {
	case err == nil:
		return 0
	case errors.As(context.Cause(ctx), &by):
		fmt.Fprintf(os.Stderr, "ledger-lab: %v\n", by)
		return 128 + int(by.Signal)
	}
	fmt.Fprintf(os.Stderr, "ledger-lab: error: %v\n", err)
	return 1
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "ledger-lab",
		Short:         "A cluster on one machine, to see ipam-ledger work",
		Args:          cobra.NoArgs,
		Version:       buildVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(demoCommand(), desktopCommand(), etcdCommand())
	return root
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}

func demoCommand() *cobra.Command {
	o := options{out: os.Stdout, colour: colourWanted(os.Stdout)}
	c := &cobra.Command{
		Use:   "demo",
		Short: "Three nodes, twelve pods, one etcd: the whole story in one go",
		Long: `Three nodes, twelve pods, one etcd: the whole story in one go.

As root, nodes and pods are real network namespaces, set up through libcni with
an ordinary network configuration (bridge + ipam-ledger), and pods ping each
other. Otherwise the plugin is executed in the same way without them.

The programs it runs are those beside it: ipam-ledger, ledger, bridge ("make"
builds them all). When it ends, nothing that it made is left.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.bin, err = programsIn(o.bin); err != nil {
				return err
			}
			return demo(cmd.Context(), o)
		},
	}
	c.Flags().BoolVar(&o.keep, "keep", false, "leave the lab up until Ctrl-C and say what to type")
	c.Flags().StringVar(&o.bin, "bin", "", "directory of ipam-ledger, ledger and bridge (default: where ledger-lab is)")
	c.Flags().BoolVar(&o.direct, "direct", false, "execute the plugin without namespaces, also as root")
	return c
}

// programsIn is the directory of the programs that a demo runs: bin, or where
// ledger-lab itself is.
func programsIn(bin string) (string, error) {
	if bin == "" {
		self, err := os.Executable()
		if err == nil {
			self, err = filepath.EvalSymlinks(self)
		}
		if err != nil {
			return "", fmt.Errorf("finding the programs beside ledger-lab: %w; name their directory with --bin", err)
		}
		bin = filepath.Dir(self)
	}
	abs, err := filepath.Abs(bin)
	if err != nil {
		return "", fmt.Errorf("--bin %s: %w", bin, err)
	}
	return abs, nil
}
