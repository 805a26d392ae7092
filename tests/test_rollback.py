"""The learner goes back to where it was when what it has learnt may not serve, or an update went wrong."""

import contextlib
import gc
import logging
import weakref

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd import ensemble as ensemble_module
from hf_osd.distill import trainer as trainer_module
from hf_osd.gate import Gate, Rejected
from hf_osd.learner import Learner
from hf_osd.serving import ServingDraft


@pytest.fixture
def learner(tiny_llama):
    """A learner whose refreshes go into a real `learner.serving`."""

    def make(**fields):
        draft = tiny_llama(layers=1)
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        settings = {"seed": 0, "warmup_steps": 0, "replay": 0.0, "tail_samples": None, "update_interval": 2}
        serving = ServingDraft(draft, trainable)
        made = Learner(draft, trainable, FeedbackBuffer(), OnlineConfig(**settings | fields), serving.refresh)
        made.serving = serving
        return made

    return make


def learn(learner, *requests) -> bool:
    for request in requests:
        learner.buffer.add(request)
    return learner.update()


def everything(learner):
    """All that an update may change, and its undoing must give back."""
    members = [
        ({name: p.clone() for name, p in member.weights().items()}, member.serving_weights(), member.steps)
        for member in learner.ensemble.members
    ]
    members = [(weights, {n: p.clone() for n, p in served.items()}, steps) for weights, served, steps in members]
    return {name: p.clone() for name, p in learner.serving.weights()}, members


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def reject(since_check):
    def check(learned_rows, update_rows):
        raise Rejected("it is worse", since_check)

    return check


@pytest.mark.parametrize("fields", [{}, {"averaging": 0.0}, {"ensemble": [1, 3], "optimism": 0.5}])
def test_a_rejected_update_leaves_no_trace_but_its_count(learner, make_feedback, monkeypatch, caplog, fields):
    made = learner(**fields)
    assert learn(made, make_feedback(seed=1), make_feedback(seed=2))
    before, losses = everything(made), list(made.ensemble.losses)
    monkeypatch.setattr(made.gate, "check", reject(since_check=False))
    new = [make_feedback(seed=3), make_feedback(seed=4)]
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not learn(made, *new)
    assert same(everything(made), before)
    assert (made.updates, made.rejected, made.failed, made.misses) == (1, 1, 0, 1)
    assert made.ensemble.losses == losses
    assert len(made.buffer) == 2, "what it learnt from is forgotten"
    assert all(member._trainer.optimizer is None for member in made.ensemble.members)
    assert "it is worse" in caplog.text
    monkeypatch.undo()
    assert learn(made, make_feedback(seed=5))


def test_a_failed_check_goes_back_to_the_last_one_and_a_second_to_the_static_draft(
    learner, make_feedback, monkeypatch, caplog
):
    made, seeds = learner(), iter(range(100))

    def go_on(check):
        monkeypatch.setattr(made.gate, "check", check)
        return learn(made, make_feedback(seed=next(seeds)))

    static = everything(made)[0]
    assert go_on(lambda *rows: "an estimate")
    checked = everything(made)
    assert go_on(lambda *rows: None)
    assert not same(everything(made), checked)
    version = made.serving.version
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not go_on(reject(since_check=True))
    assert same(everything(made), checked)
    assert made.serving.version == version + 1
    assert len(made.buffer) == 1, "what was learnt since the check is forgotten"
    assert "the draft of the last check serves again" in caplog.text
    assert go_on(lambda *rows: None)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not go_on(reject(since_check=True))
    assert same(everything(made)[0], static)
    assert "the static draft serves again" in caplog.text
    assert made.rejected == 2
    assert go_on(lambda *rows: "an estimate")  # from there
    assert not go_on(reject(since_check=True))
    assert not same(everything(made)[0], static), "a check that was passed counts for the first failure after it"


def test_a_static_draft_that_is_worse_on_the_whole_is_nothing_to_go_back_to(
    learner, make_feedback, monkeypatch, caplog
):
    """A domain that was forgotten comes again: the static draft knows more of it, and of all that was learnt since, nothing."""
    made, seeds = learner(), iter(range(100))

    def go_on(check):
        monkeypatch.setattr(made.gate, "check", check)
        return learn(made, make_feedback(seed=next(seeds)))

    assert go_on(lambda *rows: "an estimate")
    checked, made.gate.static_is_worse = everything(made), True
    for _ in range(3):
        assert go_on(lambda *rows: None)
        assert not go_on(reject(since_check=True))
        assert same(everything(made), checked)
    assert "the static draft serves again" not in caplog.text


def test_the_wait_doubles_with_each_miss_and_a_good_update_ends_it(learner, make_feedback, monkeypatch):
    made, check = learner(), Gate.check
    monkeypatch.setattr(Gate, "check", lambda *args: reject(since_check=False)(0, 0))

    def add(count):
        for i in range(count):
            made.buffer.add(make_feedback(n=2, seed=i))

    for waits in (2, 4, 8):
        add(waits - 1)
        assert not made.due()
        add(1)
        assert made.due()
        assert not made.update()
    made.misses = 50
    add(127)
    assert not made.due()
    add(1)
    assert made.due(), "64 times as many is the most"
    monkeypatch.setattr(Gate, "check", check)
    assert made.update()
    assert made.misses == 0
    add(1)
    assert not made.due()
    add(1)
    assert made.due()


def test_after_a_miss_nothing_is_replayed(learner, make_feedback, monkeypatch):
    """What broke the update may be among it."""
    made, learnt = learner(replay=3.0), []
    assert learn(made, make_feedback(seed=1))
    learn_ = made.ensemble.members[0].learn
    monkeypatch.setattr(
        made.ensemble.members[0], "learn", lambda requests: (learnt.append(len(requests)), learn_(requests))
    )
    with monkeypatch.context() as patch:
        patch.setattr(made.gate, "check", reject(since_check=False))
        assert not learn(made, make_feedback(seed=2))
    assert learn(made, make_feedback(seed=3))
    assert learn(made, make_feedback(seed=4))
    assert learnt == [4, 1, 4]


# Faults, by name: each has an update fail.


@contextlib.contextmanager
def a_loss(times):
    divergence = trainer_module.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", lambda *args: times * divergence(*args))
        yield


@contextlib.contextmanager
def an_error(error):
    def raising(*args):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", raising)
        yield


@contextlib.contextmanager
def weights_of_nan(made):
    member = made.ensemble.members[0]
    after_step = member.after_step

    def spoil():
        with torch.no_grad():
            next(iter(member.weights().values())).view(-1)[0] = torch.nan
        after_step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "after_step", spoil)
        yield


@contextlib.contextmanager
def a_judge_that_raises(made):
    def raising(*args):
        raise RuntimeError("cannot be judged")

    made.gate._sample = dict.fromkeys(made.held.requests(), torch.zeros(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble_module, "judge", raising)
        yield


FAULTS = {
    "a loss that is NaN": (lambda made: a_loss(torch.nan), "loss of this update is nan"),
    "an infinite loss": (lambda made: a_loss(torch.inf), "loss of this update is"),
    "an exploding loss": (lambda made: a_loss(50.0), "over 4 times the largest"),
    "no memory on the device": (lambda made: an_error(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of"),
    "no memory": (lambda made: an_error(MemoryError("no memory")), "no memory"),
    "any other error": (lambda made: an_error(AssertionError("a bug")), "a bug"),
    "weights that are NaN": (weights_of_nan, "not finite"),
    "a judge that raises": (a_judge_that_raises, "cannot be judged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_serving_draft_as_it_was_bit_for_bit(learner, make_feedback, caplog, fault):
    made = learner(averaging=0.0, held_back_share=0.25)
    for i in range(6):
        made.offer(make_feedback(seed=i))
        made.update()
    assert made.updates >= 3
    before, version = everything(made), made.serving.version
    make, words = FAULTS[fault]
    with make(made), caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not learn(made, make_feedback(seed=7), make_feedback(seed=8))
    assert same(everything(made), before)
    assert (made.serving.version, made.failed, made.rejected) == (version, 1, 0)
    assert made.figures()["failed_updates"] == 1
    assert "An update failed; the serving draft is as it was" in caplog.text
    assert words in caplog.text
    made.gate._sample = {}
    assert learn(made, make_feedback(seed=9)), "and learning goes on"
    assert made.serving.version == version + 1


def test_a_loss_explodes_against_the_largest_of_the_last_ones(learner, make_feedback):
    made = learner(gate=False, learning_rate=1e-6)
    request = make_feedback(seed=1)
    with a_loss(4.5):  # there is nothing yet that it could be large against
        assert learn(made, request)
    for _ in range(7):
        assert learn(made, make_feedback(seed=1))
    with a_loss(4.4):
        assert learn(made, make_feedback(seed=1)), "one of the last eight was as large"
    for _ in range(8):
        assert learn(made, make_feedback(seed=1))
    with a_loss(4.4):
        assert not learn(made, make_feedback(seed=1))
    assert made.failed == 1


@pytest.mark.parametrize("share", [0.0, 0.0625])
def test_requests_that_left_the_buffer_are_let_go_of(learner, make_feedback, share):
    """Where nothing is held back no check will come that forgets them."""
    made = learner(held_back_share=share)
    request = make_feedback(seed=1)
    gone = weakref.ref(request)
    assert learn(made, request)
    made.buffer.clear()
    del request
    assert learn(made, make_feedback(seed=2))
    if share:
        made._trust()
    gc.collect()
    assert gone() is None
