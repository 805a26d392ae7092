"""Computes the speed-up, as a metric for `evaluate`. README.md beside this file is its card."""

from __future__ import annotations

import math
import statistics
from itertools import chain
from typing import ClassVar

import datasets
import evaluate

from hf_osd.metrics.columns import CheckedRows, Layout, items, real, same_length, wholes

_DESCRIPTION = """\
How much faster speculative decoding is than plain decoding of the same requests: `speedup_decode`; `speedup_end_to_end`, which has the
time of learning in it; and `ideal_speedup`, what acceptance and the costs of both models would allow.
"""

_INPUTS = """
Args, a row a request, by configuration:
    plain_seconds, decode_seconds (float): "default" and "end_to_end": seconds of plain and of assisted decoding. plain_seconds may be
        None: that request was not decoded plainly, and is no pair.
    learn_seconds (float): "end_to_end": seconds of learning after it, pair or not; every pair bears the mean of all rows.
    new_tokens, drafted, draft_steps (list of int): "rounds": new tokens, drafted tokens and the draft's forwards of each round.
    c (float): "rounds": time of a draft step, in one-token target steps.
    v (list of float): "rounds": v(1), v(2), …: time of verifying so many tokens, in one-token target steps.
Returns:
    speedup_decode, speedup_end_to_end: total seconds over total seconds; and of single pairs <name>_median, <name>_least, <name>_most.
    pairs: rows that were decoded both ways.
    ideal_speedup ("rounds"): new tokens over Σ (draft_steps · c + v(drafted + 1)).
Examples:
    >>> import evaluate, hf_osd.metrics
    >>> speedup = evaluate.load(hf_osd.metrics.path("speedup"))
    >>> figures = speedup.compute(plain_seconds=[2.0, 1.0], decode_seconds=[1.0, 1.0])
    >>> figures["speedup_decode"], figures["speedup_decode_least"], figures["pairs"]
    (1.5, 1.0, 2)
"""


def _read_times(plain_seconds, decode_seconds) -> tuple[float | None, float]:
    wanted = "seconds, more than 0"
    if plain_seconds is not None:
        either = f"{wanted}, or None for a request that was not decoded plainly"
        plain_seconds = real("plain_seconds", plain_seconds, either, lambda x: x > 0)
    return plain_seconds, real("decode_seconds", decode_seconds, wanted, lambda x: x > 0)


def _read_all_times(plain_seconds, decode_seconds, learn_seconds) -> tuple[float | None, float, float]:
    learn_seconds = real(
        "learn_seconds", learn_seconds, "seconds, 0 for a request after which nothing was learnt", lambda x: x >= 0
    )
    return *_read_times(plain_seconds, decode_seconds), learn_seconds


def _compute_times(plain_seconds: list[float | None], decode_seconds: list[float]) -> dict:
    pairs = [(p, d) for p, d in zip(plain_seconds, decode_seconds, strict=True) if p is not None]
    return _ratio("speedup_decode", pairs) | {"pairs": len(pairs)}


def _compute_all_times(
    plain_seconds: list[float | None], decode_seconds: list[float], learn_seconds: list[float]
) -> dict:
    # An update learns from several requests: each pair gets an equal share of all learning, not the update that ran after it.
    share = math.fsum(learn_seconds) / len(learn_seconds) if learn_seconds else 0.0
    pairs = [(p, d + share) for p, d in zip(plain_seconds, decode_seconds, strict=True) if p is not None]
    return _compute_times(plain_seconds, decode_seconds) | _ratio("speedup_end_to_end", pairs)


def _ratio(name: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Divide plain by assisted seconds: of all pairs together, and of single pairs."""
    totals = [math.fsum(seconds) for seconds in zip(*pairs, strict=True)]
    singles = [plain / assisted for plain, assisted in pairs] or [math.nan]
    ends = {"median": statistics.median(singles), "least": min(singles), "most": max(singles)}
    return {name: totals[0] / totals[1] if pairs else math.nan} | {f"{name}_{end}": x for end, x in ends.items()}


def _read_rounds(new_tokens, drafted, draft_steps) -> tuple[list, list, list]:
    given = {"new_tokens": new_tokens, "drafted": drafted, "draft_steps": draft_steps}
    rounds = {name: wholes(name, values) for name, values in given.items()}
    same_length(**rounds)
    for i, (new, n) in enumerate(zip(rounds["new_tokens"], rounds["drafted"], strict=True)):
        if new > n + 1:
            raise ValueError(
                f"Round {i} gave {new} tokens of {n} drafted; it cannot give more than those and one: count a row a round."
            )
    return tuple(rounds.values())


def _compute_rounds(
    new_tokens: list[list[int]],
    drafted: list[list[int]],
    draft_steps: list[list[int]],
    c: float | None = None,
    v: list[float] | None = None,
) -> dict:
    if c is None or v is None:
        raise ValueError(
            "`ideal_speedup` needs `c` and `v`, the costs in one-token target steps; give compute(..., c=0.2, v=[1.0, …])."
        )
    c = real("c", c, "the time of a draft step over that of a one-token target step, such as 0.2", lambda x: x >= 0)
    v = [real(f"v[{i}]", x, "a number over 0, v(1) first", lambda x: x > 0) for i, x in enumerate(items("v", v))]
    verified = [n + 1 for n in chain(*drafted)]
    if max(verified, default=0) > len(v):
        raise ValueError(
            f"`v` ends at v({len(v)}) and a round verified {max(verified)} tokens; give v(1) to v({max(verified)})."
        )
    time = sum(chain(*draft_steps)) * c + math.fsum(v[n - 1] for n in verified)
    return {"ideal_speedup": sum(chain(*new_tokens)) / time if verified else math.nan}


_FLOAT, _INTS = datasets.Value("float64"), datasets.Sequence(datasets.Value("int64"))
_TIMES = {"plain_seconds": _FLOAT, "decode_seconds": _FLOAT}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Speedup(CheckedRows, evaluate.Metric):
    DESCRIPTION, INPUTS = _DESCRIPTION, _INPUTS
    LAYOUTS: ClassVar[dict[str, Layout]] = {
        "default": Layout(_TIMES, _read_times, _compute_times, options=()),
        "end_to_end": Layout({**_TIMES, "learn_seconds": _FLOAT}, _read_all_times, _compute_all_times, options=()),
        "rounds": Layout(
            {"new_tokens": _INTS, "drafted": _INTS, "draft_steps": _INTS},
            _read_rounds,
            _compute_rounds,
            options=("c", "v"),
        ),
    }
