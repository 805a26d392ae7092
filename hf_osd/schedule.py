"""`Schedule`: when to learn, and how much of it fits the time. It knows requests by their lengths, and neither models nor clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from hf_osd.config import OnlineConfig
from hf_osd.feedback import Feedback

# After n updates in a row that failed learning rests for 2ⁿ of their turns, at most for this many.
_LONGEST_REST = 64
# What learning a token takes, in times of judging it, until that is measured: a forward, and a backward of twice that.
_LEARN_OVER_JUDGE = 3.0
# Of a measured speed, what the next measurement changes.
_WEIGHT = 0.3
# Where less than this share of the tokens that come could be learnt once, the machine is too slow for the draft.
_LEAST = 1 / 16


class Schedule:
    """Decides when an update is due, and, where learning holds up serving, how many tokens it may pass over.

    Args:
        config (`OnlineConfig`): with what it says of updates, and of their share of the time.
        bounded (`bool`): whether updates are to be kept to `learning_budget` of the time, that of the calls served and theirs together; else whoever runs
            them sees to that.
    """

    def __init__(self, config: OnlineConfig, bounded: bool):
        self.config = config
        self._share = config.share_of_time("inline") if bounded else 1.0
        self.misses = 0  # failed updates in a row
        self._rest = 0  # turns without learning
        self.served: float | None = None  # seconds that calls took; None where nobody says
        self.spent = self.longest = 0.0  # seconds that updates took, in all and at most
        self._before = 0.0  # of the seconds in all, those before the first call
        self.seconds: float | None = None  # to learn one token
        self._tokens = self._came = 0  # learnt; that have come to be learnt

    def due(self, new: Sequence[Feedback], times: int = 1) -> bool:
        """Whether enough requests or tokens wait, `times` as many as usual, or one has waited long enough."""
        config = self.config
        return bool(new) and (
            len(new) >= times * config.update_interval
            or (config.update_tokens is not None and sum(map(len, new)) >= times * config.update_tokens)
            or (config.update_age is not None and time.monotonic() - new[0].created >= config.update_age)
        )

    def note_served(self, seconds: float):
        """A call took so long. What was learnt before the first, a warm-up, is not held against those after it."""
        if self.served is None:
            self.served, self._before = 0.0, self.spent
        self.served += seconds

    def note_judged(self, tokens: int, seconds: float):
        """Judging so many tokens took so long: until learning is measured, all that is known of its speed."""
        if self.seconds is None and tokens:
            self.seconds = _LEARN_OVER_JUDGE * seconds / tokens

    def note_learned(self, tokens: int, seconds: float, first: bool):
        """Learning so many tokens took so long; `first` if that was the first time, of which nothing is known but a guess."""
        if tokens:
            now = seconds / tokens
            known = None if first else self.seconds
            self.seconds = now if known is None else (1 - _WEIGHT) * known + _WEIGHT * now

    def note_update(self, seconds: float):
        """An update, with all that it judged, took so long."""
        self.spent += seconds
        self.longest = max(self.longest, seconds)

    def room(self) -> float:
        """Tokens that may be learnt now for all learning so far to stay within its share; infinite where nothing is known of the time, or it is not bounded."""
        if self._share >= 1 or self.served is None or not self.seconds:
            return math.inf
        return max(self._share / (1 - self._share) * self.served - (self.spent - self._before), 0.0) / self.seconds

    def passes(self, most: int, tokens: int, bounded: bool) -> int:
        """How often so many tokens may be passed over, from once to `most` times."""
        room = self.room() if bounded else math.inf
        return max(1, most if room >= most * tokens else int(room // max(tokens, 1)))

    def fitting(self, new: list[Feedback], replayed: list[Feedback], bounded: bool) -> list[Feedback]:
        """Of what is new and replayed as much as there is room for: what is new before what is not, and of that the last. All of it if not `bounded`."""
        room, chosen = self.room() if bounded else math.inf, []
        for request in [*reversed(new), *replayed]:
            room -= len(request.tokens)
            if room < 0:
                break
            chosen.append(request)
        self._came += sum(len(request.tokens) for request in new)
        self._tokens += sum(len(request.tokens) for request in chosen)
        return chosen

    @property
    def too_slow(self) -> str | None:
        """Why this machine is too slow to learn the draft, in words; `None` if it is not, or not known."""
        if math.isinf(self.room()) or not self._came or self._tokens >= _LEAST * self._came:
            return None
        return (
            f"learning takes {1e3 * self.seconds:.1f} ms a token here, and {self._share:.0%} of the time was room for {self._tokens} of the {self._came} "
            "tokens that came"
        )

    # After failures.

    def rests(self) -> bool:
        """Whether this turn passes without learning; it is then over."""
        if not self._rest:
            return False
        self._rest -= 1
        return True

    def failed(self) -> int:
        """An update failed: the turns that learning rests for."""
        self.misses += 1
        self._rest = min(2**self.misses, _LONGEST_REST) - 1
        return self._rest

    def succeeded(self):
        """An update did not fail."""
        self.misses = 0
