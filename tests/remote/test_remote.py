"""`RemoteLearner`: a process that learns, what it is sent and sends back, and its end; once the real one."""

import gc
import os
import queue
import select
import signal
import subprocess
import sys
import threading

import pytest
import torch

from hf_osd import OnlineConfig
from hf_osd import remote as remote_module
from hf_osd.buffer import FeedbackBuffer
from hf_osd.learner_process import BEGIN, BUSY, DRAFT
from hf_osd.remote import RemoteLearner
from hf_osd.serving import ServingDraft

from .processes import FIGURES, INTERVAL, LONG, obedient, offer, reads_on, same, wait_for_death, weights_of


def test_requests_are_sent_and_weights_that_come_back_serve(remote, serving, make_feedback):
    made = remote(obedient(serving))
    before = weights_of(serving)
    offer(made, make_feedback(seed=1), make_feedback(seed=2))
    assert made.update(wait=True)
    assert same(weights_of(serving), {name: p + 1 for name, p in before.items()})
    [process] = made.processes
    assert process.laid_out == sorted([BEGIN, BUSY, DRAFT])
    assert [process.seen.get() for _ in range(3)] == [("feedback", 1), ("feedback", 1), ("flush", 0)]
    assert made.figures() == FIGURES
    assert (len(made.buffer), made.buffer.new()) == (2, []), "kept for a process that has to be started anew"


def test_nothing_is_started_before_there_is_something_to_learn(remote, serving):
    made = remote(obedient(serving))
    assert (made.due(), made.update(wait=False), made.judge([]), made.processes) == (False, False, None, [])


def test_its_state_is_asked_for_and_given_back(remote, serving):
    made = remote(obedient(serving))
    tensors, state = made.state()
    assert (tensors["x"].tolist(), state) == ([1.0, 1.0], {"n": 1})
    made.load_state(tensors, state)
    with pytest.raises(ValueError, match="that of another draft"):
        made.load_state(tensors, {"n": 2})


def test_weights_from_elsewhere_are_sent_as_they_were(remote, serving):
    """Whoever trains them goes on at once; what is fixed is not sent."""
    taken = queue.SimpleQueue()

    def behave(process):
        while (frame := process.read()) is not None:
            taken.put(frame[1])

    made = remote(behave)
    weights = {name: p.clone() for name, p in serving.active.named_parameters()}
    name = next(iter(serving.trainable))
    expected = weights[name].clone()
    with made._lock:
        writing = made._running()._out
    writing.put(("state", None, {"much": torch.zeros(10**6)}, {}))  # it is written some time later
    made.take(weights)
    weights[name].zero_()
    taken.get(timeout=LONG)
    sent = taken.get(timeout=LONG)
    assert sent.keys() == serving.trainable
    assert torch.equal(sent[name], expected)


def test_whether_somebody_is_served_is_a_byte_in_its_folder(remote, make_feedback):
    made = remote(reads_on)
    made.note_busy(True)  # there is no process to tell
    offer(made, make_feedback())
    [process] = made.processes
    assert (process.folder / BUSY).read_bytes() == b"\0"
    made.note_busy(True)
    assert (process.folder / BUSY).read_bytes() == b"\1"
    made.note_busy(False)
    assert (process.folder / BUSY).read_bytes() == b"\0"


def test_a_draft_that_another_process_cannot_load_is_refused(tiny_llama):
    class Mine(type(tiny_llama(layers=1))):
        pass

    draft = Mine(tiny_llama(layers=1).config)
    with pytest.raises(ValueError, match=r"Mine is no class of transformers\. Pass learn='background'"):
        RemoteLearner(ServingDraft(draft, set()), FeedbackBuffer(), OnlineConfig(learn="process"))


# Its end.


def test_close_ends_the_process_and_removes_its_folder(remote, serving, make_feedback):
    made = remote(obedient(serving))
    offer(made, make_feedback())
    [process] = made.processes
    made.close()
    assert process.wait(0) == 0
    assert not process.folder.exists()
    assert made._deaths == 0, "it did not die"
    made.close()
    offer(made, make_feedback(seed=1))
    assert not made.update(wait=True)
    assert len(made.processes) == 1


def test_one_that_does_not_end_is_made_to(remote, make_feedback, monkeypatch):
    def deaf(process):
        reads_on(process)
        process.killed.wait(LONG)

    monkeypatch.setattr(remote_module, "_PATIENCE", 0.1)
    made = remote(deaf)
    offer(made, make_feedback())
    made.close()
    assert made.processes[0].wait(0) == -signal.SIGKILL


def test_the_process_ends_when_nobody_holds_its_learner(remote, make_feedback):
    made = remote(reads_on)
    offer(made, make_feedback())
    [process], reader = made.processes, made._worker._reader
    del made
    gc.collect()
    reader.join(LONG)
    assert not reader.is_alive()
    assert process.wait(0) == 0
    assert not process.folder.exists()


def test_garbage_collection_does_not_wait_for_it(remote, make_feedback):
    end = threading.Event()

    def slow(process):
        reads_on(process)
        end.wait(LONG)

    made = remote(slow)
    offer(made, make_feedback())
    reader = made._worker._reader
    del made
    gc.collect()
    assert reader.is_alive()
    end.set()
    reader.join(LONG)
    assert not reader.is_alive()


# The real one.


def test_a_real_process_learns_gives_its_state_takes_it_up_and_may_be_killed(remote, serving, make_feedback):
    """In the middle of an update that at this pace would take a day: the byte says that somebody is served."""
    made = remote(learning_budget=1e-7, gate=False, warmup_steps=0, replay=1.0)
    before = weights_of(serving)
    offer(made, make_feedback(seed=1))
    assert made.update(wait=True)
    learnt = weights_of(serving)
    assert not same(learnt, before)
    figures = made.figures()
    assert (figures["updates"], figures["failed_updates"]) == (1, 0)
    tensors, state = made.state()
    made.take({name: torch.zeros_like(p) for name, p in serving.active.named_parameters()})
    made.load_state(tensors, state)
    assert same(weights_of(serving), learnt), "what was saved serves again"
    assert serving.version == 2
    with pytest.raises(ValueError, match="that of another draft"):
        made.load_state({}, state)

    made.note_busy(True)
    offer(made, *(make_feedback(seed=i) for i in range(2 * INTERVAL)))
    worker = made._worker
    os.kill(worker.pid, signal.SIGKILL)
    wait_for_death(made)
    assert same(weights_of(serving), learnt)
    assert made.figures()["updates"] == 1
    assert not made.update(wait=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(worker.pid, 0)


PARENT = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-m", "hf_osd.learner_process", sys.argv[1], "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[int(sys.argv[2])])
print(child.pid, flush=True)
child.stdout.read()
"""


def test_it_ends_when_whoever_serves_is_killed(serving, tmp_path):
    remote_module._lay_out(tmp_path, serving, OnlineConfig(learn="process"))
    ours, theirs = os.pipe()  # the end of it comes when all that have the other one are gone
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(theirs)], pass_fds=[theirs], stdout=subprocess.PIPE
    )
    os.close(theirs)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert select.select([ours], [], [], LONG)[0], f"process {child} lives on"
    assert os.read(ours, 1) == b""
    os.close(ours)
