package merge

import (
	"context"
	"errors"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/cow"
)

// cloneBlocks is the shortest run of copy ops that is cloned: a clone costs the
// file system more than moving a few blocks, and leaves one extent more.
const cloneBlocks = 16

// findClones marks the ops that can be cloned: copies from sources that the
// window does not overwrite, in runs of at least that length. Redoing them is as
// safe as redoing any op that is not logged.
func (w *window) findClones(shortest int) {
	for i := 0; i < len(w.ops); {
		n := w.cloneRun(i)
		if n >= shortest {
			for k := range n {
				w.ops[i+k].cloned = true
			}
		}
		i += max(n, 1)
	}
}

// cloneRun is the number of ops from i on that are one run of copies.
func (w *window) cloneRun(i int) int {
	n := 0
	for ; i+n < len(w.ops) && n < requestBytes/bs; n++ {
		op, first := &w.ops[i+n], &w.ops[i]
		if op.Type != cow.Copy || op.logged || copiesOntoItself(op.Op) || op.NewBlock != first.NewBlock+uint64(n) || op.Source != first.Source+uint64(n) {
			break
		}
	}
	return n
}

// clones tells whether the window clones the block.
func (w *window) clones(block uint64) bool {
	i, ok := w.find(block)
	return ok && w.ops[i].cloned
}

// cloneBase clones what the window clones. If the file system turns out to be
// unable to, it moves the data, and no later window clones.
func (m *Merger) cloneBase(ctx context.Context, w *window) error {
	for i := 0; i < len(w.ops); {
		if !w.ops[i].cloned {
			i++
			continue
		}
		n := w.cloneRun(i)
		to, from, bytes := int64(w.ops[i].NewBlock)*bs, int64(w.ops[i].Source)*bs, int64(n)*bs
		if err := m.pace(ctx, int(bytes)); err != nil {
			return err
		}
		err := errors.ErrUnsupported
		if m.cloning.Load() {
			err = m.cloner.Clone(to, from, bytes)
		}
		if errors.Is(err, errors.ErrUnsupported) {
			m.cloning.Store(false)
			err = m.moveBase(to, from, bytes)
		}
		if err != nil {
			return fmt.Errorf("write to the base: %w", err)
		}
		m.counters.BlocksWritten.Add(uint64(n))
		i += n
	}
	return nil
}

// moveBase copies within the base, at most requestBytes.
func (m *Merger) moveBase(to, from, n int64) error {
	a, err := blockio.NewArena(int(n))
	if err != nil {
		return err
	}
	defer a.Close()
	if err := blockio.ReadFull(m.cfg.Base, a.Bytes()[:n], from); err != nil {
		return err
	}
	m.counters.BytesRead.Add(uint64(n))
	if _, err := m.cfg.Base.WriteAt(a.Bytes()[:n], to); err != nil {
		return err
	}
	m.counters.BytesWritten.Add(uint64(n))
	return nil
}
