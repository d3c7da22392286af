package history

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestCheck: the model is one that can say no.
func TestCheck(t *testing.T) {
	op := func(client int, call, ret time.Duration, k Kind, address int, who int32) Operation {
		return Operation{Kind: k, Address: address, Who: who, Client: client, Call: call, Return: ret}
	}
	for name, x := range map[string]struct {
		size int
		want bool
		ops  []Operation
	}{
		"two holders":              {2, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Acquire, 0, 2)}},
		"one holder twice":         {2, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Acquire, 0, 1)}},
		"one after the other":      {2, true, []Operation{op(0, 1, 2, Acquire, 0, 1), op(0, 3, 6, Release, 0, 1), op(1, 4, 5, Acquire, 0, 2)}},
		"given back by another":    {2, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Release, 0, 2)}},
		"given back before it was": {2, false, []Operation{op(0, 1, 2, Release, 0, 1), op(0, 3, 4, Acquire, 0, 1)}},
		"exhausted while free":     {2, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Exhausted, 0, 0)}},
		"exhausted":                {1, true, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Exhausted, 0, 0)}},
		"it has it still":          {1, true, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Held, 0, 1)}},
		"it had it":                {1, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(0, 3, 4, Release, 0, 1), op(1, 5, 6, Held, 0, 1)}},
		"free for a while":         {1, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, 4, Free, 0, 0)}},
		"never seen to end":        {1, true, []Operation{op(0, 1, Never, Acquire, 0, 1), op(1, 3, 4, Free, 0, 0), op(2, 5, 6, Held, 0, 1)}},
		"never, and two holders":   {1, false, []Operation{op(0, 1, 2, Acquire, 0, 1), op(1, 3, Never, Acquire, 0, 2), op(2, 5, 6, Held, 0, 1)}},
	} {
		err := Check(x.size, x.ops, time.Minute)
		if (err == nil) != x.want {
			t.Errorf("%s: %v, want it to be explained: %v", name, err, x.want)
		}
		if err != nil && (!strings.Contains(err.Error(), x.ops[0].String()) || errors.Is(err, ErrUndecided)) {
			t.Errorf("%s: the error does not show the history: %v", name, err)
		}
	}
	if err := Check(MaxSize+1, nil, time.Minute); err == nil {
		t.Error("a history larger than the model was checked")
	}
}
