"""`check_target` refuses a target that a feature-level draft cannot have been made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_osd.models.feature_config import FeatureDraftConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_target(target: PreTrainedModel, config: PretrainedConfig, depth: int | None = None):
    """Check that `target` has the sizes of the one that a feature-level draft was made for. The config of any other draft, or of none, passes.

    Args:
        target (`PreTrainedModel`): the model to draft for.
        config (`PretrainedConfig`): the draft's.
        depth (`int`, *optional*): how many decoder layers the target has; by its config if left out.

    Raises:
        ValueError: if the target is an encoder-decoder, or has states of another width, other layers, or another vocabulary than the draft's.
    """
    if getattr(config, "model_type", None) != FeatureDraftConfig.model_type:
        return
    name = type(target).__name__
    mend = "Choose the target that the draft was made for, or grow a draft for this one with hf_osd.grow_feature_draft(target)."
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"The target ({name}) is an encoder-decoder, and a feature-level draft reads a decoder's states. Choose a draft loaded with AutoModelForSeq2SeqLM."
        )
    text = target.config.get_text_config(decoder=True)
    if text.hidden_size != config.target_hidden_size:
        raise ValueError(
            f"The draft reads states of width {config.target_hidden_size} and those of the target ({name}) have {text.hidden_size}. {mend}"
        )
    depth, made_for = text.num_hidden_layers if depth is None else depth, config.target_num_hidden_layers
    if max(config.aux_layers) > depth or made_for not in (None, depth):
        raise ValueError(
            f"The draft reads the states after layers {config.aux_layers}{f' of {made_for}' if made_for else ''} and the target ({name}) has {depth} layers. {mend}"
        )
    head = target.get_output_embeddings()
    rows = getattr(getattr(head, "weight", None), "shape", [text.vocab_size])[0]
    if config.vocab_size not in (text.vocab_size, rows):
        raise ValueError(
            f"The draft has {config.vocab_size} tokens and the target ({name}) {text.vocab_size}; a feature-level draft has its target's, and no tokenizers help. {mend}"
        )
