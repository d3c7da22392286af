package desktop

import (
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/swaytest"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// The bar is drawn with the numbers that etcd holds, also by a block that came
// when all was said already.
func TestBarShowsWhatEtcdHolds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/25")
	w.network("db", "10.22.1.0/26")
	o := w.observe()
	o.wait("no publisher")
	w.draws(o.wait("no publisher"), "no-publisher")

	w.acquire("web", 31)
	w.acquire("db", 7)
	w.publish()
	w.draws(o.wait(w.says("web")), "bar")
	o.match(`(✓|ok) ?\d\d:\d\d`) // and it verifies

	w.acquire("web", 12)
	w.release("web", 3)
	w.draws(o.wait(w.says("web")), "changed")

	// Nothing changes now, the state that is kept for cold starts is gone, and the
	// next heartbeat is far away: the late one has to ask.
	for _, f := range stateFiles(t, w) {
		w.must(os.Remove(f))
	}
	before := time.Now()
	l := w.observe().wait(w.says("web"))
	t.Logf("a late block knew after %v", l.at.Sub(before).Round(time.Millisecond))

	// One that starts where sway is not yet reads the file.
	w.acquire("web", 1)
	o.wait(w.says("web"))
	if files := stateFiles(t, w); len(files) == 0 {
		t.Error("no state is kept for cold starts")
	} else if i, err := os.Stat(files[0]); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v %v, want 0600", files[0], i, err)
	}
}

func stateFiles(t *testing.T, w *world) []string {
	t.Helper()
	files, err := filepath.Glob(w.desk.Path("ipam-ledger/state*.json"))
	w.must(err)
	return files
}

// Commit to line, measured. No time is asserted but the one that means broken.
func TestCommitToLine(t *testing.T) {
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/22")
	o := w.observe()
	w.publish()
	w.acquire("web", 1)
	o.wait(w.says("web"))
	o.match(`(✓|ok) ?\d\d:\d\d`)

	var alone []time.Duration
	for range 25 {
		// An isolated change: the rate cap has nothing to hold back.
		quiet(o, 400*time.Millisecond)
		w.acquire("web", 1)
		committed := time.Now()
		alone = append(alone, o.wait(fmt.Sprintf(" web %d/", len(w.held["web"]))).at.Sub(committed))
	}
	report(t, "an isolated change", alone, 50*time.Millisecond)

	// A steady stream: each commit is in some line soon. Which line is the first to
	// hold it is told by its count.
	first := len(w.held["web"])
	committed := map[int]time.Time{}
	lines := o.count()
	stream := time.NewTicker(20 * time.Millisecond)
	defer stream.Stop()
	for range 200 {
		<-stream.C
		w.acquire("web", 1)
		committed[len(w.held["web"])] = time.Now()
	}
	o.wait(fmt.Sprintf(" web %d/", len(w.held["web"])))
	var steady []time.Duration
	o.mu.Lock()
	next := first + 1
	for _, l := range o.lines[lines:] {
		var n int
		if _, after, ok := strings.Cut(l.text, " web "); ok {
			_, err := fmt.Sscanf(after, "%d/", &n)
			w.must(err)
		}
		for ; next <= n; next++ {
			steady = append(steady, l.at.Sub(committed[next]))
		}
	}
	took := o.lines[len(o.lines)-1].at.Sub(o.lines[lines].at)
	n := len(o.lines) - lines
	o.mu.Unlock()
	report(t, "under a steady stream", steady, 300*time.Millisecond)
	t.Logf("%d lines for 200 commits in %v: %.1f/s", n, took.Round(time.Millisecond), float64(n-1)/took.Seconds())
	if rate := float64(n-1) / took.Seconds(); rate > 6 {
		t.Errorf("%.1f lines a second: the rate cap is 4", rate)
	}
}

// quiet waits until no line came for a while.
func quiet(o *observer, d time.Duration) {
	for {
		_, came := o.last()
		select {
		case <-came:
		case <-time.After(d):
			return
		}
	}
}

func report(t *testing.T, what string, all []time.Duration, target time.Duration) {
	t.Helper()
	slices.Sort(all)
	at := func(q float64) time.Duration {
		return all[int(math.Ceil(q*float64(len(all))))-1].Round(100 * time.Microsecond)
	}
	t.Logf("commit to the block's line, %s, n=%d: median %v, p90 %v, max %v (target: median %v)",
		what, len(all), at(.5), at(.9), at(1), target)
	if at(.5) > 10*target {
		t.Errorf("median %v: ten times the target is broken, on any machine", at(.5))
	}
}

// The publisher is killed, and started again.
func TestPublisherKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	p := w.publish()
	w.acquire("web", 5)
	o.wait(w.says("web"))
	p.Kill()
	w.acquire("web", 5)
	// It held a lock, which must not outlive it.
	second := w.publish()
	w.draws(o.wait(w.says("web")), "again")
	// A second one beside it is refused, and says who is there.
	c := w.desk.Command("ledger", "publish", "--source", source)
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), fmt.Sprint(second.PID())) {
		t.Errorf("a second publisher: %v, which does not name %d: %s", err, second.PID(), out)
	}
	w.acquire("web", 1)
	o.wait(w.says("web"))
	w.must(second.Signal(syscall.SIGTERM))
	select {
	case <-second.Done():
	case <-time.After(10 * time.Second):
		t.Error("the publisher does not end on SIGTERM")
	}
}

// A publisher that fell silent is noticed, and numbers that are old say so.
func TestStale(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	o := w.observe()
	o.wait("no publisher") // it listens
	// A publisher whose heartbeat is a second, so that it is soon missed.
	w.must(w.desk.Tick(encode(t, &state.State{
		Source: source, Epoch: 1, Revision: 5, At: time.Now(), Heartbeat: 1, Ledger: state.LedgerRunning,
		Etcd:  state.Etcd{OK: true},
		Pools: []state.Pool{{Space: "default", Name: "web", Capacity: 100, Leased: 42}},
	})))
	o.wait(" web 42/100")
	w.draws(o.wait("stale <1m"), "stale")
}

func encode(t *testing.T, s *state.State) []byte {
	t.Helper()
	b, err := state.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// etcd goes, and comes back.
func TestEtcdGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	w.publish()
	w.acquire("web", 9)
	o.wait(w.says("web"))
	w.etcd.Stop()
	w.draws(o.wait("etcd unreachable"), "gone")
	w.etcd.Restart(t)
	w.acquire("web", 2)
	l := o.wait(w.says("web"))
	if strings.Contains(l.text, "unreachable") {
		l = o.match(`^[^u]* web 11/[^u]*$`)
	}
	w.draws(l, "back")
}

// Somebody edits the record: whoever looks at the bar knows.
func TestTampered(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	w.publish()
	w.acquire("web", 9)
	o.wait(w.says("web"))
	client := w.etcd.Client(t)
	key := w.lastEntry()
	r, err := client.Get(t.Context(), key)
	w.must(err)
	_, err = client.Put(t.Context(), key, strings.Replace(string(r.Kvs[0].Value), "web-9", "web-0", 1))
	w.must(err)
	w.verifies = 1
	l := o.wait("VERIFY FAILED")
	if !strings.Contains(l.raw, `"urgent":true`) {
		t.Errorf("not urgent: %s", l.raw)
	}
	w.draws(l, "tampered")
}

// Sway is killed, which leaves its socket behind, and started again: nobody else
// is.
func TestSwayRestarted(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	p := w.publish()
	w.acquire("web", 3)
	o.wait(w.says("web"))
	old := w.desk.Socket()
	w.must(w.desk.Stop(syscall.SIGKILL))
	if _, err := os.Stat(old); err != nil {
		t.Error(err)
	}
	o.wait("sway lost")
	w.acquire("web", 3)
	w.must(w.desk.WriteFile("twin", header))
	w.must(w.desk.Restart())
	l := o.match(`^[^k]* web 6/`)
	if strings.Contains(l.text, "sway lost") {
		t.Errorf("sway is back, and the block says %s", l.text)
	}
	w.draws(l, "back")
	if p.Ended() {
		t.Errorf("the publisher ended: %v", p.Wait())
	}
	w.onlyOne(o)
}

// onlyOne waits until one block is left, beside the observers.
func (w *world) onlyOne(observers ...*observer) {
	w.t.Helper()
	w.until(func() error {
		if got := w.desk.Processes("ledger-swaybar"); len(got) != 1+len(observers) {
			return fmt.Errorf("blocks: %v, want 1 and %d observers", got, len(observers))
		}
		return nil
	})
}

// The configuration is read again, ten times: bars and blocks are replaced.
func TestReload(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	w.publish()
	w.acquire("web", 8)
	seen := map[int]bool{}
	for range 10 {
		w.until(func() error { // a block that is new
			for _, p := range w.desk.Processes("ledger-swaybar") {
				if !seen[p.PID] {
					seen[p.PID] = true
					return nil
				}
			}
			return errors.New("no new block")
		})
		w.must(w.desk.WriteFile("twin", header))
		w.must(w.desk.Reload())
	}
	w.onlyOne()
	if len(seen) != 10 {
		t.Errorf("%d blocks, want 10", len(seen))
	}
	o := w.observe()
	w.draws(o.wait(w.says("web")), "after")
	w.onlyOne(o)
}

// A bar that is hidden does not stop its block.
func TestHidden(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	w.publish()
	w.acquire("web", 4)
	w.draws(o.wait(w.says("web")), "shown")
	for _, mode := range []string{"hide", "invisible"} {
		w.must(w.desk.Run("bar bar-0 mode " + mode))
		w.until(func() error { // it is gone
			i, err := w.picture()
			if err == nil && len(colours(rows(i, 0, barHeight))) != 1 {
				err = fmt.Errorf("bar mode %s: the bar is still there", mode)
			}
			return err
		})
		for _, p := range w.desk.Processes("ledger-swaybar") {
			if p.State == 'T' {
				t.Errorf("bar mode %s: %v is stopped", mode, p)
			}
		}
		w.acquire("web", 4)
		l := o.wait(w.says("web"))
		w.must(w.desk.Run("bar bar-0 mode dock"))
		w.draws(l, "shown-after-"+mode)
	}
	// A hidden bar's block ends, too, when the bar does.
	w.must(w.desk.Run("bar bar-0 mode hide"))
	w.must(w.desk.Reload())
	w.onlyOne(o)
}

// right is where the bar's block is.
const rightX, barY = width - 80, barHeight / 2

// A thousand clicks in about a second. Twenty times as many a second end swaybar
// 1.7 itself, whatever its status command does.
func TestFloodOfClicks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{block: `
[clicks]
left = ["sh", "-c", "echo left $LEDGER_SOURCE >> \"$XDG_RUNTIME_DIR/clicked\""]
right = ["sh", "-c", "echo right $LEDGER_SOURCE $LEDGER_SPACE $LEDGER_POOL >> \"$XDG_RUNTIME_DIR/clicked\""]
middle = []
`})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	w.publish()
	w.acquire("web", 4)
	w.draws(o.wait(w.says("web")), "before")
	p := w.desk.Pointer()
	w.must(p.Move(rightX, barY))
	began := time.Now()
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	for i := range 1000 {
		<-pace.C
		w.must(p.Click([]swaytest.Button{swaytest.Left, swaytest.Middle, swaytest.Right}[i%3]))
	}
	t.Logf("1,000 clicks in %v", time.Since(began).Round(time.Millisecond))
	w.must(p.Move(width/2, height/2)) // off the bar
	w.acquire("web", 4)
	w.draws(o.wait(w.says("web")), "after")
	w.until(func() error {
		b, err := os.ReadFile(w.desk.Path("clicked"))
		for _, want := range []string{"left prod\n", "right prod default web\n"} {
			if err == nil && !strings.Contains(string(b), want) {
				err = fmt.Errorf("clicks said %q, want %q among it", b, want)
			}
		}
		return err
	})
	b, err := os.ReadFile(w.desk.Path("clicked"))
	w.must(err)
	t.Logf("%d commands were run", strings.Count(string(b), "\n"))
	w.onlyOne(o)
}

// Ticks that nobody honest sends.
func TestForgedTicks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{block: `
[clicks]
right = ["sh", "-c", "printf %s \"$LEDGER_POOL\" > \"$XDG_RUNTIME_DIR/pool\""]
`})
	w.network("web", "10.22.0.0/24")
	o := w.observe()
	w.publish()
	w.acquire("web", 4)
	o.wait(w.says("web"))
	n := o.count()

	// Over the cap, valid otherwise; no JSON; another program's; half of one.
	s := state.State{
		Source: source, Epoch: 9, Revision: 1 << 40, At: time.Now(), Heartbeat: 15, Ledger: state.LedgerRunning,
		Etcd: state.Etcd{OK: true}, Verify: state.Verify{Result: state.VerifyOK, At: time.Now()},
	}
	whole := encode(t, &s)
	for _, payload := range []string{
		strings.Replace(string(whole), `"pools":[]`, `"pools":[]`+strings.Repeat(" ", 17<<10), 1),
		strings.Replace(string(whole), `"pools":[]`, `"pools":[]`+strings.Repeat(" ", 100<<10), 1),
		string(whole[:len(whole)/2]),
		`{"app":"somebody-else","v":1}`, `null`, `[`, "\x00\xff", strings.Repeat("[", 10000),
		strings.Replace(string(whole), `"hb":15`, `"hb":-1`, 1),
		strings.Replace(string(whole), `"source":"prod"`, `"source":""`, 1),
	} {
		w.must(w.desk.Tick([]byte(payload)))
	}
	w.acquire("web", 1)
	l := o.wait(w.says("web"))
	for _, l := range o.lines[n:] {
		if !strings.Contains(l.text, " web ") {
			t.Errorf("a forged tick made the block say %s", l.text)
		}
	}
	w.draws(l, "ignored")

	// Another version.
	w.must(w.desk.Tick([]byte(`{"app":"ipam-ledger","v":2,"type":"state","source":"prod"}`)))
	l = o.wait("update ledger-swaybar")
	w.draws(l, "version")

	// Markup, line breaks, commands, and letters that turn a line around.
	show := func(name string, leased uint64) line {
		s.Pools = []state.Pool{{Space: "<b>", Name: name, Capacity: 100, Leased: leased}}
		s.Epoch, s.Revision, s.At = 1, 1<<40, time.Now()
		w.must(w.desk.Tick(encode(t, &s)))
		l := o.wait(fmt.Sprintf("%d/100", leased))
		var blocks []map[string]any
		if err := json.Unmarshal([]byte(strings.TrimPrefix(l.raw, ",")), &blocks); err != nil {
			t.Errorf("%v: %s", err, l.raw)
		}
		for _, b := range blocks {
			if text := b["full_text"].(string); strings.ContainsAny(text, "<>\n\u202e") {
				t.Errorf("unescaped: %q", text)
			}
		}
		return l
	}
	w.draws(show("<span size='90000' background='red'>a\n]}\n&amp;\u202e", 98), "line-breaks")
	name := "&<b>$(touch pwned1)`touch pwned2`;touch pwned3"
	l = show(name, 99)
	w.draws(l, "forged")
	p := w.desk.Pointer()
	w.must(p.Move(rightX, barY))
	w.must(p.Click(swaytest.Right))
	w.until(func() error {
		b, err := os.ReadFile(w.desk.Path("pool"))
		if err == nil && string(b) != name {
			err = fmt.Errorf("the command was told %q, want %q", b, name)
		}
		return err
	})
	if found, _ := filepath.Glob(w.desk.Path("pwned*")); found != nil {
		t.Errorf("a tick became a command: %v", found)
	}
}

// A click opens the dashboard in a window that floats, a middle one verifies.
func TestClicks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/24")
	w.network("db", "10.22.1.0/26")
	o := w.observe()
	w.publish()
	w.acquire("web", 77)
	w.acquire("db", 9)
	w.draws(o.wait(w.says("web")), "bar")
	p := w.desk.Pointer()
	w.must(p.Move(rightX, barY))
	for _, click := range []struct {
		name   string
		button swaytest.Button
	}{{"left", swaytest.Left}, {"right", swaytest.Right}} {
		w.must(p.Click(click.button))
		window := w.floating()
		if window.AppID != "ipam-float" {
			t.Errorf("%s click: the window's app_id is %q", click.name, window.AppID)
		}
		w.drawn(window)
		w.keep(click.name + "-click")
		if got := w.desk.Processes("ledger"); !slices.ContainsFunc(got, func(p swaytest.Running) bool { return strings.Contains(p.Command, "ledger top") }) {
			t.Errorf("%s click: no ledger top among %v", click.name, got)
		}
		w.must(w.desk.Run(fmt.Sprintf("[pid=%d] kill", window.PID)))
		w.until(func() error {
			windows, err := w.desk.Windows()
			if err == nil && len(windows) != 0 {
				err = fmt.Errorf("windows: %v", windows)
			}
			return err
		})
	}
	summary := w.bar()
	w.must(p.Scroll(false)) // a block for each pool
	w.until(func() error { return differ("scrolling up", w.bar(), summary) })
	w.keep("scrolled-up")
	w.must(p.Scroll(true))
	w.until(func() error {
		if w.bar() != summary {
			return errors.New("scrolling down does not show again what was there")
		}
		return nil
	})
	w.must(p.Click(swaytest.Middle)) // the result is shown in the block
	w.until(func() error { return differ("a middle click", w.bar(), summary) })
	w.until(func() error {
		if got := w.desk.Processes("ledger"); slices.ContainsFunc(got, func(p swaytest.Running) bool { return strings.Contains(p.Command, "verify") }) {
			return fmt.Errorf("still verifying: %v", got)
		}
		return nil
	})
	w.keep("middle-click")
}

// bar are the pixels of the bar.
func (w *world) bar() string {
	w.t.Helper()
	i, err := w.picture()
	w.must(err)
	return string(rows(i, 0, barHeight))
}

func differ(what, a, b string) error {
	if a == b {
		return errors.New(what + " does not change the bar")
	}
	return nil
}

// floating waits for a floating window.
func (w *world) floating() swaytest.Window {
	w.t.Helper()
	var found swaytest.Window
	w.until(func() error {
		windows, err := w.desk.Windows()
		if err != nil {
			return err
		}
		for _, found = range windows {
			if found.Floating {
				return nil
			}
		}
		return fmt.Errorf("no floating window; windows: %v", windows)
	})
	return found
}

// drawn waits until a window has text in it, and is no longer changing.
func (w *world) drawn(window swaytest.Window) {
	w.t.Helper()
	var before string
	w.until(func() error {
		i, err := w.picture()
		if err != nil {
			return err
		}
		r := window.Rect
		part := string(rows(i, r.Y, r.Y+r.Height))
		same := part == before
		before = part
		if n := len(colours([]byte(part))); n < 20 || !same {
			return fmt.Errorf("the window %v is not drawn: %d colours", window, n)
		}
		return nil
	})
}

// The dialect of Waybar, in Waybar, with the module that we ship.
func TestWaybar(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/usr/bin/waybar"); err != nil {
		t.Fatal("waybar is missing: sudo hack/install-test-deps.sh")
	}
	w := newWorld(t, options{config: `for_window [app_id="ipam-float"] floating enable`})
	w.network("web", "10.22.0.0/26")
	w.publish()
	w.acquire("web", 20)
	w.observe().wait(w.says("web"))
	module := deployed(t, w, "waybar.jsonc")
	w.must(w.desk.WriteFile("waybar/config", strings.Replace(module, "{", `{"position": "top", "height": 30,`, 1)))
	style := deployed(t, w, "waybar.css")
	// Colours that nothing else has, to see the class.
	w.must(w.desk.WriteFile("waybar/style.css", `* { font-family: "DejaVu Sans Mono"; font-size: 14px; border-radius: 0; }
window#waybar { background: #2e3440; color: #eceff4; }
`+style+`
#custom-ipam.normal { background-color: #00ff00; color: #000000; }
#custom-ipam.warning { background-color: #ffff00; color: #000000; }
#custom-ipam.critical { background-color: #ff0000; }
#custom-ipam.unknown { background-color: #0000ff; }
`))
	c := w.desk.Command("waybar", "-c", w.desk.Path("waybar/config"), "-s", w.desk.Path("waybar/style.css"))
	errs := &logged{t: t, name: "waybar"}
	c.Stdout, c.Stderr = errs, errs
	bar, err := w.desk.Start(c)
	w.must(err)
	t.Cleanup(errs.stop)
	w.shows(color.RGBA{0, 255, 0, 255}, "normal")
	w.acquire("web", 33)
	w.shows(color.RGBA{255, 255, 0, 255}, "warning")
	w.acquire("web", 7)
	w.shows(color.RGBA{255, 0, 0, 255}, "critical")
	w.etcd.Stop()
	w.shows(color.RGBA{0, 0, 255, 255}, "unknown")
	w.etcd.Restart(t)
	w.shows(color.RGBA{255, 0, 0, 255}, "critical-again")
	p := w.desk.Pointer()
	w.must(p.Move(rightX, 15))
	w.must(p.Click(swaytest.Left))
	w.drawn(w.floating())
	w.keep("click")
	// It is killed, and its block does not stay behind: the observer alone does.
	bar.Kill()
	w.until(func() error {
		if got := w.desk.Processes("ledger-swaybar"); len(got) != 1 {
			return fmt.Errorf("blocks: %v", got)
		}
		return nil
	})
}

// shows waits until a colour has some area in the top of the picture.
func (w *world) shows(c color.RGBA, name string) {
	w.t.Helper()
	w.until(func() error {
		i, err := w.picture()
		if err == nil {
			if n := colours(rows(i, 0, 30))[c]; n < 500 {
				err = fmt.Errorf("%s: %d pixels are %v", name, n, c)
			}
		}
		return err
	})
	w.keep(name)
}

// deployed is a file that we ship, with the programs where they are here.
func deployed(t *testing.T, w *world, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", name))
	w.must(err)
	return strings.ReplaceAll(string(b), "/usr/local/bin/", w.desk.Path("bin")+"/")
}

// The lines that we ship for Sway's configuration are all that is needed.
func TestShippedSwayConfig(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{config: "# empty"})
	w.network("web", "10.22.0.0/26")
	w.acquire("web", 20)
	w.must(w.desk.Stop(syscall.SIGTERM)) // exec is for a start alone
	w.must(w.desk.Configure(deployed(t, w, "sway.conf")))
	w.must(w.desk.Restart())
	w.observe().wait(w.says("web"))
	w.until(func() error {
		i, err := w.picture()
		if err == nil {
			if n := len(colours(rows(i, 0, 16))); n < 12 {
				err = fmt.Errorf("the bar has %d colours", n)
			}
		}
		return err
	})
	w.keep("bar")
	// What sway's exec started lives on without sway: it serves the next one.
	w.must(w.desk.Stop(syscall.SIGTERM))
	publisher := w.desk.Processes("ledger")
	if len(publisher) != 1 {
		t.Fatalf("publishers: %v", publisher)
	}
	w.must(w.desk.Restart())
	w.until(func() error { // and the one that this sway starts finds it there, and ends
		if got := w.desk.Processes("ledger"); !slices.Equal(got, publisher) {
			return fmt.Errorf("publishers %v, want %v", got, publisher)
		}
		return nil
	})
	w.observe().wait(w.says("web"))
	w.must(syscall.Kill(publisher[0].PID, syscall.SIGTERM))
}

// Two Sways of one user: one publisher serves the bars of both.
func TestTwoSessions(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/26")
	w.acquire("web", 20)
	w.publish()
	o := w.observe()
	o.wait(w.says("web"))
	other, err := w.desk.Second("")
	w.must(err)
	p := w.observeOn(other, "--format", "text")
	p.wait(w.says("web"))
	w.acquire("web", 2)
	p.wait(w.says("web"))
	o.wait(w.says("web"))
}

// Where only a bastion reaches etcd, states come through a command, whose end is
// not the publisher's.
func TestFromCommand(t *testing.T) {
	t.Parallel()
	w := newWorld(t, options{})
	w.network("web", "10.22.0.0/26")
	w.acquire("web", 20)
	o := w.observe()
	// What runs on the bastion has no sway.
	p := w.publish("--from-command", "exec env -u SWAYSOCK XDG_RUNTIME_DIR=/nonexistent ledger publish --print --source far")
	w.draws(o.wait(w.says("web")), "bar")
	var far []swaytest.Running
	w.until(func() error {
		far = slices.DeleteFunc(w.desk.Processes("ledger"), func(r swaytest.Running) bool { return !strings.Contains(r.Command, "--print") || r.PID == p.PID() })
		if len(far) != 1 {
			return fmt.Errorf("on the bastion: %v", far)
		}
		return nil
	})
	w.must(syscall.Kill(far[0].PID, syscall.SIGKILL))
	w.acquire("web", 2)
	o.wait(w.says("web"))
}
