// Package driver is the CSI driver of a node: identity, controller and node
// service on one socket, and all that a node plugin needs around them.
//
// It runs on every node in the distributed mode of the CSI sidecars: the
// controller service of a node makes the volumes and snapshots of that node.
// Volume ids are the names that were asked for, where they can be the names of
// directories. A snapshot's id ends in "@" and the node it lies on, so that the
// others know that it exists.
//
// The services translate and validate. Errors are ordinary errors up to the
// edge, where errors.go gives them their gRPC codes.
//
// # Operations
//
// What is done to one volume is done one after the other; a request that comes in
// between is answered Aborted. An operation that has begun is carried to its end
// even if its caller does not wait any longer, for a file system that is half made
// or half checked helps nobody: the caller asks again and finds it done. All of
// them can be repeated.
//
// Tools that touch a volume's device (mkfs, fsck, mount, umount) run as processes
// of their own, never as system calls of this one: it serves the device, and a
// process that waits for itself cannot be killed. A device that does not get
// anything done any more is taken away, so that they end.
package driver
