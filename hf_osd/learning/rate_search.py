"""`RateSearch`: finds the learning rate, and how often to pass over new requests, on the first requests of a draft."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from hf_osd.distill.scoring import Judged
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.contenders import Contenders, Point
from hf_osd.learning.gate import Verdict
from hf_osd.learning.rate import Rate, Trial
from hf_osd.learning.rollback import Rollback
from hf_osd.learning.schedule import Schedule

logger = logging.getLogger(__name__)


class RateSearch:
    """Learns from one half of the first requests at several rates, scores each on the other half, and goes on from the best.

    Args:
        contenders (`Contenders`), rollback (`Rollback`), rate (`Rate`), schedule (`Schedule`): the learner's.
        train (`Callable[[list[Feedback]], None]`): passes once over requests; raises ArithmeticError if the loss is not finite.
    """

    def __init__(
        self,
        contenders: Contenders,
        rollback: Rollback,
        rate: Rate,
        schedule: Schedule,
        train: Callable[[list[Feedback]], None],
    ):
        self._contenders, self._student, self._ranks = contenders, contenders.student, contenders.ranks
        self._rollback, self._rate, self._schedule, self._train = rollback, rate, schedule, train

    def is_possible(self, new: list[Feedback]) -> bool:
        """Tell whether all ranks together have requests to try rates on, and others to score them on."""
        learnt, judged = self._ranks.sum(len(new) // 2, len(new) - len(new) // 2)
        return min(learnt, judged) > 0

    def run(self, new: list[Feedback]) -> tuple[Verdict, bool]:
        """Find the rate on `new`, oldest first.

        Returns:
            `(verdict, gained)`: of the gate on the best draft, as [`Contenders.decide`] returns it.

        Raises:
            ArithmeticError: if the loss is not finite at any rate.
        """
        # 1. Halve the requests, and score the draft that all begin from.
        half = len(new) // 2
        learnt, judged = new[:half], self._schedule.within(new[half:])
        start = self._student.snapshot()
        with self._ranks.together():
            static = self._contenders.score(judged, self._contenders.static)
        before = self._gathered(static)
        if not len(before):
            return Verdict.WAIT, False  # there is nothing to score on
        # 2. As many requests and passes as there is time for.
        rates = self._rate.to_try(before)
        learnt = self._schedule.within(learnt, rates)
        tokens, beside = (rates * self._schedule.tokens(part) for part in (learnt, judged))
        most = self._schedule.passes(round(self._student.config.passes), tokens, beside)
        # 3. Try the rates, from the fastest on.
        trials: list[Trial] = []
        best: tuple[Point, list[Judged]] | None = None
        for rate in self._rate.ladder:
            self._student.restore(start)
            self._student.set_rate(rate)
            done = 0
            for passes in sorted({min(n, most) for n in self._rate.tried_passes}):
                try:
                    self._train(learnt * (passes - done))
                    done, point = passes, self._contenders.point()
                except ArithmeticError:  # too fast by far
                    break
                with self._ranks.together():
                    scores = self._contenders.score(judged, point)
                trials.append(Trial(rate, passes, self._gathered(scores)))
                if self._rate.prefers(trials[-1], before):
                    best = point, scores
            if self._rate.is_enough(before):
                break
        if best is None:
            raise ArithmeticError("The loss was not finite at any learning rate that was tried.")
        # 4. Go on from the best, which is the first candidate.
        self._rate.settle(len(trials), before, most)
        logger.info("Learning rate %.1e: %s.", self._rate.value, self._rate.reason)
        point, scores = best
        self._student.restore(point.snapshot)
        self._rollback.begin(learnt)
        return self._contenders.choose(point, len(trials), static, scores)

    def _gathered(self, judged: list[Judged]) -> Tensor:
        """Σ min(p, q) at all positions of all ranks that have a target, request by request: `(N,)`."""
        parts = self._ranks.gather([one.shared[~one.overlap.isnan()].nan_to_num(0.0) for one in judged])
        return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *parts])
