"""Collects answers of a target for drafts to learn from: to a user's prompts, or, where there are none, texts that the target writes freely."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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

_BATCH = 8
# More do not change the choice, and take their time to be learnt.
_MOST = 512


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Read the field `prompt` of each line of a JSONL file; prompts that repeat are left out.

    Raises:
        ValueError: if a line is no JSON object with such a text, or there is none; the message names the line.
        OSError: if the file cannot be read.
    """
    prompts = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError):
                prompt = None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f'{path}, line {number}: no prompt; write an object with one, such as {{"prompt": "…"}}.'
                )
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f'{path} has no prompts; write an object such as {{"prompt": "…"}} a line.')
    return list(dict.fromkeys(prompts))


def encoded(
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    target: PreTrainedModel,
    max_new_tokens: int,
    seed: int = 0,
) -> list[Tensor]:
    """Encode prompts through the chat template, if there is one, in a random order; those that leave no room for an answer are dropped. int64 `(L,)` each.

    Raises:
        ValueError: if none is left.
    """
    found = []
    for prompt in prompts:
        if tokenizer.chat_template is None:
            ids = tokenizer(prompt)["input_ids"]
        else:
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        found.append(torch.tensor(ids, dtype=torch.long, device="cpu"))
    window = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    fitting = [ids for ids in found if len(ids) and (window is None or len(ids) + max_new_tokens <= window)]
    if not fitting:
        raise ValueError(
            f"None of the {len(found)} prompts leaves room for {max_new_tokens} tokens in the window of {window}; give shorter ones."
        )
    if len(fitting) < len(found):
        logger.warning("Left out %d prompts that leave no room for an answer.", len(found) - len(fitting))
    order = torch.randperm(len(fitting), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    return [fitting[i] for i in order]


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
