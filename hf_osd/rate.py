"""`Rate`: the learning rate, found on the draft at hand and followed since. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What is tried on the first requests, largest first, in times of the largest.
LADDER = (1.0, 0.2, 0.04)
# The largest rate tried of drafts that learn all their weights, and of those that learn in an adapter.
WEIGHTS, ADAPTER = 1e-3, 1e-3
# What a candidate that was dropped makes of the rate, what one that was better does, and how far below the largest it may fall.
_LOWER, _HIGHER, _LEAST = 0.5, 1.25, 1e-3
# And what of a rate at which something was dropped is the most to come back to.
_BELOW = 0.8


@dataclass(frozen=True)
class Trial:
    """What was tried on the first requests: a `rate`, and how many `passes` over them; and what came of it on the next: `shared`, the mean over positions of
    Σ min(p, q)."""

    rate: float
    passes: int
    shared: float = 0.0

    def __str__(self) -> str:
        return f"{self.rate:.0e} and {self.passes} pass{'es' if self.passes > 1 else ''}: {self.shared:.3f}"


class Rate:
    """The rate of the next update.

    Args:
        value (`float` or `"auto"`): a number is obeyed; `"auto"` is to be found.
        adapter (`bool`): whether the draft learns in an adapter.

    Attributes:
        value (`float`): of the next update.
        passes (`int`, *optional*): over new requests in it, replay included, where that was found too.
        reason (`str`): where it comes from.
    """

    def __init__(self, value: float | str, adapter: bool):
        self.is_auto = value == "auto"
        self._largest = self._most = self.value = (ADAPTER if adapter else WEIGHTS) if self.is_auto else float(value)
        self.passes: int | None = None
        self.found = not self.is_auto
        self.reason = "as given" if self.found else "to be found on the first requests"

    def trials(self, passes: Sequence[int]) -> list[Trial]:
        """What to try: each rate with each number of passes."""
        return [Trial(self._largest * factor, n) for factor in LADDER for n in passes]

    def choose(self, trials: Sequence[Trial], static: float) -> int:
        """Which of the trials is best, and go on with it; `static` is `shared` of the draft that they began from."""
        best = max(range(len(trials)), key=lambda i: trials[i].shared)
        chosen = trials[best]
        self.value = chosen.rate
        self.passes, self.found = chosen.passes, True
        self.reason = f"the best of {len(trials)} tried on the first requests, on the next: {chosen}, from {static:.3f}"
        return best

    def lower(self):
        """A candidate was dropped: it learnt too fast, as far as anybody knows."""
        if self.is_auto:
            self._most = self.value * _BELOW
            self.value = max(self.value * _LOWER, self._largest * _LEAST)
            self.reason = f"lowered, for what was learnt at {self.value / _LOWER:.1e} was worse"

    def higher(self):
        """A candidate was accepted that is better beyond chance."""
        if self.is_auto and self.value < self._most:
            self.value = min(self.value * _HIGHER, self._most)
            self.reason = "raised, for what was learnt was better"

    def state(self) -> dict:
        """What a restart needs, as JSON has it."""
        return {name: getattr(self, name) for name in ("value", "passes", "found", "reason", "_most")}

    def load_state(self, values: dict):
        """Go on from `state()`; a rate that was given is obeyed, whatever that says."""
        if self.is_auto:
            vars(self).update(values)
