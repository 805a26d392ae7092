"""`RankTransport`: carries frames between two ranks of a job, over torch.distributed. They go point to point, so that a rank that dies breaks its own
connections and no others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from hf_osd.feedback.trace import pack
from hf_osd.remote.frames import END, from_bytes, to_bytes
from hf_osd.remote.transport import ANSWER_TIMEOUT, OnDeath, OnFrame

if TYPE_CHECKING:
    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# Seconds that each thread has to send what is left.
_CLOSE_TIMEOUT = 30.0


def feedback_frame(batch: Sequence[Feedback], kind: str = "feedback") -> bytes:
    """Return a frame of requests without the draft's log-probabilities of the target's top k: they are a quarter of it, and learning does not use them."""
    batch = [replace(one, draft_logps=torch.full_like(one.draft_logps, torch.nan)) for one in batch]
    return to_bytes(kind, pack(batch))


class RankTransport:
    """Connects to another rank: a [`hf_osd.remote.transport.Transport`], and its only [`hf_osd.remote.transport.Connection`] too, for a rank that died is
    not replaced. A serving rank has one to the learning rank, and that has one to each serving rank. One thread sends and one receives.

    Args:
        peer (`int`): the other rank.
        name (`str`): the other rank in the log, such as "rank 1".
    """

    shared, restarts, is_starting = True, 0, False
    outlook = "The draft serves on as it is, and learns no more."

    def __init__(self, peer: int, name: str):
        self.peer, self.name = peer, name
        self.open = True
        self._closing = False
        self._out: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()

    @property
    def over(self) -> str | None:
        return None if self.open else f"{self.name} is gone"

    def listen(self, on_frame: OnFrame, on_death: OnDeath):
        """Start the threads. `on_death` is called if the other rank goes without ending the connection."""
        self._on_frame, self._on_death = on_frame, on_death
        self._threads = [
            threading.Thread(target=run, name=f"hf_osd rank {self.peer}", daemon=True)
            for run in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    def connect(self, requests: int = 0) -> RankTransport | None:
        return self if self.open else None

    def send(
        self,
        kind: str,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
        feedback: Sequence[Feedback] = (),
    ):
        """Queue a frame. Its tensors are copied before this returns."""
        self.send_bytes(kind, feedback_frame(feedback, kind) if feedback else to_bytes(kind, tensors, values))

    def send_bytes(self, kind: str, data: bytes, latest: bool = False):
        """Queue a frame that [`hf_osd.remote.frames.to_bytes`] made. With `latest`, it replaces those of its kind that wait: old weights are not worth a
        slow peer's time."""
        with self._changed:
            if self.open:
                if latest:
                    self._out = deque(item for item in self._out if item[0] != kind)
                self._out.append((kind, data))
                self._changed.notify()

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Return whether at most as many bytes wait as `buffer` may hold."""
        with self._changed:
            return sum(len(data) for _, data in self._out) <= buffer.max_bytes

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function returned says whether one may still come: the connection is open, and `ANSWER_TIMEOUT` has not
        passed. A rank that learns shows no other sign of life."""
        until = time.monotonic() + ANSWER_TIMEOUT
        return lambda: self.open and time.monotonic() < until

    def after_fork(self) -> str:
        """Close this end in a forked child. Returns why nothing can be learnt there."""
        self.open = False
        return "what it says to the learning rank goes through threads that are not here"

    def close(self):
        """Send what waits, and end the connection when the other end does."""
        self._closing = True
        self.send(END)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_TIMEOUT)

    def _write(self):
        kind = None
        while kind != END:
            with self._changed:
                while not self._out and self.open:
                    self._changed.wait()
                if not self._out:
                    return
                kind, data = self._out.popleft()
            try:
                dist.send(torch.tensor([len(data)], device="cpu"), self.peer)
                dist.send(torch.frombuffer(bytearray(data), dtype=torch.uint8), self.peer)
            except RuntimeError:  # gone, which the reading thread notices
                return

    def _read(self):
        try:
            while (frame := self._receive())[0] != END:
                try:
                    self._on_frame(*frame)
                except Exception:
                    logger.exception("What %s sent (%s) cannot be used.", self.name, frame[0])
            ended = True
        except Exception:  # gone, or not to be understood
            ended = self._closing
        with self._changed:
            self.open = False
            self._out.clear()
            if ended and not self._closing:
                self._out.append((END, to_bytes(END)))
            self._changed.notify()
        if not ended:
            self._on_death(f"{self.name.capitalize()} is gone.")

    def _receive(self) -> tuple[str, dict[str, Tensor], dict]:
        length = torch.zeros(1, dtype=torch.long, device="cpu")
        dist.recv(length, self.peer)
        data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        dist.recv(data, self.peer)
        return from_bytes(data.numpy().tobytes())
