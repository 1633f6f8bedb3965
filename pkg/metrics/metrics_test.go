package metrics

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

var update = flag.Bool("update", false, "rewrite docs/metrics.md")

// newManager opens a node without devices, with blank volumes.
func newManager(t *testing.T, ids ...string) *volume.Manager {
	t.Helper()
	m, err := volume.OpenManager(t.Context(), volume.ManagerConfig{
		FS: blockio.OS(), StateDir: t.TempDir(), Init: true, IO: blockio.Sync, Log: klog.Background(),
		Capacity: func() (free, total int64, err error) { return 1 << 30, 8 << 30, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, id := range ids {
		_, err := m.CreateVolume(t.Context(), volume.VolumeSpec{ID: id, Size: 1 << 20, Claim: volume.Claim{Namespace: "shop", PVC: "pvc-" + id}})
		if err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// works says that no file system hangs.
func works(string) error { return nil }

// scrape is what Prometheus gets: values by name and labels.
type scrape map[string]float64

func (m *Metrics) scrape(t *testing.T) scrape {
	t.Helper()
	s := scrape{}
	families, err := m.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, v := range f.Metric {
			var labels []string
			for _, l := range v.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			name := f.GetName()
			if len(labels) > 0 {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			s[name] = v.GetGauge().GetValue() + v.GetCounter().GetValue() + float64(v.GetHistogram().GetSampleCount())
		}
	}
	return s
}

// patience is how long a test waits for what must come.
const patience = 3 * time.Minute

// scrapeUntil is scrape, again until ok: where a volume is to hang and its limit is
// short, a slow machine may find others late, too.
func (m *Metrics) scrapeUntil(t *testing.T, ok func(s scrape) bool) scrape {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		s := m.scrape(t)
		if ok(s) || time.Now().After(end) {
			return s
		}
	}
}

func (s scrape) want(t *testing.T, name string, value float64) {
	t.Helper()
	if got, ok := s[name]; !ok || got != value {
		t.Errorf("%s is %v (there: %v), want %v", name, got, ok, value)
	}
}

// of counts the series of a volume.
func (s scrape) of(id string) (n int) {
	for name := range s {
		if strings.Contains(name, "volume_id="+id) {
			n++
		}
	}
	return n
}

func TestVolumes(t *testing.T) {
	m := New("v1")
	m.volumes.limit = patience
	before := m.scrape(t)
	before.want(t, "snapmerge_ready", 0)
	before.want(t, "snapmerge_build_info{version=v1}", 1)
	v := newManager(t, "a", "b")
	m.Show(v, works)
	a, err := v.Get("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.WriteAt(make([]byte, 8192), 0); err != nil {
		t.Fatal(err)
	}
	s := m.scrape(t)
	s.want(t, "snapmerge_ready", 1)
	s.want(t, "snapmerge_volumes{state=unstaged}", 2)
	s.want(t, "snapmerge_pool_free_bytes", 1<<30-(8<<30)/20)
	s.want(t, "snapmerge_volume_size_bytes{namespace=shop,pvc=pvc-a,volume_id=a}", 1<<20)
	s.want(t, "snapmerge_volume_state{namespace=shop,pvc=pvc-a,state=unstaged,volume_id=a}", 1)
	s.want(t, "snapmerge_io_bytes_total{namespace=shop,op=write,pvc=pvc-a,volume_id=a}", 8192)
	s.want(t, "snapmerge_io_bytes_total{namespace=shop,op=write,pvc=pvc-b,volume_id=b}", 0)
	s.want(t, "snapmerge_write_bytes_total{namespace=shop,pvc=pvc-a,target=base,volume_id=a}", 8192)
	s.want(t, "snapmerge_log_hard_limit_bytes{namespace=shop,pvc=pvc-a,volume_id=a}", 0)

	m.Show(v, func(id string) error {
		if id == "a" {
			return errors.New("it does not answer")
		}
		return nil
	})
	s = m.scrape(t)
	s.want(t, "snapmerge_volume_device_down{namespace=shop,pvc=pvc-a,volume_id=a}", 1)
	s.want(t, "snapmerge_volume_device_down{namespace=shop,pvc=pvc-b,volume_id=b}", 0)

	if err := v.DeleteVolume("a"); err != nil {
		t.Fatal(err)
	}
	s = m.scrape(t)
	if n := s.of("a"); n > 0 {
		t.Errorf("%d series of a volume that is gone", n)
	}
	s.want(t, "snapmerge_volumes{state=unstaged}", 1)
}

// TestSilent: a volume that hangs is told as such, keeps no other from being
// told, and is read by one goroutine only, whoever asks.
func TestSilent(t *testing.T) {
	t.Parallel()
	m := New("")
	v := newManager(t, "a", "b")
	m.Show(v, works)
	m.volumes.limit = patience
	m.scrape(t) // now it knows the claims
	m.volumes.limit = readLimit
	hanging, release := make(chan string, 10), make(chan struct{})
	m.volumes.hook = func(key string) {
		if key == "a" || key == poolKey {
			hanging <- key
			<-release
		}
	}
	for range 2 {
		s := m.scrapeUntil(t, func(s scrape) bool { return s["snapmerge_volumes_unresponsive"] == 1 })
		s.want(t, "snapmerge_volume_unresponsive{namespace=shop,pvc=pvc-a,volume_id=a}", 1)
		if n := s.of("a"); n != 1 {
			t.Errorf("%d series of a volume that hangs", n)
		}
		s.want(t, "snapmerge_volume_unresponsive{namespace=shop,pvc=pvc-b,volume_id=b}", 0)
		s.want(t, "snapmerge_volumes_unresponsive", 1)
		s.want(t, "snapmerge_volumes{state=unstaged}", 1)
		if _, ok := s["snapmerge_pool_free_bytes"]; ok {
			t.Error("room of a pool that does not answer")
		}
	}
	if n := len(hanging); n != 2 {
		t.Errorf("%d goroutines hang, want one for the volume and one for the pool", n)
	}
	close(release)
	s := m.scrapeUntil(t, func(s scrape) bool {
		return s["snapmerge_volumes_unresponsive"] == 0 && s["snapmerge_pool_free_bytes"] > 0
	})
	s.want(t, "snapmerge_volumes_unresponsive", 0)
	if s["snapmerge_pool_free_bytes"] <= 0 || s.of("a") != s.of("b") {
		t.Errorf("series of a %d, b %d", s.of("a"), s.of("b"))
	}
}

// TestMostVolumes: there is a bound, and who is in trouble comes first.
func TestMostVolumes(t *testing.T) {
	t.Parallel()
	m := New("")
	v := newManager(t, "a", "b", "c", "d")
	m.Show(v, works)
	m.volumes.most = 2
	m.volumes.limit = patience
	s := m.scrape(t)
	m.volumes.limit = readLimit
	if s.of("a") == 0 || s.of("b") == 0 || s.of("c")+s.of("d") > 0 {
		t.Errorf("series of a %d, b %d, c %d, d %d", s.of("a"), s.of("b"), s.of("c"), s.of("d"))
	}
	s.want(t, "snapmerge_volumes_without_series", 2)
	s.want(t, "snapmerge_volumes{state=unstaged}", 4)

	release := make(chan struct{})
	defer close(release)
	m.volumes.hook = func(key string) {
		if key == "d" {
			<-release
		}
	}
	s = m.scrapeUntil(t, func(s scrape) bool { return s["snapmerge_volumes_unresponsive"] == 1 })
	s.want(t, "snapmerge_volume_unresponsive{namespace=shop,pvc=pvc-d,volume_id=d}", 1)
	if s.of("a") == 0 || s.of("b")+s.of("c") > 0 {
		t.Errorf("series of a %d, b %d, c %d", s.of("a"), s.of("b"), s.of("c"))
	}
}

func TestCalls(t *testing.T) {
	m := New("")
	end := m.Call("NodeStageVolume")
	m.scrape(t).want(t, "snapmerge_csi_calls_in_flight{method=NodeStageVolume}", 1)
	end(codes.Aborted)
	s := m.scrape(t)
	s.want(t, "snapmerge_csi_calls_in_flight{method=NodeStageVolume}", 0)
	s.want(t, "snapmerge_csi_call_duration_seconds{code=Aborted,method=NodeStageVolume}", 1)
}

// full collects every metric there is.
type full struct{}

func (full) Describe(chan<- *prometheus.Desc) {}

func (full) Collect(ch chan<- prometheus.Metric) {
	n := nodeReading{ready: true, known: true, encodes: []volume.EncodeStatus{{Snapshot: "s", Volume: "v"}},
		ahead: readahead.Stats{Reads: map[readahead.Mode]readahead.Times{readahead.Async: {}}}}
	send(ch, nodeMetrics, nodeDescs, &n, nil)
	sendAhead(ch, &n)
	send(ch, volumeMetrics, volumeDescs, &reading{open: true}, []string{"v", "n", "p"})
}

// TestList: the list has the metrics that there are, as they are, and they are
// as Prometheus wants them.
func TestList(t *testing.T) {
	m := New("")
	m.Call("Probe")(codes.OK)
	reg := prometheus.NewRegistry()
	reg.MustRegister(full{}, m.calls.seconds, m.calls.inFlight)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	there := map[string]int{}
	for i, f := range families {
		there[f.GetName()] = i
	}
	for _, g := range List() {
		for _, d := range g.Metrics {
			i, ok := there[d.Name]
			if !ok {
				t.Errorf("%s is in the list only", d.Name)
				continue
			}
			f := families[i]
			delete(there, d.Name)
			var labels []string
			for _, l := range f.Metric[0].Label {
				labels = append(labels, l.GetName())
			}
			want := slices.Sorted(slices.Values(slices.Concat(g.Labels, d.Labels)))
			if !strings.HasPrefix(d.Name, "snapmerge_") || strings.ToLower(f.GetType().String()) != d.Type || !slices.Equal(labels, want) {
				t.Errorf("%+v is %v with %v", d, f.GetType(), labels)
			}
		}
	}
	for name := range there {
		t.Errorf("%s is not in the list", name)
	}
}

// TestPage keeps the page for users in step with the code. -update writes its
// tables anew.
func TestPage(t *testing.T) {
	const page = "../../docs/metrics.md"
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, g := range List() {
		begin, end := fmt.Sprintf("<!-- begin %s -->\n", g.Title), fmt.Sprintf("<!-- end %s -->", g.Title)
		before, rest, ok := strings.Cut(text, begin)
		have, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has no lines %q and %q", page, begin, end)
		}
		if have != table(g) && !*update {
			t.Errorf("the table %s of %s is not that of the code (go test ./pkg/metrics -run %s -update)", g.Title, page, t.Name())
		}
		text = before + begin + table(g) + end + after
	}
	if *update {
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func table(g Group) string {
	b := &strings.Builder{}
	b.WriteString("| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
	for _, d := range g.Metrics {
		labels := "`" + strings.Join(d.Labels, "`, `") + "`"
		if len(d.Labels) == 0 {
			labels = ""
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", d.Name, d.Type, labels, d.Help)
	}
	return b.String()
}
