"""Learner settings side by side on the same recorded answers: the target answers once, and every arm learns from that.

    python recipes/replay.py --stream stdlib --requests 48 --held_back 24 --arms "batch_size=2;batch_size=8,replay=6.0"

Greedy answers do not depend on the draft, so what an arm learns here is what it would have learnt serving. Only learning is timed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command import check_numbers, run_command
from models import ModelArguments, encode, load_draft, load_target, use_threads

from hf_osd import OnlineAssistant, OnlineConfig, record_answers


@dataclass
class ReplayArguments(ModelArguments):
    """What to record, and what to try on it. `OnlineConfig`'s own flags are the base of all arms."""

    arms: str = field(default="", metadata={"help": "Arms with ';' between, each 'field=value,…' over the base."})
    stream: str = field(default="stdlib", metadata={"help": "One stream, see prompts.py."})
    requests: int = field(default=48, metadata={"help": "Requests to learn from, in turn."})
    held_back: int = field(default=24, metadata={"help": "Prompts to score on, never learnt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    score_every: int = field(default=16, metadata={"help": "Requests between two scores."})
    dtype: str = field(
        default="float32", metadata={"help": "'auto' (the checkpoint's), 'float32', 'bfloat16' or 'float16'."}
    )
    batch_answers: int = field(default=8, metadata={"help": "Prompts a batch where answers are recorded."})
    chat_template: bool = field(default=True, metadata={"help": "Put prompts through the tokenizer's chat template."})
    save_to: str | None = field(
        default=None, metadata={"help": "Also save each arm's draft, in a folder 0, 1, … here."}
    )
    json: str | None = field(default=None, metadata={"help": "Also write the table to this file."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, {"requests": 1, "held_back": 1, "max_new_tokens": 1, "score_every": 1, "batch_answers": 1})


def main(argv: list[str] | None = None) -> int:
    """Record, learn with each arm, print a row for each; the exit status."""
    return run_command(ReplayArguments, measure, argv)


def measure(args: ReplayArguments, base: OnlineConfig):
    """The table, to the file asked for as well."""
    table = replay(args, base)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def replay(args: ReplayArguments, base: OnlineConfig) -> list[dict]:
    """A row an arm: held-back α every `score_every` requests, and what learning took."""
    from prompts import load_streams, split_held_back

    arms = [read_arm(arm, base) for arm in args.arms.split(";")]
    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype)
    name, rows = load_streams(args.stream, base.seed)[0]
    parts = split_held_back(rows, args.held_back, base.seed, name)
    held_back, stream = (
        record_answers(
            target,
            [encode(tokenizer, row["prompt"], args.chat_template) for row in part],
            args.max_new_tokens,
            batch_size=args.batch_answers,
            top_k=base.top_k,
        )
        for part in (parts[0], parts[1][: args.requests])
    )
    table = []
    for number, (label, config) in enumerate(arms):
        assistant = OnlineAssistant(load_draft(args.draft, target), config)
        curve = [_alpha(assistant, held_back)]
        for served, feedback in enumerate(stream, 1):
            assistant.buffer.add(feedback)
            assistant.update()
            if served % args.score_every == 0:
                curve.append(_alpha(assistant, held_back))
        stats = assistant.stats
        rate = stats.learned_tokens / stats.learning_seconds if stats.updates else 0.0
        row = {"arm": label, "alpha": curve, "updates": stats.updates, "failed": stats.failed_updates}
        row |= {"learning_seconds": stats.learning_seconds, "learned_tokens_per_second": rate}
        table.append(row)
        if args.save_to is not None:
            assistant.save_pretrained(Path(args.save_to) / str(number), tokenizer)
        figures = " ".join(f"{alpha:.3f}" for alpha in curve)
        print(
            f"{label or 'base':<36} alpha {figures}   {stats.learning_seconds:.0f} s, {rate:.0f} tokens/s", flush=True
        )
    return table


def read_arm(arm: str, base: OnlineConfig) -> tuple[str, OnlineConfig]:
    """`"batch_size=2,replay=3.0"` over `base`.

    Raises:
        ValueError: if it is not a list of fields of `OnlineConfig` with fitting values.
    """
    changes = {}
    for item in filter(None, map(str.strip, arm.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"`arms` has {item!r}; write field=value, such as batch_size=2.")
        try:
            changes[key.strip()] = json.loads(value)
        except json.JSONDecodeError:  # a word, such as forward_kl
            changes[key.strip()] = value.strip()
    return arm.strip(), OnlineConfig.from_dict({**base.to_dict(), **changes})


def _alpha(assistant: OnlineAssistant, held_back: list) -> float:
    return float(torch.cat(assistant.score(held_back)).mean())


if __name__ == "__main__":
    sys.exit(main())
