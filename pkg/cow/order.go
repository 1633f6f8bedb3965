package cow

// checkOverlap checks that no block is written by two ops. The ops lie in two
// runs that are sorted by block, the first part and the rest.
func (l *loader) checkOverlap() error {
	t := l.t
	var end uint64 // of the op before
	for i, j := 0, t.first; i < t.first || j < len(t.blocks); {
		var pos int
		if j == len(t.blocks) || i < t.first && t.blockInFirst(i) <= t.blocks[j] {
			pos = int(t.byBlock[i])
			i++
		} else {
			pos = j
			j++
		}
		if uint64(t.blocks[pos]) < end {
			return l.opError(t.blocks[pos], "block %d is written by more than one op", t.blocks[pos])
		}
		end = uint64(t.blocks[pos]) + uint64(t.packed[pos].blocks())
	}
	return nil
}

// checkMix checks that all copy and xor ops come before all others, and counts
// them.
func (l *loader) checkMix() error {
	t := l.t
	for pos := range t.packed {
		switch ordered := t.packed[pos].typ().Ordered(); {
		case ordered && uint64(pos) > t.ordered:
			return l.opError(t.blocks[pos], "%s op of block %d comes after a replace or zero op in the merge order",
				t.packed[pos].typ(), t.blocks[pos])
		case ordered:
			t.ordered++
		}
	}
	return nil
}

// checkOrder checks that no op reads a block that an op before it in the merge
// order has overwritten.
func (l *loader) checkOrder() error {
	t := l.t
	for pos := range t.ordered {
		op := t.at(int(pos))
		first, n := op.SourceBlocks()
		for block := first; block < first+uint64(n); block++ {
			// In memory, Find has no errors.
			if _, before, ok, _ := t.Find(block); ok && before < pos {
				return l.opError(t.blocks[pos], "%s op of block %d reads block %d, which op %d of the merge order has overwritten by then",
					op.Type, op.NewBlock, block, before)
			}
		}
	}
	return nil
}

// checkProgress checks what the file says about its own merge.
func (l *loader) checkProgress() error {
	if l.header.NumMergeOps > l.t.Len() {
		return badFormat(NumMergeOpsOffset, "%d ops are merged, of %d", l.header.NumMergeOps, l.t.Len())
	}
	s, err := l.Scratch()
	if s == nil || err != nil {
		return err
	}
	_, err = s.Window(l.t, l.header.NumMergeOps)
	return err
}
