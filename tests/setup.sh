#!/usr/bin/env bash
# Installs what is missing on Debian or Ubuntu, says so, and asks for nothing.
#   setup.sh build   a C++ compiler and libclang, for RocksDB
#   setup.sh test    strace, e2fsprogs, Debian's own backup clients, and newer ones in the user's cache
set -euo pipefail

what=${1:-build}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/granary
here=$(cd "$(dirname "$0")" && pwd)

root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

apt_updated=
install() { # install PACKAGE...: only what dpkg does not have
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || { echo "setup: this system has no apt-get; install by hand: ${missing[*]}" >&2; exit 1; }
  echo "==> installing system packages: ${missing[*]}"
  if [ -z "$apt_updated" ]; then root apt-get update -qq; apt_updated=1; fi
  root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

command -v cargo >/dev/null || { echo "setup: cargo not found; install Rust 1.95 or later first (rustup)" >&2; exit 1; }

# A C++ compiler.
if ! command -v g++ >/dev/null || ! command -v make >/dev/null; then install g++ make; fi

# libclang and its own headers: any version will do, the newest packaged one if there is none.
have_libclang() {
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stdbool.h' >/dev/null
}
if ! have_libclang; then
  if [ -z "$apt_updated" ] && command -v apt-get >/dev/null; then echo "==> reading package lists"; root apt-get update -qq; apt_updated=1; fi
  for version in 14 15 16 17 18 19 20; do
    package=libclang1-$version
    apt-cache show "$package" >/dev/null 2>&1 || { package=libclang1-${version}t64; apt-cache show "$package" >/dev/null 2>&1 || continue; }
    install "$package" "libclang-common-$version-dev"
    break
  done
  have_libclang || { echo "setup: no libclang could be installed; RocksDB's bindings need one (libclang1-N and libclang-common-N-dev)" >&2; exit 1; }
fi

[ "$what" = test ] || exit 0

install strace e2fsprogs mount util-linux procps python3 python3-venv restic rclone s3cmd

# Clients from PyPI, in a folder of their own; the list's hash names it, so that a changed list is a new folder.
requirements=$here/clients/requirements.txt
clients=$cache/clients-$(sha256sum "$requirements" | cut -c1-12)
if [ ! -e "$clients/ready" ]; then
  echo "==> installing backup clients from PyPI into $clients"
  rm -rf "$clients"
  mkdir -p "$cache"
  python3 -m venv "$clients"
  "$clients/bin/pip" install --quiet --disable-pip-version-check -r "$requirements"
  touch "$clients/ready"
fi

# Debian 12's restic is old; the next release's package runs on it, unpacked beside the system. Elsewhere apt's own is new enough.
newer=$cache/newer-restic
sources=/etc/apt/sources.list.d/debian.sources
if [ -e "$sources" ] && grep -q bookworm "$sources"; then
  if [ ! -x "$newer/x/usr/bin/restic" ]; then
    echo "==> unpacking the newer restic of the next Debian release into $newer"
    rm -rf "$newer"
    mkdir -p "$newer"/{lists/partial,cache/archives/partial,x}
    sed 's/bookworm/trixie/g' "$sources" > "$newer/next.sources"
    apt_next=(-o "Dir::Etc::SourceList=$newer/next.sources" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$newer/lists" -o "Dir::Cache=$newer/cache" -o APT::Sandbox::User=root)
    apt-get "${apt_next[@]}" -qq update
    (cd "$newer" && apt-get "${apt_next[@]}" -qq download restic && dpkg -x restic_*.deb x)
  fi
  newer_bin=$newer/x/usr/bin
else
  newer_bin=
fi

mkdir -p "$cache"
printf 'GRANARY_CLIENTS=%s\nGRANARY_NEWER_CLIENTS=%s\n' "$clients/bin" "$newer_bin" > "$cache/clients.env"
