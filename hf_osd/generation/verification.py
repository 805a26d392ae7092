"""Whether a target can verify a block: say of several tokens at once, and again after some of them were taken back, what it says of them one at a time.

What is true of the call's cache is asked first, and of `peft`'s learnt prompts. What that leaves open is tried, once for each target, configuration and
kind of cache in a process ([`hf_osd.generation.trial`]). A target that fails decodes plainly.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import BaseQuantizedLayer, LinearAttentionCacheLayerMixin

from hf_osd.generation.trial import RECURRENT, Trial, layers_of
from hf_osd.models.properties import is_compiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.recorder import CallRecorder
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.running import RunningCall

# Of target (by a part that all views of it share), by configuration and kind of cache: why it cannot verify a block, `None` if it can.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _renew_lock():
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # another thread may hold it, which a child does not have
    os.register_at_fork(after_in_child=_renew_lock)


class CannotVerify(ValueError):
    """The target of a call cannot verify a block, which was found before its first token: `generate` decodes plainly.

    Args:
        why (`str`): the reason.
        running (`RunningCall`, *optional*): the call.
    """

    def __init__(self, why: str, running: RunningCall | None = None):
        super().__init__(f"This target cannot verify drafts: {why}. Leave assistant_model out.")
        self.why, self.running = why, running


class Verification:
    """Whether the target of one call can verify a block, found out when it first matters.

    Args:
        request (`GenerateRequest`): the call's.
        tries (`bool`): whether to try what the cache does not tell.
        warn (`Callable[[str], None]`): gives a warning, once.
    """

    def __init__(self, request: GenerateRequest, tries: bool, warn: Callable[[str], None]):
        target, running = request.target, request.running
        self._request, self._target, self._running, self._warn = request, target, running, warn
        self._cache = request.model_kwargs.get("past_key_values")
        # Other processes would wait for as many forwards; another shape would compile anew; dropout is another one each time.
        synced = running is not None and running.synced_gpus
        self._tries = tries and not (synced or target.training or any(map(is_compiled, (target, target.base_model))))
        self._given = None  # a copy of the caller's own cache, while that is empty

    def begin(self, record: CallRecorder):
        """To be called before the first round: raises [`CannotVerify`] for what is known then, or has to be."""
        why = _obstacle(self._target, self._cache)
        if why is None and self._tries and getattr(self._cache, "_is_user_defined", False):
            try:
                self._given = copy.deepcopy(self._cache)
            except Exception:  # whatever a user's cache makes of it
                self._tries = False
        if why is None and _is_doubtful(self._target, self._cache):
            why = self._find(record) if self._tries else _unknown_state(self._target, self._cache)
        if why is not None:
            self._fail(why, record)
            raise CannotVerify(why, self._running)

    def allows(self, record: CallRecorder, first: bool) -> bool:
        """To be called before the call's first block is drafted: whether the target can verify it.

        Raises:
            CannotVerify: in the first round, in place of `False`.
        """
        why = self._find(record)
        if why is None:
            return True
        self._fail(why, record)
        if first:
            raise CannotVerify(why, self._running)
        return False

    def _fail(self, why: str, record: CallRecorder):
        record.stats.plain_requests = 1
        self._warn(plain_warning(self._target, why))

    def _find(self, record: CallRecorder) -> str | None:
        """Why the target fails; known, or tried now."""
        if not self._tries:
            return None
        part = next(self._target.children(), self._target)
        key = _kind(self._target, self._cache)
        with _lock:
            verdicts = _verdicts.setdefault(part, {})
            if key not in verdicts:
                start = time.perf_counter()
                trial = Trial(self._request, self._given)
                with contextlib.nullcontext() if record.prompt_states is None else record.prompt_states.paused():
                    verdicts[key] = trial.run()
                record.stats.verification_forwards += trial.forwards
                record.stats.verification_seconds += time.perf_counter() - start
            return verdicts[key]


def plain_warning(target: PreTrainedModel, why: str) -> str:
    """Says of the calls of a target that they are not drafted for."""
    return f"{type(target).__name__} decodes plainly, and nothing is drafted for it: it cannot verify a block of drafts, for {why}."


def only_looks_stateful(target: PreTrainedModel) -> bool:
    """Whether a class that transformers takes for stateful has attention layers alone in this configuration."""
    if not target._supports_default_dynamic_cache():  # states of its own
        return False
    try:
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    except Exception:  # layers of kinds that no cache here knows
        return False
    return bool(cache.layers) and cache.is_croppable


@contextlib.contextmanager
def recording_put_back(cache) -> Iterator[None]:
    """Have layers record their past no longer than before, if the call goes on plainly: nothing would ever crop them."""
    layers = [layer for layer in layers_of(cache) if getattr(layer, "record_past", True) is False]
    try:
        yield
    except CannotVerify:
        for layer in layers:
            layer.record_past = False
        raise


# By what is true of the cache and the target.


def _obstacle(target: PreTrainedModel, cache) -> str | None:
    """What rules it out from the start."""
    # peft's generate puts its own method in the target's place.
    owner = getattr(target.prepare_inputs_for_generation, "__self__", None)
    learnt = getattr(owner, "active_peft_config", None)
    if getattr(learnt, "is_prompt_learning", False):
        return f"its learnt prompt ({type(learnt).__name__}) is counted among the tokens"
    fixed = sorted({type(layer).__name__ for layer in layers_of(cache) if _is_fixed(layer)})
    if fixed:
        return f"tokens cannot be taken back out of its cache ({', '.join(fixed)})"
    return None


def _is_fixed(layer) -> bool:
    """Whether it keeps what it is given for good. A quantised layer has the cropping of a layer that keeps keys and values as they are."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):  # not known before it has states
        return False
    return isinstance(layer, BaseQuantizedLayer) or not getattr(layer, "is_croppable", True)


def _is_doubtful(target: PreTrainedModel, cache) -> bool:
    """Whether it may have states that cannot be cropped, or give no cache back: not to be trusted with one token."""
    known = type(target).__module__.startswith("transformers.") and not target._is_stateful
    keeps = "past_key_values" in inspect.signature(target.forward).parameters or is_compiled(target)
    return not (known and keeps and getattr(cache, "is_croppable", False))


def _unknown_state(target: PreTrainedModel, cache) -> str | None:
    """What rules a doubtful target out that is not tried: convolutions are cropped, and what else a layer keeps is not known."""
    kinds = set(getattr(target.config.get_text_config(decoder=True), "layer_types", None) or ())
    linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers_of(cache))
    if linear and not kinds & {"conv"}:
        return RECURRENT
    return None if linear or getattr(cache, "is_croppable", False) else "its cache does not say that it can be cropped"


def _kind(target: PreTrainedModel, cache) -> tuple:
    """The configuration and kind of cache that a verdict is of."""
    layers = {
        (kind, getattr(kind, "update", None), getattr(kind, "crop", None), getattr(layer, "sliding_window", None))
        for layer in layers_of(cache)
        for kind in (type(layer),)
    }
    methods = (target.forward, target.prepare_inputs_for_generation)
    return (
        type(cache),
        getattr(type(cache), "crop", None),
        frozenset(layers),
        getattr(cache, "offloading", False),
        *(getattr(method, "__func__", id(method)) for method in methods),
        getattr(target.config, "_attn_implementation", None),
        target.dtype,
    )
