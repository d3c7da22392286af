package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"go4.org/netipx"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
)

// add gives the attachment its addresses. What can be refused is refused before
// the commit; skel itself looks at the netns only afterwards.
func add(args *skel.CmdArgs) error {
	n, err := config.LoadNetwork("ADD", args.StdinData, args.Args)
	if err != nil {
		return err
	}
	if err := checkNames(args, n); err != nil {
		return err
	}
	if err := checkNetns(args); err != nil {
		return err
	}
	p, err := open("ADD", n)
	if err != nil {
		return err
	}
	defer p.close()
	req := allocator.Request{ID: p.attachment(args), PoolName: n.Pool, Requested: n.Requested, Trace: traceID()}
	switch n.Identity {
	case config.IdentityFull:
		req.Pod, req.PodUID = n.Pod, n.PodUID
	case config.IdentityUID:
		req.PodUID = n.PodUID
	}
	if !n.Named {
		req.Pool, err = allocator.NewPool(n.Space, n.Pool, n.RangeSets, n.Exclude, n.StrictAffinity, n.BlockSize, n.Cooldown)
		if err != nil {
			return types.NewError(types.ErrInvalidNetworkConfig, "ranges cannot be used", err.Error())
		}
	}
	a, err := p.Acquire(context.Background(), req)
	if err != nil {
		return p.fail("ADD", req.ID.String(), err)
	}
	p.contacted()
	p.Log.Info("ADD", "attachment", req.ID.String(), "addresses", a.Leases, "acquire", a.Acquire.Short())
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion, Routes: n.Routes, DNS: n.DNS}
	for _, l := range a.Leases {
		ip := &current.IPConfig{Address: *netipx.PrefixIPNet(l.Address)}
		ip.Address.IP = l.Address.Addr().AsSlice()
		if l.Gateway.IsValid() {
			ip.Gateway = l.Gateway.AsSlice()
		}
		result.IPs = append(result.IPs, ip)
	}
	return types.PrintResult(result, n.CNIVersion)
}

// del ends the attachment's lease, or queues that: it fails only where neither
// is possible.
func del(args *skel.CmdArgs) error {
	n, err := config.LoadNetwork("DEL", args.StdinData, args.Args)
	if err != nil {
		return err
	}
	p, err := open("DEL", n)
	if err != nil {
		return err
	}
	defer p.close()
	if err := checkNames(args, n); err != nil {
		// No ADD of that name can have succeeded, and a pod must not hang for it.
		p.Log.Warn("DEL of what cannot have been added", "err", err)
		return nil
	}
	id := p.attachment(args)
	if err := p.Release(context.Background(), id, ""); err != nil {
		return p.fail("DEL", id.String(), err)
	}
	p.Log.Info("DEL", "attachment", id.String())
	return nil
}

// check compares what etcd says with prevResult.
func check(args *skel.CmdArgs) error {
	n, err := config.LoadNetwork("CHECK", args.StdinData, args.Args)
	if err != nil {
		return err
	}
	if err := checkNames(args, n); err != nil {
		return err
	}
	if n.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "CHECK needs prevResult", "prevResult is absent from the network configuration")
	}
	p, err := open("CHECK", n)
	if err != nil {
		return err
	}
	defer p.close()
	var ips []netip.Addr
	for _, ip := range n.PrevResult.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			ips = append(ips, a.Unmap())
		}
	}
	id := p.attachment(args)
	if err := p.Check(context.Background(), id, ips); err != nil {
		return p.fail("CHECK", id.String(), err)
	}
	p.contacted()
	return nil
}

// gc releases what this node holds for this network and the runtime does not
// list. An empty list is a list; an absent one is refused.
func gc(args *skel.CmdArgs) error {
	n, err := config.LoadNetwork("GC", args.StdinData, args.Args)
	if err != nil {
		return err
	}
	if !n.HasValidAttachments {
		return types.NewError(types.ErrInvalidNetworkConfig, "GC needs the list of valid attachments", "cni.dev/valid-attachments is absent or null; an empty list is written []")
	}
	p, err := open("GC", n)
	if err != nil {
		return err
	}
	defer p.close()
	keep := map[keyspace.AttachmentID]bool{}
	for _, a := range n.ValidAttachments {
		keep[keyspace.AttachmentID{Node: n.Node, Network: n.Name, Container: a.ContainerID, Interface: a.IfName}] = true
	}
	released, err := p.GC(context.Background(), n.Name, keep)
	for _, id := range released {
		p.Log.Info("GC", "released", id.String())
	}
	if err != nil {
		return p.fail("GC", n.Name+" on "+n.Node, err)
	}
	p.contacted()
	return nil
}

// How STATUS asks etcd: seldom, as runtimes ask it all the time, and briefly.
const (
	statusEvery   = 30 * time.Second
	statusAgain   = 5 * time.Second // after a question that was not answered well
	statusTimeout = 2 * time.Second
)

// status fails for what is wrong with this node, and never for what is wrong
// with the cluster: runtimes turn it into node readiness, and a cluster gone
// NotReady would evict the very pods that hold the addresses.
func status(args *skel.CmdArgs) error {
	n, err := config.LoadNetwork("STATUS", args.StdinData, args.Args)
	if err != nil {
		return err
	}
	n.Timeout, n.LockTimeout = min(n.Timeout, statusTimeout), min(n.LockTimeout, statusTimeout)
	p, err := open("STATUS", n)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.Identity(); err != nil {
		return p.fail("STATUS", "node "+n.Node, err)
	}
	if err, known := p.known(n); known {
		return err
	}
	if err := p.Dir.Touch("asked"); err != nil {
		return p.fail("STATUS", "node "+n.Node, fmt.Errorf("%w: %w", allocator.ErrState, err))
	}
	err = p.Probe(context.Background())
	var answer *types.Error
	switch {
	case err == nil:
		p.contacted()
	case errors.Is(err, allocator.ErrUnavailable), errors.Is(err, allocator.ErrUnknownOutcome), errors.Is(err, context.DeadlineExceeded):
		p.Log.Warn("STATUS", "err", err)
		answer = unreachable(err)
	default:
		errors.As(p.fail("STATUS", "node "+n.Node, err), &answer)
	}
	if err := p.Dir.SaveAnswer(answer); err != nil {
		p.Log.Warn("STATUS's answer was not kept for the next", "err", err)
	}
	return p.judge(n, answer)
}

// known is STATUS's answer where etcd need not be asked: it was a short while ago.
// Who was refused asks again sooner, and who knows nothing at once.
func (p *plugin) known(n *config.Network) (err error, known bool) {
	asked, ok := p.Dir.Since("asked")
	if !ok {
		return nil, false
	}
	// Jittered, so that the nodes of a cluster do not ask in step.
	if contact, ok := p.Dir.Since("contact"); ok && contact < min(asked, n.StatusGrace) {
		return nil, asked <= statusEvery-rand.N(statusEvery/4) // also another verb's since
	}
	answer := p.Dir.Answer()
	return p.judge(n, answer), answer != nil && asked <= statusAgain
}

// judge makes STATUS's answer of what was found: that etcd does not answer counts
// once it has lasted for the grace.
func (p *plugin) judge(n *config.Network, answer *types.Error) error {
	contact, ever := p.Dir.Since("contact")
	silent := !ever || contact > n.StatusGrace
	switch {
	case answer == nil, answer.Code == pluginNotAvailable && !silent:
		return nil
	case answer.Code != pluginNotAvailable:
		return answer
	}
	since := "since this node started"
	if ever {
		since = "for " + contact.Round(time.Second).String()
	}
	answer.Details = fmt.Sprintf("node %s has had no contact with etcd (%s) %s; run 'ledger doctor' on it%s",
		n.Node, strings.Join(n.Endpoints, ", "), since, answer.Details)
	return answer
}

// pluginNotAvailable is STATUS's code 50 of the specification.
const pluginNotAvailable = 50

// unreachable is the answer that etcd did not answer; judge completes it.
func unreachable(cause error) *types.Error {
	msg, details := "etcd cannot be reached", ": "+strings.ReplaceAll(cause.Error(), "\n", "; ")
	if tls := (*etcdstore.TLSError)(nil); errors.As(cause, &tls) {
		msg += ": " + tls.Msg
	}
	return types.NewError(pluginNotAvailable, msg, details)
}

// checkNetns does before the commit what skel does after it.
func checkNetns(args *skel.CmdArgs) error {
	if o := strings.ToUpper(args.NetnsOverride); o == "TRUE" || o == "1" {
		return nil
	}
	own, err := ns.CheckNetNS(args.Netns)
	switch {
	case err != nil:
		return err
	case own:
		return types.NewError(types.ErrInvalidNetNS, "plugin's netns and netns from CNI_NETNS should not be the same", "")
	}
	return nil
}

// traceID is the W3C trace ID of the request, where the runtime has one.
func traceID() string {
	p := strings.Split(os.Getenv("TRACEPARENT"), "-")
	if len(p) != 4 || len(p[1]) != 32 || strings.Trim(p[1], "0123456789abcdef") != "" || strings.Trim(p[1], "0") == "" {
		return "" // not of https://www.w3.org/TR/trace-context/
	}
	return p[1]
}
