"""`StoppingRule` decides after each draft step whether to draft on. Symbols as in [`hf_osd.policy.lookahead`]."""

from __future__ import annotations

from collections.abc import Sequence

# Intervals of the grid over prefix acceptance, from 0 to 1, on which gains are tabulated.
_GRID = 10


class StoppingRule:
    """Decides when to stop drafting, given the draft's confidence. It is optimal, by dynamic programming over the position in the block and the
    probability that all drafts so far are accepted.

    A draft step costs c whatever its outcome. Once its confidence is known, its token either goes into the block, which makes verification longer, or is
    dropped, which ends the draft.

    Args:
        bins (`Sequence[tuple[float, float]]`): for each confidence bin its frequency and its acceptance.
        c, v, rate: as in [`hf_osd.policy.lookahead.best_gain`].
        max_gamma (`int`): the largest γ.
        tail (`float`): what tokens of the suffix cache after the drafted ones gain on average, if all of these are accepted.
        rollback (`float`): what a block loses that is not accepted as a whole, as in [`hf_osd.policy.lookahead.best_gain`].
    """

    def __init__(
        self,
        bins: Sequence[tuple[float, float]],
        c: float,
        v: Sequence[float],
        rate: float,
        max_gamma: int,
        tail: float = 0.0,
        rollback: float = 0.0,
    ):
        max_gamma = min(max_gamma, len(v) - 1)
        self._bins, self._tail, self._step_cost, self._rollback = bins, tail, rate * c, rollback
        # The cost of token j in the verification.
        self.step_costs = [rate * (v[j + 1] - v[j]) for j in range(max_gamma)]
        # gains[j][r]: gain of drafting from the j-th token on, when all before it are accepted with probability r / _GRID.
        self._gains = [[0.0] * (_GRID + 1) for _ in range(max_gamma + 1)]
        self._tabulate()

    def _tabulate(self):
        """Fill the table of gains. What it calculates is `token_gain` and `end_gain`: a rule is made every few rounds, and calling these would take most
        of the planning's time, as would finding the same places in the grid again for each j."""
        tail, rollback, grid = self._tail, self._rollback, []
        for r in range(_GRID + 1):
            tokens = []  # for each bin: share, prefix acceptance with the token, its place in the grid, and the gain of ending there
            for share, a in self._bins:
                prefix = r / _GRID * a
                low = min(int(prefix * _GRID), _GRID - 1)
                ending = rollback * (prefix - 1) + max(prefix * tail, 0.0)
                tokens.append((share, prefix, low, prefix * _GRID - low, ending))
            grid.append((rollback * (r / _GRID - 1), tokens))
        for j in reversed(range(len(self.step_costs))):
            after, cost = self._gains[j + 1], self.step_costs[j]
            for r, (end, tokens) in enumerate(grid):
                kept, dropped = 0.0, end if j else 0.0
                for share, prefix, low, part, ending in tokens:
                    gain = prefix - cost + max(after[low] + part * (after[low + 1] - after[low]), ending)
                    kept += share * max(gain, dropped)
                self._gains[j][r] = kept - self._step_cost

    def end_gain(self, j: int, prefix_acceptance: float) -> float:
        """Gives the gain of ending the block with j tokens, all accepted with probability `prefix_acceptance`: what is lost where they are not."""
        return self._rollback * (prefix_acceptance - 1) if j else 0.0

    def step_gain(self, j: int, prefix_acceptance: float) -> float:
        """Gives the gain of drafting the j-th token, counted from 0, when all before it are accepted with probability `prefix_acceptance`."""
        gains, at = self._gains[min(j, len(self._gains) - 1)], prefix_acceptance * _GRID
        low = min(int(at), _GRID - 1)
        return gains[low] + (at - low) * (gains[low + 1] - gains[low])

    def token_gain(self, j: int, prefix_acceptance: float) -> float:
        """Gives the gain of putting the j-th token into the block, when it and all before it are accepted with probability `prefix_acceptance`."""
        end = self.end_gain(j + 1, prefix_acceptance)
        rest = max(self.step_gain(j + 1, prefix_acceptance), end + max(prefix_acceptance * self._tail, 0.0))
        return prefix_acceptance - self.step_costs[min(j, len(self.step_costs) - 1)] + rest

    def first_gain(self, cached: float) -> float:
        """Gives the gain of a first draft step before the choice between its token and tokens of the suffix cache in its place, whose gain is `cached`."""
        if len(self._gains) < 2:
            return -self._step_cost
        return sum(share * max(self.token_gain(0, a), cached) for share, a in self._bins) - self._step_cost
