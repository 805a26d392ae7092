"""`LearnerProtocol`: the methods of every learner, in this thread, another one, another process or another rank. `LearningAssistant`: what those who drive an
assistant's learning from outside ask of it; they lie below it, and cannot import it."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.config import OnlineConfig
    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback
    from hf_osd.feedback.prompt_states import SeenTexts
    from hf_osd.models.hot_swap import HotSwapDraft


class LearnerProtocol(Protocol):
    """Learns from feedback, and puts the weights that may serve into the draft that serves. It never raises for what happens inside learning."""

    def add(self, feedback: Feedback):
        """Take a request, to be judged by and then learnt."""

    def is_due(self) -> bool:
        """Tell whether enough requests wait for an update."""

    def update(self, wait: bool = True) -> bool:
        """Learn from the requests that wait, or begin to; with `wait` from all of them, before it returns. `True` if other weights serve than before."""

    def note_served(self, seconds: float):
        """Note how long a call took, by which learning that holds up serving keeps to its share of the time."""

    def metrics(self) -> dict:
        """Collect the figures of learning, by their names in [`hf_osd.metrics.stats.Stats`]."""

    def trouble(self) -> str | None:
        """Explain what is wrong, if learning goes on and changes nothing."""

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Go on from weights that were trained elsewhere and serve already; with `base`, in an adapter over other weights of the plain draft, by its names."""

    def serve(self):
        """Serve anew the weights that may serve, after `load_state`."""

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Copy what a restart needs: tensors, by name, and plain values.

        Raises:
            RuntimeError: if there is none to be had here.
        """

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft, or of another number of students.
        """

    def after_fork(self) -> str | None:
        """Explain, in a forked child, why this cannot learn there; `None` if it can."""

    def close(self):
        """Stop learning; the draft serves on as it is."""


class LearningAssistant(Protocol):
    """An [`OnlineAssistant`](hf_osd.OnlineAssistant) with a draft."""

    osd_config: OnlineConfig
    buffer: FeedbackBuffer
    serving: HotSwapDraft
    seen_texts: SeenTexts
    learner: LearnerProtocol | None  # `None` where nothing learns
    learning_choice: str
    rehearsable: MutableSet[Feedback]
    reach: Any  # what the draft can read

    def collect(self): ...

    def score(self, requests: Sequence[Feedback]) -> list[Tensor]: ...

    def update(self, force: bool = False) -> bool: ...
