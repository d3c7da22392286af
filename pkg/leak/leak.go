// Package leak decides which leases nobody uses any more: those whose container
// no runtime knows, or whose pod the cluster does not have.
//
// A lease is valid until it is proven leaked, and the proof is:
//
//   - a list, whole and readable, of what exists, taken from those who know;
//   - two observations, at least a grace period apart, in each of which the
//     lease was the same (it names its acquire) and not on the list;
//   - what ends the lease compares, in its transaction, that it is still that one.
//
// The grace period is for what a list cannot show: a runtime lists a sandbox
// only once its network is up, and a list of pods is a moment old. What a list
// says nothing about (an attachment without a pod, asked of a list of pods) is
// never leaked.
//
// A wrong list is the one thing that nobody can see from here. So a list of no
// pod at all, and one that is only a part, are refused, and callers free a
// limited number at a time.
//
// The package is pure; the grace period is measured on the caller's clock.
package leak

import (
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
	Wall  time.Time     `json:"wall"`  // for people
}

// Observation is a lease that was not on a list.
type Observation struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Acquire    entry.Ref             `json:"acquire"`
	Source     string                `json:"source"` // the kind of list: observations of different kinds do not add up
	Since      time.Time             `json:"since"`  // the first of the observations
}

// Suspect is a lease that is not on the list.
type Suspect struct {
	Lease
	Since  time.Time // first observed so
	Leaked bool      // long enough, and more than once
}

// Findings are what Judge found.
type Findings struct {
	Known    int // leases on the list
	Untold   int // leases that the list says nothing about
	Suspects []Suspect
}

// Judge compares leases with a list, now, in the light of earlier observations
// of the same source. An observation that is not before now (the clock was set
// back) counts for nothing.
func Judge(leases []Lease, list List, source string, earlier []Observation, now time.Time, grace time.Duration) Findings {
	type seen struct {
		id      keyspace.AttachmentID
		acquire entry.Ref
	}
	since := map[seen]time.Time{}
	for _, o := range earlier {
		if o.Source == source && o.Since.Before(now) {
			since[seen{o.Attachment, o.Acquire}] = o.Since
		}
	}
	var out Findings
	for _, l := range leases {
		switch has, tells := list.Has(&l); {
		case !tells:
			out.Untold++
		case has:
			out.Known++
		default:
			s := Suspect{Lease: l, Since: now}
			if t, ok := since[seen{l.ID, l.Value.Acquire}]; ok {
				s.Since, s.Leaked = t, now.Sub(t) >= grace
			}
			out.Suspects = append(out.Suspects, s)
		}
	}
	return out
}

// Containers are the IDs of all sandboxes that a node's runtime knows, each with
// whether it runs. One that does not may still have its address.
type Containers map[string]bool

// Has implements List.
func (c Containers) Has(l *Lease) (has, tells bool) {
	_, has = c[l.ID.Container]
	return has, true
}
