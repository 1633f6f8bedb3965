package driver

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// operationLimit ends operations on a volume that nothing else has ended.
const operationLimit = 15 * time.Minute

// operations sees to it that what is done to one volume, or one snapshot, is done
// one after the other. The zero value is ready.
type operations struct {
	mu   sync.Mutex
	busy map[string]string // what is being done, by key
	wg   sync.WaitGroup
}

// do runs fn, alone for all the keys, and waits for it as long as ctx allows. fn
// goes on when ctx has ended, with a context of its own, and keeps the keys until
// it returns. If another operation has one of them: errAborted.
//
// What fn writes to variables of its caller may be read if do returns nil.
func (o *operations) do(ctx context.Context, what string, fn func(ctx context.Context) error, keys ...string) error {
	if err := o.begin(what, keys); err != nil {
		return err
	}
	done := make(chan error, 1)
	o.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), operationLimit)
		defer cancel()
		err := guard(what, func() error { return fn(ctx) })
		o.end(keys) // before the caller can ask for the next
		done <- err
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s goes on without its caller: %w", what, ctx.Err())
	}
}

func (o *operations) begin(what string, keys []string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, key := range keys {
		if now := o.busy[key]; now != "" {
			return fmt.Errorf("%s: %w: %s", key, errAborted, now)
		}
	}
	if o.busy == nil {
		o.busy = map[string]string{}
	}
	for _, key := range keys {
		o.busy[key] = what
	}
	return nil
}

func (o *operations) end(keys []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, key := range keys {
		delete(o.busy, key)
	}
}

// keyOf and keyOfSnapshot are the keys of operations.
func keyOf(volume string) string           { return "volume " + volume }
func keyOfSnapshot(snapshot string) string { return "snapshot " + snapshot }

// wait waits for all operations, for at most d.
func (o *operations) wait(d time.Duration) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.wg.Wait()
	}()
	select {
	case <-done:
		return true
	case <-time.After(d):
		return false
	}
}

// guard turns a panic of fn into an error, so that one request cannot end the
// process that serves all volumes.
func guard(what string, fn func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			klog.ErrorS(nil, "Panic", "in", what, "panic", r, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic in %s: %v", what, r)
		}
	}()
	return fn()
}
