#!/bin/sh
# Measures merges and puts the tables between the markers of a document.
#
#   hack/bench.sh SNAPMERGE DOCUMENT [RUNS]
#
# Files of up to 12 GiB lie in TMPDIR (/var/tmp), which should be on a disk. As
# root caches are dropped in full, system calls counted, and merges on xfs
# measured, too.
set -eu

if [ $# -lt 2 ] || [ ! -x "$1" ] || [ ! -f "$2" ]; then
	echo "usage: $0 SNAPMERGE DOCUMENT [RUNS]" >&2
	exit 2
fi
program=$1 document=$2 runs=${3:-5}
fewer=$(((runs + 1) / 2))
work=$(mktemp -d "${TMPDIR:-/var/tmp}/snapmerge-bench.XXXXXX")
tracing=/sys/kernel/tracing
mounted='' xfs=''
cleanup() {
	[ -z "$xfs" ] || umount "$work/xfs"
	rm -rf "$work"
	[ -z "$mounted" ] || umount "$tracing"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

# System calls are counted at the kernel's trace point.
if [ "$(id -u)" = 0 ] && [ ! -e "$tracing/events" ] && mount -t tracefs tracefs "$tracing" 2>/dev/null; then
	mounted=yes
fi

# measure WORKLOAD ARGUMENT... measures with both back ends beside what $beside
# says, and again with slow flushes.
# shellcheck disable=SC2086 # $beside is some arguments, or none
measure() {
	"$program" bench merge --workload "$@" --dir "$work/files" --keep --json --runs "$runs" \
		--io uring,sync $beside >>"$work/results"
	case $beside in *--floor*) floor=--floor ;; *) floor= ;; esac
	"$program" bench merge --workload "$@" --dir "$work/files" --reuse --json --runs "$fewer" \
		--io uring $floor --flush-delay 5ms >>"$work/results"
	rm -rf "$work/files"
}

# once RESULTS ARGUMENT... measures io_uring by itself, with fewer runs.
once() {
	results=$1
	shift
	"$program" bench merge "$@" --json --runs "$fewer" --io uring >>"$results"
}

beside='--floor --compare qemu-img'
measure copyshift
measure copyshift-down
measure incremental
measure full
measure full --max-block 64KiB
beside='--floor'
measure copyshift --distance 8192
measure copyshift --in-place
beside='--compare qemu-img' # the floor is one block at a time, or decodes nothing
measure randcopy
measure full --max-block 64KiB --compression zstd
beside='--compare qemu-img --scaling'
measure full --compression gz

# Growth, and what read-ahead is worth.
for ops in 117500 470000 940000 20000; do
	once "$work/results" --workload copyshift --ops "$ops" --dir "$work/files"
done
once "$work/results" --workload copyshift-down --ops 20000 --dir "$work/files"
for w in copyshift copyshift-down; do
	once "$work/results" --workload "$w" --ops 20000 --read-ahead off --dir "$work/files"
done

# Sharing space instead of moving data.
if [ "$(id -u)" = 0 ] && command -v mkfs.xfs >/dev/null; then
	truncate -s 6G "$work/xfs.img"
	mkfs.xfs -q "$work/xfs.img"
	mkdir "$work/xfs"
	if mount -o loop "$work/xfs.img" "$work/xfs"; then
		xfs=yes
	else
		echo "$0: no loop device for xfs: --reflink is not measured" >&2
	fi
fi
if [ -n "$xfs" ]; then
	for w in 'copyshift --distance 8192' copyshift incremental; do
		for how in --keep '--reuse --reflink'; do
			# shellcheck disable=SC2086
			once "$work/results-xfs" --workload $w --dir "$work/xfs/files" $how
		done
		rm -rf "$work/xfs/files"
	done
fi

{
	echo
	echo "Measured with $("$program" version | head -n 1) on $(uname -s) $(uname -r), $(nproc) processors" \
		"($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), $(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo) of memory," \
		"$(df --output=fstype "$work" | tail -n 1) file system, $(qemu-img --version | head -n 1), load $(cut -d ' ' -f 1 /proc/loadavg) at the end;" \
		"medians of $runs runs in turn (fastest–slowest), of $fewer with slow flushes, of io_uring alone, and on xfs."
	echo
	"$program" bench table <"$work/results"
	if [ -s "$work/results-xfs" ]; then
		echo
		echo "On xfs, on a loop device in the same file system:"
		echo
		"$program" bench table <"$work/results-xfs"
	fi
	echo
} >"$work/table"
"${0%/*}/fill.sh" "$document" merge <"$work/table"
