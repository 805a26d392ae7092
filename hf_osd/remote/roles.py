"""Parts a job into serving ranks and a learning rank: replicas of a target send what they verified, one process without a target learns from all of it and
sends its weights back."""

from __future__ import annotations

import logging
import os
import queue
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from torch import Tensor
from torch import distributed as dist

from hf_osd.distill.ranks import LAUNCH_VARIABLES, RankGroup
from hf_osd.learning.learner import Learner
from hf_osd.remote.channel import RankTransport
from hf_osd.remote.frames import BadFrame, to_bytes
from hf_osd.remote.learner import RemoteLearner
from hf_osd.remote.service import LearnerService

if TYPE_CHECKING:
    from hf_osd.learning.protocol import LearningAssistant

logger = logging.getLogger(__name__)

# Only a closed connection is a death: a rank may serve for days before there is a batch to send.
_FOR_EVER = timedelta(days=3650)
# Seconds between two checks that a rank still serves.
_POLL = 0.5


class JobRoles:
    """Assigns the processes of a job: the last one learns, the others serve.

    Make it once in each process, before anything of accelerate: it connects the processes, and hides them from accelerate, which then takes each to be
    alone. So nothing that trains waits for a rank that serves.

    Args:
        init_method (`str`, *optional*): how torch.distributed finds the other processes; from the variables of `accelerate launch` if left out.

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
        # The serving ranks, to add up their figures, say.
        self.serving = RankGroup() if self.learns else RankGroup(size - 1, rank, group=group)


def serve_separately(assistant: LearningAssistant, roles: JobRoles):
    """Move the learning of `assistant` to the learning rank. Every serving rank calls this, with the same draft, and `assistant.close()` at its end.

    Raises:
        ValueError: if the assistant does not learn inline, or not at all.
    """
    _inline(assistant).close()
    transport = RankTransport(roles.learning_rank, "the learning rank")
    assistant.learner = RemoteLearner(transport, assistant.serving, assistant.buffer, assistant.osd_config)


class LearningRank:
    """Learns from the feedback of all serving ranks, with the only buffer and the only gate of the job.

    Args:
        assistant (`OnlineAssistant`): with the same draft and config as on the serving ranks; intervals count the requests of all ranks. It serves no
            calls and needs no target.
        roles (`JobRoles`): of the job.
        weights_every (`int`): weights are sent once they have changed so many times; the static draft, where it is better, at once.

    Raises:
        ValueError: if the assistant does not learn inline, or not at all.
    """

    def __init__(self, assistant: LearningAssistant, roles: JobRoles, weights_every: int = 1):
        self.learner, self._serving = _inline(assistant), assistant.serving
        self._service = LearnerService(self.learner, flush=lambda: self._learn(None))
        self._every, self._sent = weights_every, self._serving.version
        self._most = assistant.osd_config.requests_an_update
        self._frames: queue.SimpleQueue = queue.SimpleQueue()
        self.channels = {rank: RankTransport(rank, f"rank {rank}") for rank in range(roles.learning_rank)}
        for rank, channel in self.channels.items():
            channel.listen(
                on_frame=lambda *frame, rank=rank: self._frames.put((rank, *frame)),
                on_death=lambda sentence: logger.error("%s Learning goes on from the others.", sentence),
            )

    def run(self):
        """Learn until no rank serves any more."""
        while any(channel.open for channel in self.channels.values()) or not self._frames.empty():
            self._handle_waiting()
            if self.learner.is_due():
                self._learn(self._most)
        self._learn(None)  # requests that the last of them sent
        for channel in self.channels.values():
            channel.close()

    def _handle_waiting(self):
        """Handle all frames that wait; if there are none, wait a moment for one."""
        with suppress(queue.Empty):
            self._handle(*self._frames.get(timeout=_POLL))
            while True:
                self._handle(*self._frames.get_nowait())

    def _handle(self, rank: int, kind: str, tensors: dict[str, Tensor], values: dict):
        try:
            answer = self._service.handle(kind, tensors, values)
        except BadFrame as error:
            logger.error("Rank %d: %s Learning goes on without it.", rank, error)
            return
        if answer is not None:
            self._send_weights()
            tensors, values = answer
            self.channels[rank].send("answer", tensors, values | self._service.report())

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
        data = to_bytes("weights", dict(self._serving.weights()), self._service.report())  # once for all
        for channel in self.channels.values():
            channel.send_bytes("weights", data, latest=True)


def _inline(assistant: LearningAssistant) -> Learner:
    if assistant.learner is None and assistant.osd_config.learns:
        raise ValueError(f"The assistant does not learn, so it cannot on another rank. {assistant.learning_choice}")
    if not isinstance(assistant.learner, Learner):
        raise ValueError(
            f"The assistant has learn={assistant.osd_config.learn!r}; make it with learn='inline' to learn on another rank."
        )
    return assistant.learner
