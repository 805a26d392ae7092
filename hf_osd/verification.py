"""Whether a target can verify a block: say of several tokens at once, and again after some of them were taken back, what it says of them one at a time.

What is true of the call's cache is asked first, and of `peft`'s learnt prompts. What that leaves open is tried, once for each target, configuration and
kind of cache: a short text is decoded by transformers' own two loops, plainly and in blocks that are right in part, on fresh caches of the same kind. A
target that fails decodes plainly.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.cache_utils import BaseQuantizedLayer, LinearAttentionCacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode

from hf_osd.prefill import is_compiled
from hf_osd.random_state import isolated_random_state

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from hf_osd.call_record import CallRecord
    from hf_osd.integration import RunningCall

logger = logging.getLogger(__name__)

# Blocks of the trial: how many tokens of each are right, and how many wrong ones follow. Each round gives a row more than it has right tokens.
_ROUNDS = ((0, 2), (3, 2), (1, 0))
_PROMPT = 6  # tokens
_ROWS = sum(right + 1 for right, _ in _ROUNDS)
# A row is another one if it is further from what it should be than rounding in matrix products of other shapes takes it, as a share of its spread: in float32
# and in coarser arithmetic, up to float16's (or TF32's) and beyond;
_FINE, _COARSE, _COARSEST = 1e-3, 1e-2, 3e-2
_NOISE = 6  # or than so many times what two plain decodings of the text differ by,
_MOST_FINE, _MOST = 3e-2, 1.0  # but then no more than this, the former in float32.
# Where arithmetic is coarse, an expert may be chosen by a hair, and be another one in a block: of so many texts most must show the fault.
_TEXTS = 5
_SMALL = 2**16  # numbers: a model's tensors up to this size are put back if a forward wrote into them

# Of target (by a part that all views of it share), by configuration and kind of cache: why it cannot verify a block, `None` if it can.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[tuple, str | None]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


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
        target (`PreTrainedModel`), input_ids, generation_config, model_kwargs: the call's.
        running (`RunningCall`, *optional*): the same, if generate's own loop runs it.
        tries (`bool`): whether to try what the cache does not tell.
        warn (`Callable[[PreTrainedModel, str], None]`): says why a target decodes plainly, once.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        running: RunningCall | None,
        tries: bool,
        warn: Callable[[PreTrainedModel, str], None],
    ):
        self._target, self._running, self._warn = target, running, warn
        self._cache = model_kwargs.get("past_key_values")
        # Other processes would wait for as many forwards; another shape would compile anew; dropout is another one each time.
        synced = running is not None and running.synced_gpus
        self._tries = tries and not (synced or target.training or any(map(is_compiled, (target, target.base_model))))
        self._input_ids, self._config, self._kwargs = input_ids, generation_config, model_kwargs
        self._given = None  # a copy of the caller's own cache, while that is empty

    def begin(self, record: CallRecord):
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

    def allows(self, record: CallRecord, first: bool) -> bool:
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

    def _fail(self, why: str, record: CallRecord):
        record.stats.plain_requests = 1
        self._warn(self._target, why)

    def _find(self, record: CallRecord) -> str | None:
        """Why the target fails; known, or tried now."""
        if not self._tries:
            return None
        part = next(self._target.children(), self._target)
        key = _kind(self._target, self._cache)
        with _lock:
            verdicts = _verdicts.setdefault(part, {})
            if key not in verdicts:
                start = time.perf_counter()
                trial = _Trial(self._target, self._input_ids, self._config, self._kwargs, self._given)
                with nullcontext() if record.prefill is None else record.prefill.paused():
                    verdicts[key] = trial.run()
                record.stats.verification_forwards += trial.forwards
                record.stats.verification_seconds += time.perf_counter() - start
            return verdicts[key]


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
    layers = [layer for layer in _layers(cache) if getattr(layer, "record_past", True) is False]
    try:
        yield
    except CannotVerify:
        for layer in layers:
            layer.record_past = False
        raise


# By what is true of the cache and the target.


def _layers(cache) -> list:
    return list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))


def _seq_length(cache) -> int:
    try:
        return int(cache.get_seq_length())
    except Exception:  # a cache without positions
        return 0


def _obstacle(target: PreTrainedModel, cache) -> str | None:
    """What rules it out from the start."""
    # peft's generate puts its own method in the target's place.
    owner = getattr(target.prepare_inputs_for_generation, "__self__", None)
    learnt = getattr(owner, "active_peft_config", None)
    if getattr(learnt, "is_prompt_learning", False):
        return f"its learnt prompt ({type(learnt).__name__}) is counted among the tokens"
    fixed = sorted({type(layer).__name__ for layer in _layers(cache) if _is_fixed(layer)})
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
    linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _layers(cache))
    if linear and not kinds & {"conv"}:
        return _RECURRENT
    return None if linear or getattr(cache, "is_croppable", False) else "its cache does not say that it can be cropped"


_RECURRENT = "its layers have recurrent states, which no token can be taken back out of"


def _kind(target: PreTrainedModel, cache) -> tuple:
    """The configuration and kind of cache that a verdict is of."""
    layers = {
        (kind, getattr(kind, "update", None), getattr(kind, "crop", None), getattr(layer, "sliding_window", None))
        for layer in _layers(cache)
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


# By trial.


class _Forced(LogitsProcessor):
    """Has a loop say a given text."""

    def __init__(self, text: Tensor):
        self._text, self.calls = text, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self._text[0, input_ids.shape[1]]] = 0.0
        return scores


class _Scripted:
    """Stands for an assistant, and for its candidate generator: drafts what `_ROUNDS` say of the text `(1, T)`, wrong tokens from `wrong` `(1, T)`."""

    requires_model_outputs = False

    def __init__(self, text: Tensor, wrong: Tensor):
        self._text, self._wrong, self.calls = text, wrong, 0

    def open_call(self, target, **kwargs) -> _Scripted:
        return self

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        right, wrong = _ROUNDS[self.calls]
        self.calls += 1
        at = input_ids.shape[1]
        drafts = self._text[:, at : at + right], self._wrong[:, at + right : at + right + wrong]
        return torch.cat([input_ids, *drafts], dim=-1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        pass


class _Trial:
    """Decodes short texts with a target both ways, on caches of their own.

    Args:
        target, input_ids, config, kwargs: the call's.
        cache (`Cache`, *optional*): an empty one like the call's; generate makes one if left out.
    """

    def __init__(
        self, target: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, kwargs: dict, cache: object
    ):
        self._target, self._given, self.forwards = target, cache, 0
        self._encodes = target.config.is_encoder_decoder
        self._start = input_ids[:, :_PROMPT] if self._encodes else input_ids[:, :0]
        plain = (bool, int, float, str)
        self._kwargs = {name: value for name, value in kwargs.items() if value is None or isinstance(value, plain)}
        if self._encodes:  # what the encoder made is read and not written
            self._kwargs |= {name: kwargs[name] for name in ("encoder_outputs", "attention_mask") if name in kwargs}
        self._positions = not self._encodes and kwargs.get("position_ids") is not None
        self._device, self._was = input_ids.device, config

    def run(self) -> str | None:
        """Why the target fails; `None` if it does not, or if it cannot be told."""
        try:
            with isolated_random_state(), _left_as_it_was(self._target):
                return self._compare()
        except torch.OutOfMemoryError:
            return None

    def _compare(self) -> str | None:
        unit = _unit(self._target)
        is_fine = unit <= torch.finfo(torch.float32).eps
        tolerance = _FINE if is_fine else _COARSE if unit <= torch.finfo(torch.float16).eps else _COARSEST
        most = _MOST_FINE if is_fine else _MOST
        texts = 1 if is_fine else _TEXTS
        shown = passed = 0
        while max(shown, passed) <= texts // 2:
            text, wrong = self._texts(shown + passed)
            try:
                plain, cache = self._plainly(text, text.shape[1] - _ROWS)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # it may need more than tokens, images say
                logger.debug("%s was not tried in blocks.", type(self._target).__name__, exc_info=True)
                return None
            if _has_recurrent_states(cache):
                return _RECURRENT
            fed = text.shape[1] - 1
            if (held := _seq_length(cache)) > fed:
                return f"its cache holds {held - fed} positions more than it has read tokens"
            try:
                blocks = self._in_blocks(text, wrong)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # as it would in the call
                logger.debug("%s failed in blocks.", type(self._target).__name__, exc_info=True)
                return f"several tokens at once end in {type(error).__name__}: {error}".splitlines()[0]
            apart = float(_apart(plain, blocks).max())
            if apart > tolerance and apart > min(self._rounding(text, plain), most):
                shown += 1
            elif shown:
                passed += 1
            else:
                return None
        if passed > shown:
            return None
        return f"what it says of several tokens at once is not what it says of them one at a time (apart by {apart:.0%} of the logits' spread)"

    def _rounding(self, text: Tensor, plain: Tensor) -> float:
        """How far apart rows may be by rounding alone, by what plain decoding from a longer prompt says of the same text."""
        skipped = _ROWS // 2
        rows, _ = self._plainly(text, text.shape[1] - _ROWS + skipped)
        return _NOISE * float(_apart(plain[skipped:], rows).max())

    def _texts(self, seed: int) -> tuple[Tensor, Tensor]:
        """A text of random tokens `(1, T)`, none of which means something to the model, and another that differs from it everywhere."""
        config = self._target.config.get_text_config(decoder=True)
        rows = getattr(self._target.get_input_embeddings(), "num_embeddings", config.vocab_size)
        named = [value for part in (self._target.config, config) for value in _special_ids(part)]
        allowed = torch.tensor([i for i in range(min(rows, config.vocab_size, 2**15)) if i not in set(named)])
        random = torch.Generator().manual_seed(seed)
        length = _ROWS + (self._start.shape[1] or _PROMPT)
        at = torch.randint(len(allowed), (1, length), generator=random)
        aside = torch.randint(1, max(len(allowed), 2), (1, length), generator=random)
        text, wrong = (allowed[i % len(allowed)].to(self._device) for i in (at, at + aside))
        text[:, : self._start.shape[1]] = self._start
        return text, wrong

    def _plainly(self, text: Tensor, prompt: int) -> tuple[Tensor, object]:
        """The rows that plain decoding has after the first `prompt` tokens of `text`, float32 `(T-prompt, V)`; and the cache it leaves."""
        forced = _Forced(text)
        try:
            return self._decode("_sample", forced, text, prompt)
        finally:
            self.forwards += forced.calls

    def _in_blocks(self, text: Tensor, wrong: Tensor) -> Tensor:
        """The same rows, of blocks."""
        scripted = _Scripted(text, wrong)
        try:
            rows, _ = self._decode(
                "_assisted_decoding", _Forced(text), text, text.shape[1] - _ROWS, assistant_model=scripted
            )
        finally:
            self.forwards += scripted.calls
        return rows

    def _decode(self, loop: str, forced: _Forced, text: Tensor, prompt: int, **extra) -> tuple[Tensor, object]:
        target, length, ids = self._target, text.shape[1], text[:, :prompt]
        config = copy.copy(self._was)
        settings = {
            "do_sample": False, "max_length": length, "max_new_tokens": None, "return_dict_in_generate": True, "output_logits": True,
            "output_scores": False, "output_attentions": False, "output_hidden_states": False, "prefill_chunk_size": None,
            "disable_compile": True, "assistant_ensemble_weight": None, "_eos_token_tensor": None, "_mask_length": prompt,
        }  # fmt: skip
        for name, value in settings.items():
            setattr(config, name, value)
        kwargs = dict(self._kwargs)
        if self._positions:
            kwargs["position_ids"] = target._prepare_position_ids_for_generation(ids, kwargs)
        if self._given is not None:
            kwargs["past_key_values"] = copy.deepcopy(self._given)
        else:
            kwargs.pop("past_key_values", None)
            target._prepare_cache_for_generation(config, kwargs, GenerationMode.ASSISTED_GENERATION, 1, length - 1)
        output = getattr(type(target), loop)(
            target,
            ids,
            logits_processor=LogitsProcessorList([forced]),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(length)]),
            generation_config=config,
            **extra,
            **kwargs,
        )
        return torch.cat(output.logits), output.past_key_values


def _special_ids(config) -> Iterator[int]:
    """Ids that a config names: ends of text, and what stands for an image or a sound."""
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index", "token_ids")):
            yield from value if isinstance(value, (list, tuple)) else [value]


def _has_recurrent_states(cache) -> bool:
    return any(any(getattr(layer, "is_recurrent_states_initialized", {}).values()) for layer in _layers(cache))


def _apart(rows: Tensor, others: Tensor) -> Tensor:
    """How far `others` `(R, V)` are from `rows` `(R, V)`, each as a share of the spread of its row, `(R,)`; infinite where one is finite alone."""
    finite = rows.isfinite()
    same = (finite == others.isfinite()).all(-1)
    rows, others = rows.masked_fill(~finite, 0.0).double(), others.masked_fill(~finite, 0.0).double()
    spread = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1)
    apart = (rows - others).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(same, apart, torch.inf)


def _unit(target: PreTrainedModel) -> float:
    """A unit in the last place of the coarsest arithmetic that the target computes in, relative to the number."""
    kind = target.device.type
    dtypes = {p.dtype for p in target.parameters() if p.is_floating_point() and p.dtype.itemsize > 1} or {target.dtype}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    if getattr(target, "hf_quantizer", None) is not None:
        dtypes.add(torch.bfloat16)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest":
        unit = max(unit, torch.finfo(torch.float16).eps)  # TF32, or less
    return unit


@contextlib.contextmanager
def _left_as_it_was(target: PreTrainedModel) -> Iterator[None]:
    """Put back what forwards leave in modules: position offsets of the last prompt, say, which the call has still to read."""
    homes = [home for module in target.modules() for home in (vars(module), module._buffers)]
    before = [dict(home) for home in homes]
    copies = [
        (value, value.clone())
        for home in before
        for value in home.values()
        if isinstance(value, Tensor) and not value.is_meta and value.numel() <= _SMALL
    ]
    try:
        yield
    finally:
        for home, then in zip(homes, before, strict=True):
            for name in [name for name, value in home.items() if name not in then and not callable(value)]:
                del home[name]
            for name, value in then.items():
                if home.get(name, home) is not value and not callable(value):
                    home[name] = value
        for value, was in copies:
            if not torch.equal(value, was):
                value.copy_(was)
