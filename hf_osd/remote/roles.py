"""Serving ranks and a learning rank: replicas of a target send what they verified, one process without a target learns from it all, and its weights come
back. Frames go from process to process over torch.distributed, so that one that dies parts from its peer alone."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import distributed as dist

from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import LAUNCH_VARIABLES, RankGroup
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.trace import pack, unpack
from hf_osd.learning.learner import Learner
from hf_osd.metrics.intervals import figures_from_json, figures_to_json
from hf_osd.remote.frames import from_bytes, to_bytes

if TYPE_CHECKING:
    from hf_osd.learning.protocol import LearningAssistant
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Silence is no death, which closes the connection: somebody may serve for days before there is a batch to send.
_FOR_EVER = timedelta(days=3650)
# Seconds that a thread is given to send what is left, and between two looks at whether an update is due by age.
_PATIENCE, _LOOK = 30.0, 0.5
# Seconds that anybody waits for an answer.
_ANSWER = 3600.0


class JobRoles:
    """Who does what in a job of several processes: the last one learns, the others serve.

    Made once in each process, before anything of accelerate: it brings the processes together, and hides them from accelerate, by whose view each is then
    alone. Nothing that trains waits for a rank that serves.

    Args:
        init_method (`str`, *optional*): where they meet, as torch.distributed has it; by the variables of `accelerate launch` if left out.

    Raises:
        ValueError: if there is no second process.
    """

    def __init__(self, init_method: str | None = None):
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size < 2:
            raise ValueError("Serving and learning apart takes at least 2 processes; start more: --num_processes 2.")
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size, timeout=_FOR_EVER)
        group = dist.new_group(range(size - 1), backend="gloo", timeout=dist.default_pg_timeout)
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        self.rank, self.learning_rank, self.learns = rank, size - 1, rank == size - 1
        # Of those that serve: to bring their figures together, say.
        self.serving = RankGroup() if self.learns else RankGroup(size - 1, rank, group=group)


class RankTransport:
    """Frames to and from another rank, by a thread each way.

    Args:
        peer (`int`): the other rank.
        came (`Callable[[str, dict, dict], None]`): given kind, tensors and values of each frame, in a thread.
        died (`Callable[[], None]`): called once, in a thread, if the other is gone without having said so.
    """

    _END = "end"

    def __init__(self, peer: int, came: Callable[[str, dict, dict], None], died: Callable[[], None]):
        self.peer, self._came, self._died = peer, came, died
        self.open = True
        self._closing = False
        self._out: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=run, name=f"hf_osd rank {peer}", daemon=True) for run in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, kind: str, data: bytes, latest: bool = False):
        """Have a frame sent, soon, that [`hf_osd.remote.frames.to_bytes`] has made. With `latest`, those of its kind that wait are not sent any more: to a slow peer
        old weights are not worth the time."""
        with self._changed:
            if self.open:
                if latest:
                    self._out = deque(item for item in self._out if item[0] != kind)
                self._out.append((kind, data))
                self._changed.notify()

    @property
    def waiting(self) -> int:
        """Bytes that are not sent yet."""
        with self._changed:
            return sum(len(data) for _, data in self._out)

    def close(self):
        """Send what waits, and end when the other does."""
        self._closing = True
        self.send(self._END, to_bytes(self._END))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PATIENCE)

    def _write(self):
        kind = None
        while kind != self._END:
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
            while (frame := self._receive())[0] != self._END:
                try:
                    self._came(*frame)
                except Exception:
                    logger.exception("What rank %d sent (%s) cannot be used.", self.peer, frame[0])
            ended = True
        except Exception:  # gone, or not to be understood
            ended = self._closing
        with self._changed:
            self.open = False
            self._out.clear()
            if ended and not self._closing:
                self._out.append((self._END, to_bytes(self._END)))
            self._changed.notify()
        if not ended:
            self._died()

    def _receive(self) -> tuple[str, dict[str, Tensor], dict]:
        length = torch.zeros(1, dtype=torch.long, device="cpu")
        dist.recv(length, self.peer)
        data = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        dist.recv(data, self.peer)
        return from_bytes(data.numpy().tobytes())


class SeparateLearner:
    """The learning rank, as whoever serves sees it: takes feedback, sends it in batches of `update_interval` requests, and serves the weights that come
    back. If the learning rank dies, the draft serves on as it is.

    Args:
        serving (`HotSwapDraft`): the draft to refresh.
        buffer (`FeedbackBuffer`): what waits to be sent.
        config (`OnlineConfig`): how much is sent at once.
        learning_rank (`int`): where to.
    """

    def __init__(self, serving: HotSwapDraft, buffer: FeedbackBuffer, config: OnlineConfig, learning_rank: int):
        self._serving, self.buffer, self.config = serving, buffer, config
        self._figures: dict = {}
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self.channel = RankTransport(learning_rank, self._take_frame, self._lost)

    def add(self, feedback: Feedback):
        """Keep a request until a batch is full."""
        self.buffer.add(feedback)

    def is_due(self) -> bool:
        """Whether a batch is full, and those before it are not still on their way: what is too much for the other rank stays in the buffer, which
        is bounded."""
        full = len(self.buffer.new()) >= self.config.update_interval
        return full and self.channel.open and self.channel.waiting <= self.config.buffer_bytes

    def trouble(self) -> str | None:
        """What the learning rank says is wrong, if learning goes on and changes nothing."""
        return self._figures.get("trouble")

    def update(self, wait: bool = True) -> bool:
        """Send what waits. With `wait`, have the learning rank learn from all that it has, and wait for it: `True` if the serving draft was refreshed by
        that, `False` also if there is no learning rank any more."""
        batch = self.buffer.new()
        if batch and self.channel.open:
            self.buffer.discard(batch)
            self.channel.send("feedback", feedback_frame(batch))
        if not wait:
            return False
        with self._asking:
            until = time.monotonic() + _ANSWER
            self.channel.send("flush", to_bytes("flush"))
            while self.channel.open and time.monotonic() < until:
                with suppress(queue.Empty):
                    return self._answers.get(timeout=_LOOK)
        return False

    def note_served(self, seconds: float):
        """Nothing to the learning rank, which learns beside serving."""

    def metrics(self) -> dict:
        return dict(self._figures)

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Refused: another rank's next weights would undo it.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("The draft learns on another rank, which alone gives it weights; refresh it there.")

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Refused: it is the learning rank's.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("The learner's state is on another rank; save the draft itself with save_pretrained.")

    def after_fork(self) -> str:
        """In a forked child: why this cannot learn there."""
        self.channel.open = False
        return "what it says to the learning rank goes through threads that are not here"

    def close(self):
        """Say that this rank serves no more."""
        self.channel.close()

    def _take_frame(self, kind: str, tensors: dict[str, Tensor], values: dict):
        self._figures = figures_from_json(values["figures"])
        if kind == "weights":
            self._serving.refresh(tensors)
        elif kind == "answer":
            self._answers.put(values["refreshed"])

    def _lost(self):
        logger.error("The learning rank is gone. The draft serves on as it is, and learns no more.")


def feedback_frame(batch: Sequence[Feedback]) -> bytes:
    """A frame of requests, without what the draft said of the target's top k: a quarter of it, which no learning asks for."""
    batch = [replace(one, draft_logps=torch.full_like(one.draft_logps, torch.nan)) for one in batch]
    return to_bytes("feedback", pack(batch))


def serve_separately(assistant: LearningAssistant, roles: JobRoles):
    """Let `assistant` learn on the learning rank, in place of here. Every serving rank calls this, with the same draft, and `assistant.close()` at its end.

    Raises:
        ValueError: if the assistant does not learn inline, or not at all.
    """
    _inline(assistant).close()
    assistant.learner = SeparateLearner(assistant.serving, assistant.buffer, assistant.osd_config, roles.learning_rank)


class LearningRank:
    """The process that learns, from the feedback of all that serve: it has the one buffer, and the gate.

    Args:
        assistant (`OnlineAssistant`): with the same draft and config as on the serving ranks; its intervals are here of all requests together. It is
            given no calls, and needs no target.
        roles (`JobRoles`): of the job.
        weights_every (`int`): times that other weights are to serve after which they go out. The static draft, where it is better, goes out at once.

    Raises:
        ValueError: if the assistant does not learn inline, or not at all.
    """

    def __init__(self, assistant: LearningAssistant, roles: JobRoles, weights_every: int = 1):
        self.learner, self._serving = _inline(assistant), assistant.serving
        config = assistant.osd_config
        self._every, self._sent = weights_every, self._serving.version
        self._most = config.requests_an_update
        self._came: queue.SimpleQueue = queue.SimpleQueue()
        self.channels = {
            rank: RankTransport(
                rank,
                came=lambda kind, tensors, values, rank=rank: self._came.put((rank, kind, tensors)),
                died=lambda rank=rank: logger.error("Rank %d is gone. Learning goes on from the others.", rank),
            )
            for rank in range(roles.learning_rank)
        }

    def run(self):
        """Learn until nobody serves any more."""
        while any(channel.open for channel in self.channels.values()) or not self._came.empty():
            self._take_frames()
            if self.learner.is_due():
                self._learn(self._most)
        self._learn(None)  # what the last of them left
        for channel in self.channels.values():
            channel.close()

    def _take_frames(self):
        """All that have come; if there is none, the next, or nothing for a while."""
        with suppress(queue.Empty):
            self._take_frame(*self._came.get(timeout=_LOOK))
            while True:
                self._take_frame(*self._came.get_nowait())

    def _take_frame(self, rank: int, kind: str, tensors: dict[str, Tensor]):
        if kind == "feedback":
            try:
                requests = unpack(tensors)
            except Exception:
                logger.exception("What rank %d sent is no feedback; learning goes on without it.", rank)
                return
            for feedback in requests:
                self.learner.add(feedback)
        elif kind == "flush":
            values = {"refreshed": self._learn(None)}
            self._send_weights()
            self.channels[rank].send("answer", to_bytes("answer", values=values | self._figures()))
        else:
            logger.error("Rank %d sent a frame of kind %r: all ranks must run one version of hf_osd.", rank, kind)

    def _learn(self, most: int | None) -> bool:
        was_static = self.learner.contenders.serves_static
        refreshed = self.learner.update(most=most)
        goes_back = self.learner.contenders.serves_static and not was_static
        if self._serving.version - self._sent >= self._every or goes_back:
            self._send_weights()
        return refreshed

    def _send_weights(self):
        if self._serving.version == self._sent:
            return
        self._sent = self._serving.version
        data = to_bytes("weights", dict(self._serving.weights()), self._figures())  # once for all
        for channel in self.channels.values():
            channel.send("weights", data, latest=True)

    def _figures(self) -> dict:
        return {"figures": figures_to_json(self.learner.metrics())}


def _inline(assistant: LearningAssistant) -> Learner:
    if assistant.learner is None and assistant.osd_config.learns:
        raise ValueError(f"The assistant does not learn, so it cannot on another rank. {assistant.learning_choice}")
    if not isinstance(assistant.learner, Learner):
        raise ValueError(
            f"The assistant has learn={assistant.osd_config.learn!r}; make it with learn='inline' to learn on another rank."
        )
    return assistant.learner
