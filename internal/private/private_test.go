package private

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// file is a file that need not be there.
type file struct {
	mode     fs.FileMode
	uid, gid uint32
}

func (f file) Name() string       { return "f" }
func (f file) Size() int64        { return 1 }
func (f file) Mode() fs.FileMode  { return f.mode }
func (f file) ModTime() time.Time { return time.Time{} }
func (f file) IsDir() bool        { return f.mode.IsDir() }
func (f file) Sys() any           { return &syscall.Stat_t{Uid: f.uid, Gid: f.gid} }

func TestCheck(t *testing.T) {
	root, alice := who{0, []int{0, 999}}, who{4711, []int{4711, 999}}
	for _, tc := range []struct {
		file
		who
		want string // "": used
	}{
		{file{0o600, 0, 0}, root, ""},
		{file{0o400, 0, 0}, root, ""},
		{file{0o700, 0, 0}, root, ""},
		{file{0o600, 4711, 4711}, alice, ""},
		{file{0o600, 0, 0}, alice, ""}, // the kernel decides
		// The group is the way by which a container gets it.
		{file{0o640, 0, 999}, alice, ""},
		{file{0o440, 0, 999}, alice, ""},
		{file{0o640, 0, 998}, alice, "mode 0640"}, // not ours
		{file{0o660, 0, 999}, alice, "mode 0660"},
		{file{0o650, 0, 999}, alice, "mode 0650"},
		{file{0o644, 0, 999}, alice, "mode 0644"},
		{file{0o640, 4711, 999}, alice, "mode 0640"}, // we could have made it 0600
		{file{0o640, 0, 999}, root, "mode 0640"},     // root needs no group
		{file{0o604, 0, 0}, root, "mode 0604"},
		{file{0o601, 0, 0}, root, "mode 0601"},
		{file{0o620, 0, 0}, root, "mode 0620"},
		{file{0o666, 4711, 4711}, alice, "mode 0666"},
		{file{0o600, 4711, 0}, root, "belongs to user 4711"},
		{file{0o600, 4712, 4711}, alice, "belongs to user 4712"},
		{file{0o600 | fs.ModeNamedPipe, 0, 0}, root, "not a regular file"},
		{file{0o700 | fs.ModeDir, 0, 0}, root, "not a regular file"},
	} {
		err := check("/k", tc.file, tc.who)
		name := fmt.Sprintf("%v of %d:%d, seen by %d", tc.mode, tc.file.uid, tc.gid, tc.who.uid)
		var refused *Error
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		case strings.HasPrefix(tc.want, "mode") && !strings.HasSuffix(err.Error(), "run chmod 600 /k"):
			t.Errorf("%s: no remedy in %v", name, err)
		}
	}
}

// TestRead: what counts is the file at the end of the links.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// As the kubelet lays a volume out.
	must(os.Mkdir(filepath.Join(dir, "..2026_11_20"), 0o755))
	target := filepath.Join(dir, "..2026_11_20", "tls.key")
	must(os.WriteFile(target, []byte("secret"), 0o600))
	must(os.Symlink("..2026_11_20", filepath.Join(dir, "..data")))
	link := filepath.Join(dir, "tls.key")
	must(os.Symlink("..data/tls.key", link))
	if b, err := Read(link); err != nil || string(b) != "secret" {
		t.Errorf("%q, %v", b, err)
	}
	must(os.Chmod(target, 0o644))
	_, err := Read(link)
	if want := link + " has mode 0644, so others can use it: run chmod 600 " + link + `, or in a Kubernetes volume set "defaultMode: 0400"`; err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if _, err := Read(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	pipe := filepath.Join(dir, "pipe")
	must(syscall.Mkfifo(pipe, 0o600))
	if _, err := Read(pipe); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Error(err)
	}
	large := filepath.Join(dir, "large")
	must(os.WriteFile(large, make([]byte, maxSize+1), 0o600))
	if _, err := Read(large); err == nil || !strings.Contains(err.Error(), "no secret") {
		t.Error(err)
	}
}
