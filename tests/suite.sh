#!/usr/bin/env bash
# Runs `cargo test` and ends with what each suite took and what could not run: suite.sh CARGO-ARGUMENTS...
set -euo pipefail
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
started=$SECONDS
cargo test "$@" 2>&1 | tee "$log" || status=$?
echo
echo "==> seconds by suite"
# Cargo names a package in the line of its unit tests only; its other suites follow.
awk '
  / Running / {
    name = $0; sub(/^ *Running (unittests )?/, "", name); sub(/ \(.*/, "", name)
    if ($0 ~ / unittests /) { package = $0; sub(/.*\/deps\//, "", package); sub(/-[0-9a-f]+\)$/, "", package) }
    name = package " " name
  }
  / Doc-tests / { name = $2 " doc-tests" }
  /^test result:/ {
    seconds = $0; sub(/.*finished in /, "", seconds); sub(/s$/, "", seconds)
    if ($4 + $6 > 0) printf "%8.1f  %4d passed %3d failed  %s\n", seconds, $4, $6, name
  }
' "$log" | sort -rn
printf '%8d  in all\n' $((SECONDS - started))
grep -ho 'NOT RUN: .*' "$log" || true
exit "$status"
