"""Answers of the target itself: recorded to score a draft on, or for it to learn before anything is served."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_osd import Feedback, OnlineAssistant, record_answers
from hf_osd.distill.scoring import score_by_step, served
from hf_osd.models.properties import reads_states
from recipes.common.figures import or_none

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.drafting.vocab_mapping import VocabMapping

logger = logging.getLogger("hf_osd.recipes.answers")

STEPS = 3  # tokens of a block whose α is told apart


def record_fitting(
    target: PreTrainedModel,
    assistant: OnlineAssistant,
    mapping: VocabMapping,
    prompts: list[Tensor],
    max_new_tokens: int,
    batch_size: int,
    what: str,
    show: bool = True,
) -> list[Feedback]:
    """Record greedy answers to prompts in the draft's tokens, and leave out those longer than the draft's window, with a warning.

    Args:
        assistant ([`OnlineAssistant`]): whose config says what is kept of an answer, and whose draft the answers have to fit.
        mapping (`VocabMapping`): between the target's tokens and the draft's.
        what (`str`): names the prompts, for the progress bar and the warning.
        show (`bool`): whether there is a progress bar.
    """
    config, draft = assistant.osd_config, assistant.serving.active
    states_of = draft.config.recorded_layers if reads_states(draft) else None
    with tqdm(total=len(prompts), desc=what, unit="prompt", disable=not prompts or not show) as bar:
        answers = record_answers(
            target,
            prompts,
            max_new_tokens,
            batch_size=batch_size,
            top_k=config.top_k,
            dtype=getattr(torch, config.feedback_dtype),
            prompt_positions=config.prompt_positions,
            on_batch=bar.update,
            translation=mapping,
            states_of=states_of,
        )
    fitting = [feedback for feedback in answers if assistant.reach.covers(feedback)]
    if longer := len(answers) - len(fitting):
        window = assistant.reach.window
        logger.warning("%s: left out %d answers longer than the draft's window of %s.", what, longer, window)
    return fitting


def score_by_domain(
    assistant: OnlineAssistant, held_back: dict[str, list[Feedback]]
) -> dict[str, list[float | None] | None]:
    """Score the serving draft on each domain's held-back answers: its α, and, if it reads the target's states, that of the two tokens after a first one; `None` where
    scoring failed."""
    found = {}
    for name, feedback in held_back.items():
        try:
            if reads_states(assistant.serving.active):
                steps = alpha_by_step(assistant, feedback)
            else:
                steps = [float(torch.cat(assistant.score(feedback)).nanmean())]
            found[name] = [or_none(alpha) for alpha in steps]
        except Exception:  # out of memory, for instance: one figure is missing, and the others are kept
            logger.exception("%s: scoring the held-back prompts failed, so their α is missing.", name)
            found[name] = None
    return found


def alpha_by_step(assistant: OnlineAssistant, feedback: list[Feedback], steps: int = STEPS) -> list[float]:
    """Compute α of each of the first `steps` tokens of a block, those before it being right; the first is α itself. NaN where there is no such block."""
    with served(assistant.serving) as model:
        scores = torch.cat(score_by_step(model, feedback, steps), dim=-1)  # (steps, positions)
    return scores.nanmean(dim=-1).tolist()
