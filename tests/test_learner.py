"""The learner: when an update is due, whom it waits for, what it holds back to judge by, and the random state it gives back."""

import dataclasses
import json
import logging
import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, feedback
from hf_osd import ensemble as ensemble_module
from hf_osd.held_back import JUDGED_SHARE
from hf_osd.learner import Learner
from hf_osd.random_state import isolated_random_state


@pytest.fixture
def learner(tiny_llama):
    """`learner(**config) -> Learner` with an empty buffer, whose refreshes are kept in `learner.refreshed`."""

    def make(**config):
        draft = tiny_llama(layers=1)
        refreshed = []
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        made = Learner(draft, trainable, FeedbackBuffer(), OnlineConfig(**{"seed": 0, **config}), refreshed.append)
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
    before = {name: tensor.clone() for name, tensor in made.ensemble.serving_weights().items()}
    assert made.update()
    assert made.learned_tokens == 30
    assert len(made.refreshed) == 1
    assert any(not torch.equal(tensor, before[name]) for name, tensor in made.ensemble.serving_weights().items())
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
    fixed = {n: p.clone() for n, p in made.ensemble.members[0].module.named_parameters() if n not in made.trainable}
    made.buffer.add(make_feedback())
    assert made.update()
    assert all(torch.equal(p, fixed[n]) for n, p in made.ensemble.members[0].module.named_parameters() if n in fixed)


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


# What is held back.


def offer(learner, *requests):
    for request in requests:
        learner.offer(request)


def same(one, other) -> bool:
    return torch.equal(one.tokens, other.tokens)


def test_every_sixteenth_request_is_held_back_and_not_learnt(learner, make_feedback, monkeypatch):
    made, learnt = learner(update_interval=10**6, replay=3.0), []
    requests = [make_feedback(n=2, seed=i) for i in range(48)]
    offer(made, *requests)
    held = made.held.requests()
    assert len(held) == 3
    assert all(map(same, held, (requests[7], requests[23], requests[39])))
    monkeypatch.setattr(made.ensemble.members[0], "learn", lambda batch: learnt.extend(batch))
    assert made.update()
    assert len(learnt) == 45 * 4, "three replayed for each new one"
    assert not any(same(one, kept) for one in learnt for kept in held)


def test_the_share_held_back_is_the_configs(learner, make_feedback):
    none, half = learner(gate=False), learner(held_back_share=0.5)
    for made in (none, half):
        offer(made, *(make_feedback(n=2, seed=i) for i in range(10)))
    assert (len(none.held), len(none.buffer)) == (0, 10)
    assert (len(half.held), len(half.buffer)) == (5, 5)


def test_a_request_is_held_with_what_the_draft_says_as_it_comes(learner, make_feedback):
    """By the same judging as later: serving had other rows to go by, and drafted for some positions alone."""
    made = learner(held_back_share=0.5)
    offer(made, *(make_feedback(seed=i) for i in range(4)))
    assert made.update()
    request = make_feedback(n=20, seed=9)
    [(expected, _)] = made.judge([request])
    assert not torch.equal(expected.nan_to_num(-1), request.overlap.nan_to_num(-1))
    judged = made.held.judged_rows
    offer(made, request)
    assert torch.equal(made.held.requests()[-1].overlap, expected)
    assert made.held.judged_rows == judged + 20


def held_with_a_busy_learner(made, request):
    with made._lock:
        thread = threading.Thread(target=offer, args=(made, request))
        thread.start()
        thread.join(timeout=60)


def held_with_a_broken_judge(made, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble_module, "judge", breaks)
        offer(made, request)


def breaks(*args):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("hold", [held_with_a_busy_learner, held_with_a_broken_judge])
def test_where_nobody_can_judge_it_is_held_as_it_was_served(learner, make_feedback, hold):
    """To wait, or to raise, would be in the middle of somebody's call."""
    made, request = learner(held_back_share=0.5), make_feedback()
    hold(made, request)
    assert made.held.requests() == [request]
    assert made.held.judged_rows == 0


PLAIN = {"replay": 3.0, "warmup_steps": 0, "tail_samples": None}


@pytest.mark.parametrize("fields", [{}, {"averaging": 0.9, "optimism": 0.5, "ensemble": [1, 3]}])
def test_an_estimate_comes_when_learning_has_paid_for_it_and_never_before(learner, tiny_llama, answer_of, fields):
    made, target = learner(held_back_share=0.25, learning_rate=1e-2, **PLAIN, **fields), tiny_llama(seed=7)
    texts = [
        answer_of(target, torch.arange(2, 8) + i, 8) for i in range(3)
    ]  # learnt by heart: what serves is far off it
    learned = estimates = 0
    for i in range(30):
        last, judged = made.estimate, made.held.judged_rows
        offer(made, replace(texts[i % 3]))
        if not made.buffer.new():
            assert made.held.judged_rows == judged + 8  # as it came
            continue
        assert made.update()
        learned += 32  # and three replayed
        held = made.held.requests()
        assert (made.estimate is not last) == (0 < 8 * len(held) <= JUDGED_SHARE * learned - judged)
        if made.estimate is last:
            continue
        estimates += 1
        assert made.held.judged_rows >= judged + 8 * len(held)
        scores = torch.cat([overlap for overlap, _ in made.judge(held)])
        assert made.estimate.alpha == pytest.approx(scores.mean().item())
        assert made.estimate.requests == len(held)
        assert made.estimate.since.before == pytest.approx(torch.cat([one.overlap for one in held]).mean().item())
    assert estimates >= 2


def test_without_anything_held_back_there_is_no_estimate(learner, make_feedback):
    made = learner(gate=False, **PLAIN)
    for i in range(12):
        offer(made, make_feedback(seed=i))
        assert made.update()
    assert made.estimate is None


def test_a_draft_that_cannot_be_judged_does_not_serve(learner, make_feedback, monkeypatch, caplog):
    made = learner(held_back_share=0.25, **PLAIN)
    offer(made, *(make_feedback(n=8, seed=i) for i in range(8)))
    monkeypatch.setattr(ensemble_module, "judge", breaks)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not made.update()
    assert "out of memory" in caplog.text
    assert (made.updates, made.failed, made.estimate, made.refreshed) == (0, 1, None, [])
    monkeypatch.undo()
    for i in range(24):
        offer(made, make_feedback(n=8, seed=9 + i))
        made.update()
    assert made.estimate is not None


def test_a_restart_goes_on_thinning_where_it_was_and_owes_what_it_owed(learner, make_feedback):
    requests = [make_feedback(n=2, seed=i) for i in range(30)]
    straight, resumed = learner(**PLAIN), learner(**PLAIN)
    offer(straight, *requests[:20])
    assert straight.update()
    tensors, values = straight.state()
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values)))
    assert resumed.held.judged_rows == straight.held.judged_rows > 0
    assert len(resumed.held) == 0, "traffic is not in the state"
    offer(resumed, *requests[20:])
    [kept] = resumed.held.requests()
    assert same(kept, requests[23])


def test_where_errors_alone_teach_requests_without_one_are_no_failure(learner, make_feedback):
    made = learner(positions="error")
    request = make_feedback(n=6)
    made.buffer.add(dataclasses.replace(request, outcome=torch.full_like(request.outcome, feedback.ACCEPTED)))
    assert not made.update()
    assert (made.updates, made.failed, made.buffer.new()) == (0, 0, [])
