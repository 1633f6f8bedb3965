package keeper

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestParseRequest(t *testing.T) {
	long := strings.Repeat("k", maxKey)
	tests := []struct {
		name, msg string
		fds       int
		err       string // "" means accepted
	}{
		{"put", `{"v":1,"op":"put","key":"fuse/a","meta":{"n":1}}`, 2, ""},
		{"put longest key", `{"v":1,"op":"put","key":"` + long + `","meta":{}}`, 1, ""},
		{"get", `{"v":1,"op":"get","key":"a"}`, 0, ""},
		{"list", `{"v":1,"op":"list"}`, 0, ""},
		{"list after", `{"v":1,"op":"list","after":"a"}`, 0, ""},
		{"drop", `{"v":1,"op":"drop","key":"ü"}`, 0, ""},
		{"freeze", `{"v":1,"op":"freeze","key":"a","timeout_ms":10000}`, 1, ""},
		{"thaw", `{"v":1,"op":"thaw"}`, 0, ""},
		{"run", `{"v":1,"op":"run","key":"task","meta":{}}`, 0, ""},
		{"run with descriptors", `{"v":1,"op":"run","key":"task","meta":{}}`, maxFDs, ""},

		{"empty", ``, 0, "not a message"},
		{"not JSON", `put a`, 0, "not a message"},
		{"cut", `{"v":1,"op":"li`, 0, "not a message"},
		{"array", `[1]`, 0, "not a message"},
		{"two values", `{"v":1,"op":"list"} {}`, 0, "after the JSON value"},
		{"unknown field", `{"v":1,"op":"list","x":1}`, 0, "unknown field"},
		{"wrong type", `{"v":1,"op":"get","key":7}`, 0, "not a message"},
		{"no version", `{"op":"list"}`, 0, "protocol version 0"},
		{"other version", `{"v":2,"op":"list"}`, 0, "protocol version 2"},
		{"unknown operation", `{"v":1,"op":"steal","key":"a"}`, 0, "no such operation"},
		{"no operation", `{"v":1}`, 0, "no such operation"},
		{"put without descriptor", `{"v":1,"op":"put","key":"a","meta":{}}`, 0, "0 descriptors"},
		{"put with too many", `{"v":1,"op":"put","key":"a","meta":{}}`, maxFDs + 1, "9 descriptors"},
		{"put without meta", `{"v":1,"op":"put","key":"a"}`, 1, "not a JSON object"},
		{"put with null meta", `{"v":1,"op":"put","key":"a","meta":null}`, 1, "not a JSON object"},
		{"put with list meta", `{"v":1,"op":"put","key":"a","meta":[]}`, 1, "not a JSON object"},
		{"put with huge meta", `{"v":1,"op":"put","key":"a","meta":{"x":"` + strings.Repeat("y", maxMeta) + `"}}`, 1, "meta of"},
		{"put with timeout", `{"v":1,"op":"put","key":"a","meta":{},"timeout_ms":1}`, 1, "timeout_ms not expected"},
		{"get with descriptor", `{"v":1,"op":"get","key":"a"}`, 1, "1 descriptors"},
		{"get without key", `{"v":1,"op":"get"}`, 0, "key of 0 bytes"},
		{"get with long key", `{"v":1,"op":"get","key":"` + long + `k"}`, 0, "key of 256 bytes"},
		{"get with meta", `{"v":1,"op":"get","key":"a","meta":{}}`, 0, "meta not expected"},
		{"key with newline", `{"v":1,"op":"get","key":"a\nb"}`, 0, "control character"},
		{"list with key", `{"v":1,"op":"list","key":"a"}`, 0, "key not expected"},
		{"drop with after", `{"v":1,"op":"drop","key":"a","after":"b"}`, 0, "after not expected"},
		{"freeze without directory", `{"v":1,"op":"freeze","key":"a","timeout_ms":1}`, 0, "0 descriptors"},
		{"freeze for ever", `{"v":1,"op":"freeze","key":"a","timeout_ms":60001}`, 1, "timeout of 60001 ms"},
		{"freeze for no time", `{"v":1,"op":"freeze","key":"a"}`, 1, "timeout of 0 ms"},
		{"freeze backwards", `{"v":1,"op":"freeze","key":"a","timeout_ms":-1}`, 1, "timeout of -1 ms"},
		{"run without arguments", `{"v":1,"op":"run","key":"task"}`, 0, "not a JSON object"},
		{"thaw with descriptor", `{"v":1,"op":"thaw"}`, 1, "1 descriptors"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseRequest([]byte(tt.msg), tt.fds)
			switch {
			case tt.err == "" && err != nil:
				t.Fatalf("refused: %v", err)
			case tt.err != "" && err == nil:
				t.Fatal("accepted")
			case tt.err != "" && !strings.Contains(err.Error(), tt.err):
				t.Fatalf("error %q does not say %q", err, tt.err)
			}
		})
	}
}

// FuzzMessage checks that no input breaks the parser and that whatever it
// accepts is accepted again, as the same request, after being written.
func FuzzMessage(f *testing.F) {
	for _, msg := range []string{
		`{"v":1,"op":"put","key":"fuse/a","meta":{"n":1}}`,
		`{"v":1,"op":"get","key":"a"}`,
		`{"v":1,"op":"list","after":"a"}`,
		`{"v":1,"op":"freeze","key":"a","timeout_ms":10000}`,
		`{"v":1,"op":"thaw"}`,
		`{"v":1,"op":"li`,
	} {
		f.Add([]byte(msg), 1)
		f.Add([]byte(msg), 0)
	}
	f.Fuzz(func(t *testing.T, msg []byte, fds int) {
		r, err := parseRequest(msg, fds)
		if err != nil {
			return
		}
		if fds < 0 || fds > maxFDs || len(r.Key) > maxKey || len(r.Meta) > maxMeta {
			t.Fatalf("accepted beyond the limits: %+v with %d descriptors", r, fds)
		}
		out, err := json.Marshal(r)
		if err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
		again, err := parseRequest(out, fds)
		if err != nil {
			if len(out) > len(msg) && strings.Contains(err.Error(), "meta of") {
				return // escaping made it longer
			}
			t.Fatalf("%s not accepted again: %v", out, err)
		}
		r.Meta, again.Meta = nil, nil // white space and escapes may differ
		if !reflect.DeepEqual(r, again) {
			t.Fatalf("read %+v, wrote %+v", r, again)
		}
	})
}
