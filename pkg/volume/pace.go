package volume

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// setRate sets the rate in MiB/s; 0: the node's default.
func (v *Volume) setRate(mib int) {
	if mib == 0 {
		mib = v.cfg.Rate
	}
	if mib <= 0 {
		v.limiter.Store(nil)
		return
	}
	perSecond := mib << 20
	v.limiter.Store(rate.NewLimiter(rate.Limit(perSecond), perSecond))
}

// SetRate limits merge and fold to mib MiB/s, durably; 0 is the node's default.
func (v *Volume) SetRate(mib int) error {
	if err := v.update(func(r *Record) { r.Rate = mib }); err != nil {
		return err
	}
	v.setRate(mib)
	return nil
}

// pace waits until a merge may write n bytes: as the pods and the rate that is set
// allow.
func (v *Volume) pace(ctx context.Context, n int) error { return v.paceWrite(ctx, n, 1) }

// foldTimes is how much faster than a merge a fold is at least, while the pods write:
// it has to be faster than they are, or there is no end. With each round that they
// were faster in, it is so much faster again.
const foldTimes = 4

// paceFold is pace for a fold.
func (v *Volume) paceFold(ctx context.Context, n int) error {
	times := 1
	for range min(v.rounds.Load(), patience) {
		times *= foldTimes
	}
	return v.paceWrite(ctx, n, times)
}

// encodeTimes is how much faster than a merge a snapshot is encoded at least, while the
// pods use the disk: somebody waits for it, and it only reads what they read, too.
const encodeTimes = 16

// paceEncode is pace for the encoding of a snapshot.
func (v *Volume) paceEncode(ctx context.Context, n int) error {
	return v.paceWrite(ctx, n, encodeTimes)
}

func (v *Volume) paceWrite(ctx context.Context, n, times int) error {
	if v.onPace != nil {
		v.onPace(ctx)
	}
	v.noteProgress(time.Now())
	if v.mustShrink() {
		return ctx.Err()
	}
	if err := v.pacer.Write(ctx, n, times); err != nil {
		return err
	}
	l := v.limiter.Load()
	if l == nil {
		return ctx.Err()
	}
	for n > 0 {
		k := min(n, l.Burst())
		if err := l.WaitN(ctx, k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// paceAhead waits until a merge may read, or log, n bytes for later.
func (v *Volume) paceAhead(ctx context.Context, n int) error {
	if v.mustShrink() {
		return ctx.Err()
	}
	return v.pacer.Ahead(ctx, n)
}

// mustShrink tells whether the log is so long that work goes at full rate.
func (v *Volume) mustShrink() bool { return v.logAbove(v.Record().Limits.Soft) }

func (v *Volume) logAbove(limit int64) bool {
	return limit > 0 && v.logBytes() > limit
}

// logBytes is what the volume's logs take on disk.
func (v *Volume) logBytes() int64 {
	n := int64(0)
	for _, l := range v.stack.Load().layers {
		if l.log != nil {
			n += l.log.Bytes()
		}
	}
	return n
}

const (
	throttleFirst = time.Millisecond
	throttleMost  = 100 * time.Millisecond
)

// throttle slows guest writes down while the logs are above their hard limit,
// the more the further, and while the guest writes faster than its log can be
// folded.
func (v *Volume) throttle() {
	if len(v.stack.Load().layers) == 0 {
		return
	}
	steps := v.rounds.Load() - patience
	if hard := v.Record().Limits.Hard; hard > 0 {
		if over := v.logBytes() - hard; over > 0 {
			steps = max(steps, over/max(hard/16, 1))
		}
	}
	if steps > 0 {
		wait := min(throttleFirst<<min(steps, 10), throttleMost)
		v.counts.throttled.Add(int64(wait))
		time.Sleep(wait)
	}
}

// meter measures what background work gets done.
type meter struct {
	folded atomic.Int64 // bytes

	mu      sync.Mutex
	samples []sample // the oldest first
}

type sample struct {
	at    time.Time
	bytes int64
}

// meterSpan is the time over which a rate is averaged.
const meterSpan = 10 * time.Second

// rate notes that bytes are done by now and returns bytes per second lately.
func (m *meter) rate(now time.Time, bytes int64) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.samples); n > 0 && m.samples[n-1].bytes > bytes {
		m.samples = nil // another layer
	}
	if n := len(m.samples); n == 0 || now.Sub(m.samples[n-1].at) >= meterSpan/20 {
		m.samples = append(m.samples, sample{now, bytes})
	}
	for len(m.samples) > 2 && now.Sub(m.samples[1].at) >= meterSpan {
		m.samples = m.samples[1:]
	}
	first := m.samples[0]
	if d := now.Sub(first.at).Seconds(); d > 0 {
		return float64(bytes-first.bytes) / d
	}
	return 0
}

// once runs one function at a time in the background and can be waited for.
type once struct {
	busy atomic.Bool
	wg   sync.WaitGroup
}

func (o *once) start(fn func()) {
	if !o.busy.CompareAndSwap(false, true) {
		return
	}
	o.wg.Go(func() {
		defer o.busy.Store(false)
		fn()
	})
}

func (o *once) wait() { o.wg.Wait() }
