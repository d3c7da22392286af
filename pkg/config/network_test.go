package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// The tests must not see this machine's name or configuration.
func TestMain(m *testing.M) {
	defaultFile = "/nonexistent/config.json"
	hostname = func() (string, error) { return "Worker-1", nil }
	os.Exit(m.Run())
}

const etcdHere = `"etcd": {"endpoints": ["http://127.0.0.1:2379"]}`

// conf is a network configuration with ipam's keys and others beside ipam.
func conf(ipam string, beside ...string) string {
	ipam = strings.Join(slices.DeleteFunc([]string{`"type": "ipam-ledger"`, etcdHere, ipam}, func(s string) bool { return s == "" }), ", ")
	all := append([]string{`"cniVersion": "1.1.0"`, `"name": "prod"`, `"type": "bridge"`}, beside...)
	return "{" + strings.Join(append(all, `"ipam": {`+ipam+`}`), ", ") + "}"
}

func add(t *testing.T, doc string) *Network {
	t.Helper()
	n, err := LoadNetwork("ADD", []byte(doc), "")
	if err != nil {
		t.Fatalf("%v\n%s", err, doc)
	}
	return n
}

// fails checks code and details of an error.
func fails(t *testing.T, err error, code uint, details string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) {
		t.Fatalf("error %v is no *types.Error, want %d: %s", err, code, details)
	}
	if e.Code != code || e.Details != details {
		t.Errorf("got  %d: %s\nwant %d: %s", e.Code, e.Details, code, details)
	}
}

func spell(sets [][]keyspace.Range) (out []string) {
	for _, set := range sets {
		var parts []string
		for _, r := range set {
			parts = append(parts, fmt.Sprintf("%s %s-%s via %s", r.Subnet, r.Start, r.End, r.Gateway))
		}
		out = append(out, strings.Join(parts, ", "))
	}
	return out
}

// What host-local takes, and what it makes of it. Each case is also given to
// host-local's own code, which must agree.
func TestHostLocalConfigurations(t *testing.T) {
	for _, tc := range []struct {
		name, ipam, beside, args string
		sets, requested          []string
	}{
		{
			name: "one range in ipam itself",
			ipam: `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.20", "gateway": "10.1.2.30"`,
			sets: []string{"10.1.2.0/24 10.1.2.9-10.1.2.20 via 10.1.2.30"},
		},
		{
			name: "a subnet alone",
			ipam: `"subnet": "203.0.113.0/24"`,
			sets: []string{"203.0.113.0/24 203.0.113.1-203.0.113.254 via 203.0.113.1"},
		},
		{
			name: "a small subnet",
			ipam: `"subnet": "192.0.2.0/25"`,
			sets: []string{"192.0.2.0/25 192.0.2.1-192.0.2.126 via 192.0.2.1"},
		},
		{
			name: "the smallest subnets",
			ipam: `"ranges": [[{"subnet": "192.0.2.4/30"}], [{"subnet": "2001:db8::4/126"}]]`,
			sets: []string{"192.0.2.4/30 192.0.2.5-192.0.2.6 via 192.0.2.5", "2001:db8::4/126 2001:db8::5-2001:db8::7 via 2001:db8::5"},
		},
		{
			name: "IPv6, upper case",
			ipam: `"subnet": "2001:DB8:1::/64"`,
			sets: []string{"2001:db8:1::/64 2001:db8:1::1-2001:db8:1:0:ffff:ffff:ffff:ffff via 2001:db8:1::1"},
		},
		{
			name: "sets of one and of two ranges",
			ipam: `"ranges": [
				[{"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "rangeEnd": "10.1.2.20", "gateway": "10.1.2.30"}, {"subnet": "10.1.4.0/24"}],
				[{"subnet": "11.1.2.0/24", "rangeStart": "11.1.2.9", "rangeEnd": "11.1.2.20", "gateway": "11.1.2.30"}]]`,
			sets: []string{
				"10.1.2.0/24 10.1.2.9-10.1.2.20 via 10.1.2.30, 10.1.4.0/24 10.1.4.1-10.1.4.254 via 10.1.4.1",
				"11.1.2.0/24 11.1.2.9-11.1.2.20 via 11.1.2.30",
			},
		},
		{
			name: "dual stack",
			ipam: `"ranges": [[{"subnet": "10.22.0.0/16"}], [{"subnet": "fd00:22::/64", "gateway": "fd00:22::ff"}]]`,
			sets: []string{
				"10.22.0.0/16 10.22.0.1-10.22.255.254 via 10.22.0.1",
				"fd00:22::/64 fd00:22::1-fd00:22::ffff:ffff:ffff:ffff via fd00:22::ff",
			},
		},
		{
			name: "two parts of one subnet",
			ipam: `"ranges": [[{"subnet": "10.0.0.0/24", "rangeEnd": "10.0.0.127"}], [{"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.128"}]]`,
			sets: []string{
				"10.0.0.0/24 10.0.0.1-10.0.0.127 via 10.0.0.1",
				"10.0.0.0/24 10.0.0.128-10.0.0.254 via 10.0.0.1",
			},
		},
		{
			name: "families whose bits overlap",
			ipam: `"ranges": [[{"subnet": "0.0.0.0/24"}], [{"subnet": "::/24"}]]`,
			sets: []string{
				"0.0.0.0/24 0.0.0.1-0.0.0.254 via 0.0.0.1",
				"::/24 ::1-0:ff:ffff:ffff:ffff:ffff:ffff:ffff via ::1",
			},
		},
		{
			name: "v4-mapped addresses",
			ipam: `"subnet": "10.1.2.0/24", "rangeStart": "::ffff:10.1.2.9", "rangeEnd": "::ffff:10.1.2.20", "gateway": "::ffff:10.1.2.30"`,
			sets: []string{"10.1.2.0/24 10.1.2.9-10.1.2.20 via 10.1.2.30"},
		},
		{
			name: "a gateway outside", // host-local lets it be
			ipam: `"subnet": "10.1.2.0/24", "gateway": "10.9.9.9"`,
			sets: []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.9.9.9"},
		},
		{
			name: "empty texts",
			ipam: `"subnet": "10.1.2.0/24", "rangeStart": "", "rangeEnd": "", "gateway": "", "routes": [], "ranges": []`,
			sets: []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1"},
		},
		{
			name:   "the runtime's ranges come first, then ipam's own",
			ipam:   `"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9", "ranges": [[{"subnet": "11.1.2.0/24", "rangeEnd": "11.1.2.20"}]]`,
			beside: `"runtimeConfig": {"irrelevant": "a", "ipRanges": [[{"subnet": "12.1.3.0/24"}]]}`,
			sets: []string{
				"12.1.3.0/24 12.1.3.1-12.1.3.254 via 12.1.3.1",
				"10.1.2.0/24 10.1.2.9-10.1.2.254 via 10.1.2.1",
				"11.1.2.0/24 11.1.2.1-11.1.2.20 via 11.1.2.1",
			},
		},
		{
			name:   "the runtime's ranges alone",
			beside: `"runtimeConfig": {"ipRanges": [[{"subnet": "12.1.3.0/24", "gateway": "12.1.3.254"}]]}`,
			sets:   []string{"12.1.3.0/24 12.1.3.1-12.1.3.254 via 12.1.3.254"},
		},
		{
			name:      "an address asked for in CNI_ARGS",
			ipam:      `"subnet": "10.1.2.0/24"`,
			args:      "IP=10.1.2.10",
			sets:      []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1"},
			requested: []string{"10.1.2.10"},
		},
		{
			name:      "with a prefix length",
			ipam:      `"subnet": "10.1.2.0/24"`,
			args:      "IgnoreUnknown=1;IP=10.1.2.11/24;MAC=00:11:22:33:44:55",
			sets:      []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1"},
			requested: []string{"10.1.2.11"},
		},
		{
			name:      "an empty one",
			ipam:      `"subnet": "10.1.2.0/24"`,
			args:      "IP=",
			sets:      []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1"},
			requested: nil,
		},
		{
			name: "all three ways, in order",
			ipam: `"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "11.1.2.0/24"}], [{"subnet": "2001:db8:1::/64"}]]`,
			beside: `"args": {"cni": {"ips": ["10.1.2.11", "11.11.11.11/24", "2001:db8:1::11/64"], "labels": [{"key": "a", "value": "b"}]}},
				"runtimeConfig": {"ips": ["192.168.0.1", "192.168.0.5/24", "2001:db8::1/64", "::ffff:10.1.2.12"]}`,
			args: "IP=10.1.2.10/24",
			sets: []string{
				"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1",
				"11.1.2.0/24 11.1.2.1-11.1.2.254 via 11.1.2.1",
				"2001:db8:1::/64 2001:db8:1::1-2001:db8:1:0:ffff:ffff:ffff:ffff via 2001:db8:1::1",
			},
			requested: []string{
				"10.1.2.10", "10.1.2.11", "11.11.11.11", "2001:db8:1::11",
				"192.168.0.1", "192.168.0.5", "2001:db8::1", "10.1.2.12",
			},
		},
		{
			name:   "nulls",
			ipam:   `"subnet": "10.1.2.0/24", "ranges": null, "routes": null, "gateway": null`,
			beside: `"args": null, "runtimeConfig": {"ips": null, "ipRanges": null}, "prevResult": null`,
			sets:   []string{"10.1.2.0/24 10.1.2.1-10.1.2.254 via 10.1.2.1"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var beside []string
			if tc.beside != "" {
				beside = []string{tc.beside}
			}
			doc := conf(tc.ipam, beside...)
			n, err := LoadNetwork("ADD", []byte(doc), tc.args)
			if err != nil {
				t.Fatal(err)
			}
			if got := spell(n.RangeSets); !slices.Equal(got, tc.sets) {
				t.Errorf("sets\n got %q\nwant %q", got, tc.sets)
			}
			var requested []string
			for _, a := range n.Requested {
				requested = append(requested, a.String())
			}
			if !slices.Equal(requested, tc.requested) {
				t.Errorf("requested\n got %q\nwant %q", requested, tc.requested)
			}
			if n.Name != "prod" || n.Pool != "prod" || n.Named || n.Space != "default" || n.CNIVersion != "1.1.0" || len(n.Warnings) > 0 {
				t.Errorf("got %+v", n)
			}

			theirs, _, err := allocator.LoadIPAMConfig([]byte(doc), tc.args)
			if err != nil {
				t.Fatalf("host-local: %v", err)
			}
			var sets [][]keyspace.Range
			for _, set := range theirs.Ranges {
				var ranges []keyspace.Range
				for _, r := range set {
					bits, _ := r.Subnet.Mask.Size()
					ranges = append(ranges, keyspace.Range{
						Subnet: netip.PrefixFrom(addr(r.Subnet.IP), bits), Start: addr(r.RangeStart), End: addr(r.RangeEnd), Gateway: addr(r.Gateway),
					})
				}
				sets = append(sets, ranges)
			}
			if !reflect.DeepEqual(sets, n.RangeSets) {
				t.Errorf("host-local has %q", spell(sets))
			}
			requested = nil
			for _, ip := range theirs.IPArgs {
				requested = append(requested, addr(ip).String())
			}
			if !slices.Equal(requested, tc.requested) {
				t.Errorf("host-local has %q requested", requested)
			}
		})
	}
}

func TestRequestedIsFolded(t *testing.T) {
	n, err := LoadNetwork("ADD", []byte(conf(`"subnet": "10.1.2.0/24"`,
		`"args": {"cni": {"ips": ["10.1.2.3", "10.1.2.4/24"]}}`,
		`"runtimeConfig": {"ips": ["10.1.2.4", "::ffff:10.1.2.3", "10.1.2.5"]}`)), "IP=10.1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(n.Requested); got != "[10.1.2.3 10.1.2.4 10.1.2.5]" {
		t.Error(got)
	}
}

// Every key at once.
func TestEveryKey(t *testing.T) {
	dir := t.TempDir()
	resolv := write(t, dir, "resolv.conf", 0o644, "nameserver 192.0.2.53\n")
	ca := write(t, dir, "ca.pem", 0o644, "ca")
	cert := write(t, dir, "cert.pem", 0o644, "cert")
	key := write(t, dir, "key.pem", 0o600, "key")
	password := write(t, dir, "password", 0o400, "secret")
	file := write(t, dir, "config.json", 0o600, `{}`)
	n := add(t, fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "prod", "ipam": {
		"type": "ipam-ledger",
		"ranges": [[{"subnet": "10.22.0.0/16", "rangeStart": "10.22.0.0", "rangeEnd": "10.22.255.255", "gateway": "10.22.0.1"}]],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.0.0.0/8", "gw": "10.22.0.9", "mtu": 1400, "advmss": 1360, "priority": 5, "table": 7, "scope": 0}],
		"resolvConf": %q, "dataDir": "/run/leases",
		"exclude": ["10.22.0.0/28", "10.22.1.7", "10.22.2.10-10.22.2.20", "::ffff:10.22.3.1 - 10.22.3.2"],
		"addressSpace": "blue", "strictAffinity": true, "blockSize": 32, "cooldown": "90s",
		"etcd": {"endpoints": ["https://10.0.0.1:2379", "10.0.0.2:2379"],
			"caFile": %q, "certFile": %q, "keyFile": %q, "username": "root", "passwordFile": %q},
		"node": "Node-7", "stateDir": "/var/lib/x/", "prefix": "/x/", "clusterID": "c-1", "identity": "uid",
		"timeout": "2s", "lockTimeout": "3s", "statusGrace": "4m", "logFile": "/var/log/x.log", "configFile": %q
	}}`, resolv, ca, cert, key, password, file))
	want := Settings{
		Endpoints: []string{"https://10.0.0.1:2379", "https://10.0.0.2:2379"},
		CAFile:    ca, CertFile: cert, KeyFile: key, Username: "root", PasswordFile: password,
		Node: "Node-7", StateDir: "/var/lib/x", Prefix: "/x/", ClusterID: "c-1", Identity: "uid", LogFile: "/var/log/x.log",
		Timeout: 2 * time.Second, LockTimeout: 3 * time.Second, StatusGrace: 4 * time.Minute,
	}
	if !reflect.DeepEqual(n.Settings, want) {
		t.Errorf("settings\n got %+v\nwant %+v", n.Settings, want)
	}
	if n.Space != "blue" || !n.StrictAffinity || n.BlockSize != 32 || n.Cooldown != 90*time.Second || n.Pool != "prod" || n.Named {
		t.Errorf("got %+v", n)
	}
	if got := fmt.Sprint(n.Exclude.Ranges()); got != "[10.22.0.0-10.22.0.15 10.22.1.7-10.22.1.7 10.22.2.10-10.22.2.20 10.22.3.1-10.22.3.2]" {
		t.Error("exclude", got)
	}
	if got := spell(n.RangeSets); got[0] != "10.22.0.0/16 10.22.0.0-10.22.255.255 via 10.22.0.1" {
		t.Error(got)
	}
	if got := fmt.Sprint(n.Routes); !strings.Contains(got, "10.22.0.9") || len(n.Routes) != 2 || n.Routes[1].MTU != 1400 ||
		n.Routes[1].AdvMSS != 1360 || n.Routes[1].Priority != 5 || *n.Routes[1].Table != 7 || *n.Routes[1].Scope != 0 || n.Routes[0].Table != nil {
		t.Error("routes", got)
	}
	if !slices.Equal(n.DNS.Nameservers, []string{"192.0.2.53"}) {
		t.Error(n.DNS)
	}
	if want := []string{"ipam.dataDir is ignored: leases are in etcd; to take over host-local's, run ledger import host-local /run/leases"}; !slices.Equal(n.Warnings, want) {
		t.Errorf("warnings %q", n.Warnings)
	}
}

func TestDefaults(t *testing.T) {
	n := add(t, conf(`"pool": "blue"`))
	want := Settings{
		Endpoints: []string{"http://127.0.0.1:2379"}, Node: "worker-1", StateDir: "/var/lib/ipam-ledger", Prefix: "/ipam-ledger/v1/",
		Identity: "full", Timeout: 10 * time.Second, LockTimeout: 30 * time.Second, StatusGrace: time.Minute,
	}
	if !reflect.DeepEqual(n.Settings, want) {
		t.Errorf("settings\n got %+v\nwant %+v", n.Settings, want)
	}
	if n.Pool != "blue" || !n.Named || n.RangeSets != nil || n.Exclude == nil || n.PrevResult != nil || n.HasValidAttachments || n.Warnings != nil {
		t.Errorf("got %+v", n)
	}
}

func write(t *testing.T, dir, name string, mode os.FileMode, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// wrong are network configurations that ADD refuses, each with what it says. The
// other verbs take those that are not hard.
var wrong = []struct {
	name, doc, args string
	code            uint
	details         string
	hard            bool
}{
	// Ranges.
	{"nothing", conf(``), "", 7, `there is nothing to hand out: set ipam.subnet, ipam.ranges or ipam.pool`, false},
	{"no ranges", conf(`"ranges": []`), "", 7, `there is nothing to hand out: set ipam.subnet, ipam.ranges or ipam.pool`, false},
	{"pool and subnet", conf(`"pool": "blue", "subnet": "10.0.0.0/24"`), "", 7, `ipam.pool is "blue" and there are ranges too (ipam.subnet): remove one of them`, false},
	{"pool and ranges", conf(`"pool": "blue", "ranges": [[{"subnet": "10.0.0.0/24"}]]`), "", 7, `ipam.pool is "blue" and there are ranges too (ipam.ranges[0]): remove one of them`, false},
	{
		"pool and the runtime's ranges", conf(`"pool": "blue"`, `"runtimeConfig": {"ipRanges": [[{"subnet": "10.0.0.0/24"}]]}`), "", 7,
		`ipam.pool is "blue" and there are ranges too (runtimeConfig.ipRanges[0]): remove one of them`, false,
	},
	{"pools", conf(`"pools": ["a", "b"]`), "", 7, `ipam.pools is a list of pools, which is not supported: name one pool with "pool"`, false},
	{"a bad pool name", conf(`"pool": "a/b"`), "", 7, `ipam.pool: pool "a/b": only A-Z a-z 0-9 . _ @ - are allowed`, false},
	{
		"too small", conf(`"subnet": "192.0.2.0/31"`), "", 7,
		`ipam: Network 192.0.2.0/31 too small to allocate from: it has no address beside network, gateway and broadcast; use a /30 (IPv6: /126) or wider`, false,
	},
	{
		"host bits", conf(`"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "192.0.2.12/24"}]]`), "", 7,
		`ipam.ranges[0][1]: Network has host bits set. For a subnet mask of length 24 the network address is 192.0.2.0`, false,
	},
	{
		"host bits, IPv6", conf(`"subnet": "2001:DB8:24:19ff::/63"`), "", 7,
		`ipam: Network has host bits set. For a subnet mask of length 63 the network address is 2001:db8:24:19fe::`, false,
	},
	{
		"start outside", conf(`"subnet": "192.0.2.0/24", "rangeStart": "192.0.3.0"`), "", 7,
		`ipam: RangeStart 192.0.3.0 not in network 192.0.2.0/24: put both ends inside it, and the start not above the end`, false,
	},
	{
		"end outside", conf(`"subnet": "192.0.2.0/24", "rangeEnd": "192.0.4.0"`), "", 7,
		`ipam: RangeEnd 192.0.4.0 not in network 192.0.2.0/24: put both ends inside it, and the start not above the end`, false,
	},
	{
		"backwards", conf(`"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.50", "rangeEnd": "192.0.2.40"`), "", 7,
		`ipam: RangeStart 192.0.2.50 not in network 192.0.2.0/24: put both ends inside it, and the start not above the end`, false,
	},
	{
		"mixed families", conf(`"ranges": [[{"subnet": "10.1.0.0/22"}, {"subnet": "2001:db8:5::/64"}]]`), "", 7,
		`ipam.ranges[0]: mixed address families: a range set gives one address; make a set for IPv4 and one for IPv6`, false,
	},
	{
		"overlap in a set", conf(`"ranges": [[{"subnet": "10.1.0.0/22"}, {"subnet": "10.1.2.0/24"}]]`), "", 7,
		`ipam.ranges[0]: subnets 10.1.0.1-10.1.3.254 and 10.1.2.1-10.1.2.254 overlap: make one range of them or move one`, false,
	},
	{
		"overlap of sets", conf(`"subnet": "10.9.0.0/24", "ranges": [[{"subnet": "10.1.2.0/24"}, {"subnet": "10.2.2.0/24"}], [{"subnet": "10.1.4.0/24"}, {"subnet": "10.1.2.0/24"}]]`), "", 7,
		`ipam.ranges[1] overlaps with ipam.ranges[0]: an interface gets one address from each, so give each its own range`, false,
	},
	{"empty set", conf(`"ranges": [[]]`), "", 7, `ipam.ranges[0] is an empty range set: put a range in it or remove it`, false},
	{"null set", conf(`"ranges": [null]`), "", 7, `ipam.ranges[0] is null: want a list, like [{"subnet": "10.22.0.0/16"}]`, false},
	{
		"not nested", conf(`"ranges": [{"subnet": "10.1.2.0/24"}]`), "", 7,
		`ipam.ranges[0] is an object: want a list, like [{"subnet": "10.22.0.0/16"}]`, false,
	},
	{"not a list", conf(`"ranges": "10.1.2.0/24"`), "", 7, `ipam.ranges is a string: want a list, like [[{"subnet": "10.22.0.0/16"}]]`, false},
	{"no subnet", conf(`"ranges": [[{"rangeStart": "10.1.2.0"}]]`), "", 7, `ipam.ranges[0][0].subnet is not set: want a prefix, like "10.22.0.0/16"`, false},
	{"no length", conf(`"subnet": "10.1.2.0"`), "", 7, `ipam.subnet is "10.1.2.0": want a prefix, like "10.22.0.0/16"`, false},
	{"subnet a number", conf(`"subnet": 10`), "", 7, `ipam.subnet is the number 10: want a string in quotes`, false},
	{"mapped subnet", conf(`"subnet": "::ffff:10.1.2.0/120"`), "", 7, `ipam.subnet is "::ffff:10.1.2.0/120": write it as the IPv4 prefix that it is`, false},
	{"gateway", conf(`"subnet": "10.1.2.0/24", "gateway": "10.1.2"`), "", 7, `ipam.gateway is "10.1.2": want an address, like "10.22.0.7"`, false},
	{
		"CNI 0.2.0 has one address per family",
		`{"cniVersion": "0.2.0", "name": "prod", "ipam": {` + etcdHere + `, "ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "11.1.2.0/24"}]]}}`, "", 7,
		`ranges: CNI version 0.2.0 does not support more than 1 address per family`, false,
	},
	{
		"too many sets", conf(`"ranges": [` + strings.Repeat(`[{"subnet": "10.1.2.0/24"}],`, 32) + `[{"subnet": "10.1.2.0/24"}]]`), "", 7,
		`there are 33 range sets, each with an address of its own: at most 32`, false,
	},

	// Exclude and the pool's rules.
	{
		"all excluded", conf(`"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "10.1.3.0/29"}]], "exclude": ["10.1.3.2-10.1.3.6"]`), "", 7,
		`ipam.ranges[1] (10.1.3.1-10.1.3.6 in 10.1.3.0/29) has no address left: network, broadcast, gateway (10.1.3.1) and ipam.exclude take them all; widen the range or exclude less`, false,
	},
	{
		"only the gateway", conf(`"subnet": "10.1.2.0/24", "rangeEnd": "10.1.2.1"`), "", 7,
		`ipam.subnet (10.1.2.1-10.1.2.1 in 10.1.2.0/24) has no address left: network, broadcast, gateway (10.1.2.1) and ipam.exclude take them all; widen the range or exclude less`, false,
	},
	{
		"only the network address", conf(`"ranges": [[{"subnet": "fd00::/64", "rangeStart": "fd00::", "rangeEnd": "fd00::1"}]]`), "", 7,
		`ipam.ranges[0] (fd00::-fd00::1 in fd00::/64) has no address left: network, broadcast, gateway (fd00::1) and ipam.exclude take them all; widen the range or exclude less`, false,
	},
	{
		"only the broadcast address", conf(`"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.255", "rangeEnd": "10.1.2.255"`), "", 7,
		`ipam.subnet (10.1.2.255-10.1.2.255 in 10.1.2.0/24) has no address left: network, broadcast, gateway (10.1.2.1) and ipam.exclude take them all; widen the range or exclude less`, false,
	},
	{"exclude", conf(`"subnet": "10.1.2.0/24", "exclude": ["10.1.2"]`), "", 7, `ipam.exclude[0] is "10.1.2": want an address, a prefix or FIRST-LAST, like ` + exampleExclude, false},
	{"exclude a text", conf(`"subnet": "10.1.2.0/24", "exclude": "10.1.2.3"`), "", 7, `ipam.exclude is a string: want a list, like ` + exampleExclude, false},
	{"exclude a number", conf(`"subnet": "10.1.2.0/24", "exclude": [7]`), "", 7, `ipam.exclude[0] is the number 7: want a string in quotes`, false},
	{
		"exclude with host bits", conf(`"subnet": "10.1.2.0/24", "exclude": ["10.1.2.7/28"]`), "", 7,
		`ipam.exclude[0] is "10.1.2.7/28": host bits are set; write "10.1.2.0/28" for all of it or "10.1.2.7" for the one address`, false,
	},
	{"exclude backwards", conf(`"subnet": "10.1.2.0/24", "exclude": ["10.1.2.9-10.1.2.7"]`), "", 7, `ipam.exclude[0] is "10.1.2.9-10.1.2.7": the last address is below the first`, false},
	{"exclude two families", conf(`"subnet": "10.1.2.0/24", "exclude": ["10.1.2.9-fd00::1"]`), "", 7, `ipam.exclude[0] is "10.1.2.9-fd00::1": its ends are of two address families`, false},
	{"exclude with a zone", conf(`"subnet": "10.1.2.0/24", "exclude": ["fe80::1%eth0"]`), "", 7, `ipam.exclude[0] is "fe80::1%eth0": want an address, a prefix or FIRST-LAST, like ` + exampleExclude, false},
	{"block size", conf(`"subnet": "10.1.2.0/24", "blockSize": 48`), "", 7, `ipam.blockSize is 48: want a power of two from 1 to 1024`, false},
	{"block size 0", conf(`"subnet": "10.1.2.0/24", "blockSize": 0`), "", 7, `ipam.blockSize is 0: want a power of two from 1 to 1024`, false},
	{"block size 2048", conf(`"subnet": "10.1.2.0/24", "blockSize": 2048`), "", 7, `ipam.blockSize is 2048: want a power of two from 1 to 1024`, false},
	{"block size a text", conf(`"subnet": "10.1.2.0/24", "blockSize": "64"`), "", 7, `ipam.blockSize is a string: want a whole number`, false},
	{"affinity", conf(`"subnet": "10.1.2.0/24", "strictAffinity": "yes"`), "", 7, `ipam.strictAffinity is a string: want true or false, without quotes`, false},
	{"cooldown", conf(`"subnet": "10.1.2.0/24", "cooldown": "25h"`), "", 7, `ipam.cooldown is "25h": want a duration like "10s", from 0s to 24h`, false},
	{"a rule of the pool's", conf(`"pool": "blue", "cooldown": "5s"`), "", 7, `ipam.cooldown is set, but pool "blue" has its own: remove it here`, false},
	{"a space of the pool's", conf(`"pool": "blue", "addressSpace": "s"`), "", 7, `ipam.addressSpace is set, but pool "blue" has its own: remove it here`, false},
	{"space", conf(`"subnet": "10.1.2.0/24", "addressSpace": "a b"`), "", 7, `ipam.addressSpace: address space "a b": only A-Z a-z 0-9 . _ @ - are allowed`, false},

	// Keys.
	{"case", conf(`"Subnet": "10.1.2.0/24"`), "", 7, `ipam.Subnet is not a key that is known here: did you mean "subnet"?`, false},
	{
		"several", conf(`"subnett": "10.1.2.0/24", "rangestart": "10.1.2.7", "banana": 1`), "", 7,
		`ipam.subnett is not a key that is known here: did you mean "subnet"?; ipam.rangestart is not a key that is known here: did you mean "rangeStart"?; ipam.banana is not a key that is known here: remove it`, false,
	},
	{"range", conf(`"range": "10.1.2.0/24"`), "", 7, `ipam.range is not a key that is known here: did you mean "subnet" or "ranges"?`, false},
	{"in a range", conf(`"ranges": [[{"subnet": "10.1.2.0/24", "rangeEnds": "10.1.2.7"}]]`), "", 7, `ipam.ranges[0][0].rangeEnds is not a key that is known here: did you mean "rangeEnd"?`, false},
	{
		"in the runtime's range", conf(``, `"runtimeConfig": {"ipRanges": [[{"subnet": "10.1.2.0/24", "Gateway": "10.1.2.7"}]]}`), "", 7,
		`runtimeConfig.ipRanges[0][0].Gateway is not a key that is known here: did you mean "gateway"?`, false,
	},
	{"in a route", conf(`"subnet": "10.1.2.0/24", "routes": [{"dst": "0.0.0.0/0", "gateway": "10.1.2.1"}]`), "", 7, `ipam.routes[0].gateway is not a key that is known here: remove it`, false},
	{"too high", conf(`"subnet": "10.1.2.0/24", "endpoints": []`), "", 7, `ipam.endpoints belongs one level down, in "etcd"`, false},
	{"twice", conf(`"subnet": "10.1.2.0/24", "subnet": "10.1.3.0/24"`), "", 7, `ipam.subnet is there twice: keep one`, false},
	{"twice in a range", conf(`"ranges": [[{"subnet": "10.1.2.0/24", "subnet": "10.1.3.0/24"}]]`), "", 7, `ipam.ranges[0][0].subnet is there twice: keep one`, false},
	{"twice on top", conf(`"subnet": "10.1.2.0/24"`, `"name": "prod"`), "", 7, `name is there twice: keep one`, false},
	{
		"in etcd", `{"name": "prod", "ipam": {"subnet": "10.1.2.0/24", "etcd": {"endpoints": ["http://h:1"], "CAFile": "/x", "password": "secret"}}}`, "", 7,
		`ipam.etcd.CAFile is not a key that is known here: did you mean "caFile"?; ipam.etcd.password is not read: write the password to a file, run chmod 600 on it, and name the file with "passwordFile"`, false,
	},

	// Routes, DNS.
	{"route without dst", conf(`"subnet": "10.1.2.0/24", "routes": [{"gw": "10.1.2.1"}]`), "", 7, `ipam.routes[0].dst is "": want a prefix, like "0.0.0.0/0"`, false},
	{"null route", conf(`"subnet": "10.1.2.0/24", "routes": [null]`), "", 7, `ipam.routes[0] is null: want an object in braces`, false},
	{"gw", conf(`"subnet": "10.1.2.0/24", "routes": [{"dst": "0.0.0.0/0", "gw": "me"}]`), "", 7, `ipam.routes[0].gw is "me": want an address, like "10.22.0.1"`, false},
	{"mtu", conf(`"subnet": "10.1.2.0/24", "routes": [{"dst": "0.0.0.0/0", "mtu": 1.5}]`), "", 7, `ipam.routes[0].mtu is the number 1.5: want a whole number`, false},
	{"no resolv.conf", conf(`"subnet": "10.1.2.0/24", "resolvConf": "/nonexistent/resolv.conf"`), "", 7, `ipam.resolvConf: cannot read "/nonexistent/resolv.conf": no such file or directory; check the path`, false},
	{"resolv.conf a device", conf(`"subnet": "10.1.2.0/24", "resolvConf": "/dev/zero"`), "", 7, `ipam.resolvConf: /dev/zero is not a regular file`, false},
	{"dataDir", conf(`"subnet": "10.1.2.0/24", "dataDir": {}`), "", 7, `ipam.dataDir is an object: want a string in quotes`, false},

	// Who asks for what.
	{"asked for", conf(`"subnet": "10.1.2.0/24"`, `"runtimeConfig": {"ips": ["10.1.2.7", "me"]}`), "", 7, `runtimeConfig.ips[1] is "me": want an address, with or without a prefix length`, false},
	{"null asked for", conf(`"subnet": "10.1.2.0/24"`, `"args": {"cni": {"ips": [null]}}`), "", 7, `args.cni.ips[0] is null: want a string in quotes`, false},
	{"empty asked for", conf(`"subnet": "10.1.2.0/24"`, `"args": {"cni": {"ips": [""]}}`), "", 7, `args.cni.ips[0] is "": want an address, with or without a prefix length`, false},
	{"asked for, no list", conf(`"subnet": "10.1.2.0/24"`, `"args": {"cni": {"ips": "10.1.2.7"}}`), "", 7, `args.cni.ips is a string: want a list, like ["10.22.0.7"]`, false},
	{"args", conf(`"subnet": "10.1.2.0/24"`, `"args": []`), "", 7, `args is a list: want an object in braces`, false},
	{"CNI_ARGS IP", conf(`"subnet": "10.1.2.0/24"`), "IP=10.1.2", 4, `IP is "10.1.2": want an address, with or without a prefix length`, false},
	{"CNI_ARGS unknown", conf(`"subnet": "10.1.2.0/24"`), "FOO=1", 4, `ARGS: unknown args ["FOO=1"]; remove them or add IgnoreUnknown=1`, false},
	{"CNI_ARGS pair", conf(`"subnet": "10.1.2.0/24"`), "FOO", 4, `ARGS: invalid pair "FOO"; want NAME=VALUE;NAME=VALUE`, false},
	{"CNI_ARGS a field of ours", conf(`"subnet": "10.1.2.0/24"`), "CommonArgs=1", 4, "", false},
	{"CNI_ARGS long", conf(`"subnet": "10.1.2.0/24"`), "K8S_POD_UID=" + strings.Repeat("u", 1025), 4, `K8S_POD_UID has 1025 bytes: at most 1024`, false},

	// Settings that are only nice to have.
	{"timeout without unit", conf(`"pool": "p", "timeout": "10"`), "", 7, `ipam.timeout is "10": want a duration like "10s", from 100ms to 10m`, false},
	{"timeout a number", conf(`"pool": "p", "timeout": 10`), "", 7, `ipam.timeout is the number 10: want a string in quotes`, false},
	{"timeout too short", conf(`"pool": "p", "timeout": "99ms"`), "", 7, `ipam.timeout is "99ms": want a duration like "10s", from 100ms to 10m`, false},
	{"lock timeout too long", conf(`"pool": "p", "lockTimeout": "11m"`), "", 7, `ipam.lockTimeout is "11m": want a duration like "10s", from 100ms to 10m`, false},
	{"grace", conf(`"pool": "p", "statusGrace": "soon"`), "", 7, `ipam.statusGrace is "soon": want a duration like "10s", from 100ms to 10m`, false},
	{"identity", conf(`"pool": "p", "identity": "most"`), "", 7, `ipam.identity is "most": want full, uid or none`, false},
	{"identity a bool", conf(`"pool": "p", "identity": true`), "", 7, `ipam.identity is true: want a string in quotes`, false},
	{"log file", conf(`"pool": "p", "logFile": "x.log"`), "", 7, `ipam.logFile is "x.log": want an absolute path`, false},

	// What every verb needs.
	{"not JSON", `{"name": "prod",` + "\n" + `"ipam": }`, "", 6, `network configuration: line 2: invalid character '}' looking for beginning of value`, true},
	{"empty", ``, "", 6, `network configuration: line 1: unexpected end of JSON input`, true},
	{"a list", `[]`, "", 6, `network configuration is a list: want {…}`, true},
	{"name", `{"ipam": {` + etcdHere + `}}`, "", 7, `name is not set: give the network a name`, true},
	{"name in another case", `{"Name": "x", "ipam": {` + etcdHere + `}}`, "", 7, `name is not set ("Name" is not the same key): give the network a name`, true},
	{"name with a slash", `{"name": "a/b", "ipam": {` + etcdHere + `}}`, "", 7, `name is "a/b": want letters, digits, dot, hyphen and underscore, and a letter or digit first`, true},
	{"long name", `{"name": "` + strings.Repeat("a", 256) + `", "ipam": {` + etcdHere + `}}`, "", 7, `name has 256 bytes: at most 255`, true},
	{
		"a name too long for a pool", `{"name": "` + strings.Repeat("a", 129) + `", "ipam": {"subnet": "10.1.2.0/24",` + etcdHere + `}}`, "", 7,
		`the pool of inline ranges is named after the network: name "` + strings.Repeat("a", 40) + `"… has 129 bytes: at most 128`, false,
	},
	{"version", `{"cniVersion": 1, "name": "prod", "ipam": {}}`, "", 7, `cniVersion is the number 1: want a string in quotes`, true},
	{"no ipam", `{"name": "prod", "IPAM": {}}`, "", 7, `ipam is not set ("IPAM" is not the same key): say where etcd is and what to hand out, like ` + exampleIPAM, true},
	{"ipam a text", `{"name": "prod", "ipam": "x"}`, "", 7, `ipam is a string: want an object in braces`, true},
	{
		"no endpoints", `{"name": "prod", "ipam": {"subnet": "10.1.2.0/24"}}`, "", 7,
		`ipam.etcd.endpoints is not set: say where etcd is, like ["https://10.0.0.1:2379"], there or as etcd.endpoints in /nonexistent/config.json`, true,
	},
	{"etcd a text", `{"name": "prod", "ipam": {"etcd": "http://root:secret@h:1"}}`, "", 7, `ipam.etcd is a string: want an object in braces`, true},
	{"endpoints a text", `{"name": "prod", "ipam": {"etcd": {"endpoints": "http://h:1"}}}`, "", 7, `ipam.etcd.endpoints is a string: want a list, like ["https://10.0.0.1:2379"]`, true},
	{"state directory", conf(`"pool": "p", "stateDir": "state"`), "", 7, `ipam.stateDir is "state": want an absolute path`, true},
	{"prefix", conf(`"pool": "p", "prefix": "/x"`), "", 7, `ipam.prefix: prefix "/x": want /name/…/ with a slash at both ends, at most 255 bytes`, true},
	{"cluster", conf(`"pool": "p", "clusterID": "a b"`), "", 7, `ipam.clusterID: cluster ID "a b": only A-Z a-z 0-9 . _ @ - are allowed`, true},
	{"node", conf(`"pool": "p", "node": "a/b"`), "", 7, `ipam.node: node "a/b": only A-Z a-z 0-9 . _ @ - are allowed`, true},
	{"node a list", conf(`"pool": "p", "node": []`), "", 7, `ipam.node is a list: want a string in quotes`, true},
	{"config file", conf(`"pool": "p", "configFile": "/nonexistent/c.json"`), "", 7, `ipam.configFile: cannot read "/nonexistent/c.json": no such file or directory; check the path`, true},
	{"relative config file", conf(`"pool": "p", "configFile": "c.json"`), "", 7, `ipam.configFile is "c.json": want an absolute path`, true},
}

func TestWrong(t *testing.T) {
	for _, tc := range wrong {
		t.Run(tc.name, func(t *testing.T) {
			n, err := LoadNetwork("ADD", []byte(tc.doc), tc.args)
			if err == nil {
				t.Fatalf("accepted as %+v", n)
			}
			want := tc.details
			if want == "" { // only the code is ours
				var e *types.Error
				if errors.As(err, &e) {
					want = e.Details
				}
			}
			fails(t, err, tc.code, want)

			for _, verb := range []string{"DEL", "CHECK", "GC", "STATUS"} {
				n, err := LoadNetwork(verb, []byte(tc.doc), tc.args)
				if tc.hard {
					fails(t, err, tc.code, want)
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", verb, err)
					continue
				}
				if n.Name == "" || len(n.Endpoints) == 0 || n.StateDir == "" || n.Exclude == nil || n.Pool == "" {
					t.Errorf("%s: got %+v", verb, n)
				}
				// Routes and DNS are of no use here and are not looked at.
				if !strings.Contains(tc.doc, "routes") && !strings.Contains(tc.doc, "resolvConf") &&
					!slices.ContainsFunc(n.Warnings, func(w string) bool { return strings.Contains(w, want) }) {
					t.Errorf("%s: no warning of it in %q", verb, n.Warnings)
				}
			}
		})
	}
}

func TestBrokenIdentityRecordsLeast(t *testing.T) {
	for _, identity := range []string{`"ful"`, `7`} {
		n, err := LoadNetwork("DEL", []byte(conf(`"identity": `+identity)), "")
		if err != nil || n.Identity != IdentityNone {
			t.Errorf("%s: %v, %+v", identity, err, n)
		}
	}
}

func TestWarnings(t *testing.T) {
	n := add(t, conf(`"rangeStart": "10.9.9.9", "ranges": [[{"subnet": "10.1.2.0/24"}]], "exclude": ["10.1.2.3", "10.2.0.0/16"]`))
	want := []string{
		"ipam.rangeStart is ignored: it says something of ipam.subnet, which is not set",
		`ipam.exclude[1] is "10.2.0.0/16", which is in none of the ranges: it excludes nothing`,
	}
	if !slices.Equal(n.Warnings, want) {
		t.Errorf("got %q", n.Warnings)
	}
}

func TestPod(t *testing.T) {
	for args, want := range map[string]string{
		"": "|",
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-7d9f;K8S_POD_INFRA_CONTAINER_ID=c0;K8S_POD_UID=6f9d": "shop/cart-7d9f|6f9d",
		"K8S_POD_NAME=cart":         "cart|",
		"K8S_POD_NAMESPACE=shop":    "|",
		"IgnoreUnknown=true;FOO=1":  "|",
		"FOO=1;IgnoreUnknown=1":     "|",
		"K8S_POD_UID=u;K8S_POD_IP=": "",
	} {
		n, err := LoadNetwork("ADD", []byte(conf(`"pool": "p"`)), args)
		if want == "" {
			if err == nil {
				t.Errorf("%s: accepted", args)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", args, err)
		} else if got := n.Pod + "|" + n.PodUID; got != want {
			t.Errorf("%s: got %s, want %s", args, got, want)
		}
	}
}

func TestResolvConf(t *testing.T) {
	path := write(t, t.TempDir(), "resolv.conf", 0o644, `
   nameserver 192.0.2.0
nameserver 192.0.2.2 # both
domain first.example
domain example.com
;nameserver comment
#nameserver comment
nameserver
search example.net example.org
search example.gov
options one two three
options four
sortlist 1.2.3.4`)
	n := add(t, conf(fmt.Sprintf(`"pool": "p", "resolvConf": %q`, path)))
	want := types.DNS{
		Nameservers: []string{"192.0.2.0", "192.0.2.2"}, Domain: "example.com",
		Search: []string{"example.net", "example.org", "example.gov"}, Options: []string{"one", "two", "three", "four"},
	}
	if !reflect.DeepEqual(n.DNS, want) {
		t.Errorf("got %+v", n.DNS)
	}
	long := write(t, t.TempDir(), "long", 0o644, strings.Repeat("x", 1<<17))
	_, err := LoadNetwork("ADD", []byte(conf(fmt.Sprintf(`"pool": "p", "resolvConf": %q`, long))), "")
	fails(t, err, 7, fmt.Sprintf("ipam.resolvConf: cannot read %q: bufio.Scanner: token too long; check the path", long))
}

func TestPrevResult(t *testing.T) {
	for version, result := range map[string]string{
		"0.2.0": `{"ip4": {"ip": "10.1.2.7/24", "gateway": "10.1.2.1"}}`,
		"0.3.0": `{"cniVersion": "0.3.0", "ips": [{"version": "4", "address": "10.1.2.7/24", "interface": 0}], "interfaces": [{"name": "eth0"}]}`,
		"0.3.1": `{"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.1.2.7/24"}], "routes": [{"dst": "0.0.0.0/0"}]}`,
		"0.4.0": `{"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.1.2.7/24"}], "dns": {}}`,
		"1.0.0": `{"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.7/24"}]}`,
		"1.1.0": `{"cniVersion": "1.1.0", "ips": [{"address": "10.1.2.7/24"}]}`,
	} {
		for _, verb := range []string{"ADD", "CHECK", "DEL"} {
			doc := fmt.Sprintf(`{"cniVersion": %q, "name": "prod", "prevResult": %s, "ipam": {"pool": "p", %s}}`, version, result, etcdHere)
			n, err := LoadNetwork(verb, []byte(doc), "")
			if err != nil {
				t.Errorf("%s: %v", version, err)
			} else if n.PrevResult == nil || len(n.PrevResult.IPs) != 1 || n.PrevResult.IPs[0].Address.String() != "10.1.2.7/24" || n.Warnings != nil {
				t.Errorf("%s: got %+v", version, n)
			}
		}
	}
	for doc, details := range map[string]string{
		`[]`:                            `prevResult is a list: want an object in braces`,
		`{"ips": [null]}`:               `prevResult.ips[0] is null`,
		`{"interfaces": 7}`:             `prevResult.interfaces is the number 7: want a list, like […]`,
		`{"cniVersion": "7", "ips":[]}`: `prevResult is not a result of CNI version "1.1.0": result type supports [1.0.0 1.1.0] but unmarshalled CNIVersion is "7"`,
	} {
		doc := conf(`"pool": "p"`, `"prevResult": `+doc)
		_, err := LoadNetwork("CHECK", []byte(doc), "")
		fails(t, err, 7, details)
		for _, verb := range []string{"ADD", "DEL"} { // which do not need it
			n, err := LoadNetwork(verb, []byte(doc), "")
			if err != nil || n.PrevResult != nil || len(n.Warnings) != 1 {
				t.Errorf("%s %s: %v, %+v", verb, doc, err, n)
			}
		}
	}
}

func TestValidAttachments(t *testing.T) {
	const key = `"cni.dev/valid-attachments": `
	for text, want := range map[string]string{
		``:                                "false []",
		key + `null`:                      "false []",
		key + `[]`:                        "true []",
		`"cni.dev/Valid-Attachments": []`: "false []",
		key + `[{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c2", "ifname": "net1", "x": 1}]`: "true [{c1 eth0} {c2 net1}]",
	} {
		var beside []string
		if text != "" {
			beside = []string{text}
		}
		n, err := LoadNetwork("GC", []byte(conf(`"pool": "p"`, beside...)), "")
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := fmt.Sprint(n.HasValidAttachments, n.ValidAttachments); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
	for text, details := range map[string]string{
		key + `{}`:                     `cni.dev/valid-attachments is an object: want a list, like [{"containerID": "…", "ifname": "eth0"}]`,
		key + `[null]`:                 `cni.dev/valid-attachments[0] is null: want an object in braces`,
		key + `[{"containerID": "c"}]`: `cni.dev/valid-attachments[0] has no containerID or no ifname: the runtime must give both`,
		key + `[{"containerid": "c", "ifname": "eth0"}]`: `cni.dev/valid-attachments[0] has no containerID or no ifname: the runtime must give both`,
		key + `[], ` + key + `[]`:                        `cni.dev/valid-attachments is there twice: it says what must not be released, so there can be only one`,
	} {
		_, err := LoadNetwork("GC", []byte(conf(`"pool": "p"`, text)), "")
		fails(t, err, 7, details)
		if n, err := LoadNetwork("DEL", []byte(conf(`"pool": "p"`, text)), ""); err != nil || n.HasValidAttachments {
			t.Errorf("DEL %s: %v", text, err)
		}
	}
}

func TestSuggest(t *testing.T) {
	for key, want := range map[string]string{
		"Subnet": "subnet", "subnt": "subnet", "rangeStrat": "rangeStart", "RANGEEND": "rangeEnd", "pol": "pool", "pl": "", "x": "",
		"statedir": "stateDir", "gatewayaddress": "", strings.Repeat("subnet", 9): "",
	} {
		if got := suggest(key, ipamKeys); got != want {
			t.Errorf("%s: got %q, want %q", key, got, want)
		}
	}
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"kitten", "sitting", 3}, {"ab", "ba", 2}, {"abc", "abc", 0}} {
		if got := distance(tc.a, tc.b); got != tc.want || distance(tc.b, tc.a) != tc.want {
			t.Errorf("%q %q: got %d, want %d", tc.a, tc.b, got, tc.want)
		}
	}
}

// Whatever comes in, nothing panics and every error says which kind it is.
func FuzzLoadNetwork(f *testing.F) {
	for _, tc := range wrong {
		f.Add("ADD", []byte(tc.doc), tc.args)
	}
	f.Add("GC", []byte(conf(`"subnet": "10.1.2.0/24"`, `"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "i"}]`)), "")
	f.Add("CHECK", []byte(conf(`"subnet": "10.1.2.0/24"`, `"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.2.7/24"}]}`)), "")
	f.Add("ADD", []byte(`{"cniVersion": "0.4.0", "name": "n", "prevResult": {"cniVersion": "0.4.0", "ips": [{"version": "4", "address": "10.1.2.7/24"}]}, "ipam": {"pool": "p"}}`), "")
	f.Add("ADD", []byte(conf(`"ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00::/64"}]], "exclude": ["10.1.2.7", "fd00::-fd00::ff"], "cooldown": "1h", "blockSize": 8`,
		`"runtimeConfig": {"ips": ["10.1.2.9/24"]}`, `"args": {"cni": {"ips": ["fd00::9"]}}`)), "IgnoreUnknown=1;IP=10.1.2.3;K8S_POD_NAME=p")
	f.Fuzz(func(t *testing.T, verb string, stdin []byte, args string) {
		n, err := LoadNetwork(verb, stdin, args)
		if err != nil {
			var e *types.Error
			if !errors.As(err, &e) || (e.Code != 4 && e.Code != 6 && e.Code != 7) || e.Details == "" || n != nil {
				t.Fatalf("%#v", err)
			}
			return
		}
		if n.Exclude == nil || n.Name == "" || n.Pool == "" || n.Space == "" || len(n.Endpoints) == 0 || n.Node == "" || n.Timeout < MinTimeout {
			t.Fatalf("incomplete: %+v", n)
		}
		if verb == "ADD" && n.Named == (len(n.RangeSets) > 0) {
			t.Fatalf("both or neither of pool and ranges: %+v", n)
		}
		for _, set := range n.RangeSets {
			for _, r := range set {
				if !r.Subnet.Contains(r.Start) || !r.Subnet.Contains(r.End) || r.End.Less(r.Start) || r.Start.Is4In6() || !r.Gateway.IsValid() || r.Subnet != r.Subnet.Masked() {
					t.Fatalf("range %+v", r)
				}
			}
		}
	})
}
