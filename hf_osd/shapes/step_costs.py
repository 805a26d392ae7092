"""`measure_costs` times drafts against the target on this machine, in turn, as they would draft in a call. It knows nothing of what they have learnt."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_osd.drafting.context import DraftContext
from hf_osd.drafting.draft_model import DraftModelProposer
from hf_osd.drafting.feature_context import FeatureContext
from hf_osd.drafting.stopping import DraftStops
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.models.properties import reads_states
from hf_osd.policy.costs import Costs
from hf_osd.policy.lookahead import DraftPolicy, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.feedback.feedback import Feedback
    from hf_osd.models.draft_head import DraftHead

# A round drafts one token, or so many, in turn: what the longer ones take more is the steps after the first forward. Then so many tokens are verified.
_LONG, _VERIFIED = 4, 2
# Rounds on one text: then the next, or all costs would be of one length.
_ROUNDS_A_TEXT = 9
# The first rounds of a process are slow.
_WARM_UP = 2


class Variant(NamedTuple):
    """A draft with the head that it computes; `None` for its whole one."""

    draft: PreTrainedModel
    head: DraftHead | None


def measure_costs(
    target: PreTrainedModel,
    variants: Sequence[Variant],
    texts: Sequence[Feedback],
    max_gamma: int,
    rounds: int = 32,
    clock: Callable[[], float] | None = None,
) -> list[Costs]:
    """Measure c of each variant and v(n) of the target along its own answers: in each round the target reads one token, and a block of several, and each variant drafts
    one or several, in an order that changes. All are medians against the same target's steps, so that what slows the machine slows all of them.

    Args:
        target (`PreTrainedModel`): a decoder-only model.
        variants (`Sequence[Variant]`): drafts over the target's vocabulary.
        texts (`Sequence[Feedback]`): the target's answers.
        max_gamma (`int`): the largest number of drafted tokens that is reckoned with.
        rounds (`int`): in all, along one text after the other.
        clock (`Callable[[], float]`, *optional*): gives seconds; [`default_clock`] if left out.

    Raises:
        ValueError: if no text is long enough.
    """
    clock = clock or default_clock(target.device)
    lengths = sorted({n for n in (2, 3, 5, max_gamma + 1) if n <= max_gamma + 1})
    needed = _VERIFIED + lengths[-1]  # of two rounds, for in the first the prompt is read
    long = [text for text in texts if len(text.tokens) >= max(text.prompt_length, 2) + needed]
    if not long:
        raise ValueError(
            f"None of the target's {len(texts)} answers has {needed} tokens to measure costs by; give other prompts, or let the answers be longer."
        )
    costs = [Costs() for _ in variants]
    blocks: list[dict[int, list[float]]] = [{1: [], _LONG: []} for _ in variants]  # seconds by length
    moments = itertools.chain.from_iterable(
        _rounds(target, variants, text, lengths[-1]) for text in itertools.cycle(long)
    )
    with torch.no_grad():
        for done, moment in enumerate(itertools.islice(moments, rounds + _WARM_UP)):
            n, turn, kept = lengths[done % len(lengths)], done % max(len(variants), 1), done >= _WARM_UP
            for size in (1, n) if done % 2 else (n, 1):
                seconds = moment.verify(size, clock)
                for one in costs if kept else ():
                    one.observe_target(size, seconds)
            for i in [*range(turn, len(variants)), *range(turn)]:
                length = _LONG if (done // 2 + i) % 2 else 1
                seconds = moment.draft(i, length, clock)
                if kept and not moment.is_first:  # where the prompt is read
                    blocks[i][length].append(seconds)
    for one, seconds in zip(costs, blocks, strict=True):
        read = median(seconds[1])
        for each in seconds[1]:
            one.observe_draft(1, each, 1, each)
        for each in seconds[_LONG]:
            one.observe_draft(_LONG, each, _VERIFIED, min(read, each))
    return costs


def default_clock(device: torch.device) -> Callable[[], float]:
    """Choose the time to measure by: that of the processor where a CPU computes in one thread, which the machine's other work does not disturb; else the clock on the wall."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _rounds(target: PreTrainedModel, variants: Sequence[Variant], text: Feedback, longest: int) -> Iterator[_Round]:
    """Yield the rounds along one text; between two of them the target verifies tokens."""
    tokens = text.tokens.long().to(target.device)[None]  # (1, L)
    start = max(text.prompt_length, 2)  # a draft that reads states needs one
    reading = _Target(target, sorted({layer for one in variants for layer in _layers(one.draft)}))
    proposers = [_proposer(one, tokens[0, :start], target.device) for one in variants]
    verified = reading.read(tokens[:, : start - 1])
    for count in range(_ROUNDS_A_TEXT):
        for one in proposers:
            if isinstance(one.context, FeatureContext):
                one.context.add_states(verified, start - 1 - one.context.known)
        yield _Round(reading, proposers, tokens, start, is_first=not count)
        if start + _VERIFIED + longest > tokens.shape[1]:
            return
        verified = reading.read(tokens[:, start - 1 : start - 1 + _VERIFIED])
        new = tokens[:, start : start + _VERIFIED]
        for one, block in zip(proposers, reading.blocks, strict=True):
            one.accept(block, [], [[token] for token in new[0].tolist()], new, None)
        start += _VERIFIED


class _Target:
    """The target's KV cache, and the states that drafts read of its last forward."""

    def __init__(self, model: PreTrainedModel, layers: list[int]):
        self._model, self._cache, self.blocks = (
            model,
            DynamicCache(config=model.config.get_text_config(decoder=True)),
            [],
        )
        self._cache.activate_past_recording()
        self._wanted = {"output_hidden_states": layers} if layers else {}

    def read(self, tokens: Tensor) -> Sequence[Tensor | None]:
        """Read `(1, T)` tokens, and return the states after its layers, as far as they are wanted."""
        outputs = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._wanted)
        int(outputs.logits[0, -1].argmax())  # waits for the device
        return outputs.hidden_states if self._wanted else ()

    def forget(self, count: int):
        self._cache.crop(-count)


class _Round:
    """One moment of a text: the target and each variant can be timed there."""

    def __init__(
        self, reading: _Target, proposers: Sequence[DraftModelProposer], tokens: Tensor, start: int, is_first: bool
    ):
        self._reading, self._proposers, self._tokens, self._start = reading, proposers, tokens, start
        self.is_first = is_first  # of its text
        reading.blocks = [None] * len(proposers)

    def verify(self, n: int, clock: Callable[[], float]) -> float:
        """Time a forward of the target over n tokens, in seconds; it is forgotten."""
        block, began = self._tokens[:, self._start - 1 : self._start - 1 + n], clock()
        self._reading.read(block)
        seconds = clock() - began
        self._reading.forget(n)
        return seconds

    def draft(self, i: int, length: int, clock: Callable[[], float]) -> float:
        """Time a block of so many tokens of variant `i`, in seconds; it is kept until the tokens are verified."""
        began = clock()
        block = self._proposers[i].draft(self._tokens[:, : self._start], Plan("draft", length), None)
        int(block.draft_tokens[-1])  # waits for the device
        self._reading.blocks[i] = block
        return clock() - began


def _layers(draft: PreTrainedModel) -> list[int]:
    return list(draft.config.recorded_layers) if reads_states(draft) else []


def _proposer(variant: Variant, prompt: Tensor, device: torch.device) -> DraftModelProposer:
    draft, head = variant
    width = draft.get_output_embeddings().weight.shape[0]
    return DraftModelProposer(
        (FeatureContext if reads_states(draft) else DraftContext)(draft, prompt),
        VocabMapping.from_sizes(width, width),
        DraftPolicy("constant", _LONG),
        verified=None,
        stops=DraftStops([], sampled=False, eos=set(), max_length=2**31),
        eos=set(),
        sample=False,
        scores_device=device,
        make_head=None if head is None else lambda text: head.view(draft, text),
    )
