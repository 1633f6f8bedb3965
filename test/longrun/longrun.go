// Package longrun bounds tests that run for as long as they are asked to.
package longrun

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// Seeds gives seeds until the duration in the environment variable is over. It
// skips the test if the variable is not set.
func Seeds(t *testing.T, variable string, share float64) func(yield func(uint64) bool) {
	t.Helper()
	s := os.Getenv(variable)
	if s == "" {
		t.Skipf("set %s to a duration to run this; `make crash` does", variable)
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return func(yield func(uint64) bool) {
		for end := time.Now().Add(time.Duration(float64(d) * share)); time.Now().Before(end) && !t.Failed(); {
			if !yield(rand.Uint64()) {
				return
			}
		}
	}
}
