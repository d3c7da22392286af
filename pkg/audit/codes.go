package audit

import (
	"fmt"
	"strings"
)

// Code names a kind of finding. Codes do not change their meaning.
type Code string

// The codes. Codes has their meaning.
const (
	Malformed      Code = "MALFORMED"
	Unsigned       Code = "UNSIGNED"
	BadSignature   Code = "BAD-SIGNATURE"
	UntrustedKey   Code = "UNTRUSTED-KEY"
	HashMismatch   Code = "HASH-MISMATCH"
	Missing        Code = "MISSING"
	HeadRollback   Code = "HEAD-ROLLBACK"
	Fork           Code = "FORK"
	Replay         Code = "REPLAY"
	Order          Code = "ORDER"
	WrongChain     Code = "WRONG-CHAIN"
	WrongNode      Code = "WRONG-NODE"
	Equivocation   Code = "EQUIVOCATION"
	Rewritten      Code = "REWRITTEN"
	LeasedKey      Code = "LEASED-KEY"
	Revision       Code = "REVISION"
	StaleEpoch     Code = "STALE-EPOCH"
	DoubleAlloc    Code = "DOUBLE-ALLOC"
	DoubleLease    Code = "DOUBLE-LEASE"
	BrokenHistory  Code = "BROKEN-HISTORY"
	TooSoon        Code = "TOO-SOON"
	OutsidePool    Code = "OUTSIDE-POOL"
	Frozen         Code = "FROZEN"
	ReleaseNoHold  Code = "RELEASE-NO-HOLD"
	DoubleClaim    Code = "DOUBLE-CLAIM"
	AllocNoEntry   Code = "ALLOC-NO-ENTRY"
	StateMissing   Code = "STATE-MISSING"
	StateDiffers   Code = "STATE-DIFFERS"
	UnknownKey     Code = "UNKNOWN-KEY"
	UnknownEntry   Code = "UNKNOWN-ENTRY"
	Rollback       Code = "ROLLBACK"
	ArchiveCorrupt Code = "ARCHIVE-CORRUPT"
	TrailingData   Code = "TRAILING-DATA"
	UnknownVersion Code = "UNKNOWN-VERSION"
	ClockSkew      Code = "CLOCK-SKEW"
)

// Codes is the table of all codes.
var Codes = []struct {
	Code    Code
	Meaning string
}{
	{Malformed, "an entry or a value is not what this program would have written: edited, torn, or of another program"},
	{Unsigned, "an entry has no signature line"},
	{BadSignature, "an entry is not signed by the key that was in force in its chain"},
	{UntrustedKey, "a chain was opened with a key that is not in the key file, nor reached from one by rotation, or goes on with one that no entry gives it"},
	{HashMismatch, "an entry's bytes are not those whose hash the next entry, or the writer's head, holds"},
	{Missing, "entries are gone: a gap in a chain, a tail that the writer's head still names, or a predecessor"},
	{HeadRollback, "the writer's head names an older entry than the chain's last: it was put back"},
	{Fork, "a chain goes on in two ways: it was regrown by somebody with the key, goes on after it was closed, or a second chain was opened beside it or with another key"},
	{Replay, "an entry stands a second time at another place"},
	{Order, "entries do not stand in the order in which they were signed, or keys not in the order of an export"},
	{WrongChain, "an entry belongs to another chain or another cluster"},
	{WrongNode, "a writer recorded what is not its to record: another node's lease, or an operator's act"},
	{Equivocation, "two signed entries exist for one place, or one chain stands under two writers"},
	{Rewritten, "an entry's key was written more than once; entries are written once"},
	{LeasedKey, "a key has an etcd lease attached: it would vanish by itself"},
	{Revision, "an entry's revision is not before its own commit, or goes back within its chain"},
	{StaleEpoch, "a chain of an earlier epoch was extended after a recovery, one was opened in an epoch that never began, or an epoch went back"},
	{DoubleAlloc, "an address was acquired while another attachment held it (I1)"},
	{DoubleLease, "an attachment acquired while it held a lease already, or two addresses of one range (I2)"},
	{BrokenHistory, "an acquire does not follow the last release of its address"},
	{TooSoon, "an address was acquired before its cooldown was over, by the clocks of release and acquire"},
	{OutsidePool, "an address was acquired that no pool hands out: a network's own, its broadcast, a gateway"},
	{Frozen, "an address was acquired while the ledger was frozen, or asserted by a node that had recovered"},
	{ReleaseNoHold, "a release or unclaim of what is not held by whom it names, or not as it says"},
	{DoubleClaim, "a block was claimed while it was claimed already"},
	{AllocNoEntry, "an address, attachment or block is held in etcd, and no entry says so (I3)"},
	{StateMissing, "by the entries a key should be there, and it is not"},
	{StateDiffers, "a live key differs from what the entries say, or was written outside their commits"},
	{UnknownKey, "a key below the prefix that this program would not have written"},
	{UnknownEntry, "an entry of a version or with an op that this program does not know, in a ledger of a version that it does"},
	{Rollback, "etcd is not the one that the ledger was made for: restored without 'ledger recover'"},
	{ArchiveCorrupt, "an export's checksum or counts are not those of its content"},
	{TrailingData, "bytes follow the end of an export"},
	{UnknownVersion, "the ledger is of a newer version: of what is new hash and signature are checked, not the meaning (reduced coverage)"},
	{ClockSkew, "writers' clocks disagree (a warning: order never rests on clocks)"},
}

// Explain is the text of 'ledger verify --explain': what each code means, and
// what verification cannot see.
func Explain() string {
	var b strings.Builder
	b.WriteString("Findings:\n\n")
	for _, c := range Codes {
		fmt.Fprintf(&b, "  %-16s %s\n", c.Code, c.Meaning)
	}
	b.WriteString(`
Exit status: 0 verified, 1 findings, 2 could not check, 3 verified with reduced
coverage (the ledger is of a newer version: what its chains with entries that are
not known may explain is counted and not judged).

What cannot be detected yet, and why:

  A chain's tail cut off together with its writer's head, where no live lease,
  later release or other chain rests on what was cut: nothing in etcd remembers
  it. The writer's own node does, by its mark, and refuses to go on (104); a
  tail whose node is gone is lost unseen until entries are sealed.

  A whole close undone before the closed writer opened another chain: the
  operator's tail cut off together with its head, and the writer's "closed"
  cleared. The operator's own mark shows it.

  A chain rolled back and regrown, or a whole ledger rewritten from its start,
  by somebody who has the writers' keys: all signatures hold. An earlier export
  shows the difference; only a seal kept elsewhere proves it.

  An etcd restored from an old snapshot with the same cluster ID: it is a whole
  and consistent ledger, only an old one. The first node with a newer mark
  notices (I5). With a new cluster ID it is ROLLBACK.

  A wholly new writer with a key of its own, unless keys are pinned with --keys:
  then it is UNTRUSTED-KEY. Without, keys are believed on first use.

  Two readers shown different ledgers by one etcd: each is consistent in
  itself. Comparing their exports shows it (EQUIVOCATION); a witness would
  prevent it.

  Plausible entries signed with a stolen key that nobody has closed.

  What is in no entry: stops (that one was deleted, too), and of writers' heads
  the boot ID and whether two machines dispute the chain. Every other field of
  every value is replayed and compared.

  Which ranges a pool has: of its subnet, gateway and range an acquire says what
  its node says.

  An allocation without entry that was made and undone between two runs.

  Signatures below a tip, unless --all-signatures: an edited entry is found by
  its hash in any case, who signed it is then asked of the entries involved.
`)
	return b.String()
}
