package top

import (
	"cmp"
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

// Line is an entry as it was found.
type Line struct {
	Ref    entry.Ref
	Commit int64
	Writer entry.Writer
	Stored []byte
	Entry  *entry.Entry // nil: it cannot be read
	Bad    string       // what is wrong with it
}

func newLine(key keyspace.Key, r audit.Record) Line {
	l := Line{Ref: entry.Ref{Chain: key.Chain, Seq: key.Seq, Hash: entry.HashOf(r.Value)}, Commit: r.Create, Writer: key.Writer, Stored: r.Value}
	e, err := entry.Parse(r.Value)
	switch {
	case err != nil && !errors.Is(err, entry.ErrVersion):
		l.Bad = "it cannot be read: " + err.Error()
		return l
	case e.Known() && (e.Chain != key.Chain || e.Seq != key.Seq):
		l.Bad = "it says that it belongs elsewhere"
	}
	l.Entry = e
	return l
}

func (l *Line) op() string {
	if l.Entry == nil {
		return "?"
	}
	return string(l.Entry.Op)
}

func (l *Line) time() time.Time {
	if l.Entry == nil {
		return time.Time{}
	}
	return l.Entry.Time
}

func (l *Line) pod() string {
	if l.Entry == nil {
		return ""
	}
	return cmp.Or(l.Entry.Pod, l.Entry.PodUID)
}

// node is whose lease or block it is about, or else who wrote it.
func (l *Line) node() string {
	if l.Entry != nil && l.Entry.Node != "" {
		return l.Entry.Node
	}
	if l.Writer.Kind == entry.KindNode {
		return l.Writer.Name
	}
	return l.Writer.String()
}

// what is what an entry is about.
func (l *Line) what() string {
	e := l.Entry
	if e == nil {
		return ""
	}
	var list []string
	for _, at := range e.Addresses {
		list = append(list, at.IP.String())
	}
	for _, b := range e.Blocks {
		s := b.String()
		if e.Op == entry.Acquire {
			s = "+" + s // claimed with it
		}
		list = append(list, s)
	}
	switch e.Op {
	case entry.Meta:
		return fmt.Sprintf("%s, epoch %d", e.State, e.Epoch)
	case entry.Open, entry.Recover:
		return fmt.Sprintf("epoch %d", e.Epoch)
	case entry.Close:
		return e.Writer.String()
	case entry.Pool:
		return e.Pool
	}
	return strings.Join(list, " ")
}

// heads are the ends of all chains, so that an entry that comes by is judged at
// once: by its place, the hash it names and its signature.
type heads struct {
	keys   keyspace.Keys
	chains map[entry.ChainID]*head
}

type head struct {
	seq uint64
	key note.Verifier // nil: what stands in the store is no key
	end entry.Hash
}

func newHeads(keys keyspace.Keys) *heads {
	return &heads{keys, map[entry.ChainID]*head{}}
}

// writer takes a chain's end from the writer's key, as it is when reading
// begins.
func (h *heads) writer(w *keyspace.Writer) {
	key, _ := note.NewVerifier(w.Key)
	h.chains[w.Chain] = &head{w.Seq, key, w.Hash}
}

// deleted is a finding: entries stay.
func (h *heads) deleted(key keyspace.Key, rev int64) audit.Finding {
	return h.finding(audit.Missing, key, rev, "the entry was deleted")
}

func (h *heads) finding(code audit.Code, key keyspace.Key, rev int64, detail string) audit.Finding {
	return audit.Finding{
		Code: code, Where: strings.TrimPrefix(h.keys.Entry(key.Writer, key.Chain, key.Seq), h.keys.Prefix()),
		Writer: key.Writer.String(), Chain: key.Chain.String(), Seq: key.Seq, Revision: rev, Detail: detail,
	}
}

// take judges an entry that was just committed, and moves its chain's end.
func (h *heads) take(key keyspace.Key, r audit.Record) (Line, []audit.Finding) {
	l := newLine(key, r)
	var found []audit.Finding
	bad := func(code audit.Code, detail string) {
		if l.Bad == "" {
			l.Bad = detail
		}
		found = append(found, h.finding(code, key, r.Mod, detail))
	}
	switch {
	case r.Version != 1:
		bad(audit.Rewritten, fmt.Sprintf("it was rewritten at revision %d", r.Mod))
		return l, found
	case l.Entry == nil:
		bad(audit.Malformed, l.Bad)
		return l, found
	case l.Bad != "":
		bad(audit.WrongChain, l.Bad)
		return l, found
	}
	e := l.Entry
	c := h.chains[key.Chain]
	switch {
	case e.Op == entry.Open && c == nil && key.Seq == 1:
		c = new(head)
		c.key, _ = note.NewVerifier(e.Key)
		h.chains[key.Chain] = c
	case c == nil:
		bad(audit.WrongChain, "no such chain is known")
		return l, found
	case key.Seq != c.seq+1:
		bad(audit.Fork, fmt.Sprintf("the chain's last entry is %d", c.seq))
	case e.Prev != c.end && e.Known():
		bad(audit.HashMismatch, "it does not follow the entry before it")
	}
	if err := signed(r.Value, c.key); err != nil {
		bad(audit.BadSignature, err.Error())
	}
	c.seq, c.end = key.Seq, l.Ref.Hash
	if e.Op == entry.Rotate {
		c.key, _ = note.NewVerifier(e.Key)
	}
	return l, found
}

// signed says what is wrong with an entry's signature.
func signed(stored []byte, key note.Verifier) error {
	if key == nil {
		return errors.New("nobody's key is known for its chain")
	}
	err := entry.Verify(stored, key)
	if invalid := (*note.InvalidSignatureError)(nil); errors.As(err, &invalid) {
		return fmt.Errorf("its signature by %s+%08x does not hold", invalid.Name, invalid.Hash)
	}
	return err
}

// tail judges a chain's last entries, which are in order and end with its head.
func (h *heads) tail(lines []Line, w *keyspace.Writer) []Line {
	for i := range lines {
		l := &lines[i]
		switch {
		case l.Bad != "":
		case i+1 < len(lines) && lines[i+1].Entry != nil && lines[i+1].Entry.Known() && lines[i+1].Entry.Prev != l.Ref.Hash:
			l.Bad = "it is not what the next entry follows"
		case i+1 == len(lines) && l.Ref.Seq == w.Seq && l.Ref.Hash != w.Hash:
			l.Bad = "it is not what the writer's head names"
		case i+1 == len(lines):
			// It covers the others by its hashes.
			if err := signed(l.Stored, h.chains[w.Chain].key); err != nil {
				l.Bad = err.Error()
			}
		}
	}
	return lines
}

// before is which entry comes before this one in an address's own history; zero
// where there is none.
func (l *Line) before(ip netip.Addr) entry.Ref {
	if l.Entry == nil {
		return entry.Ref{}
	}
	if l.Entry.Op == entry.Release {
		return l.Entry.Acquire
	}
	for _, at := range l.Entry.Addresses {
		if at.IP == ip {
			return at.After
		}
	}
	return entry.Ref{}
}
