"""Collects answers of a target for drafts to learn from: to a user's prompts, or, where there are none, texts that the target writes freely."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.recording import record_answers
from hf_osd.system.random_state import isolated_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_osd.config import OnlineConfig
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# One answer in so many is held back to score drafts on.
HELD_BACK = 5
_BATCH = 8
# More do not change the choice, and take their time to be learnt.
_MOST = 512


@dataclass(frozen=True)
class Prompt:
    """Holds a prompt: its text, the group of alike prompts that it is of, if any, and whether its answer is held back to score drafts on."""

    text: str
    group: str | None = None
    is_held_back: bool = False


def read_prompts(path: str | os.PathLike, seed: int = 0) -> list[Prompt]:
    """Read the field `prompt`, and `group` where there is one, of each line of a JSONL file, in a random order; prompts that repeat are left out.

    One in five is held back, evenly spread, and where there are groups of prompts (about one database, say) none is on both sides: what a draft has learnt by heart would be no measure.

    Raises:
        ValueError: if a line is no JSON object with such a text, or there are fewer than two groups; the message names the line.
        OSError: if the file cannot be read.
    """
    groups: dict[object, dict[str, Prompt]] = {}
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, group = row["prompt"], row.get("group")
            except (ValueError, TypeError, KeyError, AttributeError):
                text, group = None, None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f'{path}, line {number}: no prompt; write an object with one, such as {{"prompt": "…"}}.'
                )
            group = None if group is None else str(group)
            groups.setdefault(("prompt", text) if group is None else group, {})[text] = Prompt(text, group)
    if len(groups) < 2:
        raise ValueError(
            f'{path} has {"prompts of one group" if groups else "no prompts"}, and some are learnt, others held back; write an object such as {{"prompt": "…"}} a line.'
        )
    draws = random.Random(seed)
    order = list(groups.values())
    draws.shuffle(order)
    aside = max(1, len(order) // HELD_BACK)
    held, learnt = ([one for group in part for one in group.values()] for part in (order[:aside], order[aside:]))
    for part in (held, learnt):
        draws.shuffle(part)
    mixed, rest = [], iter(held)
    for i, one in enumerate(learnt):
        if i % (HELD_BACK - 1) == 0 and (other := next(rest, None)) is not None:
            mixed.append(replace(other, is_held_back=True))
        mixed.append(one)
    return mixed


def encoded(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, max_new_tokens: int
) -> tuple[list[Tensor], list[bool]]:
    """Encode prompts through the chat template, if there is one; those that leave no room for an answer are dropped. int64 `(L,)` each, and which are held back.

    Raises:
        ValueError: if none is left to learn, or none to hold back.
    """
    window = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    found, held = [], []
    for prompt in prompts:
        if tokenizer.chat_template is None:
            ids = tokenizer(prompt.text)["input_ids"]
        else:
            chat = [{"role": "user", "content": prompt.text}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) and (window is None or len(ids) + max_new_tokens <= window):
            found.append(torch.tensor(ids, dtype=torch.long, device="cpu"))
            held.append(prompt.is_held_back)
    if len(set(held)) < 2:
        raise ValueError(
            f"{len(found)} of {len(prompts)} prompts leave room for {max_new_tokens} tokens in the window of {window}, too few to learn some and hold others back; give "
            "shorter ones, or more."
        )
    if len(found) < len(prompts):
        logger.warning("Left out %d prompts that leave no room for an answer.", len(prompts) - len(found))
    return found, held


def free_prompts(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield prompts of one token, without end, after which the target writes as it likes: the one with which its texts begin, or else with which they end.

    Raises:
        ValueError: if there is no such token.
    """
    start = next(
        (
            one
            for one in (tokenizer.bos_token_id, target.generation_config.bos_token_id, tokenizer.eos_token_id)
            if one is not None
        ),
        None,
    )
    if start is None:
        raise ValueError("The tokenizer has no token with which a text begins; give prompts (--prompts).")
    return itertools.repeat(torch.tensor([start], dtype=torch.long, device="cpu"))


def answers_within(
    target: PreTrainedModel,
    prompts: Iterable[Tensor],
    max_new_tokens: int,
    config: OnlineConfig,
    seconds: float,
    states_of: Sequence[int] | None = None,
    sampled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Feedback]:
    """Record answers, a batch after another, until there are no more prompts, or the time is over; two batches at least.

    Args:
        target, prompts, max_new_tokens, states_of: as in [`record_answers`].
        config (`OnlineConfig`): whose `top_k`, `prompt_positions` and `seed` count.
        seconds (`float`): the time.
        sampled (`bool`): sample at temperature 1 in place of greedy decoding.
    """
    began, left, found = clock(), iter(prompts), []
    with isolated_random_state():
        torch.manual_seed(config.seed or 0)
        while batch := list(itertools.islice(left, _BATCH)):
            found += record_answers(
                target,
                batch,
                max_new_tokens,
                batch_size=_BATCH,
                top_k=config.top_k,
                prompt_positions=config.prompt_positions,
                temperature=1.0 if sampled else 0.0,
                states_of=states_of,
            )
            if len(found) >= _MOST or (len(found) >= 2 * _BATCH and clock() - began >= seconds):
                break
    return found
