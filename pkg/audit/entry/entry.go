// Package entry is the format of one entry of the audit ledger.
//
// An entry is a C2SP signed note (https://c2sp.org/signed-note): lines of
// "key value" in a fixed order, a blank line, and the one Ed25519 signature
// line of the writer whose chain it extends. A worked entry:
//
//	ipam-ledger/entry/v1
//	chain 5f0c3a8e7d1b42960c5f3a8e7d1b4296
//	seq 41
//	prev 9a3e…64 hex digits…
//	time 2026-11-20T14:03:07.123456789Z
//	revision 88213
//	op acquire
//	space default
//	pool prod
//	address 10.22.7.14/24 gateway 10.22.7.1 range 10.22.7.2-10.22.7.254 after 5f0c…/17/e0b1…
//	network prod
//	container 0b1f6d…
//	interface "eth0"
//	node worker-1
//	pod "shop/cart-7d9f"
//	pod-uid "6f9d…"
//
//	— node/worker-1 Ym9n…
//
// # Guarantees
//
// One entry has one spelling. Parse re-encodes what it read, the signature line
// included, and refuses bytes that it would not itself have written: no second
// signature, no other base64 or quoting, no trailing byte, no field out of
// order. What is stored is what is hashed and signed; nothing is canonicalised.
//
// The hash of an entry is SHA-256(0x00 ‖ stored bytes), the leaf hash of
// RFC 6962 section 2.1, so that one hash serves the chain and a Merkle tree.
//
// Every field has a length limit (the Max constants) and an entry is at most
// MaxSize bytes. Free text is quoted with strconv.QuoteToASCII, so that no value
// holds a line break or an unprintable byte.
//
// An entry of a newer version, or with an op this code does not know, parses to
// an Entry for which Known reports false: its place in the chain, hash and
// signature can be checked, its meaning cannot.
//
// Nothing here does I/O, and values are safe for concurrent use once built.
// The package imports no etcd client.
package entry

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"go4.org/netipx"
)

// Header is the first line of every entry of this version.
const Header = "ipam-ledger/entry/v1"

const headerStem = "ipam-ledger/entry/v"

// Limits, in bytes unless said otherwise. Longer values are refused by Sign and Parse alike.
const (
	MaxSize      = 16 << 10
	MaxName      = 128 // writer, node, pool and space names
	MaxNetwork   = 255
	MaxContainer = 255
	MaxInterface = 15 // IFNAMSIZ - 1
	MaxPod       = 512
	MaxText      = 1024
	MaxAddresses = 32           // per entry
	MaxBlocks    = 32           // per entry
	MaxCooldown  = 24 * 60 * 60 // seconds
)

// Hash is SHA-256(0x00 ‖ stored bytes of an entry).
type Hash [sha256.Size]byte

// HashOf returns the hash of an entry as it is stored.
func HashOf(stored []byte) Hash {
	buf := make([]byte, 0, 1024)
	buf = append(buf, 0)
	return sha256.Sum256(append(buf, stored...))
}

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// Short returns the first twelve hex digits, for people.
func (h Hash) Short() string { return hex.EncodeToString(h[:6]) }

// MarshalText implements encoding.TextMarshaler: 64 lower-case hex digits.
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler and accepts only what MarshalText writes.
func (h *Hash) UnmarshalText(b []byte) error { return unhex(h[:], string(b), "hash") }

// ChainID names a chain: 128 random bits.
type ChainID [16]byte

// NewChainID draws a chain ID from the system's random source.
func NewChainID() ChainID {
	var c ChainID
	rand.Read(c[:]) // never fails since Go 1.24
	return c
}

func (c ChainID) String() string { return hex.EncodeToString(c[:]) }

// Short returns the first eight hex digits, for people.
func (c ChainID) Short() string { return hex.EncodeToString(c[:4]) }

// MarshalText implements encoding.TextMarshaler: 32 lower-case hex digits.
func (c ChainID) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, c[:]), nil }

// UnmarshalText implements encoding.TextUnmarshaler and accepts only what MarshalText writes.
func (c *ChainID) UnmarshalText(b []byte) error { return unhex(c[:], string(b), "chain") }

// ParseChainID is the inverse of String.
func ParseChainID(s string) (ChainID, error) {
	var c ChainID
	return c, unhex(c[:], s, "chain")
}

func unhex(dst []byte, s, what string) error {
	if len(s) != 2*len(dst) {
		return fmt.Errorf("%s %.80q: want %d hex digits", what, s, 2*len(dst))
	}
	for i := range dst {
		hi, lo := unhexDigit[s[2*i]], unhexDigit[s[2*i+1]]
		if hi|lo > 0x0f {
			return fmt.Errorf("%s %.80q: want lower-case hex digits", what, s)
		}
		dst[i] = hi<<4 | lo
	}
	return nil
}

var unhexDigit = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// Ref names an entry: its chain, sequence number and hash.
type Ref struct {
	Chain ChainID
	Seq   uint64 // from 1
	Hash  Hash
}

// String is chain/seq/hash, the spelling used in entries and stored values.
func (r Ref) String() string { return string(r.append(nil)) }

// Short is an abbreviation for people: chain/seq.
func (r Ref) Short() string { return r.Chain.Short() + "/" + strconv.FormatUint(r.Seq, 10) }

// IsZero reports whether r names nothing.
func (r Ref) IsZero() bool { return r == Ref{} }

func (r Ref) append(dst []byte) []byte {
	dst = hex.AppendEncode(dst, r.Chain[:])
	dst = append(dst, '/')
	dst = strconv.AppendUint(dst, r.Seq, 10)
	dst = append(dst, '/')
	return hex.AppendEncode(dst, r.Hash[:])
}

// MarshalText implements encoding.TextMarshaler.
func (r Ref) MarshalText() ([]byte, error) { return r.append(nil), nil }

// AppendText implements encoding.TextAppender: what String returns.
func (r *Ref) AppendText(b []byte) ([]byte, error) { return r.append(b), nil }

// UnmarshalText implements encoding.TextUnmarshaler and accepts only what MarshalText writes.
func (r *Ref) UnmarshalText(b []byte) (err error) {
	*r, err = ParseRef(string(b))
	return err
}

// ParseRef is the inverse of Ref.String.
func ParseRef(s string) (Ref, error) {
	var r Ref
	if len(s) < 32+1+1+1+64 || s[32] != '/' || s[len(s)-65] != '/' {
		return r, fmt.Errorf("reference %.120q: want chain/seq/hash", s)
	}
	if err := unhex(r.Chain[:], s[:32], "chain"); err != nil {
		return r, err
	}
	var err error
	if r.Seq, err = parseUint(s[33:len(s)-65], "seq"); err != nil {
		return r, err
	}
	return r, unhex(r.Hash[:], s[len(s)-64:], "hash")
}

// Kind is what sort of writer extends a chain.
type Kind string

// The kinds of writers.
const (
	KindNode     Kind = "node"
	KindOperator Kind = "operator"
	KindSealer   Kind = "sealer"
)

// Writer is whoever extends a chain.
type Writer struct {
	Kind Kind
	Name string
}

// String is kind/name: the name of the writer's key.
func (w Writer) String() string { return string(w.Kind) + "/" + w.Name }

// ParseWriter is the inverse of Writer.String.
func ParseWriter(s string) (Writer, error) {
	kind, name, ok := strings.Cut(s, "/")
	w := Writer{Kind(kind), name}
	if !ok {
		return Writer{}, fmt.Errorf("writer %.200q: want kind/name", s)
	}
	return w, w.Validate()
}

// Validate reports whether w can stand in an entry.
func (w Writer) Validate() error {
	switch w.Kind {
	case KindNode, KindOperator, KindSealer:
	default:
		return fmt.Errorf("writer kind %.80q: want node, operator or sealer", w.Kind)
	}
	return ValidateName("writer name", w.Name)
}

// ValidateName checks a name of a writer, node, pool or address space: 1 to
// MaxName bytes of [A-Za-z0-9._@-], and neither "." nor "..". The error names
// what and the value.
func ValidateName(what, name string) error {
	return validateToken(what, name, MaxName)
}

func validateToken(what, s string, limit int) error {
	if s == "" {
		return fmt.Errorf("%s is empty: want 1 to %d of A-Z a-z 0-9 . _ @ -", what, limit)
	}
	if len(s) > limit {
		return fmt.Errorf("%s %.40q… has %d bytes: at most %d", what, s, len(s), limit)
	}
	if s == "." || s == ".." {
		return fmt.Errorf("%s %q is not allowed", what, s)
	}
	for i := range len(s) {
		if !tokenByte[s[i]] {
			return fmt.Errorf("%s %.200q: only A-Z a-z 0-9 . _ @ - are allowed", what, s)
		}
	}
	return nil
}

// ValidateAttachment checks the names of an attachment: they are parts of a key and
// stand in entries and in JSON, where each must have one spelling.
func ValidateAttachment(node, network, container, iface string) error {
	if err := ValidateName("node", node); err != nil {
		return err
	}
	if err := validateToken("network", network, MaxNetwork); err != nil {
		return err
	}
	if err := validateToken("container", container, MaxContainer); err != nil {
		return err
	}
	switch {
	case iface == "":
		return errors.New("interface is empty")
	case len(iface) > MaxInterface:
		return fmt.Errorf("interface %.40q has %d bytes: at most %d", iface, len(iface), MaxInterface)
	case !utf8.ValidString(iface), strings.ContainsFunc(iface, func(r rune) bool { return r == '/' || r == ' ' || !unicode.IsPrint(r) }):
		return fmt.Errorf("interface %q: only printable UTF-8 without slash and space is allowed", iface)
	}
	return nil
}

var tokenByte = func() (t [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._@-") {
		t[c] = true
	}
	return t
}()

// Op is what an entry records.
type Op string

// The ops of version 1. Meta records a change of the cluster's meta key
// (init, freeze, recover start, thaw); Seal is reserved.
const (
	Open    Op = "open"
	Rotate  Op = "rotate"
	Close   Op = "close"
	Acquire Op = "acquire"
	Release Op = "release"
	Claim   Op = "claim"
	Unclaim Op = "unclaim"
	Pool    Op = "pool"
	Meta    Op = "meta"
	Recover Op = "recover"
)

// Address is an address that changes hands. Only an acquire has more than the IP.
type Address struct {
	IP      netip.Addr
	Bits    int            // length of its subnet's prefix
	Gateway netip.Addr     // of the interface; invalid: none
	Range   netipx.IPRange // that it is of, where that is known
	// After is the release this acquire follows; zero if the address was never
	// held before.
	After Ref
}

// What an acquire asserts: a lease that was there before it is recorded.
const (
	AssertRecover = "recover" // a restore had lost it
	AssertImport  = "import"  // another IPAM had made it
)

// Entry is one entry. Which fields an op has is listed in its line of the table
// in docs/formats.md; Sign refuses an entry with a field that its op lacks, or
// without one that it requires.
type Entry struct {
	Chain    ChainID
	Seq      uint64    // from 1, which is always an open
	Prev     Hash      // hash of entry Seq-1; zero for the first
	Time     time.Time // the writer's clock, to the nanosecond; information, never order
	Revision int64     // etcd revision of the view it was decided on
	Op       Op

	Writer      Writer // open: of this chain; close: of the chain that is closed
	Key         string // open, rotate: the key as a C2SP verifier key (name+id+base64)
	Machine     string // open: machine ID of the writer's host
	Cluster     string // open, meta: our cluster ID
	EtcdCluster string // meta: etcd's cluster ID
	Epoch       uint64 // open, meta, recover
	State       string // meta: running or frozen
	Recovering  bool   // meta: a recovery is under way
	Version     uint64 // meta: of the ledger's format
	Predecessor Ref    // open: head of the chain this one continues, as the store has it
	Mark        Ref    // open: head that the writer remembers, where a restore lost entries
	Closes      Ref    // close: last entry of the chain that is closed
	Remove      bool   // close: the writer is removed: what is leased on its chains ends, too
	Space       string
	Pool        string
	Spec        Hash           // pool: SHA-256 of the stored spec, zero once deleted
	Blocks      []netip.Prefix // acquire, claim: claimed with this entry; unclaim: given back
	Addresses   []Address
	Acquire     Ref    // release: the acquire it ends
	Cooldown    int64  // acquire: seconds that its addresses wait after their release
	Assert      string // acquire: AssertRecover or AssertImport, else empty
	Network     string
	Container   string
	Interface   string
	Node        string
	Pod         string // namespace/name
	PodUID      string
	Trace       string // W3C trace ID of the request, where there was one
	Reason      string

	// Signature of the stored bytes, set by Parse and Sign.
	Signature Signature

	unknown bool
	raw     string // Text of an entry that is not Known
}

// Signature is an entry's signature line.
type Signature struct {
	Name  string // name of the key: kind/name of the writer
	KeyID uint32
	Bytes [64]byte
}

// Known reports whether this code knows the entry's version and op. Of an entry
// that is not known only Chain, Seq, Prev, Time, Revision, Op and Signature are
// set, and of one of a newer version only Signature.
func (e *Entry) Known() bool { return !e.unknown }

// ErrVersion marks an entry of a version that this code does not know.
var ErrVersion = errors.New("entry of an unknown version")

// Attachment says whose lease an acquire or release is about.
func (e *Entry) Attachment() string {
	return e.Node + "/" + e.Network + "/" + e.Container + "/" + e.Interface
}
