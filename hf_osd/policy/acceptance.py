"""How often what a source proposes is accepted: decayed counts by position in a block, by the draft's confidence, and by how sure the suffix
cache is. Knows nothing of time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

# Weight that an observation keeps when the next one arrives: about the last 200 of a position in a block count, and the last 500 of all
# bins together.
_POSITION_DECAY = 0.995
_BIN_DECAY = 0.998
# A position's acceptance is the mean of what was seen there and, with this many observations' weight, of all positions.
_POSITION_PRIOR = 8.0
# A bin's acceptance is what was seen there and, with this many observations' weight, what the bin itself leads to expect.
_BIN_PRIOR = 4.0
# Upper edges of the confidence bins.
_CONFIDENCE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
# Upper edges of the bins of matched tokens, and of shares of agreeing occurrences.
_MATCH = (1, 2, 3, 5, 8, 16)
_SHARE = (0.5, 0.99)


class PositionAcceptance:
    """a_1..a_most: the probability that the i-th token of a block is accepted, all before it having been."""

    def __init__(self, most: int):
        self._tested, self._accepted = [0.0] * most, [0.0] * most

    def observe(self, position: int, accepted: float):
        """Expected acceptance, from 0 to 1, at a tested position, counted from 0."""
        for counts in (self._tested, self._accepted):
            counts[position] *= _POSITION_DECAY
        self._tested[position] += 1
        self._accepted[position] += accepted

    def values(self) -> list[float]:
        """Each drawn towards the mean of all where little was seen; .5 where nothing was."""
        tested, accepted = sum(self._tested), sum(self._accepted)
        mean = (accepted + 0.5) / (tested + 1)
        return [
            (a + _POSITION_PRIOR * mean) / (t + _POSITION_PRIOR)
            for a, t in zip(self._accepted, self._tested, strict=True)
        ]


class BinnedAcceptance:
    """Acceptance by bin.

    Args:
        expected (`Sequence[float]`): of each bin, what to expect before anything was seen there.
    """

    def __init__(self, expected: Sequence[float]):
        self._expected = list(expected)
        self._tested, self._accepted = [0.0] * len(expected), [0.0] * len(expected)

    @property
    def seen(self) -> float:
        """Observations, decayed, in all bins."""
        return sum(self._tested)

    def observe(self, bin: int, accepted: float):
        for counts in (self._tested, self._accepted):
            counts[:] = [_BIN_DECAY * count for count in counts]
        self._tested[bin] += 1
        self._accepted[bin] += accepted

    def acceptance(self, bin: int) -> float:
        prior = _BIN_PRIOR * self._expected[bin]
        return (self._accepted[bin] + prior) / (self._tested[bin] + _BIN_PRIOR)

    def bins(self) -> list[tuple[float, float]]:
        """Of each bin, the share of positions that fall into it, and its acceptance. Shares are even before anything was seen."""
        total = self.seen + len(self._tested) * _BIN_PRIOR / 4
        return [((t + _BIN_PRIOR / 4) / total, self.acceptance(b)) for b, t in enumerate(self._tested)]


class ConfidenceAcceptance(BinnedAcceptance):
    """By the probability of the draft's likeliest token: what it is worth before anything was seen."""

    def __init__(self):
        edges = [0.0, *_CONFIDENCE, 1.0]
        super().__init__([(low + high) / 2 for low, high in pairwise(edges)])

    @staticmethod
    def bin(confidence: float) -> int:
        return bisect_left(_CONFIDENCE, confidence)


class MatchAcceptance(BinnedAcceptance):
    """By how many tokens of the text the suffix cache matched, and the share of occurrences that went on as proposed."""

    def __init__(self):
        shares, lengths = (0.35, 0.75, 1.0), (1, 2, 3, 4, 6, 11, 24)
        super().__init__([share * m / (m + 1.5) for m in lengths for share in shares])

    @staticmethod
    def bin(match: int, share: float) -> int:
        return bisect_left(_MATCH, match) * (len(_SHARE) + 1) + bisect_left(_SHARE, share)

    def of(self, match: int, shares: Sequence[float]) -> list[float]:
        """Acceptance of each token of a continuation: as it is accepted, the match grows by its tokens."""
        return [self.acceptance(self.bin(match + i, share)) for i, share in enumerate(shares)]
