package chart

import (
	"maps"
	"strings"
	"testing"

	rbac "k8s.io/api/rbac/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	crd "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	objects "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// TestDefinition: the definition of VolumeMerge is one that the API accepts, with a
// structural schema, and takes what is right and nothing else.
func TestDefinition(t *testing.T) {
	all, err := manifests(nil)
	check(t, err)
	var d *crd.CustomResourceDefinition
	for _, m := range all {
		if c, ok := decode(t, m).(*crd.CustomResourceDefinition); ok {
			d = c
		}
	}
	if d == nil {
		t.Fatal("there is no definition")
	}
	s := runtime.NewScheme()
	install.Install(s)
	s.Default(d)
	// The API does this itself when it stores the definition.
	d.Status.StoredVersions = []string{d.Spec.Versions[0].Name}
	internal := &apiextensions.CustomResourceDefinition{}
	check(t, s.Convert(d, internal, nil))
	if errs := validation.ValidateCustomResourceDefinition(t.Context(), internal); len(errs) > 0 {
		t.Fatal(errs.ToAggregate())
	}
	props := internal.Spec.Versions[0].Schema
	if props == nil {
		props = internal.Spec.Validation
	}
	structural, err := schema.NewStructural(props.OpenAPIV3Schema)
	check(t, err)
	if errs := schema.ValidateStructural(nil, structural); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
	validator, _, err := objects.NewSchemaValidator(props.OpenAPIV3Schema)
	check(t, err)
	for _, c := range []struct {
		name, text string
		ok         bool
	}{
		{"empty", "{}", true},
		{"orders", "spec: {paused: true, rateMiBPerSecond: 50}", true},
		{"negative rate", "spec: {rateMiBPerSecond: -1}", false},
		{"high rate", "spec: {rateMiBPerSecond: 1048577}", false},
		{"paused is a word", "spec: {paused: 'yes'}", false},
		{"status", `status: {state: Merging, bytesDone: 5, bytesTotal: 10, startTime: "2026-01-02T03:04:05Z", progress: "50.0%"}`, true},
		{"unknown state", "status: {state: Sleeping}", false},
		{"negative bytes", "status: {bytesDone: -1}", false},
		{"condition", `status: {conditions: [{type: Merged, status: "True", reason: MergeCompleted, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"}]}`, true},
		{"half a condition", `status: {conditions: [{type: Merged, status: "True"}]}`, false},
	} {
		var o map[string]any
		check(t, yaml.Unmarshal([]byte(c.text), &o))
		defaulting.Default(o, structural)
		if spec, _ := o["spec"].(map[string]any); spec["paused"] == nil || spec["rateMiBPerSecond"] == nil {
			t.Errorf("%s: defaults are missing: %v", c.name, o)
		}
		if errs := objects.ValidateCustomResource(nil, o, validator); (len(errs) == 0) != c.ok {
			t.Errorf("%s: %v", c.name, errs.ToAggregate())
		}
	}
	unknown := map[string]any{"spec": map[string]any{"pause": true}}
	if pruning.Prune(unknown, structural, true); len(unknown["spec"].(map[string]any)) > 0 {
		t.Errorf("unknown fields stay: %v", unknown)
	}
}

// TestWithoutAPI: who does not want the objects has no trace of them.
func TestWithoutAPI(t *testing.T) {
	with, err := manifests(nil)
	check(t, err)
	without, err := manifests(set(nil, []string{"kubeApi", "enabled"}, false))
	check(t, err)
	if len(with)-len(without) != 5 {
		t.Errorf("%d objects with, %d without", len(with), len(without))
	}
	for _, m := range without {
		if _, ok := decode(t, m).(*crd.CustomResourceDefinition); ok {
			t.Error("the definition is there")
		}
	}
}

// TestPermissions: what the node plugin may do by itself is this and no more.
func TestPermissions(t *testing.T) {
	want := map[string]string{
		"volumemerges.snapmerge.io":        "list watch create patch delete",
		"volumemerges/status.snapmerge.io": "patch",
		"persistentvolumeclaims.":          "get",
		"events.":                          "create patch",
	}
	have := map[string]string{}
	all, err := manifests(nil)
	check(t, err)
	for _, m := range all {
		r, ok := decode(t, m).(*rbac.ClusterRole)
		if !ok || r.Name != "snapmerge-volumemerges" {
			continue
		}
		for _, rule := range r.Rules {
			have[strings.Join(rule.Resources, ",")+"."+strings.Join(rule.APIGroups, ",")] = strings.Join(rule.Verbs, " ")
		}
	}
	if !maps.Equal(have, want) {
		t.Errorf("the plugin may %v, want %v", have, want)
	}
}
