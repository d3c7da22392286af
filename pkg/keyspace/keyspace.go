// Package keyspace says where things are in etcd and how they are written there:
// the keys below the prefix and the JSON values of all but entries (package
// entry has those).
//
//	meta                                            Meta
//	stops/NODE                                      Stop
//	pools/POOL                                      Pool
//	addresses/SPACE/4/010.022.000.007               Address
//	addresses/SPACE/6/fd00:0000:…:0007              Address
//	attachments/NODE/NETWORK/CONTAINER/INTERFACE    Attachment
//	blocks/SPACE/POOL/4/010.022.000.000-26          Block
//	writers/KIND/NAME                               Writer
//	chains/KIND/NAME/CHAIN/SEQ                      an entry; SEQ is 16 hex digits
//
// Addresses have a fixed width, so that a range of keys is a range of
// addresses. Every key has one spelling: Parse refuses what the functions here
// would not have built, and Decode refuses values with fields that they do not
// have, so that a stray write is noticed instead of ignored.
//
// The package is pure and imports no etcd client.
package keyspace

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// DefaultPrefix is where everything lives unless configured otherwise.
const DefaultPrefix = "/ipam-ledger/v1/"

// FormatVersion is the version in Meta that this code reads and writes. It rises
// with each change that an older program would misread; a program refuses a
// ledger of any other version.
const FormatVersion = 2

// Keys builds the keys below a prefix.
type Keys struct{ prefix string }

// New returns the keys below prefix, which must start and end with a slash.
func New(prefix string) (Keys, error) {
	if len(prefix) < 2 || prefix[0] != '/' || prefix[len(prefix)-1] != '/' || strings.Contains(prefix, "//") || len(prefix) > 255 {
		return Keys{}, fmt.Errorf("prefix %.300q: want /name/…/ with a slash at both ends, at most 255 bytes", prefix)
	}
	return Keys{prefix}, nil
}

// Prefix is what all keys start with.
func (k Keys) Prefix() string { return k.prefix }

// Meta is the key of Meta.
func (k Keys) Meta() string { return k.prefix + "meta" }

// Stops is the prefix of all stops.
func (k Keys) Stops() string { return k.prefix + "stops/" }

// Stop is the key of a node's Stop.
func (k Keys) Stop(node string) string { return k.Stops() + node }

// Pool is the key of a named pool's spec.
func (k Keys) Pool(name string) string { return k.prefix + "pools/" + name }

// Address is the key of an address in an address space.
func (k Keys) Address(space string, ip netip.Addr) string {
	return k.Addresses() + space + "/" + spell(ip)
}

// Addresses is the prefix of all addresses.
func (k Keys) Addresses() string { return k.prefix + "addresses/" }

// Attachments is the prefix of all attachments.
func (k Keys) Attachments() string { return k.prefix + "attachments/" }

// Attachment is the key of an attachment.
func (k Keys) Attachment(a AttachmentID) string { return k.Attachments() + a.String() }

// NodeAttachments is the prefix of a node's attachments.
func (k Keys) NodeAttachments(node string) string { return k.Attachments() + node + "/" }

// NetworkAttachments is the prefix of a node's attachments to one network.
func (k Keys) NetworkAttachments(node, network string) string {
	return k.NodeAttachments(node) + network + "/"
}

// AllBlocks is the prefix of all claims.
func (k Keys) AllBlocks() string { return k.prefix + "blocks/" }

// Blocks is the prefix of the claims in a pool of an address space.
func (k Keys) Blocks(space, pool string) string { return k.AllBlocks() + space + "/" + pool + "/" }

// Block is the key of a claim.
func (k Keys) Block(b BlockID) string {
	return k.Blocks(b.Space, b.Pool) + spell(b.Prefix.Addr()) + "-" + strconv.Itoa(b.Prefix.Bits())
}

// Writers is the prefix of all writers.
func (k Keys) Writers() string { return k.prefix + "writers/" }

// Writer is the key that a writer swaps on each commit.
func (k Keys) Writer(w entry.Writer) string { return k.Writers() + w.String() }

// Chains is the prefix of all entries.
func (k Keys) Chains() string { return k.prefix + "chains/" }

// Chain is the prefix of one chain's entries.
func (k Keys) Chain(w entry.Writer, c entry.ChainID) string {
	return k.Chains() + w.String() + "/" + c.String() + "/"
}

// Entry is the key of an entry.
func (k Keys) Entry(w entry.Writer, c entry.ChainID, seq uint64) string {
	return k.Chain(w, c) + seqSpelling(seq)
}

func seqSpelling(seq uint64) string {
	s := strconv.FormatUint(seq, 16)
	return "0000000000000000"[len(s):] + s
}

// After returns the first key after all that start with prefix: the end of a
// range read, as in etcd's clientv3.GetPrefixRangeEnd.
func After(prefix string) string {
	b := []byte(prefix)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] < 0xff {
			b[i]++
			return string(b[:i+1])
		}
	}
	return "\x00"
}

// spell writes an address in fixed width, with its family before it.
func spell(ip netip.Addr) string {
	b := make([]byte, 0, 41)
	if ip.Is4() {
		b = append(b, '4', '/')
		for i, o := range ip.As4() {
			if i > 0 {
				b = append(b, '.')
			}
			b = append(b, '0'+o/100, '0'+o/10%10, '0'+o%10)
		}
		return string(b)
	}
	a := ip.As16()
	b = append(b, '6', '/')
	for i := 0; i < 16; i += 2 {
		if i > 0 {
			b = append(b, ':')
		}
		b = hex.AppendEncode(b, a[i:i+2])
	}
	return string(b)
}

func unspell(family, s string) (netip.Addr, error) {
	switch {
	case family == "4" && len(s) == 15:
		var o [4]byte
		for i := range o {
			n, err := strconv.ParseUint(s[4*i:4*i+3], 10, 8)
			if err != nil {
				return netip.Addr{}, fmt.Errorf("address %q: %w", s, err)
			}
			o[i] = byte(n)
		}
		return netip.AddrFrom4(o), nil
	case family == "6" && len(s) == 39:
		if ip, err := netip.ParseAddr(s); err != nil || !ip.Is4In6() {
			return ip, err
		}
	}
	return netip.Addr{}, fmt.Errorf("address %.60q of family %.10q", s, family)
}

// AttachmentID names an attachment and the node it is on.
type AttachmentID struct {
	Node      string `json:"node"`
	Network   string `json:"network"`
	Container string `json:"container"`
	Interface string `json:"interface"`
}

func (a AttachmentID) String() string {
	return a.Node + "/" + a.Network + "/" + a.Container + "/" + a.Interface
}

// BlockID names a block of a pool.
type BlockID struct {
	Space, Pool string
	Prefix      netip.Prefix
}

func (b BlockID) String() string { return b.Space + "/" + b.Pool + "/" + b.Prefix.String() }

// Key is what a key says. Kind is its first part; the fields that belong to the
// kind are set.
type Key struct {
	Kind       string // meta, stops, pools, addresses, attachments, blocks, writers, chains
	Name       string // stops: node; pools: pool
	Space      string
	IP         netip.Addr
	Attachment AttachmentID
	Block      BlockID
	Writer     entry.Writer
	Chain      entry.ChainID
	Seq        uint64
}

// Parse reads a key. It fails for keys that this package would not have built.
func (k Keys) Parse(key string) (Key, error) {
	rel, ok := strings.CutPrefix(key, k.prefix)
	if !ok {
		return Key{}, fmt.Errorf("key %.300q is not below %s", key, k.prefix)
	}
	p := strings.Split(rel, "/")
	out := Key{Kind: p[0]}
	var err error
	again := ""
	switch {
	case rel == "meta":
		again = k.Meta()
	case p[0] == "stops" && len(p) == 2:
		out.Name, again = p[1], k.Stop(p[1])
		err = entry.ValidateName("node", p[1])
	case p[0] == "pools" && len(p) == 2:
		out.Name, again = p[1], k.Pool(p[1])
		err = entry.ValidateName("pool", p[1])
	case p[0] == "addresses" && len(p) == 4:
		out.Space = p[1]
		if out.IP, err = unspell(p[2], p[3]); err == nil {
			again = k.Address(out.Space, out.IP)
			err = entry.ValidateName("space", p[1])
		}
	case p[0] == "attachments" && len(p) == 5:
		out.Attachment = AttachmentID{p[1], p[2], p[3], p[4]}
		again = k.Attachment(out.Attachment)
		err = entry.ValidateAttachment(p[1], p[2], p[3], p[4])
	case p[0] == "blocks" && len(p) == 5:
		addr, size, _ := strings.Cut(p[4], "-")
		var ip netip.Addr
		var n int
		if ip, err = unspell(p[3], addr); err == nil {
			n, err = strconv.Atoi(size)
		}
		if err == nil {
			out.Block = BlockID{p[1], p[2], netip.PrefixFrom(ip, n)}
			if !out.Block.Prefix.IsValid() || out.Block.Prefix.Masked() != out.Block.Prefix {
				err = errors.New("block is not aligned")
			} else {
				again = k.Block(out.Block)
				if err = entry.ValidateName("space", p[1]); err == nil {
					err = entry.ValidateName("pool", p[2])
				}
			}
		}
	case p[0] == "writers" && len(p) == 3:
		if out.Writer, err = entry.ParseWriter(p[1] + "/" + p[2]); err == nil {
			again = k.Writer(out.Writer)
		}
	case p[0] == "chains" && len(p) == 5:
		if out.Writer, err = entry.ParseWriter(p[1] + "/" + p[2]); err != nil {
			break
		}
		if out.Chain, err = entry.ParseChainID(p[3]); err != nil {
			break
		}
		if out.Seq, err = strconv.ParseUint(p[4], 16, 64); err == nil {
			again = k.Entry(out.Writer, out.Chain, out.Seq)
		}
	default:
		err = errors.New("no such key in this format")
	}
	if err == nil && again != key {
		err = fmt.Errorf("its spelling would be %q", again)
	}
	if err != nil {
		return Key{}, fmt.Errorf("key %.300q: %w", key, err)
	}
	return out, nil
}

// State is whether the cluster may allocate.
type State string

// The states of Meta.
const (
	Running State = "running"
	Frozen  State = "frozen"
)

// Meta is the cluster's own key. Only operators write it, and every
// transaction compares it.
type Meta struct {
	Version     int       `json:"version"`
	Cluster     string    `json:"cluster"`     // our cluster ID: a random UUID
	EtcdCluster string    `json:"etcdCluster"` // etcd's cluster ID, 16 hex digits
	Epoch       uint64    `json:"epoch"`       // from 1; one more at each recovery
	State       State     `json:"state"`
	Recovering  bool      `json:"recovering,omitempty"` // from 'recover start' to 'thaw'
	Entry       entry.Ref `json:"entry"`                // the meta entry that wrote this
}

// Validate says what is wrong with a meta that was decoded. That of another
// version is left to who compares versions.
func (m *Meta) Validate() error {
	switch {
	case m.Version < 1:
		return fmt.Errorf("version %d: want 1 or more", m.Version)
	case m.Version != FormatVersion:
		return nil
	case m.Epoch < 1:
		return errors.New("epoch 0: want 1 or more")
	case m.State != Running && m.State != Frozen:
		return fmt.Errorf("state %.80q: want running or frozen", m.State)
	}
	if err := entry.ValidateName("etcdCluster", m.EtcdCluster); err != nil {
		return err
	}
	return entry.ValidateName("cluster", m.Cluster)
}

// EtcdClusterID spells etcd's cluster ID as Meta has it.
func EtcdClusterID(id uint64) string { return fmt.Sprintf("%016x", id) }

// Stop is put by a node that found that etcd went back in time. While any stop
// is present nobody allocates.
type Stop struct {
	Node  string    `json:"node"`
	Found string    `json:"found"` // what it found, for people
	Time  time.Time `json:"time"`  // the node's clock
}

// AddressState says whether an address is held.
type AddressState string

// The states of Address.
const (
	Leased AddressState = "leased"
	Free   AddressState = "free"
)

// Address is who holds an address, or which release freed it. A key that does
// not exist is an address that was never held.
type Address struct {
	State    AddressState  `json:"state"`
	Pool     string        `json:"pool"`
	Holder   *AttachmentID `json:"holder,omitempty"`   // leased
	Acquire  entry.Ref     `json:"acquire,omitzero"`   // leased
	Release  entry.Ref     `json:"release,omitzero"`   // free
	Since    time.Time     `json:"since,omitzero"`     // free: the release entry's time
	Cooldown int64         `json:"cooldown,omitempty"` // free: seconds, as the lease had it
}

// Cooling reports whether a free address waits: whether now is less than its
// cooldown away from its release, in either direction. So a clock that was wrong
// at the release, or is wrong now, costs at most the wait and never the address.
func (a *Address) Cooling(now time.Time) bool {
	return a.State == Free && Cooling(a.Since, now, a.Cooldown)
}

// Until is when a free address stops waiting, if its release's clock was right.
func (a *Address) Until() time.Time { return a.Since.Add(time.Duration(a.Cooldown) * time.Second) }

// Cooling reports whether now is less than cooldown seconds away from since.
func Cooling(since, now time.Time, cooldown int64) bool {
	return now.Sub(since).Abs() < time.Duration(cooldown)*time.Second
}

// Lease is one address of an attachment with what the interface needs of its range.
type Lease struct {
	Address netip.Prefix   `json:"address"` // the address with the length of its subnet
	Gateway netip.Addr     `json:"gateway,omitzero"`
	Range   netipx.IPRange `json:"range,omitzero"` // that the address is of, where it is known
}

// Attachment is the node's view of what an attachment holds.
type Attachment struct {
	Space    string    `json:"space"`
	Pool     string    `json:"pool"`
	Leases   []Lease   `json:"leases"` // one a range set, in their order
	Acquire  entry.Ref `json:"acquire"`
	Cooldown int64     `json:"cooldown,omitempty"` // seconds that its addresses wait after the release: the pool's rule at the acquire
	Pod      string    `json:"pod,omitempty"`      // namespace/name
	PodUID   string    `json:"podUID,omitempty"`
}

// MaxCooldown is how long a released address may wait at most.
const MaxCooldown = entry.MaxCooldown * time.Second

// Validate says what is wrong with a value that was decoded: what no acquire
// would have written.
func (a *Attachment) Validate() error {
	if err := entry.ValidateName("space", a.Space); err != nil {
		return err
	}
	if err := entry.ValidateName("pool", a.Pool); err != nil {
		return err
	}
	if n := len(a.Leases); n == 0 || n > entry.MaxAddresses {
		return fmt.Errorf("%d leases: want 1 to %d", n, entry.MaxAddresses)
	}
	for i, l := range a.Leases {
		ip := l.Address.Addr()
		if !l.Address.IsValid() || ip.Is4In6() {
			return fmt.Errorf("lease %d: %v is no plain address with the length of its subnet", i, l.Address)
		}
		if g := l.Gateway; g.IsValid() && (g.Is4() != ip.Is4() || g.Is4In6() || g.Zone() != "") {
			return fmt.Errorf("lease %d: gateway %v does not go with address %v", i, g, ip)
		}
		if r := l.Range; !r.IsZero() && !r.Contains(ip) {
			return fmt.Errorf("lease %d: address %v is not in its range %v", i, ip, r)
		}
		for _, other := range a.Leases[:i] {
			if other.Address.Addr() == ip {
				return fmt.Errorf("lease %d: address %v stands twice", i, ip)
			}
		}
	}
	switch {
	case a.Acquire.IsZero():
		return errors.New("it names no acquire")
	case a.Cooldown < 0 || a.Cooldown > entry.MaxCooldown:
		return fmt.Errorf("cooldown %d: want 0 to %d seconds", a.Cooldown, entry.MaxCooldown)
	case len(a.Pod) > entry.MaxPod:
		return fmt.Errorf("pod has %d bytes: at most %d", len(a.Pod), entry.MaxPod)
	case len(a.PodUID) > entry.MaxText:
		return fmt.Errorf("podUID has %d bytes: at most %d", len(a.PodUID), entry.MaxText)
	}
	return nil
}

// Block is a claim.
type Block struct {
	Node  string    `json:"node"`
	Claim entry.Ref `json:"claim"` // the entry that claimed it
}

// Writer is the head of a writer's chain.
type Writer struct {
	Chain   entry.ChainID `json:"chain"`
	Seq     uint64        `json:"seq"`
	Hash    entry.Hash    `json:"hash"`
	Key     string        `json:"key"`     // C2SP verifier key
	Machine string        `json:"machine"` // machine ID of the writer's host
	Boot    string        `json:"boot"`    // boot ID of the process that wrote last
	Epoch   uint64        `json:"epoch"`
	Closed  entry.Ref     `json:"closed,omitzero"`    // the operator's close that lets the writer open another chain
	Removed bool          `json:"removed,omitempty"`  // Closed, once nothing is leased on its chains any more
	Recover entry.Ref     `json:"recovered,omitzero"` // the chain's recover entry
	// Disputed is the boot ID of a machine that found another one writing on its
	// chain. Both are refused until an operator closes the chain.
	Disputed string `json:"disputed,omitempty"`
}

// Head is the reference of the chain's last entry.
func (w *Writer) Head() entry.Ref { return entry.Ref{Chain: w.Chain, Seq: w.Seq, Hash: w.Hash} }

// Range is one range of a Pool, as host-local has it.
type Range struct {
	Subnet  netip.Prefix `json:"subnet"`
	Start   netip.Addr   `json:"rangeStart,omitzero"`
	End     netip.Addr   `json:"rangeEnd,omitzero"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
}

// Reserved says why no pool hands out an address of a subnet: it is the network's
// own, the routers' anycast (RFC 4291, 2.6.1) or the broadcast address. It is empty
// where a pool may, as in subnets of one or two addresses.
func Reserved(ip netip.Addr, subnet netip.Prefix) string {
	switch {
	case subnet.Bits() > ip.BitLen()-2:
		return ""
	case ip == subnet.Masked().Addr() && ip.Is4():
		return "its network's own address"
	case ip == subnet.Masked().Addr():
		return "its subnet's routers' anycast address"
	case ip.Is4() && ip == netipx.PrefixLastIP(subnet):
		return "its network's broadcast address"
	}
	return ""
}

// Pool is the spec of a named pool.
type Pool struct {
	Ranges         [][]Range `json:"ranges"`
	Exclude        []string  `json:"exclude,omitempty"`
	Space          string    `json:"addressSpace,omitempty"`
	StrictAffinity bool      `json:"strictAffinity,omitempty"`
	BlockSize      int       `json:"blockSize,omitempty"` // addresses; a power of two
	Cooldown       string    `json:"cooldown,omitempty"`  // duration as in time.ParseDuration
}

// Encode writes a value.
func Encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil { // only values of this package are encoded, and none can fail
		panic(fmt.Sprintf("keyspace: encoding %T: %v", v, err))
	}
	return b
}

// Decode reads a value into v and refuses unknown fields and trailing data.
func Decode(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		// The error of a field may quote all of it, which may be a megabyte.
		return fmt.Errorf("value %.60q: %.300s", b, err.Error())
	}
	if _, err := d.Token(); err != io.EOF {
		return fmt.Errorf("value %.60q: something follows the JSON", b)
	}
	return nil
}
