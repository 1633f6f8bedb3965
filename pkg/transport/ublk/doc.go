// Package ublk serves a volume as a block device of the kernel's ublk driver
// (kernel 6.4 and later).
//
//	guest I/O -> /dev/ublkbN -> ublk_drv -> a ring per queue -> Backend
//
// # Threads
//
// Each queue of the device belongs to one OS thread, which alone may fetch its
// requests and answer them. It never waits for anything else, so a backend that hangs
// holds up nobody else, and Abort can answer for it. What the backend lends
// (transport.Lender: the base of a volume that is merged) is read and written by the
// queue's own ring, without another thread; every other request is served by a goroutine
// of its own.
//
// # Restarts
//
// The kernel keeps a device whose server was killed (UBLK_F_USER_RECOVERY), and
// gives what it had not answered to the next one (UBLK_F_USER_RECOVERY_REISSUE),
// so no keeper is needed. Adopt knows the device by a random tag that the kernel
// stores with it and that a file, one per volume, names. A request that the dead
// process had carried out is carried out twice; with reads, writes, flushes and
// zeroing that is harmless, since the guest waits for the first answer. What the kernel
// still does for the dead process keeps the backend's files locked, and so comes before.
//
// A process must not wait for its own device: killed while it does, it would
// never end, and the device would never be free for the next one. Two steps
// cannot avoid it, the kernel's look for partitions in START_DEV and its writing
// of dirty pages in STOP_DEV; SIGKILL within those milliseconds leaves a process
// that ends only when the device is stopped by STOP_DEV from elsewhere.
//
// # Kernel interface
//
// Of linux/ublk_cmd.h, in the machine's byte order. Commands are io_uring entries
// IORING_OP_URING_CMD: control commands on /dev/ublk-control with entries of 128
// bytes, those of a queue on /dev/ublkcN. Opcodes are encoded as ioctls: type 'u',
// direction and size of the argument.
//
//	struct ublksrv_ctrl_cmd, 32 bytes, in the command area of the entry
//	  0   4  dev_id
//	  4   2  queue_id         0xffff if it does not matter
//	  6   2  len              of the buffer
//	  8   8  addr             of the buffer
//	 16   8  data[1]          START_DEV and END_USER_RECOVERY: process id; UPDATE_SIZE: sectors
//	 24   2  dev_path_len
//	 26   2  pad
//	 28   4  reserved
//
//	struct ublksrv_ctrl_dev_info, 64 bytes
//	  0   2  nr_hw_queues     lowered by ADD_DEV to the number of processors
//	  2   2  queue_depth
//	  4   2  state            0 dead, 1 live, 2 quiesced
//	  6   2  pad
//	  8   4  max_io_buf_bytes
//	 12   4  dev_id           ADD_DEV: 0xffffffff lets the kernel choose
//	 16   4  ublksrv_pid
//	 20   4  pad
//	 24   8  flags            UBLK_F_*; ADD_DEV clears what the kernel does not know
//	 32   8  ublksrv_flags    the server's own: our tag
//	 40   4  owner_uid
//	 44   4  owner_gid
//	 48  16  reserved
//
//	struct ublk_params, the first 60 bytes of it
//	  0   4  len
//	  4   4  types            1 basic, 2 discard
//	  8   4  attrs            1 read-only, 4 volatile cache, 8 FUA
//	 12   1  logical_bs_shift
//	 13   1  physical_bs_shift
//	 14   1  io_opt_shift
//	 15   1  io_min_shift
//	 16   4  max_sectors      all sectors are of 512 bytes
//	 20   4  chunk_sectors
//	 24   8  dev_sectors
//	 32   8  virt_boundary_mask
//	 40   4  discard_alignment
//	 44   4  discard_granularity
//	 48   4  max_discard_sectors
//	 52   4  max_write_zeroes_sectors
//	 56   2  max_discard_segments
//	 58   2  reserved
//
//	struct ublksrv_io_cmd, 16 bytes, in the command area of FETCH_REQ and COMMIT_AND_FETCH_REQ
//	  0   2  q_id
//	  2   2  tag
//	  4   4  result           bytes done, or minus errno
//	  8   8  addr             of the buffer for the next request of the tag
//
//	struct ublksrv_io_desc, 24 bytes, mapped read-only from /dev/ublkcN: queue q begins
//	at q * 98304 (room for 4096 of them, in whole pages)
//	  0   4  op_flags         bits 0-7: 0 read, 1 write, 2 flush, 3 discard, 5 write zeroes; bit 13: FUA
//	  4   4  nr_sectors
//	  8   8  start_sector
//	 16   8  addr
//
// A fetch completes with 0 when there is a request, its data in the buffer if it
// is a write, and with -ENODEV when the device is no more. A commit takes the data
// of a read out of the buffer before it fetches the tag's next request.
package ublk
