"""`GenerateRequest` holds the arguments of one generate call, as an assistant gets them."""

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
    """Holds the arguments of `_get_candidate_generator`, and the run of generate's loop. `generate` goes on to change the objects in it.

    Args:
        target (`PreTrainedModel`): the model whose `generate` runs.
        input_ids (`Tensor` int64 `(B, L)`): the target's tokens so far, padding included; the decoder's if it is an encoder-decoder.
        generation_config (`GenerationConfig`), model_kwargs (`dict`), logits_processor (`LogitsProcessorList`): as generate has prepared them.
        inputs_tensor (`Tensor`, *optional*): the input of generate: the prompt, or the encoder's input, tokens or features.
        tokenizers (`tuple`, *optional*): the target's and the draft's, if both were passed.
        running (`RunningCall`, *optional*): the run of generate's own loop; `None` if another loop asks.
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
        """Is `True` if the target is an encoder-decoder."""
        return self.target.config.is_encoder_decoder

    @property
    def mask(self) -> Tensor | None:
        """Returns the attention mask of `input_ids`, 0 where they are padding, `(B, L)`."""
        return self.model_kwargs.get("decoder_attention_mask" if self.encodes else "attention_mask")

    @property
    def reads_tokens(self) -> bool:
        """Is `True` if the target reads tokens only: no embeddings and no images, encoded or not."""
        from torch import Tensor  # imported here, to keep `import hf_osd` quick

        others = (value for value in self.model_kwargs.values() if isinstance(value, Tensor))
        return self.model_kwargs.get("mm_encoder_outputs") is None and not any(o.is_floating_point() for o in others)

    @property
    def held(self) -> int:
        """Counts the positions of `input_ids`, the first ones, that the cache held when the call began, padding included: the target reads those after them."""
        return 0 if self.running is None else self.running.held

    @property
    def held_tokens(self) -> int:
        """Counts the same without padding."""
        return self.held if self.mask is None or not self.mask.any() else int(self.mask[0, : self.held].sum())

    @property
    def stopping_criteria(self) -> Sequence[StoppingCriteria]:
        """Returns the call's stopping criteria; none if another loop than generate's own asks, for then they are unknown."""
        return () if self.running is None else self.running.stopping_criteria
