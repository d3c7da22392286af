package entry

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/mod/sumdb/note"
)

// TestDocumentedExample checks what docs/formats.md says of the two entries
// beside it: a reader who checks it with sha256sum must find the same.
func TestDocumentedExample(t *testing.T) {
	docs := filepath.Join("..", "..", "..", "docs")
	page, err := os.ReadFile(filepath.Join(docs, "formats.md"))
	if err != nil {
		t.Fatal(err)
	}
	var open *Entry
	for i, name := range []string{"example-open.txt", "example-entry.txt"} {
		stored, err := os.ReadFile(filepath.Join(docs, name))
		if err != nil {
			t.Fatal(err)
		}
		e, err := Parse(stored)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if open == nil {
			open = e
			if !bytes.Contains(page, []byte(e.Key)) {
				t.Errorf("formats.md does not print the key %s", e.Key)
			}
		} else if !bytes.Contains(page, stored) {
			t.Errorf("formats.md does not print %s as it is", name)
		}
		v, err := note.NewVerifier(open.Key)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(stored, v); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		h := HashOf(stored)
		if !bytes.Contains(page, []byte(h.String()+"  -\n")) {
			t.Errorf("formats.md does not print the hash of %s, %s, as sha256sum does", name, h)
		}
		if i == 1 {
			if first, err := os.ReadFile(filepath.Join(docs, "example-open.txt")); err != nil || e.Prev != HashOf(first) {
				t.Errorf("%s does not name the hash of example-open.txt (%v)", name, err)
			}
		}
	}
}
