"""Turns drafts with a PEFT adapter (LoRA and its kin) into plain models, with the adapter merged into the weights or left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.models.copies import copy_draft, sharing_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_adapter(model: nn.Module) -> bool:
    """Tell whether a model is a PeftModel, or has an adapter of transformers' `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "peft_config", None))


def merged(model: nn.Module) -> PreTrainedModel:
    """Copy a model with its active adapter merged into the weights, as a plain model.

    Raises:
        ValueError: if not exactly one adapter is active.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    active_adapter(inner)
    return without_adapters(inner, merge=True)


def without_adapters(model: PreTrainedModel, merge: bool = False) -> PreTrainedModel:
    """Return the base model without adapters, in the same storage; with `merge` a copy that has the active adapter in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = copy_draft(model, set()) if merge else sharing_copy(model)
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    # A module inside another adapted one is merged with that one.
    adapted = {n: m for n, m in adapted.items() if not any(n.startswith(f"{outer}.") for outer in adapted)}
    inner, outer = (
        {id(p) for p in end.parameters()} for end in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    tied = bool(inner & outer)
    if merge:
        _unshare(base, adapted.values())
    for name, module in adapted.items():
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            plain = module.get_base_layer()
        else:
            trained = merge and module.unload_and_optionally_merge_module(True, safe_merge=False, adapter_names=None)
            plain = trained or module.original_module
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, plain)
    if merge and tied:
        _retie(base)
    record_ties(base)
    base._hf_peft_config_loaded = False
    base.__dict__.pop("peft_config", None)
    # Where transformers has loaded the adapter, it noted how to convert its names, and would write the base under converted names.
    if any(
        one.source_patterns[0].startswith("base_model.") for one in getattr(base, "_weight_conversions", None) or ()
    ):
        del base._weight_conversions  # the architecture's own apply again
    return base


def record_ties(model: PreTrainedModel):
    """Set `tie_word_embeddings` in the config to whether input embeddings and LM head are one weight: checkpoints are read by it, and have no head where they
    are tied. An encoder-decoder's config stays as it is, for there the field also decides how hidden states are scaled."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.is_encoder_decoder or not all(type(getattr(end, "weight", None)) is nn.Parameter for end in ends):
        return
    for part in (model.config, model.config.get_text_config(decoder=True)):
        one = ends[0].weight is ends[1].weight
        if getattr(part, "tie_word_embeddings", one) != one:
            part.tie_word_embeddings = one


def _retie(model: PreTrainedModel):
    """Tie input embeddings and LM head again if their values are still equal.

    Raises:
        ValueError: if they differ in an encoder-decoder, whose config cannot record that.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(ends[0].weight, ends[1].weight):
        ends[1].weight = ends[0].weight
    elif model.config.is_encoder_decoder:
        raise ValueError(
            f"Input embeddings and LM head of {type(model).__name__} are one weight, and the adapter changes one of them alone, which a plain checkpoint cannot "
            "hold. Save it as an adapter (merge=False)."
        )


def _unshare(model: nn.Module, adapted: Iterable[nn.Module]):
    """Give adapted layers their own copy of a shared weight: merging into one must not change another layer, such as the LM head tied to the embeddings."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in itertools.chain.from_iterable(module.modules() for module in adapted):
        for name, parameter in layer._parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def active_adapter(model: nn.Module) -> str:
    """Return the name of the active adapter; `ValueError` unless exactly one is active."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    if len(names) != 1:
        raise ValueError(
            f"The active adapters of the draft are {sorted(names)}; make one of them active with set_adapter(name), and save."
        )
    return names.pop()
