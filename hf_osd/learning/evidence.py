"""`Evidence`: shows on requests which of two drafts is better, paired position by position, however often one looks. Pure arithmetic.

Positions are taken in *blocks*, runs of 16 of one request: whether two drafts differ at a position depends on the positions around it, and much less on
those a block away. Where two drafts are alike, which of them is better in a block is a toss of a coin, whatever came before: the differences are
symmetric about 0. For such differences d and any λ, exp(λ·Σd - λ²·Σd²/2) is a supermartingale that starts at 1 (de la Peña 1999), and so is its mean over
λ > 0 that are normally distributed (Robbins 1970). By Ville's inequality it is ever above 1/ε with a probability of at most ε: an e-process, which may be
looked at after each request and stopped at any time. It assumes nothing of the spread of the differences, and gains from a small one. About another point than
0, such as a tolerance, symmetry is an assumption: where one draft has nothing but losses in long runs, `better(-tolerance)` errs more often (simulated in
tests/learning/test_evidence.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

# Positions of a request that count as one draw.
BLOCK = 16
# Standard deviations s of λ, over which the evidence is the mean: for two drafts that hardly differ, for such as learning makes, and for a cold one and a good one.
_SCALES = (0.05, 0.2, 0.8)
# Added to the squares, as if so many tokens had been lost before: losses that are rare and in runs, with no gains beside them, are not symmetric about a
# tolerance, and would go unseen for a while.
_SKEW = 9.0
# The logarithm of evidence is at most so much, or it would not be finite.
_MOST = 600.0


@dataclass(frozen=True)
class Evidence:
    """Holds sums over blocks of `n` positions in which the first draft has `d` more right than the second: all that a decision needs. Evidence adds up.

    Args:
        positions (`float`): Σn.
        difference (`float`): Σd, expected accepted tokens.
        squares (`float`), mixed (`float`), sizes (`float`): Σd², Σd·n, Σn².
    """

    positions: float = 0.0
    difference: float = 0.0
    squares: float = 0.0
    mixed: float = 0.0
    sizes: float = 0.0

    @classmethod
    def of(cls, first: Sequence[Tensor], second: Sequence[Tensor]) -> Evidence:
        """Compare two drafts' scores on the same requests, float `(N,)` each, NaN where a position has no target.

        A NaN of one draft alone, which has diverged, counts as a token that is not accepted.
        """
        total = cls()
        for a, b in zip(first, second, strict=True):
            known = ~(a.isnan() & b.isnan())
            gain = (a.nan_to_num(0.0) - b.nan_to_num(0.0))[known].double()
            for block in gain.split(BLOCK):
                n, d = len(block), float(block.sum())
                total += cls(n, d, d * d, d * n, n * n)
        return total

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    @property
    def mean(self) -> float:
        """The difference of α, the first draft's less the second's; 0 without any position."""
        return self.difference / self.positions if self.positions else 0.0

    def better(self, than: float = 0.0) -> float:
        """Compute the evidence, as an e-value, against α of the first draft being at most `than` above the second's: 20 errs once in twenty. It is as large as can be
        where `than` is -1 or less, which α cannot differ by."""
        if than <= -1.0 and self.positions:
            return math.exp(_MOST)
        return _e_value(self.difference - than * self.positions, self._squares_about(than))

    def worse(self, than: float = 0.0) -> float:
        """Compute the evidence, as an e-value, against α of the first draft being at least `than` above the second's."""
        return _e_value(than * self.positions - self.difference, self._squares_about(than))

    def _squares_about(self, offset: float) -> float:
        """Compute Σ(d - offset·n)², and add a constant where symmetry is only assumed, about another point than 0."""
        squares = max(self.squares - 2 * offset * self.mixed + offset**2 * self.sizes, 0.0)
        return squares + (_SKEW if offset else 0.0)

    def values(self) -> tuple[float, ...]:
        """The sums, in the order of the fields."""
        return astuple(self)


def _e_value(total: float, squares: float) -> float:
    """Compute the mean of exp(λ·total - λ²·squares/2) over λ = |z|, z ~ N(0, s²), and over the scales s."""
    values = []
    for scale in _SCALES:
        spread = 1 + scale**2 * squares
        at = scale * total / math.sqrt(spread)
        # Far below 0 nothing is left of log Φ.
        tail = math.erfc(-at / math.sqrt(2))  # 2Φ(at)
        values.append(math.log(tail) + at * at / 2 - math.log(spread) / 2 if tail > 0 else -math.inf)
    most = max(values)
    if most == -math.inf:
        return 0.0
    return math.exp(min(most, _MOST)) * sum(math.exp(value - most) for value in values) / len(_SCALES)


def gathered(evidence: Sequence[Evidence], sums: Sequence[float]) -> list[Evidence]:
    """Make as many as `evidence` from the sums over all ranks of its values, one after the other."""
    width = len(Evidence().values())
    return [Evidence(*sums[i * width : (i + 1) * width]) for i in range(len(evidence))]
