#!/usr/bin/env python3
"""What counts as a difference.   python -m unittest test_digests   (in this folder)"""
import unittest

from digests import compare, digest


class CompareTest(unittest.TestCase):
  def check(self, old, new, n_differences, n_remarks):
    differences, remarks = compare({"case": old}, {"case": new})
    self.assertEqual((len(differences), len(remarks)), (n_differences, n_remarks), (differences, remarks))
    return differences + remarks

  def test_equal_answers_are_equal(self):
    self.check([{"text": "a", "kv_bytes": 5}], [{"text": "a", "kv_bytes": 5}], 0, 0)

  def test_the_last_digit_differs(self):
    line, = self.check([{"perplexity": 35.56315371236885}], [{"perplexity": 35.56315371236886}], 1, 0)
    self.assertEqual(line, "case, perplexity: 35.56315371236885, now 35.56315371236886")

  def test_bytes_may_fall_but_not_rise(self):
    self.check({"kv_bytes_peak": 10}, {"kv_bytes_peak": 9}, 0, 1)
    self.check({"kv_bytes_peak": 10}, {"kv_bytes_peak": 11}, 1, 0)
    self.check({"kv_bytes_full": 10}, {"kv_bytes_full": 9}, 1, 0)

  def test_refusals_are_answers(self):
    self.check({"text": "a"}, {"refused": "no", "status": 2}, 2, 1)
    self.check({"refused": "no", "status": 2}, {"refused": "never", "status": 2}, 1, 0)
    self.check({"refused": "no", "status": 2}, {"text": "a"}, 0, 1)
    self.check({"refused": "no", "status": 2}, {"refused": "no", "status": -6}, 1, 0)

  def test_cases_and_fields_that_come_and_go(self):
    self.check([{"a": 1}], [{"a": 1, "b": 2}], 0, 1)
    self.check([{"a": 1, "b": 2}], [{"a": 1}], 1, 0)
    self.check([{"a": 1}], [{"a": 1}, {"a": 1}], 1, 0)
    self.assertEqual(len(compare({"a": 1}, {})[0]), 1)
    self.assertEqual(len(compare({}, {"a": 1})[1]), 1)

  def test_times_and_versions_are_left_out(self):
    self.assertEqual(digest([{"decode_seconds": 1.5, "version": "2", "prefill_tokens_per_second": 3, "text": "a"}]),
                     [{"text": "a"}])


if __name__ == "__main__":
  unittest.main()
