"""`Gate`: whether what was learnt may serve. It is given scores of drafts on requests that none of them has learnt from, and knows neither models nor clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from hf_osd.distill.ranks import RankGroup
from hf_osd.learning.evidence import Evidence, gathered

# The evidence that a decision takes, as an e-value: it errs at most once in so many, however often it was looked for.
ODDS = 20.0
# What it takes where an error costs little and is mended soon: between two drafts that were both learnt, and to go back to the static one.
BACK = 4.0
# Requests, the last ones, on which the static draft is compared with the accepted one also by themselves: traffic that has changed shows there first.
WINDOW = 16
# By how much a candidate may be worse than the static draft on requests of before; and the step, in requests, in which they are looked at from the oldest on,
# for what traffic has become since cannot pay for what it was.
HARM, PART = 0.05, 8


class Verdict(Enum):
    """What is to become of a candidate."""

    WAIT = "wait"
    ACCEPT = "accept"
    DROP = "drop"


class Gate:
    """Compares three drafts on every request, before it is learnt: the *static* one, as it was before any learning; the *accepted* one, the last that was let
    through; and the *candidate*, what had been learnt when the request came. At first the accepted one is the static one.

    1. The candidate is accepted once the requests since the last one was say, at odds of `ODDS` to 1 against chance, that what had been learnt by then was worse
       by less than the tolerance than the static draft, and at odds of `BACK` to 1 the same of the accepted one; unless the last of them, which judged this very
       candidate, say at odds of `BACK` to 1 that it is worse, or the oldest of the requests of before that it is worse there than the static one by more than
       `HARM`.
    2. It is dropped, with what was learnt since the accepted one, once they say at odds of `ODDS` to 1 that it was worse than that.
    3. The accepted draft serves; but the static one does from when the requests since that was accepted, or the last `WINDOW` ones, say at odds of `BACK` to 1
       that the static one is better, until those since then, or the last of them, say at odds of `ODDS` to 1 that it is not.

    The odds are those of [`hf_osd.learning.evidence.Evidence`]: those of `ODDS` in 1 and 2 stay valid however often one looks, which is at each update, and though what
    has been learnt is another each time, for no request has been learnt by what it judges. The best of several candidates takes so many times the odds.

    Args:
        tolerance (`float`): by how much α may be lower.
        ranks (`RankGroup`, *optional*): with which evidence is summed, each having its own requests; all come to the same decision.
    """

    def __init__(self, tolerance: float, ranks: RankGroup | None = None):
        self.tolerance, self._ranks = tolerance, ranks or RankGroup()
        self.reset()

    def reset(self):
        """Another draft is the static one, and accepted; there is no candidate."""
        self.serves_static = False
        self._since_accepted = Looks()  # at the accepted against the static draft
        self.begin()

    def begin(self, choices: int = 1):
        """Nothing is known of what will be learnt from now on. If a candidate is the best of several on the first requests that it will be judged by, `choices`
        says of how many."""
        self._choices = choices
        self._against_accepted, self._against_static = Looks(), Looks()

    def observe(
        self, static: Sequence[Tensor], accepted: Sequence[Tensor], candidate: Sequence[Tensor] | None
    ) -> Verdict:
        """Scores of the three on new requests, float `(N,)` each, NaN without a target; see [`hf_osd.distill.scoring.score`]. Sets `serves_static`.

        Returns:
            `Verdict`: on the candidate, which the caller then sees through; `WAIT` where there is none.
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
        """The candidate has become the accepted draft. Whether what had been learnt was better than that was, beyond chance."""
        gained = self._against_accepted.total.better() >= ODDS
        requests, evidence = self._against_static.newest()
        self._since_accepted = Looks()
        self._since_accepted.add(requests, evidence)
        self.serves_static = False  # what it took to be accepted says that it is no better
        self.begin()
        return gained

    def may_break(self, static: Sequence[Tensor]) -> bool:
        """Whether the static draft knew so much of requests of before, of which these are its scores, oldest first, that a candidate could have unlearnt it."""
        so_far, most = Evidence(), 0.0
        for i in range(0, len(static), PART):
            part = static[i : i + PART]
            so_far += Evidence.of(part, [torch.where(one.isnan(), one, 0.0) for one in part])
            most = max(most, so_far.mean)
        return self._ranks.any(most > 2 * HARM)

    def breaks(self, static: Sequence[Tensor], candidate: Sequence[Tensor]) -> bool:
        """Whether a candidate has unlearnt what the static draft knew of requests of before, of which these are the scores, oldest first."""
        worst, so_far = 0.0, Evidence()
        for i in range(0, len(static), PART):
            so_far += Evidence.of(candidate[i : i + PART], static[i : i + PART])
            worst = max(worst, so_far.worse(-HARM))
        return self._ranks.any(worst >= BACK * self._ranks.size)

    def state(self) -> dict:
        """What a restart needs, as JSON has it; without the candidate, which is begun anew."""
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
        """Which of the two serves: by all requests since that one does or was accepted, and by the last of them. What was before speaks for neither."""
        looked = (self._since_accepted.total, self._since_accepted.recent())
        if self.serves_static:
            changes = max(one.better(-self.tolerance) for one in looked) >= ODDS
        else:
            changes = max(one.worse() for one in looked) >= BACK
        if changes:
            self.serves_static = not self.serves_static
            self._since_accepted = Looks()


class Looks:
    """Evidence of one pair of drafts, look by look: the `total`, and the last of them."""

    def __init__(self):
        self.total = Evidence()
        self._last: deque[tuple[int, Evidence]] = deque()  # requests and evidence; as many as hold `WINDOW` requests

    def add(self, requests: int, evidence: Evidence):
        self.total += evidence
        self._last.append((requests, evidence))
        while sum(count for count, _ in self._last) - self._last[0][0] >= WINDOW:
            self._last.popleft()

    def newest(self) -> tuple[int, Evidence]:
        """Requests and evidence of the last look; none if there was none."""
        return self._last[-1] if self._last else (0, Evidence())

    def recent(self) -> Evidence:
        """Of the last `WINDOW` requests, in whole looks."""
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
