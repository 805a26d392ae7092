"""`Reach` knows the longest text and source that a draft can read, and its token ids, by its config, a trial and the errors it has raised."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from hf_osd.drafting.context import DraftContext
from hf_osd.models.properties import draft_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.drafting.draft_trial import TrialResult
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# A length that every draft can read: its trial at construction had as many.
_SHORTEST = 2


class Reach:
    """Holds the limits of what a draft can read. Beyond them the target goes on alone, and nothing is learnt.

    Limits of position tables come from config and trial, for on a GPU a position beyond a table would crash the process. All others, such as a table of
    distances of a fixed size, are found by the first forward that fails.

    Args:
        draft (`PreTrainedModel`): the draft.
        trial (`TrialResult`): what a trial of the draft has shown.

    Attributes:
        window (`float`): the longest text, in the draft's tokens; may be infinite.
        source (`float`): the longest input of its encoder, in tokens; may be infinite.
        num_embeddings (`int`): rows of its embedding table.
        width (`int`): logits that it gives for a token.
    """

    def __init__(self, draft: PreTrainedModel, trial: TrialResult):
        self.window = min(draft_window(draft), math.inf if trial.window is None else trial.window)
        self.source = math.inf if trial.source is None else trial.source
        self.num_embeddings = draft.get_input_embeddings().weight.shape[0]
        self.width = trial.width or draft.config.get_text_config(decoder=True).vocab_size
        self._warned = False

    def covers(self, feedback: Feedback) -> bool:
        """Returns `True` if the draft can read all of a request."""
        source = 0 if feedback.source is None else len(feedback.source)
        return len(feedback.tokens) <= self.window and source <= self.source

    def failed(self, error: Exception, context: DraftContext, drafting: int):
        """Handles an `error` of the draft in a call where it had to draft `drafting` tokens after its text. If another text of that length fails as well, it
        was too long: the longest text that the draft can read is then found by bisection and becomes `window`."""
        self._warn(error)
        longest = context.length + drafting
        if isinstance(error, torch.OutOfMemoryError) or longest > self.window:
            return
        try:
            if context.reads(longest) or not context.reads(_SHORTEST):
                return  # not the length was wrong, but this text
            shortest = _SHORTEST
            while longest - shortest > 1:
                middle = (shortest + longest) // 2
                shortest, longest = (middle, longest) if context.reads(middle) else (shortest, middle)
            self.window = shortest
        except torch.OutOfMemoryError:
            return

    def failed_source(self, error: Exception, length: int | None):
        """Handles an `error` of the draft's encoder over a source of `length` tokens, or over features (`None`)."""
        self._warn(error)
        if length is not None and not isinstance(error, torch.OutOfMemoryError):
            self.source = min(self.source, length - 1)

    def _warn(self, error: Exception):
        if not self._warned:
            self._warned = True
            logger.warning(
                "The draft failed in a call (%s: %s); the target goes on alone there, and in others in which the draft fails. If the text was too long for it, longer "
                "ones are left to the target from now on.",
                type(error).__name__,
                error,
            )
