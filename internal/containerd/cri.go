package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client is a CRI client.
type Client struct {
	cri.RuntimeServiceClient
	images cri.ImageServiceClient
	conn   *grpc.ClientConn
}

func dial(endpoint string) (*Client, error) {
	soon := backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.2, MaxDelay: 200 * time.Millisecond}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: soon, MinConnectTimeout: timeout}))
	if err != nil {
		return nil, fmt.Errorf("CRI at %s: %w", endpoint, err)
	}
	return &Client{RuntimeServiceClient: cri.NewRuntimeServiceClient(conn), images: cri.NewImageServiceClient(conn), conn: conn}, nil
}

// ready waits until CRI answers, and gives it the image that pods start with.
func (c *Client) ready(ctx context.Context) error {
	for {
		_, err := c.Version(ctx, &cri.VersionRequest{}, grpc.WaitForReady(true))
		if err == nil {
			break
		}
		// It listens before it has found out what it had been running.
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	_, err := c.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}

// Pod is what a kubelet knows of a pod before it runs.
type Pod struct {
	Namespace, Name, UID string
	Attempt              uint32 // counted up each time its sandbox is made anew
}

// Sandbox is the configuration a kubelet would give for it.
func (p Pod) Sandbox(cgroupParent string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:  &cri.PodSandboxMetadata{Name: p.Name, Namespace: p.Namespace, Uid: p.UID, Attempt: p.Attempt},
		Hostname:  p.Name,
		DnsConfig: &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{p.Namespace + ".svc.cluster.local"}, Options: []string{"ndots:5"}},
		Labels: map[string]string{
			"io.kubernetes.pod.name": p.Name, "io.kubernetes.pod.namespace": p.Namespace, "io.kubernetes.pod.uid": p.UID,
		},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: cgroupParent + "/pod" + p.UID,
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_POD},
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
		},
	}
}

// Network is where a sandbox is on the network.
type Network struct {
	IP    netip.Addr
	Netns string // the path of its network namespace, on the machine
	PID   int    // its process, as the machine counts
}

// Network asks where a sandbox is.
func (c *Client) Network(ctx context.Context, id string) (n Network, err error) {
	r, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return n, fmt.Errorf("asking for sandbox %s: %w", id, err)
	}
	if n.IP, err = netip.ParseAddr(r.GetStatus().GetNetwork().GetIp()); err != nil {
		return n, fmt.Errorf("the address of sandbox %s: %w", id, err)
	}
	var detail struct {
		PID         int
		RuntimeSpec struct {
			Linux struct{ Namespaces []struct{ Type, Path string } }
		}
	}
	if err := json.Unmarshal([]byte(r.GetInfo()["info"]), &detail); err != nil {
		return n, fmt.Errorf("what containerd tells of sandbox %s: %w", id, err)
	}
	n.PID = detail.PID
	for _, ns := range detail.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			n.Netns = ns.Path
		}
	}
	if n.PID == 0 || n.Netns == "" {
		return n, fmt.Errorf("no process or no network namespace in what containerd tells of sandbox %s: %s", id, r.GetInfo()["info"])
	}
	return n, nil
}

// NetworkReady is what a kubelet makes of the runtime's status.
func (c *Client) NetworkReady(ctx context.Context) (ready bool, message string, err error) {
	r, err := c.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return false, "", err
	}
	for _, condition := range r.GetStatus().GetConditions() {
		if condition.GetType() == cri.NetworkReady {
			return condition.GetStatus(), condition.GetMessage(), nil
		}
	}
	return false, "", fmt.Errorf("no condition %s in %v", cri.NetworkReady, r)
}
