"""`Costs` holds the times of a draft step and of a verification, measured while serving or fixed by the config. Acceptance does not enter here.

Symbols: c is the time of a draft step and v(n) the time of verifying n tokens, both in one-token target steps. A round's first draft forward is no such step: it reads
all verified text that the draft has not read yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_TIMES_KEPT = 32
# A length counts as measured from this many rounds on: one slow round is then not the median.
_ROUNDS_NEEDED = 3
# Up to so many unread tokens a forward takes as long as with one, and beyond them longer with each.
_NEAR = 8
# How much longer, as a share of a step, as long as that was not measured.
_FAR_SLOPE = 0.02


class Costs:
    """Estimates c and v(n) as medians over the last 32 rounds of each length.

    Args:
        draft_cost (`float`, *optional*), verify_cost (`float`): fixed c and v(n) = 1 + verify_cost·(n-1); measured if `None`.
    """

    def __init__(self, draft_cost: float | None = None, verify_cost: float = 0.0):
        self._fixed, self._slope = draft_cost, verify_cost
        self._steps: deque[float] = deque(maxlen=_TIMES_KEPT)  # seconds of a draft step
        # Seconds of a round's first forward, of few unread tokens.
        self._reads: deque[float] = deque(maxlen=_TIMES_KEPT)
        self._far: deque[tuple[int, float]] = deque(maxlen=_TIMES_KEPT)  # unread tokens and seconds of one of many
        self._verify: dict[int, deque[float]] = {}  # tokens verified -> seconds

    @property
    def are_fixed(self) -> bool:
        return self._fixed is not None

    @property
    def step_seconds(self) -> float | None:
        """Returns the seconds of a one-token target step, `None` until it was measured."""
        return self._seconds(1)

    @property
    def c(self) -> float | None:
        """Returns the time of a draft step in one-token target steps; `None` until both were measured."""
        if self._fixed is not None:
            return self._fixed
        one, times = self._seconds(1), self._steps or self._reads
        return median(times) / one if times and one else None

    @property
    def is_sure_of_draft(self) -> bool:
        """Tells whether a draft's forwards were timed often enough: the first ones of a process are slow."""
        return self.are_fixed or (self.c is not None and len(self._reads) >= _ROUNDS_NEEDED)

    def read(self, unread: int) -> float:
        """Estimates the time of a round's first draft forward, which reads so many tokens, in one-token target steps."""
        c = self.c or 0.0
        if self.are_fixed or not (one := self._seconds(1)):
            return c
        near = median(self._reads) / one if self._reads else c
        if unread <= _NEAR:
            return near
        slopes = [(seconds / one - near) / n for n, seconds in self._far]
        return near + unread * (max(median(slopes), 0.0) if slopes else _FAR_SLOPE * near)

    def drafting(self, steps: int, unread: int = 1) -> float:
        """Estimates the time of a round's draft forwards, the first of which reads `unread` tokens, in one-token target steps; 0 if there are none."""
        return self.read(unread) + (steps - 1) * (self.c or 0.0) if steps else 0.0

    @property
    def longest_measured(self) -> int:
        """Returns the largest number of tokens whose verification was measured; 0 if none was."""
        return max((n for n in self._verify if self._seconds(n) is not None), default=0)

    def v(self, n: int) -> float:
        """Estimates v(n), see `v_upto`."""
        return self.v_upto(n)[n - 1]

    def v_upto(self, longest: int) -> list[float]:
        """Estimates v(1)..v(longest): the measurements, corrected so as never to fall with n, and straight lines between and beyond them; 1 if
        fewer than two lengths were measured."""
        if self._fixed is not None:
            return [1 + self._slope * (n - 1) for n in range(1, longest + 1)]
        one = self._seconds(1)
        known = sorted((n, seconds / one) for n in self._verify if one and (seconds := self._seconds(n)) is not None)
        if len(known) < 2:
            return [1.0] * longest
        lengths = [n for n, _ in known]
        heights = _never_falling([height for _, height in known], [len(self._verify[n]) for n in lengths])
        values, i = [], 0
        for n in range(1, longest + 1):
            while i < len(lengths) - 2 and lengths[i + 1] < n:
                i += 1
            slope = (heights[i + 1] - heights[i]) / (lengths[i + 1] - lengths[i])
            values.append(max(heights[i] + slope * (n - lengths[i]), 1.0))
        return values

    def observe_draft(self, steps: int, seconds: float, unread: int = 1, read_seconds: float | None = None):
        """Records a round's draft forwards.

        Args:
            steps: how many they were.
            seconds: the time of all of them.
            unread: tokens that the first of them read.
            read_seconds: the time of the first; `None` where it was not measured apart, for nobody waited for the device.
        """
        if read_seconds is None:
            if unread <= _NEAR:
                self._steps.append(seconds / steps)
                self._reads.append(seconds / steps)
            return
        if unread <= _NEAR:
            self._reads.append(read_seconds)
        else:
            self._far.append((unread, read_seconds))
        if steps > 1:
            self._steps.append((seconds - read_seconds) / (steps - 1))

    def observe_target(self, n: int, seconds: float):
        """Records a verification of n tokens."""
        self._verify.setdefault(n, deque(maxlen=_TIMES_KEPT)).append(seconds)

    def _seconds(self, n: int) -> float | None:
        seconds = self._verify.get(n)
        return median(seconds) if seconds and len(seconds) >= _ROUNDS_NEEDED else None


def _never_falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Finds the sequence nearest to `values` (weighted least squares) that never falls: isotonic regression by pooling neighbours. By noise a longer
    block may be measured as faster than a shorter one, and a policy would then fit its lengths to the noise."""
    pools: list[list[float]] = []  # mean, weight, count
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, total, count = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * total) / (before[1] + total)
            before[1] += total
            before[2] += count
    return [mean for mean, _, count in pools for _ in range(count)]
