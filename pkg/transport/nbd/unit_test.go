package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/test/devicetest"
	"github.com/snapmerge/snapmerge/test/machine"
)

const patience = devicetest.Patience

// driver is the kernel's end of a connection.
type driver struct {
	t    *testing.T
	c    net.Conn
	stop func() error // ends the connection and returns what the server says
}

// connectTo serves a connection of s.
func connectTo(t *testing.T, s *server) *driver {
	t.Helper()
	ours, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := s.serve(context.Background(), ours)
		ours.Close()
		ended <- err
	}()
	stop := sync.OnceValue(func() error {
		c.Close()
		return <-ended
	})
	t.Cleanup(func() { _ = stop() })
	return &driver{t, c, stop}
}

func (d *driver) send(typ, flags uint16, cookie uint64, off int64, n int, data []byte) {
	d.t.Helper()
	b := make([]byte, requestSize)
	network.PutUint32(b, requestMagic)
	network.PutUint16(b[4:], flags)
	network.PutUint16(b[6:], typ)
	network.PutUint64(b[8:], cookie)
	network.PutUint64(b[16:], uint64(off))
	network.PutUint32(b[24:], uint32(n))
	if _, err := d.c.Write(append(b, data...)); err != nil {
		d.t.Error(err)
	}
}

// reply reads a reply with n bytes of data, if it is a success.
func (d *driver) reply(n int) (cookie uint64, errno unix.Errno, data []byte) {
	d.t.Helper()
	_ = d.c.SetReadDeadline(time.Now().Add(patience))
	head := make([]byte, replySize)
	if _, err := io.ReadFull(d.c, head); err != nil {
		d.t.Fatal(err)
	}
	if network.Uint32(head) != replyMagic {
		d.t.Fatalf("reply % x", head)
	}
	errno = unix.Errno(network.Uint32(head[4:]))
	if errno == 0 {
		data = make([]byte, n)
		if _, err := io.ReadFull(d.c, data); err != nil {
			d.t.Fatal(err)
		}
	}
	return network.Uint64(head[8:]), errno, data
}

func TestProtocol(t *testing.T) {
	m := devicetest.NewMemory(1 << 20)
	d := connectTo(t, newServer(m, false))
	data := bytes.Repeat([]byte("snapmerg"), 1024)
	for i, tt := range []struct {
		typ, flags uint16
		off        int64
		n          int
		data       []byte // of a write
		want       unix.Errno
		flushes    int64
	}{
		{cmdWrite, 0, 4096, 8192, data, 0, 0},
		{cmdWrite, cmdFlagFUA, 16384, 8192, data, 0, 1},
		{cmdFlush, 0, 0, 0, nil, 0, 1},
		{cmdTrim, 0, 8192, 4096, nil, 0, 0},
		{cmdWriteZeroes, cmdFlagFUA | 2, 16384, 4096, nil, 0, 1},
		{cmdRead, 0, 0, 32768, nil, 0, 0},
		{cmdRead, 0, 1<<20 - 4096, 8192, nil, unix.EIO, 0},
		{cmdWrite, 0, 1<<20 - 4096, 8192, data, unix.EIO, 0},
		{cmdTrim, 0, -4096, 4096, nil, unix.EIO, 0},
		{7, 0, 0, 4096, nil, unix.EINVAL, 0},
	} {
		flushes := m.Flushes.Load()
		d.send(tt.typ, tt.flags, uint64(i)<<40|7, tt.off, tt.n, tt.data)
		n := 0
		if tt.typ == cmdRead {
			n = tt.n
		}
		cookie, errno, got := d.reply(n)
		if cookie != uint64(i)<<40|7 || errno != tt.want || m.Flushes.Load()-flushes != tt.flushes {
			t.Errorf("%d: cookie %#x, errno %v, %d flushes", i, cookie, errno, m.Flushes.Load()-flushes)
		}
		if n > 0 && errno == 0 && !bytes.Equal(got, m.Content()[:n]) {
			t.Errorf("%d: read wrong data", i)
		}
	}
	want := make([]byte, 32768)
	copy(want[4096:8192], data)
	copy(want[20480:], data[4096:])
	if !bytes.Equal(m.Content()[:32768], want) {
		t.Error("the backend has not what was written")
	}
	m.FailWith(unix.ENOSPC)
	d.send(cmdWrite, 0, 99, 0, 4096, data[:4096])
	if _, errno, _ := d.reply(0); errno != unix.ENOSPC {
		t.Errorf("backend's error: %v", errno)
	}
	d.send(cmdDisconnect, 0, 0, 0, 0, nil)
	if err := d.stop(); !errors.Is(err, errDisconnect) {
		t.Errorf("disconnect: %v", err)
	}
}

func TestReadOnly(t *testing.T) {
	m := devicetest.NewMemory(1 << 20)
	d := connectTo(t, newServer(m, true))
	d.send(cmdWrite, 0, 1, 0, 4096, make([]byte, 4096))
	if _, errno, _ := d.reply(0); errno != unix.EROFS || m.Writes.Load() != 0 {
		t.Errorf("write: %v", errno)
	}
}

// TestBadStream: what is no request ends the connection.
func TestBadStream(t *testing.T) {
	good := make([]byte, requestSize)
	network.PutUint32(good, requestMagic)
	huge := bytes.Clone(good)
	network.PutUint32(huge[24:], maxTransfer+1)
	for name, b := range map[string][]byte{"magic": make([]byte, requestSize), "too long": huge, "cut": good[:20]} {
		d := connectTo(t, newServer(devicetest.NewMemory(4096), false))
		if _, err := d.c.Write(b); err != nil {
			t.Fatal(err)
		}
		_ = d.c.(*net.UnixConn).CloseWrite()
		if _, err := d.c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.stop(); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// waitFor waits for something that has no event to wait for.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// stamp is a block of a version.
func stamp(version uint64) []byte {
	b := make([]byte, 4096)
	binary.LittleEndian.PutUint64(b, version)
	return b
}

// TestLateWrite is what happens when a write takes the backend longer than the
// driver waits: it comes again on another connection, and must not undo what comes
// after it.
func TestLateWrite(t *testing.T) {
	m := devicetest.NewMemory(1 << 20)
	s := newServer(m, false)
	first, second := connectTo(t, s), connectTo(t, s)
	release := m.Hang()
	first.send(cmdWrite, 0, 1, 0, 4096, stamp(1))
	waitFor(t, "the write arrives", func() bool { return m.Writes.Load() == 1 })
	// The driver gives the first connection up, and sends the write again, twice.
	_ = first.c.Close()
	second.send(cmdWrite, 0, 2, 0, 4096, stamp(1))
	second.send(cmdWrite, 0, 3, 2048, 2048, stamp(7)[:2048])
	second.send(cmdWrite, 0, 4, 8192, 4096, stamp(9)) // other blocks need not wait
	waitFor(t, "the write of other blocks arrives", func() bool { return m.Writes.Load() == 2 })
	waitFor(t, "all have a place", func() bool {
		s.ranges.mu.Lock()
		defer s.ranges.mu.Unlock()
		return len(s.ranges.queue) == 4
	})
	release()
	for range 3 {
		if _, errno, _ := second.reply(0); errno != 0 {
			t.Error(errno)
		}
	}
	second.send(cmdWrite, 0, 5, 0, 4096, stamp(2))
	second.reply(0)
	_, _ = first.stop(), second.stop()
	s.workers.Wait()
	if !bytes.Equal(m.Content()[:4096], stamp(2)) {
		t.Error("an older write came after a newer one")
	}
}

// TestUnreadWrite: a write that lies in the socket of a connection that the driver
// has given up is not carried out.
func TestUnreadWrite(t *testing.T) {
	m := devicetest.NewMemory(1 << 20)
	s := newServer(m, false)
	ours, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.FileConn(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	d := &driver{t: t, c: c}
	d.send(cmdWrite, 0, 1, 0, 4096, stamp(1))
	d.send(cmdTrim, 0, 2, 0, 4096, nil)
	c.Close()
	if err := s.serve(t.Context(), ours); err != io.EOF {
		t.Errorf("serve: %v", err)
	}
	ours.Close()
	s.workers.Wait()
	if m.Writes.Load()+m.Zeros.Load() != 0 || len(s.ranges.queue) != 0 {
		t.Errorf("%d writes, %d zeros, %d places", m.Writes.Load(), m.Zeros.Load(), len(s.ranges.queue))
	}
}

// TestStandsInterrupted: a signal, of which Go sends many, does not make a connection
// look given up.
func TestStandsInterrupted(t *testing.T) {
	ours, theirs, err := pair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	c := &conn{c: ours}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, stop := unix.Gettid(), make(chan struct{})
	var signals sync.WaitGroup
	signals.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end) && !t.Failed(); {
		if !c.stands() {
			t.Error("a living connection passes for given up")
		}
	}
	close(stop)
	signals.Wait()
}

// TestBoundedMemory: a backend that hangs does not have requests pile up.
func TestBoundedMemory(t *testing.T) {
	m := devicetest.NewMemory(maxTransfer)
	s := newServer(m, false)
	d := connectTo(t, s)
	release := m.Hang()
	defer release()
	for i := range 4 { // of 32 MiB each
		d.send(cmdRead, 0, uint64(i), 0, maxTransfer, nil)
	}
	waitFor(t, "two requests are under way", func() bool { return m.Reads.Load() == 2 })
	if s.memory.TryAcquire(1) {
		t.Error("there is room for more")
	}
	release()
	for range 4 {
		if _, errno, _ := d.reply(maxTransfer); errno != 0 {
			t.Error(errno)
		}
	}
	if m.Reads.Load() != 4 {
		t.Errorf("%d reads", m.Reads.Load())
	}
}

// closeDirty has a user of the device, which m serves, write a page and close it. That
// close waits for m, which hangs until release; left has what came of it.
func closeDirty(t *testing.T, path string, m *devicetest.Memory) (left chan error, release func()) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(stamp(1)); err != nil {
		t.Fatal(err)
	}
	release = m.Hang()
	defer func() {
		if t.Failed() { // nobody else would
			release()
		}
	}()
	left = make(chan error, 1)
	go func() { left <- f.Close() }()
	waitFor(t, "the write arrives", func() bool { return m.Writes.Load() > 0 })
	return left, release
}

// TestEndWritesDirtyPages: a user whose close is under way has what he wrote written
// before the device is disconnected. A device of FUSE, under the name of one of NBD, is
// as good for that, and needs no driver of NBD.
func TestEndWritesDirtyPages(t *testing.T) {
	machine.NeedDevices(t, machine.FUSE, machine.Loop)
	const index = 1<<20 - 1 // the driver has no such device
	m := devicetest.NewMemory(1 << 20)
	guest, err := fuseloop.New(nil).Create(t.Context(), "dirty", m, transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer closeDevice(t, guest)
	if err := os.Symlink(guest.Path(), blockPath(index)); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(blockPath(index))
	d := New(t.TempDir()).newDevice("dirty", 1, devicetest.NewMemory(4096), false) // whose flush does not wait
	d.index = index
	close(d.connsDone)

	closed, release := closeDirty(t, guest.Path(), m)
	defer release() // before the device is closed
	ended := make(chan error, 1)
	go func() { ended <- d.end() }()
	select {
	case err := <-ended:
		t.Fatalf("ended while a page was dirty: %v", err)
	case <-time.After(200 * time.Millisecond): // it waits
	}
	release()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil || !bytes.Equal(m.Content()[:4096], stamp(1)) {
		t.Errorf("close: %v", err)
	}
}

func TestLargeZero(t *testing.T) {
	b := &sizes{TryBackend: transport.TryBackend{}}
	s := newServer(b, false)
	if err := s.zero(transport.Request{Op: transport.OpZero, FUA: true, N: 3*maxZero + 4096}); err != nil {
		t.Fatal(err)
	}
	if len(b.zeroed) != 4 || b.zeroed[3] != 4096 || b.flushes != 1 {
		t.Errorf("%v, %d flushes", b.zeroed, b.flushes)
	}
}

// sizes is a large backend that notes what is zeroed.
type sizes struct {
	transport.TryBackend
	zeroed  []int64
	flushes int
}

func (s *sizes) Size() int64 { return 1 << 40 }
func (s *sizes) Flush() error {
	s.flushes++
	return nil
}
func (s *sizes) Zero(_, n int64) error {
	s.zeroed = append(s.zeroed, n)
	return nil
}

// TestDevicesUnknown: devices that cannot be listed do not pass for none, which would have
// their records dropped.
func TestDevicesUnknown(t *testing.T) {
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: had.Max}); err != nil {
		t.Fatal(err)
	}
	devices, err := devicesByTag()
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &had); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("without a descriptor to look with there are %v, %v", devices, err)
	}
}

func TestMain(m *testing.M) {
	devicetest.ServerMain(func(_ context.Context, args []string) (transport.Transport, error) { return New(args[0]), nil })
	os.Exit(m.Run())
}
