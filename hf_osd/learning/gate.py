"""`Gate`: decides which draft may serve, by scores on requests that none of them has learnt. It knows neither models nor clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from hf_osd.distill.ranks import RankGroup
from hf_osd.learning.evidence import Evidence, gathered

# The evidence that a decision takes, as an e-value: it errs at most once in so many, however often one looks.
ODDS = 20.0
# The evidence where an error costs little and is mended soon: between two drafts that were both learnt, and to go back to the static one.
BACK = 4.0
# The last requests, which are also looked at by themselves: traffic that has changed shows there first.
WINDOW = 16
# How much α a candidate may lose against the static draft on remembered requests.
REGRESSION = 0.05
# Remembered requests are looked at in steps of so many, from the oldest on: gains on new traffic cannot pay for losses on old.
PART = 8


class Verdict(Enum):
    """The decision on a candidate."""

    WAIT = "wait"
    ACCEPT = "accept"
    DROP = "drop"


class Gate:
    """Compares three drafts on every request before it is learnt: *static*, as it was before any learning; *accepted*, the last that was let through, at first
    the static one; and the *candidate*, what had been learnt when the request came.

    1. The candidate is accepted when the requests since the last decision show, at odds of `ODDS` to 1, that it is worse than static by less than `tolerance`,
       and at odds of `BACK` to 1 the same against accepted; unless the newest of them, or the last `WINDOW`, show at odds of `BACK` to 1 that it is worse than
       one of the two, or the remembered requests that it is worse than static by more than `REGRESSION`.
    2. The candidate is dropped, with all that was learnt since accepted, when these requests show at odds of `ODDS` to 1 that it is worse than accepted.
    3. Accepted serves, except from when the requests since it was accepted, or the last `WINDOW`, show at odds of `BACK` to 1 that static is better, until those
       since then, or the last `WINDOW`, show at odds of `ODDS` to 1 that it is not.

    The odds are e-values of [`hf_osd.learning.evidence.Evidence`]. Those of `ODDS` in 1 and 2 stay valid however often one looks, which is at each update, and though
    the candidate is another each time, for no request has been learnt by the draft that it judges. The best of several candidates takes so many times the odds.

    Args:
        tolerance (`float`): how much lower α may be.
        ranks (`RankGroup`, *optional*): sum their evidence, each of its own requests, and come to the same decision.

    Attributes:
        serves_static (`bool`): static serves in place of accepted.
    """

    def __init__(self, tolerance: float, ranks: RankGroup | None = None):
        self.tolerance, self._ranks = tolerance, ranks or RankGroup()
        self.reset()

    def reset(self):
        """Begin with another static draft, which is accepted, and no candidate."""
        self.serves_static = False
        self._since_accepted = Looks()  # at the accepted against the static draft
        self.begin()

    def begin(self, choices: int = 1):
        """Begin with another candidate, of which nothing is known; the best of `choices` on the first requests that it will be judged by."""
        self._choices = choices
        self._against_accepted, self._against_static = Looks(), Looks()

    def observe(
        self, static: Sequence[Tensor], accepted: Sequence[Tensor], candidate: Sequence[Tensor] | None
    ) -> Verdict:
        """Decide by scores of the three on new requests, float `(N,)` each, NaN without a target; see [`hf_osd.distill.scoring.score`]. Sets `serves_static`.

        Returns:
            `Verdict`: on the candidate, for the caller to follow; `WAIT` where there is none.
        """
        own = [Evidence.of(accepted, static)]
        if candidate is not None:
            own += [Evidence.of(candidate, accepted), Evidence.of(candidate, static)]
        requests, *sums = self._ranks.sum(len(static), *(value for one in own for value in one.values()))
        requests, (standing, *found) = int(requests), gathered(own, sums)
        if not standing.positions:
            return Verdict.WAIT
        self._since_accepted.add(requests, standing)
        self._compare_with_static()
        return self._judge(requests, *found) if found else Verdict.WAIT

    def accept(self) -> bool:
        """Make the candidate the accepted draft. `True` if it was better than that one beyond chance."""
        gained = self._against_accepted.total.better() >= ODDS
        requests, evidence = self._against_static.newest()
        self._since_accepted = Looks()
        self._since_accepted.add(requests, evidence)
        self.serves_static = False  # accepted is no worse, or it would not have been
        self.begin()
        return gained

    def can_regress(self, static: Sequence[Tensor]) -> bool:
        """Tell whether a candidate could be much worse than static on remembered requests, by static's scores there, oldest first."""
        so_far, most = Evidence(), 0.0
        for i in range(0, len(static), PART):
            part = static[i : i + PART]
            so_far += Evidence.of(part, [torch.where(one.isnan(), one, 0.0) for one in part])
            most = max(most, so_far.mean)
        return self._ranks.any(most > 2 * REGRESSION)

    def regresses(self, static: Sequence[Tensor], candidate: Sequence[Tensor]) -> bool:
        """Tell whether the candidate is worse than static on remembered requests by more than `REGRESSION`, by scores of both there, oldest first."""
        worst, so_far = 0.0, Evidence()
        for i in range(0, len(static), PART):
            so_far += Evidence.of(candidate[i : i + PART], static[i : i + PART])
            worst = max(worst, so_far.worse(-REGRESSION))
        return self._ranks.any(worst >= BACK * self._ranks.size)

    def state(self) -> dict:
        """Collect what a restart needs, as JSON has it; without the candidate, which is begun anew."""
        return {
            "serves_static": self.serves_static,
            "since_accepted": self._since_accepted.state(),
        }

    def load_state(self, values: dict):
        """Go on from `state()`."""
        self.serves_static = values["serves_static"]
        self._since_accepted = Looks.of_state(values["since_accepted"])
        self.begin()

    def _judge(self, requests: int, against_accepted: Evidence, against_static: Evidence) -> Verdict:
        self._against_accepted.add(requests, against_accepted)
        self._against_static.add(requests, against_static)
        both = (self._against_static, self._against_accepted)
        if self._against_accepted.total.worse() >= ODDS * self._choices:
            return Verdict.DROP
        known = [
            looks.total.better(-self.tolerance) >= odds * self._choices
            for looks, odds in zip(both, (ODDS, BACK), strict=True)
        ]
        if all(known) and max(one.worse() for looks in both for one in (looks.newest()[1], looks.recent())) < BACK:
            return Verdict.ACCEPT
        return Verdict.WAIT

    def _compare_with_static(self):
        """Decide which of static and accepted serves, by all requests since that one does or was accepted, and by the last of them; not by those before."""
        looked = (self._since_accepted.total, self._since_accepted.recent())
        if self.serves_static:
            changes = max(one.better(-self.tolerance) for one in looked) >= ODDS
        else:
            changes = max(one.worse() for one in looked) >= BACK
        if changes:
            self.serves_static = not self.serves_static
            self._since_accepted = Looks()


class Looks:
    """Adds up the evidence on one pair of drafts, look by look, and keeps that of the last looks."""

    def __init__(self):
        self.total = Evidence()
        self._last: deque[tuple[int, Evidence]] = deque()  # requests and evidence; as many as hold `WINDOW` requests

    def add(self, requests: int, evidence: Evidence):
        self.total += evidence
        self._last.append((requests, evidence))
        while sum(count for count, _ in self._last) - self._last[0][0] >= WINDOW:
            self._last.popleft()

    def newest(self) -> tuple[int, Evidence]:
        """Requests and evidence of the last look; 0 and none before the first."""
        return self._last[-1] if self._last else (0, Evidence())

    def recent(self) -> Evidence:
        """Sum up the last `WINDOW` requests, in whole looks."""
        return sum((one for _, one in self._last), Evidence())

    def state(self) -> dict:
        last = [[requests, *one.values()] for requests, one in self._last]
        return {"total": self.total.values(), "last": last}

    @classmethod
    def of_state(cls, values: dict) -> Looks:
        looks = cls()
        looks.total = Evidence(*values["total"])
        looks._last.extend((requests, Evidence(*sums)) for requests, *sums in values["last"])
        return looks
