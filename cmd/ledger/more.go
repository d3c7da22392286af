package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

func buildVersion() string {
	if version != "" {
		return version
	}
	if b, ok := debug.ReadBuildInfo(); ok && b.Main.Version != "" {
		return b.Main.Version
	}
	return "unknown"
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "version",
		Short:       "The version of this program and of the formats it writes",
		Args:        args(0, 0, ""),
		Annotations: formats("table,json,yaml"),
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
				Format  int    `json:"format"`
				Entry   string `json:"entry"`
				Go      string `json:"go"`
				System  string `json:"system"`
			}{buildVersion(), keyspace.FormatVersion, entry.Header, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			if done, err := a.structured(v); done {
				return err
			}
			a.printf("ledger %s (ledger format %d, %s, %s)\n", v.Version, v.Format, v.Go, v.System)
			return nil
		},
	}
}

func (a *app) man() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the manual pages into a directory",
		Hidden: true,
		Args:   args(1, 1, "a directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			date := time.Unix(0, 0).UTC() // the same pages from the same source
			h := &doc.GenManHeader{Title: "LEDGER", Section: "1", Source: "ipam-ledger " + buildVersion(), Manual: "ipam-ledger", Date: &date}
			if err := doc.GenManTree(root, h, args[0]); err != nil {
				return fmt.Errorf("manual pages: %w", err)
			}
			return nil
		},
	}
}
