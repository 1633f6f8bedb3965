#!/bin/sh
# Installs what a make target needs and this machine lacks (Debian, Ubuntu), or
# says what is missing. Usage: hack/setup.sh test|demo|bench|bench-foreground
set -eu

case "${1:-}" in
test) tools="mkfs.ext4:e2fsprogs e2fsck:e2fsprogs resize2fs:e2fsprogs mkfs.xfs:xfsprogs xfs_repair:xfsprogs mkfs.btrfs:btrfs-progs blkid:util-linux losetup:mount fio:fio gcc:gcc gcc:libc6-dev" ;; # gcc: -race
demo) tools="mkfs.ext4:e2fsprogs e2fsck:e2fsprogs resize2fs:e2fsprogs blkid:util-linux" ;;
bench) tools="qemu-img:qemu-utils mkfs.xfs:xfsprogs" ;;
bench-foreground) tools="mkfs.ext4:e2fsprogs losetup:mount fio:fio qemu-img:qemu-utils qemu-storage-daemon:qemu-system-common pg_ctlcluster:postgresql" ;;
*)
	echo "usage: hack/setup.sh test|demo|bench|bench-foreground" >&2
	exit 2
	;;
esac

# Administrators' tools are not on everybody's path.
PATH=$PATH:/usr/sbin:/sbin

command -v go >/dev/null || {
	echo "Go is missing: see https://go.dev/doc/install" >&2
	exit 1
}

missing=
for t in $tools; do
	command -v "${t%%:*}" >/dev/null || missing="$missing ${t##*:}"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	export DEBIAN_FRONTEND=noninteractive
	# shellcheck disable=SC2086 # a list of packages
	if apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing; then
		exit 0
	fi
fi
echo "please install:$missing" >&2
# Tests that need one of them are skipped with a reason; the others cannot do without.
[ "$1" = test ]
