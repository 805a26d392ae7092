"""A process that learns and dies, says nonsense, cannot be sent to or cannot be started, and a draft that serves on through all of it."""

import logging
import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch

from hf_osd import OnlineAssistant
from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.learner import Learner
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter
from hf_osd.remote import learner as learner_module
from hf_osd.remote import pipe as pipe_module
from hf_osd.remote.frames import to_bytes

from .processes import INTERVAL, LONG, Process, dies, obedient, offer, reads_on, same, wait_for_death, weights_of


def garbage(process):
    process.read()
    process.output.write(b"Traceback (most recent call last):\n" * 10)
    process.output.flush()
    process.killed.wait(LONG)


def half_a_frame(process):
    process.read()
    process.output.write(b"hf_osd 1" + (1000).to_bytes(8, "little") + to_bytes("answer")[:-1])


def a_frame_of_nonsense(process):
    process.read()
    process.output.write(b"hf_osd 1" + (100).to_bytes(8, "little") + b"\xff" * 100)
    process.output.flush()
    process.killed.wait(LONG)


def silence(process):
    """It has closed its output, and lives on."""
    process.read()
    process.output.close()
    process.killed.wait(LONG)


@pytest.mark.parametrize("behaviour", [dies, garbage, half_a_frame, a_frame_of_nonsense, silence])
def test_a_process_that_dies_or_says_nonsense_is_counted_and_the_draft_serves_on(
    remote, serving, make_feedback, monkeypatch, caplog, behaviour
):
    monkeypatch.setattr(pipe_module, "EXIT_TIMEOUT", 0.1)
    made, before = remote(behaviour), weights_of(serving)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        offer(made, make_feedback())
        wait_for_death(made)
        assert not made.update(wait=True)
    assert same(weights_of(serving), before)
    assert serving.version == 0
    assert "The process that learns has died" in caplog.text
    assert "so it cannot answer (flush)" in caplog.text
    assert not made.processes[0].folder.exists()
    assert made.processes[0].killed.is_set() == (behaviour not in (dies, half_a_frame))


def test_the_next_one_starts_after_more_requests_with_what_is_in_the_buffer(remote, serving, make_feedback):
    made = remote(dies)
    seeds = iter(range(100))

    def offers_until_a_start():
        count, processes = 0, len(made.processes)
        while len(made.processes) == processes:
            offer(made, make_feedback(seed=next(seeds)))
            count += 1
        return count

    assert offers_until_a_start() == 1
    for deaths in (1, 2, 3):
        wait_for_death(made)
        assert offers_until_a_start() == INTERVAL * 2**deaths
        assert made.metrics()["learner_restarts"] == deaths
    assert made.processes[1].seen.get(timeout=LONG) == ("replay", 1 + 2 * INTERVAL - 1)
    wait_for_death(made)
    assert not made.update(wait=True), "and a flush starts none before its time"
    assert len(made.processes) == 4


def test_weights_that_come_end_the_backoff(remote, serving, make_feedback):
    made = remote(obedient(serving))
    made.transport._deaths, made.transport._requests = 3, 10**6  # as if three had died
    offer(made, make_feedback())
    assert made.transport.wait == INTERVAL * 8
    assert made.update(wait=True)
    assert made.transport.wait == INTERVAL


def test_counts_go_on_over_deaths(remote, serving, make_feedback):
    def learns_and_dies(process):
        process.read()
        process.serve(serving, 0.0, updates=5, learned_tokens=100)

    made = remote(learns_and_dies)
    offer(made, make_feedback())
    wait_for_death(made)
    for i in range(2 * INTERVAL):
        offer(made, make_feedback(seed=i))
    wait_for_death(made)
    figures = made.metrics()
    assert (figures["updates"], figures["learned_tokens"], figures["learner_restarts"]) == (10, 200, 1)


def test_one_that_dies_again_and_again_is_not_started_any_more_and_that_is_said_once(
    remote, serving, make_feedback, caplog
):
    made = remote(dies, update_interval=1)
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        for i in range(200):
            offer(made, make_feedback(seed=i % 7))
            if made.transport.pipe is not None:
                wait_for_death(made)
        assert (made.is_due(), made.update(wait=True)) == (False, False)
    assert len(made.processes) == 1 + made.metrics()["learner_restarts"] == 6
    assert "5 that were started in its place" in made.metrics()["learning_over"]
    assert caplog.text.count("None is started any more: the draft serves as it is, and learns no more") == 1
    with pytest.raises(RuntimeError, match="None is started any more"):
        made.load_state({}, {})
    student = make_student(serving.active, serving.trainable, made.config)
    Learner(student, FeedbackBuffer(), print).load_state(*made.state())


def test_deaths_that_lie_a_thousand_requests_apart_end_nothing(remote, make_feedback):
    made = remote(dies, update_interval=1)
    for _ in range(10):
        made.transport._requests = 1000  # as if so many had come since the last death
        offer(made, make_feedback())
        wait_for_death(made)
    assert made.metrics()["learner_restarts"] == 9
    assert "learning_over" not in made.metrics()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_state_of_a_dead_one_is_that_of_what_serves(remote, serving, make_feedback, caplog, tiny_llama, adapter):
    def learns_and_dies(process):
        process.read()
        process.serve(serving, 0.01, updates=5, learned_tokens=100)

    if adapter:
        draft = tiny_llama(layers=1)
        serving = HotSwapDraft(draft, set(), Adapter(draft, 4))
    made = remote(learns_and_dies, serving)
    offer(made, make_feedback())
    wait_for_death(made)
    learnt = weights_of(serving)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        tensors, values = made.state()
    assert "what is saved of learning is the draft that serves" in caplog.text
    served = []
    draft = serving.adapter.draft if adapter else tiny_llama(layers=1)
    learner = Learner(make_student(draft, serving.trainable, made.config), FeedbackBuffer(), served.append)
    learner.load_state(tensors, values)
    learner.serve()
    assert learner.student.trainable == learnt.keys()
    assert same(learnt, served[-1])
    assert (learner.updates, learner.learned_tokens) == (5, 100)


def test_a_job_saves_and_goes_on_from_what_a_dead_one_leaves(tiny_llama, tmp_path, monkeypatch, target):
    """The library's own way: `save_state` of one assistant, `load_state` of another."""
    monkeypatch.setattr(Process, "behaviour", staticmethod(dies))
    monkeypatch.setattr(Process, "made", [])
    monkeypatch.setattr(pipe_module.subprocess, "Popen", Process)
    draft = tiny_llama(layers=1)
    prompt = torch.arange(2, 9)[None]
    with OnlineAssistant(draft, learn="process", update_interval=1) as assistant:
        target.generate(prompt, assistant_model=assistant, max_new_tokens=6, do_sample=False)
        assistant.stats  # noqa: B018 (the call is taken in)
        wait_for_death(assistant.learner)
        assistant.save_state(tmp_path, progress={"served": 1})
    with OnlineAssistant(draft, learn="inline") as other:
        assert other.load_state(tmp_path) == {"served": 1}
        assert other.stats.total.requests == 1


def silent(process):
    """It is stopped, say: it reads nothing, and shows no life after its beginning."""
    process.killed.wait(LONG)


def test_one_that_shows_no_life_is_ended_by_who_waits_for_it(remote, serving, make_feedback, monkeypatch, caplog):
    monkeypatch.setattr(pipe_module, "_PULSE_TIMEOUT", 0.1)
    monkeypatch.setattr(learner_module, "_POLL", 0.02)
    made = remote(silent)
    offer(made, make_feedback())
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not made.update(wait=True)
    assert "does not answer, and is ended" in caplog.text
    assert made.processes[0].killed.is_set()
    assert made.state()[0]


def test_one_that_lives_is_waited_for(remote, serving, make_feedback, monkeypatch):
    monkeypatch.setattr(pipe_module, "_PULSE_TIMEOUT", 0.2)
    monkeypatch.setattr(learner_module, "_POLL", 0.02)

    def slow(process):
        while (frame := process.read()) is not None:
            if frame[0] == "flush":
                for beat in range(20):
                    process.beat(beat + 1)
                    process.killed.wait(0.05)
                process.frames.write("answer", {}, {"refreshed": True, "asked": frame[2]["asked"]})

    made = remote(slow)
    offer(made, make_feedback())
    assert made.update(wait=True)


def test_to_close_one_that_does_not_read_takes_no_longer_than_it_is_given(remote, make_feedback, monkeypatch):
    monkeypatch.setattr(pipe_module, "EXIT_TIMEOUT", 0.1)
    made = remote(silent)
    for i in range(3):
        offer(made, make_feedback(seed=i))
    made.transport.pipe.send("state", tensors={"much": torch.zeros(10**6)})  # more than a pipe holds
    until = time.monotonic() + LONG
    while made.transport.pipe.waiting and time.monotonic() < until:  # till that one is being written
        time.sleep(0.01)
    made.close()
    assert made.transport.pipe.dead.wait(LONG)
    assert made.processes[0].killed.is_set()


def test_one_that_has_not_begun_is_neither_waited_for_nor_asked(remote, serving, make_feedback, monkeypatch, caplog):
    monkeypatch.setattr(Process, "beat", lambda process, beat=0: None)
    made = remote(silent)
    offer(made, make_feedback())
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        tensors, values = made.state()
    assert values["updates"] == 0
    assert same(weights_of(serving), {n.removeprefix("accepted."): t for n, t in tensors.items() if "accepted" in n})
    assert "dead" not in caplog.text
    made.close()
    assert made.processes[0].wait(0) == -signal.SIGKILL


def test_what_waits_for_one_that_does_not_keep_up_is_no_more_than_the_buffer_holds(remote, make_feedback):
    held = make_feedback().nbytes * 3
    made = remote(silent, buffer_bytes=held)
    made.buffer.max_bytes = held
    for i in range(100):
        offer(made, make_feedback(seed=i))
    assert len(made.buffer) == 3
    assert made.transport.pipe.waiting <= 4
    made.transport.pipe._process.kill()


def test_a_flush_over_which_it_dies_fails_and_so_do_those_behind_it(remote, serving, make_feedback):
    asked, die = threading.Event(), threading.Event()

    def behave(process):
        while process.read()[0] != "flush":
            pass
        asked.set()
        die.wait(LONG)

    made, found = remote(behave), []
    threads = [threading.Thread(target=lambda: found.append(made.update(wait=True))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert asked.wait(LONG)
    die.set()
    for thread in threads:
        thread.join(LONG)
    assert found == [False] * 3
    with pytest.raises(RuntimeError, match="another process is started after 4 more requests"):
        made.load_state({}, {})


def test_an_answer_to_a_call_that_was_interrupted_is_nobody_elses(remote, serving):
    made = remote(obedient(serving))
    made.state()

    class Interrupted:
        def get(self, timeout):
            made._answers = answers
            raise KeyboardInterrupt

    answers, made._answers = made._answers, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        made.update(wait=True)
    assert made.state()[1] == {"n": 1}


def test_weights_that_cannot_serve_are_left_out(remote, serving, make_feedback, caplog):
    def behave(process):
        while (frame := process.read()) is not None:
            if frame[0] == "flush":
                process.serve(serving, torch.nan)
                process.frames.write("answer", {}, {"refreshed": False, "asked": frame[2]["asked"]})

    made, before = remote(behave), weights_of(serving)
    offer(made, make_feedback())
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        made.update(wait=True)
    assert same(weights_of(serving), before)
    assert "cannot serve; the serving draft is as it was" in caplog.text
    assert not made.transport.pipe.dead.is_set()


def test_what_cannot_be_sent_ends_the_process(remote, make_feedback, caplog):
    """Else it would hear nothing more, and nobody would know."""
    made = remote(reads_on)
    offer(made, make_feedback())
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        made.transport.pipe.send("take", tensors={"a": "no tensor"})
        wait_for_death(made)
    assert "could not be sent" in caplog.text


class Full:
    """No process can be started."""

    def __init__(self, *args, **kwargs):
        raise OSError("no space left on device")


def test_where_none_can_be_started_calls_go_on_and_it_is_tried_again(
    remote, serving, make_feedback, monkeypatch, tmp_path, caplog
):
    made = remote(obedient(serving))
    monkeypatch.setattr(pipe_module.tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="hf_osd"):
        patch.setattr(pipe_module.subprocess, "Popen", Full)
        offer(made, make_feedback())
        assert not made.update(wait=True)
    assert "could not be started" in caplog.text
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    for i in range(2 * INTERVAL):
        assert made.processes == []
        offer(made, make_feedback(seed=i))
    assert len(made.processes) == 1
    assert made.update(wait=True)
    assert made.metrics()["learner_restarts"] == 1


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_nor_does_a_python_that_fails_break_a_call(remote, serving, make_feedback, monkeypatch, python):
    """A real process: its end is waited for, or it would be a zombie."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(pipe_module.sys, "executable", shutil.which(python) or python)
    monkeypatch.setattr(
        pipe_module.subprocess,
        "Popen",
        lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1],
    )
    made = remote()
    offer(made, make_feedback())
    if made.transport.pipe is not None:
        wait_for_death(made)
        assert started[0].returncode == 1
        with pytest.raises(ChildProcessError):
            os.waitpid(started[0].pid, 0)
    assert len(started) == (python == "false")
    assert made.transport._deaths == 1
    assert not made.update(wait=True)
