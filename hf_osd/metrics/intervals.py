"""Computes intervals of α, and of the difference between two drafts' α, over requests. α of a single request has a standard deviation near .17, so drafts are
compared on the same requests, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """Compares two drafts on the same `requests`, counting those with a target distribution: α `before` and `after`, means over all positions; the `difference`
    after - before; and its interval over requests, `low` to `high`, which is infinite with fewer than two requests."""

    requests: int
    before: float
    after: float
    difference: float
    low: float
    high: float


def compare(before: Sequence[Tensor], after: Sequence[Tensor], level: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two drafts by their scores, float `(N,)` a request, NaN at positions without a target distribution (see [`hf_osd.distill.scoring.score`]),
    resampling requests in pairs. NaN in `after` alone means that the draft diverged, and counts as 0. `ValueError` if the scores are of different positions."""
    same = [len(b) for b in before] == [len(a) for a in after]
    if not same or any((b.isnan() & ~a.isnan()).any() for b, a in zip(before, after, strict=True)):
        raise ValueError(f"{len(before)} and {len(after)} scores, not of the same positions; score the same requests.")
    after = [torch.where(b.isnan(), b, a.nan_to_num(0.0)) for b, a in zip(before, after, strict=True)]
    requests, *gain = bootstrap([a - b for b, a in zip(before, after, strict=True)], level, seed)
    was, now = (float(torch.cat(scores).double().nanmean()) if requests else 0.0 for scores in (list(before), after))
    return Comparison(requests, was, now, *gain)


def interval(scores: Sequence[Tensor], level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """Compute α and its interval from one draft's scores: 0 to 1 with fewer than two requests; α is NaN with none."""
    requests, alpha, low, high = bootstrap(scores, level, seed)
    return alpha if requests else math.nan, max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True)
class Estimate:
    """Holds α of the serving draft on the last requests, each scored before it was learnt: `alpha`, with its 95% interval `low` to `high` over `requests`; and
    `gain`, the comparison of the draft before any learning with the serving draft on the same requests."""

    alpha: float
    low: float
    high: float
    requests: int
    gain: Comparison

    def __str__(self) -> str:
        return f"alpha {self.alpha:.3f} ({self.low:.3f} to {self.high:.3f}) on the last {self.requests}; {self.gain.before:.3f} without learning"

    def to_dict(self) -> dict:
        """Return all fields, those of `gain` as a dict inside."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Estimate:
        """Restore what `to_dict` returned."""
        return cls(**{**values, "gain": Comparison(**values["gain"])})

    @classmethod
    def from_scores(cls, static: Sequence[Tensor], served: Sequence[Tensor]) -> Estimate:
        """Estimate from the scores of the draft before any learning and of the serving draft, `(N,)` a request."""
        gain = compare(static, served)
        return cls(*interval(served), gain.requests, gain)


def figures_to_json(figures: dict) -> dict:
    """Convert a learner's `figures()` to JSON values, for another process: `estimate` becomes a dict."""
    estimate = figures["estimate"]
    return figures | {"estimate": None if estimate is None else estimate.to_dict()}


def figures_from_json(figures: dict) -> dict:
    """Restore the figures that were passed to `figures_to_json`."""
    estimate = figures["estimate"]
    return figures | {"estimate": None if estimate is None else Estimate.from_dict(estimate)}


def bootstrap(scores: Sequence[Tensor], level: float, seed: int) -> tuple[int, float, float, float]:
    """Bootstrap the mean of numbers, `(N,)` a request, over requests. Returns how many requests have a number, the mean (0 without any), and the ends of its
    interval at `level`, percentiles of 1000 resamples; infinite with fewer than two requests. `ValueError` unless `level` is between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level!r}; give a number between 0 and 1, such as 0.9.")
    counted = [numbers.double() for one in scores if len(numbers := one[~one.isnan()])]
    if len(counted) < 2:
        return len(counted), float(counted[0].mean()) if counted else 0.0, -math.inf, math.inf
    sums = torch.stack([numbers.sum() for numbers in counted])  # (R,)
    positions = torch.tensor([len(numbers) for numbers in counted], device=sums.device)  # (R,)
    draws = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(len(sums), (1000, len(sums)), generator=draws, device="cpu")
    means = sums[drawn].sum(1) / positions[drawn].sum(1)  # (resamples,)
    low, high = means.quantile(means.new_tensor([0.5 - level / 2, 0.5 + level / 2])).tolist()
    return len(counted), float(sums.sum() / positions.sum()), low, high
