// The composition language: canonical forms by hand, and sentences for what cannot be.
#include "kvcache/registry.h"
#include "kvcache/spec.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/rng.h"

namespace lesskv {
namespace {

TEST(Spec, CanonicalForms) {
  for (const auto& [text, canonical] : std::initializer_list<std::pair<const char*, const char*>>{
           {"full", "full"},
           {"f32", "full+f32"},
           {"f16", "full"},
           {"full+f16+uniform+all", nullptr},
           {" h2o( 5% ) + less ", "h2o(5%)+less"},
           {"less+h2o(5%)", "h2o(5%)+less"},
           {"prefill(chunk=512)+bf16+less+pyramid+h2o(5%)", "h2o(5%)+pyramid+less+bf16+prefill(chunk=512)"},
           {"h2o(rows=5%)", "h2o(5%)"},
           {"h2o(5.0%, extra=0)", "h2o(5%)"},
           {"h2o(5%, extra=4)", "h2o(5%, extra=4)"},
           {"h2o(recent=2.5%,heavy=2.5%)", "h2o(heavy=2.5%, recent=2.5%)"},
           {"h2o(0.5%)", "h2o(0.5%)"},
           {"window(256, positions=true, sinks=4)", "window(256)"},
           {"window(sinks=2, rows=8, positions=cache)", nullptr},
           {"h2o(5%)+pyramid(20)", "h2o(5%)+pyramid"},
           {"snapkv(1024, pool=max, kernel=7)", "snapkv(1024)"},
           {"mix(k=f32, v=bf16)", "full+mix(k=f32, v=bf16)"},
           {"h2o(5%)+less(file=\"a,b.gguf\")", "h2o(5%)+less(file=\"a,b.gguf\")"},
           {"h2o(5%)+less(file=\"a)+b\")", "h2o(5%)+less(file=\"a)+b\")"}}) {
    SCOPED_TRACE(text);
    try {
      const std::string printed = CacheSpec::Parse(text).ToString();
      EXPECT_EQ(printed, canonical == nullptr ? printed : canonical);
      EXPECT_EQ(CacheSpec::Parse(printed).ToString(), printed);
    } catch (const Error& error) {
      EXPECT_EQ(canonical, nullptr) << error.what();
    }
  }
}

TEST(Spec, Refusals) {
  for (const auto& [text, word] :
       std::initializer_list<std::pair<const char*, const char*>>{{"", "name"},
                                                                  {"+", "name"},
                                                                  {"full+", "name"},
                                                                  {"full full", "'+'"},
                                                                  {"h2o", "rows"},
                                                                  {"h2o()", "rows"},
                                                                  {"h2o(", "value"},
                                                                  {"h2o(5%", "')'"},
                                                                  {"h2o(5%))", "'+'"},
                                                                  {"h2o(5%,)", "value"},
                                                                  {"h2o(0)", "rows"},
                                                                  {"h2o(0%)", "rows"},
                                                                  {"h2o(101%)", "rows"},
                                                                  {"h2o(-3)", "rows"},
                                                                  {"h2o(2.5)", "rows"},
                                                                  {"h2o(nan%)", "rows"},
                                                                  {"h2o(1e3)", "rows"},
                                                                  {"h2o(5%%)", "rows"},
                                                                  {"h2o(\"5%\")", "rows"},
                                                                  {"h2o(5%, 6%)", "name"},
                                                                  {"h2o(5%, rows=6%)", "twice"},
                                                                  {"h2o(5%, heavy=3)", "not both"},
                                                                  {"h2o(heavy=3)", "h2o needs"},
                                                                  {"h2o(5%, colour=red)", "colour"},
                                                                  {"full(3)", "value"},
                                                                  {"window(256, positions=maybe)", "positions"},
                                                                  {"snapkv(1024, kernel=4)", "odd"},
                                                                  {"elastic(0.5, merge=off, weighted=true)", "nothing to do"},
                                                                  {"elastic(0.5, merge=off, keys=unrotated)+recent", "nothing to do"},
                                                                  {"less(file=\"x)", "\""},
                                                                  {"frob(3)", "frob"},
                                                                  {"f16+f32", "same question"},
                                                                  {"h2o(5%)+h2o(5%)", "same question"},
                                                                  {"h2o(5%)+tova(5%)", "same question"},
                                                                  {"less", "nothing to do"},
                                                                  {"full+less", "nothing to do"},
                                                                  {"pyramid", "nothing to do"},
                                                                  {"window(256, positions=cache)+less", "positions"},
                                                                  {"prefill", "chunk"},
                                                                  {"prefill(chunk=0)", "chunk"}}) {
    try {
      CacheSpec::Parse(text);
      ADD_FAILURE() << "'" << text << "' was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << text;
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << text << ": " << error.what();
    }
  }
}

// Numbers are written without exponents, which a spec does not read: what was printed parses to the same spec.
TEST(Spec, SmallNumbersReadBack) {
  for (const char* text : {"h2o(0.00001%)", "h2o(0.000000123%)", "window(12345678.5%)", "h2o(1e9%)"}) {
    CacheSpec spec;
    try {
      spec = CacheSpec::Parse(text);
    } catch (const Error&) {
      continue;  // above 100 %
    }
    EXPECT_EQ(CacheSpec::Parse(spec.ToString()).ToString(), spec.ToString()) << text;
    EXPECT_EQ(spec.ToString().find('e'), std::string::npos) << spec.ToString();
  }
  EXPECT_EQ(CacheSpec::Parse("h2o(0.00001%)").ToString(), "h2o(0.00001%)");
}

// Specs are taken apart and changed as specs, not as text.
TEST(Spec, WithoutATermAndWithMoreRows) {
  const CacheSpec spec = CacheSpec::Parse("h2o(5%, extra=3)+less+q8");
  EXPECT_EQ(spec.Without(Stage::kResidual).ToString(), "h2o(5%, extra=3)+q8");
  EXPECT_EQ(spec.WithExtraRows(4).ToString(), "h2o(5%, extra=7)+less+q8");
  EXPECT_EQ(CacheSpec::Parse("tova(9)").WithExtraRows(2).ToString(), "tova(9, extra=2)");
  EXPECT_THROW(CacheSpec::Parse("full").WithExtraRows(1), Error);
  EXPECT_THROW(spec.Without(Stage::kSelect), Error);  // what is left needs a selector that evicts
}

// A trained artefact is named by its fingerprint, never by a path.
TEST(Spec, FingerprintInPlaceOfThePath) {
  const CacheSpec spec = CacheSpec::Parse("h2o(5%)+less(file=\"/maps/k.gguf\")+f32");
  const std::vector<Artefact> artefacts = {{"less", "0123456789abcdef"}};
  EXPECT_EQ(spec.ToString(artefacts), "h2o(5%)+less(sidecar=\"0123456789abcdef\")+f32");
  EXPECT_NO_THROW(CacheSpec::Parse(spec.ToString(artefacts)));
}

// Nothing but Error comes out of the parser, and what it takes it prints and takes again.
TEST(Spec, RandomTextsAreRefusedOrStable) {
  const char* pieces[] = {"h2o",   "less",    "window", "full", "mix", "f32",  "(",    ")",    "+",
                          ",",     "=",       "5%",     "16",   "\"",  " ",    "k",    "rows", "sinks",
                          "chunk", "prefill", ".",      "-",    "%",   "\x01", "\xff", "1e9",  "999999999999"};
  Rng rng(1);
  size_t taken = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (size_t n = 1 + rng.Below(9); n > 0; --n) text += pieces[rng.Below(std::size(pieces))];
    try {
      const std::string printed = CacheSpec::Parse(text).ToString();
      EXPECT_EQ(CacheSpec::Parse(printed).ToString(), printed) << text;
      ++taken;
    } catch (const Error&) {
    }
  }
  EXPECT_GT(taken, 10u);
}

}  // namespace
}  // namespace lesskv
