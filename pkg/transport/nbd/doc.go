// Package nbd serves a volume as a device of the kernel's NBD driver, set up by
// generic netlink (kernel 5.14 and later).
//
//	guest I/O -> /dev/nbdN -> nbd driver -> socket pairs -> Backend
//
// A device has several connections, each a pair of unix sockets of which the
// driver has one end. There is no handshake: netlink says all that it would.
//
// # Restarts
//
// The driver keeps a device whose connections are gone (NBD_ATTR_DEAD_CONN_TIMEOUT)
// and holds new requests back. Adopt gives it new sockets (NBD_CMD_RECONFIGURE). So
// no keeper is needed; it could not do better either, for the sockets are streams
// of which the dead process may have read the half. The driver sends a request that
// was in flight again, on another connection, when it had no answer for
// NBD_ATTR_TIMEOUT; that is how long guests may wait after a restart. The device
// carries a random tag (NBD_ATTR_BACKEND_IDENTIFIER), by which the next process
// finds it.
//
// # Requests that come twice
//
// The driver also sends a request again that takes the backend too long, and shuts
// the connection down on which it was. Were the first one carried out after the
// second, and after that a newer write of the same blocks, the newer would be
// lost. So writes take their place in a queue (ranges) as they are read, and
// those of the same blocks are carried out in the order of the queue. A write that
// lay unread in a socket until the driver gave it up must not be carried out at
// all: it takes its place first and then looks whether its connection still
// stands. If it does, whatever the driver sends instead of it comes later.
//
// # Kernel interface
//
// Netlink: family "nbd" of linux/nbd-netlink.h (see netlink.go), in the network
// namespace of the machine only.
//
// Messages, big-endian:
//
//	request, 28 bytes, then the data of a write
//	  0   4  magic    0x25609513
//	  4   2  flags    1 FUA, 2 no hole
//	  6   2  type     0 read, 1 write, 2 disconnect, 3 flush, 4 trim, 6 write zeroes
//	  8   8  cookie
//	 16   8  offset   bytes
//	 24   4  length   bytes
//
//	reply, 16 bytes, then the data of a read without an error
//	  0   4  magic    0x67446698
//	  4   4  error    an errno; the driver makes EIO of every one
//	  8   8  cookie   of the request
package nbd
