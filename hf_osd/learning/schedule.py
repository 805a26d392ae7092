"""`Schedule`: when to learn, and how much of it fits the time. It knows requests by their lengths, and neither models nor clocks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from hf_osd.config import OnlineConfig
from hf_osd.feedback.feedback import Feedback

# After n updates in a row that failed learning rests for 2ⁿ of their turns, at most for this many.
_LONGEST_REST = 64
# What learning a token takes, in times of judging it, until that is measured: a forward, and a backward of twice that.
_LEARN_OVER_JUDGE = 3.0
# Of a measured speed, what the next measurement changes.
_WEIGHT = 0.3
# Tokens that may be learnt while their speed is not known; and those that may be judged, or tried a rate on, though there is no time.
_TRIAL, _ENOUGH = 4096, 512
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
        self._calls, self._served_before = 0, 0.0  # how many calls, and their seconds before the last update
        self.spent = self.longest = 0.0  # seconds that updates took, in all and at most
        self._before = 0.0  # of the seconds in all, those before the first call
        self._since: float | None = None  # when the update that runs began
        self.is_bounded = False  # whether a call waits for it that has not asked for it
        self.seconds: float | None = None  # to learn one token
        self._tokens = self._came = 0  # learnt; that have come to be learnt

    def due(self, new: Sequence[Feedback], times: int = 1) -> bool:
        """Whether enough requests wait, `times` as many as usual."""
        return len(new) >= times * self.config.update_interval

    def note_served(self, seconds: float):
        """A call took so long. What was learnt before the first, a warm-up, is not held against those after it."""
        if self.served is None:
            self.served, self._before = 0.0, self.spent
        self.served += seconds
        self._calls += 1

    def note_judged(self, requests: Sequence[Feedback], seconds: float):
        """Note how long it took to judge requests: until learning is measured, all that is known of its speed."""
        if self.seconds is None and (tokens := self.tokens(requests)):
            self.seconds = _LEARN_OVER_JUDGE * seconds / tokens

    def note_learned(self, tokens: int, seconds: float, first: bool):
        """Learning so many tokens took so long; `first` if that was the first time, of which nothing is known but a guess."""
        if tokens:
            now = seconds / tokens
            known = None if first else self.seconds
            self.seconds = now if known is None else (1 - _WEIGHT) * known + _WEIGHT * now

    def begin(self, bounded: bool):
        """An update begins, which keeps to the time there is if it is `bounded`: a call waits for it that has not asked for it."""
        self._since, self.is_bounded = time.perf_counter(), bounded

    def note_update(self, seconds: float):
        """An update, with all that it judged, took so long."""
        self._since = None
        self._served_before = self.served or 0.0
        self.spent += seconds
        self.longest = max(self.longest, seconds)

    def room(self) -> float:
        """Tokens that may be learnt now for all learning so far to stay within its share, and this update within that of the calls between two, or since the last one if these are more, up to twice as
        many, for so many pass before the first; infinite where nothing is known of the time, or it is not bounded."""
        if self._share >= 1 or self.served is None or not self.seconds:
            return math.inf
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        spent = self.spent - self._before + running
        earned = self._share / (1 - self._share)
        # One call waits for it: what earlier updates have left over is not to be spent on one.
        between = self.config.update_interval * self.served / self._calls
        most = earned * min(max(between, self.served - self._served_before), 2 * between)
        return max(min(earned * self.served - spent, most - running), 0.0) / self.seconds

    def tokens(self, requests: Sequence[Feedback]) -> int:
        """Of their texts, which a forward reads; of an encoder's too."""
        most = self.config.learning_window or math.inf
        sources = sum(len(request.source) for request in requests if request.source is not None)
        return sum(min(len(request.tokens), most) for request in requests) + sources

    def within(self, requests: list[Feedback], times: float = 1.0) -> list[Feedback]:
        """The last requests that may be learnt `times` each in the time there is; some at least, that something is known."""
        room, chosen = max(self._room_for_update(), _ENOUGH), 0
        for request in reversed(requests):
            room -= times * self.tokens([request])
            if room < 0 and chosen:
                break
            chosen += 1
        return requests[len(requests) - chosen :]

    def thinned(self, requests: list[Feedback]) -> list[Feedback]:
        """Of requests of before those, evenly, that two drafts can judge in the time there is; eight at least."""
        count, cost = len(requests), 2 / 3 * self.tokens(requests)
        room = max(self._room_for_update(), _ENOUGH)
        if cost <= room:
            return requests
        keep = max(int(count * room / cost), min(count, 8))
        return [requests[i * count // keep] for i in range(keep)]

    def _room_for_update(self) -> float:
        """`room` for the update that runs; with a bound also on what is done for the first time."""
        if not self.is_bounded:
            return math.inf
        unknown = self._share < 1 and self.served is not None and not self.seconds
        return _TRIAL if unknown else self.room()

    def passes(self, most: int, tokens: int, beside: int = 0) -> int:
        """How often so many tokens may be passed over, from once to `most` times, when `beside` others are learnt, or judged three times, once."""
        room = self.room() - beside if self.is_bounded else math.inf
        return max(1, most if room >= most * tokens else int(room // max(tokens, 1)))

    def fitting(self, new: list[Feedback], replayed: list[Feedback]) -> list[Feedback]:
        """Choose as many requests as there is room for: the last new ones first, then replayed ones. All of them if the update is not bounded."""
        room, chosen = self._room_for_update(), []
        for request in [*reversed(new), *replayed]:
            room -= self.tokens([request])
            if room < 0:
                break
            chosen.append(request)
        self._came += self.tokens(new)
        self._tokens += self.tokens(chosen)
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
