#!/bin/sh
# Makes the root file system of the container image in DIR: the static program
# BINARY and the tools that it runs (pkg/driver/filesystem.go, and mount and
# umount by k8s.io/mount-utils), with the shared libraries that they need and
# nothing else. Takes them from the machine it runs on, Debian or Ubuntu with
# e2fsprogs, xfsprogs, util-linux and mount. Usage: hack/rootfs.sh DIR BINARY
set -eu

[ $# = 2 ] || {
	echo "usage: hack/rootfs.sh DIR BINARY" >&2
	exit 2
}
dir=$1 binary=$2
tools="blkid e2fsck mkfs.ext4 resize2fs mkfs.xfs xfs_growfs mount umount"

# Administrators' tools are not on everybody's path.
PATH=$PATH:/usr/sbin:/sbin

# put FILE copies a file, not a link, to its place below $dir.
put() {
	[ -e "$dir$1" ] && return
	mkdir -p "$dir${1%/*}"
	cp -L "$1" "$dir$1"
}

mkdir "$dir"
# Tools and libraries have their places with and without /usr.
for name in bin sbin lib lib64; do
	mkdir -p "$dir/usr/$name"
	ln -s "usr/$name" "$dir/$name"
done
# Mount points, and /tmp for what runs without any volume there.
mkdir -p "$dir/proc" "$dir/sys" "$dir/dev" "$dir/run" "$dir/var/lib" "$dir/etc" "$dir/tmp"
chmod 1777 "$dir/tmp"

for name in $tools; do
	tool=$(command -v "$name") || {
		echo "$name is missing" >&2
		exit 1
	}
	put "$tool"
	# Lines are "libx.so.1 => /path (address)" or, the loader's, "/path (address)".
	for lib in $(ldd "$tool" | grep -o '/[^ ]*'); do
		put "$lib"
	done
done
put /etc/mke2fs.conf
install -m 755 "$binary" "$dir/usr/bin/snapmerge"
