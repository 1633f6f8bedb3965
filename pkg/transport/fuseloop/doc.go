// Package fuseloop serves a volume as a loop device on a file of a FUSE file
// system of our own. It needs nothing but the fuse and loop modules.
//
//	guest I/O -> /dev/loopN -> kernel FUSE client -> /dev/fuse -> readers -> Backend
//
// The file system holds one file. It is mounted detached (fsopen, fsmount): it
// appears in no mount table, and only a descriptor leads to it. The loop device
// does direct I/O in 4096-byte blocks, so no page of the volume is cached twice
// and each guest flush arrives as FSYNC.
//
// # Restarts
//
// The connection lives as long as the /dev/fuse file is open anywhere. A keeper
// (package keeper) holds duplicates of it and of the mount; after the death of
// the serving process requests simply wait. Adopt fetches the descriptors, has
// the kernel send again what the dead process had read and not answered
// (FUSE_NOTIFY_RESEND, kernel 6.9), and serves on. Such requests carry bit 63 in
// unique, which the reply must repeat. A request that the dead process had
// carried out is carried out twice; with reads, writes, flushes and zeroing that
// is harmless, since the guest waits for the first answer.
//
// Three rules keep a killed process from hanging for ever or failing a request:
//
//   - It never waits for its own device. A thread in the kernel that waits for an
//     answer of its own, dead, process cannot be killed, and so that process never
//     ends; closing the last descriptor of the file or of the loop device waits in
//     the same way. What opens them is done by children of the keeper (Tasks), which
//     do not hold the connection, and the mount is held by an O_PATH descriptor. Without a keeper it has to be done here, and
//     SIGKILL within those microseconds of Create, Resize and Close leaves a
//     process that ends only when its connection is aborted through fusectl.
//   - The buffer that a request is read into is in memory before read is called.
//     The kernel cannot fault a page in for a process that is being killed and
//     would answer the request with EIO.
//   - Waiting for requests is a wait on epoll, not a read, so an idle reader needs
//     no such buffer, and readers of an idle volume give theirs back.
//
// # Readers
//
// A reader is a thread that carries out a request by plain calls and answers it before
// it reads the next. Beside others, small reads and writes of what the backend lends
// (transport.Lender: the base of a volume that is merged) are left to a ring of the
// reader's own: it goes on reading, copies the data to a smaller buffer first, and
// answers as the ring is done. Before it carries out a request itself it waits for its
// ring, so that nobody waits for an answer behind a call that may take long.
//
// # Passthrough
//
// Where the volume allows it (transport.Options.Base) and the kernel can (6.9,
// CONFIG_FUSE_PASSTHROUGH), OPEN is answered with the base as the backing file:
//
//	guest I/O -> /dev/loopN -> kernel FUSE client -> the base's file system
//
// READ and WRITE do not come here any more, from the first byte on, and the loop
// device's direct I/O is direct I/O on the base. FSYNC, FALLOCATE and all the rest still
// come here. The kernel holds the inode's lock over FSYNC, so that writes wait for it.
// It goes on with reads and writes when the connection has ended, too. Therefore the
// loop device of such a volume carries the mark ":base" in its lo_file_name, and
// whoever takes it away from users that have it open first makes its I/O fail: with
// LOOP_SET_STATUS64 and an offset that no file reaches, which the kernel sets while
// nothing is in flight.
//
// All who open the file must get the same backing file. Its number is known to the
// process that gave it alone, so one that has adopted the device refuses to open the
// file: the loop device has it open already.
//
// # Kernel interface
//
// Of linux/fuse.h, protocol 7.31 (kernel 5.4) to 7.40 and later; little- or
// big-endian as the machine is. Every request begins with a fuse_in_header of 40
// bytes, every reply with a fuse_out_header of 16; offsets below count from the
// end of those headers.
//
//	fuse_in_header   len 0 (u32), opcode 4 (u32), unique 8 (u64), nodeid 16 (u64),
//	                 uid 24, gid 28, pid 32 (u32), total_extlen 36 (u16), padding
//	fuse_out_header  len 0 (u32), error 4 (s32, -511 to 0), unique 8 (u64)
//
//	opcode           request                                     reply
//	LOOKUP 1         name and a NUL                              fuse_entry_out, 128: nodeid 0, generation 8,
//	                                                             entry_valid 16, attr_valid 24, attr 40
//	FORGET 2         nlookup 0 (u64)                             none
//	GETATTR 3        flags 0, dummy 4, fh 8                      fuse_attr_out, 104: attr_valid 0, attr 16
//	SETATTR 4        88 bytes: valid 0 (u32), fh 8, size 16      fuse_attr_out
//	OPEN 14          flags 0, open_flags 4                       fuse_open_out, 16: fh 0, open_flags 8, backing_id 12 (s32)
//	READ 15          40 bytes: fh 0, offset 8, size 16           the data
//	WRITE 16         40 bytes: fh 0, offset 8, size 16; data     size 0, padding 4
//	STATFS 17        nothing                                     fuse_kstatfs, 80: blocks 0, bfree 8, bavail 16,
//	                                                             files 24, ffree 32, bsize 40, namelen 44, frsize 48
//	RELEASE 18       24 bytes: fh 0                              empty
//	FSYNC 20         fh 0, fsync_flags 8                         empty
//	INIT 26          major 0, minor 4, max_readahead 8,          64 bytes: major 0, minor 4, max_readahead 8, flags 12,
//	                 flags 12, flags2 16; 16 bytes or more       max_background 16 (u16), congestion_threshold 18 (u16),
//	                                                             max_write 20, time_gran 24, max_pages 28 (u16),
//	                                                             map_alignment 30 (u16), flags2 32, max_stack_depth 36
//	INTERRUPT 36     unique 0 (u64)                              none
//	DESTROY 38       nothing                                     empty
//	BATCH_FORGET 42  count 0, dummy 4; count times 16 bytes      none
//	FALLOCATE 43     fh 0, offset 8, length 16, mode 24 (u32)    empty
//	all others                                                   error ENOSYS
//
//	fuse_attr, 88    ino 0, size 8, blocks 16, times 24 to 59, mode 60, nlink 64,
//	                 uid 68, gid 72, rdev 76, blksize 80, flags 84
//
// ENOSYS to FLUSH, ACCESS and GETXATTR makes the kernel never ask again: a
// process that closes the file does not wait for itself, and a write costs one
// request. FSYNC and FALLOCATE must never be answered so, for the kernel would
// then report success without us. A notification is a reply with unique 0 and its
// code in error: FUSE_NOTIFY_RESEND is 7, without a body.
//
// FUSE_DEV_IOC_BACKING_OPEN on /dev/fuse takes fuse_backing_map, 16: fd 0 (s32), flags 4,
// padding 8; it returns the backing_id. The kernel closes the file with the connection.
//
// # Loop device
//
// LOOP_CONFIGURE (kernel 5.8) with block size 4096 and LO_FLAGS_DIRECT_IO;
// lo_file_name is "snapmerge:", 16 hex digits of the SHA-256 of the volume id, ":"
// and 12 random hex digits, by which a later process knows the device again. The
// name of the file, and so /sys/block/loopN/loop/backing_file, carries the same
// hash. LOOP_CLR_FD by the only opener detaches at once, dirty pages or not; by one
// of several it sets LO_FLAGS_AUTOCLEAR, with which the last close writes them and
// detaches. Close does the latter, and clears the flag if others stay.
package fuseloop
