"""`Listener` stands as learner in an assistant whose calls another one's draft learns from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.feedback.feedback import Feedback
    from hf_osd.learning.protocol import LearnerProtocol


class Listener:
    """Hands feedback on to the learner of another draft; this assistant's own draft stays as it is.

    Args:
        learner (`LearnerProtocol`): that other one.
    """

    def __init__(self, learner: LearnerProtocol):
        self._learner = learner

    def add(self, feedback: Feedback):
        self._learner.add(feedback)

    rehearse = add

    def note_served(self, seconds: float):
        self._learner.note_served(seconds)

    def is_due(self) -> bool:
        """Tell that no update is due: the other assistant makes it."""
        return False

    def update(self, wait: bool = True) -> bool:
        return False

    def metrics(self) -> dict:
        return {}

    def trouble(self) -> str | None:
        return None

    def after_fork(self) -> str | None:
        return self._learner.after_fork()

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Do nothing: the draft that learns is another one."""

    def serve(self):
        pass

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Refuse: the other assistant has it.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("A static draft has no learner's state; save the assistant that it serves beside.")

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Refuse, as `state` does.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("A static draft takes up no learner's state.")

    def close(self):
        pass
