package cluster

import (
	"errors"
	"os"
	"strings"
	"sync"
)

// settings are those of the kernel that the kubelet changes for all.
var settings = []string{
	"vm.overcommit_memory", "vm.panic_on_oom", "kernel.panic", "kernel.panic_on_oops", "kernel.keys.root_maxkeys", "kernel.keys.root_maxbytes",
}

// found are the settings from before the first of the clusters that there are.
var found struct {
	sync.Mutex
	clusters int
	values   map[string]string
}

func keepSettings() {
	found.Lock()
	defer found.Unlock()
	if found.clusters++; found.clusters > 1 {
		return
	}
	found.values = map[string]string{}
	for _, name := range settings {
		if b, err := os.ReadFile(sysctl(name)); err == nil {
			found.values[name] = strings.TrimSpace(string(b))
		}
	}
}

// restoreSettings undoes keepSettings, after the last cluster.
func restoreSettings() error {
	found.Lock()
	defer found.Unlock()
	if found.clusters--; found.clusters > 0 {
		return nil
	}
	var errs []error
	for name, value := range found.values {
		if b, err := os.ReadFile(sysctl(name)); err == nil && strings.TrimSpace(string(b)) != value {
			errs = append(errs, os.WriteFile(sysctl(name), []byte(value), 0))
		}
	}
	return errors.Join(errs...)
}

func sysctl(name string) string {
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}
