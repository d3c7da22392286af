// Package leak decides which leases nobody uses any more: those whose container
// no runtime knows, or whose pod the cluster does not have.
//
// A lease is valid until it is proven leaked, and the proof is:
//
//   - a list, whole and readable, of what exists, taken from those who know;
//   - an observation in which the lease was not on such a list, and a list that
//     was taken at least a grace period after it and lacks the lease, too; in
//     each the lease was the same (it names its acquire), and it was on no list
//     in between;
//   - what ends the lease compares, in its transaction, that it is still that one.
//
// The grace period is for what a list cannot show: a runtime lists a sandbox
// only once its network is up, and a list of pods is a moment old. It ends at
// the list's own time and not when the list is read: leases are read before an
// observation, so that what a list lacks that was taken so much later is gone,
// however old the list was when it was used. What a list says nothing about (an
// attachment without a pod) is never leaked.
//
// It is measured by the clock of one boot, which nobody can set. An observation
// of another boot counts for nothing. A file knows the wall clock's time alone;
// see FromFile.
//
// A wrong list is the one thing that nobody can see from here. So a list of no
// pod at all, one that is only a part, and one that was looked at before are
// refused, and callers free a limited number at a time.
//
// The package is pure: times are its callers'.
package leak

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Lease is what an attachment holds.
type Lease struct {
	ID         keyspace.AttachmentID
	Value      keyspace.Attachment
	Remembered bool // only the node's state directory says so, and etcd does not
}

// ofPod reports whether a pod of Kubernetes has the lease. podman, too, gives a
// pod's name, and no namespace and no UID.
func (l *Lease) ofPod() bool { return l.Value.PodUID != "" || strings.Contains(l.Value.Pod, "/") }

// List is what exists.
type List interface {
	// Has reports whether what holds the lease exists; tells is false where the
	// list says nothing about such leases.
	Has(l *Lease) (has, tells bool)
}

// Moment is a point in time by two clocks.
type Moment struct {
	Boot  string        `json:"boot"`  // boot ID; moments of different boots are not compared
	Since time.Duration `json:"since"` // the boot, suspended or not (CLOCK_BOOTTIME)
	Wall  time.Time     `json:"wall"`  // for people, and for files, which know no other
}

// Taken is a list and when it was taken, or a moment before.
type Taken struct {
	Moment
	Name string `json:"name"`
	File bool   `json:"file,omitempty"` // by the time of its file
	Sum  string `json:"sum,omitempty"`  // SHA-256 of what was read
}

// FromFile dates a list by when its file was written (mtime). The wall clock may
// have been set since. Was it set back, the file looks younger than it is: one of
// the future is refused here, and Judge goes by the clock of the observation as
// well. What nobody can see is a file that was written while the clock was ahead
// of both.
func FromFile(name, sum string, mtime time.Time, now Moment) (Taken, error) {
	if mtime.After(now.Wall) {
		return Taken{}, fmt.Errorf("%s: the file is of %s, and the clock says %s: one of them is wrong", name, stamp(mtime), stamp(now.Wall))
	}
	if first := time.Unix(0, 0); mtime.Before(first) {
		mtime = first
	}
	at := Moment{now.Boot, now.Since - now.Wall.Sub(mtime), mtime.UTC()}
	return Taken{at, name, true, sum}, nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// Observation is a lease that was not on a list.
type Observation struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Acquire    entry.Ref             `json:"acquire"`
	First      Moment                `json:"first"` // when that was first observed
}

// Look is one look at what exists. Leases were read before At.
type Look struct {
	Source string        `json:"source"` // the kind of list: looks at different kinds do not add up
	At     Moment        `json:"at"`
	Lists  []Taken       `json:"lists"` // all that are needed to know what exists
	Off    []Observation `json:"off"`   // leases that were not on any
}

// Memory is what is kept from one look to the next: the last at each kind of list
// in each boot, newest first. Boots are several where the memory moves between
// machines.
type Memory []Look

// maxBoots is of how many boots looks at one kind of list are kept.
const maxBoots = 4

// Suspect is a lease that is not on the list.
type Suspect struct {
	Lease
	First  Moment        // first observed so
	Off    time.Duration // how much later the list was taken
	Leaked bool          // long enough, and observed before
}

// Findings are what Judge found.
type Findings struct {
	Known    int // leases on the list
	Untold   int // leases that the list says nothing about
	Suspects []Suspect
}

// Judge compares leases with what the lists of a look say in the light of earlier
// ones, and returns what is to be kept for the next. It fails for lists that were
// looked at before.
func (m Memory) Judge(look Look, leases []Lease, list List, grace time.Duration) (Findings, Memory, error) {
	first := map[lease]Moment{}
	if last := m.last(&look); last != nil {
		if err := look.newer(last); err != nil {
			return Findings{}, nil, err
		}
		for _, o := range last.Off {
			first[o.lease()] = o.First
		}
	}
	var out Findings
	look.Off = []Observation{}
	for _, l := range leases {
		switch has, tells := list.Has(&l); {
		case !tells:
			out.Untold++
		case has:
			out.Known++
		default:
			s := Suspect{Lease: l, First: look.At}
			o := Observation{l.ID, l.Value.Acquire, look.At}
			if at, ok := first[o.lease()]; ok {
				if off, ok := look.after(at); ok {
					s.First, s.Off, s.Leaked = at, max(0, off), off >= grace
					o.First = at
				}
			}
			out.Suspects = append(out.Suspects, s)
			look.Off = append(look.Off, o)
		}
	}
	return out, m.with(look), nil
}

type lease struct {
	id      keyspace.AttachmentID
	acquire entry.Ref
}

func (o *Observation) lease() lease { return lease{o.Attachment, o.Acquire} }

// after says how much later than an earlier look all lists were taken; false where
// that cannot be known: in another boot, or, for a file's sake, where the clock was
// set back since.
func (k *Look) after(at Moment) (off time.Duration, ok bool) {
	if at.Boot == "" || at.Boot != k.At.Boot || at.Since > k.At.Since {
		return 0, false
	}
	for i, t := range k.Lists {
		d := t.Since - at.Since
		if t.File {
			if at.Wall.After(k.At.Wall) {
				return 0, false
			}
			d = min(d, t.Wall.Sub(at.Wall))
		}
		if i == 0 || d < off {
			off = d
		}
	}
	return off, len(k.Lists) > 0
}

// last is the look before this one.
func (m Memory) last(k *Look) *Look {
	for i := range m {
		if m[i].Source == k.Source {
			if _, ok := k.after(m[i].At); ok {
				return &m[i]
			}
		}
	}
	return nil
}

// oldest is the list that counts.
func (k *Look) oldest() *Taken {
	t := slices.MinFunc(k.Lists, func(a, b Taken) int { return int(min(1, max(-1, a.Since-b.Since))) })
	return &t
}

// newer fails if the lists, or one that bears no time, are those of the last look.
func (k *Look) newer(last *Look) error {
	if t := k.oldest(); t.File && len(last.Lists) > 0 {
		l := last.oldest()
		if before := l.File && !t.Wall.After(l.Wall) || !l.File && t.Since <= l.Since; before {
			return fmt.Errorf("%s: the list is of %s, and the last one that was looked at of %s: it says nothing new", t.Name, stamp(t.Wall), stamp(l.Wall))
		}
	}
	for _, t := range k.Lists {
		for _, l := range last.Lists {
			if !t.File && t.Sum != "" && t.Sum == l.Sum {
				return fmt.Errorf("%s: the list, read at %s, is byte for byte the one that was looked at at %s: it cannot be told from that", t.Name, stamp(k.At.Wall), stamp(last.At.Wall))
			}
		}
	}
	return nil
}

// with adds a look. What is on its lists, or leased no more, is no suspect of
// other boots either.
func (m Memory) with(k Look) Memory {
	off := map[lease]bool{}
	for _, o := range k.Off {
		off[o.lease()] = true
	}
	out, boots := Memory{k}, 1
	for _, l := range m {
		if l.Source == k.Source {
			l.Off = slices.DeleteFunc(slices.Clone(l.Off), func(o Observation) bool { return !off[o.lease()] })
			if l.At.Boot == k.At.Boot || len(l.Off) == 0 || boots == maxBoots {
				continue
			}
			boots++
		}
		out = append(out, l)
	}
	return out
}

// Containers are the IDs of all sandboxes that a node's runtime knows, each with
// whether it runs. One that does not may still have its address. A lease of no
// pod may be another runtime's (nerdctl's, podman's), and is left alone.
type Containers map[string]bool

// Has implements List.
func (c Containers) Has(l *Lease) (has, tells bool) {
	_, has = c[l.ID.Container]
	return has, has || l.ofPod()
}

// All are the sandboxes of every runtime of the node: they tell of leases of no
// pod, too.
type All Containers

// Has implements List.
func (c All) Has(l *Lease) (has, tells bool) {
	_, has = c[l.ID.Container]
	return has, true
}
