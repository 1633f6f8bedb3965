package merge

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// wideScratch makes a rig in place of the image, of copies alone, whose COW has a
// scratch space of size bytes, a hole but for window: the final data of the first
// ops, in merge order.
func wideScratch(t *testing.T, im cowgen.Image, size int64, window []SeedBlock) *rig {
	t.Helper()
	r := &rig{fsys: blockio.OS(), dir: t.TempDir(), io: blockio.Sync, inPlace: true}
	if err := r.write("base", im.Base); err != nil {
		t.Fatal(err)
	}
	const bufferSize = 34 // offset in the header
	head := bytes.Clone(im.COW[:le.Uint16(im.COW[12:])])
	rest := im.COW[len(head)+cow.DefaultScratchSize:]
	le.PutUint32(head[bufferSize:], uint32(size))
	f, err := os.Create(r.path("cow"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := int64(len(head))
	put := func(p []byte, off int64) {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	put(head, 0)
	put(rest, at+size)
	if len(window) == 0 {
		return r
	}
	var entries []byte
	for i, b := range window {
		off := at + size/bs*cow.ScratchEntrySize + int64(i)*bs
		entries = le.AppendUint64(entries, b.Block)
		entries = le.AppendUint64(entries, uint64(off))
		if b.Data != nil {
			put(b.Data, off)
		}
	}
	put([]byte{cow.ScratchDone}, at)
	put(entries, at+1)
	return r
}

const manyOps = DefaultWindowBlocks + 100

func shifted(t *testing.T) cowgen.Image {
	t.Helper()
	im, err := cowgen.Make(rand.New(rand.NewPCG(6, 6)), cowgen.Spec{Blocks: manyOps + 1, Ops: cowgen.Shift(0, manyOps, 1), Scratch: true})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// TestWideScratch: what a merge in place keeps in memory does not follow the size
// that the file says its scratch space has.
func TestWideScratch(t *testing.T) {
	im := shifted(t)
	r := wideScratch(t, im, 1<<30, nil)
	if err := r.open(); err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	r.m.cfg.Pace = func(context.Context, int) error { return stop }
	if err := r.m.Run(context.Background()); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	p := r.m.prog.(*inPlace)
	if n, most := len(r.m.redo.ops), DefaultWindowBlocks; n > most {
		t.Errorf("a window of %d blocks, more than %d", n, most)
	}
	if n, most := len(p.image.Bytes()), int(roundUp(p.space.DataOffset()))+DefaultWindowBlocks*bs; n > most {
		t.Errorf("%d bytes of the file in memory, more than %d", n, most)
	}
	r.close()
	if err := r.checkAll(im.Want); err != nil {
		t.Error(err)
	}
}

// TestWideWindow: a window that somebody left half merged is completed, though it
// is longer than those made here.
func TestWideWindow(t *testing.T) {
	im := shifted(t)
	var window []SeedBlock
	for pos := range uint64(manyOps) {
		block := manyOps - pos
		window = append(window, SeedBlock{Pos: pos, Block: block, Data: im.Want[block*bs:][:bs]})
	}
	copy(im.Base[manyOps/2*bs:], bytes.Repeat([]byte("torn"), manyOps/2*bs/4))
	r := wideScratch(t, im, 32<<20, window)
	if err := r.checkAll(im.Want); err != nil {
		t.Error(err)
	}
}

// TestReadSeedTooLong: a window that no journal would take is refused before its
// data is read, in a file that has that data as a hole.
func TestReadSeedTooLong(t *testing.T) {
	const n = maxWindowBlocks + 1
	fsys := blockio.OS()
	dir := t.TempDir()
	f, err := fsys.Open(dir+"/cow", blockio.Create)
	if err != nil {
		t.Fatal(err)
	}
	w, err := cow.NewWriter(f, cow.WriterOptions{Version: 3, OpCountMax: n, ScratchSize: cow.DefaultScratchSize})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Copy(0, n, n), w.Finalize(), f.Close()); err != nil {
		t.Fatal(err)
	}
	var im cowgen.Image
	if im.COW, err = os.ReadFile(dir + "/cow"); err != nil {
		t.Fatal(err)
	}
	window := make([]SeedBlock, n)
	for i := range window {
		window[i].Block = uint64(i)
	}
	r := wideScratch(t, im, 5<<28, window)
	if f, err = fsys.Open(r.path("cow"), blockio.ReadOnly); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	file, err := cow.Open(f, f.Size(), cow.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ops, err := file.Load()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSeed(file, f, ops); err == nil || !strings.Contains(err.Error(), "262145 blocks") {
		t.Errorf("error %v", err)
	}
}
