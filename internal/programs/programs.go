// Package programs builds the plugin and the command for tests that execute them.
package programs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const module = "github.com/ipam-ledger/ipam-ledger/"

// Main builds both into a directory of their own, says where they are, and runs
// the tests; the directory is gone afterwards. TestMain exits with its result.
func Main(m *testing.M, plugin, command *string) int {
	dir, err := os.MkdirTemp("", "ipam-ledger-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// -buildvcs: go's own way fails in a checkout of another user.
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", module+"plugins/ipam-ledger", module+"cmd/ledger")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the programs:", err)
		return 1
	}
	*plugin, *command = filepath.Join(dir, "ipam-ledger"), filepath.Join(dir, "ledger")
	return m.Run()
}
