// Command dmsnapshot compares three ways to put the same blocks into a disk, for
// measurements in a virtual machine: the kernel's snapshot-merge target, our merge,
// and a plain copy.
//
// Usage: dmsnapshot BASE STORE DIR
//
// BASE and STORE are disks, of which the first 256 MiB are overwritten; DIR is where
// our snapshot and its journal lie, on a third disk. For exceptions that were made in
// random and in ascending order it prints, medians of three rounds in turn, the
// seconds until all is in the base and durable, the requests to all disks, the bytes
// written to them, and the read and write system calls. The base is checked each time.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/devmapper"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

const (
	bs       = blockio.BlockSize
	baseSize = 256 << 20
	changed  = 2048 // blocks
	rounds   = 3
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: dmsnapshot BASE STORE DIR")
		os.Exit(2)
	}
	m := machine{base: os.Args[1], store: os.Args[2], dir: os.Args[3]}
	if err := m.run(); err != nil {
		fmt.Println("dmsnapshot:", err)
		os.Exit(1)
	}
}

type machine struct{ base, store, dir string }

// cost is what a merge took.
type cost struct {
	seconds         float64
	requests, bytes float64 // of all disks; bytes written
	calls           float64 // read and write system calls of this process
}

func (m machine) run() error {
	rng := rand.New(rand.NewPCG(1, 1))
	for _, order := range []string{"random", "ascending"} {
		blocks := rng.Perm(baseSize / bs)[:changed]
		if order == "ascending" {
			slices.Sort(blocks)
		}
		if err := m.writeCOW(blocks); err != nil {
			return err
		}
		ways := []struct {
			name    string
			prepare func(blocks []int) error
			do      func(blocks []int) error
		}{
			{"dm-snapshot", m.makeExceptions, m.kernelMerge},
			{"snapmerge", nothing, m.ourMerge},
			{"copy", nothing, m.copy},
		}
		costs := make([][]cost, len(ways))
		for range rounds {
			for i, w := range ways {
				c, err := m.measure(blocks, w.prepare, w.do)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", w.name, order, err)
				}
				costs[i] = append(costs[i], c)
			}
		}
		for i, w := range ways {
			median := func(of func(cost) float64) float64 {
				slices.SortFunc(costs[i], func(a, b cost) int { return cmp.Compare(of(a), of(b)) })
				return of(costs[i][rounds/2])
			}
			fmt.Printf("MERGE %-12s %-10s %8.3f s %8.0f requests %8.1f MiB written %8.0f system calls\n", w.name, order,
				median(func(c cost) float64 { return c.seconds }), median(func(c cost) float64 { return c.requests }),
				median(func(c cost) float64 { return c.bytes })/(1<<20), median(func(c cost) float64 { return c.calls }))
		}
	}
	return nil
}

func nothing([]int) error { return nil }

// measure makes the base anew and does one merge.
func (m machine) measure(blocks []int, prepare, do func([]int) error) (c cost, err error) {
	if err := m.fill(); err != nil {
		return c, err
	}
	if err := prepare(blocks); err != nil {
		return c, err
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return c, err
	}
	requests, written, err := diskStats()
	if err != nil {
		return c, err
	}
	calls, begin := systemCalls(), time.Now()
	if err := do(blocks); err != nil {
		return c, err
	}
	c.seconds, c.calls = time.Since(begin).Seconds(), systemCalls()-calls
	r, w, err := diskStats()
	if err != nil {
		return c, err
	}
	c.requests, c.bytes = r-requests, w-written
	return c, m.check(blocks)
}

// content of a block: before the merge, or after it.
func content(block int, after bool) []byte {
	p := make([]byte, bs)
	for i := 0; i < bs; i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block))
		if after {
			binary.LittleEndian.PutUint64(p[i+8:], uint64(i+1))
		}
	}
	return p
}

// withDisk has fn use a disk by direct I/O and flushes it.
func withDisk(path string, fn func(f blockio.File) error) error {
	f, err := blockio.OS().Open(path, blockio.Direct)
	if err != nil {
		return err
	}
	err = fn(f)
	if err == nil {
		err = f.Flush()
	}
	return errors.Join(err, f.Close())
}

// chunks calls fn for all blocks of the base, 1 MiB at a time.
func chunks(fn func(p []byte, first int) error) error {
	a, err := blockio.NewArena(1 << 20)
	if err != nil {
		return err
	}
	defer a.Close()
	for first := 0; first < baseSize/bs; first += len(a.Bytes()) / bs {
		if err := fn(a.Bytes(), first); err != nil {
			return err
		}
	}
	return nil
}

func (m machine) fill() error {
	return withDisk(m.base, func(f blockio.File) error {
		return chunks(func(p []byte, first int) error {
			for i := 0; i < len(p); i += bs {
				copy(p[i:], content(first+i/bs, false))
			}
			_, err := f.WriteAt(p, int64(first)*bs)
			return err
		})
	})
}

func (m machine) check(blocks []int) error {
	after := make(map[int]bool, len(blocks))
	for _, b := range blocks {
		after[b] = true
	}
	return withDisk(m.base, func(f blockio.File) error {
		return chunks(func(p []byte, first int) error {
			if _, err := f.ReadAt(p, int64(first)*bs); err != nil {
				return err
			}
			for i := 0; i < len(p); i += bs {
				if b := first + i/bs; !bytes.Equal(p[i:i+bs], content(b, after[b])) {
					return fmt.Errorf("block %d is wrong after the merge", b)
				}
			}
			return nil
		})
	})
}

func dmsetup(args ...string) (string, error) {
	out, err := exec.Command("dmsetup", append([]string{"--noudevsync", "--noudevrules"}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("dmsetup %v: %w: %s", args, err, out)
	}
	return string(out), nil
}

// table is a line of the snapshot targets with chunks of a block, persistent.
func (m machine) table(target string) string {
	return fmt.Sprintf("0 %d %s %s %s P %d", baseSize/512, target, m.base, m.store, bs/512)
}

// makeExceptions writes the blocks to a snapshot, in their order.
func (m machine) makeExceptions(blocks []int) error {
	// A store that begins with zeros is a new one.
	if err := withDisk(m.store, func(f blockio.File) error { _, err := f.WriteAt(make([]byte, 1<<20), 0); return err }); err != nil {
		return err
	}
	if _, err := dmsetup("create", "snap", "--table", m.table("snapshot")); err != nil {
		return err
	}
	info, err := devmapper.Status("snap")
	if err != nil {
		return err
	}
	err = withDisk(info.Path(), func(f blockio.File) error {
		for _, b := range blocks {
			if _, err := f.WriteAt(content(b, true), int64(b)*bs); err != nil {
				return err
			}
		}
		return nil
	})
	_, rerr := dmsetup("remove", "snap")
	return errors.Join(err, rerr)
}

// kernelMerge waits until the store has nothing but metadata.
func (m machine) kernelMerge([]int) error {
	if _, err := dmsetup("create", "merge", "--table", m.table("snapshot-merge")); err != nil {
		return err
	}
	for {
		// START LENGTH snapshot-merge ALLOCATED/TOTAL METADATA
		out, err := dmsetup("status", "merge")
		if err != nil {
			return err
		}
		f := strings.Fields(out)
		if len(f) != 5 {
			return fmt.Errorf("status %q", out)
		}
		if used, _, _ := strings.Cut(f[3], "/"); used == f[4] {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	_, err := dmsetup("remove", "merge")
	return err
}

func (m machine) cowPath() string { return filepath.Join(m.dir, "cow.img") }

func (m machine) writeCOW(blocks []int) error {
	f, err := blockio.OS().Open(m.cowPath(), blockio.Create)
	if err != nil {
		return err
	}
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: changed})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	for _, b := range blocks {
		if err := w.Replace(uint64(b), content(b, true)); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(w.Finalize(), f.Close())
}

func (m machine) ourMerge([]int) error {
	journal := filepath.Join(m.dir, "journal")
	if err := os.RemoveAll(journal); err != nil {
		return err
	}
	_, err := offline.Merge(context.Background(), offline.MergeOptions{Base: m.base, COW: m.cowPath(), Journal: journal, IO: blockio.Auto})
	return err
}

// copy writes one block after the other and flushes once.
func (m machine) copy(blocks []int) error {
	return withDisk(m.base, func(f blockio.File) error {
		a, err := blockio.NewArena(bs)
		if err != nil {
			return err
		}
		defer a.Close()
		for _, b := range blocks {
			copy(a.Bytes(), content(b, true))
			if _, err := f.WriteAt(a.Bytes(), int64(b)*bs); err != nil {
				return err
			}
		}
		return nil
	})
}

// diskStats sums the virtual disks' counters (Documentation/block/stat.rst).
func diskStats() (requests, written float64, err error) {
	files, err := filepath.Glob("/sys/block/vd*/stat")
	if err != nil || len(files) == 0 {
		return 0, 0, errors.Join(err, errors.New("no virtual disks"))
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return 0, 0, err
		}
		f := strings.Fields(string(text))
		if len(f) < 7 {
			return 0, 0, fmt.Errorf("%s: %q", name, text)
		}
		number := func(i int) float64 { n, _ := strconv.ParseFloat(f[i], 64); return n }
		requests += number(0) + number(4)
		written += number(6) * 512
	}
	return requests, written, nil
}

// systemCalls are those that read or write (proc(5), /proc/PID/io); io_uring's are
// not among them.
func systemCalls() (n float64) {
	text, _ := os.ReadFile("/proc/self/io")
	for line := range strings.Lines(string(text)) {
		if name, value, _ := strings.Cut(line, ": "); name == "syscr" || name == "syscw" {
			v, _ := strconv.ParseFloat(strings.TrimSpace(value), 64)
			n += v
		}
	}
	return n
}
