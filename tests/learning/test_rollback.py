"""The learner goes back to where it was when what it has learnt may not serve, or an update went wrong."""

import contextlib
import gc
import logging
import time
import weakref

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd.distill import student as student_module
from hf_osd.distill import trainer as trainer_module
from hf_osd.distill.ensemble import make_student
from hf_osd.learning.gate import Verdict
from hf_osd.learning.learner import Learner
from hf_osd.models.hot_swap import HotSwapDraft


@pytest.fixture
def learner(tiny_llama):
    """A learner whose refreshes go into a real `learner.serving`."""

    def make(**fields):
        draft = tiny_llama(layers=1)
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        settings = {"seed": 0, "warmup_steps": 0, "replay_ratio": 0.0, "sampled_columns": None, "update_interval": 2}
        settings |= {"learning_rate": 1e-3}
        serving = HotSwapDraft(draft, trainable)
        made = Learner(
            make_student(draft, trainable, OnlineConfig(**settings | fields)), FeedbackBuffer(), serving.refresh
        )
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
        for member in getattr(learner.student, "students", [learner.student])
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


@contextlib.contextmanager
def a_gate_that_says(learner, verdict: Verdict):
    """Of a candidate, where there is one; and which draft serves stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            learner.contenders.gate,
            "observe",
            lambda static, accepted, candidate: Verdict.WAIT if candidate is None else verdict,
        )
        yield


def let_one_through(learner, *requests):
    """What has been learnt from `requests` serves, and has been accepted. Returns what it was."""
    with a_gate_that_says(learner, Verdict.ACCEPT):
        assert not learn(learner, *requests)
        members = everything(learner)[1]
        learner.schedule._rest = 1  # judged by, and not learnt
        assert learn(learner, requests[0])
    return members


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.0}, {"ensemble": [1, 3], "optimism": 0.5}])
def test_a_dropped_candidate_leaves_no_trace_but_its_count(learner, make_feedback, caplog, fields):
    made = learner(**fields)
    accepted = let_one_through(made, make_feedback(seed=1), make_feedback(seed=2))
    served, rate = everything(made)[0], made.rate.value
    with a_gate_that_says(made, Verdict.WAIT):
        for seed in (3, 4):
            assert not learn(made, make_feedback(seed=seed))
    assert not same(everything(made)[1], accepted)
    made.schedule._rest = 1
    with a_gate_that_says(made, Verdict.DROP), caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not learn(made, make_feedback(seed=5))
    assert same(everything(made), (served, [(served, served, 0)] * len(accepted))), (
        "learning begins anew with what serves"
    )
    assert made.serving.version == 1
    figures = made.metrics()
    assert (figures["accepted_updates"], figures["rejected_updates"], figures["failed_updates"]) == (1, 1, 0)
    assert made.rate.value == rate, "one that was given is obeyed"
    assert all(member._trainer.optimizer is None for member in getattr(made.student, "students", [made.student]))
    assert "is dropped" in caplog.text
    assert not learn(made, make_feedback(seed=6))
    assert not same(everything(made)[1], accepted), "and learning goes on from it"


def test_a_second_drop_in_a_row_forgets_what_was_learnt_for_it(learner, make_feedback):
    """The first may be a matter of the rate, and what was learnt is replayed. The second says that it may be what is wrong."""
    made = learner()
    let_one_through(made, make_feedback(seed=1))
    one, two, three, four = (make_feedback(seed=i) for i in range(2, 6))
    with a_gate_that_says(made, Verdict.DROP):
        learn(made, one)
        assert made.contenders.dropped == 0, "there was no candidate but the one that was let through"
        learn(made, two)
        assert made.contenders.dropped == 1
        assert one in made.buffer.requests()
        learn(made, three)
        assert made.contenders.dropped == 2
        assert two not in made.buffer.requests()
        assert one in made.buffer.requests(), "it was learnt before the first"
        learn(made, four)
        assert three not in made.buffer.requests()
        assert four in made.buffer.requests(), "it has been judged by, and was not learnt yet"


def test_a_rate_that_was_found_falls_with_a_drop_and_does_not_come_back_to_it(learner, make_feedback):
    made = learner(learning_rate="auto")
    with a_gate_that_says(made, Verdict.WAIT):
        learn(made, *(make_feedback(seed=i) for i in range(4)))
    found = made.rate.value
    assert made.student.learning_rate == found
    made.contenders.propose()
    with a_gate_that_says(made, Verdict.DROP):
        learn(made, make_feedback(seed=5))
    assert made.rate.value < found
    assert made.student.learning_rate == made.metrics()["learning_rate"] == made.rate.value
    trainer = made.student.trainer
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(made.rate.value)


def test_the_static_draft_serves_while_the_gate_says_so_and_learning_goes_on(learner, make_feedback, caplog):
    made = learner()
    static = everything(made)[0]
    let_one_through(made, make_feedback(seed=1))
    accepted = everything(made)[0]
    assert not same(static, accepted)
    updates = made.updates
    with a_gate_that_says(made, Verdict.WAIT), caplog.at_level(logging.WARNING, logger="hf_osd"):
        made.contenders.gate.serves_static = True
        assert learn(made, make_feedback(seed=2))
        assert same(everything(made)[0], static)
        assert made.metrics()["serves_static"]
        assert "worse than the draft before any learning" in caplog.text
        made.contenders.gate.serves_static = False
        assert learn(made, make_feedback(seed=3))
    assert same(everything(made)[0], accepted)
    assert made.updates == updates + 2


def test_an_accepted_draft_that_cannot_serve_is_none(learner, make_feedback, monkeypatch, caplog):
    made = learner()
    let_one_through(made, make_feedback(seed=1))
    served, version = everything(made)[0], made.serving.version
    with a_gate_that_says(made, Verdict.ACCEPT):
        learn(made, make_feedback(seed=2))
        candidate, name = made.contenders._candidate.weights, next(iter(served))
        candidate[name] = candidate[name].clone().fill_(torch.nan)
        with caplog.at_level(logging.ERROR, logger="hf_osd"):
            assert not learn(made, make_feedback(seed=3))
    assert "not finite" in caplog.text
    assert (same(everything(made)[0], served), made.serving.version, made.failed) == (True, version, 1)
    assert made.contenders.serving.weights is made.contenders._out.weights
    made.schedule._rest = 0
    assert not learn(made, make_feedback(seed=4))
    assert made.failed == 1, "and learning goes on"


def test_the_rest_doubles_with_each_failure_and_a_good_update_ends_it(learner, make_feedback):
    """In its turns requests are judged by, and not learnt."""
    made, seeds = learner(), iter(range(1000))

    def fail():
        failed = made.failed
        with a_loss(torch.nan):
            assert not learn(made, make_feedback(n=2, seed=next(seeds)))
        assert made.failed == failed + 1

    for turns in (1, 3, 7):
        fail()
        judged = made.contenders.shadow.requests
        for i in range(turns):
            assert not learn(made, make_feedback(n=2, seed=next(seeds)))
            assert made.contenders.shadow.requests == judged + i + 1
        assert (made.updates, made.buffer.new()) == (0, [])
    made.schedule.misses = 50
    fail()
    for _ in range(63):
        learn(made, make_feedback(n=2, seed=next(seeds)))
    assert made.updates == 0, "that is the most"
    learn(made, make_feedback(n=2, seed=next(seeds)))
    assert (made.updates, made.schedule.misses) == (1, 0)
    learn(made, make_feedback(n=2, seed=next(seeds)))
    assert made.updates == 2


@pytest.mark.parametrize("gate", [False, True])
def test_after_a_failure_nothing_is_replayed(learner, make_feedback, monkeypatch, gate):
    """What broke the update may be among it."""
    made, learnt = learner(replay_ratio=3.0, gate=gate), []
    learn(made, make_feedback(seed=1))
    assert made.updates == 1
    learn_ = made.student.learn
    monkeypatch.setattr(made.student, "learn", lambda requests: (learnt.append(len(requests)), learn_(requests)))
    with a_loss(torch.nan):
        assert not learn(made, make_feedback(seed=2))
    for seed in (3, 4, 5):  # the first of them is let pass
        learn(made, make_feedback(seed=seed))
    assert learnt == [4, 1, 4]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("rate", ["auto", 1e-3])
def test_an_interrupt_passes_through_and_nothing_is_learnt_by_halves(learner, make_feedback, gate, rate):
    """What is saved after it is what was there before, also while rates are tried."""
    made, steps = learner(gate=gate, learning_rate=rate, batch_size=1), []
    member = made.student
    before = everything(made)

    def interrupt():
        steps.append(None)
        if len(steps) == 3:
            raise KeyboardInterrupt

    member.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        learn(made, *(make_feedback(seed=i) for i in range(8)))
    assert len(steps) == 3
    assert same(everything(made), before)
    assert (made.updates, made.failed) == (0, 0)


# Faults, by name: each has an update fail.


@contextlib.contextmanager
def a_loss(times):
    divergence = trainer_module.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", lambda *args: times * divergence(*args))
        yield


@contextlib.contextmanager
def an_error(error):
    def raising(*args, **kwargs):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", raising)
        yield


@contextlib.contextmanager
def weights_of_nan(made):
    member = made.student
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
    def raising(*args, **kwargs):
        raise RuntimeError("cannot be judged")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_module, "judge", raising)
        yield


FAULTS = {
    "a loss that is NaN": (lambda made: a_loss(torch.nan), "loss of this update is nan"),
    "an infinite loss": (lambda made: a_loss(torch.inf), "loss of this update is"),
    "no memory on the device": (lambda made: an_error(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of"),
    "no memory": (lambda made: an_error(MemoryError("no memory")), "no memory"),
    "any other error": (lambda made: an_error(AssertionError("a bug")), "a bug"),
    "weights that are NaN": (weights_of_nan, "not finite"),
    "a judge that raises": (a_judge_that_raises, "cannot be judged"),
}


@pytest.mark.parametrize(
    ("fault", "gate"),
    [(fault, gate) for fault in FAULTS for gate in (True, False) if gate or fault != "a judge that raises"],
)
def test_a_fault_leaves_the_serving_draft_as_it_was_bit_for_bit(learner, make_feedback, caplog, fault, gate):
    made = learner(ema_decay=0.0, gate=gate)
    if gate:
        let_one_through(made, make_feedback(seed=10))
    for i in range(3):
        made.add(make_feedback(seed=i))
        made.update()
    assert made.updates >= 3
    before, version = everything(made), made.serving.version
    assert version >= 1
    make, words = FAULTS[fault]
    with make(made), caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not learn(made, make_feedback(seed=7), make_feedback(seed=8))
    assert same(everything(made), before)
    assert (made.serving.version, made.failed, made.contenders.dropped) == (version, 1, 0)
    assert made.metrics()["failed_updates"] == 1
    assert "An update failed; the serving draft is as it was" in caplog.text
    assert words in caplog.text
    learn(made, make_feedback(seed=9))
    updates = made.updates
    served = learn(made, make_feedback(seed=11))
    assert made.updates == updates + 1, "and learning goes on, a turn later"
    assert served == (not gate)
    assert made.serving.version == version + (not gate)
    assert made.failed == 1


@pytest.mark.parametrize("gate", [False, True])
def test_requests_that_left_the_buffer_are_let_go_of(learner, make_feedback, gate):
    """But for those that are kept to see that they are not unlearnt: a few, and until they are as old as the buffer allows."""
    made = learner(gate=gate, buffer_age=1000.0 if gate else None)
    request = make_feedback(seed=1, created=time.monotonic() - 999.0)
    gone = weakref.ref(request)
    made.buffer.add(request)
    made.update()
    assert made.updates == 1
    assert (request in made.contenders.remembered.requests()) == gate
    made.buffer.clear()
    del request
    if gate:
        gone().__dict__["created"] -= 10.0  # as if time had passed
    learn(made, make_feedback(seed=2))
    assert made.updates == 2
    gc.collect()
    assert gone() is None


def test_a_closed_learner_keeps_no_request_of_before(learner, make_feedback):
    """But those of its last update, which its trainer has until it is gone."""
    made = learner()
    gone = []
    for i in range(3):
        request = make_feedback(seed=i)
        gone.append(weakref.ref(request))
        learn(made, request)
    made.close()
    made.buffer.clear()
    del request
    gc.collect()
    assert [reference() for reference in gone[:-1]] == [None] * 2
