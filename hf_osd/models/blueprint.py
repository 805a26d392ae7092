"""`Blueprint` plans a draft of some of a target's layers: the model without weights, and the target's tensor behind each of the draft's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.plain import has_adapter
from hf_osd.models.properties import empty_cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# How many choices of layers are tried to find one that an error can recommend.
_TRIED = 40
# The names under which configs count the layers of a decoder.
_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")


class Blueprint:
    """Plans the draft that has these decoder layers of `target`.

    Args:
        target (`PreTrainedModel`): a causal LM, or a model that contains one, whose text model is a class of its own in transformers.
        picked (`list[int]`): indices of the layers, from 0.

    Raises:
        ValueError: if no such draft can be made.

    Attributes:
        draft (`PreTrainedModel`): the draft, on the meta device.
        sources (`dict[str, str]`): names of parameters and buffers, the target's by the draft's.
    """

    def __init__(self, target: PreTrainedModel, picked: list[int]):
        kind, config = text_kind(target)
        self.depth, self.picked = depth_of(target), picked
        try:
            with torch.inference_mode(False), torch.device("meta"):
                self.draft = kind(picked_config(config, picked, self.depth))
        except Exception as error:  # a class may refuse a config that it cannot have
            raise ValueError(f"a {kind.__name__} of layers {picked} cannot be made ({error})") from error
        # In a multimodal model the text model lies deeper than in a class of its own.
        inside = [
            (_name_of(one, one.get_decoder()), _name_of(one, one.get_output_embeddings()))
            for one in (self.draft, target)
        ]
        stack = _stack_name(self.draft, len(picked), inside[0][0])
        tensors, self._placeholders = _tensors(target), _tensors(self.draft)
        self.sources = {}
        for name, placeholder in self._placeholders.items():
            source = name
            for ours, theirs in zip(*inside, strict=True):
                if ours and name.startswith(ours + "."):
                    source = theirs + name[len(ours) :]
                    break
            if name.startswith(stack + "."):
                index, _, rest = name[len(stack) + 1 :].partition(".")
                source = f"{_stack_name(target, self.depth, inside[1][0])}.{picked[int(index)]}.{rest}"
            found = tensors.get(source)
            if found is None or (found.shape != placeholder.shape and self.packed(name, found.shape) is None):
                raise ValueError(f"{name!r} has no counterpart in {type(target).__name__}")
            self.sources[name] = source

    def packed(self, name: str, shape: torch.Size) -> int | None:
        """Return the dimension along which a tensor of the target holds one part for each layer, so that the draft's holds the parts of its layers; `None` if
        there is none."""
        wanted = self._placeholders[name].shape
        unlike = [i for i, (a, b) in enumerate(zip(shape, wanted, strict=False)) if a != b]
        if len(shape) != len(wanted) or len(unlike) != 1:
            return None
        [dim] = unlike
        return dim if shape[dim] * len(self.picked) == wanted[dim] * self.depth else None

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a target's tensor that the draft has: all of it, unless it is packed by layer."""
        dim = self.packed(name, tensor.shape) if tensor.shape != self._placeholders[name].shape else None
        if dim is None:
            return tensor
        index = torch.tensor(self.picked, device=tensor.device)
        return tensor.unflatten(dim, (self.depth, -1)).index_select(dim, index).flatten(dim, dim + 1)


def blueprint(target: PreTrainedModel, layers: Sequence[int]) -> Blueprint:
    """Plan a draft of these layers; negative indices count from the end.

    Raises:
        ValueError: if no such draft can be made; the message names a choice of layers that works, or another remedy.
    """
    depth = depth_of(target)
    if not layers or any(not -depth <= i < depth for i in layers):
        raise ValueError(
            f"`layers` is {list(layers)}; give at least one index from {-depth} to {depth - 1}: the target has {depth} layers."
        )
    picked = [i % depth for i in layers]
    try:
        return Blueprint(target, picked)
    except ValueError as error:
        for other in itertools.islice(itertools.combinations(range(depth), len(picked)), _TRIED):
            try:
                Blueprint(target, list(other))
            except ValueError:
                continue
            raise ValueError(
                f"{error}: the layers differ in kind. Pick other `layers` than {picked}, such as {list(other)}."
            ) from error
        raise ValueError(
            f"{error}. No draft can be grown from this target; load a small model of its family, with "
            "AutoModelForCausalLM.from_pretrained."
        ) from error


def attention_layers(target: PreTrainedModel) -> list[int] | None:
    """Return the layers of a stack with recurrent states that have none themselves; `None` if no layer has any."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    cache = empty_cache(target) if getattr(target, "_is_stateful", False) else None
    layers = [] if cache is None else cache.layers
    found = [i for i, layer in enumerate(layers) if not isinstance(layer, LinearAttentionCacheLayerMixin)]
    return None if len(found) == len(layers) else found


def text_kind(target: PreTrainedModel) -> tuple[type, PretrainedConfig]:
    """Return the class and the config of the causal LM that a draft of `target` would be.

    Raises:
        ValueError: if there is no such class, or the target is an encoder-decoder, has no LM head, has an adapter, or is quantised.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = target.config.get_text_config(decoder=True)
    if target.config.is_encoder_decoder or target.get_output_embeddings() is None:
        raise ValueError(
            f"`target` is a {type(target).__name__}; a draft grows from a decoder-only model with an LM head, such as one loaded "
            "by AutoModelForCausalLM."
        )
    if has_adapter(target):
        raise ValueError(
            f"`target` is a {type(target).__name__} with an adapter, which a draft would lack. Grow from `target.merge_and_unload()`, or from the model "
            "without it."
        )
    if getattr(target, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`target` is a quantised {type(target).__name__}, whose weights cannot be trained. Grow from the model before it was quantised, "
            "or from `target.dequantize()`, or load a small model of its family."
        )
    if config is target.config:
        return type(target), config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or kind is type(target):
        raise ValueError(
            f"`target` is a {type(target).__name__}, and transformers has no separate class for its text model ({type(config).__name__}), so its "
            "layers cannot be a draft. Load a small text model of the same vocabulary with AutoModelForCausalLM.from_pretrained."
        )
    return kind, config


def text_model(target: PreTrainedModel) -> PreTrainedModel:
    """Return the causal LM inside a multimodal model, if it is a module of its own; else the model itself."""
    if target.config.get_text_config(decoder=True) is target.config or target.config.is_encoder_decoder:
        return target
    kind = text_kind(target)[0]
    return next((module for module in target.modules() if type(module) is kind), target)


def depth_of(target: PreTrainedModel) -> int:
    """Count the target's decoder layers.

    Raises:
        ValueError: if they cannot be found.
    """
    config = text_kind(target)[1]
    inside = _name_of(target, target.get_decoder())
    for name in reversed(_COUNTS):  # where there are two, the first counts an encoder's
        depth = getattr(config, name, None)
        if isinstance(depth, int) and _stack_name(target, depth, inside):
            return depth
    raise ValueError(
        f"hf_osd finds no ModuleList in {type(target).__name__} that has its {config.num_hidden_layers} layers; make the draft by hand, or load a "
        "small model of its family."
    )


def picked_config(config: PretrainedConfig, picked: list[int], depth: int) -> PretrainedConfig:
    """Make the config of a draft that has these layers of a model with this config and depth."""
    counts = [name for name in _COUNTS if name in vars(config) or name in config.attribute_map]
    changes = dict.fromkeys(counts, len(picked))
    for name, value in vars(config).items():  # layer_types and other lists with one entry for each layer
        other = name == "architectures" or name.endswith(("_token_id", "_token_ids"))  # may have that length by chance
        if isinstance(value, (list, tuple)) and len(value) == depth and not other:
            changes[name] = type(value)(value[i] for i in picked)
        elif name == "attn_layer_indices" and value:
            changes[name] = [j for j, i in enumerate(picked) if i in value]
    if shared := getattr(config, "num_kv_shared_layers", 0):  # the last ones, which read the keys and values of others
        changes["num_kv_shared_layers"] = sum(i >= depth - shared for i in picked)
    by_layer = config.to_dict().get("per_layer_config")
    if by_layer:  # entries by layer, from which the config derives other fields when it is made
        values = config.to_dict() | changes
        values["per_layer_config"] = {j: by_layer[str(i)] for j, i in enumerate(picked) if str(i) in by_layer}
        made = type(config).from_dict(values)
        made._attn_implementation = config._attn_implementation
    else:
        made = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(made, name, value)
    made._name_or_path = ""  # it is in no repository
    return made


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, one in model.named_modules() if one is module), "")


def _stack_name(model: nn.Module, depth: int, inside: str) -> str | None:
    """Return the name of the ModuleList that holds the decoder layers, such as `"model.layers"`."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.startswith(inside)
    ]
    return min(names, key=len, default=None)
