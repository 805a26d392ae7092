"""`Transport`: how a serving process reaches a learner elsewhere. Implemented by [`hf_osd.remote.supervisor.Supervisor`], for a process of its own, and by
[`hf_osd.remote.channel.RankTransport`], for a rank of a job."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback

OnFrame = Callable[[str, "dict[str, Tensor]", dict], Any]  # kind, tensors, values
OnDeath = Callable[[str], Any]  # a sentence for the log
# Seconds that anybody waits for an answer.
LONGEST_ANSWER = 3600.0


class Connection(Protocol):
    """Carries frames to one learner, for as long as both ends live."""

    def send(
        self,
        kind: str,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
        feedback: Sequence[Feedback] = (),
    ):
        """Have a frame sent, soon: of tensors, or of requests, and plain values. To a dead end nothing is sent."""

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Tell whether less waits to be sent than `buffer` may hold, so that more may be."""

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function tells whether one may still come; it is called until it is `False`, and bounds the wait."""


class Transport(Protocol):
    """Connects to a learner, again where that has died and can be replaced."""

    shared: bool  # several serving processes teach the one learner, whose own its state and weights are
    over: str | None  # why nothing will be learnt any more
    restarts: int  # learners started in place of dead ones

    @property
    def is_starting(self) -> bool:
        """Whether the first learner has not begun yet, and so has learnt nothing."""

    @property
    def outlook(self) -> str:
        """What follows from a death, in sentences."""

    def listen(self, on_frame: OnFrame, on_death: OnDeath):
        """Call these, from a thread, for each frame that comes and for each death; no `connect` returns another connection before `on_death` has."""

    def connect(self, requests: int = 0) -> Connection | None:
        """The connection, made if need be and if it may be; `None` if there is none now.

        Args:
            requests (`int`, defaults to 0): how many have been served since the last time.
        """

    def after_fork(self) -> str | None:
        """In a forked child: leave the learner to the parent. Returns why there can be none here; `None` if there can."""

    def close(self):
        """End the learner, or tell it that nothing more comes; and wait for that, though not for ever."""


def weakly(method: Callable) -> Callable:
    """Wrap a bound method so that holding it keeps its object from nothing; once that is gone, calls do nothing."""
    reference = weakref.WeakMethod(method)

    def call(*args):
        bound = reference()
        return None if bound is None else bound(*args)

    return call
