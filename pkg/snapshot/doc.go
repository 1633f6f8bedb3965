// Package snapshot keeps snapshots on disk: the record and the copy-on-write
// (COW) file of each, and beside every COW an index, by which its ops are found
// without loading them, and sums, by which damage to it is found.
//
// All integers are little-endian; sums are CRC-32C. Index and sums are made of
// pages of 4096 bytes, numbered from 0 as they lie in the file:
//
//	offset size field
//	     0 4064 content; what is not used is zero
//	  4064    4 number of the page
//	  4068   24 zero
//	  4092    4 CRC-32C of all before it
//
// Page 0 is the root. A file is exactly as long as its root says.
//
// # Index
//
// A COW of n ops has an index of E = ⌈n/127⌉ pages of entries, then a tree with
// ⌈E/1016⌉ pages in its lowest level and 1016 times fewer in each one above it,
// up to one of a single page (no tree if E < 2), then, if the merge order is not
// that of the blocks, ⌈n/1016⌉ pages of order.
//
// Root:
//
//	offset size field
//	     0    8 magic "snmgcidx"
//	     8    4 format version 1
//	    12    4 flags: bit 0 the merge order is that of the blocks
//	    16    8 length of the COW in bytes
//	    24    4 CRC of the COW's identity (cow.Identity)
//	    28    4 CRC-32C of the COW's header with its count of merged ops zeroed
//	    32    8 n, ops that write blocks
//	    40    8 of them, copy and xor ops
//	    48    8 blocks written by all ops
//	    56    8 highest block written plus 1
//	    64    8 bytes of the source image, from its start, that hold all bytes read
//	    72   16 first half of the SHA-256 of the contents, each cut to what is
//	            used of it, of the pages of entries and order
//
// Entry, one for each op, sorted by block:
//
//	offset size field
//	     0    4 first block written
//	     4    4 length of the stored data in bytes
//	     8    8 bits 0–47 source, 48–50 compression, 51–53 f (the op writes 2^f
//	            blocks), 56–59 type
//	    16    8 file offset of the stored data
//	    24    4 CRC-32C of the stored data; 0 for copy and zero
//	    28    4 position in the merge order
//
// Tree: for each page of the level below, in order, the first block that its
// first entry writes, u32. Order: for each position in the merge order the number
// of its entry, u32.
//
// # Sums
//
// A COW is summed in chunks of 1 MiB; the last may be shorter. The root is
// followed by pages with the CRC-32C of each chunk, u32.
//
//	offset size field
//	     0    8 magic "snmgcsum"
//	     8    4 format version 1
//	    12    4 length of a chunk in bytes, 1048576
//	    16    8 length of the COW in bytes
//	    24    4 CRC of the COW's identity
//	    28    4 zero
//	    32    8 the COW's count of merged ops, which tells whether the file was
//	            merged in place since
//
// # Store
//
//	<dir>/<id>/snapshot.json  record, see Record
//	<dir>/<id>/data.cow       COW
//	<dir>/<id>/data.idx       index
//	<dir>/<id>/data.sum       sums
//	<dir>/.new-<id>           snapshot whose creation was cut off; swept
//	<dir>/.deleted-<id>       snapshot whose removal was cut off; swept
package snapshot
