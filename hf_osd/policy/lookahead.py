"""How many tokens to draft next, from which source, or none: pure functions of what was observed, and `DraftPolicy`, which does the observing.

Symbols (as everywhere): γ tokens drafted; a_i the probability that the i-th is accepted, all before it having been; c the time of a
draft step and v(n) that of verifying n tokens, both over the time of a one-token target step; λ the rate that serving reaches, in tokens a
one-token target step. What costs T and yields E tokens is worth E - λT: a round of the largest worth makes the largest rate
(renewal-reward; with one kind of round only, it is the round of the largest E/T).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_osd.policy.acceptance import ConfidenceAcceptance, MatchAcceptance, PositionAcceptance
from hf_osd.policy.costs import Costs
from hf_osd.system.forks import released

# Rounds after which a policy that drafts nothing drafts one token anyway, so that costs stay measured. Seldom, for the draft must
# then catch up on the whole request; what reopens drafting is acceptance, which learning estimates in shadow.
PROBE_EVERY = 1024
# Rounds with drafts after which one goes without: every cost is a multiple of a plain step's, which drifts as texts grow.
PLAIN_EVERY = 128
# Drafts seen before their confidence is trusted to stop a draft early.
_CONFIDENT_AFTER = 24.0
# Rounds between two computations of what a policy goes by, once it is past its beginnings.
_REFRESH_EVERY = 16
# Points between 0 and 1 at which the worth of a further draft is known.
_REACHES = 10
# Weight that λ's counts keep a round.
_RATE_DECAY = 0.99


def expected_tokens(acceptance: Sequence[float], gamma: int) -> float:
    """1 + Σ_{j≤γ} Π_{i≤j} a_i: tokens a round yields, bonus token included (arXiv 2310.07177, section 3)."""
    total, reach = 1.0, 1.0
    for a in acceptance[:gamma]:
        reach *= a
        total += reach
    return total


def ideal_speedup(acceptance: Sequence[float], gamma: int, c: float, v: Callable[[int], float]) -> float:
    """Expected tokens over expected time of a round, in one-token target steps; plain decoding is 1."""
    return expected_tokens(acceptance, gamma) / (gamma * c + v(gamma + 1))


def best_length(acceptance: Sequence[float], c: float, v: Callable[[int], float]) -> tuple[int, float]:
    """The γ of 0..len(acceptance) with the largest `ideal_speedup`, and that speed-up. γ=0 is plain decoding, 1."""
    best = (0, 1.0)
    for gamma in range(1, len(acceptance) + 1):
        speedup = ideal_speedup(acceptance, gamma, c, v)
        if speedup > best[1]:
            best = (gamma, speedup)
    return best


def break_even(c: float, v: Callable[[int], float], most: int) -> float | None:
    """The least acceptance, the same at all positions, from which drafting pays; `None` if even 1 does not."""
    if best_length([1.0] * most, c, v)[0] == 0:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if best_length([middle] * most, c, v)[0] else (middle, high)
    return high


def heuristic_length(gamma: int, drafted: int, accepted: int, most: int) -> int:
    """transformers' rule (`AssistedCandidateGenerator.update_candidate_strategy`): +2 after a round accepted whole, else -1."""
    if not drafted:
        return gamma
    return min(gamma + 2, most) if accepted == drafted else max(gamma - 1, 1)


def best_gain(
    acceptance: Sequence[float], c: float, v: Sequence[float], rate: float, after: int = 0
) -> tuple[int, float]:
    """How many of the proposed tokens to draft, and what they are worth beyond the round without them.

    Args:
        acceptance: a_i of each proposed token.
        c: of drafting one.
        v: v(1), v(2), …; a proposal that it does not reach is cut.
        rate: λ.
        after: tokens drafted in the round before them, all of them accepted.
    """
    best, tokens, reach = (0, 0.0), 0.0, 1.0
    for m, a in enumerate(acceptance[: max(len(v) - after - 1, 0)], 1):
        reach *= a
        tokens += reach
        worth = tokens - rate * (m * c + v[after + m] - v[after])
        if worth > best[1]:
            best = (m, worth)
    return best


class StoppingRule:
    """When to stop drafting, knowing how confident the draft was: the optimum, by dynamic programming over how far a draft is likely to reach.

    A step costs c whatever it says. Once its confidence is known, its token is put into the block, which makes verification longer, or dropped
    and the draft ended.

    Args:
        bins (`Sequence[tuple[float, float]]`): of each bin of confidence, how often it comes and its acceptance.
        c, v, rate: as in [`best_gain`].
        most (`int`): the largest γ.
    """

    def __init__(self, bins: Sequence[tuple[float, float]], c: float, v: Sequence[float], rate: float, most: int):
        most = min(most, len(v) - 1)
        self.step_costs = [rate * (v[j + 1] - v[j]) for j in range(most)]  # of token j in the verification
        # worth[j][r]: of the steps from the j-th on, where all before are accepted with probability r / _REACHES.
        self._worth = [[0.0] * (_REACHES + 1) for _ in range(most + 1)]
        for j in reversed(range(most)):
            for r in range(_REACHES + 1):
                gain = sum(share * max(self.token(j, r / _REACHES * a), 0.0) for share, a in bins)
                self._worth[j][r] = gain - rate * c

    def step(self, j: int, reach: float) -> float:
        """Worth of drafting the j-th token, counted from 0, where all before it are accepted with probability `reach`."""
        worth, at = self._worth[min(j, len(self._worth) - 1)], reach * _REACHES
        low = min(int(at), _REACHES - 1)
        return worth[low] + (at - low) * (worth[low + 1] - worth[low])

    def token(self, j: int, reach: float) -> float:
        """Worth of putting the j-th token into the block, it and all before it being accepted with probability `reach`."""
        return reach - self.step_costs[min(j, len(self.step_costs) - 1)] + max(self.step(j + 1, reach), 0.0)


@dataclass(frozen=True)
class Plan:
    """What to draft in a round: up to `length` tokens of `"draft"` or of the `"cache"`; nothing if `length` is 0. With `selective`, the draft
    asks `worth_token` and `worth_step` on the way."""

    source: str = "draft"
    length: int = 0
    selective: bool = False


class DraftPolicy:
    """Observes rounds and chooses what to draft. One instance serves all calls of an assistant; it is thread-safe.

    Args:
        policy (`str`): `"cost"`, `"heuristic"` or `"constant"`, as in [`OnlineConfig`].
        most (`int`): the largest γ.
        draft_cost (`float`, *optional*), verify_cost (`float`): see [`Costs`].
        most_cached (`int`): the most tokens of the suffix cache a round.
        has_draft (`bool`): whether there is a draft at all. With one, the suffix cache joins under the policy `"cost"` alone: it takes what is
            expected of both to choose between them.
    """

    def __init__(
        self,
        policy: str,
        most: int,
        draft_cost: float | None = None,
        verify_cost: float = 0.0,
        most_cached: int = 0,
        has_draft: bool = True,
    ):
        self.policy, self.most, self.most_cached, self.has_draft = policy, most, most_cached, has_draft
        self.costs = Costs(draft_cost, verify_cost)
        self.positions, self.confidence, self.matches = (
            PositionAcceptance(most),
            ConfidenceAcceptance(),
            MatchAcceptance(),
        )
        self._gamma = most  # state of the heuristic
        self._idle = self._busy = self._rounds = 0  # rounds since the draft drafted; since nothing was; in all
        self._tokens = self._time = 0.0  # decayed, for λ
        self._view: _View | None = None
        self._lock = released(threading.RLock())

    @property
    def c(self) -> float | None:
        return self.costs.c

    def v(self, n: int) -> float:
        return self.costs.v(n)

    def acceptance(self) -> list[float]:
        """a_1..a_most of the draft, see [`PositionAcceptance`]."""
        return self.positions.values()

    @property
    def rate(self) -> float:
        """λ, at least plain decoding's 1."""
        return max(self._tokens / self._time, 1.0) if self._time else 1.0

    @property
    def wants_cache(self) -> bool:
        """Whether the suffix cache is worth looking into."""
        return self.most_cached > 0 and (self.policy == "cost" or not self.has_draft)

    def plan(self, match: int = 0, shares: Sequence[float] = ()) -> Plan:
        """What to draft in the next round.

        Args:
            match: how many tokens of the text the suffix cache matched, 0 for no proposal.
            shares: of each proposed token, see [`hf_osd.drafting.suffix_cache.Continuation`].
        """
        with self._lock:
            if self.policy != "cost":
                length = self.most if self.policy == "constant" else self._gamma
                return Plan("draft", length) if self.has_draft else Plan("cache", min(length, len(shares)))
            if not self.costs.are_fixed and self._must_measure_plain():
                return Plan()  # every cost is a multiple of a plain round's
            view = self._current()
            cached, worth = best_gain(self.matches.of(match, shares), 0.0, view.v, view.rate)
            if not self.has_draft:
                return Plan("cache", cached)
            if self.costs.c is None:  # the draft was never asked
                return Plan("draft", 1)
            if view.worth > worth:
                return Plan("draft", view.gamma, view.selective)
            if not cached and self._idle >= PROBE_EVERY:
                return Plan("draft", 1)
            return Plan("cache", cached)

    def worth_token(self, j: int, reach: float) -> bool:
        """Whether the j-th token, counted from 0, goes into the block: it and all before it are accepted with probability `reach`."""
        view = self._view
        return view is None or view.rule.token(j, reach) > 0

    def tail(self, j: int, reach: float, match: int, shares: Sequence[float]) -> int:
        """How many cached tokens to put after j drafts, as the end of the block, in place of drafting on; 0 for none."""
        view = self._view
        if view is None or not match:
            return 0
        acceptance = self.matches.of(match, shares)
        acceptance[0] *= reach
        cached, worth = best_gain(acceptance, 0.0, view.v, view.rate, after=j)
        return cached if worth > max(view.rule.step(j, reach), 0.0) else 0

    def worth_step(self, j: int, reach: float) -> bool:
        """Whether to ask the draft for its j-th token, counted from 0."""
        view = self._view
        return view is None or view.rule.step(j, reach) > 0

    def observe_round(
        self,
        drafted: int,
        tested: int,
        accepted: int,
        draft_seconds: float | None = None,
        target_seconds: float | None = None,
        *,
        steps: int | None = None,
        cached: int = 0,
        confidence: Sequence[float] = (),
        match: int = 0,
        shares: Sequence[float] = (),
    ):
        """One round: what was drafted, tested and accepted of it.

        Args:
            drafted, tested, accepted: tokens of both sources.
            draft_seconds, target_seconds: `None` where they held a prefill as well, which says nothing of c or v.
            steps: of the draft; as many as it drafted if left out.
            cached: how many of the last drafted tokens are the suffix cache's.
            confidence: the draft's at its own tokens, in order, where known.
            match, shares: the suffix cache's, at its tokens.
        """
        own = drafted - cached
        steps = own if steps is None else steps
        with self._lock:
            self._rounds += 1
            self._gamma = heuristic_length(self._gamma, drafted, accepted, self.most)
            self._idle = 0 if steps else self._idle + 1
            self._busy = self._busy + 1 if drafted else 0
            for i in range(min(tested, own, self.most)):
                self.positions.observe(i, float(i < accepted))
            for i, value in enumerate(confidence[:tested]):
                self.confidence.observe(self.confidence.bin(value), float(i < accepted))
            for i, share in enumerate(shares[: max(tested - own, 0)]):
                self.matches.observe(self.matches.bin(match + i, share), float(own + i < accepted))
            if target_seconds is not None:
                self.costs.observe_target(drafted + 1, target_seconds)
                if steps and draft_seconds is not None:
                    self.costs.observe_draft(steps, draft_seconds)
            view = self._view
            if view is not None and drafted < len(view.v):
                self._tokens = _RATE_DECAY * self._tokens + accepted + 1
                self._time = _RATE_DECAY * self._time + steps * (self.costs.c or 0.0) + view.v[drafted]
            self._invalidate()

    def observe_untested(self, overlap: Sequence[float], confidence: Sequence[float] = ()):
        """Expected acceptance at positions where the draft's token was not tested, as evidence for position 1, and the draft's confidence there
        where known."""
        if not overlap:
            return
        with self._lock:
            for value in overlap:
                self.positions.observe(0, float(value))
            for value, sure in zip(overlap, confidence, strict=False):
                self.confidence.observe(self.confidence.bin(sure), float(value))
            if len(overlap) > 1:  # more than a bonus token
                self._view = None
            else:
                self._invalidate()

    def _must_measure_plain(self) -> bool:
        return self.costs.step_seconds is None or self._busy >= PLAIN_EVERY

    def _invalidate(self):
        if self._rounds < 4 * _REFRESH_EVERY or self._rounds % _REFRESH_EVERY == 0:
            self._view = None

    def _current(self) -> _View:
        if self._view is None:
            longest = 1 + max(self.most if self.has_draft else 0, self.most_cached)
            if not self.costs.are_fixed:  # v is unknown beyond what was measured: on some machines it is steep
                longest = min(longest, 2 * self.costs.longest_measured)
            self._view = _View.of(self, longest)
        return self._view


@dataclass(frozen=True)
class _View:
    """What the cost policy goes by, for some rounds."""

    v: list[float]
    rate: float
    rule: StoppingRule
    gamma: int
    worth: float  # of drafting, beyond a plain round
    selective: bool

    @classmethod
    def of(cls, seen: DraftPolicy, longest: int) -> _View:
        v, rate, c = seen.costs.v_upto(longest), seen.rate, seen.costs.c or 0.0
        bins = seen.confidence.bins()
        rule = StoppingRule(bins, c, v, rate, seen.most if seen.has_draft else 0)
        # Confidence lags behind a draft that learns unasked, what its first tokens are worth does not.
        first = seen.acceptance()[0] if seen.most else 0.0
        gamma, worth = best_gain([first] * seen.most, c, v, rate)
        if seen.confidence.seen >= _CONFIDENT_AFTER and rule.step(0, 1.0) > 0:
            return cls(v, rate, rule, min(seen.most, longest - 1), max(rule.step(0, 1.0), worth), True)
        return cls(v, rate, rule, gamma, worth, False)
