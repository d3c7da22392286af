package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
)

// netns is a network namespace that nothing but this process's descriptor keeps
// alive: no mount, no name, so it is gone when the process is, however it ends.
type netns struct{ ns ns.NetNS }

func newNetns() (*netns, error) {
	n, err := ns.TempNetNS()
	if err != nil {
		return nil, fmt.Errorf("making a network namespace: %w", err)
	}
	out := &netns{n}
	err = out.do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("setting lo up: %w", err)
		}
		return nil
	})
	if err != nil {
		n.Close()
		return nil, err
	}
	return out, nil
}

// path is what a runtime gives a plugin as CNI_NETNS, and nsenter as --net.
func (n *netns) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.ns.Fd()) }

func (n *netns) close() error { return n.ns.Close() }

// do runs f inside the namespace, on a thread of its own; programs and sockets
// that f starts are inside, too. f must not start goroutines that need to be. A
// panic becomes an error, so that it does not pass by the cleaning up.
func (n *netns) do(f func() error) error {
	return n.ns.Do(func(ns.NetNS) error { return guarded(f) })
}

func guarded(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	return f()
}

// together runs f for 0 to n-1 at the same moment and waits for all of them.
func together(n int, f func(i int) error) error {
	errs := make([]error, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			errs[i] = guarded(func() error { return f(i) })
		})
	}
	close(start)
	wg.Wait()
	return errors.Join(errs...)
}

// whyNoNamespaces tries what the lab needs of the kernel and of our rights and
// returns what is missing, nil if nothing is.
func whyNoNamespaces() error {
	a, err := newNetns()
	if err != nil {
		return err
	}
	defer a.close()
	b, err := newNetns()
	if err != nil {
		return err
	}
	defer b.close()
	if err := makeBridge(a, "probe"); err != nil {
		return err
	}
	if err := makeBridge(b, "probe"); err != nil {
		return err
	}
	return wire(a, "to-b", b, "to-a", "probe")
}

// makeBridge makes a bridge in a node, as bridge would on the first ADD.
func makeBridge(n *netns, name string) error {
	return n.do(func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("making bridge %s: %w", name, err)
		}
		if err := netlink.LinkSetUp(br); err != nil {
			return fmt.Errorf("setting bridge %s up: %w", name, err)
		}
		return nil
	})
}

// wire joins the bridges of two nodes by a pair of interfaces, one in each.
func wire(a *netns, inA string, b *netns, inB, bridge string) error {
	err := a.do(func() error {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: inA},
			PeerName:      inB,
			PeerNamespace: netlink.NsFd(int(b.ns.Fd())),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("making the pair %s, %s: %w", inA, inB, err)
		}
		return plug(inA, bridge)
	})
	if err != nil {
		return err
	}
	return b.do(func() error { return plug(inB, bridge) })
}

func plug(name, bridge string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding %s: %w", name, err)
	}
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("finding bridge %s: %w", bridge, err)
	}
	if err := netlink.LinkSetMaster(link, br); err != nil {
		return fmt.Errorf("plugging %s into %s: %w", name, bridge, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	return nil
}

// relay makes addr, which is on loopback here, answer inside the namespace,
// too: a node reaches etcd though its loopback is another one.
func relay(n *netns, addr string) (stop func(), err error) {
	var l net.Listener
	err = n.do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("relaying %s into a node: %w", addr, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return // stopped
			}
			wg.Go(func() { join(ctx, in, addr) })
		}
	})
	return func() {
		cancel()
		l.Close()
		wg.Wait()
	}, nil
}

// join copies between a connection and addr until either side ends or ctx does.
// A side that cannot be reached looks to the other like one that hung up.
func join(ctx context.Context, in net.Conn, addr string) {
	defer in.Close()
	var d net.Dialer
	out, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return
	}
	defer out.Close()
	done := make(chan struct{}, 2)
	forward := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // whatever ended it, the connection is over
		done <- struct{}{}
	}
	go forward(out, in)
	go forward(in, out)
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// pingTimeout is how long a pod waits for one answer. It leaves the kernel time
// to ask for the neighbour's address three times.
const pingTimeout = 5 * time.Second

// ping sends one ICMP echo request to each target from inside the namespace,
// and returns an error for the first that does not answer.
func ping(ctx context.Context, n *netns, id int, targets []netip.Addr) error {
	return n.do(func() error {
		c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		if err != nil {
			return fmt.Errorf("opening an ICMP socket: %w", err)
		}
		defer c.Close()
		for seq, to := range targets {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := pingOne(c, id, seq, to); err != nil {
				return fmt.Errorf("ping %s: %w", to, err)
			}
		}
		return nil
	})
}

func pingOne(c *icmp.PacketConn, id, seq int, to netip.Addr) error {
	request := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: seq, Data: []byte("ledger-lab")}}
	b, err := request.Marshal(nil)
	if err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(pingTimeout)); err != nil {
		return err
	}
	if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	in := make([]byte, 1500)
	for {
		size, from, err := c.ReadFrom(in)
		if err != nil {
			return err
		}
		// A raw socket also sees the requests of others.
		m, err := icmp.ParseMessage(1, in[:size])
		if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && e.Seq == seq && from.String() == to.String() {
			return nil
		}
	}
}
