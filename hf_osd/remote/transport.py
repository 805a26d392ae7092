"""`Transport`: carries frames between a serving process and a learner elsewhere. Implemented twice: by [`hf_osd.remote.supervisor.Supervisor`] for a
learning process, and by [`hf_osd.remote.channel.RankTransport`] for a learning rank."""

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
# Longest wait for an answer, in seconds.
ANSWER_TIMEOUT = 3600.0


class Connection(Protocol):
    """Carries frames to one learner, for as long as both ends live."""

    def send(
        self,
        kind: str,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
        feedback: Sequence[Feedback] = (),
    ):
        """Queue a frame of tensors or of requests, and plain values. It is dropped if the other end is dead."""

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Return whether more may be sent: no more waits than `buffer` may hold."""

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function returned is called again and again, and says whether one may still come; in the end it says no."""


class Transport(Protocol):
    """Connects to a learner, and again to another one where that died and can be replaced."""

    shared: bool  # several assistants teach the one learner, which alone has its state and sets its weights
    over: str | None  # why nothing will be learnt any more
    restarts: int  # learners started in place of dead ones

    @property
    def is_starting(self) -> bool:
        """Whether the first learner has yet to begin, and has learnt nothing."""

    @property
    def outlook(self) -> str:
        """Says what follows from a death, in sentences for the log."""

    def listen(self, on_frame: OnFrame, on_death: OnDeath):
        """Call these, in a thread, for each frame that comes and for each death. `connect` returns no other connection before `on_death` has returned."""

    def connect(self, requests: int = 0) -> Connection | None:
        """Return the connection, which is made if there is none and there may be; `None` if there is none.

        Args:
            requests (`int`, defaults to 0): requests served since the last call.
        """

    def after_fork(self) -> str | None:
        """Leave the learner to the parent, in a forked child. Returns why there can be none here; `None` if there can."""

    def close(self):
        """End the learner, or tell a shared one that nothing more comes; the wait for it is bounded."""


def weakly(method: Callable) -> Callable:
    """Wrap a bound method in a function that does not keep its object alive, and does nothing once that is gone."""
    reference = weakref.WeakMethod(method)

    def call(*args):
        bound = reference()
        return None if bound is None else bound(*args)

    return call
