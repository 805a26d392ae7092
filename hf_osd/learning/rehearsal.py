"""`Rehearsal`: lets an idle target answer prompts again, for the draft to learn from. A request teaches one answer of many that the target might have given; others
to the same prompt are more of the same traffic, for no more than decoding them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.recording import record_answers
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.models.properties import reads_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.learning.protocol import LearningAssistant


class Rehearsal:
    """Samples the target's answers to prompts in an assistant's buffer, and puts them there to be learnt.

    They do not count as traffic, and no draft is judged by them. Left out are requests of private calls, those whose prompt was more than
    tokens (images, say) or of another tokenizer than the draft's, and those from before a restart. The weights that serve change as by any update, behind
    the gate. hf_osd's own; docs/experiments.md has its gain.

    Args:
        assistant ([`OnlineAssistant`]): with a draft that reads the target's own tokens, and learning in this process.
        target (`PreTrainedModel`): the causal LM that the requests were answered by.
        temperature (`float`, defaults to 0.7): the temperature of sampling.
        times (`int`, defaults to 1): answers to each prompt, at most.
        batch_size (`int`, defaults to 8): prompts that the target answers at once.

    Raises:
        ValueError: if the assistant does not learn, or learns in another process, which is sent what was served and nothing else; or if target and draft do not have
            the same tokens, or are encoder-decoders; for a temperature of 0 or `times` below 1.
    """

    def __init__(
        self,
        assistant: LearningAssistant,
        target: PreTrainedModel,
        temperature: float = 0.7,
        times: int = 1,
        batch_size: int = 8,
    ):
        if not isinstance(assistant.learner, (Learner, BackgroundLearner)):
            raise ValueError(
                "This assistant does not learn in this process (no draft, closed, another rank learns, or `learn` is 'off' or 'process'), so nothing can be "
                "rehearsed. Make it with learn='inline' or 'background'."
            )
        sizes = [one.config.get_text_config().vocab_size for one in (target, assistant)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The draft has a vocabulary of {sizes[1]} and the target of {sizes[0]}, and what is kept of requests is in the draft's: they cannot be "
                "answered again."
            )
        if target.config.is_encoder_decoder:
            raise ValueError(
                f"`target` is an encoder-decoder ({type(target).__name__}); decoder-only models rehearse."
            )
        if not temperature > 0:
            raise ValueError(f"`temperature` is {temperature!r}; greedy answers are known, so give a number above 0.")
        if times < 1:
            raise ValueError(f"`times` is {times!r}; give a whole number ≥ 1.")
        self.assistant, self.target = assistant, target
        self.temperature, self.times, self.batch_size = temperature, times, batch_size
        self._answered: weakref.WeakKeyDictionary[Feedback, int] = weakref.WeakKeyDictionary()  # how often

    def waiting(self) -> list[Feedback]:
        """List the requests in the buffer that are to be rehearsed: those rehearsed least often first, and of these the latest."""
        often = [
            (self._answered.get(one, 0), one)
            for one in reversed(self.assistant.buffer.requests())
            if one in self.assistant.rehearsable
        ]
        return [one for times, one in sorted(often, key=lambda pair: pair[0]) if times < self.times]

    def run(self, most: int = 8, max_new_tokens: int | None = None) -> int:
        """Rehearse some requests, and learn if an update is due. Draws the process's random numbers, as any sampled `generate` does.

        Args:
            most (`int`): requests, at most.
            max_new_tokens (`int`, *optional*): tokens of an answer, at most; as many as the longest of these requests' answers has, if left out.

        Returns:
            `int`: the number of answers; 0 when there is nothing left to do.
        """
        assistant = self.assistant
        assistant.collect()
        chosen = self.waiting()[:most]
        if chosen:
            answers = record_answers(
                self.target,
                [request.tokens[: request.prompt_length].long() for request in chosen],
                max_new_tokens or max(map(len, chosen)),
                batch_size=self.batch_size,
                top_k=assistant.osd_config.top_k,
                dtype=getattr(torch, assistant.osd_config.feedback_dtype),
                temperature=self.temperature,
                states_of=assistant.config.recorded_layers if reads_states(assistant) else None,
            )
            for request, answer in zip(chosen, answers, strict=True):
                self._answered[request] = self._answered.get(request, 0) + 1
                if assistant.reach.covers(answer):  # or the draft has no positions for its end
                    assistant.learner.rehearse(answer)
            assistant.update()
        return len(chosen)
