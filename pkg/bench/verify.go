package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/offline"
)

// compare reads both files in full. A difference is an *offline.DifferenceError.
func compare(ctx context.Context, fsys blockio.FS, got, want string) (err error) {
	var files [2]blockio.File
	for i, name := range []string{got, want} {
		f, err := fsys.Open(name, blockio.ReadOnly|blockio.Direct)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		files[i] = f
	}
	size := files[1].Size()
	if have := files[0].Size(); have != size {
		return &offline.DifferenceError{Off: -1, What: fmt.Sprintf("%s has %d bytes, %s has %d", got, have, want, size)}
	}
	arena, err := blockio.NewArena(2 * chunkBytes)
	if err != nil {
		return err
	}
	defer arena.Close()
	for off := int64(0); off < size; off += chunkBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(chunkBytes, size-off)
		halves := [2][]byte{arena.Bytes()[:n], arena.Bytes()[chunkBytes:][:n]}
		var both errgroup.Group
		for i, f := range files {
			both.Go(func() error {
				if _, err := f.ReadAt(halves[i], off); err != nil {
					return fmt.Errorf("comparison: %w", err)
				}
				return nil
			})
		}
		if err := both.Wait(); err != nil {
			return err
		}
		if bytes.Equal(halves[0], halves[1]) {
			continue
		}
		for i := int64(0); i < n; i++ {
			if halves[0][i] != halves[1][i] {
				return &offline.DifferenceError{Off: off + i/bs*bs, What: fmt.Sprintf("%s is not what %s says", got, want)}
			}
		}
	}
	return nil
}
