package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"
)

// report prints tables as they come and keeps the targets for the end.
type report struct {
	out        io.Writer
	targets    []target
	duplicates int
}

// target is what is claimed and what was measured.
type target struct {
	what   string
	got    float64
	limit  float64
	atMost bool
	unit   string
}

func (t *target) met() bool {
	if t.atMost {
		return t.got <= t.limit
	}
	return t.got >= t.limit
}

func (r *report) claim(t target) { r.targets = append(r.targets, t) }

// section prints one table; its first row is the heading.
func (r *report) section(title string, rows [][]string, notes ...string) {
	fmt.Fprintf(r.out, "\n%s\n", title)
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, row := range rows {
		for i, cell := range row {
			if i == 0 { // the first column reads from the left
				cell = fmt.Sprintf("  %-*s", firstWidth(rows), cell)
			}
			fmt.Fprintf(w, "%s\t", cell)
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	for _, n := range notes {
		fmt.Fprintf(r.out, "  %s\n", n)
	}
}

func firstWidth(rows [][]string) (n int) {
	for _, row := range rows {
		n = max(n, len(row[0]))
	}
	return n
}

func (r *report) summary(took time.Duration) {
	if len(r.targets) > 0 {
		rows := [][]string{{"", "measured", "target", ""}}
		for i := range r.targets {
			t := &r.targets[i]
			sign, verdict := "at least", "met"
			if t.atMost {
				sign = "at most"
			}
			if !t.met() {
				verdict = fmt.Sprintf("MISSED by %.0f %%", 100*math.Abs(t.got/t.limit-1))
			}
			rows = append(rows, []string{t.what, number(t.got) + t.unit, sign + " " + number(t.limit) + t.unit, verdict})
		}
		r.section("Targets", rows)
	}
	fmt.Fprintf(r.out, "\nduplicates found: %d. Total time %s, load after %s.\n", r.duplicates, took.Round(time.Second), load())
}

// number prints three digits, or all of a large number in groups.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case math.Abs(v) >= 1000:
		s := strconv.FormatFloat(v, 'f', 0, 64)
		for i := len(s) - 3; i > 0; i -= 3 {
			s = s[:i] + "," + s[i:]
		}
		return s
	case math.Abs(v) >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case math.Abs(v) >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// millis prints seconds as milliseconds.
func millis(seconds float64) string { return number(1000 * seconds) }

func mebi(bytes float64) string { return number(bytes/(1<<20)) + " MiB" }

// median is the middle of some numbers, the mean of the two middle ones.
func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// percentile is the smallest number that p of all are not above.
func percentile(v []float64, p float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	v = slices.Sorted(slices.Values(v))
	return v[max(0, int(math.Ceil(p*float64(len(v))))-1)]
}

// ratios divides pair by pair: both sides of a pair were measured together.
func ratios(a, b []float64) (out []float64) {
	for i := range a {
		out = append(out, a[i]/b[i])
	}
	return out
}
