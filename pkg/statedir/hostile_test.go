package statedir

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// names are the files of a state directory.
var names = []string{"mark", "mark.synced", "open", "key", "blocks", "queue/one.json", "holdings/one.json"}

// FuzzFiles puts any bytes where a file of the state directory should be. What is
// read is what was written, or an error that names the file; a mark that is
// damaged is never believed, and a commit that may be open never forgotten.
func FuzzFiles(f *testing.F) {
	whole := func(name string) []byte {
		d := filled(f)
		b, err := os.ReadFile(d.file(place(d, name)))
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	for i, name := range names {
		b := whole(name)
		f.Add(byte(i), b)
		f.Add(byte(i), b[:len(b)/2])
		f.Add(byte(i), make([]byte, len(b)))
		f.Add(byte(i), []byte(nil))
		f.Add(byte(i), []byte("null"))
		f.Add(byte(i), []byte("{}"))
	}
	f.Add(byte(4), []byte(`{"default/p":["","10.0.0.0/99","::/0"]}`))
	f.Add(byte(5), []byte(`{"attachment":{"node":"b","network":"n","container":"1","interface":"eth0"},"time":"2026-11-20T14:00:00Z","reason":"\u001b[2J"}`))
	d := filled(f)
	mark, queued, held := read(f, d)
	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		d := filled(t)
		name := place(d, names[int(which)%len(names)])
		old, err := os.ReadFile(d.file(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d.file(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		same := string(old) == string(b)

		m, err := d.LoadMark()
		switch {
		case err != nil:
			t.Fatalf("one mark was damaged, and none is read: %v", err)
		case name == "mark" && !reflect.DeepEqual(m, mark) && m.Seq != 1:
			// Whoever can write a checksum can write any mark; a fuzzer cannot but
			// by changing what the checksum is not of.
			t.Fatalf("a damaged mark is read: %+v", m)
		case name != "mark" && !reflect.DeepEqual(m, mark):
			t.Fatalf("mark %+v, want %+v", m, mark)
		}
		pending, err := d.Pending()
		if err != nil || name != "open" && !pending || name == "open" && !pending && !strings.HasPrefix(string(b), nothingOpen) {
			t.Fatalf("open %q: %v, %v", b, pending, err)
		}
		if k, err := d.Key(); err != nil || name != "key" && k != "secret" || strings.TrimSuffix(string(b), "\n") != k && name == "key" {
			t.Fatalf("key %q, %v", k, err)
		}
		q, err := d.Queue()
		if !strings.HasPrefix(name, "queue/") {
			if err != nil || len(q) != 1 || !reflect.DeepEqual(&q[0], queued) {
				t.Fatalf("queue %+v, %v", q, err)
			}
		} else if err == nil && (len(q) != 1 || nameOf(q[0].Attachment) != filepath.Base(name)) || err != nil && (len(q) != 0 || !strings.Contains(err.Error(), name)) {
			// Who settles it would not find the file again.
			t.Fatalf("queue %+v, %v of %q", q, err, b)
		}
		h, err := d.Holdings()
		if !strings.HasPrefix(name, "holdings/") {
			if err != nil || len(h) != 1 || h[0].ID != held.ID {
				t.Fatalf("holdings %+v, %v", h, err)
			}
		} else if err == nil && (len(h) != 1 || nameOf(h[0].ID) != filepath.Base(name) || h[0].Value.Validate() != nil) || err != nil && (len(h) != 0 || !strings.Contains(err.Error(), name)) {
			t.Fatalf("holdings %+v, %v of %q", h, err, b)
		}
		if one := d.Holding(held.ID); one != nil && (one.ID != held.ID || one.Value.Validate() != nil) || one == nil && same {
			t.Fatalf("holding %+v", one)
		}
		for _, p := range d.Blocks("default", "p") {
			if !p.IsValid() || p != p.Masked() {
				t.Fatalf("the hint is %v", p)
			}
		}
		// Whatever it was, it can be written again.
		if err := errors.Join(d.SaveMark(mark, false), d.Settled(), d.SaveBlocks("default", "p", nil), d.Dequeue(queued.Attachment), d.Unhold(held.ID), d.SaveKey("secret")); err != nil {
			t.Fatal(err)
		}
		if m, err := d.LoadMark(); err != nil || !reflect.DeepEqual(m, mark) {
			t.Fatalf("written again: %+v, %v", m, err)
		}
		if pending, err := d.Pending(); err != nil || pending {
			t.Fatalf("settled: %v, %v", pending, err)
		}
	})
}

// filled is a state directory in which everything is. It is written plainly, as
// nothing here is about power losses.
func filled(t testing.TB) *Dir {
	d, err := Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	id := keyspace.AttachmentID{Node: "a", Network: "n", Container: "1", Interface: "eth0"}
	var v keyspace.Attachment
	if err := keyspace.Decode([]byte(`{"space":"default","pool":"p","leases":[{"address":"10.0.0.2/24"}],"acquire":"`+entry.Ref{Seq: 3}.String()+`"}`), &v); err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) {
		if err := os.WriteFile(d.file(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(d.SaveMark(mark(1), false))
	b, err := os.ReadFile(d.file("mark"))
	must(err)
	write("mark.synced", b)
	must(d.SaveMark(mark(5), false))
	must(d.Begin(entry.Hash{1}))
	write("key", []byte("secret\n"))
	write("blocks", []byte(`{"default/p":["10.0.0.0/26"]}`))
	write("queue/"+nameOf(id), keyspace.Encode(Queued{Attachment: id, Time: time.Date(2026, 11, 20, 14, 0, 0, 0, time.UTC), Reason: "r"}))
	other := id // a release that waits stands over a holding
	other.Container = "2"
	must(d.Prepare(Holding{ID: other, Value: v}))
	must(d.Hold(other))
	return d
}

// place is where a file is: those of attachments are named after them.
func place(d *Dir, name string) string {
	dir, file := filepath.Split(name)
	if file != "one.json" {
		return name
	}
	all, err := filepath.Glob(d.file(dir) + "/*.json")
	if err != nil || len(all) != 1 {
		panic("no one file in " + dir)
	}
	return dir + filepath.Base(all[0])
}

func read(t testing.TB, d *Dir) (*Mark, *Queued, *Holding) {
	m, err := d.LoadMark()
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.Queue()
	if err != nil || len(q) != 1 {
		t.Fatal(q, err)
	}
	h, err := d.Holdings()
	if err != nil || len(h) != 1 {
		t.Fatal(h, err)
	}
	return m, &q[0], &h[0]
}
