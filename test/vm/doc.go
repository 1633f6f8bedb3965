// Package vm is a virtual machine for tests that need another kernel than the
// host's, or that cut its power. It boots a stock Debian cloud kernel under QEMU
// (KVM if that works here, else emulated) with an initramfs of busybox, kernel
// modules, programs of the host and static Go binaries, runs a shell script in it
// and returns output and exit code.
//
// # Disks
//
// A Disk is served to QEMU by an NBD server in this process. What the guest
// writes stays in a volatile cache until the guest flushes; when the power is cut
// each write still in that cache is dropped, kept or torn in steps of 512 bytes.
// Killing QEMU alone would lose nothing: the page cache of the host survives it.
//
// # Ports
//
// The first serial port is the console: kernel messages and what the script
// prints. The second, /dev/ttyS1 in the guest, carries lines from programs to the
// test: what such a line says had happened before it was sent. The line "exit N"
// is the script's exit code.
//
// Tests that boot machines run only with SNAPMERGE_VM=1 in the environment, as
// `make test-vm` does.
package vm
