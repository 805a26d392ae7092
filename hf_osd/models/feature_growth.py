"""`grow_feature_draft`: a feature-level draft for a target that has none, to begin learning with."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.blueprint import depth_of, text_model
from hf_osd.models.clean_copy import execution_device, real_tensor, unwrapped
from hf_osd.models.feature_config import ROPE_TYPES, FeatureDraftConfig
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.plain import record_ties

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_STD = 0.02
# What decoders call the norm before the LM head.
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm")
# In which configs say how wide a dense MLP is.
_INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def grow_feature_draft(
    target: PreTrainedModel, aux_layers: Sequence[int] | None = None, *, fc_norm: bool = True, seed: int = 0
) -> FeatureDraft:
    """Make a draft of one layer that reads the target's hidden states.

    Embeddings and LM head are the target's own storage, frozen, and cost no memory. The layer is as wide as the target's; its weights are random, but that it begins with
    the target's last state of `aux_layers`, and with the target's final norm. Undistilled it accepts next to nothing: it is where learning starts.

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
            embeddings or head have another width than its layers, or it lacks one of `aux_layers`.
    """
    given = unwrapped(target)
    target = text_model(given)
    depth = depth_of(target)
    layers = default_aux_layers(depth) if aux_layers is None else [int(i) for i in aux_layers]
    if any(not 0 <= i <= depth for i in layers):
        raise ValueError(
            f"`aux_layers` is {layers}; choose from 0 to {depth}, such as {default_aux_layers(depth)}: the target has {depth} layers."
        )
    config = _config_of(target, layers, fc_norm)
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
    draft.generation_config = copy.deepcopy(given.generation_config)
    return draft.eval()


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
        ValueError: if their widths differ from that of its layers, or there are fewer embeddings than rows of the head.
    """
    size = target.config.get_text_config(decoder=True).hidden_size
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
    size, heads = text.hidden_size, text.num_attention_heads
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
    norm = next((m for name in _FINAL_NORMS if (m := getattr(decoder, name, None)) is not None), None)
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
