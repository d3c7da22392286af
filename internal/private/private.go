// Package private decides whether a file that holds a secret may be used, and
// reads it.
//
// # Guarantees
//
// A file is used only if nobody but root and the user of this process can read,
// write or replace its contents by its mode and owner:
//
//   - it is a regular file (symbolic links are followed: the file that counts is
//     the one at their end);
//   - it belongs to root or to the user of this process;
//   - nobody but its owner may do anything with it (mode 0600 or less). One
//     exception, as PostgreSQL makes it: a process that is not root may use a
//     file of root that a group of the process may read (0640 or less). That is
//     how Kubernetes hands a secret to a container by fsGroup, and there is no
//     other way to hand root's file to somebody who is not root. A process of
//     root needs no group, so for it the group are others.
//
// Read looks at the file that it opened, not at whatever has its name by then.
// Errors name the file, its mode or owner, and the remedy, never its contents.
//
// # What can fail
//
// Reading; and what a mode does not say: ACLs beyond the group's, directories
// that others can write to, whoever is root.
package private

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Error says why a file is refused.
type Error struct{ text string }

func (e *Error) Error() string { return e.text }

// who is a process, as far as it matters here.
type who struct {
	uid    int
	groups []int
}

// Check refuses a file that others can use. info is of the file at the end of
// all links.
func Check(path string, info fs.FileInfo) error {
	groups, err := os.Getgroups()
	if err != nil {
		groups = nil // then none is ours
	}
	return check(path, info, who{os.Geteuid(), append(groups, os.Getegid())})
}

func check(path string, info fs.FileInfo, w who) error {
	if !info.Mode().IsRegular() {
		return &Error{path + " is not a regular file"}
	}
	allowed := fs.FileMode(0o700)
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		if st.Uid != 0 && int(st.Uid) != w.uid {
			return &Error{fmt.Sprintf("%s belongs to user %s, who can read and replace it, and this process is user %s's: run chown %s %s",
				path, userName(int(st.Uid)), userName(w.uid), userName(w.uid), path)}
		}
		if w.uid != 0 && st.Uid == 0 && slices.Contains(w.groups, int(st.Gid)) {
			allowed |= 0o040
		}
	}
	if mode := info.Mode().Perm(); mode&^allowed != 0 {
		return &Error{fmt.Sprintf("%s has mode %04o, so others can use it: run chmod 600 %s%s", path, mode, path, mounted(path))}
	}
	return nil
}

// mounted adds what helps where chmod does not: in a volume of Kubernetes, which
// is read-only, and whose files are links through a directory named "..data".
func mounted(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil && strings.Contains(real, "/..") {
		return `, or in a Kubernetes volume set "defaultMode: 0400"`
	}
	return ""
}

func userName(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return strconv.Itoa(uid)
}

// Open opens a file for reading and checks it. The file may be nil with an error
// of another kind than *Error: it could not be opened.
func Open(path string) (*os.File, error) {
	// A pipe must not hold up anybody: open without waiting, then refuse it.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = Check(path, info)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// maxSize is far above any key or password.
const maxSize = 1 << 20

// Read opens a file, checks it and returns what it holds.
func Read(path string) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err == nil && len(b) > maxSize {
		err = &Error{fmt.Sprintf("%s has more than %d bytes: that is no secret", path, maxSize)}
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}
