"""`RemoteLearner`: a learner in a process of its own, as whoever serves sees it. If the process dies, the serving draft stays and another one is
started."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.learner import Learner
from hf_osd.metrics.intervals import figures_from_json
from hf_osd.remote.frames import BASE
from hf_osd.remote.worker import Worker
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Processes that are started in place of dead ones, until one has taken so many requests.
_MOST_RESTARTS, _FORGIVEN = 5, 1000
# After n deaths in a row, the next process waits for 2ⁿ updates' requests, at most for this many.
_LONGEST_WAIT = 64
# What is summed up over processes.
_COUNTS = (
    "updates",
    "failed_updates",
    "rejected_updates",
    "accepted_updates",
    "learned_tokens",
    "learning_seconds",
    "learner_restarts",
)


class RemoteLearner:
    """Sends feedback to a process that learns, and serves the weights that come back.

    The process has a gate and a buffer of its own; the buffer here holds the same feedback, for a process that has to be started anew. What the dead one
    knew of its candidate is lost. One that dies again and again is not started any more, and the draft serves as it is.

    In a forked child this one starts a process of its own, and leaves alone that of before.

    Args:
        serving (`HotSwapDraft`): the draft to start from, and to refresh.
        buffer (`FeedbackBuffer`), config (`OnlineConfig`): as [`hf_osd.learning.learner.Learner`] takes them.

    Raises:
        ValueError: if the draft is not a class of transformers, or serves with an adapter: another process could not load it.
    """

    def __init__(self, serving: HotSwapDraft, buffer: FeedbackBuffer, config: OnlineConfig):
        draft = serving.active
        if not type(draft).__module__.startswith("transformers."):
            raise ValueError(
                f"learn='process' loads the draft in another process, and {type(draft).__name__} is no class of transformers. Pass learn='background', which "
                "learns in a thread."
            )
        if getattr(draft, "peft_config", None):
            raise ValueError(
                "learn='process' loads the draft in another process as a plain checkpoint, and this one serves with an adapter that is not in its weights. Pass "
                "learn='background', which learns in a thread."
            )
        self._serving, self.buffer, self.config = serving, buffer, config
        self.restarts = 0
        self._base = 0  # how often the weights under an adapter were others
        self._figures: dict = {}  # of this process
        self._before = dict.fromkeys(_COUNTS, 0)  # of those that have died
        self._worker: Worker | None = None
        self._sent: weakref.WeakSet[Feedback] = weakref.WeakSet()  # to this process
        self._behind = False  # the buffer may hold what it has not been sent
        self._deaths = self._offered = 0  # in a row; since the last death
        self._restarts_left = _MOST_RESTARTS
        self._over: str | None = None  # why no process is started any more
        self._lock = released(threading.Lock())
        self._closed = False

    # What an assistant asks of every learner.

    def add(self, feedback: Feedback):
        """Send a request to the process. One that does not keep up is sent no more than the buffer holds."""
        with self._lock:
            self._offered += 1
            worker = self._running()
            if worker is not None and self._behind:
                self._send_held(worker)
            self.buffer.add(feedback)
            self.buffer.mark_seen([feedback])
            if worker is not None and worker.waiting <= len(self.buffer):
                self._sent.add(feedback)
                worker.send("feedback", [feedback])

    def is_due(self) -> bool:
        """Whether the buffer holds what is new and was not offered. When to learn is seen to by the process."""
        return bool(self.buffer.new()) and self._over is None

    def update(self, wait: bool = True) -> bool:
        """Send what has come into the buffer otherwise than by `add`. With `wait`, have the process learn from all that is new and wait for it: `True` if
        the serving draft was refreshed; `False` also if the process died over it."""
        if self._closed or self._over is not None or not (wait or self.buffer.new()):
            return False
        with self._lock:
            worker = self._running()
            if worker is not None and (self._behind or self.buffer.new()):
                self._send_held(worker)
        if not wait:
            return False
        try:
            _, values = self._ask("flush")
        except RuntimeError as error:
            logger.error("%s", error)
            return False
        return values["refreshed"]

    def note_served(self, seconds: float):
        """Nothing to the process, which learns beside serving."""

    def metrics(self) -> dict:
        counts = {name: before + self._figures.get(name, 0) for name, before in self._before.items()}
        counts["learner_restarts"] += self.restarts
        return self._figures | counts | ({} if self._over is None else {"learning_over": self._over})

    def trouble(self) -> str | None:
        """What the process says is wrong, if learning goes on and changes nothing."""
        return self._figures.get("trouble")

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Go on learning from weights that were trained elsewhere; with `base`, in an adapter over other weights of the plain draft, by its names."""
        with self._lock:
            worker = self._running()
            self._base += base is not None
        if worker is not None:
            # Copies: they are written some time later, and whoever trains them goes on.
            tensors = {name: weights[name].detach().clone() for name in self._serving.trainable}
            tensors |= {f"{BASE}{name}": tensor.detach().clone() for name, tensor in (base or {}).items()}
            worker.send("take", tensors=tensors, values={"base": self._base})

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """As [`hf_osd.learning.learner.Learner.state`]; that of a learner which begins with what serves, if there is no process that could give its own."""
        worker = self._worker
        if worker is not None and not worker.has_begun and not worker.dead.is_set() and not self._deaths:
            return self._state_of_what_serves()  # there is nothing else yet, and nothing to wait for
        try:
            tensors, values = self._ask("state")
        except RuntimeError:
            logger.warning(
                "The process that learns is dead: what is saved of learning is the draft that serves, without the optimizer and the rate of before."
            )
            return self._state_of_what_serves()
        return tensors, values["state"]

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`; the serving draft with it.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
            RuntimeError: if the process dies over it.
        """
        _, answer = self._ask("load", tensors, {"state": values})
        if "refused" in answer:
            raise ValueError(answer["refused"])
        self._behind = True  # a buffer may be restored with it

    def serve(self):
        """Done by the process itself."""

    def note_busy(self, busy: bool):
        """Whether somebody is served, for the process to see. May be called anywhere, and takes no lock."""
        worker = self._worker
        if worker is not None:
            worker.note_busy(busy)

    def after_fork(self) -> None:
        """In a forked child: begin with a process of its own."""
        if self._worker is None:
            return
        self._worker.forget()
        self._worker, self._behind = None, True
        self._sum_up()
        logger.info("The process was forked: in this one the draft learns by a process of its own.")

    def close(self):
        """End the process."""
        with self._lock:
            self._closed, worker = True, self._worker
        if worker is not None:
            worker.end()

    # The process.

    def _running(self) -> Worker | None:
        """The process, started if it was not, or if it has died and enough requests have come since."""
        if self._closed or self._over is not None:
            return None
        if self._worker is not None and not self._worker.dead.is_set():
            return self._worker
        if self._deaths:
            if self._offered < self._wait:
                return None
            self.restarts += 1
            self._restarts_left -= 1
        self._worker = None
        try:
            self._worker = Worker(
                self._serving, self.config, weakref.WeakMethod(self._came), weakref.WeakMethod(self._died), self._base
            )
        except Exception:  # the disk is full, say: no reason to break the user's call
            self._count_death()
            logger.exception("The process that learns could not be started. %s", self._what_follows())
            return None
        self._sent, self._behind = weakref.WeakSet(), True
        return self._worker

    def _send_held(self, worker: Worker):
        """All in the buffer that this process has not been sent: to be learnt what is new, the rest for replay."""
        new = self.buffer.new()
        fresh = set(map(id, new))
        seen = [one for one in self.buffer.requests() if one not in self._sent and id(one) not in fresh]
        for kind, requests in (("replay", seen), ("feedback", new)):
            if requests:
                worker.send(kind, requests)
                self._sent.update(requests)
        self.buffer.mark_seen(new)
        self._behind = False

    def _state_of_what_serves(self) -> tuple[dict[str, Tensor], dict]:
        serving, figures = self._serving, self.metrics()
        leased = serving.lease()
        try:
            draft, weights = serving.begin()
            if serving.adapter is not None:
                draft = serving.adapter.with_weights(weights)
            student = make_student(draft, serving.trainable, self.config)
            learner = Learner(student, self.buffer, serve=lambda weights: None)
            learner.updates, learner.failed = figures["updates"], figures["failed_updates"]
            learner.learned_tokens, learner.seconds = figures["learned_tokens"], figures["learning_seconds"]
            return learner.state()
        finally:
            serving.release(leased)

    @property
    def _wait(self) -> int:
        """Requests that must come after a death."""
        return self.config.update_interval * min(2**self._deaths, _LONGEST_WAIT)

    def _count_death(self):
        if self._offered >= _FORGIVEN:
            self._restarts_left = _MOST_RESTARTS
        self._deaths, self._offered = self._deaths + 1, 0
        self._sum_up()
        if not self._restarts_left:
            self._over = (
                f"the process that learns has died, and so have {_MOST_RESTARTS} that were started in its place"
            )

    def _sum_up(self):
        for name in _COUNTS:
            self._before[name] += self._figures.pop(name, 0)

    def _what_follows(self) -> str:
        if self._over is not None:
            return "None is started any more: the draft serves as it is, and learns no more."
        return f"The draft serves as it is; another process is started after {self._wait} more requests."

    def _ask(
        self, kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None
    ) -> tuple[dict, dict]:
        with self._lock:
            worker = self._running()
        answer = None if worker is None else worker.ask(kind, tensors, values)
        if answer is None:
            raise RuntimeError(
                f"The process that learns is dead, so it cannot answer ({kind}). {self._what_follows()} What the dead one said is on stderr."
            )
        return answer

    def _came(self, kind: str, tensors: dict[str, Tensor], values: dict):
        """A frame of the process."""
        if values.get("figures") is not None:
            self._figures = figures_from_json(values["figures"])
        # An adapter that was learnt over the weights before is nothing to those of now.
        if kind == "weights" and values.get("base", self._base) == self._base:
            self._serving.refresh(tensors)
            self._deaths = 0

    def _died(self, status: int | None):
        with self._lock:
            self._count_death()
        logger.error(
            "The process that learns has died (exit status %s%s). %s",
            status,
            ", killed, as the system does where memory is short" if status == -9 else "",
            self._what_follows(),
        )
