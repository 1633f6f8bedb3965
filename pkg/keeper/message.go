package keeper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	protocolVersion = 1

	maxMessage = 32 << 10 // bytes of one message
	maxMeta    = 8 << 10  // bytes of an entry's meta
	maxKey     = 255      // bytes of a key
	maxFDs     = 8        // descriptors of an entry
	maxEntries = 8192     // entries of a keeper
	maxFreeze  = time.Minute

	// listBudget bounds the keys of one answer to list, in bytes, so that it
	// stays below maxMessage even if JSON escapes every byte of them.
	listBudget = 4 << 10
)

type op string

const (
	opPut    op = "put"
	opGet    op = "get"
	opList   op = "list"
	opDrop   op = "drop"
	opFreeze op = "freeze"
	opThaw   op = "thaw"
	opRun    op = "run"
)

type code string

const (
	codeNotFound   code = "not_found"
	codeFull       code = "full"
	codeBadRequest code = "bad_request"
	codeBroken     code = "broken"
	codeFailed     code = "failed"
)

type request struct {
	Version   int             `json:"v"`
	Op        op              `json:"op"`
	Key       string          `json:"key,omitempty"`
	Meta      json.RawMessage `json:"meta,omitempty"`
	After     string          `json:"after,omitempty"`
	TimeoutMS int64           `json:"timeout_ms,omitempty"`
}

type response struct {
	Version int             `json:"v"`
	Error   string          `json:"error,omitempty"`
	Code    code            `json:"code,omitempty"`
	Meta    json.RawMessage `json:"meta,omitempty"`
	Keys    []string        `json:"keys,omitempty"`
	More    bool            `json:"more,omitempty"`
}

// parseRequest reads a request and checks every rule of the protocol, the
// number of descriptors that came with it included.
func parseRequest(msg []byte, fds int) (*request, error) {
	var r request
	if err := decodeStrict(msg, &r); err != nil {
		return nil, err
	}
	if r.Version != protocolVersion {
		return nil, fmt.Errorf("protocol version %d, want %d", r.Version, protocolVersion)
	}
	if err := r.checkFields(); err != nil {
		return nil, fmt.Errorf("%s: %w", r.Op, err)
	}
	low, high := 0, 0
	switch r.Op {
	case opPut:
		low, high = 1, maxFDs
	case opFreeze:
		low, high = 1, 1
	case opRun:
		high = maxFDs
	}
	if fds < low || fds > high {
		return nil, fmt.Errorf("%s: %d descriptors, want %d to %d", r.Op, fds, low, high)
	}
	return &r, nil
}

func parseResponse(msg []byte) (response, error) {
	var r response
	if err := decodeStrict(msg, &r); err != nil {
		return r, err
	}
	if r.Version != protocolVersion {
		return r, fmt.Errorf("keeper speaks version %d, want %d", r.Version, protocolVersion)
	}
	return r, nil
}

// checkFields checks that each field is there exactly where the operation has
// it, and its value.
func (r *request) checkFields() error {
	var key, meta, after, timeout bool // what the operation takes
	switch r.Op {
	case opPut, opRun:
		key, meta = true, true
	case opGet, opDrop:
		key = true
	case opList:
		after = true
	case opFreeze:
		key, timeout = true, true
	case opThaw:
	default:
		return errors.New("no such operation")
	}
	if key {
		if err := checkKey(r.Key); err != nil {
			return err
		}
	} else if r.Key != "" {
		return errors.New("key not expected")
	}
	if meta {
		if err := checkMeta(r.Meta); err != nil {
			return err
		}
	} else if r.Meta != nil {
		return errors.New("meta not expected")
	}
	if r.After != "" {
		if !after {
			return errors.New("after not expected")
		}
		if err := checkKey(r.After); err != nil {
			return err
		}
	}
	if timeout {
		if r.TimeoutMS < 1 || r.TimeoutMS > maxFreeze.Milliseconds() {
			return fmt.Errorf("timeout of %d ms, want 1 to %d", r.TimeoutMS, maxFreeze.Milliseconds())
		}
	} else if r.TimeoutMS != 0 {
		return errors.New("timeout_ms not expected")
	}
	return nil
}

func checkKey(key string) error {
	if key == "" || len(key) > maxKey {
		return fmt.Errorf("key of %d bytes, want 1 to %d", len(key), maxKey)
	}
	if !utf8.ValidString(key) {
		return errors.New("key is not UTF-8")
	}
	for _, c := range key {
		if unicode.IsControl(c) {
			return errors.New("key has a control character")
		}
	}
	return nil
}

func checkMeta(meta json.RawMessage) error {
	if len(meta) > maxMeta {
		return fmt.Errorf("meta of %d bytes, want at most %d", len(meta), maxMeta)
	}
	if t := bytes.TrimSpace(meta); len(t) == 0 || t[0] != '{' || !json.Valid(t) {
		return errors.New("meta is not a JSON object")
	}
	return nil
}

// decodeStrict reads exactly one JSON value without unknown fields.
func decodeStrict(msg []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(msg))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("not a message: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("not a message: data after the JSON value")
	}
	return nil
}
