package main

import (
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/readahead"
)

// addReadAhead adds the flags of the read-ahead, with their defaults.
func addReadAhead(c *cobra.Command, mode *string, cfg *readahead.Config) {
	f := c.Flags()
	*mode = string(readahead.None)
	f.Var(&choice{mode, []string{string(readahead.None), string(readahead.Sync), string(readahead.Async)}}, "read-ahead",
		"how data that is still to be merged is read ahead for sequential readers: none, sync (by the reader itself), or async (in the background); a volume may have a mode of its own")
	addReadAheadSizes(c, cfg)
}

// addReadAheadSizes adds those of them that are sizes.
func addReadAheadSizes(c *cobra.Command, cfg *readahead.Config) {
	f := c.Flags()
	cfg.Memory, cfg.Window, cfg.Batch = readahead.DefaultMemory, readahead.DefaultWindow, readahead.DefaultBatch
	f.Var(aheadFlag{&cfg.Memory}, "read-ahead-memory", "most memory for what is read ahead")
	f.Var(aheadFlag{&cfg.Window}, "read-ahead-window", "how much is read ahead at a time with async")
	f.Var(aheadFlag{&cfg.MaxWindow}, "read-ahead-max-window", "lets the window grow and shrink with success, up to this (default: it is fixed)")
	f.Var(aheadFlag{&cfg.Batch}, "read-ahead-batch", "how much is read ahead at a time with sync")
}

// aheadFlag is a size of the read-ahead: whole chunks, and not more than a machine
// may have.
type aheadFlag struct{ value *int64 }

const maxAhead = 1 << 40

func (f aheadFlag) Type() string { return "SIZE" }

func (f aheadFlag) String() string {
	if *f.value == 0 {
		return ""
	}
	return humanize.IBytes(uint64(*f.value))
}

func (f aheadFlag) Set(s string) error {
	n, err := parseBytes(s)
	if err == nil && (n < readahead.ChunkBytes || n%readahead.ChunkBytes != 0 || n > maxAhead) {
		err = fmt.Errorf("want a multiple of %s, 1 TiB at most", humanize.IBytes(readahead.ChunkBytes))
	}
	if err == nil {
		*f.value = n
	}
	return err
}
