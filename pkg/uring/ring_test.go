package uring

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newRing(t testing.TB, entries, flags uint32) *Ring {
	t.Helper()
	r, err := New(entries, flags)
	// ENOMEM: the limit of locked memory, which closed rings count for until the
	// kernel has got around to freeing them.
	for _, reason := range []error{unix.EPERM, unix.ENOSYS, unix.ENOMEM} {
		if errors.Is(err, reason) {
			t.Skip(err)
		}
	}
	if flags != 0 && errors.Is(err, unix.EINVAL) && !hasCommands(t) {
		t.Skipf("rings with flags %#x need kernel 5.19", flags)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// hasCommands tells kernels from 5.19 on from older ones.
func hasCommands(t testing.TB) bool {
	t.Helper()
	p, err := newRing(t, 1, 0).Probe()
	if err != nil {
		t.Fatal(err)
	}
	return p.Supports(OpUringCmd)
}

// memory is mapped outside the Go heap.
func memory(t testing.TB, size int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	return mem
}

func tempFile(t testing.TB, data []byte) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "f"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		_, err = f.Write(data)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// newPipe makes a pipe.
func newPipe(t testing.TB) (from, to int) {
	t.Helper()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(pipe[0])
		_ = unix.Close(pipe[1])
	})
	return pipe[0], pipe[1]
}

// submit hands everything over, and waits unless a signal comes.
func submit(t testing.TB, r *Ring, wait uint32) {
	t.Helper()
	for {
		_, err := r.Submit(wait)
		if err == nil && r.Pending() == 0 {
			return
		}
		if err != nil && err != syscall.EINTR {
			t.Fatal(err)
		}
	}
}

// do runs one entry and returns its result.
func do(t testing.TB, r *Ring, prepare func(e *SQE)) int32 {
	t.Helper()
	e := r.SQE()
	prepare(e)
	e.UserData = 77
	c := await(t, r)
	if c.UserData != 77 {
		t.Fatalf("completion %+v", c)
	}
	return c.Res
}

// await submits and waits for a completion, through signals.
func await(t testing.TB, r *Ring) CQE {
	t.Helper()
	for {
		if r.Pending() > 0 {
			submit(t, r, 1)
		}
		if c, ok := r.CQE(); ok {
			return c
		}
		submit(t, r, 1)
	}
}

func TestLayout(t *testing.T) {
	var e SQE
	var c CQE
	for name, got := range map[string][2]uintptr{
		"ioprio": {unsafe.Offsetof(e.Ioprio), 2}, "fd": {unsafe.Offsetof(e.Fd), 4}, "off": {unsafe.Offsetof(e.Off), 8},
		"addr": {unsafe.Offsetof(e.Addr), 16}, "len": {unsafe.Offsetof(e.Len), 24}, "flags": {unsafe.Offsetof(e.OpFlags), 28},
		"user_data": {unsafe.Offsetof(e.UserData), 32}, "buf_index": {unsafe.Offsetof(e.BufIndex), 40},
		"file_index": {unsafe.Offsetof(e.FileIndex), 44}, "cmd": {unsafe.Offsetof(e.Cmd), 48},
		"res": {unsafe.Offsetof(c.Res), 8}, "big_cqe": {unsafe.Offsetof(c.Big), 16},
	} {
		if got[0] != got[1] {
			t.Errorf("%s at %d, want %d", name, got[0], got[1])
		}
	}
}

// TestWrapAround pushes many batches of all sizes through small rings and
// expects every entry back exactly once.
func TestWrapAround(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for name, flags := range map[string]uint32{"plain": 0, "big": SetupSQE128 | SetupCQE32, "coop": SetupCoopTaskrun} {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			r := newRing(t, 4, flags)
			next, inFlight := uint64(0), map[uint64]bool{}
			for next < 20000 {
				for range rng.IntN(6) {
					e := r.SQE()
					if e == nil {
						if r.Pending() != 4 {
							t.Fatalf("no entry though only %d are pending", r.Pending())
						}
						break
					}
					e.Nop()
					e.UserData = next
					inFlight[next] = true
					next++
				}
				submit(t, r, uint32(rng.IntN(min(len(inFlight), 4)+1)))
				for len(inFlight) > 4 || rng.IntN(3) > 0 { // at most the 8 that fit
					c, ok := r.CQE()
					if !ok {
						break
					}
					if c.Res != 0 || !inFlight[c.UserData] {
						t.Fatalf("completion %+v", c)
					}
					delete(inFlight, c.UserData)
				}
			}
		})
	}
}

// TestOverflow leaves more completions than the ring holds.
func TestOverflow(t *testing.T) {
	r := newRing(t, 4, 0)
	const n = 100
	for i := range uint64(n) {
		e := r.SQE()
		e.Nop()
		e.UserData = i
		for r.Pending() > 0 {
			if _, err := r.Submit(0); err != nil {
				if err == syscall.EBUSY {
					t.Skip("this kernel takes nothing while completions wait")
				}
				t.Fatal(err)
			}
		}
	}
	seen := map[uint64]bool{}
	for {
		c, ok := r.CQE()
		if !ok {
			break
		}
		seen[c.UserData] = true
	}
	if len(seen) != n {
		t.Errorf("%d completions of %d", len(seen), n)
	}
}

func TestEntriesAreZero(t *testing.T) {
	for _, flags := range []uint32{0, SetupSQE128} {
		r := newRing(t, 2, flags)
		for range 6 {
			e := r.SQE()
			raw := unsafe.Slice((*byte)(unsafe.Pointer(e)), sqeSize-16+len(r.Command(e)))
			if want := map[uint32]int{0: 64, SetupSQE128: 128}[flags]; len(raw) != want {
				t.Fatalf("entry of %d bytes, want %d", len(raw), want)
			}
			if !bytes.Equal(raw, make([]byte, len(raw))) {
				t.Fatalf("left over: %x", raw)
			}
			for i := range raw {
				raw[i] = 0xff
			}
			e.Opcode, e.Flags = 250, 0 // the kernel refuses it
			if c := await(t, r); c.Res != -int32(syscall.EINVAL) {
				t.Fatalf("completion %+v", c)
			}
		}
	}
}

func TestTransfers(t *testing.T) {
	r := newRing(t, 8, 0)
	f := tempFile(t, []byte("0123456789"))
	fd := int(f.Fd())
	mem := memory(t, 1<<16)
	content := func() string {
		data, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	expect := func(what string, got, want int32) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}

	expect("read", do(t, r, func(e *SQE) { e.Read(fd, mem[:5], 3) }), 5)
	if string(mem[:5]) != "34567" {
		t.Errorf("read %q", mem[:5])
	}
	expect("read across the end", do(t, r, func(e *SQE) { e.Read(fd, mem[:5], 7) }), 3)
	expect("read past the end", do(t, r, func(e *SQE) { e.Read(fd, mem[:5], 10) }), 0)
	copy(mem[100:], "ab")
	expect("write", do(t, r, func(e *SQE) { e.Write(fd, mem[100:102], 1) }), 2)
	copy(mem[200:], "XYZ")
	v := []unix.Iovec{{Base: &mem[200], Len: 1}, {Base: &mem[100], Len: 2}, {Base: &mem[201], Len: 2}}
	expect("writev", do(t, r, func(e *SQE) { e.Writev(fd, v, 8) }), 5)
	if got := content(); got != "0ab34567XabYZ" {
		t.Errorf("file is %q", got)
	}
	w := []unix.Iovec{{Base: &mem[300], Len: 3}, {Base: &mem[400], Len: 4}}
	expect("readv", do(t, r, func(e *SQE) { e.Readv(fd, w, 2) }), 7)
	if got := string(mem[300:303]) + string(mem[400:404]); got != "b34567X" {
		t.Errorf("readv %q", got)
	}
	runtime.KeepAlive(v)
	runtime.KeepAlive(w)
	expect("fsync", do(t, r, func(e *SQE) { e.Fsync(fd, 0) }), 0)
	expect("fdatasync", do(t, r, func(e *SQE) { e.Fsync(fd, FsyncDatasync) }), 0)
	expect("fallocate", do(t, r, func(e *SQE) { e.Fallocate(fd, 0, 5000, 3000) }), 0)
	if got := content(); len(got) != 8000 {
		t.Errorf("%d bytes after fallocate", len(got))
	}
	expect("punch", do(t, r, func(e *SQE) {
		e.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1, 3)
	}), 0)
	if got := content(); got[:6] != "0\x00\x00\x0045" {
		t.Errorf("after punching %q", got[:6])
	}

	expect("bad descriptor", do(t, r, func(e *SQE) { e.Read(1<<20, mem[:5], 0) }), -int32(syscall.EBADF))
	expect("bad address", do(t, r, func(e *SQE) { e.Read(fd, nil, 0); e.Len = 5 }), -int32(syscall.EFAULT))
	refused := -int32(syscall.EOPNOTSUPP)
	if !hasCommands(t) {
		refused = -int32(syscall.EINVAL)
	}
	expect("command", do(t, r, func(e *SQE) { e.UringCmd(fd, 1) }), refused)
}

func TestRegistered(t *testing.T) {
	r := newRing(t, 4, 0)
	f := tempFile(t, []byte("0123456789"))
	mem := memory(t, 1<<16)
	if err := r.RegisterBuffers([][]byte{mem[:4096], mem[8192:12288]}); err != nil {
		t.Fatal(err)
	}
	if err := r.RegisterFiles([]int32{-1, int32(f.Fd())}); err != nil {
		t.Fatal(err)
	}
	fixed := func(prepare func(e *SQE)) int32 {
		return do(t, r, func(e *SQE) {
			prepare(e)
			e.Flags |= FixedFile
		})
	}
	if n := fixed(func(e *SQE) { e.ReadFixed(1, mem[8200:8204], 2, 1) }); n != 4 || string(mem[8200:8204]) != "2345" {
		t.Errorf("read: %d, %q", n, mem[8200:8204])
	}
	copy(mem[10:], "ab")
	if n := fixed(func(e *SQE) { e.WriteFixed(1, mem[10:12], 0, 0) }); n != 2 {
		t.Errorf("write: %d", n)
	}
	if data, err := os.ReadFile(f.Name()); string(data) != "ab23456789" || err != nil {
		t.Errorf("file is %q, %v", data, err)
	}
	if n := fixed(func(e *SQE) { e.ReadFixed(1, mem[8200:8204], 2, 0) }); n != -int32(syscall.EFAULT) {
		t.Errorf("memory outside of the buffer: %d", n)
	}
	if n := fixed(func(e *SQE) { e.ReadFixed(0, mem[:4], 0, 0) }); n != -int32(syscall.EBADF) {
		t.Errorf("file slot without a file: %d", n)
	}
	if err := r.UnregisterBuffers(); err != nil {
		t.Error(err)
	}
	if err := r.UnregisterFiles(); err != nil {
		t.Error(err)
	}
	if err := r.UnregisterFiles(); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("unregister twice: %v", err)
	}
	for _, err := range []error{r.RegisterBuffers(nil), r.RegisterFiles(nil)} {
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("register nothing: %v", err)
		}
	}
}

// TestLateCompletion waits for a transfer that cannot be done at once, while
// another one overtakes it.
func TestLateCompletion(t *testing.T) {
	r := newRing(t, 4, 0)
	from, to := newPipe(t)
	mem := memory(t, 4096)
	e := r.SQE()
	e.Read(from, mem[:10], -1)
	e.UserData = 1
	e = r.SQE()
	e.Nop()
	e.UserData = 2
	if c := await(t, r); c.UserData != 2 {
		t.Fatalf("completion %+v", c)
	}
	if c, ok := r.CQE(); ok {
		t.Fatalf("completion %+v before there is data", c)
	}
	written := make(chan error)
	go func() {
		_, err := unix.Write(to, []byte("hello"))
		written <- err
	}()
	if c := await(t, r); c.UserData != 1 || c.Res != 5 || string(mem[:5]) != "hello" {
		t.Errorf("completion %+v, %q", c, mem[:5])
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// TestManyTransfers keeps a ring full of reads of a file in random order.
func TestManyTransfers(t *testing.T) {
	const blocks, size = 512, 4096
	data := make([]byte, blocks*size)
	for i := range data {
		data[i] = byte(i / size * 31)
	}
	f := tempFile(t, data)
	r := newRing(t, 16, 0)
	mem := memory(t, len(data))
	order := rand.Perm(blocks)
	done := 0
	for len(order) > 0 || done < blocks {
		for len(order) > 0 {
			e := r.SQE()
			if e == nil {
				break
			}
			b := order[0]
			order = order[1:]
			e.Read(int(f.Fd()), mem[b*size:(b+1)*size], int64(b*size))
			e.UserData = uint64(b)
		}
		submit(t, r, 1)
		for {
			c, ok := r.CQE()
			if !ok {
				break
			}
			if c.Res != size {
				t.Fatalf("block %d: %d", c.UserData, c.Res)
			}
			done++
		}
	}
	if !bytes.Equal(mem, data) {
		t.Error("wrong data")
	}
}

func TestProbe(t *testing.T) {
	r := newRing(t, 1, 0)
	p, err := r.Probe()
	if err != nil {
		t.Fatal(err)
	}
	for _, op := range []uint8{OpNop, OpReadv, OpWritev, OpFsync, OpReadFixed, OpWriteFixed, OpFallocate, OpRead, OpWrite} {
		if !p.Supports(op) {
			t.Errorf("opcode %d is not supported", op)
		}
	}
	if p.Supports(255) {
		t.Error("opcode 255 is supported")
	}
}

func TestSetupErrors(t *testing.T) {
	newRing(t, 1, 0) // skips where there is none
	for _, test := range []struct{ entries, flags uint32 }{{0, 0}, {1 << 20, 0}, {1, 1 << 31}} {
		if r, err := New(test.entries, test.flags); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: %v, %v", test, r, err)
		}
	}
}

func TestClose(t *testing.T) {
	before := openFiles(t)
	for range 50 {
		r, err := New(64, 0)
		if err != nil {
			t.Skip(err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Fatal(err)
		}
		if r.SQE() != nil || r.Pending() != 0 || r.Fd() != -1 {
			t.Error("a closed ring works")
		}
		if _, ok := r.CQE(); ok {
			t.Error("a closed ring has completions")
		}
		_, err = r.Submit(0)
		for _, err := range []error{err, r.RegisterFiles([]int32{1}), r.UnregisterBuffers()} {
			if !errors.Is(err, os.ErrClosed) {
				t.Errorf("closed ring: %v", err)
			}
		}
	}
	if after := openFiles(t); !slices.Equal(before, after) {
		t.Errorf("descriptors before %v, after %v", before, after)
	}
}

func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func BenchmarkNop(b *testing.B) {
	r := newRing(b, 32, 0)
	b.ReportAllocs()
	for b.Loop() {
		for range 32 {
			r.SQE().Nop()
		}
		for range 32 {
			await(b, r)
		}
	}
}
