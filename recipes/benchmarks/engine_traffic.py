"""Measures what a token that teaches takes on its way from an engine through a sidecar to the learner: bytes, and microseconds of the sidecar's one thread for each.

    python -m recipes.benchmarks.engine_traffic --threads 1 --seed 0

No engine runs and nothing is sent: the target answers prompts, and its answers are written as vLLM 0.32 streams them, a token a chunk. What HTTP takes is not in the figures.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from hf_osd import Feedback, OnlineConfig, record_answers
from hf_osd.engines.sidecar.answers import to_feedback
from hf_osd.engines.sidecar.asking import CHAT, COMPLETIONS, StreamCutter, ask
from hf_osd.feedback.trace import pack, unpack
from hf_osd.remote.frames import from_bytes, to_bytes
from hf_osd.system.bounds import number, option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import run_command
from recipes.common.models import TargetArguments, encode_rows, load_target, use_threads
from recipes.common.options import optional_string, string
from recipes.common.prompts import load_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class EngineTrafficArguments(TargetArguments):
    """What to measure, and for how many engines."""

    stream: str = option("stdlib", string(), "One stream; see docs/recipes.md.")
    requests: int = option(8, whole(1), "Answers to measure.")
    prompt_tokens: int = option(128, whole(1), "Tokens of a prompt; of longer ones the last.")
    max_new_tokens: int = option(64, whole(2), "Longest answer, in tokens.")
    top_log_probs: int = option(20, whole(1), "Log-probs a position, as the sidecar's flag of that name.")
    repeats: int = option(15, whole(1), "How often each step is timed; figures are medians.")
    engines: int = option(1000, whole(1), "Engines to calculate for.")
    tokens_per_second: float = option(1000.0, number(1), "Tokens a second of each engine.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command(EngineTrafficArguments, measure, argv)


def measure(args: EngineTrafficArguments, config: OnlineConfig):
    """Answer, stream, cut, make feedback, pack, and print the table."""
    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype)
    name, rows = load_stream(args.stream, config.seed)
    rows, _ = encode_rows(target, tokenizer, name, rows[: args.requests], args.max_new_tokens)
    prompts = [row["ids"][-args.prompt_tokens :] for row in rows]
    answers = record_answers(target, prompts, args.max_new_tokens, top_k=args.top_log_probs, dtype=torch.float32)
    width = target.config.get_text_config(decoder=True).vocab_size
    dtype = getattr(torch, config.feedback_dtype)
    figures: dict[str, Any] = {
        "requests": len(answers),
        "tokens": sum(map(len, answers)),
        "prompt_tokens": sum(one.prompt_length for one in answers),
        "streams": {
            path: streamed(answers, tokenizer, path, args.top_log_probs, args.repeats) for path in (COMPLETIONS, CHAT)
        },
        **learnt(answers, args.top_log_probs, width, dtype, args.repeats),
        "threads": torch.get_num_threads(),
        "arguments": asdict(args),
    }
    if args.json is not None:
        write_json(args.json, figures)
    _print(figures, args)


def streamed(
    answers: list[Feedback], tokenizer: PreTrainedTokenizerBase, path: str, top_k: int, repeats: int
) -> dict[str, float]:
    """Measure the bytes a token that are cut out of streamed answers, and the microseconds for it."""
    prompt = {"messages": [{"role": "user", "content": ""}]} if path == CHAT else {"prompt": [1]}
    asked = ask(path, json.dumps({**prompt, "stream": True}).encode(), top_k)
    streams = [list(events(answer, tokenizer, path)) for answer in answers]
    tokens, seconds = sum(map(len, answers)), []
    for _ in range(repeats):
        cutters, began = [StreamCutter(asked) for _ in streams], time.thread_time()
        rest = sum(
            len(cutter.feed(event)) for cutter, stream in zip(cutters, streams, strict=True) for event in stream
        )
        seconds.append(time.thread_time() - began)
    whole_bytes = sum(map(len, itertools.chain.from_iterable(streams)))
    return {"bytes_a_token": (whole_bytes - rest) / tokens, "cut_us_a_token": 1e6 * median(seconds) / tokens}


def learnt(answers: list[Feedback], top_k: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Measure what it takes to make feedback of an answer's values and to send it to the learner, a request a frame."""
    tokens, times = sum(map(len, answers)), []
    values = [[_values(answer)] for answer in answers]
    for _ in range(repeats):
        marks = [time.thread_time()]
        made = [to_feedback(one, False, top_k, width, dtype) for one in values]
        marks.append(time.thread_time())
        frames = [to_bytes("feedback", pack([one])) for one in made]
        marks.append(time.thread_time())
        for frame in frames:
            unpack(from_bytes(frame)[1])
        marks.append(time.thread_time())
        times.append([1e6 * (after - before) / tokens for before, after in itertools.pairwise(marks)])
    made_us, write_us, read_us = (median(column) for column in zip(*times, strict=True))
    return {
        "feedback_us_a_token": made_us,
        "learner": {
            "bytes_a_token": sum(map(len, frames)) / tokens,
            "write_us_a_token": write_us,
            "read_us_a_token": read_us,
        },
    }


def events(answer: Feedback, tokenizer: PreTrainedTokenizerBase, path: str) -> Iterator[bytes]:
    """Write an answer as vLLM 0.32 streams it to a sidecar, of which it was asked for log-probs and token ids: one server-sent event a token, and the last."""
    chat = path == CHAT
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{0:016x}",
        "object": kind,
        "created": 1_700_000_000,
        "model": "target",
    }
    prompt = answer.tokens[: answer.prompt_length].tolist()
    if chat:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield _event({**head, "choices": [choice], "prompt_token_ids": prompt, "prompt_text": None})
    for i, (token, row) in enumerate(_rows(answer)):
        text = tokenizer.decode([token])
        ends = {"finish_reason": "length" if i == len(answer) - 1 else None}
        if chat:
            choice = {"index": 0, "delta": {"content": text}, "logprobs": _chat_logprobs(token, row, text), **ends}
            choice |= {"stop_reason": None} if ends["finish_reason"] else {}
        else:
            choice = {"index": 0, "text": text, "logprobs": _logprobs(token, row, 12 * i), **ends, "stop_reason": None}
            choice["prompt_token_ids"] = None if i else prompt
        yield _event({**head, "choices": [{**choice, "token_ids": [token]}]})
    yield b"data: [DONE]\n\n"


def _rows(answer: Feedback) -> Iterator[tuple[int, dict[int, float]]]:
    """Yield each token with the log-probs of the likeliest ones, and its own."""
    rows = zip(answer.answer.tolist(), answer.top_ids.tolist(), answer.top_logps.tolist(), strict=True)
    for token, ids, logps in rows:
        likely = dict(zip(ids, logps, strict=True))
        yield token, {token: likely.get(token, 0.0), **likely}


def _logprobs(token: int, row: dict[int, float], offset: int) -> dict[str, Any]:
    return {
        "text_offset": [offset],
        "token_logprobs": [row[token]],
        "tokens": [_name(token)],
        "top_logprobs": [{_name(i): logp for i, logp in row.items()}],
    }


def _chat_logprobs(token: int, row: dict[int, float], text: str) -> dict[str, Any]:
    likely = [{"token": _name(i), "logprob": p, "bytes": list(_name(i).encode())} for i, p in row.items()]
    own = {"token": _name(token), "logprob": row[token], "bytes": list(text.encode())}
    return {"content": [{**own, "top_logprobs": likely}]}


def _values(answer: Feedback) -> dict[str, Any]:
    """Return what a sidecar takes out of an answer."""
    rows = list(_rows(answer))
    return {
        "prompt_token_ids": answer.tokens[: answer.prompt_length].tolist(),
        "token_ids": [token for token, _ in rows],
        "logprobs": {"top_logprobs": [{_name(i): logp for i, logp in row.items()} for _, row in rows]},
    }


def _name(token: int) -> str:
    return f"token_id:{token}"


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _print(figures: dict[str, Any], args: EngineTrafficArguments):
    print(
        f"{figures['requests']} answers, {figures['tokens']} tokens after {figures['prompt_tokens']} of prompts, {args.top_log_probs} log-probs, {figures['threads']} threads\n"
    )
    all_tokens = args.engines * args.tokens_per_second

    def line(what: str, size: float | None, times: str):
        gbit = "" if size is None else f"{all_tokens * size * 8e-9:.1f}"
        print(f"{what:<26}  {'' if size is None else f'{size:.0f}':>5}  {times:<34}  {gbit}")

    print(
        f"{'a token':<26}  bytes  {'µs':<34}  Gbit/s of {args.engines} engines at {args.tokens_per_second:g} tokens a second"
    )
    for path, row in figures["streams"].items():
        line(
            f"from the engine, {'chats' if path == CHAT else 'completions'}",
            row["bytes_a_token"],
            f"{row['cut_us_a_token']:.1f} to cut",
        )
    line("made feedback", None, f"{figures['feedback_us_a_token']:.1f}")
    row = figures["learner"]
    line(
        "to the learner",
        row["bytes_a_token"],
        f"{row['write_us_a_token']:.1f} to pack, {row['read_us_a_token']:.1f} to unpack",
    )


if __name__ == "__main__":
    sys.exit(main())
