#!/bin/sh
# Puts standard input between the markers "<!-- NAME:begin" and "<!-- NAME:end" of a
# document.
#
#   hack/fill.sh DOCUMENT NAME
set -eu

if [ $# -ne 2 ] || [ ! -f "$1" ]; then
	echo "usage: $0 DOCUMENT NAME" >&2
	exit 2
fi
document=$1 name=$2
filled=$(mktemp "${TMPDIR:-/tmp}/snapmerge-fill.XXXXXX")
trap 'rm -f "$filled"' EXIT
trap 'exit 1' HUP INT TERM

awk -v document="$document" -v name="$name" '
	{ table = table $0 "\n" }
	END {
		while ((getline line < document) > 0) {
			if (index(line, "<!-- " name ":end")) { skip = 0; found++ }
			if (!skip) print line
			if (index(line, "<!-- " name ":begin")) { printf "%s", table; skip = 1; found++ }
		}
		exit found != 2
	}
' >"$filled" || {
	echo "$document lacks the markers $name:begin and $name:end" >&2
	exit 1
}
cat "$filled" >"$document"
