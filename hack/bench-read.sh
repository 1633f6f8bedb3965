#!/bin/sh
# Measures reads before the merge and puts the tables between the markers of a
# document.
#
#   hack/bench-read.sh SNAPMERGE DOCUMENT [RUNS]
#
# It takes about 12 minutes with 5 runs, and as root: devices are made, and caches
# dropped in full. fio must be installed. Files of up to 4 GiB lie in TMPDIR
# (/var/tmp), which should be on a disk.
set -eu

if [ $# -lt 2 ] || [ ! -x "$1" ] || [ ! -f "$2" ]; then
	echo "usage: $0 SNAPMERGE DOCUMENT [RUNS]" >&2
	exit 2
fi
program=$1 document=$2 runs=${3:-5} transport=${TRANSPORT:-fuse}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/snapmerge-bench.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# Mixed loads have an image that no reader comes to the end of, and of which the
# memory for what is read ahead holds but a small part.
once=64MiB mixed=1GiB

# measure SIZE ARGUMENT... adds a table.
measure() {
	mkdir "$work/files"
	"$program" bench read --quiet --runs "$runs" --dir "$work/files" --size "$@" >>"$work/results"
	rm -rf "$work/files"
}

for compression in lz4 zstd; do
	for block in 4KiB 64KiB; do
		measure $once --compression "$compression" --max-block "$block" --transport "$transport"
	done
	measure $mixed --compression "$compression" --transport "$transport" --mixed 1s
	measure $mixed --compression "$compression" --request 4KiB --mixed 1s
done
for workload in incremental randcopy; do
	measure $mixed --workload "$workload" --transport "$transport" --mixed 1s
done

{
	echo
	echo "Measured with $("$program" version | head -n 1) on $(uname -s) $(uname -r), $(nproc) processors" \
		"($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), load $(cut -d ' ' -f 1 /proc/loadavg) at the end; medians of $runs runs in turn."
	echo
	echo '```'
	sed '${/^$/d}' "$work/results"
	echo '```'
	echo
} >"$work/table"
"${0%/*}/fill.sh" "$document" read <"$work/table"
