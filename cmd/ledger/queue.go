package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

func (a *app) queue() *cobra.Command {
	c := &cobra.Command{
		Use: "queue", Short: "Releases that wait on this node for etcd",
		Long: `Releases that could not be committed when a pod went, because etcd was out of
reach or refused, wait in the node's state directory. Each contact with etcd takes
some along by itself.`,
		RunE: a.group("list or flush"), Args: cobra.ArbitraryArgs,
	}
	c.AddCommand(&cobra.Command{
		Use: "list", Short: "List the releases that wait",
		Args: args(0, 0, ""), Annotations: formats("table,wide,json,yaml,name"),
		RunE: func(*cobra.Command, []string) error {
			s, err := a.settings()
			if err != nil {
				return err
			}
			if err := haveStateDir(s.StateDir); err != nil {
				return err
			}
			d, err := statedir.Open(s.StateDir)
			if err != nil {
				return err
			}
			// Without the lock: a file that is renamed into place is whole, and one
			// that goes meanwhile was settled.
			q, qerr := d.Queue()
			if q == nil {
				q = []statedir.Queued{}
			}
			if done, err := a.structured(q); done {
				return first(err, qerr)
			}
			if a.output == "name" {
				for _, x := range q {
					a.printf("%s\n", printable(x.Attachment.String()))
				}
				return qerr
			}
			if len(q) == 0 {
				a.say("no release waits")
				return qerr
			}
			t := a.table("SINCE", "AGE", "ATTACHMENT", "REASON")
			for _, x := range q {
				t.row(stamp(x.Time), span(a.now().Sub(x.Time)), x.Attachment.String(), x.Reason)
			}
			t.flush()
			return qerr
		},
	}, &cobra.Command{
		Use: "flush", Short: "Settle the releases that wait, now",
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, done, err := a.node(false)
			if err != nil {
				return err
			}
			defer done()
			// A file that cannot be read keeps no other release waiting.
			before, unread := w.Dir.Queue()
			left, err := w.Drain(cmd.Context())
			if err != nil {
				return err
			}
			if n := len(before) - left; n > 0 {
				a.printf("%s settled\n", count(n, "release"))
			}
			if left > 0 {
				return errors.Join(refuse("the warning above says why; 'ledger doctor' looks further", "%s of %d cannot be settled now and wait on", count(left, "release"), len(before)), unread)
			}
			if unread != nil {
				return refuse("'ledger gc' frees the address of a pod that is gone; then move the file away", "a release that waits cannot be read: %w", unread)
			}
			if len(before) == 0 {
				a.printf("no release waits\n")
			}
			return nil
		},
	})
	return c
}
