package metrics

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

const (
	// MaxVolumes is the most volumes that have series of their own. If there are
	// more, those that somebody should look at come first, then the others, in the
	// order of their ids.
	MaxVolumes = 500
	// readLimit is how long a scrape waits for volumes and pool to answer.
	readLimit = time.Second
	// poolKey stands for the pool among the ids of volumes, none of which is empty.
	poolKey = ""
)

// source is where a scrape reads. It may hang in any of the methods but ids and
// node.
type source struct {
	m    *volume.Manager
	hung func(id string) error
}

func (s *source) ids() []string { return s.m.IDs() }

func (s *source) volume(id string) (reading, error) {
	st, err := s.m.Status(id)
	if err != nil {
		return reading{}, err
	}
	r := reading{Status: st}
	r.DeviceDown = r.DeviceDown || s.hung(id) != nil
	if v, err := s.m.Get(id); err == nil {
		r.open, r.counters, r.inFlight, r.limits = true, v.Counters(), v.InFlight(), v.Record().Limits
	}
	return r, nil
}

func (s *source) pool() (free, total int64, err error) { return s.m.Capacity() }

// node fills in what never waits.
func (s *source) node(n *nodeReading) {
	n.encodes = s.m.Encodes()
	n.adopted, n.lost = s.m.Adoptions()
	n.ahead = s.m.ReadAhead()
}

// collector reads volumes when it is asked for their metrics.
//
// What is read may hang when a disk does, so each volume is read in a goroutine of
// its own, which nobody waits for longer than readLimit; until it has ended its
// volume counts as silent and is not read again.
type collector struct {
	version string
	source  atomic.Pointer[source]
	most    int           // see MaxVolumes
	limit   time.Duration // see readLimit
	// hook, if not nil, is called before something is read. Tests hang in it.
	hook func(key string)

	// scraping is held over a scrape, so that one does not find the volumes busy
	// with another.
	scraping sync.Mutex
	claims   map[string]volume.Claim // of volumes that have answered before

	mu   sync.Mutex
	busy map[string]bool // what is being read
}

func newCollector(version string) *collector {
	return &collector{version: version, most: MaxVolumes, limit: readLimit, claims: map[string]volume.Claim{}, busy: map[string]bool{}}
}

var (
	volumeDescs = descs(volumeMetrics, volumeLabels)
	nodeDescs   = descs(nodeMetrics, nil)
	aheadDescs  = descs(aheadMetrics, nil)
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range slices.Concat(volumeDescs, nodeDescs, aheadDescs, aheadTimesDescs) {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.scraping.Lock()
	defer c.scraping.Unlock()
	n := nodeReading{version: c.version}
	var shown []reading
	if s := c.source.Load(); s != nil {
		shown = c.read(s, &n)
	}
	send(ch, nodeMetrics, nodeDescs, &n, nil)
	sendAhead(ch, &n)
	for i := range shown {
		r := &shown[i]
		send(ch, volumeMetrics, volumeDescs, r, []string{r.ID, r.Claim.Namespace, r.Claim.PVC})
	}
}

func send[R any](ch chan<- prometheus.Metric, all []metric[R], descs []*prometheus.Desc, r R, labels []string) {
	for i := range all {
		all[i].values(r, func(value float64, own ...string) {
			m, err := prometheus.NewConstMetric(descs[i], all[i].kind, value, slices.Concat(labels, own)...)
			if err != nil {
				m = prometheus.NewInvalidMetric(descs[i], err)
			}
			ch <- m
		})
	}
}

// read reads all that answers in time, and returns the volumes to be shown.
// scraping must be held.
func (c *collector) read(s *source, n *nodeReading) []reading {
	n.ready = true
	s.node(n)
	ids := s.ids()
	got := c.readAll(s, ids, n)

	n.states = map[volume.State]int{}
	claims := make(map[string]volume.Claim, len(ids))
	all := make([]reading, 0, len(ids))
	for _, id := range ids {
		r, ok := got[id]
		switch {
		case !ok:
			r = reading{silent: true}
			r.ID, r.Claim = id, c.claims[id]
			n.silent++
		case r.ID == "":
			continue // deleted meanwhile
		default:
			n.states[r.State]++
			if r.Device != "" {
				n.devices++
			}
		}
		claims[id] = r.Claim
		all = append(all, r)
	}
	c.claims = claims
	if len(all) > c.most {
		slices.SortStableFunc(all, func(a, b reading) int { return int(truth(b.trouble()) - truth(a.trouble())) })
		n.hidden = len(all) - c.most
		all = all[:c.most]
	}
	return all
}

// readAll reads volumes and pool at the same time. What does not answer is
// missing; a volume that is gone has no id.
func (c *collector) readAll(s *source, ids []string, n *nodeReading) map[string]reading {
	type answer struct {
		id          string
		r           reading
		free, total int64
		err         error
	}
	answers := make(chan answer, len(ids)+1)
	asked := 0
	for _, id := range append(ids[:len(ids):len(ids)], poolKey) {
		if !c.begin(id) {
			continue
		}
		asked++
		go func() {
			if c.hook != nil {
				c.hook(id)
			}
			a := answer{id: id}
			if id == poolKey {
				a.free, a.total, a.err = s.pool()
			} else if a.r, a.err = s.volume(id); a.err != nil {
				a.r = reading{}
			}
			c.end(id) // before the scrape, and the next, can go on
			answers <- a
		}()
	}
	got := make(map[string]reading, len(ids))
	late := time.After(c.limit)
	for ; asked > 0; asked-- {
		select {
		case a := <-answers:
			if a.id == poolKey {
				n.free, n.total, n.known = a.free, a.total, a.err == nil
			} else {
				got[a.id] = a.r
			}
		case <-late:
			return got
		}
	}
	return got
}

// begin notes that something is being read; false: it is already.
func (c *collector) begin(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy[key] {
		return false
	}
	c.busy[key] = true
	return true
}

func (c *collector) end(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.busy, key)
}
