package top

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The least screen that there is something to be seen on.
const leastWidth, leastHeight = 40, 12

// View draws the page that is looked at: height lines of at most width cells.
func (m *Model) View(width, height int) string {
	var lines []string
	if width < leastWidth || height < leastHeight {
		lines = []string{m.row(width).add("", fmt.Sprintf("%d%s%d is too small: q quits", width, m.glyphs.times, height)).String()}
	} else {
		lines = m.head(width)
		foot := m.foot(width)
		room := height - len(lines) - 1
		body := m.body(width, room)
		body = body[:min(len(body), room)]
		lines = append(lines, body...)
		for len(lines) < height-1 {
			lines = append(lines, "")
		}
		lines = append(lines, foot)
	}
	for len(lines) < height {
		lines = append(lines, "")
	}
	return strings.Join(lines[:height], "\n")
}

// head is who, whether all is well, and where one is.
func (m *Model) head(wide int) []string {
	t := &m.theme
	clock := m.now.UTC().Format("15:04:05") + " UTC"
	one := m.row(wide).add(t.title, "ledger top")
	if m.led != nil && m.led.meta != nil {
		v := m.led.meta
		one.add("", fmt.Sprintf("  cluster %.8s  epoch %d  ", v.Cluster, v.Epoch))
		switch {
		case len(m.led.stops) > 0:
			one.add(t.bad, "STOPPED")
		case v.Recovering:
			one.add(t.warn, "frozen, recovering")
		case v.State != keyspace.Running:
			one.add(t.warn, string(v.State))
		default:
			one.add(t.good, string(v.State))
		}
		one.add(t.dim, fmt.Sprintf("  revision %d", m.led.Revision))
	}
	one.gap(wide-len(clock)).add(t.dim, clock)

	two := m.row(wide)
	switch {
	case m.waiting:
		two.add(t.warn, "etcd: connecting")
	case m.lost != nil && m.lost.Answers:
		two.add(t.bad, m.glyphs.no+" no ledger")
	case m.lost != nil:
		two.add(t.bad, m.glyphs.no+" etcd unreachable")
	default:
		two.add(t.good, m.glyphs.ok+" etcd")
	}
	m.verdictText(two.add("", "   "))
	if m.led != nil {
		leased := 0
		for _, p := range m.led.pools {
			leased += int(p.sum.Leased)
		}
		rest := fmt.Sprintf("%d leased, %s, %s", leased, count(len(m.led.pools), "pool"), count(len(m.led.sortedNodes()), "node"))
		if two.w+3+len(rest) <= wide {
			two.gap(wide-len(rest)).add("", rest)
		}
	}

	three := m.row(wide)
	here := m.pages[0].kind
	for i, name := range []string{"Pools", "Nodes", "Log", "Verify"} {
		if i > 0 {
			three.add("", " ")
		}
		s := t.dim
		if pageKind(i) == here {
			s = t.chosen
			if len(m.pages) > 1 {
				s = t.title
			}
		}
		mark := " "
		if pageKind(i) == here && m.o.Plain { // reversed is no colour, and may be off all the same
			mark = m.glyphs.here
		}
		three.add(s, fmt.Sprintf("%s%d %s ", mark, i+1, name))
	}
	for _, p := range m.pages[1:] {
		three.add(t.dim, m.glyphs.crumb+" ").add(t.title, p.name()+" ")
	}
	switch {
	case m.typing:
		three.add("", "  ").add(t.chosen, "/"+m.filter+"_")
	case m.filter != "":
		three.add("", "  ").add(t.warn, "/"+m.filter)
	}
	out := []string{one.String(), two.String(), three.String()}
	out = append(out, m.alerts(wide)...)
	return append(out, "")
}

func (p *page) name() string {
	switch p.kind {
	case pageMap:
		if p.pool.Name == "" {
			return p.node
		}
		if p.pool.Space == "" {
			return p.pool.Name
		}
		return p.pool.String()
	case pageAddress:
		return p.at.ip.String()
	case pageEntry:
		return p.line.Ref.Short()
	case pageHelp:
		return "Help"
	}
	return ""
}

// alerts are lines for what must not be overlooked.
func (m *Model) alerts(wide int) (out []string) {
	t := &m.theme
	say := func(s style, format string, args ...any) {
		lines := wrap(fmt.Sprintf(format, args...), wide-2)
		if len(lines) > 2 {
			lines = []string{lines[0], strings.Join(lines[1:], " ")} // cut off
		}
		for _, text := range lines {
			r := m.row(wide)
			r.over = s
			out = append(out, r.cell("", " "+text, wide).String())
		}
	}
	if m.lost != nil {
		what := "etcd unreachable since " + m.moment(m.lost.Since)
		if m.lost.Answers {
			what = "etcd answers"
		}
		if m.led != nil {
			what += fmt.Sprintf(", shown is revision %d", m.led.Revision)
		}
		say(t.alarm, "%s: %s", what, m.lost.Cause)
	}
	switch c := &m.cert; {
	case c.Until.IsZero() || m.now.Before(c.Warn):
	case m.now.Before(c.Until):
		say(t.warn, "the %s ends in %s, at %s: renew it", c.What, until(c.Until.Sub(m.now)), c.Until.UTC().Format(time.DateTime))
	default:
		say(t.alarm, "the %s ended at %s: renew it", c.What, m.moment(c.Until))
	}
	if m.led == nil {
		return out
	}
	for _, name := range sorted(m.led.stops) {
		s := m.led.stops[name]
		say(t.alarm, "STOPPED by node %s since %s, nobody allocates: %s", name, m.moment(s.Time), s.Found)
	}
	if v := m.led.meta; v != nil && v.State != keyspace.Running {
		say(t.alarm, "the ledger is %s: nobody allocates until 'ledger thaw'", v.State)
	}
	if n := len(m.led.unreadable); n > 0 {
		say(t.alarm, "%s cannot be read and counted for nothing here (the first: %s): 'ledger verify' says more", count(n, "key"), sorted(m.led.unreadable)[0])
	}
	if m.note != "" {
		say(t.warn, "%s", m.note)
	}
	return out[:min(len(out), 6)]
}

func sorted[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// moment is a time for people, with how long ago it was.
func (m *Model) moment(t time.Time) string {
	layout := "15:04:05"
	if d := m.now.Sub(t); d > 20*time.Hour || d < -20*time.Hour {
		layout = "2006-01-02 15:04:05"
	}
	return fmt.Sprintf("%s (%s)", t.UTC().Format(layout), ago(m.now.Sub(t)))
}

func until(d time.Duration) string {
	if d < 48*time.Hour {
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func ago(d time.Duration) string {
	switch {
	case d < time.Second:
		return "now"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}

func (m *Model) verdictText(r *row) {
	t := &m.theme
	v := m.verified
	switch m.verdict() {
	case failed:
		list, more := m.findings()
		r.add(t.bad, fmt.Sprintf("%s NOT VERIFIED: %s, %s", m.glyphs.no, count(int64(len(list))+more, "finding"), firstCode(list)))
	case reduced:
		r.add(t.warn, "verified in part "+m.moment(v.At))
	case unchecked:
		r.add(t.warn, "could not be verified "+m.moment(v.At))
	case good:
		r.add(t.good, fmt.Sprintf("%s verified %s", m.glyphs.ok, m.moment(v.At)))
	default:
		if !m.verifying {
			r.add(t.dim, "not verified yet (v)")
		}
	}
	if m.verifying {
		if m.verdict() != unknown {
			r.add("", "  ")
		}
		r.add(t.dim, fmt.Sprintf("verifying: %s", count(m.progress, "entry")))
	}
}

// foot shows the keys.
func (m *Model) foot(wide int) string {
	g := &m.glyphs
	var keys, always [][2]string
	p := m.page()
	pairs := func(list []string) (out [][2]string) {
		for i := 0; i < len(list); i += 2 {
			out = append(out, [2]string{list[i], list[i+1]})
		}
		return out
	}
	add := func(list ...string) { keys = append(keys, pairs(list)...) }
	always = pairs([]string{"esc", "back", "?", "help", "q", "quit"})
	if p.kind <= pageVerify {
		always = always[1:]
	}
	switch {
	case m.typing:
		add(g.enter, "keep", "esc", "drop")
		always = nil
	case p.kind == pagePools:
		add(g.up, "choose", g.enter, "map", "/", "filter", "1-4", "pages", "v", "verify")
	case p.kind == pageNodes:
		add(g.up, "choose", g.enter, "its blocks", "/", "filter", "1-4", "pages", "v", "verify")
	case p.kind == pageLog:
		add(g.up, "choose", g.enter, "entry", "/", "filter", "end", "newest", "1-4", "pages")
	case p.kind == pageVerify:
		add("v", "verify now", g.up, "scroll", "1-4", "pages")
	case p.kind == pageMap:
		next := "next leased"
		if m.filter != "" {
			next = "next match"
		}
		colour := "by state"
		if m.theme.byState {
			colour = "by node"
		}
		add(g.arrows, "move", g.enter, "address", "tab", "block", "/", "filter", "n", next)
		if !m.o.Plain {
			add("c", "colour "+colour)
		}
	case p.kind == pageAddress:
		add(g.up, "choose", g.enter, "entry")
	default:
		add(g.up, "scroll")
	}
	wants := func(k [2]string) int { return width(k[0]) + width(k[1]) + 3 }
	room := wide
	for _, k := range always {
		room -= wants(k)
	}
	var shown [][2]string
	for _, k := range keys {
		if room -= wants(k); room < -2 { // the last has no gap after it
			break
		}
		shown = append(shown, k)
	}
	r := m.row(wide)
	for i, k := range append(shown, always...) {
		if i > 0 {
			r.add("", "  ")
		}
		r.add(m.theme.title, k[0]).add(m.theme.dim, " "+k[1])
	}
	return r.String()
}

func (m *Model) body(wide, room int) []string {
	p := m.page()
	if m.led == nil && p.kind != pageHelp && p.kind != pageVerify {
		text := "reading the ledger ..."
		if m.lost != nil {
			text = "nothing was read so far; trying again"
		}
		return []string{m.row(wide).add(m.theme.dim, "  "+text).String()}
	}
	switch p.kind {
	case pagePools:
		return m.overview(wide, room)
	case pageNodes:
		list := m.nodes()
		return m.nodeTable(list, wide, room, m.cursorOf(p, len(list), func(i int) string { return list[i].name }))
	case pageLog:
		list := m.lines()
		return m.logTable(list, wide, room, m.cursorOf(p, len(list), func(i int) string { return list[i].Ref.String() }))
	case pageMap:
		return m.mapPage(p, wide, room)
	case pageAddress:
		return m.addressPage(p, wide, room)
	}
	all := m.text(p, wide)
	from := max(0, min(p.scroll, len(all)-room))
	return all[from:]
}

// text is a page that is only read.
func (m *Model) text(p *page, wide int) []string {
	switch p.kind {
	case pageVerify:
		return m.verifyPage(wide)
	case pageEntry:
		return m.entryPage(p, wide)
	}
	return m.helpPage(wide)
}

// mostScroll is how far such a page scrolls.
func (m *Model) mostScroll(p *page) int {
	return max(0, len(m.text(p, m.width))-(m.height-len(m.head(m.width))-1))
}

// visible is which part of a list is shown, so that the cursor is seen.
func visible(n, cursor, room int) (from, to int) {
	if room <= 0 {
		return 0, 0
	}
	from = max(0, min(cursor-room/2, n-room))
	return from, min(n, from+room)
}

// position heads the first column of a list, with the cursor's place in a list
// that is longer than what is shown of it.
func position(name string, cursor, n, shown int) string {
	if cursor < 0 || n <= shown {
		return name
	}
	return fmt.Sprintf("%s %d/%d", name, cursor+1, n)
}

// columns gives columns what they want; where that is more than there is, the
// widest give way.
func columns(room int, want ...int) []int {
	total := 0
	for _, n := range want {
		total += n
	}
	for ; total > max(room, 0); total-- {
		widest := 0
		for i, n := range want {
			if n >= want[widest] {
				widest = i
			}
		}
		if want[widest] == 0 {
			break
		}
		want[widest]--
	}
	return want
}

func (m *Model) header(wide int, text string) string {
	return m.row(wide).add(m.theme.title, text).String()
}

// overview: pools, and below or beside them nodes and the newest entries.
func (m *Model) overview(wide, room int) []string {
	p := m.page()
	pools := m.pools()
	cursor := m.cursorOf(p, len(pools), func(i int) string { return pools[i].id.String() })
	// Pools get what they need up to half, nodes up to a quarter, the log the rest.
	want := min(len(pools), max(3, room/2-2))
	out := m.poolTable(pools, wide, want+1, cursor)
	out = append(out, "")
	left := room - len(out)
	if left < 1 {
		return out
	}
	nodes := m.nodes()
	slices.SortStableFunc(nodes, func(a, b *node) int { return cmp.Compare(share(b), share(a)) }) // the fullest first
	if wide >= 140 {
		half := wide * 2 / 5
		l, r := m.nodeTable(nodes, half-2, left, -1), m.newest(wide-half, left)
		for i := range left {
			line := m.row(wide)
			text := ""
			if i < len(l) {
				text = l[i]
			}
			line.b.WriteString(text)
			line.w = width(text)
			line.gap(half)
			if i < len(r) {
				line.b.WriteString(r[i])
			}
			out = append(out, line.String())
		}
		return out
	}
	if n := min(len(nodes), max(1, left/3-1)); n > 0 && left > 6 {
		out = append(out, m.nodeTable(nodes, wide, n+1, -1)...)
		out = append(out, "")
	}
	return append(out, m.newest(wide, room-len(out))...)
}

func share(n *node) float64 {
	if n.room == 0 {
		return -1
	}
	return float64(n.filled) / float64(n.room)
}

// newest are the last entries, newest at the bottom.
func (m *Model) newest(wide, room int) []string {
	if room < 1 {
		return nil
	}
	list := m.lines()
	return m.logTable(list[max(0, len(list)-max(0, room-1)):], wide, room, -1)
}

func (m *Model) poolTable(list []*pool, wide, room, cursor int) []string {
	t := &m.theme
	name := 12
	for _, p := range list {
		name = max(name, width(p.id.String()))
	}
	name = min(name, wide/4)
	spark, trend := min(31, max(10, wide/8)), 6
	fixed := 2 + name + 1 + 5 + 8 + 6 + 8 + 8 + 2 + spark + trend
	bar := max(6, min(50, wide-fixed-1))
	h := m.row(wide)
	h.add("", "  ").cell(t.title, position("POOL", cursor, len(list), room-1), name+1).cell(t.title, "USED", bar+5).right(t.title, "LEASED", 8).right(t.title, "HELD", 6).
		right(t.title, "FREE", 8).right(t.title, "OF", 8).add("", "  ").cell(t.title, "LAST 5 MIN", spark+trend)
	out := []string{h.String()}
	if len(list) == 0 {
		text := "no address has been handed out yet"
		if m.filter != "" {
			text = fmt.Sprintf("no pool is called %q (esc drops the filter)", m.filter)
		}
		return append(out, m.row(wide).add(t.dim, "  "+text).String())
	}
	from, to := visible(len(list), cursor, room-1)
	for i := from; i < to; i++ {
		p := list[i]
		r := m.row(wide)
		m.marker(r, i == cursor)
		s := style("")
		if i == cursor {
			s = t.title
		}
		r.col(s, p.id.String(), name)
		percent, of := p.percent(), float64(p.sum.Capacity)
		if percent < 0 {
			r.add(t.dim, strings.Repeat(m.glyphs.empty, bar)).right(t.dim, "?", 5)
		} else {
			sev := m.severity(percent)
			m.bar(r, sev, float64(p.sum.Leased)/of, float64(p.sum.Held)/of, bar)
			r.right(sev, fmt.Sprintf("%d%%", int(percent)), 5)
		}
		r.right("", fmt.Sprint(p.sum.Leased), 8).right("", fmt.Sprint(p.sum.Held), 6).right("", number(p.sum.Free()), 8).right(t.dim, number(p.sum.Capacity), 8)
		r.add("", "  ").add(t.good, m.sparkline(p.samples.list, spark))
		if by, ok := p.samples.change(); ok {
			r.right("", fmt.Sprintf("%+d", by), trend)
		}
		out = append(out, r.String())
	}
	return out
}

// marker shows which line of a list is chosen.
func (m *Model) marker(r *row, chosen bool) {
	if chosen {
		r.add(m.theme.title, m.glyphs.here+" ")
		return
	}
	r.add("", "  ")
}

func (m *Model) nodeTable(list []*node, wide, room, cursor int) []string {
	t := &m.theme
	name := 10
	for _, n := range list {
		name = max(name, width(n.name))
	}
	name = min(name, max(10, wide-64))
	bar := max(6, min(40, wide-name-54))
	h := m.row(wide).add("", "  ").cell(t.title, position("NODE", cursor, len(list), room-1), name+1).cell(t.title, "ITS BLOCKS", bar+5).
		right(t.title, "BLOCKS", 7).right(t.title, "ATTACHED", 9).right(t.title, "LEASED", 8).add("", "  ").add(t.title, "STATE")
	out := []string{h.String()}
	if len(list) == 0 {
		text := "no node has been here yet"
		if m.filter != "" {
			text = fmt.Sprintf("no node is called %q (esc drops the filter)", m.filter)
		}
		return append(out, m.row(wide).add(t.dim, "  "+text).String())
	}
	from, to := visible(len(list), cursor, room-1)
	for i := from; i < to; i++ {
		n := list[i]
		r := m.row(wide)
		m.marker(r, i == cursor)
		r.col(m.nodeStyle(n.name), n.name, name)
		if n.room == 0 {
			r.cell(t.dim, "no block", bar+5)
		} else {
			sev := m.severity(100 * share(n))
			m.bar(r, sev, share(n), 0, bar)
			r.right(sev, fmt.Sprintf("%d%%", int(100*share(n))), 5)
		}
		r.right("", fmt.Sprint(n.blocks), 7).right("", fmt.Sprint(n.attachments), 9).right("", fmt.Sprint(n.leased), 8).add("", "  ")
		state, s := m.nodeState(n)
		r.add(s, state)
		out = append(out, r.String())
	}
	rest := ""
	if cursor < 0 {
		rest = ", the fullest: 2 lists all"
	}
	if n := len(list); cursor < 0 && n > to-from && room > 2 {
		out[len(out)-1] = m.row(wide).add(t.dim, fmt.Sprintf("  %d of %s shown%s", to-from-1, count(n, "node"), rest)).String()
	}
	return out
}

func (m *Model) nodeState(n *node) (string, style) {
	t := &m.theme
	switch {
	case n.writer == nil:
		return "no chain", t.warn
	case !n.writer.Closed.IsZero():
		return "chain closed", t.warn
	case m.led.meta != nil && n.writer.Epoch < m.led.meta.Epoch:
		return fmt.Sprintf("not recovered: epoch %d", n.writer.Epoch), t.warn
	case n.near:
		return "blocks nearly full", t.warn
	}
	return "ok", t.dim
}

func (m *Model) logTable(list []*Line, wide, room, cursor int) []string {
	t := &m.theme
	refs := 0
	if wide >= 100 {
		refs = 16
	}
	what, pod, node := 16, 12, 10
	for _, l := range list[max(0, len(list)-2*room):] {
		what, pod, node = max(what, width(l.what())), max(pod, width(l.pod())), max(node, width(l.node()))
	}
	w := columns(wide-2-9-8-3-refs, what, pod, node)
	h := m.row(wide).add("", "  ").cell(t.title, "TIME", 9).cell(t.title, "OP", 8).col(t.title, "WHAT", w[0]).col(t.title, "POD", w[1]).col(t.title, "NODE", w[2])
	if refs > 0 {
		h.add(t.title, "CHAIN/SEQ")
	}
	out := []string{h.String()}
	if len(list) == 0 {
		text := "no entry so far"
		if m.filter != "" {
			text = fmt.Sprintf("none of the last %s matches %q (esc drops the filter)", count(len(m.log), "entry"), m.filter)
		}
		return append(out, m.row(wide).add(t.dim, "  "+text).String())
	}
	from, to := visible(len(list), cursor, room-1)
	if cursor < 0 {
		from, to = max(0, len(list)-max(0, room-1)), len(list)
	}
	for i := from; i < to; i++ {
		l := list[i]
		r := m.row(wide)
		m.marker(r, i == cursor)
		when := "?"
		if !l.time().IsZero() {
			when = l.time().UTC().Format("15:04:05")
		}
		r.cell(t.dim, when, 9).cell(m.opStyle(l), l.op(), 8)
		r.col("", l.what(), w[0]).col("", l.pod(), w[1])
		s := style("")
		if m.led.nodes[l.node()] != nil {
			s = m.nodeStyle(l.node())
		}
		if l.Bad != "" {
			r.add(t.bad, "BAD: "+l.Bad)
		} else {
			r.col(s, l.node(), w[2])
			if refs > 0 {
				r.add(t.dim, l.Ref.Short())
			}
		}
		out = append(out, r.String())
	}
	return out
}

func (m *Model) opStyle(l *Line) style {
	switch entry.Op(l.op()) {
	case entry.Acquire:
		return m.theme.good
	case entry.Release:
		return m.theme.dim
	}
	return m.theme.warn
}

// mapHeight is how many lines the map has on the screen.
func (m *Model) mapHeight() int { return m.height - len(m.head(m.width)) - 1 - 5 }

func (m *Model) mapPage(p *page, wide, room int) []string {
	t := &m.theme
	g := &m.glyphs
	one := m.row(wide)
	if pool := m.led.pools[p.pool]; pool != nil {
		percent, of := pool.percent(), float64(max(1, pool.sum.Capacity))
		m.bar(one, m.severity(percent), float64(pool.sum.Leased)/of, float64(pool.sum.Held)/of, max(8, min(40, wide/5)))
		nodes := map[string]bool{}
		for _, b := range pool.blocks {
			nodes[b.node] = true
		}
		if percent >= 0 {
			one.add(m.severity(percent), fmt.Sprintf(" %d%%", int(percent)))
		}
		one.add("", fmt.Sprintf("  %d leased  %d held  %s free of %s  %s of %s", pool.sum.Leased, pool.sum.Held, number(pool.sum.Free()), number(pool.sum.Capacity),
			count(len(pool.blocks), "block"), count(len(nodes), "node")))
	} else if n := m.led.nodes[p.node]; p.node != "" && n != nil {
		m.bar(one, m.severity(100*share(n)), max(0, share(n)), 0, max(8, min(40, wide/5)))
		state, s := m.nodeState(n)
		one.add("", fmt.Sprintf("  %s, %d of their %s leased  %s  ", count(n.blocks, "block"), n.filled, count(n.room, "address"), count(n.attachments, "attachment"))).add(s, state)
	}
	by := "node"
	ls, bs := style(""), style("")
	if t.byState {
		by, ls, bs = "state", t.leased, t.borrowed
	}
	two := m.row(wide)
	two.add(ls, g.leased).add(t.dim, " leased  ").add(bs, g.borrowed).add(t.dim, " by another node  ").add(t.held, g.held).add(t.dim, " held  ").
		add(t.dim, g.freed+" free again  "+g.room+" never used  "+g.never+" reserved")
	if !m.o.Plain && two.w+13+len(by) < wide {
		two.add(t.dim, "   colour: "+by)
	}
	out := []string{one.String(), two.String()}
	drawn := m.drawMap(p, wide, max(1, room-5))
	out = append(out, drawn...)
	for len(out) < room-3 {
		out = append(out, "")
	}
	return append(append(out, ""), m.about(p, wide)...)
}

// about says in two lines what the cursor is on.
func (m *Model) about(p *page, wide int) []string {
	tiles := m.tilesIn(p, wide)
	i, j := m.on(p, tiles)
	if i < 0 {
		return nil
	}
	tile := &tiles[i]
	at := place{tile.space, tile.at(j)}
	r := m.row(wide).add(m.theme.title, m.glyphs.here+" "+at.ip.String())
	a := m.led.addresses[at]
	two := m.row(wide).add("", "  ")
	switch {
	case a == nil && m.led.pools[tile.pool] != nil && m.led.pools[tile.pool].neverOf(at.ip):
		r.add("", "  is never handed out")
		two.add(m.theme.dim, "a network's own address, its broadcast or gateway, or excluded")
	case a == nil:
		r.add("", "  was never handed out")
		two.add(m.theme.dim, m.blockText(tile))
	default:
		m.holds(r.add("", "  "), a)
		if a.state == keyspace.Leased {
			two.add(m.theme.dim, fmt.Sprintf("network %s, %s, container %.12s; %s", a.holder.Network, a.holder.Interface, a.holder.Container, m.blockText(tile)))
		} else {
			two.add(m.theme.dim, m.blockText(tile))
		}
	}
	return []string{r.String(), two.String()}
}

func (m *Model) blockText(t *tile) string {
	if t.node == "" {
		return "in no claimed block"
	}
	return fmt.Sprintf("block %v of %s", t.prefix, t.node)
}

// holds says how an address stands.
func (m *Model) holds(r *row, a *address) {
	switch {
	case a.state == keyspace.Leased:
		pod := m.led.pod(a)
		if pod == "" {
			pod = "container " + a.holder.Container[:min(12, len(a.holder.Container))]
		}
		r.add(m.theme.good, "leased").add("", " by ").add(m.theme.title, pod).add("", " on ").add(m.nodeStyle(a.holder.Node), a.holder.Node)
	case a.until.After(m.now):
		r.add(m.theme.held, "held").add("", fmt.Sprintf(", not to be handed out for %d s", int(a.until.Sub(m.now).Seconds()+1)))
	default:
		r.add("", "free again, after it was released")
	}
}

func (m *Model) addressPage(p *page, wide, room int) []string {
	t := &m.theme
	var out []string
	line := func(name, value string) {
		if value != "" {
			out = append(out, m.row(wide).add(t.dim, fmt.Sprintf("  %-10s", name)).add("", value).String())
		}
	}
	a := m.led.addresses[p.at]
	r := m.row(wide).add(t.title, p.at.ip.String()).add("", "  ")
	if a == nil {
		r.add("", "was never handed out")
		return []string{r.String()}
	}
	m.holds(r, a)
	out = append(out, r.String())
	line("pool", a.pool.String())
	if pool := m.led.pools[a.pool]; pool != nil {
		if b := m.led.blockOf(p.at, pool); b != nil {
			text := fmt.Sprintf("%v, claimed by %s", b.Prefix, b.node)
			if a.state == keyspace.Leased && a.holder.Node != b.node {
				text += ", borrowed"
			}
			line("block", text)
		} else {
			line("block", "in no claimed block")
		}
	}
	if a.state == keyspace.Leased {
		line("network", fmt.Sprintf("%s, interface %s", a.holder.Network, a.holder.Interface))
		line("container", a.holder.Container)
		line("pod UID", m.led.atts[a.holder].PodUID)
	}
	out = append(out, "")
	h := m.history
	head := "HISTORY, newest first: each entry names the one before it by its hash"
	switch {
	case h == nil || h.Newest != a.last && m.lost == nil:
		return append(out, m.header(wide, head), m.row(wide).add(t.dim, "  reading ...").String())
	case h.Err != "" && len(h.Lines) == 0:
		return append(out, m.header(wide, head), m.row(wide).add(t.bad, "  could not be read: "+h.Err).String())
	}
	out = append(out, m.header(wide, head))
	pod, node := 12, 6
	for i := range h.Lines {
		pod, node = max(pod, width(h.Lines[i].pod())), max(node, width(h.Lines[i].node()))
	}
	w := columns(wide-2-20-8-2-15-13, pod, node)
	out = append(out, m.row(wide).add("", "  ").cell(t.title, "TIME (UTC)", 20).cell(t.title, "OP", 8).col(t.title, "POD", w[0]).col(t.title, "NODE", w[1]).
		cell(t.title, "CHAIN/SEQ", 15).add(t.title, "HELD FOR").String())
	from, to := visible(len(h.Lines), p.cursor, room-len(out)-1)
	for i := from; i < to; i++ {
		l := &h.Lines[i]
		r := m.row(wide)
		m.marker(r, i == p.cursor)
		r.cell(t.dim, l.time().UTC().Format(time.DateTime), 20).cell(m.opStyle(l), l.op(), 8).col("", l.pod(), w[0]).col(m.nodeStyle(l.node()), l.node(), w[1])
		switch {
		case l.Bad != "":
			r.add(t.bad, "BAD: "+l.Bad)
		default:
			r.cell(t.dim, l.Ref.Short(), 15)
			if entry.Op(l.op()) == entry.Release && i+1 < len(h.Lines) {
				r.add("", span(l.time().Sub(h.Lines[i+1].time())))
			} else if i == 0 && entry.Op(l.op()) == entry.Acquire {
				r.add("", span(m.now.Sub(l.time()))+" so far")
			}
		}
		out = append(out, r.String())
	}
	switch {
	case h.Err != "":
		out = append(out, m.row(wide).add(t.bad, "  could not be read further: "+h.Err).String())
	case h.More:
		out = append(out, m.row(wide).add(t.dim, fmt.Sprintf("  older ones: ledger ip %v", p.at.ip)).String())
	case to == len(h.Lines):
		out = append(out, m.row(wide).add(t.dim, "  never held before").String())
	}
	return out
}

// span is a duration for people.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "?" // clocks disagree
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func (m *Model) entryPage(p *page, wide int) []string {
	l := &p.line
	t := &m.theme
	out := []string{m.header(wide, "ENTRY "+l.Ref.Short()+" of "+l.Writer.String())}
	line := func(s style, text string) { out = append(out, m.row(wide).add(s, text).String()) }
	line(t.dim, fmt.Sprintf("  committed in revision %d", l.Commit))
	if l.Bad != "" {
		line(t.bad, "  BAD: "+l.Bad)
	}
	line("", "")
	for text := range strings.SplitSeq(strings.TrimRight(string(l.Stored), "\n"), "\n") {
		for _, part := range wrap(text, wide-2) { // all of it counts
			line("", "  "+part)
		}
	}
	line("", "")
	line(t.dim, "  hash "+l.Ref.Hash.String())
	return out
}

func (m *Model) verifyPage(wide int) []string {
	t := &m.theme
	r := m.row(wide)
	m.verdictText(r)
	out := []string{r.String(), ""}
	line := func(s style, format string, args ...any) {
		for _, part := range wrap(fmt.Sprintf(format, args...), wide) {
			out = append(out, m.row(wide).add(s, part).String())
		}
	}
	if v := m.verified; v != nil && v.Report != nil {
		p := v.Report
		line("", "covered     etcd cluster %s at revision %d, %s", p.EtcdCluster, p.Revision, p.Taken.UTC().Format(time.DateTime))
		line("", "entries     %d in %s of %s", p.Entries, count(p.Chains, "chain"), count(p.Writers, "writer"))
		line("", "live        %d leased, %d free again, %s, %s", p.Leased, p.Free, count(p.Attachments, "attachment"), count(p.Blocks, "block"))
		line("", "signatures  %d checked; they cover the other entries by their hashes", p.Signatures)
		line("", "keys        first use, not pinned ('ledger verify --keys FILE' pins them)")
		if p.Revision < m.led.Rev() {
			line(t.dim, "since then  entries are judged as they come: place, hash and signature")
		}
		for _, n := range p.Reduced {
			line(t.warn, "reduced     %s", n)
		}
	} else if v != nil {
		line(t.warn, "could not be checked: %s", v.Err)
	} else {
		line(t.dim, "v verifies the whole ledger: every entry, its place, hash and signature,")
		line(t.dim, "and that what is live is what the entries add up to.")
	}
	list, more := m.findings()
	if len(list) > 0 {
		line("", "")
		line(t.bad, "FINDINGS")
	}
	for i := range list {
		f := &list[i]
		line(t.bad, "%s %s", f.Code, f.Where)
		line("", "  %s%s", f.Detail, meaning(f.Code))
		if f.Want != "" || f.Got != "" {
			line(t.dim, "  want %s", cmp.Or(f.Want, "nothing"))
			line(t.dim, "  got  %s", cmp.Or(f.Got, "nothing"))
		}
	}
	if more > 0 {
		line(t.bad, "and %d more: 'ledger verify' lists them", more)
	}
	return out
}

func meaning(c audit.Code) string {
	for _, k := range audit.Codes {
		if k.Code == c {
			return " (" + k.Meaning + ")"
		}
	}
	return ""
}

// Rev is the revision of a ledger; 0 where there is none.
func (l *Ledger) Rev() int64 {
	if l == nil {
		return 0
	}
	return l.Revision
}

func (m *Model) helpPage(wide int) []string {
	g := &m.glyphs
	var out []string
	for _, l := range [][2]string{
		{"", "KEYS"},
		{g.up + " k j", "choose; on a map left and right, h and l, too; page up and down leap"},
		{g.enter, "open: a pool's map, a node's blocks, an address, an entry"},
		{"esc", "drop the filter; go back"},
		{"1 2 3 4 tab", "pools, nodes, log, verification"},
		{"/", "filter by pool, node, address, pod, container, op"},
		{"n N", "on a map: the next and last match, or leased address"},
		{"tab", "on a map: the next block; shift+tab the one before"},
		{"c", "colour maps by node or by state"},
		{"v", "verify the whole ledger now"},
		{"q ctrl+c", "quit"},
		{"", ""},
		{"", "MAP"},
		{g.leased, "leased by a pod on the node that claimed the block"},
		{g.borrowed, "leased by a pod on another node (borrowed)"},
		{g.held, "held: released, and not to be handed out yet"},
		{g.freed, "free again: it was leased before"},
		{g.room, "never used"},
		{g.never, "never handed out: network, broadcast, gateway, excluded"},
		{"", ""},
		{"", "WHAT THE NUMBERS SAY"},
		{"OF", "a named pool's size; of an inline pool, what its leases' subnets show"},
		{"LAST 5 MIN", "leased addresses, from the lowest to the highest, and the change"},
		{"TIME", "the writer's own clock, in UTC; the order is that of the commits"},
		{"BAD", "an entry's place, hash or signature does not hold"},
	} {
		switch {
		case l[0] == "":
			out = append(out, m.header(wide, l[1]))
		default:
			out = append(out, m.row(wide).add("", "  ").cell(m.theme.title, l[0], 14).add("", l[1]).String())
		}
	}
	return out
}
