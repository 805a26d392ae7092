"""Training-time test: a feature-level draft in training reads its own states of a step before, as it does when it drafts several tokens (EAGLE-3, arXiv
2503.01840, section 3.2).

Step k (from 0) predicts a token after k drafted ones. The tokens that it reads are the true ones, for only after these is its prediction ever used; of the states
the last k are the draft's own. A row has a step k where at least k columns of its request lie before its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.distill.losses import among_draftable, divergence, draft_buckets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

# The weight of each step in the loss, to that of the step before (EAGLE-3's).
_DECAY = 0.8


def unrolled_rows(depth: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Which of R rows have which of the steps: `(rows, step)`, int64 `(S,)` each, step by step.

    Args:
        depth (`Tensor` int64 `(R,)`): as [`hf_osd.distill.feature_collator.FeatureCollator`] gives it.
        steps (`int`): K, the steps asked for.
    """
    step, rows = (depth >= torch.arange(steps, device=depth.device)[:, None]).nonzero(as_tuple=True)
    return rows, step


def unrolled_logits(model: PreTrainedModel, batch: dict, steps: int) -> Tensor:
    """The draft's logits at the rows and steps of `unrolled_rows`: `(S, V)`, or of as many columns as its head computes.

    Args:
        model (`PreTrainedModel`): a [`FeatureDraft`], or a wrapper of one.
        batch (`dict`): of [`hf_osd.distill.feature_collator.FeatureCollator`], on the model's device.
        steps (`int`): K.
    """
    names = ("input_ids", "attention_mask", "position_ids", "features")
    logits = model(
        **{name: batch[name] for name in names},
        logits_to_keep=batch["keep"],
        unroll=min(steps, batch["input_ids"].shape[1]),
        use_cache=False,
    ).logits  # (K, B, keep, V); (B, keep, V) of one step
    logits = (logits if logits.ndim == 4 else logits[None]).flatten(1, 2)  # (K, B·keep, V)
    rows, step = unrolled_rows(batch["depth"], steps)
    return logits[step, batch["rows"][rows]]


def unrolled_losses(
    logits: Tensor, at: Tensor, p: Tensor, depth: Tensor, config: OnlineConfig, draftable: Tensor | None = None
) -> Tensor:
    """The loss of each row, `(R,)`: the divergence of each step that it has, weighted by 0.8 to the power of the step, in all.

    Args:
        logits (`Tensor` `(S, C)`): as `unrolled_logits` gives them.
        at (`Tensor` int64 `(R, k)`): the columns of the targets' tokens in them.
        p (`Tensor` float32 `(R, k+1)`): the targets, see [`hf_osd.distill.losses.target_buckets`].
        depth (`Tensor` int64 `(R,)`): as of `unrolled_rows`.
        config (`OnlineConfig`): names divergence and steps.
        draftable (`Tensor` bool `(R, k)`, *optional*): which of the targets' tokens the draft's LM head has, if it lacks some; see
            [`hf_osd.distill.losses.among_draftable`].
    """
    rows, step = unrolled_rows(depth, config.unrolled_steps)
    p, q, weights = p[rows], draft_buckets(logits, at[rows]), 1.0
    if draftable is not None:
        p, q, weights = among_draftable(p, q, draftable[rows])
    losses = weights * divergence(p, q, config.divergence, config.beta, config.total_variation_weight)  # (S,)
    return losses.new_zeros(len(depth)).index_add(0, rows, losses * _DECAY**step)
