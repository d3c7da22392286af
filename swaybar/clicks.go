package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// Buttons.
const (
	buttonLeft   = 1
	buttonMiddle = 2
	buttonRight  = 3
	buttonUp     = 4
	buttonDown   = 5
)

const (
	// maxClicks is how many clicks wait for the loop at most.
	maxClicks = 16
	// clickEvery is how often one button does something; what comes faster is one
	// click, as a double click is.
	clickEvery = 400 * time.Millisecond
	// maxWindows is how many windows that clicks opened may be open.
	maxWindows = 4
	// early is how soon a window ends that could not open.
	early = 5 * time.Second
)

// click is what swaybar tells of a click.
type click struct {
	Name     string `json:"name"`
	Instance string `json:"instance"`
	Button   int    `json:"button"`
}

// readClicks reads until the end of in, however fast and whatever comes: a bar
// that could not get rid of its clicks would stop working.
func readClicks(in io.Reader, got func(click)) {
	lines := bufio.NewReaderSize(in, 4096)
	for tooLong := false; ; {
		line, err := lines.ReadSlice('\n')
		var c click
		if !tooLong && err == nil && json.Unmarshal(bytes.TrimLeft(line, "[, \t"), &c) == nil && c.Name == i3barName {
			got(c)
		}
		tooLong = errors.Is(err, bufio.ErrBufferFull)
		if err != nil && !tooLong {
			return
		}
	}
}

// addClick adds a click to those that wait. Equal ones become one.
func addClick(waiting []click, c click) []click {
	if len(waiting) >= maxClicks || slices.Contains(waiting, c) {
		return waiting
	}
	return append(waiting, c)
}

// environ is a command's environment. What was clicked may come from anybody in
// the session, and so it is put there and nowhere else.
func environ(base []string, dir, source, space, pool string) []string {
	env := slices.DeleteFunc(slices.Clone(base), func(s string) bool {
		return strings.HasPrefix(s, "LEDGER_SOURCE=") || strings.HasPrefix(s, "LEDGER_SPACE=") || strings.HasPrefix(s, "LEDGER_POOL=")
	})
	path := false
	for i, s := range env {
		if strings.HasPrefix(s, "PATH=") {
			env[i], path = s+":"+dir, true
		}
	}
	if !path {
		env = append(env, "PATH=/usr/local/bin:/usr/bin:/bin:"+dir)
	}
	for _, v := range [][2]string{{"LEDGER_SOURCE", source}, {"LEDGER_SPACE", space}, {"LEDGER_POOL", pool}} {
		if v[1] != "" && strings.IndexFunc(v[1], func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
			env = append(env, v[0]+"="+v[1])
		}
	}
	return env
}

// find finds a program in $PATH, and else beside this one.
func find(program, dir string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil && !strings.Contains(program, "/") {
		if beside, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return beside, nil
		}
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", fmt.Errorf("%s: not found", program)
	}
	return path, err
}

// start starts a command in a session of its own, so that a bar's reload does not
// end it.
func start(ctx context.Context, command []string, dir, source, space, pool string) (*exec.Cmd, error) {
	program, err := find(command[0], dir)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, program, command[1:]...)
	cmd.Args[0] = command[0]
	cmd.Env = environ(os.Environ(), dir, source, space, pool)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	return cmd, cmd.Start()
}
