"""gptj_bench.long_prompts: which gaps between a stream's events count as beside a prompt."""

from __future__ import annotations

from itertools import accumulate

import pytest

from gptj_bench.long_prompts import summary


def test_gaps_during_a_prompt_are_told_from_quiet_ones() -> None:
    gaps = [5.0, *[0.1] * 10, 0.4, 0.6, *[0.1] * 9]  # the first ends its own prefill
    arrived = [list(accumulate(gaps, initial=0.0))[1:]]
    begin = 5.0 + 10 * 0.1
    found = summary(arrived, [(begin + 0.3, begin + 0.9)])
    assert found["quiet_p50_ms"] == pytest.approx(100.0)
    assert found["quiet_p99_ms"] == pytest.approx(100.0)
    assert found["beside_p99_ms"] == found["beside_max_ms"] == pytest.approx(600.0)
    assert found["beside_p99 / quiet_p50"] == pytest.approx(6.0)


def test_a_gap_that_only_begins_or_ends_in_a_prompt_counts() -> None:
    arrived = [[0.0, 1.0, 2.0, 3.0, 4.0]]
    found = summary(arrived, [(2.5, 3.2)])
    assert found["quiet_p50_ms"] == 1000.0
    arrived = [[0.0, 1.0, 2.0, 3.5, 4.7]]
    found = summary(arrived, [(3.0, 4.0)])
    assert (found["quiet_p50_ms"], found["beside_max_ms"]) == (1000.0, 1500.0)
