"""`record_answers` has the target answer prompts in batches, without drafts, and keeps the answers as [`Feedback`]: for held-out prompts, for warming up a
draft, and for rehearsal."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.drafting.vocab_mapping import VocabMapping, check_vocabularies
from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.feedback.prompt_states import PromptStates
from hf_osd.feedback.target_states import TargetStates
from hf_osd.models.heads import contiguous_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Prompt tokens in a batch, padding included: otherwise a few long prompts would make a batch of dozens take minutes, and gigabytes.
_BATCH_TOKENS = 8192
# Of a prompt, positions whose states are kept at least: what a draft reads before the answer, whether it teaches or not.
_CONTEXT = 256


class _RawLogits:
    """While open, keeps top k and tail of the last logits `(B, V)` of each forward of `target`: the model's own distribution, before the logits processors
    of its generation settings."""

    def __init__(
        self,
        target: PreTrainedModel,
        top_k: int,
        dtype: torch.dtype,
        translation: VocabMapping,
        prefill: PromptStates | None = None,
    ):
        self.top_k, self.dtype, self._translation, self._prefill = top_k, dtype, translation, prefill
        self.steps: list[SparseLogits] = []  # one a forward, with a row for each request
        self._thread = threading.get_ident()  # the target may serve others meanwhile
        self._handle = target.register_forward_hook(self._keep)

    def _keep(self, target, inputs, output):
        if threading.get_ident() == self._thread:
            if self._prefill is not None and not self.steps:
                self._prefill.finish_prefill(0, output.logits[0, -1])
            logits = output.logits[:, -1].float()
            columns = self._translation.shared_columns(logits.device)
            self.steps.append(SparseLogits.from_logits(logits, self.top_k, self.dtype, columns).cpu())

    def __enter__(self) -> _RawLogits:
        return self

    def __exit__(self, *exception):
        self._handle.remove()
        if self._prefill is not None:
            self._prefill.close()


class _States:
    """While open, keeps the hidden states `(B, T, F)` that each forward of `target` has after some of its layers; of the first forward those of the last
    `most` positions."""

    def __init__(self, target: PreTrainedModel, layers: Sequence[int], most: int):
        self._layers, self._most = list(layers), most
        self._steps: list[Tensor] = []
        self._thread = threading.get_ident()  # the target may serve others meanwhile
        self._handles = [
            target.register_forward_pre_hook(self._ask, with_kwargs=True),
            target.register_forward_hook(self._keep),
        ]

    def _ask(self, target, args, kwargs):
        if threading.get_ident() != self._thread:
            return None
        return args, {**kwargs, "output_hidden_states": self._layers}

    def _keep(self, target, inputs, output):
        if threading.get_ident() == self._thread:
            begin = 0 if self._steps else -self._most
            # Layers may lie on several devices.
            states = [output.hidden_states[i][:, begin:].cpu() for i in self._layers]
            self._steps.append(torch.cat(states, -1))

    def of_row(self, row: int, prompt_length: int, count: int) -> TargetStates:
        """The states of one request, whose answer has `count` tokens: of the end of its prompt, and of the answer but for its last token."""
        prompt = self._steps[0][row][-prompt_length:]
        states = torch.cat([prompt, *(step[row] for step in self._steps[1:count])])
        return TargetStates.from_states(states, len(self._layers), prompt_length - len(prompt))

    def __enter__(self) -> _States:
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()


def record_answers(
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    batch_size: int = 8,
    top_k: int = 64,
    dtype: torch.dtype = torch.float16,
    prompt_positions: int = 0,
    on_batch: Callable[[int], None] | None = None,
    temperature: float = 0.0,
    translation: VocabMapping | None = None,
    states_of: Sequence[int] | None = None,
) -> list[Feedback]:
    """Have `target` answer `prompts`, by greedy decoding unless a temperature is given, and return the answers as feedback, in order.

    Args:
        target (`PreTrainedModel`): a causal LM, or an encoder-decoder, whose encoder then reads the prompts.
        prompts (`Sequence[Tensor]`): token ids, int64 `(L,)` each.
        max_new_tokens (`int`): length of the longest answer; an answer ends with its first end-of-sequence token.
        batch_size (`int`): largest number of prompts in a `generate` call; long prompts come in smaller batches.
        top_k (`int`): how many of the target's largest log-probs are kept at each position.
        dtype (`torch.dtype`): dtype of these log-probs.
        prompt_positions (`int`): largest number of prompt positions, counted from the prompt's end, whose distributions are kept as `prompt_rows`; always 0
            where the draft has another tokenizer, or an encoder reads the prompts.
        on_batch (`Callable[[int], None]`, *optional*): called after each batch with its number of prompts, for a progress bar.
        temperature (`float`): 0 for greedy answers; above 0, answers are sampled at it, from all tokens, with the process's random numbers. The distributions
            kept are the target's at temperature 1 in both cases.
        translation (`VocabMapping`, *optional*): maps to the draft's vocabulary, where it differs from the target's: see [`VocabMapping.from_models`]. Feedback
            then has the draft's ids, as in a generate call: one token of the target may become several, of which the first has the target distribution.
        states_of (`Sequence[int]`, *optional*): the target's layers whose hidden states are kept as well, for a feature-level draft to learn from: its
            `config.aux_layers`, counted as in `output_hidden_states`, 0 being the embeddings. Of a prompt those of its last positions, as many as teach and 256 at
            least. They cost no forward.

    Returns:
        `list[Feedback]`: one a prompt, without drafts; all tokens of the answers can be learnt.

    Raises:
        ValueError: if `target` is an encoder-decoder and the draft's vocabulary another, or `temperature` is negative or not finite; with `states_of`, if the
            target has no such layer, is an encoder-decoder, or the draft's vocabulary is another.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"`temperature` is {temperature!r}; give 0 for greedy answers, or a number above 0, such as 0.7."
        )
    if translation is None:
        size = target.config.get_text_config().vocab_size
        translation = VocabMapping.from_sizes(size, size)
    check_vocabularies(target, translation)
    encodes = target.config.is_encoder_decoder
    if states_of is not None:
        _check_layers(target, states_of, translation)
    if encodes or not translation.has_one_tokenizer:
        prompt_positions = 0
    how = (
        {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    answers: list[Feedback | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    eos = target.generation_config.eos_token_id
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ends = torch.tensor(ends, dtype=torch.long, device="cpu")
    pad = int(ends[0]) if len(ends) else 0
    for chosen in _batches(order, [len(prompt) for prompt in prompts], batch_size):
        longest = max(len(prompts[i]) for i in chosen)
        input_ids = torch.full((len(chosen), longest), pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(chosen):
            # A decoder continues where its prompts end; an encoder counts positions from its first column.
            columns = slice(0, len(prompts[i])) if encodes else slice(longest - len(prompts[i]), longest)
            input_ids[row, columns] = prompts[i]
            mask[row, columns] = 1
        prefill = (
            PromptStates(target, prompt_positions) if prompt_positions and PromptStates.can_capture(target) else None
        )
        states = None if states_of is None else _States(target, states_of, max(prompt_positions, _CONTEXT) + 2)
        with (
            _RawLogits(target, top_k, dtype, translation, prefill) as raw,
            contiguous_head(target),
            states or nullcontext(),
        ):
            sequences = target.generate(
                input_ids=input_ids.to(target.device),
                attention_mask=mask.to(target.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                **how,
            ).cpu()
        begin = sequences.shape[1] - len(raw.steps)  # each step generated a token
        for row, i in enumerate(chosen):
            answer = sequences[row, begin:]
            end = torch.isin(answer, ends).nonzero()
            n = int(end[0]) + 1 if len(end) else len(answer)
            rows = SparseLogits.cat([step.select([row]) for step in raw.steps[:n]])
            source = prompts[i].cpu() if encodes else None
            prompt, prompt_rows = sequences[row, :begin] if encodes else prompts[i].cpu(), None
            if prefill is not None:  # the first token follows nothing
                prompt_rows = prefill.rows(len(prompt) - 1, top_k, dtype, row, translation.shared_columns)
            prompt, pieces = translation.to_draft_prompt(prompt), translation.to_draft_ids(answer[:n].tolist())
            answers[i] = Feedback.from_target(
                torch.cat([prompt, torch.tensor([token for piece in pieces for token in piece], device="cpu")]),
                len(prompt),
                translation.to_draft_rows(rows, pieces),
                prompt_rows=prompt_rows,
                sampled=temperature > 0,
                source=source,
                states=None if states is None else states.of_row(row, len(prompt), n),
            )
        if on_batch is not None:
            on_batch(len(chosen))
    return answers


def _check_layers(target: PreTrainedModel, layers: Sequence[int], translation: VocabMapping):
    """See that there are hidden states after these layers, and that a draft can read them."""
    if target.config.is_encoder_decoder or not translation.is_identity:
        raise ValueError(
            "`states_of` was given, and a draft that reads the target's hidden states drafts the target's own tokens, for a decoder; leave it out."
        )
    count = target.config.get_text_config().num_hidden_layers
    if not layers or not all(0 <= i <= count for i in layers):
        raise ValueError(
            f"`states_of` is {list(layers)}; the target has hidden states 0 (its embeddings) to {count} (after its last layer). Give the draft's "
            "`config.aux_layers`."
        )


def _batches(order: list[int], lengths: list[int], size: int) -> Iterator[list[int]]:
    """Split `order`, sorted by ascending length, into batches of at most `size` prompts and `_BATCH_TOKENS` tokens, or of one longer prompt."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == size or lengths[i] * (len(batch) + 1) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
