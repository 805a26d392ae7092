"""Drafts with an adapter (LoRA and its kin, by PEFT), and the plain models that are in them: what adapters do, put into the weights, or left out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.models.copies import copy_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_adapter(model: nn.Module) -> bool:
    """Whether it is a PeftModel, or a model with an adapter of transformers' `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "peft_config", None))


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain copy of a model with an adapter, which has what the active one does in its weights.

    Raises:
        ValueError: if not exactly one adapter is active.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    active_adapter(inner)
    return without_adapters(inner, merge=True)


def without_adapters(model: PreTrainedModel, merge: bool = False) -> PreTrainedModel:
    """The base of a model with adapters, in their storage; or with `merge` a copy that has the active adapter in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = copy_draft(model, set() if merge else {name for name, _ in model.named_parameters()})
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    # Of what lies in another one its own merging takes care.
    adapted = {n: m for n, m in adapted.items() if not any(n.startswith(f"{outer}.") for outer in adapted)}
    inner, outer = (
        {id(p) for p in end.parameters()} for end in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    tied = bool(inner & outer)
    if merge:
        _part_shared(base, adapted.values())
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
        _join_again(base)
    say_ties(base)
    base._hf_peft_config_loaded = False
    base.__dict__.pop("peft_config", None)
    # Where transformers has loaded the adapter, it noted how that one's names are changed, and would write the base under such names.
    if any(
        one.source_patterns[0].startswith("base_model.") for one in getattr(base, "_weight_conversions", None) or ()
    ):
        del base._weight_conversions  # those of the architecture hold again
    return base


def say_ties(model: PreTrainedModel):
    """Have the config say whether input embeddings and LM head are one: whoever reads a checkpoint goes by that, and the file has no head where they are.
    An encoder-decoder's is left as it is, for there it also says how hidden states are scaled."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.is_encoder_decoder or not all(type(getattr(end, "weight", None)) is nn.Parameter for end in ends):
        return
    for part in (model.config, model.config.get_text_config(decoder=True)):
        one = ends[0].weight is ends[1].weight
        if getattr(part, "tie_word_embeddings", one) != one:
            part.tie_word_embeddings = one


def _join_again(model: PreTrainedModel):
    """Make one of two ends that were one, and have the same values still.

    Raises:
        ValueError: if they have not, and the config of an encoder-decoder could not say that.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(ends[0].weight, ends[1].weight):
        ends[1].weight = ends[0].weight
    elif model.config.is_encoder_decoder:
        raise ValueError(
            f"The adapter changes one of two ends of {type(model).__name__} that are one weight, and without it a checkpoint could not say that they are two. Save "
            "it as an adapter (merge=False)."
        )


def _part_shared(model: nn.Module, adapted: Iterable[nn.Module]):
    """Give layers that are adapted weights of their own: what is merged into one must not change another that shares them, such as the other end of a
    draft with tied ones."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in itertools.chain.from_iterable(module.modules() for module in adapted):
        for name, parameter in layer._parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def active_adapter(model: nn.Module) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    if len(names) != 1:
        raise ValueError(
            f"The active adapters of the draft are {sorted(names)}; make one of them active with set_adapter(name), and save."
        )
    return names.pop()
