"""`grow_feature_draft`: a feature-level draft for a target that has none, to begin learning with."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.blueprint import depth_of, text_model
from hf_osd.models.clean_copy import execution_device, real_tensor, unwrapped
from hf_osd.models.copying_head import install_copying_head
from hf_osd.models.feature_config import ROPE_TYPES, FeatureDraftConfig
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.plain import record_ties
from hf_osd.models.random_texts import random_texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_STD = 0.02
# What decoders call the norm before the LM head.
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")
# In which configs say how wide a dense MLP is.
_INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def grow_feature_draft(
    target: PreTrainedModel, aux_layers: Sequence[int] | None = None, *, fc_norm: bool = True, seed: int = 0
) -> FeatureDraft:
    """Make a draft of one layer that reads the target's hidden states.

    Embeddings and LM head are the target's own storage, frozen, and cost no memory. The layer is as wide as the target's; it begins with the weights of the target's
    last one, where that is such a layer, and with an attention head that continues what the text has said before ([`hf_osd.models.copying_head`]), and at random elsewhere; it
    reads the target's last state of `aux_layers`. Undistilled it accepts next to nothing: it is where learning starts. The target runs once on a few random tokens, to
    see how large its states are, and its first layers on some thousands, to see how these show which token they are of.

    Args:
        target (`PreTrainedModel`): a decoder-only causal LM, or a model with one in it that also sees, such as Gemma 3's.
        aux_layers (`Sequence[int]`, *optional*): after how many of the target's layers its states are read, 0 being the embeddings. Of L layers 2, L/2 and L-3, as EAGLE-3
            has them, or three others where these are not there.
        fc_norm (`bool`): normalise each layer's state before `fc`, as EAGLE-3.1 does (arXiv 2605.09992). `False` makes a draft without these norms, which readers of EAGLE-3
            heads in older vLLM and SGLang need; its residual stream then begins as the target's own.
        seed (`int`): of the random weights. The global random state is left alone.

    Returns:
        [`FeatureDraft`]: in the target's dtype, on the device of its embeddings, in eval mode.

    Raises:
        ValueError: if `target` is no decoder-only model with an LM head, has an adapter or quantised weights or some on the meta device, its layers cannot be found, its
            embeddings or head have another width than its layers, its layers hand on several states a position (Gemma 3n), it has no attention layers; or if `aux_layers` are not two or more different layers that it has.
    """
    given = unwrapped(target)
    target = text_model(given)
    depth = depth_of(target)
    config = _config_of(
        target, default_aux_layers(depth) if aux_layers is None else _checked(aux_layers, depth), fc_norm
    )
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            draft = FeatureDraft(config)
        home, dtype = execution_device(target.get_input_embeddings()), target.dtype
        random = torch.Generator().manual_seed(seed)
        for name, placeholder in list(draft.named_parameters()):
            if placeholder.requires_grad:
                value = _first_value(name, placeholder.shape, random)
                _put(draft, name, nn.Parameter(value.to(home, dtype)))
        draft.norm.weight.copy_(_final_scale(target, config.hidden_size).to(draft.norm.weight))
        share_ends(draft, target)
        scale = _size_of_states(target, config.aux_layers[-1])
        if scale is not None:
            copy_last_layer(draft, target, scale if fc_norm else 1.0)
            install_copying_head(draft, target, 1.0 if fc_norm else scale)
    draft.generation_config = copy.deepcopy(given.generation_config)
    return draft.eval()


def copy_last_layer(draft: FeatureDraft, target: PreTrainedModel, scale: float):
    """Give a draft's layer the weights of the target's last, as far as that has what the draft's has, of the same shapes: attention reads the feature with them, and the
    embedding with its random ones. A head start: from 250 requests on it is worth some points of acceptance.

    Args:
        scale (`float`): how many times larger the target's stream is than the draft's, to which what the layer adds is scaled.
    """
    layer = next(iter(reversed(getattr(target.get_decoder(), "layers", None) or [])), None)
    norms = ("input_layernorm", "post_attention_layernorm")
    # Where the two norms are not the only ones, they stand for something else.
    if (
        layer is None
        or any(getattr(layer, name, None) is None for name in norms)
        or hasattr(layer, "pre_feedforward_layernorm")
    ):
        return
    ours, attention, mlp = draft.midlayer, getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    width = draft.config.hidden_size
    heads = {name: getattr(ours.self_attn, name).weight[:, width:] for name in ("q_proj", "k_proj", "v_proj")}
    heads["o_proj"] = ours.self_attn.o_proj.weight
    gated = {name: getattr(ours.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    # Where weights come from; those that take them, the last of which adds to the stream; and the norms before them, the draft's and the target's.
    parts = [(mlp, gated, ours.post_attention_layernorm, layer.post_attention_layernorm)]
    if not hasattr(attention, "q_norm"):  # which the draft has not
        parts.append((attention, heads, ours.hidden_norm, layer.input_layernorm))
    parts = [part for part in parts if _has_all(part[0], part[1])]
    for owner, aims, norm, its_norm in parts:
        for name, aim in aims.items():
            aim.copy_(_of_target(target, getattr(owner, name).weight, aim.device).to(aim.dtype))
        aim.mul_(1 / scale)
        norm.weight.copy_(_scale_of(target, its_norm, width))


def _has_all(owner: nn.Module | None, aims: dict[str, Tensor]) -> bool:
    """Tell whether a module has linear layers of these names and shapes, in floating point."""
    weights = [getattr(getattr(owner, name, None), "weight", None) for name in aims]
    return all(
        weight is not None and weight.shape == aim.shape and weight.is_floating_point()
        for weight, aim in zip(weights, aims.values(), strict=True)
    )


def _size_of_states(target: PreTrainedModel, layer: int) -> float | None:
    """Measure the root mean square of the target's states after a layer, the median over random tokens; `None` if that fails."""
    try:
        with random_texts(target, 1) as ids:
            outputs = target(input_ids=ids, use_cache=False, output_hidden_states=True)
        size = float(outputs.hidden_states[layer].float().square().mean(-1).sqrt().median())
    except Exception as error:  # the draft can begin at random
        logger.debug("The size of the target's states could not be measured: %s", error)
        return None
    return size if math.isfinite(size) and size > 0 else None


def _checked(aux_layers: Sequence[int], depth: int) -> list[int]:
    """Return a user's choice of layers as whole numbers; a `ValueError` that recommends one if the target has no such layers, or they are too few or not distinct."""
    try:
        layers = [int(i) for i in aux_layers]
        exact = all(isinstance(i, str) or float(i) == int(i) for i in aux_layers)
    except (TypeError, ValueError, OverflowError):  # no list, or no numbers in it
        layers, exact = [], False
    if not exact or len(set(layers)) < len(layers) or not all(0 <= i <= depth for i in layers) or len(layers) < 2:
        raise ValueError(
            f"`aux_layers` is {aux_layers!r}; give a list of two or more different whole numbers from 0 to {depth}, such as {default_aux_layers(depth)}: the target has "
            f"{depth} layers, and 0 stands for its embeddings."
        )
    return layers


def default_aux_layers(depth: int) -> list[int]:
    """The layers of a target of so many whose states are read by default: three, if it has as many."""
    layers = {min(max(i, 1), max(depth - 1, 1)) for i in (2, depth // 2, depth - 3)}
    for other in (*range(depth - 1, 0, -1), depth, 0):
        if len(layers) < min(3, max(depth, 2)):
            layers.add(other)
    return sorted(layers)


def share_ends(draft: FeatureDraft, target: PreTrainedModel, head: bool = True):
    """Give a draft the target's embeddings and LM head, in their storage, frozen.

    Args:
        head (`bool`): the LM head as well.

    Raises:
        ValueError: if they are of other sizes than the draft's.
    """
    config, entry, out = draft.config, target.get_input_embeddings(), target.get_output_embeddings()
    check_ends(target)
    if out.weight.shape != (config.vocab_size, config.hidden_size):
        raise ValueError(
            f"The draft has {config.vocab_size} tokens and width {config.hidden_size}, and {type(target).__name__} has {out.weight.shape[0]} and {out.weight.shape[1]}. Choose a "
            "draft made for this target, or grow one with hf_osd.grow_feature_draft(target)."
        )
    tied = head and (entry.weight is out.weight or (entry.weight.is_meta and target.config.tie_word_embeddings))
    home = execution_device(entry)
    rows = _of_target(target, entry.weight, home)[: config.vocab_size]  # beyond them are images and the like
    draft.embed_tokens.weight = nn.Parameter(rows, requires_grad=False)
    if head and tied:
        draft.lm_head.weight = draft.embed_tokens.weight
    elif head:
        draft.lm_head.weight = nn.Parameter(_of_target(target, out.weight, home), requires_grad=False)
    if head and getattr(out, "bias", None) is not None:
        draft.lm_head.bias = nn.Parameter(_of_target(target, out.bias, home), requires_grad=False)
    record_ties(draft)


def check_ends(target: PreTrainedModel):
    """See that a feature-level draft can have the target's embeddings and LM head.

    Raises:
        ValueError: if their widths differ from that of its layers, there are fewer embeddings than rows of the head, or its layers hand on several states a position (AltUp).
    """
    text = target.config.get_text_config(decoder=True)
    size, states = text.hidden_size, getattr(text, "altup_num_inputs", None) or 1
    if states > 1:
        raise ValueError(
            f"The layers of {type(target).__name__} hand on {states} states a position (AltUp), and a feature-level draft reads one. Grow one with hf_osd.grow_draft instead."
        )
    entry, head = (end.weight.shape for end in (target.get_input_embeddings(), target.get_output_embeddings()))
    if entry[1:] != (size,) or head[1:] != (size,) or entry[0] < head[0]:
        raise ValueError(
            f"{type(target).__name__} has embeddings {tuple(entry)}, an LM head {tuple(head)} and layers of width {size}; a feature-level draft needs these of one "
            "width, and an embedding for each token. Grow one with hf_osd.grow_draft instead."
        )


def of_target(target: PreTrainedModel) -> dict:
    """What a config says of the target that the draft is for, and of its embeddings."""
    entry, name = target.get_input_embeddings(), target.config._name_or_path
    return {
        "embed_scale": float(getattr(entry, "scalar_embed_scale", getattr(entry, "embed_scale", 1.0))),
        "target_num_hidden_layers": depth_of(target),
        # A folder of this machine is nobody else's business.
        "target_name_or_path": None if not name or os.path.exists(name) or os.path.isabs(name) else name,
        "target_architectures": [type(target).__name__],
    }


def _config_of(target: PreTrainedModel, layers: list[int], fc_norm: bool) -> FeatureDraftConfig:
    check_ends(target)
    text, head = target.config.get_text_config(decoder=True), target.get_output_embeddings()
    if getattr(text, "num_attention_heads", None) is None and getattr(target, "_is_stateful", False):
        raise ValueError(
            f"`target` is a {type(target).__name__}, whose state cannot be taken back to before a rejected token, so that nothing can draft for it. Choose a target "
            "of attention layers."
        )
    size = text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or max(size // 64, 1)
    pairs = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or max(size // heads, 1)
    inner = next((n for name in _INNER_SIZES if isinstance(n := getattr(text, name, None), int) and n > 0), 4 * size)
    eps = (getattr(text, name, None) for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"))
    return FeatureDraftConfig(
        vocab_size=head.weight.shape[0],
        hidden_size=size,
        aux_layers=layers,
        fc_norm=fc_norm,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=pairs if heads % pairs == 0 else heads,
        head_dim=width + width % 2,
        rms_norm_eps=next((e for e in eps if isinstance(e, float)), 1e-5),
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2048,
        rope_parameters=_rope_of(text),
        head_bias=getattr(head, "bias", None) is not None,
        **of_target(target),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def _rope_of(text: PretrainedConfig) -> dict:
    """The target's rotary embedding, of its layers that read the whole text where kinds differ; the usual one where it has none, or one that follows the text's length."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}
    theta = float(rope.get("rope_theta") or 10000.0)
    if rope.get("rope_type") not in ROPE_TYPES:
        return {"rope_type": "default", "rope_theta": theta}
    return {k: v for k, v in rope.items() if k != "partial_rotary_factor"} | {"rope_theta": theta}


def _first_value(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    """What a weight that trains begins with, float32."""
    if len(shape) == 1:
        return torch.ones(shape, device="cpu", dtype=torch.float32)
    if name == "fc.weight":
        value = torch.zeros(shape, device="cpu", dtype=torch.float32)
        value[:, -shape[0] :].fill_diagonal_(1.0)
        return value
    return _STD * torch.randn(shape, generator=random, device="cpu", dtype=torch.float32)


def _final_scale(target: PreTrainedModel, size: int) -> Tensor:
    """What the target's final norm multiplies by, `(H,)`: some keep it less one. Ones if there is no such norm."""
    decoder = target.get_decoder()
    return _scale_of(
        target, next((m for name in _FINAL_NORMS if (m := getattr(decoder, name, None)) is not None), None), size
    )


def _scale_of(target: PreTrainedModel, norm: nn.Module | None, size: int) -> Tensor:
    """What a norm of the target multiplies by, float32 `(H,)`."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (size,):
        return torch.ones(size, device="cpu", dtype=torch.float32)
    home = execution_device(norm)
    scale = _of_target(target, weight, home).float()
    if isinstance(norm, nn.LayerNorm):
        return scale
    applied = norm(torch.ones(1, 1, size, device=home, dtype=weight.dtype)).detach().flatten().float()
    # As it is kept, which is exact, unless that is not what is applied.
    return next((kept for kept in (scale, 1 + scale) if torch.allclose(applied, kept, rtol=0.02)), applied)


def _of_target(target: PreTrainedModel, weight: Tensor, home: torch.device) -> Tensor:
    """A weight of the target with its values, in its storage where it has one there."""
    name = next(name for name, p in target.named_parameters(remove_duplicate=False) if p is weight)
    return real_tensor(target, name).detach().to(home)


def _put(model: nn.Module, name: str, parameter: nn.Parameter):
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner).register_parameter(leaf, parameter)
