package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// logged is an entry as it was found: what 'log', 'ip' and 'keys' show.
type logged struct {
	Entry  entry.Ref `json:"entry"`
	Commit int64     `json:"commit"` // etcd's revision of the commit
	// Rewritten is the revision of a later write to the entry's key, which there
	// must not be.
	Rewritten int64     `json:"rewritten,omitempty"`
	Writer    string    `json:"writer"`
	Time      time.Time `json:"time"`
	Revision  int64     `json:"revision"` // of the view it was decided on
	Op        entry.Op  `json:"op"`

	Space     string       `json:"space,omitempty"`
	Pool      string       `json:"pool,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// After is, of an acquire, the release that each address follows, if it was
	// held before.
	After     map[netip.Addr]entry.Ref `json:"after,omitempty"`
	Blocks    []netip.Prefix           `json:"blocks,omitempty"`
	Acquire   entry.Ref                `json:"acquire,omitzero"`
	Network   string                   `json:"network,omitempty"`
	Container string                   `json:"container,omitempty"`
	Interface string                   `json:"interface,omitempty"`
	Node      string                   `json:"node,omitempty"`
	Pod       string                   `json:"pod,omitempty"`
	PodUID    string                   `json:"podUID,omitempty"`
	Trace     string                   `json:"trace,omitempty"`
	Reason    string                   `json:"reason,omitempty"`

	Key         string    `json:"key,omitempty"`
	Subject     string    `json:"subject,omitempty"` // open, close: whose chain
	Epoch       uint64    `json:"epoch,omitempty"`
	State       string    `json:"state,omitempty"`
	Predecessor entry.Ref `json:"predecessor,omitzero"`
	Mark        entry.Ref `json:"mark,omitzero"`
	Closes      entry.Ref `json:"closes,omitzero"`

	// Signed says by which key the signature was found to hold; Bad says what is
	// wrong with it.
	Signed string `json:"signedBy,omitempty"`
	Bad    string `json:"bad,omitempty"`
}

// scan walks entries in commit order and keeps the keys of chains, so that
// signatures can be judged on the way.
type scan struct {
	keys   keyspace.Keys
	chains map[entry.ChainID]*signingKey

	bad   int // entries that cannot be read
	first string
}

// signingKey is what a chain's entries must be signed with.
type signingKey struct {
	verifier note.Verifier
	text     string
}

func newScan(src audit.Source) (*scan, error) {
	keys, err := keyspace.New(src.Snapshot().Prefix)
	if err != nil {
		return nil, fmt.Errorf("export: %w", err)
	}
	return &scan{keys: keys, chains: map[entry.ChainID]*signingKey{}}, nil
}

// each calls f with every entry that can be read. check says whether its
// signature matters: those of entries that change keys always do.
func (s *scan) each(ctx context.Context, src audit.Source, check func(*entry.Entry) bool, f func(audit.Record, *entry.Entry, *logged) error) error {
	return src.Entries(ctx, func(r audit.Record) error {
		e, l, err := s.take(r, check)
		if err != nil || e == nil {
			return err
		}
		return f(r, e, l)
	})
}

// take reads one record; nil for one that is no entry. The logged form is made
// only for entries that are checked.
func (s *scan) take(r audit.Record, check func(*entry.Entry) bool) (*entry.Entry, *logged, error) {
	key, err := s.keys.Parse(r.Key)
	if err != nil {
		s.spoilt(r.Key)
		return nil, nil, nil
	}
	e, err := entry.Parse(r.Value)
	if err != nil && !errors.Is(err, entry.ErrVersion) {
		s.spoilt(r.Key)
		return nil, nil, nil
	}
	changesKey := e.Op == entry.Open || e.Op == entry.Rotate
	if !changesKey && !check(e) {
		return e, nil, nil
	}
	l := describe(r, key, e)
	s.judge(r, key, e, l)
	return e, l, nil
}

func (s *scan) spoilt(key string) {
	if s.bad++; s.bad == 1 {
		s.first = strings.Clone(strings.TrimPrefix(key, s.keys.Prefix()))
	}
}

// judge checks the signature with the key that is in force in the chain, as
// the chain itself says, and follows changes of it.
func (s *scan) judge(r audit.Record, key keyspace.Key, e *entry.Entry, l *logged) {
	switch {
	case e.Known() && (e.Chain != key.Chain || e.Seq != key.Seq):
		l.Bad = "it says that it belongs elsewhere"
		return
	case r.Version != 1:
		l.Rewritten = r.Mod
		l.Bad = fmt.Sprintf("it was rewritten at revision %d", r.Mod)
	}
	k := s.chains[key.Chain]
	if e.Op == entry.Open {
		v, err := note.NewVerifier(e.Key)
		if err != nil || e.Writer != key.Writer {
			l.Bad = "it opens the chain of " + e.Writer.String()
			return
		}
		k = &signingKey{v, e.Key}
		s.chains[key.Chain] = k
	}
	if k == nil {
		l.Bad = "its chain's open entry is not there, so nobody's key is known"
		return
	}
	if err := entry.Verify(r.Value, k.verifier); err != nil {
		text := err.Error()
		if invalid := (*note.InvalidSignatureError)(nil); errors.As(err, &invalid) {
			text = fmt.Sprintf("its signature by %s+%08x does not hold", invalid.Name, invalid.Hash)
		}
		if l.Bad != "" {
			text = l.Bad + ", and " + text
		}
		l.Bad = text
		return
	}
	if l.Bad == "" {
		l.Signed = fmt.Sprintf("%s+%08x", k.verifier.Name(), k.verifier.KeyHash())
	}
	if e.Op == entry.Rotate {
		if v, err := note.NewVerifier(e.Key); err == nil {
			s.chains[key.Chain] = &signingKey{v, e.Key}
		}
	}
}

func describe(r audit.Record, key keyspace.Key, e *entry.Entry) *logged {
	l := &logged{
		Entry: entry.Ref{Chain: key.Chain, Seq: key.Seq, Hash: entry.HashOf(r.Value)}, Commit: r.Create, Writer: key.Writer.String(),
		Time: e.Time, Revision: e.Revision, Op: e.Op, Space: e.Space, Pool: e.Pool, Blocks: e.Blocks, Acquire: e.Acquire,
		Network: e.Network, Container: e.Container, Interface: e.Interface, Node: e.Node, Pod: e.Pod, PodUID: e.PodUID,
		Trace: e.Trace, Reason: e.Reason, Key: e.Key, Epoch: e.Epoch, State: e.State,
		Predecessor: e.Predecessor, Mark: e.Mark, Closes: e.Closes,
	}
	if e.Writer != (entry.Writer{}) {
		l.Subject = e.Writer.String()
	}
	for _, at := range e.Addresses {
		l.Addresses = append(l.Addresses, at.IP)
		if !at.After.IsZero() {
			if l.After == nil {
				l.After = map[netip.Addr]entry.Ref{}
			}
			l.After[at.IP] = at.After
		}
	}
	return l
}

// what is what an entry is about, in a table.
func (l *logged) what() string {
	switch l.Op {
	case entry.Acquire, entry.Release:
		if len(l.Blocks) > 0 {
			return join(l.Addresses) + " +" + join(l.Blocks) // claimed with it
		}
		return join(l.Addresses)
	case entry.Claim, entry.Unclaim:
		return join(l.Blocks)
	case entry.Meta:
		return fmt.Sprintf("%s, epoch %d", l.State, l.Epoch)
	case entry.Open, entry.Recover:
		return fmt.Sprintf("epoch %d", l.Epoch)
	case entry.Close:
		return l.Subject
	case entry.Pool:
		return l.Pool
	}
	return ""
}

func join[T fmt.Stringer](list []T) string {
	var b strings.Builder
	for i, v := range list {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(v.String())
	}
	return b.String()
}

// podText is the pod, as far as the entry names one.
func podText(pod, uid string) string { return cmp.Or(pod, uid) }

// finish warns of what could not be read; then the answer may lack something.
func (s *scan) finish(a *app) error {
	if s.bad == 0 {
		return nil
	}
	verb := "cannot be read and are"
	if s.bad == 1 {
		verb = "cannot be read and is"
	}
	a.warn("%s %s left out here (the first: %s); 'ledger verify' says more", count(s.bad, "entry"), verb, s.first)
	return wrong
}
