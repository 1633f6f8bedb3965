package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

var (
	// ErrNotFound says that the keeper has no such key.
	ErrNotFound = errors.New("keeper: no such key")
	// ErrBroken says that a freeze had ended before it was thawed in the
	// orderly way: what was done under it is no consistent cut.
	ErrBroken = errors.New("keeper: the file system was thawed early")
	// ErrClosed says that the client was closed.
	ErrClosed = errors.New("keeper: client is closed")
)

const (
	// callTimeout bounds every call that does not have an earlier deadline; a
	// keeper that restarts has that long to come back.
	callTimeout = 10 * time.Second
	// DefaultFreeze is the usual longest time a file system stays frozen.
	DefaultFreeze = 10 * time.Second

	redialMin = 10 * time.Millisecond
	redialMax = time.Second
)

// errLost says that the connection ended before the answer; calls are
// idempotent and go out again.
var errLost = errors.New("connection to the keeper lost")

// Client talks to a keeper. It may be used concurrently. When the keeper is
// restarted the client connects again and puts everything that it had put.
type Client struct {
	path   string
	calls  chan *call
	makeUp chan struct{} // has room for one: there are drops to be made up for
	done   chan struct{} // closed by Close
	ended  chan struct{} // closed when run has returned

	mu      sync.Mutex
	closed  bool
	held    map[string]entry    // what this client has put, with own duplicates
	dropped map[string]struct{} // drops that no keeper has confirmed yet
	err     error               // why there is no connection now
	lost    time.Time           // since when there is none
}

type call struct {
	ctx   context.Context
	req   request
	fds   []int
	reply chan answer // has room for the one answer
}

type answer struct {
	resp response
	fds  []int
	err  error
}

// Dial connects to the keeper at the socket path. It waits for one until ctx
// ends.
func Dial(ctx context.Context, path string) (*Client, error) {
	c := &Client{
		path:    path,
		calls:   make(chan *call),
		makeUp:  make(chan struct{}, 1),
		done:    make(chan struct{}),
		ended:   make(chan struct{}),
		held:    make(map[string]entry),
		dropped: make(map[string]struct{}),
	}
	conn, err := dial(ctx, path)
	if err != nil {
		return nil, err
	}
	go c.run(conn)
	return c, nil
}

// dial tries until ctx ends. The error is that of the last try which that did not
// cut short: it says what is wrong.
func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	var why error
	for wait := redialMin; ; wait = min(2*wait, redialMax) {
		conn, err := d.DialContext(ctx, network, path)
		if err == nil {
			return conn.(*net.UnixConn), nil
		}
		if why == nil || !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) {
			why = err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("keeper: %w", why)
		case <-time.After(wait):
		}
	}
}

// Put gives duplicates of the descriptors, 1 to 8, to the keeper under key, in
// place of what the key had. meta is marshalled to a JSON object of at most
// 8 KiB. After an error the keeper may have them or not; Drop makes sure.
func (c *Client) Put(ctx context.Context, key string, meta any, fds ...int) error {
	raw, err := marshal(meta)
	if err != nil {
		return fmt.Errorf("keeper: put %q: %w", key, err)
	}
	dups, err := dupAll(fds)
	if err != nil {
		return fmt.Errorf("keeper: put %q: %w", key, err)
	}
	req := request{Op: opPut, Key: key, Meta: raw}
	if _, err := c.do(ctx, req, dups); err != nil {
		closeAll(dups)
		return fmt.Errorf("keeper: put %q: %w", key, err)
	}
	return nil // run has taken dups
}

// Get fetches what the keeper has under key: ErrNotFound if nothing. The
// descriptors are the caller's. The client does not remember them; whoever
// goes on using them puts them again.
func (c *Client) Get(ctx context.Context, key string) (meta json.RawMessage, fds []int, err error) {
	a, err := c.do(ctx, request{Op: opGet, Key: key}, nil)
	if err != nil {
		return nil, nil, fmt.Errorf("keeper: get %q: %w", key, err)
	}
	return a.resp.Meta, a.fds, nil
}

// Holds tells whether there is anything under the key.
func (c *Client) Holds(ctx context.Context, key string) (bool, error) {
	_, fds, err := c.Get(ctx, key)
	CloseAll(fds)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// CloseAll closes what Get has given.
func CloseAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// List returns all keys in order.
func (c *Client) List(ctx context.Context) ([]string, error) {
	var keys []string
	for more := true; more; {
		req := request{Op: opList}
		if len(keys) > 0 {
			req.After = keys[len(keys)-1]
		}
		a, err := c.do(ctx, req, nil)
		if err != nil {
			return nil, fmt.Errorf("keeper: list: %w", err)
		}
		keys = append(keys, a.resp.Keys...)
		more = a.resp.More && len(a.resp.Keys) > 0
	}
	return keys, nil
}

// Drop makes keeper and client forget key; an absent one is no error. If the
// keeper does not answer in time the error says so, and the drop is made up for
// as soon as the keeper can be reached.
func (c *Client) Drop(ctx context.Context, key string) error {
	c.mu.Lock()
	if e, ok := c.held[key]; ok {
		closeAll(e.fds)
		delete(c.held, key)
	}
	c.dropped[key] = struct{}{}
	c.mu.Unlock()
	_, err := c.do(ctx, request{Op: opDrop, Key: key}, nil)
	if err != nil && !errors.Is(err, ErrNotFound) {
		select {
		case c.makeUp <- struct{}{}: // it may not have been sent, and the connection may live
		default:
		}
		return fmt.Errorf("keeper: drop %q: %w", key, err)
	}
	return nil
}

// Err is nil while there is a connection to a keeper, else why there is none.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Lost is since when there has been no connection to a keeper; zero while there is one.
func (c *Client) Lost() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost
}

// Close ends the connection. What was put stays with the keeper.
func (c *Client) Close() error {
	c.mu.Lock()
	first := !c.closed
	c.closed = true
	c.mu.Unlock()
	if first {
		close(c.done)
	}
	<-c.ended
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.held {
		closeAll(e.fds)
	}
	clear(c.held)
	return nil
}

// do carries out a call, over a new connection if need be.
func (c *Client) do(ctx context.Context, req request, fds []int) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req.Version = protocolVersion
	if err := req.checkFields(); err != nil {
		return answer{}, err // the keeper would only hang up
	}
	for {
		cl := &call{ctx: ctx, req: req, fds: fds, reply: make(chan answer, 1)}
		select {
		case c.calls <- cl:
		case <-ctx.Done():
			return answer{}, errors.Join(ctx.Err(), c.Err())
		case <-c.done:
			return answer{}, ErrClosed
		}
		a := <-cl.reply
		if a.err == nil {
			a.err = a.resp.err()
		}
		if !errors.Is(a.err, errLost) {
			return a, a.err
		}
	}
}

// err turns an answer's code into an error.
func (r *response) err() error {
	switch r.Code {
	case "":
		return nil
	case codeNotFound:
		return ErrNotFound
	case codeBroken:
		return ErrBroken
	default:
		return errors.New(r.Error)
	}
}

// run owns the connection: it makes the calls, one at a time, and connects
// again when the keeper went away.
func (c *Client) run(conn *net.UnixConn) {
	defer close(c.ended)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-c.done
		cancel()
	}()
	wait := redialMin
	for {
		begin := time.Now()
		in := make(chan answer)
		go readAnswers(conn, in)
		err := c.restore(conn, in)
		if err == nil {
			c.setErr(nil)
			err = c.serve(conn, in)
		}
		conn.Close()
		for a := range in {
			closeAll(a.fds)
		}
		if errors.Is(err, ErrClosed) {
			return
		}
		c.setErr(err)
		klog.ErrorS(err, "Lost the keeper, connecting again", "socket", c.path)
		if time.Since(begin) > redialMax {
			wait = redialMin
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait): // it may be one that hangs up at once
		}
		wait = min(2*wait, redialMax)
		if conn, err = dial(ctx, c.path); err != nil {
			return // closed
		}
	}
}

func (c *Client) setErr(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	switch {
	case err == nil:
		c.lost = time.Time{}
	case c.lost.IsZero():
		c.lost = time.Now()
	}
}

// readAnswers passes on what the keeper sends; after an error it closes in.
func readAnswers(conn *net.UnixConn, in chan<- answer) {
	defer close(in)
	for {
		msg, fds, err := receive(conn)
		a := answer{fds: fds, err: err}
		if err == nil {
			a.resp, a.err = parseResponse(msg)
		}
		in <- a
		if a.err != nil {
			return
		}
	}
}

// serve makes calls until the connection is of no use any more.
func (c *Client) serve(conn *net.UnixConn, in <-chan answer) error {
	for {
		select {
		case <-c.done:
			return ErrClosed
		case a := <-in:
			closeAll(a.fds)
			if a.err == nil {
				a.err = errors.New("answer that nobody asked for")
			}
			return fmt.Errorf("%w: %w", errLost, a.err)
		case <-c.makeUp:
			if err := c.dropAgain(conn, in); err != nil {
				return err
			}
		case cl := <-c.calls:
			if err := c.carryOut(conn, in, cl); err != nil {
				return err
			}
		}
	}
}

// carryOut makes a call. If its context ends first the caller gets his error at
// once, but the connection is not given up: a keeper that read an old message of
// ours after a newer one from the next connection would undo the newer.
func (c *Client) carryOut(conn *net.UnixConn, in <-chan answer, cl *call) error {
	released := false // the caller has gone, and has closed cl.fds
	a := c.exchange(conn, in, cl.req, cl.fds, cl.ctx.Done(), func() {
		released = true
		cl.reply <- answer{err: cl.ctx.Err()}
	})
	if a.err == nil && cl.req.Op == opDrop {
		c.settle(cl.req.Key)
	}
	if released {
		closeAll(a.fds)
		return a.err
	}
	if a.err == nil && a.resp.Code == "" {
		c.remember(cl)
	}
	cl.reply <- a
	return a.err
}

// exchange sends one request and waits for its answer for callTimeout; the
// connection must not be used any more if the answer's err is set. When early is
// ready before the answer is there, exchange calls release and goes on waiting.
func (c *Client) exchange(conn *net.UnixConn, in <-chan answer, req request, fds []int, early <-chan struct{}, release func()) answer {
	conn.SetWriteDeadline(time.Now().Add(callTimeout)) // fails only on a closed connection
	if err := send(conn, req, fds); err != nil {
		return answer{err: fmt.Errorf("%w: %w", errLost, err)}
	}
	timer := time.NewTimer(callTimeout)
	defer timer.Stop()
	for {
		select {
		case a := <-in:
			if a.err != nil {
				a.err = fmt.Errorf("%w: %w", errLost, a.err)
			}
			return a
		case <-early:
			release()
			early = nil
		case <-timer.C:
			return answer{err: errors.New("the keeper does not answer")}
		case <-c.done:
			return answer{err: ErrClosed}
		}
	}
}

// remember takes over the descriptors of a successful put.
func (c *Client) remember(cl *call) {
	if cl.req.Op != opPut {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	closeAll(c.held[cl.req.Key].fds)
	c.held[cl.req.Key] = entry{meta: cl.req.Meta, fds: cl.fds}
	delete(c.dropped, cl.req.Key)
}

// settle notes that the keeper knows of a drop.
func (c *Client) settle(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.dropped, key)
}

// restore brings a keeper that we have just connected to up to date.
func (c *Client) restore(conn *net.UnixConn, in <-chan answer) error {
	if err := c.dropAgain(conn, in); err != nil {
		return err
	}
	c.mu.Lock()
	held := slices.Collect(maps.Keys(c.held))
	c.mu.Unlock()
	for _, key := range held {
		if err := c.putAgain(conn, in, key); err != nil {
			return err
		}
	}
	if len(held) > 0 {
		klog.InfoS("Gave all descriptors to the keeper again", "entries", len(held))
	}
	return nil
}

// dropAgain makes up for drops that no keeper has confirmed.
func (c *Client) dropAgain(conn *net.UnixConn, in <-chan answer) error {
	c.mu.Lock()
	dropped := slices.Collect(maps.Keys(c.dropped))
	c.mu.Unlock()
	for _, key := range dropped {
		a := c.exchange(conn, in, request{Version: protocolVersion, Op: opDrop, Key: key}, nil, nil, nil)
		if a.err != nil {
			return a.err
		}
		c.settle(key)
	}
	return nil
}

func (c *Client) putAgain(conn *net.UnixConn, in <-chan answer, key string) error {
	c.mu.Lock()
	e, ok := c.held[key]
	if !ok { // dropped meanwhile
		c.mu.Unlock()
		return nil
	}
	fds, err := dupAll(e.fds)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	defer closeAll(fds)
	a := c.exchange(conn, in, request{Version: protocolVersion, Op: opPut, Key: key, Meta: e.meta}, fds, nil, nil)
	if a.err != nil {
		return a.err
	}
	if err := a.resp.err(); err != nil {
		klog.ErrorS(err, "The keeper did not take an entry", "key", key)
	}
	return nil
}
