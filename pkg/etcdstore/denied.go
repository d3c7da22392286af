package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/ipam-ledger/ipam-ledger/pkg/access"
	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
)

// ErrDenied marks that etcd knows who asks, or that nobody does, and that its
// roles do not allow what was asked.
var ErrDenied = errors.New("etcd's roles do not allow this")

// deniedTimeout is for asking etcd what the user may do, after it said no.
const deniedTimeout = 2 * time.Second

// Explain says who was denied what is denied by etcd's roles, and what lets
// them: it asks etcd what it knows of the user. Other errors it returns as they
// are.
func (s *Store) Explain(ctx context.Context, err error) error {
	var known *denial
	if err == nil || errors.As(err, &known) {
		return err
	}
	switch {
	case errors.Is(err, rpctypes.ErrPermissionDenied):
	case errors.Is(err, rpctypes.ErrUserEmpty) && s.cfg.CertFile != "" && s.cfg.Username == "":
		return &denial{fmt.Sprintf("etcd does not take the name in client certificate %s for its user: start etcd with --client-cert-auth", s.cfg.CertFile), err}
	default:
		return err
	}
	user, from := s.cfg.user()
	if user == "" {
		return &denial{fmt.Sprintf("%s, which is etcd's user: give it the name that 'ledger auth plan' shows", from), err}
	}
	me := fmt.Sprintf("user %q (%s)", user, from)
	remedy := "'ledger auth apply --node NODE --cn node/NODE=" + user + "'"
	if sub, ok := access.OfUser(user); ok {
		remedy = "'ledger auth apply " + sub.Flags(user) + "'"
	}
	roles, aerr := s.roles(ctx, user)
	switch {
	case errors.Is(aerr, rpctypes.ErrUserNotFound):
		return &denial{fmt.Sprintf("there is no %s; if this is the right one, an operator runs %s", me, remedy), err}
	case aerr != nil:
		return &denial{fmt.Sprintf("it answered so to %s, and not what roles that has (%v); 'ledger auth plan' shows them", me, aerr), err}
	case len(roles) == 0:
		return &denial{fmt.Sprintf("%s has no role; an operator runs %s", me, remedy), err}
	}
	return &denial{fmt.Sprintf("%s has %s, which does not cover it: is this the right user? 'ledger auth plan' shows what a role lacks", me, strings.Join(roles, ", ")), err}
}

// denial is an ErrDenied with its cause. To the allocator it is an
// allocator.ErrUnavailable, which it does not say: etcd was reached.
type denial struct {
	text  string
	cause error
}

func (d *denial) Is(target error) bool { return target == allocator.ErrUnavailable }

func (d *denial) Error() string   { return ErrDenied.Error() + ": " + d.text }
func (d *denial) Unwrap() []error { return []error{ErrDenied, d.cause} }

// roles asks etcd for the caller's own roles, which anybody may.
func (s *Store) roles(ctx context.Context, user string) ([]string, error) {
	if s.session == nil || s.session.dead.Err() != nil {
		return nil, errors.New("the connection broke")
	}
	ctx, unbind := s.session.bound(ctx)
	defer unbind()
	ctx, cancel := context.WithTimeout(ctx, deniedTimeout)
	defer cancel()
	r, err := s.session.client.UserGet(ctx, user)
	if err != nil {
		return nil, err
	}
	return r.Roles, nil
}

// User is etcd's user of this configuration: the one that is named, else the
// common name of the client certificate; "" where there is neither.
func (c Config) User() string {
	user, _ := c.user()
	return user
}

// user is etcd's user, and where its name comes from.
func (c Config) user() (name, from string) {
	if c.Username != "" {
		return c.Username, "by name and password"
	}
	if c.CertFile == "" {
		return "", "there is neither a username nor a client certificate, whose name (CN) could be"
	}
	b, err := os.ReadFile(c.CertFile)
	certs := parsePEM(b)
	if err != nil || len(certs) == 0 {
		return "", fmt.Sprintf("client certificate %s cannot be read now, and so not its name (CN)", c.CertFile)
	}
	if cn := certs[0].Subject.CommonName; cn != "" {
		return cn, "the name (CN) in " + c.CertFile
	}
	return "", fmt.Sprintf("client certificate %s has no name (CN)", c.CertFile)
}

// stale reports whether etcd refused because roles changed between its taking
// the request and its doing it. Then it was not done, and may be sent again.
func stale(err error) bool { return errors.Is(err, rpctypes.ErrAuthOldRevision) }
