// Package uring is io_uring by raw system calls: setting up a ring, preparing
// entries, submitting, reaping, and registering files and buffers. It knows
// nothing of what moves through it; package blockio builds queues on it.
//
// # Rules for callers
//
// The kernel works on memory after the system call has returned. Whatever an
// entry points to (buffers, vectors) must stay in place and alive until its
// completion was reaped: memory outside the Go heap, or pinned with a
// runtime.Pinner. UserData is for an index, never a pointer.
//
// A Ring is used by one goroutine at a time. Completions may come in any order,
// a transfer may be short, and an entry may complete before Submit returns.
//
// # ABI
//
// All names and values are those of linux/io_uring.h (UAPI); 64-bit fields are
// aligned to 8 bytes and everything is in the machine's byte order.
//
//	struct io_uring_sqe, 64 bytes (128 with IORING_SETUP_SQE128)
//	off len
//	  0   1  opcode        IORING_OP_*
//	  1   1  flags         IOSQE_*
//	  2   2  ioprio
//	  4   4  fd            or index of a registered file
//	  8   8  off           file offset; for a command: u32 cmd_op, u32 0
//	 16   8  addr          buffer or vectors; for fallocate the length
//	 24   4  len           bytes or number of vectors; for fallocate the mode
//	 28   4  rw_flags, fsync_flags, uring_cmd_flags, ...
//	 32   8  user_data
//	 40   2  buf_index     of a registered buffer
//	 42   2  personality
//	 44   4  splice_fd_in, file_index
//	 48  16  addr3 and padding; cmd[16], or cmd[80] with SQE128
//
//	struct io_uring_cqe, 16 bytes (32 with IORING_SETUP_CQE32)
//	  0   8  user_data
//	  8   4  res           result, or minus errno
//	 12   4  flags         IORING_CQE_F_*
//	 16  16  big_cqe       with CQE32
//
//	struct io_uring_params, 120 bytes
//	  0   4  sq_entries
//	  4   4  cq_entries
//	  8   4  flags         IORING_SETUP_*
//	 12   4  sq_thread_cpu
//	 16   4  sq_thread_idle
//	 20   4  features      IORING_FEAT_*
//	 24   4  wq_fd
//	 28  12  resv
//	 40  40  sq_off: u32 head, tail, ring_mask, ring_entries, flags, dropped, array, resv; u64 user_addr
//	 80  40  cq_off: u32 head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv; u64 user_addr
//
//	struct io_uring_probe, 16 bytes and 8 per opcode
//	  0   1  last_op
//	  1   1  ops_len
//	  2  14  resv
//	 16      ops[]: u8 op, u8 resv, u16 flags (bit 0: supported), u32 resv
//
// Built with the tag giouring, the ring itself is that of
// github.com/pawelgaczynski/giouring, of which only the parts found sound are
// used: see ring_giouring.go.
package uring

import "unsafe"

// Opcodes (enum io_uring_op).
const (
	OpNop        = 0
	OpReadv      = 1
	OpWritev     = 2
	OpFsync      = 3
	OpReadFixed  = 4
	OpWriteFixed = 5
	OpFallocate  = 17
	OpRead       = 22
	OpWrite      = 23
	OpUringCmd   = 46
)

// Flags of an entry (IOSQE_*).
const (
	FixedFile = 1 << 0 // Fd is the index of a registered file
	IODrain   = 1 << 1 // start after all entries before it have completed
)

// FsyncDatasync is IORING_FSYNC_DATASYNC for SQE.OpFlags.
const FsyncDatasync = 1 << 0

// Flags of New (IORING_SETUP_*).
const (
	SetupCoopTaskrun  = 1 << 8  // complete when the task enters the kernel, no interrupt (kernel 5.19)
	SetupSQE128       = 1 << 10 // entries of 128 bytes (kernel 5.19)
	SetupCQE32        = 1 << 11 // completions of 32 bytes (kernel 5.19)
	SetupSingleIssuer = 1 << 12 // only one thread submits (kernel 6.0)
	SetupDeferTaskrun = 1 << 13 // complete when the thread waits (kernel 6.1)
)

// Operations of io_uring_register(2) (enum io_uring_register_op).
const (
	registerBuffers   = 0
	unregisterBuffers = 1
	registerFiles     = 2
	unregisterFiles   = 3
	registerProbe     = 8
)

// SQE is a submission queue entry (struct io_uring_sqe).
type SQE struct {
	Opcode      uint8
	Flags       uint8
	Ioprio      uint16
	Fd          int32
	Off         uint64
	Addr        uint64
	Len         uint32
	OpFlags     uint32
	UserData    uint64
	BufIndex    uint16
	Personality uint16
	FileIndex   uint32
	Cmd         [16]byte // the first 16 of 80 with SetupSQE128: see Ring.Command
}

// CQE is a completion (struct io_uring_cqe).
type CQE struct {
	UserData uint64
	Res      int32 // the result of the call, or minus errno
	Flags    uint32
	Big      [2]uint64 // zero without SetupCQE32
}

const (
	sqeSize = 64
	cqeSize = 16
)

// The compiler checks the sizes.
var (
	_ [sqeSize]byte     = [unsafe.Sizeof(SQE{})]byte{}
	_ [2 * cqeSize]byte = [unsafe.Sizeof(CQE{})]byte{}
	_ [16 + 256*8]byte  = [unsafe.Sizeof(Probe{})]byte{}
)
