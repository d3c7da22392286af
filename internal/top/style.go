package top

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
)

// style is what stands between "\x1b[" and "m"; empty for plain text.
type style string

// theme is the colours. Colour never says anything alone: each has a sign or a
// word beside it.
type theme struct {
	title, dim, good, warn, bad style
	alarm, chosen               style // whole lines, reversed
	leased, borrowed, held      style
	nodes                       []style
	byState                     bool
}

func colours(list ...int) (out []style) {
	for _, n := range list {
		out = append(out, style("38;5;"+strconv.Itoa(n)))
	}
	return out
}

// The themes. Until the terminal has said what its background is, the neutral
// one uses its own palette, which it can read on either.
var (
	plain   = theme{title: "1", alarm: "7", chosen: "7"}
	neutral = theme{
		title: "1", dim: "2", good: "32", warn: "33", bad: "31", alarm: "31;7", chosen: "7",
		leased: "36", borrowed: "35", held: "33", nodes: []style{"36", "32", "35", "34", "33"},
	}
	dark = theme{
		title: "1", dim: "38;5;245", good: "38;5;114", warn: "38;5;221", bad: "38;5;203", alarm: "1;38;5;203;7", chosen: "7",
		leased: "38;5;75", borrowed: "38;5;176", held: "38;5;221", nodes: colours(75, 114, 215, 176, 80, 185, 147, 211, 150, 180, 117, 223),
	}
	light = theme{
		title: "1", dim: "38;5;242", good: "38;5;28", warn: "38;5;130", bad: "38;5;160", alarm: "1;38;5;160;7", chosen: "7",
		leased: "38;5;25", borrowed: "38;5;90", held: "38;5;130", nodes: colours(25, 28, 130, 90, 30, 94, 61, 125, 64, 97, 24, 58),
	}
)

// glyphs are the signs that are drawn with.
type glyphs struct {
	full, part, empty                          string // of bars
	spark                                      []string
	leased, borrowed, held, freed, room, never string // cells of maps
	frame, chosen                              [6]string
	here, dot, ok, no, crumb, cut, times       string
	up, arrows, enter                          string
}

var (
	unicode = glyphs{
		full: "█", part: "▒", empty: "░",
		spark:  strings.Split("▁▂▃▄▅▆▇█", ""),
		leased: "■", borrowed: "◆", held: "□", freed: "○", room: "·", never: "×",
		frame: [6]string{"┌", "─", "┐", "│", "└", "┘"}, chosen: [6]string{"╔", "═", "╗", "║", "╚", "╝"},
		here: "▶", dot: "·", ok: "✓", no: "✗", crumb: "›", cut: "…", times: "×",
		up: "↑↓", arrows: "←→↑↓", enter: "⏎",
	}
	ascii = glyphs{
		full: "#", part: "%", empty: ".",
		spark:  strings.Split("_.-=+*%#", ""),
		leased: "#", borrowed: "@", held: "%", freed: "o", room: ".", never: "x",
		frame: [6]string{"+", "-", "+", "|", "+", "+"}, chosen: [6]string{"*", "=", "*", "|", "*", "*"},
		here: ">", dot: "|", ok: "ok", no: "!!", crumb: ">", cut: "~", times: "x",
		up: "up/down", arrows: "arrows", enter: "enter",
	}
)

// clean keeps what the ledger holds from moving the cursor: what cannot be
// printed is spelt out.
func clean(s string) string {
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return s
	}
	q := strconv.Quote(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}

func width(s string) int { return ansi.StringWidth(s) }

// row is a line on its way, never wider than most.
type row struct {
	b       strings.Builder
	w, most int
	cut     string
	over    style // of the whole line
}

func (m *Model) row(most int) *row { return &row{most: most, cut: m.glyphs.cut} }

// add appends text in a style. What does not fit is cut off.
func (r *row) add(s style, text string) *row {
	text = clean(text)
	w := width(text)
	if left := r.most - r.w; w > left {
		text = ansi.Truncate(text, max(0, left), r.cut)
		w = width(text)
	}
	if text == "" {
		return r
	}
	r.w += w
	if r.over != "" {
		s = r.over
	}
	if s == "" {
		r.b.WriteString(text)
	} else {
		fmt.Fprintf(&r.b, "\x1b[%sm%s\x1b[m", string(s), text)
	}
	return r
}

// cell appends a text of exactly n cells.
func (r *row) cell(s style, text string, n int) *row {
	text = clean(text)
	if width(text) > n {
		text = ansi.Truncate(text, max(0, n), r.cut)
	}
	return r.add(s, text+strings.Repeat(" ", max(0, n-width(text))))
}

// col is cell with a blank after it.
func (r *row) col(s style, text string, n int) *row { return r.cell(s, text, n).add("", " ") }

// right appends a text of exactly n cells that ends at their end.
func (r *row) right(s style, text string, n int) *row {
	text = clean(text)
	if width(text) > n {
		text = ansi.Truncate(text, max(0, n), r.cut)
	}
	return r.add(s, strings.Repeat(" ", max(0, n-width(text)))+text)
}

// gap appends blanks up to column n.
func (r *row) gap(n int) *row { return r.add("", strings.Repeat(" ", max(0, n-r.w))) }

func (r *row) String() string { return r.b.String() }

// bar draws how much of a pool is taken.
func (m *Model) bar(r *row, s style, leased, held float64, n int) {
	full := int(leased*float64(n) + 0.5)
	if leased > 0 && full == 0 {
		full = 1
	}
	part := min(n-full, int(held*float64(n)+0.5))
	r.add(s, strings.Repeat(m.glyphs.full, full))
	r.add(m.theme.held, strings.Repeat(m.glyphs.part, part))
	r.add(m.theme.dim, strings.Repeat(m.glyphs.empty, n-full-part))
}

// severity is how a share that is taken looks.
func (m *Model) severity(percent float64) style {
	switch {
	case percent >= 95:
		return m.theme.bad
	case percent >= 80:
		return m.theme.warn
	}
	return m.theme.good
}

// sparkline draws samples in n cells, the newest at the right. It shows how they
// moved, from the lowest to the highest.
func (m *Model) sparkline(list []int, n int) string {
	if n <= 0 {
		return ""
	}
	if most := int(window/step) + 1; n > most {
		return strings.Repeat(" ", n-most) + m.sparkline(list, most)
	}
	// The whole window in n cells: each shows its last sample.
	total := int(window/step) + 1
	var lo, hi int
	for i, v := range list {
		if i == 0 || v < lo {
			lo = v
		}
		if i == 0 || v > hi {
			hi = v
		}
	}
	var b strings.Builder
	for i := range n {
		at := len(list) - total + (i+1)*total/n - 1
		switch {
		case at < 0:
			b.WriteByte(' ')
		case hi == lo:
			b.WriteString(m.glyphs.spark[0])
		default:
			b.WriteString(m.glyphs.spark[(list[at]-lo)*(len(m.glyphs.spark)-1)/(hi-lo)])
		}
	}
	return b.String()
}

// number shortens what only says "plenty".
func number(n uint64) string {
	if n < 1<<32 {
		return strconv.FormatUint(n, 10)
	}
	if n == 1<<64-1 {
		return "2^64+"
	}
	bits := 0
	for v := n; v > 1; v >>= 1 {
		bits++
	}
	return "~2^" + strconv.Itoa(bits)
}

// wrap breaks text into lines of at most n cells, between words where it can.
func wrap(text string, n int) []string {
	return strings.Split(ansi.Wrap(clean(text), max(1, n), ""), "\n")
}

// count is "1 lease", "2 leases".
func count[N int | int64 | uint64](n N, one string) string {
	if n == 1 {
		return "1 " + one
	}
	switch {
	case strings.HasSuffix(one, "ss"):
		one += "es"
	case strings.HasSuffix(one, "ry"):
		one = one[:len(one)-1] + "ies"
	default:
		one += "s"
	}
	return fmt.Sprintf("%d %s", n, one)
}
