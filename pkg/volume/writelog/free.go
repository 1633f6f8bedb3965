package writelog

import "slices"

// Dead returns the freed segments as they would be if everything that can be
// freed now were, and how many bytes that would give back. A segment can go when
// each of its records was made obsolete by one that is flushed; the one being
// appended to stays. Nothing changes until Free.
func (l *Log) Dead() (freed []Freed, bytes int64) {
	l.mu.RLock()
	defer l.mu.RUnlock()
	gone := make([]bool, len(l.segs))

	for i := range l.segs {
		s := &l.segs[i]
		gone[i] = s.gone
		if !s.gone && s.refs == 0 && s.killed <= l.flushed && i < len(l.segs)-1 {
			gone[i] = true
			bytes += l.hdr.segment
		}
	}
	if bytes == 0 {
		return l.freed, 0
	}
	return l.runs(gone), bytes
}

// firstSeq is the number of the first record of a segment, or of the next one
// to be written. mu must be held.
func (l *Log) firstSeq(seg int) uint64 {
	if seg < len(l.segs) {
		return l.segs[seg].first
	}
	return l.seq + 1
}

// runs describes the segments that are gone. mu must be held.
func (l *Log) runs(gone []bool) []Freed {
	var out []Freed
	for i := 0; i < len(gone); i++ {
		if !gone[i] {
			continue
		}
		k := i
		for k < len(gone) && gone[k] {
			k++
		}
		out = append(out, Freed{Segment: i, Count: k - i, FirstSeq: l.firstSeq(i), NextSeq: l.firstSeq(k)})
		i = k
	}
	return out
}

// Free gives the space of segments back. The volume's record that lists freed
// is durable, and no reader that looked the log up before is left.
func (l *Log) Free(freed []Freed) error {
	l.mu.Lock()
	var zero []int
	for _, fr := range freed {
		for i := fr.Segment; i < fr.Segment+fr.Count; i++ {
			if !l.segs[i].gone {
				l.segs[i].gone = true
				zero = append(zero, i)
			}
		}
	}
	l.freed = slices.Clone(freed)
	l.mu.Unlock()
	for _, i := range zero {
		if err := l.f.Zero(l.segStart(i), l.hdr.segment); err != nil {
			return err
		}
	}
	return nil
}
