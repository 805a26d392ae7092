"""Computes the accepted length, as a metric for `evaluate`. README.md beside this file is its card."""

from __future__ import annotations

from typing import ClassVar

import datasets
import evaluate
import torch

from hf_osd.metrics.columns import CheckedRows, Layout, length_interval, same_length, whole, wholes
from hf_osd.metrics.stats import CallStats

_DESCRIPTION = """\
How far a round of speculative decoding gets, a round being one forward of the target: `accepted_length`, the drafted tokens that were
accepted, and `tokens_per_round`, all new tokens, the bonus token of the target's own included.
"""

_INPUTS = """
Args, a row a request, by configuration:
    accepted, new_tokens, rounds (int): "default": accepted drafts, new tokens and forwards of the target.
    accepted, new_tokens (list of int): "rounds": the same of each round.
    level (float, optional): of the intervals; None for no interval. Defaults to 0.95.
Returns:
    accepted_length, tokens_per_round: each with the ends of its interval over requests, <name>_low and <name>_high.
Examples:
    >>> import evaluate, hf_osd.metrics
    >>> accepted_length = evaluate.load(hf_osd.metrics.path("accepted_length"))
    >>> accepted_length.compute(accepted=[6, 2], new_tokens=[9, 6], rounds=[3, 5], level=None)
    {'accepted_length': 1.0, 'tokens_per_round': 1.875}
"""


def _read_totals(accepted, new_tokens, rounds) -> tuple[int, int, int]:
    counts = whole("accepted", accepted), whole("new_tokens", new_tokens), whole("rounds", rounds)
    _check(*counts)
    return counts


def _check(accepted: int, new_tokens: int, rounds: int):
    if accepted > new_tokens:
        raise ValueError(
            f"`accepted` is {accepted} and `new_tokens` {new_tokens}; count as accepted only tokens of the answer, and as new all of its tokens."
        )
    if new_tokens > accepted + rounds:
        raise ValueError(
            f"`new_tokens` is {new_tokens}, `accepted` {accepted} and `rounds` {rounds}; a round gives one token beyond those accepted: count "
            "each forward of the target, also the prompt's."
        )


def _compute_totals(accepted: list[int], new_tokens: list[int], rounds: list[int], level: float | None = 0.95) -> dict:
    total = CallStats(accepted=sum(accepted), new_tokens=sum(new_tokens), rounds=sum(rounds))
    length = total.accepted / total.rounds if total.rounds else float("nan")
    figures = {}
    for name, value, counts in (
        ("accepted_length", length, accepted),
        ("tokens_per_round", total.tokens_per_round, new_tokens),
    ):
        # Each round gets its request's mean: requests are resampled whole, so the distribution over rounds does not matter.
        lengths = [
            torch.full((n,), count / max(n, 1), dtype=torch.float64, device="cpu")
            for count, n in zip(counts, rounds, strict=True)
        ]
        figures |= {name: value, **length_interval(name, lengths, level)}
    return figures


def _read_rounds(accepted, new_tokens) -> tuple[list, list]:
    accepted, new_tokens = wholes("accepted", accepted), wholes("new_tokens", new_tokens)
    same_length(accepted=accepted, new_tokens=new_tokens)
    for i, (a, n) in enumerate(zip(accepted, new_tokens, strict=True)):
        try:
            _check(a, n, 1)
        except ValueError as error:
            raise ValueError(f"Round {i}: {error}") from None
    return accepted, new_tokens


def _compute_rounds(accepted: list[list[int]], new_tokens: list[list[int]], level: float | None = 0.95) -> dict:
    return _compute_totals(list(map(sum, accepted)), list(map(sum, new_tokens)), list(map(len, accepted)), level)


_INT, _INTS = datasets.Value("int64"), datasets.Sequence(datasets.Value("int64"))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class AcceptedLength(CheckedRows, evaluate.Metric):
    DESCRIPTION, INPUTS = _DESCRIPTION, _INPUTS
    LAYOUTS: ClassVar[dict[str, Layout]] = {
        "default": Layout({"accepted": _INT, "new_tokens": _INT, "rounds": _INT}, _read_totals, _compute_totals),
        "rounds": Layout({"accepted": _INTS, "new_tokens": _INTS}, _read_rounds, _compute_rounds),
    }
