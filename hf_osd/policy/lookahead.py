"""`DraftPolicy` decides before each round how many tokens to draft and from which source, if any; the formulas it uses are functions here.

Symbols (as everywhere): γ is the number of drafted tokens; a_i is the probability that the i-th is accepted, given that all before it were; c is the
time of a draft step and v(n) the time of verifying n tokens, both in one-token target steps; λ is the token rate reached so far, in tokens per
one-token target step. A choice that yields E tokens and takes time T has the gain E - λT. We take the choice of the largest gain, which maximises the
long-run rate (renewal-reward; if all rounds were of one kind, it would be the round with the largest E/T).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_osd.policy.acceptance import ConfidenceAcceptance, MatchAcceptance, PositionAcceptance
from hf_osd.policy.costs import Costs
from hf_osd.policy.earnings import Earnings
from hf_osd.policy.stopping_rule import StoppingRule
from hf_osd.system.forks import released

# After so many rounds without drafts one token is drafted anyway, so that costs stay measured. This is rare, for the draft must then
# catch up on the whole request; what reopens drafting is acceptance, which is scored after the call (`learning/undrafted.py`).
PROBE_EVERY = 1024
# Until the draft's acceptance has been seen so often, in tests or scores, it is tried again after so few rounds: a few unlucky first tokens say little, and where
# nothing learns nobody scores the draft. Not if even a draft that is always right would not pay.
_KNOWN_FROM, _TRY_EVERY = 48.0, 16
# After so many rounds with drafts one is plain: every cost is measured in plain steps, whose time drifts as texts grow.
PLAIN_EVERY = 128
# Observations of confidence (decayed) that are needed before it may end a draft early.
_CONFIDENT_AFTER = 24.0
# What the draft has not read of a text is read once: of that time a round is charged one part of so many.
_READ_ROUNDS = 16
# Decay, per round, of the mean gain of what the suffix cache proposes.
_TAIL_DECAY = 0.98
# Rounds between two computations of the estimates, once the first rounds are over.
_REFRESH_EVERY = 16
# From so many carried tokens on a round is plain, which absorbs them, whatever the policy.
_MOST_CARRIED = 16
# Decay of the counts behind λ, per round.
_RATE_DECAY = 0.99


def expected_tokens(acceptance: Sequence[float], gamma: int) -> float:
    """Gives the tokens that a round of γ drafts yields, 1 + Σ_{j≤γ} Π_{i≤j} a_i, bonus token included (arXiv 2310.07177, section 3)."""
    total, prefix_acceptance = 1.0, 1.0
    for a in acceptance[:gamma]:
        prefix_acceptance *= a
        total += prefix_acceptance
    return total


def ideal_speedup(acceptance: Sequence[float], gamma: int, c: float, v: Callable[[int], float]) -> float:
    """Divides a round's expected tokens by its expected time in one-token target steps; plain decoding has 1."""
    return expected_tokens(acceptance, gamma) / (gamma * c + v(gamma + 1))


def best_length(acceptance: Sequence[float], c: float, v: Callable[[int], float]) -> tuple[int, float]:
    """Finds the γ from 0 to len(acceptance) with the largest `ideal_speedup`, and returns both. γ=0 is plain decoding, with 1."""
    best = (0, 1.0)
    for gamma in range(1, len(acceptance) + 1):
        speedup = ideal_speedup(acceptance, gamma, c, v)
        if speedup > best[1]:
            best = (gamma, speedup)
    return best


def break_even(c: float, v: Callable[[int], float], max_gamma: int) -> float | None:
    """Finds the acceptance (the same at all positions, to within 1e-3) from which drafting pays; `None` if it does not pay even at 1."""
    if best_length([1.0] * max_gamma, c, v)[0] == 0:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if best_length([middle] * max_gamma, c, v)[0] else (middle, high)
    return high


def heuristic_length(gamma: int, drafted: int, accepted: int, max_gamma: int) -> int:
    """Applies transformers' rule (`AssistedCandidateGenerator.update_candidate_strategy`): +2 after a round accepted whole, else -1."""
    if not drafted:
        return gamma
    return min(gamma + 2, max_gamma) if accepted == drafted else max(gamma - 1, 1)


def best_gain(
    acceptance: Sequence[float], c: float, v: Sequence[float], rate: float, after: int = 0, rollback: float = 0.0
) -> tuple[int, float]:
    """Finds how many of the proposed tokens to draft, and returns that and their gain over the same round without them.

    Args:
        acceptance: a_i of each proposed token.
        c: the cost of drafting one.
        v: v(1), v(2), …; a proposal longer than that is cut.
        rate: λ.
        after: tokens of the block before the proposal; a_1 then includes the probability that they are accepted.
        rollback: λ times the time that is lost where the block is not accepted as a whole: a target with recurrent states then reads its tokens again.
    """
    best, tokens, prefix_acceptance = (0, -math.inf if after and rollback else 0.0), 0.0, 1.0
    for m, a in enumerate(acceptance[: max(len(v) - after - 1, 0)], 1):
        prefix_acceptance *= a
        tokens += prefix_acceptance
        gain = tokens - rate * (m * c + v[after + m] - v[after]) - rollback * (1 - prefix_acceptance)
        if gain > best[1]:
            best = (m, gain)
    return best


@dataclass(frozen=True)
class Plan:
    """Plans a round: it drafts up to `length` tokens from the draft model (`"draft"`) or the suffix cache (`"cache"`), none if `length` is 0. If it is
    `selective`, the draft asks `should_keep` and `should_step` after each step. Without a draft model the round would have `cached` tokens, whose gain is
    `cached_gain`: they take the place of a first token that is not kept."""

    source: str = "draft"
    length: int = 0
    selective: bool = False
    cached: int = field(default=0, compare=False)
    cached_gain: float = field(default=0.0, compare=False)


class DraftPolicy:
    """Observes rounds and plans the next one. One instance serves all calls of an assistant; it is thread-safe.

    Args:
        policy (`str`): `"cost"`, `"heuristic"` or `"constant"`, as in [`OnlineConfig`].
        max_gamma (`int`): the largest γ.
        draft_cost (`float`, *optional*), verify_cost (`float`): see [`Costs`].
        max_cached (`int`): the largest number of suffix-cache tokens in a round.
        has_draft (`bool`): whether there is a draft model. If so, the suffix cache is used by the policy `"cost"` only: choosing between the two takes
            estimates of both.
        beside ([`DraftPolicy`], *optional*): a policy of a draft of the same shape, whose costs hold for this one too.
    """

    def __init__(
        self,
        policy: str,
        max_gamma: int,
        draft_cost: float | None = None,
        verify_cost: float = 0.0,
        max_cached: int = 0,
        has_draft: bool = True,
        beside: DraftPolicy | None = None,
    ):
        self.policy, self.max_gamma, self.max_cached, self.has_draft = policy, max_gamma, max_cached, has_draft
        self.costs = Costs(draft_cost, verify_cost) if beside is None else beside.costs
        self.positions, self.confidence, self.matches = (
            PositionAcceptance(max_gamma),
            ConfidenceAcceptance(),
            MatchAcceptance(),
        )
        self.earnings = Earnings()  # of the draft, beside the cache
        self._version = 0  # of the draft's weights
        self._gamma = max_gamma  # of the heuristic policy, for the next round
        self._idle = self._busy = self._rounds = (
            0  # rounds since the draft's last step; since the last plain round; in all
        )
        self._tokens = self._time = 0.0  # decayed sums, whose ratio is λ
        self._rolls_back = False  # whether the target of the last plan has recurrent states
        self._tail = 0.0  # decayed mean of the gain of the suffix cache's proposals
        self._estimates: _Estimates | None = None
        self._lock = released(threading.RLock()) if beside is None else beside._lock  # it guards the costs too

    def acceptance(self) -> list[float]:
        """Estimates a_1..a_γ of the draft for the largest γ, see [`PositionAcceptance`]."""
        return self.positions.values()

    @property
    def rate(self) -> float:
        """Returns the token rate λ; it is at least 1, the rate of plain decoding."""
        return max(self._tokens / self._time, 1.0) if self._time else 1.0

    @property
    def wants_cache(self) -> bool:
        """Is `True` if this policy can use proposals of the suffix cache."""
        return self.max_cached > 0 and (self.policy == "cost" or not self.has_draft)

    @property
    def may_ask_draft(self) -> bool:
        """Is `False` if, as things stand, no round is worth a step of the draft model, and none is due to measure it."""
        with self._lock:
            if self.policy != "cost" or not self.has_draft:
                return self.has_draft
            if not self.earnings.in_credit:
                return False
            return not self.costs.is_sure_of_draft or self._is_probe_due or self._current().gain > 0

    @property
    def _is_probe_due(self) -> bool:
        if self._idle >= PROBE_EVERY:
            return True
        if self._idle < _TRY_EVERY or self.positions.seen >= _KNOWN_FROM:
            return False
        estimates = self._current()
        return best_gain([1.0] * self.max_gamma, self.costs.c or 0.0, estimates.v, estimates.rate)[1] > 0

    def plan(
        self,
        match: int = 0,
        agreement: Sequence[float] = (),
        *,
        can_draft: bool = True,
        unread: int = 1,
        carried: int | None = None,
    ) -> Plan:
        """Plans the next round.

        Args:
            match: how many tokens of the text the suffix cache matched, 0 for no proposal.
            agreement: for each token proposed by the cache, see [`hf_osd.drafting.suffix_cache.Continuation`].
            can_draft: `False` if the draft model cannot draft in this round: the suffix cache may.
            unread: tokens that its first forward would read.
            carried: verified tokens that the target reads again before the block, see [`hf_osd.generation.rollback`]; `None` for a target that needs no rollback.
        """
        with self._lock:
            if (carried is not None) != self._rolls_back:
                self._rolls_back, self._estimates = carried is not None, None
            if carried is not None and carried >= _MOST_CARRIED:
                return Plan()
            if self.policy != "cost":
                length = self.max_gamma if self.policy == "constant" else self._gamma
                if self.has_draft:
                    return Plan("draft", length if can_draft else 0)
                return Plan("cache", min(length, len(agreement)))
            if not self.costs.are_fixed and (self.costs.step_seconds is None or self._busy >= PLAIN_EVERY):
                return Plan()  # a plain round, to measure the unit of all costs
            estimates = self._current()
            rollback = self._rollback(carried or 0)
            acceptance = self.matches.along(match, agreement)
            cached, gain = best_gain(acceptance, 0.0, estimates.v, estimates.rate, rollback=rollback)
            self._tail = _TAIL_DECAY * self._tail + (1 - _TAIL_DECAY) * gain
            without = Plan("cache", cached, cached=cached)
            if not (self.has_draft and can_draft and self.earnings.in_credit):
                return without
            if not self.costs.is_sure_of_draft:
                # A step after the first forward too, which costs something else.
                return Plan("draft", 2, cached=cached)
            drafting = estimates.rule.first_gain(gain) if estimates.selective else -math.inf
            near, c = self.costs.read(1), self.costs.c
            reading = near - c + (self.costs.read(unread) - near) / _READ_ROUNDS
            # What was carried already would be carried on.
            again = rollback - self._rollback(0) if carried else 0.0
            if max(drafting, estimates.gain) - estimates.rate * reading - again > gain:
                return Plan("draft", estimates.gamma, estimates.selective, cached, gain)
            if not cached and self._is_probe_due:
                return Plan("draft", 1)
            return without

    def should_keep(self, j: int, prefix_acceptance: float, instead: float = 0.0) -> bool:
        """Decides if the j-th token, counted from 0, goes into the block, when it and all before it are accepted with probability `prefix_acceptance`, and what would be
        proposed in its place gains `instead`."""
        estimates = self._estimates
        if estimates is None:
            return True
        return estimates.rule.token_gain(j, prefix_acceptance) > max(
            instead, estimates.rule.end_gain(j, prefix_acceptance)
        )

    def cache_suffix_length(self, j: int, prefix_acceptance: float, match: int, agreement: Sequence[float]) -> int:
        """Decides how many cached tokens end the block after j drafts (all accepted with probability `prefix_acceptance`) instead of further drafts; 0 to
        draft on."""
        estimates = self._estimates
        if estimates is None or not match:
            return 0
        acceptance = self.matches.along(match, agreement)
        acceptance[0] *= prefix_acceptance
        cached, gain = best_gain(acceptance, 0.0, estimates.v, estimates.rate, j, self._rollback(0))
        end = estimates.rule.end_gain(j, prefix_acceptance)
        return cached if gain > max(estimates.rule.step_gain(j, prefix_acceptance), end) else 0

    def should_step(self, j: int, prefix_acceptance: float) -> bool:
        """Decides if the draft makes a step for its j-th token, counted from 0, when all before it are accepted with probability `prefix_acceptance`."""
        estimates = self._estimates
        if estimates is None:
            return True
        return estimates.rule.step_gain(j, prefix_acceptance) > estimates.rule.end_gain(j, prefix_acceptance)

    def note_weights(self, version: int):
        """Notes which of the draft's weights serve, by their number."""
        with self._lock:
            if version != self._version:
                self._version = version
                self.earnings.renew()

    def observe_round(
        self,
        drafted: int,
        tested: int,
        accepted: int,
        draft_seconds: float | None = None,
        target_seconds: float | None = None,
        *,
        steps: int | None = None,
        unread: int = 1,
        read_seconds: float | None = None,
        cached: int = 0,
        confidence: Sequence[float] = (),
        match: int = 0,
        agreement: Sequence[float] = (),
        carried: int = 0,
    ):
        """Records one round.

        Args:
            drafted, tested, accepted: numbers of tokens, of both sources together.
            draft_seconds, target_seconds: their times; `None` if they included a prefill, by which c and v cannot be measured.
            steps: the draft's forwards; by default one for each token that it drafted.
            unread, read_seconds: of the first of them, see [`Costs.observe_draft`].
            cached: how many of the drafted tokens came from the suffix cache; they are the last ones.
            confidence: the draft's confidence at each token that it drafted, where known.
            match, agreement: of the suffix cache's proposal, see [`hf_osd.drafting.suffix_cache.Continuation`].
            carried: verified tokens that the target has read again before the block.
        """
        from_draft = drafted - cached
        steps = from_draft if steps is None else steps
        with self._lock:
            self._rounds += 1
            self._gamma = heuristic_length(self._gamma, drafted, accepted, self.max_gamma)
            self._idle = 0 if steps else self._idle + 1
            self._busy = self._busy + 1 if drafted else 0
            for i in range(min(tested, from_draft, self.max_gamma)):
                self.positions.observe(i, float(i < accepted))
            for i, value in enumerate(confidence[:tested]):
                self.confidence.observe(self.confidence.bin(value), float(i < accepted))
            for i, share in enumerate(agreement[: max(tested - from_draft, 0)]):
                self.matches.observe(self.matches.bin(match + i, share), float(from_draft + i < accepted))
            if target_seconds is not None:
                self.costs.observe_target(carried + drafted + 1, target_seconds)
                if steps and draft_seconds is not None:
                    self.costs.observe_draft(steps, draft_seconds, unread, read_seconds)
            estimates = self._estimates
            if estimates is not None and drafted < len(estimates.v):
                self._tokens = _RATE_DECAY * self._tokens + accepted + 1
                verified = self.costs.v(drafted + carried + 1) if carried else estimates.v[drafted]
                self._time = _RATE_DECAY * self._time + self.costs.drafting(steps, unread) + verified
            self._invalidate()

    def observe_earnings(
        self,
        plan: Plan,
        verified: Sequence[int],
        proposed: Sequence[int],
        match: int,
        agreement: Sequence[float],
        *,
        drafted: int,
        recorded: int,
        steps: int,
        draft_seconds: float,
    ):
        """Records what a round earned beside the one that the suffix cache alone would have made in its place, see [`Earnings`]. The verified tokens show how many of the
        cache's proposal would have been accepted, and that is evidence for its acceptance too. Call it before `observe_round`.

        Args:
            plan: the round's plan.
            verified: the m+1 verified tokens.
            proposed, match, agreement: the suffix cache's proposal after the round's text, see [`hf_osd.drafting.suffix_cache.Continuation`].
            drafted: how many tokens were drafted, of both sources.
            recorded: how many of `proposed` were tested in the round's block: `observe_round` records these.
            steps, draft_seconds: the draft's forwards, and all the time that they took, with what it had to catch up on.
        """
        with self._lock:
            step = 1.0 if self.costs.are_fixed else self.costs.step_seconds
            if self.policy != "cost" or not self.has_draft or step is None:
                return
            known = min(len(proposed), len(verified))
            right = next((i for i in range(known) if proposed[i] != verified[i]), known)
            for i in range(recorded, min(right + 1, known)):
                self.matches.observe(self.matches.bin(match + i, agreement[i]), float(i < right))
            v = self._current().v
            time = v[min(drafted, len(v) - 1)]
            if not steps:
                self.earnings.observe(len(verified), time, len(verified), time)
                return
            without = 1.0 + min(right, plan.cached)
            if right == len(verified) < plan.cached:  # how it would have gone on is not known
                expected = self.matches.along(match, agreement)
                without += expected_tokens(expected[right:], plan.cached - right) - 1
            time_without = v[min(plan.cached, len(v) - 1)]
            time += self.costs.drafting(steps) if self.costs.are_fixed else draft_seconds / step
            self.earnings.observe(len(verified), time, without, time_without)

    def observe_untested(self, acceptance: Sequence[float], confidence: Sequence[float] = ()):
        """Records expected acceptance at verified positions where no token of the draft was tested, and the draft's confidence there where known. It
        counts as evidence for a_1."""
        if not acceptance:
            return
        with self._lock:
            for value in acceptance:
                self.positions.observe(0, float(value))
            for value, sure in zip(acceptance, confidence, strict=False):
                self.confidence.observe(self.confidence.bin(sure), float(value))
            if len(acceptance) > 1:  # more than the one after a block
                self._estimates = None
            else:
                self._invalidate()

    def _rollback(self, carried: int) -> float:
        """Estimates λ times the time that a block loses which is not accepted as a whole: of the next verification, what it reads again."""
        if not self._rolls_back:
            return 0.0
        accepted = round(expected_tokens(self.acceptance(), self.max_gamma)) - 1 if self.max_gamma else 0
        again = carried + accepted + 1
        return self.rate * (self.costs.v(again + 1) - 1.0)

    def _invalidate(self):
        if self._rounds < 4 * _REFRESH_EVERY or self._rounds % _REFRESH_EVERY == 0:
            self._estimates = None

    def _current(self) -> _Estimates:
        if self._estimates is None:
            longest = 1 + max(self.max_gamma if self.has_draft else 0, self.max_cached)
            if not self.costs.are_fixed:  # beyond measured lengths v is extrapolated, and on some machines it is steep
                longest = min(longest, 2 * self.costs.longest_measured)
            self._estimates = _Estimates.from_policy(self, longest)
        return self._estimates


@dataclass(frozen=True)
class _Estimates:
    """Holds the estimates that the policy `"cost"` plans by, for some rounds at a time."""

    v: list[float]
    rate: float
    rule: StoppingRule
    gamma: int
    gain: float  # of drafting, over a plain round
    selective: bool

    @classmethod
    def from_policy(cls, policy: DraftPolicy, longest: int) -> _Estimates:
        v, rate, c = policy.costs.v_upto(longest), policy.rate, policy.costs.c or 0.0
        bins = policy.confidence.bins()
        rollback = policy._rollback(0)
        rule = StoppingRule(bins, c, v, rate, policy.max_gamma if policy.has_draft else 0, policy._tail, rollback)
        # Confidence may lag behind a draft that learns while it drafts nothing. a_1 does not (`observe_untested`), so its gain counts too.
        first = policy.acceptance()[0] if policy.max_gamma else 0.0
        gamma, gain = best_gain([first] * policy.max_gamma, c, v, rate, rollback=rollback)
        if policy.confidence.seen >= _CONFIDENT_AFTER and rule.step_gain(0, 1.0) > 0:
            return cls(v, rate, rule, min(policy.max_gamma, longest - 1), max(rule.step_gain(0, 1.0), gain), True)
        return cls(v, rate, rule, gamma, gain, False)
