"""`LearnerService`: handles the frames that serving processes send, for the learner of a process and of a learning rank alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.trace import unpack
from hf_osd.metrics.intervals import figures_to_json
from hf_osd.remote.frames import BASE, BadFrame

if TYPE_CHECKING:
    from hf_osd.learning.background import BackgroundLearner
    from hf_osd.learning.learner import Learner

Answer = tuple[dict[str, Tensor], dict]  # tensors and values


class LearnerService:
    """Has a learner do what a frame asks.

    Args:
        learner (`Learner` or `BackgroundLearner`): the learner to ask.
        flush (`Callable[[], bool]`): learns from all that is new; returns whether other weights serve than before.
    """

    def __init__(self, learner: Learner | BackgroundLearner, flush: Callable[[], bool]):
        self.learner, self._flush = learner, flush
        self._base = 0  # the number of the weights under an adapter
        self._handlers: dict[str, Callable[[dict[str, Tensor], dict], Answer | None]] = {
            "feedback": self._learn,
            "replay": self._replay,
            "take": self._take,
            "flush": self._update,
            "state": self._state,
            "load": self._load,
        }

    def handle(self, kind: str, tensors: dict[str, Tensor], values: dict) -> Answer | None:
        """Do what a frame asks. Returns the answer's tensors and values; `None` for kinds that have no answer.

        Raises:
            BadFrame: if the kind is unknown, or the requests cannot be read.
        """
        if kind not in self._handlers:
            raise BadFrame(f"A frame of kind {kind!r} came; both ends must run one version of hf_osd.")
        answer = self._handlers[kind](tensors, values)
        return None if answer is None else (answer[0], {**answer[1], "asked": values["asked"]})

    def report(self) -> dict:
        """Return the values that belong to every frame from the learner: figures, and the number of the weights under an adapter."""
        return {"figures": figures_to_json(self.learner.metrics()), "base": self._base}

    def _learn(self, tensors: dict[str, Tensor], values: dict):
        for feedback in _requests(tensors):
            self.learner.add(feedback)

    def _replay(self, tensors: dict[str, Tensor], values: dict):
        self.learner.replay(_requests(tensors))

    def _take(self, tensors: dict[str, Tensor], values: dict):
        base = {name.removeprefix(BASE): tensor for name, tensor in tensors.items() if name.startswith(BASE)}
        self.learner.load_weights(tensors, base or None)
        self._base = values["base"]

    def _update(self, tensors: dict[str, Tensor], values: dict) -> Answer:
        return {}, {"refreshed": self._flush()}

    def _state(self, tensors: dict[str, Tensor], values: dict) -> Answer:
        tensors, state = self.learner.state()
        return tensors, {"state": state}

    def _load(self, tensors: dict[str, Tensor], values: dict) -> Answer:
        try:
            self.learner.load_state(tensors, values["state"])
        except ValueError as error:
            return {}, {"refused": str(error)}
        self.learner.serve()
        return {}, {}


def _requests(tensors: dict[str, Tensor]) -> list[Feedback]:
    try:
        return unpack(tensors)
    except Exception as error:  # whatever is wrong with it
        raise BadFrame(f"What came is no feedback ({type(error).__name__}: {error}).") from error
