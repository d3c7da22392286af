package runtime

import (
	"context"
	"fmt"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/ipam-ledger/ipam-ledger/internal/containerd"
)

// list are the sandboxes that containerd knows; with a UID, those of one pod.
func (w *world) list(ctx context.Context, uid string) ([]*cri.PodSandbox, error) {
	filter := &cri.PodSandboxFilter{}
	if uid != "" {
		filter.LabelSelector = map[string]string{"io.kubernetes.pod.uid": uid}
	}
	r, err := w.CRI().ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: filter})
	if err != nil {
		return nil, fmt.Errorf("listing sandboxes: %w", err)
	}
	return r.GetItems(), nil
}

// sync is what a kubelet does for a pod that should run: it keeps a sandbox that
// is ready, stops and removes the others, and makes a new one, as the next
// attempt, if there is none.
func (w *world) sync(pod containerd.Pod) (*sandbox, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	items, err := w.list(ctx, pod.UID)
	if err != nil {
		return nil, err
	}
	var ready *sandbox
	for _, i := range items {
		pod.Attempt = max(pod.Attempt, i.GetMetadata().GetAttempt()+1)
		if i.GetState() == cri.PodSandboxState_SANDBOX_READY && ready == nil {
			ready = &sandbox{pod: pod, id: i.GetId()}
			ready.pod.Attempt = i.GetMetadata().GetAttempt()
			continue
		}
		if err := w.stop(i.GetId()); err != nil {
			return nil, err
		}
	}
	if ready == nil {
		return w.start(pod)
	}
	ready.Network, err = w.CRI().Network(ctx, ready.id)
	return ready, err
}

// syncAll brings all pods up, with as many retries as a kubelet has in the time.
func (w *world) syncAll(all []containerd.Pod) []*sandbox {
	w.t.Helper()
	out := make([]*sandbox, len(all))
	w.together(len(all), func(i int) (err error) {
		for range 3 {
			if out[i], err = w.sync(all[i]); err == nil {
				return nil
			}
			w.t.Logf("a retry: %v", err)
		}
		return err
	})
	return out
}

// removeListed stops and removes whatever containerd knows.
func (w *world) removeListed() int {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	items, err := w.list(ctx, "")
	if err != nil {
		w.t.Fatal(err)
	}
	w.together(len(items), func(i int) error { return w.stop(items[i].GetId()) })
	return len(items)
}
