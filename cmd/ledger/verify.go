package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"github.com/spf13/cobra"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
)

func (a *app) verify() *cobra.Command {
	var from, keys, report string
	var all, explain bool
	c := &cobra.Command{
		Use:   "verify",
		Short: "Check every entry and compare with what is live",
		Long: `Check the whole ledger at one revision: that every entry is there, in its place
and signed; that no address ever had two holders; that what is live is exactly
what the entries add up to.

Exit status: 0 verified, 1 findings, 2 could not check, 3 verified with reduced
coverage. --explain says what each finding means, and what cannot be detected.

Keys are believed as the ledger names them, unless --keys pins them.`,
		Example: `  ledger verify
  ledger verify --keys trusted.keys --all-signatures
  ledger verify --from ledger.export -o json`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,json,yaml"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if explain {
				a.printf("%s", audit.Explain())
				return nil
			}
			o := audit.Options{AllSignatures: all}
			if keys != "" {
				f, err := os.Open(keys)
				if err != nil {
					return fmt.Errorf("--keys: %w", err)
				}
				o.Keys, err = audit.ParseKeys(f)
				f.Close()
				if err != nil {
					return fmt.Errorf("--keys %s: %w", keys, err)
				}
			}
			return a.runVerify(cmd.Context(), from, report, o)
		},
	}
	c.Flags().StringVar(&from, "from", "", "verify an export `file`; no etcd is asked")
	c.Flags().StringVar(&keys, "keys", "", "trust only the keys in this `file` ('ledger keys export' makes one)")
	c.Flags().BoolVar(&all, "all-signatures", false, "check every signature, not only those that cover the rest")
	c.Flags().BoolVar(&explain, "explain", false, "say what the findings mean and what cannot be detected, and check nothing")
	c.Flags().StringVar(&report, "report", "", "also write the whole report as JSON to this `file`")
	return c
}

func (a *app) runVerify(ctx context.Context, from, reportFile string, o audit.Options) error {
	began := time.Now()
	var drawn bool
	if a.terminalErr && a.env("TERM") != "dumb" {
		var last time.Time
		o.Progress = func(n int64) {
			now := time.Now()
			if now.Sub(began) < time.Second || now.Sub(last) < 200*time.Millisecond {
				return
			}
			last, drawn = now, true
			fmt.Fprintf(a.err, "\r\x1b[K%s, %.0f a second", count(n, "entry"), float64(n)/now.Sub(began).Seconds())
		}
	}
	var r *audit.Report
	err := a.read(ctx, from, func(src audit.Source, _ *reader) (err error) {
		r, err = audit.Verify(ctx, src, o)
		return err
	})
	if drawn {
		fmt.Fprint(a.err, "\r\x1b[K")
	}
	if err != nil {
		return &failure{err: fmt.Errorf("could not check: %w", err), code: audit.ExitUnknown, hint: hintOf(err)}
	}
	if reportFile != "" {
		b, err := marshal(r, "  ")
		if err != nil {
			return err
		}
		if err := renameio.WriteFile(reportFile, b, 0o600); err != nil {
			return fmt.Errorf("--report: %w", err)
		}
	}
	if done, err := a.structured(r); err != nil {
		return err
	} else if !done {
		a.showReport(r, from)
	}
	if code := r.ExitCode(); code != audit.ExitVerified {
		return &failure{code: code}
	}
	return nil
}

// hintOf is the hint that an error would have by itself.
func hintOf(err error) string {
	_, _, hint := judge(err)
	return hint
}

func (a *app) showReport(r *audit.Report, from string) {
	show := func(f *audit.Finding, colour string) {
		a.printf("%s %s", a.paint(colour, string(f.Code)), printable(f.Where))
		if f.Writer != "" && !strings.Contains(f.Where, f.Writer) {
			a.printf(" (%s)", f.Writer)
		}
		if f.Revision > 0 {
			a.printf(", revision %d", f.Revision)
		}
		a.printf("\n  %s\n", printable(f.Detail))
		if f.Want != "" || f.Got != "" {
			a.printf("  want  %s\n  got   %s\n", side(f.Want), side(f.Got))
		}
	}
	for i := range r.Findings {
		show(&r.Findings[i], red)
	}
	if more := r.FindingCount - int64(len(r.Findings)); more > 0 {
		a.printf("and %d findings more\n", more)
	}
	for i := range r.Warnings {
		a.printf("warning: ")
		show(&r.Warnings[i], yellow)
	}
	if more := r.WarningCount - int64(len(r.Warnings)); more > 0 {
		a.printf("and %d warnings more\n", more)
	}
	if r.FindingCount > 0 || r.WarningCount > 0 {
		a.printf("\n")
	}
	what := "etcd"
	if from != "" {
		what = "export " + from + " of etcd"
	}
	cluster := r.Cluster
	if cluster == "" {
		cluster = "unknown"
	}
	a.printf("covered     %s cluster %s at revision %d, taken %s\n", what, r.EtcdCluster, r.Revision, stamp(r.Taken))
	a.printf("ledger      %s, epoch %d, %s\n", cluster, r.Epoch, r.State)
	a.printf("entries     %d in %s of %s, revisions %d to %d\n", r.Entries, count(r.Chains, "chain"), count(r.Writers, "writer"), r.First, r.Last)
	a.printf("live        %s leased, %d free, %s, %s\n", count(r.Leased, "address"), r.Free, count(r.Attachments, "attachment"), count(r.Blocks, "block"))
	sigs := "of each chain's last and of all that change keys or state; they cover the rest by its hashes"
	if r.AllSignatures {
		sigs = "all"
	}
	a.printf("signatures  %d checked (%s)\n", r.Signatures, sigs)
	if r.Pinned {
		a.printf("keys        pinned\n")
	} else {
		a.printf("keys        first use, not pinned (pin them: ledger keys export > FILE)\n")
	}
	for _, n := range r.Notes {
		a.printf("note        %s\n", printable(n))
	}
	for _, n := range r.Reduced {
		a.printf("reduced     %s\n", printable(n))
	}
	a.printf("\n")
	switch r.ExitCode() {
	case audit.ExitFindings:
		var codes []audit.Code
		for c := range r.ByCode {
			codes = append(codes, c)
		}
		slices.Sort(codes)
		var parts []string
		for _, c := range codes {
			parts = append(parts, fmt.Sprintf("%d %s", r.ByCode[c], c))
		}
		a.printf("%s: %s: %s\n", a.paint(red, "NOT VERIFIED"), count(r.FindingCount, "finding"), strings.Join(parts, ", "))
		a.complain("hint", "'ledger verify --explain' says what the codes mean; 'ledger export FILE' keeps the evidence as it is now")
	case audit.ExitReduced:
		a.printf("%s\n", a.paint(yellow, "verified with reduced coverage"))
	default:
		a.printf("%s\n", a.paint(green, "verified"))
	}
}

// side is one side of a finding.
func side(s string) string {
	if s == "" {
		return "nothing"
	}
	return printable(s)
}

func (a *app) export() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:   "export FILE",
		Short: "Write the whole ledger at one revision to a file",
		Long: `Write the whole ledger, state and entries, at one revision to FILE (mode 0600), or
to standard output for "-". 'ledger verify --from FILE' checks it where there is
no etcd; show, ip, log and keys read it, too.`,
		Args: args(1, 1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.runExport(cmd.Context(), args[0], force) },
	}
	c.Flags().BoolVar(&force, "force", false, "replace FILE if it exists")
	return c
}

func (a *app) runExport(ctx context.Context, file string, force bool) error {
	if file == "-" {
		if a.terminalOut {
			return usage("an export is not for a terminal: name a file, or send it through a pipe")
		}
		return a.read(ctx, "", func(src audit.Source, live *reader) error {
			if err := live.haveLedger(); err != nil {
				return err
			}
			err := audit.WriteExport(ctx, a.out, src)
			if err != nil {
				// Half of one is out: it cannot be taken back and begun anew.
				return fmt.Errorf("what was written is not a whole export: %v", err)
			}
			return nil
		})
	}
	if _, err := os.Lstat(file); err == nil && !force {
		return refuse("--force replaces it", "%s exists", file)
	}
	var snap audit.Snapshot
	var n countingWriter
	err := a.read(ctx, "", func(src audit.Source, live *reader) error {
		if err := live.haveLedger(); err != nil {
			return err
		}
		snap = src.Snapshot()
		f, err := renameio.NewPendingFile(file, renameio.WithTempDir(filepath.Dir(file)), renameio.WithStaticPermissions(0o600))
		if err != nil {
			return fmt.Errorf("writing %s: %w", file, cause(err))
		}
		defer f.Cleanup()
		n = countingWriter{w: f}
		if err := audit.WriteExport(ctx, &n, src); err != nil {
			return err
		}
		if !force {
			if _, err := os.Lstat(file); err == nil {
				return refuse("--force replaces it", "%s exists by now", file)
			}
		}
		return f.CloseAtomicallyReplace()
	})
	if err != nil {
		return err
	}
	a.say("%s holds revision %d, %s", file, snap.Revision, size(n.n))
	return nil
}

// cause leaves out the name of a temporary file.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
