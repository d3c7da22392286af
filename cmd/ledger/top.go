package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/internal/top"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

func (a *app) top() *cobra.Command {
	var pool, space string
	var noVerify bool
	c := &cobra.Command{
		Use:   "top",
		Short: "A dashboard: pools, a map of their addresses, nodes, entries",
		Long: `A dashboard in the terminal: how full pools are, a map of a pool's addresses, nodes,
the entries as they are committed, and whether the ledger verifies.

It reads the ledger once and then follows it. While etcd is out of reach it says
so, and since when, above the last state that it knows. Keys are shown at the
bottom; ? lists all.

--pool opens a pool's page; without it LEDGER_POOL and LEDGER_SPACE say which, as
a bar's click sets them. NO_COLOR is respected.`,
		Example: `  ledger top
  ledger top --pool prod
  ledger top --pool default/prod --no-verify`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if pool == "" {
				pool = a.env("LEDGER_POOL")
				if space == "" {
					space = a.env("LEDGER_SPACE")
				}
			}
			name := pool
			if s, n, ok := strings.Cut(pool, "/"); ok {
				if space != "" && space != s {
					return usage("--pool %q and --space %q name two spaces", pool, space)
				}
				space, name = s, n
			}
			if name != "" {
				if err := entry.ValidateName("--pool", name); err != nil {
					return usage("%w", err)
				}
			}
			if space != "" {
				if err := entry.ValidateName("--space", space); err != nil {
					return usage("%w", err)
				}
			}
			if !a.terminalOut || !a.terminalIn {
				return &failure{
					err:  fmt.Errorf("ledger top needs a terminal"),
					hint: "'ledger show' and 'ledger log --follow' print the same for pipes and scripts", code: exitUnknown,
				}
			}
			etcd, keys, err := a.etcd()
			if err != nil {
				return err
			}
			if err := a.out.Flush(); err != nil {
				return err
			}
			return top.Run(cmd.Context(), top.Config{
				Etcd: etcd, Keys: keys, Timeout: a.loaded.Timeout, Output: os.Stdout, Clock: a.now,
				Options: top.Options{
					Pool: name, Space: space, Verify: !noVerify,
					Plain: a.env("NO_COLOR") != "" || a.env("TERM") == "dumb", ASCII: a.asciiOnly(),
				},
			})
		},
	}
	c.Flags().StringVar(&pool, "pool", "", "open the page of this `pool`: NAME or SPACE/NAME")
	c.Flags().StringVar(&space, "space", "", "of this address `space`")
	c.Flags().BoolVar(&noVerify, "no-verify", false, "verify only when asked to (v)")
	return c
}

// asciiOnly reports whether the terminal is said to show no more than ASCII.
func (a *app) asciiOnly() bool {
	if a.env("TERM") == "linux" { // its font lacks most of what maps are drawn with
		return true
	}
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := a.env(name); v != "" {
			v = strings.ToLower(v)
			return !strings.Contains(v, "utf-8") && !strings.Contains(v, "utf8")
		}
	}
	return false
}
