package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/test/e2e/internal/rig"
)

const (
	conformanceEnv = "SNAPMERGE_CONFORMANCE"
	// focusEnv is a regular expression: only tests that it matches are run.
	focusEnv       = "FOCUS"
	conformanceDoc = repo + "/docs/conformance.md"
)

// omission are tests that are not run although the driver declares what they test:
// a regular expression, and why.
type omission struct{ tests, why string }

var omissions = []omission{
	{`\[Disruptive\]`, "stops and starts the kubelet by SSH"},
	{`any volume data source`, "tests a volume populator, of which the driver sees nothing, and needs its images"},
	{`should support volume limits`, "fills the node up to its limit of volumes"},
	{`Pre-provisioned Snapshot`, "makes contents by hand that do not name their node, so that no node's snapshotter takes them"},
}

// noResource are the tests that grow an ext4 whose mount the kubelet has already
// asked for: it expands after staging, also when a pod comes back.
const noResource = `(Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand (Verify|should resize)|` +
	`Generic Ephemeral-volume \(default fs\) \([a-z-]*\)\] ephemeral should support expansion)`

// TestConformance runs Kubernetes' suite of tests for storage drivers, as far as
// test/e2e/conformance/driver.yaml says that it applies. No test may fail; what is
// skipped, docs/conformance.md has to have the reason of.
func TestConformance(t *testing.T) {
	mode := os.Getenv(conformanceEnv)
	if mode == "" {
		t.Skipf("%s is not set; see make test-conformance", conformanceEnv)
	}
	e := newEnv(t, "1.36", rig.Plain)
	suite, err := rig.LoadSuite(e.Context(), e.c, repo)
	e.check(err)
	e.reportFaster()
	out := slices.Clone(omissions)
	if !mayGrow(t) {
		out = append(out, omission{noResource, "growing a mounted ext4 needs CAP_SYS_RESOURCE, which this machine lacks"})
	}
	r := e.runSuite(suite, os.Getenv(focusEnv), out)
	table := r.table(out)
	e.Logf("%d passed in %s\n%s", r.count("passed"), time.Duration(r.RunTime).Round(time.Second), table)
	for _, s := range r.SpecReports {
		if s.bad() {
			e.Errorf("%s: %s\n%s\n%s", s.State, s.name(), s.Failure.Message, tail(s.CapturedGinkgoWriterOutput, 4000))
		}
	}
	e.noteVolumes()
	e.noVolumes()
	e.deleteManifest()
	switch {
	case e.Failed() || os.Getenv(focusEnv) != "":
	case mode == "update":
		e.check(updateDoc(conformanceDoc, r, table))
	default:
		e.checkDoc(r)
	}
}

// reportFaster lets the provisioner report capacity more often than once a second.
// The suite has a storage class for each test, and after each volume that comes or
// goes there is something to be reported for every class.
func (e *env) reportFaster() {
	e.Helper()
	var patch []string
	for _, flag := range []string{"--kube-api-capacity-qps=100", "--kube-api-capacity-burst=200", "--capacity-threads=4"} {
		patch = append(patch, fmt.Sprintf(`{"op": "add", "path": "/spec/template/spec/containers/1/args/-", "value": %q}`, flag))
	}
	e.ours("patch", "daemonset", "snapmerge-node", "--type=json", "--patch=["+strings.Join(patch, ",")+"]")
	e.ours("rollout", "status", "--timeout=2m", "daemonset/snapmerge-node")
	if args := e.ours("get", "daemonset", "snapmerge-node", "--output", `jsonpath={.spec.template.spec.containers[?(@.name=="csi-provisioner")].args}`); !strings.Contains(args, "capacity-qps") {
		e.Fatalf("the second container is not the provisioner: %s", args)
	}
}

// mayGrow tells whether processes of this machine's root may grow a mounted ext4.
func mayGrow(t *testing.T) bool {
	t.Helper()
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		t.Fatal(err)
	}
	return d[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// specReport is the part of ginkgo's report of a test that is used here.
type specReport struct {
	ContainerHierarchyTexts    []string
	LeafNodeText, LeafNodeType string
	State                      string
	Failure                    struct{ Message string }
	CapturedGinkgoWriterOutput string
}

// suiteReport is that of the whole suite.
type suiteReport struct {
	SuiteSucceeded bool
	RunTime        int64 // ns
	SpecReports    []specReport
}

func (s specReport) name() string {
	return strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
}

// ours tells whether it is a test of storage drivers: the suite's packages bring
// others along.
func (s specReport) ours() bool {
	return s.LeafNodeType == "It" && strings.Contains(s.name(), "[Driver: csi.snapmerge.io]")
}

func (s specReport) bad() bool { return s.State != "passed" && s.State != "skipped" }

var suiteName = regexp.MustCompile(`\[Testpattern:[^\]]*\](?: \[[^\]]*\])* ([A-Za-z-]+)`)

// suite is the part of Kubernetes' suite that the test belongs to.
func (s specReport) suite() string {
	if m := suiteName.FindStringSubmatch(strings.Join(s.ContainerHierarchyTexts, " ")); m != nil {
		return m[1]
	}
	return s.name()
}

var (
	driverOf = regexp.MustCompile(`^[Dd]river "?csi\.snapmerge\.io"? `)
	ending   = regexp.MustCompile(`(,? ?-{1,2} ?|, )skipping$`)
)

// why is the reason why the test was skipped.
func (s specReport) why(out []omission) string {
	if s.Failure.Message == "" {
		for _, o := range out {
			if regexp.MustCompile(o.tests).MatchString(s.name()) {
				return o.why
			}
		}
	}
	return ending.ReplaceAllString(driverOf.ReplaceAllString(s.Failure.Message, "driver "), "")
}

// runSuite runs the tests that match focus ("": all), but for those left out.
func (e *env) runSuite(suite *rig.Suite, focus string, out []omission) suiteReport {
	e.Helper()
	var skip []string
	for _, o := range out {
		skip = append(skip, o.tests)
	}
	// The program has tests of other things, too.
	focus = `\[Driver: csi\.snapmerge\.io\].*(` + focus + ")"
	logs := filepath.Dir(e.c.Log("suite"))
	driver, err := filepath.Abs("conformance/driver.yaml")
	e.check(err)
	kubectl, err := e.c.Link("kubectl")
	e.check(err)
	cmd := suite.Command(e.Context(), e.c, []string{
		fmt.Sprintf("-procs=%d", max(4, 4*runtime.NumCPU())), "-timeout=60m", "-focus=" + focus, "-skip=" + strings.Join(skip, "|"),
		"-no-color", "-output-dir=" + logs, "-json-report=suite.json",
	}, []string{"-storage.testdriver=" + driver, "-num-nodes=1", "-kubectl-path=" + kubectl, "-e2e-output-dir=" + logs})
	f, err := os.Create(e.c.Log("suite"))
	e.check(err)
	defer f.Close()
	cmd.Stdout, cmd.Stderr, cmd.Dir = f, f, logs
	e.Logf("the suite's log is %s", f.Name())
	ran := cmd.Run()
	b, err := os.ReadFile(filepath.Join(logs, "suite.json"))
	if err != nil {
		e.Fatalf("no report: %v, %v", ran, err)
	}
	var all []suiteReport
	e.check(json.Unmarshal(b, &all))
	if len(all) != 1 || all[0].count("passed") == 0 {
		e.Fatalf("no test has passed (%v), see %s", ran, f.Name())
	}
	if ran != nil || !all[0].SuiteSucceeded {
		e.Errorf("the suite: %v, succeeded: %v", ran, all[0].SuiteSucceeded)
	}
	return all[0]
}

func (r suiteReport) count(state string) int {
	n := 0
	for _, s := range r.SpecReports {
		if s.ours() && s.State == state {
			n++
		}
	}
	return n
}

// table is what has been run and what has not, in Markdown.
func (r suiteReport) table(out []omission) string {
	passed, skipped, reasons := map[string]int{}, map[string]int{}, map[string]int{}
	suites := map[string]bool{}
	for _, s := range r.SpecReports {
		if !s.ours() {
			continue
		}
		suites[s.suite()] = true
		switch s.State {
		case "passed":
			passed[s.suite()]++
		case "skipped":
			if why := s.why(out); why != "" { // not among those in focus
				skipped[s.suite()]++
				reasons[why]++
			}
		}
	}
	var b bytes.Buffer
	fmt.Fprint(&b, "| part of the suite | passed | skipped |\n| --- | --: | --: |\n")
	for _, s := range slices.Sorted(maps.Keys(suites)) {
		fmt.Fprintf(&b, "| %s | %d | %d |\n", s, passed[s], skipped[s])
	}
	fmt.Fprint(&b, "\n| skipped | because |\n| --: | --- |\n")
	for _, why := range slices.Sorted(maps.Keys(reasons)) {
		fmt.Fprintf(&b, "| %d | %s |\n", reasons[why], strings.ReplaceAll(why, "\n", " "))
	}
	return b.String()
}

const docBegin, docEnd = "<!-- begin run -->\n", "<!-- end run -->"

// updateDoc writes the run into the documentation.
func updateDoc(file string, r suiteReport, table string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), docBegin)
	_, after, ok2 := strings.Cut(rest, docEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for the run", file)
	}
	text := fmt.Sprintf("%d tests passed, none failed, in %s.\n\n%s", r.count("passed"), time.Duration(r.RunTime).Round(time.Second), table)
	return os.WriteFile(file, []byte(before+docBegin+text+docEnd+after), 0o644)
}

// checkDoc makes sure that the reasons of all that was skipped are documented.
func (e *env) checkDoc(r suiteReport) {
	e.Helper()
	doc, err := os.ReadFile(conformanceDoc)
	e.check(err)
	for _, s := range r.SpecReports {
		if s.State == "skipped" && s.Failure.Message != "" && !strings.Contains(string(doc), s.why(nil)) {
			e.Errorf("%s does not say why %s is skipped: %s", conformanceDoc, s.name(), s.why(nil))
		}
	}
}

var made = regexp.MustCompile(`"Volume made" volume="([^"]+)"`)

// noteVolumes notes the volumes that the suite has made.
func (e *env) noteVolumes() {
	e.Helper()
	for _, m := range made.FindAllStringSubmatch(e.ours("logs", "daemonset/snapmerge-node", "--container=node"), -1) {
		e.volumes[m[1]] = true
	}
	e.Logf("%d volumes were made", len(e.volumes))
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }
