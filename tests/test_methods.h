// Methods that exist to test what the cache offers to methods: a store of its own layout, wrapped codecs, budgets that
// are decided late, rows that are merged. Registered once by seams_test.cpp.
#pragma once

namespace lesskv::testing_support {

// Registers `sample` (example_method.h), the codecs `plain` and `plain(rotated=true)`, the wrapper `scaled`, the
// budgeters `by_vote` (a layer at a time) and `by_need` (the whole model), and the residuals `average` and
// `fails`.
void RegisterTestMethods();

}  // namespace lesskv::testing_support
