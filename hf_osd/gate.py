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
# What requests that got worse may have lost, in α averaged over all that are held back. Between two drafts of like worth that mean is a few hundredths,
# for each gains where the other loses.
_HARM = 0.05
# Requests, in the order they came, that are compared with the static draft by themselves: what came at another time cannot pay for them.
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
    tolerance since the last full check. And the harm: it must not be worse than the *static* draft, the one before any learning, neither on those that came
    at about the same time nor, beyond what is noise, on scattered ones; so that traffic which is easily learnt cannot pay for what it breaks elsewhere.
    Harm is not judged against the last check alone: small losses, of which each may be chance, would add up. Between full checks a few of the requests are
    judged at each update, enough to see a draft that fell; after one that failed each update is checked in full, until several have passed.

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
        self._static |= zip(new, self._scores(self._judge_static, new), strict=True)
        static = [self._static[request] for request in requests]
        # Those that came after the last check are compared with the draft that served them.
        before = [self._checked.get(request, request.overlap) for request in requests]
        known = [torch.where(b.isnan(), b, score) for b, score in zip(before, scores, strict=True)]
        was, known = self._ranks.gather(before), self._ranks.gather(known)
        reference, now = self._ranks.gather(static), self._ranks.gather(scores)
        there = [torch.where(b.isnan(), b, r) for b, r in zip(was, reference, strict=True)]
        self.static_is_worse = compare(was, there).surely_worse_than(self.tolerance)
        self._compare(was, known, "the draft of the last check", since_check=True)
        for part in _parts(len(now)):
            # What is on its way up again is let through: a domain may come that was forgotten when it did not.
            if compare(was[part], known[part]).difference <= 0:
                # Several are compared, so chance must be kept out of each the more.
                self._compare(reference[part], now[part], "the static draft", since_check=True, level=0.98)
        harm, low = harm_of(reference, now)
        if len(now) >= _LEAST and low > _HARM and harm >= harm_of(reference, was)[0]:
            raise Rejected(
                f"requests on which it is worse than the static draft lost {harm:.3f} in α, averaged over {len(now)} held back",
                since_check=True,
            )
        self._checked = dict(zip(requests, scores, strict=True))
        self._static = {request: self._static[request] for request in requests}
        self._sample = {request: self._checked[request] for request in self._few(requests, update_rows)}
        served = [SimpleNamespace(overlap=overlap) for overlap in self._ranks.gather([r.overlap for r in requests])]
        return Estimate.of(served, now)

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
        self, before: Sequence[Tensor], after: Sequence[Tensor], than: str, since_check: bool, level: float = 0.9
    ):
        found = compare(before, after, level)
        if found.requests >= _LEAST and found.surely_worse_than(self.tolerance):
            raise Rejected(
                f"its α on {found.requests} requests held back is {found.after:.3f}, and {than} had {found.before:.3f} there ({found.difference:+.3f}, "
                f"{found.low:+.3f} to {found.high:+.3f})",
                since_check,
            )


def _parts(count: int) -> list[slice]:
    """`count` things in order, in parts of about `_PART`."""
    parts = max(count // _PART, 1)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def harm_of(reference: Sequence[Tensor], scores: Sequence[Tensor]) -> tuple[float, float]:
    """What requests lost against `reference`, in α, those that gained counting as 0: the mean over requests, and the low end of its interval over
    requests, which is infinitely low for fewer than two."""
    lost = []
    for was, now in zip(reference, scores, strict=True):
        both = ~(was.isnan() | now.isnan())
        if both.any():
            lost.append((was - now)[both].mean().clamp(min=0.0)[None])
    _, harm, low, _ = bootstrap(lost, 0.9, seed=0)
    return harm, low
