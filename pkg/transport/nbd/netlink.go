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

	"github.com/mdlayher/genetlink"
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
)

// Commands and attributes of linux/nbd-netlink.h.
const (
	cmdNlConnect     = 1
	cmdNlDisconnect  = 2
	cmdNlReconfigure = 3

	attrIndex             = 1 // u32
	attrSizeBytes         = 2 // u64, as all that follow but the last two
	attrBlockSizeBytes    = 3
	attrTimeout           = 4 // in seconds
	attrServerFlags       = 5
	attrSockets           = 7 // of items, each of a descriptor (u32)
	attrDeadConnTimeout   = 8 // in seconds
	attrBackendIdentifier = 10

	attrSocketItem = 1
	attrSocketFD   = 1
)

// Server flags of linux/nbd.h. Write-zeroes are for kernel 6.10 and later.
const (
	serverReadOnly = 1 << 1
	// has flags, flush, FUA, trim, write-zeroes, several connections
	serverFlags = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<8
)

// identifier is what the driver keeps of a tag.
func identifier(tag uint64) string { return fmt.Sprintf("snapmerge-%016x", tag) }

// connect makes a device of the sockets.
func connect(tag uint64, size int64, readOnly bool, sockets []*os.File) (index uint32, err error) {
	flags := uint64(serverFlags)
	if readOnly {
		flags |= serverReadOnly
	}
	answer, err := command("NBD_CMD_CONNECT", cmdNlConnect, netlink.Request, func(e *netlink.AttributeEncoder) {
		e.Uint64(attrSizeBytes, uint64(size))
		e.Uint64(attrBlockSizeBytes, transport.BlockSize)
		e.Uint64(attrServerFlags, flags)
		putConnections(e, tag, sockets)
	})
	if err != nil {
		return 0, err
	}
	for _, m := range answer {
		d, err := netlink.NewAttributeDecoder(m.Data)
		if err != nil {
			return 0, fmt.Errorf("answer to NBD_CMD_CONNECT: %w", err)
		}
		for d.Next() {
			if d.Type() == attrIndex {
				return d.Uint32(), nil
			}
		}
	}
	return 0, errors.New("no index in the answer to NBD_CMD_CONNECT")
}

// reconfigure gives the device sockets in place of dead ones; those for which there
// is no dead one are left alone. size is the new size in bytes, or 0.
func reconfigure(index uint32, tag uint64, size int64, sockets ...*os.File) error {
	_, err := command("NBD_CMD_RECONFIGURE", cmdNlReconfigure, netlink.Request|netlink.Acknowledge, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, index)
		if size > 0 {
			e.Uint64(attrSizeBytes, uint64(size))
		}
		putConnections(e, tag, sockets)
	})
	return err
}

func putConnections(e *netlink.AttributeEncoder, tag uint64, sockets []*os.File) {
	e.Uint64(attrTimeout, uint64(requestTimeout/time.Second))
	e.Uint64(attrDeadConnTimeout, uint64(deadTimeout/time.Second))
	e.String(attrBackendIdentifier, identifier(tag))
	if len(sockets) == 0 {
		return
	}
	e.Nested(attrSockets, func(list *netlink.AttributeEncoder) error {
		for _, s := range sockets {
			list.Nested(attrSocketItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(attrSocketFD, uint32(s.Fd()))
				return nil
			})
		}
		return nil
	})
}

// disconnect ends the device: what is in flight fails. One that is gone is no
// error.
func disconnect(index uint32) error {
	_, err := command("NBD_CMD_DISCONNECT", cmdNlDisconnect, netlink.Request|netlink.Acknowledge, func(e *netlink.AttributeEncoder) {
		e.Uint32(attrIndex, index)
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// errNoFamily says that there is nobody to talk to.
var errNoFamily = errors.New("the module nbd is not loaded, or the machine's network namespace cannot be reached")

// command carries a command out over a connection of its own: one that hangs must
// not hold up those of other volumes.
func command(name string, cmd uint8, flags netlink.HeaderFlags, attributes func(*netlink.AttributeEncoder)) ([]genetlink.Message, error) {
	c, err := dial()
	if err != nil {
		return nil, fmt.Errorf("%s: generic netlink: %w", name, err)
	}
	defer c.Close()
	family, err := c.GetFamily("nbd")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: %w", name, err, errNoFamily)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	e := netlink.NewAttributeEncoder()
	attributes(e)
	data, err := e.Encode()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	answer, err := c.Execute(genetlink.Message{Header: genetlink.Header{Command: cmd, Version: family.Version}, Data: data}, family.ID, flags)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return answer, nil
}

// dial connects in the machine's network namespace, for the family is in no other.
// A pod of its own namespace finds it as that of process 1 if it has the machine's
// processes (hostPID).
func dial() (*genetlink.Conn, error) {
	f, err := os.Open("/proc/1/ns/net")
	if err != nil {
		return genetlink.Dial(nil)
	}
	defer f.Close()
	return genetlink.Dial(&netlink.Config{NetNS: int(f.Fd())})
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
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return nil, err
	}
	found := map[string]uint32{}
	for _, e := range entries {
		n, ok := strings.CutPrefix(e.Name(), "nbd")
		index, err := strconv.ParseUint(n, 10, 32)
		if !ok || err != nil {
			continue
		}
		id, err := attribute(uint32(index), "backend")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // not connected, or gone meanwhile
		}
		if err != nil { // to leave out one that may be ours would have its record dropped
			return nil, err
		}
		found[id] = uint32(index)
	}
	return found, nil
}
