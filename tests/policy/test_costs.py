"""c and v(n): medians of what was measured, straight lines where nothing was, and never a longer block cheaper than a shorter one."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.policy.costs import Costs, _never_falling


def measured(seconds: dict[int, float], steps: float | None = None) -> Costs:
    costs = Costs()
    for n, value in seconds.items():
        for _ in range(3):
            costs.observe_target(n, value)
    if steps is not None:
        costs.observe_draft(2, 2 * steps)
    return costs


def test_nothing_is_known_before_it_was_measured():
    costs = Costs()
    assert (costs.c, costs.step_seconds, costs.longest_measured) == (None, None, 0)
    assert costs.v_upto(4) == [1.0] * 4


def test_c_is_a_draft_step_over_a_plain_step():
    assert measured({1: 2.0}, steps=0.5).c == pytest.approx(0.25)
    assert measured({2: 2.0}, steps=0.5).c is None, "a plain step was never measured"


def test_two_rounds_of_a_length_do_not_count_yet():
    costs = measured({1: 1.0, 2: 1.5})
    for _ in range(2):
        costs.observe_target(9, 50.0)
    assert costs.longest_measured == 2
    assert costs.v(2) == pytest.approx(1.5)


def test_v_runs_in_straight_lines_between_and_beyond_what_was_measured():
    v = measured({1: 2.0, 3: 3.0, 5: 6.0}).v_upto(7)
    assert v == pytest.approx([1.0, 1.25, 1.5, 2.25, 3.0, 3.75, 4.5])


def test_a_longer_block_is_never_cheaper_than_a_shorter_one():
    v = measured({1: 1.0, 2: 1.4, 3: 1.2, 4: 1.3}).v_upto(6)
    assert v == sorted(v)
    assert v[1] == pytest.approx(1.3), "noise between neighbours is averaged"


def test_fixed_costs_are_what_they_are():
    costs = Costs(draft_cost=0.2, verify_cost=0.1)
    costs.observe_target(1, 5.0)
    costs.observe_draft(1, 50.0)
    assert costs.are_fixed
    assert costs.c == 0.2
    assert costs.v_upto(3) == pytest.approx([1.0, 1.1, 1.2])


def test_only_the_last_rounds_count():
    costs = measured({1: 9.0})
    for _ in range(64):
        costs.observe_target(1, 1.0)
    assert costs.step_seconds == 1.0


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 10)), min_size=1, max_size=8))
def test_pooling_keeps_the_mean_and_never_falls(points):
    values, weights = zip(*points, strict=True)
    pooled = _never_falling(values, weights)
    assert all(a <= b + 1e-9 for a, b in pairwise(pooled))
    assert sum(map(lambda x, w: x * w, pooled, weights)) == pytest.approx(
        sum(map(lambda x, w: x * w, values, weights))
    )
    if list(values) == sorted(values):
        assert pooled == pytest.approx(list(values))


def test_a_rounds_drafting_is_its_first_forward_and_the_steps_after_it():
    assert Costs(0.1).drafting(3) == pytest.approx(0.3)
    costs = Costs()
    for _ in range(3):
        costs.observe_target(1, 2.0)
        costs.observe_draft(3, 1.6, unread=1, read_seconds=0.8)
    assert costs.drafting(1) == pytest.approx(costs.read(1)) == pytest.approx(0.4)
    assert costs.drafting(4) == pytest.approx(0.4 + 3 * 0.2)
    assert costs.drafting(2, 200) == pytest.approx(costs.read(200) + 0.2)
    assert costs.drafting(0, 200) == 0.0
