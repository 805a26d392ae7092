"""`StoppingRule` against its optimum by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.policy.stopping_rule import StoppingRule


def gain_by_hand(bins, c, v, rate, j, prefix_acceptance, max_gamma):
    """The same optimum, without a table."""
    if j == max_gamma:
        return 0.0
    total = -rate * c
    for share, a in bins:
        taken = (
            prefix_acceptance * a
            - rate * (v[j + 1] - v[j])
            + max(gain_by_hand(bins, c, v, rate, j + 1, prefix_acceptance * a, max_gamma), 0.0)
        )
        total += share * max(taken, 0.0)
    return total


@given(
    acceptance=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3),
    c=st.floats(0.0, 0.4),
    slope=st.floats(0.0, 0.3),
    rate=st.floats(1.0, 2.5),
    prefix_acceptance=st.floats(0.0, 1.0),
)
def test_the_stopping_rule_is_the_optimum_by_hand(acceptance, c, slope, rate, prefix_acceptance):
    bins, v = [(1 / len(acceptance), a) for a in acceptance], [1 + slope * n for n in range(5)]
    rule = StoppingRule(bins, c, v, rate, 4)
    # The table knows ten points of reach; between them worth is convex, so lines lie above it, by at most a tenth of its slope.
    assert rule.step_gain(0, prefix_acceptance) == pytest.approx(
        gain_by_hand(bins, c, v, rate, 0, prefix_acceptance, 4), abs=0.1
    )
    assert rule.step_gain(4, prefix_acceptance) == 0.0, "no more tokens than the most"


@given(
    acceptance=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3),
    slope=st.floats(0.0, 0.3),
    tail=st.floats(-0.5, 2.0),
    rollback=st.floats(0.0, 1.0),
)
def test_at_places_of_its_table_a_step_gains_what_its_tokens_gain(acceptance, slope, tail, rollback):
    bins, v = [(1 / len(acceptance), a) for a in acceptance], [1 + slope * n for n in range(5)]
    rule = StoppingRule(bins, 0.1, v, 1.5, 4, tail, rollback)
    for j in range(4):
        for prefix in (0.0, 0.3, 0.7, 1.0):
            end = rule.end_gain(j, prefix)
            expected = sum(share * max(rule.token_gain(j, prefix * a), end) for share, a in bins) - 0.15
            assert rule.step_gain(j, prefix) == pytest.approx(expected, abs=1e-9)


def test_a_draft_that_is_unsure_stops_and_one_that_is_sure_goes_on():
    rule = StoppingRule([(0.5, 0.05), (0.5, 0.95)], 0.1, [1 + 0.1 * n for n in range(6)], 1.5, 5)
    assert rule.token_gain(0, 0.95) > 0 > rule.token_gain(0, 0.05)
    assert rule.step_gain(1, 0.95) > 0 > rule.step_gain(1, 0.05)
