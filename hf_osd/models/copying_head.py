"""`install_copying_head`: lets a feature-level draft begin with an attention head that continues what the text has said before (an induction head, arXiv 2209.11895),
written down in place of learnt.

The column of token t_j reads t_j's embedding and the target's states at j-1, in which its first layers still have t_{j-1}. So the head asks with t_j's embedding for columns
whose *state* is that of the same token. These are the columns after earlier occurrences of it. Their *embedding* is that of the token which came next there, and the head
adds it to the stream in the direction in which the LM head reads it.

Symbols: H the draft's width, H_t the target's, d that of an attention head, n the numbers of a token's code.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_osd.models.feature_config import FeatureDraftConfig
from hf_osd.models.feature_draft import FeatureDraft, rotary_frequencies
from hf_osd.models.random_texts import random_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Random texts that the target reads: half as many as its width, within these bounds; and how many of them at once.
_TEXTS, _AT_ONCE = (16, 256), 32
# Tokens that stand for the whole vocabulary: at least so many, and so many times the width.
_TOKENS, _TOKENS_A_WIDTH = 8192, 4
# Codes lie where rotary embedding turns by less than a radian in a hundred tokens, so that it does not matter how far back a token was.
_SLOW = 0.01
# The attention score of a token's code with itself, in nats; other tokens' are about 0, and vary by this over √n.
_SHARPNESS = 16.0
# What a copied token's logit is raised by, in nats, where all attention is on it and all else the stream has is nothing.
_BOOST = 40.0
# The probe that reads codes from states is the best of these ridges, as shares of the states' mean square, on tokens that it was not fitted on, and has to explain so much of
# the codes' variance there.
_RIDGES, _EXPLAINED = (1e-3, 1e-2, 1e-1, 1.0), 0.2


class _Weights(NamedTuple):
    """A copying head, float32: `probe` `(H, H_t)`, from states to the stream; `place` `(H, n)`, the directions that are its own there; its projections `(d, 2H)`, and
    what it adds, `o` `(H, d)`."""

    probe: Tensor
    place: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def install_copying_head(draft: FeatureDraft, target: PreTrainedModel, scale: float) -> bool:
    """Write a copying head into the last group of attention heads that share keys and values. `False`, and nothing is changed, where there is one group alone, or
    states do not show which token they are of.

    Args:
        draft (`FeatureDraft`): a grown one, with its target's embeddings and LM head.
        target (`PreTrainedModel`): the target, whose first layers read some thousands of random tokens.
        scale (`float`): the root mean square of the draft's stream.
    """
    config, attention, fc = draft.config, draft.midlayer.self_attn, draft.fc.weight
    dims = _slow_dims(config)
    if config.num_key_value_heads < 2 or len(dims) < 2 or config.head_dim > config.hidden_size:
        return False
    sample = states_of_random_tokens(target, config.aux_layers[0])
    if sample is None:
        return False
    try:
        head = _weights_of(draft, dims, *sample, scale)
    except torch.linalg.LinAlgError as error:  # the draft can begin without
        logger.debug("A copying head could not be computed: %s", error)
        return False
    if head is None or not all(part.to(fc.dtype).isfinite().all() for part in head):
        return False
    feature = fc.cpu().float()
    feature = feature - head.place @ (head.place.T @ feature)
    feature[:, : config.target_hidden_size] += head.probe
    fc.copy_(feature)
    width, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    first, group = (config.num_attention_heads - shared) * width, (config.num_key_value_heads - 1) * width
    attention.q_proj.weight[first : first + width] = head.q.to(fc)
    attention.k_proj.weight[group:] = head.k.to(fc)
    attention.v_proj.weight[group:] = head.v.to(fc)
    attention.o_proj.weight[:, first:] = 0.0  # the others of the group had keys and values of their own
    attention.o_proj.weight[:, first : first + width] = head.o.to(fc)
    return True


def _slow_dims(config: FeatureDraftConfig) -> Tensor:
    """The dimensions `(n,)` of an attention head in which codes can lie."""
    slow = (rotary_frequencies(config)[0] < _SLOW).nonzero().squeeze(-1)
    return torch.cat([slow, slow + config.head_dim // 2])[: config.hidden_size // 4]


def _weights_of(draft: FeatureDraft, dims: Tensor, ids: Tensor, states: Tensor, scale: float) -> _Weights | None:
    """Compute a copying head, whose codes lie in `dims`, by the states `(N, H_t)` that the target has at tokens `ids` `(N,)` after the first layer that the draft reads.
    `None` where they do not show which token they are of."""
    size, width, lm_head = draft.config.hidden_size, draft.config.head_dim, draft.lm_head.weight
    # 1. Tokens: as the layer reads them, and what raises their logits.
    step = max(len(lm_head) // max(_TOKENS, _TOKENS_A_WIDTH * size), 1)
    tokens = torch.arange(0, len(lm_head), step, device="cpu")
    inputs = _inputs(draft, tokens)
    outputs = (lm_head[tokens.to(lm_head.device)] * draft.norm.weight).cpu().float()
    outputs = outputs - outputs.mean(0)  # what raises all of them raises none
    # 2. Their codes (n,), of unit variance and without what all share, and the probe that reads them from states.
    code = _whitened(inputs, len(dims), without=inputs.mean(0))
    if len(draft.fc_norm):
        states = draft.fc_norm[0](states.to(draft.fc.weight))
    probe = _probe(states.cpu().float(), _inputs(draft, ids) @ code)
    if probe is None:
        return None
    # 3. The codes' place in the stream, where the LM head reads least; and the directions in which it tells tokens apart best.
    variances, directions = torch.linalg.eigh(outputs.T @ outputs / len(outputs))  # ascending
    place = directions[:, : len(dims)]
    raises = directions[:, -width:] / variances[-width:].clamp_min(variances[-1] * 1e-6).sqrt()  # (H, d)
    # 4. Queries are the tokens' codes, keys those in the states, values what raises the tokens' logits.
    normed = draft.midlayer.hidden_norm.weight.cpu().float()
    unscaled = torch.where(normed.abs() > 0.05 * normed.abs().mean(), 1 / normed, 0.0)
    q, k, v = (torch.zeros(width, 2 * size, dtype=torch.float32, device="cpu") for _ in range(3))
    q[dims, :size] = _SHARPNESS * width**0.5 / len(dims) * code.T
    k[dims, size:] = place.T * unscaled
    v[:, :size] = _fitted(inputs, outputs @ raises, 1e-4).T
    return _Weights(scale * place @ probe.T, place, q, k, v, scale * _BOOST / width * raises)


class _Enough(Exception):
    """A layer has run, and those after it need not."""


@torch.no_grad()
def states_of_random_tokens(target: PreTrainedModel, depth: int) -> tuple[Tensor, Tensor] | None:
    """Run the target's first layers on random tokens: these, int64 `(N,)`, and its states after `depth` layers, float32 `(N, H_t)`; `None` if that fails."""
    layers = getattr(target.get_decoder(), "layers", None)
    if not layers or not 0 < depth <= len(layers):
        return None
    width = target.get_input_embeddings().weight.shape[-1]
    found: list[Tensor] = []
    thread = threading.get_ident()

    def keep(layer, inputs, output):
        if threading.get_ident() != thread:  # the target may serve others meanwhile
            return
        # The first token of a text has states like no other's.
        found.append((output if isinstance(output, Tensor) else output[0])[:, 1:].flatten(0, 1).float().cpu())
        raise _Enough

    handle = layers[depth - 1].register_forward_hook(keep)
    try:
        with random_texts(target, min(max(width // 2, _TEXTS[0]), _TEXTS[1])) as ids:
            for some in ids.split(_AT_ONCE):
                with contextlib.suppress(_Enough):
                    target(input_ids=some, use_cache=False)
    except Exception as error:  # the draft can begin without
        logger.debug("The target's first states could not be measured: %s", error)
        return None
    finally:
        handle.remove()
    ids, states = ids[:, 1:].flatten().cpu(), torch.cat(found)
    return (ids, states) if len(states) == len(ids) and states.isfinite().all() else None


def _inputs(draft: FeatureDraft, ids: Tensor) -> Tensor:
    """Tokens as the layer's attention reads them, float32 `(N, H)`."""
    return draft.midlayer.input_layernorm(draft.embed_tokens(ids.to(draft.embed_tokens.weight.device))).cpu().float()


def _whitened(x: Tensor, count: int, without: Tensor) -> Tensor:
    """The directions `(H, n)` of largest variance of `x` `(N, H)`, across `without` `(H,)`, scaled so that its parts there have variance 1."""
    without = without / without.norm().clamp_min(1e-12)
    x = x - x.mean(0)
    x = x - (x @ without)[:, None] * without
    variances, directions = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    return directions[:, -count:] / variances[-count:].clamp_min(1e-12).sqrt()


def _probe(states: Tensor, codes: Tensor) -> Tensor | None:
    """The linear map `(H_t, n)` from states `(N, H_t)` to codes `(N, n)`, by ridge regression; `None` if it explains too little."""
    learnt = len(states) * 3 // 4
    found = [_fitted(states[:learnt], codes[:learnt], ridge) for ridge in _RIDGES]
    errors = [float((states[learnt:] @ one - codes[learnt:]).square().mean()) for one in found]
    best = min(range(len(found)), key=errors.__getitem__)
    explained = 1 - errors[best] / float(codes[learnt:].square().mean())
    logger.debug("A probe of the target's states explains %.2f of the tokens' codes.", explained)
    return found[best] if explained >= _EXPLAINED else None


def _fitted(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """The linear map `(A, B)` from `x` `(N, A)` to `y` `(N, B)`, by ridge regression."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.T @ x / len(x) + ridge * x.square().mean() * eye, x.T @ y / len(x))
