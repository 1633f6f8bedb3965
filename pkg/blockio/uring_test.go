package blockio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestRingFails takes the ring away under a queue: before a batch, and at some
// moment in the middle of one. No transfer may be lost, and the queue goes on
// without a ring.
func TestRingFails(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const size = 8 << 20
	for round := range 12 {
		q := newQueue(t, URing, 8).(*uringQueue)
		flag := Flag(0)
		if round%2 == 1 {
			flag = Direct
		}
		f := open(t, filepath.Join(t.TempDir(), "f"), Create|flag)
		ok(t, f.Truncate(size))
		arena, err := NewArena(size)
		ok(t, err)
		defer arena.Close()
		for i := range arena.Bytes() {
			arena.Bytes()[i] = byte(i/4096 + i)
		}
		var batch []Request
		for off := 0; off < size; off += 8192 { // nothing to join
			batch = append(batch, Request{Buf: arena.Bytes()[off : off+4096], Off: int64(off)})
		}
		rng.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
		// The ring's descriptor becomes one that cannot be entered.
		null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
		ok(t, err)
		defer unix.Close(null)
		ringFd, delay := q.ring.Fd(), time.Duration(rng.IntN(10_000))*time.Microsecond
		taken := make(chan error)
		takeAway := func() { taken <- unix.Dup3(null, ringFd, unix.O_CLOEXEC) }
		if round < 2 {
			go takeAway()
			ok(t, <-taken)
		} else {
			time.AfterFunc(delay, takeAway)
		}
		ok(t, q.Write(f, batch))
		if round >= 2 {
			ok(t, <-taken)
		}
		got := make([]byte, size)
		_, err = f.ReadAt(got, 0)
		ok(t, err)
		for _, r := range batch {
			if !bytes.Equal(got[r.Off:r.Off+4096], r.Buf) {
				t.Fatalf("round %d: lost the write at %d", round, r.Off)
			}
			clear(r.Buf)
		}
		ok(t, q.Read(f, batch))
		for _, r := range batch {
			if !bytes.Equal(got[r.Off:r.Off+4096], r.Buf) {
				t.Fatalf("round %d: wrong data at %d", round, r.Off)
			}
		}
		if q.Kind() != Sync {
			t.Errorf("round %d: still %s without a ring", round, q.Kind())
		}
		if err := q.Read(f, []Request{{Buf: got[:10], Off: size}}); err == nil {
			t.Error("no error from the fallback")
		}
	}
}

// TestResults judges results that the kernel gives rarely.
func TestResults(t *testing.T) {
	f := open(t, filepath.Join(t.TempDir(), "f"), Create)
	f.align = 512
	arena, err := NewArena(8192)
	ok(t, err)
	defer arena.Close()
	for _, test := range []struct {
		res         int
		odd, again  int
		off, length int64 // of the rest
		err         error
	}{
		{res: 8192},
		{res: -int(syscall.EAGAIN), odd: 2, length: 4096},
		{res: -int(syscall.EINTR), odd: 2, length: 4096},
		{res: -int(syscall.EIO), err: syscall.EIO},
		{res: -int(syscall.ECANCELED), err: syscall.ECANCELED},
		{res: 0, err: io.EOF},
		{res: 512, again: 1, off: 512, length: 7680},
		{res: 4096, again: 1, off: 4096, length: 4096},
		{res: 4608, again: 1, off: 4608, length: 3584},
		{res: 100, odd: 2, off: 100, length: 3996},
		{res: 4097, odd: 1, off: 4097, length: 4095},
	} {
		q := &uringQueue{file: f}
		ok(t, q.plan.build([]Request{
			{Buf: arena.Bytes()[4096:], Off: 0}, {Buf: arena.Bytes()[:4096], Off: 4096},
		}, f.align, uringBytes, uringVectors))
		q.finish(0, test.res)
		if len(q.plan.odd) != test.odd || len(q.again) != test.again || !errors.Is(q.err, test.err) {
			t.Errorf("%d: %d odd, %d again, %v", test.res, len(q.plan.odd), len(q.again), q.err)
			continue
		}
		if r := q.plan.runs[0]; test.again > 0 && (r.off != test.off || int64(r.bytes) != test.length) {
			t.Errorf("%d: goes on with %+v", test.res, r)
		}
		if test.odd > 0 && (q.plan.odd[0].Off != test.off || int64(len(q.plan.odd[0].Buf)) != test.length) {
			t.Errorf("%d: leaves %d bytes at %d", test.res, len(q.plan.odd[0].Buf), q.plan.odd[0].Off)
		}
	}
}

// TestRingForbidden runs itself under a seccomp filter like a container's.
func TestRingForbidden(t *testing.T) {
	const inside = "BLOCKIO_TEST_NO_URING"
	if os.Getenv(inside) != "" {
		forbidURing(t)
		err := ProbeURing()
		fmt.Println("probe:", err)
		if _, urErr := NewQueue(URing, 4); !errors.Is(err, syscall.EPERM) || !errors.Is(urErr, syscall.EPERM) {
			t.Errorf("probe %v, queue %v", err, urErr)
		}
		q, err := NewQueue(Auto, 4)
		ok(t, err)
		if q.Kind() != Sync {
			t.Errorf("auto is %s", q.Kind())
		}
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestRingForbidden$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "seccomp") || strings.Contains(string(out), "SKIP") {
		t.Errorf("%v\n%s", err, out)
	}
}

// forbidURing makes io_uring_setup fail with EPERM in all threads, for ever.
func forbidURing(t *testing.T) {
	t.Helper()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // struct seccomp_data: nr
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: unix.SYS_IO_URING_SETUP},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // a filter needs no_new_privs of the same thread
		defer runtime.UnlockOSThread()
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			done <- err
			return
		}
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
			uintptr(unsafe.Pointer(&prog)))
		if errno != 0 {
			done <- errno
			return
		}
		done <- nil
	}()
	ok(t, <-done)
}

func TestProbeURing(t *testing.T) {
	if err := ProbeURing(); err != nil {
		t.Skip(err)
	}
	if err := tryURing(); err != nil {
		t.Errorf("second look: %v", err)
	}
}

// BenchmarkQueue moves 16 MiB in batches: 4 KiB blocks with gaps,
// or all blocks of a range, which are joined.
func BenchmarkQueue(b *testing.B) {
	const size, block = 64 << 20, 4096
	for _, flag := range []Flag{0, Direct} {
		for _, pattern := range []string{"scattered", "joined"} {
			for _, write := range []bool{false, true} {
				for _, kind := range []Kind{Sync, URing} {
					name := fmt.Sprintf("%s/direct=%v/%s/%s", kind, flag == Direct, pattern, opName(write))
					b.Run(name, func(b *testing.B) {
						q := newQueue(b, kind, 64)
						f := open(b, filepath.Join(b.TempDir(), "f"), Create|flag)
						arena, err := NewArena(16 << 20)
						ok(b, err)
						defer arena.Close()
						for off := int64(0); off < size; off += 16 << 20 {
							ok(b, second(f.WriteAt(arena.Bytes(), off)))
						}
						ok(b, f.Flush())
						var batch []Request
						for i := range 16 << 20 / block {
							off := int64(i * block)
							if pattern == "scattered" {
								off = int64(i*3+i%2) * block
							}
							batch = append(batch, Request{Buf: arena.Bytes()[i*block : (i+1)*block], Off: off})
						}
						move := q.Read
						if write {
							move = q.Write
						}
						b.SetBytes(16 << 20)
						b.ReportAllocs()
						var before, after unix.Rusage
						ok(b, unix.Getrusage(unix.RUSAGE_SELF, &before))
						for b.Loop() {
							ok(b, move(f, batch))
						}
						ok(b, unix.Getrusage(unix.RUSAGE_SELF, &after))
						cpu := unix.TimevalToNsec(after.Utime) + unix.TimevalToNsec(after.Stime) -
							unix.TimevalToNsec(before.Utime) - unix.TimevalToNsec(before.Stime)
						b.ReportMetric(float64(cpu)/1e6/float64(b.N), "cpu-ms/op")
					})
				}
			}
		}
	}
}
