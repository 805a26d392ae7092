"""This is the one seam into transformers: by it `assistant_model=` may be an [`OnlineAssistant`]. It wraps `GenerationMixin._get_candidate_generator`, its caller
`_assisted_decoding`, which has the stopping criteria and ends with the call, `_update_model_kwargs_for_generation`, which gets the target's outputs at the end of each
round, the validation before a call, and two methods of Whisper, which change a setting if they get an assistant. Every other assistant passes through unchanged."""

from __future__ import annotations

import contextlib
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

    from hf_osd.generation.rollback import Rollback

logger = logging.getLogger(__name__)

# Parameters that the seam relies on, by method; checked when the seam opens.
_LOOP_PARAMETERS = (
    "input_ids",
    "logits_processor",
    "stopping_criteria",
    "generation_config",
    "synced_gpus",
    "streamer",
)
_REQUEST_PARAMETERS = ("input_ids", "generation_config", "model_kwargs", "inputs_tensor", "logits_processor")
_CONTRACT = {
    "GenerationMixin._assisted_decoding": ("stopping_criteria", "assistant_model", "synced_gpus"),
    "GenerationMixin._sample": _LOOP_PARAMETERS,
    "GenerationMixin._validate_generation_mode": ("generation_mode_kwargs",),
    "GenerationMixin._update_model_kwargs_for_generation": ("outputs", "model_kwargs"),
    "GenerationMixin._prepare_cache_for_generation": ("generation_config", "model_kwargs", "max_cache_length"),
    "GenerationMixin._get_candidate_generator": (
        *_REQUEST_PARAMETERS,
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

# Attribute, by thread: `whispers`, the assistants of Whisper's calls, the innermost last.
_thread = threading.local()


def enable():
    """Opens the seam. `OnlineAssistant()` calls it; calling it again does nothing.

    Raises:
        RuntimeError: if this transformers lacks parameters that the seam relies on; the message names them, and what to install.
    """
    if is_enabled():
        return
    _check_contract()
    for owner, methods in _seam().items():
        for name, make in methods.items():
            setattr(owner, name, _wrapped(owner, name, make))


def disable():
    """Closes the seam. An OnlineAssistant then drafts like any stock assistant, and no longer learns."""
    if is_enabled():
        for owner, methods in _seam().items():
            for name in methods:
                setattr(owner, name, getattr(owner, name)._hf_osd_original)


def is_enabled() -> bool:
    """Returns `True` if the seam is open."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin._get_candidate_generator, "_hf_osd_original")


def generate_unpatched(target: PreTrainedModel, assistant_model: object = None, **kwargs):
    """Returns the output of `target.generate(assistant_model=assistant_model, **kwargs)` with the seam open for this call only: the call runs on a view of the
    target, of a subclass that has the seam. Target, transformers and other threads' calls stay unchanged.

    The generation strategy that hf_osd writes for the Hub calls it with the arguments of `generate`; those that only locate the strategy are dropped.

    Raises:
        RuntimeError: as `enable` does.
    """
    for name in ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder"):
        kwargs.pop(name, None)
    cls = type(target)
    # Without an assistant: `from_pretrained(..., trust_remote_code=True)` makes the strategy in a draft's repository the draft's own `generate`.
    if assistant_model is None:
        return cls.generate(target, **kwargs)
    if not hasattr(assistant_model, "open_call"):
        _warn_not_learning(type(assistant_model).__name__)
    _check_contract()
    view = _viewed(target, _with_seam(cls))
    return type(view).generate(view, assistant_model=assistant_model, **kwargs)


def _viewed(target: PreTrainedModel, cls: type) -> PreTrainedModel:
    """Makes a view of `target` as an instance of `cls`, a subclass of its own; it shares all attributes."""
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", target.__dict__)
    return view


@functools.cache
def _warn_not_learning(kind: str):
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
    """Maps each class to the methods that are wrapped in it, and these to their wrappers."""
    from transformers import GenerationMixin
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

    return {
        GenerationMixin: {
            "_get_candidate_generator": _wrap_get_candidates,
            "_assisted_decoding": _wrap_decoding,
            "_validate_generation_mode": _wrap_validation,
            "_update_model_kwargs_for_generation": _wrap_round_end,
        },
        WhisperGenerationMixin: {"generate": _wrap_whisper, "generate_with_fallback": _wrap_whisper_fallback},
    }


def _wrapped(cls: type, name: str, make: Callable) -> Callable:
    original = getattr(cls, name)
    original = getattr(original, "_hf_osd_original", original)
    wrapped = functools.wraps(original)(make(original, inspect.signature(original)))
    wrapped._hf_osd_original = original
    return wrapped


def _wrap_get_candidates(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps `_get_candidate_generator`: an OnlineAssistant makes its own generator."""

    def get_candidate_generator(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments.get("assistant_model")
        if not hasattr(assistant, "open_call"):
            return original(self, *args, **kwargs)
        tokenizers = arguments.get("target_tokenizer"), arguments.get("assistant_tokenizer")
        running = running_calls()[-1] if running_calls() else None
        request = GenerateRequest(
            target=self if running is None or running.target is None else running.target,
            **{name: arguments[name] for name in _REQUEST_PARAMETERS},
            tokenizers=None if None in tokenizers else tokenizers,
            running=running,
        )
        return assistant.open_call(request)

    return get_candidate_generator


def _wrap_decoding(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps `_assisted_decoding`: it registers the running call with its stopping criteria, and decodes plainly if the target cannot verify."""
    from hf_osd.system.default_device import default_device

    def assisted_decoding(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        if not hasattr(arguments.get("assistant_model"), "open_call"):
            return original(self, *args, **kwargs)
        # Imported here, to keep `import hf_osd` quick.
        from hf_osd.generation.filled_cache import held_by
        from hf_osd.generation.verification import CannotVerify

        model_kwargs, processors = arguments["model_kwargs"], list(arguments["logits_processor"])
        cache = model_kwargs.get("past_key_values")
        call = RunningCall(arguments["stopping_criteria"], arguments.get("synced_gpus", False), held=held_by(cache))
        running_calls().append(call)
        try:
            kept = getattr(cache, "_is_user_defined", False) or arguments["generation_config"].return_dict_in_generate
            if (why := _unsuited(self, cache, call, model_kwargs, kept)) is not None:
                arguments["assistant_model"].warn_plain_decoding(self, why)
                raise CannotVerify(why, call)
            with default_device(self.device):  # the loop of assisted decoding makes tensors on it
                output = _run_loop(lambda target: original(target, *args, **kwargs), self, cache, call)
                if kept and call.rollback is not None and call.rollback.carried:
                    call.count_completed(call.rollback.complete(self, getattr(output, "sequences", output)))
            return output
        except CannotVerify as error:
            if error.running is not call:  # raised by a call within this one
                raise
        finally:
            running_calls().pop()
            call.count_completed = None
        arguments["logits_processor"][:] = processors
        named = {name: arguments[name] for name in _LOOP_PARAMETERS if name in arguments}
        return type(self)._sample(self, **named, **model_kwargs)

    return assisted_decoding


def _unsuited(target: PreTrainedModel, cache, call: RunningCall, model_kwargs: dict, kept: bool) -> str | None:
    """Returns why a call decodes plainly whatever drafts there are, if so; `kept` is `True` if its cache outlives it."""
    from hf_osd.generation.rollback import needs_rollback

    if cache is None and model_kwargs.get("use_cache"):
        return "it keeps no cache that generate could take tokens back out of"
    rolls_back = needs_rollback(target, cache)
    if rolls_back and kept and call.synced_gpus:
        return "its cache is kept, has recurrent states, and may want a forward at the end, for which other processes would wait (synced_gpus)"
    if (call.held or rolls_back) and "prepare_inputs_for_generation" in vars(target):
        return (
            "its prepare_inputs_for_generation was replaced, and would not be asked for other inputs than generate's"
        )
    return None


def _run_loop(loop: Callable, target: PreTrainedModel, cache, call: RunningCall):
    """Runs generate's own loop on `target`, or on a view of it where the cache is filled or has recurrent states."""
    from hf_osd.generation.filled_cache import continuing, past_recording_restored, take_back
    from hf_osd.generation.rollback import Rollback, needs_rollback, rolling

    cls = continuing(type(target)) if call.held else type(target)
    with past_recording_restored(cache), contextlib.ExitStack() as stack:
        if needs_rollback(target, cache):
            call.rollback, cls = Rollback(cache), rolling(cls, _running_rollback)
            stack.enter_context(call.rollback.installed())
        if cls is not type(target):
            call.target, target = target, _viewed(target, cls)
        try:
            return loop(target)
        except BaseException:
            if call.verified is not None and getattr(cache, "_is_user_defined", False):
                take_back(cache, call.verified)
            raise


def _running_rollback() -> Rollback:
    return running_calls()[-1].rollback


def _wrap_round_end(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps `_update_model_kwargs_for_generation`, which generate calls with the target's outputs when a round has been verified, after a call's last round too: a
    candidate generator that has just asked for the outputs gets them. Nothing of theirs is changed."""

    def update_model_kwargs(self, *args, **kwargs):
        calls = running_calls()
        if calls and calls[-1].waiting is not None:
            calls[-1].end_round(signature.bind(self, *args, **kwargs).arguments["outputs"])
        return original(self, *args, **kwargs)

    return update_model_kwargs


def _wrap_validation(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps `_validate_generation_mode`: a target is refused as stateful only if it has states that nothing can take back; and one that the draft was not made for, in
    words of its own."""

    def validate_generation_mode(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments["generation_mode_kwargs"].get("assistant_model")
        if hasattr(assistant, "open_call"):
            # Before upstream asks for tokenizers, which could not help a draft that reads another target's states.
            from hf_osd.models.feature_target import check_target

            check_target(self, assistant.config)
        if hasattr(assistant, "open_call") and self._is_stateful:
            from hf_osd.generation.rollback import can_roll_back, refusal
            from hf_osd.generation.verification import only_looks_stateful

            if only_looks_stateful(self) or can_roll_back(self):
                return original(_viewed(self, _stateless(type(self))), *args, **kwargs)
            raise ValueError(refusal(self))
        return original(self, *args, **kwargs)

    return validate_generation_mode


@functools.lru_cache(maxsize=32)
def _stateless(cls: type) -> type:
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_is_stateful": False})


def _wrap_whisper(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps Whisper's `generate`. If it got an assistant, it would clear `begin_suppress_tokens`, which changes the output; so the assistant is withheld until it
    decodes (`_wrap_whisper_fallback`)."""

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


def _wrap_whisper_fallback(original: Callable, signature: inspect.Signature) -> Callable:
    """Wraps Whisper's `generate_with_fallback`, which decodes one segment: it gets the assistant back."""

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
