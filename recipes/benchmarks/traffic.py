"""Measures what learning costs on the wire: bytes of feedback a token, bytes and milliseconds of a swap of weights, and both for many replicas.

    python -m recipes.benchmarks.traffic --threads 2 --seed 0

The figures of docs/scale.md on replicas come from here. A few requests are served in one process, so that their feedback has drafts in it, and packed in frames as
hf_osd.remote.channel sends them. Nothing is sent: bytes are those of the frames, without what a network adds.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median

import torch

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.feedback.trace import unpack
from hf_osd.remote.channel import feedback_frame
from hf_osd.remote.frames import from_bytes, to_bytes
from hf_osd.system.bounds import number, option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import run_command
from recipes.common.models import ModelArguments, answer, encode_rows, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string

TOP_K = (64, 16, 4, 1)


@dataclass
class TrafficArguments(ModelArguments):
    """What to measure, and for how many replicas. `update_interval` of `OnlineConfig` is how many requests go into a frame."""

    stream: str = option("stdlib", string(), "One stream; see docs/recipes.md.")
    requests: int = option(8, whole(1), "Requests to serve.")
    max_new_tokens: int = option(32, whole(2), "Longest answer, in tokens.")
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")
    repeats: int = option(15, whole(1), "How often frames are made, read and swapped in; figures are medians.")
    replicas: int = option(1000, whole(1), "Replicas of the target to calculate for.")
    tokens_per_second: float = option(1000.0, number(1), "Verified tokens a second of each replica.")
    weights_seconds: float = option(60.0, number(1), "Seconds between two swaps.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command(TrafficArguments, measure, argv)


def measure(args: TrafficArguments, config: OnlineConfig):
    """Serve, pack, swap, and print the tables."""
    from recipes.common.prompts import load_stream

    use_threads(args.threads)
    torch.manual_seed(config.seed or 0)
    target, tokenizer = load_target(args.target, args.dtype)
    name, rows = load_stream(args.stream, config.seed)
    rows, _ = encode_rows(target, tokenizer, name, rows[: args.requests], args.max_new_tokens, args.chat_template)
    draft = load_draft(args.draft, target)
    # The constant policy drafts whether or not that pays, and nothing is learnt.
    served = {"lookahead": "constant", "update_interval": 10**9, "gate": False, "top_k": max(TOP_K)}
    with OnlineAssistant(draft, OnlineConfig.from_dict({**config.to_dict(), **served})) as assistant:
        for row in rows:
            answer(target, row["ids"], args.max_new_tokens, assistant_model=assistant)
        assistant.collect()
        feedback = assistant.buffer.new()
    figures = {
        "feedback": [_feedback(feedback, k, config.update_interval, args.repeats) for k in TOP_K],
        "swap": [
            {"trains": what, **_swap(draft, freeze, config, args.repeats)}
            for what, freeze in (("layers", True), ("layers, embeddings and head", False))
        ],
        "tokens": sum(map(len, feedback)),
        "prompt_tokens": sum(one.prompt_length for one in feedback),
        "threads": torch.get_num_threads(),
        "arguments": asdict(args),
    }
    figures["replicas"] = _replicas(figures, args)
    if args.json is not None:
        write_json(args.json, figures)
    _print(figures, args)


def _feedback(feedback: list, k: int, batch: int, repeats: int) -> dict:
    """Measure frames of `batch` requests each, with k log-probs a position."""
    sparse = [one.truncate(k) for one in feedback]
    tokens, rows = sum(map(len, sparse)), []
    for _ in range(repeats):
        times = [time.perf_counter()]
        frames = [feedback_frame(sparse[i : i + batch]) for i in range(0, len(sparse), batch)]
        times.append(time.perf_counter())
        for data in frames:
            unpack(from_bytes(data)[1])
        times.append(time.perf_counter())
        rows.append([1e6 * (after - before) / tokens for before, after in pairwise(times)])
    write, read = (median(column) for column in zip(*rows, strict=True))
    return {
        "top_k": k,
        "bytes_a_token": sum(map(len, frames)) / tokens,
        "write_us_a_token": write,
        "read_us_a_token": read,
    }


def _swap(draft, freeze: bool, config: OnlineConfig, repeats: int) -> dict:
    """Measure a frame of weights: make, read and swap it in."""
    draft.requires_grad_(True)
    settings = {"freeze_embeddings": freeze, "learn": False, "suffix_cache": False}
    assistant = OnlineAssistant(draft, OnlineConfig.from_dict({**config.to_dict(), **settings}))
    rows = []
    for _ in range(repeats):
        times = [time.perf_counter()]
        data = to_bytes("weights", dict(assistant.serving.weights()))
        times.append(time.perf_counter())
        weights = from_bytes(data)[1]
        times.append(time.perf_counter())
        assistant.serving.refresh(weights)
        times.append(time.perf_counter())
        rows.append([1e3 * (after - before) for before, after in pairwise(times)])
    write, read, refresh = (median(column) for column in zip(*rows, strict=True))
    parameters = sum(p.numel() for _, p in assistant.serving.weights())
    return {
        "parameters": parameters,
        "bytes": len(data),
        "write_ms": write,
        "read_ms": read,
        "refresh_ms": refresh,
    }


def _replicas(figures: dict, args: TrafficArguments) -> dict:
    """Calculate megabits a second at the process that learns: all feedback in, and the weights out to each replica separately."""
    tokens = args.replicas * args.tokens_per_second
    return {
        "replicas": args.replicas,
        "tokens_per_second": tokens,
        "feedback_mbit_per_second": {
            row["top_k"]: tokens * row["bytes_a_token"] * 8e-6 for row in figures["feedback"]
        },
        "weights_mbit_per_second": {
            row["trains"]: args.replicas * row["bytes"] * 8e-6 / args.weights_seconds for row in figures["swap"]
        },
    }


def _print(figures: dict, args: TrafficArguments):
    print(
        f"{figures['tokens']} tokens verified after {figures['prompt_tokens']} of prompts, {figures['threads']} threads\n"
    )
    found, each = figures["replicas"], f"at {args.tokens_per_second:g} tokens a second each"
    print(f"top_k  bytes a token  write µs  read µs  Mbit/s of {args.replicas} replicas {each}")
    for row in figures["feedback"]:
        k = row["top_k"]
        print(
            f"{k:>5}  {row['bytes_a_token']:>13.1f}  {row['write_us_a_token']:>8.1f}  {row['read_us_a_token']:>7.1f}  {found['feedback_mbit_per_second'][k]:.0f}"
        )
    print(
        f"\nwhat trains                   parameters       bytes  write ms  read ms  refresh ms  Mbit/s, a swap in {args.weights_seconds:g} s"
    )
    for row in figures["swap"]:
        print(
            f"{row['trains']:<28}  {row['parameters']:>10}  {row['bytes']:>10}  {row['write_ms']:>8.1f}  {row['read_ms']:>7.1f}  {row['refresh_ms']:>10.1f}  "
            f"{found['weights_mbit_per_second'][row['trains']]:.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
