package blockio

import (
	"fmt"
	"io"
)

// NewQueue makes a queue of the kind. depth is the most transfers that it keeps
// in flight at a time; Sync keeps one whatever depth is. URing fails with the
// reason where io_uring does not work; Auto falls back to Sync there.
func NewQueue(kind Kind, depth int) (Queue, error) {
	if depth < 1 {
		return nil, fmt.Errorf("queue depth %d: must be at least 1", depth)
	}
	switch kind {
	case Auto:
		if ProbeURing() == nil {
			if q, err := newURingQueue(depth); err == nil {
				return q, nil
			}
		}
		return &syncQueue{}, nil
	case Sync:
		return &syncQueue{}, nil
	case URing:
		if err := ProbeURing(); err != nil {
			return nil, err
		}
		return newURingQueue(depth)
	}
	return nil, fmt.Errorf("queue kind %q: must be %s, %s or %s", kind, Auto, Sync, URing)
}

// eachRequest serves requests by the device's own methods.
func eachRequest(d Device, batch []Request, write bool) error {
	move := d.ReadAt
	if write {
		move = d.WriteAt
	}
	for _, r := range batch {
		if len(r.Buf) == 0 {
			continue
		}
		n, err := move(r.Buf, r.Off)
		switch {
		case n == len(r.Buf): // io.ReaderAt may give io.EOF together with the last byte
		case err == nil || err == io.EOF:
			name := "device"
			if f, ok := d.(File); ok {
				name = f.Name()
			}
			return ioError(opName(write), name, r.Off+int64(n), endError(write))
		default:
			return err
		}
	}
	return nil
}

// endError is what a transfer of 0 bytes means.
func endError(write bool) error {
	if write {
		return io.ErrShortWrite
	}
	return io.EOF
}

func opName(write bool) string {
	if write {
		return "write"
	}
	return "read"
}

// unwrap returns the file of the system behind d.
func unwrap(d Device) (*osFile, bool) {
	for {
		w, ok := d.(Wrapper)
		if !ok {
			break
		}
		d = w.Unwrap()
	}
	f, ok := d.(*osFile)
	return f, ok
}
