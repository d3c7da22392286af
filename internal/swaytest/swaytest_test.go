package swaytest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// status is a status command that says how often, and how, it was clicked.
const status = `#!/bin/sh
printf '{"version":1,"click_events":true}\n[\n'
printf '[{"name":"n","full_text":"XXXXXXXXXXXXXXXX","background":"#ff0000"}],\n'
while read -r line; do
	[ "$line" = "[" ] && continue
	echo "$line" >>"$XDG_RUNTIME_DIR/clicks"
	printf '[{"name":"n","full_text":"XXXXXXXXXXXXXXXX","background":"#00ff00"}],\n'
done
`

const bar = `bar {
	id bar-0
	position top
	tray_output none
	status_command %s
}
`

func newDesktop(t *testing.T) *Desktop {
	t.Helper()
	d, err := Start(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		dir := d.Dir()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s is still there", dir)
		}
	})
	if err := d.WriteFile("bin/status", status); err != nil {
		t.Fatal(err)
	}
	if err := d.Configure(fmt.Sprintf(bar, d.Path("bin/status"))); err != nil {
		t.Fatal(err)
	}
	if err := d.Reload(); err != nil {
		t.Fatal(err)
	}
	return d
}

// drawn waits until the bar's right end has a colour.
func drawn(t *testing.T, d *Desktop, want color.RGBA) {
	t.Helper()
	err := Until(func() error {
		b, err := d.Screenshot()
		if err != nil {
			return err
		}
		i, err := png.Decode(bytes.NewReader(b))
		if err != nil {
			return err
		}
		if got := color.RGBAModel.Convert(i.At(i.Bounds().Max.X-40, 1)); got != want {
			return fmt.Errorf("the bar is %v, want %v", got, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A bar is drawn, a click arrives, sway can be restarted, and nothing is left.
func TestDesktop(t *testing.T) {
	d := newDesktop(t)
	drawn(t, d, color.RGBA{255, 0, 0, 255})
	p := d.Pointer()
	if err := p.Move(1240, 8); err != nil {
		t.Fatal(err)
	}
	if err := p.Scroll(true); err != nil {
		t.Fatal(err)
	}
	for _, b := range []Button{Left, Middle, Right} {
		if err := p.Click(b); err != nil {
			t.Fatal(err)
		}
	}
	drawn(t, d, color.RGBA{0, 255, 0, 255})
	if err := Until(func() error {
		b, err := os.ReadFile(d.Path("clicks"))
		if err != nil {
			return err
		}
		var got []int
		for _, line := range strings.Split(string(b), "\n") {
			var c struct{ Button int }
			if json.Unmarshal([]byte(strings.Trim(line, ",")), &c) == nil && c.Button != 0 {
				got = append(got, c.Button)
			}
		}
		if fmt.Sprint(got) != "[5 1 2 3]" {
			return fmt.Errorf("clicked with %v, want 5, 1, 2, 3:\n%s", got, b)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}

	if err := d.Stop(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := d.Restart(); err != nil {
		t.Fatal(err)
	}
	drawn(t, d, color.RGBA{255, 0, 0, 255})
	if got := d.Processes("sway"); len(got) != 1 {
		t.Errorf("sways: %v", got)
	}
}

// What hides from sway's end is found, named and ended.
func TestCloseNamesOrphans(t *testing.T) {
	d, err := Start(Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := d.Command("sh", "-c", "trap '' TERM HUP; sleep 98765 & exit 0")
	p, err := d.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := Until(func() error {
		if got := d.Processes("sleep"); len(got) != 1 || got[0].Command != "sleep 98765" {
			return fmt.Errorf("processes %v, want the sleep", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	old := patience
	patience = 1
	defer func() { patience = old }()
	err = d.Close()
	if err == nil || !strings.Contains(err.Error(), "sleep 98765") {
		t.Errorf("error %v does not name the orphan", err)
	}
	patience = old
	if err := Until(d.empty); err != nil {
		t.Error(err)
	}
}

// TestDialBusy: a queue that is full is waited for, a socket that is not there is not.
func TestDialBusy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sway.sock")
	if _, err := Dial(path); err == nil {
		t.Fatal("connected to nobody")
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	busy := false
	for range 8 { // fills the queue
		c, err := net.Dial("unix", path)
		if err == nil {
			defer c.Close()
		}
		busy = busy || errors.Is(err, syscall.EAGAIN)
	}
	if !busy {
		t.Fatal("the queue does not get full: this tests nothing")
	}
	connected := make(chan error, 1)
	go func() {
		c, err := Dial(path)
		if err == nil {
			c.Close()
		}
		connected <- err
	}()
	n, _, err := unix.Accept(fd) // lets one in
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(n)
	if err := <-connected; err != nil {
		t.Fatal(err)
	}
}
