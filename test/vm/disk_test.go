package vm

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
)

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// TestDiskCut writes over flushed data, cuts the power with many seeds, and
// expects per sector nothing but what may be there, and all of what may be.
func TestDiskCut(t *testing.T) {
	const sectors = 8
	seen := map[string]bool{}
	for seed := range uint64(400) {
		d := NewDisk(sectors * sector)
		d.write(fill('a', sectors*sector), 0, false)
		d.flush()
		d.write(fill('b', 4*sector), 0, false)
		d.write(fill('c', sector), 2*sector, true)
		d.zero(6*sector, sector, false)
		d.PowerOff()
		if d.read(make([]byte, sector), 0) || d.write(fill('x', sector), 0, false) || d.flush() {
			t.Fatal("a disk without power answers")
		}
		d.Restart(rand.New(rand.NewPCG(seed, 0)))
		got := make([]byte, sectors*sector)
		if !d.read(got, 0) {
			t.Fatal("no answer after the restart")
		}
		var each []byte
		for i := range sectors {
			s := got[i*sector : (i+1)*sector]
			if !bytes.Equal(s, fill(s[0], sector)) {
				t.Fatalf("seed %d: a sector is torn", seed)
			}
			each = append(each, s[0])
		}
		allowed := []string{"ab", "ab", "c", "ab", "a", "a", "a\x00", "a"}
		for i, s := range each {
			if !bytes.ContainsRune([]byte(allowed[i]), rune(s)) {
				t.Fatalf("seed %d: sector %d is %q", seed, i, s)
			}
		}
		seen[string(each)] = true
	}
	// Sectors 0, 1, 3 and 6 are free to differ.
	if len(seen) != 16 {
		t.Errorf("%d outcomes of 16", len(seen))
	}
}

func TestDiskKeepsFlushed(t *testing.T) {
	d := NewDisk(1 << 20)
	d.write(fill('a', 4096), 8192, false)
	d.flush()
	d.PowerOff()
	d.Restart(rand.New(rand.NewPCG(1, 1)))
	got := make([]byte, 4096)
	if d.read(got, 8192); !bytes.Equal(got, fill('a', 4096)) {
		t.Error("flushed data are gone")
	}
}

func TestDiskCutAfter(t *testing.T) {
	d := NewDisk(1 << 20)
	cut := d.CutAfter(3)
	for i, want := range []bool{true, true, false, false} {
		if d.flush() != want {
			t.Errorf("request %d: %v", i, !want)
		}
	}
	<-cut
}

// nbdClient is a client as simple as the server.
type nbdClient struct {
	t *testing.T
	c net.Conn
}

func (n *nbdClient) send(parts ...any) {
	n.t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			n.t.Fatal(err)
		}
	}
	if _, err := n.c.Write(b.Bytes()); err != nil {
		n.t.Fatal(err)
	}
}

func (n *nbdClient) recv(size int) []byte {
	n.t.Helper()
	b := make([]byte, size)
	if _, err := io.ReadFull(n.c, b); err != nil {
		n.t.Fatal(err)
	}
	return b
}

// option sends one and returns the types of the replies, up to the last.
func (n *nbdClient) option(option uint32) (kinds []uint32) {
	n.send(uint64(nbdOptionMagic), option, uint32(0))
	for {
		head := n.recv(20)
		kind := binary.BigEndian.Uint32(head[12:])
		n.recv(int(binary.BigEndian.Uint32(head[16:])))
		kinds = append(kinds, kind)
		if kind != nbdRepInfo {
			return kinds
		}
	}
}

// request returns the error code and the data.
func (n *nbdClient) request(flags, kind uint16, off uint64, length uint32, data []byte) (uint32, []byte) {
	n.send(uint32(nbdRequestMagic), flags, kind, uint64(99), off, length, data)
	head := n.recv(16)
	code := binary.BigEndian.Uint32(head[4:])
	if binary.BigEndian.Uint64(head[8:]) != 99 {
		n.t.Errorf("reply % x", head)
	}
	if kind == nbdRead && code == 0 {
		return code, n.recv(int(length))
	}
	return code, nil
}

func TestNBD(t *testing.T) {
	d := NewDisk(1 << 20)
	client, server := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- d.serveConn(server) }()
	n := &nbdClient{t, client}
	n.recv(18)
	n.send(uint32(1))
	if kinds := n.option(8); !slices.Equal(kinds, []uint32{nbdRepErrUnsup}) {
		t.Errorf("unknown option: %x", kinds)
	}
	if kinds := n.option(nbdOptGo); !slices.Equal(kinds, []uint32{nbdRepInfo, nbdRepInfo, nbdRepAck}) {
		t.Errorf("go: %x", kinds)
	}
	for _, tt := range []struct {
		flags, kind uint16
		off         uint64
		length      uint32
		data        []byte
		code        uint32
	}{
		{0, nbdWrite, 4096, 1024, fill('a', 1024), 0},
		{nbdFUA, nbdWrite, 8192, 512, fill('b', 512), 0},
		{0, nbdWriteZeroes, 4608, 512, nil, 0},
		{0, nbdTrim, 1<<20 - 512, 512, nil, 0},
		{0, nbdRead, 1<<20 - 512, 1024, nil, nbdErrInvalid},
		{0, nbdRead, 1 << 63, 512, nil, nbdErrInvalid},
		{0, nbdRead, 1, 512, nil, nbdErrInvalid},
		{0, 77, 0, 0, nil, nbdErrInvalid},
	} {
		if code, _ := n.request(tt.flags, tt.kind, tt.off, tt.length, tt.data); code != tt.code {
			t.Errorf("%+v: code %d", tt, code)
		}
	}
	if _, got := n.request(0, nbdRead, 4096, 1024, nil); !bytes.Equal(got, append(fill('a', 512), fill(0, 512)...)) {
		t.Error("wrong data")
	}
	if d.durable[4096] != 0 || !d.cache[1].forced {
		t.Errorf("cache before the flush: %+v", d.cache[1].forced)
	}
	if code, _ := n.request(0, nbdFlush, 0, 0, nil); code != 0 || d.durable[4096] != 'a' {
		t.Error("flush")
	}
	n.send(uint32(nbdRequestMagic), uint16(0), uint16(nbdDisconnect), uint64(0), uint64(0), uint32(0))
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
