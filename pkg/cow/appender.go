package cow

import "io"

// appendChunk is how much an appender collects before it writes, in bytes.
const appendChunk = 256 << 10

// appender collects writes to one place after another and writes them in large
// pieces.
type appender struct {
	w   io.WriterAt
	at  int64 // where buf belongs
	buf []byte
}

func newAppender(w io.WriterAt) *appender {
	return &appender{w: w, buf: make([]byte, 0, appendChunk)}
}

// put writes p at off, now or later.
func (a *appender) put(p []byte, off int64) error {
	if off != a.at+int64(len(a.buf)) || len(a.buf)+len(p) > cap(a.buf) {
		if err := a.flush(); err != nil {
			return err
		}
		a.at = off
	}
	if len(p) > cap(a.buf) {
		return writeAt(a.w, p, off)
	}
	a.buf = append(a.buf, p...)
	return nil
}

// flush writes what is left.
func (a *appender) flush() error {
	if len(a.buf) == 0 {
		return nil
	}
	err := writeAt(a.w, a.buf, a.at)
	a.at += int64(len(a.buf))
	a.buf = a.buf[:0]
	return err
}

func writeAt(w io.WriterAt, p []byte, off int64) error {
	n, err := w.WriteAt(p, off)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
