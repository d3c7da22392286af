package leak

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Annotations of a mirror pod, which stands in the API for a static pod. Its own
// UID is the API server's; the static pod's, which the runtime passes to CNI, is
// in these (k8s.io/kubernetes, pkg/kubelet/types/constants.go).
const (
	configMirror = "kubernetes.io/config.mirror"
	configHash   = "kubernetes.io/config.hash"
)

// Pods are all pods of a cluster, or of several.
type Pods struct {
	uids  map[string]bool
	names map[string]bool // namespace/name
	count int
}

// Len is how many pods there are.
func (p *Pods) Len() int { return p.count }

// Has implements List. A lease is its pod's by UID, as a name may come back with
// another pod; by name where only that was recorded.
func (p *Pods) Has(l *Lease) (has, tells bool) {
	switch {
	case !l.ofPod():
		return false, false
	case l.Value.PodUID != "":
		return p.uids[l.Value.PodUID], true
	}
	return p.names[l.Value.Pod], true
}

// Add reads what 'kubectl get pods --all-namespaces -o json' writes (a v1 List or
// PodList). It fails, and adds nothing, for anything else, for a list that is cut
// off or only a part, and for one without a pod.
func (p *Pods) Add(r io.Reader) error {
	type pod struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Namespace   string            `json:"namespace"`
			Name        string            `json:"name"`
			UID         string            `json:"uid"`
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	var list struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Continue string `json:"continue"`
		} `json:"metadata"`
		Items []pod `json:"items"`
	}
	d := json.NewDecoder(r)
	switch err := d.Decode(&list); {
	case errors.Is(err, io.EOF):
		return errors.New("it is empty; want what 'kubectl get pods --all-namespaces -o json' writes")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("it is cut off in the middle")
	case err != nil:
		return fmt.Errorf("it is no JSON list of pods: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the list; give each list by a --pods of its own")
	}
	switch {
	case list.Kind != "List" && list.Kind != "PodList":
		return fmt.Errorf("its kind is %.40q; want List or PodList, as 'kubectl get pods --all-namespaces -o json' writes it", list.Kind)
	case list.Metadata.Continue != "":
		return errors.New("it is only a part of the pods (metadata.continue is set): read them all")
	case len(list.Items) == 0:
		return errors.New("there is no pod in it; a cluster without one has nothing to free either, so this list is not believed")
	}
	for i, x := range list.Items {
		if x.Kind != "Pod" && (x.Kind != "" || list.Kind != "PodList") {
			return fmt.Errorf("item %d is a %.40q, not a Pod", i, x.Kind)
		}
		if x.Metadata.UID == "" || x.Metadata.Name == "" || x.Metadata.Namespace == "" {
			return fmt.Errorf("item %d (%.80q) has no namespace, name or uid", i, x.Metadata.Name)
		}
	}
	if p.uids == nil {
		p.uids, p.names = map[string]bool{}, map[string]bool{}
	}
	for _, x := range list.Items {
		p.names[x.Metadata.Namespace+"/"+x.Metadata.Name] = true
		for _, uid := range []string{x.Metadata.UID, x.Metadata.Annotations[configMirror], x.Metadata.Annotations[configHash]} {
			if uid != "" {
				p.uids[uid] = true
			}
		}
	}
	p.count += len(list.Items)
	return nil
}
