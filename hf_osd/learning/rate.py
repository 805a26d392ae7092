"""`Rate`: the learning rate and the passes over new requests, found on the draft at hand and adapted since. Pure arithmetic; the trials are
[`hf_osd.learning.rate_search.RateSearch`]'s."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_osd.learning.evidence import BLOCK

# Rates that are tried on the first requests of a draft that learns all its weights, and of one that learns in an adapter; and passes over them, fewer for an
# adapter: a draft that is too large to learn whole takes long for each.
WEIGHTS, ADAPTER = (1e-3, 2e-4, 4e-5), (4e-4, 1e-4, 2.5e-5)
PASSES, ADAPTER_PASSES = (1, 3, 7), (3,)
# A draft with less in common with the target than this has more to gain by a fast rate than to lose.
_COLD = 0.5
# The few requests of a trial are overfitted at any rate that is worth trying. A rate spoils such a draft if it leaves it less than this share of its overlap.
_SPOILT = 0.75
# Factors on the rate after a candidate was dropped, and after one was better; and the lowest rate, as a share of the fastest.
_LOWER, _HIGHER, _LEAST = 0.5, 1.25, 1e-3
# The rate comes back to this share, at most, of one at which a candidate was dropped.
_BELOW = 0.8


@dataclass(frozen=True)
class Trial:
    """A `rate` and a number of `passes` that were tried on the first requests, and the overlap that resulted on the next: Σ min(p, q) at each position, `(N,)`."""

    rate: float
    passes: int
    shared: Tensor

    def __str__(self) -> str:
        return f"{self.rate:.0e} and {self.passes} pass{'es' if self.passes > 1 else ''}: {_mean(self.shared):.3f}"


class Rate:
    """Gives the rate of the next update.

    Args:
        value (`float` or `"auto"`): a number is obeyed; `"auto"` is to be found.
        adapter (`bool`): the draft learns in an adapter.

    Attributes:
        ladder (`tuple[float, ...]`), tried_passes (`tuple[int, ...]`): rates to try, from the fastest on, each with these numbers of passes.
        value (`float`): the rate of the next update.
        passes (`int`, *optional*): over new requests in it, replay included, where that was found too.
        found (`bool`): the rate is known.
        reason (`str`): explains the rate, to be read.
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
        """Tell whether this is the best trial so far. Trials must come from the fastest rate on, with few passes before many.

        Of trials that chance does not tell apart the one with the most passes is best: later updates make them over more requests than these few. So is, for a
        draft that has less than half in common with the target, the fastest rate that does not spoil it, and for another the slowest, at which it has least to lose.

        Args:
            trial (`Trial`): the next one.
            static (`Tensor`): the overlap of the draft that all trials began from, `(N,)`.
        """
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
        """Tell whether slower rates need not be tried: the fastest has not spoilt a draft that has little in common with the target."""
        return self._best is not None and _mean(static) < _COLD and not self._has_spoilt(static)

    def _has_spoilt(self, static: Tensor) -> bool:
        """Tell whether the best trial so far has left the draft too little of its overlap, beyond chance."""
        loss = _mean(static) - _mean(self._best.shared)
        return loss > max((1 - _SPOILT) * _mean(static), _chance(self._best.shared, static))

    def to_try(self, static: Tensor) -> int:
        """Estimate how many rates there will be to try on a draft with this overlap."""
        return 1 if _mean(static) < _COLD else len(self.ladder)

    def settle(self, trials: int, static: Tensor, most: int | None = None):
        """Choose the rate and the passes of the best of so many trials, each of up to `most` passes, as many as there was time for.

        Later updates may make the largest number of passes if the best trial made `most`, or if the draft has little in common with the target: passes over the
        few requests of a trial overfit, where those of an update go over all that the buffer has.
        """
        best, self._best = self._best, None
        self.value, self.passes, self.found = best.rate, best.passes, True
        if _mean(static) < _COLD or (most is not None and self.passes >= most):
            self.passes = max(self.tried_passes)
        self.reason = f"the best of {trials} tried on the first requests, by what the next share with the target: {best}, from {_mean(static):.3f}"

    def lower(self):
        """Slow down after a candidate was dropped: for all that is known it learnt too fast."""
        if self.is_auto:
            dropped = self.value
            self._most = dropped * _BELOW
            self.value = max(dropped * _LOWER, self.ladder[0] * _LEAST)
            self.reason = f"lowered, for what was learnt at {dropped:.1e} was worse"

    def higher(self):
        """Speed up after a candidate was accepted that is better beyond chance; with more passes too, where few did best over the first requests."""
        if self.passes is not None:
            self.passes = min(2 * self.passes, max(PASSES))
        if self.is_auto and self.value < self._most:
            self.value = min(self.value * _HIGHER, self._most)
            self.reason = "raised, for what was learnt was better"

    def state(self) -> dict:
        """Collect what a restart needs, as JSON has it."""
        return {name: getattr(self, name) for name in ("value", "passes", "found", "reason", "_most")}

    def load_state(self, values: dict):
        """Go on from `state()`; a rate that was given is obeyed all the same."""
        if self.is_auto:
            vars(self).update(values)


def _chance(one: Tensor, other: Tensor) -> float:
    """Estimate the standard error of the difference of two means, `(N,)` each and paired, by blocks of positions."""
    return float(sum(block.sum() ** 2 for block in (one - other).split(BLOCK))) ** 0.5 / len(one)


def _mean(shared: Tensor) -> float:
    return float(shared.double().mean()) if len(shared) else 0.0
