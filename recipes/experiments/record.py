"""Records the target's answers, greedy unless asked for others, to streams of prompts once, as traces from which `recipes/experiments/replay.py` learns as often as you like.

    python -m recipes.experiments.record --stream sql.jsonl,maths.jsonl --requests 1000 --held_back 100 --output_dir runs/traces

A trace contains prompts and answers as token ids. Give the command again to go on with a recording that was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from hf_osd import OnlineConfig, record_answers
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.feedback.trace import read_trace, write_trace
from hf_osd.models.blueprint import depth_of, text_model
from hf_osd.models.feature_growth import default_aux_layers
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.output_paths import check_apart
from recipes.common.command import numbers_of, run_command
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
from recipes.common.options import sampling_temperature, string
from recipes.common.run_folder import LOCK, folder_name, locked

logger = logging.getLogger("hf_osd.recipes.record")

SHARD = 96  # requests a file, which is what an interruption may lose
SEED_STEP = 10**6  # between the seeds of two answers to one request
_NAME = re.compile(r"(held_back|stream|again\d+)-\d+\.safetensors")
_MAY_LACK = ("prompts", "top_k", "feedback_dtype", "prompt_positions")  # facts that older recordings do not have


@dataclass
class RecordArguments(TargetArguments):
    """What to record. Of `OnlineConfig` only `top_k`, `feedback_dtype`, `prompt_positions` and `seed` matter here."""

    stream: str = option("stdlib", string(), "Streams with ',' between; see docs/recipes.md.")
    draft: str = option(
        "",
        string(),
        "A draft of another vocabulary, in whose tokens to record. Only drafts of that vocabulary can learn from the traces.",
    )
    requests: int = option(1000, whole(1), "Requests to record of each stream, at most.")
    held_back: int = option(100, whole(1), "Prompts of each stream for scoring, in a trace of their own.")
    held_back_top_k: int = option(
        4096,
        whole(1),
        "With --temperature, how many of the target's log-probs are kept at each position of held-back answers: α is Σ min(p, q) over these.",
    )
    max_new_tokens: int = option(64, whole(1), "Longest answer, in tokens.")
    longest_prompt: int | None = option(None, whole(1).or_none(), "Leave out prompts of more tokens than this.")
    batch_answers: int = option(48, whole(1), "Batch size.")
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")
    again: float = option(
        0.0,
        sampling_temperature(),
        "Also record answers sampled at this temperature, for replay.py --again.",
    )
    temperature: float = option(
        0.0,
        sampling_temperature(),
        "Record answers sampled at this temperature in place of greedy ones, held-back prompts' too.",
    )
    times: int = option(1, whole(1), "With --again, how many sampled answers to each request.")
    states: str = option(
        "",
        string(),
        "Also record the target's hidden states after these layers, such as 2,15,27, for replay.py --draft feature; 'auto' for those that a grown feature draft reads and learns from.",
    )
    output_dir: str = option("runs/traces", string(), "Folder in which each domain gets a folder.")
    overwrite: bool = option(False, switch(), "Record these domains anew, in place of what is there.")


def main(argv: list[str] | None = None) -> int:
    """Record each stream in turn; returns the exit status."""
    return run_command(RecordArguments, record, argv)


def record(args: RecordArguments, config: OnlineConfig):
    """Write a trace `held_back` and a trace `stream` for each domain, and one for each further answer, in shards."""
    from recipes.common.prompts import load_streams, split_held_back

    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype, args.device)
    translation, vocabulary = None, {}
    if args.draft:
        draft = load_draft(args.draft, target, any_vocabulary=True)
        translation = VocabMapping.from_models(target, draft, **draft_tokenizers(args.draft, draft, target, tokenizer))
        if not translation.is_identity:
            vocabulary = {"draft": args.draft, "draft_size": str(translation.draft_size)}
    layers = state_layers(args.states, target)
    if layers is not None:
        vocabulary["states"] = ",".join(map(str, layers))
    seed, shards = config.seed or 0, []
    for name, rows in load_streams(args.stream, seed):
        rows, _ = encode_rows(target, tokenizer, name, rows, args.max_new_tokens, args.chat_template)
        if args.longest_prompt is not None:
            rows = [row for row in rows if len(row["ids"]) <= args.longest_prompt]
        held_back, rest = split_held_back(rows, args.held_back, seed, name)
        folder, stream = Path(args.output_dir) / folder_name(name), shuffled(rest, seed)[: args.requests]
        check_apart({"--output_dir": folder}, {"--target": args.target, "--draft": args.draft})
        parts = [("held_back", held_back, args.temperature, SEED_STEP // 2), ("stream", stream, args.temperature, 0)]
        parts += [(again_part(n), stream, args.again, n * SEED_STEP) for n in range(args.times if args.again else 0)]
        for part, rows, temperature, offset in parts:
            # Nobody learns from prompts held back, and the prompt's own positions are the same in every answer to it.
            scored = part == "held_back" and temperature > 0
            positions = 0 if scored or part.startswith("again") else config.prompt_positions
            top_k = max(args.held_back_top_k, config.top_k) if scored else config.top_k
            for start in range(0, len(rows), SHARD):
                path, some = folder / f"{part}-{start:05d}.safetensors", rows[start : start + SHARD]
                facts = _facts(args, config, target, some, temperature) | vocabulary
                facts |= {"top_k": str(top_k), "prompt_positions": str(positions)}
                random = (config.seed or 0) + offset + start
                shards.append(Shard(path, some, facts, temperature, top_k, positions, random))
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(shard.path.parent for shard in shards):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"The trace {folder}"))
        todo = [
            shard for shard in shards if args.overwrite or not shard.is_there()
        ]  # all are checked before one is written
        if args.overwrite:
            _discard({shard.path.parent for shard in shards})
        for shard in tqdm(todo, desc="recording", unit="shard"):
            _record(args, config, target, translation, layers, shard)


@dataclass
class Shard:
    """One file of a trace, and what it is to contain."""

    path: Path
    rows: list[dict]
    facts: dict[str, str]  # saved with it; see `_facts`
    temperature: float
    top_k: int
    prompt_positions: int
    seed: int  # for sampled answers

    def is_there(self) -> bool:
        """Tell whether it has been recorded already.

        Raises:
            ValueError: if that recording was of something else, or the file is damaged.
        """
        if not self.path.is_file():
            return False
        recorded = read_trace(self.path)[1]
        names = dict.fromkeys(["temperature", *self.facts, "draft_size"])
        names = [name for name in names if name in recorded or name not in _MAY_LACK]
        if changed := [name for name in names if recorded.get(name) != self.facts.get(name)]:
            raise ValueError(
                f"{self.path} was recorded with another {', '.join(changed)}; choose another --output_dir, or record it anew with --overwrite."
            )
        return True


def _facts(
    args: RecordArguments, config: OnlineConfig, target, rows: list[dict], temperature: float
) -> dict[str, str]:
    """Collect the facts that are saved with a shard, and by which a recording of something else is recognised."""
    facts = {
        "target": args.target,
        "max_new_tokens": str(args.max_new_tokens),
        "dtype": str(target.dtype).removeprefix("torch."),
        "ids": json.dumps([row.get("id") for row in rows]),
        # Rows with the same ids may have other texts by now, or another chat template.
        "prompts": digest([row["ids"].tolist() for row in rows]),
        "feedback_dtype": config.feedback_dtype,
    }
    return facts | ({"temperature": str(temperature)} if temperature else {})


def _discard(folders: set[Path]):
    """Delete the traces in these folders."""
    for path in [path for folder in folders for path in folder.glob("*-*.safetensors")]:
        if _NAME.fullmatch(path.name):
            path.unlink()


def again_part(n: int) -> str:
    """Name the part of a trace with the n-th further answer to each request, counted from 0."""
    return f"again{n + 1}"


def state_layers(states: str, target) -> list[int] | None:
    """Read the flag `states`: the layers after which the target's hidden states are recorded, `None` for no states.

    Raises:
        ValueError: if it cannot be read.
    """
    if not states:
        return None
    if states == "auto":
        depth = depth_of(text_model(target))
        return list(dict.fromkeys([*default_aux_layers(depth), depth]))
    return numbers_of(states, "states", least=0)


def _record(
    args: RecordArguments,
    config: OnlineConfig,
    target,
    translation: VocabMapping | None,
    layers: list[int] | None,
    shard: Shard,
):
    if shard.temperature:  # seeded for each shard, so that a recording that goes on gives the same answers
        torch.manual_seed(shard.seed)
    began = time.perf_counter()
    answers = record_answers(
        target,
        [row["ids"] for row in shard.rows],
        args.max_new_tokens,
        batch_size=args.batch_answers,
        top_k=shard.top_k,
        dtype=getattr(torch, config.feedback_dtype),
        prompt_positions=shard.prompt_positions,
        temperature=shard.temperature,
        translation=translation,
        states_of=layers,
    )
    write_trace(shard.path, answers, shard.facts | {"seconds": f"{time.perf_counter() - began:.1f}"})


if __name__ == "__main__":
    sys.exit(main())
