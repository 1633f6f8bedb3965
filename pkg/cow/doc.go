// Package cow reads and writes copy-on-write files: lists of operations that
// turn one image (the source) into another (the target), block by block. The
// format is that of Android's libsnapshot in its three header versions. The
// package knows nothing of devices, volumes or merging.
//
// All integers are little-endian, all structures packed. A block is 4096 bytes;
// other sizes are refused. File offsets count from byte 0 of the file.
//
//	v1            v2                          v3
//	header 34/38  header 38                   header 78
//	ops and data  scratch  buffer_size        scratch        buffer_size
//	footer 84     ops and data                sequence       4 × sequence_count
//	              footer 84                   resume points  16 × resume_point_max
//	                                          op table       16 × op_count_max
//	                                          data           to the end of the file
//
// Header:
//
//	offset size field
//	     0    8 magic 0x436f77634f572121
//	     8    2 major version 1, 2 or 3
//	    10    2 minor version 0
//	    12    2 header size 34 or 38 (v1), 38 (v2), 78 (v3)
//	    14    2 footer size 84 (v1, v2), 0 (v3)
//	    16    2 op size 20 (v1, v2), 16 (v3)
//	    18    4 block size 4096
//	    22    4 ops per cluster; 0 none, never 1; 0 in v3
//	    26    8 ops merged already, in merge order
//	    34    4 scratch size in bytes (not in the 34-byte header; ignored in v1)
//	    38    8 v3: numbers in the sequence area
//	    46    4 v3: resume points written
//	    50    4 v3: resume point slots
//	    54    8 v3: ops in the op table
//	    62    8 v3: slots in the op table
//	    70    4 v3: compression of the file
//	    74    4 v3: largest uncompressed size of one op in bytes
//
// Scratch, H = header size, B = scratch size, M = B×16/4096, N = (B−M)/4096:
//
//	offset  size       field
//	     H  1          state: 0 not started, 1 in progress, 2 holds a whole window
//	   H+1  16×(≤ N+1) entries {new block u64, file offset of its data u64}, ended by zeros
//	   H+M  4096×N     final data of the listed blocks
//
// Op of v1 and v2:
//
//	offset size field
//	     0    1 type
//	     1    1 compression
//	     2    2 stored length of the data in bytes
//	     4    8 new block
//	    12    8 source
//
// Op of v3:
//
//	offset size field
//	     0    4 stored length of the data in bytes
//	     4    4 new block
//	     8    8 bits 0–47 source, 48–56 zero, 57–59 f (the op writes 2^f blocks), 60–63 type
//
// The meaning of source depends on the type:
//
//	type         source
//	1 copy       block number in the source image
//	2 replace    file offset of the data
//	3 zero       unused
//	4 label      the label (v1, v2)
//	5 cluster    bytes from the end of this op to the next op table (v1, v2)
//	6 xor        byte offset in the source image, any alignment
//	7 sequence   file offset of the data: block numbers, u32 (v1, v2)
//	255 footer   v1, v2: the op's new block is 20 × ops, its source the number of
//	             ops before it; 64 bytes follow
//
// Where data lies: in v1 and v2 without clusters after its op; with clusters of
// C ops a table of C slots is followed by the data of its ops; in v3 in the data
// area. Always in op order and without gaps, which is how the data of xor ops is
// found.
//
// Resume point of v3: {label u64, ops that belong to it u64}.
//
// The merge order, which fixes what "ops merged already" counts: the ops named
// by the sequence, in its order, then all others sorted by block. Without a
// sequence, v1 and v2 have copy and xor ops in file order as the first part, and
// v3 has all ops in file order.
package cow
