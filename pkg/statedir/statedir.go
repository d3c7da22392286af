// Package statedir is what one writer remembers on its own machine: who it is,
// how far its chain had come, what it holds, and what it still has to release.
//
//	lock           flock held around view, commit and mark; released by the kernel with the process
//	key            the signing key, mode 0600, written once and fsynced
//	mark           identity and the last commit, written in place, not fsynced
//	mark.synced    the first mark of each boot and chain, fsynced
//	open           hash of a commit that was sent and whose outcome is not known yet, or "-"
//	queue/         releases that could not be committed, one file each, fsynced
//	spoilt/        releases of the queue that what stands in etcd does not let be done
//	holdings/      what each attachment was told it has, one file each
//	blocks         which blocks to look at first
//	pools/         what was known of a pool when it was nearly full, one file each
//	suspects       leases that were not on a list, see package leak
//	contact, asked time stamps, as boot ID and time since boot: last contact with
//	               etcd, last question of STATUS
//	answer         what was wrong when STATUS asked last; absent: nothing
//
// # Guarantees
//
// A process killed at any instant leaves each file whole, old or new: mark and
// open, which each commit writes, are single writes within one page, as making
// files would cost more than the commit; the others are replaced by rename. A
// power loss may leave files that are not fsynced old, empty or torn; mark carries a
// checksum, and mark.synced stands in where it does not hold. That an older mark
// comes back is harmless: whoever finds another boot than the mark's fences
// first, and the chain leads from the old mark to the head.
//
// All methods expect the lock to be held, but Lock itself, Touch, Stamp, Since, and
// Enqueue, which a release needs also where the lock cannot be had. So a queued
// release stands over the holding: that is not read while its release waits.
package statedir

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"github.com/ipam-ledger/ipam-ledger/internal/private"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/leak"
)

// DefaultPath is a node's state directory unless configured otherwise.
const DefaultPath = "/var/lib/ipam-ledger"

// ErrTorn means that neither mark nor mark.synced can be read.
var ErrTorn = errors.New("mark is unreadable")

// Dir is a state directory.
type Dir struct{ path string }

// Open makes the directory (mode 0700) if need be. It fails where that cannot be
// done or where the directory cannot be written.
func Open(path string) (*Dir, error) {
	d := &Dir{path}
	for _, p := range []string{path, d.file("queue"), d.file("spoilt"), d.file("holdings"), d.file("pools")} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, fmt.Errorf("state directory: %w", err)
		}
	}
	if err := unix.Access(path, unix.W_OK); err != nil {
		return nil, fmt.Errorf("state directory %s cannot be written: %w", path, err)
	}
	return d, nil
}

// Path is where the directory is.
func (d *Dir) Path() string { return d.path }

func (d *Dir) file(name string) string { return filepath.Join(d.path, name) }

// Lock takes the lock, waiting until ctx is done, and returns what gives it back.
func (d *Dir) Lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(d.file("lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory lock: %w", err)
	}
	if err := flock(f, unix.LOCK_EX|unix.LOCK_NB); err == nil {
		return func() { f.Close() }, nil
	}
	// A blocked flock cannot be called off. Whoever gives up leaves it to a
	// goroutine, which closes the file, and so the lock, when it gets it.
	got := make(chan error, 1)
	go func() { got <- flock(f, unix.LOCK_EX) }()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("state directory lock %s: %w", f.Name(), err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("state directory lock %s is held by another process: %w", f.Name(), ctx.Err())
	}
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// Position is where a writer is on its chain.
type Position struct {
	EtcdCluster string        `json:"etcdCluster"`
	Epoch       uint64        `json:"epoch"`
	Chain       entry.ChainID `json:"chain"`
	Seq         uint64        `json:"seq"` // 0: the chain's open may not have been committed
	Hash        entry.Hash    `json:"hash"`
	// Recovering says that the epoch was entered by a recovery; until the chain
	// has its recover entry, what the node holds may be another's.
	Recovering bool `json:"recovering,omitempty"`
	// Previous is the entry that the writer was at before, on the chain that this one
	// will continue, and Closed the close that lets it, if one does; while Seq is 0.
	Previous entry.Ref `json:"previous,omitzero"`
	Closed   entry.Ref `json:"closed,omitzero"`
}

// Mark is identity and last commit, in one file so that one write replaces both.
type Mark struct {
	Writer  string `json:"writer"`  // kind/name
	Machine string `json:"machine"` // machine ID
	Cluster string `json:"cluster"` // our cluster ID
	Position
	Revision int64 `json:"revision"` // the highest seen
	// Boot is the boot in which it was last found out what became of all that was
	// sent: nothing of an earlier boot can land any more.
	Boot string `json:"boot"`
	// Boots are those in which this directory may have written the head. It has
	// them durably before the first commit of each, so that a head of another boot
	// is another machine's.
	Boots []string `json:"boots"`
	// Before is the position to go back to where this one is that of a 'recover start'
	// which may not have come to etcd.
	Before *Position `json:"before,omitempty"`
}

// Ref is the entry at the mark; zero while Seq is 0.
func (m *Mark) Ref() entry.Ref {
	if m.Seq == 0 {
		return entry.Ref{}
	}
	return entry.Ref{Chain: m.Chain, Seq: m.Seq, Hash: m.Hash}
}

// At is the mark moved to another entry of its chain.
func (m *Mark) At(seq uint64, hash entry.Hash) Mark {
	out := *m
	out.Seq, out.Hash, out.Previous, out.Closed, out.Before = seq, hash, entry.Ref{}, entry.Ref{}, nil
	return out
}

// Back is the mark of before a 'recover start' that did not come to etcd.
func (m *Mark) Back() Mark {
	out := *m
	out.Position, out.Before = *m.Before, nil
	return out
}

// LoadMark reads the mark: nil if there is none, ErrTorn if there is none that
// can be read.
func (d *Dir) LoadMark() (*Mark, error) {
	m, err := d.readMark("mark")
	if err == nil && m != nil {
		return m, nil
	}
	s, serr := d.readMark("mark.synced")
	if serr == nil && s != nil {
		return s, nil
	}
	return nil, errors.Join(err, serr)
}

func (d *Dir) readMark(name string) (*Mark, error) {
	b, err := os.ReadFile(d.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	body, sum, ok := strings.Cut(string(b), "\n")
	sum, _, _ = strings.Cut(sum, "\n") // the rest is padding
	want := sha256.Sum256([]byte(body))
	m := new(Mark)
	if !ok || sum != hex.EncodeToString(want[:]) || json.Unmarshal([]byte(body), m) != nil {
		return nil, fmt.Errorf("%w: %s holds %d bytes that its checksum does not fit", ErrTorn, d.file(name), len(b))
	}
	return m, nil
}

// SaveMark replaces the mark. With durable it is fsynced, also under its second
// name: for the first of each boot and chain, and for identities.
func (d *Dir) SaveMark(m *Mark, durable bool) error {
	body := keyspace.Encode(m)
	sum := sha256.Sum256(body)
	b := append(append(body, '\n'), hex.EncodeToString(sum[:])+"\n"...)
	if len(b) > markSize {
		return fmt.Errorf("state directory: a mark of %d bytes: at most %d", len(b), markSize)
	}
	b = append(b, bytes.Repeat([]byte{'\n'}, markSize-len(b))...)
	if durable {
		// The second name first: a crash in between leaves a newer stand-in
		// beside an older mark, and readers prefer the mark.
		if err := d.writeSynced("mark.synced", b); err != nil {
			return err
		}
		return d.writeSynced("mark", b)
	}
	return d.overwrite("mark", b)
}

// markSize is a mark's size with its padding: one page, so that a process cannot
// be killed in the middle of writing it.
const markSize = 4096

// overwrite writes a small file in place, without fsync.
func (d *Dir) overwrite(name string, b []byte) error {
	f, err := os.OpenFile(d.file(name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// replace writes by rename, without fsync.
func (d *Dir) replace(name string, b []byte) error {
	tmp := d.file(name) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := os.Rename(tmp, d.file(name)); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

func (d *Dir) writeSynced(name string, b []byte) error {
	// renameio.WriteFile would keep the mode of a file that is there: a new key
	// would be as readable as the one it replaces.
	f, err := renameio.NewPendingFile(d.file(name), renameio.WithTempDir(d.path), renameio.WithPermissions(0o600))
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer f.Cleanup()
	if _, err := f.Write(b); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return d.sync(filepath.Dir(name))
}

// sync makes names durable.
func (d *Dir) sync(sub string) error {
	f, err := os.Open(d.file(sub))
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Key returns the signing key as a C2SP signer key, "" if there is none. A key
// that others can use is refused.
func (d *Dir) Key() (string, error) {
	b, err := private.Read(d.file("key"))
	var refused *private.Error
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case errors.As(err, &refused):
		return "", fmt.Errorf("signing key %w; if somebody may have used it, that is not enough", err)
	case err != nil:
		return "", fmt.Errorf("state directory: %w", err)
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// SaveKey writes the signing key durably.
func (d *Dir) SaveKey(skey string) error { return d.writeSynced("key", []byte(skey+"\n")) }

// Begin notes the hash of a commit that is about to be sent.
func (d *Dir) Begin(h entry.Hash) error {
	return d.overwrite("open", []byte(h.String()+"\n"))
}

// nothingOpen is as long as a hash, so that it covers one.
var nothingOpen = strings.Repeat("-", 2*sha256.Size) + "\n"

// Pending reports whether a commit's outcome is unknown.
func (d *Dir) Pending() (bool, error) {
	b, err := os.ReadFile(d.file("open"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("state directory: %w", err)
	}
	// A torn one counts. What a power loss left behind it does not: it would stay.
	return !strings.HasPrefix(string(b), nothingOpen), nil
}

// Settled notes that the outcome is known.
func (d *Dir) Settled() error {
	if pending, err := d.Pending(); err != nil || !pending {
		return err
	}
	return d.overwrite("open", []byte(nothingOpen))
}

// Queued is a release that waits for etcd.
type Queued struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Time       time.Time             `json:"time"`
	Reason     string                `json:"reason"`
	// Holds is what it was told it has, if that is known: where the attachment's key is
	// gone, it tells the addresses.
	Holds *keyspace.Attachment `json:"holds,omitempty"`
}

func nameOf(a keyspace.AttachmentID) string {
	sum := sha256.Sum256([]byte(a.String()))
	return hex.EncodeToString(sum[:16]) + ".json"
}

// Enqueue writes a release down durably. Twice is once.
func (d *Dir) Enqueue(q Queued) error {
	return d.writeSynced(filepath.Join("queue", nameOf(q.Attachment)), keyspace.Encode(q))
}

// Dequeue removes a release that has been settled.
func (d *Dir) Dequeue(a keyspace.AttachmentID) error {
	return errors.Join(d.remove("queue", a), d.remove("spoilt", a))
}

// SetAside moves a queued release to where only Spoilt finds it: what stands in
// etcd does not let it be done, and it must not keep others waiting.
func (d *Dir) SetAside(a keyspace.AttachmentID) error {
	err := os.Rename(d.file(filepath.Join("queue", nameOf(a))), d.file(filepath.Join("spoilt", nameOf(a))))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

func (d *Dir) remove(sub string, a keyspace.AttachmentID) error {
	_ = os.Remove(d.file(filepath.Join(sub, nameOf(a))) + ".new") // of a process that was killed
	if err := os.Remove(d.file(filepath.Join(sub, nameOf(a)))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Queue lists the releases that wait, those set aside included, oldest first.
func (d *Dir) Queue() ([]Queued, error) {
	q, err := readAll(d, "queue", 0, (*Queued).id, nil)
	set, serr := readAll(d, "spoilt", 0, (*Queued).id, nil)
	q = append(q, set...)
	slices.SortFunc(q, func(a, b Queued) int { return a.Time.Compare(b.Time) })
	return q, errors.Join(err, serr)
}

// Some lists at most n of the releases that wait and were not set aside. It costs
// the same however many there are. A file that cannot be read is set aside.
func (d *Dir) Some(n int) ([]Queued, error) {
	return readAll(d, "queue", n, (*Queued).id, func(name string) {
		_ = os.Rename(d.file(filepath.Join("queue", name)), d.file(filepath.Join("spoilt", name)))
	})
}

// Spoilt lists the releases that were set aside.
func (d *Dir) Spoilt() ([]Queued, error) { return readAll(d, "spoilt", 0, (*Queued).id, nil) }

func (q *Queued) id() (keyspace.AttachmentID, error) { return q.Attachment, nil }

// Waiting reads the queued release of a; nil if there is none that can be read.
func (d *Dir) Waiting(a keyspace.AttachmentID) *Queued {
	for _, sub := range []string{"queue", "spoilt"} {
		q := new(Queued)
		if b, err := os.ReadFile(d.file(filepath.Join(sub, nameOf(a)))); err == nil && keyspace.Decode(b, q) == nil && q.Attachment == a && (q.Holds == nil || q.Holds.Validate() == nil) {
			return q
		}
	}
	return nil
}

// IsQueued reports whether a release of a waits.
func (d *Dir) IsQueued(a keyspace.AttachmentID) bool {
	for _, sub := range []string{"queue", "spoilt"} {
		if _, err := os.Lstat(d.file(filepath.Join(sub, nameOf(a)))); err == nil {
			return true
		}
	}
	return false
}

// Holding is what an attachment was told it has.
type Holding struct {
	ID    keyspace.AttachmentID `json:"id"`
	Value keyspace.Attachment   `json:"value"`
	// Earlier are other acquires by which it has the same: those that a restore took
	// back, and a recovery asserted anew. Another restore may bring one back.
	Earlier []entry.Ref `json:"earlier,omitempty"`
}

// maxEarlier is how many restores a pod's lease is told apart over.
const maxEarlier = 16

// By is the holding by another acquire, of the same.
func (h Holding) By(value keyspace.Attachment) Holding {
	out := Holding{ID: h.ID, Value: value}
	for _, e := range append(h.Earlier, h.Value.Acquire) {
		if e != value.Acquire && !e.IsZero() {
			out.Earlier = append(out.Earlier, e)
		}
	}
	out.Earlier = out.Earlier[max(0, len(out.Earlier)-maxEarlier):]
	return out
}

// Acquires are all acquires by which it has what it has, the one that counts first.
func (h *Holding) Acquires() []entry.Ref {
	return append([]entry.Ref{h.Value.Acquire}, h.Earlier...)
}

// Prepare writes a holding where nothing reads it yet. Hold puts it in place. So a
// full disk is found before a commit, and not after it.
func (d *Dir) Prepare(h Holding) error {
	name := d.file(filepath.Join("holdings", nameOf(h.ID))) + ".new"
	if err := os.WriteFile(name, keyspace.Encode(h), 0o600); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Prepared reads a holding that was prepared and not put in place; nil if there is
// none that can be read.
func (d *Dir) Prepared(a keyspace.AttachmentID) *Holding {
	return d.readHolding(a, ".new")
}

// Hold puts a prepared holding in place.
func (d *Dir) Hold(a keyspace.AttachmentID) error {
	name := d.file(filepath.Join("holdings", nameOf(a)))
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Unhold forgets a holding.
func (d *Dir) Unhold(a keyspace.AttachmentID) error { return d.remove("holdings", a) }

// Holding reads one holding; nil if there is none that can be read, or if its
// release waits.
func (d *Dir) Holding(a keyspace.AttachmentID) *Holding {
	if d.IsQueued(a) {
		return nil
	}
	return d.readHolding(a, "")
}

func (d *Dir) readHolding(a keyspace.AttachmentID, suffix string) *Holding {
	h := new(Holding)
	b, err := os.ReadFile(d.file(filepath.Join("holdings", nameOf(a))) + suffix)
	if err != nil || keyspace.Decode(b, h) != nil || h.ID != a || h.Value.Validate() != nil {
		return nil
	}
	return h
}

// Holdings lists all holdings but those whose release waits. Files that a power
// loss tore are an error that names them: the recover drill must not take them
// for nothing.
func (d *Dir) Holdings() ([]Holding, error) {
	h, err := readAll(d, "holdings", 0, func(h *Holding) (keyspace.AttachmentID, error) { return h.ID, h.Value.Validate() }, nil)
	h = slices.DeleteFunc(h, func(h Holding) bool { return d.IsQueued(h.ID) })
	slices.SortFunc(h, func(a, b Holding) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return h, err
}

// readAll returns what can be read of a folder, or of the first n files in it, and
// joins the errors of what cannot, which is passed to spoilt. A file that is not
// named after its attachment would not be found to be removed.
func readAll[T any](d *Dir, sub string, n int, check func(*T) (keyspace.AttachmentID, error), spoilt func(name string)) ([]T, error) {
	f, err := os.Open(d.file(sub))
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	defer f.Close()
	var names []os.DirEntry
	for {
		some, err := f.ReadDir(max(n, 0)) // 0: all
		for _, x := range some {
			// Others are temporary files of processes that were killed.
			if strings.HasSuffix(x.Name(), ".json") {
				names = append(names, x)
			}
		}
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("state directory: %w", err)
		}
		if n <= 0 || len(names) >= n || err == io.EOF {
			break
		}
	}
	if n > 0 {
		names = names[:min(n, len(names))]
	}
	var out []T
	var errs []error
	for _, n := range names {
		b, err := os.ReadFile(d.file(filepath.Join(sub, n.Name())))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var v T
		if err == nil {
			err = keyspace.Decode(b, &v)
		}
		if err == nil {
			var id keyspace.AttachmentID
			if id, err = check(&v); err == nil && nameOf(id) != n.Name() {
				err = fmt.Errorf("it is about attachment %.300q, whose file is %s", id.String(), nameOf(id))
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("state directory: %s: %w", d.file(filepath.Join(sub, n.Name())), err))
			if spoilt != nil {
				spoilt(n.Name())
			}
			continue
		}
		out = append(out, v)
	}
	return out, errors.Join(errs...)
}

// Blocks returns the hint which blocks of a pool to look at, newest first.
func (d *Dir) Blocks(space, pool string) []netip.Prefix {
	return slices.DeleteFunc(d.blocks()[space+"/"+pool], func(p netip.Prefix) bool { return !p.IsValid() || p != p.Masked() })
}

func (d *Dir) blocks() map[string][]netip.Prefix {
	var m map[string][]netip.Prefix
	b, err := os.ReadFile(d.file("blocks"))
	if err != nil || json.Unmarshal(b, &m) != nil || m == nil {
		return map[string][]netip.Prefix{} // a hint: what cannot be read is no hint
	}
	return m
}

// SaveBlocks replaces the hint for a pool.
func (d *Dir) SaveBlocks(space, pool string, blocks []netip.Prefix) error {
	m := d.blocks()
	if slices.Equal(m[space+"/"+pool], blocks) {
		return nil
	}
	m[space+"/"+pool] = blocks
	return d.replace("blocks", keyspace.Encode(m))
}

// Pool returns what SavePool kept of a pool, nil if nothing.
func (d *Dir) Pool(space, pool string) []byte {
	b, err := os.ReadFile(d.file(poolFile(space, pool)))
	if err != nil {
		return nil
	}
	return b
}

func poolFile(space, pool string) string {
	sum := sha256.Sum256([]byte(space + "/" + pool)) // the names may be too long for a file's
	return filepath.Join("pools", hex.EncodeToString(sum[:16]))
}

// SavePool keeps what is known of a pool, in the caller's own form; nil forgets it.
// What a power loss makes of it the caller must find out.
func (d *Dir) SavePool(space, pool string, b []byte) error {
	name := poolFile(space, pool)
	if b != nil {
		return d.replace(name, b)
	}
	if err := os.Remove(d.file(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Suspects returns what SaveSuspects kept. What cannot be read is nothing: those
// leases are observed anew.
func (d *Dir) Suspects() leak.Memory {
	var out leak.Memory
	b, err := os.ReadFile(d.file("suspects"))
	if err != nil || keyspace.Decode(b, &out) != nil {
		return nil
	}
	return out
}

// SaveSuspects keeps observations for the next time.
func (d *Dir) SaveSuspects(m leak.Memory) error {
	return d.replace("suspects", keyspace.Encode(m))
}

// SaveAnswer keeps what STATUS found wrong, nil for nothing, until it asks again.
func (d *Dir) SaveAnswer(e *types.Error) error {
	if e != nil {
		return d.replace("answer", keyspace.Encode(e))
	}
	if err := os.Remove(d.file("answer")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Answer is what SaveAnswer kept; nil also where that cannot be read.
func (d *Dir) Answer() *types.Error {
	e := new(types.Error)
	b, err := os.ReadFile(d.file("answer"))
	if err != nil || keyspace.Decode(b, e) != nil || e.Code == 0 {
		return nil
	}
	return e
}

// Touch sets a time stamp ("contact" or "asked") to now.
func (d *Dir) Touch(name string) error {
	now, err := Now()
	if err != nil {
		return fmt.Errorf("state directory: %s: %w", d.file(name), err)
	}
	return d.Stamp(name, now)
}

// Stamp sets a time stamp. All of them are of one length.
func (d *Dir) Stamp(name string, at leak.Moment) error {
	return d.overwrite(name, fmt.Appendf(nil, "%s %020d\n", at.Boot, at.Since))
}

// Since says how long ago a time stamp was set; false if never in this boot. One
// of the future, or one that cannot be read, is none.
func (d *Dir) Since(name string) (time.Duration, bool) {
	b, err := os.ReadFile(d.file(name))
	if err != nil {
		return 0, false
	}
	line, _, whole := strings.Cut(string(b), "\n")
	boot, text, _ := strings.Cut(line, " ")
	at, err := strconv.ParseInt(text, 10, 64)
	now, nerr := Now()
	if !whole || err != nil || nerr != nil || boot != now.Boot || time.Duration(at) > now.Since {
		return 0, false
	}
	return now.Since - time.Duration(at), true
}

// Now is this moment. It fails where the kernel does not say which boot this is.
func Now() (leak.Moment, error) {
	boot, err := bootID()
	if err != nil {
		return leak.Moment{}, err
	}
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return leak.Moment{}, fmt.Errorf("time since boot: %w", err)
	}
	return leak.Moment{Boot: boot, Since: time.Duration(t.Nano()), Wall: time.Now().UTC().Round(0)}, nil
}

// MachineID is the ID of this machine (machine-id(5)), "none" where there is
// none: then clones cannot be told apart.
func MachineID() string {
	for _, p := range []string{"/etc/machine-id", "/var/lib/dbus/machine-id"} {
		b, err := os.ReadFile(p)
		id := strings.TrimSpace(string(b))
		if err != nil || id == "" {
			continue
		}
		if entry.ValidateName("machine", id) != nil { // it stands in entries
			sum := sha256.Sum256([]byte(id))
			id = hex.EncodeToString(sum[:16])
		}
		return id
	}
	return "none"
}

// BootID is the kernel's ID of this boot (random(4)).
func BootID() string {
	id, err := bootID()
	if err != nil {
		return "unknown"
	}
	return id
}

func bootID() (string, error) {
	const file = "/proc/sys/kernel/random/boot_id"
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("boot ID: %w", err)
	}
	id := strings.TrimSpace(string(b))
	if id == "" {
		return "", fmt.Errorf("boot ID: %s is empty", file)
	}
	return id, nil
}
