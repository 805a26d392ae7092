"""A cache that outlives its call: one that a user passes, empty or with the tokens of earlier calls in it, as in a chat, or that generate returns. The target reads what such a
cache lacks and nothing else; afterwards it holds what plain decoding would have left: all tokens of the text but the last.

transformers' assisted generation feeds the whole prompt on top of a filled cache (its plain decoding does not): here its loop runs on a view of the target (`continuing`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import LinearAttentionCacheLayerMixin


def layers_of(cache) -> list:
    """Lists the layers of a cache from which rejected tokens are removed."""
    return list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))


def held_by(cache) -> int:
    """Counts the tokens that a cache holds, padding included; 0 without a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


@functools.lru_cache(maxsize=32)
def continuing(cls: type) -> type:
    """Makes the class of views of a target whose first forward reads only those tokens of the prompt that the cache lacks, and drafts after them."""

    def prepare_inputs_for_generation(
        self, input_ids, *args, next_sequence_length=None, is_first_iteration=False, **kwargs
    ):
        if is_first_iteration:
            next_sequence_length = input_ids.shape[1] - held_by(kwargs["past_key_values"])
        return cls.prepare_inputs_for_generation(
            self,
            input_ids,
            *args,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    attributes = {"__module__": cls.__module__, "prepare_inputs_for_generation": prepare_inputs_for_generation}
    return type(cls.__name__, (cls,), attributes)


@contextlib.contextmanager
def past_recording_restored(cache) -> Iterator[None]:
    """Restores, when a call has ended or goes on plainly, which cache layers record their past: nothing would crop what they record."""
    layers = [layer for layer in layers_of(cache) if getattr(layer, "record_past", True) is False]
    try:
        yield
    finally:
        for layer in layers:
            layer.record_past = False
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                trim_convolutions(layer)


def take_back(cache, count: int):
    """Leaves a cache right that a user keeps when an error, of a streamer say, has ended a call: with its first `count` tokens. Where it cannot be cropped to these (recurrent
    states; layers of unlike lengths, after an interrupt in mid-forward) it is emptied: the next call reads all of its text anew."""
    layers = layers_of(cache)
    lengths = {
        layer.get_seq_length()
        for layer in layers
        if getattr(layer, "is_initialized", False) and layer.keys is not None
    }
    if len(lengths) > 1 or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        cache.reset()
    elif lengths and (excess := lengths.pop() - count) > 0:
        cache.crop(-excess)


def trim_convolutions(layer: LinearAttentionCacheLayerMixin):
    """Cuts the recorded past of a layer's convolution states back to their working window. Where a text is shorter it is filled up with zeros, as it is where nothing is
    recorded: some models read no shorter ones."""
    for i, state in layer.conv_states.items():
        size = layer.conv_kernel_size[i]
        if state is not None and size is not None:
            window = state[..., -size:]
            missing = size - window.shape[-1]
            layer.conv_states[i] = F.pad(window, (missing, 0)) if missing else window


def emptied(cache):
    """Makes an empty copy of a cache, without copying the keys and values that it holds."""
    held = [value for layer in layers_of(cache) for value in vars(layer).values() if isinstance(value, Tensor)]
    copied = copy.deepcopy(cache, {id(value): value.new_empty(0) for value in held if value.ndim > 2})
    copied.reset()
    return copied
