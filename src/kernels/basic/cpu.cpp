#include "kernels/basic/cpu.h"

#include <hwy/targets.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>

#include "base/error.h"

namespace lesskv {
namespace {

// Lowest first.
#if defined(__aarch64__)
constexpr Isa kIsasHere[] = {Isa::kScalar, Isa::kNeon, Isa::kDotprod};
#elif defined(__x86_64__)
constexpr Isa kIsasHere[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};
#else
constexpr Isa kIsasHere[] = {Isa::kScalar};
#endif
constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2,       Isa::kAvxVnni, Isa::kAvx512,
                            Isa::kAvx512Bf16, Isa::kAmx, Isa::kNeon,    Isa::kDotprod};
constexpr int kUnset = -1;
std::atomic<int> g_isa{kUnset};

#if defined(__x86_64__)
// Whether the processor multiplies bfloat16 tiles and the system lets this process use them: Linux wants to be asked,
// because the tiles' 8 KiB are saved at every change of threads that use them.
bool HasAmx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Clang 14's builtin does not know these two names. The registers that they use are AVX2's.
bool HasAvxVnni() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4)) != 0;
#else
  return false;
#endif
}

#if defined(__x86_64__)
bool HasF16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29)) != 0;
}
#endif

Isa DetectIsa() {
#if defined(__x86_64__)
  // GCC's and Clang's builtins also ask the operating system whether it saves the wide registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c())) {
    return Isa::kScalar;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))) {
    return HasAvxVnni() ? Isa::kAvxVnni : Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  return HasAmx() ? Isa::kAmx : Isa::kAvx512Bf16;
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? Isa::kDotprod : Isa::kNeon;
#elif defined(__aarch64__)
  return Isa::kNeon;
#else
  return Isa::kScalar;
#endif
}

bool IsAvailable(Isa isa) {
  if (std::find(std::begin(kIsasHere), std::end(kIsasHere), isa) == std::end(kIsasHere)) return false;
  return isa == Isa::kAvxVnni ? HasAvxVnni() : isa <= BestIsa();
}

void CheckAvailable(Isa isa) {
  if (!IsAvailable(isa)) {
    Fail(ErrorCode::kInvalidArgument, "instruction set: this processor offers {}, not {}", IsaName(BestIsa()),
         IsaName(isa));
  }
}

// The kernels written with Highway follow the same choice: its targets above the level are masked out. The scalar
// level never reaches Highway.
void LimitHighway([[maybe_unused]] Isa isa) {
  int64_t allowed = -1;
#if defined(__x86_64__)
  if (isa == Isa::kAvx2 || isa == Isa::kAvxVnni) allowed = ~static_cast<int64_t>(HWY_AVX2 - 1);
#endif
  hwy::SetSupportedTargetsForTest(0);
  if (allowed != -1) hwy::SetSupportedTargetsForTest(hwy::SupportedTargets() & allowed);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

void Activate(Isa isa) {
  if (isa != BestIsa()) LimitHighway(isa);
  g_isa.store(static_cast<int>(isa), std::memory_order_release);
}

Isa InitialIsa() {
  const char* name = std::getenv("LESSKV_ISA");
  if (name == nullptr || *name == '\0') return BestIsa();
  const Isa isa = ParseIsa(name);
  CheckAvailable(isa);
  return isa;
}

}  // namespace

Isa BestIsa() {
  static const Isa best = DetectIsa();
  return best;
}

Isa ActiveIsa() {
  const int isa = g_isa.load(std::memory_order_acquire);
  if (isa != kUnset) return static_cast<Isa>(isa);
  Activate(InitialIsa());
  return static_cast<Isa>(g_isa.load());
}

void ForceIsa(Isa isa) {
  CheckAvailable(isa);
  LimitHighway(isa);
  g_isa.store(static_cast<int>(isa), std::memory_order_release);
}

std::vector<Isa> AvailableIsas() {
  std::vector<Isa> isas;
  for (Isa isa : kIsasHere) {
    if (IsAvailable(isa)) isas.push_back(isa);
  }
  return isas;
}

std::string_view IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kNeon:
      return "neon";
    case Isa::kDotprod:
      return "dotprod";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvxVnni:
      return "avxvnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "?";
}

std::string IsaName() { return std::string(IsaName(ActiveIsa())); }

Isa ParseIsa(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (name == IsaName(isa)) return isa;
  }
  Fail(ErrorCode::kInvalidArgument,
       "instruction set \"{}\" is unknown; it can be scalar, avx2, avxvnni, avx512, avx512bf16 or amx, on ARM neon or "
       "dotprod",
       name);
}

}  // namespace lesskv
