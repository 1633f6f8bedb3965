#!/bin/sh
# Packs the golden COW files into the archive that package test/fixtures embeds.
#
#   hack/make-fixtures.sh SOURCE
#
# SOURCE has a folder for each case with info.json and *.img.gz, and a folder
# reject with info.json and one .img.gz for each file to be refused. The archive
# depends on nothing but their content. Needs GNU tar, zstd and 1 GiB in TMPDIR.
set -eu

if [ $# -ne 1 ] || [ ! -d "$1/reject" ]; then
	echo "usage: $0 SOURCE (a folder of cases, with one named reject)" >&2
	exit 2
fi
source=$(cd "$1" && pwd)
target=$(cd "$(dirname "$0")/../test/fixtures" && pwd)/fixtures.tar.zst
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

# pack FOLDER NAME IMAGE... unpacks what is there of the images and lists it.
pack() {
	folder=$1 name=$2
	shift 2
	mkdir "$stage/$name"
	cp "$folder/info.json" "$stage/$name/"
	echo "$name/info.json" >>"$stage/list"
	for image in "$@"; do
		[ -e "$folder/$image.gz" ] || continue
		gzip -dc "$folder/$image.gz" >"$stage/$name/$image"
		echo "$name/$image" >>"$stage/list"
	done
}

# The loader relies on this order: the files to be refused first, then case by
# case, each with its info first. Like images lie side by side, where they
# compress best.
LC_ALL=C
export LC_ALL
set --
for file in "$source"/reject/*.gz; do
	set -- "$@" "$(basename "$file" .gz)"
done
pack "$source/reject" reject "$@"
for folder in "$source"/*/; do
	name=$(basename "$folder")
	[ "$name" = reject ] || pack "$folder" "$name" base.img expected.img cow.img cow.unfinished.img
done

chmod -R u=rwX,go=rX "$stage"
LC_ALL=C tar -C "$stage" --format=ustar --owner=0 --group=0 --numeric-owner --mtime=@0 --files-from="$stage/list" -cf - |
	zstd -19 --long=27 -T1 -q -f -o "$target"
ls -l "$target"
