package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
)

// forget loses a node, and has snapmerge forget it. What is left of the node does not
// go by itself, since nobody else deletes its volumes and snapshots.
func (e *env) forget() {
	e.apply("lost.yaml")
	e.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", "--timeout=1m", "persistentvolumeclaim/lost")
	const finalizer = "jsonpath={.metadata.finalizers}"
	e.until(time.Minute, "the content is bound", func() (bool, string) {
		out := e.kubectl("get", "volumesnapshotcontent", "lost", "--output", finalizer)
		return strings.Contains(out, "bound-protection"), out
	})
	program := filepath.Join(e.TempDir(), "snapmerge")
	_, err := binary.Output(e.Context(), repo, "go", "build", "-o", program, "./cmd/snapmerge")
	e.check(err)
	run := func(args ...string) string {
		out, err := e.c.Output(e.Context(), program, append([]string{"forget", "lost"}, args...)...)
		e.check(err)
		e.Logf("snapmerge forget lost %s\n%s", args, out)
		return out
	}
	if out := run("--yes"); strings.Count(out, "keep") != 2 {
		e.Error("what is used is not kept")
	}
	e.kubectl("delete", "--wait=false", "persistentvolumeclaim/lost", "volumesnapshot/lost")
	e.until(time.Minute, "the volume is released", func() (bool, string) {
		out := e.kubectl("get", "persistentvolume", "lost", "--output", "jsonpath={.status.phase}")
		return out == "Released", out
	})
	if out := run(); strings.Contains(out, "keep") {
		e.Error("what is not used any more is kept")
	}
	run("--yes")
	for _, what := range []string{"persistentvolume", "volumesnapshotcontent", "volumesnapshot", "persistentvolumeclaim"} {
		e.until(30*time.Second, "no "+what, func() (bool, string) {
			out, err := e.c.Output(e.Context(), "kubectl", "get", what, "lost", "--ignore-not-found", "--output=name")
			return err == nil && out == "", fmt.Sprint(out, err)
		})
	}
	if _, err := e.c.Output(e.Context(), program, "forget", cluster.Node); err == nil || !strings.Contains(err.Error(), "exists") {
		e.Errorf("a node that lives is forgotten: %v", err)
	}
}
