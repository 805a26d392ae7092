"""Forks: what an assistant learns in the child, or says that it does not, and that nothing there waits for a thread that is not there."""

import json
import logging
import os
import select
import signal
import threading
import time
import traceback

import pytest

from hf_osd import FeedbackBuffer, OnlineAssistant, OnlineConfig
from hf_osd.learning.orphan import Orphan
from hf_osd.remote.channel import RankTransport
from hf_osd.remote.learner import RemoteLearner
from hf_osd.system import forks

from ..served import PROMPTS, serve

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
LONG = 120  # seconds in which anything has happened, on any machine


def in_child(work):
    """What `work()` returns in a forked child, as JSON has it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            told = {"is": work()}
        except BaseException:
            told = {"raised": traceback.format_exc()}
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    told, end = b"", time.monotonic() + LONG
    try:
        while select.select([reading], [], [], max(end - time.monotonic(), 0))[0] and (
            part := os.read(reading, 2**16)
        ):
            told += part
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert told, "the child hangs"
    told = json.loads(told)
    assert "raised" not in told, told["raised"]
    return told["is"]


@pytest.fixture
def made(target, draft):
    """`made(learn)`: an assistant that serves all that it learns."""
    assistants = []

    def make(learn):
        settings = {"update_interval": 2, "gate": False, "learning_rate": 1e-3, "warmup_steps": 0, "seed": 0}
        assistants.append(OnlineAssistant(draft, learn=learn, **settings))
        return assistants[-1]

    yield make
    for one in assistants:
        one.close()


def begun(assistant, target):
    """Have its thread begin, and wait for an update."""
    end = time.monotonic() + LONG
    while not assistant.stats.updates:
        assert time.monotonic() < end
        serve(target, assistant, PROMPTS[:2])
    return assistant


def test_a_child_without_the_thread_that_learns_says_so_at_its_first_call_and_serves_on(
    made, target, caplog, tmp_path
):
    assistant = begun(made("background"), target)
    plain = [target.generate(prompt, max_new_tokens=16, do_sample=False).tolist() for prompt in PROMPTS[:3]]

    def work():
        caplog.clear()
        version = assistant.stats.draft_version
        first = serve(target, assistant, PROMPTS[:1])[0].tolist()
        said = caplog.text
        outputs = [first, *(output.tolist() for output in serve(target, assistant, PROMPTS[1:3]))]
        refused = []
        for ask in (assistant.save_state, assistant.load_state):
            try:
                ask(tmp_path / "state")
            except (RuntimeError, OSError) as error:
                refused.append(str(error))
        assistant.save_pretrained(tmp_path / "draft")
        flushed = assistant.flush()
        again = caplog.text.count("Nothing is learnt")
        over, report = assistant.stats.learning_over, assistant.report()
        assistant.close()
        return [outputs, said, again, flushed, assistant.stats.draft_version - version, refused, over, report]

    outputs, said, again, flushed, refreshed, refused, over, report = in_child(work)
    assert outputs == plain
    assert "this process was forked" in said
    assert "its thread is not in this process" in said
    assert again == 1
    assert (flushed, refreshed) == (False, 0)
    assert "There is no learner's state to save" in refused[0]
    assert over in report
    assert (tmp_path / "draft" / "model.safetensors").is_file()
    updates = assistant.stats.updates
    serve(target, assistant, PROMPTS[:4])
    assistant.flush()
    assert assistant.stats.updates > updates, "where the thread is it learns on"


@pytest.mark.parametrize("learn", ["background", "inline"])
def test_a_child_of_before_the_first_update_learns_by_itself(made, target, learn):
    assistant = made(learn)

    def work():
        serve(target, assistant, PROMPTS[:4])
        flushed = assistant.flush()
        assistant.close()
        return [flushed, assistant.stats.draft_version]

    flushed, version = in_child(work)
    assert version >= 1
    assert assistant.stats.draft_version == 0


def test_a_child_learns_on_inline_from_what_was_learnt(made, target):
    assistant = begun(made("inline"), target)
    version = assistant.stats.draft_version

    def work():
        serve(target, assistant, PROMPTS[:4])
        assistant.flush()
        return [assistant.stats.draft_version, assistant.stats.failed_updates]

    assert in_child(work)[0] > version
    assert in_child(work)[1] == 0


def holding(locks):
    """A thread that has all of them, and the event that lets them go."""
    held, go = threading.Event(), threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        held.set()
        go.wait(LONG)
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(LONG)
    return thread, go


@pytest.mark.parametrize("learns_then", [True, False])
def test_no_lock_that_another_thread_had_holds_up_the_child(made, target, caplog, learns_then):
    """All that there are; and all but the one of an update."""
    assistant = made("inline")
    serve(target, assistant, PROMPTS[:1])
    locks = [lock for lock in forks._locks if learns_then or lock is not assistant.learner._lock]
    locks += [cache._lock for cache in assistant.texts._by_tenant.values()] + [assistant.texts._lock]
    assert len(locks) >= 8
    thread, go = holding(locks)

    def work():
        serve(target, assistant, PROMPTS[:4])
        assistant.flush()
        assistant.refresh(assistant.serving.active)
        return [assistant.stats.draft_version, isinstance(assistant.learner, Orphan), caplog.text]

    try:
        with caplog.at_level(logging.WARNING, logger="hf_osd"):
            version, orphan, said = in_child(work)
    finally:
        go.set()
        thread.join(LONG)
    assert orphan == learns_then
    assert (version > 1) == (not learns_then), "a refresh, and what was learnt"
    assert ("in the middle of an update" in said) == learns_then


def test_a_fork_waits_for_the_imports_that_learning_takes(monkeypatch):
    """They would be half done in the child for ever; those of the forking thread itself are not waited for, nor those that do not end."""
    inside, go, forked = threading.Event(), threading.Event(), []

    def imports():
        with forks.importing():
            inside.set()
            go.wait(LONG)

    thread = threading.Thread(target=imports, daemon=True)
    thread.start()
    assert inside.wait(LONG)
    monkeypatch.setattr(forks, "_PATIENCE", 0.05)
    assert in_child(lambda: 1) == 1
    monkeypatch.setattr(forks, "_PATIENCE", LONG)
    forking = threading.Thread(target=lambda: forked.append(in_child(lambda: thread.is_alive() or go.is_set())))
    forking.start()
    forking.join(0.2)
    assert forking.is_alive()
    go.set()
    forking.join(LONG)
    assert forked == [True]
    with forks.importing():
        assert in_child(lambda: 2) == 2


def test_a_child_of_a_rank_that_serves_waits_for_no_answer():
    transport = RankTransport(1, "the learning rank")
    transport.listen = lambda on_frame, on_death: None  # there is no other rank
    learner = RemoteLearner(transport, None, FeedbackBuffer(), OnlineConfig())
    assert "through threads that are not here" in learner.after_fork()
    assert (learner.is_due(), learner.update(wait=True)) == (False, False)


def test_a_child_that_never_serves_says_nothing(made, target, caplog):
    """A worker that loads data, say."""
    begun(made("background"), target)
    caplog.clear()
    assert "fork" not in in_child(lambda: caplog.text)
