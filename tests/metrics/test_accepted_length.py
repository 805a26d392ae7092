"""Accepted length and tokens a round: one without the bonus token, one with it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import metrics
from hf_osd.metrics.stats import CallStats


def length(config: str = "default", **kwargs) -> dict:
    return metrics.load("accepted_length", config, keep_in_memory=True).compute(**kwargs)


def test_the_bonus_token_is_in_one_and_not_in_the_other():
    figures = length(accepted=[6, 2], new_tokens=[9, 7], rounds=[3, 5], level=None)
    assert figures == {"accepted_length": 1.0, "tokens_per_round": 2.0}


def test_plain_decoding_has_length_0_and_one_token_a_round():
    figures = length(accepted=[0, 0], new_tokens=[7, 3], rounds=[7, 3])
    assert figures == {
        **{"accepted_length": 0.0, "accepted_length_low": 0.0, "accepted_length_high": 0.0},
        **{"tokens_per_round": 1.0, "tokens_per_round_low": 1.0, "tokens_per_round_high": 1.0},
    }


@given(data=st.data())
def test_figures_of_random_rounds_are_those_of_call_stats(requests_of_rounds, data):
    requests, total = data.draw(requests_of_rounds), CallStats()
    for request in requests:
        for one in request:
            total.observe_round(*one)
    rows = {
        name: [[r[i] for r in request] for request in requests] for i, name in ((2, "accepted"), (3, "new_tokens"))
    }
    by_round = length("rounds", **rows)
    assert by_round["tokens_per_round"] == total.tokens_per_round
    assert by_round["accepted_length"] == total.accepted / total.rounds
    totals = {name: [sum(row) for row in column] for name, column in rows.items()}
    assert length(**totals, rounds=[len(request) for request in requests]) == by_round
    for name in ("accepted_length", "tokens_per_round"):
        assert by_round[f"{name}_low"] - 1e-9 <= by_round[name] <= by_round[f"{name}_high"] + 1e-9


def test_one_request_says_nothing_of_the_spread():
    figures = length(accepted=[6], new_tokens=[9], rounds=[3])
    assert (figures["tokens_per_round_low"], figures["tokens_per_round_high"]) == (0.0, math.inf)


def test_intervals_lie_between_the_requests():
    figures = length(accepted=[2, 8], new_tokens=[4, 10], rounds=[2, 2])
    assert (figures["accepted_length_low"], figures["accepted_length_high"]) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((3, 2, 1), "`accepted` is 3 and `new_tokens` 2; count as accepted only tokens of the answer"),
        ((1, 4, 2), "`new_tokens` is 4, `accepted` 1 and `rounds` 2; .* also the prompt's"),
        ((1, 2, -1), "`rounds` is -1; give a whole number"),
        ((0, 1, 0), "`rounds` 0"),
        ((0.5, 1, 1), "`accepted` is 0.5"),
    ],
)
def test_rows_that_cannot_be_are_refused(row, message):
    with pytest.raises(ValueError, match=f"Row 0: .*{message}"):
        length(**dict(zip(("accepted", "new_tokens", "rounds"), ([value] for value in row), strict=True)))


def test_a_round_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="Row 0: Round 1: `new_tokens` is 3, `accepted` 1"):
        length("rounds", accepted=[[1, 1]], new_tokens=[[2, 3]])
