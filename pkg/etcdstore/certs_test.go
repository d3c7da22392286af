package etcdstore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
)

const day = 24 * time.Hour

// issuer is a CA.
type issuer struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func span(from, to time.Duration) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func encoded(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// newCA makes a CA; by is its own issuer, nil for a root.
func newCA(t *testing.T, name string, by *issuer, change ...func(*x509.Certificate)) *issuer {
	t.Helper()
	c := &issuer{t: t, key: newKey(t), cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	span(-2*day, 365*day)(c.cert)
	for _, f := range change {
		f(c.cert)
	}
	if by == nil {
		by = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c.cert, by.cert, c.key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	if c.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	c.pem = encoded("CERTIFICATE", der)
	return c
}

// issue makes a certificate and its key, in PEM form.
func (c *issuer) issue(name string, change ...func(*x509.Certificate)) (cert, key []byte) {
	c.t.Helper()
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	span(-day, 90*day)(leaf)
	for _, f := range change {
		f(leaf)
	}
	own := newKey(c.t)
	der, err := x509.CreateCertificate(rand.Reader, leaf, c.cert, own.Public(), c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		c.t.Fatal(err)
	}
	return encoded("CERTIFICATE", der), encoded("PRIVATE KEY", pkcs8)
}

// put writes a file of mode 0600 below dir.
func put(t *testing.T, dir, name string, parts ...[]byte) string {
	t.Helper()
	file := filepath.Join(dir, name)
	var all []byte
	for _, b := range parts {
		all = append(all, b...)
	}
	if err := os.WriteFile(file, all, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestStanding(t *testing.T) {
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	c := Cert{NotBefore: now.Add(-90 * day), NotAfter: now}
	for _, tc := range []struct {
		before time.Duration
		want   Standing
		days   int
	}{
		{91 * day, NotYet, 91},
		{90 * day, Valid, 90},
		{WarnBefore + time.Second, Valid, 14},
		{WarnBefore, EndsSoon, 14},
		{WarnBefore - time.Second, EndsSoon, 13},
		{day, EndsSoon, 1},
		{time.Second, EndsSoon, 0},
		{0, EndsSoon, 0},
		{-time.Second, Expired, -1},
		{-25 * time.Hour, Expired, -2},
	} {
		at := now.Add(-tc.before)
		if got := c.Standing(at); got != tc.want {
			t.Errorf("%v before its end: standing %d, want %d", tc.before, got, tc.want)
		}
		if got := c.Days(at); got != tc.days {
			t.Errorf("%v before its end: %d days, want %d", tc.before, got, tc.days)
		}
	}
}

// TestFiles: which certificate of a file counts.
func TestFiles(t *testing.T) {
	now, dir := time.Now(), t.TempDir()
	old, late := newCA(t, "old", nil, span(-9*day, -day)), newCA(t, "late", nil, span(-3*day, 300*day))
	soon, older := newCA(t, "soon", nil, span(-3*day, 5*day)), newCA(t, "older", nil, span(-19*day, -11*day))
	future := newCA(t, "future", nil, span(2*day, 3*day))
	middle := newCA(t, "middle", late, span(-3*day, 7*day))
	root := newCA(t, "root", nil, span(-3*day, day))
	leaf, _ := middle.issue("leaf")
	for name, tc := range map[string]struct {
		cfg  Config
		want string
	}{
		"the first of the valid":   {Config{CAFile: put(t, dir, "1", old.pem, late.pem, soon.pem, future.pem)}, "soon"},
		"what is left over":        {Config{CAFile: put(t, dir, "2", old.pem, late.pem)}, "late"},
		"none valid":               {Config{CAFile: put(t, dir, "3", older.pem, old.pem)}, "old"},
		"text around":              {Config{CAFile: put(t, dir, "4", []byte("# ours\n"), late.pem, []byte("-----BEGIN CERT"))}, "late"},
		"an intermediate":          {Config{CertFile: put(t, dir, "5", leaf, middle.pem)}, "middle"},
		"a root beside a client's": {Config{CertFile: put(t, dir, "6", leaf, root.pem)}, "leaf"},
	} {
		certs, err := tc.cfg.Files(now)
		if err != nil || len(certs) != 1 || certs[0].Subject != "CN="+tc.want {
			t.Errorf("%s: got %+v, %v, want %s", name, certs, err, tc.want)
		}
	}
	certs, err := Config{CAFile: put(t, dir, "7", late.pem), CertFile: filepath.Join(dir, "absent")}.Files(now)
	if err == nil || len(certs) != 1 || certs[0].Kind != CACert || certs[0].Where != filepath.Join(dir, "7") {
		t.Errorf("%+v, %v", certs, err)
	}
	if c := Earliest(nil); c != nil {
		t.Error(c)
	}
	if c := Earliest([]Cert{{Subject: "b", NotAfter: now.Add(day)}, {Subject: "a", NotAfter: now}}); c.Subject != "a" {
		t.Error(c)
	}
}

// says fails unless err is a TLSError that says all of parts; first is its Msg.
func says(t *testing.T, err error, msg string, parts ...string) *TLSError {
	t.Helper()
	var bad *TLSError
	if !errors.As(err, &bad) {
		t.Errorf("got %v, want a TLSError: %s", err, msg)
		return nil
	}
	if bad.Msg != msg {
		t.Errorf("got %q, want %q: %v", bad.Msg, msg, err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q is not in %v", p, err)
		}
	}
	if strings.ContainsAny(bad.Error(), "\n\x1b") {
		t.Errorf("not one line: %q", bad.Error())
	}
	return bad
}

// TestLocal: what is wrong with our own files is known before anybody is dialed.
func TestLocal(t *testing.T) {
	dir := t.TempDir()
	ca := newCA(t, "our CA", nil)
	caFile := put(t, dir, "ca", ca.pem)
	cert, key := ca.issue("node:a")
	other, otherKey := ca.issue("node:b")
	expired, expiredKey := ca.issue("node:c\n\x1b[31m", span(-30*day, -3*day))
	early, earlyKey := ca.issue("node:d", span(time.Hour, day))
	files := func(cert, key []byte) Config {
		d := t.TempDir()
		return Config{CAFile: caFile, CertFile: put(t, d, "cert", cert), KeyFile: put(t, d, "key", key)}
	}
	open := files(cert, key)
	if err := os.Chmod(open.KeyFile, 0o644); err != nil {
		t.Fatal(err)
	}
	absent := func(change func(c *Config)) Config {
		c := files(cert, key)
		change(&c)
		return c
	}
	const gone = "/nonexistent/file"
	for name, tc := range map[string]struct {
		cfg  Config
		msg  string
		says []string
	}{
		"expired":           {files(expired, expiredKey), "the client certificate has expired", []string{"/cert (CN=node:c??[31m, signed by CN=our CA) has expired: it is valid from ", "and the clock says ", "renew it, or set the clock"}},
		"not yet":           {files(early, earlyKey), "the client certificate is not valid yet", []string{"CN=node:d", "set the clock"}},
		"another's key":     {files(cert, otherKey), "the client certificate and its key do not fit each other", []string{"/cert", "/key", "as they were issued"}},
		"half written":      {files(other, key), "the client certificate and its key do not fit each other", nil},
		"truncated":         {files(cert[:len(cert)/2], key), "the client certificate cannot be read", []string{"holds no certificate in PEM form"}},
		"empty":             {files(nil, key), "the client certificate cannot be read", nil},
		"no key in it":      {files(cert, cert), "the client certificate and its key do not fit each other", nil},
		"key others read":   {open, "the client's key is refused, because others can use it", []string{"has mode 0644", "chmod 600 " + open.KeyFile}},
		"no certificate":    {absent(func(c *Config) { c.CertFile = gone }), "the client certificate cannot be read", []string{"certFile: ", gone, "no such file"}},
		"no key":            {absent(func(c *Config) { c.KeyFile = gone }), "the client's key cannot be read", []string{"keyFile: ", gone}},
		"no CA":             {absent(func(c *Config) { c.CAFile = gone }), "the CA certificate cannot be read", []string{"caFile: ", gone}},
		"CA file of a key":  {absent(func(c *Config) { c.CAFile = c.KeyFile }), "the CA certificate cannot be read", []string{"caFile ", "holds no certificate"}},
		"a directory as CA": {absent(func(c *Config) { c.CAFile = dir }), "the CA certificate cannot be read", []string{"is a directory"}},
	} {
		t.Run(name, func(t *testing.T) {
			tc.cfg.Endpoints = []string{"https://127.0.0.1:1", "https://127.0.0.1:2"} // where nobody listens
			_, err := New(tc.cfg).Read(t.Context(), false, []allocator.Get{{Key: "k"}})
			if !errors.Is(err, allocator.ErrUnavailable) {
				t.Errorf("not unavailable: %v", err)
			}
			bad := says(t, err, tc.msg, tc.says...)
			if bad != nil && !bad.Local {
				t.Errorf("not local: %v", err)
			}
			if n := strings.Count(err.Error(), "https://"); n != 1 {
				t.Errorf("%d endpoints are named, and all would have us say the same: %v", n, err)
			}
		})
	}
	// A DEL's: the secret is out already.
	open.Exposed = true
	if _, err := open.TLS(); err != nil {
		t.Error(err)
	}
	password := put(t, dir, "password", []byte("s3cret\r\n"))
	if got, err := (Config{PasswordFile: password}).password(); got != "s3cret" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if err := os.Chmod(password, 0o604); err != nil {
		t.Fatal(err)
	}
	_, err := New(Config{PasswordFile: password, Endpoints: []string{"http://127.0.0.1:1"}}).Read(t.Context(), false, nil)
	if err == nil || !strings.Contains(err.Error(), "chmod 600 "+password) || strings.Contains(err.Error(), "s3cret") {
		t.Error(err)
	}
}

// server takes TLS connections and, after the handshake, what comes on them.
func server(t *testing.T, c *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				if c != nil {
					conn = tls.Server(conn, c)
				} else if _, err := conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); conns.Wait() })
	return "https://" + l.Addr().String()
}

// TestHandshake: what is wrong with etcd's certificate, or with ours in etcd's
// eyes, is named.
func TestHandshake(t *testing.T) {
	ca, twin, foreign := newCA(t, "our CA", nil), newCA(t, "our CA", nil), newCA(t, "other CA", nil)
	ended := newCA(t, "ended CA", nil, span(-30*day, -3*day))
	usage := func(u x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{u} }
	}
	elsewhere := func(c *x509.Certificate) {
		c.IPAddresses, c.DNSNames = []net.IP{net.IPv4(192, 0, 2, 7)}, []string{"etcd-0.local"}
	}
	const trust = "use a certificate that etcd's --trusted-ca-file has signed"
	for _, tc := range []struct {
		name         string
		server       *issuer
		serverChange func(*x509.Certificate)
		trusts       *issuer // of the client
		client       *issuer // nil: no certificate
		clientChange func(*x509.Certificate)
		msg          string
		says         []string
		kind         Kind
	}{
		{"expired", ca, span(-30*day, -3*day), ca, ca, nil, "etcd's certificate has expired", []string{"etcd's certificate (CN=etcd, signed by CN=our CA) has expired: it is valid from ", "the clock says", "renew it"}, EtcdCert},
		{"not yet", ca, span(time.Hour, day), ca, ca, nil, "etcd's certificate is not valid yet", []string{"set the clock"}, EtcdCert},
		{"another name", ca, elsewhere, ca, ca, nil, "etcd's certificate is for another name", []string{"it is for etcd-0.local, 192.0.2.7, and the endpoint says 127.0.0.1"}, EtcdCert},
		{"not for servers", ca, usage(x509.ExtKeyUsageClientAuth), ca, ca, nil, "etcd's certificate cannot be used", []string{"incompatible key usage"}, EtcdCert},
		{"of another CA", foreign, nil, ca, ca, nil, "etcd's certificate is not signed by our CA", []string{"but by CN=other CA (CN=etcd), and the file holds CN=our CA", "set caFile"}, EtcdCert},
		{"of a CA of the same name", twin, nil, ca, ca, nil, "etcd's certificate is not signed by our CA", []string{"of which the file holds one with another key"}, EtcdCert},
		{"of a CA that has ended", ended, nil, ended, ca, nil, "the CA certificate has expired", []string{"CA certificate ", "CN=ended CA", "set caFile to etcd's CA as it is now"}, CACert},
		{"no client certificate", ca, nil, ca, nil, nil, "etcd wants a client certificate", []string{"which has no certificate (certFile is not set)", "set certFile and keyFile"}, ClientCert},
		{"a foreign client", ca, nil, ca, foreign, nil, "etcd does not trust the CA of the client certificate", []string{"(CN=client, signed by CN=other CA)", "but only CN=our CA", trust}, ClientCert},
		{"a client of a CA of the same name", ca, nil, ca, twin, nil, "etcd does not trust the CA of the client certificate", []string{"one of the same name, with another key?", trust}, ClientCert},
		{"a client's for servers", ca, nil, ca, ca, usage(x509.ExtKeyUsageServerAuth), "etcd refuses the client certificate", []string{"it was not issued for clients"}, ClientCert},
		{"all is well but the protocol", ca, nil, ca, ca, nil, "", nil, ""},
	} {
		for version, name := range map[uint16]string{tls.VersionTLS12: "TLS 1.2", tls.VersionTLS13: "TLS 1.3"} {
			t.Run(tc.name+"/"+name, func(t *testing.T) {
				dir := t.TempDir()
				if tc.serverChange == nil {
					tc.serverChange = func(*x509.Certificate) {}
				}
				if tc.clientChange == nil {
					tc.clientChange = func(*x509.Certificate) {}
				}
				pair, err := tls.X509KeyPair(tc.server.issue("etcd", tc.serverChange))
				if err != nil {
					t.Fatal(err)
				}
				pool := x509.NewCertPool()
				pool.AddCert(ca.cert)
				sc := &tls.Config{
					Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
					MinVersion: version, MaxVersion: version, NextProtos: []string{"h2"},
				}
				cfg := Config{Endpoints: []string{server(t, sc)}, CAFile: put(t, dir, "ca", tc.trusts.pem)}
				if tc.client != nil {
					cert, key := tc.client.issue("client", tc.clientChange)
					cfg.CertFile, cfg.KeyFile = put(t, dir, "cert", cert), put(t, dir, "key", key)
				}
				s := New(cfg)
				defer s.Close()
				wait := 10 * time.Second
				if tc.msg == "" {
					wait = 200 * time.Millisecond // nobody answers
				}
				ctx, cancel := context.WithTimeout(t.Context(), wait)
				defer cancel()
				_, err = s.Read(ctx, false, []allocator.Get{{Key: "k"}})
				if tc.msg == "" {
					if bad := (*TLSError)(nil); err == nil || errors.As(err, &bad) {
						t.Errorf("TLS is well, and it says %v", err)
					}
					if c, ok := s.Serving(); ok && (c.Kind != EtcdCert || c.Subject != "CN=etcd" || c.Where != cfg.Endpoints[0]) {
						t.Errorf("%+v", c)
					}
					if c := Earliest(cfg.Look(t.Context(), time.Now())); c == nil || c.Days(time.Now()) != 89 {
						t.Errorf("%+v", c)
					}
					return
				}
				if ctx.Err() != nil {
					t.Error("it took the whole deadline")
				}
				bad := says(t, err, tc.msg, tc.says...)
				if bad == nil {
					return
				}
				if bad.Kind != tc.kind || bad.Local {
					t.Errorf("kind %q, local %t: %v", bad.Kind, bad.Local, err)
				}
				// Who looks at certificates sees etcd's also where it has expired.
				if tc.msg == "etcd's certificate has expired" {
					if c := Earliest(cfg.Look(t.Context(), time.Now())); c == nil || c.Kind != EtcdCert || c.Standing(time.Now()) != Expired {
						t.Errorf("Look: %+v", c)
					}
				}
			})
		}
	}
	t.Run("plaintext", func(t *testing.T) {
		_, err := Dial(t.Context(), Config{}, server(t, nil))
		says(t, err, "etcd does not speak TLS", "use http://, or its TLS port")
	})
}
