"""Judgement by an engine's own counters: what is compared with what, and how sure a fall must be."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.engines.counters import Counted
from hf_osd.engines.judgement import Judgement, fell


def counted(lengths, gamma=4, answers=None):
    """Make the counters of rounds of which so many tokens each were accepted."""
    at = tuple(sum(n > i for n in lengths) for i in range(gamma))
    return Counted(len(lengths), gamma * len(lengths), sum(lengths), at, answers)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_the_variance_of_a_round_is_known_from_the_positions(lengths):
    mean = sum(lengths) / len(lengths)
    assert counted(lengths).variance == pytest.approx(sum((n - mean) ** 2 for n in lengths) / len(lengths))
    without = Counted(len(lengths), 4 * len(lengths), sum(lengths))
    assert without.variance >= counted(lengths).variance - 1e-9


def drawn(draw, rounds, share, an_answer):
    """Draw rounds in answers of so many rounds, each with a share of its own, which varies as that of requests does."""
    lengths, answers = [], 0
    while len(lengths) < rounds:
        alpha = min(max(draw.gauss(share, 0.17), 0.0), 1.0)
        answers += 1
        for _ in range(an_answer):
            n = 0
            while n < 4 and draw.random() < alpha:
                n += 1
            lengths.append(n)
    return counted(lengths, answers=answers)


@pytest.mark.parametrize(("rounds", "an_answer"), [(1000, 1), (1000, 20), (4000, 100)])
def test_chance_is_no_fall_however_long_answers_are(rounds, an_answer):
    draw = random.Random(0)
    pairs = [[drawn(draw, rounds, 0.5, an_answer) for _ in range(2)] for _ in range(50)]
    assert not any(fell(*pair) for pair in pairs)
    assert all(fell(before, drawn(draw, rounds, 0.1, an_answer)) for before, _ in pairs[:20])


def test_a_fall_is_told_from_chance():
    assert fell(counted([2, 2, 1, 3] * 500, answers=100), counted([1, 1, 0, 2] * 500, answers=100))
    assert not fell(counted([1, 1, 0, 2] * 500, answers=100), counted([2, 2, 1, 3] * 500, answers=100))
    assert not fell(counted([0, 4] * 100, answers=4), counted([0, 3] * 100, answers=4))
    assert not fell(Counted(), counted([0] * 500))
    assert not fell(counted([0] * 500), counted([0] * 500))
    assert fell(counted([4] * 500), counted([0] * 500)), "the variance is 0, the fall is not"


def test_without_a_count_of_answers_rounds_are_taken_for_those_of_long_ones():
    before, after = [1, 1, 0, 3] * 200, [1, 1, 0, 2] * 200
    assert fell(counted(before, answers=800), counted(after, answers=800))
    assert not fell(counted(before), counted(after))


GOOD, BAD = counted([2, 2, 1, 3] * 30, answers=60), counted([0, 0, 0, 1] * 30, answers=60)  # 120 rounds each
FEW = counted([0, 0, 0, 1] * 15, answers=30)


def judged(*events):
    """Judge: counters are taken in, numbers are drafts that come; return the judgement, and whether it fell at each look."""
    judgement, old, falls = Judgement(100), None, []
    for event in events:
        if isinstance(event, Counted):
            judgement.add(event)
            falls.append(judgement.has_fallen())
        else:
            judgement.replace(old, event)
            old = event
    return judgement, falls


def test_a_fall_is_told_once_and_the_one_before_is_gone_back_to():
    judgement, falls = judged(1, GOOD, 2, BAD, BAD)
    assert falls == [False, True, False]
    assert judgement.proven == 1
    judgement.replace(2, 1)
    judgement.add(GOOD)
    assert (judgement.after, judgement.before) == (None, GOOD + GOOD), "what was taken back counts nowhere"


def test_drafts_of_few_rounds_are_judged_together():
    judgement, falls = judged(1, GOOD, 2, FEW, 3, FEW)
    assert falls == [False, False, True]
    assert judgement.proven == 1


def test_too_few_rounds_before_are_no_measure():
    judgement, falls = judged(counted([4] * 50, answers=50), 1, BAD, BAD)
    assert not any(falls)
    assert judgement.proven is None


def test_one_that_fell_is_no_measure_for_the_next():
    judgement = Judgement(100)
    judgement.replace(None, 1)
    judgement.add(GOOD)
    judgement.replace(1, 2)
    judgement.add(BAD)  # nobody looks
    judgement.replace(2, 3)
    assert (judgement.before, judgement.proven) == (GOOD, 1)
    judgement.add(BAD)
    assert judgement.has_fallen()


def test_what_comes_after_one_that_fell_is_judged_too():
    assert judged(1, GOOD, 2, BAD, 3, BAD)[1] == [False, True, True]
    assert judged(1, GOOD, 2, BAD, 3, GOOD)[1] == [False, True, False]


def test_one_that_did_not_fall_is_what_the_next_is_compared_with():
    judgement, _ = judged(1, BAD, 2, GOOD, 3)
    assert (judgement.before, judgement.proven) == (GOOD, 2)


def test_looks_are_at_each_doubling():
    """A fall that is too small for 200 rounds would be seen at 300."""
    before, after = counted([2, 1] * 2000, answers=2000), counted([2] * 38 + [1] * 62, answers=50)
    assert fell(before, after + after + after)
    _, falls = judged(1, before, 2, *[after] * 5)
    assert falls == [False] * 4 + [True, False]
