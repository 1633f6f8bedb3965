package bench

import (
	"bytes"
	"context"
	"testing"
)

// TestReaderOnce: a reader that the load's time was over for before it got a processor
// has a request to tell of all the same.
func TestReaderOnce(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	took, err := reader(ctx, bytes.NewReader(make([]byte, 2*bs)), bs, 0, func(off int64) int64 { return off + bs })
	if err != nil || len(took) != 1 {
		t.Errorf("%d requests, %v", len(took), err)
	}
}
