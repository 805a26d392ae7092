"""`Feedback`: what one request taught. Token ids, the target's sparse distributions at its verified positions, and what
the draft had said there. It holds no text, and knows neither models nor training.

All ids are of the draft's vocabulary, which mostly is the target's. Where it is not (see [`hf_osd.drafting.vocab_mapping.VocabMapping`]), a token of
the target may be several of the draft's: the first of them is the position that has a target, the others have none.

Symbols: position i is the i-th generated token, N of them; `p` is the target's raw distribution there (temperature 1, no
logits processor), `q` the distribution the draft's token was taken from. All other mass of p beyond its top k is one tail.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from hf_osd.feedback.target_states import TargetStates

# Outcomes of a position.
UNTESTED, ACCEPTED, REJECTED = 0, 1, 2

# Floor of a stored tail, in nats: reverse KL against an empty tail would be infinite, and float16 holds no less than -16.6
# as a probability anyway.
TAIL_FLOOR = -16.0


@dataclass(frozen=True, eq=False)
class Feedback:
    """One request.

    Args:
        tokens (`Tensor` int32 `(prompt_length + N,)`): prompt and verified tokens.
        prompt_length (`int`): how many of them are the prompt.
        top_ids (`Tensor` int32 `(N, k)`): the target's k likeliest tokens that the draft has too, likeliest first.
        top_logps (`Tensor` float `(N, k)`): their log-probs under p.
        tail_logp (`Tensor` float `(N,)`): log of p's mass outside them, at least `TAIL_FLOOR`; NaN where the position has no target.
        draft_logps (`Tensor` float `(N, k)`): log q of the same tokens; NaN where nothing was drafted.
        drafted (`Tensor` int32 `(N,)`): the token the draft drafted for the position; -1 where it drafted none.
        drafted_logp (`Tensor` float `(N,)`): log q of it; NaN where none.
        outcome (`Tensor` int8 `(N,)`): `UNTESTED`, `ACCEPTED` or `REJECTED`, of the draft's own tokens. Where the draft alone drafts, every
            position that is not accepted ends a round, so `outcome != ACCEPTED` is Algorithm 1's error index; what the suffix cache drafted is
            untested, and counts among them.
        overlap (`Tensor` float32 `(N,)`): expected acceptance of the draft there, from dense rows: Σ min(p, q) as both were
            sampled from, or 0/1 when greedy; NaN where the draft made no prediction.
        sampled (`bool`): whether the request was sampled rather than greedy.
        created (`float`): `time.monotonic()` at which it was sealed.
        source (`Tensor` int32 `(S,)`, *optional*): what the encoder read, if the draft has one; `tokens` are then the decoder's.
        prompt_rows (`SparseLogits` of M rows, *optional*): the target's distributions at the last M tokens of the prompt, k as above; `None` where they
            are not known. They teach as well, and nothing else: α is of generated tokens alone.
        gap (`tuple[int, int]`, *optional*): `(after, count)`: of the text, `count` tokens are left out after the first `after` ones ([`hf_osd.distill.windows.cut`]).
        states (`TargetStates`, *optional*): the target's hidden states at some consecutive positions of `tokens`, which feature-level drafts read: to predict
            token i they read the state at i-2. Positions without one teach such a draft nothing. `None` where they were not recorded.
    """

    tokens: Tensor
    prompt_length: int
    top_ids: Tensor
    top_logps: Tensor
    tail_logp: Tensor
    draft_logps: Tensor
    drafted: Tensor
    drafted_logp: Tensor
    outcome: Tensor
    overlap: Tensor
    sampled: bool = False
    created: float = field(default_factory=time.monotonic)
    source: Tensor | None = None
    prompt_rows: SparseLogits | None = None
    gap: tuple[int, int] | None = None
    states: TargetStates | None = None

    def __len__(self) -> int:
        """N, the number of verified positions."""
        return self.tokens.shape[0] - self.prompt_length

    @property
    def answer(self) -> Tensor:
        """The generated tokens, `(N,)`."""
        return self.tokens[self.prompt_length :]

    @property
    def rows(self) -> SparseLogits:
        """The target's distributions at the N positions."""
        return SparseLogits(self.top_ids, self.top_logps, self.tail_logp)

    @property
    def nbytes(self) -> int:
        own = sum(tensor.nbytes for tensor in self.tensors().values())
        return own + sum(part.nbytes for part in (self.prompt_rows, self.states) if part is not None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name; without those of `prompt_rows` and `states`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def teaching_mask(self, positions: str, states: bool = False) -> Tensor:
        """Mask `(N,)` of the generated positions to learn from: `"all"` that have a target, or `"error"`, those of them that end a round. With `states` only
        those of them that a feature-level draft predicts from the target's `states`."""
        taught = ~self.tail_logp.isnan()
        if states:
            taught &= self.predicted_from_states()[self.prompt_length :]
        return taught & (self.outcome != ACCEPTED) if positions == "error" else taught

    def predicted_from_states(self) -> Tensor:
        """Mask `(prompt_length + N,)` of the tokens that a feature-level draft predicts from the target's `states`: it reads the state two tokens before."""
        known = torch.zeros(len(self.tokens), dtype=torch.bool, device="cpu")
        if self.states is not None:
            known[self.states.start + 2 : self.states.stop + 2] = True
        return known

    def num_teaching(self, positions: str, states: bool = False) -> int:
        """How many positions there are to learn from, those of the prompt included; with `states` as of `teaching_mask`."""
        count = int(self.teaching_mask(positions, states).sum())
        if self.prompt_rows is None:
            return count
        start, rows = self.prompt_length, len(self.prompt_rows)
        return count + (int(self.predicted_from_states()[start - rows : start].sum()) if states else rows)

    def with_overlap(self, overlap: Tensor) -> Feedback:
        """The same request with `overlap` filled in at the positions where it was unknown."""
        return replace(self, overlap=torch.where(self.overlap.isnan(), overlap, self.overlap))

    def truncate(self, k: int) -> Feedback:
        """The same request with the k likeliest of its stored tokens alone; the mass of the others joins the tail. Itself if it has no more.

        Raises:
            ValueError: if `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"`k` is {k}; keep at least 1 of the log-probs.")
        if k >= self.top_ids.shape[1]:
            return self
        return replace(
            self,
            **vars(self.rows.truncate(k)),
            draft_logps=self.draft_logps[:, :k].clone(),
            prompt_rows=None if self.prompt_rows is None else self.prompt_rows.truncate(k),
        )

    def with_prompt_rows(self, most: int) -> Feedback:
        """The same request with the last `most` of its `prompt_rows`, at most. Itself if it has no more. `states` stay: what comes
        before a row is read for it."""
        if self.prompt_rows is None or len(self.prompt_rows) <= most:
            return self
        return replace(self, prompt_rows=self.prompt_rows.at(torch.arange(-most, 0, device="cpu")) if most else None)

    @classmethod
    def of_target(
        cls,
        tokens: Tensor,
        prompt_length: int,
        rows: SparseLogits,
        overlap: Tensor | None = None,
        prompt_rows: SparseLogits | None = None,
        sampled: bool = False,
        source: Tensor | None = None,
        states: TargetStates | None = None,
    ) -> Feedback:
        """Feedback of a request that the target answered alone: nothing drafted, all positions with a target teach."""
        n, k = rows.top_ids.shape
        dtype = rows.top_logps.dtype
        return cls(
            tokens=tokens.to("cpu", torch.int32),
            prompt_length=prompt_length,
            top_ids=rows.top_ids,
            top_logps=rows.top_logps,
            tail_logp=rows.tail_logp,
            draft_logps=torch.full((n, k), torch.nan, dtype=dtype, device="cpu"),
            drafted=torch.full((n,), -1, dtype=torch.int32, device="cpu"),
            drafted_logp=torch.full((n,), torch.nan, dtype=dtype, device="cpu"),
            outcome=torch.full((n,), UNTESTED, dtype=torch.int8, device="cpu"),
            overlap=torch.full((n,), torch.nan, dtype=torch.float32, device="cpu") if overlap is None else overlap,
            sampled=sampled,
            source=None if source is None else source.to("cpu", torch.int32),
            prompt_rows=prompt_rows,
            states=states,
        )


@dataclass(frozen=True)
class SparseLogits:
    """n distributions as top k and tail; the fields are those of [`Feedback`]."""

    top_ids: Tensor
    top_logps: Tensor
    tail_logp: Tensor

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, dtype: torch.dtype = torch.float16, among: Tensor | None = None
    ) -> SparseLogits:
        """Top k and tail of logits `(n, V)`, float32, on their device. Costs one top-k and two log-sum-exps a row.

        Args:
            among (`Tensor` int64 `(S,)`, *optional*): the columns that may be kept; all others are tail.
        """
        total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
        kept = logits if among is None else logits.index_select(-1, among)
        top, ids = kept.topk(min(k, kept.shape[-1]), dim=-1)  # (n, k)
        ids = ids if among is None else among[ids]
        # The mass of the rest is summed itself: 1 - Σ top would cancel when the tail is small.
        rest = logits.scatter(-1, ids, -torch.inf).logsumexp(-1)  # (n,)
        return cls(
            top_ids=ids.to(torch.int32),
            top_logps=(top - total).to(dtype),
            tail_logp=(rest - total.squeeze(-1)).clamp_min(TAIL_FLOOR).to(dtype),
        )

    def __len__(self) -> int:
        return self.tail_logp.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def cpu(self) -> SparseLogits:
        return SparseLogits(*(getattr(self, f.name).cpu() for f in fields(self)))

    def truncate(self, k: int) -> SparseLogits:
        """With the k likeliest of the stored tokens alone; the mass of the others joins the tail. Copies: a view would keep what was cut in memory."""
        left_out = self.top_logps[:, k:].float().logsumexp(-1)  # (n,)
        tail = torch.logaddexp(self.tail_logp.float(), left_out).clamp_min(TAIL_FLOOR)  # NaN stays NaN
        return SparseLogits(self.top_ids[:, :k].clone(), self.top_logps[:, :k].clone(), tail.to(self.tail_logp.dtype))

    def at(self, rows: Tensor) -> SparseLogits:
        """Those of the rows `(r,)`; copies."""
        return SparseLogits(*(getattr(self, f.name)[rows] for f in fields(self)))

    def spread(self, at: list[int], n: int) -> SparseLogits:
        """These rows at the positions `at` of n; the others have no target."""
        rows = SparseLogits(
            self.top_ids.new_zeros(n, self.top_ids.shape[1]),
            self.top_logps.new_full((n, self.top_ids.shape[1]), torch.nan),
            self.tail_logp.new_full((n,), torch.nan),
        )
        for f in fields(self):
            getattr(rows, f.name)[at] = getattr(self, f.name)
        return rows

    @classmethod
    def cat(cls, parts: list[SparseLogits]) -> SparseLogits:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))
