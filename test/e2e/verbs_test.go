package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/testutils"

	"github.com/ipam-ledger/ipam-ledger/internal/etcdtest"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

var versions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// Codes of the specification and of our own.
const (
	codeVersion      = 1
	codeEnvironment  = 4
	codeIO           = 5
	codeDecoding     = 6
	codeConfig       = 7
	codeNetns        = 8
	codeTryAgain     = 11
	codeUnreachable  = 50
	codeExhausted    = 100
	codeNotAvailable = 101
	codeNoPool       = 102
	codeMismatch     = 103
	codeIntegrity    = 104
)

// TestVersions: every verb of every version, with results in that version's form.
func TestVersions(t *testing.T) {
	c := newCluster(t)
	for i, version := range versions {
		t.Run(version, func(t *testing.T) {
			n := c.node("n" + strings.ReplaceAll(version, ".", ""))
			n.t = t
			w := network{version: version, ipam: fmt.Sprintf(`"ranges": [[{"subnet": "10.%d.0.0/24"}], [{"subnet": "fd00:%d::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]`, i+1, i+1)}
			w.name = n.name
			added := n.call("ADD", "c1", w)
			added.want(fmt.Sprintf("10.%d.0.2/24", i+1), fmt.Sprintf("fd00:%d::2/64", i+1))
			var form struct {
				IPs    []struct{ Version, Address, Gateway string }
				IP4    any
				Routes []struct{ Dst string }
			}
			if err := json.Unmarshal([]byte(added.stdout), &form); err != nil {
				t.Fatal(err)
			}
			family := []string{"4", "6"}
			if version >= "1" {
				family = []string{"", ""}
			}
			for j, ip := range form.IPs {
				if ip.Version != family[j] || ip.Gateway == "" {
					t.Errorf("address %d: version %q, gateway %q; want version %q and a gateway", j, ip.Version, ip.Gateway, family[j])
				}
			}
			if len(form.Routes) != 1 || form.Routes[0].Dst != "0.0.0.0/0" {
				t.Errorf("routes: %v", form.Routes)
			}
			n.call("ADD", "c1", w).want(added.ips()...)

			checked := n.call("CHECK", "c1", w.with(`"prevResult": `+added.stdout))
			if version < "0.4" {
				checked.refused(codeVersion)
			} else {
				checked.ok()
			}
			gc, status := n.call("GC", "", w.with(`"cni.dev/valid-attachments": []`)), n.call("STATUS", "", w)
			if version < "1.1" {
				gc.refused(codeVersion)
				status.refused(codeVersion)
				c.leasedBy(t, n.name, 2)
			} else {
				gc.ok()
				status.ok()
				if gc.stdout != "" || status.stdout != "" {
					t.Errorf("GC and STATUS have no result, and said %q and %q", gc.stdout, status.stdout)
				}
				c.leasedBy(t, n.name, 0)
			}
			for range 2 {
				if out := n.call("DEL", "c1", w).ok().stdout; out != "" {
					t.Errorf("DEL has no result, and said %q", out)
				}
			}
			c.leasedBy(t, n.name, 0)
		})
	}
	n := c.node("n")
	r := n.call("VERSION", "", network{}).ok()
	var v struct {
		CNIVersion        string
		SupportedVersions []string
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || !slices.Equal(v.SupportedVersions, versions) || v.CNIVersion == "" {
		t.Errorf("VERSION: %v, %s", err, r.stdout)
	}
	for _, version := range []string{"0.1.0", "0.2.0", "1.2.0", "9.9.9"} {
		for _, verb := range []string{"ADD", "DEL"} {
			n.call(verb, "c", network{version: version, ipam: `"subnet": "10.99.0.0/24"`}).refused(codeVersion)
		}
	}
}

// leasedBy counts the addresses that a node's attachments hold.
func (c *cluster) leasedBy(t testing.TB, node string, want int) {
	t.Helper()
	got := 0
	for _, id := range c.leased() {
		if id.Node == node {
			got++
		}
	}
	if got != want {
		t.Errorf("%d addresses are leased by %s, want %d", got, node, want)
	}
}

// TestDel: DEL may come twice, for nothing, without a netns, without a range,
// and while the network's configuration has been edited.
func TestDel(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	n.call("DEL", "never", w).ok()
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	n.call("DEL", "c1", w, "CNI_NETNS=", "CNI_NETNS_OVERRIDE=").ok()
	n.call("DEL", "c1", w, "CNI_NETNS=", "CNI_NETNS_OVERRIDE=").ok()
	c.wantLeased()
	for i, edited := range []string{`"subnet": "192.168.0.0/24"`, `"pool": "other"`, `"subnet": "broken", "unknown": 1`, ``, `"ranges": []`} {
		id := fmt.Sprint("e", i)
		n.call("ADD", id, w).ok()
		n.call("DEL", id, network{ipam: edited}).ok()
		c.wantLeased()
	}
	// prevResult of another version, or of none, is none of DEL's business.
	n.call("ADD", "c2", w).ok()
	n.call("DEL", "c2", w.with(`"prevResult": {"cniVersion": "0.2.0", "ip4": {"ip": "1.2.3.4/24"}}`)).ok()
	c.wantLeased()
	n.isSettled()
}

// TestTogether: runtimes call for one attachment from several processes at once.
func TestTogether(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	together := func(calls int, verb func(i int) string) (out []*reply) {
		out = make([]*reply, calls)
		var wg sync.WaitGroup
		for i := range calls {
			wg.Go(func() { out[i], _ = runKilled(t, n.command(context.Background(), verb(i), "c1", w), time.Hour) })
		}
		wg.Wait()
		return out
	}
	// The first calls of a node, too: one of them makes its identity.
	for _, r := range together(8, func(int) string { return "ADD" }) {
		r.version = "1.1.0"
		r.want("10.1.0.2/24")
	}
	for _, r := range together(8, func(int) string { return "DEL" }) {
		r.ok()
	}
	c.wantLeased()
	for _, r := range together(12, func(i int) string { return []string{"ADD", "DEL"}[i%2] }) {
		r.ok()
	}
	n.call("DEL", "c1", w).ok()
	c.wantLeased()
	n.isSettled()
	if a, r := len(n.entries(entry.Acquire)), len(n.entries(entry.Release)); a != r || len(n.entries(entry.Open)) != 1 {
		t.Errorf("%d acquires, %d releases, %d opens", a, r, len(n.entries(entry.Open)))
	}
	// Many nodes of a new cluster start their first pods.
	var wg sync.WaitGroup
	replies := make([]*reply, 16)
	for i := range replies {
		fresh := c.node(fmt.Sprint("fresh", i))
		wg.Go(func() {
			replies[i], _ = runKilled(t, fresh.command(context.Background(), "ADD", "c", subnet("10.2.0.0/26")), time.Hour)
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, r := range replies {
		r.version = "1.1.0"
		ip := r.ips()[0]
		if seen[ip] {
			t.Errorf("%s was given twice", ip)
		}
		seen[ip] = true
	}
}

// TestInterfaces: interfaces and networks of one container are attachments of
// their own.
func TestInterfaces(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w, other := subnet("10.1.0.0/24"), network{name: "other", ipam: `"subnet": "10.2.0.0/24"`}
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	n.call("ADD", "c1", w, "CNI_IFNAME=net1").want("10.1.0.3/24")
	n.call("ADD", "c1", other, "CNI_IFNAME=net1").want("10.2.0.2/24")
	n.call("ADD", "c1", w, "CNI_IFNAME=net1").want("10.1.0.3/24")
	n.call("DEL", "c1", w, "CNI_IFNAME=net1").ok()
	c.wantLeased("10.1.0.2", "10.2.0.2")
	// Ranges of two networks that overlap in one space do not collide.
	same := network{name: "same", ipam: w.ipam}
	n.call("ADD", "c2", same, "CNI_ARGS=IP=10.1.0.2").refused(codeNotAvailable, "10.1.0.2", "n1/net/c1/eth0")
	c.node("n2").call("ADD", "c2", same).want("10.1.0.4/24")
	// In another space they are other addresses.
	n.call("ADD", "c3", network{name: "vrf", ipam: w.ipam + `, "addressSpace": "vrf"`}).want("10.1.0.2/24")
}

// TestAllOrNothing: a range set that is exhausted takes no address of another.
func TestAllOrNothing(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := network{ipam: `"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/126"}], [{"subnet": "10.3.0.0/24"}]]`}
	n.call("ADD", "c1", w).want("10.1.0.2/24", "fd00::2/126", "10.3.0.2/24")
	n.call("ADD", "c2", w).want("10.1.0.3/24", "fd00::3/126", "10.3.0.3/24")
	before := c.kvs(keys.Prefix())
	n.call("ADD", "c3", w).refused(codeExhausted, "net", "2 addresses", "2 leased")
	if after := c.kvs(keys.Prefix()); len(after) != len(before) {
		t.Errorf("a refused ADD left %d keys, before there were %d", len(after), len(before))
	}
	n.call("DEL", "c1", w).ok()
	n.call("ADD", "c3", w).want("10.1.0.4/24", "fd00::2/126", "10.3.0.4/24")
	c.wantLeased("10.1.0.3", "fd00::3", "10.3.0.3", "10.1.0.4", "fd00::2", "10.3.0.4")
}

// TestRequested: an address can be asked for in three ways.
func TestRequested(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := network{ipam: `"subnet": "10.1.0.0/24", "rangeEnd": "10.1.0.200", "gateway": "10.1.0.7", "exclude": ["10.1.0.100-10.1.0.110", "10.1.0.150"]`}
	n.call("ADD", "c1", w, "CNI_ARGS=IP=10.1.0.11").want("10.1.0.11/24")
	n.call("ADD", "c2", w.with(`"args": {"cni": {"ips": ["10.1.0.12/24"]}}`)).want("10.1.0.12/24")
	n.call("ADD", "c3", w.with(`"runtimeConfig": {"ips": ["10.1.0.13/24"]}`)).want("10.1.0.13/24")
	// All three agree.
	n.call("ADD", "c4", w.with(`"runtimeConfig": {"ips": ["10.1.0.14/24"]}, "args": {"cni": {"ips": ["10.1.0.14"]}}`), "CNI_ARGS=IP=10.1.0.14").want("10.1.0.14/24")
	// Asked again, the same and another.
	n.call("ADD", "c1", w, "CNI_ARGS=IP=10.1.0.11").want("10.1.0.11/24")
	n.call("ADD", "c1", w).want("10.1.0.11/24")
	n.call("ADD", "c1", w, "CNI_ARGS=IP=10.1.0.99").refused(codeNotAvailable, "10.1.0.99", "10.1.0.11")
	for _, x := range []struct{ ip, says string }{
		{"10.1.0.12", "n1/net/c2/eth0"},
		{"10.1.0.0", "10.1.0.0"},
		{"10.1.0.255", "10.1.0.255"},
		{"10.1.0.201", "10.1.0.201"},
		{"10.1.0.7", "gateway"},
		{"10.1.0.105", "excluded"},
		{"10.1.0.150", "excluded"},
		{"10.9.0.1", "10.9.0.1"},
		{"fd00::1", "fd00::1"},
	} {
		n.call("ADD", "x", w, "CNI_ARGS=IP="+x.ip).refused(codeNotAvailable, x.says)
		n.call("ADD", "x", w.with(fmt.Sprintf(`"runtimeConfig": {"ips": [%q]}`, x.ip))).refused(codeNotAvailable, x.says)
	}
	n.call("ADD", "x", w, "CNI_ARGS=IP=10.1.0.20", "CNI_IFNAME=a").ok()
	n.call("ADD", "x", w.with(`"runtimeConfig": {"ips": ["10.1.0.21", "10.1.0.22"]}`)).refused(codeNotAvailable)
	n.call("ADD", "x", w, "CNI_ARGS=IP=nonsense").refused(codeEnvironment, "nonsense")
	n.call("ADD", "x", w, "CNI_ARGS=what=ever").refused(codeEnvironment, "IgnoreUnknown")
	n.call("ADD", "x", w, "CNI_ARGS=what=ever;IgnoreUnknown=1;IP=10.1.0.23").want("10.1.0.23/24")
	// v4-mapped is v4.
	n.call("ADD", "y", w, "CNI_ARGS=IP=::ffff:10.1.0.24").want("10.1.0.24/24")
	// Another node asks for what lies in this one's block.
	c.node("n2").call("ADD", "z", w, "CNI_ARGS=IP=10.1.0.25").want("10.1.0.25/24")
	c.wantLeased("10.1.0.11", "10.1.0.12", "10.1.0.13", "10.1.0.14", "10.1.0.20", "10.1.0.23", "10.1.0.24", "10.1.0.25")
}

// TestCooldown: a released address is not handed out before its time, not even when
// it is asked for.
func TestCooldown(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := network{ipam: `"subnet": "10.1.0.0/29", "exclude": ["10.1.0.6"], "cooldown": "1h"`}
	for i := range 4 {
		n.call("ADD", fmt.Sprint("c", i), w).want(fmt.Sprintf("10.1.0.%d/29", i+2))
	}
	n.call("DEL", "c1", w).ok()
	n.call("ADD", "c9", w, "CNI_ARGS=IP=10.1.0.3").refused(codeNotAvailable, "is cooling")
	n.call("ADD", "c9", w).refused(codeExhausted, "pool net", "4 addresses", "3 leased", "1 cooling", "2 excluded")
	c.node("n2").call("ADD", "c9", w).refused(codeExhausted, "1 cooling")
}

// TestExclude: what is excluded is never handed out, to nobody.
func TestExclude(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := network{ipam: `"subnet": "10.1.0.0/28", "exclude": ["10.1.0.2", "10.1.0.4/30", "10.1.0.9-10.1.0.13"]`}
	for i, want := range []string{"10.1.0.3/28", "10.1.0.8/28", "10.1.0.14/28"} {
		n.call("ADD", fmt.Sprint("c", i), w).want(want)
	}
	n.call("ADD", "c9", w).refused(codeExhausted, "3 addresses", "3 leased", "11 excluded")
	n.call("ADD", "c9", network{ipam: `"subnet": "10.2.0.0/30", "exclude": ["10.2.0.0/30"]`}).refused(codeConfig, "exclude")
}

// TestAffinity: a full block leads to the next, then to borrowing, which
// strictAffinity forbids.
func TestAffinity(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a"), c.node("b")
	w := network{ipam: `"subnet": "10.1.0.0/28"`} // blocks of 4: 2 3 | 4-7 | 8-11 | 12-14
	b.call("ADD", "b1", w).want("10.1.0.2/28")
	for i, want := range []int{4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 3} {
		a.call("ADD", fmt.Sprint("c", i), w).want(fmt.Sprintf("10.1.0.%d/28", want))
	}
	a.call("ADD", "c99", w).refused(codeExhausted, "13 addresses", "13 leased", "0 cooling")
	strict := network{name: "strict", ipam: `"subnet": "10.2.0.0/29", "strictAffinity": true`}
	b.call("ADD", "s1", strict).want("10.2.0.2/29")
	a.call("ADD", "s2", strict).want("10.2.0.4/29")
	a.call("ADD", "s3", strict).want("10.2.0.5/29")
	a.call("ADD", "s4", strict).want("10.2.0.6/29")
	a.call("ADD", "s5", strict).refused(codeExhausted, "strictAffinity")
	b.call("ADD", "s6", strict).want("10.2.0.3/29")
}

// TestRefusedConfig: what is wrong is named, and nothing is written.
func TestRefusedConfig(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	before := len(c.kvs(keys.Prefix()))
	for _, x := range []struct {
		ipam string
		code int
		says string
	}{
		{`"subnet": "10.1.0.0/24", "subnett": "x"`, codeConfig, "ipam.subnett"},
		{`"subnet": "10.1.0.0/24", "Exclude": []`, codeConfig, "ipam.Exclude"},
		{`"subnet": "10.1.0.0/24", "etcd": {"endpoint": "x"}`, codeConfig, "endpoint"},
		{`"ranges": [[{"subnet": "10.1.0.0/24", "rangeStrat": "10.1.0.9"}]]`, codeConfig, "rangeStrat"},
		{`"subnet": "10.1.0.0/31"`, codeConfig, "10.1.0.0/31"},
		{`"subnet": "10.1.0.0/33"`, codeConfig, "10.1.0.0/33"},
		{`"subnet": "10.1.0.0/24", "subnet": "10.2.0.0/24"`, codeConfig, "twice"},
		{`"subnet": "10.1.0.0/24", "rangeStart": "10.2.0.1"`, codeConfig, "10.2.0.1"},
		{`"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.1.0.0/25"}]]`, codeConfig, "overlap"},
		{`"ranges": [[{"subnet": "10.1.0.0/24"}, {"subnet": "fd00::/64"}]]`, codeConfig, "families"},
		{``, codeConfig, "nothing to hand out"},
		{`"pool": "p", "subnet": "10.1.0.0/24"`, codeConfig, "ipam.pool"},
		{`"pool": "p"`, codeNoPool, `"p"`},
		{`"subnet": "10.1.0.0/24", "identity": "all"`, codeConfig, "identity"},
		{`"subnet": "10.1.0.0/24", "timeout": "soon"`, codeConfig, "timeout"},
	} {
		n.call("ADD", "c1", network{ipam: x.ipam}).refused(x.code, x.says)
	}
	if after := len(c.kvs(keys.Prefix())); after != before {
		t.Errorf("refused ADDs left %d keys, before there were %d", after, before)
	}
	// What skel looks at.
	w := subnet("10.1.0.0/24")
	n.call("ADD", "", w).refused(codeEnvironment, "CNI_CONTAINERID")
	n.call("ADD", "../../etc", w).refused(codeEnvironment)
	n.call("ADD", "c1", w, "CNI_IFNAME=a/b").refused(codeEnvironment)
	n.call("ADD", "c1", network{name: "a/b", ipam: w.ipam}).refused(codeConfig)
	n.call("ADD", "c1", w.with(`"x": `)).refused(codeDecoding)
	if after := len(c.kvs(keys.Prefix())); after != before {
		t.Errorf("refused ADDs left %d keys, before there were %d", after, before)
	}
}

// TestPrivateFile: a configuration file that others can read is refused.
func TestPrivateFile(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	if err := os.Chmod(n.file, 0o644); err != nil {
		t.Fatal(err)
	}
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).refused(codeConfig, n.file, "0644", "chmod 600")
	if err := os.Chmod(n.file, 0o600); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	// A signing key that others can read is an identity that others may have.
	if err := os.Chmod(filepath.Join(n.state, "key"), 0o644); err != nil {
		t.Fatal(err)
	}
	n.call("ADD", "c2", w).refused(codeIntegrity, "0644", "ledger node replace n1")
	n.call("STATUS", "", w).refused(codeIntegrity, "ledger node replace n1")
	n.call("DEL", "c1", w).ok()
	n.wantQueue(1)
	c.wantLeased("10.1.0.2")
	c.ledger("node", "replace", "n1", "--reason", "others could read its key").ok()
	n.call("ADD", "c2", w).want("10.1.0.3/24")
	if st, err := os.Stat(filepath.Join(n.state, "key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the new key: %v, %v", st.Mode(), err)
	}
	n.call("ADD", "c3", w).want("10.1.0.4/24")
	c.wantLeased("10.1.0.3", "10.1.0.4")
	n.isSettled()
}

// TestNotInitialised: an etcd without a ledger must not look like a fresh start.
func TestNotInitialised(t *testing.T) {
	c := bareCluster(t, etcdtest.Start(t))
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	n.call("ADD", "c1", w).refused(codeConfig, "not initialised", "ledger init")
	n.call("DEL", "c1", w).ok()
	n.call("STATUS", "", w).ok()
	if got := c.kvs(keys.Prefix()); len(got) > 0 {
		t.Errorf("keys were written: %v", got)
	}
	c.ledger("init").ok()
	c.ledger("init").ok()
	n.call("ADD", "c1", w).want("10.1.0.2/24")
	n.isSettled()
}

// TestCheck: what the attachment holds, and nothing else, is in prevResult.
func TestCheck(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := network{ipam: `"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]`}
	check := func(container string, ips ...string) *reply {
		t.Helper()
		prev := `"prevResult": {"cniVersion": "1.1.0", "ips": [`
		for i, ip := range ips {
			if i > 0 {
				prev += ","
			}
			prev += fmt.Sprintf(`{"address": %q}`, ip)
		}
		return n.call("CHECK", container, w.with(prev+`]}`))
	}
	n.call("ADD", "c1", w).want("10.1.0.2/24", "fd00::2/64")
	check("c1", "10.1.0.2/24", "fd00::2/64").ok()
	check("c1", "10.1.0.2/24", "fd00::2/64", "192.168.7.7/24").ok() // another plugin's
	check("c1", "10.1.0.2/24").refused(codeMismatch, "fd00::2")
	check("c1", "10.1.0.3/24", "fd00::2/64").refused(codeMismatch, "10.1.0.2")
	check("c2", "10.1.0.2/24").refused(codeMismatch, "c2")
	n.call("CHECK", "c1", w).refused(codeConfig, "prevResult")
	n.call("DEL", "c1", w).ok()
	check("c1", "10.1.0.2/24", "fd00::2/64").refused(codeMismatch)
}

// TestNamedPool: a pool that is in etcd is read and compared there.
func TestNamedPool(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a"), c.node("b")
	w := network{ipam: `"pool": "prod"`}
	a.call("ADD", "a1", w).refused(codeNoPool, `"prod"`, keys.Pool("prod"))
	pool := keyspace.Pool{Ranges: [][]keyspace.Range{{{
		Subnet: netip.MustParsePrefix("10.1.0.0/28"), Start: netip.MustParseAddr("10.1.0.4"), End: netip.MustParseAddr("10.1.0.9"), Gateway: netip.MustParseAddr("10.1.0.1"),
	}}}, Exclude: []string{"10.1.0.5"}}
	client := c.etcd.Client(t)
	if _, err := client.Put(t.Context(), keys.Pool("prod"), string(keyspace.Encode(pool))); err != nil {
		t.Fatal(err)
	}
	// Put by hand it is on no record, as verify would say.
	defer func() {
		if _, err := client.Delete(context.Background(), keys.Pool("prod")); err != nil {
			t.Error(err)
		}
	}()
	a.call("ADD", "a1", w).want("10.1.0.4/28")
	b.call("ADD", "b1", w).want("10.1.0.8/28")
	a.call("ADD", "a2", w).want("10.1.0.6/28")
	a.call("ADD", "a3", w, "CNI_ARGS=IP=10.1.0.5").refused(codeNotAvailable, "excluded")
	a.call("ADD", "a3", w).want("10.1.0.7/28")
	a.call("ADD", "a4", w).want("10.1.0.9/28") // borrowed
	b.call("ADD", "b2", w).refused(codeExhausted, "prod", "5 addresses", "5 leased")
	b.call("DEL", "b1", w).ok()
	c.wantLeased("10.1.0.4", "10.1.0.6", "10.1.0.7", "10.1.0.9")
}

// TestGC: only what this node holds for this network and the list lacks.
func TestGC(t *testing.T) {
	c := newCluster(t)
	a, b := c.node("a"), c.node("b")
	w, other := subnet("10.1.0.0/24"), network{name: "net2", ipam: `"subnet": "10.2.0.0/24"`}
	for _, id := range []string{"c1", "c2", "c3"} {
		a.call("ADD", id, w).ok()
	}
	a.call("ADD", "c1", w, "CNI_IFNAME=net1").want("10.1.0.5/24")
	a.call("ADD", "c2", other).want("10.2.0.2/24")
	b.call("ADD", "c2", w).want("10.1.0.16/24")
	all := []string{"10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.2.0.2", "10.1.0.16"}
	c.wantLeased(all...)
	for _, list := range []string{
		``, `"cni.dev/valid-attachments": null`, `"cni.dev/attachments": []`,
		`"cni.dev/valid-attachments": {}`, `"cni.dev/valid-attachments": [{"containerID": "c1"}]`, `"cni.dev/valid-attachments": [null]`,
	} {
		a.call("GC", "", w.with(list)).refused(codeConfig, "attachments")
	}
	c.wantLeased(all...)
	a.call("GC", "", w.with(`"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c3", "ifname": "eth0"}, {"containerID": "who", "ifname": "eth0"}]`)).ok()
	c.wantLeased("10.1.0.2", "10.1.0.4", "10.2.0.2", "10.1.0.16")
	a.call("GC", "", w.with(`"cni.dev/valid-attachments": []`)).ok()
	c.wantLeased("10.2.0.2", "10.1.0.16")
	a.call("GC", "", w.with(`"cni.dev/valid-attachments": []`)).ok()
	b.call("GC", "", w.with(`"cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth0"}]`)).ok()
	c.wantLeased("10.2.0.2", "10.1.0.16")
	if got := a.entries(entry.Release); len(got) != 4 || !strings.HasPrefix(got[0].Reason, "gc") {
		t.Errorf("release entries: %+v", got)
	}
}

// TestNetns: a netns that cannot be the pod's is refused before anything is
// written; a real one is not.
func TestNetns(t *testing.T) {
	c := newCluster(t)
	n := c.node("n1")
	w := subnet("10.1.0.0/24")
	before := len(c.kvs(keys.Prefix()))
	n.call("ADD", "c1", w, "CNI_NETNS_OVERRIDE=", "CNI_NETNS=/proc/self/ns/net").refused(codeNetns)
	n.call("ADD", "c1", w, "CNI_NETNS_OVERRIDE=", "CNI_NETNS=").refused(codeEnvironment, "CNI_NETNS")
	if after := len(c.kvs(keys.Prefix())); after != before {
		t.Errorf("refused ADDs left %d keys, before there were %d", after, before)
	}
	if os.Geteuid() != 0 {
		t.Log("not root, so without a network namespace of our own")
		return
	}
	ns, err := testutils.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ns.Close()
		if err := testutils.UnmountNS(ns); err != nil {
			t.Error(err)
		}
	}()
	n.call("ADD", "c1", w, "CNI_NETNS_OVERRIDE=", "CNI_NETNS="+ns.Path()).want("10.1.0.2/24")
	n.call("DEL", "c1", w, "CNI_NETNS_OVERRIDE=", "CNI_NETNS="+ns.Path()).ok()
	c.wantLeased()
}

// TestIdentity: what of the pod is on the record is the operator's choice.
func TestIdentity(t *testing.T) {
	c := newCluster(t)
	const args = "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=8c1f;K8S_POD_INFRA_CONTAINER_ID=c1"
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	for _, x := range []struct{ identity, pod, uid string }{
		{"full", "shop/web-0", "8c1f"}, {"uid", "", "8c1f"}, {"none", "", ""},
	} {
		n := c.node(x.identity, fmt.Sprintf(`"identity": %q`, x.identity))
		w := subnet("10.1.0.0/24")
		n.call("ADD", "c1", w, args, "TRACEPARENT=00-"+trace+"-00f067aa0ba902b7-01").ok()
		n.call("DEL", "c1", w, args).ok()
		for _, op := range []entry.Op{entry.Acquire, entry.Release} {
			ee := n.entries(op)
			if len(ee) != 1 || ee[0].Pod != x.pod || ee[0].PodUID != x.uid {
				t.Errorf("identity %s: %s entries %+v", x.identity, op, ee)
			}
		}
		if e := n.entries(entry.Acquire)[0]; e.Trace != trace || e.Container != "c1" || e.Interface != "eth0" || e.Network != "net" || e.Node != x.identity {
			t.Errorf("acquire entry: %+v", e)
		}
		for k, v := range c.kvs(keys.Prefix()) {
			if x.identity != "full" && strings.Contains(k, "/"+x.identity+"/") && strings.Contains(string(v), "web-0") {
				t.Errorf("identity %s: %s has the pod's name: %s", x.identity, k, v)
			}
		}
	}
	// What is no trace is left out.
	n := c.node("n")
	for i, tp := range []string{"00-" + trace, "nonsense", "00-" + strings.Repeat("z", 32) + "-00f067aa0ba902b7-01", "00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01"} {
		n.call("ADD", fmt.Sprint("t", i), subnet("10.1.0.0/24"), "TRACEPARENT="+tp).ok()
	}
	for _, e := range n.entries(entry.Acquire) {
		if e.Trace != "" {
			t.Errorf("trace %q is none", e.Trace)
		}
	}
}

// TestLogs: stdout is the result's alone.
func TestLogs(t *testing.T) {
	c := newCluster(t)
	log := filepath.Join(c.dir, "plugin.log")
	n := c.node("n1", fmt.Sprintf(`"logFile": %q`, log))
	w := network{ipam: `"subnet": "10.1.0.0/24", "dataDir": "/var/lib/cni/networks"`}
	if r := n.call("ADD", "c1", w); !strings.Contains(r.stderr, "dataDir") {
		t.Errorf("nothing warns of dataDir: %q", r.stderr)
	}
	n.call("ADD", "c1", w, "CNI_IFNAME=eth1", "CNI_ARGS=IP=10.9.9.9").refused(codeNotAvailable)
	n.call("DEL", "c1", w).ok()
	b, err := os.ReadFile(log)
	for _, s := range []string{"msg=ADD", "n1/net/c1/eth0", "10.1.0.2", "msg=DEL", "dataDir", "10.9.9.9", "code=101"} {
		if !strings.Contains(string(b), s) {
			t.Errorf("the log (%v) does not say %q:\n%s", err, s, b)
		}
	}
	// A log that cannot be written must not keep a pod from starting.
	n.configure(`"logFile": "/proc/no/such/file"`)
	if r := n.call("ADD", "c2", w).ok(); !strings.Contains(r.stderr, "logFile") {
		t.Errorf("nothing warns of the logFile: %q", r.stderr)
	}
}

// TestResult: routes, DNS and gateways are passed on.
func TestResult(t *testing.T) {
	c := newCluster(t)
	resolv := filepath.Join(c.dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("# comment\nnameserver 192.0.2.3\nnameserver 2001:db8::1\ndomain example.com\nsearch a.example b.example\noptions ndots:5 edns0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	n := c.node("n1")
	w := network{ipam: fmt.Sprintf(`"subnet": "10.1.0.0/24", "gateway": "10.1.0.254", "resolvConf": %q,
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "192.168.0.0/16", "gw": "10.1.0.9", "mtu": 1400, "table": 0, "scope": 253}]`, resolv)}
	r := n.call("ADD", "c1", w).result()
	if got := fmt.Sprint(r.DNS); got != "{[192.0.2.3 2001:db8::1] example.com [a.example b.example] [ndots:5 edns0]}" {
		t.Errorf("DNS: %s", got)
	}
	if len(r.IPs) != 1 || !r.IPs[0].Gateway.Equal(net.ParseIP("10.1.0.254")) || r.IPs[0].Address.String() != "10.1.0.1/24" {
		t.Errorf("address: %v", r.IPs)
	}
	if len(r.Routes) != 2 || r.Routes[1].GW.String() != "10.1.0.9" || r.Routes[1].MTU != 1400 || r.Routes[1].Table == nil || *r.Routes[1].Table != 0 || *r.Routes[1].Scope != 253 {
		t.Errorf("routes: %v", r.Routes)
	}
	n.call("ADD", "c2", network{ipam: `"subnet": "10.1.0.0/24", "resolvConf": "/no/such/file"`}).refused(codeConfig, "/no/such/file")
	c.wantLeased("10.1.0.1")
}

// TestLikeHostLocal: host-local's own cases, in every version.
func TestLikeHostLocal(t *testing.T) {
	c := newCluster(t)
	two := `"ranges": [[{"subnet": "10.1.2.0/24"}, {"subnet": "10.2.2.0/24"}], [{"subnet": "2001:db8:1::0/64"}]]`
	for vi, version := range versions {
		cases := []struct {
			name, ipam, more, args string
			want                   []string // of a fresh pool; empty: refused
			code                   int
		}{
			{name: "two-families", ipam: two, want: []string{"10.1.2.2/24", "2001:db8:1::2/64"}},
			{name: "args", ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}]]`, more: `"args": {"cni": {"ips": ["10.1.2.88"]}}`, want: []string{"10.1.2.88/24"}},
			{name: "args-of-two-ranges", ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "10.1.3.0/24"}]]`, more: `"args": {"cni": {"ips": ["10.1.2.88", "10.1.3.77"]}}`, want: []string{"10.1.2.88/24", "10.1.3.77/24"}},
			{name: "args-in-the-other-order", ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "10.1.3.0/24"}]]`, more: `"args": {"cni": {"ips": ["10.1.3.77", "10.1.2.88"]}}`, want: []string{"10.1.2.88/24", "10.1.3.77/24"}},
			{name: "args-of-two-families", ipam: `"ranges": [[{"subnet": "172.16.1.0/24"}, {"subnet": "10.1.2.0/24"}], [{"subnet": "2001:db8:1::/48"}]]`, more: `"args": {"cni": {"ips": ["10.1.2.88", "2001:db8:1::999"]}}`, want: []string{"10.1.2.88/24", "2001:db8:1::999/48"}},
			{name: "args-too-many", ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "10.1.3.0/24"}]]`, more: `"args": {"cni": {"ips": ["10.1.2.88", "10.1.2.77"]}}`, code: codeNotAvailable},
			{name: "old-style", ipam: `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.20", "gateway": "10.1.2.30"`, want: []string{"10.1.2.9/24"}},
			{name: "before-the-range", ipam: `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9"`, args: "IP=10.1.2.8", code: codeNotAvailable},
			{name: "after-the-range", ipam: `"subnet": "10.1.2.0/24", "rangeEnd": "10.1.2.20"`, args: "IP=10.1.2.21", code: codeNotAvailable},
			{name: "args-with-prefix", ipam: `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.20"`, args: "IP=10.1.2.11/24", want: []string{"10.1.2.11/24"}},
			{name: "runtime-ranges-first", ipam: `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "ranges": [[{"subnet": "11.1.2.0/24", "rangeStart": "11.1.2.9"}]]`, more: `"runtimeConfig": {"irrelevant": "a", "ipRanges": [[{"subnet": "12.1.3.0/24"}]]}`, want: []string{"12.1.3.2/24", "10.1.2.9/24", "11.1.2.9/24"}},
			{name: "one-address", ipam: `"subnet": "10.0.0.0/30"`, want: []string{"10.0.0.2/30"}},
			{name: "overlap-between-sets", ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}, {"subnet": "10.2.2.0/24"}], [{"subnet": "10.1.4.0/24"}, {"subnet": "10.1.2.0/24"}]]`, code: codeConfig},
			{name: "overlap-within-a-set", ipam: `"ranges": [[{"subnet": "10.1.0.0/22"}, {"subnet": "10.1.2.0/24"}]]`, code: codeConfig},
			{name: "mixed-families", ipam: `"ranges": [[{"subnet": "10.1.0.0/22"}, {"subnet": "2001:db8:5::/64"}]]`, code: codeConfig},
		}
		if vi > 0 && vi < len(versions)-1 {
			cases = cases[:3] // the oldest and the newest see all
		}
		for _, x := range cases {
			t.Run(version+"/"+x.name, func(t *testing.T) {
				n := c.node("n")
				n.t = t
				// A space of its own: these ranges overlap from case to case.
				id := fmt.Sprintf("%s-%d", x.name, vi)
				w := network{version: version, name: id, ipam: x.ipam + fmt.Sprintf(`, "addressSpace": %q`, id), more: x.more}
				r := n.call("ADD", "dummy", w, "CNI_ARGS="+x.args)
				if x.code != 0 {
					r.refused(x.code)
					return
				}
				r.want(x.want...)
				n.call("DEL", "unknown", w).ok()
				n.call("DEL", "dummy", w).ok()
				c.leasedBy(t, n.name, 0)
			})
		}
	}
	// Round and round: a released address comes last, all are used.
	n := c.node("round")
	w := network{name: "round", ipam: `"subnet": "192.168.1.0/29"`}
	var got []string
	for i := range 12 {
		got = append(got, netip.MustParsePrefix(n.call("ADD", fmt.Sprint("c", i), w).ips()[0]).Addr().String()[10:])
		n.call("DEL", fmt.Sprint("c", i), w).ok()
	}
	// The node's blocks are of four; each goes round by itself.
	if s := strings.Join(got, ""); !strings.HasPrefix(s, "23") || strings.ContainsAny(s, "0178") {
		t.Errorf("addresses in turn: %s", s)
	}
	c.wantLeased()
}
