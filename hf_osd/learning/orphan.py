"""`Orphan`: takes the place of a learner that a fork has left without its thread. It warns once, and learns nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.protocol import LearnerProtocol

logger = logging.getLogger(__name__)


class Orphan:
    """Answers as a learner, in a forked child where the parent's cannot learn.

    Args:
        learner (`LearnerProtocol`): the parent's, whose metrics stay.
        reason (`str`): why it cannot learn here.
    """

    def __init__(self, learner: LearnerProtocol, reason: str):
        self._learner, self._has_warned = learner, False
        self._over = (
            f"this process was forked off the one that the draft learns in, and {reason}: the draft serves here as it was then, and learns nothing. Make the "
            "OnlineAssistant after the fork, or fork before its first call, or pass learn='process', which starts a process that learns for each"
        )

    def add(self, feedback: Feedback):
        """Keep nothing: nobody would learn it."""

    rehearse = add

    def is_due(self) -> bool:
        """Warn at the first call, as each call asks this."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("Nothing is learnt: %s.", self._over)
        return False

    def update(self, wait: bool = True) -> bool:
        return self.is_due()

    def trouble(self) -> None:
        """Name no trouble: that nothing is learnt has been a warning already."""

    def note_served(self, seconds: float):
        pass

    def metrics(self) -> dict:
        return self._learner.metrics() | {"learning_over": self._over}

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Warn, as of calls: the weights serve already, and nobody learns from there on."""
        self.is_due()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Refuse: the state may be of the middle of an update.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"There is no learner's state to save: {self._over}. save_pretrained saves the draft.")

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Refuse, as `state` does.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"A learner's state cannot be taken up: {self._over}.")

    def serve(self):
        pass

    def after_fork(self) -> None:
        """Answer `None`: in a child of the child this one goes on."""

    def close(self):
        pass
