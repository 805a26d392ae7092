"""`Blueprint`: a draft made of some of a target's layers, without weights, and which of the target's tensors each of its own is."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.plain import has_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Choices of layers that are tried in search of one that can be recommended.
_TRIED = 40
# In which configs count the layers of a decoder.
_COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")


class Blueprint:
    """The draft of `target` that has these of its decoder layers.

    Args:
        target (`PreTrainedModel`): a causal LM, or a model that has one in it, whose text model transformers has as a class of its own.
        picked (`list[int]`): the layers, from 0.

    Raises:
        ValueError: if there is no such draft.

    Attributes:
        draft (`PreTrainedModel`): it, on the meta device.
        sources (`dict[str, str]`): the name in the target by the name in the draft, of parameters and buffers.
    """

    def __init__(self, target: PreTrainedModel, picked: list[int]):
        kind, config = text_kind(target)
        self.depth, self.picked = depth_of(target), picked
        try:
            with torch.inference_mode(False), torch.device("meta"):
                self.draft = kind(picked_config(config, picked, self.depth))
        except Exception as error:  # a class may refuse what its config cannot say
            raise ValueError(f"a {kind.__name__} of layers {picked} cannot be made ({error})") from error
        # Of a model that sees, the text model lies deeper than in a class of its own.
        inside = [
            (_name_of(one, one.get_decoder()), _name_of(one, one.get_output_embeddings()))
            for one in (self.draft, target)
        ]
        stack = _stack_name(self.draft, len(picked), inside[0][0])
        tensors, self._own = _tensors(target), _tensors(self.draft)
        self.sources = {}
        for name, placeholder in self._own.items():
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
        """The dimension in which a tensor of the target holds one part a layer, of which the draft's has those of its layers; `None` if there is none."""
        wanted = self._own[name].shape
        unlike = [i for i, (a, b) in enumerate(zip(shape, wanted, strict=False)) if a != b]
        if len(shape) != len(wanted) or len(unlike) != 1:
            return None
        [dim] = unlike
        return dim if shape[dim] * len(self.picked) == wanted[dim] * self.depth else None

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What the draft has of a tensor of the target."""
        dim = self.packed(name, tensor.shape) if tensor.shape != self._own[name].shape else None
        if dim is None:
            return tensor
        index = torch.tensor(self.picked, device=tensor.device)
        return tensor.unflatten(dim, (self.depth, -1)).index_select(dim, index).flatten(dim, dim + 1)


def blueprint(target: PreTrainedModel, layers: Sequence[int]) -> Blueprint:
    """The blueprint of a draft of these layers, negative ones counted from the end.

    Raises:
        ValueError: if there is none, with what to do about it.
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
                f"{error}: its layers are not of one kind. Pick other `layers` than {picked}, such as {list(other)}."
            ) from error
        raise ValueError(
            f"{error}. No draft can be grown from this target; load a small model of its family, with "
            "AutoModelForCausalLM.from_pretrained."
        ) from error


def text_kind(target: PreTrainedModel) -> tuple[type, PretrainedConfig]:
    """The class and the config of the causal LM that a draft of `target` is.

    Raises:
        ValueError: if there is none.
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
            f"`target` is a {type(target).__name__} with an adapter, which no draft would have. Grow from `target.merge_and_unload()`, or from the model "
            "without it."
        )
    if getattr(target, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`target` is a quantised {type(target).__name__}, whose weights are in no form that can be learnt. Grow from the model as it was before, "
            "or from `target.dequantize()`, or load a small model of its family."
        )
    if config is target.config:
        return type(target), config
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or kind is type(target):
        raise ValueError(
            f"`target` is a {type(target).__name__}, of whose text model ({type(config).__name__}) transformers has no class of its own, so none of its "
            "layers can be a draft. Load a small text model of the same vocabulary with AutoModelForCausalLM.from_pretrained."
        )
    return kind, config


def text_model(target: PreTrainedModel) -> PreTrainedModel:
    """The causal LM that a model which sees holds whole, if it does; else the model itself."""
    if target.config.get_text_config(decoder=True) is target.config or target.config.is_encoder_decoder:
        return target
    kind = text_kind(target)[0]
    return next((module for module in target.modules() if type(module) is kind), target)


def depth_of(target: PreTrainedModel) -> int:
    """How many decoder layers the target has.

    Raises:
        ValueError: if they are not to be found.
    """
    config = text_kind(target)[1]
    inside = _name_of(target, target.get_decoder())
    for name in reversed(_COUNTS):  # of two, the first counts an encoder's
        depth = getattr(config, name, None)
        if isinstance(depth, int) and _stack_name(target, depth, inside):
            return depth
    raise ValueError(
        f"{type(target).__name__} keeps its {config.num_hidden_layers} layers in no ModuleList that hf_osd can find; make the draft by hand, or load a "
        "small model of its family."
    )


def picked_config(config: PretrainedConfig, picked: list[int], depth: int) -> PretrainedConfig:
    """The config of a draft that has these layers of the model of `config`."""
    counts = [name for name in _COUNTS if name in vars(config) or name in config.attribute_map]
    changes = dict.fromkeys(counts, len(picked))
    for name, value in vars(config).items():  # layer_types and other lists with an entry a layer
        other = name == "architectures" or name.endswith(("_token_id", "_token_ids"))  # may be as long by chance
        if isinstance(value, (list, tuple)) and len(value) == depth and not other:
            changes[name] = type(value)(value[i] for i in picked)
    if shared := getattr(config, "num_kv_shared_layers", 0):  # the last ones, which read the keys and values of others
        changes["num_kv_shared_layers"] = sum(i >= depth - shared for i in picked)
    own = config.to_dict().get("per_layer_config")
    if own:  # by layer, from which such a config derives more when it is made
        values = config.to_dict() | changes
        values["per_layer_config"] = {j: own[str(i)] for j, i in enumerate(picked) if str(i) in own}
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
    """The name of the ModuleList that holds the decoder layers, `"model.layers"` for one."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.startswith(inside)
    ]
    return min(names, key=len, default=None)
