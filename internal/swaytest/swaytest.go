// Package swaytest runs a Sway without a screen: for the desktop's tests, and
// for the demo on a machine that has no display.
//
// It guarantees that
//
//   - sway and what runs on it belong to an ordinary user (sway refuses root): a
//     caller that is root drops to another uid, any other caller is that user;
//   - nothing of the caller's own desktop is touched: the environment is made
//     anew, with a runtime directory of its own;
//   - Close leaves no process, and says which ones had to be killed: each
//     process is known by its environment, also one that lost its parent;
//   - should the caller die, sway and what was launched here die with it.
//
// A headless Sway has no pointer, and "swaymsg seat … cursor press" reports
// success and does nothing. Here it gets one, and from the start: a program that
// is told of its first pointer while it runs may miss what happens at once.
//
// It knows the wire formats of Sway's IPC and of Wayland as far as it needs
// them, and imports nothing of this project: what it says about a program under
// test does not rest on that program.
package swaytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// nobody is the uid and gid that root drops to unless told otherwise.
const nobody = 65534

// markName is the variable by which a process on the desktop is known.
const markName = "SWAYTEST_DIR"

// patience is how long anything here may take until it counts as failed. A
// machine that is busy with other tests needs some.
var patience = 20 * time.Second

// Options say what kind of desktop.
type Options struct {
	Width, Height int      // of the output; default 1280×720
	Config        string   // further lines of sway's configuration: bar { … }, for_window …
	Env           []string // for sway and all that runs on it; the last one counts
	Programs      []string // files that are put into Dir/bin, which comes first in PATH
	UID, GID      int      // whom root drops to; default 65534
}

// Desktop is a running sway.
type Desktop struct {
	dir       string
	opts      Options
	uid, gid  int
	config    string // file name
	log       string // file name
	sway      *Process
	pointer   *Pointer
	processes []*Process // that Start started
	others    []*Desktop // further sways of the same user
}

// Missing names what a headless desktop needs and this machine does not have,
// and how to get it. It is nil when all is there.
func Missing() error {
	var absent []string
	for _, p := range []struct{ program, pkg string }{
		{"sway", "sway"}, {"swaymsg", "sway"}, {"swaybar", "sway"}, {"swaybg", "swaybg"}, {"grim", "grim"}, {"foot", "foot"},
	} {
		if _, err := exec.LookPath(p.program); err != nil && !slices.Contains(absent, p.pkg) {
			absent = append(absent, p.pkg)
		}
	}
	if absent == nil {
		return nil
	}
	return fmt.Errorf("a headless desktop needs %s: sudo apt-get install --no-install-recommends sway swaybg grim foot fonts-dejavu-core", strings.Join(absent, ", "))
}

// Start starts a sway and waits until it answers and its output is there.
func Start(o Options) (_ *Desktop, err error) {
	if err := Missing(); err != nil {
		return nil, err
	}
	if o.Width == 0 {
		o.Width, o.Height = 1280, 720
	}
	d := &Desktop{opts: o, uid: os.Getuid(), gid: os.Getgid(), config: "config", log: "sway.log"}
	if d.uid == 0 {
		if d.uid, d.gid = o.UID, o.GID; d.uid == 0 {
			d.uid, d.gid = nobody, nobody
		}
	}
	// Directly below the directory for temporary files: a socket's path has to fit
	// into 108 bytes.
	if d.dir, err = os.MkdirTemp("", "sway-"); err != nil {
		return nil, fmt.Errorf("headless sway: %w; set TMPDIR to a directory that is writable", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	if n := len(filepath.Join(d.dir, "sway-ipc.4294967295.4194304.sock")); n > 107 {
		return nil, fmt.Errorf("headless sway: %s is too long for a socket's path: set TMPDIR to a shorter one", d.dir)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(d.dir, d.uid, d.gid); err != nil {
			return nil, fmt.Errorf("headless sway: %w", err)
		}
		if closed := closedAbove(d.dir); closed != "" {
			return nil, fmt.Errorf("headless sway: %s is closed to uid %d, as whom sway runs: set TMPDIR to a directory that is open to all", closed, d.uid)
		}
	}
	if err := d.Configure(o.Config); err != nil {
		return nil, err
	}
	if err := d.install(o.Programs); err != nil {
		return nil, err
	}
	if err := d.startSway(); err != nil {
		return nil, err
	}
	return d, nil
}

// closedAbove names a directory above one that not everybody may pass, if there
// is one.
func closedAbove(dir string) string {
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		if i, err := os.Stat(dir); err != nil || i.Mode().Perm()&0o001 == 0 {
			return dir
		}
	}
	return ""
}

// Configure writes sway's configuration anew. It is read at the next Reload or
// Restart.
func (d *Desktop) Configure(lines string) error {
	// xwayland would be one more process to wait for, and nothing here needs it.
	base := fmt.Sprintf(`xwayland disable
output HEADLESS-1 resolution %dx%d position 0 0 bg #2e3440 solid_color
default_border none
default_floating_border pixel 2
focus_on_window_activation focus
exec echo "$WAYLAND_DISPLAY" >"$SWAYSOCK.display"
`, d.opts.Width, d.opts.Height)
	return d.WriteFile(d.config, base+lines+"\n")
}

// WriteFile writes a file below Dir that the desktop's user owns.
func (d *Desktop) WriteFile(name, content string) error {
	file := d.Path(name)
	for dir := filepath.Dir(file); dir != d.dir; dir = filepath.Dir(dir) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("headless sway: %w", err)
		}
		if err := d.own(dir); err != nil {
			return err
		}
	}
	if err := os.WriteFile(file, []byte(content), 0o700); err != nil {
		return fmt.Errorf("headless sway: %w", err)
	}
	return d.own(file)
}

// install puts programs where the desktop's user can reach them: a test's own
// temporary directory is closed to others.
func (d *Desktop) install(programs []string) error {
	for _, from := range programs {
		to := filepath.Join("bin", filepath.Base(from))
		if err := d.WriteFile(to, ""); err != nil {
			return err
		}
		if err := copyFile(from, d.Path(to)); err != nil {
			return fmt.Errorf("headless sway: %w", err)
		}
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func (d *Desktop) own(file string) error {
	if os.Getuid() != 0 {
		return nil
	}
	if err := os.Lchown(file, d.uid, d.gid); err != nil {
		return fmt.Errorf("headless sway: %w", err)
	}
	return nil
}

func (d *Desktop) startSway() error {
	log, err := os.OpenFile(d.Path(d.log), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("headless sway: %w", err)
	}
	defer log.Close()
	d.sway = nil // a new one must not take over the old one's names
	// No GPU, no input device, no seat: pixman draws, and noop needs no logind.
	c := d.Command("sway", "-c", d.Path(d.config))
	c.Env = append(c.Env, "WLR_BACKENDS=headless", "WLR_RENDERER=pixman", "WLR_LIBINPUT_NO_DEVICES=1", "LIBSEAT_BACKEND=noop")
	c.Stdout, c.Stderr = log, log
	if d.sway, err = Launch(c); err != nil {
		return fmt.Errorf("headless sway: %w", err)
	}
	err = Until(func() error {
		if d.sway.Ended() {
			return fatal{errors.New("sway ended")}
		}
		return d.ready()
	})
	if err == nil {
		d.pointer, err = d.plug()
	}
	if err == nil {
		err = d.pointer.Move(d.opts.Width/2, d.opts.Height/2) // off the bars
	}
	if err != nil {
		return fmt.Errorf("headless sway: %w; its log ends:\n%s", err, d.LogTail())
	}
	return nil
}

func (d *Desktop) ready() error {
	if d.display() == "" {
		return errors.New("sway made no Wayland socket")
	}
	var outputs []struct{ Active bool }
	if err := d.Ask(getOutputs, nil, &outputs); err != nil {
		return err
	}
	if len(outputs) == 0 || !outputs[0].Active {
		return errors.New("sway has no output")
	}
	return nil
}

// LogTail is the end of sway's log.
func (d *Desktop) LogTail() string {
	b, err := os.ReadFile(d.Path(d.log))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// Dir is the desktop's runtime directory and its user's home.
func (d *Desktop) Dir() string { return d.dir }

// Path is a file below Dir.
func (d *Desktop) Path(name string) string { return filepath.Join(d.dir, name) }

// Socket is where sway's IPC answers.
func (d *Desktop) Socket() string {
	return d.Path(fmt.Sprintf("sway-ipc.%d.%d.sock", d.uid, d.sway.PID()))
}

// display is the name of sway's Wayland socket, which a line of Configure told.
func (d *Desktop) display() string {
	name, err := os.ReadFile(d.Socket() + ".display")
	if err != nil {
		return "" // it is not up yet
	}
	return strings.TrimSpace(string(name))
}

// Env is the environment of a program on the desktop.
func (d *Desktop) Env() []string {
	env := []string{
		markName + "=" + d.dir, "XDG_RUNTIME_DIR=" + d.dir, "HOME=" + d.dir, "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=xterm-256color",
		"XDG_SESSION_TYPE=wayland", "XDG_CURRENT_DESKTOP=sway", "USER=desktop", "LOGNAME=desktop",
		// No settings daemon and no accessibility bus: a GTK program would wait for them.
		"GSETTINGS_BACKEND=memory", "NO_AT_BRIDGE=1", "GTK_A11Y=none",
		"PATH=" + strings.Trim(d.Path("bin")+":"+os.Getenv("PATH"), ":"),
	}
	if d.sway != nil {
		env = append(env, "SWAYSOCK="+d.Socket(), "WAYLAND_DISPLAY="+d.display())
	}
	return append(env, d.opts.Env...)
}

// Command is a program of the desktop's user, in the desktop's environment. It
// is not yet started.
func (d *Desktop) Command(name string, args ...string) *exec.Cmd {
	if own := d.Path(filepath.Join("bin", name)); !strings.Contains(name, "/") {
		if _, err := os.Stat(own); err == nil {
			name = own
		}
	}
	c := exec.Command(name, args...)
	c.Env, c.Dir = d.Env(), d.dir
	// What it started may hold its output open for longer than it lives.
	c.WaitDelay = time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(d.uid), Gid: uint32(d.gid)}
	}
	return c
}

// Start starts a command of Command. Close ends it if it still runs.
func (d *Desktop) Start(c *exec.Cmd) (*Process, error) {
	p, err := Launch(c)
	if err != nil {
		return nil, fmt.Errorf("on the headless desktop: %w", err)
	}
	d.processes = append(d.processes, p)
	return p, nil
}

// Screenshot is what the output shows, a PNG.
func (d *Desktop) Screenshot() ([]byte, error) {
	c := d.Command("grim", "-")
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	p, err := d.Start(c)
	if err != nil {
		return nil, err
	}
	if err := p.Wait(); err != nil {
		return nil, fmt.Errorf("taking a screenshot with grim: %w: %s", err, &errs)
	}
	return out.Bytes(), nil
}

// Reload lets sway read its configuration again. Its bars are replaced.
func (d *Desktop) Reload() error { return d.Run("reload") }

// Stop ends sway, and with it what cannot live without. With SIGKILL it leaves
// its sockets behind.
func (d *Desktop) Stop(s syscall.Signal) error {
	if d.pointer != nil {
		d.pointer.unplug()
		d.pointer = nil
	}
	if err := d.sway.Signal(s); err != nil {
		return err
	}
	return Until(func() error {
		if !d.sway.Ended() {
			return fmt.Errorf("sway %d still runs after %v", d.sway.PID(), s)
		}
		return nil
	})
}

// Second starts another sway of the same user, in the same runtime directory, as
// in a second login. It ends when d does.
func (d *Desktop) Second(config string) (*Desktop, error) {
	n := len(d.others) + 2
	other := &Desktop{dir: d.dir, opts: d.opts, uid: d.uid, gid: d.gid, config: fmt.Sprintf("config-%d", n), log: fmt.Sprintf("sway-%d.log", n)}
	d.others = append(d.others, other)
	if err := other.Configure(config); err != nil {
		return nil, err
	}
	return other, other.startSway()
}

// Restart starts sway again after Stop.
func (d *Desktop) Restart() error { return d.startSway() }

// Close ends everything and removes the directory. It returns an error if a
// process did not end by itself when sway did.
func (d *Desktop) Close() error {
	errs := []error{d.end()}
	errs = append(errs, Until(d.empty))
	for _, p := range d.Processes("") {
		_ = syscall.Kill(p.PID, syscall.SIGKILL) // named by the error above; it may have ended now
	}
	return errors.Join(append(errs, Until(d.empty), os.RemoveAll(d.dir))...)
}

// end ends what was started here, and sway.
func (d *Desktop) end() error {
	var errs []error
	for _, other := range d.others {
		errs = append(errs, other.end())
	}
	for _, p := range d.processes {
		p.Kill()
	}
	d.others, d.processes = nil, nil
	if d.sway != nil && !d.sway.Ended() {
		if err := d.Stop(syscall.SIGTERM); err != nil {
			errs = append(errs, err)
			d.sway.Kill()
		}
	}
	return errors.Join(errs...)
}

func (d *Desktop) empty() error {
	if left := d.Processes(""); left != nil {
		return fmt.Errorf("still running on the headless desktop: %v", left)
	}
	return nil
}

// Running is a process that runs on the desktop.
type Running struct {
	PID     int
	Command string
	State   byte // as in /proc: S, T, …
}

func (r Running) String() string { return strconv.Itoa(r.PID) + " " + r.Command }

// Processes are the processes on the desktop whose program has that name (all:
// ""), whoever started them. Zombies do not count.
func (d *Desktop) Processes(name string) []Running {
	var found []Running
	mark := []byte("\x00" + markName + "=" + d.dir + "\x00")
	files, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is well formed
	for _, f := range files {
		// Processes come and go meanwhile: what cannot be read is gone, or not ours.
		env, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(append([]byte{0}, env...), mark) {
			continue
		}
		dir := filepath.Dir(f)
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue
		}
		_, rest, ok := bytes.Cut(stat, []byte(") "))
		pid, err := strconv.Atoi(filepath.Base(dir))
		if !ok || err != nil || len(rest) == 0 || rest[0] == 'Z' {
			continue
		}
		program, _, _ := strings.Cut(string(line), "\x00")
		if name != "" && filepath.Base(program) != name {
			continue
		}
		found = append(found, Running{pid, strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")), rest[0]})
	}
	return found
}

// fatal is an error that more patience does not help.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// Until calls f until it returns nil, and gives up with its error after a while.
func Until(f func() error) error {
	var last error
	end := time.Now().Add(patience)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if last = f(); last == nil {
			return nil
		}
		if errors.As(last, new(fatal)) || time.Now().After(end) {
			return last
		}
		time.Sleep(wait)
	}
}
