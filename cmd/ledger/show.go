package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// What 'show -o json' writes.
type shown struct {
	Cluster     string          `json:"cluster"`
	EtcdCluster string          `json:"etcdCluster"`
	Epoch       uint64          `json:"epoch"`
	State       keyspace.State  `json:"state"`
	Recovering  bool            `json:"recovering,omitempty"`
	Stops       []keyspace.Stop `json:"stops,omitempty"`
	Revision    int64           `json:"revision"`
	Taken       time.Time       `json:"taken"`
	Etcd        *shownEtcd      `json:"etcd,omitempty"`         // absent for an export
	Certs       []shownCert     `json:"certificates,omitempty"` // where TLS is spoken
	Spaces      []shownSpace    `json:"spaces"`
	Pools       []shownPool     `json:"pools"`
	Nodes       []shownNode     `json:"nodes"`
	Blocks      []shownBlock    `json:"blocks,omitempty"`
	Leases      []shownLease    `json:"leases,omitempty"`
	Unreadable  []string        `json:"unreadable,omitempty"`
}

type shownEtcd struct {
	Endpoint     string   `json:"endpoint"`
	Version      string   `json:"version"`
	Size         int64    `json:"size"`      // bytes of the file
	InUse        int64    `json:"sizeInUse"` // bytes
	Quota        int64    `json:"quota"`     // bytes; 0: not known
	Alarms       []string `json:"alarms,omitempty"`
	PerDay       int64    `json:"bytesPerDay,omitempty"`
	EntriesPer   float64  `json:"entriesPerDay,omitempty"`
	DaysLeft     *float64 `json:"daysLeft"` // null: not known
	DaysLeftNote string   `json:"daysLeftNote,omitempty"`
}

type shownCert struct {
	etcdstore.Cert
	DaysLeft int `json:"daysLeft"` // negative once it has expired
}

type shownSpace struct {
	Space  string `json:"space"`
	Pools  int    `json:"pools"`
	Blocks int    `json:"blocks"`
	Leased uint64 `json:"leased"`
	Held   uint64 `json:"held"`
	Freed  uint64 `json:"freed"`
}

type shownPool struct {
	Space   string `json:"space"`
	Pool    string `json:"pool"`
	Size    string `json:"size,omitempty"` // of a named pool
	Blocks  int    `json:"blocks"`
	Claimed string `json:"claimed"` // addresses in claimed blocks
	Leased  uint64 `json:"leased"`
	Held    uint64 `json:"held"`
	Freed   uint64 `json:"freed"` // free now, leased before
	Free    string `json:"free"`  // in claimed blocks, at most
}

type shownNode struct {
	Node        string    `json:"node"`
	Blocks      int       `json:"blocks"`
	Attachments int       `json:"attachments"`
	Leased      int       `json:"leased"`
	Epoch       uint64    `json:"epoch,omitempty"`
	Head        entry.Ref `json:"head,omitzero"`
	Closed      bool      `json:"closed,omitempty"`
	Machine     string    `json:"machine,omitempty"`

	state string
}

type shownBlock struct {
	Block    string    `json:"block"`
	Node     string    `json:"node"`
	Size     string    `json:"size"`
	Leased   uint64    `json:"leased"`
	Borrowed uint64    `json:"borrowed"`
	Held     uint64    `json:"held"`
	Free     string    `json:"free"`
	Claim    entry.Ref `json:"claim"`
}

type shownLease struct {
	Space      string                `json:"space"`
	Address    netip.Addr            `json:"address"`
	Pool       string                `json:"pool"`
	Attachment keyspace.AttachmentID `json:"attachment"`
	Pod        string                `json:"pod,omitempty"`
	PodUID     string                `json:"podUID,omitempty"`
	Acquire    entry.Ref             `json:"acquire"`
}

func (a *app) show() *cobra.Command {
	var from string
	var blocks, leases bool
	c := &cobra.Command{
		Use:   "show",
		Short: "Pools, nodes and the room that is left",
		Long: `What is in use: address spaces, pools, nodes, and etcd's room.

CLAIMED counts the addresses in blocks that a node has claimed; a pool has more
where nobody has claimed them yet (SIZE says how many in all, for a named pool).
LEASED are held by an attachment, HELD are released and not to be handed out
yet. FREE is what is left of CLAIMED; network, broadcast, gateway and excluded
addresses are still among it.

"Days left" takes the entries of the last day at their mean size in etcd.`,
		Args:        args(0, 0, ""),
		Annotations: formats("table,wide,json,yaml,name"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			var st *state
			var etcd *shownEtcd
			var certs []shownCert
			err := a.read(ctx, from, func(src audit.Source, live *reader) (err error) {
				if st, err = readState(ctx, src); err != nil {
					return err
				}
				if st.meta == nil {
					return fmt.Errorf("%w: %s is absent", errNoLedger, st.keys.Meta())
				}
				if live != nil {
					certs = a.certs(live.store)
					etcd, err = a.room(ctx, live, st)
				}
				return err
			})
			if err != nil {
				return err
			}
			return a.showState(st, etcd, certs, blocks, leases)
		},
	}
	c.Flags().BoolVar(&blocks, "blocks", false, "also each block")
	c.Flags().BoolVar(&leases, "leases", false, "also each lease")
	c.Flags().StringVar(&from, "from", "", "read an export `file` instead of etcd")
	return c
}

// certs are the certificates that this very connection rests on: those in our
// files and the one that etcd showed.
func (a *app) certs(store *etcdstore.Store) (out []shownCert) {
	shown, ok := store.Serving()
	if !ok {
		return nil
	}
	now := a.now()
	files, err := etcdstore.FromSettings(*a.loaded).Files(now)
	if err != nil { // they were replaced just now
		a.warn("%v", err)
	}
	for _, c := range append(files, shown) {
		out = append(out, shownCert{c, c.Days(now)})
	}
	return out
}

func (a *app) showState(st *state, etcd *shownEtcd, certs []shownCert, blocks, leases bool) error {
	now := a.now()
	if etcd == nil {
		now = st.snap.Taken // an export is judged by its own time
	}
	t := st.tally(now)
	v := &shown{
		Cluster: st.meta.Cluster, EtcdCluster: st.snap.EtcdCluster, Epoch: st.meta.Epoch, State: st.meta.State, Recovering: st.meta.Recovering,
		Stops: st.stops, Revision: st.snap.Revision, Taken: st.snap.Taken, Etcd: etcd, Certs: certs, Unreadable: st.unreadable,
		Spaces: []shownSpace{}, Pools: []shownPool{}, Nodes: []shownNode{},
	}
	for id, p := range t.pools {
		v.Pools = append(v.Pools, shownPool{
			Space: id.space, Pool: id.name, Size: number(p.total), Blocks: p.blocks, Claimed: number(p.claimed),
			Leased: p.leased, Held: p.held, Freed: p.freed, Free: number(free(p.claimed, &p.inBlocks)),
		})
	}
	slices.SortFunc(v.Pools, func(a, b shownPool) int { return cmp.Or(cmp.Compare(a.Space, b.Space), cmp.Compare(a.Pool, b.Pool)) })
	for _, p := range v.Pools {
		if n := len(v.Spaces); n == 0 || v.Spaces[n-1].Space != p.Space {
			v.Spaces = append(v.Spaces, shownSpace{Space: p.Space})
		}
		s := &v.Spaces[len(v.Spaces)-1]
		s.Pools, s.Blocks, s.Leased, s.Held, s.Freed = s.Pools+1, s.Blocks+p.Blocks, s.Leased+p.Leased, s.Held+p.Held, s.Freed+p.Freed
	}
	for name, n := range t.nodes {
		s := shownNode{Node: name, Blocks: n.blocks, Attachments: n.attachments, Leased: n.leased, state: "no chain"}
		if n.writer != nil {
			s.Epoch, s.Head, s.Closed, s.Machine = n.writer.Epoch, n.writer.Head(), !n.writer.Closed.IsZero(), n.writer.Machine
			s.state = standing(n.writer, st.meta.Epoch, st.meta.Recovering)
		}
		v.Nodes = append(v.Nodes, s)
	}
	slices.SortFunc(v.Nodes, func(a, b shownNode) int { return cmp.Compare(a.Node, b.Node) })
	if blocks {
		v.Blocks = []shownBlock{}
		for _, b := range t.blocks {
			n := addressesIn(b.Prefix)
			v.Blocks = append(v.Blocks, shownBlock{
				Block: b.BlockID.String(), Node: b.Node, Size: number(n), Leased: b.leased, Borrowed: b.borrowed, Held: b.held,
				Free: number(free(n, &b.use)), Claim: b.Claim,
			})
		}
	}
	if leases {
		v.Leases = []shownLease{}
		for _, at := range st.addresses {
			if at.State != keyspace.Leased {
				continue
			}
			l := shownLease{Space: at.space, Address: at.ip, Pool: at.Pool, Attachment: *at.Holder, Acquire: at.Acquire}
			if att, ok := st.attachments[*at.Holder]; ok {
				l.Pod, l.PodUID = att.Pod, att.PodUID
			}
			v.Leases = append(v.Leases, l)
		}
	}
	if done, err := a.structured(v); done || err != nil {
		return errors.Join(err, a.unreadable(st))
	}
	if a.output == "name" {
		switch {
		case leases:
			for _, l := range v.Leases {
				a.printf("%s\n", l.Address)
			}
		case blocks:
			for _, b := range v.Blocks {
				a.printf("%s\n", b.Block)
			}
		default:
			for _, p := range v.Pools {
				a.printf("%s/%s\n", p.Space, p.Pool)
			}
		}
		return a.unreadable(st)
	}
	a.showText(v)
	return a.unreadable(st)
}

func (a *app) showText(v *shown) {
	state := string(v.State)
	switch {
	case v.Recovering:
		state = a.paint(yellow, "frozen, recovering")
	case v.State != keyspace.Running:
		state = a.paint(yellow, state)
	}
	a.printf("ledger  cluster %s, epoch %d, %s, revision %d\n", v.Cluster, v.Epoch, state, v.Revision)
	if e := v.Etcd; e != nil {
		a.printf("etcd    %s\n", e.text())
		for _, alarm := range e.Alarms {
			a.printf("%s   %s\n", a.paint(red, "ALARM"), printable(alarm))
		}
		a.showCerts(v.Certs)
	} else {
		a.printf("export  of etcd cluster %s, taken %s\n", v.EtcdCluster, stamp(v.Taken))
	}
	for _, s := range v.Stops {
		a.printf("%s by %s since %s: %s\n", a.paint(red, "STOPPED"), s.Node, stamp(s.Time), printable(s.Found))
	}
	if len(v.Pools) == 0 {
		a.printf("\nno address has been handed out yet\n")
	} else {
		a.printf("\n")
		named := slices.ContainsFunc(v.Pools, func(p shownPool) bool { return p.Size != "" })
		t := a.table(pick(named, "SPACE", "POOL", "SIZE", "BLOCKS", "CLAIMED", "LEASED", "HELD", "FREE")...)
		for _, p := range v.Pools {
			t.row(pick(named, p.Space, p.Pool, p.Size, fmt.Sprint(p.Blocks), p.Claimed, fmt.Sprint(p.Leased), fmt.Sprint(p.Held), p.Free)...)
		}
		t.flush()
	}
	if len(v.Spaces) > 1 {
		a.printf("\n")
		t := a.table("SPACE", "POOLS", "BLOCKS", "LEASED", "HELD")
		for _, s := range v.Spaces {
			t.row(s.Space, fmt.Sprint(s.Pools), fmt.Sprint(s.Blocks), fmt.Sprint(s.Leased), fmt.Sprint(s.Held))
		}
		t.flush()
	}
	if len(v.Nodes) > 0 {
		a.printf("\n")
		headers := []string{"NODE", "BLOCKS", "ATTACHMENTS", "LEASED", "HEAD", "STATE"}
		if a.wide() {
			headers = append(headers, "MACHINE")
		}
		t := a.table(headers...)
		for _, n := range v.Nodes {
			row := []string{n.Node, fmt.Sprint(n.Blocks), fmt.Sprint(n.Attachments), fmt.Sprint(n.Leased), a.refText(n.Head), n.state}
			if a.wide() {
				row = append(row, n.Machine)
			}
			t.row(row...)
		}
		t.flush()
	}
	if v.Blocks != nil {
		a.printf("\n")
		t := a.table("BLOCK", "NODE", "SIZE", "LEASED", "BORROWED", "HELD", "FREE", "CLAIM")
		for _, b := range v.Blocks {
			t.row(b.Block, b.Node, b.Size, fmt.Sprint(b.Leased), fmt.Sprint(b.Borrowed), fmt.Sprint(b.Held), b.Free, a.refText(b.Claim))
		}
		t.flush()
	}
	if v.Leases != nil {
		a.printf("\n")
		headers := []string{"ADDRESS", "SPACE", "POOL", "POD", "NODE", "NETWORK", "ACQUIRE"}
		if a.wide() {
			headers = append(headers, "CONTAINER", "INTERFACE")
		}
		t := a.table(headers...)
		for _, l := range v.Leases {
			row := []string{l.Address.String(), l.Space, l.Pool, podText(l.Pod, l.PodUID), l.Attachment.Node, l.Attachment.Network, a.refText(l.Acquire)}
			if a.wide() {
				row = append(row, l.Attachment.Container, l.Attachment.Interface)
			}
			t.row(row...)
		}
		t.flush()
	}
}

// showCerts prints a line about certificates, if there are any.
func (a *app) showCerts(certs []shownCert) {
	if len(certs) == 0 {
		return
	}
	now := a.now()
	var list []string
	for _, c := range certs {
		text := fmt.Sprintf("%s until %s (%s)", c.Kind, c.NotAfter.Format(time.DateOnly), daysLeft(&c.Cert, now))
		switch c.Standing(now) {
		case etcdstore.Valid:
		case etcdstore.EndsSoon:
			text = a.paint(yellow, "RENEW SOON: "+text)
		default:
			text = a.paint(red, "RENEW: "+text)
		}
		list = append(list, text)
	}
	a.printf("TLS     %s\n", strings.Join(list, ", "))
}

// pick leaves the third cell out where no pool has a size to show.
func pick(third bool, cells ...string) []string {
	if third {
		return cells
	}
	return slices.Delete(cells, 2, 3)
}

// unreadable warns of keys whose values nobody of this program wrote.
func (a *app) unreadable(st *state) error {
	if len(st.unreadable) == 0 {
		return nil
	}
	a.warn("%s cannot be read and counts for nothing here (the first: %s); 'ledger verify' says more", count(len(st.unreadable), "key"), st.unreadable[0])
	return wrong
}

func (e *shownEtcd) text() string {
	quota := "the quota is not known (etcd before 3.6 does not tell)"
	if e.Quota > 0 {
		quota = fmt.Sprintf("%.1f%% of the quota of %s", 100*float64(e.InUse)/float64(e.Quota), size(e.Quota))
	}
	left := "days left: unknown (" + e.DaysLeftNote + ")"
	if e.DaysLeft != nil {
		left = fmt.Sprintf("full in %.0f days at %s a day", *e.DaysLeft, size(e.PerDay))
		if *e.DaysLeft > 3650 {
			left = "not full in ten years at the rate of the last day"
		}
	}
	return fmt.Sprintf("%s in use (file %s), %s; %s", size(e.InUse), size(e.Size), quota, left)
}

// status asks the member at the other end of this very connection.
func status(ctx context.Context, c *clientv3.Client) (*pb.StatusResponse, error) {
	return pb.NewMaintenanceClient(c.ActiveConnection()).Status(ctx, &pb.StatusRequest{})
}

// room is how full etcd is, and how fast it fills.
func (a *app) room(ctx context.Context, r *reader, st *state) (*shownEtcd, error) {
	sctx, cancel := context.WithTimeout(ctx, a.loaded.Timeout)
	s, err := status(sctx, r.client)
	cancel()
	if err != nil {
		return nil, fmt.Errorf("asking etcd for its status: %w", err)
	}
	e := &shownEtcd{Endpoint: strings.Join(a.loaded.Endpoints, ","), Version: s.Version, Size: s.DbSize, InUse: s.DbSizeInUse, Quota: s.DbSizeQuota, Alarms: s.Errors}
	g, err := a.growth(ctx, r, st)
	if errors.Is(err, rpctypes.ErrPermissionDenied) {
		e.DaysLeftNote = "a node's role does not count others' entries"
		return e, nil
	} else if err != nil {
		return nil, err
	}
	if g.note != "" {
		e.DaysLeftNote = g.note
		return e, nil
	}
	e.EntriesPer = g.perDay
	e.PerDay = int64(g.perDay * float64(s.DbSizeInUse) / float64(max(1, g.entries)))
	switch {
	case e.Quota == 0:
		e.DaysLeftNote = "the quota is not known"
	case e.PerDay == 0:
		e.DaysLeftNote = "nothing was written in the last day"
	default:
		left := max(0, float64(e.Quota-e.InUse)/float64(e.PerDay))
		e.DaysLeft = &left
	}
	return e, nil
}

type growth struct {
	entries int64   // in etcd
	perDay  float64 // entries a day
	note    string  // why that is not known
}

const (
	window       = 24 * time.Hour // over which growth is taken
	leastHistory = time.Hour      // less of it says nothing
	atOnce       = 100            // gets in one transaction; etcd takes 128
)

// growth finds, by bisection and for all chains at once, the first entry of
// each chain that is not older than a day. Reading all entries would take as
// long as verify.
func (a *app) growth(ctx context.Context, r *reader, st *state) (*growth, error) {
	g := new(growth)
	n, err := r.client.Get(ctx, r.keys.Chains(), clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithRev(st.snap.Revision))
	if err != nil {
		return nil, fmt.Errorf("counting entries: %w", err)
	}
	g.entries = n.Count
	now := a.now()
	since := now.Add(-window)
	type search struct {
		w      liveWriter
		lo, hi uint64 // the first young entry is in [lo, hi]; hi = seq+1: there is none
	}
	var all []*search
	for _, w := range st.writers {
		if w.value.Seq > 0 {
			all = append(all, &search{w, 1, w.value.Seq + 1})
		}
	}
	oldest := now
	for first := true; ; first = false {
		var open []*search
		for _, s := range all {
			if s.lo < s.hi {
				open = append(open, s)
			}
		}
		if len(open) == 0 {
			break
		}
		for part := range slices.Chunk(open, atOnce) {
			var ops []clientv3.Op
			at := make([]uint64, len(part))
			for i, s := range part {
				at[i] = (s.lo + s.hi) / 2
				if first {
					at[i] = 1 // how old the chain is
				}
				ops = append(ops, clientv3.OpGet(r.keys.Entry(s.w.Writer, s.w.value.Chain, at[i]), clientv3.WithSerializable(), clientv3.WithRev(st.snap.Revision)))
			}
			tctx, cancel := context.WithTimeout(ctx, a.loaded.Timeout)
			resp, err := r.client.Txn(tctx).Then(ops...).Commit()
			cancel()
			if errors.Is(err, rpctypes.ErrCompacted) {
				return nil, fmt.Errorf("%w (%d)", etcdstore.ErrCompacted, st.snap.Revision)
			} else if err != nil {
				return nil, fmt.Errorf("reading the ages of entries: %w", err)
			}
			for i, s := range part {
				var t time.Time
				if kvs := resp.Responses[i].GetResponseRange().Kvs; len(kvs) == 1 {
					if e, err := entry.Parse(kvs[0].Value); err == nil {
						t = e.Time
					}
				}
				if t.IsZero() { // gone or edited: verify's business
					s.hi = s.w.value.Seq + 1
					s.lo = s.hi
					continue
				}
				if first && t.Before(oldest) {
					oldest = t
				}
				if t.Before(since) {
					s.lo = at[i] + 1
				} else {
					s.hi = at[i]
				}
			}
		}
	}
	var young uint64
	for _, s := range all {
		young += s.w.value.Seq + 1 - s.lo
	}
	past := min(now.Sub(oldest), window)
	if past < leastHistory {
		g.note = "less than an hour of history"
		return g, nil
	}
	g.perDay = float64(young) * float64(window) / float64(past)
	return g, nil
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}
