#!/usr/bin/env bash
# Runs a command that compiles or uses what was compiled, alone in the target folder that all clones of a user share:
# locked.sh COMMAND...
#
# Cargo tells a changed file by its time alone. A clone that was checked out before another one was built would be taken
# for built, so whoever builds after another clone touches its own sources first.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$CARGO_TARGET_DIR"
exec 9>"$CARGO_TARGET_DIR/.lock"
flock -n 9 || { echo "==> waiting: another clone builds or tests in $CARGO_TARGET_DIR"; flock 9; }
last=$CARGO_TARGET_DIR/.last-clone
if [ "$(cat "$last" 2>/dev/null)" != "$PWD" ]; then
  find placement disk-node gateway bench tests -name '*.rs' -exec touch -c {} +
  echo "$PWD" > "$last"
fi
# The lock ends with this script; what the command leaves running must not hold it.
"$@" 9>&-
