package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/authpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/access"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

const authText = `Who may do what in etcd. Each subject has a role of its own, named after the prefix
and the subject, and an etcd user, whose name is that in its client certificate
(CN). Users have no password.

  KIND      USER             MAY
  node      node:NAME        read meta, pools, stops; write addresses, blocks, and
                             its own attachments, stop, head and chain
  operator  operator:NAME    read all; write all but others' chains and sealers' heads
  auditor   auditor:NAME     read all, write nothing; 'ledger publish' runs as one
  sealer    sealer:NAME      read all; write all chains, and its own head

What roles cannot prevent, because to etcd "write" is put and delete in one, and
all nodes share the addresses: whoever has a node's certificate can overwrite or
delete any address or block, and entries of that node's own chain; an operator's
can do so with any address, attachment or head; the sealer's can delete or
overwrite any entry. 'ledger verify' finds that, by the hash chains and by
comparing keys with entries. Run it from a machine of its own, as an auditor, with
--keys.

All this needs etcd's root: a client certificate with the name root, or --user
root with --password-file. To begin with:

  etcdctl user add root --no-password
  etcdctl user grant-role root root
  ledger auth apply
  ledger auth apply --enable`

func (a *app) auth() *cobra.Command {
	c := &cobra.Command{Use: "auth", Short: "Who may do what in etcd: roles and users", Long: authText, RunE: a.group("plan, apply or revoke"), Args: cobra.ArbitraryArgs}
	c.AddCommand(a.authPlan(), a.authApply(), a.authRevoke())
	return c
}

// subjects are who is to have a role.
type subjects struct {
	named   map[access.Kind]*[]string
	nodes   string
	cn      []string
	without []string
}

// flags adds the flags. --node is not the global one, which names the node that a
// command acts as: here no command does.
func (o *subjects) flags(c *cobra.Command) {
	o.named = map[access.Kind]*[]string{}
	for kind, what := range map[access.Kind]string{
		access.Node: "a node", access.Operator: "an operator", access.Auditor: "an auditor", access.Sealer: "a sealer",
	} {
		o.named[kind] = c.Flags().StringSlice(string(kind), nil, "`name` of "+what+" that is to have its role (repeated)")
	}
	c.Flags().StringVar(&o.nodes, "nodes", "", "`file` with nodes that are to have their role, one a line (- is standard input; kubectl get nodes -o name will do)")
	c.Flags().StringArrayVar(&o.cn, "cn", nil, "name in the certificate, where it is not KIND:NAME: `KIND/NAME=CN` (repeated)")
	c.Flags().StringSliceVar(&o.without, "without", nil, "`KIND/NAME` that is to have no role though etcd knows it (repeated)")
}

const subjectsText = `

Roles that exist are put right. New ones are made for whom --node, --nodes,
--operator, --auditor, --sealer and --cn name, and, as long as etcd's
authentication is off, for all nodes and operators that the ledger knows, and for
you as operator: they would be shut out when it is turned on.`

// wants are the subjects that are to have a role. known are the writers of the
// ledger, who count while everybody can write.
func (a *app) wants(o *subjects, known []entry.Writer, enabled bool) ([]access.Want, error) {
	wants := map[access.Subject]string{}
	if !enabled {
		for _, w := range known {
			wants[access.Subject{Kind: access.Kind(w.Kind), Name: w.Name}] = ""
		}
		own := a.as
		if own == "" {
			var err error
			if own, err = operatorName(); err != nil {
				return nil, err
			}
		}
		wants[access.Subject{Kind: access.Operator, Name: own}] = ""
	}
	for kind, names := range o.named {
		for _, n := range *names {
			wants[access.Subject{Kind: kind, Name: n}] = ""
		}
	}
	if o.nodes != "" {
		list, err := a.nodeList(o.nodes)
		if err != nil {
			return nil, err
		}
		for _, n := range list {
			wants[access.Subject{Kind: access.Node, Name: n}] = ""
		}
	}
	for _, x := range o.without {
		s, err := access.ParseSubject(x)
		if err != nil {
			return nil, usage("--without %w", err)
		}
		delete(wants, s)
	}
	for _, x := range o.cn {
		who, cn, _ := strings.Cut(x, "=")
		s, err := access.ParseSubject(who)
		if err != nil {
			return nil, usage("--cn %w", err)
		}
		if cn == "" {
			return nil, usage("--cn %s: want KIND/NAME=CN, for example node/worker-1=worker-1.example.com", x)
		}
		if before := wants[s]; before != "" && before != cn {
			return nil, usage("--cn gives %s two names, %q and %q", s, before, cn)
		}
		wants[s] = cn
	}
	var out []access.Want
	for s, cn := range wants {
		if err := s.Validate(); err != nil {
			return nil, usage("%w", err)
		}
		out = append(out, access.Want{Subject: s, User: cn})
	}
	return out, nil
}

// etcdAuth is a connection to see and change roles by.
type etcdAuth struct {
	*app
	r       *reader
	have    access.State
	enabled bool
}

// request gives one its own deadline, and explains a refusal.
func (e *etcdAuth) request(ctx context.Context, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, e.loaded.Timeout)
	defer cancel()
	err := f(ctx)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrUserNotFound), errors.Is(err, rpctypes.ErrUserEmpty):
		c, _, cerr := e.etcd()
		if cerr != nil {
			return cerr
		}
		return refuse("use a client certificate with the name (CN) root, or --user root with --password-file",
			"only etcd's root may see and change roles, and you are user %q: %w", c.User(), err)
	}
	return fmt.Errorf("%w: %w", allocator.ErrUnavailable, err)
}

// many is how many requests are under way at a time.
const many = 8

// each runs f for all names, some at a time, and returns the first error.
func each(names []string, f func(name string) error) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failed error
	free := make(chan struct{}, many)
	for _, n := range names {
		free <- struct{}{}
		mu.Lock()
		stop := failed != nil
		mu.Unlock()
		if stop {
			break
		}
		wg.Go(func() {
			defer func() { <-free }()
			if err := f(n); err != nil {
				mu.Lock()
				failed = cmp.Or(failed, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return failed
}

// authRead reads roles and users. Its owner closes the store.
func (a *app) authRead(ctx context.Context) (*etcdAuth, error) {
	r, err := a.connect(ctx)
	if err != nil {
		return nil, err
	}
	e := &etcdAuth{app: a, r: r, have: access.State{Roles: map[string][]access.Permission{}, Users: map[string][]string{}}}
	if err := e.read(ctx); err != nil {
		r.store.Close()
		return nil, err
	}
	return e, nil
}

func (e *etcdAuth) read(ctx context.Context) error {
	var roles, users []string
	err := e.request(ctx, func(ctx context.Context) error {
		s, err := e.r.client.AuthStatus(ctx)
		if err != nil {
			return err
		}
		e.enabled = s.Enabled
		rr, err := e.r.client.RoleList(ctx)
		if err != nil {
			return err
		}
		uu, err := e.r.client.UserList(ctx)
		if err != nil {
			return err
		}
		roles, users = rr.Roles, uu.Users
		return nil
	})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	err = each(roles, func(role string) error {
		var pp []access.Permission
		if _, ours := access.OfRole(e.r.keys, role); ours {
			err := e.request(ctx, func(ctx context.Context) error {
				r, err := e.r.client.RoleGet(ctx, role)
				if errors.Is(err, rpctypes.ErrRoleNotFound) {
					return nil // gone since
				} else if err != nil {
					return err
				}
				for _, p := range r.Perm {
					pp = append(pp, access.Permission{
						Key: string(p.Key), End: string(p.RangeEnd),
						Read: p.PermType != authpb.Permission_WRITE, Write: p.PermType != authpb.Permission_READ,
					})
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		mu.Lock()
		defer mu.Unlock()
		e.have.Roles[role] = pp
		return nil
	})
	if err != nil {
		return err
	}
	return each(users, func(user string) error {
		return e.request(ctx, func(ctx context.Context) error {
			u, err := e.r.client.UserGet(ctx, user)
			if errors.Is(err, rpctypes.ErrUserNotFound) {
				return nil // gone since
			} else if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			e.have.Users[user] = u.Roles
			return nil
		})
	})
}

// known are the writers of the ledger, as far as there is one.
func (e *etcdAuth) known(ctx context.Context) ([]entry.Writer, error) {
	g, err := e.r.client.Get(ctx, e.r.keys.Writers(), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, e.r.store.Explain(ctx, err)
	}
	var out []entry.Writer
	for _, kv := range g.Kvs {
		k, err := e.r.keys.Parse(string(kv.Key))
		if err != nil {
			e.warn("%v: 'ledger verify' says more", err)
			continue
		}
		out = append(out, k.Writer)
	}
	return out, nil
}

func (e *etcdAuth) plan(ctx context.Context, o *subjects) (access.Plan, error) {
	known, err := e.known(ctx)
	if err != nil {
		return access.Plan{}, err
	}
	wants, err := e.wants(o, known, e.enabled)
	if err != nil {
		return access.Plan{}, err
	}
	p := access.Make(e.r.keys, wants, e.have)
	if !e.r.found {
		p.Notes = append(p.Notes, fmt.Sprintf("there is no ledger at %s yet, so it knows no nodes: is the prefix right?", e.r.keys.Prefix()))
	}
	return p, nil
}

// What 'auth -o json' writes.
type plannedAuth struct {
	Authentication bool            `json:"authentication"` // etcd's is on
	Prefix         string          `json:"prefix"`
	Changes        []plannedChange `json:"changes"`
	Unchanged      int             `json:"unchanged"` // subjects
	Notes          []string        `json:"notes"`
	Applied        int             `json:"applied"` // changes
}

type plannedChange struct {
	Op       access.Op `json:"op"`
	Role     string    `json:"role,omitempty"`
	User     string    `json:"user,omitempty"`
	Mode     string    `json:"mode,omitempty"` // of a permission
	Key      string    `json:"key,omitempty"`
	RangeEnd string    `json:"rangeEnd,omitempty"`
}

func (e *etcdAuth) structured(p access.Plan, applied int) (bool, error) {
	v := plannedAuth{e.enabled, e.r.keys.Prefix(), []plannedChange{}, p.Same, append([]string{}, p.Notes...), applied}
	for _, c := range p.Changes {
		x := plannedChange{Op: c.Op, Role: c.Role, User: c.User, Key: c.Permission.Key, RangeEnd: c.Permission.End}
		if c.Permission != (access.Permission{}) {
			x.Mode = c.Permission.Mode()
		}
		v.Changes = append(v.Changes, x)
	}
	return e.app.structured(v)
}

// show writes a plan as a diff. What a new role allows is left out unless -o
// wide asks for it.
func (e *etcdAuth) show(w io.Writer, p access.Plan) {
	var target string
	head := func(sign, what, name string) {
		if t := what + name; t != target {
			target = t
			colour := map[string]string{"+": green, "~": yellow, "-": red}[sign]
			fmt.Fprintf(w, "%s %s  %s\n", e.paint(colour, sign), what, printable(name))
		}
	}
	made := map[string]bool{}
	for _, c := range p.Changes {
		switch c.Op {
		case access.AddRole:
			made[c.Role] = true
			head("+", "role", c.Role)
		case access.Grant, access.Revoke:
			if made[c.Role] && !e.wide() {
				continue
			}
			sign := "+"
			if c.Op == access.Revoke {
				sign = "-"
			}
			head("~", "role", c.Role)
			fmt.Fprintf(w, "      %s %-9s  %s\n", sign, c.Permission.Mode(), printable(c.Permission.Keys()))
		case access.AddUser:
			head("+", "user", c.User)
		case access.GiveRole:
			head("~", "user", c.User)
			fmt.Fprintf(w, "      + role  %s\n", printable(c.Role))
		case access.TakeRole:
			head("~", "user", c.User)
			fmt.Fprintf(w, "      - role  %s\n", printable(c.Role))
		case access.DeleteRole:
			head("-", "role", c.Role)
		case access.DeleteUser:
			head("-", "user", c.User)
		}
	}
	for _, n := range p.Notes {
		fmt.Fprintf(w, "%s %s\n", e.paint(yellow, "!"), printable(n))
	}
}

// off says what roles are worth while nobody is asked who he is.
func (e *etcdAuth) off() {
	if !e.enabled {
		e.printf("etcd's authentication is off: roles bind nobody until 'ledger auth apply --enable'\n")
	}
}

func (a *app) authPlan() *cobra.Command {
	var o subjects
	c := &cobra.Command{
		Use:   "plan",
		Short: "Show what 'auth apply' would change",
		Long: `Show what 'ledger auth apply' would change in etcd's roles and users: + is made, ~ is
changed, - goes, ! is left alone and should be looked at. Nothing is changed.` + subjectsText + `

Exit status 0 where nothing is to be done, 1 where something is, 2 where that
cannot be known.`,
		Example: `  ledger auth plan --operator alice@desk --auditor monitoring
  kubectl get nodes -o name | ledger auth plan --nodes - -o wide`,
		Args: args(0, 0, ""), Annotations: formats("table,wide,json,yaml"),
	}
	o.flags(c)
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		e, err := a.authRead(cmd.Context())
		if err != nil {
			return err
		}
		defer e.r.store.Close()
		p, err := e.plan(cmd.Context(), &o)
		if err != nil {
			return err
		}
		done, err := e.structured(p, 0)
		if err != nil {
			return err
		}
		if !done {
			e.show(a.out, p)
			e.off()
			a.printf("%s to be made, %s as they should be\n", count(len(p.Changes), "change"), count(p.Same, "subject"))
		}
		if len(p.Changes) > 0 {
			return wrong
		}
		return nil
	}
	return c
}

func (a *app) authApply() *cobra.Command {
	var o subjects
	var yes, enable, shared bool
	c := &cobra.Command{
		Use:   "apply",
		Short: "Make the roles and users",
		Long: `Make etcd's roles and users what 'ledger auth plan' shows; it shows it, and asks. It
may be cut short and run again, and run while nodes allocate. It deletes no role
and no user: that is 'ledger auth revoke'.` + subjectsText + `

With --enable it then turns etcd's authentication on, if that leaves you in: user
root must exist and have the role root, you must be it (or another that has that
role), and etcd must ask clients for certificates. It is refused where etcd holds
keys of others, unless --shared says that they have users, too.`,
		Example: `  kubectl get nodes -o name | ledger auth apply --nodes - --auditor monitoring
  ledger auth apply --node worker-9 --cn node/worker-9=worker-9.example.com --yes
  ledger auth apply --enable`,
		Args: args(0, 0, ""), Annotations: formats("table,wide,json,yaml"),
	}
	o.flags(c)
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.Flags().BoolVar(&enable, "enable", false, "then turn etcd's authentication on")
	c.Flags().BoolVar(&shared, "shared", false, "with --enable: others whose keys are in this etcd have users, too")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		if o.nodes == "-" && !yes {
			return usage("standard input is the list of nodes, so that nobody can be asked: look with 'ledger auth plan', then say --yes")
		}
		ctx := cmd.Context()
		e, err := a.authRead(ctx)
		if err != nil {
			return err
		}
		defer e.r.store.Close()
		p, err := e.plan(ctx, &o)
		if err != nil {
			return err
		}
		enable = enable && !e.enabled
		if enable {
			if err := e.mayEnable(ctx, shared); err != nil {
				return err
			}
		}
		question := "make these changes? [y/N] "
		if enable {
			question = "make these changes and turn etcd's authentication on? [y/N] "
		}
		return e.carryOut(ctx, p, enable, yes, question)
	}
	return c
}

func (a *app) authRevoke() *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use:   "revoke KIND/NAME…",
		Short: "Take a node's, an operator's or another's access away",
		Long: `Delete the roles of subjects, and their users where they had no other role. It
shows them, and asks. It counts at once, also on connections that stand; only a
watch that is open goes on until its connection ends, so end 'ledger publish' and
the like.

A node's leases stay. 'ledger node' ends them.`,
		Example: "  ledger auth revoke node/worker-3 operator/bob@desk",
		Args:    args(1, -1, "subjects, KIND/NAME"), Annotations: formats("table,wide,json,yaml"),
	}
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	c.RunE = func(cmd *cobra.Command, args []string) error {
		var gone []access.Subject
		for _, x := range args {
			s, err := access.ParseSubject(x)
			if err != nil {
				return usage("%w", err)
			}
			gone = append(gone, s)
		}
		e, err := a.authRead(cmd.Context())
		if err != nil {
			return err
		}
		defer e.r.store.Close()
		return e.carryOut(cmd.Context(), access.Remove(e.r.keys, gone, e.have), false, yes, "delete these? [y/N] ")
	}
	return c
}

// carryOut shows a plan, asks, and does it.
func (e *etcdAuth) carryOut(ctx context.Context, p access.Plan, enable, yes bool, question string) error {
	nothing := len(p.Changes) == 0 && !enable
	if !nothing && !yes {
		if !e.terminalIn {
			return usage("nobody to ask: standard input is no terminal; look with 'ledger auth plan', then say --yes")
		}
		e.out.Flush()
		e.show(e.err, p)
		if !e.ask(ctx, question) {
			return refuse("", "nothing was changed")
		}
	} else if e.output == "table" || e.output == "wide" {
		e.show(e.out, p)
	}
	for i, c := range p.Changes {
		if err := e.request(ctx, func(ctx context.Context) error { return e.change(ctx, c) }); err != nil {
			return fmt.Errorf("%s %s%s, after %d of %s (run it again): %w", c.Op, c.Role, c.User, i, count(len(p.Changes), "change"), err)
		}
	}
	if enable {
		if err := e.request(ctx, func(ctx context.Context) error {
			_, err := e.r.client.AuthEnable(ctx)
			return err
		}); err != nil {
			return fmt.Errorf("turning authentication on: %w", err)
		}
		e.enabled = true
		if err := e.stillRoot(ctx); err != nil {
			return err
		}
	}
	if done, err := e.structured(p, len(p.Changes)); done {
		return err
	}
	if nothing {
		e.printf("nothing to be done")
	} else {
		e.printf("%s made", count(len(p.Changes), "change"))
	}
	if p.Same > 0 {
		e.printf(", %s as they should be", count(p.Same, "subject"))
	}
	e.printf("\n")
	if enable {
		e.printf("etcd's authentication is on\n")
	}
	e.off()
	return nil
}

// change does one step. What is so already is fine: another apply may run.
func (e *etcdAuth) change(ctx context.Context, c access.Change) error {
	p := c.Permission
	var err, fine error
	switch c.Op {
	case access.AddRole:
		_, err = e.r.client.RoleAdd(ctx, c.Role)
		fine = rpctypes.ErrRoleAlreadyExist
	case access.Grant:
		mode := clientv3.PermissionType(clientv3.PermRead)
		switch {
		case p.Read && p.Write:
			mode = clientv3.PermissionType(clientv3.PermReadWrite)
		case p.Write:
			mode = clientv3.PermissionType(clientv3.PermWrite)
		}
		_, err = e.r.client.RoleGrantPermission(ctx, c.Role, p.Key, p.End, mode)
	case access.Revoke:
		_, err = e.r.client.RoleRevokePermission(ctx, c.Role, p.Key, p.End)
		fine = rpctypes.ErrPermissionNotGranted
	case access.AddUser:
		_, err = e.r.client.UserAddWithOptions(ctx, c.User, "", &clientv3.UserAddOptions{NoPassword: true})
		fine = rpctypes.ErrUserAlreadyExist
	case access.GiveRole:
		_, err = e.r.client.UserGrantRole(ctx, c.User, c.Role)
	case access.TakeRole:
		_, err = e.r.client.UserRevokeRole(ctx, c.User, c.Role)
		fine = rpctypes.ErrRoleNotGranted
	case access.DeleteRole:
		_, err = e.r.client.RoleDelete(ctx, c.Role)
		fine = rpctypes.ErrRoleNotFound
	case access.DeleteUser:
		_, err = e.r.client.UserDelete(ctx, c.User)
		fine = rpctypes.ErrUserNotFound
	}
	if err != nil && errors.Is(err, fine) {
		return nil
	}
	return err
}

// mayEnable says why authentication may not be turned on: whoever does so must
// be able to turn it off again, and nobody else's keys may be in the way.
func (e *etcdAuth) mayEnable(ctx context.Context, shared bool) error {
	if !slices.Contains(e.have.Users["root"], "root") {
		return refuse("etcdctl user add root --no-password && etcdctl user grant-role root root; and make a client certificate with the name (CN) root",
			"authentication stays off: etcd has no user root with the role root, and so nobody could turn it off again")
	}
	c, _, err := e.etcd()
	if err != nil {
		return err
	}
	for _, ep := range c.Endpoints {
		asks, err := asksForCertificate(ctx, c, ep)
		if err != nil {
			return fmt.Errorf("looking at %s: %w", ep, err)
		}
		if !asks {
			return refuse("give etcd --client-cert-auth and --trusted-ca-file, and use https",
				"authentication stays off: %s does not ask clients for a certificate, and so nobody would be let in by one", ep)
		}
	}
	if me := c.User(); !slices.Contains(e.have.Users[me], "root") {
		return refuse("use a client certificate with the name (CN) root, or --user root with --password-file",
			"authentication stays off: you are user %q, which has not the role root: you would be shut out", me)
	}
	if c.Username != "" {
		e.warn("whether the password of %q is right is not known until authentication is on", c.Username)
	}
	if shared {
		return nil
	}
	for _, span := range [][2]string{{"\x00", e.r.keys.Prefix()}, {keyspace.After(e.r.keys.Prefix()), "\x00"}} {
		g, err := e.r.client.Get(ctx, span[0], clientv3.WithRange(span[1]), clientv3.WithLimit(1), clientv3.WithKeysOnly())
		if err != nil {
			return e.r.store.Explain(ctx, err)
		}
		if len(g.Kvs) > 0 {
			return refuse("give them users and roles first (Kubernetes' API server is such a one), then say --shared; or move the ledger to an etcd of its own",
				"authentication stays off: etcd also holds keys outside %s, for example %q: whoever uses them would be shut out", e.r.keys.Prefix(), g.Kvs[0].Key)
		}
	}
	return nil
}

// asksForCertificate reports whether etcd asks a client for its certificate in
// the handshake: where it does not, names in certificates mean nothing to it.
func asksForCertificate(ctx context.Context, c etcdstore.Config, endpoint string) (asked bool, err error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "https" {
		return false, nil
	}
	tc, err := c.TLS()
	if err != nil {
		return false, err
	}
	give, own := tc.GetClientCertificate, tc.Certificates
	tc.GetClientCertificate = func(i *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		asked = true
		switch {
		case give != nil:
			return give(i)
		case len(own) > 0:
			return &own[0], nil
		}
		return new(tls.Certificate), nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.DialTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: tc}).DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return false, err
	}
	return asked, conn.Close()
}

// stillRoot looks, on a connection of its own, whether the caller is let in.
func (e *etcdAuth) stillRoot(ctx context.Context) error {
	c, _, err := e.etcd()
	if err != nil {
		return err
	}
	store := etcdstore.New(c)
	defer store.Close()
	ctx, cancel := context.WithTimeout(ctx, e.loaded.Timeout)
	defer cancel()
	client, err := store.Client(ctx)
	if err == nil {
		_, err = client.RoleList(ctx)
	}
	if err != nil {
		return &failure{
			err: fmt.Errorf("authentication is on, and etcd does not take you for root: %w", err), code: exitWrong,
			hint: "start each member with --client-cert-auth; until then nobody is let in by certificate",
		}
	}
	return nil
}
