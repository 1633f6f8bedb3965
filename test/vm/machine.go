package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Config of a machine.
type Config struct {
	Kernel    *Kernel
	Initramfs []byte            // of Initramfs
	Job       string            // the shell script that the machine runs
	Files     map[string][]byte // for this boot, by name in the guest
	Disks     []*Disk           // /dev/vda, /dev/vdb, ...
	MemoryMiB int               // 0: 1024
	Console   io.Writer         // gets what the guest prints as it comes; may be nil
}

// Machine is a virtual machine that runs.
type Machine struct {
	cfg    Config
	dir    string
	cmd    *exec.Cmd
	lines  chan string
	booted time.Time
	nbd    []net.Listener

	mu      sync.Mutex
	console strings.Builder
	errs    []error
	exit    int // of the job; -1: it did not end
	up      time.Duration

	done chan struct{} // QEMU has ended and all it said was read
}

// Boot starts a machine; it must be ended by Wait or Kill.
func Boot(cfg Config) (*Machine, error) {
	if cfg.MemoryMiB == 0 {
		cfg.MemoryMiB = 1024
	}
	dir, err := os.MkdirTemp("", "snapmerge-vm-")
	if err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg, dir: dir, exit: -1, lines: make(chan string, 1<<16), done: make(chan struct{})}
	if err := m.start(); err != nil {
		m.cleanUp()
		return nil, err
	}
	return m, nil
}

func (m *Machine) start() error {
	if err := m.writeInitramfs(); err != nil {
		return err
	}
	accel, err := accelerator(m.cfg.Kernel)
	if err != nil {
		return err
	}
	ports, err := net.Listen("unix", filepath.Join(m.dir, "port"))
	if err != nil {
		return err
	}
	defer ports.Close()
	args := append(accel, "-smp", "2", "-m", strconv.Itoa(m.cfg.MemoryMiB), "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-kernel", m.cfg.Kernel.Image, "-initrd", filepath.Join(m.dir, "initramfs"),
		"-append", "console=ttyS0 panic=-1 oops=panic softlockup_panic=1 mitigations=off random.trust_cpu=on "+messages(),
		"-serial", "stdio",
		"-chardev", "socket,id=port,path="+filepath.Join(m.dir, "port"), "-serial", "chardev:port")
	for i, d := range m.cfg.Disks {
		path := filepath.Join(m.dir, fmt.Sprintf("disk%d", i))
		l, err := net.Listen("unix", path)
		if err != nil {
			return err
		}
		m.nbd = append(m.nbd, l)
		go d.serve(l, m.fail)
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=d%d,format=raw,cache=writeback,discard=unmap,file.driver=nbd,file.server.type=unix,file.server.path=%s", i, path),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,num-queues=2", i))
	}
	m.cmd = exec.Command("qemu-system-x86_64", args...)
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	m.cmd.Stderr = m.cmd.Stdout
	m.booted = time.Now()
	if err := m.startTied(); err != nil {
		return err
	}
	var readers sync.WaitGroup
	readers.Go(func() { m.readConsole(out) })
	connected := make(chan struct{})
	go func() {
		<-connected
		readers.Wait()
		// After the readers: Wait closes the pipe.
		err := m.cmd.Wait()
		if exit := (*exec.ExitError)(nil); err != nil && !(errors.As(err, &exit) && !exit.Exited()) {
			m.fail(fmt.Errorf("qemu: %w", err))
		}
		close(m.lines)
		close(m.done)
	}()
	// QEMU connects before the machine runs, or ends at once.
	_ = ports.(*net.UnixListener).SetDeadline(time.Now().Add(20 * time.Second))
	port, err := ports.Accept()
	if err != nil {
		_ = m.cmd.Process.Kill()
		close(connected)
		<-m.done
		return fmt.Errorf("qemu: %w: %s", err, m.Console())
	}
	readers.Go(func() { m.readPort(port) })
	close(connected)
	return nil
}

// startTied starts QEMU so that the kernel kills it when this process dies. That
// ties it to the thread that starts it, which must stay as long.
func (m *Machine) startTied() error {
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := m.cmd.Start()
		started <- err
		if err == nil {
			<-m.done
		}
	}()
	return <-started
}

// messages says which kernel messages the console shows: warnings, or all with
// SNAPMERGE_VM_VERBOSE.
func messages() string {
	if os.Getenv("SNAPMERGE_VM_VERBOSE") != "" {
		return "ignore_loglevel"
	}
	return "quiet loglevel=4"
}

func (m *Machine) writeInitramfs() error {
	var a archive
	a.file("/job", 0o755, []byte(m.cfg.Job))
	for name, data := range m.cfg.Files {
		a.file(name, 0o755, data)
	}
	f, err := os.Create(filepath.Join(m.dir, "initramfs"))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(m.cfg.Initramfs); err != nil {
		return err
	}
	_, err = f.Write(a.bytes())
	return err
}

func (m *Machine) readConsole(r io.Reader) {
	b := bufio.NewReader(r)
	for {
		line, err := b.ReadString('\n')
		if line != "" {
			line = strings.ReplaceAll(line, "\r", "")
			m.mu.Lock()
			m.console.WriteString(line)
			m.mu.Unlock()
			if m.cfg.Console != nil {
				_, _ = io.WriteString(m.cfg.Console, line)
			}
		}
		if err != nil {
			return
		}
	}
}

func (m *Machine) readPort(c net.Conn) {
	defer c.Close()
	for s := bufio.NewScanner(c); s.Scan(); {
		line := strings.TrimSuffix(s.Text(), "\r")
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case "exit":
			if n, err := strconv.Atoi(rest); err == nil {
				m.mu.Lock()
				m.exit = n
				m.mu.Unlock()
			}
		case "up":
			m.mu.Lock()
			m.up = time.Since(m.booted)
			m.mu.Unlock()
		default:
			m.lines <- line
		}
	}
}

func (m *Machine) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.errs = append(m.errs, err)
}

// Lines are the lines that programs sent through the second serial port. The
// channel is closed when the machine has ended. It must be read: if too much
// waits in it, the guest waits too.
func (m *Machine) Lines() <-chan string { return m.lines }

// Console is what the guest has printed so far.
func (m *Machine) Console() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.console.String()
}

// BootTime is how long it took from the start of QEMU to the job; 0: it has not
// begun.
func (m *Machine) BootTime() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.up
}

// ErrNoExit says that a machine ended without its job having ended.
var ErrNoExit = errors.New("the machine ended before its job")

// Wait waits until the machine has powered itself off, and returns the exit code
// of the job. When ctx ends the machine is killed.
func (m *Machine) Wait(ctx context.Context) (exit int, err error) {
	select {
	case <-m.done:
	case <-ctx.Done():
		err = ctx.Err()
		m.Kill()
	}
	m.cleanUp()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil && m.exit < 0 {
		err = ErrNoExit
	}
	return m.exit, errors.Join(append(m.errs, err)...)
}

// Kill ends the machine at once. Its disks are not touched: for a power cut, turn
// them off before, and restart them after.
func (m *Machine) Kill() {
	_ = m.cmd.Process.Kill()
	<-m.done
	m.cleanUp()
}

func (m *Machine) cleanUp() {
	for _, l := range m.nbd {
		l.Close()
	}
	os.RemoveAll(m.dir)
}
