"""What hf_osd serves, and what it refuses: every refusal names the thing, its value and the mend, before anything has run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.assistant import OnlineAssistant


def check_draft(draft):
    """Whether `draft` can draft at all: a `ValueError` if not."""
    config = getattr(draft, "config", None)
    if not isinstance(draft, nn.Module) or config is None:
        raise ValueError(
            f"`draft` is a {type(draft).__name__}; give a model, such as AutoModelForCausalLM.from_pretrained(...)."
        )
    if getattr(config, "is_encoder_decoder", False) or draft.get_output_embeddings() is None:
        raise ValueError(
            f"`draft` is a {type(draft).__name__}, which is not a decoder with an LM head. Load it with AutoModelForCausalLM."
        )


def check_call(
    target: PreTrainedModel,
    assistant: OnlineAssistant,
    input_ids: Tensor,
    model_kwargs: dict,
    different_tokenizers: bool,
):
    """Whether `assistant` can serve this generate call of `target`: a `ValueError` if not."""
    vocabularies = [m.config.get_text_config().vocab_size for m in (target, assistant)]
    if different_tokenizers or vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"The target has {vocabularies[0]} tokens and the draft {vocabularies[1]}, or they come with two tokenizers; hf_osd "
            "needs a draft with the target's own vocabulary. Choose one of the target's family, or hf_osd.grow_draft(target)."
        )
    if target.config.is_encoder_decoder:
        raise ValueError(
            f"The target is an encoder-decoder ({type(target).__name__}); hf_osd serves decoder-only targets. Pass the draft itself "
            "as assistant_model to use stock assisted generation."
        )
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"The batch has {input_ids.shape[0]} prompts; assisted generation takes one a call. Call generate for each prompt, "
            "from several threads if you like."
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` already holds {cache.get_seq_length()} tokens; transformers' assisted generation would feed the prompt "
            "on top of them and answer wrongly. Leave past_key_values out."
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` gives the draft no tokens to draft from. Pass `input_ids`, or leave assistant_model out."
        )
