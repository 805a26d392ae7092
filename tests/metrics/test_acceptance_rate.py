"""Acceptance rate: α and α_live are those of docs/figures.md, and what cannot be is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import metrics
from hf_osd.feedback.feedback import ACCEPTED, REJECTED
from hf_osd.metrics.intervals import interval
from hf_osd.metrics.stats import CallStats


def rate(config: str = "default", **kwargs) -> dict:
    return metrics.load("acceptance_rate", config, keep_in_memory=True).compute(**kwargs)


def test_greedy_alpha_is_the_share_of_positions_at_which_the_two_agree():
    figures = rate(predictions=[[5, 7, 2], [9]], references=[[5, 7, 3], [9]], level=None)
    assert figures == {"alpha": 0.75}, "a mean over positions, not over requests"


def test_sampled_alpha_is_the_mean_overlap_of_known_positions():
    assert rate("sampled", overlaps=[[0.5, None, 1.0], [], [0.0]], level=None) == {"alpha": 0.5}


def test_alpha_of_scores_is_that_of_the_tokens(make_feedback):
    requests = [make_feedback(n=n, gamma=n, seed=n) for n in (4, 9, 12)]
    total = CallStats()
    for feedback in requests:
        known = feedback.overlap[~feedback.overlap.isnan()]
        total.add(CallStats(overlap_sum=float(known.sum()), overlap_count=len(known)))
    known = [feedback.overlap[~feedback.overlap.isnan()] for feedback in requests]
    drafted = [feedback.drafted[~feedback.overlap.isnan()] for feedback in requests]
    answers = [feedback.answer[~feedback.overlap.isnan()] for feedback in requests]
    assert 0 < total.alpha < 1
    assert rate("sampled", overlaps=known) == rate(predictions=drafted, references=answers)
    assert rate("sampled", overlaps=known)["alpha"] == total.alpha


def test_intervals_are_those_of_held_back_requests():
    overlaps = [[0.2, 0.9], [0.4], [0.7, 0.8, 0.1]]
    figures = rate("sampled", overlaps=overlaps, level=0.8)
    expected = interval([torch.tensor(row, dtype=torch.float64) for row in overlaps], level=0.8)
    assert tuple(figures.values()) == pytest.approx(expected)
    assert list(figures) == ["alpha", "alpha_low", "alpha_high"]


def test_one_request_says_nothing_of_the_spread():
    figures = rate("live", accepted=[3], tested=[4])
    assert figures == {"alpha_live": 0.75, "alpha_live_low": 0.0, "alpha_live_high": 1.0}


@given(data=st.data())
def test_live_figures_of_random_rounds_are_those_of_call_stats(requests_of_rounds, data):
    requests = data.draw(requests_of_rounds)
    total = CallStats()
    for request in requests:
        for drafted, tested, accepted, new_tokens in request:
            total.observe_round(drafted, tested, accepted, new_tokens)
    rows = {name: [[r[i] for r in request] for request in requests] for i, name in ((2, "accepted"), (1, "tested"))}
    by_round = rate("rounds", **rows)
    by_position = by_round.pop("acceptance_by_position")
    assert by_position == total.to_dict()["acceptance_by_position"]
    assert by_round["alpha_live"] == pytest.approx(total.alpha_live, nan_ok=True)
    totals = rate("live", **{name: [sum(row) for row in column] for name, column in rows.items()})
    assert totals == pytest.approx(by_round, nan_ok=True)
    outcomes = [[j < a for _, t, a, _ in request for j in range(t)] + [None] for request in requests]
    assert rate("outcomes", outcomes=outcomes) == pytest.approx(totals, nan_ok=True)


def test_outcomes_of_feedback_are_its_accepted_over_its_tested(make_feedback):
    codes = make_feedback(n=12).outcome.tolist()
    outcomes = [{ACCEPTED: True, REJECTED: False}.get(code) for code in codes]
    accepted, rejected = codes.count(ACCEPTED), codes.count(REJECTED)
    assert accepted
    assert rejected
    assert rate("outcomes", outcomes=[outcomes], level=None) == {"alpha_live": accepted / (accepted + rejected)}


def test_arrays_and_tensors_are_taken_as_lists_are():
    expected = rate(predictions=[[1, 2], [3, 4]], references=[[1, 0], [3, 0]])
    for make in (np.array, torch.tensor):
        both = {"predictions": make([[1, 2], [3, 4]]), "references": [make([1, 0]), [make(3), 0]]}
        assert rate(**both) == expected
    assert rate("live", accepted=np.array([1, 2]), tested=torch.tensor([2, 2])) == rate(
        "live", accepted=[1, 2], tested=[2, 2]
    )


@pytest.mark.parametrize(
    ("config", "row", "message"),
    [
        ("default", {"predictions": [1, 2], "references": [1]}, "`predictions` has 2, `references` has 1; give lists"),
        (
            "default",
            {"predictions": [1, -100], "references": [1, 2]},
            r"`predictions\[1\]` is -100; give a whole number",
        ),
        ("default", {"predictions": 3, "references": 3}, "`predictions` is 3; give a list"),
        ("default", {"predictions": "ab", "references": "ab"}, "`predictions` is 'ab'; give a list"),
        ("default", {"predictions": [1.0], "references": [1]}, r"`predictions\[0\]` is 1.0; give a whole number"),
        ("sampled", {"overlaps": [0.5, math.nan]}, r"`overlaps\[1\]` is nan; .* None at a position without a target"),
        ("sampled", {"overlaps": [1.5]}, r"`overlaps\[0\]` is 1.5; give a number from 0 to 1"),
        ("sampled", {"overlaps": [-0.1]}, r"`overlaps\[0\]` is -0.1"),
        ("live", {"accepted": 3, "tested": 2}, "`accepted` is 3 and `tested` 2"),
        ("live", {"accepted": -1, "tested": 2}, "`accepted` is -1; give a whole number ≥ 0"),
        ("live", {"accepted": 1, "tested": math.nan}, "`tested` is nan; give a whole number ≥ 0"),
        ("live", {"accepted": None, "tested": 2}, "`accepted` is None"),
        (
            "rounds",
            {"accepted": [1, 0], "tested": [2, 3]},
            r"Round 1 accepted 0 of 3 tested; .*min\(accepted \+ 1, drafted\)",
        ),
        ("rounds", {"accepted": [1], "tested": [2, 3]}, "`accepted` has 1, `tested` has 2"),
        ("rounds", {"accepted": 1, "tested": 2}, "`accepted` is 1; give a list"),
        ("outcomes", {"outcomes": [True, 2]}, r"`outcomes\[1\]` is 2; give True"),
    ],
)
def test_rows_that_cannot_be_are_refused(config, row, message):
    good = {"default": [[1]] * 2, "sampled": [[0.5]], "live": [1, 1], "rounds": [[1], [1]], "outcomes": [[True]]}[
        config
    ]
    columns = {name: [value, row[name]] for name, value in zip(row, good, strict=True)}
    with pytest.raises(ValueError, match=f"Row 1: .*{message}"):
        rate(config, **columns)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`level` is 95; give a number between 0 and 1"):
        rate("live", accepted=[1], tested=[2], level=95)
