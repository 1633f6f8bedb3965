package volume

import (
	"errors"
	"io"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/blockio/crashfs"
)

// TestFrozenEnds: what was frozen cannot be read any more when its cut has ended, not
// even if there is another cut for the same snapshot.
func TestFrozenEnds(t *testing.T) {
	v := newVolume(t, crashfs.New("/s"), Spec{Size: 8 * bs, Blank: true})
	defer v.Close()
	cut := func() *Frozen {
		if err := v.Cut("s", nil); err != nil {
			t.Fatal(err)
		}
		return v.Frozen()
	}
	end := func() {
		if err := v.EndCut("s"); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, bs)
	first := cut()
	if _, err := first.ReadAt(p, 0); err != nil {
		t.Error(err)
	}
	if _, _, err := first.NextData(0); err != nil && err != io.EOF {
		t.Error(err)
	}
	end()
	for _, again := range []bool{false, true} {
		if again {
			second := cut()
			defer end()
			if _, err := second.ReadAt(p, 0); err != nil {
				t.Error(err)
			}
		}
		if _, err := first.ReadAt(p, 0); !errors.Is(err, ErrCutEnded) {
			t.Errorf("cut again: %v, read: %v", again, err)
		}
		if _, _, err := first.NextData(0); !errors.Is(err, ErrCutEnded) {
			t.Errorf("cut again: %v, next data: %v", again, err)
		}
	}
}

// TestEncodeWithoutCut: there is nothing to encode when the cut has ended.
func TestEncodeWithoutCut(t *testing.T) {
	m, v := writtenVolume(t, managerConfig(crashfs.New("/n")))
	if r, err := m.startEncode(v); !errors.Is(err, ErrCutEnded) {
		t.Errorf("%+v, %v", r, err)
	}
}
