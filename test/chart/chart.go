// Package chart tests the Helm chart and the manifests that are made from it. It
// is a module of its own, so that the product does not depend on Helm.
package chart

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

const (
	// Dir is the chart's directory, as seen from this package's.
	Dir = "../../charts/snapmerge"
	// Namespace is that of the plain manifests.
	Namespace = "snapmerge"

	notes = "NOTES.txt"
)

// render is what `helm template` makes of the chart with the values in place of
// its own: the text of each template, by name.
func render(values map[string]any) (map[string]string, error) {
	c, err := loader.Load(Dir)
	if err != nil {
		return nil, err
	}
	release := common.ReleaseOptions{Name: "snapmerge", Namespace: Namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(c, values, release, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(c, all)
}

// manifests are the objects that the chart makes, one text each, in the order of
// the templates' names.
func manifests(values map[string]any) ([]string, error) {
	files, err := render(values)
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range files {
		if !strings.HasSuffix(name, notes) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var all []string
	for _, name := range names {
		all = append(all, split(files[name])...)
	}
	return all, nil
}

var separator = regexp.MustCompile(`(?m)^---\s*$`)

// split takes a file apart into its documents.
func split(file string) []string {
	var all []string
	for _, doc := range separator.Split(file, -1) {
		if doc = strings.TrimSpace(doc); doc != "" {
			all = append(all, doc)
		}
	}
	return all
}

// header stands before the plain manifests.
const header = `# Made from charts/snapmerge by make deploy-manifests; not to be edited.
#
# The kinds VolumeSnapshot, VolumeSnapshotContent and VolumeSnapshotClass have to
# be known to the cluster before. See docs/kubernetes.md.
---
apiVersion: v1
kind: Namespace
metadata:
  name: %s
  labels:
    # Node plugin and keeper are privileged.
    pod-security.kubernetes.io/enforce: privileged
`

// monitoringHeader stands before the manifests of what is for monitoring.
const monitoringHeader = `# Made from charts/snapmerge by make deploy-manifests; not to be edited.
#
# For snapmerge.yaml, where there are the Prometheus operator and Grafana. Their
# selectors may want labels that are not here. See docs/kubernetes.md.
`

// plain are the files for kubectl: the chart with its own values, and what is added
// if all of monitoring is on.
func plain() (driver, monitoring string, err error) {
	all, err := manifests(nil)
	if err != nil {
		return "", "", err
	}
	more, err := manifests(withMonitoring())
	if err != nil {
		return "", "", err
	}
	more = slices.DeleteFunc(more, func(m string) bool { return slices.Contains(all, m) })
	return fmt.Sprintf(header, Namespace) + join(all), monitoringHeader + join(more), nil
}

func join(manifests []string) string {
	var b strings.Builder
	for _, m := range manifests {
		fmt.Fprintf(&b, "---\n%s\n", m)
	}
	return b.String()
}

// withMonitoring are values with all of monitoring on.
func withMonitoring() map[string]any {
	on := map[string]any{"enabled": true}
	return map[string]any{"monitoring": map[string]any{"podMonitor": on, "rules": on, "dashboard": on}}
}
