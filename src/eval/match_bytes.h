// --match-bytes: beside each cache, its nearest rivals at equal bytes.
#pragma once

#include <cstddef>

#include "eval/setup.h"

namespace lesskv {

// Adds `full` and, behind each subject, the rivals that it has to beat; a rival that is among the subjects already is
// not added twice. Bytes are CacheConfig::Plan's at the end of a prompt of n_prompt and n_decode further tokens, so
// they hold codes, scores and state, and a rival gets as many rows as fit into them.
//
//   SELECTOR+less   SELECTOR alone ("bare selector"); SELECTOR with rank / 2 extra rows ("rank/2 extra rows": the
//   paper's
//                   Baseline+, equal in numbers stored at equal precision); SELECTOR with as many extra rows as the
//                   state's real bytes buy ("equal bytes"), the rounding up of arenas never to its disadvantage
//   anything else   window and h2o in f16 with as many rows as its bytes buy ("equal bytes")
//
// The last two of +less are left out for a selector without the parameter `extra`. Throws Error for a subject whose bytes
// depend on the text.
void AddRivals(EvalSetup& setup, size_t n_prompt, size_t n_decode);

}  // namespace lesskv
