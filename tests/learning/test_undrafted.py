"""What the draft would have said in a call that did without it: told to the policy, and α where that is as exact as serving's."""

import logging
from types import SimpleNamespace

import pytest
import torch

from hf_osd import OnlineAssistant
from hf_osd.distill.scoring import score
from hf_osd.learning.undrafted import score_undrafted
from hf_osd.metrics.stats import CallStats

PROMPT = torch.tensor([5, 9, 17, 3])


class Policy:
    def __init__(self):
        self.told = []

    def observe_untested(self, overlap, confidence=()):
        self.told.append((overlap, confidence))


@pytest.fixture
def serving(target, noised_copy):
    return OnlineAssistant(noised_copy(target, 0.2)).serving


@pytest.fixture
def request_(target, answer_of):
    return answer_of(target, PROMPT, 12)


def record(request, processed=False):
    answer = request.tokens[request.prompt_length :].tolist()
    return SimpleNamespace(prompt=PROMPT, answer=answer, processed=processed, stats=CallStats(requests=1))


def test_a_call_that_drafted_nothing_gets_its_alpha_afterwards(serving, request_):
    call, policy = record(request_), Policy()
    found = score_undrafted(request_, call, serving, policy)
    [expected] = score(serving.active, [request_])
    assert torch.equal(found.overlap, expected)
    assert (call.stats.overlap_sum, call.stats.overlap_count) == (float(expected.sum()), 12)
    [(overlap, confidence)] = policy.told
    assert overlap == expected.tolist()
    assert len(confidence) == 12
    assert not serving._leases


def test_where_the_draft_was_asked_it_is_not_asked_again(request_):
    asked = request_.with_overlap(torch.ones(12))
    policy = Policy()
    assert score_undrafted(asked, record(asked), None, policy) is asked
    assert not policy.told


def test_after_the_first_calls_some_are_scored_and_the_others_have_no_alpha(serving, request_):
    """Not that of the positions where the draft was asked, which the policy chose."""
    partly = torch.full((12,), torch.nan)
    partly[:3] = 1.0
    asked, scored = request_.with_overlap(partly), []
    for before in range(80):
        call, policy = record(asked), Policy()
        call.stats.overlap_sum, call.stats.overlap_count, call.stats.head_missed = 3.0, 3, 1
        found = score_undrafted(asked, call, serving, policy, before=before)
        scored.append(bool(policy.told))
        assert bool(policy.told) == (found is not asked)
        assert (call.stats.overlap_count, call.stats.head_missed) == ((12, 1) if policy.told else (0, 0))
    assert scored[:64] == [True] * 64
    assert scored[64:] == [True, False, False, False] * 4


def test_under_processors_it_decides_whether_to_draft_and_is_not_alpha(serving, request_):
    call, policy = record(request_, processed=True), Policy()
    assert score_undrafted(request_, call, serving, policy) is request_
    assert len(policy.told) == 1
    assert call.stats.overlap_count == 0


def test_what_a_head_of_some_rows_could_not_have_said_is_not_accepted(serving, request_):
    head = SimpleNamespace(covers=lambda prompt, answer: torch.zeros(len(answer), dtype=torch.bool))
    found = score_undrafted(request_, record(request_), serving, Policy(), head)
    assert not found.overlap.any()


def test_one_that_fails_breaks_no_call(serving, request_, monkeypatch, caplog):
    def judge(*args):
        raise torch.OutOfMemoryError("none left")

    policy = Policy()
    monkeypatch.setattr("hf_osd.distill.scoring.judge", judge)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert score_undrafted(request_, record(request_), serving, policy) is request_
    assert "could not be scored" in caplog.text
    assert not policy.told
    assert not serving._leases
