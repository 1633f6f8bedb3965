package probe

import (
	"bufio"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// driver is a kernel driver that a transport needs.
type driver struct {
	transport, module string
	// traces are paths, without the leading slash, of which one is there if the
	// driver is part of the kernel or loaded.
	traces []string
	needs  string
}

var (
	dmUserDriver = driver{"dm-user", "dm_user", []string{"sys/module/dm_user", "dev/dm-user"}, "the device-mapper target user of Android's kernels, which mainline does not have"}
	ublkDriver   = driver{"ublk", "ublk_drv", []string{"dev/ublk-control", "sys/module/ublk_drv"}, "CONFIG_BLK_DEV_UBLK, kernel 6.4"}
	nbdDriver    = driver{"nbd", "nbd", []string{"sys/module/nbd", "dev/nbd0"}, "CONFIG_BLK_DEV_NBD"}
)

func (d driver) absent() Answer {
	return Answer{Why: fmt.Sprintf("the kernel has no %s driver (%s: %s)", d.transport, d.module, d.needs)}
}

// present tells whether the driver is there, or could be loaded. root is the root
// directory.
func (d driver) present(root fs.FS, release string) bool {
	for _, p := range d.traces {
		if _, err := fs.Stat(root, p); err == nil {
			return true
		}
	}
	for _, list := range []string{"modules.builtin", "modules.dep"} {
		if lists(root, path.Join("lib/modules", release, list), d.module) {
			return true
		}
	}
	return false
}

// lists tells whether a list of modules of depmod(8) has the module. Its lines
// start with paths such as kernel/drivers/block/nbd.ko.xz.
func lists(root fs.FS, name, module string) bool {
	f, err := root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		file, _, _ := strings.Cut(s.Text(), ":")
		base, _, _ := strings.Cut(path.Base(file), ".ko")
		if strings.ReplaceAll(base, "-", "_") == module {
			return true
		}
	}
	return false
}
