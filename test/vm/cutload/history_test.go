package main

import "testing"

// TestExpected plays two epochs and checks what is taken for allowed.
func TestExpected(t *testing.T) {
	const blocks = 64
	initial := make([]byte, blocks*blockSize)
	for i := range initial {
		initial[i] = byte(i / blockSize)
	}
	epochs := []Epoch{{Seed: 1, Settled: true, Acked: 500}, {Seed: 2}, {Seed: 3, Settled: true, Acked: 5}}
	e := expect(initial, epochs)
	flushed := opOf(3, 4, blocks) // the last one
	later := opOf(3, 5, blocks)   // not flushed
	before := opOf(1, 499, blocks)
	for before.block == flushed.block || len(e.maybe[before.block]) > 0 && e.last[before.block] != before {
		before = opOf(1, before.n-1, blocks)
	}
	got := make([]byte, blockSize)
	check := func(what string, block int, allowed, exact bool) {
		t.Helper()
		if a, x := e.check(block, got); a != allowed || x != exact {
			t.Errorf("%s: allowed %v, exact %v", what, a, x)
		}
	}
	flushed.content(got)
	check("flushed", flushed.block, true, true)
	opOf(1, 600, blocks).content(got)
	if !opOf(1, 600, blocks).zero {
		check("undone by settling", opOf(1, 600, blocks).block, false, false)
	}
	later.content(got)
	check("not flushed", later.block, true, false)
	half := make([]byte, blockSize)
	e.flushed(later.block, half)
	copy(got[sectorSize:], half[sectorSize:])
	check("torn", later.block, true, false)
	got[0] ^= 0x80
	check("wrong", later.block, false, false)
	copy(got, initial[flushed.block*blockSize:])
	check("lost", flushed.block, false, false)
}
