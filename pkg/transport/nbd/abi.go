package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

var network = binary.BigEndian

const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	requestSize  = 28
	replySize    = 16
)

// Types of requests (NBD_CMD_*).
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6

	cmdFlagFUA = 1
)

// operations by the protocol's numbers.
var operations = map[uint16]transport.Op{
	cmdRead: transport.OpRead, cmdWrite: transport.OpWrite, cmdFlush: transport.OpFlush,
	cmdTrim: transport.OpZero, cmdWriteZeroes: transport.OpZero,
}

// request is one of the driver.
type request struct {
	transport.Request
	cookie uint64
	bad    bool // of a type that was not offered
}

// errDisconnect says that somebody has disconnected the device.
var errDisconnect = errors.New("the device was disconnected")

// decodeRequest reads a request's header. An error is the end of the connection,
// for there is no telling where the next one begins.
func decodeRequest(b []byte) (request, error) {
	if magic := network.Uint32(b); magic != requestMagic {
		return request{}, fmt.Errorf("request with magic %#x", magic)
	}
	typ := network.Uint16(b[6:])
	if typ == cmdDisconnect {
		return request{}, errDisconnect
	}
	op, known := operations[typ]
	r := request{cookie: network.Uint64(b[8:]), bad: !known}
	r.Request = transport.Request{
		Op: op, FUA: network.Uint16(b[4:])&cmdFlagFUA != 0,
		Off: int64(network.Uint64(b[16:])), N: int64(network.Uint32(b[24:])),
	}
	if r.N > maxTransfer && (r.Op == transport.OpRead || r.Op == transport.OpWrite) {
		return r, fmt.Errorf("%s of %d bytes", r.Op, r.N)
	}
	return r, nil
}

func putReply(b []byte, cookie uint64, errno uint32) {
	network.PutUint32(b, replyMagic)
	network.PutUint32(b[4:], errno)
	network.PutUint64(b[8:], cookie)
}
