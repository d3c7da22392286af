package publish

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// Command is the Feed that runs a command, such as
//
//	ssh bastion ledger publish --print
//
// and takes each line that it writes for a state. It is run again when it ends,
// and when it has been silent for three of its heartbeats. What it says on its
// stderr goes to the log, last line only when it ends.
type Command struct {
	Shell string // for sh -c
}

func (c *Command) run(ctx context.Context, p *Publisher, out chan<- message) {
	wait := backoff{first: 500 * time.Millisecond, most: 30 * time.Second}
	for said := ""; ; {
		lines, err := c.once(ctx, p, out)
		if ctx.Err() != nil {
			return
		}
		if lines > 0 {
			wait.reset()
		}
		if text := err.Error(); lines > 0 || text != said {
			p.Log.Warn("the command will be run again", "err", err)
			said = text
		}
		if pass(ctx, out, lost{short(err.Error())}) != nil || wait.wait(ctx) != nil {
			return
		}
	}
}

func short(s string) string { return strings.ToValidUTF8(s[:min(len(s), state.MaxMessage)], "") }

// silence is how long a command may say nothing, before it has said how often it will.
const silence = time.Minute

func (c *Command) once(ctx context.Context, p *Publisher, out chan<- message) (lines int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, "sh", "-c", c.Shell)
	// A group of its own, so that all of it can be ended.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	said := new(lastLine)
	cmd.Stderr = said
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("command: %w", err)
	}
	quiet := time.AfterFunc(silence, func() { cancel(errors.New("the command is silent")) })
	defer quiet.Stop()
	r := bufio.NewReaderSize(stdout, state.MaxSize+1)
	var bad error
	for {
		line, rerr := r.ReadSlice('\n')
		if errors.Is(rerr, bufio.ErrBufferFull) {
			bad = fmt.Errorf("the command wrote a line of more than %d bytes", state.MaxSize)
			break
		}
		if rerr != nil {
			if !errors.Is(rerr, io.EOF) && ctx.Err() == nil {
				bad = rerr
			}
			break
		}
		kind, s, derr := state.Decode(line)
		if derr != nil || kind != state.TypeState {
			if errors.Is(derr, state.ErrVersion) {
				bad = derr
				break
			}
			// A banner, or what a login script says.
			p.Log.Warn("the command wrote a line that is no state", "line", fmt.Sprintf("%.80q", line))
			continue
		}
		lines++
		quiet.Reset(3 * time.Duration(s.Heartbeat) * time.Second)
		if pass(ctx, out, relayed{s}) != nil {
			break
		}
	}
	// One that has closed its stdout is about to tell its exit status.
	if bad != nil {
		cancel(nil)
	}
	ending := time.AfterFunc(time.Second, func() { cancel(nil) })
	werr := cmd.Wait()
	ending.Stop()
	// Whatever is left of its group.
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	var exit *exec.ExitError
	switch cause := context.Cause(ctx); {
	case bad != nil:
		return lines, bad
	case cause != nil && !errors.Is(cause, context.Canceled):
		return lines, cause
	case errors.As(werr, &exit) && exit.Exited():
		err = fmt.Errorf("the command ended with exit status %d", exit.ExitCode())
	default:
		err = errors.New("the command ended")
	}
	if text := said.String(); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return lines, err
}

// lastLine keeps the last line that was written to it, or a part of it.
type lastLine struct{ line, next []byte }

func (l *lastLine) Write(b []byte) (int, error) {
	for _, c := range b {
		switch {
		case c == '\n' || c == '\r':
			if len(l.next) > 0 {
				l.line, l.next = l.next, nil
			}
		case len(l.next) < 200 && c >= ' ' && c < 0x7f:
			l.next = append(l.next, c)
		}
	}
	return len(b), nil
}

func (l *lastLine) String() string {
	if len(l.next) > 0 {
		return string(l.next)
	}
	return string(l.line)
}
