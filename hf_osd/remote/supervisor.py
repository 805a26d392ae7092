"""`Supervisor`: keeps a learning process running. One that died is replaced, later each time, and a few times at most."""

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

# Restarts in all, and the requests that one process must live through for the count to begin anew.
_MOST_RESTARTS, _FORGIVEN = 5, 1000


def learn_in_process(serving: HotSwapDraft, buffer: FeedbackBuffer, config: OnlineConfig) -> RemoteLearner:
    """Return a learner in another process, which starts with the first request to learn from.

    Raises:
        ValueError: if another process could not load the draft.
    """
    check_loadable(serving.active)
    write_folder = functools.partial(write_draft_folder, serving=serving, config=config)
    return RemoteLearner(Supervisor(write_folder, config.update_interval), serving, buffer, config)


class Supervisor:
    """Starts a process that learns, and another one where that died: a [`hf_osd.remote.transport.Transport`].

    After n deaths in a row the next process is started once 2ⁿ × `interval` requests have come, at most 64 × `interval`; weights that serve end the row.
    After five restarts none is started any more, unless one of the processes lived through 1,000 requests.

    In a forked child it starts another process, and leaves the parent's alone.

    Args:
        write_folder (`Callable[[Path], None]`): writes the files that a process begins with into a folder.
        interval (`int`): requests between two updates.
    """

    shared = False

    def __init__(self, write_folder: Callable[[Path], None], interval: int):
        self._write_folder, self._interval = write_folder, interval
        self.pipe: Pipe | None = None  # to the process that was started last
        self.restarts, self.over = 0, None
        self._deaths = self._requests = 0  # in a row; since the last death
        self._restarts_left = _MOST_RESTARTS
        self._lock, self._closed = released(threading.Lock()), False

    def listen(self, on_frame: OnFrame, on_death: OnDeath):
        self._deliver, self._announce = on_frame, on_death

    def connect(self, requests: int = 0) -> Pipe | None:
        """Return the pipe to the process, which is started if it was not, or if it has died and enough requests have come since."""
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
                self.pipe = Pipe(self._write_folder, weakly(self._on_frame), weakly(self._on_exit))
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
        """Show the process whether a call runs. May be called anywhere, and takes no lock."""
        pipe = self.pipe
        if pipe is not None:
            pipe.note_busy(busy)

    def after_fork(self) -> None:
        """Leave the process to the parent; the next `connect` in a forked child starts another."""
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

    def _on_frame(self, kind: str, tensors: dict[str, Tensor], values: dict):
        self._deliver(kind, tensors, values)
        if kind == "weights":  # which serve, or that would have raised
            self._deaths = 0

    def _on_exit(self, status: int):
        with self._lock:
            self._count_death()
        killed = ", killed, as the system does where memory is short" if status == -9 else ""
        self._announce(f"The process that learns has died (exit status {status}{killed}); what it wrote is on stderr.")

    def _count_death(self):
        if self._requests >= _FORGIVEN:
            self._restarts_left = _MOST_RESTARTS
        self._deaths, self._requests = self._deaths + 1, 0
        if not self._restarts_left:
            self.over = (
                f"the process that learns has died, and so have {_MOST_RESTARTS} that were started in its place"
            )
