package allocator

import (
	"context"
	"errors"
)

// KV is a key as a read found it.
type KV struct {
	Key   string
	Value []byte
	Mod   int64 // mod_revision, at least 1
}

// Get is a read of one key, or of the keys from Key up to but not including End.
type Get struct {
	Key, End string
	Limit    int64 // 0: all
	// Since leaves out keys that were not written at this revision or later. What
	// was deleted since is not told: only Count shows it.
	Since int64
}

// Compare is one condition of a transaction. With End set, it must hold for
// every key of the range, and holds for a range without keys.
type Compare struct {
	Key, End string
	// Mod is the mod_revision the key must have, 0 for a key that must not
	// exist. For a range it is the highest mod_revision its keys may have, so
	// that 0 means that there are none.
	Mod int64
}

// Write puts Value at Key, or with Delete removes Key, or the range up to End.
type Write struct {
	Key, End string
	Value    []byte
	Delete   bool
}

// Txn is one transaction: all writes are done at one revision if every
// condition holds, otherwise none is.
type Txn struct {
	If   []Compare
	Then []Write
}

// Reply is what a read or transaction answered.
type Reply struct {
	Cluster   uint64 // etcd's cluster ID
	Revision  int64  // etcd's revision when it answered
	Succeeded bool   // of a Txn: the conditions held
	Ranges    []Range
}

// Range is the answer to a Get: its keys in ascending order, and whether the
// limit cut it short.
type Range struct {
	KVs   []KV
	More  bool
	Count int64 // of the keys in the range, whatever Limit and Since leave out
}

// Store is what the allocator needs of etcd. Implementations need not be safe
// for concurrent use.
type Store interface {
	// Connect returns when a connection stands. It is called before the lock
	// is taken, so that waiting for etcd holds up nobody else.
	Connect(ctx context.Context) error

	// Read answers all gets at one revision. Unless serializable, that is no
	// older than any commit that was answered before Read was called.
	Read(ctx context.Context, serializable bool, gets []Get) (*Reply, error)

	// Commit does the transaction on the connection of the last Read. An error
	// that is neither ErrNotApplied nor ErrDecided leaves the outcome unknown:
	// the transaction may have been done, may be done later, or never.
	Commit(ctx context.Context, txn Txn) (*Reply, error)
}

// Errors of a Store.
var (
	// ErrNotApplied marks an error of Commit after which the transaction has
	// not been done and never will be.
	ErrNotApplied = errors.New("not applied")
	// ErrDecided marks an error of Commit after which the transaction has been
	// done or never will be. A Read that is not serializable tells which; the
	// connection is kept for it.
	ErrDecided = errors.New("etcd does not say whether it was done")
	// ErrReconnected marks an ErrNotApplied because the connection of the last
	// Read is gone: take another view.
	ErrReconnected = errors.New("connection replaced")
	// ErrUnavailable marks that etcd could not be reached or does not answer.
	ErrUnavailable = errors.New("etcd cannot be reached")
	// ErrNoSpace marks an ErrDecided because etcd is out of space.
	ErrNoSpace = errors.New("etcd is out of space (alarm NOSPACE): compact, defragment, then 'etcdctl alarm disarm', or raise --quota-backend-bytes")
)

// Errors of the verbs. One function of the plugin maps them to CNI codes.
var (
	ErrExhausted      = errors.New("no address is free")
	ErrNotAvailable   = errors.New("requested address is not available")
	ErrNoPool         = errors.New("no such pool")
	ErrMismatch       = errors.New("attachment differs from prevResult")
	ErrIntegrity      = errors.New("ledger refuses")
	ErrNotInitialised = errors.New("ledger is not initialised")
	ErrUnknownOutcome = errors.New("not confirmed by etcd")
	ErrState          = errors.New("local state cannot be used")
	ErrConflict       = errors.New("conflict") // operators: something changed in between
	ErrNotFound       = errors.New("not found")
	ErrBefore         = errors.New("recorded already")                 // imports
	ErrEnded          = errors.New("recorded before, and ended since") // imports
)
