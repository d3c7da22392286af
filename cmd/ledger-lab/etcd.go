package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
)

func etcdCommand() *cobra.Command {
	var o etcdmember.Options
	c := &cobra.Command{
		Use:   "etcd --dir DIR",
		Short: "One etcd member in the foreground, to follow the README by hand",
		Long: `One etcd member in the foreground, to follow the README by hand.

It speaks plaintext, asks nobody for a password and has no second member: for
trying things out, not for a cluster. Its data stays in DIR.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runEtcd(cmd.Context(), os.Stdout, o)
		},
	}
	c.Flags().StringVar(&o.Dir, "dir", "", "data directory, made if it is absent")
	c.Flags().StringVar(&o.Listen, "listen", "127.0.0.1:2379", "host:port for clients; port 0 takes a free one")
	if err := c.MarkFlagRequired("dir"); err != nil {
		panic(err) // the flag is defined two lines above
	}
	return c
}

// runEtcd runs a member until ctx ends. That is its normal end.
func runEtcd(ctx context.Context, out io.Writer, o etcdmember.Options) error {
	if o.Dir == "" {
		return errors.New("--dir is empty: name a directory for etcd's data")
	}
	m, err := etcdmember.Start(o)
	if err != nil {
		return err
	}
	defer m.Close()
	if _, err := fmt.Fprintf(out, `etcd is up at %s, its data is in %s.
Type in another terminal:

    export LEDGER_ENDPOINTS=%[1]s
    ledger init

Ctrl-C stops it; the data stays.
`, m.Endpoint(), m.Dir()); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-m.Failed():
		return fmt.Errorf("etcd at %s: %w", m.Endpoint(), err)
	}
}
