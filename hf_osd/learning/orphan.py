"""`Orphan`: stands for a learner that a fork has left without its thread. It says so once, and learns nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)


class Orphan:
    """What an assistant asks of every learner, in a forked child where the learner of before cannot learn.

    Args:
        learner: that of before, whose figures stay.
        reason (`str`): why it cannot learn here.
    """

    def __init__(self, learner: Any, reason: str):
        self._learner, self._said = learner, False
        self._over = (
            f"this process was forked off the one that the draft learns in, and {reason}: the draft serves here as it was then, and learns nothing. Make the "
            "OnlineAssistant after the fork, or fork before its first call, or pass learn='process', which starts a process that learns for each"
        )

    def add(self, feedback: Feedback):
        """Nothing is kept: nobody would learn it."""

    rehearse = add

    def is_due(self) -> bool:
        """Asked as each call begins, so that the first says what has become of learning."""
        if not self._said:
            self._said = True
            logger.warning("Nothing is learnt: %s.", self._over)
        return False

    def update(self, wait: bool = True) -> bool:
        return self.is_due()

    def trouble(self) -> None:
        """None but that it learns nothing, which has been said."""

    def note_served(self, seconds: float):
        pass

    def metrics(self) -> dict:
        return self._learner.metrics() | {"learning_over": self._over}

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """They serve already, and are learnt on nowhere."""
        self.is_due()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Refused: it may be one of the middle of an update.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"There is no learner's state to save: {self._over}. save_pretrained saves the draft.")

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Refused, as `state`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"A learner's state cannot be taken up: {self._over}.")

    def serve(self):
        pass

    def after_fork(self) -> None:
        """In a child of the child the same holds."""

    def close(self):
        pass
