package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/snapmerge/snapmerge/pkg/volume"
)

// WatchOptions say how to show what changes.
type WatchOptions struct {
	// Terminal draws the table again and again; otherwise a line is written for
	// each volume that has changed, with JSON one object.
	Terminal, JSON bool
	// Tick says when to look again.
	Tick <-chan time.Time
}

// Watch shows what fetch returns until ctx ends, which is no error, nor is a
// plugin that cannot be reached for a time.
func Watch(ctx context.Context, fetch func(context.Context) ([]volume.Status, error), w io.Writer, o WatchOptions) error {
	p := watch{w: w, o: o, last: map[string]volume.Status{}}
	all, err := fetch(ctx)
	if err != nil {
		return err
	}
	for {
		if err := p.show(all, err); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-o.Tick:
		}
		all, err = fetch(ctx)
		if ctx.Err() != nil {
			return nil
		}
	}
}

type watch struct {
	w    io.Writer
	o    WatchOptions
	last map[string]volume.Status // as shown, by id
	down bool                     // the plugin could not be reached
}

const clearScreen = "\x1b[H\x1b[2J"

func (p *watch) show(all []volume.Status, fetchErr error) error {
	if p.o.Terminal && !p.o.JSON {
		var screen bytes.Buffer
		screen.WriteString(clearScreen)
		if fetchErr != nil {
			fmt.Fprintln(&screen, fetchErr)
		} else if err := WriteTable(&screen, all); err != nil {
			return err
		}
		_, err := p.w.Write(screen.Bytes())
		return err
	}
	if fetchErr != nil {
		if p.down || p.o.JSON {
			return nil
		}
		p.down = true
		_, err := fmt.Fprintln(p.w, fetchErr)
		return err
	}
	p.down = false
	return p.changes(all)
}

// changes writes what is not as it was shown last.
func (p *watch) changes(all []volume.Status) error {
	now := map[string]volume.Status{}
	for _, s := range all {
		now[s.ID] = s
		if was, ok := p.last[s.ID]; ok && was == s {
			continue
		}
		if err := p.write(s); err != nil {
			return err
		}
	}
	for id := range p.last {
		if _, ok := now[id]; ok || p.o.JSON {
			continue
		}
		if _, err := fmt.Fprintf(p.w, "%s: gone\n", id); err != nil {
			return err
		}
	}
	p.last = now
	return nil
}

func (p *watch) write(s volume.Status) error {
	if p.o.JSON {
		return json.NewEncoder(p.w).Encode(s)
	}
	return writeLine(p.w, s)
}
