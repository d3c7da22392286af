// Package allocator assigns pod addresses from pools kept in etcd.
//
// At every etcd revision:
//
//	I1  an address in an address space is held by at most one attachment;
//	I2  an attachment holds at most one address per range set;
//	I3  each change of holder commits in the same transaction as exactly one
//	    audit entry;
//	I4  an entry, once committed, is never rewritten;
//
// and across time:
//
//	I5  nobody allocates from an etcd that has gone back in time.
//
// # How
//
// Every verb is one loop: take a view (one read), let a pure function plan
// against it, commit the plan in one transaction that compares all it was
// decided on, and after a conflict plan again from a fresh view.
//
//	view    view.go    reads, and checks what it read against the mark (I5)
//	plan    plan.go    which addresses, which block; no context, clock or store
//	commit  commit.go  signs the entries, sends the transaction, settles its outcome
//	memory  memory.go  what is known of a pool that is nearly full
//	recover recover.go the drill after a restore
//	remove  remove.go  the end of a node, by an operator
//
// I1 rests on one comparison: an address key is written only at the
// mod_revision that was read. I2 on the attachment's: absent before an acquire,
// unchanged before a release. I3 and I4 on the writer's key, which each commit
// swaps, and on the next entry's key being absent. I5 on the mark in the state
// directory, on meta, and on stops/ being empty.
//
// A view may be serializable (answered by a member that lags) only if a commit
// follows. Any answer that ends without a commit is read again, linearizable.
//
// # Unknown outcomes
//
// A commit whose reply is lost may have happened, may happen later, or never.
// Until that is known the file "open" stands in the state directory, and nobody
// on this machine answers anything. Whoever finds it fences: it puts the writer
// key back unchanged under its own comparison, after which nothing sent earlier
// can land, because every transaction compares that key's mod_revision. Then a
// linearizable read tells what did.
//
// An answer may also leave it open what was done, while nothing is under way any
// more (ErrDecided: out of space). Then a linearizable read is enough.
//
// What one process finds out another may not have: so everything that a call
// leaves behind for others (a queued release, a holding, the mark) it leaves under
// the lock. Only a DEL that cannot have the lock queues without it, and a queued
// release stands over what is held.
//
// # Processes
//
// Nothing is resident. Processes of one writer exclude each other by the lock of
// the state directory; a Writer is used by one goroutine at a time. The package
// knows etcd only through Store.
package allocator
