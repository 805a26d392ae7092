"""`score_undrafted`: scores the draft afterwards on a call that went without it for long, before it learns that call. Else nobody would know when drafting pays
again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from hf_osd.distill.scoring import judge_served
from hf_osd.distill.windows import Windows
from hf_osd.feedback.feedback import Feedback

if TYPE_CHECKING:
    from hf_osd.metrics.stats import CallStats
    from hf_osd.models.draft_head import DraftHead
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Scoring a call takes about 2% of its time. So many calls are scored one by one, and every so many after them.
_FIRST, _EVERY = 64, 4


class EndedCall(Protocol):
    """The record of a call, such as a `CallRecorder`."""

    stats: CallStats
    processed: bool

    @property
    def prompt(self) -> Tensor: ...

    @property
    def answer(self) -> Sequence[int]: ...


class Policy(Protocol):
    """Decides when to draft, as a `DraftPolicy` does."""

    def observe_untested(self, acceptance: Sequence[float], confidence: Sequence[float] = ()): ...


def score_undrafted(
    feedback: Feedback,
    call: EndedCall,
    serving: HotSwapDraft,
    policy: Policy,
    head: DraftHead | None = None,
    window: int | None = None,
    before: int = 0,
) -> Feedback:
    """Score the draft that serves where a call drafted nothing for long, and let the policy know. After the first 64 calls that is done at every fourth; α is not known of the others.

    Args:
        feedback (`Feedback`): the call's; not learnt yet.
        call (`EndedCall`): its record, whose `stats` get the α that is then known.
        serving (`HotSwapDraft`): the draft; leased meanwhile.
        policy (`Policy`): observes the scores.
        head (`DraftHead`, *optional*): the draft's, where calls compute some of its rows alone.
        window (`int`, *optional*): tokens of a request that are scored, at most; all if left out.
        before (`int`): calls before this one.

    Returns:
        `Feedback`: the same, with the acceptance that was found, where that is as exact as serving's.
    """
    unknown = feedback.overlap.isnan() & feedback.teaching_mask("all")
    if int(unknown.sum()) < 2:  # the last token of a call is never put to the draft
        return feedback
    if before >= _FIRST and before % _EVERY:
        # The policy asked the draft where it is good, so what is known is no sample of all positions.
        call.stats.overlap_sum, call.stats.overlap_count, call.stats.head_missed = 0.0, 0, 0
        return feedback
    try:
        windows = Windows([feedback], window)
        [(overlap, confidence, _)] = windows.spread(judge_served(serving, windows.requests))
    except Exception:  # out of memory, say: a figure less, and no reason to break the user's call
        logger.exception("The draft could not be scored on a call that went without it.")
        return feedback
    if head is not None:  # a whole head was scored, and the draft as it serves cannot propose all of its tokens
        overlap *= head.covers(call.prompt, call.answer)
    unknown &= ~overlap.isnan()
    policy.observe_untested(overlap[unknown].tolist(), confidence[unknown].tolist())
    # From sparse rows, at temperature 1, without processors: enough to decide whether to draft again, but not α of a call that differs.
    if feedback.sampled or call.processed:
        return feedback
    feedback = feedback.with_overlap(overlap)
    known = feedback.overlap[~feedback.overlap.isnan()]
    call.stats.overlap_sum, call.stats.overlap_count = float(known.sum()), len(known)
    return feedback
