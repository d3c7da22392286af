// Package cri asks a container runtime which pod sandboxes it knows, over the
// Kubernetes Container Runtime Interface, version v1.
//
// It lists sandboxes in every state: one that is stopped may still have its
// addresses. A runtime that is starting, and has not read its own records yet,
// answers with an error and never with a short list (containerd and CRI-O both
// serve CRI only after that).
package cri

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is what kubelet allows a runtime's answer, in bytes.
const maxMessage = 16 << 20

// Sandboxes returns the IDs of all sandboxes of the runtime at endpoint
// (unix:///path/to.sock, or a path), each with whether it is ready (running), and
// the runtime's name and version.
func Sandboxes(ctx context.Context, endpoint string) (runtime string, ready map[string]bool, err error) {
	if strings.HasPrefix(endpoint, "/") {
		endpoint = "unix://" + endpoint
	}
	if !strings.HasPrefix(endpoint, "unix:///") {
		return "", nil, fmt.Errorf("CRI endpoint %q: want unix:///path/to/socket", endpoint)
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return "", nil, fmt.Errorf("CRI endpoint %q: %w", endpoint, err)
	}
	defer conn.Close()
	client := runtimev1.NewRuntimeServiceClient(conn)
	version, err := client.Version(ctx, &runtimev1.VersionRequest{})
	if err != nil {
		return "", nil, fmt.Errorf("runtime at %s: %w", endpoint, err)
	}
	list, err := client.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{})
	if err != nil {
		return "", nil, fmt.Errorf("listing the sandboxes of the runtime at %s: %w", endpoint, err)
	}
	ready = make(map[string]bool, len(list.Items))
	for i, s := range list.Items {
		if s.GetId() == "" {
			return "", nil, fmt.Errorf("runtime at %s: sandbox %d of its list has no ID", endpoint, i)
		}
		ready[s.Id] = s.State == runtimev1.PodSandboxState_SANDBOX_READY
	}
	return strings.TrimSpace(version.RuntimeName + " " + version.RuntimeVersion), ready, nil
}
