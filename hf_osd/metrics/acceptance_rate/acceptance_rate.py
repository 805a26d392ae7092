"""Computes the acceptance rate, as a metric for `evaluate`. README.md beside this file is its card."""

from __future__ import annotations

from itertools import chain
from typing import ClassVar

import datasets
import evaluate
import torch
from torch import Tensor

from hf_osd.metrics.columns import CheckedRows, Layout, items, real, same_length, share_interval, whole, wholes
from hf_osd.metrics.stats import CallStats

_DESCRIPTION = """\
How often the target of speculative decoding accepts what a draft proposes: `alpha`, at every position of the target's own text, or
`alpha_live`, at the positions that were tested in serving.
"""

_INPUTS = """
Args, a row a request, by configuration:
    predictions, references (list of int): "default": the draft's likeliest token and the target's token at each position.
    overlaps (list of float): "sampled": Σ min(p, q) at each position; None where it is not known.
    accepted, tested (int): "live": tokens in all rounds of the request.
    accepted, tested (list of int): "rounds": tokens in each round.
    outcomes (list of bool): "outcomes": whether the drafted token was accepted at each position; None where none was tested.
    level (float, optional): of the interval; None for no interval. Defaults to 0.95.
Returns:
    alpha ("default", "sampled") or alpha_live (the others), with the ends of its interval over requests, <name>_low and <name>_high.
    acceptance_by_position ("rounds"): alpha_live of the 1st, 2nd, … token of a block.
Examples:
    >>> import evaluate, hf_osd.metrics
    >>> acceptance_rate = evaluate.load(hf_osd.metrics.path("acceptance_rate"))
    >>> acceptance_rate.compute(predictions=[[5, 7, 2], [9]], references=[[5, 7, 3], [9]], level=None)
    {'alpha': 0.75}
"""


def _read_greedy(predictions, references) -> tuple[list, list]:
    predictions, references = wholes("predictions", predictions), wholes("references", references)
    same_length(predictions=predictions, references=references)
    return predictions, references


def _compute_greedy(predictions: list[list[int]], references: list[list[int]], level: float | None = 0.95) -> dict:
    pairs = zip(predictions, references, strict=True)
    hits = [torch.tensor(p, device="cpu") == torch.tensor(r, device="cpu") for p, r in pairs]
    return _alpha([hit.double() for hit in hits], level)


def _read_sampled(overlaps) -> tuple[list]:
    # In low precision a sum of probabilities can be a little above 1.
    wanted = "a number from 0 to 1, or None at a position without a target"
    known = enumerate(items("overlaps", overlaps))
    return ([x if x is None else real(f"overlaps[{i}]", x, wanted, lambda x: 0 <= x <= 1.01) for i, x in known],)


def _compute_sampled(overlaps: list[list[float | None]], level: float | None = 0.95) -> dict:
    known = [[x for x in row if x is not None] for row in overlaps]
    return _alpha([torch.tensor(row, dtype=torch.float64, device="cpu") for row in known], level)


def _alpha(scores: list[Tensor], level: float | None) -> dict:
    """Compute α and its interval from expected acceptance, float64 `(N,)` a request."""
    total = CallStats(overlap_sum=float(sum(s.sum() for s in scores)), overlap_count=sum(map(len, scores)))
    return {"alpha": total.alpha, **share_interval("alpha", scores, level)}


def _read_live(accepted, tested) -> tuple[int, int]:
    accepted, tested = whole("accepted", accepted), whole("tested", tested)
    if accepted > tested:
        raise ValueError(
            f"`accepted` is {accepted} and `tested` {tested}; accepted tokens are tested ones: count it there too."
        )
    return accepted, tested


def _compute_live(accepted: list[int], tested: list[int], level: float | None = 0.95) -> dict:
    total = CallStats(accepted=sum(accepted), tested=sum(tested))
    scores = [(torch.arange(t, device="cpu") < a).double() for a, t in zip(accepted, tested, strict=True)]
    return {"alpha_live": total.alpha_live, **share_interval("alpha_live", scores, level)}


def _read_rounds(accepted, tested) -> tuple[list, list]:
    accepted, tested = wholes("accepted", accepted), wholes("tested", tested)
    same_length(accepted=accepted, tested=tested)
    for i, (a, t) in enumerate(zip(accepted, tested, strict=True)):
        if not a <= t <= a + 1:
            raise ValueError(
                f"Round {i} accepted {a} of {t} tested; the first rejection ends a round, so tested is min(accepted + 1, drafted)."
            )
    return accepted, tested


def _compute_rounds(accepted: list[list[int]], tested: list[list[int]], level: float | None = 0.95) -> dict:
    total = CallStats()
    for a, t in zip(chain(*accepted), chain(*tested), strict=True):
        total.observe_round(drafted=t, tested=t, accepted=a, new_tokens=a + 1)
    figures = _compute_live([sum(row) for row in accepted], [sum(row) for row in tested], level)
    return figures | {"acceptance_by_position": total.to_dict()["acceptance_by_position"]}


def _read_outcomes(outcomes) -> tuple[list]:
    outcomes = items("outcomes", outcomes)
    for i, one in enumerate(outcomes):
        # Numbers are refused: 0 could mean a rejection, or, as in `Feedback.outcome`, a position that was not tested.
        if one is not None and one is not True and one is not False:
            raise ValueError(
                f"`outcomes[{i}]` is {one!r}; give True (accepted), False (rejected) or None (not tested)."
            )
    return (outcomes,)


def _compute_outcomes(outcomes: list[list[bool | None]], level: float | None = 0.95) -> dict:
    accepted, tested = ([sum(one in which for one in row) for row in outcomes] for which in ((True,), (True, False)))
    return _compute_live(accepted, tested, level)


_INT, _INTS = datasets.Value("int64"), datasets.Sequence(datasets.Value("int64"))
_FLOATS, _BOOLS = datasets.Sequence(datasets.Value("float64")), datasets.Sequence(datasets.Value("bool"))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class AcceptanceRate(CheckedRows, evaluate.Metric):
    DESCRIPTION, INPUTS = _DESCRIPTION, _INPUTS
    LAYOUTS: ClassVar[dict[str, Layout]] = {
        "default": Layout({"predictions": _INTS, "references": _INTS}, _read_greedy, _compute_greedy),
        "sampled": Layout({"overlaps": _FLOATS}, _read_sampled, _compute_sampled),
        "live": Layout({"accepted": _INT, "tested": _INT}, _read_live, _compute_live),
        "rounds": Layout({"accepted": _INTS, "tested": _INTS}, _read_rounds, _compute_rounds),
        "outcomes": Layout({"outcomes": _BOOLS}, _read_outcomes, _compute_outcomes),
    }
