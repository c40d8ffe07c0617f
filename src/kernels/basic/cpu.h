// What the processor can do, and which set of kernels is in use. The choice is made once, at the first kernel call; the
// environment variable LESSKV_ISA (scalar; avx2, avxvnni, avx512, avx512bf16, amx; neon, dotprod) lowers it, so that
// every path can be tested on one machine.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lesskv {

// Each level of an architecture includes its ones before, but for kAvxVnni: processors with AVX-512 need not have it.
enum class Isa {
  kScalar,      // portable C++, the reference of every kernel
  kNeon,        // 64-bit ARM
  kDotprod,     // and its dot products of four 8-bit numbers (the `asimddp` of /proc/cpuinfo)
  kAvx2,        // AVX2, FMA, F16C
  kAvxVnni,     // and AVX-VNNI: dot products of four 8-bit numbers
  kAvx512,      // AVX-512 F, BW, DQ, VL and VNNI
  kAvx512Bf16,  // and AVX512_BF16: products of bfloat16 pairs
  kAmx,         // and AMX-BF16: the same in tiles of 16 x 16 sums
};

// The highest level this processor and its operating system support.
Isa BestIsa();

// The level in use: BestIsa() unless lowered by LESSKV_ISA or ForceIsa. Throws Error when LESSKV_ISA is not a level's
// name or names one the processor lacks.
Isa ActiveIsa();

// Changes the level of later kernel calls. Throws Error when the processor lacks it. Not to be called while kernels
// run.
void ForceIsa(Isa isa);

// Every level this processor can run, lowest first.
std::vector<Isa> AvailableIsas();

std::string_view IsaName(Isa isa);  // "scalar", "neon", "dotprod", "avx2", "avxvnni", "avx512", "avx512bf16", "amx"
std::string IsaName();              // of the active level

// The level of that name; throws Error listing the names otherwise.
Isa ParseIsa(std::string_view name);

}  // namespace lesskv
