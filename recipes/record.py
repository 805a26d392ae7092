"""Record once: the target's greedy answers to streams of prompts, as traces that `recipes/replay.py` learns from as often as you like.

    python recipes/record.py --stream sql.jsonl,maths.jsonl --requests 1000 --held_back 100 --output_dir runs/traces

A trace holds the prompts and answers as token ids. An interrupted recording goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command import check_numbers, check_temperature, run_command
from models import TargetArguments, draft_tokenizers, encode_rows, load_draft, load_target, shuffled, use_threads
from tqdm import tqdm

from hf_osd import OnlineConfig, record_answers
from hf_osd.trace import read_trace, write_trace
from hf_osd.translation import Translation

logger = logging.getLogger("hf_osd.recipes.record")

SHARD = 96  # requests a file: what an interruption may lose
SEEDS_APART = 10**6  # of two answers to one request


@dataclass
class RecordArguments(TargetArguments):
    """What to record. Of `OnlineConfig` only `top_k`, `feedback_dtype` and `seed` matter here."""

    stream: str = field(default="stdlib", metadata={"help": "Streams with ',' between, see prompts.py."})
    draft: str = field(
        default="",
        metadata={
            "help": "A draft of another vocabulary, in whose tokens to record: its traces are for such drafts alone."
        },
    )
    requests: int = field(default=1000, metadata={"help": "Requests a stream, at most."})
    held_back: int = field(default=100, metadata={"help": "Prompts a stream to score on, in a trace of their own."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    longest_prompt: int | None = field(default=None, metadata={"help": "Leave out prompts of more tokens than this."})
    batch_answers: int = field(default=48, metadata={"help": "Prompts a batch."})
    chat_template: bool = field(default=True, metadata={"help": "Put prompts through the tokenizer's chat template."})
    again: float = field(
        default=0.0,
        metadata={
            "help": "Also record answers to each request sampled at this temperature, which replay.py --again learns from."
        },
    )
    times: int = field(default=1, metadata={"help": "With --again, how many answers to each."})
    output_dir: str = field(default="runs/traces", metadata={"help": "A folder a domain is made in here."})

    def __post_init__(self):
        super().__post_init__()
        check_temperature(self, "again")
        check_numbers(
            self,
            {
                "requests": 1,
                "times": 1,
                "held_back": 1,
                "max_new_tokens": 1,
                "batch_answers": 1,
                "threads": 1,
                "longest_prompt": 1,
            },
        )


def main(argv: list[str] | None = None) -> int:
    """Record each stream in turn; the exit status."""
    return run_command(RecordArguments, record, argv)


def record(args: RecordArguments, config: OnlineConfig):
    """A trace `held_back` and a trace `stream` for each domain, in shards."""
    from prompts import load_streams, split_held_back

    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype, args.device)
    translation, vocabulary = None, {}
    if args.draft:
        draft = load_draft(args.draft, target, any_vocabulary=True)
        translation = Translation.of_models(target, draft, **draft_tokenizers(args.draft, draft, target, tokenizer))
        if not translation.is_identity:
            vocabulary = {"draft": args.draft, "draft_size": str(translation.draft_size)}
    seed = config.seed or 0
    for name, rows in load_streams(args.stream, seed):
        rows, _ = encode_rows(target, tokenizer, name, rows, args.max_new_tokens, args.chat_template)
        if args.longest_prompt is not None:
            rows = [row for row in rows if len(row["ids"]) <= args.longest_prompt]
        held_back, rest = split_held_back(rows, args.held_back, seed, name)
        folder, stream = Path(args.output_dir) / name, shuffled(rest, seed)[: args.requests]
        part = functools.partial(_record_part, args, config, target, translation, vocabulary, folder)
        part("held_back", held_back)
        part("stream", stream)
        for n in range(args.times if args.again else 0):
            part(again_part(n), stream, args.again, n * SEEDS_APART)


def again_part(n: int) -> str:
    """The part of a trace with the n-th answer again to each request, from 0."""
    return f"again{n + 1}"


def _record_part(
    args: RecordArguments,
    config: OnlineConfig,
    target,
    translation: Translation | None,
    vocabulary: dict[str, str],  # facts of it, where it is another than the target's
    folder: Path,
    part: str,
    rows: list[dict],
    temperature: float = 0.0,
    offset: int = 0,  # to the seed of what is sampled
):
    folder.mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(rows), SHARD), desc=f"{folder.name}: {part}", unit="shard"):
        shard = rows[start : start + SHARD]
        path = folder / f"{part}-{start:05d}.safetensors"
        facts = {
            "target": args.target,
            "max_new_tokens": str(args.max_new_tokens),
            "dtype": str(target.dtype).removeprefix("torch."),
            "ids": json.dumps([row.get("id") for row in shard]),
            **vocabulary,
        }
        if temperature:
            facts["temperature"] = str(temperature)
        if path.is_file():
            recorded = read_trace(path)[1]
            changed = [name for name in (*facts, "draft_size") if recorded.get(name) != facts.get(name)]
            if changed:
                raise ValueError(
                    f"{path} was recorded with another {', '.join(changed)}; choose another --output_dir, or delete it."
                )
            continue
        if temperature:  # of the shard: wherever a recording goes on, it is the same
            torch.manual_seed((config.seed or 0) + offset + start)
        began = time.perf_counter()
        answers = record_answers(
            target,
            [row["ids"] for row in shard],
            args.max_new_tokens,
            batch_size=args.batch_answers,
            top_k=config.top_k,
            dtype=getattr(torch, config.feedback_dtype),
            prompt_positions=0 if temperature else config.prompt_positions,  # the request's own are known
            temperature=temperature,
            translation=translation,
        )
        facts["seconds"] = f"{time.perf_counter() - began:.1f}"
        write_trace(path, answers, facts)


if __name__ == "__main__":
    sys.exit(main())
