package vm

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// emulated has one host thread for all processors: with one each, a processor of
// QEMU 7.2 now and then runs code that another one has just patched, and the
// kernel, which patches itself a lot, dies of it.
var emulated = []string{"-machine", "pc", "-accel", "tcg,thread=single", "-cpu", "max"}

var accel struct {
	sync.Mutex
	args []string
}

// accelerator gives the arguments for KVM, if a kernel boots with it here, else
// for emulation. /dev/kvm alone says little: in some virtual machines it is there
// and guests crash.
func accelerator(k *Kernel) ([]string, error) {
	accel.Lock()
	defer accel.Unlock()
	if accel.args != nil {
		return accel.args, nil
	}
	args := emulated
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err == nil {
		f.Close()
		kvm := []string{"-machine", "pc", "-accel", "kvm", "-cpu", "host"}
		if boots(k, kvm) {
			args = kvm
		}
	}
	accel.args = args
	return args, nil
}

// boots tells whether a kernel comes as far as an init that says hello.
func boots(k *Kernel, args []string) bool {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return false
	}
	dir, err := os.MkdirTemp("", "snapmerge-vm-")
	if err != nil {
		return false
	}
	defer os.RemoveAll(dir)
	var a archive
	if err := a.hostFile("/bin/busybox", busybox); err != nil {
		return false
	}
	a.file("/init", 0o755, []byte("#!/bin/busybox sh\n/bin/busybox echo it-boots\n/bin/busybox poweroff -f\n"))
	image := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(image, a.bytes(), 0o600); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	args = append(args[:len(args):len(args)], "-smp", "2", "-m", "512", "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio",
		"-kernel", k.Image, "-initrd", image, "-append", "console=ttyS0 quiet panic=-1")
	out, _ := exec.CommandContext(ctx, "qemu-system-x86_64", args...).CombinedOutput()
	return bytes.Contains(out, []byte("it-boots"))
}
