"""Divergences between target and draft on sparse targets.

| symbol | is | shape |
|---|---|---|
| p | the target's distribution, as log-probs over its top k tokens and one tail bucket | `(R, k+1)` |
| q | the draft's, over the same k tokens and the same bucket | `(R, k+1)` |
| loss | one divergence a row, in nats (total variation: a probability) | `(R,)` |

Putting the tail into one bucket is a coarsening, so by the data-processing inequality each divergence here is a lower bound of
the dense one, and equal to it at k = V. Sources: GKD's generalized JSD (arXiv 2306.13649, eq. 1, as
`trl.experimental.gkd.GKDTrainer.generalized_jsd_loss` computes it); total variation as 1 - α (arXiv 2310.07177, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The draft's tail is at least this much mass: 1 - Σ in float32 is not known better, and log(0) has no gradient.
_TAIL_EPS = 1e-6
# A kept token that the target rules out (log p = -inf) counts as this likely, in nats: 0·log 0 is NaN, and reverse KL infinite.
_RULED_OUT = -100.0


def target_buckets(top_logps: Tensor, tail_logp: Tensor) -> Tensor:
    """Join p's stored log-probs, `(R, k)` and `(R,)` of any float dtype, to float32 `(R, k+1)`."""
    return torch.cat([top_logps.float(), tail_logp.float()[:, None]], dim=-1).clamp_min(_RULED_OUT)


def draft_buckets(logits: Tensor, top_ids: Tensor) -> Tensor:
    """Turn the draft's logits `(R, V)` into q's log-probs `(R, k+1)` over the target's top k `(R, k)` and the tail.

    Costs one log-sum-exp over V and a gather; no `(R, V)` log-softmax is kept.
    """
    top = _LogProbsAt.apply(logits.float(), top_ids.long())  # (R, k)
    covered = top.logsumexp(-1).clamp_max(math.log1p(-_TAIL_EPS))  # (R,)
    return torch.cat([top, torch.log(-torch.expm1(covered))[:, None]], dim=-1)


class _LogProbsAt(torch.autograd.Function):
    """Computes `logits.log_softmax(-1).gather(-1, ids)` with one `(R, V)` tensor, which its backward writes over, where the plain expression makes five. Beside the matrix products learning spends its time on these."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True)  # (R, 1)
        exps = (logits - largest).exp_()
        total = exps.sum(-1, keepdim=True)
        ctx.save_for_backward(exps, ids, total)
        return logits.gather(-1, ids) - (largest + total.log())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        exps, ids, total = ctx.saved_tensors
        # d(z_i - lse)/dz = 1[i] - softmax
        rows = exps.mul_(-grad.sum(-1, keepdim=True) / total)
        return rows.scatter_add_(-1, ids, grad), None


def among_draftable(p: Tensor, q: Tensor, draftable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Restrict targets to the tokens that a draft can draft, for one whose LM head lacks some of the target's.

    What it lacks it can never propose, so the best acceptance Σ min(p, q) there is, at temperature 1, is that of q ∝ p among the others: p is renormalised among them, and
    p's mass there is what the row weighs, for only that much of it can be accepted. So no gradient comes from what is lacking: where all the target wants is lacking, the
    row teaches next to nothing. (EAGLE-3 and SpecForge take the target's softmax over the draft's columns and leave out rows whose likeliest token is none of them: the
    same for a sure target.)

    Args:
        p (`Tensor` float32 `(R, k+1)`), q (`Tensor` `(R, k+1)`): log-probs of top k and tail, of target and draft.
        draftable (`Tensor` bool `(R, k)`): which of the k tokens the draft's head has. The tail counts as draftable.

    Returns:
        p and q, alike and all but 0 outside the draftable tokens, and the rows' weights `(R,)`. All are finite.
    """
    kept = torch.nn.functional.pad(draftable, (0, 1), value=True)
    mass = p.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True).clamp_max(0.0)  # (R, 1)
    p = torch.where(kept, p - mass, _RULED_OUT).clamp_min(_RULED_OUT)
    return p, torch.where(kept, q, _RULED_OUT), mass.squeeze(-1).exp()


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(p‖q): `generalized_jsd_loss` at beta 0."""
    return (p.exp() * (p - q)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """Compute KL(q‖p): `generalized_jsd_loss` at beta 1."""
    return (q.exp() * (q - p)).sum(-1)


def generalized_jsd(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """Compute beta·KL(p‖m) + (1-beta)·KL(q‖m) with the mixture m = beta·p + (1-beta)·q; the KLs themselves at beta 0 and 1."""
    if beta == 0:
        return forward_kl(p, q)
    if beta == 1:
        return reverse_kl(p, q)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Compute ½ Σ |p - q| = 1 - Σ min(p, q): the probability that a token sampled from q is rejected."""
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)


def divergence(p: Tensor, q: Tensor, kind: str, beta: float = 0.5, total_variation_weight: float = 0.0) -> Tensor:
    """Compute the divergence that an [`OnlineConfig`] names, plus its total variation term: `(R, k+1)` twice to `(R,)`.

    Raises:
        ValueError: if `kind` is none of `config.DIVERGENCES`.
    """
    if kind == "forward_kl":
        loss = forward_kl(p, q)
    elif kind == "reverse_kl":
        loss = reverse_kl(p, q)
    elif kind == "jsd":
        loss = generalized_jsd(p, q, beta)
    elif kind == "total_variation":
        loss = total_variation(p, q)
    else:
        raise ValueError(
            f"`divergence` is {kind!r}; choose one of 'forward_kl', 'reverse_kl', 'jsd', 'total_variation'."
        )
    if total_variation_weight and kind != "total_variation":
        loss = loss + total_variation_weight * total_variation(p, q)
    return loss
