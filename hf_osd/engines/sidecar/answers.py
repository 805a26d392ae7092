"""`token_ids` and `to_feedback` read what an engine sent with an answer: token ids, and the target's likeliest tokens at each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_osd.feedback.feedback import TAIL_FLOOR, Feedback, SparseLogits

_ID = "token_id:"  # how vLLM writes a token with `return_tokens_as_token_ids`


def token_ids(values: Sequence[Mapping[str, Any]], vocab_size: int) -> tuple[list[int], list[int]] | None:
    """Read the ids of prompt and answer; `None` if some are missing, or not below `vocab_size`. For `values` see [`to_feedback`]."""
    prompt: list[int] | None = None
    answer: list[int] = []
    try:
        for chunk in values:
            prompt = chunk.get("prompt_token_ids", prompt)
            answer += chunk.get("token_ids", ())
        whole = all(type(token) is int and 0 <= token < vocab_size for token in [*prompt, *answer])
    except (TypeError, AttributeError):  # another format, or no prompt
        return None
    return (prompt, answer) if whole and prompt and answer else None


def to_feedback(
    values: Sequence[Mapping[str, Any]],
    sampled: bool,
    top_k: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float16,
) -> Feedback | None:
    """Make the feedback of one answer; `None` if it cannot be read whole: ids are missing, or do not belong to the log-probs.

    Log-probs are raw: vLLM's `--logprobs-mode` is `raw_logprobs` unless told otherwise. They are those of the likeliest tokens and, where it is none of them, of the
    sampled one. The mass of all others is the tail: 1 less theirs, in float64, which below some 1e-6 is rounding.

    Args:
        values (`Sequence[Mapping]`): what [`hf_osd.engines.sidecar.asking.cut`] took out of an answer, or of each chunk of it in turn.
        sampled (`bool`): whether the answer was sampled.
        top_k (`int`): log-probs to keep at each position; of one that has fewer only the token is kept.
        vocab_size (`int`): ids are below it.
        dtype (`torch.dtype`): dtype of the log-probs.
    """
    ids = token_ids(values, vocab_size)
    rows: list[tuple[list[int], list[float]]] = []
    try:
        for chunk in values:
            rows += _rows(chunk["logprobs"]) if "logprobs" in chunk else ()
    except (LookupError, TypeError, ValueError, AttributeError):  # another format
        return None
    if ids is None or len(rows) != len(ids[1]):
        return None
    (prompt, answer), k = ids, min(top_k, vocab_size)
    top_ids, top_logps, tails = [], [], []
    for token, (ids, logps) in zip(answer, rows, strict=True):
        if token not in ids or len(set(ids)) < len(ids) or not all(0 <= i < vocab_size for i in ids):
            return None
        likely = sorted(zip(logps, ids, strict=True), key=lambda pair: -pair[0])[:k]
        if len(likely) < k or not all(logp <= 1e-3 for logp, _ in likely):  # NaN fails too
            likely, tail = [(math.nan, 0)] * k, math.nan
        else:
            tail = max(math.log(max(1.0 - math.fsum(math.exp(p) for p, _ in likely), 1e-300)), TAIL_FLOOR)
        top_ids.append([i for _, i in likely])
        top_logps.append([p for p, _ in likely])
        tails.append(tail)
    return Feedback.from_target(
        torch.tensor([*prompt, *answer], dtype=torch.int32, device="cpu"),
        len(prompt),
        SparseLogits(
            torch.tensor(top_ids, dtype=torch.int32, device="cpu"),
            torch.tensor(top_logps, dtype=torch.float64, device="cpu").to(dtype),
            torch.tensor(tails, dtype=torch.float64, device="cpu").to(dtype),
        ),
        sampled=sampled,
    )


def _rows(logprobs: Mapping[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Read ids and log-probs at each position, in the form of chats or of completions.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: if they have neither form.
    """
    if "content" in logprobs:
        pairs = [[(one["token"], one["logprob"]) for one in (*at["top_logprobs"], at)] for at in logprobs["content"]]
    else:
        pairs = [list(at.items()) for at in logprobs["top_logprobs"]]
    rows = []
    for at in pairs:
        by_id = {_id(token): float(logp) for token, logp in at}  # a chat names the chosen token twice
        rows.append((list(by_id), list(by_id.values())))
    return rows


def _id(token: str) -> int:
    if not token.startswith(_ID):
        raise ValueError("the engine names tokens by their text")
    return int(token.removeprefix(_ID))
