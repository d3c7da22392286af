package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"strings"
	"sync"

	"golang.org/x/mod/sumdb/note"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Records are read by one goroutine, worked on in batches by several (parsing,
// hashing, comparing), and consumed by one, in order. Batches are reused, so
// that reading millions of records allocates next to nothing; whoever keeps
// something of an item must copy it.

const (
	batchItems = 512
	batchBytes = 512 << 10
)

type batch struct {
	buf   []byte // of each record: key, a zero byte, value
	items []item
	n     int
	done  chan struct{}
	sigs  []sigTask
}

// item is one record and what a worker found out about it.
type item struct {
	ord                         int64 // position in the stream, from 0
	keyAt, valAt, end           int   // in the batch's buf
	create, mod, version, lease int64

	// Set by the worker.
	key      string // below the prefix; shares the batch's memory
	val      []byte // stored bytes
	keyBytes []byte // of a live key, in full
	badKey   error
	writer   string // kind/name, of the key
	chain    entry.ChainID
	seq      uint64
	hash     entry.Hash
	e        entry.Entry
	err      error // of parsing; ErrVersion for a newer version
}

type sigTask struct {
	it  *item
	key note.Verifier
}

func (b *batch) add(ord int64, r *Record) {
	if b.n == len(b.items) {
		b.items = append(b.items, item{})
	}
	it := &b.items[b.n]
	b.n++
	it.ord, it.create, it.mod, it.version, it.lease = ord, r.Create, r.Mod, r.Version, r.Lease
	it.keyAt = len(b.buf)
	b.buf = append(b.buf, r.Key...)
	b.buf = append(b.buf, 0) // RFC 6962's prefix of a leaf: hashed with the value
	it.valAt = len(b.buf)
	b.buf = append(b.buf, r.Value...)
	it.end = len(b.buf)
}

func (b *batch) full() bool { return b.n >= batchItems || len(b.buf) >= batchBytes }

// each reads all records of a stream, has work called for each batch on one of
// n workers, and then consume, in order, on this goroutine. consume returns
// whether the batch may be reused at once.
func each(ctx context.Context, n int, stream func(context.Context, func(Record) error) error, work func(*batch), consume func(*batch) (free bool), pool *batchPool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		todo    = make(chan *batch, n)
		ordered = make(chan *batch, 4*n)
		wg      sync.WaitGroup
		readErr error
	)
	for range n {
		wg.Go(func() {
			for b := range todo {
				work(b)
				b.done <- struct{}{}
			}
		})
	}
	wg.Go(func() {
		defer close(ordered)
		defer close(todo)
		b := pool.get()
		send := func() error {
			for _, c := range []chan *batch{ordered, todo} {
				select {
				case c <- b:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		}
		var ord int64
		readErr = stream(ctx, func(r Record) error {
			b.add(ord, &r)
			ord++
			if !b.full() {
				return nil
			}
			if err := send(); err != nil {
				return err
			}
			b = pool.get()
			return nil
		})
		if readErr == nil && b.n > 0 {
			readErr = send()
		}
	})
	for b := range ordered {
		if ctx.Err() != nil {
			break
		}
		select {
		case <-b.done:
		case <-ctx.Done():
			continue // a batch that was queued here and never reached a worker
		}
		if consume(b) {
			pool.put(b)
		}
	}
	cancel0 := ctx.Err()
	cancel()
	for range ordered { // let the reader end
	}
	wg.Wait()
	if readErr != nil {
		return readErr
	}
	return cancel0
}

type batchPool struct{ free chan *batch }

func newBatchPool(n int) *batchPool { return &batchPool{make(chan *batch, n)} }

func (p *batchPool) get() *batch {
	select {
	case b := <-p.free:
		return b
	default:
		return &batch{buf: make([]byte, 0, batchBytes+entry.MaxSize), done: make(chan struct{}, 1)}
	}
}

func (p *batchPool) put(b *batch) {
	b.buf, b.n, b.sigs = b.buf[:0], 0, b.sigs[:0]
	select {
	case p.free <- b:
	default:
	}
}

// parseEntry is a worker's part of one entry.
func (it *item) parseEntry(prefix string, keys keyspace.Keys, buf []byte) {
	it.key = view(buf[it.keyAt : it.valAt-1])
	it.val = buf[it.valAt:it.end:it.end]
	it.badKey = it.parseKey(prefix, keys)
	it.hash = sha256.Sum256(buf[it.valAt-1 : it.end])
	it.err = entry.ParseInto(view(it.val), &it.e)
}

// parseKey reads chains/KIND/NAME/CHAIN/SEQ without allocating; for the error it
// asks package keyspace.
func (it *item) parseKey(prefix string, keys keyspace.Keys) error {
	full := it.key
	const tail = 1 + 32 + 1 + 16
	rel, ok := strings.CutPrefix(full, prefix)
	if ok {
		it.key = rel
	}
	w, isChain := strings.CutPrefix(rel, "chains/")
	if ok && isChain && len(w) > tail {
		writer, rest := w[:len(w)-tail], w[len(w)-tail:]
		chain, okChain := unhex16(rest[1:33])
		hi, okHi := unhex8(rest[34:42])
		lo, okLo := unhex8(rest[42:50])
		if rest[0] == '/' && rest[33] == '/' && okChain && okHi && okLo && strings.Count(writer, "/") == 1 {
			if _, err := entry.ParseWriter(writer); err == nil {
				it.writer, it.chain, it.seq = writer, chain, uint64(hi)<<32|uint64(lo)
				return nil
			}
		}
	}
	k, err := keys.Parse(full)
	switch {
	case err != nil:
		return err
	case k.Kind != "chains":
		return errors.New("it stands among the entries")
	}
	return errors.New("its spelling is another")
}

func unhex8(s string) (n uint32, ok bool) {
	for i := range 8 {
		d := hexDigit[s[i]]
		if d > 15 {
			return 0, false
		}
		n = n<<4 | uint32(d)
	}
	return n, true
}

func unhex16(s string) (c entry.ChainID, ok bool) {
	for i := range c {
		hi, lo := hexDigit[s[2*i]], hexDigit[s[2*i+1]]
		if hi|lo > 15 {
			return c, false
		}
		c[i] = hi<<4 | lo
	}
	return c, true
}

var hexDigit = func() (t [256]byte) {
	for i := range t {
		t[i] = 0xff
	}
	for i, c := range []byte("0123456789abcdef") {
		t[c] = byte(i)
	}
	return t
}()

// signedText is what of stored bytes the signature is over.
func signedText(stored []byte) []byte {
	for i := len(stored) - 2; i >= 0; i-- {
		if stored[i] == '\n' && stored[i+1] == '\n' {
			return stored[:i+1]
		}
	}
	return nil
}

// clone copies an item so that it may be kept: its record into memory of its
// own, parsed again.
func (it *item) clone(prefix string, keys keyspace.Keys, b *batch) *item {
	c := &item{ord: it.ord, create: it.create, mod: it.mod, version: it.version, lease: it.lease}
	buf := append([]byte(nil), b.buf[it.keyAt:it.end]...)
	c.valAt, c.end = it.valAt-it.keyAt, len(buf)
	c.parseEntry(prefix, keys, buf)
	return c
}
