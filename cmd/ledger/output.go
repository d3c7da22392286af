package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// outputs is the annotation of a command that lists its formats; the first is
// the default.
const outputs = "outputs"

func formats(list string) map[string]string { return map[string]string{outputs: list} }

// checkOutput refuses a format that a command does not have.
func (a *app) checkOutput(cmd *cobra.Command, _ []string) error {
	have := cmd.Annotations[outputs]
	switch list := strings.Split(have, ","); {
	case a.output == "":
		a.output = list[0]
		return nil
	case have == "":
		return usage("%s has no -o", cmd.CommandPath())
	case !slices.Contains(list, a.output):
		return usage("-o %.40q: %s has %s", a.output, cmd.CommandPath(), strings.Join(list, ", "))
	}
	return nil
}

// structured writes v if the format is JSON or YAML, and says whether it was.
func (a *app) structured(v any) (bool, error) {
	switch a.output {
	case "json":
		b, err := marshal(v, "  ")
		if err != nil {
			return true, err
		}
		_, err = a.out.Write(b)
		return true, err
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return true, err
		}
		_, err = a.out.Write(b)
		return true, err
	}
	return false, nil
}

func marshal(v any, indent string) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", indent)
	err := e.Encode(v)
	return printableJSON(b.Bytes()), err
}

// printableJSON escapes what encoding/json does not and a terminal may obey: the
// other control characters, and those that turn the direction of writing round.
// They can only stand in strings.
func printableJSON(b []byte) []byte {
	strange := func(r rune) bool { return r >= 0x7f && !unicode.IsPrint(r) }
	if bytes.IndexFunc(b, strange) < 0 {
		return b
	}
	var out []byte
	for _, r := range string(b) {
		if strange(r) {
			for _, u := range utf16.AppendRune(nil, r) {
				out = fmt.Appendf(out, "\\u%04x", u)
			}
			continue
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}

// wide reports whether -o wide was asked for.
func (a *app) wide() bool { return a.output == "wide" }

// table aligns rows under capital headers.
type table struct {
	w    *tabwriter.Writer
	to   *trimmer
	rows int
	most []int // widest cell of each column so far
}

func (a *app) table(headers ...string) *table {
	t := &table{to: &trimmer{w: a.out}}
	t.w = tabwriter.NewWriter(t.to, 0, 0, 2, ' ', 0)
	t.most = make([]int, len(headers))
	t.row(headers...)
	return t
}

// row adds a row. An empty cell is written as a dash, but for the last.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		if c == "" && i < len(cells)-1 {
			c = "-"
		}
		c = printable(c)
		t.most[i] = max(t.most[i], len([]rune(c)))
		if i > 0 {
			io.WriteString(t.w, "\t")
		}
		io.WriteString(t.w, c)
		if i < len(cells)-1 { // a table that is written in parts keeps its columns
			io.WriteString(t.w, strings.Repeat(" ", t.most[i]-len([]rune(c))))
		}
	}
	io.WriteString(t.w, "\n")
	if t.rows++; t.rows%1000 == 0 {
		t.flush()
	}
}

func (t *table) flush() {
	t.w.Flush()
	t.to.flush()
}

// trimmer takes blanks off the ends of lines.
type trimmer struct {
	w   io.Writer
	buf []byte
}

func (t *trimmer) Write(b []byte) (int, error) {
	t.buf = append(t.buf, b...)
	for {
		i := bytes.IndexByte(t.buf, '\n')
		if i < 0 {
			return len(b), nil
		}
		line := append(bytes.TrimRight(t.buf[:i], " "), '\n')
		if _, err := t.w.Write(line); err != nil {
			return 0, err
		}
		t.buf = t.buf[i+1:]
	}
}

func (t *trimmer) flush() {
	if len(t.buf) > 0 {
		t.w.Write(t.buf)
		t.buf = nil
	}
}

// printable keeps what the ledger holds from moving somebody's cursor, and from
// turning the direction of writing round.
func printable(s string) string {
	if utf8.ValidString(s) && !strings.ContainsFunc(s, unprintable) {
		return s
	}
	q := fmt.Sprintf("%q", s)
	return q[1 : len(q)-1]
}

func unprintable(r rune) bool { return !unicode.IsPrint(r) }

// printableLines is printable for each line of a text.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

// The colours there are.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
)

// paint colours text on a terminal that wants it.
func (a *app) paint(colour, s string) string {
	if !a.terminalOut || a.env("NO_COLOR") != "" || a.env("TERM") == "dumb" {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

// stamp is a time in a table.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// exact is a time as entries have it.
func exact(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000000Z") }

// refText names an entry: in full where there is room.
func (a *app) refText(r entry.Ref) string {
	switch {
	case r.IsZero():
		return ""
	case a.wide():
		return r.String()
	}
	return r.Short()
}

// size is a number of bytes for people.
func size(n int64) string {
	switch {
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	case n < 1<<30:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}

// count is "1 lease", "2 leases".
func count[N int | int64 | uint64](n N, one string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, one)
	}
	switch {
	case strings.HasSuffix(one, "ss"), strings.HasSuffix(one, "x"):
		one += "es"
	case strings.HasSuffix(one, "ry"), strings.HasSuffix(one, "cy"):
		one = one[:len(one)-1] + "ies"
	default:
		one += "s"
	}
	return fmt.Sprintf("%d %s", n, one)
}

// was is "1 entry was", "2 entries were".
func was(n int, one string) string {
	if n == 1 {
		return count(n, one) + " was"
	}
	return count(n, one) + " were"
}

// span is a duration for people, coarse.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + span(-d)
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < 2*time.Minute:
		return d.Round(100 * time.Millisecond).String()
	case d < 2*time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	case d < 48*time.Hour:
		return strings.TrimSuffix(d.Round(time.Hour).String(), "0m0s")
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
