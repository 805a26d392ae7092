"""`Reach`: how long a text and a source a draft can read, and which tokens: as its config says, as a trial shows, and as it turns out."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from hf_osd.drafting.context import DraftContext
from hf_osd.models.properties import draft_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.drafting.draft_trial import Reads
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# Tokens that every draft could read when it was given.
_SHORT = 2


class Reach:
    """What a draft can read. Beyond it the target goes on alone, and nothing is learnt.

    Config and tables say it where a GPU could not survive the attempt: a position beyond a table breaks the process there. What they do not say, such as
    a table of distances of one size, is found by the first forward that fails.

    Args:
        draft (`PreTrainedModel`): the draft.
        reads (`Reads`): what a trial has shown of it.

    Attributes:
        window (`float`): tokens of a text, the draft's own.
        source (`float`): tokens of what its encoder reads.
        rows (`int`): how many tokens it has an embedding of.
        width (`int`): how many it gives logits of.
    """

    def __init__(self, draft: PreTrainedModel, reads: Reads):
        self.window = min(draft_window(draft), math.inf if reads.window is None else reads.window)
        self.source = math.inf if reads.source is None else reads.source
        self.rows = draft.get_input_embeddings().weight.shape[0]
        self.width = reads.width or draft.config.get_text_config(decoder=True).vocab_size
        self._said = False

    def covers(self, feedback: Feedback) -> bool:
        """Whether the draft can read all of a request."""
        source = 0 if feedback.source is None else len(feedback.source)
        return len(feedback.tokens) <= self.window and source <= self.source

    def failed(self, error: Exception, context: DraftContext, drafting: int):
        """The draft raised `error` in a call, where it was to go on from its text by `drafting` tokens. If other texts as long fail as well, that was too
        long, and the longest that it can read is searched for."""
        self._warn(error)
        most = context.length + drafting
        if isinstance(error, torch.OutOfMemoryError) or most > self.window:
            return
        try:
            if context.reads(most) or not context.reads(_SHORT):
                return  # what this text says was wrong, not its length
            least = _SHORT
            while most - least > 1:
                middle = (least + most) // 2
                least, most = (middle, most) if context.reads(middle) else (least, middle)
            self.window = least
        except torch.OutOfMemoryError:
            return

    def failed_source(self, error: Exception, length: int | None):
        """The draft's encoder raised `error` over a source of so many tokens, or over features."""
        self._warn(error)
        if length is not None and not isinstance(error, torch.OutOfMemoryError):
            self.source = min(self.source, length - 1)

    def _warn(self, error: Exception):
        if not self._said:
            self._said = True
            logger.warning(
                "The draft failed in a call (%s: %s); the target goes on alone there, and in others in which the draft fails. If the text was too long for it, longer "
                "ones are left to the target from now on.",
                type(error).__name__,
                error,
            )
