package vm

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/bench"
)

// speedJob measures devices on one file, of ext4 on a disk in memory, one after another: a plain loop
// device, each transport, and a device that is handed over to the file. Its lines begin
// with "SPEED". Then it swaps the table of such a device under load, again and again:
// "SWAP" and how long each held requests back.
const speedJob = `
export GOMAXPROCS=16 # as the node plugin has it
mkfs.ext4 -q /dev/ram0 && mount -t ext4 /dev/ram0 /mnt && dd if=/dev/zero of=/mnt/disk bs=1M count=128 conv=fsync 2>/dev/null || exit 1
cpu() { awk '/^cpu /{print $2+$3+$4+$7+$8}' /proc/stat; }
run() { # LABEL DEVICE
	for w in "randread 4k 1" "randread 4k 16" "randwrite 4k 1" "randwrite 4k 16" "read 1m 4" "write 1m 4"; do
		set -- "$1" "$2" $w
		before=$(cpu)
		fio --name=x --filename=$2 --direct=1 --ioengine=io_uring --rw=$3 --bs=$4 --iodepth=$5 --runtime=3 --time_based --size=128m \
			--output-format=terse --terse-version=3 >/tmp/fio || return 1
		after=$(cpu)
		awk -F';' -v l="$1" -v w="$3-$4-qd$5" -v c=$((after-before)) '{ kib=$6+$47; printf "SPEED %-10s %-18s %8d IOPS %8.1f MiB/s %7.1f CPU s/GiB\n", l, w, $8+$49, ($7+$48)/1024, c/100/(kib/1048576) }' /tmp/fio
	done
}
serve() { # TRANSPORT [native]
	rm -f /tmp/dev
	/serve $1 /mnt/disk /tmp/dev $2 2>/tmp/serve &
	pid=$!
	while [ ! -e /tmp/dev ]; do kill -0 $pid || { cat /tmp/serve; exit 1; }; sleep 0.1; done
	dev=$(readlink /tmp/dev)
}
end() { kill $pid; wait $pid || { cat /tmp/serve; exit 1; }; }
for round in 1 2 3; do
	loop=$(/bin/losetup -f)
	/bin/losetup --direct-io=on --sector-size 4096 $loop /mnt/disk || exit 1
	run loop $loop || exit 1
	/bin/losetup -d $loop
	for t in $TRANSPORTS; do
		serve $t
		run $t $dev || exit 1
		end
	done
	serve nbd native
	run native $dev || exit 1
	end
done
swaps() { # TRANSPORT WORKLOAD: fio, and a swap every half second
	serve $1 native
	fio --name=x --filename=$dev --direct=1 --ioengine=io_uring --rw=$2 --bsrange=4k-64k --iodepth=16 --runtime=12 --time_based --size=128m \
		--fsync=64 --output-format=terse --terse-version=3 >/tmp/fio &
	fio=$!
	for i in $(seq 1 20); do sleep 0.5; kill -USR1 $pid; done
	wait $fio || exit 1
	end
	awk -v l="$1 $2" '/Swapped the table/ { sub(/.* to=/, ""); print "SWAP", l, "to " $0 }' /tmp/serve
	awk -F';' -v l="$1 $2" '{ printf "SWAP %s: error %d, %d IOPS, longest read %.0f ms, longest write %.0f ms\n", l, $5, $8+$49, $39/1000, $80/1000 }' /tmp/fio
}
for t in $TRANSPORTS; do
	swaps $t randrw
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
	swaps := rows(t, m, "SWAP ")
	t.Log("\n" + speedTable(t, rows(t, m, "SPEED ")))
	for _, row := range swaps {
		t.Log(row)
	}
}

// rows waits for the guest's end and returns the rest of its lines that have the word.
func rows(t *testing.T, m *Machine, word string) (list []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	if exit, err := m.Wait(ctx); exit != 0 || err != nil {
		t.Errorf("exit code %d, %v\n%s", exit, err, m.Console())
	}
	for line := range strings.Lines(m.Console()) {
		if _, row, ok := strings.Cut(line, word); ok { // firmware prints before the first
			list = append(list, strings.TrimSpace(row))
		}
	}
	return list
}

// speedTable sums up the rows of speedJob: a line for each load and device, with the
// median of the rate, of its ratio to the loop device's in the same round, and of the
// processor's time.
func speedTable(t *testing.T, rows []string) string {
	type run struct{ iops, mib, cpu float64 }
	type key struct{ load, device string }
	var (
		runs = map[key][]run{}
		keys []key // in the order of the first round
	)
	for _, row := range rows {
		var k key
		var r run
		if _, err := fmt.Sscanf(row, "%s %s %f IOPS %f MiB/s %f", &k.device, &k.load, &r.iops, &r.mib, &r.cpu); err != nil {
			t.Fatalf("row %q: %v", row, err)
		}
		if runs[k] == nil {
			keys = append(keys, k)
		}
		runs[k] = append(runs[k], r)
	}
	slices.SortStableFunc(keys, func(a, b key) int { return cmp.Compare(a.load, b.load) })
	var b strings.Builder
	b.WriteString("| load | device | IOPS | MiB/s | ratio to loop | CPU s/GiB |\n| --- | --- | ---: | ---: | ---: | ---: |\n")
	for _, k := range keys {
		loop := runs[key{k.load, "loop"}]
		if len(runs[k]) != len(loop) {
			t.Fatalf("%s has %d runs of %s, loop has %d", k.device, len(runs[k]), k.load, len(loop))
		}
		iops, ratio := bench.Compare(runs[k], loop, func(r run) float64 { return r.iops })
		mib := bench.Median(runs[k], func(r run) float64 { return r.mib })
		cpu := bench.Median(runs[k], func(r run) float64 { return r.cpu })
		fmt.Fprintf(&b, "| %s | %s | %.0f | %.1f | %.2f | %.1f |\n", k.load, k.device, iops, mib, ratio, cpu)
	}
	return b.String()
}
