"""`RankTransport`: frames between two ranks of a job, over torch.distributed. They go from process to process, so that a rank that dies parts from each of
its peers alone."""

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
from hf_osd.remote.transport import LONGEST_ANSWER, OnDeath, OnFrame

if TYPE_CHECKING:
    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# Seconds that a thread is given to send what is left.
_PATIENCE = 30.0


def feedback_frame(batch: Sequence[Feedback], kind: str = "feedback") -> bytes:
    """Make a frame of requests, without the draft's log-probabilities of the target's top k: a quarter of it, and not used in learning."""
    batch = [replace(one, draft_logps=torch.full_like(one.draft_logps, torch.nan)) for one in batch]
    return to_bytes(kind, pack(batch))


class RankTransport:
    """Both a [`hf_osd.remote.transport.Transport`] to the learning rank and its one [`hf_osd.remote.transport.Connection`]; the learning rank has one of
    these to each rank that serves. A thread each way; a rank that has died is not replaced.

    Args:
        peer (`int`): the other rank.
        name (`str`): the other rank, in words.
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
        """Begin; `on_death` is called if the other rank is gone without having ended the connection."""
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
        """Have a frame sent, soon; what is in it may change once this has returned."""
        self.send_bytes(kind, feedback_frame(feedback, kind) if feedback else to_bytes(kind, tensors, values))

    def send_bytes(self, kind: str, data: bytes, latest: bool = False):
        """Have a frame sent, soon, that [`hf_osd.remote.frames.to_bytes`] has made. With `latest`, those of its kind that wait are not sent any more: to a
        slow peer old weights are not worth the time."""
        with self._changed:
            if self.open:
                if latest:
                    self._out = deque(item for item in self._out if item[0] != kind)
                self._out.append((kind, data))
                self._changed.notify()

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Tell whether no more bytes wait than `buffer` may hold."""
        with self._changed:
            return sum(len(data) for _, data in self._out) <= buffer.max_bytes

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function tells whether one may still come: the other rank is there, and has not taken longer than anybody
        waits. A rank that learns is silent for long."""
        until = time.monotonic() + LONGEST_ANSWER
        return lambda: self.open and time.monotonic() < until

    def after_fork(self) -> str:
        """In a forked child: why this rank cannot learn there."""
        self.open = False
        return "what it says to the learning rank goes through threads that are not here"

    def close(self):
        """Send what waits, and end when the other does."""
        self._closing = True
        self.send(END)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PATIENCE)

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
            except RuntimeError:  # gone: whoever reads notices
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
