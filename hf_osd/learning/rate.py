"""`Rate`: the learning rate and the passes over what is new, found on the draft at hand and followed since. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_osd.learning.evidence import BLOCK

# What is tried on the first requests of a draft that learns all its weights, and of one that learns in an adapter; and after how many passes over them: of one that is
# too large to learn whole each pass takes long.
WEIGHTS, ADAPTER = (1e-3, 2e-4, 4e-5), (4e-4, 1e-4, 2.5e-5)
PASSES, ADAPTER_PASSES = (1, 3, 7), (3,)
# A draft with less in common with the target than this has more to gain by a fast rate than to lose.
_COLD = 0.5
# The few requests of a trial are overfitted at any rate that is worth its name; one that leaves such a draft less than this share of what it had spoils it.
_SPOILT = 0.75
# What a candidate that was dropped makes of the rate, what one that was better does, and how far below the largest it may fall.
_LOWER, _HIGHER, _LEAST = 0.5, 1.25, 1e-3
# And what of a rate at which something was dropped is the most to come back to.
_BELOW = 0.8


@dataclass(frozen=True)
class Trial:
    """What was tried on the first requests, a `rate` and how many `passes` over them; and what the next ones say of it: Σ min(p, q) at each position, `(N,)`."""

    rate: float
    passes: int
    shared: Tensor

    def __str__(self) -> str:
        return f"{self.rate:.0e} and {self.passes} pass{'es' if self.passes > 1 else ''}: {_mean(self.shared):.3f}"


class Rate:
    """The rate of the next update.

    Args:
        value (`float` or `"auto"`): a number is obeyed; `"auto"` is to be found.
        adapter (`bool`): whether the draft learns in an adapter.

    Attributes:
        ladder (`tuple[float, ...]`), tried_passes (`tuple[int, ...]`): what is to be tried, each rate with each number of passes.
        value (`float`): of the next update.
        passes (`int`, *optional*): over new requests in it, replay included, where that was found too.
        found (`bool`): whether it is known.
        reason (`str`): where it comes from.
    """

    def __init__(self, value: float | str, adapter: bool):
        self.is_auto = value == "auto"
        self.ladder, self.tried_passes = (ADAPTER, ADAPTER_PASSES) if adapter else (WEIGHTS, PASSES)
        self.value = self._most = self.ladder[0] if self.is_auto else float(value)
        self.passes: int | None = None
        self.found = not self.is_auto
        self.reason = "as given" if self.found else "to be found on the first requests"
        self._best: Trial | None = None

    def prefers(self, trial: Trial, static: Tensor) -> bool:
        """Whether this is the best trial so far; `static` is what the draft that they all began from says, `(N,)`. Of those that chance does not tell apart it
        is the one of the most passes, which later updates make over more requests than these few; and for a draft that knows little the fastest that does not
        spoil it, for one that knows much the slowest, at which there is least to lose. Fast ones are to come first, and few passes before many."""
        best = self._best
        if best is not None:
            is_slower_for_a_cold_draft = trial.rate < best.rate and _mean(static) < _COLD
            if is_slower_for_a_cold_draft and not self._has_spoilt(static):
                return False
            chance = _chance(trial.shared, best.shared)
            if _mean(trial.shared) - _mean(best.shared) <= (chance if is_slower_for_a_cold_draft else -chance):
                return False
        self._best = trial
        return True

    def is_enough(self, static: Tensor) -> bool:
        """Whether slower rates need not be tried: the fastest has not spoilt a draft that knows little."""
        return self._best is not None and _mean(static) < _COLD and not self._has_spoilt(static)

    def _has_spoilt(self, static: Tensor) -> bool:
        """Whether the best trial so far has left little of what a draft knew, beyond chance."""
        loss = _mean(static) - _mean(self._best.shared)
        return loss > max((1 - _SPOILT) * _mean(static), _chance(self._best.shared, static))

    def to_try(self, static: Tensor) -> int:
        """How many rates there will be to try, most likely, on a draft that says `static`."""
        return 1 if _mean(static) < _COLD else len(self.ladder)

    def settle(self, trials: int, static: Tensor, most: int | None = None):
        """Go on with the best of so many trials, of up to `most` passes, which was as many as there was time for. If it is one of the most, later updates may
        make as many passes as there are to try; and so they may for a draft that knows little, whatever the trials say: passes over the few requests of a trial
        overfit, where those of an update go over all that the buffer has."""
        best, self._best = self._best, None
        self.value, self.passes, self.found = best.rate, best.passes, True
        if _mean(static) < _COLD or (most is not None and self.passes >= most):
            self.passes = max(self.tried_passes)
        self.reason = f"the best of {trials} tried on the first requests, by what the next share with the target: {best}, from {_mean(static):.3f}"

    def lower(self):
        """A candidate was dropped: it learnt too fast, as far as anybody knows."""
        if self.is_auto:
            dropped = self.value
            self._most = dropped * _BELOW
            self.value = max(dropped * _LOWER, self.ladder[0] * _LEAST)
            self.reason = f"lowered, for what was learnt at {dropped:.1e} was worse"

    def higher(self):
        """A candidate was accepted that is better beyond chance. Where few passes did best over the first requests, more of them may over these and those."""
        if self.passes is not None:
            self.passes = min(2 * self.passes, max(PASSES))
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


def _chance(one: Tensor, other: Tensor) -> float:
    """The standard error of the difference of two means, position by position, `(N,)` each; by blocks of positions."""
    return float(sum(block.sum() ** 2 for block in (one - other).split(BLOCK))) ** 0.5 / len(one)


def _mean(shared: Tensor) -> float:
    return float(shared.double().mean()) if len(shared) else 0.0
