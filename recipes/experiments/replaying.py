"""`replay`: requests that were recorded, served to an assistant's learner again without the target. Greedy answers do not depend on the draft, so what the draft
would have said, and what it learns, is what serving would have given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback
from hf_osd.feedback.prompt_states import SeenTexts

if TYPE_CHECKING:
    from hf_osd.learning.protocol import LearningAssistant


def replay(
    assistant: LearningAssistant,
    requests: Sequence[Feedback],
    max_new_tokens: int | None = None,
    again: Sequence[Sequence[Feedback]] | None = None,
) -> Iterator[Feedback]:
    """Predict, then learn: each request as it would have been kept if `assistant` had served it, once it has been taken in.

    `overlap` is of the weights that would have served it, at every position (serving knows it at all but the last), whatever γ; `outcome` is that of rounds of
    `num_assistant_tokens` drafts each. Where serving follows a changing γ, its rounds end elsewhere, which matters to `positions="error"` alone.
    Updates come when they are due, as between live calls.

    Args:
        assistant ([`OnlineAssistant`]): with a draft, and learning.
        requests (`Sequence[Feedback]`): greedy ones, such as `record_answers` gives; cut to its `top_k` and `prompt_positions`.
        max_new_tokens (`int`, *optional*): the limit they were recorded with; the last token of an answer that reached it cannot be drafted.
        again (`Sequence[Sequence[Feedback]]`, *optional*): for each of the requests other answers to its prompt, as [`hf_osd.Rehearsal`] has the target give.
            They are learnt beside the request, and never judged by.

    Raises:
        ValueError: if the assistant does not learn, or in another process where there is `again`; if a request was sampled, or `again` is not of as many requests.
    """
    if again is not None and len(again) != len(requests):
        raise ValueError(f"`again` is of {len(again)} requests and there are {len(requests)}; give an item for each.")
    if assistant.learner is None:
        raise ValueError(
            "This assistant does not learn (no draft, `learn=False`, or closed), so a trace is of no use to it."
        )
    if again is not None and not hasattr(assistant.learner, "rehearse"):
        raise ValueError(
            "This assistant learns in another process, which is sent what was served and nothing else; make it with learn='inline' or 'background' to learn "
            "other answers."
        )
    config, known, at = assistant.osd_config, SeenTexts(), 0
    while at < len(requests):
        # As many as no update comes between, but for one that is due by tokens or age.
        ahead = max(config.update_interval - len(assistant.buffer.new()), 1)
        chunk = [request.truncate(config.top_k) for request in requests[at : at + ahead]]
        if any(request.sampled for request in chunk):
            raise ValueError(
                "A request of the trace was sampled: its answer depends on the draws. Record greedy answers."
            )
        version = assistant.serving.version
        for request, overlap in zip(chunk, assistant.score(chunk), strict=True):
            served = as_drafted(request, overlap, config.num_assistant_tokens, max_new_tokens)
            served = known.only_new(served, config.prompt_positions)
            assistant.learner.add(served)
            if again is not None:
                for other in again[at]:
                    assistant.learner.rehearse(other.truncate(config.top_k))
            assistant.update()
            at += 1
            yield served
            if assistant.serving.version != version:
                break  # the others are the new weights' to predict


def as_drafted(request: Feedback, overlap: Tensor, gamma: int, max_new_tokens: int | None = None) -> Feedback:
    """A greedy request as rounds of `gamma` drafts would have verified it.

    Args:
        request (`Feedback`): N verified positions.
        overlap (`Tensor` float `(N,)`): 1 where the draft's likeliest token is the target's, else 0.
        gamma (`int`): tokens drafted a round.
        max_new_tokens (`int`, *optional*): where generation had to stop; the last token it gives is never drafted.
    """
    # Of a token of the target that is several of the draft's, the first is the position that a round tests.
    taught = request.teaching_mask("all")
    hits = (overlap[taught] == 1).tolist()
    n, at = len(hits), 0
    outcome = torch.full((n,), UNTESTED, dtype=torch.int8, device="cpu")
    testable = n if max_new_tokens is None or n < max_new_tokens else n - 1
    while at < n:
        drafted = min(gamma, testable - at)
        accepted = next((j for j in range(drafted) if not hits[at + j]), drafted)
        outcome[at : at + accepted] = ACCEPTED
        if accepted < drafted:
            outcome[at + accepted] = REJECTED
        at += accepted + 1  # and the target's own token
    everywhere = torch.full((len(request),), UNTESTED, dtype=torch.int8, device="cpu")
    everywhere[taught] = outcome
    return replace(request, outcome=everywhere, overlap=overlap.float())
