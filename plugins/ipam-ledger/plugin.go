package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/ipam-ledger/ipam-ledger/pkg/allocator"
	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
	"github.com/ipam-ledger/ipam-ledger/pkg/config"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
	"github.com/ipam-ledger/ipam-ledger/pkg/keyspace"
	"github.com/ipam-ledger/ipam-ledger/pkg/statedir"
)

// plugin is one call's writer with what has to be closed behind it.
type plugin struct {
	*allocator.Writer
	network *config.Network
	store   *etcdstore.Store
	logFile io.Closer
}

// open prepares a call. It talks to nobody yet.
func open(verb string, n *config.Network) (*plugin, error) {
	p := &plugin{network: n}
	log := p.logger(n.LogFile)
	for _, w := range n.Warnings {
		log.Warn(w)
	}
	dir, err := statedir.Open(n.StateDir)
	if err != nil {
		return nil, types.NewError(stateCode(verb, err), "state directory cannot be used", err.Error())
	}
	keys, err := keyspace.New(n.Prefix)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "prefix cannot be used", err.Error())
	}
	p.store = etcdstore.New(etcdstore.FromSettings(n.Settings))
	p.Writer, err = allocator.NewWriter(allocator.Config{
		Writer: entry.Writer{Kind: entry.KindNode, Name: n.Node},
		Store:  p.store, Dir: dir, Keys: keys, Cluster: n.ClusterID,
		Timeout: n.Timeout, LockTimeout: n.LockTimeout, Log: log,
	})
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "node cannot be used", err.Error())
	}
	return p, nil
}

func (p *plugin) close() {
	p.store.Close()
	if p.logFile != nil {
		p.logFile.Close()
	}
}

// logger writes to stderr, which runtimes drop where the plugin fails, and to a
// file that operators may name for that reason.
func (p *plugin) logger(path string) *slog.Logger {
	var w io.Writer = os.Stderr
	level := slog.LevelWarn
	if path != "" {
		level = slog.LevelInfo
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			fmt.Fprintf(os.Stderr, "ipam-ledger: logFile: %v\n", err)
		} else {
			p.logFile = f
			w = io.MultiWriter(os.Stderr, f)
		}
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

func (p *plugin) attachment(args *skel.CmdArgs) keyspace.AttachmentID {
	return keyspace.AttachmentID{Node: p.network.Node, Network: p.network.Name, Container: args.ContainerID, Interface: args.IfName}
}

// checkNames refuses, with 4, an attachment that cannot stand in a key and in an
// entry, before anything is asked of etcd. skel lets some of those through.
func checkNames(args *skel.CmdArgs, n *config.Network) error {
	if err := entry.ValidateAttachment(n.Node, n.Name, args.ContainerID, args.IfName); err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, "attachment cannot be named so", err.Error())
	}
	return nil
}

// contacted notes for STATUS that etcd answered.
func (p *plugin) contacted() {
	if err := p.Dir.Touch("contact"); err != nil {
		p.Log.Warn("the time of contact was not noted", "err", err)
	}
}

// Codes of our own: the specification leaves those from 100 on to plugins.
const (
	codeExhausted    = 100
	codeNotAvailable = 101
	codeNoPool       = 102
	codeMismatch     = 103
	codeIntegrity    = 104
)

// stateCode is what a broken state directory is to the runtime: an I/O failure,
// or where waiting may help (a lock that is held; a DEL, which must come again),
// "try again later".
func stateCode(verb string, err error) uint {
	if verb == "DEL" || errors.Is(err, context.DeadlineExceeded) {
		return types.ErrTryAgainLater
	}
	return types.ErrIOFailure
}

// fail is the one place where errors become CNI codes. Causes go into the
// details: runtimes drop what a failing plugin writes to stderr.
func (p *plugin) fail(verb, what string, err error) error {
	code, msg := uint(types.ErrTryAgainLater), "etcd cannot be reached"
	var tls *etcdstore.TLSError
	switch {
	case errors.Is(err, allocator.ErrIntegrity):
		code, msg = codeIntegrity, "the ledger refuses"
	case errors.Is(err, allocator.ErrNotInitialised):
		code, msg = types.ErrInvalidNetworkConfig, "the ledger is not initialised"
	case errors.Is(err, allocator.ErrExhausted):
		code, msg = codeExhausted, "no address is free"
	case errors.Is(err, allocator.ErrNotAvailable):
		code, msg = codeNotAvailable, "requested address is not available"
	case errors.Is(err, allocator.ErrNoPool):
		code, msg = codeNoPool, "no such pool"
	case errors.Is(err, allocator.ErrMismatch):
		code, msg = codeMismatch, "attachment differs from prevResult"
	case errors.Is(err, allocator.ErrUnknownOutcome):
		msg = "not confirmed by etcd; calling again is safe"
	case errors.Is(err, allocator.ErrNoSpace):
		msg = "etcd is out of space"
	case errors.Is(err, allocator.ErrState):
		code, msg = stateCode(verb, err), "state directory cannot be used"
	case errors.As(err, &tls):
		msg += ": " + tls.Msg
	case errors.Is(err, etcdstore.ErrDenied):
		msg = etcdstore.ErrDenied.Error()
	case errors.Is(err, allocator.ErrNotApplied):
		msg = "etcd refuses the transaction"
	}
	details := strings.ReplaceAll(fmt.Sprintf("%s %s: %v", verb, what, err), "\n", "; ")
	p.Log.Error(msg, "code", code, "details", details)
	return types.NewError(code, msg, details)
}
