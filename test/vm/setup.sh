#!/bin/sh
# Installs what `make test-vm` needs and this machine lacks (Debian, Ubuntu), or
# says what is missing.
set -eu

missing=
for t in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static xz:xz-utils dpkg-deb:dpkg mkfs.ext4:e2fsprogs dmsetup:dmsetup; do
	PATH=$PATH:/usr/sbin:/sbin command -v "${t%%:*}" >/dev/null || missing="$missing ${t##*:}"
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
exit 1
