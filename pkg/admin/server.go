// Package admin is how commands on the same machine talk to the node plugin:
// HTTP and JSON on a unix socket that only the plugin's user may use.
//
//	GET /volumes               status of all volumes, an array (volume.Status)
//	GET /volumes/{id}          status of one
//	PUT /volumes/{id}/paused   {"paused": true}: pause or go on; its status then
//	PUT /volumes/{id}/rate     {"mib_s": 50}: limit of the merge, 0 for the node's; its status then
//
// An error is {"error": "text"} with status 400 (a bad request), 404 (no such
// volume) or 500.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/unixsocket"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// DefaultSocket is where a node plugin listens unless it is told otherwise.
const DefaultSocket = "/run/snapmerge/admin.sock"

// MaxRate is the highest rate that can be set, in MiB/s.
const MaxRate = 1 << 20

const (
	// callTimeout bounds a request in both directions.
	callTimeout = 10 * time.Second
	// stopTimeout is for the requests under way when the server is to end.
	stopTimeout = 2 * time.Second
	maxBody     = 4 << 10
)

// Serve answers at the socket path until ctx ends. It replaces the socket that
// a dead process left there; a living one makes it fail.
func Serve(ctx context.Context, socketPath string, m *volume.Manager) error {
	l, err := unixsocket.Listen(ctx, "unix", socketPath)
	if err != nil {
		return fmt.Errorf("admin: %w", err)
	}
	s := &http.Server{
		Handler: handler(m), ReadTimeout: callTimeout, WriteTimeout: callTimeout, MaxHeaderBytes: 16 << 10,
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if s.Shutdown(wait) != nil {
			_ = s.Close() // what is left is not answered
		}
	})
	klog.InfoS("Status and control are served", "socket", socketPath)
	err = s.Serve(l)
	if !stop() {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("admin: %w", err)
}

// pausedRequest and rateRequest are the bodies of PUT.
type pausedRequest struct {
	Paused *bool `json:"paused"`
}

type rateRequest struct {
	MiB *int `json:"mib_s"`
}

type errorReply struct {
	Error string `json:"error"`
}

var errBadRequest = errors.New("bad request")

func handler(m *volume.Manager) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /volumes", reply(func(*http.Request) (any, error) { return list(m), nil }))
	mux.HandleFunc("GET /volumes/{id}", reply(func(r *http.Request) (any, error) { return m.Status(r.PathValue("id")) }))
	mux.HandleFunc("PUT /volumes/{id}/paused", reply(func(r *http.Request) (any, error) {
		var req pausedRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if req.Paused == nil {
			return nil, fmt.Errorf("%w: paused is missing", errBadRequest)
		}
		return change(m, r, func(v *volume.Volume) error { return v.SetPaused(*req.Paused) })
	}))
	mux.HandleFunc("PUT /volumes/{id}/rate", reply(func(r *http.Request) (any, error) {
		var req rateRequest
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		if req.MiB == nil || *req.MiB < 0 || *req.MiB > MaxRate {
			return nil, fmt.Errorf("%w: mib_s is not 0 to %d", errBadRequest, MaxRate)
		}
		return change(m, r, func(v *volume.Volume) error { return v.SetRate(*req.MiB) })
	}))
	return mux
}

func list(m *volume.Manager) []volume.Status {
	all := []volume.Status{}
	for _, id := range m.IDs() {
		if s, err := m.Status(id); err == nil { // else it was deleted just now
			all = append(all, s)
		}
	}
	return all
}

// change changes the volume that the request names and returns its status.
func change(m *volume.Manager, r *http.Request, do func(*volume.Volume) error) (any, error) {
	id := r.PathValue("id")
	v, err := m.Get(id)
	if err != nil {
		return nil, err
	}
	if err := do(v); err != nil {
		return nil, err
	}
	klog.InfoS("Changed by command", "volume", id, "request", r.URL.Path)
	return m.Status(id)
}

func decode(r *http.Request, into any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: %w", errBadRequest, err)
	}
	return nil
}

// reply makes a handler of a function that returns what is to be sent.
func reply(fn func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := fn(r)
		code := http.StatusOK
		switch {
		case errors.Is(err, volume.ErrNotFound):
			code = http.StatusNotFound
		case errors.Is(err, errBadRequest):
			code = http.StatusBadRequest
		case err != nil:
			code = http.StatusInternalServerError
		}
		if err != nil {
			v = errorReply{err.Error()}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		if err := json.NewEncoder(w).Encode(v); err != nil {
			klog.ErrorS(err, "Reply to a command was not sent")
		}
	}
}
