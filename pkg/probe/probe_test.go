package probe

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

func TestDrivers(t *testing.T) {
	const release = "6.12.0"
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	for name, tt := range map[string]struct {
		root fstest.MapFS
		want string // transports whose driver is there
	}{
		"bare":       {fstest.MapFS{}, ""},
		"devices":    {fstest.MapFS{"dev/ublk-control": file(""), "dev/nbd0": file("")}, "ublk nbd"},
		"loaded":     {fstest.MapFS{"sys/module/dm_user/refcnt": file("0")}, "dm-user"},
		"modules":    {fstest.MapFS{"lib/modules/6.12.0/modules.dep": file("kernel/drivers/block/nbd.ko.xz:\nkernel/drivers/block/ublk_drv.ko.xz: kernel/a.ko.xz\n")}, "ublk nbd"},
		"built in":   {fstest.MapFS{"lib/modules/6.12.0/modules.builtin": file("kernel/drivers/md/dm-user.ko\n")}, "dm-user"},
		"dependency": {fstest.MapFS{"lib/modules/6.12.0/modules.dep": file("kernel/x/other.ko: kernel/drivers/block/nbd.ko\n")}, ""},
		"other":      {fstest.MapFS{"lib/modules/6.1.0/modules.dep": file("kernel/drivers/block/nbd.ko:\n")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var there []string
			for _, d := range []driver{ublkDriver, dmUserDriver, nbdDriver} {
				if a := d.absent(); a.OK || !strings.Contains(a.Why, d.transport) {
					t.Errorf("%s: %+v", d.transport, a)
				}
				if d.present(tt.root, release) {
					there = append(there, d.transport)
				}
			}
			if got := strings.Join(there, " "); got != tt.want {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
}

func TestReflink(t *testing.T) {
	dir := t.TempDir()
	a := reflink(dir)
	t.Logf("in %s: %+v", dir, a)
	if a.OK == (a.Why != "") {
		t.Errorf("%+v", a)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if a := reflink(dir + "/none"); a.OK || !strings.Contains(a.Why, "none") {
		t.Errorf("no directory: %+v", a)
	}
	if a := reflink(""); a.OK || a.Why == "" {
		t.Errorf("not asked: %+v", a)
	}
}

// TestRun: each answer is yes, or no with a reason.
func TestRun(t *testing.T) {
	r := Run(t.TempDir())
	all := map[string]Answer{
		"io_uring": r.URing.Answer, "reflink": r.Reflink, "device-mapper": r.DeviceMapper, "hand-over": r.HandOver, "loop": r.Loop.Answer, "capability": r.SysResource,
	}
	for name, tr := range r.Transports {
		all[name] = tr.Answer
		if (tr.SurvivesRestart != nil) != tr.OK {
			t.Errorf("%s: %+v", name, tr)
		}
		if tr.SurvivesRestart != nil {
			all[name+" after a restart"] = *tr.SurvivesRestart
		}
		if (tr.Passthrough != nil) != (tr.OK && name == "fuse") {
			t.Errorf("%s: %+v", name, tr)
		}
		if tr.Passthrough != nil {
			all[name+" to the base"] = *tr.Passthrough
		}
	}
	for name, a := range all {
		if a.OK == (a.Why != "") || strings.Contains(a.Why, "\n") {
			t.Errorf("%s: %+v", name, a)
		}
	}
	if len(r.Transports) != 4 || r.Kernel == "" {
		t.Errorf("report %+v", r)
	}
	if want := blockio.ProbeURing() == nil; r.URing.OK != want || want && !r.URing.Opcodes["read"] {
		t.Errorf("io_uring: %+v", r.URing)
	}
	if os.Geteuid() == 0 && r.Loop.OK && r.Loop.Free <= 0 {
		t.Errorf("loop: %+v", r.Loop)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", text)
}

func TestText(t *testing.T) {
	no := answer(errors.Join(errors.New("one"), errors.New("two")))
	r := Report{
		Kernel:     "6.1",
		Transports: map[string]Transport{"nbd": {Answer: no}, "fuse": {Answer{OK: true}, &Answer{OK: true}, &no}},
		URing:      URing{Answer{OK: true}, map[string]bool{"read": true, "uring_cmd": false}},
		Reflink:    no, DeviceMapper: no, HandOver: no, Loop: Loop{Answer{OK: true}, 7}, SysResource: no,
	}
	var out bytes.Buffer
	if err := r.WriteText(&out); err != nil {
		t.Fatal(err)
	}
	want := `kernel                                6.1  
transport fuse                        yes  
  survives a restart (with a keeper)  yes  
  passthrough to the base             no   one; two
transport nbd                         no   one; two
io_uring                              yes  without uring_cmd
reflink                               no   one; two
device-mapper                         no   one; two
hand-over to the base                 no   one; two
loop devices                          yes  7 can be made
CAP_SYS_RESOURCE                      no   one; two
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}
