"""`measure_costs` times drafts against the target on this machine, in turn, as they would draft in a call. It knows nothing of what they have learnt."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
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

# A round drafts so many tokens, so that the steps after the first forward are timed too, and so many are then verified.
_STEPS, _VERIFIED = 3, 2
# Rounds on one text: then the next, or all costs would be of one length.
_ROUNDS_A_TEXT = 8
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
    clock: Callable[[], float] = time.perf_counter,
) -> list[Costs]:
    """Measure c of each variant and v(n) of the target along its own answers: in each round the target reads one token, and a block of several, and each variant drafts
    three, in an order that changes. All are medians against the same target's steps, so that what slows the machine slows all of them.

    Args:
        target (`PreTrainedModel`): a decoder-only model.
        variants (`Sequence[Variant]`): drafts over the target's vocabulary.
        texts (`Sequence[Feedback]`): the target's answers.
        max_gamma (`int`): the largest number of drafted tokens that is reckoned with.
        rounds (`int`): in all, along one text after the other.
        clock (`Callable[[], float]`): gives seconds.

    Raises:
        ValueError: if no text is long enough.
    """
    lengths = sorted({n for n in (2, 3, 5, max_gamma + 1) if n <= max_gamma + 1})
    long = [text for text in texts if len(text.tokens) >= max(text.prompt_length, 2) + lengths[-1]]
    if not long:
        raise ValueError(
            f"None of the target's {len(texts)} answers has {lengths[-1]} tokens to measure costs by; give other prompts, or let the answers be longer."
        )
    costs = [Costs() for _ in variants]
    moments = itertools.chain.from_iterable(
        _rounds(target, variants, text, lengths[-1]) for text in itertools.cycle(long)
    )
    with torch.no_grad():
        for done, moment in enumerate(itertools.islice(moments, rounds + _WARM_UP)):
            n, turn = lengths[done % len(lengths)], done % max(len(variants), 1)
            kept = done >= _WARM_UP
            for size in (1, n) if done % 2 else (n, 1):
                seconds = moment.verify(size, clock)
                for one in costs if kept else ():
                    one.observe_target(size, seconds)
            for i in [*range(turn, len(variants)), *range(turn)]:
                observed = moment.draft(i, clock)
                if kept:
                    costs[i].observe_draft(*observed)
    return costs


def _rounds(target: PreTrainedModel, variants: Sequence[Variant], text: Feedback, longest: int) -> Iterator[_Round]:
    """Yield the rounds along one text; between two of them the target verifies tokens."""
    tokens = text.tokens.long().to(target.device)[None]  # (1, L)
    start = max(text.prompt_length, 2)  # a draft that reads states needs one
    reading = _Target(target, sorted({layer for one in variants for layer in _layers(one.draft)}))
    proposers = [_proposer(one, tokens[0, :start], target.device) for one in variants]
    verified = reading.read(tokens[:, : start - 1])
    for _ in range(_ROUNDS_A_TEXT):
        for one in proposers:
            if isinstance(one.context, FeatureContext):
                one.context.add_states(verified, start - 1 - one.context.known)
        yield _Round(reading, proposers, tokens, start)
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

    def __init__(self, reading: _Target, proposers: Sequence[DraftModelProposer], tokens: Tensor, start: int):
        self._reading, self._proposers, self._tokens, self._start = reading, proposers, tokens, start
        reading.blocks = [None] * len(proposers)

    def verify(self, n: int, clock: Callable[[], float]) -> float:
        """Time a forward of the target over n tokens, in seconds; it is forgotten."""
        block, began = self._tokens[:, self._start - 1 : self._start - 1 + n], clock()
        self._reading.read(block)
        seconds = clock() - began
        self._reading.forget(n)
        return seconds

    def draft(self, i: int, clock: Callable[[], float]) -> tuple[int, float, int, float | None]:
        """Time a block of variant `i`; what [`Costs.observe_draft`] takes."""
        began = clock()
        block = self._proposers[i].draft(self._tokens[:, : self._start], Plan("draft", _STEPS), None)
        int(block.draft_tokens[-1])  # waits for the device
        seconds, self._reading.blocks[i] = clock() - began, block
        return block.steps, seconds, block.unread, block.read_seconds


def _layers(draft: PreTrainedModel) -> list[int]:
    return list(draft.config.recorded_layers) if reads_states(draft) else []


def _proposer(variant: Variant, prompt: Tensor, device: torch.device) -> DraftModelProposer:
    draft, head = variant
    width = draft.get_output_embeddings().weight.shape[0]
    return DraftModelProposer(
        (FeatureContext if reads_states(draft) else DraftContext)(draft, prompt),
        VocabMapping.from_sizes(width, width),
        DraftPolicy("constant", _STEPS),
        verified=None,
        stops=DraftStops([], sampled=False, eos=set(), max_length=2**31),
        eos=set(),
        sample=False,
        scores_device=device,
        make_head=None if head is None else lambda text: head.view(draft, text),
    )
