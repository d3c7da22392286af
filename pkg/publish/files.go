package publish

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/renameio/v2"

	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

// ErrLocked says that another publisher sends for the source.
var ErrLocked = errors.New("another publisher runs")

// Lock keeps others from publishing for a source. The kernel
// releases it when the process dies.
type Lock struct{ file *os.File }

// TakeLock takes the lock of a source, or says who has it.
func TakeLock(dir, source string) (*Lock, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	path := filepath.Join(dir, "publish-"+source+".lock")
	// The file stays: who removed it could remove another's.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		b := make([]byte, 20)
		n, _ := f.ReadAt(b, 0)
		who := "a process"
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n]))); err == nil {
			who = "process " + strconv.Itoa(pid)
		}
		return nil, fmt.Errorf("%w: %s publishes source %q already, and holds %s", ErrLocked, who, source, path)
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // for people: the lock does not depend on it
	}
	return &Lock{f}, nil
}

// Release releases the lock. A nil Lock has none.
func (l *Lock) Release() {
	if l != nil {
		l.file.Close()
	}
}

// stateFile is where a source's state is kept for those who start late.
func stateFile(dir, source string) string { return filepath.Join(dir, "state-"+source+".json") }

// writeState replaces the source's file, and state.json, which is whoever
// published last. A reader sees the old or the new one whole.
func writeState(dir, source string, b []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b = append(b[:len(b):len(b)], '\n')
	for _, path := range []string{stateFile(dir, source), filepath.Join(dir, "state.json")} {
		if err := renameio.WriteFile(path, b, 0o600, renameio.IgnoreUmask()); err != nil {
			return err
		}
	}
	return nil
}

// readState is what was last published of a source, if it can be read.
func readState(dir, source string) *state.State {
	b, err := os.ReadFile(stateFile(dir, source))
	if err != nil {
		return nil
	}
	kind, s, err := state.Decode(b)
	if err != nil || kind != state.TypeState || s.Source != source {
		return nil
	}
	return s
}
