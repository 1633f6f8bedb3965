package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// Client asks a node plugin.
type Client struct {
	socket string
	http   http.Client
}

// NewClient makes a client of the node plugin at the socket path.
func NewClient(socket string) *Client {
	return &Client{socket: socket, http: http.Client{
		Timeout: callTimeout,
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "unix", socket)
			},
		},
	}}
}

// List returns the status of all volumes, sorted by id.
func (c *Client) List(ctx context.Context) (all []volume.Status, err error) {
	return all, c.do(ctx, http.MethodGet, "/volumes", nil, &all)
}

// Get returns the status of a volume; one that is not there gives
// volume.ErrNotFound.
func (c *Client) Get(ctx context.Context, id string) (s volume.Status, err error) {
	return s, c.one(ctx, http.MethodGet, id, "", nil, &s)
}

// SetPaused pauses the background work of a volume or lets it go on, over
// restarts of the plugin too.
func (c *Client) SetPaused(ctx context.Context, id string, paused bool) (s volume.Status, err error) {
	return s, c.one(ctx, http.MethodPut, id, "/paused", pausedRequest{&paused}, &s)
}

// SetRate limits the background work of a volume to mib MiB/s; 0 is the node's
// default.
func (c *Client) SetRate(ctx context.Context, id string, mib int) (s volume.Status, err error) {
	return s, c.one(ctx, http.MethodPut, id, "/rate", rateRequest{&mib}, &s)
}

// one is do for one volume.
func (c *Client) one(ctx context.Context, method, id, what string, body, result any) error {
	if id == "" || id == "." || id == ".." { // no volume has such an id, and these would be another path
		return fmt.Errorf("%q: %w", id, volume.ErrNotFound)
	}
	return c.do(ctx, method, "/volumes/"+url.PathEscape(id)+what, body, result)
}

// do sends one request and reads the reply into the result.
func (c *Client) do(ctx context.Context, method, path string, body, result any) error {
	var b bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&b).Encode(body); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, &b)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("no node plugin answers at %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", c.socket, err)
	}
	if resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(raw, result); err != nil {
			return fmt.Errorf("%s: %w", c.socket, err)
		}
		return nil
	}
	var e errorReply
	if json.Unmarshal(raw, &e) != nil || e.Error == "" {
		e.Error = fmt.Sprintf("%s: %s", c.socket, resp.Status)
	}
	return &replyError{resp.StatusCode, e.Error}
}

// replyError is an error that the plugin has answered.
type replyError struct {
	code int
	text string
}

func (e *replyError) Error() string { return e.text }

func (e *replyError) Is(target error) bool {
	return target == volume.ErrNotFound && e.code == http.StatusNotFound
}
