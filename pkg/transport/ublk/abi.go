package ublk

import (
	"encoding/binary"
	"fmt"

	"github.com/snapmerge/snapmerge/pkg/transport"
)

var native = binary.NativeEndian

// ioctl encodes an opcode: _IOR and _IOWR of type 'u'.
const (
	ctrlRead   = 2<<30 | ctrlCmdSize<<16 | 'u'<<8
	ctrlModify = 3<<30 | ctrlCmdSize<<16 | 'u'<<8
	ioModify   = 3<<30 | ioCmdSize<<16 | 'u'<<8
)

// Control commands (UBLK_U_CMD_*).
const (
	cmdGetDevInfo    = ctrlRead | 0x02
	cmdAddDev        = ctrlModify | 0x04
	cmdDelDev        = ctrlModify | 0x05
	cmdStartDev      = ctrlModify | 0x06
	cmdStopDev       = ctrlModify | 0x07
	cmdSetParams     = ctrlModify | 0x08
	cmdGetParams     = ctrlRead | 0x09
	cmdStartRecovery = ctrlModify | 0x10
	cmdEndRecovery   = ctrlModify | 0x11
	cmdGetFeatures   = ctrlRead | 0x13
	cmdUpdateSize    = ctrlModify | 0x15 // kernel 6.16
)

// Commands of a queue (UBLK_U_IO_*).
const (
	ioFetch  = ioModify | 0x20
	ioCommit = ioModify | 0x21
)

// Flags of a device (UBLK_F_*).
const (
	flagRecovery        = 1 << 3
	flagRecoveryReissue = 1 << 4
	flagIoctlEncode     = 1 << 6
	flagUpdateSize      = 1 << 10

	// flagsNeeded are those without which a device does not outlive its server.
	flagsNeeded = flagRecovery | flagRecoveryReissue | flagIoctlEncode
)

const (
	ctrlCmdSize = 32
	ioCmdSize   = 16
	infoSize    = 64
	paramsSize  = 60
	descSize    = 24

	maxDepth = 4096 // UBLK_MAX_QUEUE_DEPTH
	newID    = 0xffffffff
)

// States of a device (UBLK_S_DEV_*).
type devState uint16

const (
	stateDead     devState = 0
	stateLive     devState = 1
	stateQuiesced devState = 2
)

func (s devState) String() string {
	switch s {
	case stateDead:
		return "dead"
	case stateLive:
		return "live"
	case stateQuiesced:
		return "quiesced"
	}
	return fmt.Sprintf("state %d", uint16(s))
}

// devInfo is struct ublksrv_ctrl_dev_info.
type devInfo struct {
	queues, depth uint16
	state         devState
	maxIO         uint32 // bytes
	id            uint32
	pid           int32
	flags         uint64
	tag           uint64 // ublksrv_flags
}

func (i *devInfo) encode(b []byte) {
	clear(b[:infoSize])
	native.PutUint16(b[0:], i.queues)
	native.PutUint16(b[2:], i.depth)
	native.PutUint32(b[8:], i.maxIO)
	native.PutUint32(b[12:], i.id)
	native.PutUint64(b[24:], i.flags)
	native.PutUint64(b[32:], i.tag)
}

func (i *devInfo) decode(b []byte) {
	*i = devInfo{
		queues: native.Uint16(b[0:]), depth: native.Uint16(b[2:]), state: devState(native.Uint16(b[4:])),
		maxIO: native.Uint32(b[8:]), id: native.Uint32(b[12:]), pid: int32(native.Uint32(b[16:])),
		flags: native.Uint64(b[24:]), tag: native.Uint64(b[32:]),
	}
}

// Types and attributes of parameters.
const (
	paramBasic   = 1 << 0
	paramDiscard = 1 << 1

	attrReadOnly      = 1 << 0
	attrVolatileCache = 1 << 2
	attrFUA           = 1 << 3
)

const (
	sectorShift = 9
	sectorSize  = 1 << sectorShift
	blockShift  = 12
	blockSize   = transport.BlockSize

	// maxIO is the most bytes of a read or write.
	maxIO = 512 << 10
	// maxZero is the most bytes of a discard or write-zeroes.
	maxZero = 256 << 20
)

// params is what we set of struct ublk_params.
type params struct {
	readOnly bool
	size     int64 // bytes
}

func (p *params) encode(b []byte) {
	clear(b[:paramsSize])
	attrs := uint32(attrVolatileCache | attrFUA)
	if p.readOnly {
		attrs |= attrReadOnly
	}
	native.PutUint32(b[0:], paramsSize)
	native.PutUint32(b[4:], paramBasic|paramDiscard)
	native.PutUint32(b[8:], attrs)
	for i := range 4 { // logical and physical block, optimal and least transfer
		b[12+i] = blockShift
	}
	native.PutUint32(b[16:], maxIO>>sectorShift)
	native.PutUint64(b[24:], uint64(p.size>>sectorShift))
	native.PutUint32(b[44:], blockSize)
	native.PutUint32(b[48:], maxZero>>sectorShift)
	native.PutUint32(b[52:], maxZero>>sectorShift)
	native.PutUint16(b[56:], 1)
}

func (p *params) decode(b []byte) {
	*p = params{
		readOnly: native.Uint32(b[8:])&attrReadOnly != 0,
		size:     int64(native.Uint64(b[24:])) << sectorShift,
	}
}

// Operations of a request (UBLK_IO_OP_*), and a flag of it.
type ioOp uint8

const (
	opRead        ioOp = 0
	opWrite       ioOp = 1
	opFlush       ioOp = 2
	opDiscard     ioOp = 3
	opWriteZeroes ioOp = 5

	ioFUA = 1 << 13
)

// ioDesc is struct ublksrv_io_desc.
type ioDesc struct {
	op     ioOp
	fua    bool
	off, n int64 // bytes
}

func decodeDesc(b []byte) ioDesc {
	flags := native.Uint32(b)
	return ioDesc{
		op: ioOp(flags), fua: flags&ioFUA != 0,
		n:   int64(native.Uint32(b[4:])) << sectorShift,
		off: int64(native.Uint64(b[8:])) << sectorShift,
	}
}

// descBytes is the length of a queue's descriptors in memory, in whole pages.
func descBytes(depth int) int {
	const page = 4096
	return (depth*descSize + page - 1) &^ (page - 1)
}
