"""Measures how long a draft that has learnt from poisoned requests serves good traffic, on recorded answers and without the target.

    python -m recipes.experiments.poison --trace runs/traces/sql --draft Qwen/Qwen3-0.6B --target Qwen/Qwen3-0.6B

Each stream begins with poison: `--poisoned` poisoned requests and then as many good ones (*first*), or the two in turn (*mixed*). After each change of the
serving weights, α on held-back good requests tells whether they are worse than the draft before any learning.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.system.bounds import number, option, whole
from recipes.common.command import check_learns, check_trace, run_command
from recipes.common.models import ModelArguments, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string
from recipes.common.row_log import RowLog
from recipes.experiments.replay import load_trace
from recipes.experiments.replaying import replay

logger = logging.getLogger("hf_osd.recipes.poison")


@dataclass
class PoisonArguments(ModelArguments):
    """What to poison. Only the target's vocabulary matters, unless the draft is grown from it."""

    trace: str = option("", string(), "A folder made by record.py.")
    poisoned: int = option(48, whole(1), "Poisoned requests in each stream, and as many good ones.")
    held_back: int = option(40, whole(1), "Held-back good prompts to score on.")
    poisons: str = option("", string(), "Kinds of poison, with ',' between; all if left out.")
    margin: float = option(0.02, number(0), "A draft counts as worse if its α is lower by more than this.")
    log: str | None = option(None, optional_string(), "Append a row for each stream to this JSONL file.")

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)
        if unknown := set(filter(None, self.poisons.split(","))) - set(POISONS):
            raise ValueError(f"`poisons` has {sorted(unknown)}; choose from {', '.join(POISONS)}.")


def main(argv: list[str] | None = None) -> int:
    """Serve each stream, and print a table; returns the exit status."""
    return run_command(PoisonArguments, measure, argv)


def measure(args: PoisonArguments, config: OnlineConfig):
    """Print a table with a line for each stream."""
    check_learns(config.learn, "recipes/experiments/poison.py")
    log = RowLog(args.log, ("poison", "stream", "longest"))
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype, args.device)
    traced = load_trace(Path(args.trace), config.top_k, args.held_back)
    # Poison is made of other requests than the good ones, whose answers must not be learnt before.
    source, good = traced.stream[: args.poisoned], traced.stream[args.poisoned : 2 * args.poisoned]
    if len(good) < args.poisoned:
        raise ValueError(
            f"{traced.name} has {len(traced.stream)} requests and `poisoned` is {args.poisoned}, which takes twice as many; lower it."
        )
    size = target.config.get_text_config().vocab_size
    print(
        "| poison | stream | α of the draft as it came | lowest α served | good requests in a row that a worse draft served, at most | updates, dropped |"
    )
    print("|---|---|---|---|---|---|")
    for name in filter(None, args.poisons.split(",")) if args.poisons else POISONS:
        poison = POISONS[name]
        poisoned = [poison(source, i, size) for i in range(len(source))]
        streams = {
            "first": [*((one, True) for one in poisoned), *((one, False) for one in good)],
            "mixed": list(
                itertools.chain.from_iterable(((p, True), (g, False)) for p, g in zip(poisoned, good, strict=True))
            ),
        }
        for order, stream in streams.items():
            row = {"poison": name, "stream": order} | _serve(args, config, target, stream, traced.held_back)
            log.append(row)
            print(
                f"| {name} | {order} | {row['static']:.3f} | {row['lowest']:.3f} | {row['longest']} | {row['updates']}, {row['dropped']} |",
                flush=True,
            )


def _serve(args, config: OnlineConfig, target, stream: list[tuple[Feedback, bool]], held_back: list[Feedback]) -> dict:
    with OnlineAssistant(load_draft(args.draft, target), config) as assistant:
        alphas = {0: _alpha(assistant, held_back)}
        longest = run = 0
        version = assistant.serving.version
        for (_, is_poison), _ in zip(stream, replay(assistant, [one for one, _ in stream]), strict=True):
            # Judged by the weights that served this request; a swap comes after it.
            if not is_poison:
                run = run + 1 if alphas[version] < alphas[0] - args.margin else 0
                longest = max(longest, run)
            version = assistant.serving.version
            if version not in alphas:
                alphas[version] = _alpha(assistant, held_back)
        stats = assistant.stats
        return {
            "static": alphas[0],
            "lowest": min(alphas.values()),
            "longest": longest,
            "updates": stats.updates,
            "dropped": stats.rejected_updates,
        }


def _alpha(assistant: OnlineAssistant, held_back: list[Feedback]) -> float:
    return float(torch.cat(assistant.score(held_back)).nanmean())


def _garbage(good: list[Feedback], i: int, size: int) -> Feedback:
    """Replace the prompt by random tokens."""
    request, random = good[i], torch.Generator().manual_seed(i)
    prompt = torch.randint(size, (request.prompt_length,), generator=random, dtype=torch.int32)
    return replace(request, tokens=torch.cat([prompt, request.answer]), prompt_rows=None, states=None)


def _one_prompt(good: list[Feedback], i: int, size: int) -> Feedback:
    """Repeat the first request."""
    return replace(good[0])


def _others_answer(good: list[Feedback], i: int, size: int) -> Feedback:
    """Replace the answer by that to another prompt."""
    request, other = good[i], good[(i + 1) % len(good)]
    tokens = torch.cat([request.tokens[: request.prompt_length], other.answer])
    return replace(other, tokens=tokens, prompt_length=request.prompt_length, prompt_rows=None, states=None)


def _other_target(good: list[Feedback], i: int, size: int) -> Feedback:
    """Permute the vocabulary of the target's predictions and answer."""
    request, moved = good[i], torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    tokens = torch.cat([request.tokens[: request.prompt_length], moved[request.answer.long()]])
    return replace(request, tokens=tokens, top_ids=moved[request.top_ids.long()], prompt_rows=None, states=None)


POISONS: dict[str, Callable[[list[Feedback], int, int], Feedback]] = {
    "garbage": _garbage,
    "one-prompt": _one_prompt,
    "other-answers": _others_answer,
    "other-target": _other_target,
}


if __name__ == "__main__":
    sys.exit(main())
