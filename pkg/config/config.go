// Package config reads the configuration of the CNI plugin and of the ledger
// command, and refuses what it cannot take at its word.
//
// A value has one origin. From the strongest: for the plugin the network
// configuration (below "ipam"), the configuration file, the default; for the
// command the flags, LEDGER_*, the file, etcdctl's ETCDCTL_*, the default. An
// empty string, an empty list and null are the same as a key that is not there.
// For the plugin, etcd's endpoints and the credentials for them have one origin
// together: those of the file go to no endpoints of a network's.
//
// # Guarantees
//
// Everything that the host-local plugin accepts is accepted and means the same;
// its own code judges ranges. Keys are matched as they are spelled, and a key
// below "ipam" or in the file that is unknown or there twice is an error that
// names it: a misspelt "rangeEnd" would otherwise hand out addresses that
// somebody wanted to keep.
//
// Every error is a *types.Error with the code of the CNI specification: 6 for
// what is not JSON, 4 for CNI_ARGS, 7 for all else. Its details name the key,
// the value and the remedy. No error or warning holds a secret.
//
// Only ADD is strict. The other verbs must work for a pod whose network was
// edited since, so whatever they do not need to reach etcd and the state
// directory becomes a warning: DEL has to free an address even when the range
// it came from is gone.
//
// What can fail beside the values themselves: reading the configuration file
// and resolvConf, and looking at the modes and owners of files that hold secrets
// (internal/private has the rule). The contents of certificates, keys and
// passwords are left to who connects.
//
// The package imports no etcd client.
package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// What holds where nothing is configured. The endpoint is the command's; the
// plugin has none.
const (
	DefaultFile        = "/etc/ipam-ledger/config.json"
	DefaultStateDir    = "/var/lib/ipam-ledger"
	DefaultSpace       = "default"
	DefaultEndpoint    = "127.0.0.1:2379"
	DefaultTimeout     = 10 * time.Second
	DefaultLockTimeout = 30 * time.Second
	DefaultStatusGrace = 60 * time.Second
)

// The values of Settings.Identity: what of a pod enters an entry.
const (
	IdentityFull = "full" // namespace, name and UID
	IdentityUID  = "uid"  // the UID only
	IdentityNone = "none" // nothing
)

// The limits of durations and blocks.
const (
	MinTimeout   = 100 * time.Millisecond
	MaxTimeout   = 10 * time.Minute
	MaxCooldown  = 24 * time.Hour
	MaxBlockSize = 1024 // addresses
)

// Settings are what a node or a command needs whatever the network.
type Settings struct {
	Endpoints []string // URLs: http://HOST:PORT, https://HOST:PORT or unix://PATH

	// Paths; who connects reads the contents. CertFile and KeyFile are both set
	// or both empty, and so are Username and PasswordFile.
	CAFile, CertFile, KeyFile, Username, PasswordFile string
	// Exposed says that a file is used although others can: a DEL's, which goes
	// on with a warning.
	Exposed bool

	Node      string // a valid writer name
	StateDir  string // absolute
	Prefix    string // one that keyspace.New accepts
	ClusterID string // empty: whatever meta says
	Identity  string // IdentityFull, IdentityUID or IdentityNone
	LogFile   string // absolute; empty: no file

	Timeout, LockTimeout, StatusGrace time.Duration // MinTimeout to MaxTimeout
}

// Network is what an ADD needs of a network configuration.
type Network struct {
	Name, CNIVersion string
	Space            string // the address space
	Pool             string // the network's name for inline ranges; else the named pool
	Named            bool   // Pool is a named pool: the rules below are in its spec

	// RangeSets are the inline ranges, completed by host-local's rules: each
	// with Subnet, Start, End and Gateway. A set gives at least one address.
	RangeSets      [][]keyspace.Range
	Exclude        *netipx.IPSet // never nil
	StrictAffinity bool
	BlockSize      int           // addresses; 0: the default
	Cooldown       time.Duration // before a released address is handed out again

	Requested []netip.Addr // from CNI_ARGS, args.cni.ips, runtimeConfig.ips; each once
	Routes    []*types.Route
	DNS       types.DNS // of resolvConf

	Pod, PodUID string // from CNI_ARGS; Pod is namespace/name. Identity is not applied

	PrevResult          *current.Result      // nil: absent
	ValidAttachments    []types.GCAttachment // what the runtime still has
	HasValidAttachments bool                 // the list is there, be it empty

	Settings
	Warnings []string // one line each
}

// loader carries what is the same for all parts of one configuration.
type loader struct {
	lenient  bool
	del      bool
	command  bool
	ranges   bool     // no settings are wanted
	exposed  bool     // a file that others can use was let through
	sets     []string // where each range set was written
	warnings []string
}

// maxWarnings is how many warnings are given: beyond them nobody reads on.
const maxWarnings = 32

func (l *loader) warn(format string, args ...any) {
	switch n := len(l.warnings); {
	case n < maxWarnings:
		l.warnings = append(l.warnings, fmt.Sprintf(format, args...))
	case n == maxWarnings:
		l.warnings = append(l.warnings, "there are more warnings like these")
	}
}

// soft turns the error of something that only ADD needs into a warning for
// the other verbs.
func (l *loader) soft(err error) error {
	if err == nil || !l.lenient {
		return err
	}
	l.note(err)
	return nil
}

// note makes a warning of err.
func (l *loader) note(err error) {
	var e *types.Error
	switch {
	case !errors.As(err, &e):
		l.warn("%v", err)
	case e.Code == types.ErrInvalidEnvironmentVariables:
		l.warn("CNI_ARGS: %s", e.Details)
	default:
		l.warn("%s", e.Details)
	}
}

// invalid is error 7: what is wrong in a configuration.
func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, "invalid configuration", fmt.Sprintf(format, args...))
}

// Replaced by tests, which must not depend on the machine they run on.
var (
	defaultFile = DefaultFile
	hostname    = os.Hostname
	openFile    = os.OpenFile
)

// LoadNetwork reads the network configuration that a runtime gave to the plugin
// for verb (ADD, DEL, …) on standard input, and the runtime's CNI_ARGS.
func LoadNetwork(verb string, stdin []byte, cniArgs string) (*Network, error) {
	return load(&loader{lenient: verb != "ADD", del: verb == "DEL"}, verb, stdin, cniArgs)
}

// LoadRanges reads a network configuration for what it hands out: its etcd and
// all other Settings are not looked at, and left zero.
func LoadRanges(doc []byte) (*Network, error) {
	return load(&loader{ranges: true}, "ADD", doc, "")
}

func load(l *loader, verb string, stdin []byte, cniArgs string) (*Network, error) {
	top, err := parse("network configuration", "", stdin)
	if err != nil {
		return nil, err
	}
	if err := l.soft(top.twiceErr()); err != nil {
		return nil, err
	}
	n := &Network{Space: DefaultSpace, Exclude: new(netipx.IPSet)}
	if n.CNIVersion, err = top.text("cniVersion"); err != nil {
		return nil, err
	}
	if n.Name, err = networkName(top); err != nil {
		return nil, err
	}
	ipam, err := top.object("ipam")
	if err != nil {
		return nil, err
	}
	if ipam == nil {
		return nil, invalid("ipam is not set%s: say where etcd is and what to hand out, like %s", top.near("ipam"), exampleIPAM)
	}
	if err := l.soft(ipam.check(ipamKeys, ipamElsewhere)); err != nil {
		return nil, err
	}

	if !l.ranges {
		if n.Settings, err = l.pluginSettings(ipam); err != nil {
			return nil, err
		}
	}
	for _, part := range []func(n *Network, top, ipam *object) error{l.handOut, l.rules, l.extras} {
		if err := part(n, top, ipam); err != nil {
			return nil, err
		}
	}
	if err := l.request(n, top, cniArgs); err != nil {
		return nil, err
	}
	if err := l.runtime(n, top, verb); err != nil {
		return nil, err
	}
	n.Warnings = l.warnings
	return n, nil
}

// LoadCommand returns the settings of the ledger command. file is the path that
// a flag gave, or empty; a zero field of flags was not given. Node is empty when
// it is configured nowhere and the host's name cannot be one.
func LoadCommand(file string, flags Settings, env func(string) string) (Settings, error) {
	if env == nil {
		env = func(string) string { return "" }
	}
	l := &loader{command: true}
	return l.commandSettings(file, flags, env)
}
