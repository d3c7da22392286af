// Package etcdcluster runs a real etcd cluster on this machine, to be shot at:
// several members, each a process of its own, that can be killed, stopped,
// paused, cut off from each other, and given a slow disk. It guarantees that
//
//   - Start returns when the cluster answers, or fails and leaves nothing running;
//   - all of it listens on loopback, and every URL stays the same over restarts;
//   - the members end with this process, however that ends, and with Close.
//
// What can fail: the program forgot to call Main, a member exits by itself (its
// log says why: Log), the system gives no process or port.
//
// # Members
//
// A member is this very program, executed again: Main, called first thing in
// main or TestMain, runs etcd and does not return where Start set it up so.
//
// # Links
//
// Traffic between members goes through forwarders in this process, one in front
// of each member; they tell by its socket which member a connection comes from,
// so that a link can be cut in one direction, too. A link that is cut keeps its
// connections and passes nothing: what was sent arrives after Heal, as with a
// network that drops packets for a while. With ClientLinks clients are led
// through forwarders as well. (etcd's own pkg/v3/proxy listens on all addresses
// of the machine, and cannot tell who is calling, so that with it a member that
// is cut off still hears the others.)
//
// # Disk
//
// SlowDisk holds back each fsync and fdatasync of a member (seccomp's user
// notification), all else of it runs at full speed. That is what etcd feels of a
// slow disk: it waits for the log before it answers, and for the database at
// each batch. What it does not show is reads that stall.
//
// It imports etcd's server and client, and nothing of this project.
package etcdcluster
