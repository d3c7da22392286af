package runtime

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// The kernel keeps the neighbours of all namespaces in one table, of 1024 by
// default, and lets go of none that is younger than five seconds. So after each
// few pods have asked all others, all forget.
const forgetAfter = 4

// reachEachOther checks that each pod gets an answer from each other pod.
func (w *world) reachEachOther(all []*sandbox) {
	w.t.Helper()
	var targets []netip.Addr
	for _, s := range all {
		targets = append(targets, s.IP)
	}
	for i, s := range all {
		if err := w.in(s, func() error { return ping(i, targets) }); err != nil {
			w.t.Errorf("%s with %s: %v", s, s.IP, err)
		}
		if i%forgetAfter == forgetAfter-1 || i == len(all)-1 {
			for _, s := range all {
				if err := w.in(s, forgetNeighbours); err != nil {
					w.t.Fatalf("%s: %v", s, err)
				}
			}
		}
	}
}

// in runs f in the network namespace of a sandbox.
func (w *world) in(s *sandbox, f func() error) error {
	return w.Do(func() error {
		ns, err := os.Open(s.Netns)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering %s: %w", s.Netns, err)
		}
		defer runtime.KeepAlive(ns)
		return f()
	})
}

func forgetNeighbours() error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetARPOff(eth0); err != nil {
		return err
	}
	return netlink.LinkSetARPOn(eth0)
}

// ping sends an echo request to all targets and waits for all answers.
func ping(id int, targets []netip.Addr) error {
	c, err := icmp.ListenPacket("ip4:icmp", "0.0.0.0")
	if err != nil {
		return fmt.Errorf("opening an ICMP socket: %w", err)
	}
	defer c.Close()
	waiting := map[netip.Addr]bool{}
	for _, to := range targets {
		waiting[to] = true
		request := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: 1, Data: []byte("ipam-ledger")}}
		b, err := request.Marshal(nil)
		if err != nil {
			return err
		}
		if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return fmt.Errorf("ping %s: %w", to, err)
		}
	}
	// The kernel asks three times, a second apart, for a neighbour's address.
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	in := make([]byte, 1500)
	for len(waiting) > 0 {
		size, from, err := c.ReadFrom(in)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("no answer from %d of %d: %v", len(waiting), len(targets), waiting)
		}
		if err != nil {
			return err
		}
		// A raw socket also sees the requests of others.
		m, err := icmp.ParseMessage(1, in[:size])
		if err != nil || m.Type != ipv4.ICMPTypeEchoReply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id {
			if ip, ok := netip.AddrFromSlice(from.(*net.IPAddr).IP); ok {
				delete(waiting, ip.Unmap())
			}
		}
	}
	return nil
}
