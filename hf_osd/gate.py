"""`Gate`: whether what was learnt may serve. It is given scores of drafts on requests held back from learning, and knows neither models nor clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from hf_osd.distributed import Ranks
from hf_osd.feedback import Feedback
from hf_osd.held_back import JUDGED_SHARE, Estimate, HeldBack, bootstrap, compare

# Of the rows that may be judged, the share for a look at every update; the rest pays for all that is held, every few updates.
_QUICK_SHARE = 1 / 3
# Requests that must have a say for a draft to be turned away.
_LEAST = 5
# What requests that got worse may have lost, in α averaged over all that are held back; and what a part of them may have. Between two drafts of like worth
# that mean is a few hundredths, for each gains where the other loses, and some part of several loses as much.
_HARM = 0.05
# Requests, in the order they came, that are compared with their floor by themselves: what came at another time cannot pay for them.
_PART = 10
# Updates from one full check to the next at most, whether or not learning has paid for it; and, after one that failed, updates that must each pass one.
_INTERVAL, _PROBATION = 32, 4

Judge = Callable[[Sequence[Feedback]], list[Tensor]]


class Rejected(Exception):
    """What was learnt may not serve. `since_check` if all that was learnt since the last full check is to go, not this update alone."""

    def __init__(self, reason: str, since_check: bool):
        super().__init__(reason)
        self.since_check = since_check


class Gate:
    """Compares a draft that wants to serve, request by request, with those before it.

    A *full check* judges all that is held back, whenever learning has paid for it, in two ways. The mean: α must not have fallen by more than the
    tolerance since the last full check; nor be lower than with the *static* draft, the one before any learning, unless it is on its way up. And the harm: a
    draft must not fall below the *floor* of requests, neither on those that came at about the same time nor, beyond what is noise, on scattered ones; so that
    traffic which is easily learnt cannot pay for what it breaks elsewhere. The floor of a request is what the static draft has there, or what served it as
    it came if that was less: what had been lost by then is no harm of what is learnt since, or a domain that was forgotten could not be learnt again. Nor is
    it a gain to be back where the static draft is, which could pay for others. Harm is not judged against the last check alone: small losses, of which each
    may be chance, would add up. Between full checks a few of the requests are judged at each update, enough to see a draft that fell; after one that failed
    each update is checked in full, until several have passed.

    Args:
        held (`HeldBack`): the requests.
        tolerance (`float`): by how much α may fall.
        judge (`Judge`), judge_static (`Judge`): expected acceptance of the draft that wants to serve, and of the static one, at each position: `(N,)` a
            request.
        ranks (`Ranks`, *optional*): with which the requests are pooled, each having its own; all come to the same decision.
    """

    def __init__(
        self, held: HeldBack, tolerance: float, judge: Judge, judge_static: Judge, ranks: Ranks | None = None
    ):
        self.held, self.tolerance, self._judge, self._judge_static = held, tolerance, judge, judge_static
        self._ranks = ranks or Ranks()
        self._checked: dict[Feedback, Tensor] = {}  # scores at the last full check that was passed
        self._static: dict[Feedback, Tensor] = {}
        self._forgiven: dict[Feedback, float] = {}  # how far below the static draft its floor is, in α
        self._sample: dict[Feedback, Tensor] = {}  # what each update is judged by, with scores of what serves
        # Whether, on all that is held back, the static draft is worse than that of the last check: then it is nothing to go back to.
        self.static_is_worse = False
        self._updates = self._probation = 0  # since the last full check; that must each pass one

    def check(self, learned_rows: int, update_rows: int) -> Estimate | None:
        """Judge the draft that has learnt `learned_rows` in all, `update_rows` of them in this update. The estimate of its α after a full check.

        Raises:
            Rejected: if it may not serve.
        """
        self._updates += 1
        if not self._due(learned_rows):
            self._look()
            return None
        try:
            estimate = self._check_all(update_rows)
        except Rejected:
            self._updates, self._probation = 0, _PROBATION
            raise
        self._updates, self._probation = 0, max(self._probation - 1, 0)
        return estimate

    def went_back(self, to_static: bool):
        """After a failed check: the draft of the last one serves again, or the static one. It is what is compared with from now on, also on requests that came
        since, which a draft that is no more may have served better."""
        if to_static:
            self._checked = dict(self._static)
            return
        new = [request for request in self.held.requests() if request not in self._checked]
        for request, score in zip(new, self._scores(self._judge, new), strict=True):
            self._checked[request] = score
            if request in self._static:
                self._forgiven[request] = max(self._forgiven[request], lost(self._static[request], score))

    def _due(self, learned_rows: int) -> bool:
        """Whether it is time for a full check: [`HeldBack.due`], of what all ranks hold, have judged and have learnt; or it must not be put off."""
        rows, judged = self._ranks.sum(sum(held.rows for held in self.held.held()), self.held.judged_rows)
        must = self._probation > 0 or self._updates >= _INTERVAL
        return rows > 0 and (must or rows <= JUDGED_SHARE * learned_rows - judged)

    def _look(self):
        requests = list(self._sample)
        scores = self._scores(self._judge, requests)
        before = self._ranks.gather(list(self._sample.values()))
        self._compare(before, self._ranks.gather(scores), "what serves", since_check=False)
        self._sample = dict(zip(requests, scores, strict=True))

    def _check_all(self, update_rows: int) -> Estimate:
        requests = self.held.requests()
        scores = self._scores(self._judge, requests)
        new = [request for request in requests if request not in self._static]
        for request, score in zip(new, self._scores(self._judge_static, new), strict=True):
            self._static[request], self._forgiven[request] = score, lost(score, request.overlap)
        # Those that came after the last check are compared with the draft that served them.
        before = [self._checked.get(request, request.overlap) for request in requests]
        known = [torch.where(b.isnan(), b, score) for b, score in zip(before, scores, strict=True)]
        there = [torch.where(b.isnan(), b, self._static[request]) for b, request in zip(before, requests, strict=True)]
        was, known, there = self._ranks.gather(before), self._ranks.gather(known), self._ranks.gather(there)
        static, now = self._ranks.gather([self._static[request] for request in requests]), self._ranks.gather(scores)
        floor, floor_then = (self._ranks.gather(self._floor(requests, of)) for of in (scores, before))
        self.static_is_worse = compare(was, there).surely_worse_than(self.tolerance)
        self._compare(was, known, "the draft of the last check", since_check=True)
        # What is on its way up is let through, for it was below before.
        if compare(was, known).difference <= 0:
            self._compare(static, now, "the static draft", since_check=True)
        for part in _parts(len(now)):
            if compare(was[part], known[part]).difference <= 0:
                # Several are compared, so chance must be kept out of each the more.
                tolerance = max(self.tolerance, _HARM)
                self._compare(floor[part], now[part], "their floor", since_check=True, level=0.98, tolerance=tolerance)
        harm, low = harm_of(floor, now)
        if len(now) >= _LEAST and low > _HARM and harm >= harm_of(floor_then, was)[0]:
            raise Rejected(
                f"requests on which it is below their floor lost {harm:.3f} in α, averaged over {len(now)} held back",
                since_check=True,
            )
        self._checked = dict(zip(requests, scores, strict=True))
        self._static, self._forgiven = (
            {request: of[request] for request in requests} for of in (self._static, self._forgiven)
        )
        self._sample = {request: self._checked[request] for request in self._few(requests, update_rows)}
        served = [SimpleNamespace(overlap=overlap) for overlap in self._ranks.gather([r.overlap for r in requests])]
        return Estimate.of(served, now)

    def _floor(self, requests: list[Feedback], scores: list[Tensor]) -> list[Tensor]:
        """What `scores` of requests are compared with: the static draft's, moved towards them by no more than what is forgiven."""
        return [
            self._static[request] - min(self._forgiven[request], lost(self._static[request], score))
            for request, score in zip(requests, scores, strict=True)
        ]

    def _few(self, requests: list[Feedback], update_rows: int) -> list[Feedback]:
        """As many as each update pays for, spread over all that is held."""
        rows, few = _QUICK_SHARE * JUDGED_SHARE * update_rows / self._ranks.size, []
        step = max(1, round(sum(len(request) for request in requests) / max(rows, 1)))
        for request in requests[step // 2 :: step]:
            if (rows := rows - len(request)) < 0:
                break
            few.append(request)
        return few

    def _scores(self, judge: Judge, requests: list[Feedback]) -> list[Tensor]:
        with self._ranks.together():
            scores = judge(requests) if requests else []
        self.held.note_judged(sum(int((~score.isnan()).sum()) for score in scores))
        return scores

    def _compare(
        self,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        than: str,
        since_check: bool,
        level: float = 0.9,
        tolerance: float | None = None,
    ):
        found = compare(before, after, level)
        if found.requests >= _LEAST and found.surely_worse_than(self.tolerance if tolerance is None else tolerance):
            raise Rejected(
                f"its α on {found.requests} requests held back is {found.after:.3f}, and {than} {found.before:.3f} there ({found.difference:+.3f}, "
                f"{found.low:+.3f} to {found.high:+.3f})",
                since_check,
            )


def _parts(count: int) -> list[slice]:
    """`count` things in order, in parts of about `_PART`."""
    parts = max(count // _PART, 1)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def lost(reference: Tensor, score: Tensor) -> float:
    """How much less the mean of `score`, `(N,)`, is than that of `reference`, at the positions known of both; 0 where it is not less or none is."""
    both = ~(reference.isnan() | score.isnan())
    return max(float((reference - score)[both].mean()), 0.0) if both.any() else 0.0


def harm_of(reference: Sequence[Tensor], scores: Sequence[Tensor]) -> tuple[float, float]:
    """What requests lost against `reference`, in α, those that gained counting as 0: the mean over requests, and the low end of its interval over
    requests, which is infinitely low for fewer than two."""
    known = [(was, now) for was, now in zip(reference, scores, strict=True) if not (was + now).isnan().all()]
    _, harm, low, _ = bootstrap([torch.tensor([lost(was, now)]) for was, now in known], 0.9, seed=0)
    return harm, low
