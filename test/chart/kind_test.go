package chart

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestKind: hack/kind-up.sh, which cannot be run here, would make a cluster of three
// nodes with a directory each where the chart keeps the volumes, load the image that
// the chart names, and apply files that exist: the chart, and what test/e2e applies.
func TestKind(t *testing.T) {
	cmd := exec.Command("../../hack/kind-up.sh", "--dry-run")
	cmd.Env = append(os.Environ(), "POOLS=/pools", "CLUSTER=test")
	cmd.Stderr = os.Stderr
	b, err := cmd.Output()
	check(t, err)
	out := string(b)

	_, rest, _ := strings.Cut(out, "--config - <<END\n")
	config, _, ok := strings.Cut(rest, "END\n")
	if !ok {
		t.Fatalf("no configuration in\n%s", out)
	}
	var cluster struct {
		Kind  string `json:"kind"`
		Nodes []struct {
			Role        string `json:"role"`
			ExtraMounts []struct{ HostPath, ContainerPath string }
		} `json:"nodes"`
	}
	check(t, yaml.Unmarshal([]byte(config), &cluster))
	pools := map[string]bool{}
	for _, n := range cluster.Nodes {
		for _, m := range n.ExtraMounts {
			if m.ContainerPath == "/var/lib/snapmerge" {
				pools[m.HostPath] = true
			}
		}
	}
	if cluster.Kind != "Cluster" || len(cluster.Nodes) != 3 || len(pools) != 3 {
		t.Errorf("kind %q, %d nodes, pools %v", cluster.Kind, len(cluster.Nodes), pools)
	}

	manifest, _, err := plain()
	check(t, err)
	for line := range strings.Lines(manifest) {
		if _, image, ok := strings.Cut(line, "image: "); ok && strings.Contains(image, "snapmerge/snapmerge:") {
			if want := "kind load docker-image --name test " + strings.TrimSpace(image) + "\n"; !strings.Contains(out, want) {
				t.Errorf("%q is not in\n%s", want, out)
			}
		}
	}
	if !strings.Contains(manifest, "path: /var/lib/snapmerge\n") {
		t.Error("the chart keeps volumes elsewhere")
	}

	var applied []string
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		for i, w := range words {
			if w == "--filename" || i > 0 && words[i-1] == "--install" && w == "snapmerge" {
				applied = append(applied, words[i+1])
			}
		}
	}
	if len(applied) != 5 || !slices.Contains(applied, "charts/snapmerge") {
		t.Errorf("it applies %v", applied)
	}
	for _, file := range applied {
		if !filepath.IsAbs(file) {
			file = filepath.Join("../..", file)
		}
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}
}

// TestKindScripts: both are scripts of a plain shell, and hack/kind-down.sh takes
// away the cluster that it is told to.
func TestKindScripts(t *testing.T) {
	for _, file := range []string{"../../hack/kind-up.sh", "../../hack/kind-down.sh"} {
		if out, err := exec.Command("sh", "-n", file).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", file, err, out)
		}
	}
	cmd := exec.Command("../../hack/kind-down.sh", "--dry-run")
	cmd.Env = append(os.Environ(), "POOLS="+t.TempDir(), "CLUSTER=test")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "+ kind delete cluster --name test\n") {
		t.Errorf("%v: %s", err, out)
	}
}
