"""`DraftVocab` and `LowRankHead` restrict a draft's LM head to some of its rows. They know heads and tokens, nothing of generation or learning.

A small draft spends most of a step in its LM head, on rows that never matter. q is zero outside the rows computed, and speculative
decoding is exact for any q, so the choice of rows costs acceptance at worst. `DraftVocab` keeps a set of frequent tokens, as in FR-Spec
(arXiv 2502.14856), but updated from the traffic; `LowRankHead` chooses rows by approximate logits at each position, as in SpecVocab
(arXiv 2602.13836).

Symbols: W the rows of the head, d its columns, R the rows computed, r the rank of an approximation, n positions.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_osd.system.forks import released

HALF_LIFE = 20_000  # observed tokens
_MATTERS = 1 / 64  # the set is chosen anew when new tokens are more than this share of the counts
_LARGEST_UNIT = 1e100
_SLACK = 64  # rows
_CHUNK = 8192  # rows converted to float32 at a time
_FLOOR = 1e-6  # of the largest eigenvalue of a moment: directions without hidden states keep a little weight


@dataclass(frozen=True)
class _Packed:
    """Holds rows of one head, shared by calls and never written."""

    ids: Tensor  # int64 (R,)
    weight: Tensor  # (R, d)
    bias: Tensor | None  # (R,)
    members: Container[int]
    key: tuple = ()  # version of the set; version and address of the sources
    sources: tuple[weakref.ref, ...] = ()

    def made_from(self, sources: list[Tensor]) -> bool:
        """Tell whether the rows were copied from these tensors, by identity; an id alone may be reused for another tensor."""
        return len(sources) == len(self.sources) and all(r() is p for r, p in zip(self.sources, sources, strict=True))


class DraftVocab:
    """Keeps the set of tokens that a draft may predict, updated from the traffic; one for all calls of an assistant. Thread-safe.

    The set has the `size` tokens with the largest decayed counts. Ties go to the lower id, and so decide everything before there was traffic:
    BPE numbers its tokens in the order in which it merged them, frequent ones first.

    Args:
        rows (`int`): W.
        size (`int`): tokens in the set, ≥ 1; at most W.
        decay (`float`): factor on a count for each later token, in (0, 1]. By default a count halves in 20,000 tokens, so that the set follows
            a shift of domain.
    """

    def __init__(self, rows: int, size: int, decay: float = 0.5 ** (1 / HALF_LIFE)):
        self.rows, self.size = rows, min(size, rows)
        self._decay = decay
        self._counts = torch.zeros(rows, dtype=torch.float64, device="cpu")  # in units of `_unit`
        # The weight of a token observed now. It grows, so that old counts shrink beside new ones without being touched.
        self._unit = 1.0
        self._pending = 0.0  # weight of the tokens observed since the set was chosen
        self._ids = torch.arange(self.size, device="cpu")
        self._version = 0  # of the set
        self._packed: _Packed | None = None
        self._lock = released(threading.Lock())

    def observe(self, tokens: Sequence[int] | Tensor, weight: float | Tensor = 1.0):
        """Count tokens of an ended request, int64 `(N,)`, the oldest first. Tokens without a row in the full head are skipped.

        Args:
            weight: how much a token counts, and by how many tokens it ages the earlier ones, for all or `(N,)`. Prompt tokens, which the draft need not
                predict, get less than 1; other tokens that the target found likely get their probability.

        Raises:
            ValueError: if a weight is negative.
        """
        tokens = _on_cpu(tokens, torch.long)
        weights = _on_cpu(weight, torch.float64).expand(len(tokens))
        if (weights < 0).any():
            raise ValueError(f"`weight` is {float(weights.min()):g}; choose 0, which counts nothing, or more.")
        known = (tokens >= 0) & (tokens < self.rows)
        tokens, weights = tokens[known], weights[known]
        total = float(weights.sum())
        if not total:
            return
        counts = weights * self._decay ** (total - weights.cumsum(0))
        fade = self._decay**total  # zero after very many tokens
        with self._lock:
            if fade * _LARGEST_UNIT > self._unit:
                self._unit /= fade
            else:
                self._counts *= fade / self._unit
                self._unit = 1.0
            self._counts.index_add_(0, tokens, self._unit * counts)
            self._pending += total

    @property
    def ids(self) -> Tensor:
        """Return the set, int64 `(size,)`, ascending. Read-only."""
        with self._lock:
            self._choose()
            return self._ids

    def head(self, full: nn.Linear, prompt: Tensor) -> RowsHead:
        """Make the head of one call, with the rows of the set and of the prompt's tokens.

        All calls share the packed rows until the set or the weights change. Changes are found by the weights' version counter, which writes through
        `.data` do not increase: weights must not be changed that way.

        Args:
            full (`nn.Linear`): the draft's LM head.
            prompt (`Tensor` int64 `(L,)`): the prompt in the draft's tokens.

        Raises:
            ValueError: if the head does not have W rows.
        """
        if full.weight.shape[0] != self.rows:
            raise ValueError(
                f"`rows` is {self.rows} and the head has {full.weight.shape[0]}; make a DraftVocab with as many rows."
            )
        with self._lock:
            self._choose()
            packed = self._pack(full)
        head = RowsHead(full, packed)
        head.add([token for token in prompt.flatten().tolist() if 0 <= token < self.rows])
        return head

    def _choose(self):
        """Choose the set anew, if enough tokens were observed since."""
        if self.size == self.rows or self._pending <= _MATTERS * float(self._counts.sum()) / self._unit:
            return
        self._pending = 0.0
        # topk breaks ties in no defined order, so only its threshold is used.
        threshold = self._counts.topk(self.size, sorted=False).values.min()
        chosen = self._counts > threshold
        ties = (self._counts == threshold).nonzero().squeeze(-1)
        chosen[ties[: self.size - int(chosen.sum())]] = True
        ids = chosen.nonzero().squeeze(-1)
        if not torch.equal(ids, self._ids):
            self._ids, self._version = ids, self._version + 1

    def _pack(self, full: nn.Linear) -> _Packed:
        weight, bias = full.weight, full.bias
        if self.size == self.rows:
            return _Packed(self._ids.to(weight.device), weight.detach(), _detached(bias), range(self.rows))
        sources = [p for p in (weight, bias) if p is not None]
        # Inference tensors have no version counter to reveal changes, so their rows are not kept.
        counted = not any(p.is_inference() for p in sources)
        key = counted and (self._version, *((p._version, p.data_ptr()) for p in sources))
        if self._packed is not None and key == self._packed.key and self._packed.made_from(sources):
            return self._packed
        ids = self._ids.to(weight.device)
        # Made under inference_mode, rows could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            rows = [None if p is None else p.detach().index_select(0, ids) for p in (weight, bias)]
        packed = _Packed(ids, *rows, frozenset(self._ids.tolist()), key, tuple(map(weakref.ref, sources)))
        self._packed = packed if counted else None
        return packed


class _PartialHead(nn.Module):
    """Base of both reduced heads: keeps the full head's weights, which are not parameters of this module, and the last input."""

    def __init__(self, full: nn.Linear):
        super().__init__()
        self._all = (full.weight.detach(), _detached(full.bias))
        self.hidden: Tensor | None = None  # the last forward's input, (..., d)

    @property
    def weight(self) -> Tensor:
        """Return the full weight `(W, d)`: the forward of some models reads its dtype."""
        return self._all[0]

    def full(self, hidden: Tensor) -> Tensor:
        """Compute the logits of all rows for hidden states `(n, d)`: `(n, W)`. They show what the choice of rows costs."""
        return F.linear(hidden, *self._all)


class RowsHead(_PartialHead):
    """Computes some rows of an LM head, for one call; not thread-safe. Made by `DraftVocab.head`.

    Its first columns are those of the set, shared with other calls; the added columns come after them and are its own.
    """

    def __init__(self, full: nn.Linear, packed: _Packed):
        super().__init__(full)
        self._packed = packed
        self._ids = packed.ids
        self._added: dict[int, None] = {}
        self._added_rows: tuple[Tensor, Tensor | None] | None = None  # with slack

    @property
    def ids(self) -> Tensor:
        """Return the token of each column, int64 `(R,)`."""
        return self._ids

    def __contains__(self, token: int) -> bool:
        return token in self._packed.members or token in self._added

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute logits `(..., R)` of hidden states `(..., d)`, in the head's dtype, in the order of `ids`."""
        self.hidden = hidden
        logits = F.linear(hidden, self._packed.weight, self._packed.bias)
        if not self._added:
            return logits
        weight, bias = self._added_rows
        n = len(self._added)
        return torch.cat([logits, F.linear(hidden, weight[:n], None if bias is None else bias[:n])], dim=-1)

    def add(self, tokens: Sequence[int]):
        """Append columns for those `tokens` that have none yet, in this order.

        Raises:
            IndexError: if the full head has no such row; nothing is then changed.
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self]
        if not new:
            return
        ids = torch.tensor(new, device=self._ids.device)
        start, end = len(self._added), len(self._added) + len(new)
        with torch.no_grad():
            rows = [None if p is None else p.index_select(0, ids) for p in self._all]
            if self._added_rows is None or end > len(self._added_rows[0]):
                self._added_rows = tuple(self._grown(i, start, end + _SLACK) for i in range(2))
            for buffer, row in zip(self._added_rows, rows, strict=True):
                if buffer is not None:
                    buffer[start:end] = row
        self._ids = torch.cat([self._ids, ids])
        self._added.update(dict.fromkeys(new))

    def _grown(self, i: int, used: int, rows: int) -> Tensor | None:
        """Allocate `rows` rows for the added part of the weight (`i` = 0) or bias (1), and copy the `used` ones."""
        whole = self._all[i]
        if whole is None:
            return None
        # Made under inference_mode, it could not be written outside it.
        with torch.inference_mode(False):
            room = torch.empty(rows, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
        if used:
            room[:used] = self._added_rows[i][:used]
        return room


def _on_cpu(values: Sequence | float | Tensor, dtype: torch.dtype) -> Tensor:
    """Make a flat CPU tensor of numbers."""
    return torch.as_tensor(values, dtype=dtype, device="cpu").flatten()


class LowRank:
    """Factors a head into low-rank matrices for approximate logits, optimal in least squares at rank r. This takes seconds, so do it once per weight.

    Factors of older weights make worse choices, but never wrong logits. The mean row is left out, for it shifts all logits alike.

    Args:
        full (`nn.Linear`): the head; weight `(W, d)`.
        rank (`int`): r, ≥ 1; at most d.
        moment (`Tensor` `(d, d)`, *optional*): the mean of h hᵀ over hidden states h of the draft. The error is then minimised for
            such states, instead of for all directions alike. It matters more than the rank: hidden states fill few directions.

    Raises:
        ValueError: if `moment` has another shape.
    """

    def __init__(self, full: nn.Linear, rank: int, moment: Tensor | None = None):
        weight = full.weight.detach()
        d = weight.shape[1]
        if moment is not None and moment.shape != (d, d):
            raise ValueError(
                f"`moment` is {tuple(moment.shape)} and the head has {d} columns; pass the mean of h hᵀ, ({d}, {d})."
            )
        chunks = weight.split(_CHUNK)
        mean = sum(chunk.float().sum(0) for chunk in chunks) / len(weight)
        gram = sum(part.T @ part for part in (chunk.float() - mean for chunk in chunks)).double()
        root = inverse = torch.eye(d, dtype=torch.float64, device=weight.device)
        if moment is not None:
            values, vectors = torch.linalg.eigh(moment.to(gram))
            values = values.clamp_min(_FLOOR * values.max()).sqrt()
            root, inverse = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
        main = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -min(rank, d) :]  # (d, r)
        down, up = (main.T @ inverse).to(weight.dtype), (root @ main).float()
        self.down = down  # (r, d)
        self.rows = torch.cat([((chunk.float() - mean) @ up).to(weight.dtype) for chunk in chunks])  # (W, r)
        self._bias = _detached(full.bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Approximate the logits `(n, W)` of hidden states `(n, d)`, up to a term that is the same for all tokens."""
        return F.linear(F.linear(hidden, self.down), self.rows, self._bias)


class LowRankHead(_PartialHead):
    """Computes, at each position, the rows of an LM head whose approximate logits are largest; not thread-safe.

    It has the methods of a `RowsHead`. Any token may be chosen, so it contains all tokens and `add` does nothing.

    Args:
        full (`nn.Linear`): the head.
        projection (`LowRank`): its factors.
        size (`int`): rows at each position, ≥ 1; at most W.

    Raises:
        ValueError: if the factors were made from a head of another shape.
    """

    def __init__(self, full: nn.Linear, projection: LowRank, size: int):
        super().__init__(full)
        if (projection.rows.shape[0], projection.down.shape[1]) != tuple(full.weight.shape):
            raise ValueError("`projection` was made from a head of another shape; make a LowRank from this one.")
        self._projection = projection
        self.size = min(size, full.weight.shape[0])
        self.ids: Tensor | None = None  # the last forward's tokens by column, int64 (n, size), in no order

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self._all[0].shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute the full head's logits `(..., size)` of the rows chosen, for hidden states `(..., d)`, n in all; in the head's dtype."""
        self.hidden = hidden
        flat = hidden.reshape(-1, hidden.shape[-1])  # (n, d)
        weight, bias = self._all
        self.ids = self._projection(flat).topk(self.size, sorted=False).indices
        if len(flat) * self.size >= weight.shape[0]:  # gathering rows would cost more than computing all
            logits = F.linear(flat, weight, bias).gather(-1, self.ids)
        else:
            logits = torch.bmm(F.embedding(self.ids, weight), flat[:, :, None]).squeeze(-1)
            if bias is not None:
                logits = logits + bias[self.ids]
        return logits.view(*hidden.shape[:-1], self.size)

    def add(self, tokens: Sequence[int]):
        """Do nothing: every position chooses its own rows."""


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
