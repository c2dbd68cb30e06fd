#!/usr/bin/env bash
# Installs what is missing, says so, and asks for nothing. System packages come from apt (Debian or Ubuntu), as root or through sudo;
# all else goes to the user's cache. A second run with nothing missing changes nothing and needs no rights.
#   setup.sh build   a C++ compiler and libclang, for RocksDB
#   setup.sh test    strace, e2fsprogs, Debian's own backup clients, and newer ones
#   setup.sh check   cargo-machete and cargo-deny
set -euo pipefail

what=${1:-build}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/granary
here=$(cd "$(dirname "$0")" && pwd)

# One at a time: two clones may be set up at once.
mkdir -p "$cache"
exec 8>"$cache/.setup-lock"
flock 8

root() { # root WHY COMMAND...
  local why=$1
  shift
  if [ "$(id -u)" = 0 ]; then "$@"; return; fi
  if ! command -v sudo >/dev/null || { ! sudo -n true 2>/dev/null && ! [ -t 0 ]; }; then
    echo "setup: $why; that needs root, and sudo is not there or wants a password. As root: $*" >&2
    exit 1
  fi
  sudo "$@"
}

missing() { # missing PACKAGE...: those that dpkg does not have
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
  done
}

apt_updated=
update() { # update WHY
  if [ -z "$apt_updated" ]; then root "$1" apt-get update -qq; apt_updated=1; fi
}

install() { # install PACKAGE...: only what is missing
  local packages
  mapfile -t packages < <(missing "$@")
  [ ${#packages[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || { echo "setup: this system has no apt-get; install by hand: ${packages[*]}" >&2; exit 1; }
  echo "==> installing system packages: ${packages[*]}"
  update "these packages are missing: ${packages[*]}"
  root "these packages are missing: ${packages[*]}" \
    env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

command -v cargo >/dev/null || { echo "setup: cargo not found; install Rust 1.95 or later first (rustup)" >&2; exit 1; }

setup_build() {
  if ! command -v g++ >/dev/null || ! command -v make >/dev/null; then install g++ make; fi
  # libclang and its own headers: any version will do, the newest packaged one if there is none.
  have_libclang() {
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stdbool.h' >/dev/null
  }
  have_libclang && return
  command -v apt-get >/dev/null && update "libclang is missing"
  local version package
  for version in 14 15 16 17 18 19 20; do
    package=libclang1-$version
    apt-cache show "$package" >/dev/null 2>&1 || { package=libclang1-${version}t64; apt-cache show "$package" >/dev/null 2>&1 || continue; }
    install "$package" "libclang-common-$version-dev"
    break
  done
  have_libclang || { echo "setup: no libclang could be installed; RocksDB's bindings need one (libclang1-N and libclang-common-N-dev)" >&2; exit 1; }
}

setup_test() {
  install strace e2fsprogs mount util-linux procps python3 python3-venv restic rclone s3cmd

  # Clients from PyPI, in a folder of their own; the list's hash names it, so that a changed list is a new folder. A Python that was
  # upgraded leaves a folder that does not start.
  local requirements=$here/clients/requirements.txt clients
  clients=$cache/clients-$(sha256sum "$requirements" | cut -c1-12)
  if [ ! -e "$clients/ready" ] || ! "$clients/bin/python" -c 'import boto3' 2>/dev/null; then
    echo "==> installing backup clients from PyPI into $clients"
    rm -rf "$clients"
    python3 -m venv "$clients"
    "$clients/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
    touch "$clients/ready"
  fi

  # Debian 12's restic is old; the next release's package runs on it, unpacked beside the system. Elsewhere apt's own is new enough.
  local newer=$cache/newer-restic sources=/etc/apt/sources.list.d/debian.sources newer_bin=
  if [ -e "$sources" ] && grep -q bookworm "$sources"; then
    newer_bin=$newer/x/usr/bin
    if ! "$newer_bin/restic" version >/dev/null 2>&1; then
      echo "==> unpacking the newer restic of the next Debian release into $newer"
      rm -rf "$newer"
      mkdir -p "$newer"/{lists/partial,cache/archives/partial,x}
      sed 's/bookworm/trixie/g' "$sources" > "$newer/next.sources"
      local apt_next=(-o "Dir::Etc::SourceList=$newer/next.sources" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$newer/lists" -o "Dir::Cache=$newer/cache")
      # As root apt would fetch as a user of its own, who may not write here.
      [ "$(id -u)" != 0 ] || apt_next+=(-o APT::Sandbox::User=root)
      apt-get "${apt_next[@]}" -qq update
      (cd "$newer" && apt-get "${apt_next[@]}" -qq download restic && dpkg -x restic_*.deb x)
    fi
  fi
  printf 'GRANARY_CLIENTS=%s\nGRANARY_NEWER_CLIENTS=%s\n' "$clients/bin" "$newer_bin" > "$cache/clients.env"
}

# The checkers, each in a folder of its version. Without optimisation: they are compiled in half the time and are quick enough.
setup_check() {
  local tool
  for tool in cargo-machete@0.9.2 cargo-deny@0.20.2; do
    local folder=$cache/tools/${tool/@/-}
    if ! "$folder/bin/${tool%@*}" --version >/dev/null 2>&1; then
      echo "==> compiling $tool into $folder (once, a few minutes)"
      local build
      build=$(mktemp -d "$cache/build-XXXXXX")
      trap 'rm -rf "$build"' EXIT
      CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --debug --locked --force --root "$folder" --target-dir "$build" "$tool"
      rm -rf "$build"
    fi
    mkdir -p "$cache/tools/bin"
    ln -sf "$folder/bin/${tool%@*}" "$cache/tools/bin/"
  done
}

case $what in
  build) setup_build ;;
  test) setup_build; setup_test ;;
  check) setup_check ;;
  *) echo "setup: $what is none of build, test, check" >&2; exit 2 ;;
esac
