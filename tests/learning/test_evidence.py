"""`Evidence`: against the integral that it stands for, and on thousands of streams of requests: how often it errs, and how soon it finds what there is."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.evidence import _SKEW, BLOCK, Evidence, gathered

NAN = math.nan
ODDS = 20.0
STREAMS, REQUESTS, LENGTH = 1000, 100, 45

finite = st.floats(-50, 50)
squares = st.floats(0, 500)


def toss(better: float, worse: float, run: int = 1, requests: int = REQUESTS, seed: int = 0) -> np.ndarray:
    """Streams of requests in which a share of the positions is better and another is worse, in runs of that length: `(streams, requests, positions)`."""
    draws = np.random.default_rng(seed).random((STREAMS, requests, LENGTH + run - 1), dtype=np.float32)
    ups, downs = draws < better / run, (draws >= better / run) & (draws < (better + worse) / run)
    starts = ups.astype(np.int8) - downs.astype(np.int8)
    return sum(starts[..., i : i + LENGTH] for i in range(run)).clip(-1, 1)


def sums_of(gains: np.ndarray) -> np.ndarray:
    """The five sums after each request of each stream, as `Evidence.of` would take them: `(streams, requests, 5)`."""
    starts = np.arange(0, gains.shape[-1], BLOCK)
    d = np.add.reduceat(gains, starts, axis=-1, dtype=np.float64)
    n = np.broadcast_to(np.diff([*starts, gains.shape[-1]]), d.shape)
    return np.stack([one.sum(-1).cumsum(-1) for one in (n, d, d * d, d * n, n * n)], -1)


def share_that_finds(gains: np.ndarray, of: str = "better", than: float = 0.0) -> float:
    """The share of streams in which the evidence is at `ODDS` after some request; one looks after each."""
    sums = sums_of(gains)
    n, d, dd, dn, nn = np.moveaxis(sums, -1, 0)
    total = (d - than * n) * (1 if of == "better" else -1)
    # No λ makes more of a sum than exp(total²/(2·squares)): where that is too little there is no need to look.
    may = (total > 0) & (total**2 >= 2 * math.log(ODDS) * (dd - 2 * than * dn + than**2 * nn) - 1e-6)
    found = [
        any(getattr(Evidence(*look), of)(than) >= ODDS for look in stream[looks].tolist())
        for stream, looks in zip(sums, may, strict=True)
    ]
    return sum(found) / len(found)


def integral(total: float, squares: float) -> float:
    """The mean of exp(λ·total - λ²·squares/2) over |λ| of three normal distributions, by the trapezoid rule."""
    z = np.linspace(0, 12, 20001)
    density = 2 * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(
        np.mean(
            [np.trapezoid(density * np.exp(s * z * total - (s * z) ** 2 * squares / 2), z) for s in (0.05, 0.2, 0.8)]
        )
    )


def scores(*alphas: float, n: int = LENGTH) -> list[torch.Tensor]:
    return [torch.full((n,), alpha) for alpha in alphas]


@given(total=st.floats(-12, 12), squares=squares)
def test_it_is_the_integral_it_says_it_is(total, squares):
    evidence = Evidence(positions=100, difference=total, squares=squares)
    squares = max(squares, 0.0)
    # The grid ends at 12 standard deviations: with a total and hardly a square most of the mass would lie beyond it.
    if total * 0.8 / (1 + 0.64 * squares) < 6:
        assert evidence.better() == pytest.approx(integral(total, squares), rel=1e-4)


def test_nothing_seen_is_no_evidence():
    assert (Evidence().better(), Evidence().worse(), Evidence().mean) == (1.0, 1.0, 0.0)
    assert Evidence.of([], []) == Evidence.of([torch.tensor([])], [torch.tensor([])]) == Evidence()


@given(low=finite, high=finite, squares=squares)
def test_it_rises_with_the_difference(low, high, squares):
    low, high = sorted((low, high))
    less, more = (Evidence(100, d, squares) for d in (low, high))
    assert less.better() <= more.better() * (1 + 1e-9)
    assert less.worse() * (1 + 1e-9) >= more.worse()


@given(difference=finite, few=squares, many=squares)
def test_it_falls_with_what_the_drafts_differ_by_otherwise(difference, few, many):
    few, many = sorted((few, many))
    assert Evidence(100, difference, few).better() * (1 + 1e-9) >= Evidence(100, difference, many).better()


@given(difference=finite, squares=squares, than=st.sampled_from([-0.05, -0.01, 0.0, 0.02]))
def test_what_speaks_for_one_draft_speaks_against_the_other(difference, squares, than):
    mixed, sizes = 16 * difference, 1600.0
    one = Evidence(100, difference, squares, mixed, sizes)
    other = Evidence(100, -difference, squares, -mixed, sizes)
    assert one.better(than) == pytest.approx(other.worse(-than))
    # Against all λ > 0 there is only ever one of the two that gains.
    assert min(one.better(than), one.worse(than)) <= 1.0


@pytest.mark.parametrize("of", ["better", "worse"])
@pytest.mark.parametrize("run", [1, 3, BLOCK])
def test_of_two_equal_drafts_neither_is_found_better_however_often_one_looks(of, run):
    """A test at 5% that is made after each request finds something in a third of them."""
    equal = toss(0.04, 0.04, run)
    assert share_that_finds(equal, of) <= 0.05
    _, d, dd, _, _ = np.moveaxis(sums_of(equal)[:, 9:], -1, 0)
    assert (abs(d) > 1.96 * np.sqrt(dd)).any(1).mean() > 0.25


@pytest.mark.parametrize("of", ["better", "worse"])
def test_nor_where_requests_are_of_very_different_difficulty(of):
    """On some they say the same, on others something else at half of the positions."""
    random = np.random.default_rng(0)
    differ = random.beta(0.5, 2, (STREAMS, REQUESTS, 1))
    draws = random.random((STREAMS, REQUESTS, LENGTH))
    gains = (draws < differ / 2).astype(np.int8) - ((draws >= differ / 2) & (draws < differ)).astype(np.int8)
    assert share_that_finds(gains, of) <= 0.05


@pytest.mark.parametrize(("better", "worse"), [(0.04, 0.05), (0.01, 0.02)])
@pytest.mark.parametrize("run", [1, 3])
def test_a_draft_that_is_worse_by_just_the_tolerance_is_hardly_ever_found_to_be_within_it(better, worse, run):
    gains = toss(better, worse, run)
    assert share_that_finds(gains, than=-0.01) <= 0.05
    assert share_that_finds(gains, than=-0.05) > 0.9


def test_a_gain_of_two_hundredths_is_found_within_a_hundred_requests():
    """Of 45 tokens, of which 5% are gained and 3% lost: z is 3.8 after 64, where the best λ, which nobody knows, would find .93 of them."""
    gains = toss(0.05, 0.03)
    assert share_that_finds(gains[:, :64]) >= 0.8
    assert share_that_finds(gains[:, :80]) >= 0.9
    assert share_that_finds(gains[:, :64], "worse") <= 0.01


def test_the_streams_above_are_summed_as_requests_are():
    gains = toss(0.2, 0.2)[0, :5]
    first, second = ([torch.from_numpy((sign * one).clip(0)).float() for one in gains] for sign in (1, -1))
    for count in range(1, 6):
        expected = Evidence.of(first[:count], second[:count]).values()
        assert sums_of(gains[None])[0, count - 1].tolist() == pytest.approx(expected)


@given(
    lengths=st.lists(st.integers(0, 40), max_size=8),
    cut=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_the_sums_of_parts_are_those_of_the_whole(lengths, cut, seed):
    random = torch.Generator().manual_seed(seed)
    first, second = ([torch.rand(n, generator=random) for n in lengths] for _ in range(2))
    parts = Evidence.of(first[:cut], second[:cut]) + Evidence.of(first[cut:], second[cut:])
    whole = Evidence.of(first, second)
    assert parts.values() == pytest.approx(whole.values())
    assert whole.positions == sum(lengths)
    assert whole.difference == pytest.approx(
        float(torch.cat([*first, torch.zeros(0)]).sum()) - sum(map(float, map(torch.sum, second))), abs=1e-4
    )
    assert Evidence() + whole == whole


def test_a_block_is_sixteen_positions_of_one_request():
    """Two requests of 20: blocks of 16, 4, 16 and 4, never of positions of both."""
    evidence = Evidence.of(scores(1.0, 1.0, n=20), scores(0.5, 0.5, n=20))
    assert evidence == Evidence(40, 20.0, 2 * (8**2 + 2**2), 2 * (8 * 16 + 2 * 4), 2 * (16**2 + 4**2))
    assert evidence.mean == 0.5
    alternating = torch.tensor([1.0, 0.0] * 8)
    assert Evidence.of([alternating], [1 - alternating]).squares == 0.0, (
        "what cancels out within a block does not count"
    )


def test_a_nan_of_one_draft_alone_is_a_token_that_is_not_accepted():
    fine, broken = scores(0.5), scores(NAN)
    assert Evidence.of(broken, fine) == Evidence.of(scores(0.0), fine)
    assert Evidence.of(fine, broken) == Evidence.of(fine, scores(0.0))
    assert Evidence.of(broken * 8, fine * 8).worse() > ODDS


def test_where_both_say_nan_there_is_no_target_and_no_position():
    some = torch.tensor([1.0, NAN, 0.5, NAN, 0.25])
    other = torch.tensor([0.0, NAN, 0.5, NAN, 1.0])
    assert Evidence.of([some], [other]) == Evidence.of([some[::2]], [other[::2]])
    assert Evidence.of(scores(NAN), scores(NAN)) == Evidence()


@given(than=st.floats(-0.5, 0.5), seed=st.integers(0, 99))
def test_above_by_so_much_is_as_above_a_draft_that_is_better_by_that(than, seed):
    random = torch.Generator().manual_seed(seed)
    first, second = ([torch.rand(n, generator=random, dtype=torch.double) for n in (5, 45, 16, 30)] for _ in range(2))
    evidence = Evidence.of(first, second)
    shifted = Evidence.of(first, [one + than for one in second])
    shifted = replace(shifted, squares=shifted.squares + (_SKEW if than else 0.0))
    assert evidence.better(than) == pytest.approx(shifted.better())
    assert evidence.worse(than) == pytest.approx(shifted.worse())


def test_unknown_positions_do_not_fill_a_block():
    """16 known ones among unknown ones are one block, not two."""
    known = torch.arange(2 * BLOCK) % 2 == 0
    one = torch.where(known, 1.0, NAN)
    assert Evidence.of([one], [one - 1]).squares == BLOCK**2


@given(
    difference=st.floats(-1e9, 1e9),
    squares=st.floats(0, 1e12),
    than=st.floats(-1, 1),
    n=st.floats(0, 1e9),
)
def test_no_sums_are_too_large_or_too_odd_for_it(difference, squares, than, n):
    evidence = Evidence(n, difference, squares, difference * 16, n * 16)
    for value in (evidence.better(than), evidence.worse(than)):
        assert math.isfinite(value)
        assert value >= 0.0


def test_sure_things_are_finite_and_sure():
    for one, other in ((1.0, 0.0), (0.0, 1.0)):
        evidence = Evidence.of(scores(one) * 1000, scores(other) * 1000)
        best, least = max(evidence.better(), evidence.worse()), min(evidence.better(), evidence.worse())
        assert 1e100 < best < math.inf
        assert 0.0 <= least < 1e-2
        assert (evidence.better() > evidence.worse()) == (one > other)


def test_drafts_that_say_the_same_are_soon_known_to_be_within_the_tolerance_and_never_to_differ():
    evidence = Evidence.of(scores(0.5) * 24, scores(0.5) * 24)
    assert evidence.better() == evidence.worse() == 1.0
    assert evidence.better(-0.01) > ODDS
    assert Evidence.of(scores(0.5) * 4, scores(0.5) * 4).better(-0.01) < ODDS


def test_what_ranks_have_summed_is_taken_apart_again():
    ranks = [
        [Evidence.of(scores(a), scores(b)), Evidence.of(scores(a, b), scores(b, a)), Evidence()]
        for a, b in ((0.5, 0.25), (0.75, 1.0))
    ]
    flat = [[value for one in own for value in one.values()] for own in ranks]
    sums = [sum(values) for values in zip(*flat, strict=True)]
    assert gathered(ranks[0], sums) == [one + other for one, other in zip(*ranks, strict=True)]
    assert gathered([], []) == []
