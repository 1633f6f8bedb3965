// Command cutload runs in a virtual machine whose power is cut: it serves a
// volume that is being merged through a transport, writes to the device, and
// reports what was flushed. After a cut it is run again and checks that nothing
// flushed is lost. See the power cut test of package vm.
//
// Usage: cutload DIR TRANSPORT EPOCHS write [c|b N] | finish
//
// With c or b the guest's kernel crashes (c) or resets the machine (b) after N
// operations, by sysrq.
//
// DIR has base.img, snapshot.cow, want.img (what the COW makes of the base) and,
// after the first run, the volume. EPOCHS is a file with the epochs so far and the
// present one as its last, in JSON. On /dev/ttyS1 it reports:
//
//	percent P    how far the merge is, after every opening
//	settled      all that was flushed is there, and the rest is undone
//	acked N      operations 0 to N-1 of this epoch are flushed
//	merged       finish: the base is the expected image
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/transport"
	"github.com/snapmerge/snapmerge/pkg/transport/dmuser"
	"github.com/snapmerge/snapmerge/pkg/transport/fuseloop"
	"github.com/snapmerge/snapmerge/pkg/transport/nbd"
	"github.com/snapmerge/snapmerge/pkg/transport/ublk"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

func main() {
	var end sysrq
	switch len(os.Args) {
	case 5:
	case 7:
		end.key = os.Args[5]
		end.after, _ = strconv.Atoi(os.Args[6])
	default:
		fmt.Fprintln(os.Stderr, "usage: cutload DIR TRANSPORT EPOCHS write [c|b N] | finish")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4] == "finish", end); err != nil {
		fmt.Println("cutload:", err)
		os.Exit(1)
	}
}

// sysrq is how the guest ends itself.
type sysrq struct {
	key   string // of /proc/sysrq-trigger; empty: not at all
	after int    // operations
}

var transports = map[string]func(dir string) transport.Transport{
	"dm-user": func(string) transport.Transport { return dmuser.New(nil) },
	"ublk":    func(dir string) transport.Transport { return ublk.New(filepath.Join(dir, "ublk")) },
	"fuse":    func(string) transport.Transport { return fuseloop.New(nil) },
	"nbd":     func(dir string) transport.Transport { return nbd.New(filepath.Join(dir, "nbd")) },
}

func run(dir, kind, epochFile string, finish bool, end sysrq) error {
	var epochs []Epoch
	raw, err := os.ReadFile(epochFile)
	if err == nil {
		err = json.Unmarshal(raw, &epochs)
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/ttyS1", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	port := &port{f}
	initial, err := os.ReadFile(filepath.Join(dir, "want.img"))
	if err != nil {
		return err
	}
	v, err := openVolume(dir, int64(len(initial)))
	if err != nil {
		return err
	}
	if err := port.say("percent %.0f", v.Status().Percent); err != nil {
		return err
	}
	dev, err := transports[kind](dir).Create(context.Background(), "cut", v, transport.Options{})
	if err != nil {
		return err
	}
	v.Start()
	past, present := epochs[:len(epochs)-1], epochs[len(epochs)-1]
	g := &guest{want: expect(initial, past), blocks: len(initial) / blockSize, port: port, end: end}
	if err := g.open(dev.Path()); err != nil {
		return err
	}
	if err := g.settle(); err != nil {
		return err
	}
	if !finish {
		return g.write(present.Seed)
	}
	if err := g.f.Close(); err != nil {
		return err
	}
	return merged(v, dev, g.want, filepath.Join(dir, "base.img"), port)
}

// openVolume makes the volume if it is not there, with small windows and a slow
// merge so that cuts find it under way.
func openVolume(dir string, size int64) (*volume.Volume, error) {
	at := filepath.Join(dir, "volume")
	_, err := volume.ReadRecord(blockio.OS(), at)
	if errors.Is(err, fs.ErrNotExist) {
		err = volume.Create(blockio.OS(), at, volume.Spec{
			ID: "cut", Size: size, Base: filepath.Join(dir, "base.img"),
			COWs:   []volume.COWSource{{Path: filepath.Join(dir, "snapshot.cow")}},
			Limits: volume.DefaultLimits, WindowBlocks: 100, SegmentBytes: 1 << 20,
		})
		if err == nil {
			err = blockio.OS().SyncDir(dir)
		}
	}
	if err != nil {
		return nil, err
	}
	return volume.Open(volume.Config{FS: blockio.OS(), Dir: at, IO: blockio.Auto, Rate: 1, Log: klog.Background()})
}

// guest works on the device.
type guest struct {
	want   *expected
	blocks int
	port   *port
	end    sysrq
	f      *os.File

	mu        sync.Mutex
	changed   *sync.Cond
	acked     int    // operations flushed
	completed int    // all below are written
	done      []bool // from completed on: window of them
	err       error
}

func (g *guest) open(path string) (err error) {
	g.f, err = os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	return err
}

// stride is how much is read at a time to check the device.
const stride = 32 * blockSize

// settle checks every block, and brings those that hold something that was
// never flushed back to what was.
func (g *guest) settle() error {
	arena, err := blockio.NewArena(stride)
	if err != nil {
		return err
	}
	defer arena.Close()
	undone := 0
	for first := 0; first < g.blocks; first += stride / blockSize {
		if _, err := g.f.ReadAt(arena.Bytes(), int64(first)*blockSize); err != nil {
			return err
		}
		for i := range stride / blockSize {
			p := arena.Bytes()[i*blockSize : (i+1)*blockSize]
			allowed, exact := g.want.check(first+i, p)
			if !allowed {
				return fmt.Errorf("LOST: block %d holds neither what was flushed nor what was written later: % x", first+i, p[:32])
			}
			if exact {
				continue
			}
			undone++
			g.want.flushed(first+i, p)
			if _, err := g.f.WriteAt(p, int64(first+i)*blockSize); err != nil {
				return err
			}
		}
	}
	if err := g.f.Sync(); err != nil {
		return err
	}
	fmt.Printf("checked %d blocks, %d had data that were not flushed\n", g.blocks, undone)
	return g.port.say("settled")
}

// write writes and flushes until the power goes.
func (g *guest) write(seed uint64) error {
	g.changed = sync.NewCond(&g.mu)
	g.done = make([]bool, window)
	for w := range writers {
		go g.writer(seed, w)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for {
		// A cut should find writes that are not flushed, few or many.
		least := 1 + rng.IntN(window/2)
		g.mu.Lock()
		for g.completed < g.acked+least && g.err == nil {
			g.changed.Wait()
		}
		n, err := g.completed, g.err
		g.mu.Unlock()
		if err == nil {
			err = g.f.Sync()
		}
		if err == nil {
			err = g.port.say("acked %d", n)
		}
		if err != nil {
			return err
		}
		g.mu.Lock()
		g.acked = n
		g.changed.Broadcast()
		g.mu.Unlock()
	}
}

// writer does operations w, w+writers, ...
func (g *guest) writer(seed uint64, w int) {
	p, err := blockio.NewArena(blockSize)
	for n := w; err == nil; n += writers {
		g.mu.Lock()
		for n >= g.acked+window-writers && g.err == nil {
			g.changed.Wait()
		}
		g.mu.Unlock()
		o := opOf(seed, n, g.blocks)
		o.content(p.Bytes())
		if o.zero {
			err = zeroOut(g.f, int64(o.block)*blockSize)
		} else {
			_, err = g.f.WriteAt(p.Bytes(), int64(o.block)*blockSize)
		}
		g.complete(n, err)
	}
}

func (g *guest) complete(n int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		g.err = err
	}
	g.done[n%window] = err == nil
	for g.done[g.completed%window] {
		g.done[g.completed%window] = false
		g.completed++
	}
	if g.end.key != "" && g.completed >= g.end.after && g.err == nil {
		g.err = os.WriteFile("/proc/sysrq-trigger", []byte(g.end.key), 0) // that was it
	}
	g.changed.Broadcast()
}

// merged waits for the end of the merge, at full speed, and compares the base
// with what it must be.
func merged(v *volume.Volume, dev transport.Device, want *expected, base string, port *port) error {
	if err := v.SetRate(1000); err != nil {
		return err
	}
	for !v.Idle() {
		if err := v.MergeError(); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := errors.Join(dev.Close(ctx), v.Close()); err != nil {
		return err
	}
	got, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	p := make([]byte, blockSize)
	for b := range len(want.initial) / blockSize {
		if want.flushed(b, p); !bytes.Equal(got[b*blockSize:(b+1)*blockSize], p) {
			return fmt.Errorf("LOST: block %d of the merged base is wrong", b)
		}
	}
	return port.say("merged")
}
