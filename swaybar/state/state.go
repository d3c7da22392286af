// Package state is what the publisher tells the bars: one JSON document a tick,
// always the whole state, never a difference, because ticks are lossy.
//
//	{"app":"ipam-ledger","v":1,"type":"state","source":"prod","epoch":1,"rev":88213,…}
//	{"app":"ipam-ledger","v":1,"type":"hello"}
//
// A block that starts late says hello, and every publisher answers with its
// state; a publisher broadcasts when it starts and at each heartbeat.
//
// # Guarantees
//
// Encode never returns more than MaxSize bytes: sway drops a tick that does not
// fit its socket's buffer, and burns CPU until the sender leaves. Pools that do
// not fit are cut off, the fullest are kept, and More counts the others.
//
// Decode accepts what anybody in the session may have sent, for ticks can be
// forged by all who can open the socket: it bounds sizes and counts, refuses
// another version by ErrVersion, and is ErrForeign for ticks of other programs.
// Texts in a State are untrusted: escape them where they are shown, and put none
// into a command.
//
// A state is newer by (Epoch, Revision, At): a restored etcd starts again at a
// lower revision, in a higher epoch.
//
// Members may be added to a document without a new version, where a bar that
// does not know them shows nothing wrong: Decode passes over what it does not know.
//
// No address, pod name or content of the ledger is in a state: every program in
// the session can read it.
package state

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode/utf8"
)

const (
	// App marks our ticks among others'.
	App = "ipam-ledger"
	// Version is the version of the document.
	Version = 1
	// MaxSize is the most bytes of a document.
	MaxSize = 16 << 10
	// MaxPools is the most pools that Decode accepts.
	MaxPools = 512
	// MaxText is the most bytes of a name, MaxMessage of a message.
	MaxText, MaxMessage = 128, 256
	// DefaultHeartbeat is how often a publisher repeats its state; a state that is
	// three heartbeats old is stale.
	DefaultHeartbeat = 15 * time.Second
)

// Types of documents.
const (
	TypeState = "state"
	TypeHello = "hello"
)

var (
	// ErrForeign is a tick that is not ours.
	ErrForeign = errors.New("not a tick of ipam-ledger")
	// ErrVersion is a document of another version: the block has to be updated, or
	// the publisher.
	ErrVersion = errors.New("state of another version")
)

// Results of a verification.
const (
	VerifyUnknown = "unknown" // none has ended yet
	VerifyOK      = "ok"
	VerifyFailed  = "failed"  // there are findings
	VerifyReduced = "reduced" // verified with reduced coverage
	VerifyError   = "error"   // could not be checked
)

// Kinds of certificates.
const (
	CertClient = "client" // the publisher's
	CertCA     = "ca"     // by which it knows etcd
	CertEtcd   = "etcd"   // that etcd shows
)

// States of the ledger.
const (
	LedgerRunning = "running"
	LedgerFrozen  = "frozen"
	LedgerStopped = "stopped" // a node found that etcd went back in time
)

// State is the whole state of one cluster as its publisher sees it.
type State struct {
	Source    string    `json:"source"` // the cluster's name
	Epoch     uint64    `json:"epoch"`
	Revision  int64     `json:"rev"`
	At        time.Time `json:"at"` // the publisher's wall clock
	Heartbeat int       `json:"hb"` // seconds
	Etcd      Etcd      `json:"etcd"`
	Ledger    string    `json:"ledger,omitempty"` // running, frozen or stopped; "" while unknown
	Verify    Verify    `json:"verify"`
	Nodes     int       `json:"nodes"`
	Near      int       `json:"near,omitempty"` // nodes whose blocks are nearly full
	Pools     []Pool    `json:"pools"`          // the fullest first
	More      int       `json:"more,omitempty"` // pools that were cut off
	Cert      *Cert     `json:"cert,omitempty"` // absent without TLS, and from older publishers
}

// Cert is, of the certificates that the publisher reaches etcd by, the one that
// ends first.
type Cert struct {
	Kind  string    `json:"kind"` // CertClient, CertCA or CertEtcd
	Until time.Time `json:"until"`
	Warn  time.Time `json:"warn"` // from then on it is time to renew it
}

// Etcd is whether the publisher reaches etcd.
type Etcd struct {
	OK    bool      `json:"ok"`
	Error string    `json:"error,omitempty"`
	Since time.Time `json:"since,omitzero"` // of the present condition
}

// Verify is the last verification's result.
type Verify struct {
	Result   string    `json:"result"`
	At       time.Time `json:"at,omitzero"`
	Findings int64     `json:"findings,omitempty"`
	Code     string    `json:"code,omitempty"` // of the first finding
	Running  bool      `json:"running,omitempty"`
}

// Pool is how full a pool is. Counts are of addresses.
type Pool struct {
	Space    string `json:"space"`
	Name     string `json:"name"`
	Capacity uint64 `json:"cap"` // as far as known; saturates; 0: not known
	Leased   uint64 `json:"leased"`
	Held     uint64 `json:"held,omitempty"`
	Trend    int64  `json:"trend,omitempty"` // change of leased in the last five minutes
}

// Free is how many addresses may be handed out.
func (p *Pool) Free() uint64 {
	if used := p.Leased + p.Held; used < p.Capacity {
		return p.Capacity - used
	}
	return 0
}

// Percent is how much of the pool is taken, 0 to 100; -1 where that is not known.
func (p *Pool) Percent() int {
	if p.Capacity == 0 {
		return -1
	}
	return int(min(100, float64(p.Leased+p.Held)*100/float64(p.Capacity)))
}

// Newer reports whether s supersedes old.
func (s *State) Newer(old *State) bool {
	if old == nil {
		return true
	}
	return cmp.Or(cmp.Compare(s.Epoch, old.Epoch), cmp.Compare(s.Revision, old.Revision), s.At.Compare(old.At)) > 0
}

// Stale reports whether, at now, the state's publisher has missed three
// heartbeats. Both are wall clocks, as a monotonic one stops in suspend.
func (s *State) Stale(now time.Time) bool {
	return now.Round(0).Sub(s.At.Round(0)) > 3*time.Duration(s.Heartbeat)*time.Second
}

type document struct {
	App  string `json:"app"`
	V    int    `json:"v"`
	Type string `json:"type"`
	*State
}

// Hello is the document that asks publishers for their states.
func Hello() []byte {
	b, err := json.Marshal(document{App: App, V: Version, Type: TypeHello})
	if err != nil {
		panic(err) // constants
	}
	return b
}

// Encode writes a state, with as many of its pools as fit, the fullest first.
func Encode(s *State) ([]byte, error) {
	out := *s
	out.Source, out.Etcd.Error = cut(s.Source, MaxText), cut(s.Etcd.Error, MaxMessage)
	out.Pools = slices.Clone(s.Pools)
	slices.SortStableFunc(out.Pools, func(a, b Pool) int {
		return cmp.Or(-cmp.Compare(a.Percent(), b.Percent()), cmp.Compare(a.Space, b.Space), cmp.Compare(a.Name, b.Name))
	})
	for keep := min(len(out.Pools), MaxPools); ; keep = keep * 3 / 4 {
		out.More = s.More + len(s.Pools) - keep
		out.Pools = out.Pools[:keep]
		if out.Pools == nil {
			out.Pools = []Pool{}
		}
		b, err := json.Marshal(document{App, Version, TypeState, &out})
		if err != nil {
			return nil, fmt.Errorf("state: %w", err)
		}
		if len(b) <= MaxSize {
			return b, nil
		}
		if keep == 0 {
			return nil, fmt.Errorf("state of %d bytes without any pool: at most %d", len(b), MaxSize)
		}
	}
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// Decode reads a document. It returns TypeHello with no state, or TypeState with
// one.
func Decode(b []byte) (string, *State, error) {
	if len(b) > MaxSize {
		return "", nil, fmt.Errorf("%w: %d bytes", ErrForeign, len(b))
	}
	var head struct {
		App  string `json:"app"`
		V    int    `json:"v"`
		Type string `json:"type"`
	}
	if err := json.Unmarshal(b, &head); err != nil || head.App != App {
		return "", nil, ErrForeign
	}
	if head.V != Version {
		return "", nil, fmt.Errorf("%w: %d, and this program knows %d", ErrVersion, head.V, Version)
	}
	switch head.Type {
	case TypeHello:
		return TypeHello, nil, nil
	case TypeState:
	default:
		return "", nil, fmt.Errorf("%w: of type %.40q", ErrForeign, head.Type)
	}
	s := new(State)
	if err := json.Unmarshal(b, s); err != nil {
		return "", nil, fmt.Errorf("state: %w", err)
	}
	return TypeState, s, s.validate()
}

func (s *State) validate() error {
	switch {
	case s.Source == "" || len(s.Source) > MaxText:
		return fmt.Errorf("state: source of %d bytes: want 1 to %d", len(s.Source), MaxText)
	case s.Heartbeat < 1 || s.Heartbeat > 3600:
		return fmt.Errorf("state: heartbeat of %d s: want 1 to 3600", s.Heartbeat)
	case s.At.IsZero():
		return errors.New("state: without a time")
	case len(s.Pools) > MaxPools:
		return fmt.Errorf("state: %d pools: at most %d", len(s.Pools), MaxPools)
	case len(s.Etcd.Error) > MaxMessage || len(s.Verify.Code) > MaxText || len(s.Verify.Result) > MaxText || len(s.Ledger) > MaxText:
		return errors.New("state: a text is too long")
	case s.Nodes < 0 || s.Near < 0 || s.More < 0 || s.Verify.Findings < 0:
		return errors.New("state: a count is negative")
	case s.Cert != nil && (len(s.Cert.Kind) > MaxText || s.Cert.Until.IsZero() || s.Cert.Warn.After(s.Cert.Until)):
		return errors.New("state: a certificate without an end, or with a kind that is too long")
	}
	for i := range s.Pools {
		p := &s.Pools[i]
		if p.Name == "" || len(p.Name) > MaxText || len(p.Space) > MaxText {
			return fmt.Errorf("state: pool %d has a name of %d bytes: want 1 to %d", i, len(p.Name), MaxText)
		}
		if p.Leased+p.Held < p.Leased {
			return fmt.Errorf("state: pool %d counts more addresses than there are", i)
		}
	}
	return nil
}
