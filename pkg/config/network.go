package config

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

const (
	exampleIPAM    = `{"type": "ipam-ledger", "etcd": {"endpoints": ["https://10.0.0.1:2379"]}, "subnet": "10.22.0.0/16"}`
	exampleRanges  = `[[{"subnet": "10.22.0.0/16"}]]`
	exampleExclude = `["10.22.0.0/28", "10.22.1.7", "10.22.2.10-10.22.2.20"]`
	exampleIPs     = `["10.22.0.7"]`
)

var (
	rangeKeys = []string{"subnet", "rangeStart", "rangeEnd", "gateway"}
	routeKeys = []string{"dst", "gw", "mtu", "advmss", "priority", "table", "scope"}
)

// networkName returns the network's name, which is part of every attachment.
func networkName(top *object) (string, error) {
	name, err := top.text("name")
	if err != nil {
		return "", err
	}
	if name == "" {
		return "", invalid("name is not set%s: give the network a name", top.near("name"))
	}
	if len(name) > entry.MaxNetwork {
		return "", invalid("name has %d bytes: at most %d", len(name), entry.MaxNetwork)
	}
	if e := utils.ValidateNetworkName(name); e != nil {
		return "", invalid("name is %q: want letters, digits, dot, hyphen and underscore, and a letter or digit first", name)
	}
	return name, nil
}

// validName checks a name whose error would not say which key it was in.
func validName(from, what, name string) error {
	if err := entry.ValidateName(what, name); err != nil {
		return invalid("%s: %v", from, err)
	}
	return nil
}

// maxRanges is how many ranges a set has at most. host-local has no limit, and
// takes minutes for some thousand: it compares each with each.
const maxRanges = 1024

// rangeText is a range as it is written, with host-local's keys.
type rangeText struct {
	at         string
	Subnet     string `json:"subnet"`
	RangeStart string `json:"rangeStart,omitempty"`
	RangeEnd   string `json:"rangeEnd,omitempty"`
	Gateway    string `json:"gateway,omitempty"`
}

// setText is a range set as it is written.
type setText struct {
	at     string
	ranges []rangeText
}

// handOut reads what the network hands out: its inline ranges or a named pool.
func (l *loader) handOut(n *Network, top, ipam *object) error {
	n.Pool = n.Name
	pool, err := ipam.text("pool")
	if err == nil && pool != "" {
		if err = validName(ipam.at("pool"), "pool", pool); err == nil {
			n.Pool, n.Named = pool, true
		}
	}
	if err := l.soft(err); err != nil {
		return err
	}
	return l.soft(l.inline(n, top, ipam))
}

// inline reads the inline ranges, which a named pool excludes.
func (l *loader) inline(n *Network, top, ipam *object) error {
	sets, err := l.writtenSets(top, ipam)
	switch {
	case err != nil:
		return err
	case n.Named && len(sets) > 0:
		return invalid("ipam.pool is %q and there are ranges too (%s): remove one of them", n.Pool, sets[0].at)
	case n.Named:
		return nil
	case len(sets) == 0:
		return invalid("there is nothing to hand out: set ipam.subnet, ipam.ranges or ipam.pool")
	}
	if err := validName("the pool of inline ranges is named after the network", "name", n.Name); err != nil {
		return err
	}
	for _, set := range sets {
		l.sets = append(l.sets, set.at)
	}
	n.RangeSets, err = completed(sets, n.CNIVersion)
	return err
}

// writtenSets returns the range sets in host-local's order: those of the
// runtime, the one of ipam itself, those of ipam.ranges.
func (l *loader) writtenSets(top, ipam *object) ([]setText, error) {
	var sets []setText
	runtime, err := top.object("runtimeConfig")
	if err != nil {
		return nil, err
	}
	if runtime != nil {
		if sets, err = l.setList(sets, runtime, "ipRanges"); err != nil {
			return nil, err
		}
	}
	// A subnet of the wrong type is for readRange to refuse.
	if subnet, err := ipam.text("subnet"); err != nil || subnet != "" {
		r, err := readRange("ipam", ipam)
		if err != nil {
			return nil, err
		}
		sets = append(sets, setText{"ipam.subnet", []rangeText{r}})
	} else {
		for _, key := range rangeKeys {
			if ipam.get(key) != nil {
				l.warn("%s is ignored: it says something of ipam.subnet, which is not set", ipam.at(key))
			}
		}
	}
	return l.setList(sets, ipam, "ranges")
}

func (l *loader) setList(sets []setText, o *object, key string) ([]setText, error) {
	elements, err := o.list(key, exampleRanges)
	if err != nil {
		return nil, err
	}
	for i, element := range elements {
		set := setText{at: fmt.Sprintf("%s[%d]", o.at(key), i)}
		raws, err := list(set.at, `[{"subnet": "10.22.0.0/16"}]`, element)
		if err != nil {
			return nil, err
		}
		if len(raws) > maxRanges {
			return nil, invalid("%s has %d ranges: at most %d", set.at, len(raws), maxRanges)
		}
		for j, raw := range raws {
			at := fmt.Sprintf("%s[%d]", set.at, j)
			r, err := newObject(at, at+".", raw)
			if err != nil {
				return nil, err
			}
			if err := l.soft(r.check(rangeKeys, nil)); err != nil {
				return nil, err
			}
			text, err := readRange(at, r)
			if err != nil {
				return nil, err
			}
			set.ranges = append(set.ranges, text)
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// readRange reads a range and checks that its parts can be read at all, so that
// host-local's code, which does not say where a value was, need not.
func readRange(at string, o *object) (rangeText, error) {
	r := rangeText{at: at}
	for key, to := range map[string]*string{
		"subnet": &r.Subnet, "rangeStart": &r.RangeStart, "rangeEnd": &r.RangeEnd, "gateway": &r.Gateway,
	} {
		text, err := o.text(key)
		if err != nil {
			return r, err
		}
		if text != "" && key != "subnet" && net.ParseIP(text) == nil {
			return r, invalid("%s is %.80q: want an address, like \"10.22.0.7\"", o.at(key), text)
		}
		*to = text
	}
	if r.Subnet == "" {
		return r, invalid("%s is not set: want a prefix, like \"10.22.0.0/16\"", o.at("subnet"))
	}
	if _, err := types.ParseCIDR(r.Subnet); err != nil {
		return r, invalid("%s is %.80q: want a prefix, like \"10.22.0.0/16\"", o.at("subnet"), r.Subnet)
	}
	if p, err := netip.ParsePrefix(r.Subnet); err == nil && p.Addr().Is4In6() {
		return r, invalid("%s is %q: write it as the IPv4 prefix that it is", o.at("subnet"), r.Subnet)
	}
	return r, nil
}

// completed has host-local judge the ranges and fill in what they leave out.
func completed(sets []setText, cniVersion string) ([][]keyspace.Range, error) {
	if len(sets) > entry.MaxAddresses {
		return nil, invalid("there are %d range sets, each with an address of its own: at most %d", len(sets), entry.MaxAddresses)
	}
	var conf struct {
		CNIVersion string `json:"cniVersion"`
		IPAM       struct {
			Ranges [][]rangeText `json:"ranges"`
		} `json:"ipam"`
	}
	conf.CNIVersion = cniVersion
	for _, set := range sets {
		conf.IPAM.Ranges = append(conf.IPAM.Ranges, set.ranges)
	}
	doc, err := json.Marshal(conf)
	if err != nil {
		return nil, invalid("ranges: %v", err)
	}
	judged, _, err := allocator.LoadIPAMConfig(doc, "")
	if err != nil {
		return nil, explain(sets, err)
	}
	out := make([][]keyspace.Range, len(judged.Ranges))
	for i, set := range judged.Ranges {
		for j, r := range set {
			subnet, ok := netipx.FromStdIPNet((*net.IPNet)(&r.Subnet))
			if !ok {
				return nil, invalid("%s: %s is no prefix", sets[i].at, (*net.IPNet)(&r.Subnet))
			}
			filled := keyspace.Range{Subnet: subnet, Start: addr(r.RangeStart), End: addr(r.RangeEnd), Gateway: addr(r.Gateway)}
			if filled.End.Less(filled.Start) { // host-local lets a rangeStart pass that is the broadcast address
				return nil, invalid("%s: rangeStart %s is above the last address of %s that can be handed out, %v: put it lower",
					sets[i].at, sets[i].ranges[j].RangeStart, subnet, filled.End)
			}
			out[i] = append(out[i], filled)
		}
	}
	return out, nil
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// explain says which key host-local's error is about: host-local counts sets in
// an order that nobody sees. It asks the same code in the same order.
func explain(sets []setText, err error) error {
	judged := make([]allocator.RangeSet, len(sets))
	for i, set := range sets {
		if len(set.ranges) == 0 {
			return invalid("%s is an empty range set: put a range in it or remove it", set.at)
		}
		for _, text := range set.ranges {
			var r allocator.Range
			doc, e := json.Marshal(text)
			if e == nil {
				e = json.Unmarshal(doc, &r)
			}
			if e == nil {
				e = r.Canonicalize()
			}
			if e != nil {
				return invalid("%s: %v%s", text.at, e, rangeRemedy(e.Error()))
			}
			judged[i] = append(judged[i], r)
		}
		if e := judged[i].Canonicalize(); e != nil {
			return invalid("%s: %v%s", set.at, e, rangeRemedy(e.Error()))
		}
	}
	for i := range judged {
		for j := range i {
			if judged[j].Overlaps(&judged[i]) {
				return invalid("%s overlaps with %s: an interface gets one address from each, so give each its own range", sets[i].at, sets[j].at)
			}
		}
	}
	return invalid("ranges: %v", err)
}

// rangeRemedy is what to do about an error of host-local that does not say so.
func rangeRemedy(text string) string {
	switch {
	case strings.Contains(text, "too small"):
		return ": it has no address beside network, gateway and broadcast; use a /30 (IPv6: /126) or wider"
	case strings.Contains(text, "mixed address families"):
		return ": a range set gives one address; make a set for IPv4 and one for IPv6"
	case strings.Contains(text, "overlap"):
		return ": make one range of them or move one"
	case strings.HasPrefix(text, "RangeStart"), strings.HasPrefix(text, "RangeEnd"):
		return ": put both ends inside it, and the start not above the end"
	}
	return ""
}

// rules reads what limits the handing out: exclude and the pool's rules.
func (l *loader) rules(n *Network, _, ipam *object) error {
	space, err := ipam.text("addressSpace")
	if err == nil && space != "" {
		if err = validName(ipam.at("addressSpace"), "address space", space); err == nil {
			n.Space = space
		}
	}
	if err := l.soft(err); err != nil {
		return err
	}
	if n.Named {
		for _, key := range []string{"addressSpace", "exclude", "strictAffinity", "blockSize", "cooldown"} {
			if ipam.get(key) == nil {
				continue
			}
			err := invalid("%s is set, but pool %q has its own: remove it here", ipam.at(key), n.Pool)
			if err := l.soft(err); err != nil {
				return err
			}
		}
	}
	if n.StrictAffinity, err = ipam.boolean("strictAffinity"); l.soft(err) != nil {
		return err
	}
	size, err := ipam.number("blockSize")
	if err == nil && size != nil {
		if *size < 1 || *size > MaxBlockSize || bits.OnesCount(uint(*size)) != 1 {
			err = invalid("%s is %d: want a power of two from 1 to %d", ipam.at("blockSize"), *size, MaxBlockSize)
		} else {
			n.BlockSize = *size
		}
	}
	if err := l.soft(err); err != nil {
		return err
	}
	cooldown, err := ipam.text("cooldown")
	if err == nil && cooldown != "" {
		n.Cooldown, err = duration(ipam.at("cooldown"), cooldown, 0, MaxCooldown)
	}
	if err := l.soft(err); err != nil {
		return err
	}
	return l.soft(l.exclude(n, ipam))
}

// exclude reads what must not be handed out, and refuses a range set of which
// nothing remains.
func (l *loader) exclude(n *Network, ipam *object) error {
	texts, err := ipam.texts("exclude", exampleExclude)
	if err != nil {
		return err
	}
	var in, all netipx.IPSetBuilder
	for _, set := range n.RangeSets {
		for _, r := range set {
			in.AddRange(netipx.IPRangeFrom(r.Start, r.End))
		}
	}
	inline, err := in.IPSet()
	if err != nil {
		return invalid("ranges: %v", err)
	}
	for i, text := range texts {
		at := fmt.Sprintf("%s[%d]", ipam.at("exclude"), i)
		r, err := parseExclude(at, text)
		if err != nil {
			return err
		}
		all.AddRange(r)
		if len(n.RangeSets) > 0 && !inline.OverlapsRange(r) {
			l.warn("%s is %q, which is in none of the ranges: it excludes nothing", at, text)
		}
	}
	set, err := all.IPSet()
	if err != nil {
		return invalid("%s: %v", ipam.at("exclude"), err)
	}
	n.Exclude = set
	for i, ranges := range n.RangeSets {
		left := false
		for _, r := range ranges {
			var b netipx.IPSetBuilder
			b.AddRange(netipx.IPRangeFrom(r.Start, r.End))
			b.Remove(r.Subnet.Addr())
			b.Remove(r.Gateway)
			if r.Subnet.Addr().Is4() {
				b.Remove(netipx.PrefixLastIP(r.Subnet))
			}
			b.RemoveSet(set)
			rest, err := b.IPSet()
			if err != nil {
				return invalid("%s: %v", ipam.at("exclude"), err)
			}
			left = left || len(rest.Ranges()) > 0
		}
		if !left {
			first := ranges[0]
			return invalid("%s (%s-%s in %s) has no address left: network, broadcast, gateway (%s) and ipam.exclude take them all; widen the range or exclude less",
				l.sets[i], first.Start, first.End, first.Subnet, first.Gateway)
		}
	}
	return nil
}

// parseExclude reads an address, a prefix or a range of addresses.
func parseExclude(at, text string) (netipx.IPRange, error) {
	wrong := invalid("%s is %.100q: want an address, a prefix or FIRST-LAST, like %s", at, text, exampleExclude)
	if strings.Contains(text, "/") {
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Addr().Is4In6() {
			return netipx.IPRange{}, wrong
		}
		if p != p.Masked() {
			return netipx.IPRange{}, invalid("%s is %q: host bits are set; write %q for all of it or %q for the one address", at, text, p.Masked(), p.Addr())
		}
		return netipx.RangeOfPrefix(p), nil
	}
	a, b, ok := strings.Cut(text, "-")
	if !ok {
		b = a
	}
	first, err := netip.ParseAddr(strings.TrimSpace(a))
	if err != nil || first.Zone() != "" {
		return netipx.IPRange{}, wrong
	}
	last, err := netip.ParseAddr(strings.TrimSpace(b))
	if err != nil || last.Zone() != "" {
		return netipx.IPRange{}, wrong
	}
	first, last = first.Unmap(), last.Unmap()
	if first.Is4() != last.Is4() {
		return netipx.IPRange{}, invalid("%s is %q: its ends are of two address families", at, text)
	}
	if last.Less(first) {
		return netipx.IPRange{}, invalid("%s is %q: the last address is below the first", at, text)
	}
	return netipx.IPRangeFrom(first, last), nil
}

// extras reads what is passed on to the result, and what is ignored.
func (l *loader) extras(n *Network, _, ipam *object) error {
	if dir, err := ipam.text("dataDir"); err != nil {
		if err := l.soft(err); err != nil {
			return err
		}
	} else if dir != "" {
		l.warn("%s is ignored: leases are in etcd; to take over host-local's, run ledger import host-local %s", ipam.at("dataDir"), dir)
	}
	if l.lenient {
		return nil // routes and DNS are for the result of ADD
	}
	routes, err := ipam.list("routes", `[{"dst": "0.0.0.0/0"}]`)
	if err != nil {
		return err
	}
	for i, raw := range routes {
		at := fmt.Sprintf("%s[%d]", ipam.at("routes"), i)
		o, err := newObject(at, at+".", raw)
		if err != nil {
			return err
		}
		r, err := readRoute(o)
		if err != nil {
			return err
		}
		n.Routes = append(n.Routes, r)
	}
	path, err := ipam.text("resolvConf")
	if err != nil || path == "" {
		return err
	}
	n.DNS, err = readResolvConf(ipam.at("resolvConf"), path)
	return err
}

func readRoute(o *object) (*types.Route, error) {
	if err := o.check(routeKeys, nil); err != nil {
		return nil, err
	}
	r := new(types.Route)
	dst, err := o.text("dst")
	if err != nil {
		return nil, err
	}
	prefix, err := types.ParseCIDR(dst)
	if err != nil {
		return nil, invalid("%s is %.80q: want a prefix, like \"0.0.0.0/0\"", o.at("dst"), dst)
	}
	r.Dst = *prefix
	gw, err := o.text("gw")
	if err != nil {
		return nil, err
	}
	if gw != "" {
		if r.GW = net.ParseIP(gw); r.GW == nil {
			return nil, invalid("%s is %.80q: want an address, like \"10.22.0.1\"", o.at("gw"), gw)
		}
	}
	for key, to := range map[string]*int{"mtu": &r.MTU, "advmss": &r.AdvMSS, "priority": &r.Priority} {
		number, err := o.number(key)
		if err != nil {
			return nil, err
		}
		if number != nil {
			*to = *number
		}
	}
	if r.Table, err = o.number("table"); err != nil {
		return nil, err
	}
	if r.Scope, err = o.number("scope"); err != nil {
		return nil, err
	}
	return r, nil
}

// readResolvConf takes from a resolv.conf what host-local takes.
func readResolvConf(at, path string) (dns types.DNS, err error) {
	f, err := openFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return dns, fileErr(at, path, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return dns, fileErr(at, path, err)
	} else if !info.Mode().IsRegular() {
		return dns, invalid("%s: %s is not a regular file", at, path)
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0][0] == '#' || words[0][0] == ';' {
			continue
		}
		switch words[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, words[1])
		case "domain":
			dns.Domain = words[1]
		case "search":
			dns.Search = append(dns.Search, words[1:]...)
		case "options":
			dns.Options = append(dns.Options, words[1:]...)
		}
	}
	if err := lines.Err(); err != nil {
		return types.DNS{}, fileErr(at, path, err)
	}
	return dns, nil
}

// cniArgs are the arguments that runtimes give in CNI_ARGS. The names of the
// fields are the names of the arguments.
type cniArgs struct {
	types.CommonArgs
	IP                         types.UnmarshallableString
	K8S_POD_NAMESPACE          types.UnmarshallableString //nolint:revive,staticcheck // see above
	K8S_POD_NAME               types.UnmarshallableString //nolint:revive,staticcheck // see above
	K8S_POD_UID                types.UnmarshallableString //nolint:revive,staticcheck // see above
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString //nolint:revive,staticcheck // see above
}

// request reads who asks, and for which addresses, in host-local's order.
func (l *loader) request(n *Network, top *object, environment string) error {
	wrongArgs := func(format string, args ...any) error {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "invalid CNI_ARGS", fmt.Sprintf(format, args...))
	}
	var args cniArgs
	if err := types.LoadArgs(environment, &args); err != nil {
		remedy := "want NAME=VALUE;NAME=VALUE"
		if strings.Contains(err.Error(), "unknown args") {
			remedy = "remove them or add IgnoreUnknown=1"
		}
		if err := l.soft(wrongArgs("%v; %s", err, remedy)); err != nil {
			return err
		}
	}
	n.PodUID = string(args.K8S_POD_UID)
	n.Pod = string(args.K8S_POD_NAME)
	if n.Pod != "" && args.K8S_POD_NAMESPACE != "" {
		n.Pod = string(args.K8S_POD_NAMESPACE) + "/" + n.Pod
	}
	for _, text := range []struct {
		name  string
		value *string
		limit int
	}{{"K8S_POD_NAMESPACE and K8S_POD_NAME", &n.Pod, entry.MaxPod}, {"K8S_POD_UID", &n.PodUID, entry.MaxText}} {
		var err error
		switch {
		case len(*text.value) > text.limit:
			err = wrongArgs("%s has %d bytes: at most %d", text.name, len(*text.value), text.limit)
		case !utf8.ValidString(*text.value): // JSON, in etcd, would make another name of it
			err = wrongArgs("%s is not UTF-8: %.80q", text.name, *text.value)
		default:
			continue
		}
		if err := l.soft(err); err != nil {
			return err
		}
		*text.value = ""
	}

	if args.IP != "" {
		a, err := parseRequested("IP", string(args.IP))
		if err != nil {
			err = wrongArgs("IP is %.80q: want an address, with or without a prefix length", string(args.IP))
			if err := l.soft(err); err != nil {
				return err
			}
		} else {
			n.Requested = append(n.Requested, a)
		}
	}
	return l.soft(func() error {
		in, err := top.object("args")
		if err != nil {
			return err
		}
		if in != nil {
			if in, err = in.object("cni"); err != nil {
				return err
			}
		}
		if err := n.addRequested(in); err != nil {
			return err
		}
		if in, err = top.object("runtimeConfig"); err != nil {
			return err
		}
		return n.addRequested(in)
	}())
}

// addRequested adds what the list "ips" of o asks for. o may be nil.
func (n *Network) addRequested(o *object) error {
	if o == nil {
		return nil
	}
	texts, err := o.texts("ips", exampleIPs)
	if err != nil {
		return err
	}
	for i, text := range texts {
		a, err := parseRequested(fmt.Sprintf("%s[%d]", o.at("ips"), i), text)
		if err != nil {
			return err
		}
		if !slices.Contains(n.Requested, a) {
			n.Requested = append(n.Requested, a)
		}
		if len(n.Requested) > entry.MaxAddresses {
			return invalid("%s asks for more than %d addresses, and there is one of each range set", o.at("ips"), entry.MaxAddresses)
		}
	}
	return nil
}

func parseRequested(at, text string) (netip.Addr, error) {
	if parsed := ip.ParseIP(text); parsed != nil {
		if a := addr(parsed.ToIP()); a.IsValid() {
			return a, nil
		}
	}
	return netip.Addr{}, invalid("%s is %.80q: want an address, with or without a prefix length", at, text)
}

// runtime reads what the runtime adds: an earlier result, and for GC the
// attachments that it still has.
func (l *loader) runtime(n *Network, top *object, verb string) error {
	prev, err := prevResult(top, n.CNIVersion)
	if err != nil {
		if verb == "CHECK" {
			return err
		}
		l.note(err)
	}
	n.PrevResult = prev
	if verb != "GC" {
		return nil
	}
	const key = "cni.dev/valid-attachments"
	if slices.Contains(top.twice, key) {
		return invalid("%s is there twice: it says what must not be released, so there can be only one", key)
	}
	elements, err := top.list(key, `[{"containerID": "…", "ifname": "eth0"}]`)
	if err != nil {
		return err
	}
	n.HasValidAttachments = top.get(key) != nil
	for i, raw := range elements {
		at := fmt.Sprintf("%s[%d]", top.at(key), i)
		o, err := newObject(at, at+".", raw)
		if err != nil {
			return err
		}
		var a types.GCAttachment
		if a.ContainerID, err = o.text("containerID"); err != nil {
			return err
		}
		if a.IfName, err = o.text("ifname"); err != nil {
			return err
		}
		// What is not on the list gets released: never guess at half an element.
		if a.ContainerID == "" || a.IfName == "" {
			return invalid("%s has no containerID or no ifname: the runtime must give both", at)
		}
		n.ValidAttachments = append(n.ValidAttachments, a)
	}
	return nil
}

// prevResult returns the earlier result in the newest version's form, or nil.
func prevResult(top *object, cniVersion string) (*current.Result, error) {
	o, err := top.object("prevResult")
	if err != nil || o == nil {
		return nil, err
	}
	// The conversion between versions takes no null.
	for _, key := range []string{"ips", "interfaces", "routes"} {
		elements, err := o.list(key, "[…]")
		if err != nil {
			return nil, err
		}
		for i, raw := range elements {
			if kind(raw) == 'n' {
				return nil, invalid("%s[%d] is null", o.at(key), i)
			}
		}
	}
	result, err := version.NewResult(cniVersion, top.get("prevResult"))
	if err != nil {
		return nil, invalid("prevResult is not a result of CNI version %.20q: %v", cniVersion, err)
	}
	newest, err := current.NewResultFromResult(result)
	if err != nil {
		return nil, invalid("prevResult of CNI version %.20q: %v", cniVersion, err)
	}
	return newest, nil
}
