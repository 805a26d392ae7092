"""`Rate`: which of several trials it goes on with, and what candidates make of it later."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.learning.evidence import BLOCK
from hf_osd.learning.rate import ADAPTER, WEIGHTS, Rate, Trial

N = 10 * BLOCK  # positions by which trials are judged
STEPS = ("lower", "higher")


def trial(rate: float, shared: float, passes: int = 1, noise: float = 0.0) -> Trial:
    """What a draft shares with the target, the same at each position but for noise that says its own at each."""
    random = torch.Generator().manual_seed(int(1e7 * rate) + passes)
    return Trial(rate, passes, (shared + noise * torch.randn(N, generator=random)).clamp(0, 1))


def chosen(static: float, *trials: Trial) -> Rate:
    """What a rate to be found is after these, in their order."""
    rate, before = Rate("auto", adapter=False), torch.full((N,), static)
    for one in trials:
        rate.prefers(one, before)
    rate.settle(len(trials), before)
    return rate


@pytest.mark.parametrize(("adapter", "ladder"), [(False, WEIGHTS), (True, ADAPTER)])
def test_what_is_to_be_found_is_tried_from_the_fastest_down(adapter, ladder):
    rate = Rate("auto", adapter)
    assert rate.ladder == ladder
    assert list(ladder) == sorted(ladder, reverse=True)
    assert (rate.value, rate.passes, rate.found) == (ladder[0], None, False)


def test_adapters_learn_at_slower_rates_from_those_that_there_are_to_try():
    assert ADAPTER[0] < WEIGHTS[0]


@pytest.mark.parametrize(
    ("shared", "best"),
    [((0.7, 0.8, 0.75), 2e-4), ((0.8, 0.7, 0.75), 1e-3), ((0.7, 0.75, 0.8), 4e-5), ((0.1, 0.05, 0.0), 1e-3)],
)
def test_a_good_draft_goes_on_with_what_did_best(shared, best):
    rate = chosen(0.7, *(trial(r, s, noise=0.02) for r, s in zip(WEIGHTS, shared, strict=True)))
    assert (rate.value, rate.passes, rate.found) == (best, 1, True)


@pytest.mark.parametrize(("static", "best"), [(0.05, 1e-3), (0.45, 1e-3), (0.55, 2e-4), (0.90, 2e-4)])
@pytest.mark.parametrize("better", [0.01, -0.01])
def test_of_those_that_chance_does_not_tell_apart_a_cold_draft_goes_on_with_the_fastest_and_a_good_one_with_the_slowest(
    static, best, better
):
    """The slower one is .01 better or worse on average; which of the two is, changes from block to block by more."""
    fast = trial(1e-3, 0.2)
    slow = Trial(2e-4, 1, fast.shared + better + torch.tensor([0.05, -0.05] * 5).repeat_interleave(BLOCK))
    assert chosen(static, fast, slow).value == best


@pytest.mark.parametrize("static", [0.55, 0.9])
def test_of_passes_that_chance_does_not_tell_apart_it_is_the_most_and_else_the_best(static):
    once = trial(1e-3, 0.2)
    shift = torch.tensor([0.05, -0.05] * 5).repeat_interleave(BLOCK)
    assert chosen(static, once, Trial(1e-3, 7, once.shared - 0.01 + shift)).passes == 7
    assert chosen(static, once, Trial(1e-3, 7, once.shared - 0.10 + shift)).passes == 1


@pytest.mark.parametrize(("fast", "best"), [(0.36, 1e-3), (0.31, 1e-3), (0.29, 2e-4), (0.05, 2e-4)])
def test_a_cold_draft_goes_on_with_a_slower_rate_where_the_fastest_has_spoilt_it(fast, best):
    """What it loses by overfitting a handful of requests, up to a quarter, it gets back from the next ones."""
    trials = [trial(1e-3, fast, noise=0.02), trial(2e-4, 0.40, noise=0.02), trial(4e-5, 0.41, noise=0.02)]
    rate = chosen(0.4, *trials)
    assert rate.value == best


def test_what_is_preferred_is_said_one_by_one():
    rate, before = Rate("auto", adapter=False), torch.full((N,), 0.5)
    found = [
        rate.prefers(trial(1e-3, shared, passes), before) for passes, shared in enumerate((0.4, 0.5, 0.48, 0.45, 0.6))
    ]
    assert found == [True, True, False, False, True]
    assert not rate.found
    rate.settle(5, before)
    assert (rate.value, rate.passes) == (1e-3, 4)


def test_the_first_trial_is_preferred_to_none_even_if_it_spoilt_the_draft():
    assert chosen(0.9, trial(1e-3, 0.0)).value == 1e-3
    assert chosen(0.0, trial(1e-3, 0.0)).value == 1e-3


@pytest.mark.parametrize(("static", "passes"), [(0.25, 7), (0.45, 7), (0.55, 3), (0.9, 3)])
def test_the_passes_are_those_of_the_best_but_a_draft_that_knows_little_makes_the_most(static, passes):
    """Few requests taught often overfit; later updates go over all that the buffer has."""
    tried = [trial(1e-3, static + gain, n) for n, gain in ((1, 0.0), (3, 0.09), (7, 0.03))]
    rate = chosen(static, *tried, trial(2e-4, static + 0.05, 7))
    assert (rate.value, rate.passes) == (1e-3, passes)


def test_the_reason_says_what_was_tried_and_from_where():
    reason = chosen(0.25, trial(1e-3, 0.5, 3), trial(2e-4, 0.4)).reason
    for part in ("best of 2", "1e-03 and 3 passes", "0.500", "from 0.250"):
        assert part in reason
    assert str(trial(2e-4, 0.4)) == "2e-04 and 1 pass: 0.400"


def test_the_best_of_as_many_passes_as_there_was_time_for_is_no_preference_for_few():
    def settled(most: int | None, *passes: int) -> int:
        rate, before = Rate("auto", adapter=False), torch.full((N,), 0.6)
        for n in passes:
            rate.prefers(trial(1e-3, 0.6 + 0.03 * n, n), before)
        rate.settle(len(passes), before, most)
        return rate.passes

    assert settled(1, 1) == 7
    assert settled(3, 1, 3) == 7
    assert settled(None, 1, 3) == 3
    rate, before = Rate("auto", adapter=False), torch.full((N,), 0.6)
    for n, shared in ((1, 0.7), (3, 0.4)):
        rate.prefers(trial(1e-3, shared, n, noise=0.02), before)
    rate.settle(2, before, 3)
    assert rate.passes == 1, "beyond chance"


@pytest.mark.parametrize(("static", "rates"), [(0.05, 1), (0.49, 1), (0.5, 3), (0.9, 3)])
def test_a_draft_that_knows_little_is_likely_to_try_one_rate(static, rates):
    assert Rate("auto", adapter=False).to_try(torch.full((N,), static)) == rates


def test_passes_double_with_each_gain_up_to_the_most_that_are_tried():
    rate = chosen(0.5, trial(1e-3, 0.6))
    passes = []
    for _ in range(4):
        rate.higher()
        passes.append(rate.passes)
    assert passes == [2, 4, 7, 7]
    given = Rate(3e-4, adapter=False)
    given.higher()
    assert given.passes is None


def test_what_was_dropped_halves_the_rate_and_what_was_better_raises_it_again_but_not_to_where_it_was_dropped():
    rate = chosen(0.5, trial(1e-3, 0.6))
    rate.lower()
    assert rate.value == pytest.approx(5e-4)
    assert "1.0e-03" in rate.reason
    values = []
    for _ in range(9):
        rate.higher()
        values.append(rate.value)
    assert values == sorted(values)
    assert values[0] == pytest.approx(6.25e-4)
    assert values[-1] == pytest.approx(8e-4)


def test_a_rate_that_nothing_was_dropped_at_rises_to_the_fastest_that_is_tried():
    rate = chosen(0.5, trial(4e-5, 0.6))
    for _ in range(30):
        rate.higher()
    assert rate.value == WEIGHTS[0]


def test_a_rise_that_is_none_gives_no_reason():
    rate = chosen(0.5, trial(1e-3, 0.6))
    reason = rate.reason
    rate.higher()
    assert (rate.value, rate.reason) == (1e-3, reason)


@given(steps=st.lists(st.sampled_from(STEPS), max_size=60), adapter=st.booleans())
def test_whatever_comes_it_stays_within_its_bounds(steps, adapter):
    rate = Rate("auto", adapter)
    fastest, dropped = rate.ladder[0], []
    for step in steps:
        before = rate.value
        getattr(rate, step)()
        if step == "lower":
            dropped.append(before)
            assert rate.value <= before
        else:
            assert before <= rate.value <= max(before, 1.25 * before)
        assert fastest * 1e-3 * (1 - 1e-9) <= rate.value <= fastest
        if dropped and rate.value > fastest * 1e-3:
            assert rate.value <= 0.8 * dropped[-1] * (1 + 1e-9)


def test_it_falls_to_a_thousandth_and_no_further():
    rate = Rate("auto", adapter=True)
    for _ in range(40):
        rate.lower()
    assert rate.value == pytest.approx(ADAPTER[0] * 1e-3)


def test_a_number_is_obeyed():
    rate = Rate(3e-4, adapter=False)
    for step in (*STEPS, *STEPS):
        getattr(rate, step)()
    rate.load_state(chosen(0.5, trial(1e-3, 0.6)).state())
    assert (rate.value, rate.found, rate.passes, rate.reason) == (3e-4, True, None, "as given")


@pytest.mark.parametrize("steps", [[], ["lower"], ["lower", "higher"], ["lower", "lower", "higher"]])
def test_a_restored_rate_goes_on_as_the_first_would(steps):
    rate = chosen(0.5, trial(1e-3, 0.6, 3))
    for step in steps:
        getattr(rate, step)()
    other = Rate("auto", adapter=False)
    other.load_state(json.loads(json.dumps(rate.state())))
    assert (other.value, other.passes, other.found, other.reason) == (rate.value, rate.passes, True, rate.reason)
    for step in ("higher",) * 5 + ("lower", "higher"):
        getattr(rate, step)()
        getattr(other, step)()
        assert (other.value, other.passes) == (rate.value, rate.passes)


def test_what_was_still_to_be_found_is_so_after_a_restart():
    other = Rate("auto", adapter=False)
    other.load_state(json.loads(json.dumps(Rate("auto", adapter=False).state())))
    assert not other.found
    assert other.prefers(trial(1e-3, 0.6), torch.full((N,), 0.5))


@pytest.mark.parametrize(
    ("static", "fastest", "enough"), [(0.1, 0.2, True), (0.1, 0.1, True), (0.25, 0.1, False), (0.8, 0.9, False)]
)
def test_of_a_draft_that_knows_little_the_fastest_rate_is_enough_where_it_does_no_harm(static, fastest, enough):
    rate, before = Rate("auto", adapter=False), torch.full((64,), static)
    assert not rate.is_enough(before)
    assert rate.prefers(Trial(1e-3, 1, torch.full((64,), fastest)), before)
    assert rate.is_enough(before) is enough
