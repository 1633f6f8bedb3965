// Package progress tells a person how far work has come: a bar on a terminal, a
// plain line every few seconds elsewhere.
package progress

import (
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

const (
	// redraw is the least time between two pictures of a bar, plainEvery between
	// two plain lines.
	redraw     = 100 * time.Millisecond
	plainEvery = 5 * time.Second
	// steps is how finely a bar is divided; barWidth its length in characters.
	steps    = 1000
	barWidth = 30
)

// Options of a Reporter.
type Options struct {
	// What is being done, such as "merging".
	What string
	// Quiet shows nothing at all.
	Quiet bool
	// Terminal draws a bar; otherwise plain lines are written.
	Terminal bool
	// Now is the clock; nil: the machine's.
	Now func() time.Time
}

// Reporter shows progress. It may be used concurrently.
type Reporter struct {
	w io.Writer
	o Options

	mu    sync.Mutex
	bar   *progressbar.ProgressBar // nil without a terminal or before the first picture
	speed Speed
	last  int64     // bytes done
	shown time.Time // the last picture or line, or the start
}

// New makes a Reporter that writes to w. Errors of writing are ignored: what
// is reported on must not fail for want of somebody who looks.
func New(w io.Writer, o Options) *Reporter {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Reporter{w: w, o: o, shown: o.Now()}
}

// IsTerminal tells whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Update says that done of total bytes are done. Fewer than before means that
// another part of the work has begun.
func (r *Reporter) Update(done, total int64) {
	if r.o.Quiet || total <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.o.Now()
	if done < r.last {
		r.endLocked()
	}
	r.last = done
	rate := r.speed.Add(now, done)
	if r.o.Terminal {
		if done == total || now.Sub(r.shown) >= redraw || r.bar == nil {
			r.drawLocked(done, total, rate)
			r.shown = now
		}
		return
	}
	if now.Sub(r.shown) >= plainEvery {
		fmt.Fprintf(r.w, "%s: %.1f %%, %s\n", r.o.What, percent(done, total), pace(rate, total-done))
		r.shown = now
	}
}

// drawLocked draws the bar. mu must be held.
func (r *Reporter) drawLocked(done, total int64, rate float64) {
	if r.bar == nil {
		// Speed and time left are our own: the bar's would count what an earlier
		// run did.
		r.bar = progressbar.NewOptions64(steps, progressbar.OptionSetWriter(r.w), progressbar.OptionSetWidth(barWidth),
			progressbar.OptionSetPredictTime(false), progressbar.OptionSetElapsedTime(false), progressbar.OptionUseANSICodes(true))
	}
	// In this order: a bar that is full is not drawn again.
	r.bar.Describe(r.o.What + ", " + pace(rate, total-done))
	_ = r.bar.Set64(min(int64(percent(done, total)*steps/100), steps))
}

// End finishes the picture, so that other output may follow.
func (r *Reporter) End() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
}

// endLocked ends the bar's line and forgets the speed. mu must be held.
func (r *Reporter) endLocked() {
	if r.bar != nil {
		fmt.Fprintln(r.w)
	}
	r.bar, r.speed, r.last = nil, Speed{}, 0
}

func percent(done, total int64) float64 { return float64(done) / float64(total) * 100 }

// pace is speed and time left in words.
func pace(rate float64, left int64) string {
	eta := -1.0
	switch {
	case left <= 0:
		eta = 0
	case rate > 0:
		eta = float64(left) / rate
	}
	return fmt.Sprintf("%.1f MiB/s, ETA %s", rate/(1<<20), ETA(eta))
}

// ETA writes a time in seconds as a person reads it; below 0 it is unknown.
func ETA(seconds float64) string {
	if seconds < 0 || seconds > math.MaxInt64/float64(time.Second) {
		return "unknown"
	}
	return (time.Duration(seconds+0.5) * time.Second).String()
}
