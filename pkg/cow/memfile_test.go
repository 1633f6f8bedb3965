package cow_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
)

var errInjected = errors.New("injected")

// memFile is a file in memory, both sink and source.
type memFile struct {
	b []byte
	// failAfter is the number of writes, truncations and flushes that still
	// work; -1 for all.
	failAfter int
	failed    bool
	flushed   []byte // content at the last flush
}

func newMemFile() *memFile { return &memFile{failAfter: -1} }

func (m *memFile) step() error {
	if m.failAfter == 0 {
		m.failed = true
		return errInjected
	}
	if m.failAfter > 0 {
		m.failAfter--
	}
	return nil
}

func (m *memFile) WriteAt(p []byte, off int64) (int, error) {
	if err := m.step(); err != nil {
		return 0, err
	}
	if need := off + int64(len(p)) - int64(len(m.b)); need > 0 {
		m.b = append(m.b, make([]byte, need)...)
	}
	return copy(m.b[off:], p), nil
}

func (m *memFile) Truncate(size int64) error {
	if err := m.step(); err != nil {
		return err
	}
	m.b = append(m.b[:min(int64(len(m.b)), size)], make([]byte, max(0, size-int64(len(m.b))))...)
	return nil
}

func (m *memFile) Flush() error {
	if err := m.step(); err != nil {
		return err
	}
	m.flushed = bytes.Clone(m.b)
	return nil
}

func (m *memFile) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m.b).ReadAt(p, off)
}

// write writes a file with the ops that script adds.
func write(t testing.TB, o cow.WriterOptions, script func(w *cow.Writer) error) []byte {
	t.Helper()
	m := newMemFile()
	if err := writeTo(m, o, script); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.b, m.flushed) {
		t.Error("finished, but not all is flushed")
	}
	return m.b
}

func writeTo(s cow.Sink, o cow.WriterOptions, script func(w *cow.Writer) error) error {
	w, err := cow.NewWriter(s, o)
	if err != nil {
		return err
	}
	if err := script(w); err != nil {
		return err
	}
	return w.Finalize()
}

// steps runs calls up to the first error.
func steps(calls ...error) error {
	for _, err := range calls {
		if err != nil {
			return err
		}
	}
	return nil
}

// load opens and loads a file and returns the first error.
func load(file []byte, label *uint64) (*cow.Table, error) {
	f, err := cow.Open(bytes.NewReader(file), int64(len(file)), cow.OpenOptions{Label: label})
	if err != nil {
		return nil, err
	}
	return f.Load()
}

var _ io.ReaderAt = (*memFile)(nil)
