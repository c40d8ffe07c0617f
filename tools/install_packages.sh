#!/usr/bin/env bash
# Installs the Debian packages that building and testing need, and those named as arguments, where they are missing.
# Prints what it installs. Works as root or through sudo; on a system without apt it prints the list and stops.
set -euo pipefail

packages=(
  g++ cmake ninja-build pkg-config ccache git
  libdnnl-dev libeigen3-dev libhwy-dev libpcre2-dev nlohmann-json3-dev libcli11-dev libfmt-dev libxxhash-dev libedit-dev
  libcpp-httplib-dev libhiredis-dev libgtest-dev libbenchmark-dev python3 python3-pip python3-numpy python3-pytest ca-certificates
  "$@"
)

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "This is not a Debian system. Install the counterparts of these Debian 12 packages, then build with CMake:" >&2
  printf '  %s\n' "${packages[@]}" >&2
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "Missing packages, and neither root nor sudo to install them: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "Installing: ${missing[*]}" >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
