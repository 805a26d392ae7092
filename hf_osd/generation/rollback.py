"""`Rollback` takes rejected tokens back out of a cache whose layers have recurrent states (Mamba, gated delta nets): such a state cannot be cropped.

Before a block is verified, states are copied. If the block is accepted as a whole, nothing else happens. If it is not, all layers go back to where they were before the
block, and its verified tokens are *carried*: the next forward, a verification that is made anyway, begins with them. So the target makes no forward more than for other
targets, and some of its forwards are longer. Carried tokens are absorbed by the next block that is accepted as a whole, one without drafts at the latest.
Where a call ends before that, by an EOS in place of a rejected draft, and its cache is kept, they are read in one forward more (`complete`), which `completing_forwards` counts.

`generate` knows nothing of it. Its loop runs on a view of the target (`rolling`), whose forward reads the carried tokens first and returns outputs without them, and
with a cache whose `crop` is this one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hf_osd.generation.filled_cache import trim_convolutions
from hf_osd.models.properties import empty_cache, is_compiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

# Why targets with such layers cannot be served, in transformers 5.23. A trial finds it out; this is for where none is made.
_FAULTS = {
    "JambaMambaMixer": "read several tokens at once as if none came before them",
    "ZambaMambaMixer": "read several tokens at once as if none came before them",
    "RecurrentGemmaRecurrentBlock": "are of a model that returns no cache",
}

# Outputs of a forward by position, and the dimension in which positions are counted.
_BY_POSITION = {"hidden_states": 1, "attentions": -2}


class Rollback:
    """Rolls back one cache over one run of `_assisted_decoding`.

    Args:
        cache (`Cache`): the cache that the run fills, empty or as an earlier run has left it.

    Attributes:
        carried (`int`): verified tokens that the next forward reads again before the block.
    """

    def __init__(self, cache: Cache):
        self._cache, self.carried, self._block = cache, 0, 0
        self.inputs: dict = {}  # of the last forward, as generate had them
        self._states: dict[int, _Copy] = {}  # of each recurrent layer, as before the first of the carried tokens

    @property
    def nbytes(self) -> int:
        """Counts the bytes of the copies of states."""
        copies = [part for copy in self._states.values() for part in (copy.conv, copy.recurrent) if part]
        return sum(state.nbytes for part in copies for state in part.values())

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Makes `crop` of the cache this one's, for as long as the run takes."""
        self._cache.crop = self.crop
        try:
            yield
        finally:
            del self._cache.crop

    def length(self, tokens: int | None) -> int | None:
        """Returns how many tokens the next forward reads, where `tokens` are asked for: the last verified one and the block. `None` is all of a prompt."""
        self._block = 0 if tokens is None else tokens - 1
        return None if tokens is None else tokens + self.carried

    def begin(self):
        """Copies the states that the next forward may have to be taken back to, if it reads drafts and they are not copied already."""
        if self._block and not self.carried:
            for i, layer in enumerate(self._cache.layers):
                if isinstance(layer, LinearAttentionCacheLayerMixin):
                    self._states.setdefault(i, _Copy()).take(layer)

    def crop(self, tokens_to_remove: int):
        """Takes the last block's rejected tokens out, given as a number that is not positive, as [`transformers.Cache.crop`] does."""
        rejected = abs(tokens_to_remove)
        fed = self.carried + 1 + self._block
        if not rejected:
            self.carried = 0
        elif self._block < rejected or not self._states:
            raise RuntimeError(
                f"{rejected} tokens are to be removed after a block of {self._block}; nothing can be taken back beyond it."
            )
        else:
            self.carried = fed - rejected
        back = fed if rejected else 0
        for i, layer in enumerate(self._cache.layers):
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.crop(-back)
                continue
            _crop_attention(layer, back)
            if back:
                self._states[i].restore(layer)
            else:
                trim_convolutions(layer)

    def complete(self, target: PreTrainedModel, text: Tensor) -> int:
        """Has `target` read the tokens that are still carried when the run is over and its cache is kept: the one forward more. Returns their number.

        Args:
            text (`Tensor` int64 `(1, S)`): prompt and answer.
        """
        carried, self.carried = self.carried, 0
        by_position = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
        inputs = dict(self.inputs)
        for name in by_position:
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][..., : text.shape[1] - 1]  # the last forward may have read drafts beyond
        target(**target.prepare_inputs_for_generation(text[:, :-1], next_sequence_length=carried, **inputs))
        return carried

    def without_carried(self, outputs: ModelOutput) -> ModelOutput:
        """Takes the positions of carried tokens out of a forward's outputs by position; logits are cut by generate itself."""
        if self.carried:
            for name, dim in _BY_POSITION.items():
                if outputs.get(name):
                    outputs[name] = tuple(_after(values, self.carried, dim) for values in outputs[name])
        return outputs


@dataclass
class _Copy:
    """Holds a copy of one layer's states."""

    conv: dict[int, Tensor] | None = None
    recurrent: dict[int, Tensor] | None = None

    def take(self, layer: LinearAttentionCacheLayerMixin):
        # The working window of a convolution grows with what is recorded, and may be a view of more.
        self.conv = {i: state.clone() for i, state in layer.conv_states.items() if state is not None}
        states = {i: state for i, state in layer.recurrent_states.items() if state is not None}
        if self.recurrent is None or self.recurrent.keys() != states.keys():
            self.recurrent = {i: state.clone() for i, state in states.items()}
        else:
            for i, state in states.items():
                self.recurrent[i].copy_(state)

    def restore(self, layer: LinearAttentionCacheLayerMixin):
        for i, state in self.conv.items():
            layer.conv_states[i] = state.clone()
        for i, state in self.recurrent.items():
            layer.recurrent_states[i].copy_(state)  # in place, as the layer's own update is


def _crop_attention(layer: LinearAttentionCacheLayerMixin, count: int):
    """Crops the keys and values of a layer that has them beside its states."""
    mro = type(layer).__mro__
    beside = [kind for kind in mro if "crop" in vars(kind) and not issubclass(kind, LinearAttentionCacheLayerMixin)]
    if beside and getattr(layer, "is_initialized", False):
        beside[0].crop(layer, -count)


def _after(values: Tensor | None, count: int, dim: int) -> Tensor | None:
    if values is None or values.ndim < 3:
        return values
    return values.narrow(dim, count, values.shape[dim] - count)


def needs_rollback(target: PreTrainedModel, cache) -> bool:
    """Returns `True` if layers of this cache will have recurrent states. Convolutions alone can be cropped."""
    kinds = getattr(target.config.get_text_config(decoder=True), "layer_types", None) or ()
    layers = getattr(cache, "layers", ())
    return any(
        isinstance(layer, LinearAttentionCacheLayerMixin) and (i >= len(kinds) or kinds[i] != "conv")
        for i, layer in enumerate(layers)
    )


def inconsistency(target: PreTrainedModel) -> str | None:
    """Returns why a recurrent target computes one token otherwise than several, if so: its layers limit the time step in a forward of several tokens and not in a forward of
    one (`selective_state_update` in transformers 5.23 knows no `dt_limit`). A short trial would not notice."""
    for module in target.modules():
        low, high = getattr(module, "time_step_limit", None) or (0.0, math.inf)
        if low > 0 or high < math.inf:
            return f"its layers ({type(module).__name__}) limit the time step ({low:g} to {high:g}) of several tokens at once and not of one token at a time"
    return None


def known_fault(target: PreTrainedModel) -> str | None:
    """Returns why a recurrent target is known to be wrong about several tokens, if so."""
    for name in (type(module).__name__ for module in target.modules()):
        if name in _FAULTS:
            return f"its layers ({name}) {_FAULTS[name]}"
    return None


def refusal(target: PreTrainedModel) -> str:
    """Words why a stateful target is refused that [`can_roll_back`] finds none for."""
    name = type(target).__name__
    if is_compiled(target):
        return f"The target ({name}) has recurrent states and is compiled: its states cannot be taken back out of a compiled forward. Load it without torch.compile, or leave assistant_model out."
    return f"The target ({name}) is one of the stateful models that keep their states in no cache of transformers': no rejected token can be taken back out of them. Leave assistant_model out."


def can_roll_back(target: PreTrainedModel) -> bool:
    """Returns `True` if all states of a target are in a cache of which [`Rollback`] knows the layers."""
    cache = None if is_compiled(target) else empty_cache(target)
    if cache is None:
        return False
    layers = [layer for layer in cache.layers if not isinstance(layer, LinearAttentionCacheLayerMixin)]
    return bool(cache.layers) and all(getattr(layer, "is_croppable", True) for layer in layers)


@functools.lru_cache(maxsize=32)
def rolling(cls: type, rollback: Callable[[], Rollback]) -> type:
    """Makes the class of views of a target on which generate's loop runs; `rollback` finds the run's."""

    def prepare_inputs_for_generation(self, *args, next_sequence_length=None, **kwargs):
        run = rollback()
        length, run.inputs = run.length(next_sequence_length), {**kwargs, "is_first_iteration": False}
        return cls.prepare_inputs_for_generation(self, *args, next_sequence_length=length, **kwargs)

    def call(self, *args, **kwargs):
        run = rollback()
        run.begin()
        return run.without_carried(cls.__call__(self, *args, **kwargs))

    attributes = {
        "__module__": cls.__module__,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
        "__call__": call,
    }
    return type(cls.__name__, (cls,), attributes)
