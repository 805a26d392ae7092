"""`Stats`: each figure by its definition, the rolling window, and what a user sees printed."""

import math

import pytest

from hf_osd.metrics.intervals import Comparison, Estimate
from hf_osd.metrics.stats import ROLLING, CallStats, Stats


def call(alpha: float = 0.5, tokens: int = 6) -> CallStats:
    stats = CallStats(requests=1, overlap_sum=10 * alpha, overlap_count=10)
    stats.observe_round(drafted=5, tested=3, accepted=2, new_tokens=tokens // 2)
    stats.observe_round(drafted=2, tested=2, accepted=2, new_tokens=tokens - tokens // 2)
    return stats


def test_figures_are_what_their_names_say():
    stats = call(alpha=0.7, tokens=6)
    assert stats.alpha == pytest.approx(0.7), "over every position, drafted or not"
    assert stats.alpha_live == pytest.approx(4 / 5), "accepted / tested, not accepted / drafted"
    assert stats.tokens_per_round == pytest.approx(3.0), "bonus tokens count"
    assert (stats.rounds, stats.drafted, stats.tested, stats.accepted, stats.new_tokens) == (2, 7, 5, 4, 6)


def test_acceptance_by_position_counts_tested_positions_alone():
    # Round 1: accepted, accepted, rejected. Round 2: accepted, accepted.
    assert call().to_dict()["acceptance_by_position"] == [1.0, 1.0, 0.0]


def test_figures_of_nothing_are_nan():
    empty = CallStats()
    assert all(math.isnan(value) for value in (empty.alpha, empty.alpha_live, empty.tokens_per_round))


def test_a_sum_of_calls_weighs_by_positions():
    long, short = CallStats(overlap_sum=90.0, overlap_count=90), CallStats(overlap_sum=0.0, overlap_count=10)
    total = CallStats()
    for part in (long, short):
        total.add(part)
    assert total.alpha == pytest.approx(0.9), "not the mean of two means"


def test_a_sum_adds_every_count():
    total = CallStats()
    for _ in range(2):
        total.add(call())
    assert (total.requests, total.rounds, total.new_tokens) == (2, 4, 12)
    assert total.tested_by_position == {0: 4, 1: 4, 2: 2}
    assert total.accepted_by_position == {0: 4, 1: 4, 2: 0}


def test_the_rolling_window_is_the_last_50_calls():
    stats = Stats()
    for _ in range(30):
        stats.observe_call(call(alpha=0.0))
    for _ in range(ROLLING):
        stats.observe_call(call(alpha=1.0))
    assert ROLLING == 50
    assert stats.rolling.requests == 50
    assert stats.rolling.alpha == pytest.approx(1.0)
    assert stats.total.requests == 80
    assert stats.total.alpha == pytest.approx(50 / 80)


def test_the_last_call_is_the_last():
    stats = Stats()
    stats.observe_call(call(alpha=0.1))
    stats.observe_call(call(alpha=0.9))
    assert stats.last.alpha == pytest.approx(0.9)
    assert stats.last.requests == 1
    assert stats.recent[0].alpha == pytest.approx(0.1), "summing up leaves each call as it was"


def estimate() -> Estimate:
    return Estimate(0.61, 0.5, 0.7, 9, Comparison(9, 0.42, 0.61, 0.19, 0.1, 0.3))


def test_to_dict_holds_counts_and_the_three_views():
    stats = Stats(updates=3, buffer_bytes=10)
    stats.observe_call(call(alpha=0.5))
    values = stats.to_dict()
    assert (values["updates"], values["buffer_bytes"]) == (3, 10)
    for view in ("last", "rolling", "total"):
        assert values[view]["alpha"] == pytest.approx(0.5)
        assert values[view]["accepted"] == 4
    assert "recent" not in values
    assert not any("alpha" in name for name in values)
    stats.estimate = estimate()
    values = stats.to_dict()
    assert (values["alpha_prequential"], values["alpha_static"]) == (0.61, 0.42)
    assert (values["alpha_prequential_low"], values["alpha_prequential_high"]) == (0.5, 0.7)


def test_printing_shows_the_figures():
    stats = Stats(
        updates=4,
        failed_updates=1,
        rejected_updates=2,
        accepted_updates=3,
        regret_vs_static=-0.0321,
        learned_tokens=321,
        buffer_requests=7,
        buffer_capacity=64 * 2**20,
    )
    stats.observe_call(call(alpha=0.1))
    stats.observe_call(call(alpha=0.9))
    lines = {line.split("  ")[0].strip(): line.split() for line in str(stats).splitlines()}
    assert lines["alpha"][1:] == ["0.900", "0.500", "0.500"]
    assert lines["alpha_live"][1:] == ["0.800"] * 3
    assert lines["tokens a round"][3:] == ["3.000"] * 3
    assert "4 updates (1 failed), candidates 3 accepted and 2 dropped, 321 tokens" in str(stats)
    assert "before it was learnt: -; regret_vs_static -0.0321" in str(stats)
    stats.estimate = estimate()
    assert "before it was learnt: alpha 0.610 (0.500 to 0.700) on the last 9; 0.420 without learning" in str(stats)
    assert "7 requests, 0.0 of 64 MiB" in str(stats)


def test_printing_before_the_first_call_shows_no_nan():
    stats = Stats()
    assert "nan" not in str(stats).lower()
    stats.observe_call(CallStats(requests=1, rounds=3, new_tokens=3))  # a call that drafted nothing
    assert "nan" not in str(stats).lower()
