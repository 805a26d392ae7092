"""Training-time test: a feature-level draft in training reads its own states of a step before, as it does when it drafts several tokens (EAGLE-3, arXiv
2503.01840, section 3.2).

Step k (from 0) predicts a token after k drafted ones. The tokens that it reads are the true ones, for only after these is its prediction ever used; of the states
the last k are the draft's own. A row has a step k where at least k columns of its request lie before its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_osd.distill.losses import among_draftable, divergence, draft_buckets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

# The weight of each step in the loss, to that of the step before (EAGLE-3's).
_DECAY = 0.8
# Up to this difference, in units of the target's root mean square, distance is square, and beyond it linear: a few numbers of a state are many times the others.
_BETA = 0.5


class Unrolled(NamedTuple):
    """Names the S predictions of R rows, step by step: of each its row and its step, int64 `(S,)`, as `unrolled_rows` gives them, and the state `(S, H)` that the
    draft's LM head read there."""

    rows: Tensor
    step: Tensor
    states: Tensor


def unrolled_rows(depth: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Which of R rows have which of the steps: `(rows, step)`, int64 `(S,)` each, step by step.

    Args:
        depth (`Tensor` int64 `(R,)`): as [`hf_osd.distill.feature_collator.FeatureCollator`] gives it.
        steps (`int`): K, the steps asked for.
    """
    step, rows = (depth >= torch.arange(steps, device=depth.device)[:, None]).nonzero(as_tuple=True)
    return rows, step


def unrolled_logits(model: PreTrainedModel, batch: dict, steps: int) -> tuple[Tensor, Unrolled]:
    """Compute the draft's logits, `(S, V)` or of as many columns as its head computes, and of which rows and steps they are.

    Args:
        model (`PreTrainedModel`): a [`FeatureDraft`], or a wrapper of one.
        batch (`dict`): of [`hf_osd.distill.feature_collator.FeatureCollator`], on the model's device.
        steps (`int`): K.
    """
    names = ("input_ids", "attention_mask", "position_ids", "features")
    rows, step = unrolled_rows(batch["depth"], steps)
    outputs = model(
        **{name: batch[name] for name in names},
        logits_to_keep=batch["keep"],
        unroll=min(steps, batch["input_ids"].shape[1]),
        rows=step * len(batch["input_ids"]) * batch["keep"] + batch["rows"][rows],
        use_cache=False,
    )
    return outputs.logits, Unrolled(rows, step, outputs.head_states)


def state_distances(unrolled: Unrolled, batch: dict) -> Tensor:
    """Compute how far the draft's last states are from the target's, `(S,)`: the smooth L1 distance in units of the root mean square of the target's, averaged over its
    numbers; 0 where the target's was not recorded. (The regression loss of EAGLE, arXiv 2401.15077, section 4.1, which does not name a unit.)

    Args:
        unrolled (`Unrolled`): the draft's states, see [`unrolled_logits`].
        batch (`dict`): of a [`hf_osd.distill.feature_collator.FeatureCollator`] with `last_state`, on the same device.
    """
    rows, _, states = unrolled
    aims, known = batch["last_states"].float(), batch["has_last_state"]
    unit = aims.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    aims, unit = (aims / unit)[rows], unit[rows]
    distance = F.smooth_l1_loss(states.float() / unit, aims, reduction="none", beta=_BETA).mean(-1)
    return distance * known[rows]


def unrolled_losses(
    logits: Tensor,
    unrolled: Unrolled,
    at: Tensor,
    p: Tensor,
    config: OnlineConfig,
    draftable: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """Compute the loss of each row, `(R,)`: the divergence of each step that it has, and the distance of its state from the target's, weighted by 0.8 to the power of the step, in all.

    Args:
        logits (`Tensor` `(S, C)`), unrolled (`Unrolled`): as `unrolled_logits` gives them.
        at (`Tensor` int64 `(R, k)`): the columns of the targets' tokens in them.
        p (`Tensor` float32 `(R, k+1)`): the targets, see [`hf_osd.distill.losses.target_buckets`].
        config (`OnlineConfig`): names the divergence.
        draftable (`Tensor` bool `(R, k)`, *optional*): which of the targets' tokens the draft's LM head has, if it lacks some; see
            [`hf_osd.distill.losses.among_draftable`].
        distances (`Tensor` `(S,)`, *optional*): of `state_distances`, which `config.state_loss_weight` weighs.
    """
    count, (rows, step, _) = len(p), unrolled
    p, q, weights = p[rows], draft_buckets(logits, at[rows]), 1.0
    if draftable is not None:
        p, q, weights = among_draftable(p, q, draftable[rows])
    losses = weights * divergence(p, q, config.divergence, config.beta, config.total_variation_weight)  # (S,)
    if distances is not None:
        losses = losses + config.state_loss_weight * distances
    return losses.new_zeros(count).index_add(0, rows, losses * _DECAY**step)
