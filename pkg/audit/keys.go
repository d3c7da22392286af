package audit

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// KeyRing is a set of verifier keys that an auditor trusts.
type KeyRing struct{ keys map[string]bool }

// maxKeyLine is more than the longest key has bytes.
const maxKeyLine = 1024

// ParseKeys reads C2SP verifier keys (name+id+base64), one a line. Blank lines
// and lines that start with # are skipped. The name of a key is its writer's:
// kind/name. A ring without keys is an error: it would trust nobody.
func ParseKeys(r io.Reader) (*KeyRing, error) {
	ring := &KeyRing{map[string]bool{}}
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, maxKeyLine), maxKeyLine)
	n := 0
	for s.Scan() {
		n++
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if _, err := parseKey(line); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		ring.keys[line] = true
	}
	switch err := s.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, fmt.Errorf("line %d is longer than %d bytes: want one verifier key a line, as 'ledger keys export' prints them", n+1, maxKeyLine)
	case err != nil:
		return nil, err
	case len(ring.keys) == 0:
		return nil, errors.New("no key in it: want one verifier key a line, as 'ledger keys export' prints them")
	}
	return ring, nil
}

// Contains reports whether a verifier key is in the ring.
func (k *KeyRing) Contains(vkey string) bool { return k.keys[vkey] }

// Len is how many keys the ring has.
func (k *KeyRing) Len() int { return len(k.keys) }

// parseKey reads a verifier key in its one spelling, named for a writer.
func parseKey(vkey string) (note.Verifier, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, fmt.Errorf("key %.200q: %w; want name+id+base64", vkey, err)
	}
	if _, err := entry.ParseWriter(v.Name()); err != nil {
		return nil, fmt.Errorf("key %.200q: %w", vkey, err)
	}
	// NewVerifier accepts several spellings of ID and base64.
	pub, _ := base64.StdEncoding.DecodeString(strings.SplitN(vkey, "+", 3)[2])
	if again := fmt.Sprintf("%s+%08x+%s", v.Name(), v.KeyHash(), base64.StdEncoding.EncodeToString(pub)); again != vkey {
		return nil, fmt.Errorf("key %.200q: its spelling would be %q", vkey, again)
	}
	return v, nil
}
