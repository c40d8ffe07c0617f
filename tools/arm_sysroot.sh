#!/usr/bin/env bash
# arm_sysroot.sh [DIR]: the libraries that lesskv stands on, built for arm64, unpacked into DIR (default
# build/arm-sysroot) for cmake/aarch64.cmake. apt fetches them (22 MB) with lists, cache and package status of its own
# under DIR, so nothing is installed on this system and no root is needed. Does nothing when DIR has them already.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
  libc6-dev libdnnl-dev libeigen3-dev libhwy-dev libpcre2-dev nlohmann-json3-dev libcli11-dev libfmt-dev libxxhash-dev
  libedit-dev libcpp-httplib-dev libhiredis-dev libgtest-dev
)

root=$(realpath -m "${1:-build/arm-sysroot}")
wanted="${packages[*]}"
[ "$(cat "$root/.complete" 2>/dev/null)" = "$wanted" ] && exit 0
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "This is not a Debian system: put the arm64 files of these Debian 12 packages into $root: $wanted" >&2
  exit 1
fi

echo "Fetching arm64 libraries into $root" >&2
rm -rf "$root"
apt="$root/.apt"
mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial" "$root/usr/lib"
: >"$apt/state/status"  # nothing is installed there: apt fetches whatever the packages need
ln -s usr/lib "$root/lib"
own=(-q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$apt/state"
     -o Dir::State::status="$apt/state/status" -o Dir::Cache="$apt/cache" -o APT::Sandbox::User="$(id -un)")
apt-get "${own[@]}" update >&2
apt-get "${own[@]}" install -y --download-only --no-install-recommends "${packages[@]}" >&2
for package in "$apt"/cache/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
rm -rf "$apt"
# A link to /lib/... means the sysroot's.
find "$root" -type l -lname '/*' | while read -r link; do
  ln -sfn "$(realpath -m --relative-to="$(dirname "$link")" "$root$(readlink "$link")")" "$link"
done
echo "$wanted" >"$root/.complete"
