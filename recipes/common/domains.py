"""`Domain`: one stream of a job, tokenized and split; and digests by which a run recognises its streams and models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from recipes.common.models import encode_rows, print_of, shuffled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Domain:
    """A stream's prompts as token ids, int64 `(L,)` each, split by use."""

    name: str
    held_back: list[Tensor]
    warm_up: list[Tensor]
    requests: list[Tensor]
    skipped: int  # prompts that were longer than the model's window
    content: str  # a digest of its rows


def load_domains(
    args, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, share: Callable[[list], list]
) -> list[Domain]:
    """Load the streams that the flags name, in order.

    Args:
        args (`DistillArguments`): the flags.
        share (`Callable`): picks this process's share of the prompts to serve and to warm up with.

    Raises:
        ValueError, OSError: if a stream cannot be read, or has too few prompts.
    """
    from recipes.common.prompts import load_streams, split_held_back

    domains = []
    for name, rows in load_streams(args.stream, seed):
        encoded, skipped = encode_rows(target, tokenizer, name, rows, args.max_new_tokens, args.chat_template)
        held_back, rest = split_held_back(encoded, args.held_back, seed, name)
        rest = shuffled(rest, seed) if args.shuffle else rest
        served = rest[args.warm_up :][: args.requests]
        wanted = args.requests or 1
        if len(served) < wanted:
            raise ValueError(
                f"{name} has {len(encoded)} prompts: too few for --held_back {args.held_back}, --warm_up {args.warm_up} and "
                f"--requests {wanted}. Lower one of them."
            )
        parts = (held_back, *map(share, (rest[: args.warm_up], served)))
        parts = [[row["ids"] for row in part] for part in parts]
        domains.append(Domain(name, *parts, skipped=skipped, content=content_of(rows)))
    return domains


def content_of(rows: list[dict]) -> str:
    """Digest a stream's prompts, their order and their groups."""
    return digest([(row["prompt"], row.get("group")) for row in rows])


def prints_of(
    domains: list[Domain],
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool,
) -> dict[str, str]:
    """Digest all that a resumed run must find unchanged, wherever it lies now."""
    return {
        "stream": digest([(domain.name, domain.content) for domain in domains]),
        "chat_template": digest(tokenizer.chat_template if chat_template else None),
        "held_back_prompts": digest([(domain.name, [ids.tolist() for ids in domain.held_back]) for domain in domains]),
        "target": print_of(target),
        "draft": print_of(draft),
    }


def digest(value) -> str:
    """Digest any value whose `repr` tells it from others."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
