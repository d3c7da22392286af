package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// View is all that the block knows.
type View struct {
	Config  *Config
	Problem string // with the configuration
	Pools   bool   // one block for each pool
	Link    Link
	Sources []Source // by name
	Results []Result // of clicks, at most one for a source and kind
	Other   int      // the version of a document that we can not read
	OtherAt time.Time
}

// Link is the connection to sway.
type Link struct {
	State LinkState
	Since time.Time
}

// LinkState is how the connection to sway is.
type LinkState int

// States of the connection.
const (
	LinkNew    LinkState = iota // never connected so far
	LinkAbsent                  // never connected, and there is no sway
	LinkUp
	LinkLost // was up
)

const (
	// patience is for a publisher's answer to hello, and for a connection to return,
	// before the block says that there is none.
	patience = 2 * time.Second
	// otherFor is how long a document of another version is remembered.
	otherFor = 3 * state.DefaultHeartbeat
)

// Source is what is known about one cluster.
type Source struct {
	State    *state.State
	Received time.Time
	File     bool // by which it came
}

// stale is whether the publisher has fallen silent. Its own clock decides, and
// ours where the two disagree.
func (s *Source) stale(now time.Time) bool {
	return s.State.Stale(now) || now.Sub(s.Received) > s.silence()
}

func (s *Source) silence() time.Duration { return 3 * time.Duration(s.State.Heartbeat) * time.Second }

// Result is what a click came to: of a verification, or of a window that could
// not be opened.
type Result struct {
	Source  string
	Verify  bool
	Running bool
	Status  int    // exit status of a verification
	Text    string // an error
	At      time.Time
}

// Level is how bad things are.
type Level int

// Levels. Unknown is worse than a warning: it may hide anything.
const (
	Normal Level = iota
	Warning
	Unknown
	Critical
)

func (l Level) String() string { return [...]string{"normal", "warning", "unknown", "critical"}[l] }

// Line is what the bar shows.
type Line struct {
	Blocks  []Block
	Tooltip string
	Class   string // the condition's name
	Percent int    // of the fullest pool, 0 where that is not known
	Next    time.Time
}

// Block is one block. Its texts are free of control characters, but not escaped.
type Block struct {
	Instance            string
	Full, Short         string
	Level               Level
	Urgent              bool
	Source, Space, Pool string // untrusted, as they were received
}

// Render says what to show, and in Next when that changes by itself (zero:
// never). It depends on its arguments alone.
func Render(v *View, now time.Time) Line {
	r := &renderer{View: v, now: now.Round(0)}
	line := Line{Class: "normal"}
	worst := Normal
	if note := r.note(); note != nil {
		worst, line.Class = note.level, note.class
		b := Block{Full: note.text, Short: note.short, Level: note.level}
		if len(v.Sources) == 0 {
			full, short := texts(first(r.clicked("", &state.Verify{})))
			b.Full, b.Short = words(clean(v.Config.Label, 16), b.Full, full), words(b.Short, short)
		}
		line.Blocks = append(line.Blocks, b)
	}
	var tooltip []string
	for i := range v.Sources {
		blocks, class, percent := r.source(&v.Sources[i])
		if level := slices.MaxFunc(blocks, byLevel).Level; level > worst {
			worst, line.Class = level, class
		}
		line.Blocks = append(line.Blocks, blocks...)
		line.Percent = max(line.Percent, percent)
		if v.Config.Format == formatWaybar { // nobody else has such a thing
			tooltip = append(tooltip, r.tooltip(&v.Sources[i])...)
		}
	}
	line.Tooltip = strings.Join(tooltip, "\n")
	line.Next = r.next
	return line
}

func byLevel(a, b Block) int { return cmp.Compare(a.Level, b.Level) }

// Worst is the level of the worst block.
func (l *Line) Worst() Level {
	if len(l.Blocks) == 0 {
		return Unknown
	}
	return slices.MaxFunc(l.Blocks, byLevel).Level
}

type renderer struct {
	*View
	now, next time.Time
}

// changes notes that something else is to be shown from t on.
func (r *renderer) changes(t time.Time) {
	if t.After(r.now) && (r.next.IsZero() || t.Before(r.next)) {
		r.next = t
	}
}

// past is whether t is over, and notes when it will be.
func (r *renderer) past(t time.Time) bool {
	r.changes(t)
	return !r.now.Before(t)
}

// age says coarsely how long ago t was, so that it changes seldom.
func (r *renderer) age(t time.Time) string {
	age := max(0, r.now.Sub(t.Round(0)))
	unit, sign := time.Minute, "m"
	switch {
	case age >= 48*time.Hour:
		unit, sign = 24*time.Hour, "d"
	case age >= time.Hour:
		unit, sign = time.Hour, "h"
	}
	n := age / unit
	r.changes(t.Add((n + 1) * unit))
	if n == 0 {
		return "<1m"
	}
	return strconv.FormatInt(int64(n), 10) + sign
}

// condition is something other than numbers that has to be said.
type condition struct {
	class, text, short string
	level              Level
	urgent             bool
}

// texts joins what conditions say.
func texts(list []condition) (full, short string) {
	for _, c := range list {
		full, short = words(full, c.text), words(short, c.short)
	}
	return full, short
}

// note is what is to be said about no cluster in particular.
func (r *renderer) note() *condition {
	if r.Problem != "" {
		return &condition{class: "config-error", text: clean(r.Problem, 160), short: "config", level: Critical}
	}
	if !r.OtherAt.IsZero() && !r.past(r.OtherAt.Add(otherFor)) {
		what := "ledger-swaybar"
		if r.Other < state.Version {
			what = "ledger publish"
		}
		return &condition{class: "update", text: "update " + what, short: "update", level: Unknown}
	}
	if len(r.Sources) > 0 {
		return nil // they say it
	}
	if r.Link.State == LinkLost && r.past(r.Link.Since.Add(patience)) {
		return &condition{class: "sway-lost", text: "sway lost " + r.age(r.Link.Since), short: "sway lost", level: Unknown}
	}
	if !r.past(r.Link.Since.Add(patience)) {
		return &condition{class: "waiting", text: "waiting", short: "…", level: Unknown}
	}
	switch r.Link.State {
	case LinkUp:
		text := "no publisher"
		if r.Config.Source != "" {
			text += " of " + clean(r.Config.Source, 32)
		}
		return &condition{class: "no-publisher", text: text, short: "no publisher", level: Unknown}
	case LinkAbsent:
		return &condition{class: "no-sway", text: "no sway", short: "no sway", level: Unknown}
	}
	return &condition{class: "waiting", text: "waiting for sway", short: "…", level: Unknown}
}

// source renders a cluster.
func (r *renderer) source(s *Source) (blocks []Block, class string, percent int) {
	pools, hidden := r.shown(s.State)
	wrong, current := r.wrong(s)
	verified := r.verified(s, current)
	for len(verified) > 0 && verified[0].urgent { // not at the end, where a bar cuts
		wrong, verified = append(wrong, verified[0]), verified[1:]
	}
	slices.SortStableFunc(wrong, func(a, b condition) int { return cmp.Compare(b.level, a.level) })

	head := Block{Instance: clean(s.State.Source, 64), Source: s.State.Source}
	class = "normal"
	worst := Normal
	for _, c := range append(wrong, verified...) {
		head.Urgent = head.Urgent || c.urgent
		if c.level > worst {
			worst, class = c.level, c.class
		}
	}
	head.Level = worst
	for i := range pools {
		percent = max(percent, pools[i].Percent())
		if level := r.severity(&pools[i], current); level > worst {
			worst, class = level, "pool-"+level.String()
		}
	}

	name := ""
	if s == &r.Sources[0] {
		name = clean(r.Config.Label, 16)
	}
	if len(r.Sources) > 1 || r.Config.Label == "" && (r.Pools || len(pools) == 0) {
		name = words(name, clean(s.State.Source, 32))
	}
	wrongFull, wrongShort := texts(wrong)
	verifiedFull, verifiedShort := texts(verified)

	if !r.Pools || len(pools) == 0 {
		var numbers, brief, more string
		if len(pools) == 0 {
			numbers, brief = "no pools", "no pools"
			if !s.State.Etcd.OK {
				numbers, brief = "", "" // it is not known
			}
		} else {
			numbers, brief = r.numbers(&pools[0])
			head.Space, head.Pool = pools[0].Space, pools[0].Name
		}
		if others := max(0, len(pools)-1) + hidden; others > 0 {
			more = "+" + plural(others, "pool")
		}
		head.Level = worst
		head.Full = words(name, wrongFull, numbers, more, verifiedFull)
		head.Short = cmp.Or(words(wrongShort, brief, verifiedShort), head.Full)
		return []Block{head}, class, percent
	}

	near := ""
	if s.State.Near > 0 && current {
		near = fmt.Sprintf("%d of %d nodes nearly full", s.State.Near, s.State.Nodes)
	}
	head.Full = words(name, wrongFull, near, verifiedFull)
	head.Short = cmp.Or(words(wrongShort, verifiedShort), head.Full)
	if head.Full != "" {
		blocks = append(blocks, head)
	}
	for i := range pools {
		if i == r.Config.MaxPools {
			hidden += len(pools) - i
			break
		}
		p := &pools[i]
		full, short := r.numbers(p)
		blocks = append(blocks, Block{
			Instance: clean(s.State.Source+"/"+p.Space+"/"+p.Name, 64), Full: full, Short: short,
			Level: r.severity(p, current), Source: s.State.Source, Space: p.Space, Pool: p.Name,
		})
	}
	if hidden > 0 {
		blocks = append(blocks, Block{Instance: clean(s.State.Source, 60) + "/+", Full: "+" + plural(hidden, "pool"), Short: "+" + strconv.Itoa(hidden), Source: s.State.Source})
	}
	return blocks, class, percent
}

// shown are the pools to show, the fullest first, and how many others there are.
func (r *renderer) shown(s *state.State) (pools []state.Pool, hidden int) {
	pools, hidden = slices.Clone(s.Pools), s.More
	if len(r.Config.Pools) > 0 {
		hidden = 0
		pools = slices.DeleteFunc(pools, func(p state.Pool) bool {
			return !slices.Contains(r.Config.Pools, p.Name) && !slices.Contains(r.Config.Pools, p.Space+"/"+p.Name)
		})
	}
	slices.SortStableFunc(pools, func(a, b state.Pool) int { return cmp.Compare(b.Percent(), a.Percent()) })
	return pools, hidden
}

// wrong is what is wrong with a cluster or with what we know about it. current is
// whether its numbers are those of now.
func (r *renderer) wrong(s *Source) (list []condition, current bool) {
	st := s.State
	current = true
	unknown := func(class, text, short string) {
		current = false
		list = append(list, condition{class: class, text: text, short: short, level: Unknown})
	}
	if st.Ledger == state.LedgerStopped {
		list = append(list, condition{class: "stopped", text: "STOPPED", short: "STOPPED", level: Critical, urgent: true})
	}
	stale := s.stale(r.now)
	if !stale {
		heard := st.At
		if s.Received.Before(heard) {
			heard = s.Received
		}
		r.changes(heard.Add(s.silence() + 1))
	}
	switch {
	// Where there is no sway at all, the state was read from a file.
	case r.Link.State == LinkLost && r.past(r.Link.Since.Add(patience)):
		if stale {
			unknown("sway-lost", "sway lost, "+r.age(st.At)+" old", "sway lost")
		} else {
			unknown("sway-lost", "sway lost", "sway lost")
		}
	case stale:
		age := r.age(st.At)
		unknown("stale", "stale "+age, "stale "+age)
	case !st.Etcd.OK:
		text := "etcd unreachable"
		if !st.Etcd.Since.IsZero() {
			text += " " + r.age(st.Etcd.Since)
		}
		unknown("etcd-unreachable", text, "no etcd")
	}
	switch {
	case st.Ledger == state.LedgerFrozen:
		list = append(list, condition{class: "frozen", text: "frozen", short: "frozen", level: Warning})
	case current && st.Ledger != state.LedgerRunning && st.Ledger != state.LedgerStopped:
		unknown("no-ledger", "ledger unknown", "?")
	}
	if c := r.certificate(st.Cert); c != nil {
		list = append(list, *c)
	}
	return list, current
}

// certificate is what is to be said of the certificate that ends first.
func (r *renderer) certificate(c *state.Cert) *condition {
	if c == nil || !r.past(c.Warn) {
		return nil
	}
	if r.past(c.Until) {
		return &condition{class: "certificate", text: certificateName(c) + " EXPIRED", short: "cert EXPIRED", level: Critical}
	}
	left, unit, sign := c.Until.Sub(r.now), 24*time.Hour, "d"
	if left < unit {
		unit, sign = time.Hour, "h"
	}
	n := left / unit
	r.changes(c.Until.Add(1 - n*unit))
	text := strconv.FormatInt(int64(n), 10) + sign
	if n == 0 {
		text = "<1h"
	}
	return &condition{class: "certificate", text: certificateName(c) + " ends in " + text, short: "cert " + text, level: Warning}
}

func certificateName(c *state.Cert) string {
	switch c.Kind {
	case state.CertClient:
		return "client certificate"
	case state.CertCA:
		return "CA certificate"
	case state.CertEtcd:
		return "etcd's certificate"
	}
	return "certificate " + clean(c.Kind, 16)
}

func failed(code string, n int64) condition {
	text := "VERIFY FAILED"
	if code != "" {
		text += " " + clean(code, 32)
	}
	if n > 1 {
		text += fmt.Sprintf(" (%d)", n)
	}
	return condition{class: "verify-failed", text: text, short: "VERIFY FAILED", level: Critical, urgent: true}
}

// clicked is what clicks on a cluster came to, and whether a verification is
// among them. v is what the publisher knows.
func (r *renderer) clicked(source string, v *state.Verify) (list []condition, verified bool) {
	for _, result := range r.Results {
		if result.Source != source {
			continue
		}
		shown := result.Running || !r.past(result.At.Add(r.Config.result()))
		c := condition{class: "click"}
		switch {
		case result.Running:
			c.text = "verifying"
		case result.Text != "":
			c.text, c.level = clean(result.Text, 60), Warning
		case result.Status == 0:
			c.text = r.sign("✓", "ok") + " verified now"
		case result.Status == 1:
			// This stays until somebody who looked later knows better.
			if v.Result == state.VerifyFailed || v.Result == state.VerifyOK && v.At.After(result.At) {
				continue
			}
			c, shown = failed("", 0), true
		case result.Status == 3:
			c.text, c.level = "verified in part", Warning
		default:
			c.text, c.level = "could not verify", Warning
		}
		if !shown {
			continue
		}
		c.short = cmp.Or(c.short, c.text)
		list, verified = append(list, c), verified || result.Verify
	}
	return list, verified
}

// verified is what is known about the history: the publisher's finding, and what
// clicks came to.
func (r *renderer) verified(s *Source, current bool) (list []condition) {
	v := &s.State.Verify
	if v.Result == state.VerifyFailed {
		list = append(list, failed(v.Code, v.Findings))
	}
	clicks, said := r.clicked(s.State.Source, v)
	slices.SortStableFunc(clicks, func(a, b condition) int { return cmp.Compare(b.level, a.level) })
	list = append(list, clicks...)
	if said || v.Result == state.VerifyFailed || !current {
		return list // what was verified before is no longer known to be so
	}
	c := condition{class: "verify-unknown", level: Warning}
	switch v.Result {
	case state.VerifyOK, state.VerifyReduced:
		c.level = Normal
		sign := r.sign("✓", "ok ")
		if v.Result == state.VerifyReduced {
			c.class, c.level, sign = "verify-reduced", Warning, "verified in part "
		}
		switch {
		case v.At.IsZero():
			c.level, c.text = Unknown, "verified ?"
		case r.Config.Severity.VerifyHours > 0 && r.past(v.At.Add(time.Duration(r.Config.Severity.VerifyHours)*time.Hour)):
			c.level, c.class, c.text = Warning, "verify-old", "verified "+r.age(v.At)+" ago"
		default:
			c.text = sign + r.clock(v.At)
		}
	case state.VerifyError:
		c.text = "not verified"
	default:
		if v.Running {
			c.level, c.text = Normal, "verifying"
		} else {
			c.level, c.text = Normal, "unverified"
		}
	}
	if c.level > Normal {
		c.short = c.text
	}
	return append(list, c)
}

// clock says when t was: the time of day if it was today, else its age.
func (r *renderer) clock(t time.Time) string {
	local := t.In(r.now.Location())
	y, m, d := r.now.Date()
	if ty, tm, td := local.Date(); ty == y && tm == m && td == d {
		r.changes(time.Date(y, m, d+1, 0, 0, 0, 0, r.now.Location()))
		return local.Format("15:04")
	}
	return r.age(t)
}

func (r *renderer) sign(sign, ascii string) string {
	if r.Config.ASCII {
		return ascii
	}
	return sign
}

func (r *renderer) severity(p *state.Pool, current bool) Level {
	switch percent := p.Percent(); {
	case !current:
		return Unknown
	case percent >= r.Config.Severity.Critical:
		return Critical
	case percent >= r.Config.Severity.Warning:
		return Warning
	}
	return Normal
}

// numbers says how full a pool is: leased + held / capacity.
func (r *renderer) numbers(p *state.Pool) (full, short string) {
	name, taken := clean(p.Name, 24), number(p.Leased)
	if p.Held > 0 {
		taken += "+" + number(p.Held)
	}
	trend := ""
	switch {
	case p.Trend > 0:
		trend = r.sign("↑", "+") + number(uint64(p.Trend))
	case p.Trend < 0:
		trend = r.sign("↓", "-") + number(-uint64(p.Trend))
	}
	percent := p.Percent()
	if percent < 0 {
		return words(name, taken, trend), words(name, taken)
	}
	return words(name, taken+"/"+number(p.Capacity), strconv.Itoa(percent)+"%", trend), words(name, strconv.Itoa(percent)+"%")
}

// tooltip is for bars that have such a thing. What changes with each heartbeat
// is not in it, so that an idle cluster causes no output.
func (r *renderer) tooltip(s *Source) []string {
	const most = 16
	st := s.State
	lines := []string{fmt.Sprintf("%s: ledger %s, epoch %d, %s", clean(st.Source, 32), cmp.Or(clean(st.Ledger, 16), "unknown"), st.Epoch, plural(st.Nodes, "node"))}
	if st.Near > 0 {
		lines[0] += fmt.Sprintf(", %d nearly full", st.Near)
	}
	if _, current := r.wrong(s); !current {
		lines[0] += ", as of " + st.At.In(r.now.Location()).Format("2 Jan 15:04")
	}
	if !st.Etcd.OK {
		lines = append(lines, words("etcd unreachable:", cmp.Or(clean(st.Etcd.Error, 120), "no reason given")))
	}
	verified := "verification: " + clean(st.Verify.Result, 32)
	if !st.Verify.At.IsZero() {
		verified += ", " + st.Verify.At.In(r.now.Location()).Format("2 Jan 15:04")
	}
	if st.Verify.Findings > 0 {
		verified += fmt.Sprintf(", %d found, first %s", st.Verify.Findings, clean(st.Verify.Code, 32))
	}
	lines = append(lines, verified)
	if c := st.Cert; c != nil {
		lines = append(lines, certificateName(c)+" until "+c.Until.In(r.now.Location()).Format("2 Jan 2006"))
	}
	pools, hidden := r.shown(st)
	for i := range pools {
		if i == most {
			hidden += len(pools) - i
			break
		}
		p := &pools[i]
		line := fmt.Sprintf("%s (%s): %d leased, %d held", clean(p.Name, 32), clean(p.Space, 32), p.Leased, p.Held)
		if p.Capacity > 0 {
			line += fmt.Sprintf(", %s free of %s, %d%% taken", number(p.Free()), number(p.Capacity), p.Percent())
		}
		if p.Trend != 0 {
			line += fmt.Sprintf(", %+d in 5 min", p.Trend)
		}
		lines = append(lines, line)
	}
	if hidden > 0 {
		lines = append(lines, "and "+plural(hidden, "pool")+" more")
	}
	return lines
}

func first[A, B any](a A, _ B) A { return a }

// words joins those that are not empty.
func words(list ...string) string {
	return strings.Join(slices.DeleteFunc(list, func(s string) bool { return s == "" }), " ")
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return strconv.Itoa(n) + " " + what
}

// number writes up to five digits, and more as 1.2M.
func number(n uint64) string {
	if n < 100_000 {
		return strconv.FormatUint(n, 10)
	}
	f, unit := float64(n), 0
	for f >= 999.5 && unit < 6 {
		f, unit = f/1000, unit+1
	}
	digits := 0
	if f < 9.95 {
		digits = 1
	}
	return strconv.FormatFloat(f, 'f', digits, 64) + []string{"", "k", "M", "G", "T", "P", "E"}[unit]
}

// clean makes an untrusted text fit to be shown: one line, no more than that many
// characters, none of which is invisible or turns the others around.
func clean(s string, most int) string {
	var b strings.Builder
	n := 0
	for _, c := range s {
		if n == most-1 && len([]rune(s)) > most {
			b.WriteRune('…')
			break
		}
		switch {
		case c == '\n' || c == '\t':
			c = ' '
		case !unicode.IsPrint(c):
			c = '\uFFFD'
		}
		b.WriteRune(c)
		n++
	}
	return strings.TrimSpace(b.String())
}
