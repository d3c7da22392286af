package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/ipam-ledger/ipam-ledger/internal/swaytest"
)

// The headless desktop's size: small enough for a page of documentation.
const desktopWidth, desktopHeight = 1024, 600

// labSource is the cluster's name in the bar.
const labSource = "lab"

// desktopBar is the headless desktop's bar. deploy/sway.conf says the same with
// more words.
const desktopBar = `
for_window [app_id="ipam-float"] floating enable, resize set width 940 height 500, move position center
bar {
	id ` + barID + `
	position top
	font pango:DejaVu Sans Mono 11
	tray_output none
	status_command %s
	colors {
		background #3b4252
		statusline #eceff4
	}
}
`

type desktopOptions struct {
	bin, out string
	headless bool
	lasts    time.Duration
	w        io.Writer
	colour   bool
	after    func(step int) error // for tests: called after each step, nil otherwise
}

func desktopCommand() *cobra.Command {
	o := desktopOptions{w: os.Stdout, colour: colourWanted(os.Stdout)}
	c := &cobra.Command{
		Use:   "desktop",
		Short: "The state of a small cluster in a bar of Sway",
		Long: `The state of a small cluster in a bar of Sway: an etcd, three nodes, pods that
come and go, "ledger publish", and a swaybar with ledger-swaybar in it.

With SWAYSOCK set, the bar is shown at the bottom of that desktop for a while;
its configuration stays as it is. Otherwise, or with --headless, a Sway without a
screen is started, and screenshots are written.

When it ends, nothing that it made is left but the screenshots.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.bin, err = programsIn(o.bin); err != nil {
				return err
			}
			return desktop(cmd.Context(), o)
		},
	}
	c.Flags().StringVar(&o.bin, "bin", "", "directory of ipam-ledger, ledger and ledger-swaybar (default: where ledger-lab is)")
	c.Flags().StringVar(&o.out, "out", "", "directory for the screenshots, made if it is absent (default: a new one for temporary files)")
	c.Flags().BoolVar(&o.headless, "headless", false, "start a Sway without a screen although one is running")
	c.Flags().DurationVar(&o.lasts, "for", 0, "how long pods come and go (default 8s, on a desktop of yours 1m)")
	return c
}

// show is a desktop demo on its way.
type show struct {
	*page
	o    desktopOptions
	lab  *lab
	head *swaytest.Desktop // nil on a desktop of the user's
	env  []string          // of what runs on the user's desktop
	says lastLine          // what the block says
	pods []*pod
	mu   sync.Mutex // for pods, while several nodes are at work
	made int
}

// desktop shows, step by step, and cleans up whatever happens.
func desktop(ctx context.Context, o desktopOptions) (err error) {
	began := time.Now()
	d := &show{page: &page{w: o.w, colour: o.colour}, o: o}
	for _, p := range []string{"ipam-ledger", "ledger", "ledger-swaybar"} {
		if _, err := os.Stat(filepath.Join(o.bin, p)); err != nil {
			return fmt.Errorf("looking for %s: %w; build it with make", p, err)
		}
	}
	sway := os.Getenv("SWAYSOCK")
	if sway != "" && !o.headless {
		c, err := swaytest.Dial(sway)
		if err != nil {
			return fmt.Errorf("SWAYSOCK is set, but nobody answers there: %w; --headless starts a Sway without a screen", err)
		}
		c.Close()
	} else {
		sway = ""
		if err := swaytest.Missing(); err != nil {
			return err
		}
		if err := d.folder(); err != nil {
			return err
		}
	}
	if d.o.lasts == 0 {
		d.o.lasts = 8 * time.Second
		if sway != "" {
			d.o.lasts = time.Minute
		}
	}
	if d.lab, err = newLab(o.bin, true); err != nil {
		return err
	}
	defer func() {
		cleaning := d.lab.close()
		if err == nil && cleaning == nil {
			d.farewell(time.Since(began))
			cleaning = d.err
		}
		err = errors.Join(err, cleaning)
	}()
	d.say("%s", d.paint("1", "ipam-ledger: the state of a cluster in a bar"))
	steps := []func(context.Context) error{d.begin, d.headless, d.comeAndGo, d.click, d.tamper}
	if sway != "" {
		steps = []func(context.Context) error{
			d.begin, func(ctx context.Context) error { return d.live(ctx, sway) }, d.comeAndGo, d.tamper,
		}
	}
	for i, step := range steps {
		err := guarded(func() error { return step(ctx) })
		if err == nil && o.after != nil {
			err = guarded(func() error { return o.after(i + 1) })
		}
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if err = errors.Join(err, d.err); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	if sway != "" {
		d.say("\nThe bar stays until Ctrl-C.")
		<-ctx.Done()
	}
	return nil
}

func (d *show) folder() (err error) {
	if d.o.out == "" {
		d.o.out, err = os.MkdirTemp("", "ledger-desktop-")
	} else {
		err = os.MkdirAll(d.o.out, 0o755)
	}
	if err == nil {
		d.o.out, err = filepath.Abs(d.o.out)
	}
	if err != nil {
		return fmt.Errorf("making the screenshots' directory: %w; --out names another", err)
	}
	return nil
}

// networks of the demo, and how full they get: one well used, one nearly full,
// one with room.
var networks = []struct {
	name, subnet string
	start, most  int
}{
	{"web", "10.22.0.0/25", 58, 84},
	{"batch", "10.22.4.0/26", 43, 60},
	{"db", "10.22.8.0/26", 9, 14},
}

func (d *show) begin(ctx context.Context) error {
	d.title("An etcd, three nodes, three networks", "what the desktop shows comes from etcd alone.")
	if err := d.lab.start("worker-1", "worker-2", "worker-3"); err != nil {
		return err
	}
	if out, code, err := d.lab.ledger(ctx, "init"); err != nil || code != 0 {
		return errors.Join(fmt.Errorf("ledger init: exit status %d: %s", code, out), err)
	}
	for i := range networks {
		if err := d.work(ctx, i, networks[i].start); err != nil {
			return err
		}
	}
	d.say("etcd at %s; %d pods are there.", d.lab.etcd.Endpoint(), len(d.pods))
	return nil
}

// on is the same machine with another network.
func (l *lab) on(n *node, name, subnet string) (*node, error) {
	file := filepath.Join(n.dir, "net.d", "20-"+name+".conflist")
	if err := l.writeJSON(file, map[string]any{
		"cniVersion": "1.1.0",
		"name":       name,
		"plugins": []any{map[string]any{"type": "ipam-ledger", "ipam": map[string]any{
			"type":       "ipam-ledger",
			"ranges":     [][]map[string]string{{{"subnet": subnet}}},
			"blockSize":  16,
			"configFile": filepath.Join(n.dir, "config.json"),
		}}},
	}); err != nil {
		return nil, err
	}
	other := *n
	var err error
	if other.list, err = libcni.NetworkConfFromFile(file); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return &other, nil
}

// work starts n pods of a network, those of each node one after the other.
func (d *show) work(ctx context.Context, network, n int) error {
	var nodes []*node
	for _, m := range d.lab.nodes {
		on, err := d.lab.on(m, networks[network].name, networks[network].subnet)
		if err != nil {
			return err
		}
		nodes = append(nodes, on)
	}
	return together(len(nodes), func(i int) error {
		for range (n + i) / len(nodes) {
			if err := d.add(ctx, nodes[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

func (d *show) add(ctx context.Context, n *node) error {
	d.mu.Lock()
	d.made++
	p, err := d.lab.newPod(fmt.Sprintf("%s-%d", n.list.Name, d.made), n)
	d.mu.Unlock()
	if err != nil {
		return err
	}
	if err := p.add(ctx, netip.Addr{}); err != nil {
		return err
	}
	d.mu.Lock()
	d.pods = append(d.pods, p)
	d.mu.Unlock()
	return nil
}

// headless starts a desktop without a screen.
func (d *show) headless(ctx context.Context) error {
	d.title("A Sway without a screen, with a swaybar", "the block needs no etcd and no password: the publisher tells it, over Sway's IPC.")
	var err error
	d.head, err = swaytest.Start(swaytest.Options{
		Width: desktopWidth, Height: desktopHeight,
		Programs: []string{filepath.Join(d.o.bin, "ledger"), filepath.Join(d.o.bin, "ledger-swaybar")},
		Env:      []string{"LEDGER_ENDPOINTS=" + d.lab.etcd.Endpoint()},
		Config:   fmt.Sprintf(desktopBar, "ledger-swaybar"),
	})
	if err != nil {
		return err
	}
	d.lab.later(d.head.Close)
	if err := d.start(ctx); err != nil {
		return err
	}
	return d.shoot("bar.png", true)
}

// live shows the bar on the desktop that somebody is looking at.
func (d *show) live(ctx context.Context, sway string) error {
	d.title("A bar at the bottom of this desktop", "the block needs no etcd and no password: the publisher tells it, over Sway's IPC.")
	// A runtime directory of our own: what the publisher leaves there for blocks
	// that start cold must not be taken for the state of a real cluster.
	run := filepath.Join(d.lab.dir, "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		return err
	}
	display := os.Getenv("WAYLAND_DISPLAY")
	if display == "" {
		return errors.New("SWAYSOCK is set and WAYLAND_DISPLAY is not; --headless starts a Sway without a screen")
	}
	if !filepath.IsAbs(display) {
		display = filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), display)
	}
	d.env = append(neutral(os.Environ()), "XDG_RUNTIME_DIR="+run, "WAYLAND_DISPLAY="+display,
		"LEDGER_ENDPOINTS="+d.lab.etcd.Endpoint(), "PATH="+d.o.bin+":"+os.Getenv("PATH"))
	socket, stop, err := relayBar(run, sway, filepath.Join(d.o.bin, "ledger-swaybar")+" --source "+labSource)
	if err != nil {
		return err
	}
	d.lab.later(stop)
	if err := d.start(ctx); err != nil {
		return err
	}
	if _, err := d.run(io.Discard, "swaybar", "-s", socket, "-b", barID); err != nil {
		return err
	}
	d.say("Left click: ledger top. Middle click: verify now. Wheel: pool after pool.")
	d.say("A ledger-swaybar of your own shows this, too; \"swaymsg reload\" afterwards lets it forget.")
	return nil
}

// start starts the publisher, and a block of our own that tells us what the one
// in the bar shows.
func (d *show) start(ctx context.Context) error {
	d.command("ledger publish --source " + labSource)
	if _, err := d.run(io.Discard, "ledger", "publish", "--source", labSource); err != nil {
		return err
	}
	if _, err := d.run(&d.says, "ledger-swaybar", "--format", "text", "--source", labSource); err != nil {
		return err
	}
	line, err := d.says.wait(ctx, func(line string) bool { return strings.Contains(line, "%") })
	d.say("The block says: %s", line)
	return err
}

// run starts a program on the desktop. It ends when the lab does.
func (d *show) run(out io.Writer, name string, args ...string) (*swaytest.Process, error) {
	var c *exec.Cmd
	if d.head != nil {
		c = d.head.Command(name, args...)
		c.Stdout = out
		return d.head.Start(c)
	}
	if own := filepath.Join(d.o.bin, name); name != "swaybar" {
		name = own
	}
	c = exec.Command(name, args...)
	c.Env, c.Stdout = d.env, out
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p, err := swaytest.Launch(c)
	if err != nil {
		return nil, err
	}
	d.lab.later(func() error {
		// Asked to end, so that swaybar ends its block.
		if err := p.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		select {
		case <-p.Done():
		case <-time.After(5 * time.Second):
			p.Kill()
			return fmt.Errorf("%s did not end when it was told to", name)
		}
		return nil
	})
	return p, nil
}

// comeAndGo lets pods come and go for a while.
func (d *show) comeAndGo(ctx context.Context) error {
	d.title(fmt.Sprintf("Pods come and go for %v", d.o.lasts), "each change in etcd is in the bar a moment later.")
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, d.o.lasts, errOver)
	defer cancel()
	var nodes []*node
	for _, m := range d.lab.nodes {
		for _, n := range networks {
			on, err := d.lab.on(m, n.name, n.subnet)
			if err != nil {
				return err
			}
			nodes = append(nodes, on)
		}
	}
	said := make(chan struct{})
	go func() {
		defer close(said)
		d.says.each(ctx, time.Second, func(line string) {
			d.say("%4.1f s  %s", time.Since(began).Seconds(), line)
		})
	}()
	tick := time.NewTicker(60 * time.Millisecond)
	defer tick.Stop()
	err := func() error {
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				if context.Cause(ctx) == errOver {
					return nil
				}
				return context.Cause(ctx)
			}
			if err := d.change(context.WithoutCancel(ctx), nodes); err != nil {
				return err
			}
		}
	}()
	cancel()
	<-said
	if err != nil || d.head == nil {
		return err
	}
	return d.shoot("bar-later.png", true)
}

var errOver = errors.New("the time is over")

// change starts a pod, or ends one where there are enough.
func (d *show) change(ctx context.Context, nodes []*node) error {
	n := nodes[rand.IntN(len(nodes))]
	i := slices.IndexFunc(networks, func(w struct {
		name, subnet string
		start, most  int
	},
	) bool {
		return w.name == n.list.Name
	})
	count := 0
	last := -1
	for k, p := range d.pods {
		if p.node.list.Name == n.list.Name {
			count++
			if p.node.name == n.name {
				last = k
			}
		}
	}
	if last >= 0 && (count >= networks[i].most || rand.IntN(4) == 0) {
		p := d.pods[last]
		d.pods = slices.Delete(d.pods, last, last+1)
		return p.del(ctx)
	}
	if count >= networks[i].most {
		return nil
	}
	return d.add(ctx, n)
}

// click opens the details.
func (d *show) click(ctx context.Context) error {
	d.title("A click on the block", "ledger top, in a floating window.")
	p := d.head.Pointer()
	if err := p.Move(desktopWidth-60, 10); err != nil {
		return err
	}
	if err := p.Click(swaytest.Left); err != nil {
		return err
	}
	var window swaytest.Window
	if err := swaytest.Until(func() error {
		windows, err := d.head.Windows()
		if err != nil {
			return err
		}
		for _, w := range windows {
			if w.Floating {
				window = w
				return context.Cause(ctx)
			}
		}
		return fmt.Errorf("no floating window; windows: %v", windows)
	}); err != nil {
		return err
	}
	// The dashboard fills up from etcd: two equal pictures in a row are a full one.
	if err := d.settle(ctx, window.Rect); err != nil {
		return err
	}
	if err := d.shoot("desktop.png", false); err != nil {
		return err
	}
	return p.Move(desktopWidth/2, desktopHeight-10) // off the bar
}

// settle waits until a part of the picture is no longer of one colour, and does
// not change any more.
func (d *show) settle(ctx context.Context, r swaytest.Rect) error {
	var before []byte
	return swaytest.Until(func() error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		i, err := d.picture()
		if err != nil {
			return err
		}
		part := crop(i, image.Rect(r.X, r.Y, r.X+r.Width, r.Y+r.Height))
		same := bytes.Equal(before, part.Pix)
		before = part.Pix
		colours := map[[4]byte]bool{}
		for p := range slices.Chunk(part.Pix, 4) {
			colours[[4]byte(p)] = true
		}
		if len(colours) < 16 || !same {
			return fmt.Errorf("the window is not drawn: %d colours", len(colours))
		}
		return nil
	})
}

// tamper shows what the bar says when the record is no longer whole.
func (d *show) tamper(ctx context.Context) error {
	d.title("Somebody edits one entry in etcd, behind the ledger's back", "the publisher watches: whoever looks at the bar knows at once.")
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{d.lab.etcd.Endpoint()}, Context: ctx, Logger: zap.NewNop()})
	if err != nil {
		return fmt.Errorf("connecting to etcd: %w", err)
	}
	defer c.Close()
	r, err := c.Get(ctx, keyspaceOfLab.Chains(), clientv3.WithPrefix())
	if err != nil {
		return fmt.Errorf("reading entries: %w", err)
	}
	for _, kv := range slices.Backward(r.Kvs) {
		forged := bytes.Replace(kv.Value, []byte("pod \""+namespace+"/"), []byte("pod \"elsewhere/"), 1)
		if bytes.Equal(forged, kv.Value) {
			continue
		}
		before := d.says.now()
		if _, err := c.Put(ctx, string(kv.Key), string(forged)); err != nil {
			return fmt.Errorf("putting %s: %w", kv.Key, err)
		}
		d.command("etcdctl put " + string(kv.Key) + " < forged")
		line, err := d.says.wait(ctx, func(line string) bool { return line != before && strings.Contains(strings.ToLower(line), "verif") })
		d.say("The block says: %s", line)
		if err != nil || d.head == nil {
			return err
		}
		return errors.Join(d.shoot("bar-tampered.png", true), d.shoot("desktop-tampered.png", false))
	}
	return errors.New("no entry names a pod")
}

func (d *show) picture() (image.Image, error) {
	b, err := d.head.Screenshot()
	if err != nil {
		return nil, err
	}
	i, err := png.Decode(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("reading the screenshot: %w", err)
	}
	return i, nil
}

func crop(i image.Image, r image.Rectangle) *image.RGBA {
	out := image.NewRGBA(image.Rect(0, 0, r.Dx(), r.Dy()))
	draw.Draw(out, out.Bounds(), i, r.Min, draw.Src)
	return out
}

// barHeight is enough for the bar and a little of what is below.
const barHeight = 28

// shoot writes a screenshot: of the bar alone, once it is drawn, or of all.
func (d *show) shoot(name string, barOnly bool) error {
	if barOnly {
		if err := d.settle(context.Background(), swaytest.Rect{Width: desktopWidth, Height: barHeight}); err != nil {
			return err
		}
	}
	i, err := d.picture()
	if err != nil {
		return err
	}
	if barOnly {
		i = crop(i, image.Rect(0, 0, desktopWidth, barHeight))
	}
	var b bytes.Buffer
	e := png.Encoder{CompressionLevel: png.BestCompression}
	if err := e.Encode(&b, small(i)); err != nil {
		return err
	}
	file := filepath.Join(d.o.out, name)
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		return err
	}
	d.say("Screenshot: %s", file)
	return nil
}

// small is the same picture with at most 256 colours, those it has most of. What
// is on a desktop is text and areas of one colour.
func small(i image.Image) image.Image {
	count := map[color.Color]int{}
	r := i.Bounds()
	for y := r.Min.Y; y < r.Max.Y; y++ {
		for x := r.Min.X; x < r.Max.X; x++ {
			count[i.At(x, y)]++
		}
	}
	most := slices.SortedFunc(maps.Keys(count), func(a, b color.Color) int { return cmp.Compare(count[b], count[a]) })
	out := image.NewPaletted(r, most[:min(len(most), 256)])
	draw.Draw(out, r, i, r.Min, draw.Src)
	return out
}

// farewell is said when everything is gone.
func (d *show) farewell(took time.Duration) {
	if d.o.out == "" {
		d.say("\n%s", d.paint("1", fmt.Sprintf("Done in %.1f s; no process or file is left.", took.Seconds())))
		return
	}
	d.say("\n%s", d.paint("1", fmt.Sprintf("Done in %.1f s; no process is left, and no file but the screenshots in %s.", took.Seconds(), d.o.out)))
}

// lastLine keeps the last line that was written to it.
type lastLine struct {
	mu      sync.Mutex
	rest    []byte
	line    string
	changed chan struct{} // closed at the next line
}

func (l *lastLine) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rest = append(l.rest, b...)
	for {
		n, line, err := bufio.ScanLines(l.rest, false)
		if err != nil || n == 0 {
			return len(b), nil
		}
		l.line = string(line)
		l.rest = l.rest[n:]
		if l.changed != nil {
			close(l.changed)
			l.changed = nil
		}
	}
}

func (l *lastLine) next() (string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.line, l.changed
}

func (l *lastLine) now() string {
	line, _ := l.next()
	return line
}

// wait waits for a line.
func (l *lastLine) wait(ctx context.Context, want func(string) bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		line, changed := l.next()
		if want(line) {
			return line, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return line, fmt.Errorf("the block says %q, and nothing else came", line)
		}
	}
}

// each hands on a line when it is new, but not more often than at the interval.
func (l *lastLine) each(ctx context.Context, interval time.Duration, f func(string)) {
	said := ""
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		if line := l.now(); line != said {
			f(line)
			said = line
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}
