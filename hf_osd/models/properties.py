"""What a model says of itself: how far it reads, and what its `forward` takes."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def draft_window(draft: PreTrainedModel) -> float:
    """The longest text the draft has positions for, in tokens; infinite if its config does not say."""
    return getattr(draft.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


def forward_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of the model's `forward`; of the base model's under PEFT, whose own takes anything."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(model.forward).parameters)


def encoder_parameters(draft: PreTrainedModel) -> set[str]:
    """By which parameters of its `forward` the draft takes what an encoder made; none for a plain decoder."""
    return forward_parameters(draft) & {"encoder_outputs", "encoder_hidden_states"}


def special_ids(model: PreTrainedModel) -> set:
    """Collects the token ids that a model's configs name: ends of text, padding, placeholders of images and sounds."""
    special = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return special
