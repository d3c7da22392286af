// Package audit verifies a ledger: it reads the whole keyspace at one revision,
// from etcd or from an export, and checks it from the outside.
//
// # What is checked
//
// Every entry: its key, its one spelling, its place in its chain, the hash of
// the entry before it, its revision, that its key was written once. Signatures:
// of every chain's tip, of every open, rotate, close, meta and recover, and of
// entries that a finding is about; of all with Options.AllSignatures. A valid
// signature of a tip covers the chain below it, because each entry holds the
// hash of the one before it.
//
// Then the entries are replayed in commit order, which is etcd's order and not
// a clock's, and the outcome is compared with the live keys:
//
//	I1  an address is held by at most one attachment     DOUBLE-ALLOC
//	I2  an attachment holds one lease at a time, of at   DOUBLE-LEASE
//	    most one address of each range
//	I3  each change of holder has exactly one entry      ALLOC-NO-ENTRY, STATE-…
//	I4  an entry is never rewritten; its chain extends   REWRITTEN, HASH-MISMATCH,
//	    it or ends                                       MISSING, FORK, …
//
// Each field of each live value is compared, to the byte, with what the entries
// make of it. The few that are in no entry are listed in docs/threat-model.md,
// "Unchecked fields".
//
// An entry that this program does not know is a finding, and explains nothing,
// unless the meta entries say that the ledger is of a newer version. Then a
// finding is folded, that is only counted, if its entry, or an entry that it or
// the live value names, is of a chain with entries that are not known.
//
// Codes lists all findings, Explain says what each means and what cannot be seen.
//
// Where entries were moved or rewritten, the ledger is read a second time with
// those put back to where they belong, so that one edited entry is one or two
// findings and not an avalanche.
//
// # What can fail
//
// Verify returns an error only if it could not check: the source fails, is
// truncated, or holds nothing. Everything that is wrong in what was read is a
// Finding. Memory grows with chains, live leases, address keys, and the names and
// subnets that they have in common, and not with entries.
//
// The package imports no etcd client, so that an export can be verified where
// there is no etcd.
//
// # Export
//
// An export holds one Snapshot. All numbers are unsigned and big-endian.
//
//	offset  bytes  what
//	0       22     "ipam-ledger/export/v1\n"
//	22      …      one frame H, frames E, frames S, one frame Z; nothing follows
//
// A frame:
//
//	0       1      type: H, E, S or Z
//	1       4      key length k: at most 2097152; 0 for H and Z
//	5       4      value length v: at most 2097152
//	9       32     create revision, mod revision, version, etcd lease, 8 bytes
//	               each; in E and S only
//	…       k      key, in full
//	…       v      value
//
// H has the Snapshot as JSON: {"prefix":…,"etcdCluster":…,"revision":…,"taken":…}.
// E frames are the keys below chains/ in commit order (mod revision, then key),
// S frames all other keys below the prefix in key order. Z has JSON
// {"entries":N,"state":N,"crc32c":"8 hex digits"}: how many E and S frames there
// are, and the CRC-32C (RFC 9260, appendix A) of all bytes before the Z frame. It
// guards against accidents of storage; what guards against people are the entries'
// own hashes and signatures, and the replay.
package audit

import (
	"context"
	"fmt"
	"io"
	"sort"
	"strings"
	"time"
)

// Record is one key of the store as it was at the audited revision.
type Record struct {
	Key                         string // in full
	Value                       []byte
	Create, Mod, Version, Lease int64
}

// Snapshot says what a Source holds.
type Snapshot struct {
	Prefix      string    `json:"prefix"`
	EtcdCluster string    `json:"etcdCluster"` // 16 hex digits
	Revision    int64     `json:"revision"`
	Taken       time.Time `json:"taken"`
}

// Source is a whole ledger at one revision. Both methods may be called more
// than once and yield the same each time; Verify calls Entries first. A Record
// is the callee's own only until it returns: Key and Value may be reused then.
// An error of the callee ends the reading and is returned.
type Source interface {
	Snapshot() Snapshot
	// State yields every key below the prefix outside chains/, in key order.
	State(ctx context.Context, f func(Record) error) error
	// Entries yields every key below chains/, in commit order: by Mod, then key.
	Entries(ctx context.Context, f func(Record) error) error
}

// Options of Verify. The zero value checks tips' signatures with the keys that
// the ledger itself names.
type Options struct {
	Keys          *KeyRing            // nil: the ledger's own, on first use
	AllSignatures bool                // and not only those that cover the rest
	Progress      func(entries int64) // called now and then; starts anew if the ledger is read a second time
	Workers       int                 // 0: GOMAXPROCS
}

// Finding is one thing that is wrong, with both sides.
type Finding struct {
	Code     Code   `json:"code"`
	Where    string `json:"where"` // key below the prefix, or what of the export
	Writer   string `json:"writer,omitempty"`
	Chain    string `json:"chain,omitempty"`
	Seq      uint64 `json:"seq,omitempty"`
	Revision int64  `json:"revision,omitempty"` // of the commit it was found in
	Detail   string `json:"detail"`
	Want     string `json:"want,omitempty"`
	Got      string `json:"got,omitempty"`

	order int64
}

// String is the finding in one line.
func (f *Finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %s", f.Code, f.Where, f.Detail)
	if f.Want != "" || f.Got != "" {
		fmt.Fprintf(&b, ": want %s, got %s", orNothing(f.Want), orNothing(f.Got))
	}
	return b.String()
}

func orNothing(s string) string {
	if s == "" {
		return "nothing"
	}
	return s
}

// MaxFindings is how many findings, and how many warnings, a Report lists. It
// counts all.
const MaxFindings = 1000

// Report is what Verify found and what it covered.
type Report struct {
	Snapshot
	Cluster string `json:"cluster"` // our cluster ID
	Epoch   uint64 `json:"epoch"`
	State   string `json:"state"` // running or frozen

	First          int64 `json:"firstRevision"` // of the entries covered; 0: none
	Last           int64 `json:"lastRevision"`
	Entries        int64 `json:"entries"`
	Chains         int64 `json:"chains"`
	Writers        int64 `json:"writers"`
	Leased         int64 `json:"leased"` // addresses
	Free           int64 `json:"free"`   // addresses that were held before
	Attachments    int64 `json:"attachments"`
	Blocks         int64 `json:"blocks"`
	Signatures     int64 `json:"signatures"` // checked
	AllSignatures  bool  `json:"allSignatures"`
	Pinned         bool  `json:"keysPinned"`
	UnknownVersion int64 `json:"unknownVersion"` // entries that were not replayed

	Findings     []Finding      `json:"findings"`
	FindingCount int64          `json:"findingCount"`
	ByCode       map[Code]int64 `json:"byCode,omitempty"`
	Warnings     []Finding      `json:"warnings,omitempty"`
	WarningCount int64          `json:"warningCount"`
	Notes        []string       `json:"notes,omitempty"`
	// Reduced says, line by line, what could not be judged.
	Reduced []string `json:"reduced,omitempty"`
}

// Exit statuses.
const (
	ExitVerified = 0
	ExitFindings = 1
	ExitUnknown  = 2 // could not check: Verify returned an error
	ExitReduced  = 3 // verified, with reduced coverage
)

// ExitCode is the exit status that the report stands for.
func (r *Report) ExitCode() int {
	switch {
	case r.FindingCount > 0:
		return ExitFindings
	case len(r.Reduced) > 0:
		return ExitReduced
	}
	return ExitVerified
}

// Has reports whether there is a finding or warning with a code.
func (r *Report) Has(c Code) bool {
	if c == UnknownVersion {
		return len(r.Reduced) > 0
	}
	for i := range r.Warnings {
		if r.Warnings[i].Code == c {
			return true
		}
	}
	return r.ByCode[c] > 0
}

// Summary writes the report for people, one thing a line.
func (r *Report) Summary(w io.Writer) error {
	var b strings.Builder
	for i := range r.Findings {
		fmt.Fprintf(&b, "%s\n", r.Findings[i].String())
	}
	if more := r.FindingCount - int64(len(r.Findings)); more > 0 {
		fmt.Fprintf(&b, "and %d more findings\n", more)
	}
	for i := range r.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", r.Warnings[i].String())
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	for _, n := range r.Reduced {
		fmt.Fprintf(&b, "%s: %s\n", UnknownVersion, n)
	}
	keys := "first use, not pinned"
	if r.Pinned {
		keys = "pinned"
	}
	sigs := "of tips and of what changes keys or epochs"
	if r.AllSignatures {
		sigs = "all"
	}
	fmt.Fprintf(&b, "entries %d in %d chains of %d writers, revisions %d to %d of %d; signatures checked: %d (%s); keys: %s\n",
		r.Entries, r.Chains, r.Writers, r.First, r.Last, r.Revision, r.Signatures, sigs, keys)
	fmt.Fprintf(&b, "addresses %d leased, %d free; attachments %d; blocks %d; cluster %s, epoch %d, %s\n",
		r.Leased, r.Free, r.Attachments, r.Blocks, orNothing(r.Cluster), r.Epoch, orNothing(r.State))
	switch r.ExitCode() {
	case ExitFindings:
		var cc []string
		for c, n := range r.ByCode {
			cc = append(cc, fmt.Sprintf("%d %s", n, c))
		}
		sort.Strings(cc)
		fmt.Fprintf(&b, "NOT VERIFIED: %d findings: %s\n", r.FindingCount, strings.Join(cc, ", "))
	case ExitReduced:
		b.WriteString("verified with reduced coverage\n")
	default:
		b.WriteString("verified\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
