package nodebench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/snapmerge/snapmerge/pkg/bench"
)

// The loads.
const (
	Fio     = "fio"     // random reads and writes of 4 KiB with fsync, in a file
	Pgbench = "pgbench" // PostgreSQL, with pgbench's default transactions
)

// Loads are all loads.
var Loads = []string{Fio, Pgbench}

// randomize fills p with what hardly packs.
func randomize(p []byte, seed uint64) {
	var key [32]byte
	copy(key[:], strconv.FormatUint(seed, 10))
	_, _ = rand.NewChaCha8(key).Read(p) // which never fails
}

// fio works on one file.
type fio struct{}

// fioFile is the file's length in bytes.
const fioFile = 96 * mib

func (fio) prepare(ctx context.Context, dir string) error {
	return fill(ctx, filepath.Join(dir, "data"), fioFile)
}

// warm is for how long a load goes on before it counts, and beginAfter when it works for
// sure: a merge must not begin while nobody needs the disk.
const (
	warm       = 2 * time.Second
	beginAfter = time.Second
)

func (fio) run(ctx context.Context, dir string, d time.Duration, begin func() error) (s sample, err error) {
	begun := make(chan error, 1)
	time.AfterFunc(beginAfter, func() { begun <- begin() })
	l, err := bench.Fio(ctx, filepath.Join(dir, "data"), warm, d)
	err = errors.Join(err, <-begun)
	return sample{rate: l.IOPS, p99: map[string]float64{"read": l.Read, "write": l.Write, "flush": l.Flush}}, err
}

// postgres is a server of its own for each run.
type postgres struct {
	bin      string // directory of the programs
	sockets  string // directory
	uid, gid uint32 // of the server, which does not run as root
}

const (
	pgScale   = "3" // 45 MB of accounts
	pgClients = "4"
	pgPort    = "5432"
	// pgLimit is how long the server may take to start, and to end.
	pgLimit = time.Minute
)

// ErrNoPostgres says that PostgreSQL is not installed.
var ErrNoPostgres = errors.New("PostgreSQL is not installed, which makes the load (Debian, Ubuntu: postgresql)")

func newPostgres(dir string) (*postgres, error) {
	p := &postgres{sockets: filepath.Join(dir, "postgres")}
	if found, err := exec.LookPath("initdb"); err == nil {
		if found, err = filepath.EvalSymlinks(found); err != nil {
			return nil, err
		}
		p.bin = filepath.Dir(found)
	} else if all, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb"); len(all) > 0 {
		p.bin = filepath.Dir(all[len(all)-1])
	} else {
		return nil, ErrNoPostgres
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, err
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	p.uid, p.gid = uint32(uid), uint32(gid)
	if err := os.Mkdir(p.sockets, 0o700); err != nil {
		return nil, err
	}
	return p, os.Chown(p.sockets, int(p.uid), int(p.gid))
}

// command is one of PostgreSQL's programs, as its user.
func (p *postgres) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(p.bin, name), args...)
	c.Dir = p.sockets
	c.Env = append(os.Environ(), "LC_ALL=C", "PGHOST="+p.sockets, "PGPORT="+pgPort, "PGUSER=postgres", "PGDATABASE=postgres")
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: p.uid, Gid: p.gid}}
	return c
}

func (p *postgres) call(ctx context.Context, name string, args ...string) error {
	out, err := p.command(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

func (p *postgres) prepare(ctx context.Context, dir string) error {
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if err := os.Chown(data, int(p.uid), int(p.gid)); err != nil {
		return err
	}
	if err := p.call(ctx, "initdb", "--pgdata", data, "--username=postgres", "--auth=trust", "--no-sync", "--wal-segsize=4"); err != nil {
		return err
	}
	return p.with(ctx, data, func() error {
		if err := p.call(ctx, "pgbench", "--initialize", "--scale="+pgScale, "--quiet"); err != nil {
			return err
		}
		return p.call(ctx, "psql", "--quiet", "--command=CHECKPOINT")
	})
}

// with calls do while the server runs.
func (p *postgres) with(ctx context.Context, data string, do func() error) (err error) {
	var log bytes.Buffer
	c := p.command(context.WithoutCancel(ctx), "postgres", "-D", data, "-k", p.sockets, "-p", pgPort, "-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "max_connections=20")
	c.Stdout, c.Stderr = &log, &log
	if err := c.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	defer func() {
		_ = c.Process.Signal(unix.SIGINT) // fast shutdown; it may have ended
		select {
		case werr := <-ended:
			err = errors.Join(err, werr)
		case <-time.After(pgLimit):
			err = errors.Join(err, errors.New("PostgreSQL does not end"), c.Process.Kill(), <-ended)
		}
		if err != nil {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(log.Bytes()))
		}
	}()
	for start := time.Now(); ; {
		err := p.call(ctx, "pg_isready", "--quiet")
		if err == nil {
			return do()
		}
		if ctx.Err() != nil || time.Since(start) > pgLimit {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (p *postgres) run(ctx context.Context, dir string, d time.Duration, begin func() error) (s sample, err error) {
	prefix := filepath.Join(p.sockets, "log")
	var counts time.Time // from when on transactions do
	err = p.with(ctx, filepath.Join(dir, "data"), func() error {
		counts = time.Now().Add(warm)
		begun := make(chan error, 1)
		time.AfterFunc(beginAfter, func() { begun <- begin() })
		err := p.call(ctx, "pgbench", "--no-vacuum", "--client="+pgClients, "--log", "--log-prefix="+prefix, fmt.Sprintf("--time=%d", int((warm+d).Seconds())))
		return errors.Join(err, <-begun)
	})
	logs, gerr := filepath.Glob(prefix + ".*")
	if err = errors.Join(err, gerr); err != nil {
		return s, err
	}
	var took []float64
	for _, name := range logs {
		b, err := os.ReadFile(name)
		if err != nil {
			return s, err
		}
		part, err := parsePgbench(b, counts)
		if err != nil {
			return s, fmt.Errorf("%s: %w", name, err)
		}
		took = append(took, part...)
		if err := os.Remove(name); err != nil {
			return s, err
		}
	}
	if len(took) == 0 {
		return s, errors.New("pgbench: no transaction was committed")
	}
	slices.Sort(took)
	return sample{rate: float64(len(took)) / d.Seconds(), p99: map[string]float64{"transaction": took[(len(took)-1)*99/100]}}, nil
}

// parsePgbench reads pgbench's log of transactions, a line each: client, number, time
// in µs, script, when it ended (seconds of the epoch, µs). It returns the times of those
// that ended after from.
func parsePgbench(log []byte, from time.Time) (took []float64, err error) {
	for sc := bufio.NewScanner(bytes.NewReader(log)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 6 {
			return nil, fmt.Errorf("line %q has %d fields, want 6", sc.Text(), len(f))
		}
		t, err := strconv.ParseFloat(f[2], 64)
		seconds, serr := strconv.ParseInt(f[4], 10, 64)
		µs, uerr := strconv.ParseInt(f[5], 10, 64)
		if err := errors.Join(err, serr, uerr); err != nil {
			return nil, fmt.Errorf("line %q: %w", sc.Text(), err)
		}
		if time.Unix(seconds, µs*1000).After(from) {
			took = append(took, t)
		}
	}
	return took, nil
}
