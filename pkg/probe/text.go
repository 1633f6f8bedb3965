package probe

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// WriteText writes the report for a person to read.
func (r Report) WriteText(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(what string, a Answer, more string) {
		verdict := "no"
		if a.OK {
			verdict = "yes"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", what, verdict, strings.TrimSpace(a.Why+" "+more))
	}
	fmt.Fprintf(t, "kernel\t%s\t\n", r.Kernel)
	for _, name := range slices.Sorted(maps.Keys(r.Transports)) {
		tr := r.Transports[name]
		row("transport "+name, tr.Answer, "")
		if s := tr.SurvivesRestart; s != nil {
			row("  "+survival(name), *s, "")
		}
		if p := tr.Passthrough; p != nil {
			row("  passthrough to the base", *p, "")
		}
	}
	row("io_uring", r.URing.Answer, missing(r.URing.Opcodes))
	row("reflink", r.Reflink, "")
	row("device-mapper", r.DeviceMapper, "")
	row("hand-over to the base", r.HandOver, "")
	row("loop devices", r.Loop.Answer, fmt.Sprintf("%d can be made", r.Loop.Free))
	row("CAP_SYS_RESOURCE", r.SysResource, "")
	return t.Flush()
}

// survival says what devices of a transport survive a restart with.
func survival(name string) string {
	if name == "ublk" || name == "nbd" {
		return "survives a restart"
	}
	return "survives a restart (with a keeper)"
}

// missing names the opcodes that are not there.
func missing(opcodes map[string]bool) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(opcodes)) {
		if !opcodes[name] {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return "without " + strings.Join(names, ", ")
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
