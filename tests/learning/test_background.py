"""`BackgroundLearner`: when its thread learns, what it leaves alone, and how its thread ends."""

import gc
import logging
import random
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineAssistant, OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.learning import background as background_module
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.learning.throttle import Stopped, Throttle

LONG = 120  # seconds in which anything has happened, on any machine


@pytest.fixture
def background(tiny_llama):
    """`background(**config)`: a learner with its trainer made; `served` counts refreshes, `learnt` is set after each update."""
    made = []

    def make(busy=lambda: False, **fields):
        draft, served, learnt = tiny_llama(layers=1), [], threading.Event()
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        settings = {"seed": 0, "update_interval": 2, "replay_ratio": 0.0, "warmup_steps": 0, "gate": False}
        settings |= {"learning_rate": 1e-3}
        config = OnlineConfig(**settings | fields)
        learner = Learner(make_student(draft, trainable, config), FeedbackBuffer(), served.append, alone=False)
        one = BackgroundLearner(learner, busy, learnt.set)
        one.served, one.learnt = served, learnt
        one.prepare()
        made.append(weakref.ref(one))
        return one

    yield make
    for reference in made:
        if (one := reference()) is not None:
            one.close()


class Held:
    """Holds up whoever comes to a pause, until it is let go or is to stop."""

    def __init__(self, monkeypatch):
        self.there, self.go_on = threading.Event(), threading.Event()
        held = self

        def pause(pace):
            held.there.set()
            assert held.go_on.wait(LONG)
            if pace.stopped:
                raise Stopped

        monkeypatch.setattr(Throttle, "pause", pause)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.go_on.set()


def test_offers_wake_the_thread_when_enough_have_come(background, make_feedback):
    made = background()
    made.add(make_feedback(seed=0))
    assert made._thread is None
    made.add(make_feedback(seed=1))
    assert made.learnt.wait(LONG)
    assert (made.learner.updates, len(made.served), made.learner.buffer.new()) == (1, 1, [])
    made.learnt.clear()
    thread = made._thread
    for i in range(2):
        made.add(make_feedback(seed=2 + i))
    assert made.learnt.wait(LONG)
    assert made._thread is thread


def test_while_it_learns_nobody_waits_for_it(background, make_feedback, held):
    made = background(gate=True)
    for i in range(3):
        made.add(make_feedback(seed=i))
    assert held.there.wait(LONG)
    assert made.update(wait=False) is False
    for i in range(8):
        made.add(make_feedback(seed=i))
    assert len(made.learner.buffer.new()) >= 8
    assert made.metrics()["updates"] == 0


def test_a_flush_learns_all_that_is_new_here_and_now(background, make_feedback):
    made = background(update_interval=100)
    for i in range(3):
        made.add(make_feedback(seed=i))
    assert made.update(wait=True)
    assert (made.learner.updates, made.learner.buffer.new()) == (1, [])
    assert not made.update(wait=True)


def test_a_flush_waits_for_the_update_that_runs_and_is_not_kept_to_its_pace(background, make_feedback):
    """At this pace it would take a day."""
    made = background(busy=lambda: True, learning_budget=1e-7)
    for i in range(2):
        made.add(make_feedback(seed=i))
    made.learner.buffer.add(make_feedback(seed=3))
    flushed = threading.Event()
    threading.Thread(target=lambda: (made.update(wait=True), flushed.set()), daemon=True).start()
    assert flushed.wait(LONG)
    assert made.learner.buffer.new() == []
    assert made.learner.updates >= 1


def test_so_do_a_state_and_weights_from_elsewhere(background, make_feedback):
    made = background(busy=lambda: True, learning_budget=1e-7)
    for i in range(2):
        made.add(make_feedback(seed=i))
    done = threading.Event()

    def ask():
        tensors, values = made.state()
        made.load_state(tensors, values)
        made.load_weights({name: p.clone() for name, p in made.learner.student.serving_weights().items()})
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(LONG)


def test_what_another_thread_draws_is_what_it_would_have_drawn_without_a_learner(background, make_feedback):
    made = background(replay_ratio=2.0, batch_size=1)

    def seed():
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    def draw():
        return float(torch.rand(1)), np.random.rand(), random.random()

    seed()
    for i in range(2):
        made.add(make_feedback(seed=i))
    drawn = [draw()]
    while not made.learnt.wait(0.001):
        drawn.append(draw())
    drawn.append(draw())
    seed()
    assert drawn == [draw() for _ in drawn]
    assert made.learner.updates == 1


def test_close_ends_the_thread_in_the_middle_of_an_update(background, make_feedback):
    made = background(busy=lambda: True, learning_budget=1e-7)
    for i in range(2):
        made.add(make_feedback(seed=i))
    thread = made._thread
    made.close()
    assert not thread.is_alive()
    assert made.served == []
    made.close()
    assert made.update(wait=False) is False
    assert made._thread is thread, "no other one was made"


def test_a_flush_that_is_closed_over_comes_back(background, make_feedback, held):
    made, came_back = background(update_interval=100), []
    made.add(make_feedback())
    thread = threading.Thread(target=lambda: came_back.append(made.update(wait=True)))
    thread.start()
    assert held.there.wait(LONG)
    made._end()
    held.go_on.set()
    thread.join(LONG)
    assert came_back == [False]


def test_the_thread_ends_when_nobody_holds_its_learner(background, make_feedback):
    made = background()
    for i in range(2):
        made.add(make_feedback(seed=i))
    assert made.learnt.wait(LONG)
    thread, gone = made._thread, weakref.ref(made)
    del made
    gc.collect()
    thread.join(LONG)
    gc.collect()
    assert not thread.is_alive()
    assert gone() is None


def test_the_end_of_the_process_ends_a_thread_that_has_nothing_to_do(background, make_feedback, monkeypatch):
    """And one that has, and one that has not imported all yet, of which the end of a process lets it import no more."""
    made = background(update_interval=1)
    made.add(make_feedback())
    assert made.learnt.wait(LONG)
    background_module._stop(made.throttle, made._wake)  # what is called then
    made._thread.join(LONG)
    assert not made._thread.is_alive()
    made.add(make_feedback(seed=1))
    assert not made._thread.is_alive(), "no other one was made"

    monkeypatch.setitem(sys.modules, "hf_osd.distill.trainer", None)
    background_module._run(weakref.ref(made), made.throttle, made._wake, made._imported)


def test_garbage_collection_does_not_wait_for_the_thread(background, make_feedback, held):
    """It may come under a lock that the thread waits for."""
    made = background()
    for i in range(2):
        made.add(make_feedback(seed=i))
    assert held.there.wait(LONG)
    made._end()  # what it calls
    assert made._thread.is_alive()
    held.go_on.set()
    made._thread.join(LONG)
    assert not made._thread.is_alive()


class Killed(BaseException):
    """No `Exception`."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_made_anew_and_waits_longer(background, make_feedback, caplog):
    made = background(update_interval=1)

    def die():
        raise Killed

    made.learner.student.on_step = die  # in the middle of an update
    made.add(make_feedback(seed=0))
    made._thread.join(LONG)
    assert not made._thread.is_alive()
    assert made.served == []
    made.learner.student.on_step = None
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        made.add(make_feedback(seed=1))
    assert "The learner's thread was dead; another one takes over" in caplog.text
    assert made.metrics()["learner_restarts"] == 1
    assert made.learnt.wait(LONG)
    assert (made.learner.updates, made.learner.buffer.new(), made.learner.schedule.misses) == (0, [], 1), (
        "learning rests a turn"
    )
    made.learnt.clear()
    made.add(make_feedback(seed=2))
    assert made.learnt.wait(LONG)
    assert (made.learner.updates, made.learner.buffer.new(), made.learner.schedule.misses) == (1, [], 0)
    assert made.metrics()["learner_restarts"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_dies_again_and_again_is_not_made_any_more_and_that_is_said_once(
    background, make_feedback, monkeypatch, caplog
):
    """Where trl is broken, say."""
    made, threads = background(update_interval=1), set()
    monkeypatch.setitem(sys.modules, "hf_osd.distill.trainer", None)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        for i in range(50):
            made.add(make_feedback(seed=i))
            threads.add(made._thread)
            made._thread.join(LONG)
    assert len(threads) == 1 + made.metrics()["learner_restarts"] == 6
    assert made.metrics()["learning_over"] == "the learner's thread has died 6 times in a row"
    assert caplog.text.count("learns no more") == 1


def test_updates_that_end_well_between_its_deaths_let_it_be_made_anew(background, make_feedback, monkeypatch):
    made = background(update_interval=1)
    for i in range(20):
        made.learner.updates = i
        assert made._may_restart()
    assert made.metrics()["learning_over"] is None


def test_a_trainer_that_cannot_be_made_breaks_nobodys_call(background, make_feedback, monkeypatch, caplog):
    made = background(update_interval=1)
    made._prepared = False
    made._imported.set()

    def fail():
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="hf_osd"):
        patch.setattr(made.learner.student, "prepare", fail)
        made.add(make_feedback())
    assert "The trainer could not be made" in caplog.text
    assert made.metrics()["failed_updates"] == 1
    assert not made.is_due(), "it is not tried again at each call"
    for seed, updates in ((1, 0), (2, 1)):  # learning rests a turn
        made.learnt.clear()
        made.add(make_feedback(seed=seed))
        assert made.learnt.wait(LONG)
        assert made.learner.updates == updates


def test_two_callers_make_one_trainer(background, monkeypatch):
    made = background()
    made._prepared, asked, inside = False, [], threading.Event()

    def prepare():
        asked.append(1)
        inside.set()

    monkeypatch.setattr(made.learner.student, "prepare", prepare)
    with made._preparing:
        threads = [threading.Thread(target=made.prepare) for _ in range(2)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(LONG)
    assert asked == [1]


def test_an_assistant_learns_in_the_background_and_its_statistics_say_so(tiny_llama):
    target = tiny_llama(layers=2, eos_token_id=None)
    config = {"learn": "background", "update_interval": 2, "gate": False, "learning_rate": 1e-3, "seed": 0}
    with OnlineAssistant(tiny_llama(layers=1), **config) as assistant:
        for i in range(3):
            prompt = torch.arange(2, 8)[None] + i
            target.generate(prompt, assistant_model=assistant, max_new_tokens=6, do_sample=False, pad_token_id=0)
        thread = assistant.learner._thread
        assert thread.is_alive()
        assert assistant.flush()
        stats = assistant.stats
        assert stats.updates >= 1
        assert stats.draft_version == stats.updates
        assert stats.learning_seconds > 0
        assert stats.learner_restarts == 0
        assert assistant.buffer.new() == []
    assert not thread.is_alive()


def test_a_process_may_end_in_the_middle_of_an_update():
    """At this pace the update would take a day; and the thread's own code must not be torn down under it."""
    script = """
import threading, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_osd import Feedback, FeedbackBuffer, OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.feedback import SparseLogits
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner

torch.set_num_threads(1)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
draft = LlamaForCausalLM(LlamaConfig(**sizes))
trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
config = OnlineConfig(update_interval=2, batch_size=1, learning_budget=1e-7, gate=False, learning_rate=1e-3, warmup_steps=0)
learners = [Learner(make_student(draft, trainable, config), FeedbackBuffer(), print, alone=False) for _ in range(2)]
learner, idle = (BackgroundLearner(one, busy=lambda: True) for one in learners)
learner.prepare()
idle.update(wait=False)
assert idle._imported.wait(120)
stepped, pause = threading.Event(), learner.throttle.pause
learner.learner.student.on_step = lambda: (stepped.set(), pause())
for i in range(2):
    tokens = torch.randint(32, (8,))
    learner.add(Feedback.from_target(tokens, 4, SparseLogits.from_logits(torch.randn(4, 32), 8)))
assert stepped.wait(120)
assert learner._thread.is_alive()
print("the end")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "the end"
    assert "Fatal" not in done.stderr
    assert "Traceback" not in done.stderr
