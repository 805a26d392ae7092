"""What a choice of γ would have been worth on requests that were recorded: pure arithmetic, to compare policies on the same traffic without a
clock.

Symbols: γ tokens drafted; c the time of a draft step and v(n) that of verifying n tokens, both over the time of a one-token target step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_osd.policy.lookahead import DraftPolicy


@dataclass(frozen=True)
class Trace:
    """One greedy answer, as the draft would have said it.

    Args:
        hits (`Sequence[float]`): at each position 1 where the draft's likeliest token is the target's, else 0.
        confidence (`Sequence[float]`): the probability of that likeliest token. After a draft that was wrong the text would have been another,
            so there it stands in for what is not known.
    """

    hits: Sequence[float]
    confidence: Sequence[float]

    def __len__(self) -> int:
        return len(self.hits)

    def run(self, at: int, most: int) -> int:
        """How many of up to `most` drafts from position `at` on are accepted."""
        for n, hit in enumerate(self.hits[at : at + most]):
            if not hit:
                return n
        return min(most, len(self) - at)


class Policy(Protocol):
    """Chooses what to draft, and is told what became of it."""

    def choose(self, trace: Trace, at: int, room: int) -> tuple[int, int]:
        """Drafted tokens, at most `room`, and the draft's forwards that they took, in the round that begins at position `at`."""

    def observe(self, trace: Trace, at: int, drafted: int, steps: int, accepted: int):
        """The round's outcome."""

    def end(self, trace: Trace):
        """The answer is over."""


class Fixed:
    """γ tokens in every round."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def choose(self, trace: Trace, at: int, room: int) -> tuple[int, int]:
        return (min(self.gamma, room),) * 2

    def observe(self, trace: Trace, at: int, drafted: int, steps: int, accepted: int):
        pass

    def end(self, trace: Trace):
        pass


class Driven:
    """A [`DraftPolicy`] that is asked and told as serving does, the suffix cache left out."""

    def __init__(self, lookahead: DraftPolicy):
        self.lookahead = lookahead
        self._unasked: list[int] = []  # verified positions of this answer that the draft was not asked about

    def choose(self, trace: Trace, at: int, room: int) -> tuple[int, int]:
        look, plan = self.lookahead, self.lookahead.plan()
        length = min(plan.length, room)
        if not length or not plan.selective:
            return length, length
        reach = 1.0
        for j in range(length):
            reach *= look.confidence.acceptance(look.confidence.bin(trace.confidence[at + j]))
            if not look.should_keep(j, reach):
                return j, j + 1
            if j + 1 < length and not look.should_step(j + 1, reach):
                return j + 1, j + 1
        return length, length

    def observe(self, trace: Trace, at: int, drafted: int, steps: int, accepted: int):
        asked, verified = min(steps, accepted + 1), range(at, at + accepted + 1)
        sure = trace.confidence[at : at + steps]
        tested = min(accepted + 1, drafted)
        self.lookahead.observe_round(drafted, tested, accepted, steps=steps, confidence=sure[:drafted])
        if steps:  # it has caught up with what it was not asked about
            self._settle(trace)
        self.lookahead.observe_untested(trace.hits[at + tested : at + asked], sure[tested:asked])
        self._unasked += verified[asked:]

    def end(self, trace: Trace):
        """As an assistant that learns does, which asks its draft afterwards where nothing was drafted for long."""
        if len(self._unasked) > 1:
            self._settle(trace)
        self._unasked.clear()

    def _settle(self, trace: Trace):
        self.lookahead.observe_untested([trace.hits[i] for i in self._unasked])
        self._unasked.clear()


def simulate(trace: Trace, policy: Policy, c: float, v: Callable[[int], float]) -> tuple[int, float]:
    """The answer decoded in the rounds that `policy` chooses: `(tokens, time)`, in one-token target steps.

    A round that drafts n tokens yields those accepted and one more, and takes c for each step and v(n+1). The answer's end is known as a length
    limit is: nothing is drafted beyond it.
    """
    at, time = 0, 0.0
    while at < len(trace):
        drafted, steps = policy.choose(trace, at, len(trace) - at - 1)
        accepted = trace.run(at, drafted)
        policy.observe(trace, at, drafted, steps, accepted)
        time += steps * c + v(drafted + 1)
        at += accepted + 1
    policy.end(trace)
    return at, time


def regrets(traces: Sequence[Trace], most: int, c: float, verify_cost: float = 0.0) -> dict[str, dict[str, float]]:
    """Tokens a one-token target step of each policy on these answers, in turn, and its regret: 1 - rate over that of the best fixed γ, which
    nobody knew before. Regret is negative for what beats every fixed γ.

    Args:
        traces: the answers, in serving order.
        most: the largest γ.
        c, verify_cost: of a draft step, and of each further token verified: v(n) = 1 + verify_cost·(n-1).

    Returns:
        `dict`: by `"constant-0"` (plain decoding), …, `"constant-<most>"`, `"heuristic"` and `"cost"`: `rate` and `regret`.

    Raises:
        ValueError: if there is no token in `traces`.
    """
    if not any(map(len, traces)):
        raise ValueError("`traces` holds no token; record the answers of at least one prompt.")
    policies: dict[str, Policy] = {f"constant-{gamma}": Fixed(gamma) for gamma in range(most + 1)}
    for name in ("heuristic", "cost"):
        policies[name] = Driven(DraftPolicy(name, most, c, verify_cost))
    rates = {}
    for name, policy in policies.items():
        rounds = [simulate(trace, policy, c, lambda n: 1 + verify_cost * (n - 1)) for trace in traces]
        rates[name] = sum(tokens for tokens, _ in rounds) / sum(time for _, time in rounds)
    best = max(rate for name, rate in rates.items() if name.startswith("constant"))
    return {name: {"rate": rate, "regret": 1 - rate / best} for name, rate in rates.items()}
