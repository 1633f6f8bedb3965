package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/Merovius/nbd/nbdnl"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

const (
	// requestTimeout is when the driver sends a request again, on another
	// connection.
	requestTimeout = 5 * time.Second
	// deadTimeout is how long the driver keeps a device without connections.
	deadTimeout = 24 * time.Hour

	// Of NBD_ATTR_*.
	attrSizeBytes         = 2
	attrBackendIdentifier = 10

	// NBD_FLAG_SEND_WRITE_ZEROES; drivers before kernel 6.10 do not look at it.
	flagSendWriteZeroes nbdnl.ServerFlags = 1 << 6

	serverFlags = nbdnl.FlagHasFlags | nbdnl.FlagSendFlush | nbdnl.FlagSendFUA | nbdnl.FlagSendTrim | flagSendWriteZeroes | nbdnl.FlagCanMulticonn
)

// identifier is what the driver keeps of a tag.
func identifier(tag uint64) string { return fmt.Sprintf("snapmerge-%016x", tag) }

// withIdentifier names the device, or says which one is meant.
func withIdentifier(tag uint64) nbdnl.ConnectOption {
	return func(e *netlink.AttributeEncoder) { e.String(attrBackendIdentifier, identifier(tag)) }
}

// withSize sets the size in bytes.
func withSize(size int64) nbdnl.ConnectOption {
	return func(e *netlink.AttributeEncoder) { e.Uint64(attrSizeBytes, uint64(size)) }
}

// connect makes a device of the sockets.
func connect(tag uint64, size int64, readOnly bool, sockets []*os.File) (index uint32, err error) {
	flags := serverFlags
	if readOnly {
		flags |= nbdnl.FlagReadOnly
	}
	index, err = nbdnl.Connect(nbdnl.IndexAny, sockets, uint64(size), 0, flags,
		nbdnl.WithBlockSize(transport.BlockSize), nbdnl.WithTimeout(requestTimeout), nbdnl.WithDeadconnTimeout(deadTimeout), withIdentifier(tag))
	if err != nil {
		return 0, explain("NBD_CMD_CONNECT", err)
	}
	return index, nil
}

// reconfigure gives the device sockets in place of dead ones; those for which there
// is no dead one are left alone.
func reconfigure(index uint32, tag uint64, sockets []*os.File, options ...nbdnl.ConnectOption) error {
	options = append(options, nbdnl.WithTimeout(requestTimeout), nbdnl.WithDeadconnTimeout(deadTimeout), withIdentifier(tag))
	return explain("NBD_CMD_RECONFIGURE", nbdnl.Reconfigure(index, sockets, 0, serverFlags, options...))
}

// disconnect ends the device: what is in flight fails. One that is gone is no
// error.
func disconnect(index uint32) error {
	err := nbdnl.Disconnect(index)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return explain("NBD_CMD_DISCONNECT", err)
}

// explain says what the absence of the family means.
func explain(what string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: %w: the module nbd is not loaded, or this is not the machine's network namespace", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

func blockPath(index uint32) string { return fmt.Sprintf("/dev/nbd%d", index) }
func blockDir(index uint32) string  { return fmt.Sprintf("/sys/block/nbd%d", index) }

// attribute reads a file of the device in sysfs.
func attribute(index uint32, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(blockDir(index), name))
	return strings.TrimSpace(string(b)), err
}

// sizeOf is the device's size in bytes.
func sizeOf(index uint32) (int64, error) {
	s, err := attribute(index, "size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(s, 10, 64)
	return sectors << 9, err
}

// devicesByTag looks at all NBD devices of the machine that are connected.
func devicesByTag() (map[string]uint32, error) {
	files, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		return nil, err
	}
	found := map[string]uint32{}
	for _, f := range files {
		n, _ := strings.CutPrefix(filepath.Base(filepath.Dir(f)), "nbd")
		index, err := strconv.ParseUint(n, 10, 32)
		if err != nil {
			continue
		}
		if id, err := attribute(uint32(index), "backend"); err == nil {
			found[id] = uint32(index)
		}
	}
	return found, nil
}
