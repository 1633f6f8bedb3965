package vm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// The NBD protocol (doc/proto.md of the NBD project), as far as QEMU needs it:
// fixed newstyle negotiation, simple replies, all numbers big-endian.
//
//	server greets        "NBDMAGIC" "IHAVEOPT" flags u16
//	client answers       flags u32
//	option               "IHAVEOPT" option u32, length u32, data
//	reply to an option   magic u64, option u32, type u32, length u32, data
//	request              magic u32, flags u16, type u16, cookie u64, offset u64, length u32, data of a write
//	reply                magic u32, error u32, cookie u64, data of a read
const (
	nbdMagic         = 0x4e42444d41474943
	nbdOptionMagic   = 0x49484156454f5054
	nbdReplyMagic    = 0x3e889045565a9
	nbdRequestMagic  = 0x25609513
	nbdResponseMagic = 0x67446698

	nbdFlags = 1 | 2 // fixed newstyle, no 124 zeros

	nbdOptAbort = 2
	nbdOptInfo  = 6
	nbdOptGo    = 7

	nbdRepAck      = 1
	nbdRepInfo     = 3
	nbdRepErrUnsup = 1<<31 + 1

	nbdInfoExport    = 0
	nbdInfoBlockSize = 3

	// has flags, flush, FUA, trim, write zeroes
	nbdExportFlags = 1<<0 | 1<<2 | 1<<3 | 1<<5 | 1<<6

	nbdRead        = 0
	nbdWrite       = 1
	nbdDisconnect  = 2
	nbdFlush       = 3
	nbdTrim        = 4
	nbdWriteZeroes = 6

	nbdFUA = 1 << 0

	nbdMaxRequest  = 32 << 20
	nbdMaxOption   = 4096
	nbdErrInvalid  = 22
	nbdRequestSize = 28
)

var errPowerOff = errors.New("power is off")

// serve serves the disk to whoever connects, until the listener is closed.
func (d *Disk) serve(l net.Listener, failed func(error)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if err := d.serveConn(c); err != nil && !over(err) {
				failed(fmt.Errorf("disk: %w", err))
			}
		}()
	}
}

// over tells whether the client has just gone away.
func over(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func (d *Disk) serveConn(c net.Conn) error {
	r, w := bufio.NewReaderSize(c, 1<<20), bufio.NewWriterSize(c, 1<<20)
	if ready, err := d.negotiate(r, w); !ready || err != nil {
		return err
	}
	for {
		if r.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
		more, err := d.request(r, w)
		if errors.Is(err, errPowerOff) {
			// The guest gets no answer, not even an error, until its machine is killed.
			_, err = io.Copy(io.Discard, c)
			return err
		}
		if !more || err != nil {
			return err
		}
	}
}

// negotiate returns true when the client has chosen the disk.
func (d *Disk) negotiate(r io.Reader, w *bufio.Writer) (ready bool, err error) {
	var b []byte
	b = binary.BigEndian.AppendUint64(b, nbdMagic)
	b = binary.BigEndian.AppendUint64(b, nbdOptionMagic)
	b = binary.BigEndian.AppendUint16(b, nbdFlags)
	if _, err := w.Write(b); err != nil {
		return false, err
	}
	if err := w.Flush(); err != nil {
		return false, err
	}
	if _, err := io.ReadFull(r, make([]byte, 4)); err != nil {
		return false, err
	}
	for !ready {
		head := make([]byte, 16)
		if _, err := io.ReadFull(r, head); err != nil {
			return false, err
		}
		option, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if binary.BigEndian.Uint64(head) != nbdOptionMagic || n > nbdMaxOption {
			return false, fmt.Errorf("bad option: % x", head)
		}
		if _, err := io.ReadFull(r, make([]byte, n)); err != nil {
			return false, err
		}
		switch option {
		case nbdOptGo, nbdOptInfo:
			export := binary.BigEndian.AppendUint16(nil, nbdInfoExport)
			export = binary.BigEndian.AppendUint64(export, uint64(d.Size()))
			export = binary.BigEndian.AppendUint16(export, nbdExportFlags)
			nbdOptionReply(w, option, nbdRepInfo, export)
			blocks := binary.BigEndian.AppendUint16(nil, nbdInfoBlockSize)
			for _, v := range []uint32{sector, 4096, nbdMaxRequest} {
				blocks = binary.BigEndian.AppendUint32(blocks, v)
			}
			nbdOptionReply(w, option, nbdRepInfo, blocks)
			nbdOptionReply(w, option, nbdRepAck, nil)
			ready = option == nbdOptGo
		case nbdOptAbort:
			nbdOptionReply(w, option, nbdRepAck, nil)
			return false, w.Flush()
		default:
			nbdOptionReply(w, option, nbdRepErrUnsup, nil)
		}
		if err := w.Flush(); err != nil {
			return false, err
		}
	}
	return true, nil
}

func nbdOptionReply(w *bufio.Writer, option, kind uint32, data []byte) {
	b := binary.BigEndian.AppendUint64(nil, nbdReplyMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, _ = w.Write(append(b, data...)) // the error stays with w until Flush
}

// request serves one; more is false after the last.
func (d *Disk) request(r io.Reader, w *bufio.Writer) (more bool, err error) {
	head := make([]byte, nbdRequestSize)
	if _, err := io.ReadFull(r, head); err != nil {
		return false, err
	}
	if binary.BigEndian.Uint32(head) != nbdRequestMagic {
		return false, fmt.Errorf("bad request: % x", head)
	}
	through := binary.BigEndian.Uint16(head[4:])&nbdFUA != 0
	kind := binary.BigEndian.Uint16(head[6:])
	cookie := binary.BigEndian.Uint64(head[8:])
	off, n := int64(binary.BigEndian.Uint64(head[16:])), int64(binary.BigEndian.Uint32(head[24:]))
	if kind == nbdDisconnect {
		return false, w.Flush()
	}
	var data []byte
	if kind == nbdWrite {
		if n > nbdMaxRequest {
			return false, fmt.Errorf("write of %d bytes", n)
		}
		data = make([]byte, n)
		if _, err := io.ReadFull(r, data); err != nil {
			return false, err
		}
	}
	code, ok := uint32(0), true
	switch bad := off < 0 || off > d.Size() || n > d.Size()-off || off%sector != 0 || n%sector != 0; {
	case bad || kind == nbdRead && n > nbdMaxRequest:
		code = nbdErrInvalid
	case kind == nbdRead:
		data = make([]byte, n)
		ok = d.read(data, off)
	case kind == nbdWrite:
		ok = d.write(data, off, through)
	case kind == nbdFlush:
		ok = d.flush()
	case kind == nbdTrim || kind == nbdWriteZeroes:
		ok = d.zero(off, n, through)
	default:
		code = nbdErrInvalid
	}
	if !ok {
		return false, errPowerOff
	}
	b := binary.BigEndian.AppendUint32(nil, nbdResponseMagic)
	b = binary.BigEndian.AppendUint32(b, code)
	b = binary.BigEndian.AppendUint64(b, cookie)
	if _, err := w.Write(b); err != nil {
		return false, err
	}
	if kind == nbdRead && code == 0 {
		_, err = w.Write(data)
	}
	return true, err
}
