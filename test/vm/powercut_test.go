package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// count is how often to cut the power, a transport: COUNT, or 3.
func count(t *testing.T) int {
	s := os.Getenv("COUNT")
	if s == "" {
		return 3
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("COUNT=%s: want a number", s)
	}
	return n
}

// seedOf is SEED, or a new one. It is printed; the moments of cuts in the guest
// do not repeat, what disks make of their caches then does.
func seedOf(t *testing.T) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SEED=%d", seed)
	return seed
}

func TestPowerCutFuse(t *testing.T) { powerCuts(t, "fuse") }
func TestPowerCutUblk(t *testing.T) { powerCuts(t, "ublk") }
func TestPowerCutNbd(t *testing.T)  { powerCuts(t, "nbd") }

func TestPowerCutDmUser(t *testing.T) {
	needDmUser(t)
	powerCuts(t, "dm-user")
}

// needDmUser skips without a module of dm-user.
func needDmUser(t *testing.T) {
	if !strings.Contains(os.Getenv("KERNEL_MODULES"), "dm-user") {
		t.Skip("needs dm-user, which the kernel lacks: `make test-vm KERNEL_MODULES=.../dm-user.ko`")
	}
}

// epoch is that of cutload.
type epoch struct {
	Seed    uint64
	Settled bool
	Acked   int
}

// cutsPerLife is after how many cuts a volume is merged to the end and the next
// one begun.
const cutsPerLife = 6

// cutsPerCrash is after how many cuts the kernel crashes; there is at least one crash in
// each life.
const cutsPerCrash = 6

// powerCuts cuts the power under a volume that is being merged and written, or has the
// guest's kernel crash, boots again, and checks that nothing flushed is lost; at last
// the merge must end with the expected image. See cutload.
func powerCuts(t *testing.T, transport string) {
	needVM(t)
	c := &cutter{t: t, transport: transport, program: build(t, modulePath+"test/vm/cutload", false), rng: rand.New(rand.NewPCG(seedOf(t), 0))}
	for left := count(t); left > 0 && !t.Failed(); left -= cutsPerLife {
		c.life(min(left, cutsPerLife))
	}
	t.Logf("%s: %d cuts, %d before the volume was checked, and %d crashes of the kernel; %d operations flushed; writes in the disk's cache at the cuts: %d dropped, %d kept, %d torn; boot at most %.1f s",
		transport, c.cuts, c.early, c.crashes, c.acked, c.loss.Dropped, c.loss.Kept, c.loss.Torn, c.boot.Seconds())
}

// cutter cuts.
type cutter struct {
	t         *testing.T
	transport string
	program   []byte
	rng       *rand.Rand

	cuts, early, crashes, acked int

	loss   Loss
	boot   time.Duration
	epochs []epoch // of the volume that lives
}

// life is that of one volume.
func (c *cutter) life(cuts int) {
	const blocks = 8192
	im, err := cowgen.Make(c.rng, cowgen.Spec{Blocks: blocks, Copies: 4000, Xors: 1000, Replaces: 1600, Zeros: 400, Compression: cow.LZ4})
	if err != nil {
		c.t.Fatal(err)
	}
	dir := c.t.TempDir()
	for name, data := range map[string][]byte{"base.img": im.Base, "snapshot.cow": im.COW, "want.img": im.Want} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	d := ext4(c.t, 256<<20, dir)
	c.epochs = nil
	for i := range cuts {
		c.cut(d)
		if i%cutsPerCrash == min(cuts, cutsPerCrash)-1 && !c.t.Failed() {
			c.crash(d)
		}
		if c.t.Failed() {
			return
		}
	}
	c.finish(d)
}

// start boots the guest for an epoch of its own.
func (c *cutter) start(d *Disk, what string) *Machine {
	c.epochs = append(c.epochs, epoch{Seed: c.rng.Uint64()})
	b, err := json.Marshal(c.epochs)
	if err != nil {
		c.t.Fatal(err)
	}
	small, err := smallImage()
	if err != nil {
		c.t.Fatal(err)
	}
	return boot(c.t, Config{
		Initramfs: small, Disks: []*Disk{d},
		Files: map[string][]byte{"/cutload": c.program, "/epochs": b},
		Job:   fmt.Sprintf("mount /dev/vda /mnt || exit 99\n/cutload /mnt %s /epochs %s\ncode=$?\numount /mnt\nexit $code\n", c.transport, what),
	})
}

// limit is how long a machine may take for anything, without KVM and on a busy
// host.
const limit = 4 * time.Minute

// cut boots, lets the guest work, and cuts the power.
func (c *cutter) cut(d *Disk) {
	// Some cuts come while the guest mounts, recovers and checks.
	early := c.cuts > 0 && c.rng.IntN(4) == 0
	m := c.start(d, "write")
	e := &c.epochs[len(c.epochs)-1]
	if early {
		d.CutAfter(1 + c.rng.IntN(600))
	}
	off := d.cut
	timeout := time.After(limit)
	heard := said{epoch: e}
	for alive := true; alive; {
		select {
		case line, ok := <-m.Lines():
			if !ok {
				exit, err := m.Wait(context.Background())
				c.t.Errorf("the guest ended, exit code %d, %v\n%s", exit, err, m.Console())
				return
			}
			if c.hear(line, &heard); line == settled && !early {
				d.CutAfter(1 + c.rng.IntN(3000))
			}
		case <-off:
			alive = false
		case <-timeout:
			m.Kill()
			c.t.Errorf("the power was never cut: the guest hangs\n%s", m.Console())
			return
		}
	}
	m.Kill()
	// What it said before the cut.
	for line := range m.Lines() {
		c.hear(line, &heard)
	}
	loss := d.Restart(c.rng)
	c.cuts++
	if !e.Settled {
		c.early++
	}
	c.acked += e.Acked
	c.loss.Dropped += loss.Dropped
	c.loss.Kept += loss.Kept
	c.loss.Torn += loss.Torn
	c.boot = max(c.boot, m.BootTime())
	c.t.Logf("cut %d: merged to %s %% at the start, settled %v, %d operations flushed; cache: %+v", c.cuts, heard.percent, e.Settled, e.Acked, loss)
}

// crash boots, and lets the guest work until its kernel crashes or resets the machine.
// The disk stays on: all that it was given stays, and the guest's page cache is gone.
func (c *cutter) crash(d *Disk) {
	key := []string{"c", "b"}[c.rng.IntN(2)]
	m := c.start(d, fmt.Sprintf("write %s %d", key, 1+c.rng.IntN(2500)))
	e := &c.epochs[len(c.epochs)-1]
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	exit, err := m.Wait(ctx)
	heard := said{epoch: e}
	for line := range m.Lines() {
		c.hear(line, &heard)
	}
	if !errors.Is(err, ErrNoExit) || strings.Contains(m.Console(), "sysrq triggered crash") != (key == "c") || !e.Settled {
		c.t.Errorf("the kernel did not crash by sysrq %s: exit code %d, %v\n%s", key, exit, err, m.Console())
		return
	}
	kept := d.Settle()
	c.crashes++
	c.acked += e.Acked
	c.boot = max(c.boot, m.BootTime())
	c.t.Logf("crash %d by sysrq %s: merged to %s %% at the start, %d operations flushed; %d writes in the disk's cache are kept", c.crashes, key, heard.percent, e.Acked, kept)
}

// settled is what the guest says when it has checked its volume and begins to write.
const settled = "settled"

// said is what the guest of an epoch said.
type said struct {
	*epoch
	percent string // merged at the start
}

// hear takes a line from the guest.
func (c *cutter) hear(line string, s *said) {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "percent":
		s.percent = rest
	case settled:
		s.Settled = true
	case "acked":
		n, err := strconv.Atoi(rest)
		if err != nil {
			c.t.Errorf("the guest reports %q", line)
		}
		s.Acked = n
	}
}

// finish has the guest check and merge to the end.
func (c *cutter) finish(d *Disk) {
	m := c.start(d, "finish")
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	exit, err := m.Wait(ctx)
	merged := false
	for line := range m.Lines() {
		merged = merged || line == "merged"
	}
	if exit != 0 || err != nil || !merged {
		c.t.Errorf("the merge did not end well: exit code %d, %v\n%s", exit, err, m.Console())
	}
	c.boot = max(c.boot, m.BootTime())
}
