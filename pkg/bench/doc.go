// Package bench measures the merge reproducibly: it makes a base, a COW and the
// image that must come of them, merges with the same code as the merge command,
// compares every byte, and puts the time beside that of plain loops which move
// the same bytes (the floor) and of qemu-img committing the same blocks.
//
// Everything follows from a Spec: the same one makes the same three files on any
// machine. Content comes from a small pool that is made first, each block marked
// so that no two are alike, and is written as it is made, so that images of
// gigabytes take seconds and little memory.
package bench

import "github.com/snapmerge/snapmerge/pkg/blockio"

const bs = blockio.BlockSize
