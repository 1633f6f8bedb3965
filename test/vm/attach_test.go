package vm

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/snapmerge/snapmerge/pkg/cow"
	"github.com/snapmerge/snapmerge/test/cowgen"
)

// attachJob attaches by the transport $T, kills the process, and attaches again: the
// device must be the same one, and its content right all the time.
const attachJob = `
mount /dev/vda /mnt && cd /mnt || exit 99
/snapmerge probe
/snapmerge probe --json | grep -q "\"$T\":{\"ok\":true" || exit 1
attach() { /snapmerge attach --base base.img --cow snapshot.cow --state state --transport $T --rate 1 >/tmp/device 2>/tmp/messages & pid=$!; }
path() {
	while [ ! -s /tmp/device ]; do
		kill -0 $pid || { cat /tmp/messages; exit 2; }
		sleep 0.1
	done
	cat /tmp/device
}
attach
first=$(path)
cmp $first want.img || exit 3
kill -9 $pid
wait $pid
cmp $first want.img & # waits for a server
reader=$!
rm /tmp/device
attach
[ "$(path)" = "$first" ] || exit 4
wait $reader || exit 5
until grep -q "^merged" /tmp/messages; do kill -0 $pid || exit 6; sleep 0.2; done
cmp $first want.img || exit 7
kill -INT $pid
wait $pid || exit 8
cmp base.img want.img || exit 9
[ $T = nbd ] || [ ! -e $first ] || exit 10 # NBD devices stay, unconnected
cd / && umount /mnt
`

func TestAttachUblk(t *testing.T) { attachAgain(t, "ublk") }
func TestAttachNbd(t *testing.T)  { attachAgain(t, "nbd") }

func attachAgain(t *testing.T, transport string) {
	needVM(t)
	im, err := cowgen.Make(rand.New(rand.NewPCG(seedOf(t), 1)), cowgen.Spec{Blocks: 2048, Copies: 700, Xors: 100, Replaces: 500, Zeros: 100, Compression: cow.LZ4})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, data := range map[string][]byte{"base.img": im.Base, "snapshot.cow": im.COW, "want.img": im.Want} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m := boot(t, Config{
		Console: console{t}, Job: "T=" + transport + attachJob, Disks: []*Disk{ext4(t, 128<<20, dir)},
		Files: map[string][]byte{"/snapmerge": build(t, modulePath+"cmd/snapmerge", false)},
	})
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if exit, err := m.Wait(ctx); exit != 0 || err != nil {
		t.Errorf("exit code %d, %v", exit, err)
	}
}
