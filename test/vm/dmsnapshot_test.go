package vm

import (
	"os"
	"testing"
)

// TestDmSnapshot prints what the kernel's snapshot-merge, our merge and a plain copy
// take for the same blocks; it fails only if something does not work.
func TestDmSnapshot(t *testing.T) {
	if os.Getenv("SNAPMERGE_VM") != "speed" {
		t.Skip("measures merges in a virtual machine; `make bench-vm` does")
	}
	m := boot(t, Config{
		Files:     map[string][]byte{"/dmsnapshot": build(t, modulePath+"test/vm/dmsnapshot", false)},
		Disks:     []*Disk{NewDisk(256 << 20), NewDisk(256 << 20), ext4(t, 512<<20, "")},
		MemoryMiB: 1024,
		Job: `
mount /dev/vdc /mnt || exit 99
/dmsnapshot /dev/vda /dev/vdb /mnt
code=$?
umount /mnt
exit $code
`,
	})
	for _, row := range rows(t, m, "MERGE ") {
		t.Log(row)
	}
}
