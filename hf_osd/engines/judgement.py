"""`Judgement` tells by an engine's own counters whether it accepts less of newer drafts than it accepted of those before."""

from __future__ import annotations

import math

from hf_osd.engines.counters import Counted

# Standard deviations from which a fall of acceptance is no chance: one in 1,500 comparisons, one-sided.
_SURE = 3.2
# Share of the variance of a round's accepted tokens that lies between answers: α of requests has a standard deviation near .17,
# which at α = .5 and four drafted tokens is .3 of 1.4.
_BETWEEN_ANSWERS = 0.2
# Rounds of an answer, where the engine does not count answers.
_ROUNDS = 64


class Judgement:
    """Compares what one engine accepts of drafts with what it accepted of the drafts before them.

    A draft that is replaced within `rounds` rounds is judged together with the next: what it was compared with stays what the next is compared with, so that a bad one is
    not hidden behind the next, nor becomes the measure for it.

    Args:
        rounds (`int`): rounds that the engine must have drafted before and after.

    Attributes:
        before (`Counted`): what was counted with the drafts before; with all, as long as there is nothing to compare.
        after (`Counted`, *optional*): what was counted with those that came since, if they are compared.
        proven (`int`, *optional*): number of the last of those before, to go back to.
    """

    def __init__(self, rounds: int):
        self._rounds = self._next = rounds
        self.before, self.after = Counted(answers=0), None
        self.proven: int | None = None
        self._has_fallen = False

    def add(self, counted: Counted):
        """Take in what was counted since the last time."""
        if self.after is None:
            self.before += counted
        else:
            self.after += counted

    def has_fallen(self) -> bool:
        """Tell, once, that fewer tokens are accepted than before, beyond chance. It is looked at after `rounds` rounds, and at each doubling."""
        if self.after is None or self._has_fallen or self.after.rounds < self._next:
            return False
        self._next = 2 * self.after.rounds  # each look is a chance to err
        self._has_fallen = fell(self.before, self.after)
        return self._has_fallen

    def replace(self, old: int | None, new: int):
        """Go on with another draft in the engine.

        Args:
            old (`int`, *optional*): number of the draft that was in it; `None` for one that cannot be gone back to.
            new (`int`): number of the one that is in it now.
        """
        if new == self.proven:  # it has come back
            self.after, self._has_fallen = None, False
            return
        if not self._has_fallen:
            counted = self.before if self.after is None else self.after
            if counted.rounds < self._rounds:
                return  # too few to be judged, or to judge by: the next ones are counted with them
            if self.after is None or not fell(self.before, self.after):
                self.before, self.proven = counted, old
        self.after, self._next, self._has_fallen = Counted(answers=0), self._rounds, False


def fell(before: Counted, after: Counted) -> bool:
    """Tell whether the mean number of accepted tokens a round fell beyond chance: a z-test of two means, with the variance that the counters tell and rounds of one answer alike."""
    if not before.rounds or not after.rounds:
        return False
    fall = before.accepted / before.rounds - after.accepted / after.rounds
    return fall > _SURE * math.sqrt(_variance_of_mean(before) + _variance_of_mean(after))


def _variance_of_mean(counted: Counted) -> float:
    """Estimate the variance of the mean over rounds that come in answers: 1 + (k - 1) ρ times that of independent rounds, where k is the number of rounds in the answer
    that a round is of, and ρ the share of variance between answers (Kish's design effect). A round is likelier to be of a long answer: for lengths that vary like
    geometric ones, k is twice their mean, less 1.
    """
    a_answer = min(_ROUNDS, counted.rounds) if counted.answers is None else counted.rounds / max(counted.answers, 1)
    alike = 1 + 2 * max(a_answer - 1, 0) * _BETWEEN_ANSWERS
    return alike * counted.variance / counted.rounds
