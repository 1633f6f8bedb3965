package volume

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/pkg/readahead"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// TestAhead: reads in sequence give the view, at every point of the merge of two
// COWs one above the other, and what they give comes from the read-ahead as long
// as there is something to merge.
func TestAhead(t *testing.T) {
	const blocks = 600
	rng := rand.New(rand.NewPCG(3, 4))
	first, err := cowgen.Make(rng, cowgen.Spec{Blocks: blocks, Copies: 150, Xors: 60, Replaces: 30, Zeros: 20, MaxBlock: 32 * bs, Compression: cow.Zstd})
	if err != nil {
		t.Fatal(err)
	}
	second, err := cowgen.Make(rng, cowgen.Spec{Blocks: blocks, Copies: 100, Xors: 60, Replaces: 20, Zeros: 10, MaxBlock: 8 * bs, Compression: cow.LZ4})
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range readahead.Modes {
		t.Run(string(mode), func(t *testing.T) {
			fs := crashfs.New("/s")
			for name, content := range map[string][]byte{"base": first.Base, "one.cow": first.COW, "two.cow": second.COW} {
				if err := fs.Put("/s/"+name, content); err != nil {
					t.Fatal(err)
				}
			}
			spec := Spec{ID: "v", Size: blocks * bs, Base: "/s/base", COWs: []COWSource{{Path: "/s/one.cow"}, {Path: "/s/two.cow"}}, WindowBlocks: 16,
				ReadAhead: string(mode)}
			if err := Create(fs, "/s/v", spec); err != nil {
				t.Fatal(err)
			}
			open := func(m *readahead.Manager) *Volume {
				v, err := Open(Config{FS: fs, Dir: "/s/v", IO: blockio.Sync, ReadAhead: m, Log: klog.Background()})
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
			plain := open(nil)
			want, err := readAll(plain)
			if err != nil {
				t.Fatal(err)
			}
			if err := plain.Close(); err != nil {
				t.Fatal(err)
			}
			m := readahead.NewManager(readahead.Config{Mode: readahead.None, Window: 4 * readahead.ChunkBytes, Batch: 2 * readahead.ChunkBytes})
			v := open(m)
			check := func() error {
				for _, n := range []int{bs, 7 * bs, 64 * bs, 512} {
					p := make([]byte, n)
					for off := 0; off < blocks*bs; off += n {
						q := p[:min(n, blocks*bs-off)]
						if _, err := v.ReadAt(q, int64(off)); err != nil {
							return err
						}
						if !bytes.Equal(q, want[off:off+len(q)]) {
							return fmt.Errorf("%d bytes at %d differ from the view", len(q), off)
						}
					}
				}
				return nil
			}
			if err := check(); err != nil {
				t.Fatal(err)
			}
			if st, c := m.Stats(), v.Counters(); (st.Hits > 50) != (mode != readahead.None) || (c.FromAhead > 0) != (mode != readahead.None) {
				t.Errorf("%d hits, %d bytes", st.Hits, c.FromAhead)
			}
			var steps atomic.Int64 // the merge has more than one goroutine
			fs.OnStep(func(s crashfs.Step) error {
				if s.Op == crashfs.OpFlush {
					if steps.Add(1)%5 == 0 {
						return check()
					}
				}
				return nil
			})
			for more := true; more; {
				if more, err = v.Step(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			fs.OnStep(nil)
			if n := steps.Load(); n < 20 {
				t.Errorf("the merge has flushed %d times", n)
			}
			if err := check(); err != nil {
				t.Fatal(err)
			}
			if !v.Idle() {
				t.Errorf("not merged: %+v", v.Status())
			}
			if err := v.Close(); err != nil {
				t.Error(err)
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
