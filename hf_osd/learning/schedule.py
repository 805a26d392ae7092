"""`Schedule`: decides when to learn, and how much fits the time. It knows requests by their lengths, and no models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from hf_osd.config import OnlineConfig
from hf_osd.feedback.feedback import Feedback

# After n updates in a row that failed learning rests for 2ⁿ of their turns, at most for this many.
_LONGEST_REST = 64
# How many times longer it takes to learn a token than to judge it, until that is measured: a forward, and a backward of twice that.
_LEARN_OVER_JUDGE = 3.0
# The weight of the newest measurement in the average speed.
_WEIGHT = 0.3
# Tokens that may be learnt while the speed is not known; and tokens that are judged, or tried a rate on, though there is no time.
_TRIAL, _ENOUGH = 4096, 512
# The machine is too slow for the draft where less than this share of the new tokens could be learnt once.
_LEAST = 1 / 16


def backoff(failures: int) -> int:
    """Return how many turns to wait after so many failures in a row: 2ⁿ, at most 64."""
    return min(2**failures, _LONGEST_REST)


class Schedule:
    """Decides when an update is due, and, where learning holds up serving, how many tokens it may pass over.

    Args:
        config (`OnlineConfig`): gives the size of updates, and their share of the time.
        bounded (`bool`): keep updates to `learning_budget` of the time that calls and updates take together; else whoever runs them sees to that.

    Attributes:
        served (`float`, *optional*): seconds that calls took.
        spent (`float`), longest (`float`): seconds that updates took, in all and at most.
        seconds (`float`, *optional*): to learn one token.
        misses (`int`): failed updates in a row.
        is_bounded (`bool`): a call waits for the update that runs, and has not asked for it.
    """

    def __init__(self, config: OnlineConfig, bounded: bool):
        self.config = config
        self._share = config.share_of_time("inline") if bounded else 1.0
        self.misses = 0
        self._rest = 0  # turns without learning
        self.served: float | None = None
        self._calls, self._served_before = 0, 0.0  # how many calls, and their seconds before the last update
        self.spent = self.longest = 0.0
        self._before = 0.0  # seconds that updates took before the first call
        self._since: float | None = None  # when the update that runs began
        self.is_bounded = False
        self.seconds: float | None = None
        self._tokens = self._came = 0  # tokens that were learnt; that came to be learnt

    def due(self, new: Sequence[Feedback], times: int = 1) -> bool:
        """Tell whether enough requests wait, `times` as many as usual."""
        return len(new) >= times * self.config.update_interval

    def note_served(self, seconds: float):
        """Note how long a call took. Updates before the first call, a warm-up, do not count against those after it."""
        if self.served is None:
            self.served, self._before = 0.0, self.spent
        self.served += seconds
        self._calls += 1

    def note_judged(self, requests: Sequence[Feedback], seconds: float):
        """Note how long it took to judge requests: until learning is measured, all that is known of its speed."""
        if self.seconds is None and (tokens := self.tokens(requests)):
            self.seconds = _LEARN_OVER_JUDGE * seconds / tokens

    def note_learned(self, tokens: int, seconds: float, first: bool):
        """Note how long it took to learn tokens; `first` if their speed was a guess until now."""
        if tokens:
            now = seconds / tokens
            known = None if first else self.seconds
            self.seconds = now if known is None else (1 - _WEIGHT) * known + _WEIGHT * now

    def begin(self, bounded: bool):
        """Begin an update; `bounded` if a call waits for it that has not asked for it, so that it has to keep to the time there is."""
        self._since, self.is_bounded = time.perf_counter(), bounded

    def note_update(self, seconds: float):
        """Note how long an update took, with all that it judged."""
        self._since = None
        self._served_before = self.served or 0.0
        self.spent += seconds
        self.longest = max(self.longest, seconds)

    def room(self) -> float:
        """Compute how many tokens may be learnt now, so that two things stay within the share of the time: all learning so far, of all calls; and this update, of
        the calls since the last one, or of those between two updates, whichever are more, up to twice as many as between two (so many pass before the first).
        Infinite where nothing is known of the time, or it is not bounded."""
        if self._share >= 1 or self.served is None or not self.seconds:
            return math.inf
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        spent = self.spent - self._before + running
        earned = self._share / (1 - self._share)
        # One call waits for it, and must not pay for the time that earlier updates have left over.
        between = self.config.update_interval * self.served / self._calls
        most = earned * min(max(between, self.served - self._served_before), 2 * between)
        return max(min(earned * self.served - spent, most - running), 0.0) / self.seconds

    def tokens(self, requests: Sequence[Feedback]) -> int:
        """Count the tokens that a forward reads of requests, an encoder's too."""
        most = self.config.learning_window or math.inf
        sources = sum(len(request.source) for request in requests if request.source is not None)
        return sum(min(len(request.tokens), most) for request in requests) + sources

    def within(self, requests: list[Feedback], times: float = 1.0) -> list[Feedback]:
        """Choose the last requests that can be learnt `times` each in the time there is, and a few where there is none."""
        room, chosen = max(self._room_for_update(), _ENOUGH), 0
        for request in reversed(requests):
            room -= times * self.tokens([request])
            if room < 0 and chosen:
                break
            chosen += 1
        return requests[len(requests) - chosen :]

    def thinned(self, requests: list[Feedback]) -> list[Feedback]:
        """Choose from remembered requests, evenly spaced, as many as two drafts can be scored on in the time there is; at least eight."""
        count, cost = len(requests), 2 / 3 * self.tokens(requests)
        room = max(self._room_for_update(), _ENOUGH)
        if cost <= room:
            return requests
        keep = max(int(count * room / cost), min(count, 8))
        return [requests[i * count // keep] for i in range(keep)]

    def _room_for_update(self) -> float:
        """Compute `room` for the update that runs; bounded also where the speed is not known yet."""
        if not self.is_bounded:
            return math.inf
        unknown = self._share < 1 and self.served is not None and not self.seconds
        return _TRIAL if unknown else self.room()

    def passes(self, most: int, tokens: int, beside: int = 0) -> int:
        """Compute how often so many tokens may be passed over, from once to `most` times, beside others that are learnt once or judged three times."""
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
        """Explain why this machine is too slow to learn the draft; `None` if it is not, or not known."""
        if math.isinf(self.room()) or not self._came or self._tokens >= _LEAST * self._came:
            return None
        return (
            f"learning takes {1e3 * self.seconds:.1f} ms a token here, and {self._share:.0%} of the time was room for {self._tokens} of the {self._came} "
            "tokens that came"
        )

    # After failures.

    def rests(self) -> bool:
        """Tell whether this turn passes without learning, and count it."""
        if not self._rest:
            return False
        self._rest -= 1
        return True

    def failed(self) -> int:
        """An update failed: the turns that learning rests for."""
        self.misses += 1
        self._rest = backoff(self.misses) - 1
        return self._rest

    def succeeded(self):
        """An update did not fail."""
        self.misses = 0
