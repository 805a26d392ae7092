"""`Supervisor`: keeps a process that learns. Where it has died, another one is started, later each time, and a few times at most."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.schedule import backoff
from hf_osd.remote.draft_folder import check_loadable, write_draft_folder
from hf_osd.remote.learner import RemoteLearner
from hf_osd.remote.pipe import Pipe
from hf_osd.remote.transport import OnDeath, OnFrame, weakly
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Processes that are started in place of dead ones, until one has lived through so many requests.
_MOST_RESTARTS, _FORGIVEN = 5, 1000


def learn_in_process(serving: HotSwapDraft, buffer: FeedbackBuffer, config: OnlineConfig) -> RemoteLearner:
    """Make a learner in a process of its own, which is started when there is something to learn.

    Raises:
        ValueError: if another process could not load the draft.
    """
    check_loadable(serving.active)
    lay_out = functools.partial(write_draft_folder, serving=serving, config=config)
    return RemoteLearner(Supervisor(lay_out, config.update_interval), serving, buffer, config)


class Supervisor:
    """A [`hf_osd.remote.transport.Transport`] to a process, which it starts.

    After n deaths in a row the next process is started once 2ⁿ × `interval` requests have come, at most 64 × `interval`; weights that serve end the row.
    After five restarts none is started any more, unless one of the processes lived through 1,000 requests.

    In a forked child it starts a process of its own, and leaves alone that of the parent.

    Args:
        lay_out (`Callable[[Path], None]`): writes what a process begins with into a folder.
        interval (`int`): requests between two updates.
    """

    shared = False

    def __init__(self, lay_out: Callable[[Path], None], interval: int):
        self._lay_out, self._interval = lay_out, interval
        self.pipe: Pipe | None = None  # to the last process
        self.restarts, self.over = 0, None
        self._deaths = self._requests = 0  # in a row; since the last death
        self._restarts_left = _MOST_RESTARTS
        self._lock, self._closed = released(threading.Lock()), False

    def listen(self, on_frame: OnFrame, on_death: OnDeath):
        self._on_frame, self._on_death = on_frame, on_death

    def connect(self, requests: int = 0) -> Pipe | None:
        """The process, started if it was not, or if it has died and enough requests have come since."""
        with self._lock:
            self._requests += requests
            if self._closed or self.over is not None:
                return None
            if self.pipe is not None and not self.pipe.dead.is_set():
                return self.pipe
            if self._deaths:
                if self._requests < self.wait:
                    return None
                self.restarts += 1
                self._restarts_left -= 1
            self.pipe = None
            try:
                self.pipe = Pipe(self._lay_out, weakly(self._take_frame), weakly(self._count_exit))
            except Exception:  # the disk is full, say: no reason to break the user's call
                self._count_death()
                logger.exception("The process that learns could not be started. %s", self.outlook)
            return self.pipe

    @property
    def is_starting(self) -> bool:
        pipe = self.pipe
        return pipe is not None and not (pipe.has_begun or pipe.dead.is_set() or self._deaths)

    @property
    def wait(self) -> int:
        """Requests that must come after a death before another process is started."""
        return self._interval * backoff(self._deaths)

    @property
    def outlook(self) -> str:
        if self.over is not None:
            return "None is started any more: the draft serves as it is, and learns no more."
        return f"The draft serves as it is; another process is started after {self.wait} more requests."

    def note_busy(self, busy: bool):
        """Let the process see whether somebody is served. May be called anywhere, and takes no lock."""
        pipe = self.pipe
        if pipe is not None:
            pipe.note_busy(busy)

    def after_fork(self) -> None:
        """In a forked child: begin with a process of its own."""
        if self.pipe is not None:
            self.pipe.forget()
            self.pipe = None
            logger.info("The process was forked: in this one the draft learns by a process of its own.")

    def close(self):
        """End the process, and wait for that."""
        with self._lock:
            self._closed, pipe = True, self.pipe
        if pipe is not None:
            pipe.close()

    def _take_frame(self, kind: str, tensors: dict[str, Tensor], values: dict):
        self._on_frame(kind, tensors, values)
        if kind == "weights":  # which serve, or that would have raised
            self._deaths = 0

    def _count_exit(self, status: int):
        with self._lock:
            self._count_death()
        killed = ", killed, as the system does where memory is short" if status == -9 else ""
        self._on_death(f"The process that learns has died (exit status {status}{killed}); what it wrote is on stderr.")

    def _count_death(self):
        if self._requests >= _FORGIVEN:
            self._restarts_left = _MOST_RESTARTS
        self._deaths, self._requests = self._deaths + 1, 0
        if not self._restarts_left:
            self.over = (
                f"the process that learns has died, and so have {_MOST_RESTARTS} that were started in its place"
            )
