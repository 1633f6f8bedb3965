package pacing

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// foreignRate is what others move through the disk, in bytes per second, when
	// they count: a thousand small requests. Less may be what our own I/O has the
	// file system do, such as its journal.
	foreignRate = 4 << 20
	// stalledShare is the share of time in which somebody waits for I/O.
	stalledShare = 0.1
	// aheadMost bounds the bytes of ours that the disk is believed to see later: what
	// is written through the page cache counts for the process before it gets to
	// the disk.
	aheadMost = 64 << 20

	// SectorSize is the unit of lengths in block/stat, in bytes, whatever the device
	// has.
	SectorSize = 512
)

// disk tells others' use of a block device from our own.
type disk struct {
	read func() (usage, error) // nil: there is nothing to read
	last usage
	// ahead are bytes that we moved and the disk has not shown yet.
	ahead int64
}

// usage is what was moved so far.
type usage struct {
	device, own int64         // bytes: by the device, by this process
	stalled     time.Duration // for which somebody waited for I/O
}

// newDisk is the disk below a directory. Without signals nobody else is ever seen
// there.
func newDisk(dir string) *disk {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &disk{}
	}
	stat := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	d := &disk{read: func() (usage, error) { return readUsage(stat, "/proc/self/io", "/proc/pressure/io") }}
	if _, err := d.read(); err != nil {
		return &disk{}
	}
	return d
}

// crowded tells whether others have used the disk, and somebody has waited for I/O,
// in the time since the last call.
func (d *disk) crowded(span time.Duration) bool {
	if d.read == nil {
		return false
	}
	u, err := d.read()
	if err != nil {
		return false
	}
	moved, own := u.device-d.last.device, u.own-d.last.own
	stalled := u.stalled - d.last.stalled
	d.last = u
	ours := min(d.ahead+own, moved)
	d.ahead = max(0, min(d.ahead+own-ours, aheadMost))
	return float64(moved-ours) >= foreignRate*span.Seconds() && float64(stalled) >= stalledShare*float64(span)
}

// readUsage reads the files of those names; there may be no pressure.
func readUsage(stat, self, pressure string) (u usage, err error) {
	b, err := os.ReadFile(stat)
	if err != nil {
		return u, err
	}
	var busy time.Duration
	if u.device, busy, err = parseStat(string(b)); err != nil {
		return u, fmt.Errorf("%s: %w", stat, err)
	}
	if b, err = os.ReadFile(self); err != nil {
		return u, err
	}
	if u.own, err = parseOwn(string(b)); err != nil {
		return u, fmt.Errorf("%s: %w", self, err)
	}
	u.stalled = busy
	if b, err := os.ReadFile(pressure); err == nil {
		if t, err := parsePressure(string(b)); err == nil {
			u.stalled = t
		}
	}
	return u, nil
}

// parseStat reads Documentation/block/stat.rst: the bytes that were read and
// written, and the time in which requests were in flight.
func parseStat(s string) (bytes int64, busy time.Duration, err error) {
	const readSectors, writeSectors, ioTicks = 2, 6, 9
	v, err := StatFields(s, ioTicks+1)
	if err != nil {
		return 0, 0, err
	}
	return (v[readSectors] + v[writeSectors]) * SectorSize, time.Duration(v[ioTicks]) * time.Millisecond, nil
}

// StatFields reads the first n fields of Documentation/block/stat.rst. There may be
// more.
func StatFields(s string, n int) ([]int64, error) {
	f := strings.Fields(s)
	if len(f) < n {
		return nil, fmt.Errorf("%d fields", len(f))
	}
	v := make([]int64, n)
	for i := range v {
		var err error
		if v[i], err = strconv.ParseInt(f[i], 10, 64); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// parseOwn reads proc_pid_io(5): what the process had disks read and write, what
// is not written yet included.
func parseOwn(s string) (bytes int64, err error) {
	found := 0
	for line := range strings.Lines(s) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if name != "read_bytes" && name != "write_bytes" {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return 0, err
		}
		bytes += n
		found++
	}
	if found != 2 {
		return 0, fmt.Errorf("read_bytes or write_bytes is missing")
	}
	return bytes, nil
}

// parsePressure reads Documentation/accounting/psi.rst: how long some task waited.
func parsePressure(s string) (time.Duration, error) {
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "some ") {
			continue
		}
		_, total, ok := strings.Cut(strings.TrimSpace(line), " total=")
		if !ok {
			break
		}
		us, err := strconv.ParseInt(total, 10, 64)
		return time.Duration(us) * time.Microsecond, err
	}
	return 0, fmt.Errorf("no line \"some … total=\"")
}
