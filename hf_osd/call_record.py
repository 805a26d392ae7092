"""`CallRecord`: what one generate call observed, round by round, to be sealed into [`Feedback`]. It outlives the call's generator."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback, SparseRows
from hf_osd.stats import CallStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.integration import RunningCall
    from hf_osd.translation import Translation


class CallRecord:
    """One call's observations.

    Args:
        prompt (`Tensor` int64 `(L,)`): the prompt as the draft reads it.
        translation (`Translation`): between the target's tokens, in which rounds are told, and the draft's, in which they are kept.
        sampled (`bool`): whether the call samples.
        processed (`bool`): whether logits processors stand between the models' distributions and what was chosen from.
        capture (`bool`): whether to keep the target's distributions; statistics are kept anyway.
        top_k (`int`), dtype (`torch.dtype`): of the distributions kept.
        source (`Tensor` int64 `(S,)`, *optional*): what the draft's encoder reads, if it has one.
    """

    def __init__(
        self,
        prompt: Tensor,
        translation: Translation,
        sampled: bool,
        processed: bool,
        capture: bool,
        top_k: int,
        dtype: torch.dtype,
        source: Tensor | None = None,
    ):
        self.stats = CallStats(requests=1)
        self.thread = threading.get_ident()
        self.model: PreTrainedModel | None = None  # the leased draft
        self.running: RunningCall | None = None  # None if generate's own loop does not run it
        self.sampled, self.processed = sampled, processed
        self._translation = translation
        self._capture, self._top_k, self._dtype = capture, top_k, dtype
        self._prompt = prompt.to("cpu", torch.int32)
        self._source = None if source is None else source.to("cpu", torch.int32)
        self._tokens: list[int] = []  # the draft's ids, N so far
        self._starts: list[int] = []  # where in them each of the target's tokens starts
        self._overlap: list[float] = []  # N
        self._rows: list[SparseRows] = []
        self._draft_rows: list[Tensor] = []  # (positions of a round, k) each
        self._positions: list[tuple[int, float, int]] = []  # drafted token, its log q, outcome; N

    def add_round(
        self,
        pieces: list[list[int]],
        raw: Tensor,
        draft_scores: Tensor | None,
        drafted: list[int],
        accepted: int,
        overlap: list[float],
    ):
        """One verification.

        Args:
            pieces: the m+1 verified tokens, each as the draft's ids of it.
            raw: the target's logits there before any processor, float32 `(m+1, V)`.
            draft_scores: the scores the drafts were taken from, float32 `(n, V)`; `None` if n is 0.
            drafted: the n drafted tokens, in the target's ids.
            accepted: how many of them were accepted.
            overlap: expected acceptance at the tested positions.
        """
        tested = len(overlap)
        self.stats.observe_round(len(drafted), tested, accepted, len(pieces))
        tokens = [token for piece in pieces for token in piece]
        at = _starts(pieces)
        self._starts += [len(self._tokens) + i for i in at]
        self._tokens += tokens
        self._overlap += _spread(overlap, at, len(tokens), torch.nan)
        if not self._capture:
            return
        columns = self._translation.shared_columns(raw.device)
        rows = SparseRows.of_logits(raw, self._top_k, self._dtype, columns)  # in the target's ids
        draft_rows = torch.full(rows.top_logps.shape, torch.nan, dtype=self._dtype)  # (m+1, k)
        log_q: list[float] = []
        if tested:
            # Only what is kept of q leaves the device.
            q, device = draft_scores[:tested], draft_scores.device  # (tested, V)
            total = q.logsumexp(-1, keepdim=True)
            draft_rows[:tested] = (q.gather(-1, rows.top_ids[:tested].to(device, torch.long)) - total).to(
                "cpu", self._dtype
            )
            ids = torch.tensor(drafted[:tested], device=device)[:, None]
            log_q = (q.gather(-1, ids) - total).squeeze(-1).tolist()
        if not self._translation.is_identity:
            ids = self._translation.token(rows.top_ids.long()).to(torch.int32)
            rows = SparseRows(ids, rows.top_logps, rows.tail_logp)
            drafted = [self._translation.tokens([token])[0][0] for token in drafted]
        if len(tokens) > len(pieces):
            rows = rows.spread(at, len(tokens))
            wide = torch.full((len(tokens), draft_rows.shape[1]), torch.nan, dtype=self._dtype)
            wide[at] = draft_rows
            draft_rows = wide
        self._rows.append(rows)
        self._draft_rows.append(draft_rows)
        seen = [(drafted[j], log_q[j], ACCEPTED if j < accepted else REJECTED) for j in range(tested)]
        self._positions += _spread(seen, at, len(tokens), (-1, torch.nan, UNTESTED))

    def fill_overlap(self, values: list[float]):
        """Expected acceptance at the last of the target's tokens, which the draft had not been asked about in their own round."""
        for i, value in zip(self._starts[len(self._starts) - len(values) :], values, strict=True):
            if self._overlap[i] != self._overlap[i]:  # NaN: still unknown
                self._overlap[i] = value

    def seal(self) -> Feedback | None:
        """The request's feedback; `None` if nothing was verified or captured. Also settles `alpha` in `stats`."""
        known = [value for value in self._overlap if value == value]
        self.stats.overlap_sum, self.stats.overlap_count = float(sum(known)), len(known)
        if not self._rows:
            return None
        rows = SparseRows.cat(self._rows)
        drafted, log_q, outcome = zip(*self._positions, strict=True)
        return Feedback(
            tokens=torch.cat([self._prompt, torch.tensor(self._tokens, dtype=torch.int32)]),
            prompt_length=len(self._prompt),
            top_ids=rows.top_ids,
            top_logps=rows.top_logps,
            tail_logp=rows.tail_logp,
            draft_logps=torch.cat(self._draft_rows),
            drafted=torch.tensor(drafted, dtype=torch.int32),
            drafted_logp=torch.tensor(log_q).to(self._dtype),
            outcome=torch.tensor(outcome, dtype=torch.int8),
            overlap=torch.tensor(self._overlap),
            sampled=self.sampled,
            source=self._source,
        )


def _starts(pieces: list[list[int]]) -> list[int]:
    """Where each piece starts in all of them, one after the other."""
    starts = [0]
    for piece in pieces[:-1]:
        starts.append(starts[-1] + len(piece))
    return starts


def _spread(values: list, at: list[int], n: int, fill) -> list:
    """n values: the given ones at the first of the places `at`, `fill` at all others."""
    spread = [fill] * n
    for i, value in zip(at, values, strict=False):
        spread[i] = value
    return spread
