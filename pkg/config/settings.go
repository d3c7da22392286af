package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ipam-ledger/ipam-ledger/internal/private"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// maxFile is far above any configuration; a larger file is not one.
const maxFile = 1 << 20

const exampleEndpoints = `["https://10.0.0.1:2379"]`

var (
	etcdKeys    = []string{"endpoints", "caFile", "certFile", "keyFile", "username", "passwordFile"}
	settingKeys = []string{
		"node", "stateDir", "prefix", "clusterID", "identity",
		"timeout", "lockTimeout", "statusGrace", "logFile",
	}
	fileKeys = append([]string{"etcd"}, settingKeys...)

	// What etcd is convinced with. caFile is not among them: it says who may be
	// etcd, and so belongs to the endpoints.
	credentialKeys = []string{"certFile", "keyFile", "username", "passwordFile"}
	ipamKeys       = append([]string{
		"type", "ranges", "subnet", "rangeStart", "rangeEnd", "gateway", "routes", "resolvConf", "dataDir",
		"exclude", "pool", "addressSpace", "strictAffinity", "blockSize", "cooldown", "configFile",
	}, fileKeys...)

	// What is said of keys that are known, but not where they stand.
	fileElsewhere = func() map[string]string {
		m := map[string]string{"configFile": "cannot be in the file itself: remove it"}
		for _, key := range ipamKeys {
			if !slices.Contains(fileKeys, key) && m[key] == "" {
				m[key] = "belongs in the network configuration, below ipam"
			}
		}
		return withEtcdKeys(m)
	}()
	ipamElsewhere = withEtcdKeys(map[string]string{
		"pools": `is a list of pools, which is not supported: name one pool with "pool"`,
		"range": `is not a key that is known here: did you mean "subnet" or "ranges"?`,
	})
	etcdElsewhere = map[string]string{
		"password": `is not read: write the password to a file, run chmod 600 on it, and name the file with "passwordFile"`,
	}
)

func withEtcdKeys(m map[string]string) map[string]string {
	for _, key := range etcdKeys {
		m[key] = `belongs one level down, in "etcd"`
	}
	return m
}

// secondary are the settings without which etcd and the state directory can
// still be reached.
var secondary = []string{"identity", "timeout", "lockTimeout", "statusGrace", "logFile"}

// given is a value of a setting and where it was found.
type given struct {
	text string
	list []string // of endpoints
	from string   // names the value in messages
	json bool     // found in JSON: a path must be absolute, as nobody knows what it would be relative to
}

// layer is what one source sets, by key. What is empty is not in it.
type layer map[string]given

// over returns what is set in l, and where it sets nothing, in below.
func (l layer) over(below layer) layer {
	merged := make(layer, len(l)+len(below))
	for key, g := range below {
		merged[key] = g
	}
	for key, g := range l {
		merged[key] = g
	}
	return merged
}

// less returns l without keys.
func (l layer) less(keys ...string) layer {
	rest := maps.Clone(l)
	for _, key := range keys {
		delete(rest, key)
	}
	return rest
}

// among returns those of keys that l sets.
func (l layer) among(keys ...string) (set []string) {
	for _, key := range keys {
		if _, ok := l[key]; ok {
			set = append(set, key)
		}
	}
	return set
}

// below names keys of the object that name names.
func below(name string, keys []string) string {
	return name + "." + strings.Join(keys, ", "+name+".")
}

// readLayer reads the settings in o, which is ipam or the file.
func (l *loader) readLayer(o *object) (layer, error) {
	found := make(layer)
	for _, key := range settingKeys {
		text, err := o.text(key)
		if err != nil && slices.Contains(secondary, key) {
			if err = l.soft(err); err == nil && key == "identity" {
				text = IdentityNone // as in settings
			}
		}
		if err != nil {
			return nil, err
		}
		if text != "" {
			found[key] = given{text: text, from: o.at(key), json: true}
		}
	}
	etcd, err := o.object("etcd")
	if err != nil || etcd == nil {
		return found, err
	}
	if err := l.soft(etcd.check(etcdKeys, etcdElsewhere)); err != nil {
		return nil, err
	}
	list, err := etcd.texts("endpoints", exampleEndpoints)
	if err != nil {
		return nil, err
	}
	if len(list) > 0 {
		found["endpoints"] = given{list: list, from: etcd.at("endpoints"), json: true}
	}
	for _, key := range etcdKeys[1:] {
		text, err := etcd.text(key)
		if err != nil {
			return nil, err
		}
		if text != "" {
			found[key] = given{text: text, from: etcd.at(key), json: true}
		}
	}
	return found, nil
}

// readFile reads the configuration file path; from says who named it.
func (l *loader) readFile(path, from string) (layer, error) {
	doc, err := l.readPrivate(path, from)
	if err != nil {
		return nil, err
	}
	o, err := parse(path, path+": ", doc)
	if err != nil {
		return nil, err
	}
	if err := l.soft(o.check(fileKeys, fileElsewhere)); err != nil {
		return nil, err
	}
	return l.readLayer(o)
}

// readPrivate returns the contents of a file that only its owner may use. It
// looks at the file that it opened, not at whatever has its name by then.
func (l *loader) readPrivate(path, from string) ([]byte, error) {
	// A pipe must not hold up a pod: open without waiting, then refuse it.
	f, err := openFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileErr(from, path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fileErr(from, path, err)
	}
	if err := l.private(from, path, info); err != nil {
		return nil, err
	}
	doc, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fileErr(from, path, err)
	}
	if len(doc) > maxFile {
		return nil, invalid("%s: %s has more than %d bytes: that is no configuration", from, path, maxFile)
	}
	return doc, nil
}

// fileErr is an error 7 that says why a file could not be used.
func fileErr(from, path string, err error) error {
	reason := err
	var pe *fs.PathError
	if errors.As(err, &pe) {
		reason = pe.Err
	}
	remedy := "check the path"
	if errors.Is(err, fs.ErrPermission) {
		remedy = "run as its owner"
	}
	return invalid("%s: cannot read %.300q: %v; %s", from, path, reason, remedy)
}

// private refuses a file that others can use. Only a DEL goes on with a warning:
// the secret is out already, and the pod must not hang.
func (l *loader) private(from, path string, info fs.FileInfo) error {
	err := private.Check(path, info)
	if err == nil {
		return nil
	}
	err = invalid("%s: %v", from, err)
	if l.del && info.Mode().IsRegular() {
		l.exposed = true
		return l.soft(err)
	}
	return err
}

// pluginSettings are the settings of a network whose ipam object is given.
func (l *loader) pluginSettings(ipam *object) (Settings, error) {
	network, err := l.readLayer(ipam)
	if err != nil {
		return Settings{}, err
	}
	path, err := ipam.text("configFile")
	if err != nil {
		return Settings{}, err
	}
	var file layer
	switch {
	case path != "":
		if !filepath.IsAbs(path) {
			return Settings{}, invalid("%s is %.300q: want an absolute path", ipam.at("configFile"), path)
		}
		file, err = l.readFile(path, ipam.at("configFile"))
	case exists(defaultFile):
		path = defaultFile
		file, err = l.readFile(path, "configuration file")
	default:
		path = defaultFile
	}
	if err != nil {
		return Settings{}, err
	}
	if network.over(file)["endpoints"].list == nil {
		return Settings{}, invalid("ipam.etcd.endpoints is not set: say where etcd is, like %s, there or as etcd.endpoints in %s",
			exampleEndpoints, path)
	}
	all, err := l.onePlace(network, file, path)
	if err != nil {
		return Settings{}, err
	}
	return l.settings(all)
}

// onePlace returns network over file, the file at path, in which credentials go
// only to endpoints that stand in the same place. Who defines a network could
// else name an etcd of his own, or by caFile who may pass for the file's, and be
// sent the file's password.
//
// A DEL goes on with a warning and without the keys that would go to another
// place's endpoints: where they are missed, etcd refuses and the release is queued.
func (l *loader) onePlace(network, file layer, path string) (layer, error) {
	own, files := network.among(credentialKeys...), file.among(credentialKeys...)
	all := network.over(file)
	var err error
	switch _, named := network["endpoints"]; {
	case named && len(own) > 0:
		return network.over(file.less(credentialKeys...)), nil
	case named && len(files) > 0 && !l.same(all, file):
		all = network.over(file.less(credentialKeys...))
		err = invalid("%s in %s go only to endpoints that stand there, and ipam.etcd.endpoints names others: put credentials beside ipam.etcd.endpoints, or leave it out and name the endpoints in the file",
			below("etcd", files), path)
	case named && len(files) > 0 && all["caFile"].text != file["caFile"].text:
		all = network.less("caFile").over(file)
		err = invalid("ipam.etcd.caFile would say who gets %s in %s: put credentials beside it, or leave it out",
			below("etcd", files), path)
	case !named:
		if strays := network.among(append(credentialKeys, "caFile")...); len(strays) > 0 {
			all = network.less(strays...).over(file)
			err = invalid("%s cannot go with etcd.endpoints in %s, as they must stand in one place: put ipam.etcd.endpoints beside, or leave them out",
				below("ipam.etcd", strays), path)
		}
	}
	if err != nil && l.del {
		err = l.soft(err)
	}
	return all, err
}

// same reports whether the endpoints in all are the file's, or some of them.
func (l *loader) same(all, file layer) bool {
	var ours, theirs Settings
	if l.endpoints(&ours, all) != nil || l.endpoints(&theirs, file) != nil {
		return false // what is wrong is said where they are used
	}
	return !slices.ContainsFunc(ours.Endpoints, func(e string) bool { return !slices.Contains(theirs.Endpoints, e) })
}

// exists is false only when there is certainly no such file.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// commandSettings are the settings of the ledger command.
func (l *loader) commandSettings(file string, flags Settings, env func(string) string) (Settings, error) {
	top := make(layer)
	flag := func(key, name, text string) {
		if text != "" {
			top[key] = given{text: text, from: name}
		}
	}
	if list := nonEmpty(flags.Endpoints); len(list) > 0 {
		top["endpoints"] = given{list: list, from: "--endpoints"}
	}
	flag("caFile", "--cacert", flags.CAFile)
	flag("certFile", "--cert", flags.CertFile)
	flag("keyFile", "--key", flags.KeyFile)
	flag("username", "--user", flags.Username)
	flag("passwordFile", "--password-file", flags.PasswordFile)
	flag("node", "--node", flags.Node)
	flag("stateDir", "--state-dir", flags.StateDir)
	flag("prefix", "--prefix", flags.Prefix)
	flag("clusterID", "--cluster-id", flags.ClusterID)
	flag("identity", "--identity", flags.Identity)
	flag("logFile", "--log-file", flags.LogFile)
	for _, d := range []struct {
		key, name string
		value     time.Duration
	}{
		{"timeout", "--timeout", flags.Timeout},
		{"lockTimeout", "--lock-timeout", flags.LockTimeout},
		{"statusGrace", "--status-grace", flags.StatusGrace},
	} {
		if d.value != 0 {
			flag(d.key, d.name, d.value.String())
		}
	}

	environment := func(names ...string) layer {
		e := make(layer)
		for i := 0; i < len(names); i += 2 {
			key, name := names[i], names[i+1]
			value := env(name)
			if key == "endpoints" {
				if list := nonEmpty(strings.Split(value, ",")); len(list) > 0 {
					e[key] = given{list: list, from: name}
				}
			} else if value != "" {
				e[key] = given{text: value, from: name}
			}
		}
		return e
	}
	ours := environment(
		"endpoints", "LEDGER_ENDPOINTS", "caFile", "LEDGER_CACERT", "certFile", "LEDGER_CERT", "keyFile", "LEDGER_KEY",
		"username", "LEDGER_USER", "passwordFile", "LEDGER_PASSWORD_FILE", "node", "LEDGER_NODE",
		"stateDir", "LEDGER_STATE_DIR", "prefix", "LEDGER_PREFIX", "clusterID", "LEDGER_CLUSTER_ID",
		"timeout", "LEDGER_TIMEOUT")
	etcdctl := environment(
		"endpoints", "ETCDCTL_ENDPOINTS", "caFile", "ETCDCTL_CACERT", "certFile", "ETCDCTL_CERT", "keyFile", "ETCDCTL_KEY",
		"username", "ETCDCTL_USER")
	above := top.over(ours)

	from := "--config"
	if file == "" {
		file, from = env("LEDGER_CONFIG"), "LEDGER_CONFIG"
	}
	var inFile layer
	var err error
	switch {
	case file != "":
		inFile, err = l.readFile(file, from)
	case unreadable(defaultFile) && above["endpoints"].list != nil:
		// An ordinary user who says where etcd is does not need root's file.
	case exists(defaultFile):
		inFile, err = l.readFile(defaultFile, "configuration file")
		if err != nil && unreadable(defaultFile) {
			err = invalid("cannot read %s: permission denied; run as its owner, or say where etcd is with --endpoints or LEDGER_ENDPOINTS",
				defaultFile)
		}
	}
	if err != nil {
		return Settings{}, err
	}

	// Other than a network's, endpoints and credentials need not stand in one place
	// here: flags, variables and the choice of the file are one person's, who can
	// read whatever would be sent. So one asks a single member with --endpoints.
	all := above.over(inFile).over(etcdctl)
	if user := all["username"]; user.from == "ETCDCTL_USER" {
		// etcdctl's variable may hold the password too. Ours comes from a file.
		name, _, both := strings.Cut(user.text, ":")
		if both && all["passwordFile"].text == "" {
			return Settings{}, invalid("ETCDCTL_USER holds a password, which is read from a file only: write it to one, run chmod 600 on it, and set LEDGER_PASSWORD_FILE to its path")
		}
		user.text = name
		all["username"] = user
	}
	return l.settings(all.over(layer{"endpoints": {list: []string{DefaultEndpoint}, from: "the default endpoint"}}))
}

func unreadable(path string) bool {
	f, err := openFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err == nil {
		f.Close()
	}
	return errors.Is(err, fs.ErrPermission)
}

func nonEmpty(list []string) (out []string) {
	for _, s := range list {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// settings checks what all layers together say and fills in the defaults.
func (l *loader) settings(all layer) (Settings, error) {
	s := Settings{
		CAFile: all["caFile"].text, CertFile: all["certFile"].text, KeyFile: all["keyFile"].text,
		Username: all["username"].text, PasswordFile: all["passwordFile"].text,
		Node: all["node"].text, StateDir: all["stateDir"].text, Prefix: all["prefix"].text, ClusterID: all["clusterID"].text,
		Identity: IdentityFull, LogFile: all["logFile"].text,
		Timeout: DefaultTimeout, LockTimeout: DefaultLockTimeout, StatusGrace: DefaultStatusGrace,
	}
	for _, check := range []func(*Settings, layer) error{
		l.credentials, l.endpoints, l.node, l.places, l.secondary,
	} {
		if err := check(&s, all); err != nil {
			return Settings{}, err
		}
	}
	s.Exposed = l.exposed
	return s, nil
}

// credentials checks the files and names that etcd is convinced with.
func (l *loader) credentials(s *Settings, all layer) error {
	for _, pair := range [][2]string{{"certFile", "keyFile"}, {"username", "passwordFile"}} {
		for i, key := range pair {
			if other := pair[1-i]; all[key].text != "" && all[other].text == "" {
				return invalid("%s is set but %s is not: set both or neither", all[key].from, l.spell(other))
			}
		}
	}
	if strings.Contains(s.Username, ":") {
		return invalid("%s has a colon in it: give the name alone, write the password to a file, run chmod 600 on it, and name it with %s",
			all["username"].from, l.spell("passwordFile"))
	}
	for _, key := range []string{"caFile", "certFile", "keyFile", "passwordFile"} {
		g := all[key]
		if g.text == "" {
			continue
		}
		if g.json && !filepath.IsAbs(g.text) {
			return invalid("%s is %.300q: want an absolute path", g.from, g.text)
		}
		info, err := os.Stat(g.text)
		switch {
		case err != nil:
			// Without it there is no contact, and what DEL does then is not
			// for here to decide.
			err = l.soft(fileErr(g.from, g.text, err))
		case key == "keyFile" || key == "passwordFile":
			err = l.private(g.from, g.text, info)
		case !info.Mode().IsRegular():
			err = invalid("%s: %s is not a regular file", g.from, g.text)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// spell names a setting as whoever has to set it would.
func (l *loader) spell(key string) string {
	if !l.command {
		return "etcd." + key
	}
	return map[string]string{
		"certFile": "LEDGER_CERT (or etcd.certFile)", "keyFile": "LEDGER_KEY (or etcd.keyFile)",
		"username": "LEDGER_USER (or etcd.username)", "passwordFile": "LEDGER_PASSWORD_FILE (or etcd.passwordFile)",
	}[key]
}

// endpoints gives each endpoint its scheme. One without gets https when there
// are TLS files, as nobody names those for nothing.
func (l *loader) endpoints(s *Settings, all layer) error {
	g := all["endpoints"]
	tls := all["caFile"]
	if tls.text == "" {
		tls = all["certFile"]
	}
	plain := ""
	for i, text := range g.list {
		at := g.from
		if g.json {
			at = fmt.Sprintf("%s[%d]", g.from, i)
		}
		endpoint, err := parseEndpoint(at, text, tls.text != "")
		if err != nil {
			return err
		}
		if strings.HasPrefix(endpoint, "http://") {
			if tls.text != "" {
				return invalid("%s is %q, which is not encrypted, but %s is set: write https, or remove the TLS files", at, endpoint, tls.from)
			}
			if plain == "" {
				plain = endpoint
			}
		}
		if !slices.Contains(s.Endpoints, endpoint) {
			s.Endpoints = append(s.Endpoints, endpoint)
		}
	}
	if plain != "" && s.Username != "" {
		l.warn("the password of %s goes to %s unencrypted: use https", all["username"].from, plain)
	}
	return nil
}

func parseEndpoint(at, text string, tls bool) (string, error) {
	const want = "want https://HOST:PORT, http://HOST:PORT, HOST:PORT or unix://PATH"
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		scheme, rest = "http", text
		if tls {
			scheme = "https"
		}
	}
	scheme = strings.ToLower(scheme)
	// A password in an endpoint would be ignored, and must not get into a log.
	if strings.Contains(rest, "@") {
		return "", invalid("%s has an @ in it: name the user in etcd.username and the password's file in etcd.passwordFile", at)
	}
	switch scheme {
	case "unix":
		if rest == "" {
			return "", invalid("%s is %.300q: the path is missing; %s", at, text, want)
		}
		return "unix://" + rest, nil
	case "http", "https":
	default:
		return "", invalid("%s is %.300q: %q is no scheme that etcd has; %s", at, text, scheme, want)
	}
	u, err := url.Parse(scheme + "://" + rest)
	if err != nil || u.Hostname() == "" || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return "", invalid("%s is %.300q: %s (an IPv6 address in brackets)", at, text, want)
	}
	if u.Port() == "" {
		return "", invalid("%s is %.300q: the port is missing; etcd's is 2379", at, text)
	}
	if n, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || n == 0 {
		return "", invalid("%s is %.300q: the port is not from 1 to 65535", at, text)
	}
	return scheme + "://" + u.Host, nil
}

// node finds the node's name. The default is spelt as the kubelet spells it.
func (l *loader) node(s *Settings, all layer) error {
	if g := all["node"]; g.text != "" {
		return validName(g.from, "node", g.text)
	}
	name, err := hostname()
	if err == nil {
		name = strings.ToLower(strings.TrimSpace(name))
		err = entry.ValidateName("host name", name)
	}
	switch {
	case err == nil:
		s.Node = name
	case !l.command: // the command may not need one
		return invalid("this host's name cannot be the node's: %v; set ipam.node, or node in the configuration file", err)
	}
	return nil
}

// places checks where things are: in etcd and on disk.
func (l *loader) places(s *Settings, all layer) error {
	if s.StateDir == "" {
		s.StateDir = DefaultStateDir
	} else if !filepath.IsAbs(s.StateDir) {
		return invalid("%s is %.300q: want an absolute path", all["stateDir"].from, s.StateDir)
	}
	s.StateDir = filepath.Clean(s.StateDir)
	if s.Prefix == "" {
		s.Prefix = keyspace.DefaultPrefix
	}
	if _, err := keyspace.New(s.Prefix); err != nil {
		return invalid("%s: %v", all["prefix"].from, err)
	}
	if s.ClusterID != "" {
		if err := validName(all["clusterID"].from, "cluster ID", s.ClusterID); err != nil {
			return err
		}
	}
	return nil
}

// secondary checks the settings of that name.
func (l *loader) secondary(s *Settings, all layer) error {
	if g := all["identity"]; g.text != "" {
		s.Identity = g.text
		if !slices.Contains([]string{IdentityFull, IdentityUID, IdentityNone}, g.text) {
			if err := l.soft(invalid("%s is %.40q: want full, uid or none", g.from, g.text)); err != nil {
				return err
			}
			// Whoever set it wanted less than everything on the record.
			s.Identity = IdentityNone
		}
	}
	for _, d := range []struct {
		key string
		to  *time.Duration
	}{{"timeout", &s.Timeout}, {"lockTimeout", &s.LockTimeout}, {"statusGrace", &s.StatusGrace}} {
		g := all[d.key]
		if g.text == "" {
			continue
		}
		value, err := duration(g.from, g.text, MinTimeout, MaxTimeout)
		if err == nil {
			*d.to = value
		} else if err := l.soft(err); err != nil {
			return err
		}
	}
	if g := all["logFile"]; g.text != "" && !filepath.IsAbs(g.text) && !l.command {
		if err := l.soft(invalid("%s is %.300q: want an absolute path", g.from, g.text)); err != nil {
			return err
		}
		s.LogFile = ""
	}
	return nil
}
