"""Speed-up: ratios of totals over pairs, learning shared by all, and what acceptance and costs would allow."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import metrics
from hf_osd.metrics.stats import Stats
from hf_osd.policy.lookahead import ideal_speedup

ROOT = Path(__file__).parents[2]


def speedup(config: str = "default", **kwargs) -> dict:
    return metrics.load("speedup", config, keep_in_memory=True).compute(**kwargs)


def test_the_speedup_is_total_over_total_and_pairs_are_given_beside_it():
    assert speedup(plain_seconds=[6.0, 1.0, 2.0], decode_seconds=[2.0, 1.0, 1.5]) == {
        "speedup_decode": 2.0,
        "speedup_decode_median": pytest.approx(4 / 3),
        "speedup_decode_least": 1.0,
        "speedup_decode_most": 3.0,
        "pairs": 3,
    }


def test_learning_is_shared_by_all_requests_and_borne_by_pairs():
    figures = speedup(
        "end_to_end",
        plain_seconds=[2.0, None, 4.0, None],
        decode_seconds=[1.0, 9.0, 2.0, 9.0],
        learn_seconds=[0.0, 0.0, 0.0, 2.0],
    )
    assert (figures["speedup_decode"], figures["pairs"]) == (2.0, 2)
    assert figures["speedup_end_to_end"] == 6 / (3 + 2 * 0.5)
    assert figures["speedup_end_to_end_most"] == 4 / 2.5


def test_rows_of_the_main_job_give_what_its_summary_has(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from recipes.common.report import RunReport
    from recipes.common.run_log import RunLog

    log, plain = RunLog(tmp_path, {}), {}
    for i in range(6):
        stats = Stats()
        stats.last.observe_round(drafted=4, tested=4 if i % 2 else 2, accepted=4 if i % 2 else 1, new_tokens=2 + i % 2)
        log.add("sql", stats, {"decode_seconds": 1.0 + i, "learn_seconds": 3.0 * (i == 4)})
        if i % 2:
            plain[i] = 2.0 + 3 * i
            log.add_pair("sql", "identical", plain[i], 1.0 + i)
    figures = speedup(
        "end_to_end",
        plain_seconds=[plain.get(row["request"]) for row in log.rows],
        **{name: [row[name] for row in log.rows] for name in ("decode_seconds", "learn_seconds")},
    )
    summary = RunReport(log, {}, {"sql": 0}, {"sql": 4}).summary["domains"]["sql"]
    for name in ("speedup_decode", "speedup_end_to_end"):
        assert figures[name] == pytest.approx(summary[name])
    assert figures["pairs"] == summary["compared"]


@given(
    acceptance=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    gamma=st.integers(0, 3),
    c=st.floats(0, 2),
    v=st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
)
def test_at_a_fixed_length_the_ideal_is_the_formula(acceptance, gamma, c, v):
    accepted = [min(a, gamma) for a in acceptance]
    counts = [accepted, [min(a + 1, gamma) for a in accepted]]
    rate = metrics.load("acceptance_rate", "rounds", keep_in_memory=True)
    by_position = rate.compute(accepted=[counts[0]], tested=[counts[1]], level=None)["acceptance_by_position"]
    drafted = [gamma] * len(accepted)
    rows = {"new_tokens": [[a + 1 for a in accepted]], "drafted": [drafted], "draft_steps": [drafted]}
    figures = speedup("rounds", **rows, c=c, v=v)
    by_position += [0.0] * (gamma - len(by_position))  # positions that were never reached
    assert figures["ideal_speedup"] == pytest.approx(ideal_speedup(by_position, gamma, c, lambda n: v[n - 1]))


def test_where_lengths_vary_steps_and_verifications_are_counted():
    rows = {"new_tokens": [[3, 1], [1]], "drafted": [[2, 1], [0]], "draft_steps": [[3, 0], [0]]}
    assert speedup("rounds", **rows, c=0.5, v=[1.0, 1.5, 2.0]) == {"ideal_speedup": 5 / (3 * 0.5 + 2.0 + 1.5 + 1.0)}


def test_requests_without_a_pair_have_no_speedup():
    figures = speedup(plain_seconds=[None], decode_seconds=[1.0])
    assert figures["pairs"] == 0
    assert math.isnan(figures["speedup_decode"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"plain_seconds": 0.0}, "`plain_seconds` is 0.0; give seconds, more than 0, or None"),
        ({"plain_seconds": math.nan}, "`plain_seconds` is nan; .* None for a request that was not decoded plainly"),
        ({"decode_seconds": 0}, "`decode_seconds` is 0; give seconds, more than 0"),
        ({"decode_seconds": None}, "`decode_seconds` is None"),
        ({"decode_seconds": math.inf}, "`decode_seconds` is inf"),
        ({"decode_seconds": "fast"}, "`decode_seconds` is 'fast'"),
        ({"learn_seconds": -1.0}, "`learn_seconds` is -1.0; give seconds, 0 for"),
    ],
)
def test_times_that_cannot_be_are_refused(row, message):
    row = {"plain_seconds": 1.0, "decode_seconds": 1.0, "learn_seconds": 0.0, **row}
    with pytest.raises(ValueError, match=f"Row 0: {message}"):
        speedup("end_to_end", **{name: [value] for name, value in row.items()})


def test_a_round_of_more_tokens_than_it_could_give_is_refused():
    with pytest.raises(ValueError, match="Row 0: Round 1 gave 4 tokens of 2 drafted"):
        speedup("rounds", new_tokens=[[1, 4]], drafted=[[0, 2]], draft_steps=[[0, 2]], c=0.1, v=[1.0] * 3)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({}, "needs `c` and `v`"),
        ({"c": 0.1}, "needs `c` and `v`"),
        ({"c": -0.1, "v": [1.0] * 3}, "`c` is -0.1"),
        ({"c": 0.1, "v": [1.0, 0.0, 1.0]}, r"`v\[1\]` is 0.0"),
        ({"c": 0.1, "v": [1.0, 1.0]}, r"ends at v\(2\) and a round verified 3 tokens; give v\(1\) to v\(3\)"),
    ],
)
def test_costs_that_cannot_be_are_refused(costs, message):
    with pytest.raises(ValueError, match=message):
        speedup("rounds", new_tokens=[[1]], drafted=[[2]], draft_steps=[[2]], **costs)
