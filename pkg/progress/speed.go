package progress

import "time"

// span is the time over which a speed is averaged.
const span = 10 * time.Second

// Speed measures how fast a count of bytes grows. The zero value is ready.
type Speed struct {
	samples []sample // of the last span, the oldest first
}

type sample struct {
	at    time.Time
	bytes int64
}

// Add notes the count at a time and returns the bytes per second lately.
func (s *Speed) Add(now time.Time, bytes int64) float64 {
	if n := len(s.samples); n == 0 || now.Sub(s.samples[n-1].at) >= span/50 {
		s.samples = append(s.samples, sample{now, bytes})
	}
	for len(s.samples) > 2 && now.Sub(s.samples[1].at) >= span {
		s.samples = s.samples[1:]
	}
	first := s.samples[0]
	if d := now.Sub(first.at).Seconds(); d > 0 {
		return float64(bytes-first.bytes) / d
	}
	return 0
}
