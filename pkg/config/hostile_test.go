package config

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/ipam-ledger/ipam-ledger/pkg/audit/entry"
)

// FuzzArgs reads any CNI_ARGS: what an ADD takes over can be written down, in an
// entry and in JSON alike, and a DEL never fails for it.
func FuzzArgs(f *testing.F) {
	for _, s := range []string{
		"", "x", "=", ";", "IP=10.1.2.3", "IP=", "IgnoreUnknown=1;x=y", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u",
		"K8S_POD_NAME=\xff", "K8S_POD_UID=\x1b[2J", "K8S_POD_NAME=" + strings.Repeat("p", 600), "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=../c", "IgnoreUnknown=\x00;IP=::1%eth0",
	} {
		f.Add(s)
	}
	doc := []byte(conf(`"subnet": "10.1.2.0/24"`))
	f.Fuzz(func(t *testing.T, args string) {
		for _, verb := range []string{"ADD", "DEL"} {
			n, err := LoadNetwork(verb, doc, args)
			if err != nil {
				if verb == "DEL" {
					t.Fatal(err)
				}
				continue
			}
			if len(n.Pod) > entry.MaxPod || len(n.PodUID) > entry.MaxText || !utf8.ValidString(n.Pod+n.PodUID) {
				t.Fatalf("pod %q, UID %q", n.Pod, n.PodUID)
			}
			for _, ip := range n.Requested {
				if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" {
					t.Fatalf("%v is asked for", ip)
				}
			}
		}
	})
}
