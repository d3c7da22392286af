// Package desktop runs the real publisher, the real block and the real
// dashboard on a real Sway with a real swaybar, as an ordinary user, against a
// real etcd, and takes each of them away in turn.
//
// What the bar draws is compared, pixel by pixel, with what a second bar draws
// that is told what to say; what is said is compared with what etcd holds. When
// a test ends, its ledger must verify and no process may be left.
//
// Screenshots are kept in bin/screenshots.
package desktop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/internal/swaytest"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// programs is where the programs under test were built.
var programs string

func TestMain(m *testing.M) { os.Exit(buildAndRun(m)) }

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "ledger-desktop-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs = dir
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/",
		"../../../cmd/ledger", "../../../cmd/ledger-lab", "../../../plugins/ipam-ledger")
	bar := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "ledger-swaybar"), "../../../swaybar")
	for _, c := range []*exec.Cmd{build, bar} {
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%v: %v\n%s", c, err, out)
			return 1
		}
	}
	return m.Run()
}

// The output, and the bar on it.
const (
	width, height = 1280, 720
	barHeight     = 24
	source        = "prod"
)

// bars are the bar under test, above, and below the one that is told what to
// say. Beside their status commands they are equal.
const bars = `
for_window [app_id="ipam-float"] floating enable, resize set width 1000 height 560, move position center
bar {
	id bar-0
	position top
	height 24
	font pango:DejaVu Sans Mono 11
	tray_output none
	status_command ledger-swaybar
}
bar {
	id twin
	position bottom
	height 24
	font pango:DejaVu Sans Mono 11
	tray_output none
	status_command exec tail -n +1 -f "$XDG_RUNTIME_DIR/twin"
}
`

// world is a cluster and a desktop that looks at it.
type world struct {
	t    *testing.T
	etcd *etcdtest.Etcd
	keys keyspace.Keys
	desk *swaytest.Desktop
	node *allocator.Writer
	pool map[string]*allocator.Pool
	held map[string][]keyspace.AttachmentID // by network
	n    int
	// verifies is what ledger verify exits with in the end.
	verifies int
}

// options of a world.
type options struct {
	config string // of sway; default: bars
	block  string // swaybar.toml
}

// newWorld starts an etcd with a ledger and a desktop. Nothing publishes yet.
func newWorld(t *testing.T, o options) *world {
	t.Helper()
	w := &world{t: t, etcd: etcdtest.Start(t), pool: map[string]*allocator.Pool{}, held: map[string][]keyspace.AttachmentID{}}
	var err error
	if w.keys, err = keyspace.New(keyspace.DefaultPrefix); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	w.ledger(dir, 0, "init")
	t.Cleanup(func() { w.ledger(dir, w.verifies, "verify") })
	sd, err := statedir.Open(filepath.Join(dir, "node"))
	if err != nil {
		t.Fatal(err)
	}
	store := etcdstore.New(etcdstore.Config{Endpoints: []string{w.etcd.Endpoint()}})
	t.Cleanup(func() { store.Close() })
	w.node, err = allocator.NewWriter(allocator.Config{
		Writer: entry.Writer{Kind: entry.KindNode, Name: "worker-1"}, Store: store, Dir: sd, Keys: w.keys,
	})
	if err != nil {
		t.Fatal(err)
	}

	if o.config == "" {
		o.config = bars
	}
	w.desk, err = swaytest.Start(swaytest.Options{
		Width: width, Height: height,
		Programs: []string{filepath.Join(programs, "ledger"), filepath.Join(programs, "ledger-swaybar"), filepath.Join(programs, "ledger-lab"), filepath.Join(programs, "ipam-ledger")},
		Env:      []string{"LEDGER_ENDPOINTS=" + w.etcd.Endpoint(), "TZ=UTC"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			w.keep("failed")
			t.Logf("sway's log ends:\n%s", w.desk.LogTail())
		}
		if nag := w.desk.Processes("swaynag"); nag != nil {
			t.Errorf("sway complains about its configuration: %v", nag)
		}
		if err := w.desk.Close(); err != nil {
			t.Error(err)
		}
	})
	w.must(w.desk.WriteFile("twin", header))
	if o.block != "" {
		w.must(w.desk.WriteFile(".config/ipam-ledger/swaybar.toml", o.block))
	}
	w.must(w.desk.Configure(o.config))
	w.must(w.desk.Reload())
	return w
}

// header is how the twin's status line begins. Its first line is an empty one.
const header = `{"version":1,"click_events":true}` + "\n[\n[]\n"

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// until waits for a condition.
func (w *world) until(f func() error) {
	w.t.Helper()
	w.must(swaytest.Until(f))
}

// ledger runs a command of the operator, who is not on the desktop.
func (w *world) ledger(dir string, want int, args ...string) string {
	w.t.Helper()
	c := exec.Command(filepath.Join(programs, "ledger"), args...)
	c.Env = []string{"LEDGER_ENDPOINTS=" + w.etcd.Endpoint(), "LEDGER_CONFIG=", "HOME=" + dir, "PATH=" + os.Getenv("PATH"), "USER=test"}
	out, err := c.CombinedOutput()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		w.t.Fatal(err)
	}
	if got := c.ProcessState.ExitCode(); got != want {
		w.t.Errorf("ledger %s: exit status %d, want %d:\n%s", strings.Join(args, " "), got, want, out)
	}
	return string(out)
}

// network makes a network with a subnet, for acquire.
func (w *world) network(name, subnet string) {
	w.t.Helper()
	p := netip.MustParsePrefix(subnet)
	gateway := p.Addr().Next()
	last := gateway
	for next := last.Next(); p.Contains(next.Next()); next = next.Next() {
		last = next
	}
	pool, err := allocator.NewPool("default", name, [][]keyspace.Range{{{Subnet: p, Start: gateway, End: last, Gateway: gateway}}}, nil, false, 0, 0)
	w.must(err)
	w.pool[name] = pool
}

// acquire gives n further attachments of a network their addresses.
func (w *world) acquire(network string, n int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	for range n {
		w.n++
		id := keyspace.AttachmentID{Node: "worker-1", Network: network, Container: fmt.Sprintf("c%08d", w.n), Interface: "eth0"}
		_, err := w.node.Acquire(ctx, allocator.Request{ID: id, Pool: w.pool[network], Pod: fmt.Sprintf("shop/web-%d", w.n)})
		w.must(err)
		w.held[network] = append(w.held[network], id)
	}
}

// release takes the addresses of the first n attachments.
func (w *world) release(network string, n int) {
	w.t.Helper()
	for _, id := range w.held[network][:n] {
		w.must(w.node.Release(w.t.Context(), id, "DEL"))
	}
	w.held[network] = w.held[network][n:]
}

// leases counts what etcd holds, whatever anybody believes.
func (w *world) leases(network string) int {
	w.t.Helper()
	r, err := w.etcd.Client(w.t).Get(w.t.Context(), w.keys.Prefix()+"attachments/worker-1/"+network+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	w.must(err)
	return int(r.Count)
}

// says is what the block says of a network with what etcd holds.
func (w *world) says(network string) string {
	w.t.Helper()
	return fmt.Sprintf(" %s %d/", network, w.leases(network))
}

// publish starts a publisher and returns when it runs.
func (w *world) publish(args ...string) *swaytest.Process {
	w.t.Helper()
	c := w.desk.Command("ledger", append([]string{"publish", "--source", source}, args...)...)
	errs := &logged{t: w.t, name: "publish"}
	c.Stdout, c.Stderr = errs, errs
	p, err := w.desk.Start(c)
	w.must(err)
	w.t.Cleanup(errs.stop)
	return p
}

// line is one line of output, and when it came.
type line struct {
	raw  string
	text string // what a reader sees of it
	at   time.Time
	by   *observer
}

// visible is what a line of the i3bar dialect shows. Other lines show themselves.
func visible(raw string) string {
	var blocks []struct {
		Text string `json:"full_text"`
	}
	if err := json.Unmarshal([]byte(strings.TrimPrefix(raw, ",")), &blocks); err != nil {
		return raw
	}
	var texts []string
	for _, b := range blocks {
		texts = append(texts, html.UnescapeString(b.Text))
	}
	return strings.Join(texts, " | ")
}

// observer is a block that is in no bar: what it says, the block in the bar says
// too.
type observer struct {
	w     *world
	p     *swaytest.Process
	mu    sync.Mutex
	lines []line
	came  chan struct{} // closed at the next line
}

// observe starts a block.
func (w *world) observe(args ...string) *observer {
	w.t.Helper()
	return w.observeOn(w.desk, args...)
}

func (w *world) observeOn(desk *swaytest.Desktop, args ...string) *observer {
	w.t.Helper()
	r, out, err := os.Pipe()
	w.must(err)
	c := desk.Command("ledger-swaybar", args...)
	errs := &logged{t: w.t, name: "block"}
	c.Stdout, c.Stderr = out, errs
	stdin, err := c.StdinPipe()
	w.must(err)
	o := &observer{w: w, came: make(chan struct{})}
	o.p, err = desk.Start(c)
	out.Close()
	w.must(err)
	w.t.Cleanup(func() { errs.stop(); stdin.Close() })
	go func() {
		defer r.Close()
		for s := bufio.NewReader(r); ; {
			raw, err := s.ReadString('\n')
			if err != nil {
				return
			}
			o.mu.Lock()
			o.lines = append(o.lines, line{raw, visible(raw), time.Now(), o})
			close(o.came)
			o.came = make(chan struct{})
			o.mu.Unlock()
		}
	}()
	return o
}

// last is the last line, and a channel that is closed when there is another.
func (o *observer) last() (line, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.lines) == 0 {
		return line{}, o.came
	}
	return o.lines[len(o.lines)-1], o.came
}

// wait waits until the block says something.
func (o *observer) wait(want string) line {
	o.w.t.Helper()
	return o.match(regexp.QuoteMeta(want))
}

func (o *observer) match(want string) line {
	o.w.t.Helper()
	re := regexp.MustCompile(want)
	timeout := time.After(30 * time.Second)
	for {
		l, came := o.last()
		if re.MatchString(l.text) {
			return l
		}
		select {
		case <-came:
		case <-timeout:
			o.w.t.Fatalf("the block says %q, want %q", l.text, want)
		}
	}
}

// count is how many lines came.
func (o *observer) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.lines)
}

// picture is what the output shows.
func (w *world) picture() (*image.RGBA, error) {
	b, err := w.desk.Screenshot()
	if err != nil {
		return nil, err
	}
	i, err := png.Decode(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	out := image.NewRGBA(i.Bounds())
	draw.Draw(out, out.Bounds(), i, i.Bounds().Min, draw.Src)
	return out, nil
}

// rows are some rows of a picture.
func rows(i *image.RGBA, from, to int) []byte { return i.Pix[i.PixOffset(0, from):i.PixOffset(0, to)] }

// colours are how many pixels of each colour there are.
func colours(pix []byte) map[color.RGBA]int {
	n := map[color.RGBA]int{}
	for p := 0; p+3 < len(pix); p += 4 {
		n[color.RGBA{pix[p], pix[p+1], pix[p+2], pix[p+3]}]++
	}
	return n
}

// draws waits until the bar draws exactly what a bar draws that is told to say
// the line (of the i3bar dialect), and keeps a screenshot.
func (w *world) draws(l line, name string) {
	w.t.Helper()
	show := func() {
		f, err := os.OpenFile(w.desk.Path("twin"), os.O_WRONLY|os.O_APPEND, 0)
		w.must(err)
		_, err = io.WriteString(f, ","+strings.TrimPrefix(l.raw, ","))
		w.must(errors.Join(err, f.Close()))
	}
	show()
	w.until(func() error {
		i, err := w.picture()
		if err != nil {
			return err
		}
		bar, twin := rows(i, 0, barHeight), rows(i, height-barHeight, height)
		// The left third has nothing but the workspace's button.
		if n := len(colours(bar)); n < 12 {
			return fmt.Errorf("%s: the bar shows no text: it has %d colours", name, n)
		}
		if !bytes.Equal(bar, twin) {
			// The bar has moved on where the block has something newer to say.
			if newer, _ := l.by.last(); newer.raw != l.raw {
				l = newer
				show()
			}
			return fmt.Errorf("%s: the bar does not draw what %q looks like", name, l.text)
		}
		return nil
	})
	w.keep(name)
}

// keep keeps a screenshot.
func (w *world) keep(name string) {
	b, err := w.desk.Screenshot()
	if err != nil {
		w.t.Error(err)
		return
	}
	dir := filepath.Join("..", "..", "..", "bin", "screenshots")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		dir = w.t.ArtifactDir() // a tree that must not be written to
	}
	file := filepath.Join(dir, strings.ReplaceAll(w.t.Name(), "/", "-")+"-"+name+".png")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		w.t.Error(err)
	}
}

// logged writes what a program says into the test's log, until the test ends.
type logged struct {
	t    *testing.T
	name string
	mu   sync.Mutex
	over bool
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.over {
		l.t.Logf("%s: %s", l.name, bytes.TrimRight(b, "\n"))
	}
	return len(b), nil
}

func (l *logged) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = true
}

// lastEntry is the key of the node's last entry.
func (w *world) lastEntry() string {
	w.t.Helper()
	r, err := w.etcd.Client(w.t).Get(w.t.Context(), w.keys.Chains()+"node/worker-1/", clientv3.WithPrefix(), clientv3.WithKeysOnly(),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(1))
	w.must(err)
	if len(r.Kvs) == 0 {
		w.t.Fatal("worker-1 has no entry")
	}
	return string(r.Kvs[0].Key)
}
