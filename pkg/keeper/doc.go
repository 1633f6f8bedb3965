// Package keeper holds descriptors while the process that uses them restarts.
//
// A FUSE connection lives as long as its /dev/fuse file is open somewhere, and
// a dm-user channel as long as its device is. The node plugin therefore gives
// duplicates of such descriptors to a keeper, a small process that does nothing
// else, and a restarted plugin fetches them from there. Requests of the kernel
// meanwhile wait. The client keeps duplicates of what it has put, so a keeper
// that was restarted is filled again at once; only the death of both at the same
// time loses the devices.
//
// The keeper also sees to what waits for a device on behalf of the process that
// serves it. A thread that waits in the kernel for an answer of its own process
// cannot be killed; were the process killed then, it could never be reaped, nor
// replaced by a container runtime that waits for that. The keeper would fare no
// better, since it holds the devices' descriptors, if the other were killed with
// it. So it has such things done by children of its own that hold none: it
// freezes a file system for a cut (FIFREEZE and FITHAW write to the device) and
// thaws it when the time is over or the process that asked is gone; and it runs
// the tasks that its program has given it, such as package fuseloop's. A child
// outlives its parent as long as it takes to thaw, and thaws at once then. A program
// that serves devices without a keeper has such children too (FreezeHere).
//
// A file system has one child at a time. Where its device does not answer, the
// child stays until it does or its connection ends, and further freezes are
// refused; the one that asked first can give up any time.
//
// # Protocol
//
// A SOCK_SEQPACKET unix socket of mode 0600; a peer with another user id is
// refused. One request is one message of at most 32 KiB, answered by one
// message, in order. Messages are JSON objects; descriptors travel beside them
// as SCM_RIGHTS, at most 8. A message that breaks a rule is answered with one
// error and the connection is closed.
//
//	request    fields                      descriptors  answer
//	put        key, meta (JSON object)     1 to 8       {}; replaces what the key had
//	get        key                         none         meta, and the descriptors
//	list       after (a key, or none)      none         keys above it in order, more
//	drop       key                         none         {}; closes the descriptors
//	freeze     key (for the log), timeout  1 directory  {} once the file system is frozen
//	thaw                                   none         {}; code "broken" if it was thawed before
//	run        key (a task), meta (args)   none to 8    meta: the task's result
//
//	field      JSON            meaning
//	v          number          protocol version, 1, in requests and answers
//	op         string          one of the requests above
//	key        string          1 to 255 bytes of UTF-8 without control characters
//	meta       object          at most 8 KiB, not looked into by the keeper
//	timeout_ms number          1 to 60000: the longest time frozen
//	error      string          in an answer: what went wrong
//	code       string          "not_found", "full", "bad_request", "broken" or "failed"
//
// A connection holds at most one freeze; its end thaws, or gives up a freeze or a
// task that is under way; the task may go on to its end. All other state belongs
// to the keeper, not to connections.
package keeper
