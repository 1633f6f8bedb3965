package volume

import (
	"time"

	"github.com/snapmerge/snapmerge/pkg/blockio"
	"github.com/snapmerge/snapmerge/pkg/transport"
)

var _ transport.Lender = (*Volume)(nil)

// Lend lends the base of a volume that has nothing above it. What is lent is a request
// like others: who changes the stack waits for it.
func (v *Volume) Lend(off, n int64, write bool) (fd int, back func(done bool), ok bool) {
	start := time.Now()
	base, ok := v.base.File.(blockio.Lender)
	if !ok || v.aheadBase != nil || v.checkRange(off, n) != nil {
		return -1, nil, false
	}
	if write && (v.checkWrite(off, n) != nil || !v.gate.TryRLock()) {
		return -1, nil, false
	}
	inside := v.epoch.Enter()
	leave := func() {
		inside.Leave()
		if write {
			v.gate.RUnlock()
		}
	}
	if len(v.stack.Load().layers) > 0 {
		leave()
		return -1, nil, false
	}
	fd, giveBack, ok := base.Lend(off, n, write)
	if !ok {
		leave()
		return -1, nil, false
	}
	v.inflight.Add(1)
	return fd, func(done bool) {
		giveBack()
		if write {
			v.baseDirty.Store(true) // after the write, as in toBase, and whatever came of it
		}
		if done {
			v.countLent(start, n, write)
		}
		v.inflight.Add(-1)
		leave()
	}, true
}

// countLent counts a request that was carried out elsewhere.
func (v *Volume) countLent(start time.Time, n int64, write bool) {
	if write {
		v.counts.wrote(true, int(n))
		v.counts.write.add(start, n, nil)
		return
	}
	v.counts.fromBase.Add(uint64(n))
	v.counts.read.add(start, n, nil)
}
