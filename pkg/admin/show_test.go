package admin

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

var (
	merging = volume.Status{ID: "pvc-1", State: volume.Merging, Percent: 43.2, BytesDone: 432, BytesTotal: 1000, RateMiB: 120.5,
		ETASeconds: 75, Layers: 2, LogBytes: 3 << 20, Transport: "fuse", Device: "/dev/loop7"}
	idle = volume.Status{ID: "pvc-2", State: volume.Staged, Percent: 100, Error: "device is gone"}
)

func TestTable(t *testing.T) {
	var out bytes.Buffer
	check(t, WriteTable(&out, []volume.Status{merging, idle}))
	want := `VOLUME  STATE    PERCENT  RATE         ETA    LAYERS  LOG      TRANSPORT  DEVICE      ERROR
pvc-1   merging  43.2     120.5 MiB/s  1m15s  2       3.0 MiB  fuse       /dev/loop7  -
pvc-2   staged   100.0    0.0 MiB/s    -      0       0 B      -          -           device is gone
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}

// play has Watch see the given replies one after another, then ends it.
func play(t *testing.T, o WatchOptions, replies ...any) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	tick := make(chan time.Time, len(replies))
	for range replies {
		tick <- time.Time{}
	}
	o.Tick = tick
	var out bytes.Buffer
	err := Watch(ctx, func(context.Context) ([]volume.Status, error) {
		if len(replies) == 0 {
			cancel()
			return nil, ctx.Err()
		}
		next := replies[0]
		replies = replies[1:]
		if err, ok := next.(error); ok {
			return nil, err
		}
		return next.([]volume.Status), nil
	}, &out, o)
	check(t, err)
	return out.String()
}

func TestWatchLines(t *testing.T) {
	later := merging
	later.Percent, later.ETASeconds = 50, -1
	away := errors.New("no node plugin answers")
	got := play(t, WatchOptions{}, []volume.Status{merging, idle}, []volume.Status{merging, idle}, []volume.Status{later, idle},
		away, away, []volume.Status{later})
	want := `pvc-1: merging, 43.2 %, 120.5 MiB/s, ETA 1m15s, 2 layers, log 3.0 MiB, fuse /dev/loop7, -
pvc-2: staged, 100.0 %, 0.0 MiB/s, ETA -, 0 layers, log 0 B, - -, device is gone
pvc-1: merging, 50.0 %, 120.5 MiB/s, ETA unknown, 2 layers, log 3.0 MiB, fuse /dev/loop7, -
no node plugin answers
pvc-2: gone
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestWatchJSON(t *testing.T) {
	later := merging
	later.Percent = 50
	got := play(t, WatchOptions{JSON: true, Terminal: true}, []volume.Status{merging, idle}, errors.New("away"), []volume.Status{later})
	if lines := strings.Split(strings.TrimSpace(got), "\n"); len(lines) != 3 || !strings.HasPrefix(lines[2], `{"id":"pvc-1","state":"merging","percent":50,`) {
		t.Errorf("got %s", got)
	}
}

func TestWatchTerminal(t *testing.T) {
	got := play(t, WatchOptions{Terminal: true}, []volume.Status{merging}, []volume.Status{merging}, errors.New("away"))
	screens := strings.Split(got, clearScreen)
	if len(screens) != 4 || !strings.Contains(screens[1], "pvc-1") || screens[1] != screens[2] || screens[3] != "away\n" {
		t.Errorf("got %q", got)
	}
}

// TestWatchNothing: a plugin that is not there at all is an error.
func TestWatchNothing(t *testing.T) {
	away := errors.New("away")
	err := Watch(t.Context(), func(context.Context) ([]volume.Status, error) { return nil, away }, &bytes.Buffer{}, WatchOptions{})
	if !errors.Is(err, away) {
		t.Errorf("%v", err)
	}
}
