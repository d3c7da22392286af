package audit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"unsafe"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

const (
	exportMagic = "ipam-ledger/export/v1\n"
	frameHead   = 9
	frameRevs   = 32
	maxKey      = 2 << 20 // whatever stands in etcd
	maxValue    = 2 << 20
	readChunk   = 1 << 20
)

// end is the value of the frame Z.
type end struct {
	Entries int64  `json:"entries"`
	State   int64  `json:"state"`
	CRC32C  string `json:"crc32c"` // 8 hex digits
}

// newSum is the checksum of an export's bytes: CRC-32C (RFC 9260, appendix A). It
// finds accidents of storage, at a tenth of what SHA-256 costs; what people change
// is found by the entries' own hashes and signatures, and by the replay.
func newSum() hash.Hash { return crc32.New(crc32.MakeTable(crc32.Castagnoli)) }

// WriteExport writes an export of src to w. A reader can tell a truncated
// export from a whole one; making the file durable is the caller's.
func WriteExport(ctx context.Context, w io.Writer, src Source) error {
	sum := newSum()
	out := bufio.NewWriterSize(w, readChunk)
	var head [frameHead + frameRevs]byte
	frame := func(t byte, r *Record) error {
		if len(r.Key) > maxKey || len(r.Value) > maxValue {
			return fmt.Errorf("key %.100q with %d bytes and a value of %d: an export holds at most %d and %d", r.Key, len(r.Key), len(r.Value), maxKey, maxValue)
		}
		h := append(head[:0], t)
		h = binary.BigEndian.AppendUint32(h, uint32(len(r.Key)))
		h = binary.BigEndian.AppendUint32(h, uint32(len(r.Value)))
		if t == 'E' || t == 'S' {
			for _, n := range [...]int64{r.Create, r.Mod, r.Version, r.Lease} {
				h = binary.BigEndian.AppendUint64(h, uint64(n))
			}
		}
		if t != 'Z' {
			sum.Write(h)
			io.WriteString(sum, r.Key)
			sum.Write(r.Value)
		}
		out.Write(h) // bufio keeps the first error for Flush
		out.WriteString(r.Key)
		_, err := out.Write(r.Value)
		return err
	}
	snap, err := json.Marshal(src.Snapshot())
	if err != nil {
		return err
	}
	io.WriteString(sum, exportMagic)
	out.WriteString(exportMagic)
	if err := frame('H', &Record{Value: snap}); err != nil {
		return err
	}
	var z end
	if err := src.Entries(ctx, func(r Record) error { z.Entries++; return frame('E', &r) }); err != nil {
		return err
	}
	if err := src.State(ctx, func(r Record) error { z.State++; return frame('S', &r) }); err != nil {
		return err
	}
	z.CRC32C = hex.EncodeToString(sum.Sum(nil))
	value, err := json.Marshal(z)
	if err != nil {
		return err
	}
	if err := frame('Z', &Record{Value: value}); err != nil {
		return err
	}
	return out.Flush()
}

// Export is a Source that reads an export. Its methods fail, naming the offset,
// where the file is truncated or its frames make no sense. That its checksum
// holds and nothing follows it is known, and reported by Verify, once it has
// been read to its end.
type Export struct {
	r    io.ReaderAt
	c    io.Closer
	size int64
	snap Snapshot
	body int64 // offset of the first frame after H

	mu       sync.Mutex
	state    int64     // offset of the first frame after the last E; 0: not known yet
	entries  int64     // E frames
	sum      hash.Hash // of all bytes before state
	findings []Finding // known once State has been read
}

// OpenExport opens an export and reads its header.
func OpenExport(path string) (*Export, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is not a regular file; an export is read more than once, so write it to a file first")
	}
	var e *Export
	if err == nil {
		e, err = newExport(f, st.Size())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("export %s: %w", path, err)
	}
	e.c = f
	return e, nil
}

func newExport(r io.ReaderAt, size int64) (*Export, error) {
	e := &Export{r: r, size: size}
	f := e.frames(0, newSum())
	magic, err := f.take(len(exportMagic))
	if err != nil || string(magic) != exportMagic {
		return nil, fmt.Errorf("not an export of version 1: it does not start with %q", exportMagic)
	}
	t, rec, err := f.next()
	if err != nil {
		return nil, err
	}
	if t != 'H' {
		return nil, fmt.Errorf("offset %d: frame %q where the header H is due", len(exportMagic), t)
	}
	if err := keyspace.Decode(rec.Value, &e.snap); err != nil {
		return nil, fmt.Errorf("offset %d: header: %w", len(exportMagic), err)
	}
	e.body = f.offset()
	return e, nil
}

// Close closes the file.
func (e *Export) Close() error {
	if e.c == nil {
		return nil
	}
	return e.c.Close()
}

// Snapshot implements Source.
func (e *Export) Snapshot() Snapshot { return e.snap }

// Entries implements Source.
func (e *Export) Entries(ctx context.Context, f func(Record) error) error {
	e.mu.Lock()
	known := e.state != 0
	e.mu.Unlock()
	fr := e.frames(e.body, nil)
	if !known {
		fr = e.frames(0, newSum())
		if err := fr.skip(e.body); err != nil {
			return err
		}
	}
	fr.ctx = ctx
	var n int64
	for {
		at := fr.offset()
		t, rec, err := fr.next()
		if err != nil {
			return err
		}
		switch t {
		case 'E':
			n++
			if err := f(rec); err != nil {
				return err
			}
			continue
		case 'S', 'Z':
		default:
			return fmt.Errorf("offset %d: frame %q among the entries", at, t)
		}
		if !known {
			fr.start = fr.frame // the frame just read is not part of it
			fr.account()
			e.mu.Lock()
			e.state, e.entries, e.sum = at, n, fr.sum
			e.mu.Unlock()
		}
		return nil
	}
}

// State implements Source.
func (e *Export) State(ctx context.Context, f func(Record) error) error {
	e.mu.Lock()
	known := e.state != 0
	e.mu.Unlock()
	if !known {
		if err := e.Entries(ctx, func(Record) error { return nil }); err != nil {
			return err
		}
	}
	e.mu.Lock()
	sum, err := e.sum.(hash.Cloner).Clone()
	entries := e.entries
	fr := e.frames(e.state, sum)
	e.mu.Unlock()
	if err != nil {
		return fmt.Errorf("continuing a checksum: %w", err)
	}
	fr.ctx = ctx
	var n int64
	for {
		at := fr.offset()
		t, rec, err := fr.next()
		if err != nil {
			return err
		}
		switch t {
		case 'S':
			n++
			if err := f(rec); err != nil {
				return err
			}
		case 'Z':
			value := bytes.Clone(rec.Value)
			after := fr.offset()
			fr.start = fr.frame
			fr.account()
			found := e.check(at, value, end{entries, n, hex.EncodeToString(fr.sum.Sum(nil))})
			if after != e.size {
				found = append(found, Finding{
					Code: TrailingData, Where: fmt.Sprintf("offset %d", after), Detail: "bytes follow the end of the export",
					Want: fmt.Sprintf("%d bytes", after), Got: fmt.Sprintf("%d bytes", e.size),
				})
			}
			e.mu.Lock()
			e.findings = found
			e.mu.Unlock()
			return nil
		default:
			return fmt.Errorf("offset %d: frame %q among the state", at, t)
		}
	}
}

func (e *Export) check(at int64, value []byte, have end) []Finding {
	where := fmt.Sprintf("offset %d", at)
	var z end
	if err := keyspace.Decode(value, &z); err != nil {
		return []Finding{{Code: ArchiveCorrupt, Where: where, Detail: "frame Z: " + err.Error()}}
	}
	var out []Finding
	if z.Entries != have.Entries || z.State != have.State {
		out = append(out, Finding{
			Code: ArchiveCorrupt, Where: where, Detail: "frame Z counts other frames than there are",
			Want: fmt.Sprintf("%d entries, %d others", z.Entries, z.State), Got: fmt.Sprintf("%d entries, %d others", have.Entries, have.State),
		})
	}
	if z.CRC32C != have.CRC32C {
		out = append(out, Finding{Code: ArchiveCorrupt, Where: where, Detail: "CRC-32C of all bytes before", Want: z.CRC32C, Got: have.CRC32C})
	}
	return out
}

// archiveFindings are what is wrong with the file itself, once it was read.
func (e *Export) archiveFindings() []Finding {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.findings
}

// frames reads frames from an offset on. What it hands out is valid until the
// next call.
type frames struct {
	e      *Export
	ctx    context.Context
	buf    []byte
	base   int64 // offset in the file of buf[0]
	start  int   // first byte not taken yet
	frame  int   // where the last frame started
	sum    hash.Hash
	summed int // bytes of buf that are in sum
	eof    bool
}

func (e *Export) frames(off int64, sum hash.Hash) *frames {
	return &frames{e: e, ctx: context.Background(), base: off, sum: sum, buf: make([]byte, 0, readChunk+readChunk/4)}
}

func (f *frames) offset() int64 { return f.base + int64(f.start) }

// account adds to the checksum what was taken.
func (f *frames) account() {
	if f.sum != nil && f.start > f.summed {
		f.sum.Write(f.buf[f.summed:f.start])
	}
	f.summed = f.start
}

// fill makes n bytes available from start on.
func (f *frames) fill(n int) error {
	if len(f.buf)-f.start >= n {
		return nil
	}
	if err := f.ctx.Err(); err != nil {
		return err
	}
	// Only whole frames are added to the sum, and a frame is kept whole.
	keep := min(f.frame, f.start)
	at := f.start
	f.start = keep
	f.account()
	f.start = at - keep
	f.frame -= keep
	f.base += int64(keep)
	f.summed = 0
	size := max(readChunk, f.start+n)
	rest := len(f.buf) - keep
	if cap(f.buf) < size {
		bigger := make([]byte, rest, size+readChunk/4)
		copy(bigger, f.buf[keep:])
		f.buf = bigger
	} else {
		f.buf = f.buf[:copy(f.buf[:rest], f.buf[keep:])]
	}
	for len(f.buf)-f.start < n && !f.eof {
		got, err := f.e.r.ReadAt(f.buf[len(f.buf):cap(f.buf)], f.base+int64(len(f.buf)))
		f.buf = f.buf[:len(f.buf)+got]
		switch {
		case errors.Is(err, io.EOF):
			f.eof = true
		case err != nil:
			return fmt.Errorf("offset %d: %w", f.base+int64(len(f.buf)), err)
		}
	}
	if len(f.buf)-f.start < n {
		return fmt.Errorf("offset %d: the export ends here, inside the frame at offset %d: it is truncated", f.base+int64(len(f.buf)), f.base+int64(f.frame))
	}
	return nil
}

func (f *frames) take(n int) ([]byte, error) {
	if err := f.fill(n); err != nil {
		return nil, err
	}
	b := f.buf[f.start : f.start+n : f.start+n]
	f.start += n
	return b, nil
}

func (f *frames) skip(to int64) error {
	f.frame = f.start
	_, err := f.take(int(to - f.offset()))
	return err
}

// next reads one frame. The record's key and value are the buffer's.
func (f *frames) next() (byte, Record, error) {
	f.frame = f.start
	if err := f.fill(frameHead); err != nil {
		return 0, Record{}, err
	}
	h := f.buf[f.start:]
	t := h[0]
	k, v := binary.BigEndian.Uint32(h[1:]), binary.BigEndian.Uint32(h[5:])
	n := frameHead
	switch t {
	case 'E', 'S':
		n += frameRevs
	case 'H', 'Z':
		if k != 0 {
			return 0, Record{}, fmt.Errorf("offset %d: frame %q has a key", f.offset(), t)
		}
	default:
		return 0, Record{}, fmt.Errorf("offset %d: byte %#02x where a frame H, E, S or Z is due", f.offset(), t)
	}
	if k > maxKey || v > maxValue {
		return 0, Record{}, fmt.Errorf("offset %d: a frame with a key of %d bytes and a value of %d: at most %d and %d", f.offset(), k, v, maxKey, maxValue)
	}
	b, err := f.take(n + int(k) + int(v))
	if err != nil {
		return 0, Record{}, err
	}
	var r Record
	if n > frameHead {
		r.Create = int64(binary.BigEndian.Uint64(b[9:]))
		r.Mod = int64(binary.BigEndian.Uint64(b[17:]))
		r.Version = int64(binary.BigEndian.Uint64(b[25:]))
		r.Lease = int64(binary.BigEndian.Uint64(b[33:]))
		r.Key = view(b[n : n+int(k)])
	}
	r.Value = b[n+int(k):]
	return t, r, nil
}

// view is a string that shares b's memory and is valid as long as b is unchanged.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
