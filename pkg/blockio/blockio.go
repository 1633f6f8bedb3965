// Package blockio is block I/O on files and devices: page-aligned arenas, a
// synchronous and an io_uring queue for batches, and the file-system interface
// through which everything that must survive a crash does its writing, so that
// package crashfs can stand in for the real one in tests.
package blockio

import (
	"errors"
	"io"
)

const (
	// BlockSize is the unit of volumes, COW files and direct I/O, in bytes.
	BlockSize = 4096
	// SectorSize is what a disk writes whole or not at all, in bytes.
	SectorSize = 512
)

// ErrLocked says that another open file description holds the lock.
var ErrLocked = errors.New("locked by another owner")

// Device is random-access storage. ReadAt and WriteAt move all of p or return
// an error; reading past the end gives io.EOF as io.ReaderAt says. All methods
// may be called concurrently.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Flush makes every change that returned before the call durable: data,
	// length, attributes. After an error nothing is known of what was written
	// since the last good Flush, and the kernel may have thrown it away: every
	// later Flush of an OS or crashfs file fails too, until the file is opened
	// anew and looked at.
	Flush() error
	// Zero makes the n bytes at off read as zeros, giving the space back where
	// the storage can, reserved space too. off and n are multiples of SectorSize.
	// A file that ended before off+n then ends there.
	Zero(off, n int64) error
	// Size is the length in bytes; 0 after Close.
	Size() int64
}

// File is a Device that has a name in an FS.
type File interface {
	Device
	// Name is the name the file was opened by.
	Name() string
	Close() error
	// Truncate sets the length in bytes.
	Truncate(size int64) error
	// Allocate reserves the n bytes at off, so that writing them later cannot
	// fail for want of space; the file grows if it was shorter, and reserved
	// bytes read as zeros until written. On a file system that cannot reserve
	// it only grows the file. After an error a part may be reserved: ext4 keeps
	// what it could get, which on a full disk is all that was left. See Extend.
	Allocate(off, n int64) error
	// Lock takes the exclusive flock of this open file, which the kernel keeps
	// until the last I/O issued through it has ended, even past the death of
	// the process. Held by somebody else: ErrLocked, at once.
	Lock() error
	// NextData finds the first range at or after off that may hold anything but
	// zeros (SEEK_DATA, SEEK_HOLE). No such range: io.EOF.
	NextData(off int64) (start, end int64, err error)
	// ID is the same for all names of the file and no other file's on the machine
	// while it is open.
	ID() (FileID, error)
	// Links is the number of names the file has.
	Links() (uint64, error)
	// Xattr reads the extended attribute; absent: an error for which
	// errors.Is(err, fs.ErrNotExist). Not supported there (a device, a file
	// system without them): errors.ErrUnsupported, as from SetXattr.
	Xattr(name string) ([]byte, error)
	SetXattr(name string, value []byte) error
	// RemoveXattr removes the attribute; removing an absent one is no error.
	RemoveXattr(name string) error
}

// FileID names a file whatever names it has: device and inode, as stat(2) has them.
type FileID struct{ Device, Inode uint64 }

// Flag says how FS.Open opens a file.
type Flag uint

const (
	// ReadOnly opens for reading alone; otherwise files open for both.
	ReadOnly Flag = 1 << iota
	// Create makes the file if it is absent; with Excl it must be absent.
	Create
	// Excl fails with fs.ErrExist if the file is there.
	Excl
	// Direct asks for direct I/O. Where file system and alignment allow it,
	// aligned transfers bypass the page cache and unaligned ones are bounced;
	// elsewhere the file is buffered.
	Direct
)

// FS is the part of a file system that snapmerge writes through. Names are
// slash-separated paths as package os takes them. Errors wrap the fs.Err…
// values and the errno.
type FS interface {
	// Open opens a file or block device. A device that is opened for writing is
	// claimed until Close: mounted or claimed by somebody else it gives ErrLocked.
	Open(name string, flag Flag) (File, error)
	// ReadFile returns the whole content.
	ReadFile(name string) ([]byte, error)
	Rename(oldName, newName string) error
	// Link makes a hard link.
	Link(oldName, newName string) error
	// Remove removes a file or an empty directory.
	Remove(name string) error
	// RemoveAll removes a tree; an absent one is no error.
	RemoveAll(name string) error
	Mkdir(name string) error
	// ReadDir returns the names in a directory, sorted.
	ReadDir(name string) ([]string, error)
	// Exists tells whether the name is there.
	Exists(name string) (bool, error)
	// SyncDir makes creations, renames, links and removals in the directory
	// durable.
	SyncDir(name string) error
}

// Kind names a back end for batches of I/O.
type Kind string

const (
	// Auto is URing where a probe finds it working, else Sync.
	Auto Kind = "auto"
	// Sync is vectored pread and pwrite.
	Sync Kind = "sync"
	// URing is io_uring.
	URing Kind = "uring"
)

// Request is one transfer of a batch. Buf may be any memory; with a file open for
// direct I/O it should come from an Arena, because what is not aligned takes a
// slow way through a copy.
type Request struct {
	Buf []byte
	Off int64
}

// Wrapper is a Device around another one that leaves ReadAt and WriteAt as they
// are, so that a Queue may go past it.
type Wrapper interface{ Unwrap() Device }

// Lender is a File of OS. Lend gives the descriptor for a read, or a write, of the n
// bytes at off that the caller does with memory which is page-aligned. It is open, and
// writes of part of a block wait, until back is called, once and by anybody. ok is false
// where the range or the moment does not allow that. Lend never waits.
type Lender interface {
	Lend(off, n int64, write bool) (fd int, back func(), ok bool)
}

// Queue runs batches of transfers, in any order inside a batch, and those that
// touch each other in the file joined. Read and Write return when no transfer of
// the batch is in flight any more: nil when all were complete, else the first
// error, of which some transfers may have taken no note. Reading past the end is
// an error that wraps io.EOF. One goroutine uses a Queue at a time. Only files of
// OS, or a Wrapper around one, have a descriptor to work on; any other Device is
// served by its ReadAt and WriteAt.
type Queue interface {
	Read(d Device, batch []Request) error
	Write(d Device, batch []Request) error
	// Register says that most buffers will lie in these arenas, which stay until
	// Close, so that a queue can have the kernel prepare them once. It is called
	// at most once.
	Register(arenas ...*Arena)
	Kind() Kind
	Close() error
}

// Extend is Allocate for the end of a file: after an error the file is as long as it was,
// and what was reserved behind that is given back. Nobody else may change the length
// meanwhile.
func Extend(f File, off, n int64) error {
	size := f.Size()
	err := f.Allocate(off, n)
	if err != nil {
		// Also if it is not longer: there may be space behind the end.
		err = errors.Join(err, f.Truncate(size))
	}
	return err
}
