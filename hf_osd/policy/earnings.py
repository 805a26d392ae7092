"""`Earnings` accounts what the draft model's rounds earn beside the rounds that the suffix cache alone would have made, and stops the draft while it loses.

Symbols: E is the number of tokens that a round yields and T its time in one-token target steps; E₀ and T₀ are those of the round that the same assistant
would have made in the same place without its draft model; λ₀ is the token rate that it would have. A round earns (E - E₀)/λ₀ - (T - T₀) steps: the time that
would have been needed for its tokens, less its own. Summed over rounds that is the time saved (renewal-reward, as in `lookahead`).
"""

from __future__ import annotations

# Steps that a draft may lose before it has earned any, and the most of its earnings that it may lose again.
ALLOWANCE = 24.0
MAX_CREDIT = 32.0
# Steps that it may lose at least when other weights serve: what was seen of those before says little about them.
RENEWED = 6.0
# Share of all time that it may lose beyond them: with it, a draft that does not pay is tried again now and then.
SHARE = 0.005
# Most steps that one round may lose of the credit: a machine's stall says nothing about the draft.
_MAX_LOSS = 16.0
# Decay of the sums behind λ₀, per round.
_DECAY = 0.99


class Earnings:
    """Keeps the account of one policy (a conservative bandit, arXiv 1602.04282: never below the baseline by more than a share).

    Attributes:
        credit (`float`): steps that the draft may still lose.
        time, earned (`float`): the time of all rounds, and what the draft earned in them, in steps.
    """

    def __init__(self):
        self.credit = ALLOWANCE
        self.time = self.earned = 0.0
        self._tokens = self._time = 0.0

    def renew(self):
        """Notes that other weights serve, which are tried even if those before had lost their credit."""
        self.credit = max(self.credit, RENEWED)

    @property
    def in_credit(self) -> bool:
        """Is `True` if the draft may be asked."""
        return self.credit > 0

    @property
    def rate(self) -> float:
        """Returns λ₀, the token rate without the draft; at least 1, the rate of plain decoding."""
        return max(self._tokens / self._time, 1.0) if self._time else 1.0

    @property
    def ratio(self) -> float | None:
        """Estimates how many times faster the rounds were with the draft than they would have been with the suffix cache alone; `None` before the first one."""
        return 1 + self.earned / self.time if self.time else None

    def observe(self, tokens: float, time: float, tokens_without: float, time_without: float) -> float:
        """Records one round.

        Args:
            tokens, time: E and T as they were.
            tokens_without, time_without: E₀ and T₀.

        Returns:
            `float`: the steps that the round earned; negative if it lost some.
        """
        self._tokens = _DECAY * self._tokens + tokens_without
        self._time = _DECAY * self._time + time_without
        earned = (tokens - tokens_without) / self.rate - (time - time_without)
        self.time += time
        self.earned += earned
        self.credit = min(self.credit + max(earned, -_MAX_LOSS) + SHARE * time, MAX_CREDIT)
        return earned
