"""Processes that learn, as threads at the other ends of two pipes, which do as the real one does, or not; and what is asked of them."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path

import torch

from hf_osd.feedback.trace import unpack
from hf_osd.remote.frames import FrameWriter, read_frame
from hf_osd.remote.shared_flags import BUSY

LONG = 120  # seconds in which anything has happened, on any machine
INTERVAL = 2


class Process:
    """Stands for a `Popen`, and does what `Process.behaviour(process)` does, in a thread."""

    behaviour = None
    made: list = []  # noqa: RUF012 (a test's own, by monkeypatch)

    def __init__(self, argv, **settings):
        self.folder, self.pid = Path(argv[3]), 0
        self.laid_out = sorted(path.name for path in self.folder.iterdir())
        self.beat()
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

    def beat(self, beat: int = 1):
        """A sign of life."""
        with (self.folder / BUSY).open("r+b") as file:
            file.seek(1)
            file.write(bytes([beat]))

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
        self.frames.write(
            "weights", {name: p + by for name, p in serving.weights()}, {"figures": FIGURES | figures, "base": 0}
        )


FIGURES = {
    "updates": 1,
    "failed_updates": 0,
    "rejected_updates": 0,
    "accepted_updates": 1,
    "learned_tokens": 40,
    "learning_seconds": 0.5,
    "learner_restarts": 0,
    "longest_update": 0.25,
    "learning_rate": 1e-3,
    "learning_rate_reason": "as given",
    "too_slow": None,
    "serves_static": False,
    "regret_vs_static": -0.1,
    "estimate": None,
}


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
        learner.add(request)


def wait_for_death(learner):
    assert learner.transport.pipe.dead.wait(LONG)
