#!/bin/sh
# installed.sh BUILD: installs into a folder of its own and builds generate.c against it, through pkg-config (shared and
# static) and through find_package. Each program writes the same text.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cmake --install "$1" --prefix "$folder/prefix" >/dev/null
export PKG_CONFIG_PATH="$folder/prefix/lib/pkgconfig"
model="$here/../../models/lesskv-small.gguf"
prompt="The sea was"

cc -std=c99 -Wall -Werror $(pkg-config --cflags lesskv) "$here/generate.c" -o "$folder/shared" $(pkg-config --libs lesskv)
shared=$(LD_LIBRARY_PATH="$folder/prefix/lib" "$folder/shared" "$model" "$prompt")
[ -n "$shared" ]

cc -std=c99 $(pkg-config --cflags lesskv) "$here/generate.c" -o "$folder/static" "$folder/prefix/lib/liblesskv.a" \
  $(pkg-config --static --libs lesskv | sed "s/-llesskv//")
[ "$("$folder/static" "$model" "$prompt")" = "$shared" ]

mkdir "$folder/project"
cp "$here/generate.c" "$folder/project"
cat >"$folder/project/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(user LANGUAGES C)
find_package(lesskv 0.1 REQUIRED)
add_executable(user generate.c)
target_link_libraries(user PRIVATE lesskv::lesskv)
END
cmake -S "$folder/project" -B "$folder/project/build" -DCMAKE_PREFIX_PATH="$folder/prefix" >/dev/null
cmake --build "$folder/project/build" >/dev/null
[ "$("$folder/project/build/user" "$model" "$prompt")" = "$shared" ]
echo "$shared"
