"""`RemoteLearner`: a process that learns, dies, says nonsense or never ends, and a draft that serves on through all of it.

Most processes here are threads at the other ends of two pipes, which do as the real one does, or not.
"""

import contextlib
import gc
import logging
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from hf_osd import OnlineConfig
from hf_osd import remote as remote_module
from hf_osd.buffer import FeedbackBuffer
from hf_osd.learner_process import BEGIN, BUSY, DRAFT
from hf_osd.remote import RemoteLearner
from hf_osd.serving import ServingDraft
from hf_osd.trace import unpack
from hf_osd.wire import FrameWriter, read_frame, to_bytes

LONG = 120  # seconds in which anything has happened, on any machine
INTERVAL = 2


class Process:
    """Stands for a `Popen`, and does what `Process.behaviour(process)` does, in a thread."""

    behaviour = None
    made: list = []  # noqa: RUF012 (a test's own, by monkeypatch)

    def __init__(self, argv, stdin, stdout, env):
        self.folder, self.pid = Path(argv[3]), 0
        self.laid_out = sorted(path.name for path in self.folder.iterdir())
        ends = [os.pipe(), os.pipe()]
        self.input, self.stdin = os.fdopen(ends[0][0], "rb"), os.fdopen(ends[0][1], "wb")
        self.stdout, self.output = os.fdopen(ends[1][0], "rb"), os.fdopen(ends[1][1], "wb")
        self.frames, self.seen = FrameWriter(self.output), queue.SimpleQueue()
        self.killed, self._ended = threading.Event(), threading.Event()
        self.made.append(self)
        self._thread = threading.Thread(target=self._run, args=(type(self).behaviour,), daemon=True)
        self._thread.start()

    def _run(self, behaviour):
        try:
            with contextlib.suppress(OSError, ValueError):  # the other end is closed
                behaviour(self)
        finally:
            self.input.close()
            with contextlib.suppress(OSError):
                self.output.close()
            self._ended.set()

    def wait(self, timeout=None):
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("a process", timeout)
        return -signal.SIGKILL if self.killed.is_set() else 0

    def kill(self):
        self.killed.set()

    # What a behaviour is made of.

    def read(self):
        """The next frame, as kind and number of requests; `None` at the end."""
        frame = read_frame(self.input)
        if frame is None:
            return None
        kind, tensors, values = frame
        requests = unpack(tensors) if kind in ("feedback", "replay") else []
        self.seen.put((kind, len(requests)))
        return frame

    def serve(self, serving, by, **figures):
        """Send the weights of `serving`, each `by` more."""
        self.frames.write("weights", {name: p + by for name, p in serving.weights()}, {"figures": FIGURES | figures})


FIGURES = {
    "updates": 1,
    "failed_updates": 0,
    "rejected_updates": 0,
    "learned_tokens": 40,
    "learning_seconds": 0.5,
    "learner_restarts": 0,
    "held_back": 2,
    "estimate": None,
}


@pytest.fixture
def serving(tiny_llama):
    draft = tiny_llama(layers=1)
    return ServingDraft(draft, {name for name, _ in draft.named_parameters() if "layers" in name})


@pytest.fixture
def remote(serving, monkeypatch):
    """`remote(behaviour)`: a learner whose processes behave so; `made.processes` are those that it has started."""
    made = []

    def make(behaviour=None, **fields):
        config = OnlineConfig(**{"learn": "process", "update_interval": INTERVAL, "seed": 0, **fields})
        one = RemoteLearner(serving, FeedbackBuffer(), config)
        if behaviour is not None:
            monkeypatch.setattr(Process, "behaviour", staticmethod(behaviour))
            monkeypatch.setattr(Process, "made", [])
            monkeypatch.setattr(remote_module.subprocess, "Popen", Process)
            one.processes = Process.made
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(remote_module, "_PATIENCE", 5.0)
    yield make
    for reference in made:
        if (one := reference()) is not None:
            one.close()


def weights_of(serving):
    return {name: p.clone() for name, p in serving.weights()}


def same(one, other):
    return all(torch.equal(p, other[name]) for name, p in one.items())


def reads_on(process):
    while process.read() is not None:
        pass


def dies(process):
    """When it has read one frame."""
    process.read()


def obedient(serving):
    """Does all that it is asked, and learns at every flush."""

    def behave(process):
        while (frame := process.read()) is not None:
            kind, tensors, values = frame
            if kind == "flush":
                process.serve(serving, 1.0)
                process.frames.write("answer", {}, {"refreshed": True, "asked": values["asked"]})
            elif kind == "state":
                process.frames.write("answer", {"x": torch.ones(2)}, {"state": {"n": 1}, "asked": values["asked"]})
            elif kind == "load":
                refused = {} if values["state"] == {"n": 1} else {"refused": "that of another draft"}
                process.frames.write("answer", {}, {**refused, "asked": values["asked"]})

    return behave


def offer(learner, *requests):
    for request in requests:
        learner.offer(request)


def wait_for_death(learner):
    assert learner._worker.dead.wait(LONG)


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


# Death.


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
    monkeypatch.setattr(remote_module, "_PATIENCE", 0.1)
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
        assert made.figures()["learner_restarts"] == deaths
    assert made.processes[1].seen.get(timeout=LONG) == ("replay", 1 + 2 * INTERVAL - 1)
    wait_for_death(made)
    assert not made.update(wait=True), "and a flush starts none before its time"
    assert len(made.processes) == 4


def test_weights_that_come_end_the_backoff(remote, serving, make_feedback):
    made = remote(obedient(serving))
    made._deaths, made._offered = 3, 10**6  # as if three had died
    offer(made, make_feedback())
    assert made._wait == INTERVAL * 8
    assert made.update(wait=True)
    assert made._wait == INTERVAL


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
    figures = made.figures()
    assert (figures["updates"], figures["learned_tokens"], figures["learner_restarts"]) == (10, 200, 1)


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
    with pytest.raises(RuntimeError, match="another process is started after more requests"):
        made.state()


def test_an_answer_to_a_call_that_was_interrupted_is_nobody_elses(remote, serving):
    made = remote(obedient(serving))
    made.state()
    worker = made._worker

    class Interrupted:
        def get(self):
            worker._answers = answers
            raise KeyboardInterrupt

    answers, worker._answers = worker._answers, Interrupted()
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
    assert not made._worker.dead.is_set()


def test_what_cannot_be_sent_ends_the_process(remote, make_feedback, caplog):
    """Else it would hear nothing more, and nobody would know."""
    made = remote(reads_on)
    offer(made, make_feedback())
    with caplog.at_level(logging.ERROR, logger="hf_osd"):
        made._worker.send("take", tensors={"a": "no tensor"})
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
    monkeypatch.setattr(remote_module.tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="hf_osd"):
        patch.setattr(remote_module.subprocess, "Popen", Full)
        offer(made, make_feedback())
        assert not made.update(wait=True)
    assert "could not be started" in caplog.text
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
    for i in range(2 * INTERVAL):
        assert made.processes == []
        offer(made, make_feedback(seed=i))
    assert len(made.processes) == 1
    assert made.update(wait=True)
    assert made.figures()["learner_restarts"] == 1


@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_nor_does_a_python_that_fails_break_a_call(remote, serving, make_feedback, monkeypatch, python):
    """A real process: its end is waited for, or it would be a zombie."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(remote_module.sys, "executable", shutil.which(python) or python)
    monkeypatch.setattr(
        remote_module.subprocess,
        "Popen",
        lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1],
    )
    made = remote()
    offer(made, make_feedback())
    if made._worker is not None:
        wait_for_death(made)
        assert started[0].returncode == 1
        with pytest.raises(ChildProcessError):
            os.waitpid(started[0].pid, 0)
    assert len(started) == (python == "false")
    assert made._deaths == 1
    assert not made.update(wait=True)


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
    made = remote(learning_budget=1e-7, held_back_share=0.0, warmup_steps=0, replay=1.0)
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
