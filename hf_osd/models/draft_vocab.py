"""The speculative vocabulary: which rows of a draft's LM head are computed. It knows heads and tokens, nothing of generation or learning.

A small draft spends most of a step in its LM head, on rows that never matter. q is zero outside the rows computed, and speculative
decoding is exact for any q, so the choice of rows costs acceptance at worst. Two ways are here: a set of frequent tokens, as FR-Spec
has it (arXiv 2502.14856) but kept current from the traffic (`DraftVocab`), and rows that approximate logits choose at each
position, as SpecVocab has it (arXiv 2602.13836; `LowRankHead`).

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
_MATTERS = 1 / 64  # of all that counts: new traffic below this share leaves the set as it is
_LARGEST_UNIT = 1e100
_SLACK = 64  # rows
_CHUNK = 8192  # rows turned to float32 at a time
_FLOOR = 1e-6  # of the largest eigenvalue of a moment: directions that no hidden state took still count a little


@dataclass(frozen=True)
class _Packed:
    """Rows of one head, shared by calls and never written."""

    ids: Tensor  # int64 (R,)
    weight: Tensor  # (R, d)
    bias: Tensor | None  # (R,)
    members: Container[int]
    key: tuple = ()  # of the set, and what of the sources changes with their contents
    sources: tuple[weakref.ref, ...] = ()

    def made_from(self, sources: list[Tensor]) -> bool:
        """Whether from these tensors, by identity; an id alone may have passed to another tensor."""
        return len(sources) == len(self.sources) and all(r() is p for r, p in zip(self.sources, sources, strict=True))


class DraftVocab:
    """Which tokens a draft may say, kept current from the traffic; one for all calls of an assistant. Thread-safe.

    The set is the `size` tokens with the largest decayed counts. Ties, and so everything before traffic was seen, go to the lower id:
    BPE numbers its tokens in the order it merged them, frequent ones first.

    Args:
        rows (`int`): W.
        size (`int`): tokens in the set, ≥ 1; all W if there are no more.
        decay (`float`): what a count is worth one token later, in (0, 1]. By default it halves in 20,000 tokens, so that the set follows
            a shift of domain.

    Raises:
        ValueError: if `rows`, `size` or `decay` is out of its range.
    """

    def __init__(self, rows: int, size: int, decay: float = 0.5 ** (1 / HALF_LIFE)):
        for name, value in (("rows", rows), ("size", size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}; the draft must be able to say something: choose 1 or more.")
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` is {decay}; choose a value above 0 and at most 1, which never forgets.")
        self.rows, self.size = rows, min(size, rows)
        self._decay = decay
        self._counts = torch.zeros(rows, dtype=torch.float64, device="cpu")  # in units of `_unit`
        # The weight of a token observed now. It grows, so that old counts shrink beside new ones without being touched.
        self._unit = 1.0
        self._pending = 0.0  # observed since the set was chosen, in tokens
        self._ids = torch.arange(self.size, device="cpu")
        self._version = 0  # of the set
        self._packed: _Packed | None = None
        self._lock = released(threading.Lock())

    def observe(self, tokens: Sequence[int] | Tensor, weight: float | Tensor = 1.0):
        """Count tokens of an ended request, int64 `(N,)`, the oldest first. Those that the head has no row for are skipped.

        Args:
            weight: what each counts and ages the others by, for all or `(N,)`; prompt tokens, which the draft need not say, deserve less than
                1, and what the target might have said as much as it was likely.

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
        """The set, int64 `(size,)`, ascending. To read, not to write."""
        with self._lock:
            self._choose()
            return self._ids

    def head(self, full: nn.Linear, prompt: Tensor) -> RowsHead:
        """The head of one call: the set, and the tokens of its prompt.

        The packed rows are shared by all calls until the set or the weights change. Writes to the weights are seen by their version
        counter, which writes through `.data` do not touch: weights are not to be changed so.

        Args:
            full: the draft's LM head.
            prompt (`Tensor` int64 `(L,)`): in the draft's tokens.

        Raises:
            ValueError: if the head has other than W rows.
        """
        if full.weight.shape[0] != self.rows:
            raise ValueError(
                f"`rows` is {self.rows} and the head has {full.weight.shape[0]}; make a DraftVocab of as many rows."
            )
        with self._lock:
            self._choose()
            packed = self._pack(full)
        head = RowsHead(full, packed)
        head.add([token for token in prompt.flatten().tolist() if 0 <= token < self.rows])
        return head

    def _choose(self):
        """Choose the set anew, if enough was observed to matter."""
        if self.size == self.rows or self._pending <= _MATTERS * float(self._counts.sum()) / self._unit:
            return
        self._pending = 0.0
        # topk breaks ties as it likes, so it tells no more than where to cut.
        least = self._counts.topk(self.size, sorted=False).values.min()
        chosen = self._counts > least
        ties = (self._counts == least).nonzero().squeeze(-1)
        chosen[ties[: self.size - int(chosen.sum())]] = True
        ids = chosen.nonzero().squeeze(-1)
        if not torch.equal(ids, self._ids):
            self._ids, self._version = ids, self._version + 1

    def _pack(self, full: nn.Linear) -> _Packed:
        weight, bias = full.weight, full.bias
        if self.size == self.rows:
            return _Packed(self._ids.to(weight.device), weight.detach(), _detached(bias), range(self.rows))
        sources = [p for p in (weight, bias) if p is not None]
        # Inference tensors count no versions: nobody could tell when they change, so their rows are not kept.
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
    """What both heads have: the full one, whose weights are no parameters of theirs, and the last input."""

    def __init__(self, full: nn.Linear):
        super().__init__()
        self._all = (full.weight.detach(), _detached(full.bias))
        self.hidden: Tensor | None = None  # the last forward's input, (..., d)

    @property
    def weight(self) -> Tensor:
        """`(W, d)`: some models' forward asks its head's weight for a dtype."""
        return self._all[0]

    def full(self, hidden: Tensor) -> Tensor:
        """The logits of all rows for hidden states `(n, d)`, `(n, W)`: to tell what the choice of rows costs."""
        return F.linear(hidden, *self._all)


class RowsHead(_PartialHead):
    """An LM head over some rows, for one call; not thread-safe. `DraftVocab.head` makes it.

    Its columns are those of the set, which it shares with other calls, and after them those added, which it owns.
    """

    def __init__(self, full: nn.Linear, packed: _Packed):
        super().__init__(full)
        self._packed = packed
        self._ids = packed.ids
        self._added: dict[int, None] = {}
        self._own: tuple[Tensor, Tensor | None] | None = None  # the added rows, and slack

    @property
    def ids(self) -> Tensor:
        """The token of each column, int64 `(R,)`."""
        return self._ids

    def __contains__(self, token: int) -> bool:
        return token in self._packed.members or token in self._added

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `(..., d)` to logits `(..., R)`, in the head's dtype, ordered as `ids`."""
        self.hidden = hidden
        logits = F.linear(hidden, self._packed.weight, self._packed.bias)
        if not self._added:
            return logits
        weight, bias = self._own
        n = len(self._added)
        return torch.cat([logits, F.linear(hidden, weight[:n], None if bias is None else bias[:n])], dim=-1)

    def add(self, tokens: Sequence[int]):
        """Give rows to those of `tokens` that have none yet, in this order, as the last columns.

        Raises:
            IndexError: if the full head has no such row; this one is then as it was.
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self]
        if not new:
            return
        ids = torch.tensor(new, device=self._ids.device)
        start, end = len(self._added), len(self._added) + len(new)
        with torch.no_grad():
            rows = [None if p is None else p.index_select(0, ids) for p in self._all]
            if self._own is None or end > len(self._own[0]):
                self._own = tuple(self._grown(i, start, end + _SLACK) for i in range(2))
            for own, row in zip(self._own, rows, strict=True):
                if own is not None:
                    own[start:end] = row
        self._ids = torch.cat([self._ids, ids])
        self._added.update(dict.fromkeys(new))

    def _grown(self, i: int, used: int, rows: int) -> Tensor | None:
        """Room for `rows` rows of the weight (`i` = 0) or bias (1), the first `used` as they are."""
        whole = self._all[i]
        if whole is None:
            return None
        # Made under inference_mode, it could not be written outside it.
        with torch.inference_mode(False):
            room = torch.empty(rows, *whole.shape[1:], dtype=whole.dtype, device=whole.device)
        if used:
            room[:used] = self._own[i][:used]
        return room


def _on_cpu(values: Sequence | float | Tensor, dtype: torch.dtype) -> Tensor:
    """One dimension."""
    return torch.as_tensor(values, dtype=dtype, device="cpu").flatten()


class LowRank:
    """Factors of a head for approximate logits, best in least squares at rank r. They cost seconds, so make them once per weight.

    Factors of older weights make worse choices, not wrong logits. The mean row is left out, for it shifts all logits alike.

    Args:
        full: the head; weight `(W, d)`.
        rank (`int`): r, ≥ 1; d if it is more.
        moment (`Tensor` `(d, d)`, *optional*): the mean of h hᵀ over hidden states h of the draft. With it the error is least for
            such states, instead of for all directions alike. It matters more than the rank: hidden states fill few directions.

    Raises:
        ValueError: if `rank` is below 1, or `moment` of another shape.
    """

    def __init__(self, full: nn.Linear, rank: int, moment: Tensor | None = None):
        weight = full.weight.detach()
        d = weight.shape[1]
        if rank < 1:
            raise ValueError(f"`rank` is {rank}; choose 1 or more, such as 64.")
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
        """Approximate logits `(n, W)` of hidden states `(n, d)`, less what is the same for all tokens."""
        return F.linear(F.linear(hidden, self.down), self.rows, self._bias)


class LowRankHead(_PartialHead):
    """An LM head that computes, at each position, the rows whose approximate logits are largest; not thread-safe.

    It has the methods of a `RowsHead`. Any token may be chosen, so all are in it and `add` has nothing to do.

    Args:
        full: the head.
        projection: its factors.
        size (`int`): rows at each position, ≥ 1; all W if there are no more.

    Raises:
        ValueError: if `size` is below 1, or the factors are those of another head's shape.
    """

    def __init__(self, full: nn.Linear, projection: LowRank, size: int):
        super().__init__(full)
        if size < 1:
            raise ValueError(f"`size` is {size}; the draft must be able to say something: choose 1 or more.")
        if (projection.rows.shape[0], projection.down.shape[1]) != tuple(full.weight.shape):
            raise ValueError("`projection` was made of a head of another shape; make a LowRank of this one.")
        self._projection = projection
        self.size = min(size, full.weight.shape[0])
        self.ids: Tensor | None = None  # the last forward's tokens by column, int64 (n, size), in no order

    def __contains__(self, token: int) -> bool:
        return 0 <= token < self._all[0].shape[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `(..., d)`, n in all, to the logits `(..., size)` of the rows chosen: those of the full head, in its dtype."""
        self.hidden = hidden
        flat = hidden.reshape(-1, hidden.shape[-1])  # (n, d)
        weight, bias = self._all
        self.ids = self._projection(flat).topk(self.size, sorted=False).indices
        if len(flat) * self.size >= weight.shape[0]:  # to gather rows would cost more than to compute all
            logits = F.linear(flat, weight, bias).gather(-1, self.ids)
        else:
            logits = torch.bmm(F.embedding(self.ids, weight), flat[:, :, None]).squeeze(-1)
            if bias is not None:
                logits = logits + bias[self.ids]
        return logits.view(*hidden.shape[:-1], self.size)

    def add(self, tokens: Sequence[int]):
        """Nothing: every position chooses its own rows."""


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
