// Package binary makes the programs that a cluster is made of, once: Go programs
// are built and Debian packages are unpacked into the user's cache directory.
package binary

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Cache is where everything is kept: <user's cache directory>/snapmerge-e2e.
func Cache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "snapmerge-e2e")
	return dir, os.MkdirAll(dir, 0o755)
}

// once returns the directory name-key of the cache. Only if it does not exist is
// fill called, with an empty directory that is given the name at the end.
func once(name, key string, fill func(dir string) error) (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, name+"-"+key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	start := time.Now()
	log.Printf("%s: not in %s, making it", name, cache)
	tmp, err := os.MkdirTemp(cache, ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := fill(tmp); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	log.Printf("%s: made in %s", name, time.Since(start).Round(time.Second))
	return dir, nil
}

// flags leave out what nobody looks at in those programs: they link in half the
// time.
var flags = []string{"-trimpath", "-gcflags=all=-dwarf=false"}

// Build builds packages of the module in the directory, static, and returns the
// directory of the programs. modfile is go.mod or what stands in for it;
// variables are for the linker's -X. The key in the cache is a hash of that file,
// its .sum, the Go files of the directory, Go's version, and flags.
func Build(ctx context.Context, module, modfile string, variables []string, packages ...string) (string, error) {
	return program(ctx, "build", module, modfile, variables, packages...)
}

// Test is Build for the tests of the package in the module's directory: a program
// with the package's name and ".test" after it.
func Test(ctx context.Context, module string) (string, error) {
	return program(ctx, "test", module, "go.mod", nil, "-c", ".")
}

// program runs go with the command, flags, and arguments.
func program(ctx context.Context, command, module, modfile string, variables []string, packages ...string) (string, error) {
	version, err := Output(ctx, module, "go", "env", "GOVERSION", "GOOS", "GOARCH")
	if err != nil {
		return "", err
	}
	ldflags := "-s -w"
	for _, v := range variables {
		ldflags += " -X " + v
	}
	args := append(slices.Clone(flags), "-modfile="+modfile, "-ldflags", ldflags)
	hash := sha256.New()
	fmt.Fprintln(hash, version, args, packages)
	files, err := filepath.Glob(filepath.Join(module, "*.go"))
	if err != nil {
		return "", err
	}
	for _, f := range append(files, filepath.Join(module, modfile), filepath.Join(module, strings.TrimSuffix(modfile, "mod")+"sum")) {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(hash, filepath.Base(f), len(b))
		hash.Write(b)
	}
	return once(filepath.Base(module), hex.EncodeToString(hash.Sum(nil)[:8]), func(dir string) error {
		args := append(append([]string{command}, args...), "-o", dir+"/")
		return run(ctx, module, "go", append(args, packages...)...)
	})
}

// Debian unpacks packages of the machine's distribution, without installing
// them, and returns the directory of the tree.
func Debian(ctx context.Context, packages ...string) (string, error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	fmt.Fprintln(hash, string(release), packages)
	return once("debian", hex.EncodeToString(hash.Sum(nil)[:8]), func(dir string) error {
		debs := filepath.Join(dir, "debs")
		if err := os.Mkdir(debs, 0o777); err != nil {
			return err
		}
		download := append([]string{"download", "-q"}, packages...)
		if err := run(ctx, debs, "apt-get", download...); err != nil {
			if err := run(ctx, debs, "apt-get", "update", "-q"); err != nil {
				return err
			}
			if err := run(ctx, debs, "apt-get", download...); err != nil {
				return err
			}
		}
		files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := run(ctx, dir, "dpkg", "-x", f, dir); err != nil {
				return err
			}
		}
		return os.RemoveAll(debs)
	})
}

// Output runs a program in a directory and returns what it prints.
func Output(ctx context.Context, dir, name string, args ...string) (string, error) {
	var out strings.Builder
	err := command(ctx, dir, &out, name, args...)
	return strings.TrimSpace(out.String()), err
}

func run(ctx context.Context, dir, name string, args ...string) error {
	return command(ctx, dir, os.Stderr, name, args...)
}

func command(ctx context.Context, dir string, out io.Writer, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return nil
}
