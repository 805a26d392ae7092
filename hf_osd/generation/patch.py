"""The one seam into transformers: `GenerationMixin._get_candidate_generator`, wrapped once, so that `assistant_model=` may be an
[`OnlineAssistant`]; and the method that calls it, for it alone knows the stopping criteria and when a call ends; and those of Whisper's that clear a setting
where they see an assistant. Every other assistant goes through untouched."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from hf_osd.generation.request import GenerateRequest
from hf_osd.generation.running import RunningCall, running_calls

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What the seam relies on, by what has it: names of parameters. Checked when the seam opens.
_OF_A_LOOP = ("input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer")
_OF_A_REQUEST = ("input_ids", "generation_config", "model_kwargs", "inputs_tensor", "logits_processor")
_CONTRACT = {
    "GenerationMixin._assisted_decoding": ("stopping_criteria", "assistant_model", "synced_gpus"),
    "GenerationMixin._sample": _OF_A_LOOP,
    "GenerationMixin._validate_generation_mode": ("generation_mode_kwargs",),
    "GenerationMixin._prepare_cache_for_generation": ("generation_config", "model_kwargs", "max_cache_length"),
    "GenerationMixin._get_candidate_generator": (
        *_OF_A_REQUEST,
        "assistant_model",
        "target_tokenizer",
        "assistant_tokenizer",
    ),
    "AssistedCandidateGenerator.__init__": (
        "input_ids",
        "assistant_model",
        "generation_config",
        "model_kwargs",
        "inputs_tensor",
        "logits_processor",
    ),
    "AssistedCandidateGenerator.get_candidates": ("input_ids",),
    "AssistedCandidateGenerator.update_candidate_strategy": ("input_ids", "scores", "num_matches"),
    "WhisperGenerationMixin.generate": ("kwargs",),
    "WhisperGenerationMixin.generate_with_fallback": ("kwargs",),
}
_TESTED = "transformers>=5.23,<5.24"

# Of this thread: `whispers`, the assistants of Whisper's calls, innermost last.
_thread = threading.local()


def enable():
    """Open the seam. Called by `OnlineAssistant()`; calling it again does nothing.

    Raises:
        RuntimeError: if this transformers has changed what the seam relies on; the message says what, and what to install.
    """
    if is_enabled():
        return
    _check_contract()
    for owner, methods in _seam().items():
        for name, make in methods.items():
            setattr(owner, name, _wrapped(owner, name, make))


def disable():
    """Close the seam. An OnlineAssistant then drafts like any stock assistant, and no longer learns."""
    if is_enabled():
        for owner, methods in _seam().items():
            for name in methods:
                setattr(owner, name, getattr(owner, name)._hf_osd_original)


def is_enabled() -> bool:
    """Whether the seam is open."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin._get_candidate_generator, "_hf_osd_original")


def generate_unpatched(target: PreTrainedModel, assistant_model: object = None, **kwargs):
    """What `target.generate(assistant_model=assistant_model, **kwargs)` returns with the seam open, whether it is or not: for this call alone, the target
    is seen as of a class of its own that has the seam. Target and transformers stay as they are, and other threads' calls too.

    Called by the generation strategy that hf_osd writes for the Hub, which hands on what `generate` was given: arguments that only say where the strategy
    came from are dropped.

    Raises:
        RuntimeError: as `enable` does.
    """
    for name in ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder"):
        kwargs.pop(name, None)
    cls = type(target)
    # No assistant: `from_pretrained(..., trust_remote_code=True)` makes the strategy in a draft's repository the draft's own `generate`.
    if assistant_model is None:
        return cls.generate(target, **kwargs)
    if not hasattr(assistant_model, "open_call"):
        _say_that_it_learns_nothing(type(assistant_model).__name__)
    _check_contract()
    view = object.__new__(_with_seam(cls))
    object.__setattr__(view, "__dict__", target.__dict__)
    return type(view).generate(view, assistant_model=assistant_model, **kwargs)


@functools.cache
def _say_that_it_learns_nothing(kind: str):
    logger.warning(
        "The assistant_model is a %s, which learns nothing; pass OnlineAssistant(draft) for one that does.", kind
    )


@functools.lru_cache(maxsize=32)
def _with_seam(cls: type) -> type:
    makes = {
        name: make for owner, methods in _seam().items() if issubclass(cls, owner) for name, make in methods.items()
    }
    wrapped = {name: _wrapped(cls, name, make) for name, make in makes.items()}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **wrapped})


def _seam() -> dict[type, dict[str, Callable]]:
    """What is wrapped, by whose it is, and in what."""
    from transformers import GenerationMixin
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    return {
        GenerationMixin: {
            "_get_candidate_generator": _dispatching,
            "_assisted_decoding": _running,
            "_validate_generation_mode": _validating,
        },
        WhisperGenerationMixin: {"generate": _hiding, "generate_with_fallback": _showing},
    }


def _wrapped(cls: type, name: str, make: Callable) -> Callable:
    original = getattr(cls, name)
    original = getattr(original, "_hf_osd_original", original)
    wrapped = functools.wraps(original)(make(original, inspect.signature(original)))
    wrapped._hf_osd_original = original
    return wrapped


def _dispatching(original: Callable, signature: inspect.Signature) -> Callable:
    """`_get_candidate_generator`: an OnlineAssistant makes its own."""

    def get_candidate_generator(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments.get("assistant_model")
        if not hasattr(assistant, "open_call"):
            return original(self, *args, **kwargs)
        tokenizers = arguments.get("target_tokenizer"), arguments.get("assistant_tokenizer")
        request = GenerateRequest(
            target=self,
            **{name: arguments[name] for name in _OF_A_REQUEST},
            tokenizers=None if None in tokenizers else tokenizers,
            running=running_calls()[-1] if running_calls() else None,
        )
        return assistant.open_call(request)

    return get_candidate_generator


def _running(original: Callable, signature: inspect.Signature) -> Callable:
    """`_assisted_decoding`: while it runs, its stopping criteria lie where an OnlineAssistant finds them."""
    from hf_osd.system.default_device import default_device

    def assisted_decoding(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        if not hasattr(arguments.get("assistant_model"), "open_call"):
            return original(self, *args, **kwargs)
        # Imported here: `import hf_osd` is quick, and transformers' caches are not.
        from hf_osd.generation.verification import CannotVerify, recording_put_back

        model_kwargs, processors = arguments["model_kwargs"], list(arguments["logits_processor"])
        cache, assistant = model_kwargs.get("past_key_values"), arguments["assistant_model"]
        call = RunningCall(arguments["stopping_criteria"], arguments.get("synced_gpus", False))
        running_calls().append(call)
        try:
            if cache is None and model_kwargs.get("use_cache"):
                why = "it keeps no cache that generate could take tokens back out of"
                assistant.decodes_plainly(self, why)
                raise CannotVerify(why, call)
            with (
                recording_put_back(cache),
                default_device(self.device),
            ):  # its loop has tensors that plain decoding has not
                return original(self, *args, **kwargs)
        except CannotVerify as error:
            if error.running is not call:  # of a call within this one
                raise
        finally:
            running_calls().pop()
        arguments["logits_processor"][:] = processors
        own = {name: arguments[name] for name in _OF_A_LOOP if name in arguments}
        return type(self)._sample(self, **own, **model_kwargs)

    return assisted_decoding


def _validating(original: Callable, signature: inspect.Signature) -> Callable:
    """`_validate_generation_mode`: a target is refused as stateful for what it is, not for what its class may be."""

    def validate_generation_mode(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments["generation_mode_kwargs"].get("assistant_model")
        if hasattr(assistant, "open_call") and self._is_stateful:
            from hf_osd.generation.verification import only_looks_stateful

            if only_looks_stateful(self):
                view = object.__new__(_stateless(type(self)))
                object.__setattr__(view, "__dict__", self.__dict__)
                return original(view, *args, **kwargs)
        return original(self, *args, **kwargs)

    return validate_generation_mode


@functools.lru_cache(maxsize=32)
def _stateless(cls: type) -> type:
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_is_stateful": False})


def _hiding(original: Callable, signature: inspect.Signature) -> Callable:
    """Whisper's `generate`: clears `begin_suppress_tokens` where it sees an assistant, that a stock one may draft an end of the text at once; the output is then
    another than without one. It sees none until it decodes."""

    def generate(self, *args, **kwargs):
        if not hasattr(_thread, "whispers"):
            _thread.whispers = []
        learns = hasattr(kwargs.get("assistant_model"), "open_call")
        _thread.whispers.append(kwargs.pop("assistant_model") if learns else None)
        try:
            return original(self, *args, **kwargs)
        finally:
            _thread.whispers.pop()

    return generate


def _showing(original: Callable, signature: inspect.Signature) -> Callable:
    """Whisper's `generate_with_fallback`, which decodes one segment."""

    def generate_with_fallback(self, *args, **kwargs):
        bound, whispers = signature.bind(self, *args, **kwargs), getattr(_thread, "whispers", [])
        if whispers and whispers[-1] is not None:
            bound.arguments["kwargs"] = {**bound.arguments["kwargs"], "assistant_model": whispers[-1]}
        return original(*bound.args, **bound.kwargs)

    return generate_with_fallback


def _check_contract():
    import transformers
    from transformers import GenerationMixin  # noqa: F401 (looked up by name)
    from transformers.generation.candidate_generator import AssistedCandidateGenerator  # noqa: F401 (likewise)
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin  # noqa: F401 (likewise)

    for name, needed in _CONTRACT.items():
        owner, method = name.split(".")
        function = getattr(locals()[owner], method, None)
        found = inspect.signature(function).parameters if function else ()
        if missing := [parameter for parameter in needed if parameter not in found]:
            raise RuntimeError(
                f"transformers {transformers.__version__} has changed {name}: hf_osd needs its parameters {missing}. "
                f"Install '{_TESTED}', or a newer hf_osd."
            )
