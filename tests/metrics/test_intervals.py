"""Intervals over requests: that they hold what they say, and how often; and what of them goes to other processes."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.metrics.intervals import (
    Comparison,
    Estimate,
    bootstrap,
    compare,
    figures_from_json,
    figures_to_json,
    interval,
)

NAN = math.nan


def scores_at(means: torch.Tensor, n: int = 20) -> list[torch.Tensor]:
    """A request for each mean, whose n positions all score it."""
    return [torch.full((n,), float(mean)) for mean in means]


def of_draft(alpha: float, count: int = 10, seed: int = 0) -> list[torch.Tensor]:
    """A draft of that α, on requests of 10 positions and more."""
    random = torch.Generator().manual_seed(seed)
    return [(torch.rand(10 + i, generator=random) < alpha).float() for i in range(count)]


def test_a_comparison_is_over_positions_that_have_a_target():
    before = [torch.tensor([1.0, 0.0, NAN, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([NAN]), torch.tensor([])]
    after = [torch.tensor([1.0, 1.0, NAN, 1.0]), torch.tensor([0.0, 0.5]), torch.tensor([NAN]), torch.tensor([])]
    found = compare(before, after)
    assert found.requests == 2
    assert (found.before, found.after, found.difference) == pytest.approx((2 / 5, 3.5 / 5, 1.5 / 5))
    # Resampled, the gain is that of the first request alone, of the second, or of both.
    assert (found.low, found.high) == pytest.approx((0.5 / 2, 1 / 3))
    back = compare(after, before)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_long_requests_weigh_more_and_so_they_do_when_resampled():
    """Two requests: a long one that gains nothing, and a short one that gains all. Half of the resamples have both; a quarter each has one."""
    before, after = [torch.zeros(30), torch.zeros(2)], [torch.zeros(30), torch.ones(2)]
    found = compare(before, after, level=0.4)
    assert (found.difference, found.low, found.high) == (2 / 32, 2 / 32, 2 / 32)


def test_pairing_finds_a_gain_far_smaller_than_requests_differ():
    """α between .2 and .9, and .02 more on each request: paired, the interval holds that alone. The same scores in another order have the
    same α, and say nothing."""
    random = torch.Generator().manual_seed(0)
    means = 0.2 + 0.7 * torch.rand(40, generator=random)
    gains = 0.02 + 0.01 * torch.randn(40, generator=random)
    paired = compare(scores_at(means), scores_at(means + gains))
    assert 0 < paired.low < paired.difference < paired.high < 0.04
    order = torch.randperm(40, generator=random)
    shuffled = compare(scores_at(means), scores_at((means + gains)[order]))
    assert shuffled.difference == pytest.approx(paired.difference)
    assert shuffled.low < -0.02 < 0.06 < shuffled.high
    same = compare(scores_at(means), scores_at(means))
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 samples of 40 requests of unequal lengths, gains of +.03 on average: of 90% intervals 180 ± 4 should hold it; percentile
    intervals of 40 are a little narrow."""
    random, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        lengths = torch.randint(5, 30, (40,), generator=random).tolist()
        gains = 0.03 + 0.1 * torch.randn(40, generator=random)
        before = [torch.full((n,), 0.5) for n in lengths]
        after = [one + gain for one, gain in zip(before, gains, strict=True)]
        found = compare(before, after, seed=seed)
        held += found.low <= 0.03 <= found.high
    assert 164 <= held <= 192


def test_a_wider_level_is_a_wider_interval_and_a_seed_repeats_it():
    random = torch.Generator().manual_seed(0)
    before, after = (scores_at(torch.rand(20, generator=random)) for _ in range(2))
    assert compare(before, after) == compare(before, after) != compare(before, after, seed=1)
    narrow, wide = compare(before, after, level=0.5), compare(before, after, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    for level in (0, 1, 90):
        with pytest.raises(ValueError, match=f"`level` is {level}; give"):
            compare(before, after, level=level)


def test_fewer_than_two_requests_say_nothing_of_the_spread():
    one = compare([torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 1.0])])
    assert (one.requests, one.difference, one.low, one.high) == (1, 0.5, -math.inf, math.inf)
    for none in ([], [torch.tensor([NAN])]):
        nothing = compare(none, none)
        assert (nothing.requests, nothing.before, nothing.after, nothing.difference) == (0, 0.0, 0.0, 0.0)
        assert (nothing.low, nothing.high) == (-math.inf, math.inf)


def test_a_draft_that_diverged_does_not_pass_by_saying_nan():
    fine, broken = scores_at(torch.tensor([0.5, 0.7])), [torch.full((20,), NAN)] * 2
    found = compare(fine, broken)
    assert (found.after, found.requests) == (0.0, 2)
    assert found.high == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([[1.0, 0.0]], [[1.0]]),
        ([[1.0]], [[1.0], [0.0]]),
        ([[NAN, 1.0]], [[1.0, NAN]]),
    ],
)
def test_scores_of_other_positions_are_refused(before, after):
    with pytest.raises(ValueError, match="score the same requests"):
        compare(*([torch.tensor(one) for one in scores] for scores in (before, after)))


def test_the_interval_of_one_drafts_alpha():
    random = torch.Generator().manual_seed(0)
    scores = [(torch.rand(n, generator=random) < 0.7).float() for n in range(10, 60)]
    alpha, low, high = interval([*scores, torch.tensor([NAN])])
    assert alpha == pytest.approx(float(torch.cat(scores).mean()))
    # 1725 positions, independent here: the standard error is .011.
    assert alpha - 0.04 < low < alpha - 0.01
    assert alpha + 0.01 < high < alpha + 0.04
    assert interval(scores[:1]) == (pytest.approx(float(scores[0].mean())), 0.0, 1.0)
    alpha, low, high = interval([])
    assert math.isnan(alpha)
    assert (low, high) == (0.0, 1.0)


def test_draws_leave_those_of_others_alone():
    state = torch.get_rng_state()
    compare(of_draft(0.5), of_draft(0.5, seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    seed=st.integers(0, 99),
)
def test_the_mean_is_of_all_numbers_and_lies_where_its_requests_do(lengths, seed):
    random = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n, generator=random) for n in lengths]
    requests, mean, low, high = bootstrap([*scores, torch.full((2,), NAN)], 0.95, seed)
    some = [one for one in scores if len(one)]
    assert requests == len(some)
    assert mean == pytest.approx(float(torch.cat([*some, torch.zeros(0)]).mean()) if some else 0.0, abs=1e-6)
    if requests > 1:
        means = [float(one.double().mean()) for one in some]
        assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9
    else:
        assert (low, high) == (-math.inf, math.inf)


def test_an_estimate_is_of_what_served_and_says_what_that_gained():
    static, served = of_draft(0.5), of_draft(0.8, seed=1)
    estimate = Estimate.from_scores(static, served)
    assert (estimate.alpha, estimate.low, estimate.high) == interval(served)
    assert estimate.gain == compare(static, served)
    assert estimate.requests == 10
    assert estimate.gain.after == pytest.approx(estimate.alpha)
    assert estimate.gain.difference > 0.1


def test_an_estimate_says_it_in_a_line():
    gain = Comparison(64, 0.25, 0.5, 0.25, 0.2, 0.3)
    assert (
        str(Estimate(0.5, 0.4444, 0.5556, 64, gain))
        == "alpha 0.500 (0.444 to 0.556) on the last 64; 0.250 without learning"
    )


def test_figures_come_back_from_json_as_they_went():
    estimate = Estimate.from_scores(of_draft(0.5), of_draft(0.8, seed=1))
    for figures in ({"updates": 3, "estimate": estimate}, {"updates": 0, "estimate": None}):
        sent = json.dumps(figures_to_json(figures), allow_nan=False)
        assert figures_from_json(json.loads(sent)) == figures
    assert Estimate.from_dict(estimate.to_dict()) == estimate
