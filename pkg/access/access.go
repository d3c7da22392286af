// Package access says who may do what in etcd: which role each subject has,
// what a role may read and write, and what has to change so that etcd says so.
//
// It guarantees
//
//   - that a role lets its subject do all that the ledger's programs do for it,
//     and, of what etcd can tell apart, nothing else;
//   - that a Plan widens before it narrows, so that a live cluster never lacks
//     what it has and keeps; that carrying it out, or any part of it, and
//     planning again ends at the same state; and that a Plan that Make made
//     deletes nothing but permissions in the ledger's own roles.
//
// The package is pure: it talks to nobody.
//
// # What etcd cannot tell apart
//
// etcd's "write" is put and delete in one. So whoever may append to a chain may
// also delete from it: a node its own chain's entries, the sealer everybody's.
// And whoever may lease an address may overwrite any address: nodes share
// addresses/ and blocks/ by design. What roles cannot prevent, the hash chains
// and 'ledger verify' find.
package access

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// Kind is what sort of subject has a role.
type Kind string

// The kinds of subjects. All but auditors extend chains.
const (
	Node     Kind = "node"
	Operator Kind = "operator"
	Auditor  Kind = "auditor"
	Sealer   Kind = "sealer"
)

// Kinds are all kinds.
var Kinds = []Kind{Node, Operator, Auditor, Sealer}

// Subject is who has a role: one has one.
type Subject struct {
	Kind Kind
	Name string
}

func (s Subject) String() string { return string(s.Kind) + "/" + s.Name }

// ParseSubject is the inverse of Subject.String.
func ParseSubject(text string) (Subject, error) {
	kind, name, ok := strings.Cut(text, "/")
	s := Subject{Kind(kind), name}
	if !ok {
		return Subject{}, fmt.Errorf("%.200q: want KIND/NAME, for example node/worker-1", text)
	}
	return s, s.Validate()
}

// Validate reports whether there can be such a subject.
func (s Subject) Validate() error {
	if !slices.Contains(Kinds, s.Kind) {
		return fmt.Errorf("kind %.80q: want node, operator, auditor or sealer", s.Kind)
	}
	return entry.ValidateName(string(s.Kind)+"'s name", s.Name)
}

// User is the etcd user of a subject whose certificate bears no other name.
func (s Subject) User() string { return string(s.Kind) + ":" + s.Name }

// Flags are what 'ledger auth apply' is given for the subject if it is to be
// that etcd user.
func (s Subject) Flags(user string) string {
	flags := "--" + string(s.Kind) + " " + s.Name
	if user != s.User() {
		flags += " --cn " + s.String() + "=" + user
	}
	return flags
}

// OfUser is the subject that a user is by its name.
func OfUser(user string) (Subject, bool) {
	kind, name, _ := strings.Cut(user, ":")
	s := Subject{Kind(kind), name}
	return s, s.Validate() == nil
}

// Role is the name of the subject's role. It begins with the prefix, so that
// two ledgers in one etcd do not meet.
func (s Subject) Role(keys keyspace.Keys) string { return keys.Prefix() + s.String() }

// OfRole is whose role has this name; false where it is none of this ledger's.
func OfRole(keys keyspace.Keys, role string) (Subject, bool) {
	rest, ok := strings.CutPrefix(role, keys.Prefix())
	if !ok {
		return Subject{}, false
	}
	s, err := ParseSubject(rest)
	return s, err == nil
}

// Permission lets a role read or write one key, or the keys from Key up to but
// not including End.
type Permission struct {
	Key, End    string
	Read, Write bool
}

// Mode is read, write or readwrite, as etcd names it.
func (p Permission) Mode() string {
	switch {
	case p.Read && p.Write:
		return "readwrite"
	case p.Write:
		return "write"
	}
	return "read"
}

// Keys is which keys it is about: one, all below a prefix ("…*"), or a range.
func (p Permission) Keys() string {
	switch {
	case p.End == "":
		return p.Key
	case p.End == "\x00" && (p.Key == "" || p.Key == "\x00"):
		return "*"
	case p.Key != "" && p.End == keyspace.After(p.Key):
		return p.Key + "*"
	case p.End == "\x00":
		return fmt.Sprintf("from %q on", p.Key)
	}
	return fmt.Sprintf("from %q to before %q", p.Key, p.End)
}

func (p Permission) String() string { return p.Mode() + " " + p.Keys() }

// Permissions are what the subject's role allows, in the order of keys.
//
// etcd checks the comparisons and both branches of a transaction, so each role
// also reads what it only compares.
func Permissions(keys keyspace.Keys, s Subject) []Permission {
	var out []Permission
	read := func(key string) { out = append(out, Permission{Key: key, Read: true}) }
	readAll := func(prefix string) {
		out = append(out, Permission{Key: prefix, End: keyspace.After(prefix), Read: true})
	}
	write := func(key string) { out = append(out, Permission{Key: key, Read: true, Write: true}) }
	writeAll := func(prefix string) {
		out = append(out, Permission{Key: prefix, End: keyspace.After(prefix), Read: true, Write: true})
	}
	w := entry.Writer{Kind: entry.Kind(s.Kind), Name: s.Name}
	chains := keys.Chains() + w.String() + "/"
	switch s.Kind {
	case Node:
		read(keys.Meta())
		readAll(keys.Stops())
		write(keys.Stop(s.Name))
		readAll(keys.Pool(""))
		writeAll(keys.Addresses())
		writeAll(keys.AllBlocks())
		writeAll(keys.NodeAttachments(s.Name))
		write(keys.Writer(w))
		writeAll(chains)
	case Operator:
		readAll(keys.Prefix())
		write(keys.Meta())
		writeAll(keys.Stops())
		writeAll(keys.Pool(""))
		writeAll(keys.Addresses())
		writeAll(keys.AllBlocks())
		writeAll(keys.Attachments())
		// Of nodes and other operators, to close a chain whose key is lost.
		writeAll(keys.Writers() + string(entry.KindNode) + "/")
		writeAll(keys.Writers() + string(entry.KindOperator) + "/")
		writeAll(chains)
	case Auditor:
		readAll(keys.Prefix())
	case Sealer:
		readAll(keys.Prefix())
		write(keys.Writer(w))
		// Also its own chain; and everybody's, to prune what is sealed.
		writeAll(keys.Chains())
	}
	sortPermissions(out)
	return out
}

func sortPermissions(pp []Permission) {
	slices.SortFunc(pp, func(a, b Permission) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		return strings.Compare(a.End, b.End)
	})
}

// Allows reports whether permissions let their role read (or write) the keys
// from key up to but not including end; with end "" the one key.
func Allows(permissions []Permission, write bool, key, end string) bool {
	if end == "" {
		end = key + "\x00"
	}
	at := key
	for moved := true; moved && at < end; {
		moved = false
		for _, p := range permissions {
			to := p.End
			switch to {
			case "":
				to = p.Key + "\x00"
			case "\x00":
				to = end // open
			}
			if (p.Write || !write) && (p.Read || write) && p.Key <= at && at < to {
				at, moved = to, true
			}
		}
	}
	return at >= end
}
