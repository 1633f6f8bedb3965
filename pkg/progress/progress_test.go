package progress

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"
)

// clock is a clock that only moves when told to.
type clock struct{ now time.Time }

func (c *clock) pass(d time.Duration) { c.now = c.now.Add(d) }

func start(o Options) (*Reporter, *bytes.Buffer, *clock) {
	c := &clock{now: time.Unix(1e9, 0)}
	o.What, o.Now = "merging", func() time.Time { return c.now }
	var out bytes.Buffer
	return New(&out, o), &out, c
}

const mib = 1 << 20

func TestPlain(t *testing.T) {
	r, out, c := start(Options{})
	for i := range int64(121) { // 12 s of 10 MiB/s
		r.Update(i*mib, 400*mib)
		c.pass(100 * time.Millisecond)
	}
	r.End()
	want := "merging: 12.5 %, 10.0 MiB/s, ETA 35s\nmerging: 25.0 %, 10.0 MiB/s, ETA 30s\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

func TestQuietIsQuiet(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		r, out, c := start(Options{Quiet: true, Terminal: terminal})
		for i := range int64(20) {
			r.Update(i*mib, 20*mib)
			c.pass(time.Second)
		}
		r.End()
		if out.Len() > 0 {
			t.Errorf("terminal %v: %q", terminal, out)
		}
	}
}

func TestBar(t *testing.T) {
	r, out, c := start(Options{Terminal: true})
	r.Update(0, 100*mib)
	for i := int64(1); i <= 100; i++ {
		c.pass(time.Second)
		r.Update(i*mib, 100*mib)
	}
	r.End()
	last := out.String()[strings.LastIndex(out.String(), "\r"):]
	if !strings.Contains(last, "100%") || !strings.Contains(last, "merging, 1.0 MiB/s, ETA 0s") || !strings.HasSuffix(last, "\n") {
		t.Errorf("last picture is %q", last)
	}
	if !regexp.MustCompile(`merging, 1\.0 MiB/s, ETA 50s +50%`).MatchString(out.String()) {
		t.Errorf("no picture of the middle in %q", out)
	}
	if strings.Count(out.String(), "\n") != 1 {
		t.Errorf("more than one line: %q", out)
	}
}

// TestBarIsDrawnSeldom: a terminal is not flooded, but the end is always shown.
func TestBarIsDrawnSeldom(t *testing.T) {
	r, out, c := start(Options{Terminal: true})
	for i := range int64(1000) {
		r.Update(i*mib, 1000*mib)
		c.pass(time.Millisecond)
	}
	if n := strings.Count(out.String(), "\r"); n > 25 {
		t.Errorf("%d pictures in a second", n)
	}
	r.Update(1000*mib, 1000*mib)
	if !strings.Contains(out.String(), "100%") {
		t.Errorf("the end is missing in %q", out)
	}
}

// TestResumed: what an earlier run did does not count as speed.
func TestResumed(t *testing.T) {
	r, out, c := start(Options{})
	r.Update(900*mib, 1000*mib)
	c.pass(5 * time.Second)
	r.Update(910*mib, 1000*mib)
	if want := "merging: 91.0 %, 2.0 MiB/s, ETA 45s\n"; out.String() != want {
		t.Errorf("got %q, want %q", out, want)
	}
}

// TestNextPart: counting anew begins a new picture and a new speed.
func TestNextPart(t *testing.T) {
	r, out, c := start(Options{Terminal: true})
	r.Update(10*mib, 10*mib)
	c.pass(time.Second)
	r.Update(0, 20*mib)
	c.pass(time.Second)
	r.Update(5*mib, 20*mib)
	r.End()
	if lines := strings.Split(out.String(), "\n"); len(lines) != 3 || !strings.Contains(lines[1], "5.0 MiB/s, ETA 3s") {
		t.Errorf("got %q", out)
	}
}

func TestNothingToDo(t *testing.T) {
	r, out, _ := start(Options{Terminal: true})
	r.Update(0, 0)
	r.End()
	if out.Len() > 0 {
		t.Errorf("got %q", out)
	}
}

func TestSpeedForgets(t *testing.T) {
	var s Speed
	now := time.Unix(0, 0)
	s.Add(now, 0)
	for i := range int64(600) { // a minute of 100 MiB/s, then a pause
		now = now.Add(100 * time.Millisecond)
		s.Add(now, (i+1)*10*mib)
	}
	if got := s.Add(now, 6000*mib); got < 99*mib || got > 101*mib {
		t.Errorf("%v bytes per second", got)
	}
	for range 200 {
		now = now.Add(100 * time.Millisecond)
		s.Add(now, 6000*mib)
	}
	if got := s.Add(now, 6000*mib); got != 0 {
		t.Errorf("%v bytes per second after a pause", got)
	}
	if n := len(s.samples); n > 60 {
		t.Errorf("%d samples are kept", n)
	}
}

func TestETA(t *testing.T) {
	for seconds, want := range map[float64]string{-1: "unknown", 0: "0s", 0.4: "0s", 59.6: "1m0s", 3725: "1h2m5s", 1e10: "unknown"} {
		if got := ETA(seconds); got != want {
			t.Errorf("%v s: %q, want %q", seconds, got, want)
		}
	}
}
