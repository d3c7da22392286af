package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// standIn makes path the default configuration file.
func standIn(t *testing.T, path string) {
	t.Helper()
	before := defaultFile
	defaultFile = path
	t.Cleanup(func() { defaultFile = before })
}

func named(t *testing.T, name string, err error) {
	t.Helper()
	before := hostname
	hostname = func() (string, error) { return name, err }
	t.Cleanup(func() { hostname = before })
}

func environment(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

const bare = `{"name": "prod", "ipam": {"pool": "p"}}`

func TestFileBelowNetwork(t *testing.T) {
	dir := t.TempDir()
	ca := write(t, dir, "ca.pem", 0o644, "ca")
	standIn(t, write(t, dir, "config.json", 0o600, fmt.Sprintf(`{
		"etcd": {"endpoints": ["https://file:2379"], "caFile": %q},
		"node": "from-file", "stateDir": "/from/file", "prefix": "/file/", "clusterID": "file", "identity": "none",
		"timeout": "1s", "lockTimeout": "2s", "statusGrace": "3s", "logFile": "/file.log"}`, ca)))
	file := Settings{
		Endpoints: []string{"https://file:2379"}, CAFile: ca, Node: "from-file", StateDir: "/from/file", Prefix: "/file/",
		ClusterID: "file", Identity: "none", LogFile: "/file.log", Timeout: time.Second, LockTimeout: 2 * time.Second, StatusGrace: 3 * time.Second,
	}
	if n := add(t, bare); !reflect.DeepEqual(n.Settings, file) {
		t.Errorf("file over default\n got %+v\nwant %+v", n.Settings, file)
	}

	n := add(t, `{"name": "prod", "ipam": {"pool": "p", "etcd": {"endpoints": ["net:1", "unix:///run/etcd"], "caFile": ""}, "node": "from-net", "timeout": "9s", "identity": null}}`)
	want := file
	want.Endpoints, want.Node, want.Timeout = []string{"https://net:1", "unix:///run/etcd"}, "from-net", 9*time.Second
	if !reflect.DeepEqual(n.Settings, want) {
		t.Errorf("network over file\n got %+v\nwant %+v", n.Settings, want)
	}

	other := write(t, dir, "other.json", 0o400, `{"etcd": {"endpoints": ["http://other:1"]}}`)
	if n := add(t, fmt.Sprintf(`{"name": "prod", "ipam": {"pool": "p", "configFile": %q}}`, other)); n.Endpoints[0] != "http://other:1" || n.Node != "worker-1" {
		t.Errorf("a file that is named replaces the default one: %+v", n.Settings)
	}
}

func TestFileErrors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "config.json")
	standIn(t, path)
	for text, want := range map[string]string{
		`{`:                               `6 PATH: line 1: unexpected end of JSON input`,
		"{\n\n\"node\": x}":               `6 PATH: line 3: invalid character 'x' looking for beginning of value`,
		`null`:                            `6 PATH is null: want {…}`,
		`{"subnet": "10.0.0.0/8"}`:        `7 PATH: subnet belongs in the network configuration, below ipam`,
		`{"configFile": "/x"}`:            `7 PATH: configFile cannot be in the file itself: remove it`,
		`{"endpoints": ["http://h:1"]}`:   `7 PATH: endpoints belongs one level down, in "etcd"`,
		`{"Node": "x"}`:                   `7 PATH: Node is not a key that is known here: did you mean "node"?`,
		`{"node": "x", "node": "y"}`:      `7 PATH: node is there twice: keep one`,
		`{"etcd": {"endpoint": ["h:1"]}}`: `7 PATH: etcd.endpoint is not a key that is known here: did you mean "endpoints"?`,
		`{"etcd": {"caFile": "c"}}`:       `7 PATH: etcd.caFile is "c": want an absolute path`,
		`{"stateDir": "x"}`:               `7 PATH: stateDir is "x": want an absolute path`,
		`{"timeout": "1h"}`:               `7 PATH: timeout is "1h": want a duration like "10s", from 100ms to 10m`,
	} {
		write(t, dir, "config.json", 0o600, text)
		_, err := LoadNetwork("ADD", []byte(conf(`"pool": "p"`)), "")
		code, details, _ := strings.Cut(strings.ReplaceAll(want, "PATH", path), " ")
		fails(t, err, uint(code[0]-'0'), details)
	}
	write(t, dir, "config.json", 0o600, strings.Repeat(" ", maxFile+1))
	_, err := LoadNetwork("ADD", []byte(bare), "")
	fails(t, err, 7, "configuration file: "+path+" has more than 1048576 bytes: that is no configuration")
}

func TestModes(t *testing.T) {
	dir := t.TempDir()
	config := func(mode os.FileMode) string {
		return write(t, dir, fmt.Sprintf("config%04o.json", mode), mode, `{"etcd": {"endpoints": ["https://h:1"]}}`)
	}
	for _, mode := range []os.FileMode{0o600, 0o400, 0o700} {
		add(t, fmt.Sprintf(`{"name": "prod", "ipam": {"pool": "p", "configFile": %q}}`, config(mode)))
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o644, 0o620, 0o610, 0o666} {
		path := config(mode)
		want := fmt.Sprintf("%s has mode %04o, so others can use it: run chmod 600 %s", path, mode, path)
		conf := fmt.Appendf(nil, `{"name": "prod", "ipam": {"pool": "p", "configFile": %q}}`, path)
		for _, verb := range []string{"ADD", "CHECK", "GC", "STATUS"} {
			_, err := LoadNetwork(verb, conf, "")
			fails(t, err, 7, "ipam.configFile: "+want)
		}
		// A DEL goes on: a pod must not hang in Terminating for it.
		n, err := LoadNetwork("DEL", conf, "")
		if err != nil || len(n.Warnings) != 1 || !strings.Contains(n.Warnings[0], want) {
			t.Errorf("DEL with a file that others can read: %v, %v", n, err)
		}
		_, err = LoadCommand(path, Settings{}, nil)
		fails(t, err, 7, "--config: "+want)
		_, err = LoadCommand("", Settings{}, environment(map[string]string{"LEDGER_CONFIG": path}))
		fails(t, err, 7, "LEDGER_CONFIG: "+want)
		standIn(t, path)
		_, err = LoadCommand("", Settings{}, nil)
		fails(t, err, 7, "configuration file: "+want)
	}
	standIn(t, "/nonexistent")

	// The files that hold secrets, and those that do not.
	key, cert := write(t, dir, "key", 0o640, ""), write(t, dir, "cert", 0o644, "")
	password := write(t, dir, "password", 0o604, "")
	_, err := LoadCommand("", Settings{CertFile: cert, KeyFile: key}, nil)
	fails(t, err, 7, fmt.Sprintf("--key: %s has mode 0640, so others can use it: run chmod 600 %s", key, key))
	_, err = LoadCommand("", Settings{Username: "root", PasswordFile: password}, nil)
	fails(t, err, 7, fmt.Sprintf("--password-file: %s has mode 0604, so others can use it: run chmod 600 %s", password, password))

	// A pipe would wait for a writer for ever.
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = LoadCommand(pipe, Settings{}, nil)
	fails(t, err, 7, "--config: "+pipe+" is not a regular file")
	_, err = LoadCommand("", Settings{CAFile: dir}, nil)
	fails(t, err, 7, "--cacert: "+dir+" is not a regular file")
}

// What etcd is convinced with is there as a whole or not at all.
func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	ca, cert := write(t, dir, "ca", 0o644, ""), write(t, dir, "cert", 0o644, "")
	key, password := write(t, dir, "key", 0o600, ""), write(t, dir, "password", 0o600, "")
	for etcd, want := range map[string]string{
		fmt.Sprintf(`"certFile": %q`, cert):                                                  `ipam.etcd.certFile is set but etcd.keyFile is not: set both or neither`,
		fmt.Sprintf(`"keyFile": %q`, key):                                                    `ipam.etcd.keyFile is set but etcd.certFile is not: set both or neither`,
		`"username": "root"`:                                                                 `ipam.etcd.username is set but etcd.passwordFile is not: set both or neither`,
		fmt.Sprintf(`"passwordFile": %q`, password):                                          `ipam.etcd.passwordFile is set but etcd.username is not: set both or neither`,
		fmt.Sprintf(`"username": "root:secret", "passwordFile": %q`, password):               `ipam.etcd.username has a colon in it: give the name alone, write the password to a file, run chmod 600 on it, and name it with etcd.passwordFile`,
		`"caFile": "ca.pem"`:                                                                 `ipam.etcd.caFile is "ca.pem": want an absolute path`,
		fmt.Sprintf(`"endpoints": ["https://h:1", "http://h:2"], "caFile": %q`, ca):          `ipam.etcd.endpoints[1] is "http://h:2", which is not encrypted, but ipam.etcd.caFile is set: write https, or remove the TLS files`,
		fmt.Sprintf(`"endpoints": ["http://h:2"], "certFile": %q, "keyFile": %q`, cert, key): `ipam.etcd.endpoints[0] is "http://h:2", which is not encrypted, but ipam.etcd.certFile is set: write https, or remove the TLS files`,
	} {
		if !strings.Contains(etcd, "endpoints") {
			etcd = `"endpoints": ["https://h:1"], ` + etcd
		}
		for _, verb := range []string{"ADD", "DEL"} {
			_, err := LoadNetwork(verb, fmt.Appendf(nil, `{"name": "prod", "ipam": {"pool": "p", "etcd": {%s}}}`, etcd), "")
			fails(t, err, 7, want)
		}
	}

	// A file that is gone is no contact: DEL must still queue its release.
	doc := []byte(`{"name": "prod", "ipam": {"pool": "p", "etcd": {"endpoints": ["h:1"], "caFile": "/nonexistent/ca"}}}`)
	const gone = `ipam.etcd.caFile: cannot read "/nonexistent/ca": no such file or directory; check the path`
	_, err := LoadNetwork("ADD", doc, "")
	fails(t, err, 7, gone)
	n, err := LoadNetwork("DEL", doc, "")
	if err != nil || !slices.Equal(n.Warnings, []string{gone}) || n.Endpoints[0] != "https://h:1" {
		t.Errorf("%v, %+v", err, n)
	}

	n = add(t, fmt.Sprintf(`{"name": "prod", "ipam": {"pool": "p", "etcd": {"endpoints": ["unix:///run/etcd", "h:1", "h:2"], "username": "root", "passwordFile": %q}}}`, password))
	if want := []string{"the password of ipam.etcd.username goes to http://h:1 unencrypted: use https"}; !slices.Equal(n.Warnings, want) {
		t.Errorf("got %q", n.Warnings)
	}
}

// A network's endpoints get no credentials of the file's, nor the file's a
// network's; who may pass for the file's is for the file to say.
func TestOnePlace(t *testing.T) {
	dir := t.TempDir()
	key, ca, other := write(t, dir, "key", 0o600, ""), write(t, dir, "ca", 0o644, ""), write(t, dir, "other", 0o644, "")
	path := filepath.Join(dir, "config.json")
	standIn(t, path)
	const (
		here    = `"endpoints": ["https://here:1", "https://two:1"]`
		there   = `"endpoints": ["https://there:1"]`
		foreign = "etcd.%s in PATH go only to endpoints that stand there, and ipam.etcd.endpoints names others: put credentials beside ipam.etcd.endpoints, or leave it out and name the endpoints in the file"
		stray   = "ipam.etcd.%s cannot go with etcd.endpoints in PATH, as they must stand in one place: put ipam.etcd.endpoints beside, or leave them out"
		passes  = "ipam.etcd.caFile would say who gets etcd.%s in PATH: put credentials beside it, or leave it out"
	)
	var (
		user    = fmt.Sprintf(`"username": "file", "passwordFile": %q`, key)
		mine    = fmt.Sprintf(`"username": "mine", "passwordFile": %q`, key)
		cert    = fmt.Sprintf(`"certFile": %q, "keyFile": %[1]q`, key)
		trust   = fmt.Sprintf(`"caFile": %q`, ca)
		distant = fmt.Sprintf(`"caFile": %q`, other)
	)
	for _, tc := range []struct {
		network, file string
		want          string // the error, of all verbs but DEL
		get           string // what a DEL uses: endpoint, user, certificate, CA
	}{
		// One place.
		{here + "," + mine, ``, "", "https://here:1 mine - -"},
		{``, here + "," + user, "", "https://here:1 file - -"},
		{``, here + "," + cert + "," + trust, "", "https://here:1 - key ca"},
		{here, ``, "", "https://here:1 - - -"},
		{here + "," + trust, there, "", "https://here:1 - - ca"},
		{here, there + "," + trust, "", "https://here:1 - - ca"},

		// Both have all: the network's etcd is its own, and nothing is mixed.
		{there + "," + mine, here + "," + user, "", "https://there:1 mine - -"},
		{there + "," + mine, here + "," + cert + "," + trust, "", "https://there:1 mine - ca"},
		{there + "," + cert, here + "," + user, "", "https://there:1 - key -"},
		{here + "," + mine + "," + distant, here + "," + user + "," + trust, "", "https://here:1 mine - other"},

		// The network names the file's endpoints, or some of them.
		{here, here + "," + user, "", "https://here:1 file - -"},
		{`"endpoints": ["two:1"]`, here + "," + cert, "", "https://two:1 - key -"},
		{here + "," + trust, here + "," + user + "," + trust, "", "https://here:1 file - ca"},

		// It names others, and no credentials.
		{there, here + "," + user, fmt.Sprintf(foreign, "username, etcd.passwordFile"), "https://there:1 - - -"},
		{there, here + "," + cert, fmt.Sprintf(foreign, "certFile, etcd.keyFile"), "https://there:1 - - -"},
		{there, here + "," + cert + "," + user, fmt.Sprintf(foreign, "certFile, etcd.keyFile, etcd.username, etcd.passwordFile"), "https://there:1 - - -"},
		{there, user, fmt.Sprintf(foreign, "username, etcd.passwordFile"), "https://there:1 - - -"},
		{`"endpoints": ["https://here:1", "https://there:1"]`, here + "," + user, fmt.Sprintf(foreign, "username, etcd.passwordFile"), "https://here:1 - - -"},
		{`"endpoints": ["http://here:1"]`, here + "," + user, fmt.Sprintf(foreign, "username, etcd.passwordFile"), "http://here:1 - - -"},
		{`"endpoints": ["http://here:1"]`, here + "," + cert, fmt.Sprintf(foreign, "certFile, etcd.keyFile"), "http://here:1 - - -"},

		// It names credentials, or whom to trust, for the file's.
		{mine, here, fmt.Sprintf(stray, "username, ipam.etcd.passwordFile"), "https://here:1 - - -"},
		{mine, here + "," + user, fmt.Sprintf(stray, "username, ipam.etcd.passwordFile"), "https://here:1 file - -"},
		{`"username": "mine"`, here + "," + user, fmt.Sprintf(stray, "username"), "https://here:1 file - -"},
		{cert, here + "," + user, fmt.Sprintf(stray, "certFile, ipam.etcd.keyFile"), "https://here:1 file - -"},
		{distant, here + "," + user, fmt.Sprintf(stray, "caFile"), "https://here:1 file - -"},
		{distant, here + "," + cert + "," + trust, fmt.Sprintf(stray, "caFile"), "https://here:1 - key ca"},
		{here + "," + distant, here + "," + user + "," + trust, fmt.Sprintf(passes, "username, etcd.passwordFile"), "https://here:1 file - ca"},
		{here + "," + distant, here + "," + user, fmt.Sprintf(passes, "username, etcd.passwordFile"), "https://here:1 file - -"},

		// Half of a pair is none.
		{there + `, "username": "mine"`, here + "," + user, "ipam.etcd.username is set but etcd.passwordFile is not: set both or neither", ""},
	} {
		write(t, dir, "config.json", 0o600, `{"etcd": {`+tc.file+`}}`)
		doc := []byte(`{"name": "prod", "ipam": {"pool": "p", "etcd": {` + tc.network + `}}}`)
		want := strings.ReplaceAll(tc.want, "PATH", path)
		for _, verb := range []string{"ADD", "CHECK", "GC", "STATUS", "DEL"} {
			n, err := LoadNetwork(verb, doc, "")
			if want != "" && (verb != "DEL" || tc.get == "") {
				if err == nil {
					t.Errorf("%s of %s over %s: accepted as %+v", verb, tc.network, tc.file, n.Settings)
					continue
				}
				fails(t, err, 7, want)
				continue
			}
			if err != nil {
				t.Errorf("%s of %s over %s: %v", verb, tc.network, tc.file, err)
				continue
			}
			get := n.Endpoints[0]
			for _, s := range []string{n.Username, n.CertFile, n.CAFile} {
				if s == "" {
					s = "-"
				}
				get += " " + filepath.Base(s)
			}
			if get != tc.get || (n.Username == "") != (n.PasswordFile == "") || n.CertFile != n.KeyFile {
				t.Errorf("%s of %s over %s: got %s (%+v), want %s", verb, tc.network, tc.file, get, n.Settings, tc.get)
			}
			if want != "" && !slices.Contains(n.Warnings, want) {
				t.Errorf("%s of %s over %s: no warning of it in %q", verb, tc.network, tc.file, n.Warnings)
			}
		}
	}
}

func TestEndpoints(t *testing.T) {
	const want = "want https://HOST:PORT, http://HOST:PORT, HOST:PORT or unix://PATH"
	for _, tc := range []struct {
		in  string
		tls bool
		out string
	}{
		{"http://h:2379", false, "http://h:2379"},
		{"https://h:2379/", false, "https://h:2379"},
		{"HTTPS://h.example:2379", true, "https://h.example:2379"},
		{"10.0.0.1:2379", false, "http://10.0.0.1:2379"},
		{"10.0.0.1:2379", true, "https://10.0.0.1:2379"},
		{"[fd00::1]:2379", true, "https://[fd00::1]:2379"},
		{"unix:///run/etcd.sock", true, "unix:///run/etcd.sock"},
		{"unix://etcd.sock", false, "unix://etcd.sock"},
		{"", false, `x is "": ` + want + " (an IPv6 address in brackets)"},
		{"h", false, `x is "h": the port is missing; etcd's is 2379`},
		{"h:", false, `x is "h:": the port is missing; etcd's is 2379`},
		{"h:0", false, `x is "h:0": the port is not from 1 to 65535`},
		{"h:65536", false, `x is "h:65536": the port is not from 1 to 65535`},
		{"h:etcd", false, `x is "h:etcd": ` + want + " (an IPv6 address in brackets)"},
		{":2379", false, `x is ":2379": ` + want + " (an IPv6 address in brackets)"},
		{"fd00::1:2379", false, `x is "fd00::1:2379": ` + want + " (an IPv6 address in brackets)"},
		{"http://h:1/v3", false, `x is "http://h:1/v3": ` + want + " (an IPv6 address in brackets)"},
		{"http://h:1?a=b", false, `x is "http://h:1?a=b": ` + want + " (an IPv6 address in brackets)"},
		{"http://h:1#a", false, `x is "http://h:1#a": ` + want + " (an IPv6 address in brackets)"},
		{"ftp://h:1", false, `x is "ftp://h:1": "ftp" is no scheme that etcd has; ` + want},
		{"unix://", false, `x is "unix://": the path is missing; ` + want},
		{"http://root:secret@h:1", false, "x has an @ in it: name the user in etcd.username and the password's file in etcd.passwordFile"},
	} {
		got, err := parseEndpoint("x", tc.in, tc.tls)
		if err != nil {
			fails(t, err, 7, tc.out)
		} else if got != tc.out {
			t.Errorf("%q: got %q, want %q", tc.in, got, tc.out)
		}
	}
	n := add(t, `{"name": "prod", "ipam": {"pool": "p", "etcd": {"endpoints": ["h:1", "http://h:1", "h:2"]}}}`)
	if !slices.Equal(n.Endpoints, []string{"http://h:1", "http://h:2"}) {
		t.Error(n.Endpoints)
	}
}

func TestHostName(t *testing.T) {
	named(t, "Worker-1.Example.COM\n", nil)
	if n := add(t, conf(`"pool": "p"`)); n.Node != "worker-1.example.com" {
		t.Error(n.Node)
	}
	named(t, "worker 1", nil)
	_, err := LoadNetwork("DEL", []byte(conf(``)), "")
	fails(t, err, 7, `this host's name cannot be the node's: host name "worker 1": only A-Z a-z 0-9 . _ @ - are allowed; set ipam.node, or node in the configuration file`)
	if s, err := LoadCommand("", Settings{}, nil); err != nil || s.Node != "" {
		t.Errorf("%v %+v", err, s)
	}
	named(t, "", os.ErrPermission)
	_, err = LoadNetwork("ADD", []byte(conf(`"pool": "p"`)), "")
	fails(t, err, 7, `this host's name cannot be the node's: permission denied; set ipam.node, or node in the configuration file`)
	if n := add(t, conf(`"pool": "p", "node": "w1"`)); n.Node != "w1" {
		t.Error(n.Node)
	}
}

func TestCommandDefaults(t *testing.T) {
	s, err := LoadCommand("", Settings{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Settings{
		Endpoints: []string{"http://127.0.0.1:2379"}, Node: "worker-1", StateDir: "/var/lib/ipam-ledger", Prefix: "/ipam-ledger/v1/",
		Identity: "full", Timeout: 10 * time.Second, LockTimeout: 30 * time.Second, StatusGrace: time.Minute,
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got %+v", s)
	}
}

// Each source sets all that it can; taking the strongest away shows the next.
func TestCommandPrecedence(t *testing.T) {
	dir := t.TempDir()
	paths := make(map[string]string)
	for _, source := range []string{"flag", "env", "file", "etcdctl"} {
		for _, what := range []string{"ca", "cert", "key", "password"} {
			paths[source+what] = write(t, dir, source+what, 0o600, "")
		}
	}
	p := func(s string) string { return paths[s] }
	flags := Settings{
		Endpoints: []string{"flag:1"}, CAFile: p("flagca"), CertFile: p("flagcert"), KeyFile: p("flagkey"), Username: "flag", PasswordFile: p("flagpassword"),
		Node: "flag", StateDir: "/flag", Prefix: "/flag/", ClusterID: "flag", Identity: "uid", LogFile: "flag.log",
		Timeout: time.Second, LockTimeout: time.Second, StatusGrace: time.Second,
	}
	vars := map[string]string{
		"LEDGER_ENDPOINTS": "env:1, env:2,", "LEDGER_CACERT": p("envca"), "LEDGER_CERT": p("envcert"), "LEDGER_KEY": p("envkey"),
		"LEDGER_USER": "env", "LEDGER_PASSWORD_FILE": p("envpassword"), "LEDGER_NODE": "env", "LEDGER_STATE_DIR": "/env",
		"LEDGER_PREFIX": "/env/", "LEDGER_CLUSTER_ID": "env", "LEDGER_TIMEOUT": "2s",
	}
	etcdctl := map[string]string{
		"ETCDCTL_ENDPOINTS": "https://etcdctl:1,https://etcdctl:2", "ETCDCTL_CACERT": p("etcdctlca"), "ETCDCTL_CERT": p("etcdctlcert"),
		"ETCDCTL_KEY": p("etcdctlkey"), "ETCDCTL_USER": "etcdctl:secret",
	}
	both := func(maps ...map[string]string) func(string) string {
		all := make(map[string]string)
		for _, m := range maps {
			for k, v := range m {
				all[k] = v
			}
		}
		return environment(all)
	}
	file := write(t, dir, "config.json", 0o600, fmt.Sprintf(`{"etcd": {"endpoints": ["file:1"], "caFile": %q, "certFile": %q, "keyFile": %q, "username": "file", "passwordFile": %q},
		"node": "file", "stateDir": "/file", "prefix": "/file/", "clusterID": "file", "identity": "none", "logFile": "/file.log",
		"timeout": "3s", "lockTimeout": "3s", "statusGrace": "3s"}`, p("fileca"), p("filecert"), p("filekey"), p("filepassword")))

	check := func(name string, s Settings, err error, want Settings) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !reflect.DeepEqual(s, want) {
			t.Errorf("%s\n got %+v\nwant %+v", name, s, want)
		}
	}
	want := flags
	want.Endpoints = []string{"https://flag:1"}
	s, err := LoadCommand(file, flags, both(vars, etcdctl))
	check("flags", s, err, want)

	want = Settings{
		Endpoints: []string{"https://env:1", "https://env:2"}, CAFile: p("envca"), CertFile: p("envcert"), KeyFile: p("envkey"), Username: "env", PasswordFile: p("envpassword"),
		Node: "env", StateDir: "/env", Prefix: "/env/", ClusterID: "env", Identity: "none", LogFile: "/file.log",
		Timeout: 2 * time.Second, LockTimeout: 3 * time.Second, StatusGrace: 3 * time.Second,
	}
	vars["LEDGER_CONFIG"] = file
	s, err = LoadCommand("", Settings{}, both(vars, etcdctl))
	check("environment", s, err, want)

	want = Settings{
		Endpoints: []string{"https://file:1"}, CAFile: p("fileca"), CertFile: p("filecert"), KeyFile: p("filekey"), Username: "file", PasswordFile: p("filepassword"),
		Node: "file", StateDir: "/file", Prefix: "/file/", ClusterID: "file", Identity: "none", LogFile: "/file.log",
		Timeout: 3 * time.Second, LockTimeout: 3 * time.Second, StatusGrace: 3 * time.Second,
	}
	s, err = LoadCommand(file, Settings{}, both(etcdctl))
	check("file", s, err, want)
	standIn(t, file)
	s, err = LoadCommand("", Settings{}, both(etcdctl))
	check("default file", s, err, want)
	standIn(t, "/nonexistent")

	// One person's flags and file: a single member is asked with the file's credentials.
	s, err = LoadCommand(file, Settings{Endpoints: []string{"flag:1"}}, both(etcdctl))
	want.Endpoints = []string{"https://flag:1"}
	check("endpoints alone", s, err, want)

	// etcdctl's variable may hold a password. It is not read and not shown.
	_, err = LoadCommand("", Settings{}, both(etcdctl))
	fails(t, err, 7, "ETCDCTL_USER holds a password, which is read from a file only: write it to one, run chmod 600 on it, and set LEDGER_PASSWORD_FILE to its path")
	s, err = LoadCommand("", Settings{}, both(etcdctl, map[string]string{"LEDGER_PASSWORD_FILE": p("envpassword")}))
	check("etcdctl", s, err, Settings{
		Endpoints: []string{"https://etcdctl:1", "https://etcdctl:2"}, CAFile: p("etcdctlca"), CertFile: p("etcdctlcert"), KeyFile: p("etcdctlkey"),
		Username: "etcdctl", PasswordFile: p("envpassword"), Node: "worker-1", StateDir: "/var/lib/ipam-ledger", Prefix: "/ipam-ledger/v1/",
		Identity: "full", Timeout: 10 * time.Second, LockTimeout: 30 * time.Second, StatusGrace: time.Minute,
	})
}

func TestCommandErrors(t *testing.T) {
	dir := t.TempDir()
	key := write(t, dir, "key", 0o600, "")
	for _, tc := range []struct {
		file  string
		flags Settings
		vars  map[string]string
		want  string
	}{
		{file: "/nonexistent/c.json", want: `--config: cannot read "/nonexistent/c.json": no such file or directory; check the path`},
		{vars: map[string]string{"LEDGER_CONFIG": "/nonexistent/c.json"}, want: `LEDGER_CONFIG: cannot read "/nonexistent/c.json": no such file or directory; check the path`},
		{file: dir, want: "--config: " + dir + " is not a regular file"},
		{vars: map[string]string{"LEDGER_TIMEOUT": "10"}, want: `LEDGER_TIMEOUT is "10": want a duration like "10s", from 100ms to 10m`},
		{flags: Settings{Timeout: time.Hour}, want: `--timeout is "1h0m0s": want a duration like "10s", from 100ms to 10m`},
		{flags: Settings{KeyFile: key}, want: "--key is set but LEDGER_CERT (or etcd.certFile) is not: set both or neither"},
		{vars: map[string]string{"LEDGER_USER": "a:secret", "LEDGER_PASSWORD_FILE": key}, want: "LEDGER_USER has a colon in it: give the name alone, write the password to a file, run chmod 600 on it, and name it with LEDGER_PASSWORD_FILE (or etcd.passwordFile)"},
		{vars: map[string]string{"ETCDCTL_USER": "root"}, want: "ETCDCTL_USER is set but LEDGER_PASSWORD_FILE (or etcd.passwordFile) is not: set both or neither"},
		{vars: map[string]string{"LEDGER_ENDPOINTS": "h:1,h"}, want: `LEDGER_ENDPOINTS is "h": the port is missing; etcd's is 2379`},
		{
			vars:  map[string]string{"ETCDCTL_CACERT": key},
			flags: Settings{Endpoints: []string{"http://h:1"}},
			want:  `--endpoints is "http://h:1", which is not encrypted, but ETCDCTL_CACERT is set: write https, or remove the TLS files`,
		},
		{vars: map[string]string{"LEDGER_STATE_DIR": "here"}, want: `LEDGER_STATE_DIR is "here": want an absolute path`},
		{vars: map[string]string{"LEDGER_PREFIX": "here"}, want: `LEDGER_PREFIX: prefix "here": want /name/…/ with a slash at both ends, at most 255 bytes`},
		{flags: Settings{Node: ".."}, want: `--node: node ".." is not allowed`},
		{flags: Settings{Identity: "all"}, want: `--identity is "all": want full, uid or none`},
		{flags: Settings{CAFile: "/nonexistent/ca"}, want: `--cacert: cannot read "/nonexistent/ca": no such file or directory; check the path`},
	} {
		_, err := LoadCommand(tc.file, tc.flags, environment(tc.vars))
		if err == nil {
			t.Errorf("accepted; want %s", tc.want)
			continue
		}
		fails(t, err, 7, tc.want)
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("a secret is in %v", err)
		}
	}
	// A command may name files as its user sees them.
	t.Chdir(dir)
	if _, err := LoadCommand("", Settings{CAFile: "key"}, nil); err != nil {
		t.Error(err)
	}
}

// root's file does not stand in the way of a user who needs nothing from it, but
// is not passed over in silence either.
func TestCommandWithoutTheRightToTheFile(t *testing.T) {
	path := write(t, t.TempDir(), "config.json", 0o600, `{"prefix": "/file/"}`)
	standIn(t, path)
	before := openFile
	t.Cleanup(func() { openFile = before })
	openFile = func(name string, flag int, perm os.FileMode) (*os.File, error) {
		if name == path {
			return nil, &os.PathError{Op: "open", Path: name, Err: syscall.EACCES}
		}
		return before(name, flag, perm)
	}
	_, err := LoadCommand("", Settings{}, nil)
	fails(t, err, 7, "cannot read "+path+": permission denied; run as its owner, or say where etcd is with --endpoints or LEDGER_ENDPOINTS")
	_, err = LoadCommand(path, Settings{Endpoints: []string{"h:1"}}, nil)
	fails(t, err, 7, fmt.Sprintf("--config: cannot read %q: permission denied; run as its owner", path))
	_, err = LoadNetwork("DEL", []byte(conf(``)), "")
	fails(t, err, 7, fmt.Sprintf("configuration file: cannot read %q: permission denied; run as its owner", path))
	s, err := LoadCommand("", Settings{}, environment(map[string]string{"LEDGER_ENDPOINTS": "h:1"}))
	if err != nil || s.Endpoints[0] != "http://h:1" || s.Prefix != "/ipam-ledger/v1/" {
		t.Errorf("%v, %+v", err, s)
	}
}
