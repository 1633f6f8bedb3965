package keeper

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// Run has the keeper call the task with duplicates of the descriptors, at most
// 8, and reads its result. args and result are what json.Marshal makes a JSON
// object of. It is not tried again if the keeper dies; the task may have been
// done then or not, as after the end of ctx, which does not stop the task.
func (c *Client) Run(ctx context.Context, task string, args, result any, fds ...int) error {
	if err := c.runTask(ctx, task, args, result, fds); err != nil {
		return fmt.Errorf("keeper: run %s: %w", task, err)
	}
	return nil
}

func (c *Client) runTask(ctx context.Context, task string, args, result any, fds []int) error {
	raw, err := marshal(args)
	if err != nil {
		return err
	}
	req := request{Version: protocolVersion, Op: opRun, Key: task, Meta: raw}
	if err := req.checkFields(); err != nil {
		return err
	}
	conn, err := c.dialAnother(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := ask(ctx, conn, req, fds...)
	if err == nil {
		err = resp.err()
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(resp.Meta, result)
}

// dialAnother makes a connection for one thing that may take its time.
func (c *Client) dialAnother(ctx context.Context) (*net.UnixConn, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return dial(ctx, c.path)
}

// ask sends one request and waits for the answer until ctx ends.
func ask(ctx context.Context, conn *net.UnixConn, req request, fds ...int) (response, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	if err := send(conn, req, fds); err != nil {
		return response{}, err
	}
	msg, got, err := receive(conn)
	if err != nil {
		return response{}, err
	}
	closeAll(got)
	return parseResponse(msg)
}
