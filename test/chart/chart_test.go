package chart

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	crd "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write the files in deploy instead of comparing them")

const (
	plainFile      = "../../deploy/snapmerge.yaml"
	monitoringFile = "../../deploy/monitoring.yaml"
	exampleFile    = "../../deploy/example.yaml"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPlain: what is in deploy is what the chart makes.
func TestPlain(t *testing.T) {
	driver, monitoring, err := plain()
	check(t, err)
	for file, want := range map[string]string{plainFile: driver, monitoringFile: monitoring} {
		if *update {
			check(t, os.WriteFile(file, []byte(want), 0o644))
		}
		have, err := os.ReadFile(file)
		check(t, err)
		if string(have) != want {
			t.Errorf("%s is not what the chart makes; run make deploy-manifests", file)
		}
	}
}

// decode reads a manifest as the API does, and refuses unknown fields.
func decode(t *testing.T, manifest string) runtime.Object {
	t.Helper()
	s := runtime.NewScheme()
	check(t, scheme.AddToScheme(s))
	check(t, snapshot.AddToScheme(s))
	check(t, monitoring.AddToScheme(s))
	check(t, crd.AddToScheme(s))
	o, _, err := serializer.NewCodecFactory(s, serializer.EnableStrict).UniversalDeserializer().Decode([]byte(manifest), nil, nil)
	if err != nil {
		t.Fatalf("%v in\n%s", err, manifest)
	}
	return o
}

// TestStrict: every object has only fields that its kind has.
func TestStrict(t *testing.T) {
	var all []string
	for _, file := range []string{plainFile, monitoringFile, exampleFile} {
		b, err := os.ReadFile(file)
		check(t, err)
		all = append(all, split(string(b))[1:]...) // before the first separator there are comments
	}
	if len(all) < 20 {
		t.Errorf("only %d objects", len(all))
	}
	for _, m := range all {
		decode(t, m)
	}
}

func TestLint(t *testing.T) {
	for _, m := range lint.RunAll(Dir, nil, Namespace).Messages {
		if !strings.Contains(m.Error(), "icon is recommended") {
			t.Error(m)
		}
	}
}

// set is a copy of values with one leaf replaced.
func set(values map[string]any, path []string, leaf any) map[string]any {
	c := maps.Clone(values)
	if c == nil {
		c = map[string]any{}
	}
	if len(path) == 1 {
		c[path[0]] = leaf
		return c
	}
	below, _ := c[path[0]].(map[string]any)
	c[path[0]] = set(below, path[1:], leaf)
	return c
}

// TestEveryValue: there is no value that changes nothing, and none without a case
// here.
func TestEveryValue(t *testing.T) {
	cases := map[string]any{
		"image.repository":                 "elsewhere/snapmerge",
		"image.tag":                        "v9",
		"image.pullPolicy":                 "Never",
		"imagePullSecrets":                 []any{map[string]any{"name": "secret"}},
		"kubeApi.enabled":                  false,
		"kubeletDir":                       "/var/lib/other",
		"stateDir.path":                    "/mnt/pool",
		"stateDir.init":                    false,
		"log.verbosity":                    5,
		"log.format":                       "json",
		"nodeSelector":                     map[string]any{"disk": "fast"},
		"tolerations":                      []any{},
		"node.mergeRate":                   50,
		"node.mergeConcurrency":            2,
		"node.readAhead":                   "sync",
		"node.readPromotion":               true,
		"node.mergePacing":                 false,
		"node.handOver":                    false,
		"node.mergeFloor":                  8,
		"node.metricsPort":                 9999,
		"node.priorityClassName":           "own",
		"node.resources":                   map[string]any{"limits": map[string]any{"cpu": "2"}},
		"keeper.priorityClassName":         "own",
		"keeper.resources":                 map[string]any{"limits": map[string]any{"cpu": "2"}},
		"provisioner.image":                "provisioner:v9",
		"provisioner.capacityPollInterval": "10s",
		"provisioner.resources":            map[string]any{"limits": map[string]any{"cpu": "2"}},
		"snapshotter.image":                "snapshotter:v9",
		"snapshotter.resources":            map[string]any{"limits": map[string]any{"cpu": "2"}},
		"resizer.image":                    "resizer:v9",
		"resizer.replicas":                 2,
		"resizer.priorityClassName":        "own",
		"resizer.resources":                map[string]any{"limits": map[string]any{"cpu": "2"}},

		"node.tracingEndpoint":                          "collector.observability:4317",
		"monitoring.podMonitor.enabled":                 true,
		"monitoring.podMonitor.interval":                "10s",
		"monitoring.podMonitor.labels":                  map[string]any{"release": "prometheus"},
		"monitoring.rules.enabled":                      true,
		"monitoring.rules.labels":                       map[string]any{"release": "prometheus"},
		"monitoring.dashboard.enabled":                  true,
		"monitoring.dashboard.labels.grafana_dashboard": "yes",

		"storageClasses": []any{map[string]any{
			"name": "own", "fsType": "xfs", "default": true, "reclaimPolicy": "Retain", "parameters": map[string]any{"mergeRate": 100},
		}},
		"snapshotClasses": []any{map[string]any{
			"name": "own", "default": true, "deletionPolicy": "Retain", "parameters": map[string]any{"compression": "zstd,3"},
		}},
	}
	b, err := os.ReadFile(filepath.Join(Dir, "values.yaml"))
	check(t, err)
	var values map[string]any
	check(t, yaml.Unmarshal(b, &values))
	for _, name := range leaves("", values) {
		if _, ok := cases[name]; !ok && !strings.Contains(name, "resources.") {
			t.Errorf("value %s has no case", name)
		}
	}
	initial, err := manifests(nil)
	check(t, err)
	for name, v := range cases {
		before, on := initial, map[string]any(nil)
		if path := strings.Split(name, "."); path[0] == "monitoring" && path[2] != "enabled" {
			on = set(nil, []string{path[0], path[1], "enabled"}, true) // else there is nothing to change
			before, err = manifests(on)
			check(t, err)
		}
		have, err := manifests(set(on, strings.Split(name, "."), v))
		check(t, err)
		if slices.Equal(have, before) {
			t.Errorf("%s: %v changes nothing", name, v)
		}
		for _, m := range have {
			decode(t, m)
		}
	}
}

// leaves names all that is set in values.
func leaves(prefix string, values map[string]any) []string {
	var names []string
	for name, v := range values {
		if m, ok := v.(map[string]any); ok && len(m) > 0 {
			names = append(names, leaves(prefix+name+".", m)...)
		} else {
			names = append(names, prefix+name)
		}
	}
	return names
}

// TestSchema: a value that nobody reads, or that cannot be, is refused.
func TestSchema(t *testing.T) {
	for _, c := range []struct {
		path  string
		value any
	}{
		{"mergeRate", 1},
		{"node.mergerate", 1},
		{"node.mergeRate", -1},
		{"node.mergeRate", "fast"},
		{"node.mergePacing", "on"},
		{"node.handOver", "on"},
		{"node.mergeFloor", 0},
		{"kubeApi", "on"},
		{"kubeletDir", "var/lib/kubelet"},
		{"kubeletDir", "/var/lib/kubelet/"},
		{"stateDir", "/var/lib/snapmerge"},
		{"log.format", "yaml"},
		{"image.pullPolicy", "Sometimes"},
		{"provisioner.capacityPollInterval", "60"},
		{"monitoring.enabled", true},
		{"monitoring.podMonitor.interval", "often"},
		{"monitoring.rules.labels", map[string]any{"a": 1}},
		{"node.tracingEndpoint", "collector"},
		{"storageClasses", []any{map[string]any{"name": "a", "fsType": "btrfs"}}},
		{"storageClasses", []any{map[string]any{"name": "a", "fsType": "ext4", "parameters": map[string]any{"rate": "1"}}}},
		{"snapshotClasses", []any{map[string]any{"name": "a", "parameters": map[string]any{"compression": "gz"}}}},
	} {
		if _, err := render(set(nil, strings.Split(c.path, "."), c.value)); err == nil {
			t.Errorf("%s: %v was not refused", c.path, c.value)
		}
	}
}

// TestProperties: what the driver relies on.
func TestProperties(t *testing.T) {
	all, err := manifests(nil)
	check(t, err)
	daemons := map[string]*appsv1.DaemonSet{}
	for _, m := range all {
		if d, ok := decode(t, m).(*appsv1.DaemonSet); ok {
			daemons[d.Name] = d
		}
	}
	keeper, node := daemons["snapmerge-keeper"], daemons["snapmerge-node"]
	if keeper == nil || node == nil {
		t.Fatalf("there are only %v", slices.Collect(maps.Keys(daemons)))
	}
	if keeper.Spec.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType {
		t.Error("an upgrade would replace keepers together with node plugins")
	}
	if fmt.Sprint(keeper.Spec.Template.Spec.Tolerations, keeper.Spec.Template.Spec.NodeSelector) !=
		fmt.Sprint(node.Spec.Template.Spec.Tolerations, node.Spec.Template.Spec.NodeSelector) {
		t.Error("there may be node plugins without a keeper")
	}
	plugin := node.Spec.Template.Spec.Containers[0]
	shared := slices.ContainsFunc(plugin.VolumeMounts, func(m corev1.VolumeMount) bool {
		return m.MountPath == "/var/lib/kubelet" && m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional
	})
	if !shared {
		t.Error("nobody would see the plugin's mounts")
	}
	for _, d := range daemons {
		for _, c := range d.Spec.Template.Spec.Containers {
			ours := strings.HasPrefix(c.Image, "snapmerge/")
			if (c.SecurityContext.Privileged != nil) != ours {
				t.Errorf("privileges of %s", c.Name)
			}
			if len(c.Resources.Requests) == 0 {
				t.Errorf("%s requests nothing", c.Name)
			}
		}
	}
}

// TestFlags: the program has the flags that the chart uses.
func TestFlags(t *testing.T) {
	for name, command := range map[string]string{"snapmerge-keeper": "keeper", "snapmerge-node": "node"} {
		help, err := exec.Command("go", "-C", "../..", "run", "./cmd/snapmerge", command, "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("%s --help: %v: %s", command, err, help)
		}
		all, err := manifests(nil)
		check(t, err)
		for _, m := range all {
			d, ok := decode(t, m).(*appsv1.DaemonSet)
			if !ok || d.Name != name {
				continue
			}
			for _, arg := range d.Spec.Template.Spec.Containers[0].Args[1:] {
				f, _, _ := strings.Cut(arg, "=")
				if !strings.Contains(string(help), " "+f+" ") && !strings.Contains(string(help), " "+f+",") {
					t.Errorf("%s has no flag %s", command, f)
				}
			}
		}
	}
}
