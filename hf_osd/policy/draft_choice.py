"""`DraftChoice` decides which of two drafts serves a call: the one that learns, or a static one beside it (as in ATLAS). Measured seconds decide, for they hold all in which two drafts
differ: acceptance, the cost of a step, and the lengths that each is asked for."""

from __future__ import annotations

import threading

from hf_osd.system.forks import released

STATIC, LEARNING = "static", "learning"
# Calls that each draft serves before rates are believed; the first of them is not counted, for it warms up.
_FIRST = 3
# A draft's tokens and seconds are sums that lose this share with each of its calls: about the last 20 count.
_DECAY = 0.95
# The slower draft is tried again after so many calls, as long as its trials have cost no more than this share of all time.
_EVERY, _SHARE = 8, 0.01


class DraftChoice:
    """Keeps the rates of two drafts, in new tokens a second of their calls, prompts included. Thread-safe."""

    def __init__(self):
        self._tokens, self._seconds = dict.fromkeys((STATIC, LEARNING), 0.0), dict.fromkeys((STATIC, LEARNING), 0.0)
        self._opened, self._ended = dict.fromkeys((STATIC, LEARNING), 0), dict.fromkeys((STATIC, LEARNING), 0)
        self._since = 0  # calls since the slower draft was tried
        self._lost = self._time = 0.0  # seconds that trials cost, and of all calls
        self._lock = released(threading.Lock())

    @property
    def calls(self) -> dict[str, int]:
        """Counts the calls that each draft was chosen for."""
        return dict(self._opened)

    def rate(self, name: str) -> float | None:
        """Returns a draft's tokens a second; `None` until they are known."""
        seconds = self._seconds[name]
        return self._tokens[name] / seconds if seconds else None

    def choose(self) -> str:
        """Chooses the draft of the next call."""
        with self._lock:
            name = self._choose()
            self._opened[name] += 1
            return name

    def _choose(self) -> str:
        least = min((STATIC, LEARNING), key=self._opened.get)
        if self._opened[least] < _FIRST:
            return least
        rates = {name: self.rate(name) for name in (STATIC, LEARNING)}
        if None in rates.values():  # no call of one has ended yet
            return STATIC
        faster = max(rates, key=rates.get)
        self._since += 1
        if self._since >= _EVERY and self._lost <= _SHARE * self._time:
            self._since = 0
            return LEARNING if faster == STATIC else STATIC
        return faster

    def observe(self, name: str, tokens: int, seconds: float):
        """Records a call of a draft that has ended: its new tokens, and its seconds."""
        with self._lock:
            self._ended[name] += 1
            if not tokens or seconds <= 0 or self._ended[name] == 1:
                return
            other = self.rate(LEARNING if name == STATIC else STATIC)
            self._time += seconds
            if other and other > tokens / seconds:
                self._lost += seconds - tokens / other if other > (self.rate(name) or 0.0) else 0.0
            self._tokens[name] = _DECAY * self._tokens[name] + tokens
            self._seconds[name] = _DECAY * self._seconds[name] + seconds

    def report(self) -> str:
        """Describes in a sentence which draft serves how many calls, and how fast."""
        parts = [
            f"the {name} draft has served {self._opened[name]} calls"
            + ("" if (rate := self.rate(name)) is None else f", {rate:.1f} tokens a second of late")
            for name in (STATIC, LEARNING)
        ]
        return f"Of two drafts, {parts[0]}; {parts[1]}. The faster one serves, the other is tried now and then."
