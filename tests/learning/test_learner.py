"""The learner: when an update is due, whom it waits for, what may serve of it, and the random state it gives back."""

import copy
import dataclasses
import json
import logging
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd.distill import student as student_module
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.scoring import score
from hf_osd.feedback import feedback
from hf_osd.learning.learner import Learner
from hf_osd.system.random_state import isolated_random_state


def cloned(weights) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@pytest.fixture
def learner(tiny_llama):
    """`learner(**config) -> Learner` with an empty buffer and no gate, whose refreshes are kept in `learner.refreshed`."""

    def make(**config):
        draft = tiny_llama(layers=1)
        refreshed = []
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        config = OnlineConfig(**{"seed": 0, "gate": False, "learning_rate": 1e-3, **config})
        made = Learner(
            make_student(draft, trainable, config), FeedbackBuffer(), lambda weights: refreshed.append(cloned(weights))
        )
        made.refreshed = refreshed
        return made

    return make


def test_an_update_is_due_after_so_many_requests(learner, make_feedback):
    made = learner(update_interval=3)
    for i in range(3):
        assert not made.is_due()
        made.buffer.add(make_feedback(seed=i))
    assert made.is_due()


def test_to_find_a_rate_takes_twice_as_many(learner, make_feedback):
    """Some to try rates on, and as many to judge them by; after that an update is due as ever."""
    made = learner(update_interval=2, learning_rate="auto")
    for i in range(4):
        assert not made.is_due()
        made.buffer.add(make_feedback(seed=i))
    assert made.is_due()
    assert made.update()
    for i in range(2):
        assert not made.is_due()
        made.buffer.add(make_feedback(seed=i))
    assert made.is_due()


def test_an_update_learns_new_and_replayed_requests_once_and_refreshes(learner, make_feedback):
    made = learner(replay_ratio=2.0, positions="all")
    made.buffer.add(make_feedback(n=10))
    before = {name: tensor.clone() for name, tensor in made.student.serving_weights().items()}
    assert made.update()
    assert made.learned_tokens == 30
    assert len(made.refreshed) == 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in made.student.serving_weights().items())
    assert not made.update()  # nothing new
    assert made.updates == 1


def test_while_another_thread_learns_nobody_need_wait(learner, make_feedback):
    made = learner()
    made.buffer.add(make_feedback())
    outcomes = []
    with made._lock:
        thread = threading.Thread(target=lambda: outcomes.append(made.update(wait=False)))
        thread.start()
        thread.join(timeout=60)
    assert outcomes == [False]
    assert len(made.buffer.new()) == 1  # left to the one that learns


def test_only_what_trains_changes_and_the_rest_is_shared(learner, make_feedback):
    made = learner()
    fixed = {n: p.clone() for n, p in made.student.module.named_parameters() if n not in made.student.trainable}
    made.buffer.add(make_feedback())
    assert made.update()
    assert all(torch.equal(p, fixed[n]) for n, p in made.student.module.named_parameters() if n in fixed)


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
    made = learner(positions="error", replay_ratio=0.0)
    request = make_feedback(n=12)
    made.buffer.add(request)
    assert made.update()
    assert made.learned_tokens == int((request.outcome != feedback.ACCEPTED).sum())


def test_a_learner_without_a_seed_leaves_the_users_random_state_alone(learner):
    """`torch.seed()` gives a fresh seed, and sets the process's state to it."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = learner(seed=None), learner(seed=None)
    assert torch.rand(1) == expected
    assert one._generator.initial_seed() != two._generator.initial_seed()


def test_nor_does_one_that_takes_up_a_state(learner, make_feedback):
    """It makes the optimizer, and so a Trainer, which seeds the process."""
    made, resumed = learner(), learner()
    made.buffer.add(make_feedback())
    assert made.update()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    resumed.load_state(*made.state())
    assert torch.rand(1) == expected


# The rate.


PLAIN = {"replay_ratio": 3.0, "warmup_steps": 0, "sampled_columns": None}


def offer(learner, *requests):
    for request in requests:
        learner.add(request)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def heart(tiny_llama, answer_of, count=3) -> list:
    """Answers of a target that the learner's draft is far off."""
    target = tiny_llama(seed=7)
    return [answer_of(target, torch.arange(2, 8) + i, 8) for i in range(count)]


def test_one_request_finds_no_rate_and_stays_new(learner, make_feedback):
    made = learner(learning_rate="auto", **PLAIN)
    offer(made, make_feedback())
    assert not made.update()
    assert (made.updates, made.failed, len(made.buffer.new()), made.rate.found) == (0, 0, 1, False)
    offer(made, make_feedback(seed=1))
    assert made.update()
    assert (made.updates, made.failed, made.buffer.new(), made.rate.found) == (1, 0, [], True)


@pytest.mark.parametrize(("cold", "tried"), [(0.0, 3), (2.0, 1)])
def test_what_rates_are_tried_on_is_half_of_what_is_new_and_nothing_of_it_serves(
    learner, make_feedback, monkeypatch, cold, tried
):
    """Of a draft that knows much each rate is tried; of one that knows little the fastest is enough."""
    monkeypatch.setattr("hf_osd.learning.rate._COLD", cold)
    made, learnt, judged = learner(learning_rate="auto", **PLAIN), [], []
    requests = [make_feedback(n=4, seed=i) for i in range(6)]
    member, contenders = made.student, made.contenders
    learn, judge = member.learn, contenders.score

    def learning(batch):
        assert made.refreshed == []
        learnt.append((member.learning_rate, batch))
        learn(batch)

    monkeypatch.setattr(member, "learn", learning)
    monkeypatch.setattr(
        contenders, "score", lambda batch, point, **how: (judged.append(batch), judge(batch, point, **how))[1]
    )
    offer(made, *requests)
    assert made.update()
    *trials, (rate, last) = learnt
    assert {id(one) for _, batch in trials for one in batch} == set(map(id, requests[:3]))
    assert all([one.tokens.tolist() for one in batch] == [r.tokens.tolist() for r in requests[3:]] for batch in judged)
    assert {rate for rate, _ in trials} == set(made.rate.ladder[:tried])
    assert rate == made.rate.value in made.rate.ladder
    assert set(map(id, requests)) <= set(map(id, last)), "then all of it is learnt"
    assert len(made.refreshed) == 1


def test_a_rate_at_which_the_loss_is_not_finite_is_passed_over(learner, make_feedback, monkeypatch):
    made = learner(learning_rate="auto", **PLAIN)
    member = made.student
    learn, fastest = member.learn, made.rate.ladder[0]

    def learning(batch):
        if member.learning_rate == fastest:
            raise ArithmeticError("The loss of this update is nan.")
        learn(batch)

    monkeypatch.setattr(member, "learn", learning)
    offer(made, *(make_feedback(seed=i) for i in range(4)))
    assert made.update()
    assert (made.updates, made.failed) == (1, 0)
    assert made.rate.value in made.rate.ladder[1:]


# What serves.


def test_an_update_serves_only_when_requests_that_came_since_have_said_so(learner, tiny_llama, answer_of):
    """And what serves then is what they were asked about, not what has been learnt from them meanwhile."""
    made = learner(gate=True, **PLAIN | {"learning_rate": 1e-2})
    texts, learnt = heart(tiny_llama, answer_of), []
    for i in range(40):
        offer(made, replace(texts[i % 3]))
        served = made.update()
        assert served == bool(made.refreshed)
        if served:
            break
        learnt.append(cloned(made.student.serving_weights()))
    assert i > 0, "nothing has come since the first"
    [weights] = made.refreshed
    assert any(same(weights, then) for then in learnt)
    assert not same(weights, made.student.serving_weights())
    figures = made.metrics()
    assert (figures["accepted_updates"], figures["rejected_updates"]) == (1, 0)
    assert figures["updates"] == i + 1


def test_what_has_become_worse_is_dropped_with_what_was_learnt_and_never_serves(
    learner, tiny_llama, answer_of, monkeypatch, caplog
):
    made = learner(gate=True, replay_ratio=0.0, warmup_steps=0, ema_decay=0.0, sampled_columns=None)
    own = copy.deepcopy(made.student.module)  # a target that the draft agrees with
    texts = [answer_of(own, torch.arange(2, 8) + i, 24) for i in range(8)]
    static = cloned(made.student.serving_weights())
    member = made.student
    learn = member.learn

    def badly(batch):
        learn(batch)
        with torch.no_grad():
            for weight in member.weights().values():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))

    offer(made, replace(texts[0]))
    with monkeypatch.context() as patch:
        patch.setattr(member, "learn", badly)
        assert not made.update()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        offer(made, *map(replace, texts))
        assert not made.update()
    assert made.metrics()["rejected_updates"] == 1
    assert made.refreshed == []
    assert "made the draft worse on requests that it had not learnt yet, and is dropped" in caplog.text
    # What it goes on from is the static draft, and what it has learnt of the requests that said so.
    change = max(float((w - static[n]).abs().max()) for n, w in made.student.serving_weights().items())
    assert change < 0.1, "of the noise, of deviation 1, nothing is left"


@pytest.mark.parametrize("fields", [{}, {"ema_decay": 0.9, "optimism": 0.5, "ensemble": [1, 3]}])
def test_the_estimate_is_of_what_served_before_each_request_was_learnt(learner, tiny_llama, answer_of, fields):
    made = learner(gate=True, **PLAIN | {"learning_rate": 1e-2} | fields)
    texts, static = heart(tiny_llama, answer_of), tiny_llama(layers=1)
    serving, expected, before = copy.deepcopy(static), [], []
    for i in range(30):
        request = replace(texts[i % 3])
        offer(made, request)
        expected += score(serving, [request])
        before += score(static, [request])
        made.update()
        if made.refreshed:
            serving.load_state_dict(made.refreshed[-1], strict=False)
    estimate = made.metrics()["estimate"]
    assert estimate.requests == 30
    assert estimate.alpha == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)
    assert estimate.gain.before == pytest.approx(torch.cat(before).mean().item(), abs=1e-5)
    assert estimate.gain.low > 0.0
    assert made.metrics()["regret_vs_static"] < 0


def test_without_a_gate_nothing_is_judged_and_there_is_no_estimate(learner, make_feedback, monkeypatch):
    made = learner(**PLAIN)
    monkeypatch.setattr(student_module, "judge", breaks)
    for i in range(12):
        offer(made, make_feedback(seed=i))
        assert made.update()
    assert made.metrics()["estimate"] is None
    assert made.failed == 0


def breaks(*args, **kwargs):
    raise RuntimeError("out of memory")


def test_a_draft_that_cannot_be_judged_does_not_serve(learner, tiny_llama, answer_of, monkeypatch, caplog):
    made, texts = learner(gate=True, **PLAIN | {"learning_rate": 1e-2}), heart(tiny_llama, answer_of)
    offer(made, *map(replace, texts))
    monkeypatch.setattr(student_module, "judge", breaks)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not made.update()
    assert "out of memory" in caplog.text
    assert (made.updates, made.failed, made.metrics()["estimate"], made.refreshed) == (0, 1, None, [])
    monkeypatch.undo()
    for i in range(24):
        offer(made, replace(texts[i % 3]))
        made.update()
    assert made.metrics()["estimate"] is not None
    assert made.refreshed


def test_a_restart_goes_on_from_what_was_accepted_and_what_was_learnt_since(learner, tiny_llama, answer_of):
    settings = {"gate": True, **PLAIN, "learning_rate": "auto"}
    texts, straight, resumed = heart(tiny_llama, answer_of), learner(**settings), learner(**settings)
    for i in range(40):
        offer(straight, *(replace(text) for text in texts))
        if straight.update() and i:
            break
    tensors, values = straight.state()
    resumed.load_state(cloned(tensors), json.loads(json.dumps(values)))
    resumed.serve()
    assert same(resumed.refreshed[-1], straight.refreshed[-1]), "what was let through serves"
    learnt = cloned(straight.student.serving_weights())
    assert same(resumed.student.serving_weights(), learnt), "and learning goes on from all that was learnt"
    assert not same(resumed.refreshed[-1], learnt)
    now, then = resumed.metrics(), straight.metrics()
    of_this_process = {"estimate", "longest_update", "too_slow"}
    assert {n: v for n, v in now.items() if n not in of_this_process} == {
        n: v for n, v in then.items() if n not in of_this_process
    }
    assert (resumed.rate.found, resumed.rate.passes) == (True, straight.rate.passes)
    assert len(resumed.contenders.remembered) == 0, "traffic is not in the state"
    again = resumed.state()[0]
    assert any("optimizer" in name for name in tensors)
    assert same(again, tensors), "its optimizer's moments too"


def test_where_errors_alone_teach_requests_without_one_are_no_failure(learner, make_feedback):
    made = learner(positions="error")
    request = make_feedback(n=6)
    made.buffer.add(dataclasses.replace(request, outcome=torch.full_like(request.outcome, feedback.ACCEPTED)))
    assert not made.update()
    assert (made.updates, made.failed, made.buffer.new()) == (0, 0, [])
