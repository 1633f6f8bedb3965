package ublk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/devicetest"
)

// short is a backend that moves less than asked, with an error or without.
type short struct {
	*devicetest.Memory
	err error
}

func (s short) ReadAt(p []byte, _ int64) (int, error)  { return len(p) - 1, s.err }
func (s short) WriteAt(p []byte, _ int64) (int, error) { return len(p) - 1, s.err }

// ended is one that gives io.EOF together with the last byte.
type ended struct{ *devicetest.Memory }

func (e ended) ReadAt(p []byte, _ int64) (int, error) { return len(p), io.EOF }

func TestServe(t *testing.T) {
	const size = 64 << 10
	m := devicetest.NewMemory(size)
	p := bytes.Repeat([]byte{7}, maxIO)
	for _, tt := range []struct {
		name     string
		readOnly bool
		d        ioDesc
		want     int32
	}{
		{"write", false, ioDesc{op: opWrite, off: 4096, n: 8192}, 8192},
		{"write of half a block", false, ioDesc{op: opWrite, off: 512, n: 512}, 512},
		{"read", true, ioDesc{op: opRead, off: size - 4096, n: 4096}, 4096},
		{"zero", false, ioDesc{op: opWriteZeroes, off: 8192, n: 4096}, 4096},
		{"discard", false, ioDesc{op: opDiscard, off: 0, n: size}, size},
		{"flush", true, ioDesc{op: opFlush}, 0},
		{"across the end", false, ioDesc{op: opRead, off: size - 4096, n: 8192}, -int32(unix.EIO)},
		{"beyond the end", false, ioDesc{op: opDiscard, off: size + 4096, n: 512}, -int32(unix.EIO)},
		{"offset overflows", false, ioDesc{op: opRead, off: -512, n: 512}, -int32(unix.EIO)},
		{"read-only write", true, ioDesc{op: opWrite, n: 512}, -int32(unix.EROFS)},
		{"read-only discard", true, ioDesc{op: opDiscard, n: 512}, -int32(unix.EROFS)},
		{"unknown", false, ioDesc{op: 4, n: 512}, -int32(unix.EIO)},
	} {
		if got := serve(m, tt.readOnly, tt.d, p); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	if got := serve(devicetest.NewMemory(4*maxIO), false, ioDesc{op: opRead, n: maxIO + 512}, p); got != -int32(unix.EIO) {
		t.Errorf("more than the buffer holds: %d", got)
	}
	flushes := m.Flushes.Load()
	if got := serve(m, false, ioDesc{op: opWrite, n: 512, fua: true}, p); got != 512 || m.Flushes.Load() != flushes+1 {
		t.Errorf("FUA: %d, %d flushes", got, m.Flushes.Load()-flushes)
	}
	for _, b := range []short{{m, nil}, {m, io.EOF}, {m, unix.ENOSPC}} {
		want := -int32(unix.EIO)
		if b.err == unix.ENOSPC {
			want = -int32(unix.ENOSPC)
		}
		for _, op := range []ioOp{opRead, opWrite} {
			if got := serve(b, false, ioDesc{op: op, n: 512}, p); got != want {
				t.Errorf("short with %v: %d, want %d", b.err, got, want)
			}
		}
	}
	if got := serve(ended{m}, false, ioDesc{op: opRead, n: 512}, p); got != 512 {
		t.Errorf("whole read at the end: %d", got)
	}
}

func TestResult(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want unix.Errno
	}{
		{unix.ENOSPC, unix.ENOSPC}, {fmt.Errorf("log: %w", unix.ENOSPC), unix.ENOSPC}, {unix.EROFS, unix.EROFS},
		{errors.New("plain"), unix.EIO}, {unix.EOPNOTSUPP, unix.EIO}, {unix.ENODEV, unix.EIO}, {unix.EAGAIN, unix.EIO},
		{unix.EINTR, unix.EIO}, {unix.Errno(0), unix.EIO}, {unix.Errno(4096), unix.EIO},
	} {
		if got := result(9, tt.err); got != -int32(tt.want) {
			t.Errorf("%v: %d, want %d", tt.err, got, -int32(tt.want))
		}
	}
	if got := result(9, nil); got != 9 {
		t.Errorf("no error: %d", got)
	}
}

// TestABI compares opcodes with what the macros of linux/ublk_cmd.h come to on
// x86, and layouts with themselves and with a request written by hand.
func TestABI(t *testing.T) {
	for got, want := range map[uint32]uint32{
		cmdGetDevInfo: 0x80207502, cmdAddDev: 0xc0207504, cmdDelDev: 0xc0207505, cmdStartDev: 0xc0207506, cmdStopDev: 0xc0207507,
		cmdSetParams: 0xc0207508, cmdGetParams: 0x80207509, cmdStartRecovery: 0xc0207510, cmdEndRecovery: 0xc0207511,
		cmdGetFeatures: 0x80207513, cmdUpdateSize: 0xc0207515, ioFetch: 0xc0107520, ioCommit: 0xc0107521,
	} {
		if got != want {
			t.Errorf("opcode %#x, want %#x", got, want)
		}
	}
	b := make([]byte, 4096)
	in := devInfo{queues: 3, depth: 64, maxIO: maxIO, id: 9, flags: flagsNeeded, tag: 0x1122334455667788}
	in.encode(b)
	var out devInfo
	if out.decode(b); out != in {
		t.Errorf("device: %+v, want %+v", out, in)
	}
	p := params{readOnly: true, size: 5 << 40}
	p.encode(b)
	var q params
	if q.decode(b); q != p {
		t.Errorf("parameters: %+v, want %+v", q, p)
	}
	desc := []byte{1, 0x20, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if d := decodeDesc(desc); d != (ioDesc{op: opWrite, fua: true, n: 4096, off: (1<<40 + 3) * 512}) {
		t.Errorf("request: %+v", d)
	}
	if descBytes(maxDepth) != 98304 || descBytes(32) != 4096 {
		t.Errorf("descriptors take %d and %d bytes", descBytes(maxDepth), descBytes(32))
	}
}
