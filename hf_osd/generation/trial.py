"""`Trial` decodes a short text with a target by transformers' own two loops, plainly and in blocks that are partly right, and compares the logits. Of the call it
uses the inputs only."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from hf_osd.generation.filled_cache import layers_of
from hf_osd.models.properties import special_ids
from hf_osd.system.random_state import isolated_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.request import GenerateRequest

logger = logging.getLogger(__name__)

# The trial's blocks: how many tokens of each are right, and how many wrong ones follow. Each round gives one row of logits more than it has right tokens.
_BLOCKS = ((0, 2), (3, 2), (1, 0))
# Recurrent states cannot be taken back to before the prompt; later they are twice in a row, before a block that needs no rollback.
_BLOCKS_ROLLED_BACK = ((0, 0), (0, 2), (3, 2), (2, 0), (0, 1), (1, 0))
_PROMPT = 6  # tokens
# Rows differ if their distance, relative to the row's spread, exceeds two bounds. The first is for rounding in matrix products of other shapes: in float32,
# in coarser arithmetic up to float16's (or TF32's), and in arithmetic coarser still.
_FINE, _COARSE, _COARSEST = 1e-3, 1e-2, 3e-2
_NOISE = 6  # The second is so many times the distance between two plain decodings of the text,
_MAX_FINE, _MAX_COARSE = 3e-2, 1.0  # but at most this: in float32, and in coarser arithmetic.
# In coarse arithmetic a router may choose another expert in a block by rounding alone: of so many texts the majority must fail.
_TEXTS = 5
_MAX_RESTORED = 2**16  # elements: a model's tensors up to this size are restored if a forward wrote into them
RECURRENT = "its layers have recurrent states, which no token can be taken back out of"


class _Forced(LogitsProcessor):
    """Forces a loop to generate a given text."""

    def __init__(self, text: Tensor):
        self._text, self.calls = text, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self._text[0, input_ids.shape[1]]] = 0.0
        return scores


class _Scripted:
    """Acts as an assistant and as its candidate generator: drafts `blocks`, right tokens from `text` `(1, T)`, wrong ones from `wrong` `(1, T)`."""

    requires_model_outputs = False

    def __init__(self, blocks: Sequence[tuple[int, int]], text: Tensor, wrong: Tensor):
        self._blocks, self._text, self._wrong, self.calls = blocks, text, wrong, 0

    def open_call(self, request: GenerateRequest) -> _Scripted:
        return self

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        right, wrong = self._blocks[self.calls]
        self.calls += 1
        at = input_ids.shape[1]
        drafts = self._text[:, at : at + right], self._wrong[:, at + right : at + right + wrong]
        return torch.cat([input_ids, *drafts], dim=-1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        pass


class Trial:
    """Decodes short texts with a target in both ways, each on a new cache.

    Args:
        request (`GenerateRequest`): the call's arguments.
        cache (`Cache`, *optional*): an empty cache like the call's, to be copied; by default generate makes one.
    """

    def __init__(self, request: GenerateRequest, cache: object):
        self._target, self._cache_copy, self.forwards = request.target, cache, 0
        self._rolls_back = request.running is not None and request.running.rollback is not None
        self._blocks = _BLOCKS_ROLLED_BACK if self._rolls_back else _BLOCKS
        self._rows = sum(right + 1 for right, _ in self._blocks)
        self._encodes = request.encodes
        input_ids, kwargs = request.input_ids, request.model_kwargs
        self._start = input_ids[:, :_PROMPT] if self._encodes else input_ids[:, :0]
        plain = (bool, int, float, str)
        self._kwargs = {name: value for name, value in kwargs.items() if value is None or isinstance(value, plain)}
        if self._encodes:  # encoder outputs are only read
            self._kwargs |= {name: kwargs[name] for name in ("encoder_outputs", "attention_mask") if name in kwargs}
        self._positions = not self._encodes and kwargs.get("position_ids") is not None
        self._device, self._generation_config = input_ids.device, request.generation_config

    def run(self) -> str | None:
        """Returns the reason why the target fails; `None` if it passes, or if the trial itself cannot run."""
        try:
            with isolated_random_state(), _modules_restored(self._target):
                return self._compare()
        except Exception:  # out of memory, say: it must not break the user's call
            logger.debug("%s could not be tried in blocks.", type(self._target).__name__, exc_info=True)
            return None

    def _compare(self) -> str | None:
        unit = _unit(self._target)
        is_fine = unit <= torch.finfo(torch.float32).eps
        tolerance = _FINE if is_fine else _COARSE if unit <= torch.finfo(torch.float16).eps else _COARSEST
        largest = _MAX_FINE if is_fine else _MAX_COARSE
        texts = 1 if is_fine else _TEXTS
        failed = passed = 0
        while max(failed, passed) <= texts // 2:
            text, wrong = self._texts(failed + passed)
            plain, cache = self._plainly(
                text, text.shape[1] - self._rows
            )  # raises if the target needs more than tokens
            if _has_recurrent_states(cache) and not self._rolls_back:
                return RECURRENT
            fed = text.shape[1] - 1
            if (held := _seq_length(cache)) > fed:
                return f"its cache holds {held - fed} positions more than it has read tokens"
            try:
                blocks = self._in_blocks(text, wrong)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the call would raise it too
                logger.debug("%s failed in blocks.", type(self._target).__name__, exc_info=True)
                return f"several tokens at once end in {type(error).__name__}: {error}".splitlines()[0]
            distance = float(_distance(plain, blocks).max())
            if distance > tolerance and distance > min(self._rounding(text, plain), largest):
                failed += 1
            elif failed:
                passed += 1
            else:
                return None
        if passed > failed:
            return None
        return f"its logits for several tokens at once differ from those for one at a time (by {distance:.0%} of the logits' spread)"

    def _rounding(self, text: Tensor, plain: Tensor) -> float:
        """Estimates the distance that rounding alone can make, by plain decoding of the same text from a longer prompt."""
        skipped = self._rows // 2
        rows, _ = self._plainly(text, text.shape[1] - self._rows + skipped)
        return _NOISE * float(_distance(plain[skipped:], rows).max())

    def _texts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Makes a text of random ordinary tokens `(1, T)`, and another that differs from it at every position."""
        config = self._target.config.get_text_config(decoder=True)
        rows = getattr(self._target.get_input_embeddings(), "num_embeddings", config.vocab_size)
        special = special_ids(self._target)
        ids = range(min(rows, config.vocab_size, 2**15))
        free = [i for i in ids if i not in special]
        allowed = torch.tensor(free if len(free) > 1 else ids, dtype=torch.long, device="cpu")
        random = torch.Generator("cpu").manual_seed(seed)
        length = self._rows + (self._start.shape[1] or _PROMPT)
        at = torch.randint(len(allowed), (1, length), generator=random, dtype=torch.long, device="cpu")
        offset = torch.randint(1, len(allowed), (1, length), generator=random, dtype=torch.long, device="cpu")
        text, wrong = (allowed[i % len(allowed)].to(self._device) for i in (at, at + offset))
        text[:, : self._start.shape[1]] = self._start
        return text, wrong

    def _plainly(self, text: Tensor, prompt: int) -> tuple[Tensor, object]:
        """Decodes `text` plainly after its first `prompt` tokens; returns the logits, float32 `(T-prompt, V)`, and the cache."""
        forced = _Forced(text)
        try:
            return self._decode("_sample", forced, text, prompt)
        finally:
            self.forwards += forced.calls

    def _in_blocks(self, text: Tensor, wrong: Tensor) -> Tensor:
        """Decodes `text` in blocks; returns the same rows of logits."""
        scripted = _Scripted(self._blocks, text, wrong)
        try:
            rows, _ = self._decode(
                "_assisted_decoding", _Forced(text), text, text.shape[1] - self._rows, assistant_model=scripted
            )
        finally:
            self.forwards += scripted.calls
        return rows

    def _decode(self, loop: str, forced: _Forced, text: Tensor, prompt: int, **extra) -> tuple[Tensor, object]:
        target, length, ids = self._target, text.shape[1], text[:, :prompt]
        config = copy.copy(self._generation_config)
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
        if self._cache_copy is not None:
            kwargs["past_key_values"] = copy.deepcopy(self._cache_copy)
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


def _distance(rows: Tensor, others: Tensor) -> Tensor:
    """Computes the distance of `others` `(R, V)` from `rows` `(R, V)`, relative to each row's spread, `(R,)`; infinite if only one of two values is finite."""
    finite = rows.isfinite()
    same = (finite == others.isfinite()).all(-1)
    rows, others = rows.masked_fill(~finite, 0.0).double(), others.masked_fill(~finite, 0.0).double()
    spread = (rows - rows.mean(-1, keepdim=True)).norm(dim=-1)
    distance = (rows - others).norm(dim=-1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(same, distance, torch.inf)


def _unit(target: PreTrainedModel) -> float:
    """Returns the machine epsilon of the coarsest arithmetic that the target computes in."""
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
def _modules_restored(target: PreTrainedModel) -> Iterator[None]:
    """Restores what forwards write into modules, for example position offsets of the prompt, which the call will still read."""
    stores = [store for module in target.modules() for store in (vars(module), module._buffers)]
    before = [dict(store) for store in stores]
    copies = [
        (value, value.clone())
        for store in before
        for value in store.values()
        if isinstance(value, Tensor) and not value.is_meta and value.numel() <= _MAX_RESTORED
    ]
    try:
        yield
    finally:
        for store, saved in zip(stores, before, strict=True):
            for name in [name for name, value in store.items() if name not in saved and not callable(value)]:
                del store[name]
            for name, value in saved.items():
                if store.get(name, store) is not value and not callable(value):
                    store[name] = value
        for value, saved_value in copies:
            if not torch.equal(value, saved_value):
                value.copy_(saved_value)


def _seq_length(cache) -> int:
    try:
        return int(cache.get_seq_length())
    except Exception:  # a cache without positions
        return 0


def _has_recurrent_states(cache) -> bool:
    return any(any(getattr(layer, "is_recurrent_states_initialized", {}).values()) for layer in layers_of(cache))
