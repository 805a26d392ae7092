"""`Verification` finds out if a target can verify a block: if its logits for several tokens in one forward, also after some were removed from its cache, are
those for one token at a time. The call's cache and `peft`'s learnt prompts are checked first. If that leaves it open, a trial decides, once per process for each
target, configuration and kind of cache ([`hf_osd.generation.trial`]). A target that fails decodes plainly.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn
from transformers.cache_utils import BaseQuantizedLayer, LinearAttentionCacheLayerMixin

from hf_osd.generation.filled_cache import emptied, layers_of
from hf_osd.generation.rollback import inconsistency, known_fault
from hf_osd.generation.trial import Trial
from hf_osd.models.properties import empty_cache, is_compiled
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.recorder import CallRecorder
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.running import RunningCall

# The reason why a target cannot verify a block, `None` if it can, by target (by a part that all its views share), configuration and kind of cache.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()
_lock = released(threading.RLock())
_UNTRIED = "its layers have recurrent states, and no trial can be made of it as it is: in train mode or compiled, with synced_gpus, or on a cache that cannot be copied"


class CannotVerify(ValueError):
    """Raised before a call's first token if its target cannot verify a block: the seam catches it, and `generate` decodes plainly.

    Args:
        why (`str`): the reason.
        running (`RunningCall`, *optional*): the call.
    """

    def __init__(self, why: str, running: RunningCall | None = None):
        super().__init__(f"This target cannot verify drafts: {why}. Leave assistant_model out.")
        self.why, self.running = why, running


class Verification:
    """Finds out if the target of one call can verify a block, before its first one.

    Args:
        request (`GenerateRequest`): the call's arguments.
        runs_trials (`bool`): run a trial if the checks leave it open.
        warn (`Callable[[str], None]`): gives a warning, once.
    """

    def __init__(self, request: GenerateRequest, runs_trials: bool, warn: Callable[[str], None]):
        target, running = request.target, request.running
        self._request, self._target, self._running, self._warn = request, target, running, warn
        self._cache = request.model_kwargs.get("past_key_values")
        # No trial if other processes would wait for as many forwards, another shape would compile anew, or dropout would change the logits.
        synced = running is not None and running.synced_gpus
        self._runs_trials = runs_trials and not (
            synced or target.training or any(map(is_compiled, (target, target.base_model)))
        )
        self._rolls_back = running is not None and running.rollback is not None
        self._trusts = self._rolls_back and not runs_trials  # the user wants no trials
        self._cache_copy = None  # of the caller's own cache, empty

    def check_first_round(self, record: CallRecorder):
        """Checks before the first round what can be known without a block. A target with doubtful state is tried at once.

        Raises:
            CannotVerify: if the target cannot verify a block.
        """
        why = _obstacle(self._target, self._cache) or _no_attentions(self._request)
        if why is None and self._rolls_back:
            why = inconsistency(self._target)
        if why is None and self._trusts:
            why = known_fault(self._target)
        if why is None and self._runs_trials and getattr(self._cache, "_is_user_defined", False):
            try:
                self._cache_copy = emptied(self._cache)
            except Exception:  # a user's cache may raise anything
                self._runs_trials = False
        if why is None and _is_doubtful(self._target, self._cache):
            why = (
                self._find(record) if self._runs_trials or self._trusts else _state_obstacle(self._target, self._cache)
            )
        if why is not None:
            self._fail(why, record)
            raise CannotVerify(why, self._running)

    def allows(self, record: CallRecorder, first: bool) -> bool:
        """Decides, before the call's first block is drafted, if the target can verify it; `first` is `True` in the call's first round.

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
        """Returns the reason why the target fails, from an earlier trial or a new one; `None` if it passes or is not tried."""
        if not self._runs_trials:
            return None
        part = next(self._target.children(), self._target)
        key = _verdict_key(self._target, self._cache)
        with _lock:
            verdicts = _verdicts.setdefault(part, {})
            if key not in verdicts:
                start = time.perf_counter()
                trial = Trial(self._request, self._cache_copy)
                with contextlib.nullcontext() if record.prompt_states is None else record.prompt_states.paused():
                    verdicts[key] = trial.run()
                record.stats.verification_forwards += trial.forwards
                record.stats.verification_seconds += time.perf_counter() - start
            return verdicts[key]


def plain_warning(target: PreTrainedModel, why: str) -> str:
    """Words the warning that a target's calls get no drafts."""
    return f"{type(target).__name__} decodes plainly, and nothing is drafted for it: it cannot verify a block of drafts, for {why}."


def only_looks_stateful(target: PreTrainedModel) -> bool:
    """Returns `True` if a model whose class transformers takes for stateful has attention layers only in this configuration."""
    cache = empty_cache(target)
    return cache is not None and bool(cache.layers) and cache.is_croppable


def _obstacle(target: PreTrainedModel, cache) -> str | None:
    """Returns what rules the target out without a trial: learnt prompts, or cache layers that cannot be cropped; `None` if nothing does."""
    # peft's generate replaces the target's method by its own.
    owner = getattr(target.prepare_inputs_for_generation, "__self__", None)
    learnt = getattr(owner, "active_peft_config", None)
    if getattr(learnt, "is_prompt_learning", False):
        return f"its learnt prompt ({type(learnt).__name__}) is counted among the tokens"
    fixed = sorted(
        {
            type(layer).__name__
            for layer in layers_of(cache)
            if _is_fixed(layer) or (target._is_stateful and _is_of_a_model(layer))
        }
    )
    if fixed:
        return f"tokens cannot be taken back out of its cache ({', '.join(fixed)})"
    return None


def _no_attentions(request: GenerateRequest) -> str | None:
    """Returns why attentions that a call asks for cannot be had from blocks, if so: where a target gives none, transformers' assisted generation fails on their lack."""
    asked, kind = request.generation_config, getattr(request.target.config, "_attn_implementation", None)
    if not (asked.output_attentions and asked.return_dict_in_generate) or kind in (None, "eager") or request.encodes:
        return None
    return f"attentions are asked for and its attention ({kind}) gives none; load it with attn_implementation='eager'"


def _is_fixed(layer) -> bool:
    """Returns `True` if a cache layer cannot be cropped. A quantised layer inherits a crop that works on unquantised keys and values only."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):  # unknown before it has states
        return False
    return isinstance(layer, BaseQuantizedLayer) or not getattr(layer, "is_croppable", True)


def _is_of_a_model(layer) -> bool:
    """Returns `True` if a model has brought this kind of layer along, with states beside keys and values that its inherited `crop` does not know (DeepSeek V4)."""
    kind = type(layer)
    return kind.__module__.startswith("transformers.models.") and "crop" not in vars(kind)


def _is_doubtful(target: PreTrainedModel, cache) -> bool:
    """Returns `True` if the target may have states that cannot be cropped, or return no cache; it is then tried before the first token."""
    known = type(target).__module__.startswith("transformers.") and not target._is_stateful
    keeps = "past_key_values" in inspect.signature(target.forward).parameters or is_compiled(target)
    return not (known and keeps and getattr(cache, "is_croppable", False))


def _state_obstacle(target: PreTrainedModel, cache) -> str | None:
    """Returns what rules a doubtful target out if no trial can run: convolution states are cropped, and other states are unknown; `None` if nothing does."""
    kinds = set(getattr(target.config.get_text_config(decoder=True), "layer_types", None) or ())
    linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers_of(cache))
    if linear and not kinds & {"conv"}:
        return _UNTRIED
    return None if linear or getattr(cache, "is_croppable", False) else "its cache may not be croppable"


def _verdict_key(target: PreTrainedModel, cache) -> tuple:
    """Makes the key of a verdict: the target's configuration and its kind of cache."""
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
