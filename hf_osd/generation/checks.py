"""Drafts and calls that cannot be served are refused here, before anything has run, by an error that names the thing, its value and the remedy."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from hf_osd.generation.filled_cache import held_by
from hf_osd.generation.verification import only_looks_stateful
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.feature_target import check_target
from hf_osd.models.plain import has_adapter
from hf_osd.models.properties import reads_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.request import GenerateRequest

# By the input embeddings of a target and of a draft: the state of both weights when they were compared, whether they were alike, and how many calls have
# asked since.
_compared: weakref.WeakKeyDictionary[nn.Module, weakref.WeakKeyDictionary[nn.Module, tuple]] = (
    weakref.WeakKeyDictionary()
)
# Calls after which they are compared again though nothing shows that they have changed.
_COMPARE_EVERY = 64


def check_draft(draft):
    """Raises a `ValueError` if `draft` cannot draft for any target."""
    config = getattr(draft, "config", None)
    if not isinstance(draft, nn.Module) or config is None:
        raise ValueError(
            f"`draft` is a {type(draft).__name__}; give a model, such as AutoModelForCausalLM.from_pretrained(...)."
        )
    if reads_states(draft) and has_adapter(draft):
        raise ValueError(
            f"`draft` is a {type(draft).__name__}, an adapter on a feature-level draft, whose one layer learns whole. Merge it, with draft.merge_and_unload(), or give "
            "the draft without it."
        )
    if draft.get_output_embeddings() is None:
        raise ValueError(
            f"`draft` is a {type(draft).__name__}, which has no LM head. Load it with AutoModelForCausalLM, or AutoModelForSeq2SeqLM if "
            "the target is an encoder-decoder."
        )
    if getattr(draft, "_is_stateful", False) and not only_looks_stateful(draft):
        raise ValueError(
            f"`draft` is a {type(draft).__name__}, whose state cannot be taken back to before a rejected token. Choose a draft that is an attention model throughout: "
            "hf_osd.grow_draft(target) takes the target's layers with attention alone, hf_osd.grow_feature_draft(target) makes one for any target."
        )


def check_call(request: GenerateRequest, draft: PreTrainedModel):
    """Raises a `ValueError` if `draft` cannot assist this generate call."""
    target, input_ids, inputs_tensor = request.target, request.input_ids, request.inputs_tensor
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"The batch has {input_ids.shape[0]} prompts; assisted generation takes one a call. Call generate for each prompt, "
            "from several threads if you like."
        )
    if target.device.type == "meta":
        raise ValueError(
            f"The first weights of the target ({type(target).__name__}) are offloaded, so `target.device` is meta, and transformers' assisted generation moves "
            "tokens there. Load it with its embeddings on a device (a device_map that offloads later layers alone), or leave assistant_model out."
        )
    if (why := _filled_cache_refusal(request)) is not None:
        raise ValueError(why)
    embeds = request.model_kwargs.get("inputs_embeds")
    if embeds is not None and not request.encodes and embeds.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"`inputs_embeds` holds {embeds.shape[1]} positions and `input_ids` {input_ids.shape[1]} tokens; the draft reads the tokens. "
            "Pass the `input_ids` of the same prompt beside `inputs_embeds`, or leave assistant_model out."
        )
    if (weight := request.generation_config.assistant_ensemble_weight) is not None:
        raise ValueError(
            f"`assistant_ensemble_weight` is {weight}, which makes the output another than the "
            "target's own. Leave it out, or pass a plain model as assistant_model."
        )
    guided = [p for p in request.logits_processor if isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor)]
    if guided:
        raise ValueError(
            f"`guidance_scale` is {guided[0].guidance_scale}: classifier-free guidance keeps a cache of its own, in which transformers' "
            "assisted generation leaves rejected tokens. Leave guidance_scale or assistant_model out."
        )
    if isinstance(draft, FeatureDraft):
        check_target(request.target, draft.config)
        if request.tokenizers is not None:
            raise ValueError(
                "A feature-level draft reads the target's own tokens and states, so it has the target's vocabulary. Leave `tokenizer` and `assistant_tokenizer` out."
            )
    if draft.config.is_encoder_decoder:
        if not request.encodes:
            raise ValueError(
                f"The draft is an encoder-decoder ({type(draft).__name__}) and the target is none ({type(target).__name__}). Choose a draft "
                "loaded with AutoModelForCausalLM."
            )
        if inputs_tensor is None or (not inputs_tensor.is_floating_point() and bool((inputs_tensor < 0).any())):
            raise ValueError(
                "`encoder_outputs` came without the encoder's inputs, which the draft's own encoder has to read. Pass `input_ids` in its place."
            )


def _filled_cache_refusal(request: GenerateRequest) -> str | None:
    """Words why a call cannot go on from its filled cache, and what to do; `None` if it can, or if the cache is empty."""
    held, length = held_by(request.model_kwargs.get("past_key_values")), request.input_ids.shape[1]
    if not held:
        return None
    filled = f"`past_key_values` already holds {held} tokens"
    if request.encodes:
        return f"{filled}, and the target is an encoder-decoder, whose decoder generate would feed all of `decoder_input_ids` on top of them. Leave past_key_values out."
    if request.running is None:
        return f"{filled}, and drafts are asked for by another loop than generate's own, which may feed the prompt on top of them. Leave past_key_values out, or call target.generate."
    mask = request.mask
    masked = getattr(request.generation_config, "_mask_length", length) if mask is None else mask.shape[1]
    if masked != length:
        return (
            f"{filled}; `attention_mask` is of {masked} tokens and the prompt has {length} of them, but a draft reads all of the text. Pass the `input_ids` of the whole "
            "conversation: the target is fed only those that the cache lacks."
        )
    if held >= length:
        return (
            f"{filled} and the prompt has {length}: nothing is left to feed the target. Pass the `input_ids` of the whole conversation, which end in what is new; if the prompt "
            f"is whole, take tokens out of the cache first: past_key_values.crop({length - 1 - held}), or a new cache where it has recurrent states."
        )
    return None


def doubt_of_target(target: PreTrainedModel, draft: PreTrainedModel) -> str | None:
    """Words a warning if a draft that reads states seems made for another target of the same sizes, for its embeddings are not this one's; else `None`.

    A pair of weights in two storages is compared once, at some of their rows, and again at the next call after one of them was replaced, moved, or written in place in a
    way that torch counts, as most optimizers and `load_state_dict` do. Writes that it does not count are noticed within 64 calls of the same copy of the draft: those of fused optimizers, through
    `.data` or a NumPy view, of other processes, and to weights made under `inference_mode`. What changes other rows than those compared is never noticed.
    """
    if not isinstance(draft, FeatureDraft):
        return None
    modules = target.get_input_embeddings(), draft.get_input_embeddings()
    its, ours = (getattr(module, "weight", None) for module in modules)
    if type(its) is not nn.Parameter or its.is_meta or its.ndim != 2:
        return None
    if its.data_ptr() == ours.data_ptr() or not its.is_floating_point() or its.shape[1] != ours.shape[1]:
        return None
    state = _state_of(its), _state_of(ours)
    compared = _compared.setdefault(modules[0], weakref.WeakKeyDictionary())
    before, alike, calls = compared.get(modules[1], (None, False, 0))
    if state != before or calls >= _COMPARE_EVERY:
        alike, calls = _are_alike(its, ours), 0
    compared[modules[1]] = state, alike, calls + 1
    if alike:
        return None
    return (
        f"The draft's embeddings are not those of the target ({type(target).__name__}): it was made for another, or the target was trained since. The output stays the target's "
        "own; the draft reads these states as the other's until it has learnt. To give it this target's embeddings, save it and load it with hf_osd.load_feature_draft(folder, target)."
    )


def _state_of(weight: nn.Parameter) -> tuple:
    """Returns what differs once a weight is another, or was written to in a way that torch counts."""
    return _Same(weight), weight.data_ptr(), None if weight.is_inference() else weight._version


class _Same:
    """Refers weakly to a tensor, and equals a reference to that very tensor alone, while it lives."""

    def __init__(self, tensor: Tensor):
        self._tensor = weakref.ref(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (tensor := self._tensor()) is not None and tensor is other._tensor()

    __hash__ = None


def _are_alike(its: Tensor, ours: Tensor) -> bool:
    """Compares some rows of two matrices of embeddings; returns `True` if they are the same but for rounding."""
    rows = range(0, min(len(its), len(ours)), max(len(ours) // 8, 1))
    its, ours = (weight.detach()[list(rows)].float().cpu() for weight in (its, ours))
    return bool((ours - its).abs().max() <= 0.02 * its.abs().max())
