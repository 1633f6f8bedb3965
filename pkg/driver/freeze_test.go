package driver

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/snapmerge/snapmerge/pkg/blockio"
)

// hangWritesFS is a hangFS that flushes, so that a cut gets as far as the freeze.
type hangWritesFS struct{ *hangFS }

func (f hangWritesFS) Open(name string, flag blockio.Flag) (blockio.File, error) {
	file, err := f.hangFS.Open(name, flag)
	if h, ok := file.(*hangFile); ok {
		return hangWritesFile{h}, err
	}
	return file, err
}

type hangWritesFile struct{ *hangFile }

func (f hangWritesFile) Flush() error { return f.hangFile.File.Flush() }

// TestSnapshotOfHungDevice: who wants a snapshot of a hung device is told so, and
// holds up nobody. The device stays as long as a pod uses it.
func TestSnapshotOfHungDevice(t *testing.T) {
	for _, with := range []string{"keeper", "no keeper"} {
		t.Run(with, func(t *testing.T) {
			needDevices(t, "mkfs.ext4")
			slow := &hangFS{FS: blockio.OS()}
			n := makeNode(t, nil)
			if with == "keeper" {
				n.cfg.KeeperSocket = filepath.Join(n.dir, "keeper.sock")
				helper(t, "keeper", n.cfg.KeeperSocket)
			}
			n.start(func(p *plugin) { p.fs = hangWritesFS{slow} })
			t.Cleanup(slow.end) // before the node's
			c := mountCap(writer, ext4)
			id := n.create("v", 64*mib, "", c)
			target := n.use(id, c)
			dev := n.p.volumes.Device(id)
			sh(t, "echo kept >"+target+"/kept; sync -f "+target)
			sh(t, "head -c 8M /dev/urandom >"+target+"/dirty")
			const limit = 2 * time.Second
			n.hangsAfter(limit)
			slow.start()
			for range 2 { // the second waits for the freeze of the first
				start := time.Now()
				_, err := n.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
				wantCode(t, err, codes.Unavailable, errHangs.Error())
				if took := time.Since(start); took > limit+slack {
					t.Errorf("the snapshot took %v", took)
				}
			}
			if n.p.volumes.Device(id) != dev {
				t.Error("the device was taken away though a pod uses it")
			}
			start := time.Now()
			n.unpublish(id, "pod")
			if took := time.Since(start); took > slack {
				t.Errorf("unpublishing took %v", took)
			}
			for end := time.Now().Add(patience); ; time.Sleep(hangPoll) { // as kubelet asks again
				_, err := n.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: n.stagingPath(id)})
				if err == nil {
					break
				}
				if time.Now().After(end) {
					t.Fatalf("cannot be unstaged: %v", err)
				}
			}
			slow.end()
			n.hangsAfter(hangLimit)
			if got := sh(t, "cat "+n.use(id, c)+"/kept"); got != "kept\n" {
				t.Errorf("the file has %q", got)
			}
			n.snapshot("s", id)
			n.leave(id)
		})
	}
}

// TestHungOnce: a device that hung while a snapshot was to be made, and works again, is
// not watched for ever after: when it hangs next, nobody may have asked for anything.
func TestHungOnce(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	slow := &hangFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = hangWritesFS{slow} })
	t.Cleanup(slow.end) // before the node's
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	target := n.use(id, c)
	sh(t, "head -c 8M /dev/urandom >"+target+"/dirty")
	n.hangsAfter(time.Second)
	slow.start()
	_, err := n.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	wantCode(t, err, codes.Unavailable, errHangs.Error())
	n.hangsAfter(hangLimit)
	watched := func() (found bool) {
		n.p.watched.Range(func(_, _ any) bool { found = true; return false })
		return found
	}
	if !watched() {
		t.Error("nobody would take the device away for who unstages the volume")
	}
	slow.end()
	syncFS(t, target)
	for end := time.Now().Add(patience); watched(); time.Sleep(hangPoll) {
		if time.Now().After(end) {
			t.Fatal("the device, which works, is still watched")
		}
	}
	n.snapshot("s", id)
	n.leave(id)
}

// TestSlowFreeze: a device that gets something done is waited for.
func TestSlowFreeze(t *testing.T) {
	needDevices(t, "mkfs.ext4")
	slow := &hangFS{FS: blockio.OS()}
	n := newNodeWith(t, func(p *plugin) { p.fs = slow })
	c := mountCap(writer, ext4)
	id := n.create("v", 64*mib, "", c)
	target := n.use(id, c)
	var took atomic.Int64 // by the freeze alone; the encoder reads at full speed
	freeze := n.p.freeze
	n.p.freeze = func(ctx context.Context, volume string, dir int) (func() error, error) {
		start := time.Now()
		thaw, err := freeze(ctx, volume, dir)
		took.Store(int64(time.Since(start)))
		slow.delay.Store(0)
		return thaw, err
	}
	tries := 0
	slowly(t, func(limit, delay time.Duration) time.Duration {
		sh(t, "head -c 8M /dev/urandom >"+target+"/file")
		n.hangsAfter(limit)
		slow.delay.Store(int64(delay))
		tries++
		n.snapshot(fmt.Sprint("s", tries), id)
		n.hangsAfter(hangLimit)
		return time.Duration(took.Load())
	})
	n.leave(id)
}
