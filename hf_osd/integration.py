"""The one seam into transformers: `GenerationMixin._get_candidate_generator`, wrapped once, so that `assistant_model=` may be an
[`OnlineAssistant`]; and the method that calls it, for it alone knows the stopping criteria and when a call ends. Every other assistant goes through
untouched."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

# What the seam relies on, by what has it: names of parameters. Checked when the seam opens.
_CONTRACT = {
    "GenerationMixin._assisted_decoding": ("stopping_criteria", "assistant_model"),
    "GenerationMixin._get_candidate_generator": (
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
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
}
_TESTED = "transformers>=5.23,<5.24"

_thread = threading.local()  # `calls`: of this thread, see `running_calls`


@dataclass(eq=False)
class RunningCall:
    """One run of `_assisted_decoding` with an OnlineAssistant."""

    stopping_criteria: StoppingCriteriaList


def running_calls() -> list[RunningCall]:
    """This thread's calls that have not come back, innermost last: a streamer may call generate in the middle of one."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls


def enable():
    """Open the seam. Called by `OnlineAssistant()`; calling it again does nothing.

    Raises:
        RuntimeError: if this transformers has changed what the seam relies on; the message says what, and what to install.
    """
    from transformers import GenerationMixin

    if is_enabled():
        return
    _check_contract()
    for name, wrap in (("_get_candidate_generator", _dispatching), ("_assisted_decoding", _running)):
        original = getattr(GenerationMixin, name)
        wrapped = functools.wraps(original)(wrap(original, inspect.signature(original)))
        wrapped._hf_osd_original = original
        setattr(GenerationMixin, name, wrapped)


def disable():
    """Close the seam. An OnlineAssistant then drafts like any stock assistant, and no longer learns."""
    from transformers import GenerationMixin

    if is_enabled():
        for name in ("_get_candidate_generator", "_assisted_decoding"):
            setattr(GenerationMixin, name, getattr(GenerationMixin, name)._hf_osd_original)


def is_enabled() -> bool:
    """Whether the seam is open."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin._get_candidate_generator, "_hf_osd_original")


def _dispatching(original: Callable, signature: inspect.Signature) -> Callable:
    """`_get_candidate_generator`: an OnlineAssistant makes its own."""

    def get_candidate_generator(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments.get("assistant_model")
        if not hasattr(assistant, "open_call"):
            return original(self, *args, **kwargs)
        tokenizers = arguments.get("target_tokenizer"), arguments.get("assistant_tokenizer")
        return assistant.open_call(
            self,
            input_ids=arguments["input_ids"],
            generation_config=arguments["generation_config"],
            model_kwargs=arguments["model_kwargs"],
            inputs_tensor=arguments["inputs_tensor"],
            logits_processor=arguments["logits_processor"],
            tokenizers=None if None in tokenizers else tokenizers,
            running=running_calls()[-1] if running_calls() else None,
        )

    return get_candidate_generator


def _running(original: Callable, signature: inspect.Signature) -> Callable:
    """`_assisted_decoding`: while it runs, its stopping criteria lie where an OnlineAssistant finds them."""

    def assisted_decoding(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        if not hasattr(arguments.get("assistant_model"), "open_call"):
            return original(self, *args, **kwargs)
        running_calls().append(RunningCall(arguments["stopping_criteria"]))
        try:
            return original(self, *args, **kwargs)
        finally:
            running_calls().pop()

    return assisted_decoding


def _check_contract():
    import transformers
    from transformers import GenerationMixin  # noqa: F401 (looked up by name)
    from transformers.generation.candidate_generator import AssistedCandidateGenerator  # noqa: F401 (likewise)

    for name, needed in _CONTRACT.items():
        owner, method = name.split(".")
        function = getattr(locals()[owner], method, None)
        found = inspect.signature(function).parameters if function else ()
        if missing := [parameter for parameter in needed if parameter not in found]:
            raise RuntimeError(
                f"transformers {transformers.__version__} has changed {name}: hf_osd needs its parameters {missing}. "
                f"Install '{_TESTED}', or a newer hf_osd."
            )
