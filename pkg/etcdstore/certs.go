package etcdstore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/ipam-ledger/ipam-ledger/internal/private"
)

// WarnBefore is how long before its end a certificate should be renewed: from
// then on all who look warn.
const WarnBefore = 14 * 24 * time.Hour

// Kind is whose certificate it is.
type Kind string

// Kinds of certificates.
const (
	ClientCert Kind = "client" // ours, in CertFile
	CACert     Kind = "ca"     // in CAFile: who may have signed etcd's
	EtcdCert   Kind = "etcd"   // as etcd showed it in a handshake
)

func (k Kind) String() string {
	switch k {
	case ClientCert:
		return "client certificate"
	case CACert:
		return "CA certificate"
	case EtcdCert:
		return "etcd's certificate"
	}
	return string(k)
}

// Cert is a certificate without which there is no contact with etcd.
type Cert struct {
	Kind      Kind      `json:"kind"`
	Where     string    `json:"where"` // its file; of etcd's the endpoint
	Subject   string    `json:"subject"`
	Issuer    string    `json:"issuer"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// Standing is whether a certificate is valid, and for how long.
type Standing int

// Standings, from the best.
const (
	Valid Standing = iota
	EndsSoon
	NotYet
	Expired
)

// Standing is how the certificate stands at a time.
func (c *Cert) Standing(now time.Time) Standing {
	switch {
	case now.Before(c.NotBefore):
		return NotYet
	case now.After(c.NotAfter):
		return Expired
	case !now.Before(c.NotAfter.Add(-WarnBefore)):
		return EndsSoon
	}
	return Valid
}

// Days are the whole days that are left; negative once it has expired.
func (c *Cert) Days(now time.Time) int {
	left := c.NotAfter.Sub(now)
	days := int(left / (24 * time.Hour))
	if left < 0 {
		days--
	}
	return days
}

// Earliest is the certificate that ends first; nil if there is none.
func Earliest(certs []Cert) *Cert {
	if len(certs) == 0 {
		return nil
	}
	first := slices.MinFunc(certs, func(a, b Cert) int { return a.NotAfter.Compare(b.NotAfter) })
	return &first
}

func newCert(k Kind, where string, c *x509.Certificate) Cert {
	return Cert{Kind: k, Where: where, Subject: nameOf(c), Issuer: printable(c.Issuer.String()), NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC()}
}

// nameOf is a certificate's subject or, where it has none, whom it is for.
func nameOf(c *x509.Certificate) string {
	if s := c.Subject.String(); s != "" {
		return printable(s)
	}
	return cmp.Or(printable(strings.Join(sans(c), ", ")), "no name")
}

// sans are the names that a server's certificate is for.
func sans(c *x509.Certificate) []string {
	out := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		out = append(out, ip.String())
	}
	return out
}

// printable keeps what somebody wrote into a certificate on one line.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// parsePEM returns the certificates in a file, and skips what is none.
func parsePEM(b []byte) (out []*x509.Certificate) {
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return out
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
}

// ofClient is what counts of a client certificate's file: its own certificate,
// which comes first, or an intermediate one that ends before it.
func ofClient(file string, chain []*x509.Certificate) Cert {
	first := chain[0]
	for _, c := range chain[1:] {
		if root := bytes.Equal(c.RawIssuer, c.RawSubject); !root && c.NotAfter.Before(first.NotAfter) {
			first = c
		}
	}
	return newCert(ClientCert, file, first)
}

// ofBundle is what counts of a CA file: the first to end of those that are
// valid. An old CA that was left in it after its end does no harm beside a
// valid one, and is only returned where there is none.
func ofBundle(file string, cas []*x509.Certificate, now time.Time) Cert {
	var all, valid []Cert
	for _, c := range cas {
		cert := newCert(CACert, file, c)
		all = append(all, cert)
		if s := cert.Standing(now); s == Valid || s == EndsSoon {
			valid = append(valid, cert)
		}
	}
	if len(valid) > 0 {
		return *Earliest(valid)
	}
	return slices.MaxFunc(all, func(a, b Cert) int { return a.NotAfter.Compare(b.NotAfter) })
}

// Files are the certificates that are configured, as they stand in their files
// now. It returns what can be read, with an error where not all can.
func (c Config) Files(now time.Time) (out []Cert, err error) {
	if c.CertFile != "" {
		b, rerr := os.ReadFile(c.CertFile)
		if chain := parsePEM(b); len(chain) > 0 {
			out = append(out, ofClient(c.CertFile, chain))
		} else {
			err = errors.Join(err, unreadable(ClientCert, c.CertFile, rerr))
		}
	}
	if c.CAFile != "" {
		b, rerr := os.ReadFile(c.CAFile)
		if cas := parsePEM(b); len(cas) > 0 {
			out = append(out, ofBundle(c.CAFile, cas, now))
		} else {
			err = errors.Join(err, unreadable(CACert, c.CAFile, rerr))
		}
	}
	return out, err
}

// Look is Files, and what each endpoint shows in a handshake now. An endpoint
// that does not answer is left out: others say that it does not.
func (c Config) Look(ctx context.Context, now time.Time) []Cert {
	out, _ := c.Files(now) // what cannot be read keeps every connection from being made
	for _, e := range c.Endpoints {
		if !c.secure(e) {
			continue
		}
		conn, err := Dial(ctx, c, e)
		var bad *TLSError
		switch {
		case err == nil:
			if cert, ok := Serving(conn, e); ok {
				out = append(out, cert)
			}
			conn.Close()
		case errors.As(err, &bad) && bad.Etcd != nil:
			out = append(out, *bad.Etcd)
		}
	}
	return out
}

// Serving is the certificate that etcd showed on a connection by Dial; false if
// that is without TLS.
func Serving(conn net.Conn, endpoint string) (Cert, bool) {
	t, ok := conn.(*tls.Conn)
	if !ok {
		return Cert{}, false
	}
	certs := t.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return Cert{}, false
	}
	return newCert(EtcdCert, endpoint, certs[0]), true
}

// TLSError says what is wrong with a certificate, a key or a CA, ours or etcd's.
type TLSError struct {
	Kind   Kind   // whose; "" where that is not known
	Msg    string // in a few words, which name no file: "the client certificate has expired"
	Detail string // with file, subject, dates, the clock
	Remedy string
	Local  bool  // known before etcd was asked, and the same for all endpoints
	Etcd   *Cert // etcd's, where that is what is wrong
	Err    error // what the TLS library said; may be nil
}

func (e *TLSError) Error() string {
	text := "TLS: " + e.Detail
	if e.Remedy != "" {
		text += ": " + e.Remedy
	}
	if e.Err != nil {
		text += " (" + e.Err.Error() + ")"
	}
	return text
}

func (e *TLSError) Unwrap() error { return e.Err }

// unreadable is a certificate's file that cannot be read, or holds none.
func unreadable(k Kind, file string, err error) *TLSError {
	e := &TLSError{Kind: k, Msg: "the " + k.String() + " cannot be read", Local: true}
	switch {
	case err == nil:
		e.Detail, e.Remedy = fmt.Sprintf("%s %s holds no certificate in PEM form", settingOf(k), file), "is it the right file, and whole?"
	default:
		e.Detail, e.Remedy = fmt.Sprintf("%s: %v", settingOf(k), err), remedyOf(err)
	}
	return e
}

func settingOf(k Kind) string {
	if k == CACert {
		return "caFile"
	}
	return "certFile"
}

func remedyOf(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return "run as its owner"
	}
	return "check the path"
}

// handshake is what one TLS handshake is made with, and what it showed.
type handshake struct {
	cfg    Config
	config *tls.Config
	client *x509.Certificate   // ours; nil: none
	cas    []*x509.Certificate // of CAFile
	// accepts are the names of the CAs of which etcd takes clients' certificates,
	// where it said so.
	accepts [][]byte
}

// prepare reads the certificate files. It is called for each connection, so that
// replaced files are taken up.
func (c Config) prepare(now time.Time) (*handshake, error) {
	h := &handshake{cfg: c, config: &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}}
	if c.CAFile != "" {
		b, err := os.ReadFile(c.CAFile)
		if h.cas = parsePEM(b); len(h.cas) == 0 {
			return nil, unreadable(CACert, c.CAFile, err)
		}
		h.config.RootCAs = x509.NewCertPool()
		for _, ca := range h.cas {
			h.config.RootCAs.AddCert(ca)
		}
	}
	if c.CertFile == "" {
		return h, nil
	}
	b, err := os.ReadFile(c.CertFile)
	if len(parsePEM(b)) == 0 {
		return nil, unreadable(ClientCert, c.CertFile, err)
	}
	key, err := c.secret(c.KeyFile)
	var refused *private.Error
	switch {
	case errors.As(err, &refused):
		return nil, &TLSError{Kind: ClientCert, Msg: "the client's key is refused, because others can use it", Detail: "keyFile: " + err.Error(), Local: true}
	case err != nil:
		return nil, &TLSError{Kind: ClientCert, Msg: "the client's key cannot be read", Detail: "keyFile: " + err.Error(), Remedy: remedyOf(err), Local: true}
	}
	pair, err := tls.X509KeyPair(b, key)
	if err != nil {
		return nil, &TLSError{
			Kind:   ClientCert,
			Msg:    "the client certificate and its key do not fit each other",
			Detail: fmt.Sprintf("client certificate %s and key %s do not fit each other", c.CertFile, c.KeyFile),
			Remedy: "install both as they were issued; if they are just being replaced, the next try finds both", Local: true, Err: err,
		}
	}
	h.client = pair.Leaf
	if cert := newCert(ClientCert, c.CertFile, h.client); cert.Standing(now) >= NotYet {
		e := outdated(&cert, now)
		e.Local = true
		return nil, e
	}
	// Go would keep back a certificate whose CA etcd did not name, and etcd would
	// say that there was none.
	h.config.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		h.accepts = r.AcceptableCAs
		return &pair, nil
	}
	return h, nil
}

// secret reads a file that nobody else may use.
func (c Config) secret(file string) ([]byte, error) {
	if c.Exposed {
		return os.ReadFile(file)
	}
	return private.Read(file)
}

// password is Password or what PasswordFile holds now.
func (c Config) password() (string, error) {
	if c.PasswordFile == "" {
		return c.Password, nil
	}
	b, err := c.secret(c.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("passwordFile: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

// outdated says that a certificate has expired, or is not valid yet.
func outdated(c *Cert, now time.Time) *TLSError {
	what := c.Kind.String()
	if c.Kind != EtcdCert {
		what += " " + c.Where
	}
	state, remedy := "has expired", "renew it, or set the clock"
	if now.Before(c.NotBefore) {
		state, remedy = "is not valid yet", "set the clock, or wait"
	}
	short := c.Kind.String()
	if c.Kind != EtcdCert {
		short = "the " + short
	}
	e := &TLSError{
		Kind: c.Kind,
		Msg:  short + " " + state,
		Detail: fmt.Sprintf("%s (%s, signed by %s) %s: it is valid from %s to %s UTC, and the clock says %s",
			what, c.Subject, c.Issuer, state, c.NotBefore.UTC().Format(time.DateTime), c.NotAfter.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime)),
		Remedy: remedy,
	}
	if c.Kind == EtcdCert {
		e.Etcd = c
	}
	return e
}

// explain names what made a handshake fail; endpoint is for whom it is told.
func (h *handshake) explain(err error, endpoint string) error {
	now := time.Now()
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && slices.ContainsFunc(h.cas, invalid.Cert.Equal):
		return h.endedCA(invalid.Cert, now, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		cert := newCert(EtcdCert, endpoint, invalid.Cert)
		e := outdated(&cert, now)
		e.Err = err
		return e
	case errors.As(err, &invalid):
		return &TLSError{
			Kind: EtcdCert, Msg: "etcd's certificate cannot be used", Detail: "etcd's certificate (" + nameOf(invalid.Cert) + ") cannot be used",
			Remedy: "it has to be issued anew, for a server", Err: err,
		}
	case errors.As(err, &unknown):
		return h.unknown(unknown.Cert, now, err)
	case errors.As(err, &name):
		return &TLSError{
			Kind: EtcdCert, Msg: "etcd's certificate is for another name",
			Detail: fmt.Sprintf("etcd's certificate is for another name than the endpoint: it is for %s, and the endpoint says %s",
				cmp.Or(printable(strings.Join(sans(name.Certificate), ", ")), "none"), name.Host),
			Remedy: "use an endpoint that it is for, or have it issued anew", Err: err,
		}
	case errors.As(err, &record), errors.Is(err, io.EOF):
		return &TLSError{Msg: "etcd does not speak TLS", Detail: "etcd does not speak TLS here", Remedy: "use http://, or its TLS port", Err: err}
	case strings.Contains(err.Error(), "remote error: tls:"):
		return h.refused(now, err)
	}
	return fmt.Errorf("TLS handshake: %w", err)
}

// endedCA says that the CA of etcd's certificate is not valid now.
func (h *handshake) endedCA(ca *x509.Certificate, now time.Time, err error) *TLSError {
	c := newCert(CACert, h.cfg.CAFile, ca)
	e := outdated(&c, now)
	e.Remedy, e.Err = "set caFile to etcd's CA as it is now, or set the clock", err
	return e
}

// unknown says why none of our CAs has signed etcd's certificate.
func (h *handshake) unknown(cert *x509.Certificate, now time.Time, err error) *TLSError {
	e := &TLSError{Kind: EtcdCert, Msg: "etcd's certificate is not signed by our CA", Err: err}
	var have []string
	for _, ca := range h.cas {
		have = append(have, nameOf(ca))
		if cert == nil || !bytes.Equal(ca.RawSubject, cert.RawIssuer) {
			continue
		}
		// Go does not take a CA that has expired for one.
		if c := newCert(CACert, h.cfg.CAFile, ca); c.Standing(now) >= NotYet {
			return h.endedCA(ca, now, err)
		}
	}
	by := h.cfg.CAFile
	if by == "" {
		by = "the system's roots (caFile is not set)"
	}
	e.Detail = "etcd's certificate is not signed by " + by
	e.Remedy = "set caFile to the CA of etcd's certificate; or is this another etcd?"
	if cert == nil {
		return e
	}
	issuer := printable(cert.Issuer.String())
	e.Detail += fmt.Sprintf(", but by %s (%s)", cmp.Or(issuer, "nobody"), nameOf(cert))
	if slices.Contains(have, issuer) {
		e.Detail += ", of which the file holds one with another key"
	} else if len(have) > 0 {
		e.Detail += ", and the file holds " + strings.Join(have[:min(3, len(have))], "; ")
	}
	return e
}

// refused says why etcd does not let us in, as far as its alert tells.
func (h *handshake) refused(now time.Time, err error) *TLSError {
	e := &TLSError{Kind: ClientCert, Msg: "etcd refuses the client certificate", Detail: "etcd refuses " + h.who(), Err: err}
	if h.client == nil {
		e.Msg, e.Remedy = "etcd wants a client certificate", "set certFile and keyFile"
		return e
	}
	e.Remedy = "use a certificate that etcd's --trusted-ca-file has signed"
	foreign := len(h.accepts) > 0 && !slices.ContainsFunc(h.accepts, func(raw []byte) bool { return bytes.Equal(raw, h.client.RawIssuer) })
	switch text := err.Error(); {
	case strings.Contains(text, "expired certificate"):
		// By our clock it has not, or it would not have been sent.
		e.Msg = "etcd says that the client certificate has expired"
		e.Detail += fmt.Sprintf(" as expired or not valid yet; it is valid from %s to %s UTC, and the clock here says %s",
			h.client.NotBefore.UTC().Format(time.DateTime), h.client.NotAfter.UTC().Format(time.DateTime), now.UTC().Format(time.DateTime))
		e.Remedy = "compare etcd's clock with this one; is an intermediate certificate in the file outdated?"
	case strings.Contains(text, "revoked"):
		e.Msg, e.Detail, e.Remedy = "etcd says that the client certificate was revoked", e.Detail+" as revoked", "get another one"
	case foreign, strings.Contains(text, "unknown certificate authority"):
		e.Msg = "etcd does not trust the CA of the client certificate"
		e.Detail += ": it does not trust the CA that signed it"
		if foreign {
			e.Detail += ", but only " + h.accepted()
		} else {
			e.Detail += " (one of the same name, with another key?)"
		}
	case !forClients(h.client):
		e.Detail += ": it was not issued for clients (extended key usage)"
		e.Remedy = "have it issued anew with the usage client auth"
	}
	return e
}

func forClients(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// accepted names the CAs that etcd trusts.
func (h *handshake) accepted() string {
	var names []string
	for _, raw := range h.accepts {
		if len(names) == 3 {
			names = append(names, fmt.Sprintf("%d more", len(h.accepts)-3))
			break
		}
		names = append(names, rdn(raw))
	}
	return strings.Join(names, "; ")
}

// silence is what it most likely means that etcd ends a connection right after
// the handshake, without a word.
func (h *handshake) silence() *TLSError {
	return &TLSError{
		Kind:   ClientCert,
		Msg:    "etcd refuses the client certificate",
		Detail: "etcd closed the connection right after the handshake: most likely it refuses " + h.who(),
		Remedy: "compare with etcd's --trusted-ca-file, and look into its log",
	}
}

// who is what the server sees of this client.
func (h *handshake) who() string {
	if h.client == nil {
		return "this client, which has no certificate (certFile is not set)"
	}
	return fmt.Sprintf("client certificate %s (%s, signed by %s)", h.cfg.CertFile, nameOf(h.client), printable(h.client.Issuer.String()))
}

// rdn is a CA's name as it stands in a handshake.
func rdn(raw []byte) string {
	var seq pkix.RDNSequence
	if rest, err := asn1.Unmarshal(raw, &seq); err != nil || len(rest) > 0 {
		return "a CA whose name cannot be read"
	}
	return printable(seq.String())
}
