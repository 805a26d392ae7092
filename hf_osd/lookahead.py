"""How many tokens to draft next, or none: pure functions of what was observed, and `Lookahead`, which does the observing.

Symbols (as everywhere): γ tokens drafted; a_i the probability that the i-th is accepted, all before it having been; c the time of a
draft step and v(n) that of verifying n tokens, both over the time of a one-token target step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

# Rounds after which a policy that drafts nothing drafts one token anyway, so that costs stay measured. Seldom, for the draft must
# then catch up on the whole request; what reopens drafting is acceptance, which learning estimates in shadow.
PROBE_EVERY = 1024
# A position's acceptance is the mean of what was seen there and, with this many observations' weight, of all positions.
_PRIOR_WEIGHT = 8.0
# Weight that an observation keeps when the next one arrives: about the last 200 positions count.
_DECAY = 0.995
_TIMES_KEPT = 32


def expected_tokens(acceptance: Sequence[float], gamma: int) -> float:
    """1 + Σ_{j≤γ} Π_{i≤j} a_i: tokens a round yields, bonus token included (arXiv 2310.07177, section 3)."""
    total, reach = 1.0, 1.0
    for a in acceptance[:gamma]:
        reach *= a
        total += reach
    return total


def ideal_speedup(acceptance: Sequence[float], gamma: int, c: float, v: Callable[[int], float]) -> float:
    """Expected tokens over expected time of a round, in one-token target steps; plain decoding is 1."""
    return expected_tokens(acceptance, gamma) / (gamma * c + v(gamma + 1))


def best_length(acceptance: Sequence[float], c: float, v: Callable[[int], float]) -> tuple[int, float]:
    """The γ of 0..len(acceptance) with the largest `ideal_speedup`, and that speed-up. γ=0 is plain decoding, 1."""
    best = (0, 1.0)
    for gamma in range(1, len(acceptance) + 1):
        speedup = ideal_speedup(acceptance, gamma, c, v)
        if speedup > best[1]:
            best = (gamma, speedup)
    return best


def heuristic_length(gamma: int, drafted: int, accepted: int, most: int) -> int:
    """transformers' rule (`AssistedCandidateGenerator.update_candidate_strategy`): +2 after a round accepted whole, else -1."""
    if not drafted:
        return gamma
    return min(gamma + 2, most) if accepted == drafted else max(gamma - 1, 1)


class Lookahead:
    """Observes rounds and chooses γ. One instance serves all calls of an assistant; it is thread-safe.

    Args:
        policy (`str`): `"cost"`, `"heuristic"` or `"constant"`, as in [`OnlineConfig`].
        most (`int`): the largest γ.
        draft_cost (`float`, *optional*), verify_cost (`float`): fixed c and v(n) = 1 + verify_cost·(n-1); measured if `None`.
    """

    def __init__(self, policy: str, most: int, draft_cost: float | None = None, verify_cost: float = 0.0):
        self.policy, self.most = policy, most
        self._fixed_cost, self._verify_cost = draft_cost, verify_cost
        self._gamma = most  # state of the heuristic
        self._idle = 0  # rounds since something was drafted
        self._tested, self._accepted = [0.0] * most, [0.0] * most  # decayed counts by position in the block
        self._draft_steps: deque[float] = deque(maxlen=_TIMES_KEPT)  # seconds
        self._verify: dict[int, deque[float]] = {}  # tokens verified -> seconds
        self._lock = threading.Lock()

    @property
    def c(self) -> float | None:
        """Draft step over one-token target step; `None` until both were seen."""
        if self._fixed_cost is not None:
            return self._fixed_cost
        one = self._verify_seconds(1)
        return median(self._draft_steps) / one if self._draft_steps and one else None

    def v(self, n: int) -> float:
        """Time of verifying n tokens over that of one: measured, between and beyond measured n by straight lines, 1 if unknown."""
        if self._fixed_cost is not None:
            return 1 + self._verify_cost * (n - 1)
        one = self._verify_seconds(1)
        known = sorted(m for m, seconds in self._verify.items() if len(seconds) >= 3)
        if one is None or len(known) < 2:
            return 1.0
        below = [m for m in known if m <= n][-2:]
        above = [m for m in known if m > n][:1]
        x0, x1 = (below[-1:] + above) if above else below
        y0, y1 = self._verify_seconds(x0) / one, self._verify_seconds(x1) / one
        return max(y0 + (y1 - y0) * (n - x0) / (x1 - x0), 1.0)

    def acceptance(self) -> list[float]:
        """a_1..a_most as observed, each drawn towards the mean of all where little was seen."""
        tested, accepted = sum(self._tested), sum(self._accepted)
        mean = (accepted + 0.5) / (tested + 1)
        return [
            (a + _PRIOR_WEIGHT * mean) / (t + _PRIOR_WEIGHT) for a, t in zip(self._accepted, self._tested, strict=True)
        ]

    def next_length(self) -> int:
        """γ of the next round."""
        with self._lock:
            if self.policy == "constant":
                return self.most
            if self.policy == "heuristic":
                return self._gamma
            if self._fixed_cost is None:
                if self._verify_seconds(1) is None:
                    return 0  # plain rounds first: every cost is a multiple of theirs
                if not self._draft_steps:
                    return 1
            gamma, _ = best_length(self.acceptance(), self.c, self.v)
            return gamma or int(self._idle >= PROBE_EVERY)

    def observe_round(
        self, drafted: int, tested: int, accepted: int, draft_seconds: float | None, target_seconds: float | None
    ):
        """One round: what was drafted, tested and accepted of it, and its times; `None` where they held a prefill as well, which
        says nothing of c or v."""
        with self._lock:
            self._gamma = heuristic_length(self._gamma, drafted, accepted, self.most)
            self._idle = 0 if drafted else self._idle + 1
            for i in range(min(tested, self.most)):
                self._count(i, float(i < accepted))
            if target_seconds is not None:
                self._verify.setdefault(drafted + 1, deque(maxlen=_TIMES_KEPT)).append(target_seconds)
                if drafted and draft_seconds is not None:
                    self._draft_steps.append(draft_seconds / drafted)

    def observe_shadow(self, overlap: Sequence[float]):
        """Expected acceptance at positions where nothing was drafted, estimated at learning time: as evidence for position 1."""
        with self._lock:
            for value in overlap:
                self._count(0, float(value))

    def _count(self, position: int, accepted: float):
        for counts in (self._tested, self._accepted):
            counts[position] *= _DECAY
        self._tested[position] += 1
        self._accepted[position] += accepted

    def _verify_seconds(self, n: int) -> float | None:
        seconds = self._verify.get(n)
        return median(seconds) if seconds and len(seconds) >= 3 else None
