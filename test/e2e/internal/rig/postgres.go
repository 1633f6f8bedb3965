package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/snapmerge/snapmerge/test/e2e/internal/binary"
	"github.com/snapmerge/snapmerge/test/e2e/internal/cluster"
	"github.com/snapmerge/snapmerge/test/e2e/internal/image"
)

// Postgres is the image of PostgreSQL, which runs as the user with that id.
const Postgres, PostgresUser = "localhost/postgres:e2e", 1000

var (
	// The server, its clients, the libraries, and the time zones.
	postgresHas = regexp.MustCompile(`^(postgresql-[0-9]+|postgresql-client-[0-9]+|lib.*|zlib1g.*|tzdata)$`)
	// The compiler for queries is as large as all the rest together.
	postgresLacks = regexp.MustCompile(`llvm|libz3|perl|^libpam-|^libc-`)
)

// LoadPostgres gives the image of the distribution's PostgreSQL, with busybox for a
// shell, to the cluster.
func LoadPostgres(ctx context.Context, c *cluster.Cluster) error {
	names, err := binary.Closure(ctx, "postgresql", postgresHas, postgresLacks)
	if err != nil {
		return err
	}
	tree, err := binary.Debian(ctx, names...)
	if err != nil {
		return err
	}
	debian, err := binary.Debian(ctx, packages...)
	if err != nil {
		return err
	}
	i := images{ctx: ctx, c: c, dir: filepath.Join(c.Dir(), "images"), debian: debian}
	if err := os.Mkdir(i.dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(i.dir)
	root := filepath.Join(i.dir, "postgres")
	if _, err := binary.Output(ctx, i.dir, "cp", "--archive", "--link", tree, root); err != nil {
		return err
	}
	for _, dir := range []string{"doc", "man", "locale"} {
		if err := os.RemoveAll(filepath.Join(root, "usr", "share", dir)); err != nil {
			return err
		}
	}
	if err := i.busyboxTree(root); err != nil {
		return err
	}
	passwd := fmt.Sprintf("postgres:x:%d:%d::/tmp:/bin/sh\n", PostgresUser, PostgresUser)
	if err := os.WriteFile(filepath.Join(root, "etc", "passwd"), []byte(passwd), 0o644); err != nil {
		return err
	}
	bin, err := filepath.Glob(filepath.Join(root, "usr", "lib", "postgresql", "*", "bin"))
	if err != nil || len(bin) != 1 {
		return fmt.Errorf("programs of PostgreSQL: %v, %v", bin, err)
	}
	path, err := filepath.Rel(root, bin[0])
	if err != nil {
		return err
	}
	return i.give(root, Postgres, image.Config{Env: []string{"PATH=/" + path + ":/bin"}})
}
