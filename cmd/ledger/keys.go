package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// chainKey is a key that a chain's entries are, or were, signed with.
type chainKey struct {
	Key    string    `json:"key"`
	Writer string    `json:"writer"`
	Chain  string    `json:"chain"`
	Entry  entry.Ref `json:"entry"` // the open or rotate that names it
	Since  time.Time `json:"since"`
	Status string    `json:"status"` // in use, rotated, ended, closed
	Bad    string    `json:"bad,omitempty"`
}

func (a *app) keys() *cobra.Command {
	c := &cobra.Command{Use: "keys", Short: "The keys that entries are signed with", RunE: a.group("list or export"), Args: cobra.ArbitraryArgs}
	var from string
	list := &cobra.Command{
		Use: "list", Short: "List the keys of all chains",
		Long:        "List the keys of all chains, those that are closed too, as the ledger names them.",
		Args:        args(0, 0, ""),
		Annotations: formats("table,wide,json,yaml,name"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.readKeys(cmd.Context(), from)
			if keys == nil {
				return err
			}
			if done, serr := a.structured(keys); done {
				return first(serr, err)
			}
			if a.output == "name" {
				for _, k := range keys {
					a.printf("%s\n", k.Key)
				}
				return err
			}
			t := a.table("WRITER", "CHAIN", "SINCE", "STATUS", "KEY")
			for _, k := range keys {
				chain := k.Chain
				if !a.wide() {
					chain = k.Entry.Chain.Short()
				}
				status := k.Status
				if k.Bad != "" {
					status = "BAD: " + k.Bad
				}
				t.row(k.Writer, chain, stamp(k.Since), status, k.Key)
			}
			t.flush()
			return err
		},
	}
	export := &cobra.Command{
		Use: "export", Short: "Write the keys for 'ledger verify --keys'",
		Long: `Write the keys of all chains, one a line with a comment above, for
'ledger verify --keys FILE'. Compare them with what the nodes themselves have
before you trust them. A key whose entry does not hold is left out.`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.readKeys(cmd.Context(), from)
			for _, k := range keys {
				if k.Bad != "" {
					a.warn("left out %s, entry %s: %s", k.Key, k.Entry.Short(), k.Bad)
					err = first(err, wrong)
					continue
				}
				a.printf("# %s, chain %s from entry %d, since %s, %s\n%s\n", k.Writer, k.Chain, k.Entry.Seq, stamp(k.Since), k.Status, k.Key)
			}
			return err
		},
	}
	for _, s := range []*cobra.Command{list, export} {
		s.Flags().StringVar(&from, "from", "", "read an export `file` instead of etcd")
		c.AddCommand(s)
	}
	return c
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// readKeys reads open, rotate and close entries. Keys may come with an error
// that says that something beside them is wrong.
func (a *app) readKeys(ctx context.Context, from string) ([]*chainKey, error) {
	var keys []*chainKey
	var s *scan
	err := a.read(ctx, from, func(src audit.Source, live *reader) (err error) {
		if live != nil {
			if err := live.haveLedger(); err != nil {
				return err
			}
		}
		keys = []*chainKey{}
		if s, err = newScan(src); err != nil {
			return err
		}
		current := map[entry.ChainID]*chainKey{}
		ends := func(c entry.ChainID, how string) {
			if k := current[c]; k != nil && k.Status != "closed" {
				k.Status = how
			}
		}
		return s.each(ctx, src, func(e *entry.Entry) bool { return e.Op == entry.Close }, func(r audit.Record, e *entry.Entry, l *logged) error {
			if l == nil {
				return nil
			}
			switch l.Op {
			case entry.Close:
				ends(l.Closes.Chain, "closed")
			case entry.Open, entry.Rotate:
				if l.Op == entry.Open && !l.Predecessor.IsZero() {
					ends(l.Predecessor.Chain, "ended")
				} else if l.Op == entry.Rotate {
					ends(l.Entry.Chain, "rotated")
				}
				k := &chainKey{Key: l.Key, Writer: l.Writer, Chain: l.Entry.Chain.String(), Entry: l.Entry, Since: l.Time, Status: "in use", Bad: l.Bad}
				current[l.Entry.Chain] = k
				keys = append(keys, k)
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Bad != "" {
			a.warn("%s of %s: %s", fmt.Sprintf("entry %s", k.Entry.Short()), k.Writer, k.Bad)
			err = wrong
		}
	}
	return keys, first(s.finish(a), err)
}
