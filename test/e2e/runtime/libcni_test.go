package runtime

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// crio is what CRI-O does with a network: libcni, on the machine, as a node of
// its own, with a cache of its own.
type crio struct {
	*world
	node string
	list *libcni.NetworkConfigList
	cni  *libcni.CNIConfig
}

func (w *world) crio(node string) *crio {
	w.t.Helper()
	w.node(node, "/var/lib/"+node)
	c := &crio{world: w, node: node}
	c.list = c.parse(bridge)
	c.forgetCache("cache")
	return c
}

// parse makes the configuration list of which plugin is the beginning.
func (c *crio) parse(plugin string) *libcni.NetworkConfigList {
	c.t.Helper()
	list, err := libcni.NetworkConfFromBytes([]byte(conflist(c.config(c.node), plugin)))
	if err != nil {
		c.t.Fatal(err)
	}
	return list
}

// forgetCache goes on with an empty cache.
func (c *crio) forgetCache(name string) {
	c.cni = libcni.NewCNIConfigWithCacheDir([]string{programs.Dir}, filepath.Join(c.Dir, "cni", c.node+"-"+name), nil)
}

// add makes a network namespace on the machine, and adds it to the network.
func (c *crio) add(container string) netip.Addr {
	c.t.Helper()
	rt := &libcni.RuntimeConf{
		ContainerID: container, NetNS: "/run/netns-of-" + container, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", container}, {"K8S_POD_UID", "uid-of-" + container}, {"K8S_POD_INFRA_CONTAINER_ID", container}},
	}
	var ip netip.Addr
	err := c.Do(func() error {
		// The name holds it; who has opened it keeps nothing.
		if out, err := exec.Command("sh", "-c", `: >"$0" && exec unshare --net="$0" true`, rt.NetNS).CombinedOutput(); err != nil {
			return fmt.Errorf("making %s: %w: %s", rt.NetNS, err, out)
		}
		r, err := c.cni.AddNetworkList(c.ctx(), c.list, rt)
		if err != nil {
			return err
		}
		result, err := current.NewResultFromResult(r)
		if err != nil {
			return err
		}
		ip, _ = netip.AddrFromSlice(result.IPs[0].Address.IP)
		ip = ip.Unmap()
		return nil
	})
	if err != nil {
		c.t.Fatalf("adding %s on %s: %v", container, c.node, err)
	}
	return ip
}

func (c *crio) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	c.t.Cleanup(cancel)
	return ctx
}

// gc is what CRI-O does when it starts: it says which containers there are.
func (c *crio) gc(list *libcni.NetworkConfigList, containers ...string) {
	c.t.Helper()
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, id := range containers {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: "eth0"})
	}
	if err := c.Do(func() error { return c.cni.GCNetworkList(c.ctx(), list, args) }); err != nil {
		c.t.Fatalf("GC on %s: %v", c.node, err)
	}
}

func (c *crio) status() error {
	return c.Do(func() error { return c.cni.GetStatusNetworkList(c.ctx(), c.list) })
}

// wantHeld compares what is leased with what containers, by node, have.
func (w *world) wantHeld(want map[string]netip.Addr) {
	w.t.Helper()
	got := map[string]netip.Addr{}
	for _, l := range w.leases() {
		got[l.Attachment.Node+"/"+l.Attachment.Container] = l.Address
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		w.t.Errorf("leased: %v, want %v", got, want)
	}
}

// TestCRIO: GC and STATUS, as CRI-O calls them through libcni. GC frees what is
// not in the list, of this network on this node only.
//
// It does so in two ways. What libcni's cache knows, libcni deletes by itself,
// through bridge. What only we know, we free ourselves, if GC reaches us; the
// bridge plugin does not pass it on. So a configuration list of the same name
// that names our plugin itself does for GC what bridge does not.
func TestCRIO(t *testing.T) {
	w := bareWorld(t)
	one, two := w.crio("crio-1"), w.crio("crio-2")
	held := map[string]netip.Addr{}
	for _, c := range []*crio{one, two} {
		for i := range 4 {
			container := fmt.Sprintf("%s-c%d", c.node, i)
			held[c.node+"/"+container] = c.add(container)
		}
	}
	w.wantHeld(held)
	keep := func(gone ...string) {
		t.Helper()
		for _, g := range gone {
			delete(held, g)
		}
		w.wantHeld(held)
		w.verify()
	}
	direct := one.parse(`{"type": "ipam-ledger", `)

	// Everything is there: nothing is freed.
	one.gc(one.list, "crio-1-c0", "crio-1-c1", "crio-1-c2", "crio-1-c3")
	one.gc(direct, "crio-1-c0", "crio-1-c1", "crio-1-c2", "crio-1-c3")
	keep()

	// Libcni remembers what is gone.
	one.gc(one.list, "crio-1-c0", "crio-1-c1", "crio-1-c2")
	keep("crio-1/crio-1-c3")

	// Libcni has forgotten it. Without a list of what there is, nothing is freed.
	one.forgetCache("lost")
	err := one.Do(func() error { return one.cni.GCNetworkList(one.ctx(), direct, nil) })
	var refused *types.Error
	if !errors.As(err, &refused) || refused.Code != types.ErrInvalidNetworkConfig {
		t.Errorf("GC without a list: %v, want code %d", err, types.ErrInvalidNetworkConfig)
	}
	keep()
	one.gc(direct, "crio-1-c0")
	keep("crio-1/crio-1-c1", "crio-1/crio-1-c2")
	// An empty list is one, too. The other node's containers stay.
	one.gc(direct)
	keep("crio-1/crio-1-c0")
	two.gc(two.list)
	keep("crio-2/crio-2-c0", "crio-2/crio-2-c1", "crio-2/crio-2-c2", "crio-2/crio-2-c3")
	for _, l := range w.log("--op", "release") {
		if want := "uid-of-" + l.Container; l.PodUID != want || l.Node != l.Container[:len("crio-1")] {
			t.Errorf("the log says %+v, want the pod %s on its node", l, want)
		}
	}

	if err := one.status(); err != nil {
		t.Errorf("STATUS: %v", err)
	}
	w.etcd.Stop()
	w.longWithoutContact(filepath.Join(w.Dir, "var-lib", "crio-1"))
	var down *types.Error
	if err := one.status(); !errors.As(err, &down) || down.Code != codeUnavailable {
		t.Errorf("STATUS without etcd: %v, want code %d", err, codeUnavailable)
	}
	w.etcd.Restart(t)
	w.longWithoutContact(filepath.Join(w.Dir, "var-lib", "crio-1"))
	if err := one.status(); err != nil {
		t.Errorf("STATUS with etcd again: %v", err)
	}
}

// codeUnavailable is STATUS's code of the CNI specification for a plugin that
// cannot serve an ADD.
const codeUnavailable = 50
