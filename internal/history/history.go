// Package history checks what callers saw of a set of addresses, each on its own
// clock and many at once, against what such a set does. The model is invariant
// I1: an address is held by at most one, is given back by who holds it, and
// none is free only where all are held.
//
// Check guarantees that it says no where no order of the operations, each at one
// instant between its call and its return, explains what was seen. What it is
// not told it cannot see: an operation whose outcome nobody knows must be left
// out if it did not happen, and has no Return if it did.
//
// What can fail: a history with very many operations open at once is not decided
// in the time given, which is said.
package history

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// MaxSize is how many addresses one history may have.
const MaxSize = 8

// Kind is what an operation does.
type Kind uint8

// The kinds. Held and Free are what somebody saw who changed nothing.
const (
	Acquire   Kind = iota // Who gets Address, which nobody has
	Release               // Who gives Address back, which it has
	Held                  // Address is Who's
	Free                  // Address is nobody's
	Exhausted             // none of the addresses is free
)

// Never is the Return of an operation that was not seen to end.
const Never = time.Duration(math.MaxInt64)

// Operation is one operation; Client is who saw it, for people.
type Operation struct {
	Kind         Kind
	Address      int   // from 0; not of Exhausted
	Who          int32 // from 1; not of Free and Exhausted
	Client       int
	Call, Return time.Duration // since some instant
}

func (o Operation) String() string {
	switch o.Kind {
	case Acquire:
		return fmt.Sprintf("%d gets %d", o.Who, o.Address)
	case Release:
		return fmt.Sprintf("%d gives %d back", o.Who, o.Address)
	case Held:
		return fmt.Sprintf("%d has %d", o.Who, o.Address)
	case Free:
		return fmt.Sprintf("nobody has %d", o.Address)
	}
	return "exhausted"
}

// ErrUndecided means that the time was too short.
var ErrUndecided = errors.New("the history was not decided in time")

// Check reports whether a set of size addresses, all free at first, can have
// had this history.
func Check(size int, operations []Operation, timeout time.Duration) error {
	if size < 1 || size > MaxSize {
		return fmt.Errorf("a history of %d addresses: want 1 to %d", size, MaxSize)
	}
	ops := make([]porcupine.Operation, 0, len(operations))
	for _, o := range operations {
		ops = append(ops, porcupine.Operation{ClientId: o.Client, Input: o, Output: o, Call: int64(o.Call), Return: int64(o.Return)})
	}
	switch porcupine.CheckOperationsTimeout(model(size), ops, timeout) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("%w: %d operations, %v", ErrUndecided, len(ops), timeout)
	}
	var b strings.Builder
	slices.SortStableFunc(operations, func(a, b Operation) int { return int(a.Call - b.Call) })
	for _, o := range operations {
		ret := "never"
		if o.Return != Never {
			ret = o.Return.String()
		}
		fmt.Fprintf(&b, "\n  client %d, %v to %s: %v", o.Client, o.Call, ret, o)
	}
	return fmt.Errorf("no order explains these %d operations:%s", len(ops), &b)
}

// model steps a state, who has each address, by an operation.
func model(size int) porcupine.Model {
	type state [MaxSize]int32
	return porcupine.Model{
		Init: func() any { return state{} },
		Step: func(before, in, _ any) (bool, any) {
			s, o := before.(state), in.(Operation)
			switch o.Kind {
			case Acquire:
				if s[o.Address] != 0 {
					return false, s
				}
				s[o.Address] = o.Who
				return true, s
			case Release:
				if s[o.Address] != o.Who {
					return false, s
				}
				s[o.Address] = 0
				return true, s
			case Held:
				return s[o.Address] == o.Who, s
			case Free:
				return s[o.Address] == 0, s
			}
			return !slices.Contains(s[:size], 0), s
		},
	}
}
