package fuseloop

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const patience = 30 * time.Second

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func closeDevice(t testing.TB, d transport.Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := d.Close(ctx); err != nil {
		t.Error(err)
	}
}
