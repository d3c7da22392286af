package access

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// State is what etcd has.
type State struct {
	// Roles are all roles. The permissions of those that are none of the
	// ledger's need not be known.
	Roles map[string][]Permission
	// Users are all users, each with its roles.
	Users map[string][]string
}

// Want is a subject that is to have its role.
type Want struct {
	Subject
	// User is its etcd user. "": who has the role now, else Subject.User.
	User string
}

// Op is what a Change does.
type Op string

// The changes.
const (
	AddRole    Op = "add-role"
	Grant      Op = "grant-permission" // or change it
	Revoke     Op = "revoke-permission"
	AddUser    Op = "add-user" // without a password
	GiveRole   Op = "give-role"
	TakeRole   Op = "take-role"
	DeleteRole Op = "delete-role"
	DeleteUser Op = "delete-user"
)

// Change is one step: one request to etcd.
type Change struct {
	Op         Op
	Role       string // all but AddUser and DeleteUser
	User       string // AddUser, GiveRole, TakeRole, DeleteUser
	Permission Permission
}

// Plan is what has to change.
type Plan struct {
	Changes []Change // in the order in which they are safe
	// Same is how many subjects are as they should be.
	Same int
	// Notes are what is there and is left alone, though somebody should look.
	Notes []string

	state State // what etcd has once the changes so far are made
}

// Make plans how each of wants gets its role and no more. All roles of the
// ledger that exist are put right, wanted or not. It deletes no role and no
// user, and takes a role only from users that had it under another name than
// the one that a Want says.
func Make(keys keyspace.Keys, wants []Want, have State) Plan {
	all := map[Subject]string{}
	p := Plan{state: have.clone()}
	for _, role := range slices.Sorted(maps.Keys(have.Roles)) {
		if s, ok := OfRole(keys, role); ok {
			all[s] = ""
		} else if strings.HasPrefix(role, keys.Prefix()) {
			p.note("role %q has a name of this ledger's and is none of its kinds: it is left alone", role)
		}
	}
	for _, w := range wants {
		if w.User != "" || all[w.Subject] == "" {
			all[w.Subject] = w.User
		}
	}
	// Roles first: at each change etcd reckons anew what every user may do, which
	// takes the longer the more users have roles.
	subjects := slices.SortedFunc(maps.Keys(all), compare)
	changed := map[Subject]bool{}
	for _, part := range []func(s Subject){
		func(s Subject) { p.role(keys, s) },
		func(s Subject) { p.users(keys, s, all[s]) },
	} {
		for _, s := range subjects {
			before := len(p.Changes)
			part(s)
			changed[s] = changed[s] || len(p.Changes) > before
		}
	}
	for _, s := range subjects {
		if !changed[s] {
			p.Same++
		}
	}
	return p
}

func compare(a, b Subject) int {
	if c := slices.Index(Kinds, a.Kind) - slices.Index(Kinds, b.Kind); c != 0 {
		return c
	}
	return strings.Compare(a.Name, b.Name)
}

func (p *Plan) add(c Change) {
	p.Changes = append(p.Changes, c)
	p.state.Apply(c)
}

func (p *Plan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// role makes the role, or its permissions what they should be.
func (p *Plan) role(keys keyspace.Keys, s Subject) {
	role := s.Role(keys)
	has, exists := p.state.Roles[role]
	if !exists {
		p.add(Change{Op: AddRole, Role: role})
	}
	want := Permissions(keys, s)
	for _, w := range want {
		if !slices.Contains(has, w) {
			p.add(Change{Op: Grant, Role: role, Permission: w})
		}
	}
	for _, h := range has {
		// With the same keys and another mode it was overwritten above.
		if !slices.ContainsFunc(want, func(w Permission) bool { return w.Key == h.Key && w.End == h.End }) {
			p.add(Change{Op: Revoke, Role: role, Permission: h})
		}
	}
}

// users gives the role to the subject's user.
func (p *Plan) users(keys keyspace.Keys, s Subject, user string) {
	role := s.Role(keys)
	holders := holdersOf(role, p.state)
	named := user != ""
	if !named {
		switch len(holders) {
		case 0:
			user = s.User()
		case 1:
			user = holders[0]
		default:
			p.note("role %q is had by %s: all can act as %s; 'ledger auth apply --cn %s=USER' leaves it to one", role, list(holders), s, s)
			return
		}
	}
	roles, exists := p.state.Users[user]
	if !exists {
		p.add(Change{Op: AddUser, User: user})
	}
	if !slices.Contains(roles, role) {
		p.add(Change{Op: GiveRole, User: user, Role: role})
	}
	for _, r := range roles {
		_, ours := OfRole(keys, r)
		switch {
		case r == "root":
			p.note("user %q, who is %s, has etcd's role root and may do everything", user, s)
		case !ours:
			p.note("user %q, who is %s, also has role %q, which is none of this ledger's: it is left alone", user, s, r)
		}
	}
	for _, h := range holders {
		if named && h != user {
			p.add(Change{Op: TakeRole, User: h, Role: role})
		}
	}
}

// Remove plans how subjects lose their roles, and users that had no other role
// go with them. What is not there is noted.
func Remove(keys keyspace.Keys, subjects []Subject, have State) Plan {
	p := Plan{state: have.clone()}
	gone := map[string]bool{}
	for _, s := range subjects {
		gone[s.Role(keys)] = true
	}
	var users []string
	for _, s := range subjects {
		role := s.Role(keys)
		holders := holdersOf(role, have)
		_, exists := have.Roles[role]
		if exists {
			// First, so that whatever happens next its holders can do nothing.
			p.add(Change{Op: DeleteRole, Role: role})
		}
		if roles, ok := have.Users[s.User()]; ok && len(roles) == 0 && !exists {
			holders = append(holders, s.User()) // what a removal that was cut short left
		}
		if !exists && len(holders) == 0 {
			p.note("%s has no role here", s)
		}
		for _, h := range holders {
			if slices.Contains(users, h) {
				continue
			}
			users = append(users, h)
			var left []string
			for _, r := range have.Users[h] {
				if !gone[r] {
					left = append(left, r)
				}
			}
			if len(left) > 0 {
				p.note("user %q keeps %s", h, list(left))
				continue
			}
			p.add(Change{Op: DeleteUser, User: h})
		}
	}
	return p
}

func holdersOf(role string, have State) []string {
	var out []string
	for user, roles := range have.Users {
		if slices.Contains(roles, role) {
			out = append(out, user)
		}
	}
	slices.Sort(out)
	return out
}

// list quotes some names.
func list(names []string) string {
	const most = 5
	var out []string
	for _, n := range names[:min(len(names), most)] {
		out = append(out, fmt.Sprintf("%q", n))
	}
	if len(names) > most {
		out = append(out, fmt.Sprintf("%d more", len(names)-most))
	}
	return strings.Join(out, ", ")
}

// clone is deep enough for Apply, which replaces the lists that it changes.
func (s State) clone() State {
	out := State{Roles: map[string][]Permission{}, Users: map[string][]string{}}
	maps.Copy(out.Roles, s.Roles)
	maps.Copy(out.Users, s.Users)
	return out
}

// Apply is what a State becomes by a Change: the meaning of Change, as etcd has it.
func (s *State) Apply(c Change) {
	switch c.Op {
	case AddRole:
		s.Roles[c.Role] = nil
	case Grant, Revoke:
		s.Roles[c.Role] = slices.DeleteFunc(slices.Clone(s.Roles[c.Role]), func(p Permission) bool {
			return p.Key == c.Permission.Key && p.End == c.Permission.End
		})
		if c.Op == Grant {
			s.Roles[c.Role] = append(s.Roles[c.Role], c.Permission)
			sortPermissions(s.Roles[c.Role])
		}
	case AddUser:
		s.Users[c.User] = nil
	case GiveRole:
		s.Users[c.User] = append(slices.Clone(s.Users[c.User]), c.Role)
		slices.Sort(s.Users[c.User])
	case TakeRole:
		s.take(c.User, c.Role)
	case DeleteRole:
		delete(s.Roles, c.Role)
		for u := range s.Users {
			s.take(u, c.Role)
		}
	case DeleteUser:
		delete(s.Users, c.User)
	}
}

func (s *State) take(user, role string) {
	s.Users[user] = slices.DeleteFunc(slices.Clone(s.Users[user]), func(r string) bool { return r == role })
}
