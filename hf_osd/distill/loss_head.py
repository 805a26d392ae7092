"""`LossHead`: computes some columns of the LM head of a draft in training. For a small draft the head is most of the work, and the loss asks for the target's top k
and a tail alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_osd.models.draft_head import can_select_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LossHead(nn.Linear):
    """Takes the place of an LM head, with its very parameters, under the same names."""

    def __init__(self, full: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = full.in_features, full.out_features
        self.weight, self.bias = full.weight, full.bias
        self._columns: Tensor | None = None

    @classmethod
    def install(cls, draft: PreTrainedModel) -> LossHead | None:
        """Put a loss head into `draft`, before any trainer has patched it; change nothing, and return `None`, where its head is no plain linear layer whose
        logits are treated one by one."""
        if not can_select_rows(draft):
            return None
        full = draft.get_output_embeddings()
        head = cls(full).train(draft.training)
        # By its place in the tree: `set_output_embeddings` of some models knows one name alone.
        parent, _, name = next(n for n, module in draft.named_modules() if module is full).rpartition(".")
        setattr(draft.get_submodule(parent), name, head)
        if draft.get_output_embeddings() is head:
            return head
        # It is reached by another way too, which would go on with the old one.
        setattr(draft.get_submodule(parent), name, full)
        return None

    @contextlib.contextmanager
    def only(self, columns: Tensor) -> Iterator[None]:
        """Compute only the logits of the tokens `columns`, int64 `(C,)`, in their order, while this is open."""
        self._columns = columns
        try:
            yield
        finally:
            self._columns = None

    def forward(self, hidden: Tensor) -> Tensor:
        if self._columns is None:
            return F.linear(hidden, self.weight, self.bias)
        weight = self.weight.index_select(0, self._columns)
        return F.linear(hidden, weight, None if self.bias is None else self.bias.index_select(0, self._columns))


def loss_columns(
    top_ids: Tensor,
    size: int,
    samples: int,
    generator: torch.Generator | None = None,
    draftable: Tensor | None = None,
):
    """Choose the columns that a loss over the targets `top_ids` is computed from.

    Args:
        top_ids (`Tensor` int64 `(R, k)`): the tokens that have a log-prob of their own.
        size (`int`): V, the columns of the whole head.
        samples (`int`): how many of the others are drawn, uniformly without repetition, to stand for all of them.
        draftable (`Tensor` bool `(V,)`, *optional*): which tokens the head has, if it lacks some: the others are drawn among these alone.

    Returns:
        `columns` int64 `(C,)`, those of `top_ids` first; `at` int64 `(R, k)`, where each of `top_ids` lies in them; `support`, how many are
        not drawn; and `size`, how many columns they stand for in all. `None` if the whole head has hardly more columns.
    """
    support, at = top_ids.unique(return_inverse=True)  # ascending
    if draftable is not None:
        left = draftable.index_fill(0, support, False).nonzero().squeeze(-1)
        size = len(support) + len(left)
    others = size - len(support)
    if len(support) + samples >= size // 2:
        return None
    ranks = torch.randperm(others, generator=generator, device="cpu")[:samples].to(top_ids.device)  # among the others
    if draftable is not None:
        return torch.cat([support, left[ranks]]), at, len(support), size
    # The i-th smallest token outside the support: it has as many of the support below it as have rank + their number below it.
    below = support - torch.arange(len(support), device=support.device)  # others below each of the support
    drawn = ranks + torch.searchsorted(below, ranks, right=True)
    return torch.cat([support, drawn]), at, len(support), size


def sampled_tail(logits: Tensor, support: int, size: int) -> Tensor:
    """Raise the drawn columns of logits `(R, C)`, in place, by the log of how many tokens each stands for, so that sums of exp over the row estimate those over
    all of V."""
    drawn = logits.shape[1] - support
    raised = torch.zeros(logits.shape[1], device=logits.device, dtype=logits.dtype)
    raised[support:] = math.log((size - support) / drawn)
    return logits.add_(raised)  # logits are large, and new memory for them takes longer than the sum
