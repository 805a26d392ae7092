"""What an update may take of the time, where serving waits for it. No clock is asked: what calls took, and what a token takes to learn, is told."""

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, grow_draft
from hf_osd.distill.ensemble import make_student
from hf_osd.learning.learner import Learner
from hf_osd.metrics.stats import Stats
from hf_osd.policy.report import report


@pytest.fixture
def made(target):
    """A learner of a given rate, of which all learnt serves."""

    def make(**settings):
        draft = grow_draft(target)
        trainable = {name for name, p in draft.named_parameters() if p.requires_grad}
        settings = {
            "gate": False,
            "learning_rate": 1e-3,
            "replay_ratio": 1.0,
            "update_interval": 4,
            "seed": 0,
            **settings,
        }
        out = []
        learner = Learner(make_student(draft, trainable, OnlineConfig(**settings)), FeedbackBuffer(), out.append)
        learner.learnt = []
        learn = learner.student.learn
        learner.student.learn = lambda requests: (learner.learnt.append(len(requests)), learn(requests))
        return learner

    return make


def serve(learner, make_feedback, requests: int, seconds: float):
    """So many requests of 17 tokens, which took so long together."""
    for i in range(requests):
        learner.add(make_feedback(seed=i))
        learner.note_served(seconds / requests)


def test_an_update_learns_as_many_tokens_as_fit_its_share(made, make_feedback):
    """3.1 seconds of serving leave 1.55 for learning, at a third of the time: 6 of 8 requests at a quarter of a second each."""
    learner = made()
    learner.schedule.seconds = 0.25 / 17
    serve(learner, make_feedback, 4, 3.1)
    assert learner.update(wait=False)
    assert learner.learnt == [6]


def test_a_larger_share_learns_more(made, make_feedback):
    learner = made(learning_budget=0.5)
    learner.schedule.seconds = 0.25 / 17
    serve(learner, make_feedback, 4, 3.0)
    assert learner.update(wait=False)
    assert learner.learnt == [8]


def test_who_asks_for_all_to_be_learnt_gets_all(made, make_feedback):
    learner = made()
    learner.schedule.seconds = 100.0
    serve(learner, make_feedback, 4, 3.0)
    assert learner.update(wait=True)
    assert learner.learnt == [8]


def test_where_nothing_fits_the_draft_serves_as_it_is_and_the_report_says_why(made, make_feedback, target):
    from hf_osd.policy.lookahead import DraftPolicy

    learner = made()
    learner.schedule.seconds = 100.0
    for _ in range(3):
        serve(learner, make_feedback, 4, 3.0)
        assert not learner.update(wait=False)
    assert (learner.learnt, learner.updates, learner.failed) == ([], 0, 0)
    stats = Stats()
    for name, value in learner.metrics().items():
        setattr(stats, name, value)
    stats.total.rounds = 1
    said = report(stats, DraftPolicy("cost", 5, None, 0.0))
    assert "too slow to learn this draft" in said
    assert "0 of the 204 tokens" in said


def test_rates_are_tried_with_no_more_passes_than_fit(made, make_feedback, monkeypatch):
    """Of four requests two teach and two judge; three rates take three passes over two requests at least."""
    monkeypatch.setattr("hf_osd.learning.rate._COLD", 0.0)  # or the fastest would be enough
    learner = made(learning_rate="auto", replay_ratio=6.0)
    learner.schedule.seconds = 0.01 / 17
    serve(learner, make_feedback, 4, 0.04)
    learner.update(wait=False)
    assert learner.rate.found
    assert learner.learnt[:3] == [2, 2, 2]


def test_a_call_waits_no_longer_for_long_texts_than_for_short_ones(made, make_feedback, monkeypatch):
    """Of sixteen prompts of 3,000 tokens what is read to judge, to try rates and to learn fits what sixteen calls of a second have earned; a clock that moves with
    what the draft reads says so."""
    clock = [0.0]
    learner = made(learning_rate="auto", gate=True, replay_ratio=6.0, learning_window=128)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def read(module, args, kwargs, output):
        clock[0] += kwargs["input_ids"].numel() * (3e-3 if torch.is_grad_enabled() else 1e-3)

    learner.student.module.register_forward_hook(read, with_kwargs=True)
    longest = 0.0
    for i in range(40):
        learner.add(make_feedback(seed=i, prompt=3000))
        learner.note_served(1.0)
        if learner.is_due():
            before = clock[0]
            learner.update(wait=False)
            longest = max(longest, clock[0] - before)
    assert learner.rate.found
    assert learner.updates > 0
    assert 0 < longest < 5.0
    assert learner.failed == 0
