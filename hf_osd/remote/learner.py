"""`RemoteLearner`: stands in the serving process for a learner in another process or on another rank. Whatever becomes of that, the serving draft stays."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.learner import Learner
from hf_osd.metrics.intervals import figures_from_json
from hf_osd.remote.frames import BASE
from hf_osd.remote.transport import Connection, Transport, weakly
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Seconds between two checks that an answer may still come.
_POLL = 0.5
# Figures that each learner counts from 0, and that are added up over those that died.
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
    """Sends feedback to a learner elsewhere, and serves the weights that come back. The learner has a gate and a buffer of its own.

    A learner that serves this assistant alone is sent each request at once. We keep a copy of the feedback in the buffer here, to refill a restarted
    learner; what the dead one had recorded of its candidate is lost. A learner that several assistants share (`transport.shared`) is sent batches of
    `update_interval` requests, which leave the buffer.

    Args:
        transport (`Transport`): reaches the learner.
        serving (`HotSwapDraft`): the draft to refresh.
        buffer (`FeedbackBuffer`): requests kept, or not sent yet.
        config (`OnlineConfig`): of the learner.
    """

    def __init__(self, transport: Transport, serving: HotSwapDraft, buffer: FeedbackBuffer, config: OnlineConfig):
        self.transport, self.buffer, self.config, self._serving = transport, buffer, config, serving
        self._figures: dict = {}  # of the learner that runs
        self._before = dict.fromkeys(_COUNTS, 0)  # of the learners that died, added up
        self._connection: Connection | None = None  # the next three belong to it
        self._sent: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self._behind = False  # the buffer may hold requests that were not sent
        self._base = 0  # times that the weights under an adapter were replaced
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._asked = 0  # questions so far; a question's number comes back in its answer
        self._lock, self._asking = released(threading.Lock()), released(threading.Lock())
        self._closed = False
        transport.listen(weakly(self._on_frame), weakly(self._on_death))

    # What an assistant asks of every learner.

    def add(self, feedback: Feedback):
        """Send a request, or keep it for the next batch. A learner that does not keep up is sent no more than the buffer holds."""
        if self.transport.shared:
            self.buffer.add(feedback)
            return
        with self._lock:
            connection = self._connect(requests=1)
            if connection is not None and self._behind:
                self._send_buffer(connection)
            self.buffer.add(feedback)
            self.buffer.mark_seen([feedback])
            if connection is not None and connection.has_room(self.buffer):
                self._sent.add(feedback)
                connection.send("feedback", feedback=[feedback])

    def is_due(self) -> bool:
        """Return whether `update` has anything to send: requests that came into the buffer by another way than `add`; for a shared learner a full batch,
        if there is room for it on the way. The learner decides itself when to learn."""
        new = len(self.buffer.new())
        if not self.transport.shared:
            return new > 0 and self.transport.over is None
        connection = self.transport.connect()
        return new >= self.config.update_interval and connection is not None and connection.has_room(self.buffer)

    def update(self, wait: bool = True) -> bool:
        """Send the new requests in the buffer. With `wait`, have the learner learn from all that it has, and wait for it. Returns `True` if the serving
        draft was refreshed, `False` also if the learner died before it answered."""
        if self._closed or self.transport.over is not None or not (wait or self.buffer.new()):
            return False
        with self._lock:
            connection = self._connect()
            if connection is not None and (self._behind or self.buffer.new()):
                self._send_buffer(connection)
        if not wait:
            return False
        try:
            _, values = self._ask("flush")
        except RuntimeError as error:
            logger.error("%s", error)
            return False
        return values["refreshed"]

    def note_served(self, seconds: float):
        """Do nothing: a call does not wait for a learner elsewhere."""

    def metrics(self) -> dict:
        """Return what the learner last reported, by the names of [`hf_osd.metrics.stats.Stats`]; counts include those of dead learners."""
        counts = {name: before + self._figures.get(name, 0) for name, before in self._before.items()}
        counts["learner_restarts"] += self.transport.restarts
        over = self.transport.over
        return self._figures | counts | ({} if over is None else {"learning_over": over})

    def trouble(self) -> str | None:
        """Return what is wrong, as the learner last reported it; `None` if nothing is."""
        return self._figures.get("trouble")

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Continue learning from weights that somebody else trained; with `base`, in an adapter over other weights of the plain draft, by its names.

        Raises:
            RuntimeError: if the learner is shared: the next weights that it sends would undo this.
        """
        if self.transport.shared:
            raise RuntimeError("The draft learns on another rank, which alone gives it weights; refresh it there.")
        with self._lock:
            connection = self._connect()
            if connection is None:
                return  # the next learner begins with what serves then
            # Copies: they are written some time later, and whoever trains them goes on.
            tensors = {name: weights[name].detach().clone() for name in self._serving.trainable}
            tensors |= {f"{BASE}{name}": tensor.detach().clone() for name, tensor in (base or {}).items()}
            self._base += base is not None
            connection.send("take", tensors, {"base": self._base})

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Return the learner's state, as [`hf_osd.learning.learner.Learner.state`]; where no learner can answer, that of a new one made of the serving draft.

        Raises:
            RuntimeError: if the learner is shared.
        """
        self._refuse_shared()
        if self.transport.is_starting:
            return self._state_from_serving()  # there is nothing else yet, and nothing to wait for
        try:
            tensors, values = self._ask("state")
        except RuntimeError:
            logger.warning(
                "The process that learns is dead: what is saved of learning is the draft that serves, without the optimizer and the rate of before."
            )
            return self._state_from_serving()
        return tensors, values["state"]

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Continue from `state()`; the serving draft becomes the one that the state has.

        Raises:
            ValueError: if the state belongs to another draft, or has another number of members.
            RuntimeError: if the learner dies before it answers, or is shared.
        """
        self._refuse_shared()
        _, answer = self._ask("load", tensors, {"state": values})
        if "refused" in answer:
            raise ValueError(answer["refused"])
        self._behind = True  # a buffer may be restored with it

    def serve(self):
        """Do nothing: the learner serves by itself what may serve."""

    def after_fork(self) -> str | None:
        """Prepare a forked child. Returns why it cannot learn there; `None` if it can."""
        if (reason := self.transport.after_fork()) is None:
            self._answers = queue.SimpleQueue()  # a thread of the parent may have held the other
            self._connection = None
            self._add_up()
        return reason

    def close(self):
        """End the learner, or tell a shared one that this end serves no more."""
        with self._lock:
            self._closed = True
        self.transport.close()

    # Frames.

    def _connect(self, requests: int = 0) -> Connection | None:
        connection = None if self._closed else self.transport.connect(requests)
        if connection is not None and connection is not self._connection:
            self._connection, self._sent, self._behind, self._base = connection, weakref.WeakSet(), True, 0
        return connection

    def _send_buffer(self, connection: Connection):
        """Send the requests in the buffer that this learner lacks: new ones to be learnt, the others for replay."""
        new, seen = self.buffer.new(), []
        if self.transport.shared:
            self.buffer.discard(new)
        else:
            ids = set(map(id, new))
            seen = [one for one in self.buffer.requests() if one not in self._sent and id(one) not in ids]
            self.buffer.mark_seen(new)
        for kind, requests in (("replay", seen), ("feedback", new)):
            if requests:
                connection.send(kind, feedback=requests)
                self._sent.update(requests)
        self._behind = False

    def _ask(
        self, kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None
    ) -> tuple[dict, dict]:
        """Send a question and wait for its answer, as long as one may still come.

        Raises:
            RuntimeError: if none comes.
        """
        with self._asking:
            with self._lock:
                connection = self._connect()
            waits = connection is not None
            if connection is not None:
                self._asked += 1
                connection.send(kind, tensors, {**(values or {}), "asked": self._asked})
                may_answer = connection.watch()
            while waits:
                waits = may_answer()  # first: what a dead one answered is here by then
                with suppress(queue.Empty):
                    while True:
                        asked, tensors, values = self._answers.get(timeout=_POLL if waits else 0)
                        if asked == self._asked:  # else it answers a call that was interrupted
                            return tensors, values
        raise RuntimeError(f"The remote learner is dead, so it cannot answer ({kind}). {self.transport.outlook}")

    def _on_frame(self, kind: str, tensors: dict[str, Tensor], values: dict):
        """Handle a frame of the learner; called in the transport's thread."""
        try:
            if values.get("figures") is not None:
                self._figures = figures_from_json(values["figures"])
            # An adapter fits only the weights that it was learnt over.
            if kind == "weights" and values["base"] == self._base:
                self._serving.refresh(tensors)
        finally:
            if kind == "answer":  # somebody waits
                self._answers.put((values["asked"], tensors, values))

    def _on_death(self, sentence: str):
        self._add_up()
        logger.error("%s %s", sentence, self.transport.outlook)

    def _add_up(self):
        for name in _COUNTS:
            self._before[name] += self._figures.pop(name, 0)

    def _refuse_shared(self):
        if self.transport.shared:
            raise RuntimeError("The learner's state is on another rank; save the draft itself with save_pretrained.")

    def _state_from_serving(self) -> tuple[dict[str, Tensor], dict]:
        serving, figures = self._serving, self.metrics()
        leased = serving.lease()
        try:
            draft, weights = serving.for_learner()
            if serving.adapter is not None:
                draft = serving.adapter.with_weights(weights)
            student = make_student(draft, serving.trainable, self.config)
            learner = Learner(student, self.buffer, serve=lambda weights: None)
            learner.updates, learner.failed = figures["updates"], figures["failed_updates"]
            learner.learned_tokens, learner.seconds = figures["learned_tokens"], figures["learning_seconds"]
            return learner.state()
        finally:
            serving.release(leased)
