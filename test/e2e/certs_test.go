package e2e

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/swaybar/state"
)

const day = 24 * time.Hour

// namedAuthority makes a CA with a name, valid for a time from now on.
func namedAuthority(t testing.TB, name string, left time.Duration) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key, file: filepath.Join(t.TempDir(), "ca.pem"), cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-100 * day), NotAfter: time.Now().Add(left),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	a.write(a.file, "CERTIFICATE", der)
	return a
}

// called makes a certificate with a common name.
func (a *authority) called(name string, change ...func(c *x509.Certificate)) etcdtest.Files {
	a.t.Helper()
	return a.issue(func(c *x509.Certificate) {
		c.Subject.CommonName = name
		for _, f := range change {
			f(c)
		}
	})
}

func lasting(from, to time.Duration) func(c *x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}

// place puts a file where another is, in one step.
func place(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// secured is a cluster with TLS. Its files are looked for where they were in the
// beginning, whatever is put there.
type secured struct {
	*cluster
	server, client etcdtest.Files
}

// newSecured starts an etcd that asks for client certificates, and initialises
// the ledger.
func newSecured(t testing.TB, ca *authority) *secured {
	t.Helper()
	dir := t.TempDir()
	files := func(side string) etcdtest.Files {
		return etcdtest.Files{CA: filepath.Join(dir, side+"-ca.pem"), Cert: filepath.Join(dir, side+".pem"), Key: filepath.Join(dir, side+".key")}
	}
	s := &secured{server: files("server"), client: files("client")}
	s.install(t, s.server, ca.called("etcd", lasting(-day, 300*day)), ca)
	s.install(t, s.client, ca.called("worker", lasting(-day, 300*day)), ca)
	s.cluster = bareCluster(t, etcdtest.Start(t, func(o *etcdmember.Options) {
		o.TLS = &etcdmember.TLS{CAFile: s.server.CA, CertFile: s.server.Cert, KeyFile: s.server.Key}
	}))
	s.unverified = true // by those who have the right certificates
	s.use(s.client)
	s.run("init").ok()
	return s
}

// install puts files where others are looked for, with the CA that is to be trusted.
func (s *secured) install(t testing.TB, at, f etcdtest.Files, ca *authority) {
	t.Helper()
	place(t, ca.file, at.CA)
	place(t, f.Cert, at.Cert)
	place(t, f.Key, at.Key)
}

// use makes nodes and commands use files.
func (s *secured) use(f etcdtest.Files) {
	s.client = f
	s.ipamEtcd = fmt.Sprintf(`, "caFile": %q, "certFile": %q, "keyFile": %q`, f.CA, f.Cert, f.Key)
}

func (s *secured) prepare(args ...string) *exec.Cmd {
	cmd := s.ledgerCommand(args...)
	cmd.Env = append(cmd.Env, "LEDGER_CACERT="+s.client.CA, "LEDGER_CERT="+s.client.Cert, "LEDGER_KEY="+s.client.Key)
	return cmd
}

// run runs the command with these files.
func (s *secured) run(args ...string) *reply {
	s.t.Helper()
	return run(s.t, s.prepare(args...))
}

// fails checks that the command ends with a status and says each of parts.
func (r *reply) fails(status int, parts ...string) {
	r.t.Helper()
	if r.exit != status {
		r.t.Errorf("%s: exit status %d, want %d\n%s%s", r.what, r.exit, status, r.stdout, r.stderr)
	}
	for _, p := range parts {
		if !strings.Contains("\n"+r.stdout+r.stderr, p) {
			r.t.Errorf("%s: nothing says %q:\n%s%s", r.what, p, r.stdout, r.stderr)
		}
	}
}

// TestCertificatesNamed: the plugin, the command and doctor say what is wrong
// with a certificate, ours or etcd's, and what to do.
func TestCertificatesNamed(t *testing.T) {
	ca, twin, stranger := namedAuthority(t, "our CA", 900*day), namedAuthority(t, "our CA", 900*day), namedAuthority(t, "other CA", 900*day)
	ended := namedAuthority(t, "our CA", -day)
	s := newSecured(t, ca)
	fine, good := s.server, s.client
	w := subnet("10.1.0.0/24")
	// What etcd has while all is well, to put it back.
	server, client := ca.called("etcd", lasting(-day, 300*day)), ca.called("worker", lasting(-day, 300*day))
	for i, tc := range []struct {
		name           string
		server, client etcdtest.Files // zero: what is right
		ca             *authority     // that the client trusts; nil: what is right
		msg            string
		details        []string
		line           string // of doctor
		remedy         string
	}{
		{
			name: "expired", client: ca.called("worker", lasting(-90*day, -3*day)),
			msg:     "the client certificate has expired",
			details: []string{"client certificate " + good.Cert + " (CN=worker, signed by CN=our CA) has expired: it is valid from ", "and the clock says " + time.Now().UTC().Format(time.DateOnly)},
			line:    "FAIL client certificate", remedy: "-> renew it, or set the clock",
		},
		{
			name: "not yet valid", client: ca.called("worker", lasting(day, 90*day)),
			msg: "the client certificate is not valid yet", details: []string{good.Cert, "CN=worker", "and the clock says "},
			line: "FAIL client certificate", remedy: "-> set the clock, or wait",
		},
		{
			name: "foreign", client: stranger.called("worker"),
			msg:     "etcd does not trust the CA of the client certificate",
			details: []string{"etcd refuses client certificate " + good.Cert + " (CN=worker, signed by CN=other CA)", "but only CN=our CA"},
			line:    "FAIL endpoint", remedy: "-> use a certificate that etcd's --trusted-ca-file has signed",
		},
		{
			name: "foreign, of a CA of the same name", client: twin.called("worker"),
			msg: "etcd does not trust the CA of the client certificate", details: []string{good.Cert, "of the same name, with another key?"},
			line: "FAIL endpoint", remedy: "-> use a certificate that etcd's --trusted-ca-file has signed",
		},
		{
			name: "another's key", client: etcdtest.Files{Cert: client.Cert, Key: server.Key},
			msg: "the client certificate and its key do not fit each other", details: []string{good.Cert, good.Key},
			line: "FAIL client certificate", remedy: "-> install both as they were issued",
		},
		{
			name: "no certificate in the file", client: etcdtest.Files{Cert: client.Key, Key: client.Key},
			msg: "the client certificate cannot be read", details: []string{good.Cert + " holds no certificate"},
			line: "FAIL client certificate", remedy: "-> is it the right file",
		},
		{
			name: "etcd's has expired", server: ca.called("etcd", lasting(-90*day, -day)),
			msg: "etcd's certificate has expired", details: []string{"etcd's certificate (CN=etcd, signed by CN=our CA) has expired", "and the clock says "},
			line: "FAIL endpoint", remedy: "-> renew it, or set the clock",
		},
		{
			name: "etcd's is foreign", server: stranger.called("etcd"),
			msg: "etcd's certificate is not signed by our CA", details: []string{"not signed by " + good.CA + ", but by CN=other CA", "holds CN=our CA"},
			line: "FAIL endpoint", remedy: "-> set caFile to the CA of etcd's certificate",
		},
		{
			name: "etcd's is for another name", server: ca.called("etcd", func(c *x509.Certificate) {
				c.IPAddresses, c.DNSNames = []net.IP{net.IPv4(192, 0, 2, 7)}, []string{"etcd-0.local"}
			}),
			msg: "etcd's certificate is for another name", details: []string{"it is for etcd-0.local, 192.0.2.7, and the endpoint says 127.0.0.1"},
			line: "FAIL endpoint", remedy: "-> use an endpoint that it is for",
		},
		{
			name: "our copy of the CA has expired", ca: ended, server: ended.called("etcd"),
			msg: "the CA certificate has expired", details: []string{"CA certificate " + good.CA, "has expired"},
			line: "FAIL CA certificate", remedy: "-> renew it",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, x := range []struct {
				at, want, right etcdtest.Files
				ca              *authority
			}{{fine, tc.server, server, ca}, {good, tc.client, client, tc.ca}} {
				if x.want == (etcdtest.Files{}) {
					x.want = x.right
				}
				if x.ca == nil {
					x.ca = ca
				}
				s.install(t, x.at, x.want, x.ca)
			}
			n := s.node(fmt.Sprint("n", i))
			n.t = t
			f := n.call("ADD", "c1", w).refused(codeTryAgain, append(tc.details, s.etcd.Endpoint())...)
			if want := "etcd cannot be reached: " + tc.msg; f.Msg != want {
				t.Errorf("msg %q, want %q", f.Msg, want)
			}
			n.call("DEL", "c1", w).ok()
			n.wantQueue(1)
			n.call("STATUS", "", w).refused(codeUnreachable, append(tc.details, "ledger doctor", tc.msg)...)

			show := s.run("show")
			show.t = t
			show.fails(2, append(tc.details, "ledger: error: etcd cannot be reached: ", "ledger: hint: ")...)
			doctor := s.run("doctor", "--state-dir", n.state, "--node", n.name)
			doctor.t = t
			doctor.fails(1, append(tc.details, "\n"+tc.line, tc.remedy)...)
			for _, r := range []*reply{show, doctor} {
				if strings.Contains(r.stdout+r.stderr, "deadline exceeded") {
					t.Errorf("%s speaks of a deadline:\n%s%s", r.what, r.stdout, r.stderr)
				}
			}
		})
	}
	s.install(t, fine, server, ca)
	s.install(t, good, client, ca)
	s.node("n0").call("ADD", "c1", w).want("10.1.0.2/24")
	s.run("verify").ok()
}

// TestCredentialsStay: endpoints that a network names get no certificate of the
// node's file's. A pod can go all the same, and its release waits.
func TestCredentialsStay(t *testing.T) {
	s := newSecured(t, namedAuthority(t, "our CA", 900*day))
	w := subnet("10.1.0.0/24")
	n := s.node("n1")
	n.call("ADD", "c1", w).want("10.1.0.2/24")

	elsewhere := w
	elsewhere.ipam += fmt.Sprintf(`, "etcd": {"endpoints": [%q, "https://127.0.0.1:1"]}`, s.etcd.Endpoint())
	for _, verb := range []string{"ADD", "STATUS"} {
		n.call(verb, "c1", elsewhere).refused(codeConfig, "etcd.certFile, etcd.keyFile in "+n.file, "ipam.etcd.endpoints names others")
	}
	if r := n.call("DEL", "c1", elsewhere).ok(); !strings.Contains(r.stderr, "ipam.etcd.endpoints names others") ||
		!strings.Contains(r.stderr, "which has no certificate") {
		t.Errorf("DEL sent a certificate, or warns of nothing: %s", r.stderr)
	}
	n.wantQueue(1)
	n.call("ADD", "c2", w).ok()
	n.wantQueue(0)
}

// TestSecretsOfOthers: files that hold secrets are refused when others can use
// them, by plugin, command and doctor; a pod can go all the same.
func TestSecretsOfOthers(t *testing.T) {
	ca := namedAuthority(t, "our CA", 900*day)
	s := newSecured(t, ca)
	w := subnet("10.1.0.0/24")
	n := s.node("n1")
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	n.call("ADD", "c2", w).want("10.1.0.3/24")

	password := filepath.Join(s.dir, "password")
	if err := os.WriteFile(password, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, parts ...string) {
		t.Helper()
		n.call("ADD", "new", w).refused(codeConfig, append(parts, what)...)
		r := s.run("show")
		r.fails(2, parts...)
		s.run("doctor").fails(1, append(parts, "\nFAIL configuration")...)
		if strings.Contains(r.stderr, "s3cret") {
			t.Errorf("the secret is in %s", r.stderr)
		}
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o666} {
		if err := os.Chmod(s.client.Key, mode); err != nil {
			t.Fatal(err)
		}
		refused("etcd.keyFile", fmt.Sprintf("%s has mode %04o, so others can use it: run chmod 600 %s", s.client.Key, mode, s.client.Key))
	}
	// The secret is out already; the pod must not wait for that. It is released
	// for good, not only queued.
	r := n.call("DEL", "c1", w).ok()
	if !strings.Contains(r.stderr, "chmod 600 "+s.client.Key) {
		t.Errorf("DEL warns of nothing: %s", r.stderr)
	}
	n.wantQueue(0)
	if err := os.Chmod(s.client.Key, 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(s.client.Key, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		refused("etcd.keyFile", s.client.Key+" belongs to user ", "run chown ")
		if err := os.Chown(s.client.Key, 0, 0); err != nil {
			t.Fatal(err)
		}
	}

	// As the kubelet mounts a secret: what counts is the file at the end of the links.
	mounted := filepath.Join(s.dir, "mounted")
	target := filepath.Join(mounted, "..2026_11_20", "tls.key")
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		t.Fatal(err)
	}
	place(t, s.client.Key, target)
	for link, to := range map[string]string{"..data": "..2026_11_20", "tls.key": "..data/tls.key"} {
		if err := os.Symlink(to, filepath.Join(mounted, link)); err != nil {
			t.Fatal(err)
		}
	}
	right := s.client
	s.use(etcdtest.Files{CA: right.CA, Cert: right.Cert, Key: filepath.Join(mounted, "tls.key")})
	n.configure()
	n.call("CHECK", "c2", w.with(`"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.3/24"}]}`)).ok()
	if err := os.Chmod(target, 0o644); err != nil { // Kubernetes' default
		t.Fatal(err)
	}
	refused("etcd.keyFile", filepath.Join(mounted, "tls.key")+" has mode 0644", `"defaultMode: 0400"`)
	s.use(right)

	// The password, and the configuration that says where it is.
	if err := os.Chmod(password, 0o644); err != nil {
		t.Fatal(err)
	}
	n.configure(fmt.Sprintf(`"etcd": {"endpoints": [%q], "username": "worker", "passwordFile": %q, "caFile": %q}`, s.etcd.Endpoint(), password, right.CA))
	n.call("ADD", "new", w).refused(codeConfig, "etcd.passwordFile", password+" has mode 0644", "chmod 600 "+password)
	r = s.run("show", "--user", "worker", "--password-file", password)
	r.fails(2, "--password-file: "+password+" has mode 0644", "chmod 600")
	if strings.Contains(r.stderr, "s3cret") {
		t.Errorf("the secret is in %s", r.stderr)
	}
	n.configure()
	if err := os.Chmod(n.file, 0o604); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "new", w).refused(codeConfig, n.file+" has mode 0604", "chmod 600 "+n.file)
	s.run("show", "--config", n.file).fails(2, "--config: "+n.file+" has mode 0604")
	if err := os.Chmod(n.file, 0o600); err != nil {
		t.Fatal(err)
	}

	// The key that signs.
	key := filepath.Join(n.state, "key")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "new", w).refused(codeIntegrity, "signing key "+key+" has mode 0644", "chmod 600 "+key)
	s.run("doctor", "--node", n.name, "--state-dir", n.state).fails(1, "FAIL identity", "chmod 600 "+key)
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}

	// A file that we cannot read.
	cmd := s.prepare("show")
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		readable(t, s)
	} else if err := os.Chmod(right.Key, 0); err != nil {
		t.Fatal(err)
	}
	run(t, cmd).fails(2, right.Key, "permission denied", "run as its owner")
	if err := os.Remove(filepath.Join(s.dir, "empty.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(right.Key, 0o600); err != nil {
		t.Fatal(err)
	}
	n.call("DEL", "c2", w).ok()
	s.wantQueueAndVerify(n)
}

func (s *secured) wantQueueAndVerify(n *node) {
	s.t.Helper()
	n.wantQueue(0)
	s.run("verify").ok()
}

// readable lets another user come to the programs and to all files but the key.
func readable(t testing.TB, s *secured) {
	t.Helper()
	for _, file := range []string{s.client.CA, s.client.Cert, command, filepath.Join(s.dir, "empty.json")} {
		for dir := filepath.Dir(file); len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, file := range []string{s.client.CA, s.client.Cert} {
		if err := os.Chmod(file, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(s.dir, "empty.json"), 65534, 65534); err != nil {
		t.Fatal(err)
	}
}

// following is a command that runs until it is ended.
type following struct {
	t      testing.TB
	what   string
	cmd    *exec.Cmd
	lines  chan string
	stderr lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// begin starts a command that runs on; it must still run when the test ends.
func (s *secured) begin(args ...string) *following {
	s.t.Helper()
	f := &following{t: s.t, what: strings.Join(args, " "), cmd: s.prepare(args...), lines: make(chan string, 1000)}
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	f.cmd.Stderr = &f.stderr
	out, err := f.cmd.StdoutPipe()
	if err == nil {
		err = f.cmd.Start()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(f.lines)
		for in := bufio.NewReader(out); ; {
			line, err := in.ReadString('\n')
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
					s.t.Error(err)
				}
				return
			}
			f.lines <- line
		}
	}()
	s.t.Cleanup(func() {
		_ = f.cmd.Process.Signal(syscall.SIGTERM)
		for range f.lines { // until it has ended
		}
		<-read
		err := f.cmd.Wait()
		if code := f.cmd.ProcessState.ExitCode(); code != 0 && code != 128+int(syscall.SIGTERM) {
			s.t.Errorf("%s ended with %v\n%s", f.what, err, f.stderr.String())
		}
	})
	return f
}

// until waits for a line of which something is true.
func (f *following) until(what string, ok func(line string) bool) string {
	f.t.Helper()
	end := time.After(30 * time.Second)
	for {
		select {
		case line, more := <-f.lines:
			switch {
			case !more:
				f.t.Fatalf("%s ended; waited for %s\n%s", f.what, what, f.stderr.String())
			case ok(line):
				return line
			}
		case <-end:
			f.t.Fatalf("%s: waited for %s\n%s", f.what, what, f.stderr.String())
		}
	}
}

// state waits for a published state of which something is true.
func (f *following) state(what string, ok func(*state.State) bool) *state.State {
	f.t.Helper()
	var s *state.State
	f.until(what, func(line string) bool {
		_, got, err := state.Decode([]byte(strings.TrimSuffix(line, "\n")))
		if err != nil {
			f.t.Fatalf("%v: %s", err, line)
		}
		s = got
		return ok(got)
	})
	return s
}

// TestCertificatesReplaced: who runs for long takes up replaced files, the CA's
// included, with its next connection, and gets over those that were replaced
// only in part.
func TestCertificatesReplaced(t *testing.T) {
	ca, next := namedAuthority(t, "our CA", 900*day), namedAuthority(t, "next CA", 900*day)
	s := newSecured(t, ca)
	n, w := s.node("n1"), subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).ok()
	published := s.begin("publish", "--print", "--source", "prod", "--heartbeat", "1s")
	follow := s.begin("log", "--follow", "-o", "json")
	well := func(s *state.State) bool { return s.Etcd.OK }
	published.state("contact", well)
	follow.until("c1", func(line string) bool { return strings.Contains(line, `"c1"`) })

	// Another CA, on both sides; etcd reads its own when it starts.
	s.install(t, s.server, next.called("etcd"), next)
	s.etcd.Restart(t)
	published.state("the new CA", func(s *state.State) bool { return s.Etcd.Error == "etcd's certificate is not signed by our CA" })
	anew := next.called("worker", lasting(-day, 200*day))
	place(t, next.file, s.client.CA)
	published.state("the old client certificate", func(s *state.State) bool {
		return s.Etcd.Error == "etcd does not trust the CA of the client certificate"
	})
	place(t, anew.Cert, s.client.Cert)
	published.state("half of a pair", func(s *state.State) bool {
		return s.Etcd.Error == "the client certificate and its key do not fit each other"
	})
	place(t, anew.Key, s.client.Key)
	published.state("contact", well)
	n.call("ADD", "c2", w).ok()
	follow.until("c2", func(line string) bool { return strings.Contains(line, `"c2"`) })
	got := published.state("the lease of c2", func(s *state.State) bool { return s.Etcd.OK && len(s.Pools) == 1 && s.Pools[0].Leased == 2 })
	if got.Ledger != state.LedgerRunning {
		t.Errorf("%+v", got)
	}
	if said := follow.stderr.String(); !strings.Contains(said, "connecting again") {
		t.Errorf("log --follow said %q", said)
	}
	s.run("verify").ok()
}

// TestDaysLeft: show, doctor and the published state say how long certificates
// are valid, and which ends first.
func TestDaysLeft(t *testing.T) {
	ca := namedAuthority(t, "our CA", 400*day)
	s := newSecured(t, ca)
	s.install(t, s.client, ca.called("worker", lasting(-day, 10*day+time.Hour)), ca)
	until := time.Now().Add(10*day + time.Hour).UTC()

	r := s.run("show").ok()
	for _, want := range []string{
		"\nTLS     RENEW SOON: client certificate until " + until.Format(time.DateOnly) + " (10 days left), ",
		"CA certificate until ", "(399 days left), etcd's certificate until ", "(299 days left)\n",
	} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("show does not say %q:\n%s", want, r.stdout)
		}
	}
	type cert struct {
		Kind, Where, Subject string
		NotAfter             time.Time
		DaysLeft             int
	}
	var shown struct{ Certificates []cert }
	r = s.run("show", "-o", "json").ok()
	if err := json.Unmarshal([]byte(r.stdout), &shown); err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, c := range shown.Certificates {
		if left := time.Until(c.NotAfter); int(left/day) != c.DaysLeft {
			t.Errorf("%s ends in %v, and it says %d days", c.Kind, left, c.DaysLeft)
		}
		got += fmt.Sprintf("%s %s %s %d\n", c.Kind, c.Where, c.Subject, c.DaysLeft)
	}
	if want := fmt.Sprintf("client %s CN=worker 10\nca %s CN=our CA 399\netcd %s CN=etcd 299\n", s.client.Cert, s.client.CA, s.etcd.Endpoint()); got != want {
		t.Errorf("got  %swant %s", got, want)
	}

	n := s.node("n1")
	n.call("ADD", "c1", subnet("10.1.0.0/24")).ok()
	r = s.run("doctor", "--state-dir", n.state, "--node", n.name).ok()
	for _, want := range []string{
		"warn client certificate ", s.client.Cert + " (CN=worker) valid until " + until.Format(time.DateOnly) + " (10 days left)\n", "-> renew it soon",
		"ok   CA certificate ", "ok   endpoint ", ", certificate valid until ", "(299 days left)",
	} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("doctor does not say %q:\n%s", want, r.stdout)
		}
	}

	p := s.begin("publish", "--print", "--source", "prod", "--heartbeat", "1s")
	c := p.state("a certificate", func(s *state.State) bool { return s.Cert != nil && s.Etcd.OK }).Cert
	if c.Kind != state.CertClient || c.Until.Sub(until).Abs() > time.Minute || c.Until.Sub(c.Warn) != 14*day {
		t.Errorf("%+v, want the client's, until %v", c, until)
	}
	// The one that etcd shows ends first from now on.
	s.install(t, s.server, ca.called("etcd", lasting(-day, 2*day)), ca)
	s.etcd.Restart(t)
	p.state("etcd's certificate", func(s *state.State) bool { return s.Cert != nil && s.Cert.Kind == state.CertEtcd })
	s.run("show").ok().fails(0, "RENEW SOON: etcd's certificate until ", "(1 day left)")
	s.run("doctor", "--state-dir", n.state, "--node", n.name).fails(0, "\nwarn endpoint ", "(1 day left)", "-> renew it soon")

	plain := newCluster(t)
	if r := plain.ledger("show").ok(); strings.Contains(r.stdout, "TLS") {
		t.Errorf("without TLS:\n%s", r.stdout)
	}
	if r := plain.ledger("show", "-o", "json").ok(); strings.Contains(r.stdout, "certificates") {
		t.Errorf("without TLS:\n%s", r.stdout)
	}
}
