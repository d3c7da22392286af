package audit

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExportBytes freezes the format byte by byte.
func TestExportBytes(t *testing.T) {
	l := newLedger(t)
	l.put(l.keys.Meta(), []byte("{}"))
	l.kv[l.keys.Meta()].Lease = 0x1122334455667788
	l.put(l.keys.Chains()+"x", []byte("entry"))
	var want []byte
	add := func(s string) { want = append(want, s...) }
	u32 := func(n uint32) { want = binary.BigEndian.AppendUint32(want, n) }
	u64 := func(nn ...uint64) {
		for _, n := range nn {
			want = binary.BigEndian.AppendUint64(want, n)
		}
	}
	add("ipam-ledger/export/v1\n")
	h := `{"prefix":"/ipam-ledger/v1/","etcdCluster":"cafe00000000beef","revision":102,"taken":"2026-11-20T14:00:01.123456789Z"}`
	add("H")
	u32(0)
	u32(uint32(len(h)))
	add(h)
	add("E")
	u32(24)
	u32(5)
	u64(102, 102, 1, 0)
	add("/ipam-ledger/v1/chains/xentry")
	add("S")
	u32(20)
	u32(2)
	u64(101, 101, 1, 0x1122334455667788)
	add("/ipam-ledger/v1/meta{}")
	sum := crc32.Checksum(want, crc32.MakeTable(crc32.Castagnoli))
	z := `{"entries":1,"state":1,"crc32c":"` + fmt.Sprintf("%08x", sum) + `"}`
	add("Z")
	u32(0)
	u32(uint32(len(z)))
	add(z)
	if got := export(t, l); !bytes.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
}

// TestExportTruncated cuts an export everywhere: it is never taken for whole.
func TestExportTruncated(t *testing.T) {
	whole := export(t, story(t))
	for n := 0; n < len(whole); n += 1 + n/50 {
		err := verifyBytes(whole[:n], nil)
		if err == nil || !strings.Contains(err.Error(), "offset") && n > len(exportMagic) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
}

// verifyBytes opens and verifies an export in memory.
func verifyBytes(b []byte, into **Report) error {
	e, err := newExport(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return err
	}
	r, err := Verify(context.Background(), e, Options{Workers: 1})
	if into != nil {
		*into = r
	}
	return err
}

// TestExportFlipped changes bytes everywhere: it is found, or refused.
func TestExportFlipped(t *testing.T) {
	whole := export(t, story(t))
	for i := 0; i < len(whole); i += 23 {
		b := bytes.Clone(whole)
		b[i] ^= 0x01
		var r *Report
		if err := verifyBytes(b, &r); err == nil && r.ExitCode() != ExitFindings {
			t.Fatalf("byte %d: exit %d", i, r.ExitCode())
		}
	}
}

func TestExportStrict(t *testing.T) {
	whole := export(t, story(t))
	frame := func(kind byte, key, value int) []byte {
		b := []byte{kind}
		b = binary.BigEndian.AppendUint32(b, uint32(key))
		return binary.BigEndian.AppendUint32(b, uint32(value))
	}
	h := len(exportMagic) + 9 + int(binary.BigEndian.Uint32(whole[len(exportMagic)+5:]))
	insert := func(at int, b []byte) []byte { return bytes.Join([][]byte{whole[:at], b, whole[at:]}, nil) }
	z := bytes.LastIndexByte(whole, 'Z')
	for !bytes.HasPrefix(whole[z+9:], []byte(`{"entries"`)) {
		z = bytes.LastIndexByte(whole[:z], 'Z')
	}
	for _, c := range []struct {
		name, want string
		b          []byte
	}{
		{"empty", "not an export", nil},
		{"another version", "not an export", bytes.Replace(whole, []byte("/v1\n"), []byte("/v2\n"), 1)},
		{"two headers", "frame 'H' among the entries", insert(h, whole[len(exportMagic):h])},
		{"unknown frame", "where a frame", insert(h, []byte("Q"))},
		{"long key", "at most 2097152", insert(h, frame('E', 2<<20+1, 1))},
		{"long value", "at most 2097152 and 2097152", insert(h, frame('E', 1, 2<<20+1))},
		{"header with a key", "has a key", insert(len(exportMagic), frame('H', 1, 1))},
		{"no header", "is due", append(bytes.Clone(whole[:len(exportMagic)]), whole[h:]...)},
		{"entry after state", "frame 'E' among the state", insert(z, whole[h:h+9+32+int(binary.BigEndian.Uint32(whole[h+1:]))+int(binary.BigEndian.Uint32(whole[h+5:]))])},
		{"header that is no JSON", "header", bytes.Replace(whole, []byte(`{"prefix"`), []byte(`{"prefix `), 1)},
	} {
		if err := verifyBytes(c.b, nil); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.name, err, c.want)
		}
	}
	// State first: the source finds its way.
	e := exportOf(t, whole)
	n := 0
	if err := e.State(context.Background(), func(Record) error { n++; return nil }); err != nil || n == 0 {
		t.Fatalf("State: %d, %v", n, err)
	}
	// An export of an export is the same export.
	if again := export(t, e); !bytes.Equal(again, whole) {
		t.Error("an export of an export differs")
	}
	if _, err := OpenExport(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(err) {
		t.Errorf("no file: %v", err)
	}
	if _, err := OpenExport(t.TempDir()); err == nil {
		t.Error("a directory is opened")
	}
	l := newLedger(t)
	l.put("/ipam-ledger/v1/"+strings.Repeat("x", 1<<20), nil) // anybody who may write can keep nobody from an export
	if err := WriteExport(context.Background(), &bytes.Buffer{}, l); err != nil {
		t.Error(err)
	}
	l.put("/ipam-ledger/v1/"+strings.Repeat("x", 2<<20), nil)
	if err := WriteExport(context.Background(), &bytes.Buffer{}, l); err == nil {
		t.Error("a key too long for an export is written")
	}
}

func FuzzOpenExport(f *testing.F) {
	l := newLedger(f)
	f.Add(export(f, l))
	l.meta(l.writer(ann), "running")
	l.acquire(l.writer(nodeA), att("a", "c1"), "10.22.7.2", "fd00::2")
	whole := export(f, l)
	f.Add(whole)
	f.Add(whole[:len(whole)/2])
	f.Add(append(bytes.Clone(whole), 'x'))
	f.Add([]byte(exportMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r *Report
		if err := verifyBytes(b, &r); err != nil {
			return
		}
		if r.ExitCode() == ExitVerified && len(b) == 0 {
			t.Fatal("nothing verifies")
		}
		// What was read once reads alike again.
		var again *Report
		if err := verifyBytes(b, &again); err != nil || again.ExitCode() != r.ExitCode() || again.FindingCount != r.FindingCount {
			t.Fatalf("again: %v, %+v and %+v", err, again, r)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	l := newLedger(f)
	f.Add(l.writer(nodeA).vkey + "\n# x\n" + l.writer(nodeB).vkey)
	f.Add("node/a+00000000+AAAA")
	f.Add("")
	f.Fuzz(func(t *testing.T, s string) {
		ring, err := ParseKeys(strings.NewReader(s))
		if err != nil {
			return
		}
		for k := range ring.keys {
			if !strings.Contains(s, k) {
				t.Fatalf("key %q is not in %q", k, s)
			}
		}
	})
}
