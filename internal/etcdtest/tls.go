package etcdtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Authority issues throw-away certificates. Nobody else trusts it.
type Authority struct {
	dir    string
	file   string
	cert   *x509.Certificate
	key    crypto.Signer
	serial int64
}

// NewAuthority makes an authority of its own: another CA than etcd's, for a
// client that is a stranger.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{dir: t.TempDir(), key: newKey(t), serial: 1}
	from := startOfValidity()
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: "throw-away CA"},
		NotBefore: from, NotAfter: from.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	a.file = filepath.Join(a.dir, "ca.pem")
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

// File is the authority's own certificate.
func (a *Authority) File() string { return a.file }

// Issue makes a key and a certificate with a common name, for a client or for a
// server on loopback, valid from an hour ago to a day from then. change may set
// it otherwise: func(c *x509.Certificate) { c.NotAfter = … }.
func (a *Authority) Issue(t testing.TB, commonName string, change ...func(*x509.Certificate)) Files {
	t.Helper()
	a.serial++
	from := startOfValidity()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: commonName},
		NotBefore: from, NotAfter: from.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature,
		// etcd's server is a client of itself, too.
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}
	for _, f := range change {
		f(c)
	}
	own := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, own.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(a.dir, fmt.Sprint(a.serial))
	f := Files{CA: a.file, Cert: name + ".pem", Key: name + ".key"}
	writePEM(t, f.Cert, "CERTIFICATE", der)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, f.Key, "PRIVATE KEY", pkcs8)
	return f
}

// startOfValidity is an hour back, for a clock that is stepped during the test.
func startOfValidity() time.Time { return time.Now().Add(-time.Hour) }

func newKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func writePEM(t testing.TB, file, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}
