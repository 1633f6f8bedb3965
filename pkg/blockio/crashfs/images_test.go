package crashfs

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

func TestAllSubsets(t *testing.T) {
	fsys := New()
	ok(t, fsys.Put("f", []byte("......")))
	f := open(t, fsys, "f", 0)
	for i := range allSubsets {
		write(t, f, "x", int64(i))
	}
	got := map[string]bool{}
	for _, img := range fsys.CrashImages(0, nil) {
		got[readAll(img, "f")] = true
	}
	if len(got) != 1<<allSubsets {
		t.Errorf("%d different contents, want %d", len(got), 1<<allSubsets)
	}
}

// TestImages looks at each image of a random history: every sector must hold
// what was durable or what one of the effects put there, and every class must
// have its turn.
func TestImages(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range 20 {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		fsys := New("/d")
		const size = 16 * pageSize
		ok(t, fsys.Put("/d/f", bytes.Repeat([]byte{'.'}, size)))
		f := open(t, fsys, "/d/f", 0)
		var values [size / blockio.SectorSize]string
		for i := range values {
			values[i] = "."
		}
		// So many that what another class finds by chance is no class's half: a random
		// subset is some given one of 2^n.
		n := 14 + rng.IntN(8)
		last := 0 // sectors of the last effect
		for i := range n {
			start := rng.IntN(len(values) - 8)
			last = 2 + rng.IntN(6)
			fill := string(rune('a' + i))
			if rng.IntN(5) == 0 {
				ok(t, f.Zero(int64(start)*blockio.SectorSize, int64(last)*blockio.SectorSize))
				fill = "\x00"
			} else {
				write(t, f, strings.Repeat(fill, last*blockio.SectorSize), int64(start)*blockio.SectorSize)
			}
			for s := start; s < start+last; s++ {
				values[s] += fill
			}
		}
		ok(t, fsys.Rename("/d/f", "/d/g"))
		classes := map[string]int{}
		images := 0
		for name, img := range fsys.CrashImages(300, rng) {
			classes[strings.Fields(name)[0]]++
			images++
			data := readAll(img, "/d/f")
			if data == "<absent>" {
				data = readAll(img, "/d/g")
			}
			if len(data) != size {
				t.Fatalf("%s: %d bytes, neither old nor new name", name, len(data))
			}
			for i, allowed := range values {
				sector := data[i*blockio.SectorSize : (i+1)*blockio.SectorSize]
				if strings.Trim(sector, sector[:1]) != "" || !strings.Contains(allowed, sector[:1]) {
					t.Fatalf("%s: sector %d is %q, want one of %q", name, i, sector[:1], allowed)
				}
			}
		}
		if images != 300 {
			t.Errorf("%d images", images)
		}
		for class, atLeast := range map[string]int{
			"killed": 1, "nothing": 2, "everything": 2, "drop": n / 2, "keep": n / 2, "prefix": n / 2, "moment": n / 2,
			"torn": 20 + last/2, "reversed": 1, "subset": 2, "names": 1, "mixed": 2,
		} {
			if classes[class] < atLeast {
				t.Errorf("round %d, %d effects: class %s has %d images, want %d: %v", round, n, class, classes[class], atLeast, classes)
			}
		}
	}
}

func TestTornWrite(t *testing.T) {
	fsys := New()
	ok(t, fsys.Put("f", bytes.Repeat([]byte{'.'}, 4096)))
	f := open(t, fsys, "f", 0)
	write(t, f, strings.Repeat("x", 1000), 500) // touches sectors 0 to 2
	want := map[string]bool{}
	for set := range 8 {
		data := bytes.Repeat([]byte{'.'}, 4096)
		for i := 500; i < 1500; i++ {
			if set>>(i/512)&1 == 1 {
				data[i] = 'x'
			}
		}
		want[string(data)] = true
	}
	for name, img := range fsys.CrashImages(0, nil) {
		got := readAll(img, "f")
		if _, allowed := want[got]; !allowed {
			t.Errorf("%s: %q", name, got)
		}
		want[got] = false
	}
	for data, missing := range want {
		if missing {
			t.Errorf("never seen: %q", data[:1600])
		}
	}
}

func TestReversed(t *testing.T) {
	fsys := New()
	ok(t, fsys.Put("f", []byte("....")))
	f := open(t, fsys, "f", 0)
	write(t, f, "ab", 0)
	write(t, f, "cd", 1)
	for name, img := range fsys.CrashImages(0, nil) {
		if name == "reversed" {
			if got := readAll(img, "f"); got != "abd." {
				t.Errorf("reversed: %q", got)
			}
			return
		}
	}
	t.Error("no reversed image")
}

func TestFewImages(t *testing.T) {
	fsys := New("/d")
	f := open(t, fsys, "/d/f", blockio.Create)
	ok(t, fsys.SyncDir("/d"))
	var names []string
	for name := range fsys.CrashImages(0, nil) {
		names = append(names, name)
	}
	if want := []string{"killed", "nothing"}; !slices.Equal(names, want) {
		t.Errorf("with nothing unsynced: %q, want %q", names, want)
	}
	write(t, f, "x", 0)
	for _, limit := range []int{1, 2, 3} {
		count := 0
		for range fsys.CrashImages(limit, nil) {
			count++
		}
		if count != limit {
			t.Errorf("%d images of at most %d", count, limit)
		}
	}
	for range fsys.CrashImages(10, nil) {
		break
	}
}

// TestIndependence changes images, and the file system while it is enumerated.
func TestIndependence(t *testing.T) {
	fsys := New()
	ok(t, fsys.Put("f", bytes.Repeat([]byte{'.'}, 2*chunkSize)))
	f := open(t, fsys, "f", 0)
	write(t, f, strings.Repeat("x", pageSize), 0)
	var images []*FS
	var want []string
	for _, img := range fsys.CrashImages(0, nil) {
		want = append(want, readAll(img, "f")) // before anything scribbles
		images = append(images, img)
		write(t, f, "scribble", pageSize-4)
		write(t, open(t, img, "f", 0), "", 0)
	}
	for i, img := range images {
		if got := readAll(img, "f"); got != want[i] {
			t.Errorf("image %d changed with its origin", i)
		}
		g := open(t, img, "f", 0)
		write(t, g, "mine", 7)
		ok(t, g.Truncate(3*pageSize))
		want[i] = readAll(img, "f")
		if len(want[i]) != 3*pageSize || want[i][7:11] != "mine" {
			t.Errorf("image %d: %d bytes", i, len(want[i]))
		}
	}
	for i, img := range images {
		if readAll(img, "f") != want[i] {
			t.Errorf("image %d changed with another one", i)
		}
	}
	if got := readAll(fsys, "f"); strings.Contains(got, "mine") || len(got) != 2*chunkSize {
		t.Error("an image wrote to its origin")
	}
}
