"""`LearningAssistant`: what those who drive an assistant's learning from outside ask of it. They lie below it, and cannot import it."""

from __future__ import annotations

from collections.abc import MutableSet, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.config import OnlineConfig
    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback
    from hf_osd.feedback.prompt_states import SeenTexts
    from hf_osd.models.hot_swap import HotSwapDraft


class LearningAssistant(Protocol):
    """An [`OnlineAssistant`](hf_osd.OnlineAssistant) with a draft."""

    osd_config: OnlineConfig
    buffer: FeedbackBuffer
    serving: HotSwapDraft
    seen_texts: SeenTexts
    learner: Any  # of whichever kind; `None` where nothing learns
    learning_choice: str
    rehearsable: MutableSet[Feedback]
    reach: Any  # what the draft can read

    def collect(self): ...

    def score(self, requests: Sequence[Feedback]) -> list[Tensor]: ...

    def update(self, force: bool = False) -> bool: ...
