package ublk

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// charClass lists the character devices of all ublk devices.
const charClass = "/sys/class/ublk-char"

// devicesByTag looks at all ublk devices of the machine.
func devicesByTag(c *control) (map[uint64]devInfo, error) {
	entries, err := os.ReadDir(charClass)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	found := map[uint64]devInfo{}
	for _, e := range entries {
		n, ok := strings.CutPrefix(e.Name(), "ublkc")
		id, err := strconv.ParseUint(n, 10, 32)
		if !ok || err != nil {
			continue
		}
		// One that is gone meanwhile, or another user's, is not ours.
		if info, err := c.info(uint32(id)); err == nil {
			found[info.tag] = info
		}
	}
	return found, nil
}
