"""`Contenders`: the drafts that are compared before one may serve: the static one, the accepted one, the candidate; and what serves of them. It knows their
weights and what they say; when to learn, and on what, is the learner's, and the rule of it the gate's."""

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

# Requests of before on which a candidate is judged before it is accepted.
_REMEMBERED = 32


@dataclass
class Point:
    """A draft that was learnt: the `weights` that would serve, in the serving dtype, and what it takes to go on learning from there (`snapshot`)."""

    weights: dict[str, Tensor]
    snapshot: Any


class Contenders:
    """Three drafts of one learner, judged on each request before it is learnt, and what serves of them.

    Args:
        student (`Student`): learns, and scores the drafts. Its config says whether there is a gate, and how strict.
        ranks (`RankGroup`): of the job.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes weights that are to serve.
        judged (`Callable[[Sequence[Feedback], float], None]`, *optional*): told what was judged, by one draft, and the seconds it took.
        thinned (`Callable[[list[Feedback]], list[Feedback]]`, *optional*): gives those of the remembered requests that there is time to judge by.

    Attributes:
        pause (`Callable[[], None]`, *optional*): called after each judging.
        gate (`Gate`, *optional*): without one all that is learnt serves at once, and nothing is judged.
        shadow (`Shadow`): how what served did beside the static draft.
        changes (`int`): times that other weights went out.
        accepted, dropped (`int`): candidates.
    """

    def __init__(
        self,
        student: Student,
        ranks: RankGroup,
        serve: Callable[[Mapping[str, Tensor]], None],
        judged: Callable[[Sequence[Feedback], float], None] = lambda requests, seconds: None,
        thinned: Callable[[list[Feedback]], list[Feedback]] = lambda requests: requests,
    ):
        config = student.config
        self.student, self.ranks, self._serve = student, ranks, serve
        self._judged, self._thinned = judged, thinned
        self._dtypes = {name: weight.dtype for name, weight in student.initial.items()}
        self.pause: Callable[[], None] | None = None
        self._max_age = config.buffer_age
        self.gate = Gate(config.gate_tolerance, ranks) if config.gate else None
        self.shadow, self.remembered = Shadow(ranks), Reservoir(_REMEMBERED, config.seed)
        self.static = self._accepted = self._out = Point(student.initial, student.snapshot())
        self._candidate: Point | None = None
        # The static draft's scores on what is remembered.
        self._known: weakref.WeakKeyDictionary[Feedback, Tensor] = weakref.WeakKeyDictionary()
        self.changes = self.accepted = self.dropped = 0

    @property
    def serving(self) -> Point:
        """What may serve."""
        return self.static if self.serves_static else self._accepted

    @property
    def serves_static(self) -> bool:
        """Whether the static draft serves though another one was accepted."""
        return self.gate is not None and self.gate.serves_static

    def serve(self):
        """Serve what may serve; without a gate what has been learnt."""
        self.serve_again()
        self.changes += 1

    def serve_again(self):
        """Put out once more what serves already: it may not have come to serve on all ranks."""
        self._serve(self.student.serving_weights() if self.gate is None else self.serving.weights)

    def decide(self, new: Sequence[Feedback]) -> tuple[Verdict, bool]:
        """Judge all three on requests that none of them has learnt, and do what the gate says.

        Returns:
            `(verdict, gained)`: what became of the candidate, and whether it was better beyond chance. After `DROP` what learns is the accepted draft again.
        """
        if self.gate is None:
            return Verdict.WAIT, False
        with self.ranks.together():
            static = self._scores(new, self.static)
            accepted = static if self._accepted is self.static else self._scores(new, self._accepted)
            candidate = None if self._candidate is None else self._scores(new, self._candidate)
        return self._see_through(static, accepted, candidate)

    def propose(self):
        """What has been learnt is the candidate."""
        if self.gate is not None:
            self._candidate = self.point()

    def choose(
        self, candidate: Point, of: int, static: Sequence[Judged], said: Sequence[Judged]
    ) -> tuple[Verdict, bool]:
        """The candidate is the best `of` several on the requests by which these are judged; then as `decide`."""
        if self.gate is None:
            return Verdict.WAIT, False
        self._candidate = candidate
        self.gate.begin(choices=of)
        scores = [judged.overlap for judged in static]
        return self._see_through(scores, scores, [judged.overlap for judged in said])

    def remember(self, learnt: Sequence[Feedback]):
        """Keep some of what is about to be learnt, to see later that it is not unlearnt; no longer than the buffer may."""
        if self._max_age is not None:
            now = time.monotonic()
            self.remembered.discard([one for one in self.remembered.requests() if now - one.created > self._max_age])
        for request in learnt if self.gate is not None else []:
            self.remembered.offer(request)

    def reset(self, weights: Mapping[str, Tensor]):
        """Weights that were trained elsewhere serve already, and what learns goes on from them: all are compared with these from now on."""
        self.student.set_weights(weights)
        self.static = self._accepted = self._out = self.point()
        self.student.initial = self.static.weights  # those before need not be kept
        self._candidate = None
        self._known.clear()
        if self.gate is not None:
            self.gate.reset()

    def point(self) -> Point:
        """What has been learnt so far."""
        with torch.no_grad():
            weights = {n: w.to(self._dtypes[n], copy=True) for n, w in self.student.serving_weights().items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise ArithmeticError(
                "What was learnt has weights that are not finite. Lower the learning rate if that comes again."
            )
        return Point(weights, self.student.snapshot())

    def judge(self, requests: Sequence[Feedback], point: Point, whole: bool = True) -> list[Judged]:
        """What a draft says of requests, see [`hf_osd.distill.scoring.judge`]."""
        start = time.perf_counter()
        judged = self.student.score(list(requests), point.weights, whole) if requests else []
        self._judged(requests, time.perf_counter() - start)
        if self.pause is not None:
            self.pause()
        return judged

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: the accepted draft's weights, and plain values."""
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
        self._accepted = self.static if same else Point(dict(weights), self.student.snapshot_of(weights))
        self._candidate = None
        self.shadow.load_state(values["shadow"])
        self.accepted, self.dropped = values["accepted"], values["dropped"]
        if self.gate is not None and values["gate"] is not None:
            self.gate.load_state(values["gate"])
        self._out = self.serving

    def _see_through(
        self, static: list[Tensor], accepted: list[Tensor], candidate: list[Tensor] | None
    ) -> tuple[Verdict, bool]:
        self.shadow.observe(static, static if self.serves_static else accepted)
        verdict, gained = self.gate.observe(static, accepted, candidate), False
        if verdict is Verdict.ACCEPT and self._has_unlearnt():
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
        except Exception:  # they cannot serve: what does is the accepted draft again
            self._accepted, self._candidate = self._out, None
            self.gate.reset()
            raise
        self._out = self.serving
        if self.serves_static:
            logger.warning(
                "What was learnt is worse than the draft before any learning on what comes now; that one serves until this is mended."
            )

    def _has_unlearnt(self) -> bool:
        """Whether the candidate is worse than the static draft on requests of before. Where that one knew next to nothing there is nothing to unlearn."""
        requests = self._thinned(self.remembered.requests())
        new = [request for request in requests if request not in self._known]
        with self.ranks.together():
            for request, score in zip(new, self._scores(new, self.static), strict=True):
                self._known[request] = score
        static = [self._known[request] for request in requests]
        if not self.gate.may_break(static):
            return False
        with self.ranks.together():
            candidate = self._scores(requests, self._candidate)
        return self.gate.breaks(static, candidate)

    def _scores(self, requests: Sequence[Feedback], point: Point) -> list[Tensor]:
        return [judged.overlap for judged in self.judge(requests, point, whole=False)]
