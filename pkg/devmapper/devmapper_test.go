package devmapper

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestTargets(t *testing.T) {
	want := []Target{{0, 8, "linear", "7:0 0"}, {8, 16, "error", ""}, {24, 1 << 40, "user", "0 1099511627776 snapmerge-0123456789abcdef-0123456789ab"}}
	data, err := encodeTargets(want)
	if err != nil {
		t.Fatal(err)
	}
	if len(data)%8 != 0 {
		t.Errorf("%d bytes", len(data))
	}
	// In answers next counts from the beginning of the data, and in requests from
	// the target.
	at := uint32(0)
	for range want {
		n := native.Uint32(data[at+20:])
		at += n
		native.PutUint32(data[at-n+20:], at)
	}
	got, err := decodeTargets(data, len(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for n := range data {
		if _, err := decodeTargets(data[:n], len(want)); err == nil && n < len(data)-64 {
			t.Errorf("%d of %d bytes are decoded", n, len(data))
		}
	}
	native.PutUint32(data[20:], 0)
	if _, err := decodeTargets(data, 2); !errors.Is(err, errAnswer) {
		t.Errorf("a target that follows itself: %v", err)
	}
	if _, err := encodeTargets([]Target{{Type: strings.Repeat("x", typeSize)}}); err == nil {
		t.Error("a type that is too long is taken")
	}
}

func TestLists(t *testing.T) {
	entry := func(next uint32, dev uint64, name string) []byte {
		b := make([]byte, 12+len(name)+1)
		native.PutUint64(b, dev)
		native.PutUint32(b[8:], next)
		copy(b[12:], name)
		return append(b, make([]byte, max(0, int(next)-len(b)))...)
	}
	two := append(entry(32, 5, "first"), entry(0, 6, "second")...)
	for _, tt := range []struct {
		data []byte
		want []string
		err  error
	}{
		{two, []string{"first", "second"}, nil},
		{entry(0, 0, ""), nil, nil},
		{entry(1000, 5, "x"), []string{"x"}, errAnswer},
		{nil, nil, nil},
		{two[:8], nil, errAnswer},
		{two[:35], []string{"first"}, errAnswer},
	} {
		if got, err := decodeNames(tt.data); !errors.Is(err, tt.err) || !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%v, %v; want %v, %v", got, err, tt.want, tt.err)
		}
	}
	v := make([]byte, 32)
	native.PutUint32(v[4:], 1)
	native.PutUint32(v[8:], 2)
	native.PutUint32(v[12:], 3)
	copy(v[16:], "user")
	if got, err := decodeVersions(v); err != nil || got["user"] != "1.2.3" {
		t.Errorf("%v, %v", got, err)
	}
}

func TestRequest(t *testing.T) {
	b := request{cmd: cmdCreate, name: "n", uuid: "u", flags: flagReadOnly, targets: 2, data: []byte{7}}.encode(1024)
	if len(b) != 1024 || native.Uint32(b) != 4 || native.Uint32(b[12:]) != 1024 || native.Uint32(b[16:]) != headerSize || native.Uint32(b[20:]) != 2 ||
		native.Uint32(b[28:]) != flagReadOnly || text(b[48:176]) != "n" || text(b[176:305]) != "u" || b[headerSize] != 7 {
		t.Errorf("% x", b[:320])
	}
	if _, err := do(request{name: strings.Repeat("x", nameSize)}); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("name too long: %v", err)
	}
	native.PutUint32(b[12:], 2000)
	if _, err := decode(b); err == nil {
		t.Error("an answer that ends behind the buffer is taken")
	}
}

// TestDevice makes a device, changes its table under a reader, and takes it away.
func TestDevice(t *testing.T) {
	if os.Getenv("SNAPMERGE_VM_GUEST") == "" {
		t.Skip("makes device-mapper devices, as root; `make test-vm` runs it in a virtual machine (SNAPMERGE_VM_GUEST=1 runs it here)")
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	const name = "snapmerge-test"
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	_, err := Create(name, "SNAPMERGE-TEST")
	must("create", err)
	defer RemoveWhenUnused(name) // an error if all goes well
	if _, err := Create(name, ""); err == nil {
		t.Error("created twice")
	}
	if info, err := Status(name); err != nil || info.Active || info.Inactive {
		t.Errorf("new: %+v, %v", info, err)
	}
	must("load", LoadTable(name, false, Target{0, 128, "error", ""}))
	must("clear", ClearTable(name))
	must("load", LoadTable(name, false, Target{0, 64, "zero", ""}, Target{64, 64, "error", ""}))
	if info, err := Status(name); err != nil || info.Active || !info.Inactive {
		t.Errorf("loaded: %+v, %v", info, err)
	}
	must("resume", Resume(name, 0))
	info, err := Status(name)
	if err != nil || !info.Active || info.Inactive || info.OpenCount != 0 {
		t.Errorf("resumed: %+v, %v", info, err)
	}
	table, err := Table(name)
	if want := []Target{{0, 64, "zero", ""}, {64, 64, "error", ""}}; err != nil || !reflect.DeepEqual(table, want) {
		t.Errorf("table %+v, %v", table, err)
	}
	f, err := os.Open(info.Path())
	must("open", err)
	if _, err := f.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("read of zeros: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 512), 64<<9); err == nil {
		t.Error("read of an error target succeeds")
	}
	if err := Remove(name); !errors.Is(err, ErrBusy) {
		t.Errorf("remove of an open device: %v", err)
	}
	must("swap", errors.Join(LoadTable(name, true, Target{0, 128, "zero", ""}), Suspend(name, NoFreeze|NoFlush), Resume(name, NoFreeze)))
	if info, err := Status(name); err != nil || !info.ReadOnly || info.Suspended || info.OpenCount != 1 {
		t.Errorf("swapped: %+v, %v", info, err)
	}
	if names, err := List(); err != nil || !reflect.DeepEqual(names, []string{name}) {
		t.Errorf("list %v, %v", names, err)
	}
	must("deferred", RemoveWhenUnused(name))
	must("close", f.Close())
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) { // the kernel does it by and by
		if _, err := Status(name); errors.Is(err, ErrNotFound) {
			break
		} else if err != nil || time.Now().After(end) {
			t.Fatalf("after the last close: %v", err)
		}
	}
	if v, err := TargetVersion("linear"); err != nil || strings.Count(v, ".") != 2 {
		t.Errorf("version %q, %v", v, err)
	}
	if _, err := TargetVersion("no-such-target"); !errors.Is(err, ErrNotFound) {
		t.Errorf("version of nothing: %v", err)
	}
	if err := LoadTable("no-such-device", false, Target{0, 8, "zero", ""}); !errors.Is(err, ErrNotFound) {
		t.Errorf("table of nothing: %v", err)
	}
}
