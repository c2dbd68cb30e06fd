#!/usr/bin/env bash
# Installs what is missing and says so. System packages come from apt (Debian or Ubuntu), as root or through sudo, which
# may ask for a password; without rights it says what root has to install. All else goes to the user's cache. A run with
# nothing missing changes nothing and needs no rights.
#   setup.sh build   a C++ compiler and libclang, for RocksDB
#   setup.sh test    strace, e2fsprogs, Debian's own backup clients, and newer ones
#   setup.sh check   cargo-machete and cargo-deny
set -euo pipefail

what=${1:-build}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/granary
target=${CARGO_TARGET_DIR:-$cache/target}
here=$(cd "$(dirname "$0")" && pwd)
clone=$(dirname "$here")

fail() {
  echo "setup: $*" >&2
  exit 1
}

# An earlier `sudo make`, or a clone of somebody else, leaves folders in which a build would fail half-way.
check_ours() { # check_ours FOLDER...
  local folder theirs
  for folder in "$@"; do
    [ -e "$folder" ] || continue
    theirs=$(find "$folder" -name .granary -prune -o ! -type l ! -uid "$(id -u)" ! -writable -print -quit 2>/dev/null) || true # a build of another clone takes files away meanwhile
    [ -z "$theirs" ] || fail "$theirs belongs to $(stat -c %U "$theirs"), and $(id -un) may not write it. \
Run make as one user, without sudo: it asks for rights itself where it needs them. As root: chown -R $(id -un): $folder"
  done
}

check_rust() {
  local wanted found
  wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$clone/Cargo.toml")
  command -v cargo >/dev/null || fail "cargo not found; install Rust $wanted or later first (rustup), for this user: $(id -un)"
  found=$(rustc --version 2>&1) || fail "rustc does not run; install Rust $wanted or later (rustup). It says: $found"
  found=$(echo "$found" | cut -d ' ' -f 2)
  [ "$(printf '%s\n' "$wanted" "${found%%-*}" | sort -V | head -n 1)" = "$wanted" ] \
    || fail "$(command -v rustc) is Rust $found; Granary needs $wanted or later (rustup update)"
}

missing() { # missing PACKAGE...: those that dpkg does not have
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
  done
}

# libclang and its own headers: any version will do.
have_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stdbool.h' >/dev/null
}

# The first version that is packaged; where the package lists are not there yet, a package that is larger than need be.
libclang_packages() {
  local version package
  for version in 14 15 16 17 18 19 20; do
    for package in "libclang1-$version" "libclang1-${version}t64"; do
      if apt-cache show "$package" >/dev/null 2>&1; then echo "$package" "libclang-common-$version-dev"; return; fi
    done
  done
  echo libclang-dev
}

wanted() { # wanted build|test: packages that are missing
  command -v g++ >/dev/null && command -v make >/dev/null || missing g++ make
  have_libclang || libclang_packages
  [ "$1" = build ] || missing "${test_packages[@]}"
}
test_packages=(strace e2fsprogs mount util-linux procps python3 python3-venv restic rclone s3cmd)

root() { # root COMMAND...: as root, or through sudo
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() { # install_packages build|test: all that is missing, asked for once
  local packages
  packages=$(wanted "$1" | xargs)
  [ -n "$packages" ] || return 0
  command -v apt-get >/dev/null || fail "this system has no apt-get; install by hand: $packages"
  # Whoever may use sudo with a password is asked for it, where there is somebody to ask.
  if [ "$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null && ! { [ -t 0 ] && command -v sudo >/dev/null && sudo -v; }; then
    fail "these packages are missing, and $(id -un) has no way to become root here. \
As root: apt-get update && apt-get install -y --no-install-recommends $packages"
  fi
  # A source of something else that is broken need not be in the way.
  root apt-get update -qq || echo "==> apt-get update failed; going on with the package lists that there are"
  # With fresh package lists there may be a better choice.
  packages=$(wanted "$1" | xargs)
  echo "==> installing system packages: $packages"
  # shellcheck disable=SC2086
  root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
  packages=$(wanted "$1" | xargs)
  [ -z "$packages" ] || fail "still missing after the installation: $packages"
}

setup_test() {
  # Clients from PyPI, in a folder of their own; the list's hash names it, so that a changed list is a new folder. A
  # Python that was upgraded leaves a folder that does not start.
  local requirements=$here/clients/requirements.txt clients
  clients=$cache/clients-$(sha256sum "$requirements" | cut -c1-12)
  if [ ! -e "$clients/ready" ] || ! "$clients/bin/python" -c 'import boto3' 2>/dev/null; then
    echo "==> installing backup clients from PyPI into $clients"
    rm -rf "$clients"
    python3 -m venv "$clients"
    "$clients/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
    touch "$clients/ready"
  fi

  # Debian 12's restic is old; the next release's package runs on it, unpacked beside the system. Elsewhere apt's own is
  # new enough. Debian 12 names its sources in either of two files.
  local newer=$cache/newer-restic newer_bin='' sources
  for sources in /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list; do
    grep -qs '^[^#]*bookworm' "$sources" || continue
    newer_bin=$newer/x/usr/bin
    if ! "$newer_bin/restic" version >/dev/null 2>&1; then
      echo "==> unpacking the newer restic of the next Debian release into $newer"
      rm -rf "$newer"
      mkdir -p "$newer"/{lists/partial,cache/archives/partial,x}
      local next=$newer/next.${sources##*.} apt_next
      sed '/cdrom:/d; s/bookworm/trixie/g' "$sources" > "$next"
      apt_next=(-o "Dir::Etc::SourceList=$next" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$newer/lists" -o "Dir::Cache=$newer/cache")
      # As root apt would fetch as a user of its own, who may not write here.
      [ "$(id -u)" != 0 ] || apt_next+=(-o APT::Sandbox::User=root)
      apt-get "${apt_next[@]}" -qq update
      (cd "$newer" && apt-get "${apt_next[@]}" -qq download restic && dpkg -x restic_*.deb x)
    fi
    break
  done
  printf 'GRANARY_CLIENTS=%s\nGRANARY_NEWER_CLIENTS=%s\n' "$clients/bin" "$newer_bin" > "$cache/clients.env"
}

# The checkers, each in a folder of its version. Without optimisation: they are compiled in half the time and are quick
# enough.
setup_check() {
  local tool
  # Of a run that was killed.
  rm -rf "$cache"/build-??????
  for tool in cargo-machete@0.9.2 cargo-deny@0.20.2; do
    local folder=$cache/tools/${tool/@/-}
    if ! "$folder/bin/${tool%@*}" --version >/dev/null 2>&1; then
      echo "==> compiling $tool into $folder (once, a few minutes)"
      build=$(mktemp -d "$cache/build-XXXXXX") # not local: the trap runs after the function
      trap 'rm -rf "$build"' EXIT
      CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked --force --root "$folder" --target-dir "$build" "$tool"
      rm -rf "$build"
    fi
    mkdir -p "$cache/tools/bin"
    ln -sf "$folder/bin/${tool%@*}" "$cache/tools/bin/"
  done
}

case $what in build | test | check) ;; *) fail "$what is none of build, test, check" ;; esac
check_ours "$cache" "$target" "$clone"
check_rust

# One at a time: two clones may be set up at once. What runs below does not inherit the lock: it may start a daemon.
mkdir -p "$cache" || fail "no folder $cache can be made for what is built; XDG_CACHE_HOME names another place"
exec 8>"$cache/.setup-lock"
flock -n 8 || { echo "==> waiting: another clone is being set up"; flock 8; }
case $what in
  build) install_packages build ;;
  test) install_packages test; setup_test ;;
  check) setup_check ;;
esac 8>&-
