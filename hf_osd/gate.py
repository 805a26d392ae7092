"""`Gate`: whether what was learnt may serve. It is given scores of drafts on requests held back from learning, and knows neither models nor clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_osd.feedback import Feedback
from hf_osd.held_back import JUDGED_SHARE, Estimate, HeldBack, bootstrap, compare

# Of the rows that may be judged, the share for a look at every update; the rest pays for all that is held, every few updates.
_QUICK_SHARE = 1 / 3
# Requests that must have a say for a draft to be turned away.
_LEAST = 5
# What requests that got worse may have lost, in α averaged over all that are held back. Between two drafts of like worth that mean is a few hundredths,
# for each gains where the other loses.
_HARM = 0.05

Judge = Callable[[Sequence[Feedback]], list[Tensor]]


class Rejected(Exception):
    """What was learnt may not serve. `since_check` if all that was learnt since the last full check is to go, not this update alone."""

    def __init__(self, reason: str, since_check: bool):
        super().__init__(reason)
        self.since_check = since_check


class Gate:
    """Compares a draft that wants to serve, request by request, with those before it.

    A *full check* judges all that is held back, whenever learning has paid for it, in two ways. The mean: α must not have fallen by more than the
    tolerance since the last full check. And the harm: requests on which it is worse than the *static* draft, the one before any learning, must not have
    lost more than at the last check, beyond what is noise; so that traffic which is easily learnt cannot pay for what it breaks elsewhere. Between
    full checks a few of the requests are judged at each update, enough to see a draft that fell.

    Args:
        held (`HeldBack`): the requests.
        tolerance (`float`): by how much α may fall.
        judge (`Judge`), judge_static (`Judge`): expected acceptance of the draft that wants to serve, and of the static one, at each position: `(N,)` a
            request.
    """

    def __init__(self, held: HeldBack, tolerance: float, judge: Judge, judge_static: Judge):
        self.held, self.tolerance, self._judge, self._judge_static = held, tolerance, judge, judge_static
        self._checked: dict[Feedback, Tensor] = {}  # scores at the last full check that was passed
        self._static: dict[Feedback, Tensor] = {}
        self._sample: dict[Feedback, Tensor] = {}  # what each update is judged by, with scores of what serves

    def check(self, learned_rows: int, update_rows: int) -> Estimate | None:
        """Judge the draft that has learnt `learned_rows` in all, `update_rows` of them in this update. The estimate of its α after a full check.

        Raises:
            Rejected: if it may not serve.
        """
        if self.held.due(learned_rows):
            return self._check_all(update_rows)
        self._look()
        return None

    def _look(self):
        requests = list(self._sample)
        scores = self._scores(self._judge, requests)
        self._compare(list(self._sample.values()), scores, "what serves", since_check=False)
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
        self._compare(before, known, "the draft of the last check", since_check=True)
        harm, low = harm_of(static, scores)
        harm_before, _ = harm_of(static, before)
        if len(requests) >= _LEAST and low > max(_HARM, harm_before):
            raise Rejected(
                f"requests on which it is worse than the static draft lost {harm:.3f} in α, averaged over {len(requests)} held back ({harm_before:.3f} at "
                "the last check)",
                since_check=True,
            )
        self._checked = dict(zip(requests, scores, strict=True))
        self._static = {request: self._static[request] for request in requests}
        self._sample = {request: self._checked[request] for request in self._few(requests, update_rows)}
        return Estimate.of(requests, scores)

    def _few(self, requests: list[Feedback], update_rows: int) -> list[Feedback]:
        """As many as each update pays for, spread over all that is held."""
        rows, few = _QUICK_SHARE * JUDGED_SHARE * update_rows, []
        step = max(1, round(sum(len(request) for request in requests) / max(rows, 1)))
        for request in requests[step // 2 :: step]:
            if (rows := rows - len(request)) < 0:
                break
            few.append(request)
        return few

    def _scores(self, judge: Judge, requests: list[Feedback]) -> list[Tensor]:
        scores = judge(requests) if requests else []
        self.held.note_judged(sum(int((~score.isnan()).sum()) for score in scores))
        return scores

    def _compare(self, before: Sequence[Tensor], after: Sequence[Tensor], than: str, since_check: bool):
        found = compare(before, after)
        if found.requests >= _LEAST and found.surely_worse_than(self.tolerance):
            raise Rejected(
                f"its α on {found.requests} requests held back is {found.after:.3f}, and {than} had {found.before:.3f} there ({found.difference:+.3f}, "
                f"{found.low:+.3f} to {found.high:+.3f})",
                since_check,
            )


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
