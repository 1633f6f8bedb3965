package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// command runs the snapmerge program and returns what it prints.
func (d *demo) command(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, d.Binary, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("snapmerge %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}

// status is what `snapmerge status --json` says of the restored volume.
type status struct {
	State   string  `json:"state"`
	Percent float64 `json:"percent"`
	Layers  int     `json:"layers"`
	Error   string  `json:"error"`
}

func (d *demo) status(ctx context.Context) (s status, err error) {
	out, err := d.command(ctx, "status", d.restored, "--socket", d.path("admin.sock"), "--json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(out, &s)
}
