package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/snapmerge/snapmerge/pkg/admin"
	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// choice is a flag that takes one of some words.
type choice struct {
	value *string
	of    []string
}

func (c *choice) String() string { return *c.value }
func (c *choice) Type() string   { return strings.Join(c.of, "|") }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.of, s) {
		return fmt.Errorf("want %s", strings.Join(c.of, ", "))
	}
	*c.value = s
	return nil
}

// bytesFlag is a size in bytes with an optional suffix.
type bytesFlag struct{ value *int64 }

func (f bytesFlag) Type() string { return "SIZE" }

// String is empty for 0, which stands for a default that the flag's help names.
func (f bytesFlag) String() string {
	if *f.value == 0 {
		return ""
	}
	return humanize.IBytes(uint64(*f.value))
}

func (f bytesFlag) Set(s string) error {
	n, err := parseBytes(s)
	if err == nil {
		*f.value = n
	}
	return err
}

// parseBytes reads a size such as 4096, 64KiB or 1.5GiB.
func parseBytes(s string) (int64, error) {
	// The library reads commas over, wherever they stand.
	n, err := humanize.ParseBytes(s)
	if err != nil || strings.Contains(s, ",") || n > math.MaxInt64 {
		return 0, fmt.Errorf("%q is not a size such as 4096, 64KiB, 16MiB or 1GiB", s)
	}
	return int64(n), nil
}

// maxRate is the highest rate that can be asked for, in MiB/s.
const maxRate = admin.MaxRate

// rateFlag is a rate in MiB/s.
type rateFlag struct{ value *int }

func (f rateFlag) String() string { return strconv.Itoa(*f.value) }
func (f rateFlag) Type() string   { return "MIB/S" }

func (f rateFlag) Set(s string) error {
	n, err := parseRate(s)
	if err == nil {
		*f.value = n
	}
	return err
}

func parseRate(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > maxRate {
		return 0, fmt.Errorf("%q is not a rate: a whole number of MiB/s from 0 (no limit) to %d", s, maxRate)
	}
	return n, nil
}

// labelFlag is a label, which may be absent.
type labelFlag struct{ value **uint64 }

func (f labelFlag) Type() string { return "N" }

func (f labelFlag) String() string {
	if *f.value == nil {
		return ""
	}
	return strconv.FormatUint(**f.value, 10)
}

func (f labelFlag) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not a label: a number of up to 64 bits", s)
	}
	*f.value = &n
	return nil
}

func addLabel(c *cobra.Command, label **uint64) {
	c.Flags().Var(labelFlag{label}, "label", "open a COW whose writing was cut off at this label (default: it must be finished)")
}

func addJSON(c *cobra.Command, json *bool) {
	c.Flags().BoolVar(json, "json", false, "write JSON to stdout, and nothing else")
}

func addQuiet(c *cobra.Command, quiet *bool) {
	c.Flags().BoolVarP(quiet, "quiet", "q", false, "show no progress")
}

// addIO adds the choice of the I/O back end.
func addIO(c *cobra.Command, kind *string) {
	*kind = string(blockio.Auto)
	c.Flags().Var(&choice{kind, []string{string(blockio.URing), string(blockio.Sync), string(blockio.Auto)}}, "io",
		"back end for I/O on the base: uring (io_uring), sync (pread and pwrite), or auto (uring where a probe finds it working)")
}

func required(c *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := c.MarkFlagRequired(name); err != nil {
			panic(err) // there is no such flag
		}
	}
}
