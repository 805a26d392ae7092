"""`Feedback` records what verification computed for one request: token ids, the target's sparse distributions at the verified positions, and the
draft's predictions there. It holds no text, and knows neither models nor training.

All ids are of the draft's vocabulary, which mostly is the target's. Where it is not (see [`hf_osd.drafting.vocab_mapping.VocabMapping`]), one token of
the target may be several tokens of the draft's: the first of them is a position with a target distribution, the others have none.

Symbols: position i is the i-th of N generated tokens; `p` is the target's raw distribution there (temperature 1, no logits processor), `q` the distribution
from which the draft's token was drawn. The mass of p outside its top k is kept as one number, the tail.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from hf_osd.feedback.target_states import TargetStates
from hf_osd.feedback.top_tokens import top_tokens

# Outcomes of a position.
UNTESTED, ACCEPTED, REJECTED = 0, 1, 2

# Floor of a stored tail, in nats: reverse KL against an empty tail would be infinite, and -16.6 is the log of the smallest probability in float16 anyway.
TAIL_FLOOR = -16.0


@dataclass(frozen=True, eq=False)
class Feedback:
    """Holds the feedback of one request; immutable.

    Args:
        tokens (`Tensor` int32 `(prompt_length + N,)`): prompt and verified tokens.
        prompt_length (`int`): how many of them are the prompt.
        top_ids (`Tensor` int32 `(N, k)`): the target's k likeliest tokens among those that the draft's vocabulary has too, likeliest first.
        top_logps (`Tensor` float `(N, k)`): their log-probs under p.
        tail_logp (`Tensor` float `(N,)`): log of p's mass outside them, at least `TAIL_FLOOR`; NaN where the position has no target distribution.
        draft_logps (`Tensor` float `(N, k)`): log q of the same tokens; NaN where nothing was drafted.
        drafted (`Tensor` int32 `(N,)`): the token the draft drafted for the position; -1 where it drafted none.
        drafted_logp (`Tensor` float `(N,)`): log q of that token; NaN where there is none.
        outcome (`Tensor` int8 `(N,)`): `UNTESTED`, `ACCEPTED` or `REJECTED`, for tokens of the draft model. Where it is the only source of drafts, every
            position that is not accepted ends a round, so `outcome != ACCEPTED` is Algorithm 1's error index. Tokens that the suffix cache drafted
            are untested, and so belong to that index.
        overlap (`Tensor` float32 `(N,)`): expected acceptance of the draft, computed from dense rows: Σ min(p, q) over the distributions that were
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
        """Return N, the number of verified positions."""
        return self.tokens.shape[0] - self.prompt_length

    @property
    def answer(self) -> Tensor:
        """Return the generated tokens, `(N,)`."""
        return self.tokens[self.prompt_length :]

    @property
    def rows(self) -> SparseLogits:
        """Return the target's distributions at the N positions."""
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
        """Return the same request with `overlap` `(N,)` filled in where it was NaN."""
        return replace(self, overlap=torch.where(self.overlap.isnan(), overlap, self.overlap))

    def truncate(self, k: int) -> Feedback:
        """Return the same request with only the k likeliest of its stored tokens; the mass of the others joins the tail. Returns itself if it stores no more.

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

    def with_prompt_rows(self, max_rows: int) -> Feedback:
        """The same request with the last `max_rows` of its `prompt_rows`, at most. Itself if it has no more. `states` stay: what comes
        before a row is read for it."""
        if self.prompt_rows is None or len(self.prompt_rows) <= max_rows:
            return self
        last = torch.arange(-max_rows, 0, device="cpu")
        return replace(self, prompt_rows=self.prompt_rows.select(last) if max_rows else None)

    @classmethod
    def from_target(
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
        """Make the feedback of a request that the target answered without drafts. All positions with a target distribution can be learnt. `rows` has N rows."""
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
    """Holds n distributions, each as its top k and a tail; the fields are described in [`Feedback`]."""

    top_ids: Tensor
    top_logps: Tensor
    tail_logp: Tensor

    @classmethod
    def from_logits(
        cls, logits: Tensor, k: int, dtype: torch.dtype = torch.float16, among: Tensor | None = None
    ) -> SparseLogits:
        """Take top k and tail of logits, float32 `(n, V)`, on their device. Costs one top-k and one log-sum-exp a row.

        Args:
            k (`int`): how many tokens to keep; fewer if there are fewer columns.
            dtype (`torch.dtype`): dtype of the log-probs.
            among (`Tensor` int64 `(S,)`, *optional*): the columns that may be kept; all others are tail.
        """
        kept = logits if among is None else logits.index_select(-1, among)
        top, ids = top_tokens(kept, min(k, kept.shape[-1]))  # (n, k)
        ids = ids if among is None else among[ids]
        # As torch.logsumexp, whose summands the tail needs too.
        peak = top[:, :1] if among is None else logits.amax(-1, keepdim=True)  # (n, 1)
        peak = peak.masked_fill(peak.abs() == torch.inf, 0.0)
        parts = (logits - peak).exp_()
        total = parts.sum(-1, keepdim=True).log() + peak
        # The rest is summed directly: 1 - Σ top would cancel when the tail is small.
        rest = parts.scatter_(-1, ids, 0.0).sum(-1, keepdim=True).log() + peak
        return cls(
            top_ids=ids.to(torch.int32),
            top_logps=(top - total).to(dtype),
            tail_logp=(rest - total).squeeze(-1).clamp_min(TAIL_FLOOR).to(dtype),
        )

    def __len__(self) -> int:
        return self.tail_logp.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def cpu(self) -> SparseLogits:
        """Copy all tensors to the CPU, if they are not there."""
        return SparseLogits(*map(Tensor.cpu, vars(self).values()))

    def truncate(self, k: int) -> SparseLogits:
        """Keep only the k likeliest of the stored tokens; the mass of the others joins the tail. Copies, for a view would keep the rest in memory."""
        left_out = self.top_logps[:, k:].float().logsumexp(-1)  # (n,)
        tail = torch.logaddexp(self.tail_logp.float(), left_out).clamp_min(TAIL_FLOOR)  # NaN stays NaN
        return SparseLogits(self.top_ids[:, :k].clone(), self.top_logps[:, :k].clone(), tail.to(self.tail_logp.dtype))

    def select(self, rows: Tensor | list[int]) -> SparseLogits:
        """Copy the rows with these indices, int64 `(r,)`."""
        return SparseLogits(*(tensor[rows] for tensor in vars(self).values()))

    def scatter(self, at: list[int], n: int) -> SparseLogits:
        """Place these rows at the indices `at` of n rows; the others have no target distribution (NaN)."""
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
        """Concatenate the rows of `parts`."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))
