// Package top is the terminal dashboard of 'ledger top': pools and how full
// they are, a map of a pool's addresses, nodes, the entries as they come, and
// whether the ledger verifies.
//
// # Guarantees
//
// The Model is pure: Update takes an event, View(width, height) draws, and
// neither knows etcd, a terminal or a clock. View always returns exactly height
// lines of at most width cells.
//
// What is shown is of one revision, which is named. It is read once, in full,
// and then follows a watch from that revision; where etcd compacted what was not
// seen, or went back in time, it is read anew. Nothing that is drawn waits for
// etcd: while etcd is out of reach the last state stays, under a line that says
// since when and why.
//
// Entries are judged as they come by: place, hash and signature. Between that
// and a whole verification lies what only 'ledger verify' sees; so "verified" is
// shown only for a whole one, with its time.
//
// Texts from the ledger are escaped: none moves the cursor.
//
// It reads etcd, and writes nowhere.
package top

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/publish"
)

// Event is what the model learns: one of the types below.
type Event any

type (
	// Loaded is a full read: all that is live, and the last entries.
	Loaded struct {
		Ledger  *Ledger
		Entries []Line
		At      time.Time
	}
	// Changes are what was committed up to a revision.
	Changes struct {
		Revision int64
		State    []Change
		Entries  []Line
		Findings []audit.Finding
		Strange  []string // keys that this program would not have written
	}
	// Found says that etcd is there and followed.
	Found struct{}
	// Lost says that etcd is out of reach, since when at most, and why. It is
	// repeated as the cause changes.
	Lost struct {
		Since   time.Time
		Cause   string
		Answers bool // etcd is there, the ledger is not
	}
	// Certificate is the one that ends first, of those that contact rests on;
	// without an end there is none. From Warn on it is time to renew it.
	Certificate struct {
		What        string
		Warn, Until time.Time
	}
	// Note is something to be told once.
	Note struct{ Text string }
	// Verifying is how far a verification is.
	Verifying struct{ Entries int64 }
	// Verified is the end of one.
	Verified struct {
		At     time.Time
		Report *audit.Report
		Err    string // it could not be done
	}
	// History is an address's history, newest first.
	History struct {
		Space  string
		IP     netip.Addr
		Newest entry.Ref
		Lines  []Line
		More   bool
		Err    string
	}
	// Key is a key that was pressed: its name, and the text that it types.
	Key struct{ Name, Text string }
	// Resized is the size of the screen.
	Resized struct{ Width, Height int }
	// Background says what colours can be read.
	Background struct{ Dark bool }
	// Tick is the time.
	Tick struct{ Now time.Time }
)

// Ask is what the model wants done.
type Ask any

type (
	// Quit ends the program.
	Quit struct{}
	// AskVerify asks for a verification.
	AskVerify struct{}
	// AskHistory asks for the history of an address.
	AskHistory struct {
		Space  string
		IP     netip.Addr
		Newest entry.Ref
	}
)

type pageKind int

const (
	pagePools pageKind = iota
	pageNodes
	pageLog
	pageVerify
	pageMap
	pageAddress
	pageEntry
	pageHelp
)

// page is where somebody is looking, and at what of it.
type page struct {
	kind   pageKind
	pool   PoolID // map; empty: of a node
	node   string
	at     place // map: the cursor; address
	pick   string
	cursor int
	scroll int
	follow bool // log: the cursor stays with the newest
	line   Line // entry
}

// Options are how a model begins.
type Options struct {
	Pool   string // opens its page; NAME, or SPACE/NAME
	Space  string
	Verify bool // when the first state is there
	Plain  bool // no colours
	ASCII  bool
	Now    time.Time
}

// Model is all that the dashboard knows.
type Model struct {
	o             Options
	now           time.Time
	width, height int
	theme         theme
	glyphs        glyphs

	led     *Ledger
	log     []Line // oldest first
	lost    *Lost
	waiting bool // nothing was heard yet
	cert    Certificate
	note    string
	noted   time.Time

	verifying bool
	progress  int64
	verified  *Verified
	found     []audit.Finding // while following

	pages  []page
	filter string
	typing bool

	history *History
	asked   entry.Ref // newest entry of the history that was asked for
}

// keepLog is how many entries the model keeps.
const keepLog = 1000

// New returns a model that knows nothing yet.
func New(o Options) *Model {
	m := &Model{o: o, now: o.Now, width: 80, height: 24, theme: neutral, glyphs: unicode, waiting: true, pages: []page{{kind: pagePools}}}
	if o.Plain {
		m.theme = plain
	}
	if o.ASCII {
		m.glyphs = ascii
	}
	if o.Pool != "" {
		id := PoolID{o.Space, o.Pool}
		if space, name, ok := strings.Cut(o.Pool, "/"); ok {
			id = PoolID{space, name}
		}
		m.pages = append(m.pages, page{kind: pageMap, pool: id})
	}
	return m
}

func (m *Model) page() *page { return &m.pages[len(m.pages)-1] }

// Update takes an event and says what is to be done.
func (m *Model) Update(ev Event) []Ask {
	switch ev := ev.(type) {
	case Loaded:
		return m.loaded(ev)
	case Changes:
		return m.changed(ev)
	case Found:
		m.lost, m.waiting = nil, false
	case Lost:
		if m.lost != nil { // the beginning stays
			ev.Since = m.lost.Since
		}
		m.lost, m.waiting = &ev, false
	case Certificate:
		m.cert = ev
	case Note:
		m.note, m.noted = ev.Text, m.now
	case Verifying:
		m.progress = ev.Entries
	case Verified:
		m.verifying, m.verified = false, &ev
		if ev.Report != nil && ev.Report.FindingCount == 0 {
			m.found = slices.DeleteFunc(m.found, func(f audit.Finding) bool { return f.Revision <= ev.Report.Revision })
		}
	case History:
		if ev.Newest == m.asked {
			m.history = &ev
		}
	case Key:
		return m.key(ev)
	case Resized:
		m.width, m.height = ev.Width, ev.Height
	case Background:
		switch {
		case m.o.Plain:
		case ev.Dark:
			m.theme = dark
		default:
			m.theme = light
		}
	case Tick:
		m.tick(ev.Now)
	}
	return nil
}

func (m *Model) loaded(ev Loaded) []Ask {
	old := m.led
	m.led, m.log, m.lost, m.waiting = ev.Ledger, ev.Entries, nil, false
	m.now = later(m.now, ev.At)
	for id, p := range m.led.pools {
		if old != nil && old.pools[id] != nil {
			p.samples = old.pools[id].samples
		} else {
			p.samples = recall(id, p.leased, m.log, m.now)
		}
		p.samples.add(m.now, p.leased)
	}
	var before *publish.Model
	if old != nil {
		before = old.counts
	}
	m.led.counts.Loaded(m.now, before)
	m.led.settle(m.now)
	m.adopt()
	var asks []Ask
	if m.o.Verify && m.verified == nil && !m.verifying {
		m.verifying, m.progress = true, 0
		asks = append(asks, AskVerify{})
	}
	return append(asks, m.refresh()...)
}

// adopt finds pools that were asked for by name alone, in whichever space they
// are.
func (m *Model) adopt() {
	for i := range m.pages {
		p := &m.pages[i]
		if p.kind != pageMap || p.pool.Name == "" || p.pool.Space != "" {
			continue
		}
		for _, have := range m.led.sorted() {
			if have.id.Name == p.pool.Name {
				p.pool = have.id
				break
			}
		}
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// recall makes a pool's samples from the last entries, as far back as they go.
// Their times are their writers' clocks, which is good enough for a sparkline.
func recall(id PoolID, leased int, log []Line, now time.Time) samples {
	var out samples
	if len(log) == 0 {
		return out
	}
	begin := now.Add(-window)
	if first := log[0].time(); first.After(begin) && log[0].Commit > 0 && len(log) >= lastEntries {
		begin = first // before it, nothing is known
	}
	n := leased
	type move struct {
		at time.Time
		by int
	}
	var moves []move
	for i := range log {
		e := log[i].Entry
		if e == nil || e.Space != id.Space || e.Pool != id.Name || e.Time.Before(begin) || e.Time.After(now) {
			continue
		}
		switch e.Op {
		case entry.Acquire:
			moves = append(moves, move{e.Time, len(e.Addresses)})
		case entry.Release:
			moves = append(moves, move{e.Time, -len(e.Addresses)})
		}
	}
	for _, v := range moves {
		n -= v.by
	}
	slices.SortStableFunc(moves, func(a, b move) int { return a.at.Compare(b.at) })
	out.add(begin, max(0, n))
	for _, v := range moves {
		n += v.by
		out.add(v.at, max(0, n))
	}
	return out
}

func (m *Model) changed(ev Changes) []Ask {
	if m.led == nil {
		return nil
	}
	for _, c := range ev.State {
		m.led.Apply(c, m.now)
	}
	for _, k := range ev.Strange {
		m.led.unreadable[k] = true
	}
	m.led.Revision = ev.Revision
	m.log = append(m.log, ev.Entries...)
	if drop := len(m.log) - keepLog; drop > 0 {
		m.log = slices.Delete(m.log, 0, drop)
		for i := range m.pages {
			if p := &m.pages[i]; p.kind == pageLog && !p.follow {
				p.cursor = max(0, p.cursor-drop)
			}
		}
	}
	if room := audit.MaxFindings - len(m.found); room > 0 {
		m.found = append(m.found, ev.Findings[:min(room, len(ev.Findings))]...)
	}
	for _, p := range m.led.pools {
		p.samples.add(m.now, p.leased)
	}
	m.led.settle(m.now)
	m.adopt()
	return m.refresh()
}

func (m *Model) tick(now time.Time) {
	m.now = now
	if m.note != "" && now.Sub(m.noted) > 20*time.Second {
		m.note = ""
	}
	if m.led == nil {
		return
	}
	m.led.settle(now)
	if m.lost == nil { // else nobody knows
		for _, p := range m.led.pools {
			p.samples.add(now, p.leased)
		}
	}
}

// refresh asks for the history that is looked at, where it is not the one that
// is there.
func (m *Model) refresh() []Ask {
	p := m.page()
	if p.kind != pageAddress || m.led == nil {
		return nil
	}
	a := m.led.addresses[p.at]
	if a == nil || a.last == m.asked {
		return nil
	}
	m.asked = a.last
	return []Ask{AskHistory{p.at.space, p.at.ip, a.last}}
}

// key does what a key means on the page that is shown.
func (m *Model) key(k Key) []Ask {
	if k.Name == "ctrl+c" {
		return []Ask{Quit{}}
	}
	if m.typing {
		m.type_(k)
		return nil
	}
	m.note = ""
	p := m.page()
	switch k.Name {
	case "q":
		return []Ask{Quit{}}
	case "esc", "backspace":
		switch {
		case m.filter != "" && k.Name == "esc" && p.kind != pageHelp && p.kind != pageEntry && p.kind != pageAddress:
			m.filter = ""
		case len(m.pages) > 1:
			m.pages = m.pages[:len(m.pages)-1]
			return m.refresh()
		case p.kind != pagePools:
			m.pages = []page{{kind: pagePools}}
		}
		return nil
	case "1", "2", "3", "4":
		m.pages = []page{{kind: pageKind(k.Name[0] - '1'), follow: true}}
		return nil
	case "tab", "shift+tab":
		if p.kind <= pageVerify {
			by := pageKind(1)
			if k.Name == "shift+tab" {
				by = 3
			}
			m.pages = []page{{kind: (p.kind + by) % 4, follow: true}}
			return nil
		}
	case "?":
		if p.kind != pageHelp {
			m.pages = append(m.pages, page{kind: pageHelp})
		}
		return nil
	case "/":
		if p.kind <= pageMap && p.kind != pageVerify {
			m.typing = true
		}
		return nil
	case "c":
		m.theme.byState = !m.theme.byState
		return nil
	case "v":
		if !m.verifying {
			m.verifying, m.progress = true, 0
			return []Ask{AskVerify{}}
		}
		return nil
	}
	switch p.kind {
	case pagePools:
		list := m.pools()
		m.move(p, k, m.cursorOf(p, len(list), func(i int) string { return list[i].id.String() }), len(list))
		if p.cursor < len(list) {
			p.pick = list[p.cursor].id.String()
			if k.Name == "enter" {
				m.pages = append(m.pages, page{kind: pageMap, pool: list[p.cursor].id})
			}
		}
	case pageNodes:
		list := m.nodes()
		m.move(p, k, m.cursorOf(p, len(list), func(i int) string { return list[i].name }), len(list))
		if p.cursor < len(list) {
			p.pick = list[p.cursor].name
			if k.Name == "enter" {
				m.pages = append(m.pages, page{kind: pageMap, node: list[p.cursor].name})
			}
		}
	case pageLog:
		list := m.lines()
		at := m.cursorOf(p, len(list), func(i int) string { return list[i].Ref.String() })
		m.move(p, k, at, len(list))
		p.follow = p.cursor >= len(list)-1
		if p.cursor < len(list) {
			p.pick = list[p.cursor].Ref.String()
			if k.Name == "enter" {
				m.pages = append(m.pages, page{kind: pageEntry, line: *list[p.cursor]})
			}
		}
	case pageVerify, pageEntry, pageHelp:
		switch k.Name {
		case "up", "k":
			p.scroll--
		case "down", "j":
			p.scroll++
		case "pgup":
			p.scroll -= m.height - 6
		case "pgdown", "space":
			p.scroll += m.height - 6
		case "home", "g":
			p.scroll = 0
		case "end", "G":
			p.scroll = 1 << 20
		}
		p.scroll = max(0, min(p.scroll, m.mostScroll(p)))
	case pageAddress:
		n := 0
		if m.history != nil {
			n = len(m.history.Lines)
		}
		m.move(p, k, p.cursor, n)
		if k.Name == "enter" && p.cursor < n {
			m.pages = append(m.pages, page{kind: pageEntry, line: m.history.Lines[p.cursor]})
		}
	case pageMap:
		m.mapKey(p, k)
		if k.Name == "enter" && p.at.ip.IsValid() {
			m.history, m.asked = nil, entry.Ref{}
			m.pages = append(m.pages, page{kind: pageAddress, at: p.at, pool: m.poolAt(p)})
			return m.refresh()
		}
	}
	return nil
}

// cursorOf finds what a cursor was on, as lists move below it.
func (m *Model) cursorOf(p *page, n int, name func(int) string) int {
	if p.kind == pageLog && p.follow {
		return n - 1
	}
	if p.pick != "" {
		for i := range n {
			if name(i) == p.pick {
				return i
			}
		}
	}
	return max(0, min(p.cursor, n-1))
}

// move is what the keys of a list do.
func (m *Model) move(p *page, k Key, at, n int) {
	leap := max(1, m.height-8)
	switch k.Name {
	case "up", "k":
		at--
	case "down", "j":
		at++
	case "pgup":
		at -= leap
	case "pgdown", "space":
		at += leap
	case "home", "g":
		at = 0
	case "end", "G":
		at = n - 1
	}
	p.cursor = max(0, min(at, n-1))
}

// type_ edits the filter.
func (m *Model) type_(k Key) {
	switch k.Name {
	case "enter":
		m.typing = false
		if p := m.page(); p.kind == pageMap {
			m.seek(p, 1)
		}
	case "esc":
		m.typing, m.filter = false, ""
	case "backspace":
		if r := []rune(m.filter); len(r) > 0 {
			m.filter = string(r[:len(r)-1])
		}
	case "ctrl+u":
		m.filter = ""
	default:
		if k.Text != "" && len(m.filter) < 100 {
			m.filter += clean(k.Text)
		}
	}
}

// has reports whether one of the texts holds the filter.
func (m *Model) has(texts ...string) bool {
	if m.filter == "" {
		return true
	}
	f := strings.ToLower(m.filter)
	return slices.ContainsFunc(texts, func(s string) bool { return strings.Contains(strings.ToLower(s), f) })
}

// pools are those that the filter lets through.
func (m *Model) pools() (out []*pool) {
	if m.led == nil {
		return nil
	}
	for _, p := range m.led.sorted() {
		if m.has(p.id.String()) {
			out = append(out, p)
		}
	}
	return out
}

func (m *Model) nodes() (out []*node) {
	if m.led == nil {
		return nil
	}
	for _, n := range m.led.sortedNodes() {
		if m.has(n.name) {
			out = append(out, n)
		}
	}
	return out
}

func (m *Model) lines() (out []*Line) {
	for i := range m.log {
		if l := &m.log[i]; m.filter == "" || m.has(l.op(), l.what(), l.pod(), l.node(), l.Writer.String(), l.Ref.Short()) || l.Entry != nil && m.has(l.Entry.Reason, l.Entry.Pool, l.Entry.Container) {
			out = append(out, l)
		}
	}
	return out
}

// match reports whether the filter speaks of an address.
func (m *Model) match(at place) bool {
	a := m.led.addresses[at]
	if a == nil {
		return m.has(at.ip.String())
	}
	return m.has(at.ip.String(), a.holder.Node, a.holder.Container, m.led.pod(a))
}

// poolAt is the pool of what the cursor is on.
func (m *Model) poolAt(p *page) PoolID {
	if p.pool.Name != "" {
		return p.pool
	}
	if a := m.led.addresses[p.at]; a != nil {
		return a.pool
	}
	for _, t := range m.tiles(p) {
		if t.space == p.at.space && t.prefix.Contains(p.at.ip) {
			return t.pool
		}
	}
	return PoolID{Space: p.at.space}
}

// verdict is the state of verification: what was seen while following counts,
// too.
type verdict int

const (
	unknown verdict = iota
	failed
	reduced
	unchecked
	good
)

func (m *Model) verdict() verdict {
	v := m.verified
	switch {
	case len(m.found) > 0, v != nil && v.Report != nil && v.Report.FindingCount > 0:
		return failed
	case v == nil:
		return unknown
	case v.Report == nil:
		return unchecked
	case len(v.Report.Reduced) > 0:
		return reduced
	}
	return good
}

// findings are all that there are to show.
func (m *Model) findings() (out []audit.Finding, more int64) {
	if v := m.verified; v != nil && v.Report != nil {
		out = append(out, v.Report.Findings...)
		more = v.Report.FindingCount - int64(len(out))
	}
	for _, f := range m.found {
		if !slices.ContainsFunc(out, func(g audit.Finding) bool { return g.Where == f.Where && g.Code == f.Code }) {
			out = append(out, f)
		}
	}
	return out, more
}

func firstCode(list []audit.Finding) string {
	if len(list) == 0 {
		return ""
	}
	return cmp.Or(string(list[0].Code), "?")
}
