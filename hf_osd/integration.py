"""The one seam into transformers: `GenerationMixin._get_candidate_generator`, wrapped once, so that `assistant_model=` may be an
[`OnlineAssistant`]. Every other assistant goes through untouched."""

from __future__ import annotations

import functools
import inspect

# What the seam relies on, by what has it: names of parameters. Checked when the seam opens.
_CONTRACT = {
    "GenerationMixin._get_candidate_generator": (
        "generation_config",
        "input_ids",
        "inputs_tensor",
        "logits_processor",
        "model_kwargs",
        "assistant_model",
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


def enable():
    """Open the seam. Called by `OnlineAssistant()`; calling it again does nothing.

    Raises:
        RuntimeError: if this transformers has changed what the seam relies on; the message says what, and what to install.
    """
    from transformers import GenerationMixin

    original = GenerationMixin._get_candidate_generator
    if is_enabled():
        return
    _check_contract()
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_candidate_generator(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs).arguments
        assistant = arguments.get("assistant_model")
        if not hasattr(assistant, "open_call"):
            return original(self, *args, **kwargs)
        different = arguments.get("assistant_tokenizer") is not None
        return assistant.open_call(
            self,
            input_ids=arguments["input_ids"],
            generation_config=arguments["generation_config"],
            model_kwargs=arguments["model_kwargs"],
            inputs_tensor=arguments["inputs_tensor"],
            logits_processor=arguments["logits_processor"],
            different_tokenizers=different,
        )

    _get_candidate_generator._hf_osd_original = original
    GenerationMixin._get_candidate_generator = _get_candidate_generator


def disable():
    """Close the seam. An OnlineAssistant then drafts like any stock assistant, and no longer learns."""
    from transformers import GenerationMixin

    if is_enabled():
        GenerationMixin._get_candidate_generator = GenerationMixin._get_candidate_generator._hf_osd_original


def is_enabled() -> bool:
    """Whether the seam is open."""
    from transformers import GenerationMixin

    return hasattr(GenerationMixin._get_candidate_generator, "_hf_osd_original")


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
