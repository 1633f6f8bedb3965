#!/bin/sh
# Takes away what hack/kind-up.sh has made: the cluster, loop devices of volumes that
# were still in use, and with --purge the volumes. Needs root, or sudo, for the
# devices and the volumes' files.
#
# Usage: hack/kind-down.sh [--purge] [--dry-run]
#	CLUSTER, POOLS  as for hack/kind-up.sh
set -eu

cluster=${CLUSTER:-snapmerge} pools=${POOLS:-/var/tmp/snapmerge-kind} dry='' purge=''
for arg; do
	case "$arg" in
	--dry-run) dry=1 ;;
	--purge) purge=1 ;;
	*)
		echo "usage: hack/kind-down.sh [--purge] [--dry-run]" >&2
		exit 2
		;;
	esac
done

# run runs a command, or only prints it.
run() {
	echo "+ $*"
	[ -n "$dry" ] || "$@"
}

# root runs a command as root.
root() {
	if [ "$(id -u)" = 0 ]; then run "$@"; else run sudo "$@"; fi
}

run kind delete cluster --name "$cluster"

# The device of a volume that was in use outlives the processes that served it. Its
# file has the name disk- and the beginning of a hash of the volume's id.
for volume in "$pools"/*/volumes/*; do
	[ -e "$volume" ] || continue
	file=/disk-$(printf %s "${volume##*/}" | sha256sum | cut -c 1-16)
	for backing in /sys/block/loop*/loop/backing_file; do
		if [ -e "$backing" ] && [ "$(cat "$backing")" = "$file" ]; then
			device=${backing#/sys/block/}
			root losetup --detach "/dev/${device%%/*}"
		fi
	done
done

if [ -n "$purge" ]; then
	root rm -rf "$pools"
else
	echo "volumes are left in $pools; --purge removes them"
fi
