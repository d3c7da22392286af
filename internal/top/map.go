package top

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// tile is a block on the map: one cell an address, in a frame.
type tile struct {
	space  string
	pool   PoolID
	prefix netip.Prefix
	node   string // "": nobody has claimed it
	cols   int    // cells
	rows   int
	n      int // addresses that are drawn
	x, y   int // of the frame
	w, h   int
}

// mostCells is how much of a block is drawn.
const mostCells = 4096

// tiles are the blocks of a page, laid out for the model's width: those of a
// pool, or of a node. Addresses that are in no claimed block have tiles, too.
func (m *Model) tiles(p *page) []tile { return m.tilesIn(p, m.width) }

func (m *Model) tilesIn(p *page, width int) []tile {
	if m.led == nil {
		return nil
	}
	var out []tile
	add := func(pool PoolID, prefix netip.Prefix, node string) {
		t := tile{space: pool.Space, pool: pool, prefix: prefix, node: node, n: int(min(sizeOf(prefix), mostCells)), cols: 16}
		for t.cols < 64 && t.n > 4*t.cols*t.cols/16 && 2*t.cols+2 <= width {
			t.cols *= 2
		}
		t.rows = (t.n + t.cols - 1) / t.cols
		t.w, t.h = t.cols+2, t.rows+2
		out = append(out, t)
	}
	if p.pool.Name == "" {
		for _, b := range m.led.blocks {
			if b.node == p.node {
				add(PoolID{b.Space, b.Pool}, b.Prefix, b.node)
			}
		}
	} else if pool := m.led.pools[p.pool]; pool != nil {
		for _, b := range pool.blocks {
			add(pool.id, b.Prefix, b.node)
		}
		seen := map[netip.Prefix]bool{}
		for ip := range pool.stray {
			host := 6
			if len(pool.lengths) > 0 { // no more than the smallest block, so that none is covered
				host = ip.BitLen() - pool.lengths[0]
			}
			if prefix := netip.PrefixFrom(ip, ip.BitLen()-max(0, min(host, 6))).Masked(); !seen[prefix] {
				seen[prefix] = true
				add(pool.id, prefix, "")
			}
		}
	}
	slices.SortFunc(out, func(a, b tile) int {
		return cmp.Or(cmp.Compare(a.pool.String(), b.pool.String()), a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()), cmp.Compare(a.node, b.node))
	})
	x, y, high := 0, 0, 0
	for i := range out {
		t := &out[i]
		if x > 0 && x+t.w > width {
			x, y, high = 0, y+high, 0
		}
		t.x, t.y = x, y
		x, high = x+t.w+1, max(high, t.h)
	}
	return out
}

// at is a tile's i-th address.
func (t *tile) at(i int) netip.Addr { return offset(t.prefix.Addr(), uint64(i)) }

func offset(ip netip.Addr, n uint64) netip.Addr {
	if ip.Is4() {
		b := ip.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := ip.As16()
	lo, carry := bits.Add64(binary.BigEndian.Uint64(b[8:]), n, 0)
	binary.BigEndian.PutUint64(b[8:], lo)
	binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])+carry)
	return netip.AddrFrom16(b)
}

// index is where an address is in a tile; -1 where it is not drawn.
func (t *tile) index(at place) int {
	if at.space != t.space || !t.prefix.Contains(at.ip) {
		return -1
	}
	from, to := t.prefix.Addr().As16(), at.ip.As16()
	i := binary.BigEndian.Uint64(to[8:]) - binary.BigEndian.Uint64(from[8:])
	if binary.BigEndian.Uint64(to[:8]) != binary.BigEndian.Uint64(from[:8]) || i >= uint64(t.n) {
		return -1
	}
	return int(i)
}

// on is which tile and cell is chosen; -1, 0 on an empty map. It begins with the
// first address that is leased.
func (m *Model) on(p *page, tiles []tile) (int, int) {
	for i := range tiles {
		if j := tiles[i].index(p.at); j >= 0 {
			return i, j
		}
	}
	if len(tiles) == 0 {
		return -1, 0
	}
	for j := range tiles[0].n {
		if a := m.led.addresses[place{tiles[0].space, tiles[0].at(j)}]; a != nil && a.state == keyspace.Leased {
			return 0, j
		}
	}
	return 0, 0
}

// from is the first line that is shown of a map whose cursor must be seen.
func (m *Model) from(p *page, tiles []tile, height int) int {
	i, j := m.on(p, tiles)
	if i < 0 {
		return 0
	}
	t := &tiles[i]
	last := 0
	for k := range tiles {
		last = max(last, tiles[k].y+tiles[k].h)
	}
	top, bottom := t.y, t.y+t.h
	if t.h > height { // then at least the cell
		top, bottom = t.y+j/t.cols, t.y+j/t.cols+3
	}
	from := min(p.scroll, top)
	if bottom-from > height {
		from = bottom - height
	}
	return max(0, min(from, last-height))
}

// mapKey moves the cursor of a map.
func (m *Model) mapKey(p *page, k Key) {
	tiles := m.tiles(p)
	i, j := m.on(p, tiles)
	if i < 0 {
		return
	}
	t := &tiles[i]
	step := func(by int) { // along the addresses
		j += by
		for j < 0 && i > 0 {
			i--
			j += tiles[i].n
		}
		for j >= tiles[i].n && i+1 < len(tiles) {
			j -= tiles[i].n
			i++
		}
		j = max(0, min(j, tiles[i].n-1))
	}
	block := func(by int) {
		if next := i + by; next >= 0 && next < len(tiles) {
			i, j = next, 0
		}
	}
	vertical := func(by int) {
		x, y := t.x+1+j%t.cols, t.y+1+j/t.cols
		if r := j/t.cols + by; r >= 0 && j+by*t.cols >= 0 && j+by*t.cols < t.n {
			j += by * t.cols
			return
		}
		// The nearest cell beyond the frame, above or below.
		best := -1
		for c := range tiles {
			o := &tiles[c]
			if by > 0 && o.y <= t.y || by < 0 && o.y >= t.y {
				continue
			}
			far := func(o *tile) int { return abs(o.y-y)*1000 + abs(max(o.x+1, min(x, o.x+o.cols))-x) }
			if best < 0 || far(o) < far(&tiles[best]) {
				best = c
			}
		}
		if best < 0 {
			return
		}
		o := &tiles[best]
		i = best
		j = max(0, min(x-o.x-1, o.cols-1))
		if by < 0 {
			j += (o.rows - 1) * o.cols
		}
		j = min(j, o.n-1)
	}
	switch k.Name {
	case "left", "h":
		step(-1)
	case "right", "l":
		step(1)
	case "up", "k":
		vertical(-1)
	case "down", "j":
		vertical(1)
	case "tab":
		block(1)
	case "shift+tab":
		block(-1)
	case "pgdown", "space", "pgup":
		by := 1
		if k.Name == "pgup" {
			by = -1
		}
		for range max(1, m.height-12) {
			t = &tiles[i]
			vertical(by)
		}
	case "home", "g":
		i, j = 0, 0
	case "end", "G":
		i, j = len(tiles)-1, tiles[len(tiles)-1].n-1
	case "n":
		m.seek(p, 1)
		return
	case "N", "p":
		m.seek(p, -1)
		return
	}
	p.at = place{tiles[i].space, tiles[i].at(j)}
	p.scroll = m.from(p, tiles, m.mapHeight())
}

// seek goes to the next address that the filter speaks of; without a filter, to
// the next that is leased.
func (m *Model) seek(p *page, by int) {
	tiles := m.tiles(p)
	i, j := m.on(p, tiles)
	if i < 0 {
		return
	}
	total := 0
	for k := range tiles {
		total += tiles[k].n
	}
	for range total {
		if j += by; j < 0 {
			i = (i - 1 + len(tiles)) % len(tiles)
			j = tiles[i].n - 1
		} else if j >= tiles[i].n {
			i, j = (i+1)%len(tiles), 0
		}
		at := place{tiles[i].space, tiles[i].at(j)}
		a := m.led.addresses[at]
		if m.filter == "" && a != nil && a.state == keyspace.Leased || m.filter != "" && m.match(at) && (a != nil || m.filter == at.ip.String()) {
			p.at = at
			p.scroll = m.from(p, tiles, m.mapHeight())
			return
		}
	}
	if m.filter != "" {
		m.note, m.noted = fmt.Sprintf("no address here matches %q", m.filter), m.now
	}
}

func abs(n int) int {
	if n < 0 {
		return -n
	}
	return n
}

// drawMap draws height lines of a map.
func (m *Model) drawMap(p *page, wide, height int) []string {
	tiles := m.tilesIn(p, wide)
	if len(tiles) == 0 {
		return []string{m.row(wide).add(m.theme.dim, "  "+m.emptyMap(p)).String()}
	}
	chosen, cell := m.on(p, tiles)
	from := m.from(p, tiles, height)
	out := make([]string, 0, height)
	for y := from; y < from+height; y++ {
		r := m.row(wide)
		for i := range tiles {
			t := &tiles[i]
			if y < t.y || y >= t.y+t.h {
				continue
			}
			at := -1
			if i == chosen {
				at = cell
			}
			m.drawTile(r.gap(t.x), t, y-t.y, i == chosen, at)
		}
		out = append(out, r.String())
	}
	return out
}

func (m *Model) emptyMap(p *page) string {
	switch {
	case m.led == nil:
		return ""
	case p.pool.Name == "":
		return "node " + p.node + " has claimed no block"
	case m.led.pools[p.pool] == nil && p.pool.Space == "":
		return "there is no pool " + p.pool.Name + " in this ledger so far"
	case m.led.pools[p.pool] == nil:
		return "there is no pool " + p.pool.String() + " in this ledger so far"
	}
	return "nothing was handed out of pool " + p.pool.String() + " so far"
}

func (m *Model) drawTile(r *row, t *tile, y int, chosen bool, cursor int) {
	f, s := m.glyphs.frame, m.theme.dim
	if chosen {
		f, s = m.glyphs.chosen, m.theme.title
	}
	inner := t.w - 2
	switch y {
	case 0:
		name := t.prefix.String()
		if width(name) > inner { // of a v6 prefix the end says more
			name = m.glyphs.cut + name[len(name)-inner+1:]
		}
		r.add(s, f[0]+name+strings.Repeat(f[1], inner-width(name))+f[2])
	case t.h - 1:
		right := fmt.Sprintf("%d/%d", m.leasedIn(t), t.n)
		name := t.node
		if name == "" {
			name = "not claimed"
		}
		name = clean(name)
		room := inner - width(right) - 1
		ns := s
		if t.node != "" && !m.theme.byState {
			ns = m.nodeStyle(t.node)
		}
		r.add(s, f[4])
		if width(name) > room {
			r.cell(ns, name, room)
		} else {
			r.add(ns, name)
			r.add(s, strings.Repeat(f[1], room-width(name)))
		}
		r.add(s, f[1]+right+f[5])
	default:
		r.add(s, f[3])
		var run strings.Builder
		var last style
		flush := func() {
			r.add(last, run.String())
			run.Reset()
		}
		pool := m.led.pools[t.pool]
		for i := (y - 1) * t.cols; i < y*t.cols; i++ {
			g, gs := " ", style("")
			if i < t.n {
				g, gs = m.cell(pool, t, place{t.space, t.at(i)})
			}
			if i == cursor {
				gs = m.theme.chosen
			}
			if gs != last {
				flush()
				last = gs
			}
			run.WriteString(g)
		}
		flush()
		r.add(s, f[3])
	}
}

func (m *Model) leasedIn(t *tile) int {
	if b := m.led.blocks[keyspace.BlockID{Space: t.space, Pool: t.pool.Name, Prefix: t.prefix}]; b != nil {
		return b.leased
	}
	n := 0
	for i := range t.n {
		if a := m.led.addresses[place{t.space, t.at(i)}]; a != nil && a.state == keyspace.Leased && a.pool == t.pool {
			n++
		}
	}
	return n
}

func (m *Model) nodeStyle(node string) style {
	if len(m.theme.nodes) == 0 {
		return ""
	}
	return m.theme.nodes[m.led.colour(node)%len(m.theme.nodes)]
}

// cell is how an address looks.
func (m *Model) cell(p *pool, t *tile, at place) (string, style) {
	a := m.led.addresses[at]
	g, s := m.look(p, t, at, a)
	if m.filter != "" && (a == nil || !m.match(at)) && g != m.glyphs.never {
		return m.glyphs.room, m.theme.dim
	}
	return g, s
}

func (m *Model) look(p *pool, t *tile, at place, a *address) (string, style) {
	switch {
	case a == nil && p != nil && p.neverOf(at.ip):
		return m.glyphs.never, m.theme.dim
	case a == nil || a.pool != t.pool:
		return m.glyphs.room, m.theme.dim
	case a.state == keyspace.Leased:
		g, s := m.glyphs.leased, m.theme.leased
		if a.holder.Node != t.node && t.node != "" {
			g, s = m.glyphs.borrowed, m.theme.borrowed
		}
		if !m.theme.byState {
			s = m.nodeStyle(a.holder.Node)
		}
		return g, s
	case a.until.After(m.now):
		return m.glyphs.held, m.theme.held
	}
	return m.glyphs.freed, m.theme.dim
}
