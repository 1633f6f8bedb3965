package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/snapmerge/snapmerge/pkg/unixsocket"
)

// maxConns bounds the connections at a time; every frozen file system has one.
const maxConns = 256

// LockMemory locks the process's memory, each page from its first use on, so
// that thawing a file system never waits for a disk. It needs CAP_IPC_LOCK.
func LockMemory() error {
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}

type entry struct {
	meta json.RawMessage
	fds  []int
}

// maxThaw bounds how long the end of a connection, and so of the keeper, waits for
// the child to thaw; the child goes on without.
const maxThaw = 5 * time.Second

// Task is a function that clients can have a child of the keeper call. args is a
// JSON object; fds are closed afterwards. The result must be a JSON object, too.
type Task func(args json.RawMessage, fds []int) (result any, err error)

type server struct {
	tasks    map[string]Task
	children children

	mu      sync.Mutex
	entries map[string]entry
}

// Serve is a keeper at the socket path until ctx ends. It replaces the socket
// that a dead keeper left there; a living one makes it fail at once. The file
// path + ".lock" is what tells them apart; it stays. At the end all descriptors
// are closed and what is frozen is thawed. tasks may be nil. What may wait for a
// device is done by children of this process, so the program must begin with Child.
func Serve(ctx context.Context, path string, tasks map[string]Task) error {
	lock, err := lockSocket(path)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	defer lock.Close()
	l, err := unixsocket.Listen(ctx, network, path)
	if err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	s := &server{tasks: tasks, entries: make(map[string]entry)}
	defer s.closeEntries()
	klog.InfoS("Keeper is ready", "socket", path)

	var wg sync.WaitGroup
	defer wg.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	slots := make(chan struct{}, maxConns)
	for {
		conn, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			// Out of descriptors or memory: what is held must go on being held.
			klog.ErrorS(err, "Keeper cannot accept a connection")
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			klog.InfoS("Keeper refused a connection: too many", "limit", maxConns)
			conn.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			s.serveConn(ctx, conn)
		})
	}
}

// lockSocket makes sure that this is the only keeper at path.
func lockSocket(path string) (*os.File, error) {
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another keeper serves %s", path)
		}
		return nil, fmt.Errorf("flock %s.lock: %w", path, err)
	}
	return f, nil
}

// serveConn answers one client until it goes away or breaks a rule.
func (s *server) serveConn(ctx context.Context, conn *net.UnixConn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := checkPeer(conn); err != nil {
		klog.ErrorS(err, "Keeper refused a client")
		return
	}
	var frozen *child
	defer func() {
		if frozen != nil {
			wait, cancel := context.WithTimeout(context.Background(), maxThaw)
			defer cancel()
			frozen.end(wait)
		}
	}()
	for {
		msg, fds, err := receive(conn)
		if err != nil {
			if errors.Is(err, errMessage) {
				refuse(conn, err)
			} else if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				klog.ErrorS(err, "Keeper lost a client")
			}
			return
		}
		req, err := parseRequest(msg, len(fds))
		if err != nil {
			closeAll(fds)
			refuse(conn, err)
			return
		}
		if peerGone(conn) {
			// What it wanted may have been overtaken by what it wants now, on another
			// connection.
			closeAll(fds)
			return
		}
		var resp response
		var give []int
		switch req.Op {
		case opFreeze:
			if frozen != nil {
				closeAll(fds)
				refuse(conn, errors.New("freeze: this connection has a freeze already"))
				return
			}
			wait, stop := untilGone(ctx, conn)
			frozen, err = s.children.freeze(wait, *req, fds[0])
			stop()
			closeAll(fds)
			resp = failed(err)
		case opThaw:
			if frozen == nil {
				refuse(conn, errors.New("thaw: nothing is frozen by this connection"))
				return
			}
			wait, stop := untilGone(ctx, conn)
			resp, err = frozen.thaw(wait)
			stop()
			if err != nil {
				resp = failed(err)
			}
			if resp.Code != codeFailed {
				frozen = nil
			}
		case opRun:
			wait, stop := untilGone(ctx, conn)
			resp = s.run(wait, req, fds)
			stop()
		default:
			resp, give = s.handle(req, fds)
		}
		resp.Version = protocolVersion
		err = send(conn, resp, give)
		closeAll(give)
		if err != nil {
			klog.ErrorS(err, "Keeper cannot answer", "op", req.Op, "key", req.Key)
			return
		}
	}
}

// run has a child run a task. It owns fds.
func (s *server) run(ctx context.Context, req *request, fds []int) response {
	defer closeAll(fds)
	if s.tasks[req.Key] == nil {
		return response{Code: codeFailed, Error: "the keeper has no such task"}
	}
	resp, err := s.children.once(ctx, *req, fds...)
	if err != nil {
		return failed(err)
	}
	return resp
}

// handle carries out the operations on entries. It owns fds; the descriptors
// it returns are the caller's.
func (s *server) handle(req *request, fds []int) (response, []int) {
	s.mu.Lock()
	old, found := s.entries[req.Key]
	var resp response
	var give, gone []int
	switch req.Op {
	case opPut:
		if !found && len(s.entries) >= maxEntries {
			gone = fds
			resp = response{Code: codeFull, Error: fmt.Sprintf("put: the keeper is full with %d entries", maxEntries)}
			break
		}
		s.entries[req.Key] = entry{meta: req.Meta, fds: fds}
		gone = old.fds
	case opGet:
		if !found {
			resp = response{Code: codeNotFound, Error: "get: no such key"}
			break
		}
		dups, err := dupAll(old.fds)
		if err != nil {
			resp = failed(err)
			break
		}
		resp.Meta, give = old.meta, dups
	case opDrop:
		if !found {
			resp = response{Code: codeNotFound, Error: "drop: no such key"}
			break
		}
		delete(s.entries, req.Key)
		gone = old.fds
	case opList:
		resp.Keys, resp.More = s.listLocked(req.After)
	}
	s.mu.Unlock()
	// Closing may take down a file system; nobody else shall wait for that.
	closeAll(gone)
	return resp, give
}

// listLocked returns the first keys above after; mu must be held.
func (s *server) listLocked(after string) (keys []string, more bool) {
	var all []string
	for k := range s.entries {
		if k > after {
			all = append(all, k)
		}
	}
	slices.Sort(all)
	size := 0
	for i, k := range all {
		if size += len(k); size > listBudget {
			return all[:i], true
		}
	}
	return all, false
}

func (s *server) closeEntries() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries {
		closeAll(e.fds)
	}
	clear(s.entries)
}

// failed is the answer for an error of the system; success for nil.
func failed(err error) response {
	switch {
	case err == nil:
		return response{}
	case errors.Is(err, errNotFrozen):
		return response{Code: codeBroken, Error: err.Error()}
	default:
		return response{Code: codeFailed, Error: err.Error()}
	}
}

// refuse tells a client why it is being disconnected.
func refuse(conn *net.UnixConn, err error) {
	klog.ErrorS(err, "Keeper refused a message")
	resp := response{Version: protocolVersion, Code: codeBadRequest, Error: err.Error()}
	if err := send(conn, resp, nil); err != nil {
		klog.ErrorS(err, "Keeper cannot answer")
	}
}
