package admin

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/dustin/go-humanize"

	"github.com/snapmerge/snapmerge/pkg/progress"
	"github.com/snapmerge/snapmerge/pkg/volume"
)

// WriteTable writes the status of volumes for a person to read.
func WriteTable(w io.Writer, all []volume.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VOLUME\tSTATE\tPERCENT\tRATE\tETA\tLAYERS\tLOG\tTRANSPORT\tDEVICE\tERROR")
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%s\t%.1f\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.State, s.Percent, rate(s), eta(s), s.Layers,
			humanize.IBytes(uint64(s.LogBytes)), orDash(s.Transport), orDash(s.Device), orDash(s.Error))
	}
	return t.Flush()
}

// writeLine writes the status of one volume in a line.
func writeLine(w io.Writer, s volume.Status) error {
	_, err := fmt.Fprintf(w, "%s: %s, %.1f %%, %s, ETA %s, %d layers, log %s, %s %s, %s\n", s.ID, s.State, s.Percent, rate(s), eta(s), s.Layers,
		humanize.IBytes(uint64(s.LogBytes)), orDash(s.Transport), orDash(s.Device), orDash(s.Error))
	return err
}

func rate(s volume.Status) string {
	r := fmt.Sprintf("%.1f MiB/s", s.RateMiB)
	if s.Yielding {
		r += " (yields)"
	}
	return r
}

func eta(s volume.Status) string {
	switch {
	case s.BytesDone == s.BytesTotal:
		return "-"
	case s.ETASeconds < 0:
		return "unknown"
	}
	return progress.ETA(s.ETASeconds)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
