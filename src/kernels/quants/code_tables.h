// The fixed tables that four-bit codes of some formats stand for. Data only: the translation units of every instruction
// set include it.
#pragma once

#include <cstdint>

namespace lesskv {

// IQ4_NL and IQ4_XS: steps that widen away from zero, as weights do. The format's own numbers: kvalues_iq4nl in
// https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h.
inline constexpr int8_t kIq4Codes[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// MXFP4: twice the values of E2M1 (sign, two exponent bits, one fraction bit), so that all are whole. OCP Microscaling
// Formats (MX) Specification 1.0, section 5.3.3. Code 8 is minus zero.
inline constexpr int8_t kMxfp4Codes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

}  // namespace lesskv
