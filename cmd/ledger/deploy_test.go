package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestDeploy: what the shipped units and manifests run is a command line that
// this program understands.
func TestDeploy(t *testing.T) {
	var lines [][]string
	units, err := filepath.Glob("../../deploy/systemd/*.service")
	if err != nil || len(units) == 0 {
		t.Fatalf("units: %v, %v", units, err)
	}
	for _, file := range units {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if cmd, ok := strings.CutPrefix(line, "ExecStart="); ok {
				lines = append(lines, strings.Fields(cmd))
			}
		}
	}
	b, err := os.ReadFile("../../deploy/kubernetes/ledger-gc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	kinds := []string{}
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		var object struct {
			APIVersion string
			Kind       string
			Metadata   struct{ Name, Namespace string }
			Spec       struct {
				JobTemplate struct {
					Spec struct {
						Template struct {
							Spec struct {
								Containers []struct {
									Command      []string
									VolumeMounts []struct{ Name string }
								}
								Volumes []struct{ Name string }
							}
						}
					}
				}
			}
		}
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			t.Fatalf("%v:\n%s", err, doc)
		}
		if object.APIVersion == "" || object.Kind == "" || object.Metadata.Name == "" {
			t.Fatalf("no object of Kubernetes:\n%s", doc)
		}
		kinds = append(kinds, object.Kind)
		pod := object.Spec.JobTemplate.Spec.Template.Spec
		for _, c := range pod.Containers {
			lines = append(lines, c.Command)
			for _, m := range c.VolumeMounts {
				if !slices.ContainsFunc(pod.Volumes, func(v struct{ Name string }) bool { return v.Name == m.Name }) {
					t.Errorf("%s mounts %s, which is no volume", object.Metadata.Name, m.Name)
				}
			}
		}
	}
	if !slices.Contains(kinds, "CronJob") {
		t.Fatalf("no CronJob among %v", kinds)
	}
	for _, line := range lines {
		if filepath.Base(line[0]) != "ledger" {
			t.Errorf("%v: not this program", line)
			continue
		}
		cmd, rest, err := newApp().root().Find(line[1:])
		if err == nil {
			err = cmd.ParseFlags(rest)
		}
		if err == nil {
			err = cmd.ValidateArgs(cmd.Flags().Args())
		}
		if err != nil || !cmd.HasParent() {
			t.Errorf("%s: %v", strings.Join(line, " "), err)
		}
	}
	if len(lines) < 4 {
		t.Fatalf("only %d command lines were found: %v", len(lines), lines)
	}
}
