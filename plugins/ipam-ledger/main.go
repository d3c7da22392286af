// Ipam-ledger is a CNI IPAM plugin that allocates pod addresses cluster-wide
// from pools kept in etcd, and puts each change on the record in the same
// transaction.
//
// It follows the CNI specification 1.1.0 (https://www.cni.dev/docs/spec/), and
// answers every version from 0.3.0 up. Its configuration is host-local's, with
// "etcd" and a few keys more: docs/configuration.md. What it answers when
// something fails is in docs/errors.md.
//
// Nothing is resident: a call connects to etcd, takes the lock of the node's
// state directory, commits one transaction and ends. stdout carries the result
// alone; logs go to stderr and, where logFile is set, to that file.
package main

import (
	"github.com/containernetworking/cni/pkg/skel"
	cniversion "github.com/containernetworking/cni/pkg/version"
)

// version is set when a release is built.
var version = "devel"

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add:    add,
		Del:    del,
		Check:  check,
		GC:     gc,
		Status: status,
	}, cniversion.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"), "CNI IPAM plugin ipam-ledger "+version)
}
