"""What a block costs that a target with recurrent states accepts in part, and what the policy makes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.policy.lookahead import DraftPolicy, best_gain
from hf_osd.policy.stopping_rule import StoppingRule

V = [1 + 0.1 * n for n in range(12)]
shares = st.floats(0, 1)


@given(st.lists(shares, min_size=1, max_size=8), st.floats(0, 3))
def test_a_block_pays_for_what_is_read_again_where_it_is_not_accepted_whole(acceptance, rollback):
    best = (0, 0.0)
    for m in range(1, len(acceptance) + 1):
        tokens, prefix = 0.0, 1.0
        for a in acceptance[:m]:
            prefix *= a
            tokens += prefix
        gain = tokens - 1.5 * (V[m] - V[0]) - rollback * (1 - prefix)
        best = max(best, (m, gain), key=lambda pair: pair[1])
    found = best_gain(acceptance, 0.0, V, 1.5, rollback=rollback)
    assert found[1] == pytest.approx(best[1])


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=4), st.floats(0, 0.3), st.floats(1, 2))
def test_without_rollback_nothing_changes(bins, c, rate):
    total = sum(share for share, _ in bins) or 1.0
    bins = [(share / total, a) for share, a in bins]
    rule, same = (StoppingRule(bins, c, V, rate, 5, *more) for more in ((0.2,), (0.2, 0.0)))
    for j in range(5):
        for r in (0.0, 0.3, 1.0):
            assert rule.step_gain(j, r) == same.step_gain(j, r)
            assert rule.end_gain(j, r) == 0


def test_a_draft_is_stopped_later_once_a_rollback_is_likely_anyway_and_asked_less():
    bins = [(0.5, 0.3), (0.5, 0.9)]
    free, dear = (StoppingRule(bins, 0.05, V, 1.5, 5, 0.0, rollback) for rollback in (0.0, 1.0))
    assert free.step_gain(0, 1.0) > dear.step_gain(0, 1.0)
    assert free.step_gain(0, 1.0) > 0
    assert dear.token_gain(0, 0.3) < 0 < free.token_gain(0, 0.3)
    assert dear.token_gain(0, 0.9) > dear.end_gain(0, 1.0)


def policy_of(v):
    policy = DraftPolicy("cost", 5, draft_cost=0.05, verify_cost=v, max_cached=8)
    policy.observe_untested([0.6] * 200)
    return policy


def test_a_target_that_rolls_back_is_drafted_for_where_that_pays():
    assert policy_of(0.01).plan(carried=0).length > 0, "verifying more tokens costs hardly anything"
    assert policy_of(0.45).plan().length > 0
    assert policy_of(0.45).plan(carried=0).length == 0, "it would be paid for twice"


def test_what_is_carried_is_absorbed_before_there_is_too_much_of_it():
    policy = policy_of(0.05)
    assert policy.plan(carried=0).length > 0
    assert policy.plan(carried=200).length == 0
    assert policy.plan(3, [1.0] * 8, carried=0).length > 0
    assert policy.plan().length > 0, "another target"
    constant = DraftPolicy("constant", 5)
    assert [constant.plan(carried=carried).length for carried in (0, 15, 16)] == [5, 5, 0]


def test_a_round_is_timed_by_all_that_was_read():
    policy = DraftPolicy("cost", 5)
    for _ in range(3):
        policy.observe_round(0, 0, 0, 0.0, 1.0)
        policy.observe_round(2, 2, 1, 0.1, 2.0, carried=4)
    assert policy.costs.v(7) == pytest.approx(2.0)
