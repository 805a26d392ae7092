"""Acceptance is estimated here, by decayed counts: by position in a block, by the draft's confidence, and by match length and agreement of the suffix
cache. Time does not enter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

# Factor by which older observations are discounted with each new one: about the last 200 count at a position in a block, and the last 500 in
# all bins together.
_POSITION_DECAY = 0.995
_BIN_DECAY = 0.998
# A position's acceptance is the mean of its observations and, with the weight of so many, the mean over all positions.
_POSITION_PRIOR = 8.0
# A bin's acceptance is the mean of its observations and, with the weight of so many, its prior.
_BIN_PRIOR = 4.0
# Accepted tokens' worth of trust in a draft's confidence, before it has been tested.
_TRUST = 2.0
# Upper edges of the confidence bins.
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
# Upper edges of the bins of matched tokens, and of agreement.
_MATCH = (1, 2, 3, 5, 8, 16)
_AGREEMENT = (0.5, 0.99)


class PositionAcceptance:
    """Estimates a_1..a_size: the probability that the i-th token of a block is accepted, given that all before it were."""

    def __init__(self, size: int):
        self._tested, self._accepted = [0.0] * size, [0.0] * size

    @property
    def seen(self) -> float:
        """Counts the observations, decayed, at all positions."""
        return sum(self._tested)

    def observe(self, position: int, accepted: float):
        """Records expected acceptance, from 0 to 1, at a tested position, counted from 0."""
        for counts in (self._tested, self._accepted):
            counts[position] *= _POSITION_DECAY
        self._tested[position] += 1
        self._accepted[position] += accepted

    def values(self) -> list[float]:
        """Returns all estimates. With few observations they are drawn towards the mean of all positions, and with none at all they are .5."""
        tested, accepted = sum(self._tested), sum(self._accepted)
        mean = (accepted + 0.5) / (tested + 1)
        return [
            (a + _POSITION_PRIOR * mean) / (t + _POSITION_PRIOR)
            for a, t in zip(self._accepted, self._tested, strict=True)
        ]


class BinnedAcceptance:
    """Estimates acceptance by bin.

    Args:
        expected (`Sequence[float]`): the prior acceptance of each bin.
    """

    def __init__(self, expected: Sequence[float]):
        self._expected = list(expected)
        self._tested, self._accepted = [0.0] * len(expected), [0.0] * len(expected)

    @property
    def seen(self) -> float:
        """Counts the observations, decayed, in all bins."""
        return sum(self._tested)

    def observe(self, bin: int, accepted: float):
        for counts in (self._tested, self._accepted):
            counts[:] = [_BIN_DECAY * count for count in counts]
        self._tested[bin] += 1
        self._accepted[bin] += accepted

    def prior(self, bin: int) -> float:
        """Returns the acceptance that is expected of a bin without observations."""
        return self._expected[bin]

    def acceptance(self, bin: int) -> float:
        return (self._accepted[bin] + _BIN_PRIOR * self.prior(bin)) / (self._tested[bin] + _BIN_PRIOR)

    def bins(self) -> list[tuple[float, float]]:
        """Returns for each bin the share of positions that fall into it, and its acceptance. Without observations the shares are equal."""
        total = self.seen + len(self._tested) * _BIN_PRIOR / 4
        return [((t + _BIN_PRIOR / 4) / total, self.acceptance(b)) for b, t in enumerate(self._tested)]


class ConfidenceAcceptance(BinnedAcceptance):
    """Estimates acceptance by the draft's confidence, which is the probability of its likeliest token. That is the prior as well, times what it has come to so far
    if that is less than it promised: a draft whose tokens are never accepted is not believed where it has not been tested."""

    def __init__(self):
        edges = [0.0, *_CONFIDENCE, 1.0]
        super().__init__([(low + high) / 2 for low, high in pairwise(edges)])

    def prior(self, bin: int) -> float:
        promised = sum(t * e for t, e in zip(self._tested, self._expected, strict=True))
        return self._expected[bin] * min((sum(self._accepted) + _TRUST) / (promised + _TRUST), 1.0)

    @staticmethod
    def bin(confidence: float) -> int:
        return bisect_left(_CONFIDENCE, confidence)


class MatchAcceptance(BinnedAcceptance):
    """Estimates acceptance of the suffix cache's tokens by the length of the match and by agreement, the share of occurrences that went on as proposed."""

    def __init__(self):
        agreement, lengths = (0.35, 0.75, 1.0), (1, 2, 3, 4, 6, 11, 24)  # a value inside each bin
        super().__init__([share * m / (m + 1.5) for m in lengths for share in agreement])

    @staticmethod
    def bin(match: int, agreement: float) -> int:
        return bisect_left(_MATCH, match) * (len(_AGREEMENT) + 1) + bisect_left(_AGREEMENT, agreement)

    def along(self, match: int, agreement: Sequence[float]) -> list[float]:
        """Estimates acceptance of each token along a continuation, given that those before it are accepted: they lengthen the match."""
        return [self.acceptance(self.bin(match + i, share)) for i, share in enumerate(agreement)]
