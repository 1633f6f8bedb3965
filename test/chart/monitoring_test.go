package chart

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/prometheus/prometheus/promql/parser"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

const (
	metricsPage    = "../../docs/metrics.md"
	kubernetesPage = "../../docs/kubernetes.md"
)

// monitored are the manifests with all of monitoring.
func monitored(t *testing.T) []string {
	t.Helper()
	all, err := manifests(withMonitoring())
	check(t, err)
	return all
}

// known has the metrics that there are: their types, and their labels beside
// those that a scrape adds.
type known struct {
	types  map[string]string
	labels map[string][]string
}

var (
	// metricRow is a row of the tables that the code makes.
	metricRow = regexp.MustCompile("(?m)^\\| `(snapmerge_[a-z_]+)` \\| (counter|gauge|histogram) \\| (.*?) \\|")
	quoted    = regexp.MustCompile("`([a-z_]+)`")
	// scraped are labels that Prometheus and the PodMonitor add.
	scraped = []string{"job", "node", "pod", "container", "instance"}
)

func readKnown(t *testing.T) known {
	t.Helper()
	b, err := os.ReadFile(metricsPage)
	check(t, err)
	k := known{map[string]string{"up": "gauge"}, map[string][]string{"up": {"namespace"}}}
	_, page, _ := strings.Cut(string(b), "<!-- begin Volumes -->")
	volumes, _, _ := strings.Cut(page, "<!-- end Volumes -->")
	for _, m := range metricRow.FindAllStringSubmatch(page, -1) {
		name := m[1]
		k.types[name] = m[2]
		for _, l := range quoted.FindAllStringSubmatch(m[3], -1) {
			k.labels[name] = append(k.labels[name], l[1])
		}
		if strings.Contains(volumes, "`"+name+"`") {
			k.labels[name] = append(k.labels[name], "volume_id", "namespace", "pvc")
		}
	}
	if len(k.types) < 40 {
		t.Fatalf("%s has only %d metrics", metricsPage, len(k.types))
	}
	return k
}

// metric is the name, type and labels of what a selector selects.
func (k known) metric(selected string) (kind string, labels []string, err error) {
	for _, suffix := range []string{"_bucket", "_count", "_sum"} {
		if base, ok := strings.CutSuffix(selected, suffix); ok && k.types[base] == "histogram" {
			return "counter", append([]string{"le"}, k.labels[base]...), nil
		}
	}
	kind, ok := k.types[selected]
	if !ok || kind == "histogram" {
		return "", nil, fmt.Errorf("there is no metric %s", selected)
	}
	return kind, k.labels[selected], nil
}

// expr checks that an expression is one, of metrics and labels that there are,
// and that counters are looked at as such.
func (k known) expr(t *testing.T, text string) {
	t.Helper()
	e, err := parser.NewParser(parser.Options{}).ParseExpr(strings.ReplaceAll(text, "$__rate_interval", "5m"))
	if err != nil {
		t.Errorf("%s: %v", text, err)
		return
	}
	var all []string // labels of anything in it
	parser.Inspect(e, func(n parser.Node, path []parser.Node) error {
		s, ok := n.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		kind, labels, err := k.metric(s.Name)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			return nil
		}
		labels = append(labels, scraped...)
		all = append(all, labels...)
		for _, m := range s.LabelMatchers {
			if m.Name != "__name__" && !slices.Contains(labels, m.Name) {
				t.Errorf("%s: %s has no label %s", text, s.Name, m.Name)
			}
		}
		counted := slices.ContainsFunc(path, func(n parser.Node) bool {
			c, ok := n.(*parser.Call)
			return ok && (c.Func.Name == "rate" || c.Func.Name == "increase")
		})
		if counted != (kind == "counter") {
			t.Errorf("%s: %s is a %s", text, s.Name, kind)
		}
		return nil
	})
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		if a, ok := n.(*parser.AggregateExpr); ok {
			for _, l := range a.Grouping {
				if !slices.Contains(all, l) {
					t.Errorf("%s: nothing has the label %s", text, l)
				}
			}
		}
		return nil
	})
}

// used are the labels that a text of an alert or a legend fills in.
var used = regexp.MustCompile(`\{\{ *(?:\$labels\.)?([a-z_]+) *\}\}`)

func (k known) text(t *testing.T, expr, text string) {
	t.Helper()
	names := regexp.MustCompile(`[a-z_]+`).FindAllString(expr, -1)
	for _, m := range used.FindAllStringSubmatch(text, -1) {
		ok := slices.Contains(scraped, m[1])
		for _, name := range names {
			if _, labels, err := k.metric(name); err == nil {
				ok = ok || slices.Contains(labels, m[1])
			}
		}
		if !ok {
			t.Errorf("%q: %s has no label %s", text, expr, m[1])
		}
	}
}

// TestPages: the pages name no metric that there is not, in full or by how it
// begins.
func TestPages(t *testing.T) {
	k := readKnown(t)
	pages, err := filepath.Glob("../../docs/*.md")
	check(t, err)
	for _, page := range append(pages, "../../README.md") {
		b, err := os.ReadFile(page)
		check(t, err)
		for _, name := range regexp.MustCompile(`\bsnapmerge_[a-z_]+`).FindAllString(string(b), -1) {
			_, _, err := k.metric(name)
			begins := strings.HasSuffix(name, "_") && slices.ContainsFunc(slices.Collect(maps.Keys(k.types)), func(n string) bool {
				return strings.HasPrefix(n, name)
			})
			if k.types[name] == "" && err != nil && !begins {
				t.Errorf("%s: %v", page, err)
			}
		}
	}
}

// TestRules: the alerts are about metrics that there are, and the page for
// operators tells what to do about each.
func TestRules(t *testing.T) {
	k := readKnown(t)
	page, err := os.ReadFile(kubernetesPage)
	check(t, err)
	var alerts []string
	for _, m := range monitored(t) {
		r, ok := decode(t, m).(*monitoring.PrometheusRule)
		if !ok {
			continue
		}
		for _, g := range r.Spec.Groups {
			for _, a := range g.Rules {
				alerts = append(alerts, a.Alert)
				expr := a.Expr.String()
				k.expr(t, expr)
				for _, what := range []string{"summary", "description"} {
					if a.Annotations[what] == "" {
						t.Errorf("%s has no %s", a.Alert, what)
					}
					k.text(t, expr, a.Annotations[what])
				}
				if s := a.Labels["severity"]; s != "warning" && s != "critical" {
					t.Errorf("%s has severity %q", a.Alert, s)
				}
				if !strings.Contains(string(page), "| `"+a.Alert+"` |") {
					t.Errorf("%s does not tell what to do about %s", kubernetesPage, a.Alert)
				}
				if strings.Contains(expr, "up{") && !strings.Contains(expr, `job="`+Namespace+`/snapmerge-node"`) {
					t.Errorf("%s: not the job of the PodMonitor: %s", a.Alert, expr)
				}
			}
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(Snapmerge[A-Za-z]+)` \\|").FindAllStringSubmatch(string(page), -1) {
		if !slices.Contains(alerts, m[1]) {
			t.Errorf("%s tells of %s, which there is not", kubernetesPage, m[1])
		}
	}
	if len(alerts) < 7 {
		t.Errorf("there are only the alerts %q", alerts)
	}
}

// dashboard is what is looked at of Grafana's JSON.
type dashboard struct {
	UID    string
	Panels []struct {
		ID      int
		Title   string
		Type    string
		GridPos struct{ X, Y, W, H int }
		Targets []struct{ Expr, LegendFormat string }
	}
	Templating struct {
		List []struct {
			Name  string
			Query any
		}
	}
}

// TestDashboard: its panels are about metrics that there are, and none covers
// another.
func TestDashboard(t *testing.T) {
	k := readKnown(t)
	var d dashboard
	for _, m := range monitored(t) {
		if c, ok := decode(t, m).(*corev1.ConfigMap); ok {
			check(t, json.Unmarshal([]byte(c.Data["snapmerge.json"]), &d))
		}
	}
	if d.UID != "snapmerge" || len(d.Panels) < 20 {
		t.Fatalf("%d panels", len(d.Panels))
	}
	ids, covered := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := covered[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("%s covers %s", p.Title, other)
				}
				covered[[2]int{x, y}] = p.Title
			}
		}
		if len(p.Targets) == 0 && p.Type != "row" {
			t.Errorf("%s shows nothing", p.Title)
		}
		for _, q := range p.Targets {
			k.expr(t, q.Expr)
			k.text(t, q.Expr, q.LegendFormat)
		}
	}
	values := regexp.MustCompile(`^label_values\((.*), ([a-z]+)\)$`)
	for _, v := range d.Templating.List {
		query, ok := v.Query.(map[string]any)
		if !ok {
			continue // the data source
		}
		m := values.FindStringSubmatch(fmt.Sprint(query["query"]))
		if m == nil {
			t.Errorf("variable %s: %v", v.Name, query)
			continue
		}
		k.expr(t, m[1])
		k.text(t, m[1], "{{"+m[2]+"}}")
	}
}

// TestPodMonitor: it finds the node plugins' port, and their labels do not hide
// those of claims.
func TestPodMonitor(t *testing.T) {
	var monitor *monitoring.PodMonitor
	var node *appsv1.DaemonSet
	for _, m := range monitored(t) {
		switch o := decode(t, m).(type) {
		case *monitoring.PodMonitor:
			monitor = o
		case *appsv1.DaemonSet:
			if o.Name == "snapmerge-node" {
				node = o
			}
		}
	}
	if monitor == nil || len(monitor.Spec.PodMetricsEndpoints) != 1 {
		t.Fatalf("PodMonitor %+v", monitor)
	}
	for name, value := range monitor.Spec.Selector.MatchLabels {
		if node.Spec.Template.Labels[name] != value {
			t.Errorf("node plugins do not have %s=%s", name, value)
		}
	}
	e := monitor.Spec.PodMetricsEndpoints[0]
	var ports []string
	for _, c := range node.Spec.Template.Spec.Containers {
		for _, p := range c.Ports {
			ports = append(ports, p.Name)
			arg := fmt.Sprintf("--metrics-addr=:%d", p.ContainerPort)
			if p.Name == *e.Port && !slices.Contains(c.Args, arg) {
				t.Errorf("%s is run with %q, want %s", c.Name, c.Args, arg)
			}
		}
	}
	if !slices.Equal(ports, []string{*e.Port}) || !e.HonorLabels {
		t.Errorf("%+v of the ports %q", e, ports)
	}
}
