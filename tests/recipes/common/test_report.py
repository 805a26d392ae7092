"""`RunReport`: the arithmetic of a domain's figures, and runs that did not count all of them."""

import pytest

from hf_osd.metrics.stats import CallStats, Stats
from recipes.common.report import RunReport
from recipes.common.run_log import RunLog


def served(log: RunLog, from_draft: int, accepted: int, decode: float, learn: float):
    call = CallStats(requests=1, new_tokens=accepted + 2, rounds=2, accepted=accepted)
    call.accepted_by.update(draft=from_draft, cache=accepted - from_draft)
    log.add("sql", Stats(last=call), {"decode_seconds": decode, "learn_seconds": learn})


def summary(log: RunLog) -> dict:
    return RunReport(log, {}, {"sql": 0}, {"sql": 4}).summary["domains"]["sql"]


@pytest.fixture
def log(tmp_path) -> RunLog:
    """Ten requests, of which the draft has more and more; every third is compared, and 1.5 s of learning come with each."""
    log = RunLog(tmp_path, {})
    for i in range(10):
        served(log, from_draft=i, accepted=10, decode=1.0 + i, learn=3.0 * (i % 2))
        if i % 3 == 0:
            log.add_pair("sql", "identical", 20.0, 1.0 + i, new_tokens=12, cache_tokens=10, cache_seconds=10.0)
    return log


def test_the_gain_of_learning_is_of_rates_and_charges_all_learning(log):
    log.before, log.after = {"sql": [0.25, 0.2, 0.1]}, {"sql": [0.5, 0.6, None]}
    figures = summary(log)
    assert figures["compared"] == 4
    cache, decode = 40 / 40.0, 1.0 + 4 + 7 + 10
    assert figures["gain_of_learning"] == pytest.approx(48 / decode / cache)
    assert figures["gain_of_learning_end_to_end"] == pytest.approx(48 / (decode + 4 * 1.5) / cache)
    assert figures["speedup_end_to_end"] == pytest.approx(80 / (decode + 4 * 1.5))
    assert figures["learn_seconds"] == 15.0
    low, high = figures["gain_of_learning_interval"]
    assert 1.2 / 1.0 * 10 / 10 <= low < figures["gain_of_learning"] < high <= 12 / 1.0
    assert (figures["alpha_before"], figures["alpha_after"]) == (0.25, 0.5)
    assert figures["alpha_by_step_before"] == [0.25, 0.2, 0.1]
    assert figures["alpha_by_step"] == [0.5, 0.6, None]


def test_the_drafts_share_is_of_accepted_tokens_by_fifths(log):
    figures = summary(log)
    assert figures["share_from_draft"] == pytest.approx(0.45)
    assert figures["share_from_draft_by_fifth"] == pytest.approx([0.05, 0.25, 0.45, 0.65, 0.85])


def test_figures_that_a_run_did_not_count_are_not_known(tmp_path):
    """As of a run of an older version that goes on."""
    log = RunLog(tmp_path, {})
    served(log, 1, 2, 1.0, 0.0)
    del log.rows[0]["accepted_from_draft"]
    log.add_pair("sql", "identical", 2.0, 1.0)
    served(log, 0, 0, 1.0, 0.0)
    figures = summary(log)
    assert figures["speedup_decode"] == 2.0
    assert figures["gain_of_learning"] is figures["gain_of_learning_interval"] is None
    assert figures["gain_of_learning_end_to_end"] is figures["share_from_draft"] is None
    assert figures["share_from_draft_by_fifth"][-1] is None, "nothing was accepted"
    assert figures["alpha_before"] is figures["alpha_after"] is None
    assert figures["alpha_by_step"] == [None]
    assert "sql" in str(RunReport(log, {}, {"sql": 0}, {"sql": 4}))
