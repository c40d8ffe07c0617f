#!/usr/bin/env bash
# test_arm.sh [quick | SUITE...]: builds test programs for 64-bit ARM and runs them under qemu-user: those below, those
# named, or (`quick`) the kernels with dot products alone. Wants Debian's g++-aarch64-linux-gnu and qemu-user-static; the
# libraries come through arm_sysroot.sh.
#   JOBS   compilers and emulators at once (default: processors)
set -euo pipefail
cd "$(dirname "$0")/.."

# Suites that start programs themselves cannot be named: what they start would not be emulated.
suites=(kernels_test base_test format_test tokenizer_test)
case "${1:-}" in
  '') ;;
  quick) suites=(kernels_test) ;;
  *) suites=("$@") ;;
esac
jobs=${JOBS:-$(nproc)}

for program in aarch64-linux-gnu-g++ qemu-aarch64-static; do
  if ! command -v "$program" >/dev/null; then
    echo "$program is missing: install the Debian packages g++-aarch64-linux-gnu and qemu-user-static" >&2
    exit 1
  fi
done
tools/arm_sysroot.sh
cmake --preset arm >/dev/null
cmake --build build/arm -j "$jobs" --target "${suites[@]}"

# Runs a suite in as many parts as there are jobs, side by side.
test_suite() {  # SUITE [ARGUMENT...]
  local program part pid parts=() failed=0
  program=$(find build/arm/src build/arm/tests -name "$1" -type f)
  echo "== $* on ARM${QEMU_CPU:+ ($QEMU_CPU)}"
  for ((part = 0; part < jobs; ++part)); do
    QEMU_LD_PREFIX=build/arm-sysroot GTEST_BRIEF=1 GTEST_TOTAL_SHARDS=$jobs GTEST_SHARD_INDEX=$part \
      qemu-aarch64-static "$program" "${@:2}" &
    parts+=($!)
  done
  for pid in "${parts[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

if [ "${1:-}" = quick ]; then
  test_suite kernels_test --gtest_filter='*/dotprod'
  exit
fi
for suite in "${suites[@]}"; do test_suite "$suite"; done
# On a processor without dot products, where an instruction that strayed out of their units would be the end.
[ $# -gt 0 ] || QEMU_CPU=cortex-a53 test_suite kernels_test --gtest_filter='*/neon'
