package e2e

import (
	"os"
	"os/exec"
	"testing"
)

// TestBuild: the programs that a node and an operator run build for both
// machines that nodes are.
func TestBuild(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		for _, pkg := range []string{"../../plugins/ipam-ledger", "../../cmd/ledger"} {
			cmd := exec.Command("go", "build", "-o", os.DevNull, pkg)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s for linux/%s: %v\n%s", pkg, arch, err, out)
			}
		}
	}
}
