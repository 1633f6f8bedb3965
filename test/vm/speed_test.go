package vm

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// speedJob measures devices on one file in memory one after another: a plain
// loop device, and each transport. Its lines begin with "SPEED".
const speedJob = `
dd if=/dev/zero of=/dev/shm/disk bs=1M count=128 2>/dev/null
cpu() { awk '/^cpu /{print $2+$3+$4+$7+$8}' /proc/stat; }
run() { # LABEL DEVICE
	for w in "randread 4k 1" "randread 4k 16" "randwrite 4k 1" "randwrite 4k 16" "read 1m 4" "write 1m 4"; do
		set -- "$1" "$2" $w
		before=$(cpu)
		fio --name=x --filename=$2 --direct=1 --ioengine=io_uring --rw=$3 --bs=$4 --iodepth=$5 --runtime=4 --time_based --size=128m \
			--output-format=terse --terse-version=3 >/tmp/fio || return 1
		after=$(cpu)
		awk -F';' -v l="$1" -v w="$3-$4-qd$5" -v c=$((after-before)) '{ kib=$6+$47; printf "SPEED %-10s %-18s %8d IOPS %8.1f MiB/s %7.1f CPU s/GiB\n", l, w, $8+$49, ($7+$48)/1024, c/100/(kib/1048576) }' /tmp/fio
	done
}
for round in 1 2; do
	loop=$(/bin/losetup -f)
	/bin/losetup --direct-io=on --sector-size 4096 $loop /dev/shm/disk || exit 1
	run loop $loop || exit 1
	/bin/losetup -d $loop
	for t in $TRANSPORTS; do
		rm -f /tmp/dev
		/serve $t /dev/shm/disk /tmp/dev 2>/dev/null &
		pid=$!
		while [ ! -e /tmp/dev ]; do kill -0 $pid || exit 1; sleep 0.1; done
		run $t $(readlink /tmp/dev) || exit 1
		kill $pid
		wait $pid || exit 1
	done
done
`

// TestSpeed prints a table; it fails only if something does not work. Without
// KVM the figures mean little beyond their order.
func TestSpeed(t *testing.T) {
	if os.Getenv("SNAPMERGE_VM") != "speed" {
		t.Skip("measures transports in a virtual machine; `make bench-vm` does")
	}
	transports := "ublk fuse nbd"
	if strings.Contains(os.Getenv("KERNEL_MODULES"), "dm-user") {
		transports += " dm-user"
	}
	m := boot(t, Config{Files: map[string][]byte{"/serve": build(t, modulePath+"test/vm/serve", false)}, Job: "TRANSPORTS='" + transports + "'" + speedJob, MemoryMiB: 1024})
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	exit, err := m.Wait(ctx)
	if exit != 0 || err != nil {
		t.Errorf("exit code %d, %v\n%s", exit, err, m.Console())
	}
	for line := range strings.Lines(m.Console()) {
		if _, row, ok := strings.Cut(line, "SPEED "); ok {
			t.Log(strings.TrimSpace(row))
		}
	}
}
