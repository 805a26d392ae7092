"""`replay`: passes recorded requests to an assistant's learner as serving would have, without the target. Answers do not depend on the draft, greedy
ones word by word and sampled ones by their distribution, so predictions and learning are those of serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.models.properties import reads_states

if TYPE_CHECKING:
    from hf_osd.learning.protocol import LearningAssistant


def replay(
    assistant: LearningAssistant,
    requests: Sequence[Feedback],
    max_new_tokens: int | None = None,
    again: Sequence[Sequence[Feedback]] | None = None,
) -> Iterator[Feedback]:
    """Predict each request, then let the draft learn it; yields each as serving would have recorded it, once the learner has it.

    `overlap` is measured with the weights that would have served the request, at every position (serving knows all but the last), whatever γ; `outcome` is
    that of rounds of `num_assistant_tokens` drafts each. Serving with a changing γ ends its rounds elsewhere, which matters to `positions="error"` alone.
    Updates come when they are due, as between live calls.

    Args:
        assistant ([`OnlineAssistant`]): with a draft, and learning.
        requests (`Sequence[Feedback]`): such as `record_answers` makes; cut to the assistant's `top_k` and `prompt_positions`. Of a sampled one, `overlap` is Σ min(p, q)
            over the top k, a lower bound, and `outcome` is drawn with that probability, by a generator that the config's seed starts.
        max_new_tokens (`int`, *optional*): the limit they were recorded with; the last token of an answer that reached it cannot be drafted.
        again (`Sequence[Sequence[Feedback]]`, *optional*): for each request further answers to its prompt, as [`hf_osd.Rehearsal`] samples them.
            They are learnt with the request, and nothing is judged by them.

    Raises:
        ValueError: if the assistant does not learn, or learns in another process and there is `again`; if `again` has another length.
    """
    if again is not None and len(again) != len(requests):
        raise ValueError(
            f"`again` has {len(again)} items and there are {len(requests)} requests; give an item for each."
        )
    if assistant.learner is None:
        raise ValueError(
            "This assistant does not learn (no draft, `learn=False`, or closed), so it cannot replay a trace."
        )
    if again is not None and not hasattr(assistant.learner, "rehearse"):
        raise ValueError(
            "This assistant learns in another process, which gets served requests only; make it with learn='inline' or 'background' to learn "
            "further answers."
        )
    config, known, at = assistant.osd_config, SeenTexts(), 0
    draws = torch.Generator().manual_seed(config.seed or 0)
    while at < len(requests):
        # As many as are served before the next update.
        ahead = max(config.update_interval - len(assistant.buffer.new()), 1)
        chunk = [kept(assistant, request) for request in requests[at : at + ahead]]
        version = assistant.serving.version
        for request, overlap in zip(chunk, assistant.score(chunk), strict=True):
            hits = torch.rand(len(overlap), generator=draws) < overlap if request.sampled else None
            served = serve(assistant, request, overlap, known, max_new_tokens, hits)
            if again is not None:
                for other in again[at]:
                    assistant.learner.rehearse(kept(assistant, other))
            assistant.update()
            at += 1
            yield served
            if assistant.serving.version != version:
                break  # the new weights predict the others


def serve(
    assistant: LearningAssistant,
    request: Feedback,
    overlap: Tensor,
    known: SeenTexts,
    max_new_tokens: int | None,
    hits: Tensor | None = None,
) -> Feedback:
    """Add one request to an assistant's learner, as serving would have recorded it, and return it so; the caller has the assistant update.

    Args:
        request (`Feedback`): cut by `kept`.
        overlap (`Tensor` float `(N,)`), hits (`Tensor` bool `(N,)`, *optional*): as of `as_drafted`.
        known (`SeenTexts`): the prompts that this assistant has learnt.
    """
    config = assistant.osd_config
    served = as_drafted(request, overlap, config.num_assistant_tokens, max_new_tokens, hits)
    served = known.only_new(served, config.prompt_positions)
    assistant.learner.add(served)
    return served


def kept(assistant: LearningAssistant, request: Feedback) -> Feedback:
    """Cut a request to what serving with this assistant would have kept of it: its `top_k`, and the target's states if its draft reads them."""
    request = request.truncate(assistant.osd_config.top_k)
    return request if reads_states(assistant) or request.states is None else replace(request, states=None)


def as_drafted(
    request: Feedback, overlap: Tensor, gamma: int, max_new_tokens: int | None = None, hits: Tensor | None = None
) -> Feedback:
    """Fill in a request's `outcome` and `overlap` as rounds of `gamma` drafts would have.

    Args:
        request (`Feedback`): N verified positions.
        overlap (`Tensor` float `(N,)`): expected acceptance: of a greedy request 1 where the draft's likeliest token is the target's, else 0.
        gamma (`int`): tokens drafted a round.
        max_new_tokens (`int`, *optional*): the limit of generation; the last token of an answer that reached it is never drafted.
        hits (`Tensor` bool `(N,)`, *optional*): which tokens the target would have accepted, had they been tested; left out, those with an overlap of 1.
    """
    # Where a token of the target is several of the draft's, a round tests the first of them.
    taught = request.teaching_mask("all")
    hits = (overlap == 1 if hits is None else hits)[taught].tolist()
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
