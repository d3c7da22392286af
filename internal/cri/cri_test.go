package cri

import (
	"context"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fake is a runtime with a given list.
type fake struct {
	runtimev1.UnimplementedRuntimeServiceServer
	items []*runtimev1.PodSandbox
	err   error
}

func (f *fake) Version(context.Context, *runtimev1.VersionRequest) (*runtimev1.VersionResponse, error) {
	return &runtimev1.VersionResponse{RuntimeName: "fake", RuntimeVersion: "v1"}, nil
}

func (f *fake) ListPodSandbox(_ context.Context, r *runtimev1.ListPodSandboxRequest) (*runtimev1.ListPodSandboxResponse, error) {
	if r.Filter != nil {
		return nil, status.Error(codes.InvalidArgument, "a filter hides sandboxes")
	}
	return &runtimev1.ListPodSandboxResponse{Items: f.items}, f.err
}

// TestSandboxes: all of them whatever their state, or an error that names the socket.
func TestSandboxes(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "cri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	f := new(fake)
	s := grpc.NewServer()
	runtimev1.RegisterRuntimeServiceServer(s, f)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-served
	})

	for _, endpoint := range []string{socket, "unix://" + socket} {
		f.items = []*runtimev1.PodSandbox{{Id: "a", State: runtimev1.PodSandboxState_SANDBOX_READY}, {Id: "b", State: runtimev1.PodSandboxState_SANDBOX_NOTREADY}}
		name, ids, err := Sandboxes(t.Context(), endpoint)
		if err != nil || name != "fake v1" || !maps.Equal(ids, map[string]bool{"a": true, "b": false}) {
			t.Fatalf("%s: %q, %v, %v", endpoint, name, ids, err)
		}
	}
	f.items = nil
	if _, ids, err := Sandboxes(t.Context(), socket); err != nil || ids == nil || len(ids) != 0 {
		t.Fatalf("an empty list: %v, %v", ids, err)
	}
	f.items = []*runtimev1.PodSandbox{{}}
	if _, _, err := Sandboxes(t.Context(), socket); err == nil || !strings.Contains(err.Error(), "has no ID") {
		t.Fatalf("a sandbox without an ID: %v", err)
	}
	f.err = status.Error(codes.Unavailable, "not initialized yet")
	if _, ids, err := Sandboxes(t.Context(), socket); err == nil || ids != nil || !strings.Contains(err.Error(), socket) {
		t.Fatalf("a runtime that is starting: %v, %v", ids, err)
	}
	for _, bad := range []string{"", "tcp://127.0.0.1:1", "unix://relative", "relative.sock"} {
		if _, _, err := Sandboxes(t.Context(), bad); err == nil || !strings.Contains(err.Error(), "want unix:///path/to/socket") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
