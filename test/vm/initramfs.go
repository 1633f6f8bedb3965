package vm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// archive is an initramfs: a cpio archive in the "newc" format. Archives can be
// joined; a later file of the same name wins.
type archive struct {
	out  bytes.Buffer
	dirs map[string]bool
}

// newc: 6 bytes of magic and 13 numbers of 8 hex digits (inode, mode, uid, gid,
// links, mtime, length, 4 device numbers, length of the name with its NUL,
// checksum 0), the name, the data; name and data each padded to 4 bytes.
func (a *archive) entry(name string, mode uint32, data []byte) {
	fmt.Fprintf(&a.out, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.out.WriteString(name)
	a.out.WriteByte(0)
	a.pad()
	a.out.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}

// file adds a file, by absolute name, and its directories.
func (a *archive) file(name string, mode uint32, data []byte) {
	a.dir(path.Dir(name))
	a.entry(strings.TrimPrefix(name, "/"), 0o100000|mode, data)
}

func (a *archive) dir(name string) {
	if name == "/" || a.dirs[name] {
		return
	}
	a.dir(path.Dir(name))
	if a.dirs == nil {
		a.dirs = map[string]bool{}
	}
	a.dirs[name] = true
	a.entry(strings.TrimPrefix(name, "/"), 0o040755, nil)
}

// bytes ends the archive.
func (a *archive) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.out.Bytes()
}

// hostFile adds a file of the host.
func (a *archive) hostFile(name, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.file(name, 0o755, data)
	return nil
}

// program adds a program of the host with the libraries that it needs.
func (a *archive) program(name string, seen map[string]bool) error {
	from, err := exec.LookPath(name)
	if err != nil {
		if from, err = exec.LookPath("/usr/sbin/" + name); err != nil {
			return err
		}
	}
	if err := a.hostFile("/bin/"+name, from); err != nil {
		return err
	}
	out, err := exec.Command("ldd", from).Output()
	if err != nil {
		return nil // static
	}
	for _, line := range strings.Split(string(out), "\n") {
		// "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)" or
		// "/lib64/ld-linux-x86-64.so.2 (0x...)"
		_, lib, ok := strings.Cut(line, "=> ")
		if !ok {
			lib = strings.TrimSpace(line)
		}
		lib, _, _ = strings.Cut(lib, " (")
		if !strings.HasPrefix(lib, "/") || seen[lib] {
			continue
		}
		seen[lib] = true
		to := lib
		if ok {
			to = "/lib/x86_64-linux-gnu/" + filepath.Base(lib)
		}
		if err := a.hostFile(to, lib); err != nil {
			return err
		}
	}
	return nil
}

// initScript sets the machine up, runs /job and ends the machine. The order of
// the last lines matters: the exit code is sent when all output is out.
const initScript = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root TERM=dumb
mount -t devtmpfs dev /dev
mkdir -p /proc /sys /dev/shm /tmp /run /root /mnt /etc
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs shm /dev/shm
mount -t fusectl fusectl /sys/fs/fuse/connections
ln -s /proc/self/fd /dev/fd
ln -s /proc/mounts /etc/mtab
for m in $(cat /modules/order); do insmod /modules/$m.ko $(cat /modules/$m.options 2>/dev/null); done
stty -F /dev/ttyS1 raw -echo
ip link set lo up 2>/dev/null
echo "up $(cut -d' ' -f1 /proc/uptime)" >/dev/ttyS1
sh /job </dev/null
code=$?
sync
echo "exit $code" >/dev/ttyS1
poweroff -f
`

// Contents of the machine besides kernel and busybox.
type Contents struct {
	// Modules are loaded in this order after what they depend on; one with "?"
	// in front may be missing. Options are theirs.
	Modules []string
	Options map[string]string
	// Programs of the host, found on its path, go to /bin with their libraries.
	// Those that the host lacks are left out.
	Programs []string
	// Files are host files by the name in the guest.
	Files map[string]string
}

// Initramfs makes the image that machines boot.
func Initramfs(k *Kernel, c Contents) ([]byte, error) {
	var a archive
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: install busybox-static", err)
	}
	if err := a.hostFile("/bin/busybox", busybox); err != nil {
		return nil, err
	}
	a.file("/init", 0o755, []byte(initScript))
	a.file("/etc/passwd", 0o644, []byte("root:x:0:0::/root:/bin/sh\n"))
	a.file("/etc/group", 0o644, []byte("root:x:0:\n"))
	modules, err := k.load(c.Modules...)
	if err != nil {
		return nil, err
	}
	var order strings.Builder
	for _, m := range modules {
		fmt.Fprintln(&order, m.name)
		a.file("/modules/"+m.name+".ko", 0o644, m.data)
	}
	a.file("/modules/order", 0o644, []byte(order.String()))
	for name, options := range c.Options {
		a.file("/modules/"+moduleName(name)+".options", 0o644, []byte(options))
	}
	seen := map[string]bool{}
	for _, p := range c.Programs {
		if _, err := exec.LookPath(p); err != nil {
			if _, err := exec.LookPath("/usr/sbin/" + p); err != nil {
				continue
			}
		}
		if err := a.program(p, seen); err != nil {
			return nil, err
		}
	}
	for to, from := range c.Files {
		if err := a.hostFile(to, from); err != nil {
			return nil, err
		}
	}
	return a.bytes(), nil
}
