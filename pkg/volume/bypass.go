package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/snapmerge/snapmerge/pkg/volume/pacing"
)

// bypass counts the requests of the guest that go past the volume, by what the kernel
// counts of its device.
type bypass struct {
	mu          sync.Mutex
	stat        string // the kernel's file, while there are such requests; else ""
	all         bool   // not reads and writes alone
	start, last kernelCounts
	sum         kernelCounts // of earlier times; it has nothing in flight
}

// kernelCounts are a device's, as in Documentation/block/stat.rst.
type kernelCounts struct {
	read, write, zero, flush kernelRequests
	inFlight                 int64
}

// kernelRequests are those of one kind that have ended.
type kernelRequests struct {
	done, bytes uint64
	took        time.Duration
}

func (k kernelRequests) plus(o kernelRequests) kernelRequests {
	return kernelRequests{k.done + o.done, k.bytes + o.bytes, k.took + o.took}
}

func (k kernelRequests) minus(o kernelRequests) kernelRequests {
	return kernelRequests{k.done - o.done, k.bytes - o.bytes, k.took - o.took}
}

// add adds them to what was counted here.
func (r Requests) add(k kernelRequests) Requests {
	r.Done, r.Bytes, r.Seconds = r.Done+k.done, r.Bytes+k.bytes, r.Seconds+k.took.Seconds()
	return r
}

// follow has the requests of a device counted from now on, reads and writes alone or
// all of them; none if dev is "".
func (b *bypass) follow(dev string, all bool) {
	stat := ""
	if dev != "" {
		stat = filepath.Join("/sys/class/block", filepath.Base(dev), "stat")
	}
	b.followFile(stat, all)
}

func (b *bypass) followFile(stat string, all bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if stat == b.stat {
		return
	}
	b.sum = b.valueLocked()
	b.sum.inFlight = 0
	b.stat, b.all, b.start, b.last = stat, all, kernelCounts{}, kernelCounts{}
	if stat == "" {
		return
	}
	if c, err := readStat(stat); err == nil {
		b.start, b.last = c, c
	}
}

// value only grows, but for what is in flight.
func (b *bypass) value() kernelCounts {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.valueLocked()
}

// valueLocked: mu must be held.
func (b *bypass) valueLocked() kernelCounts {
	if b.stat == "" {
		return b.sum
	}
	if c, err := readStat(b.stat); err == nil {
		b.last = c
	} else {
		b.last.inFlight = 0
	}
	v := kernelCounts{
		read: b.sum.read.plus(b.last.read.minus(b.start.read)), write: b.sum.write.plus(b.last.write.minus(b.start.write)),
		zero: b.sum.zero, flush: b.sum.flush, inFlight: b.last.inFlight,
	}
	if b.all {
		v.zero, v.flush = v.zero.plus(b.last.zero.minus(b.start.zero)), v.flush.plus(b.last.flush.minus(b.start.flush))
	}
	return v
}

// readStat reads a file /sys/block/*/stat as kernels have it from 5.5 on.
func readStat(name string) (kernelCounts, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return kernelCounts{}, err
	}
	v, err := pacing.StatFields(string(b), 17)
	if err != nil {
		return kernelCounts{}, fmt.Errorf("%s: %w", name, err)
	}
	requests := func(done, sectors, ms int64) kernelRequests {
		return kernelRequests{uint64(done), uint64(sectors * pacing.SectorSize), time.Duration(ms) * time.Millisecond}
	}
	return kernelCounts{
		read: requests(v[0], v[2], v[3]), write: requests(v[4], v[6], v[7]), zero: requests(v[11], v[13], v[14]),
		flush: requests(v[15], 0, v[16]), inFlight: v[8],
	}, nil
}
