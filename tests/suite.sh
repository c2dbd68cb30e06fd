#!/usr/bin/env bash
# Runs all suites of `cargo test`, also when some fail, and ends with what each took, what could not run, and what
# failed: suite.sh CARGO-ARGUMENTS...
set -euo pipefail
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
started=$SECONDS
cargo test --no-fail-fast "$@" 2>&1 | tee "$log" || status=$?
echo
echo "==> seconds by suite"
# Cargo names a package in the line of its unit tests only; its other suites follow. The failed tests of a suite stand
# in the last `failures:` block before its result. A suite without a result was killed, aborted, or left by `exit`: what
# came after in it never ran, so it failed whatever its exit code was.
LC_ALL=C awk -v took="$((SECONDS - started))" -v status="$status" -v log_file="$log" '
  function end_of_suite() {
    if (name == "") return
    if (row ~ /[^\n]/) print row | "sort -rn"
    if (row == "" || bad) {
      if (row == "") names = "    ended without a result; its last words are above\n"
      else if (split(names, lines, "\n") - 1 != bad) names = names "    not all " bad " names were found in the output\n"
      count += bad
      list = list name (hint == "" ? "" : "   (again: make test ARGS=\"" hint " -- NAME\")") "\n" names
      suites++
    }
    name = row = names = hint = ""
    bad = 0
  }
  { gsub(/\033\[[0-9;]*m/, "") }
  /^ +Running .*\(.*\)$/ {
    end_of_suite()
    name = $0; sub(/^ *Running (unittests )?/, "", name); sub(/ \(.*/, "", name)
    if ($0 ~ / unittests /) { package = $0; sub(/.*\/deps\//, "", package); sub(/-[0-9a-f]+\)$/, "", package) }
    name = package (package == "" ? "" : " ") name
  }
  /^ +Doc-tests / { end_of_suite(); name = $2 " doc-tests" }
  /^failures:$/ { names = ""; listing = 1; next }
  listing && /^    [^ ]/ { names = names $0 "\n"; next }
  { listing = 0 }
  /^test result:/ {
    seconds = $0; sub(/.*finished in /, "", seconds); sub(/s$/, "", seconds)
    # A suite without tests has a row that is not shown.
    row = $4 + $6 > 0 ? sprintf("%8.1f  %4d passed %3d failed  %s", seconds, $4, $6, name) : "\n"
    bad = $6
  }
  /to rerun pass `/ { hint = $0; gsub(/.*to rerun pass `(-p [^ `]+ ?)?|`.*/, "", hint) }
  END {
    end_of_suite()
    close("sort -rn")
    printf "%8d  in all\n", took
    while ((getline line < log_file) > 0) if (match(line, /NOT RUN: .*/)) print substr(line, RSTART)
    if (suites) printf "\n==> failed: %d tests in %d suites\n%s", count, suites, list
    else if (status) print "\n==> failed: no suite did; the reason is above the table"
    exit status ? status : suites > 0
  }
' "$log"
