package containerd

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
)

// Version is the containerd that is built. From 2.1 on it takes bin_dirs, and
// calls STATUS.
const Version = "v2.2.9"

// tags leave out what the tests do not use and what needs C.
const tags = "no_btrfs,no_zfs,no_aufs,no_devmapper,no_tracing"

// The programs of this project and of others that a machine needs.
const (
	module  = "github.com/ipam-ledger/ipam-ledger/"
	plugin  = module + "plugins/ipam-ledger"
	command = module + "cmd/ledger"
	machine = module + "internal/containerd/machine"
	pause   = module + "internal/containerd/pause"
	bridge  = "github.com/containernetworking/plugins/plugins/main/bridge"
)

// Programs are the programs a machine needs, and the registry its image is
// pulled from.
type Programs struct {
	// Dir holds ipam-ledger, ledger, bridge, machine and pause.
	Dir string

	tools    string // holds containerd and its shim
	runc     string
	registry http.Handler
}

// Build builds the programs into dir, and containerd into the checkout's
// bin/tools where it is absent: that takes a minute, once.
func Build(dir string) (*Programs, error) {
	p := &Programs{Dir: dir}
	var err error
	if p.runc, err = exec.LookPath("runc"); err != nil {
		return nil, fmt.Errorf("%w; hack/install-test-deps.sh installs it", err)
	}
	// One call: what they share is built once.
	build := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/", plugin, command, bridge, machine, pause)
	if err := runBuild(build); err != nil {
		return nil, err
	}
	if p.tools, err = tools(); err != nil {
		return nil, err
	}
	if p.registry, err = pauseRegistry(filepath.Join(dir, "pause")); err != nil {
		return nil, fmt.Errorf("packing the pause image: %w", err)
	}
	return p, nil
}

func runBuild(cmd *exec.Cmd, env ...string) error {
	cmd.Env = append(os.Environ(), append([]string{"CGO_ENABLED=0"}, env...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return nil
}

// tools returns the directory that holds containerd, and builds it there if
// need be. Tests of several packages may want it at the same moment: one builds,
// the others wait. What was built appears in one step.
func tools() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("finding the checkout: go list -m: %w", err)
	}
	bin := filepath.Join(strings.TrimSpace(string(out)), "bin", "tools")
	dir := filepath.Join(bin, "containerd-"+Version)
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close() // and so unlocks it
	for {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return "", fmt.Errorf("locking %s: %w", lock.Name(), err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	half, err := os.MkdirTemp(bin, "containerd-building-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(half)
	const path = "github.com/containerd/containerd/v2/cmd/"
	install := exec.Command("go", "install", "-trimpath", "-ldflags", "-s -w -X github.com/containerd/containerd/v2/version.Version="+Version, "-tags", tags,
		path+"containerd@"+Version, path+"containerd-shim-runc-v2@"+Version)
	// Its own go.mod decides, not how this test is built.
	if err := runBuild(install, "GOBIN="+half, "GOFLAGS=", "GOOS=", "GOARCH="); err != nil {
		return "", err
	}
	if err := os.Rename(half, dir); err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

// image is the pause image as machines name it: the registry is on a loopback
// of their own, where any port is free, and where no TLS is asked for.
const (
	registryAddr = "127.0.0.1:5000"
	image        = registryAddr + "/pause:1"
)

// pauseRegistry is a registry that holds the pause image.
func pauseRegistry(program string) (http.Handler, error) {
	binary, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "pause", Mode: 0o755, Size: int64(len(binary))}); err != nil {
		return nil, err
	}
	if _, err := w.Write(binary); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", runtime.GOARCH
	file.Config = v1.Config{Entrypoint: []string{"/pause"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(handler)
	defer server.Close()
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + strings.TrimPrefix(image, registryAddr))
	if err != nil {
		return nil, err
	}
	return handler, remote.Write(ref, img)
}
