package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestFits: each mutation of the list still fits the code.
func TestFits(t *testing.T) {
	mm, err := parse(list)
	if err != nil {
		t.Fatal(err)
	}
	for i := range mm {
		if _, err := mm[i].apply(filepath.Join("..", "..")); err != nil {
			t.Error(err)
		}
	}
}

func TestParse(t *testing.T) {
	mm, err := parse(strings.Join([]string{
		"# A comment.", "", "## M1 pkg/a a.go", "one line", "-x := 1", "",
		"## A22 pkg/a/b b.go", "several", "equivalent: nobody asks", "--1", "-", "-\ttab", "++1", "+",
	}, "\n"))
	want := []mutation{
		{line: 3, id: "M1", pkg: "pkg/a", file: "a.go", breaks: "one line", old: "x := 1"},
		{line: 7, id: "A22", pkg: "pkg/a/b", file: "b.go", breaks: "several", equivalent: "nobody asks", old: "-1\n\n\ttab", new: "+1\n"},
	}
	if err != nil || !reflect.DeepEqual(mm, want) {
		t.Errorf("parsed %+v, %v; want %+v", mm, err, want)
	}

	const ok = "## M1 pkg/a a.go\nwhat\n-x\n+y\n\n"
	for _, c := range []struct{ name, text, want string }{
		{"nothing", "# nothing\n", "mutations.txt: there is no mutation"},
		{"no head", ok + "what\n-x\n", `:6: "what": want ## ID PACKAGE FILE`},
		{"a head without a file", ok + "## M2 pkg/a\n", ":6: "},
		{"an ID without a number", "## M pkg/a a.go\nwhat\n-x\n", `:1: ID "M": want`},
		{"the same ID", ok + ok, ":6: M1 is in line 1 already"},
		{"a folder outside", "## M1 ../a a.go\nwhat\n-x\n", ":1: ../a/a.go: want"},
		{"a test", "## M1 pkg/a a_test.go\nwhat\n-x\n", ":1: pkg/a/a_test.go: want"},
		{"a file of another folder", "## M1 pkg/a b/a.go\nwhat\n-x\n", ":1: pkg/a/b/a.go: want"},
		{"no explanation", "## M1 pkg/a a.go\n-x\n", `:2: M1: "-x": want the line that says what it breaks`},
		{"no explanation before equivalent", "## M1 pkg/a a.go\nequivalent: so\n-x\n", ":2: M1: "},
		{"no text", ok + "## M2 pkg/a a.go\nwhat\n", ":6: M2 lacks a text"},
		{"a head alone", ok + "## M2 pkg/a a.go\n", ":6: M2 lacks the line"},
		{"a text of spaces", "## M1 pkg/a a.go\nwhat\n-\t\n+x\n", ":1: M1 lacks a text"},
		{"the same text", "## M1 pkg/a a.go\nwhat\n-x\n+x\n", ":1: M1 changes nothing"},
		{"plus first", "## M1 pkg/a a.go\nwhat\n+y\n-x\n", `:3: M1: "+y": want what it breaks, then`},
		{"minus after plus", "## M1 pkg/a a.go\nwhat\n-x\n+y\n-z\n", `:5: M1: "-z"`},
		{"two explanations", "## M1 pkg/a a.go\nwhat\nmore\n-x\n", `:3: M1: "more"`},
		{"equivalent twice", "## M1 pkg/a a.go\nwhat\nequivalent: a\nequivalent: b\n-x\n", ":4: M1: "},
		{"equivalent after the text", "## M1 pkg/a a.go\nwhat\n-x\nequivalent: a\n", ":4: M1: "},
		{"a comment inside", "## M1 pkg/a a.go\nwhat\n# why\n-x\n", ":3: M1: "},
		{"no empty line between", "## M1 pkg/a a.go\nwhat\n-x\n## M2 pkg/a a.go\nwhat\n-y\n", ":4: M1: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			if mm, err := parse(c.text); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("parsed %+v, %v; want %s", mm, err, c.want)
			}
		})
	}
}

// TestOutcomes tries mutations of a module with one function.
func TestOutcomes(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":     "module example.org/m\n\ngo 1.26\n",
		"docs/three": "3",
		"pkg/a/a.go": "package a\n\n// Add adds.\nfunc Add(a, b int) int {\n\tif b == 0 {\n\t\treturn a\n\t}\n\treturn a + b\n}\n",
		"pkg/a/a_test.go": `package a

import (
	"os"
	"strconv"
	"testing"
)

func TestAdd(t *testing.T) {
	want, _ := os.ReadFile("../../docs/three")
	t.Run("three", func(t *testing.T) {
		if strconv.Itoa(Add(1, 2)) != string(want) {
			t.Fatal("it is not three")
		}
	})
	t.Run("replays", func(t *testing.T) {
		if _, err := os.Stat("testdata/rapid"); err == nil {
			t.Fatal("a replay file is there")
		}
	})
	t.Run("environment", func(t *testing.T) {
		if os.Getenv("IPAM_LEDGER_FULL") != "" || os.Getenv("RAPID_SEED") != "" || os.Getenv("RAPID_NOFAILFILE") != "true" {
			t.Fatal(os.Environ())
		}
	})
	if err := os.WriteFile("left", nil, 0o600); err != nil {
		t.Fatal(err)
	}
}
`,
		"pkg/a/testdata/rapid/TestAdd/1.fail": "",
	} {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("IPAM_LEDGER_FULL", "1")
	t.Setenv("RAPID_SEED", "7")

	const sum, zero = "return a + b", "if b == 0 {"
	mm := []mutation{
		{id: "M1", old: sum, new: "return a - b"},
		{id: "M2", old: zero, new: "for b == 0 {"},
		{id: "M3", old: zero, new: "if b == 7 {", equivalent: "a + 0 is a"},
		{id: "M4", old: sum, new: "return a + c"},
		{id: "M5", old: "a", new: "b"},
		{id: "M6", old: sum, new: "return a +"},
		{id: "M7", old: sum, new: "for {\n\t}"},
		{id: "M8", old: sum, new: "panic(b)"},
	}
	want := []struct{ outcome, by string }{
		{killed, "TestAdd/three"},
		{survived, ""},
		{equivalent, ""},
		{notBuilt, ""},
		{notApplied, ""},
		{notApplied, ""},
		{timeout, ""},
		{killed, "TestAdd/three"},
	}
	for i := range mm {
		mm[i].pkg, mm[i].file = "pkg/a", "a.go"
		limit := time.Minute
		if want[i].outcome == timeout {
			limit = time.Second
		}
		r := try(context.Background(), root, "pkg/a", &mm[i], limit)
		if r.outcome == timeout {
			r.by = "" // how far it came is a matter of time
		}
		if r.err != nil || r.outcome != want[i].outcome || r.by != want[i].by {
			t.Errorf("%s: %q by %q, %v; want %q by %q\n%s", mm[i].id, r.outcome, r.by, r.err, want[i].outcome, want[i].by, r.output)
		}
	}

	var table bytes.Buffer
	ok, err := tryAll(context.Background(), root, mm[:3], 2, time.Minute, &table)
	if ok || err != nil || !strings.Contains(table.String(), "1 noticed, 1 equivalent, 1 not noticed, 0 to be mended: M2\n") {
		t.Errorf("%v, %v:\n%s", ok, err, table.String())
	}
	mm = append(mm[:1], mm[2])
	if ok, err := tryAll(context.Background(), root, mm, 1, time.Minute, &table); !ok || err != nil {
		t.Errorf("%v, %v:\n%s", ok, err, table.String())
	}
	if _, err := os.Stat(filepath.Join(root, "pkg/a/left")); err == nil {
		t.Error("the tests ran in the tree itself")
	}
	// Tests that fail as they are notice nothing.
	if err := os.WriteFile(filepath.Join(root, "docs/three"), []byte("4"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ok, err := tryAll(context.Background(), root, mm, 1, time.Minute, &table); ok || err == nil || !strings.Contains(err.Error(), "it is not three") {
		t.Errorf("%v, %v", ok, err)
	}
}
