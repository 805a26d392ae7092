"""Reads properties of a model: how long a text it reads, which parameters its `forward` has, and whether it is compiled."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import DynamicCache, PreTrainedModel


def draft_window(draft: PreTrainedModel) -> float:
    """Return the longest text that the draft has positions for, in tokens; infinite if its config has no such limit."""
    return getattr(draft.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def forward_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters of the model's `forward`; under PEFT of the base model's, for PEFT's own accepts anything."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(model.forward).parameters)


def reads_states(model: PreTrainedModel) -> bool:
    """Whether the model is a feature-level draft, which reads the target's hidden states ([`hf_osd.models.feature_draft.FeatureDraft`])."""
    return getattr(getattr(model, "config", None), "model_type", None) == "osd_feature_draft"


def encoder_parameters(draft: PreTrainedModel) -> set[str]:
    """Return the names of those parameters of `forward` by which the draft receives an encoder's output; none for a plain decoder."""
    return forward_parameters(draft) & {"encoder_outputs", "encoder_hidden_states"}


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module, or its forward, went through `torch.compile`."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    )


def empty_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Make an empty cache as generate does for a model; `None` if the model has states of its own, or a kind of layer that this transformers has no cache for."""
    from transformers import DynamicCache

    if not model._supports_default_dynamic_cache():
        return None
    try:
        return DynamicCache(config=model.config.get_text_config(decoder=True))
    except Exception:  # each model's config has its own
        return None


def special_ids(model: PreTrainedModel) -> set:
    """Collects the token ids that a model's configs name: ends of text, padding, placeholders of images and sounds."""
    special = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return special
