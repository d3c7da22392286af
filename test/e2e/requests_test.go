package e2e

import (
	"fmt"
	"testing"
)

// TestRequests: a warm ADD and a warm DEL ask etcd twice each, by etcd's own
// count, and the transactions are all they ask.
func TestRequests(t *testing.T) {
	c := newCluster(t)
	for i, x := range []struct {
		what string
		w    network
	}{
		{"one range set", subnet("10.1.0.0/16")},
		{"dual stack", network{name: "dual", ipam: `"ranges": [[{"subnet": "10.2.0.0/16"}], [{"subnet": "fd00::/64"}]]`}},
	} {
		n := c.node(fmt.Sprint("n", i))
		n.call("ADD", "warm", x.w).ok()
		for j := range 5 {
			id := fmt.Sprint("c", j)
			for _, verb := range []string{"ADD", "DEL"} {
				got := c.etcd.RequestsDuring(t, func() { n.call(verb, id, x.w).ok() })
				if len(got) != 1 || got["KV/Txn"] != 2 {
					t.Errorf("%s, warm %s: etcd answered %v, want 2 KV/Txn and nothing else", x.what, verb, got)
				}
			}
		}
		// Full blocks are left behind: on average a new one costs little.
		var sum float64
		const many = 70
		got := c.etcd.RequestsDuring(t, func() {
			for j := range many {
				n.call("ADD", fmt.Sprint("m", j), x.w).ok()
			}
		})
		for _, v := range got {
			sum += v
		}
		if sum > 2*many+6 {
			t.Errorf("%s: %d ADDs, one block's end among them, took %v requests", x.what, many, got)
		}
	}
}
