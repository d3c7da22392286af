package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// fast is below what anybody would wait for.
const fast = 3 * time.Second

func (r *reply) fast() *reply {
	r.t.Helper()
	if r.took > fast {
		r.t.Errorf("%s took %v", r.what, r.took)
	}
	return r
}

// TestDown: without etcd no pod starts, and none hangs in Terminating.
func TestDown(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	for i := range 12 {
		n.call("ADD", fmt.Sprint("c", i), w).ok()
	}
	c.etcd.Stop()
	n.call("ADD", "new", w).fast().refused(codeTryAgain, c.etcd.Endpoint(), "refused")
	n.call("ADD", "c0", w).fast().refused(codeTryAgain, c.etcd.Endpoint())
	for i := range 11 {
		n.call("DEL", fmt.Sprint("c", i), w).fast().ok()
	}
	n.call("DEL", "c0", w).fast().ok()
	n.wantQueue(11)
	n.call("CHECK", "c11", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.13/24"}]}`)).fast().refused(codeTryAgain, c.etcd.Endpoint())
	n.call("GC", "", w.with(`"cni.dev/valid-attachments": []`)).fast().refused(codeTryAgain, c.etcd.Endpoint())
	if r := n.ledger("queue", "list", "-o", "name").ok(); strings.Count(r.stdout, "\n") != 11 {
		t.Errorf("queue list: %q", r.stdout)
	}
	// Another network's DEL, without any of ours.
	n.call("DEL", "x", network{name: "other", ipam: `"subnet": "10.2.0.0/24"`}).ok()
	n.wantQueue(12)

	c.etcd.Restart(t)
	// An ADD for an attachment that is queued settles that first.
	n.call("ADD", "c3", w).want("10.1.0.14/24")
	if got := n.queue(); got >= 12 || got == 0 {
		t.Errorf("%d releases wait after an ADD, want some settled and not all at once", got)
	}
	n.forget("asked")
	n.call("STATUS", "", w).ok()
	c.wantLeased("10.1.0.13", "10.1.0.14")
	n.isSettled()
	n.call("DEL", "c3", w).ok()
	n.call("DEL", "c11", w).ok()
	c.wantLeased()
}

// TestFlush: the command drains what no pod does.
func TestFlush(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	for i := range 20 {
		n.call("ADD", fmt.Sprint("c", i), w).ok()
	}
	c.etcd.Stop()
	for i := range 20 {
		n.call("DEL", fmt.Sprint("c", i), w).ok()
	}
	if r := n.ledger("queue", "flush", "--timeout", "1s"); r.exit == 0 {
		t.Errorf("queue flush without etcd: %s", r.stdout)
	}
	n.wantQueue(20)
	c.etcd.Restart(t)
	n.ledger("queue", "flush").ok()
	c.wantLeased()
	n.isSettled()
}

// TestStatus: 50 is for no contact during the grace, and for nothing cluster-wide.
func TestStatus(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1", `"statusGrace": "60s"`)
	w := subnet("10.1.0.0/24")
	n.call("STATUS", "", w).ok()
	n.call("ADD", "c1", w).ok()
	// It does not ask all the time.
	got := c.etcd.RequestsDuring(t, func() {
		for range 3 {
			n.call("STATUS", "", w).ok()
		}
	})
	if len(got) > 0 {
		t.Errorf("three STATUS in a row asked etcd: %v", got)
	}
	c.etcd.Stop()
	n.forget("asked")
	n.call("STATUS", "", w).fast().ok() // within the grace
	n.age("contact", 59*time.Second)
	n.forget("asked")
	n.call("STATUS", "", w).fast().ok()
	n.age("contact", 61*time.Second)
	n.forget("asked")
	n.call("STATUS", "", w).fast().refused(codeUnreachable, "n1", c.etcd.Endpoint(), "ledger doctor", "1m1s")
	// Not asked again so soon, and still known: a node that is not ready is not
	// ready a moment later without reason.
	for range 3 {
		n.call("STATUS", "", w).fast().refused(codeUnreachable, c.etcd.Endpoint(), "refused")
	}
	n.age("contact", 95*time.Second)
	n.call("STATUS", "", w).fast().refused(codeUnreachable, c.etcd.Endpoint())
	fresh := c.node("n2")
	fresh.call("STATUS", "", w).fast().refused(codeUnreachable, "n2")
	c.etcd.Restart(t)
	n.forget("asked")
	n.call("STATUS", "", w).ok()
	n.call("STATUS", "", w).ok()
	fresh.forget("asked")
	fresh.call("STATUS", "", w).ok()
	// The same for what is wrong with this node; an ADD that works ends it.
	client := c.etcd.Client(t)
	key := keys.Writer(entry.Writer{Kind: entry.KindNode, Name: "n1"})
	was, err := client.Get(t.Context(), key)
	if err != nil || len(was.Kvs) != 1 {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), key, strings.Replace(string(was.Kvs[0].Value), `"seq":`, `"seq":1`, 1)); err != nil {
		t.Fatal(err)
	}
	n.forget("asked")
	for range 3 {
		n.call("STATUS", "", w).fast().refused(codeIntegrity, "ledger node replace n1")
	}
	if _, err := client.Put(t.Context(), key, string(was.Kvs[0].Value)); err != nil {
		t.Fatal(err)
	}
	n.call("STATUS", "", w).refused(codeIntegrity)
	n.call("ADD", "c2", w).ok()
	n.call("STATUS", "", w).ok()
	// A stamp of another boot, of the future, or one that is spoilt, is none: etcd is
	// asked, and where it does not answer there was no contact.
	here, err := statedir.Now()
	if err != nil {
		t.Fatal(err)
	}
	other, future := here, here
	other.Boot, future.Since = "9d2f0c6e-0000-4000-8000-000000000000", here.Since+time.Hour
	spoil := map[string]func(stamp string) error{
		"another boot's": func(stamp string) error { return n.stateDir().Stamp(stamp, other) },
		"the future's":   func(stamp string) error { return n.stateDir().Stamp(stamp, future) },
		"torn":           func(stamp string) error { return os.Truncate(filepath.Join(n.state, stamp), 40) },
		"empty":          func(stamp string) error { return os.Truncate(filepath.Join(n.state, stamp), 0) },
		"zeroed": func(stamp string) error {
			return os.WriteFile(filepath.Join(n.state, stamp), make([]byte, 58), 0o600)
		},
	}
	for name, do := range spoil {
		n.call("ADD", "c2", w).ok()
		if err := do("asked"); err != nil {
			t.Fatal(err)
		}
		if got := c.etcd.RequestsDuring(t, func() { n.call("STATUS", "", w).ok() }); len(got) == 0 {
			t.Errorf("%s stamp of the last question: etcd was not asked", name)
		}
	}
	c.etcd.Stop()
	for _, do := range spoil {
		n.age("contact", 0)
		if err := do("contact"); err != nil {
			t.Fatal(err)
		}
		n.forget("asked")
		n.call("STATUS", "", w).fast().refused(codeUnreachable, "since this node started")
	}
	// What the wall clock says of the files is nothing to them.
	n.age("contact", time.Second)
	for _, at := range []time.Time{time.Now().Add(90000 * time.Hour), time.Unix(0, 0)} {
		for _, stamp := range []string{"contact", "asked"} {
			if err := os.Chtimes(filepath.Join(n.state, stamp), at, at); err != nil {
				t.Fatal(err)
			}
		}
		n.call("STATUS", "", w).fast().ok()
	}
	n.age("contact", 61*time.Second)
	if err := os.Chtimes(filepath.Join(n.state, "contact"), time.Now().Add(time.Hour), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	n.forget("asked")
	n.call("STATUS", "", w).fast().refused(codeUnreachable, "1m1s")
	c.etcd.Restart(t)
	n.forget("asked")
	n.call("STATUS", "", w).ok()
	// A full pool is cluster-wide.
	n.call("ADD", "f", network{name: "full", ipam: `"subnet": "10.9.0.0/30"`}).ok()
	n.call("ADD", "g", network{name: "full", ipam: `"subnet": "10.9.0.0/30"`}).refused(codeExhausted)
	n.forget("asked")
	n.call("STATUS", "", network{name: "full", ipam: `"subnet": "10.9.0.0/30"`}).ok()
}

// TestFrozen: a frozen ledger hands out nothing and takes nothing back, and is
// no reason for a node to be NotReady.
func TestFrozen(t *testing.T) {
	c := newCluster(t)
	n, fresh := c.node("n1"), c.node("n2")
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	n.call("ADD", "c2", w).want("10.1.0.3/24")
	c.ledger("freeze", "--reason", "test").ok()
	n.call("ADD", "c3", w).fast().refused(codeIntegrity, "frozen", "ledger thaw")
	fresh.call("ADD", "d1", w).fast().refused(codeIntegrity, "frozen", "ledger thaw")
	n.call("ADD", "c1", w).want("10.1.0.2/24") // it holds it
	n.call("DEL", "c1", w).fast().ok()
	n.call("DEL", "c9", w).fast().ok() // holds nothing: nothing is to be queued
	n.wantQueue(1)
	n.call("GC", "", w.with(`"cni.dev/valid-attachments": []`)).refused(codeIntegrity, "frozen")
	for _, x := range []*node{n, fresh} {
		x.forget("asked")
		x.call("STATUS", "", w).ok()
	}
	n.wantQueue(1)
	c.wantLeased("10.1.0.2", "10.1.0.3")
	// The pod is gone: an ADD of its name must not answer with what is queued.
	n.call("ADD", "c1", w).refused(codeIntegrity, "frozen")
	c.ledger("thaw").ok()
	n.call("DEL", "c2", w).ok()
	c.wantLeased()
	n.isSettled()
}

// TestNoSpace: a full etcd is named as such; DEL does not wait for it.
func TestNoSpace(t *testing.T) {
	c := newCluster(t, func(o *etcdmember.Options) { o.Quota = 4 << 20 })
	n, fresh := c.node("n1"), c.node("n2")
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).ok()
	n.call("ADD", "c2", w).ok()
	client := c.etcd.Client(t)
	junk := strings.Repeat("x", 1<<20)
	for i := 0; ; i++ {
		_, err := client.Put(t.Context(), fmt.Sprint("/junk/", i), junk)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			break
		}
		if err != nil || i > 64 {
			t.Fatalf("filling etcd: %d, %v", i, err)
		}
	}
	n.call("ADD", "c3", w).fast().refused(codeTryAgain, "out of space", "NOSPACE", c.etcd.Endpoint())
	fresh.call("ADD", "d1", w).fast().refused(codeTryAgain, "out of space", "NOSPACE")
	n.call("DEL", "c1", w).fast().ok()
	n.wantQueue(1)
	n.call("ADD", "c2", w).want("10.1.0.3/24")
	n.forget("asked")
	n.call("STATUS", "", w).ok()
	n.call("CHECK", "c2", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.3/24"}]}`)).ok()
	c.wantLeased("10.1.0.2", "10.1.0.3")

	// What the error says is what helps.
	r, err := client.Delete(t.Context(), "/junk/", clientv3.WithPrefix())
	if err == nil {
		_, err = client.Compact(t.Context(), r.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err == nil {
		_, err = client.Defragment(t.Context(), strings.TrimPrefix(c.etcd.Endpoint(), "http://"))
	}
	if err == nil {
		_, err = client.AlarmDisarm(t.Context(), &clientv3.AlarmMember{})
	}
	if err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "c3", w).want("10.1.0.4/24")
	fresh.call("ADD", "d1", w).ok()
	n.call("DEL", "c2", w).ok()
	n.isSettled()
	fresh.isSettled()
	c.leasedBy(t, "n1", 1)
}

// authority makes certificates.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, file: filepath.Join(t.TempDir(), "ca.pem"), cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA of a test"}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a.write(a.file, "CERTIFICATE", der)
	return a
}

func (a *authority) write(file, kind string, der []byte) {
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue makes a certificate for both sides; change may spoil it.
func (a *authority) issue(change func(c *x509.Certificate)) etcdtest.Files {
	a.t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "somebody"}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	change(c)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	dir := a.t.TempDir()
	f := etcdtest.Files{CA: a.file, Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	a.write(f.Cert, "CERTIFICATE", der)
	a.write(f.Key, "PRIVATE KEY", pkcs8)
	return f
}

// TestTLS: what is wrong with TLS is said, and not that a deadline expired.
func TestTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	fine := ca.issue(func(*x509.Certificate) {})
	expired := ca.issue(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
	named := ca.issue(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(192, 0, 2, 7)} })
	strange := stranger.issue(func(*x509.Certificate) {})
	w := subnet("10.1.0.0/24")
	client := func(ca, cert, key string) string {
		s := ""
		for k, v := range map[string]string{"caFile": ca, "certFile": cert, "keyFile": key} {
			if v != "" {
				s += fmt.Sprintf(`, %q: %q`, k, v)
			}
		}
		return s
	}
	serve := func(t *testing.T, f etcdtest.Files) *cluster {
		e := etcdtest.Start(t, func(o *etcdmember.Options) {
			o.TLS = &etcdmember.TLS{CAFile: ca.file, CertFile: f.Cert, KeyFile: f.Key}
		})
		c := bareCluster(t, e)
		c.unverified = true // nobody gets in, or nothing is there
		return c
	}
	refused := func(t *testing.T, n *node, says ...string) {
		t.Helper()
		n.t = t
		f := n.call("ADD", "c1", w).fast().refused(codeTryAgain, append(says, n.etcd.Endpoint()[len("https://"):])...)
		if strings.Contains(f.Details, "deadline exceeded") {
			t.Errorf("details speak of a deadline: %s", f.Details)
		}
		n.call("DEL", "c1", w).fast().ok()
		n.wantQueue(1)
	}
	good := client(ca.file, fine.Cert, fine.Key)
	c := serve(t, fine)
	c.ipamEtcd = good
	c.node("x").call("ADD", "c1", w).refused(codeConfig, "ledger init") // all is well with TLS

	for name, x := range map[string]struct {
		files string
		says  []string
	}{
		"unknown CA":               {client(stranger.file, fine.Cert, fine.Key), []string{"TLS", "not signed by " + stranger.file}},
		"no client certificate":    {client(ca.file, "", ""), []string{"TLS", "no certificate", "certFile"}},
		"strange client":           {client(ca.file, strange.Cert, strange.Key), []string{"TLS", "refuses", strange.Cert}},
		"expired client":           {client(ca.file, expired.Cert, expired.Key), []string{"TLS", "client certificate " + expired.Cert, "has expired", "renew it"}},
		"key of another":           {client(ca.file, fine.Cert, strange.Key), []string{"client certificate", fine.Cert, strange.Key}},
		"system's roots":           {client("", fine.Cert, fine.Key), []string{"TLS", "caFile is not set"}},
		"no certificate in caFile": {client(fine.Key, fine.Cert, fine.Key), []string{"caFile", fine.Key}},
	} {
		t.Run(name, func(t *testing.T) {
			c.ipamEtcd = x.files
			refused(t, c.node(strings.NewReplacer(" ", "-", "'", "").Replace(name)), x.says...)
		})
	}
	t.Run("plain to TLS", func(t *testing.T) {
		n := c.node("plain")
		n.configure(fmt.Sprintf(`"etcd": {"endpoints": [%q]}`, strings.Replace(c.etcd.Endpoint(), "https", "http", 1)))
		refused(t, n, "TLS")
	})
	t.Run("expired server", func(t *testing.T) {
		c := serve(t, expired)
		c.ipamEtcd = good
		refused(t, c.node("n1"), "TLS", "etcd's certificate (CN=somebody", "has expired", "renew it")
	})
	t.Run("another name", func(t *testing.T) {
		c := serve(t, named)
		c.ipamEtcd = good
		refused(t, c.node("n1"), "TLS", "another name", "192.0.2.7")
	})
	t.Run("TLS to plain", func(t *testing.T) {
		c := bareCluster(t, etcdtest.Start(t))
		c.unverified = true
		n := c.node("n1")
		n.configure(fmt.Sprintf(`"etcd": {"endpoints": [%q]%s}`, strings.Replace(c.etcd.Endpoint(), "http", "https", 1), good))
		n.t = t
		n.call("ADD", "c1", w).fast().refused(codeTryAgain, "does not speak TLS")
	})
	t.Run("mTLS works", func(t *testing.T) {
		e, f := etcdtest.StartTLS(t)
		c := bareCluster(t, e)
		c.unverified = true // by the line below, with certificates
		c.ipamEtcd = client(f.CA, f.Cert, f.Key)
		tls := []string{"--cacert", f.CA, "--cert", f.Cert, "--key", f.Key}
		c.ledger(append(tls, "init")...).ok()
		n := c.node("n1")
		n.t = t
		n.call("ADD", "c1", w).want("10.1.0.2/24")
		c.ledger(append(tls, "verify")...).ok()
	})
}

// TestDeaf: a server that takes connections and says nothing costs the
// deadline, and not more.
func TestDeaf(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := newCluster(t)
	w := subnet("10.1.0.0/24")
	deaf := "http://" + l.Addr().String()
	n := c.node("n1", fmt.Sprintf(`"etcd": {"endpoints": [%q]}`, deaf), `"timeout": "500ms"`)
	n.call("ADD", "c1", w).fast().refused(codeTryAgain, deaf, "did not answer")
	n.call("DEL", "c1", w).fast().ok()
	n.wantQueue(1)
	n.call("STATUS", "", w).fast().refused(codeUnreachable, deaf)
	// One of several endpoints that is deaf or down is no outage.
	n.configure(fmt.Sprintf(`"etcd": {"endpoints": ["http://127.0.0.1:1", %q]}`, c.etcd.Endpoint()))
	for i := range 4 {
		n.call("ADD", fmt.Sprint("d", i), w).fast().ok()
	}
	n.isSettled()
}

// TestStateDir: what is wrong with the state directory is said, and refuses.
func TestStateDir(t *testing.T) {
	c := newCluster(t)
	w := subnet("10.1.0.0/24")
	n := c.node("n1")
	n.call("ADD", "c1", w).want("10.1.0.2/24")

	t.Run("not creatable", func(t *testing.T) {
		n := c.node("n2", fmt.Sprintf(`"stateDir": %q`, filepath.Join(c.dir, "n1.json", "below-a-file")))
		n.t = t
		n.call("ADD", "x", w).refused(codeIO, "state directory", "n1.json")
		n.call("DEL", "x", w).refused(codeTryAgain, "state directory", "n1.json")
		n.call("STATUS", "", w).refused(codeIO, "state directory", "n1.json")
	})
	t.Run("read-only", func(t *testing.T) {
		n.t = t
		defer func() { n.t, n.wrap = c.t, nil }()
		n.readOnly(t)
		n.call("ADD", "x", w).refused(codeIO, "state directory", n.state)
		n.call("DEL", "c1", w).refused(codeTryAgain, "state directory", n.state)
		n.call("STATUS", "", w).refused(codeIO, "state directory", n.state)
	})
	t.Run("of another node", func(t *testing.T) {
		n := c.node("n3")
		n.t = t
		n.configure(fmt.Sprintf(`"stateDir": %q`, filepath.Join(c.dir, "n1")))
		n.call("ADD", "x", w).refused(codeIntegrity, "node/n1", "node/n3")
		n.call("STATUS", "", w).refused(codeIntegrity, "node/n1", "node/n3")
		n.call("CHECK", "c1", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": []}`)).refused(codeIntegrity, "node/n1")
	})
	t.Run("new on a known node", func(t *testing.T) {
		n := c.node("n1", fmt.Sprintf(`"stateDir": %q`, filepath.Join(c.dir, "another")))
		n.t = t
		n.call("ADD", "x", w).refused(codeIntegrity, "no key", "ledger node replace n1")
		n.forget("asked")
		n.call("STATUS", "", w).refused(codeIntegrity, "ledger node replace n1")
		n.call("DEL", "c1", w).ok()
	})
	t.Run("of another cluster", func(t *testing.T) {
		n := c.node("n1", `"clusterID": "another"`)
		n.t = t
		n.call("ADD", "x", w).refused(codeIntegrity, "another")
		n.call("STATUS", "", w).refused(codeIntegrity, "another")
	})
	c.leasedBy(t, "n1", 1)
	if stops := c.kvs(keys.Stops()); len(stops) > 0 {
		t.Errorf("a node's own trouble stopped the cluster: %v", stops)
	}
}

// readOnly makes the node's state directory one that cannot be written: for
// root by a read-only mount that the plugin alone sees, for others by its mode.
func (n *node) readOnly(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		n.wrap = []string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$1"`, n.state}
		if _, err := exec.LookPath("unshare"); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := os.Chmod(n.state, 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Chmod(n.state, 0o700); err != nil {
			t.Error(err)
		}
	})
}

// fullDisk runs, on a small file system that it alone sees and with $1 pages
// free, ADD and DEL, then with the disk empty again DEL and STATUS.
const fullDisk = `
set -e
mkdir "$STATE.t"
mount -t tmpfs -o size=1m,mode=0700 tmpfs "$STATE.t"
cp -a "$STATE/." "$STATE.t/"
dd if=/dev/zero of="$STATE.t/junk" bs=4096 2>/dev/null || true
truncate -s "-$(($1 * 4096))" "$STATE.t/junk"
call() { CNI_COMMAND=$2 "$PLUGIN" <"$CONF" >"$OUT/$1" || echo $? >"$OUT/$1.exit"; }
call 1 ADD
call 2 DEL
rm "$STATE.t/junk" "$STATE.t/asked" "$STATE.t/contact" 2>/dev/null || true
call 3 DEL
call 4 STATUS
rm -rf "$STATE"
cp -a "$STATE.t" "$STATE"
`

// TestDiskFull: a state directory that is full refuses pods, at whichever of
// its writes it happens, and nothing is lost once there is space again.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("not root, so without a file system of our own that is full")
		return
	}
	c := newCluster(t)
	w := subnet("10.1.0.0/24")
	var refused int
	for _, warm := range []bool{true, false} {
		for pages := range 7 {
			n := c.node(fmt.Sprintf("n%d-%v", pages, warm))
			if warm {
				n.call("ADD", "warm", w).ok()
				n.call("DEL", "warm", w).ok()
			} else if _, err := statedir.Open(n.state); err != nil {
				t.Fatal(err)
			}
			n.configure(fmt.Sprintf(`"stateDir": %q`, n.state+".t"))
			out, conf := t.TempDir(), filepath.Join(c.dir, "conf")
			if err := os.WriteFile(conf, []byte(w.json(n)), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := n.command(t.Context(), "", "c1", w, "STATE="+n.state, "OUT="+out, "CONF="+conf, "PLUGIN="+plugin)
			cmd.Path, cmd.Args = "", []string{"unshare", "--mount", "sh", "-c", fullDisk, "sh", fmt.Sprint(pages)}
			var err error
			if cmd.Path, err = exec.LookPath("unshare"); err != nil {
				t.Fatal(err)
			}
			script := run(t, cmd).ok()
			replies := map[string]*reply{}
			for i, verb := range []string{"ADD", "DEL", "DEL again", "STATUS"} {
				stdout, err := os.ReadFile(filepath.Join(out, fmt.Sprint(i+1)))
				if err != nil {
					t.Fatal(err)
				}
				r := &reply{t: t, what: fmt.Sprintf("%s on %s", verb, n.name), version: "1.1.0", stdout: string(stdout), stderr: script.stderr}
				if b, err := os.ReadFile(filepath.Join(out, fmt.Sprintf("%d.exit", i+1))); err == nil {
					fmt.Sscan(string(b), &r.exit)
				}
				r.isClean()
				replies[verb] = r
			}
			if r := replies["ADD"]; r.exit != 0 {
				refused++
				r.refused(codeIO, "state directory")
			}
			if r := replies["DEL"]; r.exit != 0 {
				r.refused(codeTryAgain, "state directory")
			}
			replies["DEL again"].ok()
			replies["STATUS"].ok()
			n.configure()
			n.isSettled()
			c.leasedBy(t, n.name, 0)
			if left := n.files("holdings"); len(left) > 0 {
				t.Errorf("%s: holdings are left: %v", n.name, left)
			}
		}
	}
	if refused < 4 {
		t.Errorf("only %d ADDs were refused: the disk was not full enough", refused)
	}
}

// TestLocked: a process that holds the lock for too long is named as such.
func TestLocked(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1", `"lockTimeout": "200ms"`)
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).ok()
	d, err := statedir.Open(n.state)
	if err != nil {
		t.Fatal(err)
	}
	unlock, err := d.Lock(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	lock := filepath.Join(n.state, "lock")
	n.call("ADD", "c2", w).fast().refused(codeTryAgain, lock, "held by another process")
	n.call("CHECK", "c1", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.2/24"}]}`)).fast().refused(codeTryAgain, lock)
	n.call("DEL", "c1", w).fast().ok()
	n.wantQueue(1)
	n.forget("asked")
	// A lock that is held for long is a busy node, and no reason to be NotReady.
	n.call("STATUS", "", w).fast().ok()
	unlock()
	n.call("ADD", "c2", w).want("10.1.0.3/24")
	c.wantLeased("10.1.0.3")
	n.isSettled()
}
