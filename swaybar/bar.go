package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

const (
	// maxSources is how many clusters are shown at most.
	maxSources = 8
	// forget is after how long a silent cluster is no longer shown, if there is
	// another.
	forget = 24 * time.Hour
	// writeEvery is how often a line is written at most.
	writeEvery = 50 * time.Millisecond
)

// bar is the block at work. Its loop owns all but the inbox.
type bar struct {
	view   View
	in     *inbox
	out    *lines
	dir    string // of this program
	colors map[Level]string

	line    Line // as last rendered
	written []byte
	last    time.Time // when it was written
	clicked map[int]time.Time
	windows int

	verifying sync.Map // process groups to end with us
}

func newBar(c *Config, dir string, out *lines) *bar {
	return &bar{
		view: View{Config: c, Pools: c.View == viewPools, Link: Link{LinkNew, time.Now()}},
		in:   newInbox(), out: out, dir: dir, clicked: map[int]time.Time{},
		colors: map[Level]string{Normal: c.Colors.Normal, Warning: c.Colors.Warning, Unknown: c.Colors.Unknown, Critical: c.Colors.Critical},
	}
}

// loop runs until ctx ends.
func (b *bar) loop(ctx context.Context, a *alarm) error {
	for {
		now := time.Now()
		b.receive(now)
		next := b.last.Round(0).Add(writeEvery)
		if wait := next.Sub(now.Round(0)); wait <= 0 || wait > writeEvery { // more: the clock was set
			next = b.show(now)
		}
		if err := a.set(next); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.in.ready:
		case <-a.C:
		}
	}
}

// show writes what is to be seen, if that has changed, and says when it will.
func (b *bar) show(now time.Time) time.Time {
	b.line = Render(&b.view, now)
	format := b.view.Config.Format
	line := encode(format, &b.line, b.colors)
	if !bytes.Equal(line, b.written) {
		b.written, b.last = line, now
		b.out.write(line)
	}
	return b.line.Next
}

// receive takes over what has arrived.
func (b *bar) receive(now time.Time) {
	l := b.in.take()
	if l.link != nil {
		b.view.Link = *l.link
	}
	if l.other != nil {
		b.view.Other, b.view.OtherAt = *l.other, now
	}
	for _, s := range l.states {
		b.accept(s, now, false)
	}
	for _, s := range l.files {
		b.accept(s, now, true)
	}
	for _, r := range l.results {
		if !r.Verify {
			b.windows--
			if r.Text == "" {
				continue
			}
		}
		b.view.result(r)
	}
	for _, c := range l.clicks {
		b.click(c, now)
	}
	if l.scroll != 0 {
		b.view.Pools = l.scroll == buttonUp
	}
	b.view.Pools = b.view.Pools != l.toggle
}

// accept takes a state over, if it is newer than what is known. Ours that is
// stale gives way to any: whatever made it look new, nobody repeats it. A stale
// file says something only where nobody else does: its cluster may be history.
func (b *bar) accept(s *state.State, now time.Time, file bool) {
	v := &b.view
	if want := v.Config.Source; want != "" && s.Source != want {
		return
	}
	fresh := Source{s, now.Round(0), file}
	at, known := slices.BinarySearchFunc(v.Sources, s.Source, func(s Source, name string) int { return strings.Compare(s.State.Source, name) })
	if known {
		old := &v.Sources[at]
		if s.Newer(old.State) || old.stale(now.Round(0)) || now.Round(0).Before(old.Received) {
			*old = fresh
		}
		return
	}
	v.Sources = slices.DeleteFunc(v.Sources, func(s Source) bool {
		return now.Round(0).Sub(s.Received) > forget || s.File && s.stale(now.Round(0))
	})
	if file && s.Stale(now) && len(v.Sources) > 0 {
		return
	}
	if len(v.Sources) >= maxSources {
		// Names can be made up by the hundred; those that are alive stay.
		silent := slices.IndexFunc(v.Sources, func(s Source) bool { return s.stale(now.Round(0)) })
		if silent < 0 {
			return
		}
		v.Sources = slices.Delete(v.Sources, silent, silent+1)
	}
	at, _ = slices.BinarySearchFunc(v.Sources, s.Source, func(s Source, name string) int { return strings.Compare(s.State.Source, name) })
	v.Sources = slices.Insert(v.Sources, at, fresh)
}

// result replaces the last one of its kind.
func (v *View) result(r Result) {
	v.Results = slices.DeleteFunc(v.Results, func(old Result) bool { return old.Source == r.Source && old.Verify == r.Verify })
	v.Results = append(v.Results, r)
	if len(v.Results) > 2*maxSources {
		v.Results = v.Results[1:]
	}
}

// click does what a click asks for.
func (b *bar) click(c click, now time.Time) {
	if since := now.Sub(b.clicked[c.Button]); since >= 0 && since < clickEvery {
		return
	}
	b.clicked[c.Button] = now
	var on Block
	if i := slices.IndexFunc(b.line.Blocks, func(b Block) bool { return b.Instance == c.Instance }); i >= 0 {
		on = b.line.Blocks[i]
	}
	if on.Source == "" && len(b.view.Sources) > 0 { // on a note, or a signal
		on.Source = b.view.Sources[0].State.Source
	}
	commands := &b.view.Config.Clicks
	switch c.Button {
	case buttonLeft:
		b.window(commands.Left, on.Source, "", "")
	case buttonRight:
		b.window(commands.Right, on.Source, on.Space, on.Pool)
	case buttonMiddle:
		b.verify(commands.Middle, on.Source, now)
	}
}

// window opens a window, unless there are enough.
func (b *bar) window(command []string, source, space, pool string) {
	if len(command) == 0 || b.windows >= maxWindows {
		return
	}
	b.windows++
	go func() {
		began := time.Now()
		r := Result{Source: source}
		cmd, err := start(context.Background(), command, b.dir, source, space, pool)
		if err == nil {
			err = cmd.Wait()
			var exit *exec.ExitError
			if time.Since(began) > early || errors.As(err, &exit) && (!exit.Exited() || exit.ExitCode() >= 128) {
				err = nil // it was open, and somebody closed it
			}
			if err != nil {
				r.Text = filepath.Base(command[0]) + ": " + err.Error()
			}
		} else {
			r.Text = err.Error()
		}
		r.At = time.Now()
		b.in.put(func(l *letter) { l.results = append(l.results, r) })
	}()
}

// verify starts a verification of a cluster, unless there is one.
func (b *bar) verify(command []string, source string, now time.Time) {
	running := func(r Result) bool { return r.Running && r.Source == source }
	if len(command) == 0 || slices.ContainsFunc(b.view.Results, running) {
		return
	}
	b.view.result(Result{Source: source, Verify: true, Running: true, At: now})
	most := time.Duration(b.view.Config.Clicks.VerifySeconds) * time.Second
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), most)
		defer cancel()
		r := Result{Source: source, Verify: true}
		cmd, err := start(ctx, command, b.dir, source, "", "")
		if err == nil {
			b.verifying.Store(cmd.Process.Pid, true)
			err = cmd.Wait()
			b.verifying.Delete(cmd.Process.Pid)
		}
		var exit *exec.ExitError
		switch {
		case ctx.Err() != nil:
			r.Text = "verification took longer than " + most.String()
		case errors.As(err, &exit) && exit.Exited():
			r.Status = exit.ExitCode()
		case err != nil:
			r.Text = err.Error()
		}
		r.At = time.Now()
		b.in.put(func(l *letter) { l.results = append(l.results, r) })
	}()
}

// end ends what must not outlive us: nobody would see a verification's result.
func (b *bar) end() {
	b.verifying.Range(func(pid, _ any) bool {
		_ = syscall.Kill(-pid.(int), syscall.SIGTERM) // it may have ended
		return true
	})
}

// lines writes lines to a reader that may be slow: what he has not taken is
// replaced by what is newer.
type lines struct {
	w         io.Writer
	start     string // in the same write as the first line
	separator string // between lines
	next      chan []byte
}

func newLines(w io.Writer, format string) *lines {
	l := &lines{w: w, next: make(chan []byte, 1)}
	if format == formatI3bar {
		l.start, l.separator = i3barHeader, ","
	}
	return l
}

// write has one caller.
func (l *lines) write(line []byte) {
	select {
	case <-l.next:
	default:
	}
	l.next <- line
}

// run writes until that fails.
func (l *lines) run() error {
	before := l.start
	for line := range l.next {
		if _, err := l.w.Write(append([]byte(before), line...)); err != nil {
			return err
		}
		before = l.separator
	}
	return nil
}
