// Package dmuser serves a volume as a device-mapper device with the target
// "user" (dm-user), which Android's kernels have and mainline does not.
//
//	guest I/O -> /dev/dm-N -> target user -> channels -> Backend
//
// # Channels
//
// Each open of the control node /dev/dm-user/NAME is a channel, and belongs to one
// OS thread, which takes a request, carries it out and answers it, one at a time:
// two readers of a channel would lose requests. A blocked read ends only when the
// table is swapped or the device removed (ENOTBLK).
//
// A device is made in this order: device, table, channels, activation. With the
// table its control node is there, and no request comes before somebody serves.
// Names carry random digits and are never used twice, since a control node lives
// until its last descriptor is closed.
//
// # Restarts
//
// The driver fails what a channel has taken when its last descriptor is closed,
// and everything once no channel is left. So the keeper (package keeper) holds the
// descriptors of all channels, one more that nobody reads, and the memory in which
// the channels work, a memfd (see slot). From it the next process knows what each
// channel had taken and not answered; it carries that out again, answers it on the
// same descriptor, and then gives the channel a new one: if the dead process had
// answered already, the second answer is one that the driver does not know, and
// it would take no further ones. Carrying out a request twice changes nothing,
// since the guest waits for the first answer.
//
// A process holds a lock on the memory (flock on a descriptor of its own), so its
// successor begins only when it is gone with all its threads. What cannot be
// continued is failed with EIO, by closing the channel: an answer to a read above
// 16 MiB of which the guest had a part.
//
// # Kernel interface
//
// Of linux/dm-user.h, in the machine's byte order. A table line is
// "0 SECTORS user 0 SECTORS NAME".
//
//	message, 40 bytes, then the payload
//	  0   8  seq      of the request; the answer repeats it
//	  8   8  type     request: 0 read, 1 write, 2 flush, 3 discard, 4 secure erase,
//	                  5 write same, 6 write zeroes; answer: 0 success, 1 error, 2 unsupported
//	 16   8  flags    0x200 FUA, 0x400 PREFLUSH; the others do not matter here
//	 24   8  sector   of 512 bytes, from the beginning of the device
//	 32   8  len      bytes; no limit
//	 40      payload  of a write request; of the answer to a read, if it is a success
//
// A read returns header or payload of one message, never both; a write takes
// header and payload in any pieces. A flush is a write with PREFLUSH and len 0.
// After a success header nothing can be taken back, so it is written when the
// outcome of the whole request is known: reads are read in full first. A write
// must not be answered before its payload was read in full. Discards do not arrive;
// the kernel cannot send them. An error answer to a read makes the driver print a
// warning of the kernel.
package dmuser
