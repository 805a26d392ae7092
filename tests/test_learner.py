"""The learner: when an update is due, whom it waits for, and the random state it gives back."""

import random
import threading

import numpy as np
import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, feedback
from hf_osd.learner import Learner, isolated_random_state


@pytest.fixture
def learner(tiny_llama):
    """`learner(**config) -> Learner` with an empty buffer, whose refreshes are kept in `learner.refreshed`."""

    def make(**config):
        draft = tiny_llama(layers=1)
        refreshed = []
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        made = Learner(draft, trainable, FeedbackBuffer(), OnlineConfig(seed=0, **config), refreshed.append)
        made.refreshed = refreshed
        return made

    return make


def test_an_update_is_due_after_so_many_requests(learner, make_feedback):
    made = learner(update_interval=3)
    for i in range(3):
        assert not made.due()
        made.buffer.add(make_feedback(seed=i))
    assert made.due()


def test_or_after_so_many_tokens(learner, make_feedback):
    made = learner(update_interval=100, update_tokens=20)
    made.buffer.add(make_feedback(n=12))
    assert not made.due()
    made.buffer.add(make_feedback(n=12, seed=1))
    assert made.due()


def test_or_once_the_oldest_has_waited_long_enough(learner, make_feedback, monkeypatch):
    made = learner(update_interval=100, update_age=30.0)
    made.buffer.add(make_feedback(created=1000.0))
    monkeypatch.setattr("time.monotonic", lambda: 1029.0)
    assert not made.due()
    monkeypatch.setattr("time.monotonic", lambda: 1030.0)
    assert made.due()


def test_an_update_learns_new_and_replayed_requests_once_and_refreshes(learner, make_feedback):
    made = learner(replay=2.0, positions="all")
    made.buffer.add(make_feedback(n=10))
    before = {name: tensor.clone() for name, tensor in made.serving_weights().items()}
    assert made.update()
    assert made.learned_tokens == 30
    assert len(made.refreshed) == 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in made.serving_weights().items())
    assert not made.update()  # nothing new
    assert made.updates == 1


def test_while_another_thread_learns_nobody_need_wait(learner, make_feedback):
    made = learner()
    made.buffer.add(make_feedback())
    outcomes = []
    with made._lock:
        for call in (lambda: made.update(wait=False), lambda: made.judge(made.buffer.new(), wait=False)):
            thread = threading.Thread(target=lambda call=call: outcomes.append(call()))
            thread.start()
            thread.join(timeout=60)
    assert outcomes == [False, None]
    assert len(made.buffer.new()) == 1  # left to the one that learns


def test_only_what_trains_changes_and_the_rest_is_shared(learner, make_feedback):
    made = learner()
    fixed = {n: p.clone() for n, p in made.module.named_parameters() if n not in made.trainable}
    made.buffer.add(make_feedback())
    assert made.update()
    assert all(torch.equal(p, fixed[n]) for n, p in made.module.named_parameters() if n in fixed)


def test_random_states_are_given_back_also_after_an_error():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(1))

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    def breaks():
        with isolated_random_state():
            draw()
            raise RuntimeError

    seed()
    expected = draw()
    seed()
    with pytest.raises(RuntimeError):
        breaks()
    assert draw() == expected


def test_feedback_module_and_learner_agree_on_what_an_error_position_is(learner, make_feedback):
    made = learner(positions="error", replay=0.0)
    request = make_feedback(n=12)
    made.buffer.add(request)
    assert made.update()
    assert made.learned_tokens == int((request.outcome != feedback.ACCEPTED).sum())
