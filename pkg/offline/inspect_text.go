package offline

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
)

// WriteText writes the inspection for a person to read.
func (s *Inspection) WriteText(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("file", "%s", s.File)
	row("size", "%s", size(uint64(s.FileBytes)))
	version := "version " + s.Version
	if s.Label != nil {
		version += fmt.Sprintf(", opened at label %d", *s.Label)
	}
	if s.ClusterOps > 0 {
		version += fmt.Sprintf(", op tables of %d slots", s.ClusterOps)
	}
	row("format", "%s, header of %d bytes, ops of up to %s", version, s.HeaderBytes, humanize.IBytes(uint64(s.MaxOpBytes)))
	row("identity", "%d bytes, CRC-32C of header and ops %s", s.FileBytes, s.CRC)
	row("ops", "%s", counts(s.Ops))
	row("blocks", "%s", counts(s.Blocks))
	row("compression", "%s", s.Compression)
	row("payload", "%s stored, %s unpacked", size(s.Payload.StoredBytes), size(s.Payload.UnpackedBytes))
	row("image", "writes %s, needs %s of target and %s of base", size(s.Image.WrittenBytes), size(s.Image.TargetBytes), size(s.Image.SourceBytes))
	row("labels", "%s", s.labels())
	if s.Sequence.Numbers > 0 {
		row("sequence", "fixes the merge order of %d ops", s.Sequence.Numbers)
	} else {
		row("sequence", "none")
	}
	row("merged", "%d of %d ops, %.1f %%", s.Merge.NumMergeOps, s.Merge.Ops, s.Merge.Percent)
	if c := s.Scratch; c == nil {
		row("scratch", "none")
	} else {
		row("scratch", "%s, room for %d blocks, %s", size(uint64(c.Bytes)), c.Capacity, c.content())
	}
	return t.Flush()
}

// shownLabels is how many labels are listed for a person.
const shownLabels = 8

func (s *Inspection) labels() string {
	if len(s.Labels) == 0 {
		return "none"
	}
	var last []string
	for _, l := range s.Labels[max(len(s.Labels)-shownLabels, 0):] {
		last = append(last, fmt.Sprint(l.Label))
	}
	text := strings.Join(last, ", ")
	if hidden := len(s.Labels) - len(last); hidden > 0 {
		text = fmt.Sprintf("%d, the last ones %s", len(s.Labels), text)
	}
	return text
}

func (c *ScratchState) content() string {
	switch {
	case c.Valid:
		return fmt.Sprintf("%s: holds the next window of %d blocks, which may be half written to the base", c.State, c.Blocks)
	case c.Blocks > 0:
		return fmt.Sprintf("%s: its %d blocks are merged", c.State, c.Blocks)
	}
	return c.State
}

func counts(by map[string]uint64) string {
	if len(by) == 0 {
		return "none"
	}
	var names []string
	sum := uint64(0)
	for name, n := range by {
		names = append(names, fmt.Sprintf("%d %s", n, name))
		sum += n
	}
	slices.SortFunc(names, func(a, b string) int {
		return strings.Compare(a[strings.IndexByte(a, ' '):], b[strings.IndexByte(b, ' '):])
	})
	return fmt.Sprintf("%d: %s", sum, strings.Join(names, ", "))
}

// size writes a number of bytes in both ways, exact and short.
func size(n uint64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%s (%d B)", humanize.IBytes(n), n)
}
