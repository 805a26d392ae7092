"""`score_undrafted`: what the draft would have said in a call that did without it for long, asked afterwards and before it learns it. Else nobody would know
when drafting pays again."""

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


class EndedCall(Protocol):
    """What is asked of the record of a call: see `CallRecorder`."""

    stats: CallStats
    processed: bool

    @property
    def prompt(self) -> Tensor: ...

    @property
    def answer(self) -> Sequence[int]: ...


class Policy(Protocol):
    """What is told of it: see `DraftPolicy`."""

    def observe_untested(self, acceptance: Sequence[float], confidence: Sequence[float] = ()): ...


def score_undrafted(
    feedback: Feedback,
    call: EndedCall,
    serving: HotSwapDraft,
    policy: Policy,
    head: DraftHead | None = None,
    window: int | None = None,
) -> Feedback:
    """Where a call drafted nothing for long, have the draft that serves judged there, and tell the policy.

    Args:
        feedback (`Feedback`): what the call teaches; not learnt yet.
        call (`EndedCall`): its record, whose `stats` get the α that is then known.
        serving (`HotSwapDraft`): what serves; leased meanwhile.
        policy (`Policy`): decides when to draft.
        head (`DraftHead`, *optional*): of which the call's had some rows alone.
        window (`int`, *optional*): tokens of a request that are judged, at most; all if left out.

    Returns:
        `Feedback`: the same, with the acceptance that was found, where that is as exact as serving's.
    """
    unknown = feedback.overlap.isnan() & feedback.teaching_mask("all")
    if int(unknown.sum()) < 2:  # the last token of a call is never put to the draft
        return feedback
    try:
        windows = Windows([feedback], window)
        [(overlap, confidence, _)] = windows.spread(judge_served(serving, windows.requests))
    except Exception:  # out of memory, say: a figure less, and no reason to break the user's call
        logger.exception("What the draft would have said in a call that it did not draft in could not be judged.")
        return feedback
    if head is not None:  # judged was a whole head: the draft as it serves could not have said all that
        overlap *= head.covers(call.prompt, call.answer)
    unknown &= ~overlap.isnan()
    policy.observe_untested(overlap[unknown].tolist(), confidence[unknown].tolist())
    # Of sparse rows, at temperature 1, without processors: enough to decide whether to draft again, but then not α.
    if feedback.sampled or call.processed:
        return feedback
    feedback = feedback.with_overlap(overlap)
    known = feedback.overlap[~feedback.overlap.isnan()]
    call.stats.overlap_sum, call.stats.overlap_count = float(known.sum()), len(known)
    return feedback
