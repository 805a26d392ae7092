"""`GenerateRequest`: what one generate call asks of an assistant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.stopping_criteria import StoppingCriteria

    from hf_osd.generation.running import RunningCall


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """What `generate` hands to `_get_candidate_generator`, and what is known of its loop. What it holds is the call's own: `generate` goes on to change it.

    Args:
        target (`PreTrainedModel`): whose `generate` runs.
        input_ids (`Tensor` int64 `(B, L)`): the target's tokens so far, padding included; of an encoder-decoder, the decoder's.
        generation_config (`GenerationConfig`), model_kwargs (`dict`), logits_processor (`LogitsProcessorList`): as generate has prepared them.
        inputs_tensor (`Tensor`, *optional*): what generate was given: the prompt, or what an encoder reads, tokens or features.
        tokenizers (`tuple`, *optional*): the target's and the draft's, where both were passed.
        running (`RunningCall`, *optional*): the run of generate's own loop, if that runs it.
    """

    target: PreTrainedModel
    input_ids: Tensor
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    inputs_tensor: Tensor | None
    logits_processor: LogitsProcessorList
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None
    running: RunningCall | None = None

    @property
    def encodes(self) -> bool:
        """Whether the target is an encoder-decoder."""
        return self.target.config.is_encoder_decoder

    @property
    def mask(self) -> Tensor | None:
        """Of `input_ids`, 0 where they are padding, `(B, L)`."""
        return self.model_kwargs.get("decoder_attention_mask" if self.encodes else "attention_mask")

    @property
    def reads_tokens(self) -> bool:
        """Whether the target reads tokens and nothing else: no embeddings, nor images encoded already or not."""
        from torch import Tensor  # here, for `import hf_osd` is quick

        others = (value for value in self.model_kwargs.values() if isinstance(value, Tensor))
        return self.model_kwargs.get("mm_encoder_outputs") is None and not any(o.is_floating_point() for o in others)

    @property
    def stopping_criteria(self) -> Sequence[StoppingCriteria]:
        """The call's, as far as they are known."""
        return () if self.running is None else self.running.stopping_criteria
