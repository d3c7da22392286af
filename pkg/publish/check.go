package publish

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// checker judges what is written while it is written. It knows the head of each
// writer's chain and sees each revision whole, and finds
//
//   - a write to, or the end of, an entry that was there already;
//   - a new entry that does not extend its chain's head by number and hash, or
//     is not signed by the chain's key;
//   - a writer's key that does not name the last entry of its chain;
//   - a change of what is held without an entry in the same revision, or naming
//     another one.
//
// It does not replay: that an entry says the same as the keys written with it,
// and fits the history, is for audit.Verify, which reads everything.
type checker struct {
	keys  keyspace.Keys
	ring  *audit.KeyRing // nil: keys are believed on first use
	heads map[string]*head
	// unjudged counts entries of a newer version, of which only place and
	// signature can be checked.
	unjudged int64
}

// head is the end of a writer's chain.
type head struct {
	entry.Ref
	key note.Verifier // nil where it cannot be read
}

// finding is one thing that is wrong. One that stands for evidence that is gone
// once it was seen (what an entry said before) outlasts a later full
// verification that finds nothing.
type finding struct {
	audit.Finding
	lasting bool
}

func newChecker(keys keyspace.Keys, ring *audit.KeyRing) *checker {
	return &checker{keys: keys, ring: ring, heads: map[string]*head{}}
}

// load takes a key as it is at the beginning.
func (c *checker) load(r audit.Record) {
	if !strings.HasPrefix(r.Key, c.keys.Writers()) {
		return
	}
	k, err := c.keys.Parse(r.Key)
	var w keyspace.Writer
	if err != nil || keyspace.Decode(r.Value, &w) != nil {
		return // a finding of the full verification
	}
	c.heads[k.Writer.String()] = &head{w.Head(), verifier(w.Key)}
}

func verifier(vkey string) note.Verifier {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil
	}
	return v
}

// revision judges all that one revision changed.
func (c *checker) revision(events []Event) (out []finding) {
	add := func(e *Event, code audit.Code, lasting bool, format string, args ...any) {
		out = append(out, finding{audit.Finding{
			Code: code, Where: strings.TrimPrefix(e.Key, c.keys.Prefix()), Revision: e.Mod, Detail: fmt.Sprintf(format, args...),
		}, lasting})
	}
	refs := map[entry.Ref]bool{} // entries of this revision
	grown := map[string]*Event{} // writers whose chains grew
	moved := map[string]bool{}   // writers whose keys were put
	parsed := map[*Event]keyspace.Key{}
	for i := range events {
		e := &events[i]
		k, err := c.keys.Parse(e.Key)
		if err != nil {
			if !e.Deleted {
				add(e, audit.UnknownKey, false, "%v", err)
			}
			continue
		}
		parsed[e] = k
		if !e.Deleted && e.Lease != 0 {
			add(e, audit.LeasedKey, false, "it has an etcd lease")
		}
		if k.Kind != "chains" {
			continue
		}
		switch {
		case e.Deleted:
			add(e, audit.Missing, true, "an entry was deleted")
			continue
		case e.Version != 1:
			add(e, audit.Rewritten, true, "an entry was written again")
			continue
		}
		ref, f := c.extend(e, k)
		if f != nil {
			add(e, f.Code, true, "%s", f.Detail)
		}
		refs[ref], grown[k.Writer.String()] = true, e
	}
	for i := range events {
		e := &events[i]
		k, ok := parsed[e]
		if !ok {
			continue
		}
		var want entry.Ref // the entry that it names
		var err error
		code := audit.StateDiffers
		switch k.Kind {
		case "writers":
			name := k.Writer.String()
			moved[name] = true
			if f := c.writer(e, name); f != nil {
				add(e, f.Code, false, "%s", f.Detail)
			}
			continue
		case "addresses":
			var v keyspace.Address
			if e.Deleted {
				break
			}
			if err = keyspace.Decode(e.Value, &v); err == nil {
				want, code = v.Release, audit.StateDiffers
				if v.State == keyspace.Leased {
					want, code = v.Acquire, audit.AllocNoEntry
				}
			}
		case "attachments":
			var v keyspace.Attachment
			if e.Deleted {
				break
			}
			if err = keyspace.Decode(e.Value, &v); err == nil {
				want, code = v.Acquire, audit.AllocNoEntry
			}
		case "blocks":
			var v keyspace.Block
			if e.Deleted {
				break
			}
			if err = keyspace.Decode(e.Value, &v); err == nil {
				want, code = v.Claim, audit.AllocNoEntry
			}
		case "meta":
			var v keyspace.Meta
			if e.Deleted {
				break
			}
			if err = keyspace.Decode(e.Value, &v); err == nil {
				want = v.Entry
			}
		case "pools":
		default:
			continue // stops/ have no entries, chains/ are them
		}
		switch {
		case err != nil:
			add(e, audit.Malformed, false, "%v", err)
		case len(refs) == 0 && e.Deleted:
			add(e, audit.StateMissing, false, "it was deleted, and no entry was committed with that")
		case len(refs) == 0:
			add(e, code, false, "it was written, and no entry was committed with that")
		case !e.Deleted && k.Kind != "pools" && !refs[want]:
			add(e, code, false, "it names an entry (%s) that was not committed with it", want.Short())
		}
	}
	for name, e := range grown {
		if !moved[name] {
			add(e, audit.StateDiffers, false, "the chain of %s grew, and its writer's key was not written with that", name)
		}
	}
	return out
}

// extend judges a new entry and makes it its chain's head, right or wrong: what
// follows is judged by its own place. What is no chain of the writer's does not
// take the head from the one that is.
func (c *checker) extend(ev *Event, k keyspace.Key) (entry.Ref, *audit.Finding) {
	ref := entry.Ref{Chain: k.Chain, Seq: k.Seq, Hash: entry.HashOf(ev.Value)}
	name := k.Writer.String()
	before := c.heads[name]
	h := &head{Ref: ref}
	if before != nil && before.Chain == k.Chain {
		h.key = before.key
	}
	c.heads[name] = h
	bad := func(code audit.Code, format string, args ...any) (entry.Ref, *audit.Finding) {
		if before != nil && before.Chain != k.Chain {
			c.heads[name] = before
		}
		return ref, &audit.Finding{Code: code, Detail: fmt.Sprintf(format, args...)}
	}
	e, err := entry.Parse(ev.Value)
	newer := errors.Is(err, entry.ErrVersion)
	switch {
	case err != nil && !newer:
		return bad(audit.Malformed, "%v", err)
	case !newer && (e.Chain != k.Chain || e.Seq != k.Seq):
		return bad(audit.WrongChain, "it says that it is entry %d of chain %s", e.Seq, e.Chain.Short())
	case newer || !e.Known():
		c.unjudged++
	}
	if h.key == nil && !newer && e.Op == entry.Open && e.Writer == k.Writer {
		h.key = verifier(e.Key)
	}
	switch {
	case h.key == nil:
		return bad(audit.Fork, "it is of a chain that the writer has not opened")
	case entry.Verify(ev.Value, h.key) != nil:
		return bad(audit.BadSignature, "it is not signed by the key of its chain")
	}
	if newer {
		if before == nil || before.Chain != k.Chain || before.Seq+1 != k.Seq {
			return bad(audit.Missing, "entries before it are gone")
		}
		return ref, nil // its link is in what cannot be read
	}
	if e.Revision >= ev.Mod {
		return bad(audit.Revision, "it says that it was decided on at revision %d", e.Revision)
	}
	if e.Op == entry.Open {
		switch {
		case e.Seq != 1 || e.Prev != (entry.Hash{}):
			return bad(audit.Malformed, "an open that is not the first entry of its chain")
		case before != nil && e.Predecessor != before.Ref:
			return bad(audit.Fork, "the chain does not continue the writer's chain %s where that ends", before.Short())
		case c.ring != nil && !c.ring.Contains(e.Key):
			return bad(audit.UntrustedKey, "the chain is opened with a key that is not among the trusted ones")
		}
		return ref, nil
	}
	switch {
	case before.Chain != k.Chain || e.Seq <= before.Seq:
		return bad(audit.Fork, "the writer's chain ended at %s", before.Short())
	case e.Seq != before.Seq+1:
		return bad(audit.Missing, "entries %d to %d of the chain are gone", before.Seq+1, e.Seq-1)
	case e.Prev != before.Hash:
		return bad(audit.HashMismatch, "it follows an entry %s, and the one before it is %s", e.Prev.Short(), before.Hash.Short())
	case e.Op == entry.Rotate:
		if h.key = verifier(e.Key); h.key == nil || h.key.Name() != name {
			return bad(audit.UntrustedKey, "the new key is another writer's")
		}
	}
	return ref, nil
}

// writer judges a writer's key against the chain's head, as it is after this
// revision's entries. It takes the head from the key where it knows none.
func (c *checker) writer(e *Event, name string) *audit.Finding {
	if e.Deleted {
		return &audit.Finding{Code: audit.StateMissing, Detail: "a writer's key was deleted"}
	}
	var w keyspace.Writer
	if err := keyspace.Decode(e.Value, &w); err != nil {
		return &audit.Finding{Code: audit.Malformed, Detail: err.Error()}
	}
	h := c.heads[name]
	switch {
	case h == nil:
		return &audit.Finding{Code: audit.Missing, Detail: "it names a chain of which no entry was seen"}
	case w.Head() == h.Ref:
		return nil
	case w.Chain == h.Chain && w.Seq < h.Seq:
		return &audit.Finding{Code: audit.HeadRollback, Detail: fmt.Sprintf("it names entry %d, and the chain's last is %d", w.Seq, h.Seq)}
	}
	return &audit.Finding{Code: audit.StateDiffers, Detail: fmt.Sprintf("it names %s, and the chain's last is %s", w.Head().Short(), h.Short())}
}
