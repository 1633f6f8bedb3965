package driver

import (
	"os"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestTransportOfTheClass: a volume is staged by the transport of its class, or
// not at all.
func TestTransportOfTheClass(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	n := newNode(t, nil)
	c := mountCap(writer, ext4)
	id := n.create("here", 100*mib, "", c, "transport", "fuse")
	if err := n.stage(id, c); err != nil {
		t.Fatal(err)
	}
	if s, err := n.p.volumes.Status(id); err != nil || s.Transport != "fuse" {
		t.Errorf("%+v, %v", s, err)
	}
	n.leave(id)
	if _, err := os.Stat("/sys/module/ublk_drv"); err == nil {
		t.Skip("the kernel has ublk, so there is no transport that is missing for sure")
	}
	id = n.create("elsewhere", 100*mib, "", c, "transport", "ublk")
	wantCode(t, n.stage(id, c), codes.FailedPrecondition, "ublk_drv is not loaded")
	if s, err := n.p.volumes.Status(id); err != nil || s.Device != "" {
		t.Errorf("%+v, %v", s, err)
	}
}
