package main

import (
	"context"
	"strings"

	"github.com/ipam-ledger/ipam-ledger/pkg/access"
	"github.com/ipam-ledger/ipam-ledger/pkg/etcdstore"
)

// ownState is readState for a node's user, whose role reads what concerns the
// node and no other's chains and attachments. doctor says that there is more.
func (d *doctor) ownState(ctx context.Context, r *reader) (*state, error) {
	node := access.Subject{Kind: access.Node, Name: d.loaded.Node}
	if err := node.Validate(); err != nil {
		return nil, err
	}
	src, err := etcdstore.Open(ctx, r.client, r.keys)
	if err != nil {
		return nil, err
	}
	var within [][2]string
	for _, p := range access.Permissions(r.keys, node) {
		if strings.HasPrefix(p.Key, r.keys.Chains()) || p.Key == r.keys.Stop(node.Name) {
			continue // no state; within stops/, which is read
		}
		end := p.End
		if end == "" {
			end = p.Key + "\x00"
		}
		within = append(within, [2]string{p.Key, end})
	}
	src.Within(within)
	st, err := readState(ctx, src)
	if err == nil {
		d.add("role", ok, "", "%s: other nodes' attachments and chains are left out", node)
	}
	return st, err
}
