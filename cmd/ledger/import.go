package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"
	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// imports is what 'import host-local' was told.
type imports struct {
	dir                  string
	network, pool, space string
	subnets              []string
	conf, iface          string
	dry                  bool
	cooldown             int64 // seconds, of --conf
}

func (a *app) importCommand() *cobra.Command {
	c := &cobra.Command{Use: "import", Short: "Take over leases from another IPAM", RunE: a.group("host-local"), Args: cobra.ArbitraryArgs}
	var im imports
	hl := &cobra.Command{
		Use:   "host-local DIR --network NAME (--subnet CIDR | --conf FILE)",
		Short: "Record the leases that host-local has made on this node",
		Long: `Record the leases that host-local has made on this node, so that its pods keep
their addresses when the plugin is changed. DIR is host-local's, usually
/var/lib/cni/networks/NAME; it is only read. Run it on each node, as root, before
the network configuration names ipam-ledger. It may be run again: what is recorded
already stays as it is, and a lease that has ended since is not brought back.

The subnets, for prefix length and gateway, come from --conf, the node's network
configuration (a conflist or conf with ranges), or from --subnet; then the gateway
is the subnet's first address, as host-local has it where none is configured.

An address that another attachment has in the ledger, or an attachment that has
two addresses where it can have one, is listed and not imported, and the exit
status is 1: nothing is resolved silently. The others are imported.`,
		Example: `  ledger import host-local /var/lib/cni/networks/prod --network prod --subnet 10.22.0.0/16
  ledger import host-local /var/lib/cni/networks/prod --conf /etc/cni/net.d/10-prod.conflist --dry-run`,
		Args:        args(1, 1, "host-local's directory"),
		Annotations: formats("table,wide,json,yaml,name"),
	}
	f := hl.Flags()
	f.StringVar(&im.network, "network", "", "`name` of the network (default: that of --conf)")
	f.StringVar(&im.pool, "pool", "", "`name` of the pool (default: the network's, or that of --conf)")
	f.StringVar(&im.space, "space", "", "address `space` (default: that of --conf, else default)")
	f.StringSliceVar(&im.subnets, "subnet", nil, "`CIDR` of a subnet (repeated: in the order of the range sets)")
	f.StringVar(&im.conf, "conf", "", "CNI network configuration `file` whose ipam has the ranges")
	f.StringVar(&im.iface, "interface", "", "`name` of the interface where a file has none (host-local before 0.7)")
	f.BoolVar(&im.dry, "dry-run", false, "show what would be imported, and import nothing")
	reason := reasonFlag(hl)
	hl.RunE = func(cmd *cobra.Command, args []string) error {
		im.dir = args[0]
		if *reason == "" {
			*reason = "import host-local"
		}
		return a.runImport(cmd.Context(), &im, *reason)
	}
	c.AddCommand(hl)
	return c
}

// found is a lease as host-local's files have it.
type found struct {
	Attachment keyspace.AttachmentID `json:"attachment"`
	Leases     []keyspace.Lease      `json:"leases"`
	Result     string                `json:"result"` // imported, would import, already, ended, conflict, problem
	Problem    string                `json:"problem,omitempty"`

	sets  []int // range set of each lease
	files []string
}

func (a *app) runImport(ctx context.Context, im *imports, reason string) error {
	s, err := a.settings()
	if err != nil {
		return err
	}
	if s.Node == "" {
		return usage("this host's name cannot be a node's: name the node with --node")
	}
	sets, err := ranges(im)
	if err != nil {
		return err
	}
	if im.network == "" {
		return usage("--network is missing: what is the network of %s called?", im.dir)
	}
	if im.pool == "" {
		im.pool = im.network
	}
	if im.space == "" {
		im.space = config.DefaultSpace
	}
	for _, x := range [][2]string{{"--network", im.network}, {"--pool", im.pool}, {"--space", im.space}} {
		if err := entry.ValidateName(x[0], x[1]); err != nil {
			return usage("%w", err)
		}
	}
	list, problems, err := readHostLocal(im, s.Node, sets)
	if err != nil {
		return err
	}
	var ask []*found
	var leases []statedir.Holding
	for _, x := range list {
		if x.Problem == "" {
			ask = append(ask, x)
			leases = append(leases, statedir.Holding{ID: x.Attachment, Value: keyspace.Attachment{Space: im.space, Pool: im.pool, Leases: x.Leases, Cooldown: im.cooldown}})
		}
	}
	if len(ask) > 0 {
		if s, err := a.settings(); err != nil {
			return err
		} else if _, err := os.Stat(s.StateDir); im.dry && errors.Is(err, fs.ErrNotExist) {
			// A look leaves no state directory on a host that has none.
			if s.StateDir, err = os.MkdirTemp("", "ledger-dry-run-"); err != nil {
				return err
			}
			defer os.RemoveAll(s.StateDir)
		}
		w, done, err := a.node(true)
		if err != nil {
			return err
		}
		defer done()
		results, err := w.Import(ctx, leases, im.dry, reason)
		for i, result := range results {
			x := ask[i]
			switch {
			case result == nil && !im.dry:
				x.Result = "imported"
			case errors.Is(result, allocator.ErrBefore):
				x.Result = "already"
			case errors.Is(result, allocator.ErrEnded):
				x.Result = "ended"
			case result != nil:
				x.Result, x.Problem = "conflict", result.Error()
			}
		}
		if err != nil {
			if n := len(results); n > 0 && !im.dry {
				return fmt.Errorf("importing stopped, the first %d are done: %w", n, err)
			}
			return fmt.Errorf("importing: %w", err)
		}
	}
	return a.showImport(im, list, problems)
}

func (a *app) showImport(im *imports, list []*found, problems []string) error {
	bad, good, others := len(problems), 0, map[string]int{}
	for _, x := range list {
		switch {
		case x.Problem != "":
			bad++
		case x.Result == "already", x.Result == "ended":
			others[x.Result]++
		default:
			good++
		}
	}
	what, not := "imported", "not imported"
	if im.dry {
		what, not = "would be imported", "would not be imported"
	}
	end := func() error {
		if bad == 0 {
			return nil
		}
		return refuse("find out which pod really has the address; remove the files of those that are gone, and run it again",
			"%s of %s %s", count(bad, "problem"), im.dir, not)
	}
	if done, err := a.structured(struct {
		Attachments []*found `json:"attachments"`
		Problems    []string `json:"problems"`
	}{append([]*found{}, list...), append([]string{}, problems...)}); done {
		return first(err, end())
	}
	if a.output == "name" {
		for _, x := range list {
			if x.Problem == "" {
				a.printf("%s\n", x.Attachment)
			}
		}
		return end()
	}
	if len(list) > 0 {
		t := a.table("ADDRESSES", "CONTAINER", "INTERFACE", "RESULT")
		for _, x := range list {
			container := x.Attachment.Container
			if !a.wide() && len(container) > 16 {
				container = container[:12] + "…"
			}
			result := x.Result
			switch {
			case x.Problem != "":
				result = "PROBLEM: " + x.Problem
			case result == "already":
				result = "recorded already"
			case result == "ended":
				result = "ended since: left alone"
			}
			var ips []netip.Prefix
			for _, l := range x.Leases {
				ips = append(ips, l.Address)
			}
			t.row(join(ips), container, x.Attachment.Interface, result)
		}
		t.flush()
	}
	for _, p := range problems {
		a.printf("PROBLEM: %s\n", printable(p))
	}
	a.printf("%s %s, ", count(good, "attachment"), what)
	if n := others["already"]; n > 0 {
		a.printf("%d recorded already, ", n)
	}
	if n := others["ended"]; n > 0 {
		a.printf("%d ended since, ", n)
	}
	a.printf("%s\n", count(bad, "problem"))
	return end()
}

// rangeSets are alternatives that supply one address each.
type rangeSets [][]keyspace.Range

// of finds the range set, and the range in it, of an address.
func (s rangeSets) of(ip netip.Addr) (int, *keyspace.Range) {
	for i := range s {
		for j := range s[i] {
			if s[i][j].Subnet.Contains(ip) {
				return i, &s[i][j]
			}
		}
	}
	return -1, nil
}

// ranges come from --conf or --subnet.
func ranges(im *imports) (rangeSets, error) {
	if im.conf != "" {
		n, err := network(im.conf, im.network)
		if err != nil {
			return nil, err
		}
		if im.network == "" {
			im.network = n.Name
		} else if im.network != n.Name {
			return nil, usage("--network is %s, and the network of %s is %s", im.network, im.conf, n.Name)
		}
		if im.pool == "" {
			im.pool = n.Pool
		}
		if im.space == "" {
			im.space = n.Space
		}
		im.cooldown = int64(n.Cooldown / time.Second)
		if len(im.subnets) == 0 {
			if len(n.RangeSets) == 0 {
				return nil, usage("%s names pool %s and has no ranges: say the subnets with --subnet", im.conf, n.Pool)
			}
			return n.RangeSets, nil
		}
	}
	if len(im.subnets) == 0 {
		return nil, usage("the subnet is missing, for prefix length and gateway: --subnet CIDR, or --conf with the network configuration")
	}
	var sets rangeSets
	for _, text := range im.subnets {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return nil, usage("--subnet %q is no subnet in CIDR form without host bits, like 10.22.0.0/16", text)
		}
		r := keyspace.Range{Subnet: p, Gateway: p.Addr().Next()}
		if p.Bits() >= p.Addr().BitLen()-1 {
			r.Gateway = netip.Addr{}
		}
		sets = append(sets, []keyspace.Range{r})
	}
	return sets, nil
}

// ipams returns the plugins of a CNI configuration, of a list or of one plugin,
// that have an ipam; each with the network's name and version.
func ipams(doc []byte) (list []map[string]any, err error) {
	var top map[string]any
	if err := json.Unmarshal(doc, &top); err != nil {
		return nil, err
	}
	plugins, isList := top["plugins"].([]any)
	if !isList {
		plugins = []any{top}
	}
	for _, p := range plugins {
		if m, ok := p.(map[string]any); ok && m["ipam"] != nil {
			m["name"], m["cniVersion"] = top["name"], top["cniVersion"]
			list = append(list, m)
		}
	}
	return list, nil
}

// network reads the ranges of a CNI configuration. Its ipam may be host-local's
// still.
func network(file, name string) (*config.Network, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--conf: %w", err)
	}
	list, err := ipams(b)
	switch {
	case err != nil:
		return nil, usage("--conf %s is not JSON: %w", file, err)
	case len(list) == 0:
		return nil, usage("--conf %s: no plugin in it has an ipam", file)
	case len(list) > 1:
		return nil, usage("--conf %s: more than one plugin has an ipam; say the subnets with --subnet", file)
	}
	conf := list[0]
	if conf["name"] == nil {
		conf["name"] = name
	}
	if ipam, ok := conf["ipam"].(map[string]any); ok {
		delete(ipam, "resolvConf") // of no matter here, and perhaps another machine's
	}
	delete(conf, "prevResult")
	if b, err = json.Marshal(conf); err != nil {
		return nil, err
	}
	n, err := config.LoadRanges(b)
	if err != nil {
		var e *types.Error
		if errors.As(err, &e) {
			err = errors.New(e.Details)
		}
		return nil, usage("--conf %s: %w", file, err)
	}
	return n, nil
}

// readHostLocal reads host-local's files, one an address. Problems are those of
// files that belong to no attachment.
func readHostLocal(im *imports, node string, sets rangeSets) (list []*found, problems []string, err error) {
	files, err := os.ReadDir(im.dir)
	if err != nil {
		return nil, nil, fmt.Errorf("host-local's directory: %w", err)
	}
	byID := map[keyspace.AttachmentID]*found{}
	for _, f := range files {
		name := f.Name()
		if name == "lock" || strings.HasPrefix(name, "last_reserved_ip.") {
			continue
		}
		ip, err := netip.ParseAddr(strings.ReplaceAll(name, "_", ":"))
		if err != nil || ip.Zone() != "" || !f.Type().IsRegular() {
			problems = append(problems, fmt.Sprintf("%s is no file of host-local's: its name is no address", name))
			continue
		}
		ip = ip.Unmap()
		b, err := os.ReadFile(filepath.Join(im.dir, name))
		if err != nil {
			return nil, nil, fmt.Errorf("host-local's file: %w", err)
		}
		container, iface, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
		container, iface = strings.TrimSpace(container), strings.TrimSpace(iface)
		if iface == "" {
			iface = im.iface
		}
		id := keyspace.AttachmentID{Node: node, Network: im.network, Container: container, Interface: iface}
		if problem := unusable(id); problem != "" {
			problems = append(problems, fmt.Sprintf("%s: %s", name, problem))
			continue
		}
		x := byID[id]
		if x == nil {
			x = &found{Attachment: id, Result: "would import"}
			byID[id] = x
			list = append(list, x)
		}
		set, r := sets.of(ip)
		lease := keyspace.Lease{Address: netip.PrefixFrom(ip, ip.BitLen())}
		if r == nil {
			x.Problem = fmt.Sprintf("%v is in none of the subnets", ip)
		} else {
			lease = keyspace.Lease{Address: netip.PrefixFrom(ip, r.Subnet.Bits()), Gateway: r.Gateway}
			if span := netipx.IPRangeFrom(r.Start, r.End); span.Contains(ip) {
				lease.Range = span
			}
			if why := keyspace.Reserved(ip, r.Subnet); why != "" {
				x.Problem = fmt.Sprintf("%v is %s (%v)", ip, why, r.Subnet)
			}
			for _, r := range slices.Concat(sets...) {
				if r.Gateway == ip {
					x.Problem = fmt.Sprintf("%v is the gateway of %v", ip, r.Subnet)
				}
			}
		}
		for i, l := range x.Leases {
			if x.Problem == "" && (x.sets[i] == set || im.conf == "" && l.Address.Addr().Is4() == ip.Is4()) {
				x.Problem = fmt.Sprintf("it has both %v and %v, and can have one of them", l.Address.Addr(), ip)
			}
		}
		x.Leases, x.sets, x.files = append(x.Leases, lease), append(x.sets, set), append(x.files, name)
	}
	for _, x := range list {
		if x.Problem != "" {
			x.Result = "problem"
			continue
		}
		// In the order of the range sets, as an ADD would have it.
		order := make([]int, len(x.Leases))
		for i := range order {
			order[i] = i
		}
		slices.SortFunc(order, func(i, j int) int { return x.sets[i] - x.sets[j] })
		var leases []keyspace.Lease
		for _, i := range order {
			leases = append(leases, x.Leases[i])
		}
		x.Leases = leases
	}
	slices.SortFunc(list, func(x, y *found) int { return x.Leases[0].Address.Addr().Compare(y.Leases[0].Address.Addr()) })
	return list, problems, nil
}

// unusable says why an attachment cannot stand in an entry.
func unusable(id keyspace.AttachmentID) string {
	switch {
	case id.Container == "":
		return "it is empty: it names no container"
	case id.Interface == "":
		return "it names no interface: say which with --interface"
	case entry.ValidateAttachment(id.Node, id.Network, id.Container, "eth0") != nil:
		return fmt.Sprintf("%.80q is no container's ID", id.Container)
	case entry.ValidateAttachment(id.Node, id.Network, id.Container, id.Interface) != nil:
		return fmt.Sprintf("%.80q is no interface's name", id.Interface)
	}
	return ""
}
