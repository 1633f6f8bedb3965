#!/bin/sh
# Measures merges and puts the table between the markers of a document.
#
#   hack/bench.sh SNAPMERGE DOCUMENT [RUNS]
#
# Files of up to 8 GiB lie in TMPDIR (/var/tmp), which should be on a disk. As
# root caches are dropped in full and system calls counted.
set -eu

if [ $# -lt 2 ] || [ ! -x "$1" ] || [ ! -f "$2" ]; then
	echo "usage: $0 SNAPMERGE DOCUMENT [RUNS]" >&2
	exit 2
fi
program=$1 document=$2 runs=${3:-3}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/snapmerge-bench.XXXXXX")
tracing=/sys/kernel/tracing
mounted=
cleanup() {
	rm -rf "$work"
	[ -z "$mounted" ] || umount "$tracing"
}
trap cleanup EXIT
trap 'exit 1' HUP INT TERM

# System calls are counted at the kernel's trace point.
if [ "$(id -u)" = 0 ] && [ ! -e "$tracing/events" ] && mount -t tracefs tracefs "$tracing" 2>/dev/null; then
	mounted=yes
fi

# measure WORKLOAD ARGUMENT... measures as it is and, once, with slow flushes.
# shellcheck disable=SC2086 # $floor may be nothing
measure() {
	"$program" bench merge --workload "$@" --dir "$work/files" --keep --json --runs "$runs" \
		--io uring,sync $floor --compare qemu-img >>"$work/results"
	"$program" bench merge --workload "$@" --dir "$work/files" --reuse --json \
		--io uring $floor --flush-delay 5ms >>"$work/results"
	rm -rf "$work/files"
}

floor=--floor
measure copyshift
measure copyshift-down
measure incremental
measure full
measure full --max-block 64KiB
measure full --compression gz
floor= # one block at a time would be none
measure randcopy

{
	echo
	echo "Measured with $("$program" version | head -n 1) on $(uname -s) $(uname -r), $(nproc) processors" \
		"($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), $(awk '/^MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo) of memory," \
		"$(df --output=fstype "$work" | tail -n 1) file system, $(qemu-img --version | head -n 1), load $(cut -d ' ' -f 1 /proc/loadavg) at the end;" \
		"medians of $runs runs in turn (fastest–slowest), with slow flushes of one run."
	echo
	"$program" bench table <"$work/results"
	echo
} >"$work/table"

awk -v table="$work/table" '
	/<!-- merge:begin/ { print; while ((getline line < table) > 0) print line; skip = 1; found++ }
	/<!-- merge:end/   { skip = 0; found++ }
	!skip              { print }
	END                { exit found != 2 }
' "$document" >"$work/document" || {
	echo "$document lacks the markers merge:begin and merge:end" >&2
	exit 1
}
cat "$work/document" >"$document"
