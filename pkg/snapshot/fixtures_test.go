package snapshot

import (
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
	"github.com/snapmerge/snapmerge/test/fixtures"
)

// TestFixtures indexes the files of Android's writer, half merged ones too, and
// compares with the loaded table.
func TestFixtures(t *testing.T) {
	fixtures.Each(t, func(t *testing.T, c fixtures.Case) {
		fsys := crashfs.New("d")
		must(t, fsys.Put("d/x.cow", c.COW))
		must(t, BuildIndex(ctx, fsys, "d/x.cow"))
		must(t, WriteSums(ctx, fsys, "d/x.cow"))
		must(t, VerifySums(ctx, fsys, "d/x.cow", nil))
		table := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{NoIndex: true})
		index := openCOW(t, fsys, "d/x.cow", OpenCOWOptions{})
		if !index.Indexed() || index.Identity != table.Identity {
			t.Fatalf("index used %v: %v", index.Indexed(), index.IndexError)
		}
		compareOps(t, index, table.Ops, 1+table.Ops.Len()/500)
	})
}
