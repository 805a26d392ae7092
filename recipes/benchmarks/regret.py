"""Simulates policies for γ on recorded answers: pure arithmetic, to compare them on the same traffic without a clock.

Symbols: γ tokens drafted; c the time of a draft step and v(n) that of verifying n tokens, both over the time of a one-token target step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_osd.policy.lookahead import DraftPolicy


@dataclass(frozen=True)
class Predictions:
    """The draft's predictions along one greedy answer of the target.

    Args:
        hits (`Sequence[float]`): at each position 1 where the draft's likeliest token is the target's, else 0.
        confidence (`Sequence[float]`): the probability of that likeliest token. After a wrong draft token the text would have been another, and this
            stands in for the unknown confidence there.
    """

    hits: Sequence[float]
    confidence: Sequence[float]

    def __len__(self) -> int:
        return len(self.hits)

    def accepted(self, at: int, most: int) -> int:
        """Count how many of up to `most` tokens drafted from position `at` on are accepted."""
        for n, hit in enumerate(self.hits[at : at + most]):
            if not hit:
                return n
        return min(most, len(self) - at)


class Policy(Protocol):
    """Chooses how much to draft, and observes the outcome."""

    def choose(self, answer: Predictions, at: int, room: int) -> tuple[int, int]:
        """Choose for the round that begins at position `at`: returns drafted tokens, at most `room`, and the draft's forwards for them."""

    def observe(self, answer: Predictions, at: int, drafted: int, steps: int, accepted: int):
        """Observe the round's outcome."""

    def end(self, answer: Predictions):
        """Observe that the answer is complete."""


class Fixed:
    """Drafts γ tokens in every round."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def choose(self, answer: Predictions, at: int, room: int) -> tuple[int, int]:
        return (min(self.gamma, room),) * 2

    def observe(self, answer: Predictions, at: int, drafted: int, steps: int, accepted: int):
        pass

    def end(self, answer: Predictions):
        pass


class Driven:
    """Drives a [`DraftPolicy`] as serving does, without the suffix cache. `choose` makes the decisions of `DraftModelProposer.draft`; a test holds them equal."""

    def __init__(self, policy: DraftPolicy):
        self.policy = policy
        self._unscored: list[int] = []  # verified positions of this answer that the draft has not predicted yet

    def choose(self, answer: Predictions, at: int, room: int) -> tuple[int, int]:
        policy, plan = self.policy, self.policy.plan()
        length = min(plan.length, room)
        if not length or not plan.selective:
            return length, length
        reach = 1.0
        for j in range(length):
            reach *= policy.confidence.acceptance(policy.confidence.bin(answer.confidence[at + j]))
            if not policy.should_keep(j, reach):
                return j, j + 1
            if j + 1 < length and not policy.should_step(j + 1, reach):
                return j + 1, j + 1
        return length, length

    def observe(self, answer: Predictions, at: int, drafted: int, steps: int, accepted: int):
        predicted, verified = min(steps, accepted + 1), range(at, at + accepted + 1)
        sure = answer.confidence[at : at + steps]
        tested = min(accepted + 1, drafted)
        self.policy.observe_round(drafted, tested, accepted, steps=steps, confidence=sure[:drafted])
        if steps:  # the draft has caught up
            self._score(answer)
        self.policy.observe_untested(answer.hits[at + tested : at + predicted], sure[tested:predicted])
        self._unscored += verified[predicted:]

    def end(self, answer: Predictions):
        """Score what was not drafted, as an assistant that learns does after a call."""
        if len(self._unscored) > 1:
            self._score(answer)
        self._unscored.clear()

    def _score(self, answer: Predictions):
        self.policy.observe_untested([answer.hits[i] for i in self._unscored])
        self._unscored.clear()


def simulate(answer: Predictions, policy: Policy, c: float, v: Callable[[int], float]) -> tuple[int, float]:
    """Decode the answer in the rounds that `policy` chooses: `(tokens, time)`, in one-token target steps.

    A round that drafts n tokens yields the accepted ones and one more, and takes c for each step and v(n+1). The answer's end is known, as a length
    limit is: nothing is drafted beyond it.
    """
    at, time = 0, 0.0
    while at < len(answer):
        drafted, steps = policy.choose(answer, at, len(answer) - at - 1)
        accepted = answer.accepted(at, drafted)
        policy.observe(answer, at, drafted, steps, accepted)
        time += steps * c + v(drafted + 1)
        at += accepted + 1
    policy.end(answer)
    return at, time


def regrets(
    answers: Sequence[Predictions], most: int, c: float, verify_cost: float = 0.0
) -> dict[str, dict[str, float]]:
    """Simulate each policy on these answers in turn: its rate, tokens a one-token target step, and its regret, 1 - rate over that of the best fixed γ.

    The best fixed γ is known in hindsight only. A policy that beats every fixed γ has a negative regret.

    Args:
        answers: the answers, in serving order.
        most: the largest γ.
        c, verify_cost: time of a draft step, and of each further verified token: v(n) = 1 + verify_cost·(n-1).

    Returns:
        `dict`: by `"constant-0"` (plain decoding), …, `"constant-<most>"`, `"heuristic"` and `"cost"`: `rate` and `regret`.

    Raises:
        ValueError: if there is no token in `answers`.
    """
    if not any(map(len, answers)):
        raise ValueError("`answers` holds no token; record the answers of at least one prompt.")
    policies: dict[str, Policy] = {f"constant-{gamma}": Fixed(gamma) for gamma in range(most + 1)}
    for name in ("heuristic", "cost"):
        policies[name] = Driven(DraftPolicy(name, most, c, verify_cost))
    rates = {}
    for name, policy in policies.items():
        rounds = [simulate(answer, policy, c, lambda n: 1 + verify_cost * (n - 1)) for answer in answers]
        rates[name] = sum(tokens for tokens, _ in rounds) / sum(time for _, time in rounds)
    best = max(rate for name, rate in rates.items() if name.startswith("constant"))
    return {name: {"rate": rate, "regret": 1 - rate / best} for name, rate in rates.items()}
