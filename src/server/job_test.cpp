#include "server/job.h"

#include <gtest/gtest.h>

namespace lesskv {
namespace {

// What came while the first token was waited for is not lost, and the newest picture is the one that counts.
TEST(JobStateTest, WhatCameEarlierStays) {
  const auto state = [](const std::string& text, std::optional<size_t> seen) {
    JobState made;
    ChoiceState& choice = made.choices.emplace_back();
    choice.new_text = text;
    choice.new_tokens.resize(text.size());
    CachePicture picture;
    picture.stats.tokens_seen = seen.value_or(0);
    if (seen) choice.picture = std::make_shared<const CachePicture>(picture);
    return made;
  };
  JobState all = state("a", 1);
  all.Append(state("bc", std::nullopt));
  EXPECT_EQ(all.choices[0].new_text, "abc");
  EXPECT_EQ(all.choices[0].new_tokens.size(), 3u);
  ASSERT_NE(all.choices[0].picture, nullptr);
  EXPECT_EQ(all.choices[0].picture->stats.tokens_seen, 1u);
  all.Append(state("", 3));
  EXPECT_EQ(all.choices[0].picture->stats.tokens_seen, 3u);
}

}  // namespace
}  // namespace lesskv
