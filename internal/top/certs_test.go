package top

import (
	"context"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdmember"
	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// TestCertificatesReplaced: a dashboard that runs takes up replaced files, the
// CA's included, with its next connection, and gets over those that were
// replaced only in part. It tells which certificate ends first.
func TestCertificatesReplaced(t *testing.T) {
	dir := t.TempDir()
	place := func(from, to string) {
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
	file := func(name string) string { return filepath.Join(dir, name) }
	old, later := etcdtest.NewAuthority(t), etcdtest.NewAuthority(t)
	lasting := func(d time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotAfter = time.Now().Add(d) }
	}
	serve := func(a *etcdtest.Authority) {
		t.Helper()
		f := a.Issue(t, "etcd")
		place(f.CA, file("server-ca"))
		place(f.Cert, file("server"))
		place(f.Key, file("server-key"))
	}
	serve(old)
	mine := old.Issue(t, "me", lasting(5*time.Hour))
	place(mine.CA, file("ca"))
	place(mine.Cert, file("cert"))
	place(mine.Key, file("key"))
	e := etcdtest.Start(t, func(o *etcdmember.Options) {
		o.TLS = &etcdmember.TLS{CAFile: file("server-ca"), CertFile: file("server"), KeyFile: file("server-key")}
	})
	cfg := etcdstore.Config{Endpoints: []string{e.Endpoint()}, CAFile: file("ca"), CertFile: file("cert"), KeyFile: file("key")}
	c := newClusterOn(t, e, cfg)

	news := &sink{t, make(chan Event, 1000)}
	f := &feed{cfg: cfg, keys: c.keys, patience: 5 * time.Second, now: time.Now, send: func(ev Event) { news.news <- ev }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.run(ctx) }()
	defer func() { cancel(); <-done }()
	lost := func(cause string) {
		t.Helper()
		for !strings.Contains(next[Lost](news).Cause, cause) {
		}
	}
	// In whatever order they come.
	found := func() (cert Certificate) {
		t.Helper()
		for there := false; !there || cert.Until.IsZero(); {
			switch ev := next[Event](news).(type) {
			case Found:
				there = true
			case Certificate:
				cert = ev
			}
		}
		return cert
	}
	if ev := found(); ev.What != "client certificate" || time.Until(ev.Until) > 5*time.Hour || ev.Until.Sub(ev.Warn) != etcdstore.WarnBefore {
		t.Errorf("%+v", ev)
	}

	serve(later)
	e.Restart(t)
	lost("etcd's certificate is not signed by " + file("ca"))
	anew := later.Issue(t, "me")
	place(anew.CA, file("ca"))
	lost("etcd refuses client certificate " + file("cert"))
	place(anew.Cert, file("cert"))
	lost("do not fit each other")
	place(anew.Key, file("key"))
	if ev := found(); time.Until(ev.Until) < 6*time.Hour {
		t.Errorf("the old one still: %+v", ev)
	}
}
