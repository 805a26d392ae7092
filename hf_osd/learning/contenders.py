"""`Contenders`: the three drafts that are compared before one may serve, the static, the accepted and the candidate, and the one that serves. It knows their
weights and their scores; when to learn, and on what, is the learner's, and the rule is the gate's."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged
from hf_osd.distill.student import Student
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.gate import Gate, Verdict
from hf_osd.learning.shadow import Reservoir, Shadow

logger = logging.getLogger(__name__)

# Requests that have been learnt, on which a candidate is scored once more before it is accepted.
_REMEMBERED = 32


@dataclass
class Point:
    """A draft at one moment: its `weights` as they would serve, and the student's `snapshot`, to go on learning from there."""

    weights: dict[str, Tensor]
    snapshot: Any


class Contenders:
    """Scores three drafts of one learner on each request before it is learnt, and serves the one that the gate lets serve.

    Args:
        student (`Student`): learns, and scores the drafts. Its config decides whether there is a gate, and how strict it is.
        ranks (`RankGroup`): of the job.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes weights that are to serve.
        note_scored (`Callable[[Sequence[Feedback], float], None]`, *optional*): called with the requests that one draft was scored on, and the seconds it took.
        thinned (`Callable[[list[Feedback]], list[Feedback]]`, *optional*): chooses the remembered requests that there is time to score a draft on.

    Attributes:
        pause (`Callable[[], None]`, *optional*): called after each scoring.
        gate (`Gate`, *optional*): without one all that is learnt serves at once, and nothing is scored.
        shadow (`Shadow`): compares what served with the static draft.
        changes (`int`): times that other weights went out.
        accepted, dropped (`int`): candidates.
    """

    def __init__(
        self,
        student: Student,
        ranks: RankGroup,
        serve: Callable[[Mapping[str, Tensor]], None],
        note_scored: Callable[[Sequence[Feedback], float], None] = lambda requests, seconds: None,
        thinned: Callable[[list[Feedback]], list[Feedback]] = lambda requests: requests,
    ):
        config = student.config
        self.student, self.ranks, self._serve = student, ranks, serve
        self._note_scored, self._thinned = note_scored, thinned
        self._dtypes = {name: weight.dtype for name, weight in student.initial.items()}
        self.pause: Callable[[], None] | None = None
        self._max_age = config.buffer_age
        self.gate = Gate(config.gate_tolerance, ranks) if config.gate else None
        self.shadow, self.remembered = Shadow(ranks), Reservoir(_REMEMBERED, config.seed)
        self.static = self._accepted = self._out = self._as_served(student.initial)
        self._candidate: Point | None = None
        # The static draft's scores on what is remembered.
        self._known: weakref.WeakKeyDictionary[Feedback, Tensor] = weakref.WeakKeyDictionary()
        self.changes = self.accepted = self.dropped = 0

    @property
    def serving(self) -> Point:
        """The draft that may serve."""
        return self.static if self.serves_static else self._accepted

    @property
    def serves_static(self) -> bool:
        """The static draft serves though another was accepted."""
        return self.gate is not None and self.gate.serves_static

    def serve(self):
        """Serve the draft that may; without a gate the newest."""
        self.serve_again()
        self.changes += 1

    def serve_again(self):
        """Serve once more the draft that serves already: it may not serve on all ranks."""
        self._serve(self.student.serving_weights() if self.gate is None else self.serving.weights)

    def decide(self, new: Sequence[Feedback]) -> tuple[Verdict, bool]:
        """Score all three on requests that none of them has learnt, and follow the gate's verdict.

        Returns:
            `(verdict, gained)`: the verdict on the candidate, and whether it was better beyond chance. After `DROP` the student is the accepted draft again.
        """
        if self.gate is None:
            return Verdict.WAIT, False
        with self.ranks.together():
            static = self._scores(new, self.static)
            accepted = static if self._accepted is self.static else self._scores(new, self._accepted)
            candidate = None if self._candidate is None else self._scores(new, self._candidate)
        return self._follow_gate(static, accepted, candidate)

    def propose(self):
        """Make the newest draft the candidate."""
        if self.gate is not None:
            self._candidate = self._as_served(self.point().weights)

    def choose(
        self, candidate: Point, of: int, static: Sequence[Judged], judged: Sequence[Judged]
    ) -> tuple[Verdict, bool]:
        """Make a candidate of the best `of` several on some requests, by the scores of static and candidate there; then as `decide`."""
        if self.gate is None:
            return Verdict.WAIT, False
        self._candidate = self._as_served(candidate.weights)
        self.gate.begin(choices=of)
        scores = [one.overlap for one in static]
        return self._follow_gate(scores, scores, [one.overlap for one in judged])

    def remember(self, learnt: Sequence[Feedback]):
        """Keep some of the requests that are about to be learnt, to see later that they are not unlearnt; no longer than the buffer may."""
        if self._max_age is not None:
            now = time.monotonic()
            self.remembered.discard([one for one in self.remembered.requests() if now - one.created > self._max_age])
        for request in learnt if self.gate is not None else []:
            self.remembered.offer(request)

    def reset(self, weights: Mapping[str, Tensor]):
        """Go on from weights that were trained elsewhere and serve already: they are the static and the accepted draft from now on."""
        self.student.set_weights(weights)
        self.static = self._accepted = self._out = self.point()
        self.student.initial = self.static.weights  # those before need not be kept
        self._candidate = None
        self._known.clear()
        if self.gate is not None:
            self.gate.reset()

    def point(self) -> Point:
        """Hold on to the newest draft.

        Raises:
            ArithmeticError: if a weight is not finite.
        """
        with torch.no_grad():
            weights = {n: w.to(self._dtypes[n]) for n, w in self.student.serving_weights().items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ArithmeticError(
                "What was learnt has weights that are not finite. Lower the learning rate if that comes again."
            )
        return Point(weights, self.student.snapshot())

    def score(self, requests: Sequence[Feedback], point: Point, whole: bool = True) -> list[Judged]:
        """Score a draft on requests, see [`hf_osd.distill.scoring.judge`]."""
        start = time.perf_counter()
        judged = self.student.score(list(requests), point.weights, whole) if requests else []
        self._note_scored(requests, time.perf_counter() - start)
        if self.pause is not None:
            self.pause()
        return judged

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Copy what a restart needs: the accepted draft's weights, and plain values."""
        accepted = self._accepted if self.gate is not None else self.point()  # what serves, to one that has a gate
        return {name: weight.clone() for name, weight in accepted.weights.items()}, {
            "gate": None if self.gate is None else self.gate.state(),
            "shadow": self.shadow.state(),
            "accepted": self.accepted,
            "dropped": self.dropped,
        }

    def load_state(self, weights: Mapping[str, Tensor], values: dict):
        """Go on from `state()`. A candidate that was waiting is given up."""
        same = all(torch.equal(weight, self.static.weights[name].to(weight)) for name, weight in weights.items())
        self._accepted = self.static if same else self._as_served(weights)
        self._candidate = None
        self.shadow.load_state(values["shadow"])
        self.accepted, self.dropped = values["accepted"], values["dropped"]
        if self.gate is not None and values["gate"] is not None:
            self.gate.load_state(values["gate"])
        self._out = self.serving

    def _as_served(self, weights: Mapping[str, Tensor]) -> Point:
        """Make a point from which learning begins anew: weights and average as they were trained would be two copies more for as long as it serves, or waits for its verdict."""
        return Point(dict(weights), self.student.snapshot_of(weights))

    def _follow_gate(
        self, static: list[Tensor], accepted: list[Tensor], candidate: list[Tensor] | None
    ) -> tuple[Verdict, bool]:
        self.shadow.observe(static, static if self.serves_static else accepted)
        verdict, gained = self.gate.observe(static, accepted, candidate), False
        if verdict is Verdict.ACCEPT and self._regresses():
            verdict = Verdict.WAIT
            self.gate.begin()
        elif verdict is Verdict.ACCEPT:
            gained = self.gate.accept()
            self._accepted, self._candidate = self._candidate, None
            self.accepted += 1
        elif verdict is Verdict.DROP:
            self.student.restore(self._accepted.snapshot)
            self._candidate = None
            self.gate.begin()
            self.dropped += 1
        if self.serving is not self._out:
            self._swap()
        return verdict, gained

    def _swap(self):
        try:
            with self.ranks.together():
                self.serve()
        except Exception:  # it cannot serve: the one that does is the accepted draft again
            self._accepted, self._candidate = self._out, None
            self.gate.reset()
            raise
        self._out = self.serving
        if self.serves_static:
            logger.warning(
                "What was learnt is worse than the draft before any learning on what comes now; that one serves until this is mended."
            )

    def _regresses(self) -> bool:
        """Tell whether the candidate is worse than the static draft on remembered requests. It is not scored where that one has next to nothing to lose."""
        requests = self._thinned(self.remembered.requests())
        new = [request for request in requests if request not in self._known]
        with self.ranks.together():
            for request, score in zip(new, self._scores(new, self.static), strict=True):
                self._known[request] = score
        static = [self._known[request] for request in requests]
        if not self.gate.can_regress(static):
            return False
        with self.ranks.together():
            candidate = self._scores(requests, self._candidate)
        return self.gate.regresses(static, candidate)

    def _scores(self, requests: Sequence[Feedback], point: Point) -> list[Tensor]:
        return [judged.overlap for judged in self.score(requests, point, whole=False)]
