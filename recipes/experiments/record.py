"""Record once: the target's greedy answers to streams of prompts, as traces that `recipes/experiments/replay.py` learns from as often as you like.

    python -m recipes.experiments.record --stream sql.jsonl,maths.jsonl --requests 1000 --held_back 100 --output_dir runs/traces

A trace holds the prompts and answers as token ids. An interrupted recording goes on where it stopped when the command is given again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from hf_osd import OnlineConfig, record_answers
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.feedback.trace import read_trace, write_trace
from hf_osd.system.output_paths import check_apart
from recipes.common.command import check_numbers, check_temperature, run_command
from recipes.common.domains import digest
from recipes.common.models import (
    TargetArguments,
    draft_tokenizers,
    encode_rows,
    load_draft,
    load_target,
    shuffled,
    use_threads,
)
from recipes.common.run_folder import LOCK, folder_name, locked

logger = logging.getLogger("hf_osd.recipes.record")

SHARD = 96  # requests a file: what an interruption may lose
SEEDS_APART = 10**6  # of two answers to one request
_NAME = re.compile(r"(held_back|stream|again\d+)-\d+\.safetensors")
_SINCE = ("prompts", "top_k", "feedback_dtype", "prompt_positions")  # which older recordings do not say


@dataclass
class RecordArguments(TargetArguments):
    """What to record. Of `OnlineConfig` only `top_k`, `feedback_dtype` and `seed` matter here."""

    stream: str = field(
        default="stdlib", metadata={"help": "Streams with ',' between, see recipes/common/prompts.py."}
    )
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
    overwrite: bool = field(default=False, metadata={"help": "Record anew what is there of these domains."})

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
    from recipes.common.prompts import load_streams, split_held_back

    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype, args.device)
    translation, vocabulary = None, {}
    if args.draft:
        draft = load_draft(args.draft, target, any_vocabulary=True)
        translation = VocabMapping.from_models(target, draft, **draft_tokenizers(args.draft, draft, target, tokenizer))
        if not translation.is_identity:
            vocabulary = {"draft": args.draft, "draft_size": str(translation.draft_size)}
    seed, shards = config.seed or 0, []
    for name, rows in load_streams(args.stream, seed):
        rows, _ = encode_rows(target, tokenizer, name, rows, args.max_new_tokens, args.chat_template)
        if args.longest_prompt is not None:
            rows = [row for row in rows if len(row["ids"]) <= args.longest_prompt]
        held_back, rest = split_held_back(rows, args.held_back, seed, name)
        folder, stream = Path(args.output_dir) / folder_name(name), shuffled(rest, seed)[: args.requests]
        check_apart({"--output_dir": folder}, {"--target": args.target, "--draft": args.draft})
        parts = [("held_back", held_back, 0.0, 0), ("stream", stream, 0.0, 0)]
        parts += [(again_part(n), stream, args.again, n * SEEDS_APART) for n in range(args.times if args.again else 0)]
        for part, rows, temperature, offset in parts:
            for start in range(0, len(rows), SHARD):
                path, some = folder / f"{part}-{start:05d}.safetensors", rows[start : start + SHARD]
                facts = _facts(args, config, target, some, temperature) | vocabulary
                shards.append(Shard(path, some, facts, temperature, (config.seed or 0) + offset + start))
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(shard.path.parent for shard in shards):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"The trace {folder}"))
        todo = [
            shard for shard in shards if args.overwrite or not shard.is_there()
        ]  # all are looked at before one is written
        if args.overwrite:
            _discard({shard.path.parent for shard in shards})
        for shard in tqdm(todo, desc="recording", unit="shard"):
            _record(args, config, target, translation, shard)


@dataclass
class Shard:
    """One file of a trace, and what is to be in it."""

    path: Path
    rows: list[dict]
    facts: dict[str, str]
    temperature: float
    seed: int  # of what is sampled

    def is_there(self) -> bool:
        """Whether it has been recorded already.

        Raises:
            ValueError: if that was of something else, or the file is damaged.
        """
        if not self.path.is_file():
            return False
        recorded = read_trace(self.path)[1]
        names = [name for name in (*self.facts, "draft_size") if name in recorded or name not in _SINCE]
        if changed := [name for name in names if recorded.get(name) != self.facts.get(name)]:
            raise ValueError(
                f"{self.path} was recorded with another {', '.join(changed)}; choose another --output_dir, or record it anew with --overwrite."
            )
        return True


def _facts(
    args: RecordArguments, config: OnlineConfig, target, rows: list[dict], temperature: float
) -> dict[str, str]:
    """What is to be known of a shard, by which one of something else is told from it."""
    facts = {
        "target": args.target,
        "max_new_tokens": str(args.max_new_tokens),
        "dtype": str(target.dtype).removeprefix("torch."),
        "ids": json.dumps([row.get("id") for row in rows]),
        # Their tokens: rows of the same numbers may have other texts by now, or another chat template.
        "prompts": digest([row["ids"].tolist() for row in rows]),
        "top_k": str(config.top_k),
        "feedback_dtype": config.feedback_dtype,
        "prompt_positions": str(0 if temperature else config.prompt_positions),
    }
    return facts | ({"temperature": str(temperature)} if temperature else {})


def _discard(folders: set[Path]):
    """Delete what is recorded in them."""
    for path in [path for folder in folders for path in folder.glob("*-*.safetensors")]:
        if _NAME.fullmatch(path.name):
            path.unlink()


def again_part(n: int) -> str:
    """The part of a trace with the n-th answer again to each request, from 0."""
    return f"again{n + 1}"


def _record(args: RecordArguments, config: OnlineConfig, target, translation: VocabMapping | None, shard: Shard):
    if shard.temperature:  # of the shard: wherever a recording goes on, it is the same
        torch.manual_seed(shard.seed)
    began = time.perf_counter()
    answers = record_answers(
        target,
        [row["ids"] for row in shard.rows],
        args.max_new_tokens,
        batch_size=args.batch_answers,
        top_k=config.top_k,
        dtype=getattr(torch, config.feedback_dtype),
        prompt_positions=0 if shard.temperature else config.prompt_positions,  # the request's own are known
        temperature=shard.temperature,
        translation=translation,
    )
    write_trace(shard.path, answers, shard.facts | {"seconds": f"{time.perf_counter() - began:.1f}"})


if __name__ == "__main__":
    sys.exit(main())
