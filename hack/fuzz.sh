#!/bin/sh
# Runs every fuzz target of the module for a while. Usage: hack/fuzz.sh [TIME]
set -eu
time=${1:-60s}
go=${GO:-go}
for pkg in $($go list ./...); do
	list=$($go test -list '^Fuzz' "$pkg") # fails if the package does not compile
	for target in $(echo "$list" | grep '^Fuzz' || true); do
		echo "== $pkg $target"
		$go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 10x "$pkg"
	done
done
