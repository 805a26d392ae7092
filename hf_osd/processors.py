"""The logits processors of one generate call, on both sides of a verification.

Assisted generation asks the target's processors about γ+1 positions at once, of which those after a rejection never come true, and
gives the same objects to the draft. A processor that keeps state is misled by both. Here each processor sees, in the order of plain
decoding, the positions that were verified, and the draft works on copies.
"""

from __future__ import annotations

import copy
import operator

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import logits_process

# transformers' own keep no state between calls, but for these.
_WITH_STATE = ("SynthIDTextWatermarkLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor")


class VerifiedProcessors(LogitsProcessor):
    """Stands in the target's list for all its processors, and keeps each row of logits before they change it.

    Args:
        processors (`list`): the target's, in order.
        sampled (`bool`): whether the call samples. Greedy, it is known at each position whether the one before was accepted, and nothing
            is asked about positions that cannot come true; sampled, states are put back afterwards.
        eos (`set[int]`): token ids that end the text.
    """

    def __init__(self, processors: list[LogitsProcessor], sampled: bool, eos: set[int]):
        self.processors = LogitsProcessorList(processors)
        self._stateful = [p for p in processors if _may_keep_state(p)]
        self._sampled, self._eos = sampled, eos
        self._rows: list[Tensor] = []  # (1, V) each
        self._said: int | None = None  # the token that the round's last row leads to; only if greedy
        self._over = False  # a draft was rejected, or the text has ended: no later row counts
        self._before: list[
            list[LogitsProcessor]
        ] = []  # copies, as they were before each row but the first; only if sampled
        self.can_be_copied = True
        if self._stateful:
            try:
                copies = self._copies(self._stateful)
            except Exception:  # whatever a user's __deepcopy__ raises
                self.can_be_copied = False
            else:  # a function is its own copy, and so is the state it closes over
                self.can_be_copied = not any(map(operator.is_, copies, self._stateful))

    @property
    def has_state(self) -> bool:
        return bool(self._stateful)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.append(scores.clone())
        if not self._stateful:
            return self.processors(input_ids, scores)
        if self._sampled:
            if len(self._rows) > 1:
                self._before.append(self._copies(self._stateful))
            return self.processors(input_ids, scores)
        if self._said is not None:
            candidate = int(input_ids[0, -1])
            self._over = self._over or candidate != self._said or candidate in self._eos
            if self._over:
                return scores
        scores = self.processors(input_ids, scores)
        self._said = int(scores.argmax(-1))
        return scores

    def settle(self, verified: int) -> Tensor:
        """End the round: the raw rows of its verified positions, `(verified, V)`; processors are as after these."""
        rows = torch.cat(self._rows[:verified])
        if verified <= len(self._before):
            for processor, before in zip(self._stateful, self._before[verified - 1], strict=True):
                vars(processor).clear()
                vars(processor).update(vars(before))
        self._rows, self._before, self._over, self._said = [], [], False, None
        return rows

    def for_drafting(self) -> LogitsProcessorList:
        """The processors for one round of drafts: copies of those that may keep state, or none of them if they cannot be copied."""
        if not self._stateful:
            return self.processors
        if not self.can_be_copied:
            return LogitsProcessorList(p for p in self.processors if not any(p is s for s in self._stateful))
        copies = dict(zip(map(id, self._stateful), self._copies(self._stateful), strict=True))
        return LogitsProcessorList(copies.get(id(p), p) for p in self.processors)

    @staticmethod
    def _copies(processors: list[LogitsProcessor]) -> list[LogitsProcessor]:
        # One memo, so that what two of them share stays shared; models and tokenizers are not state, and cost seconds.
        memo = {
            id(value): value
            for processor in processors
            for value in vars(processor).values()
            if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
        }
        return [copy.deepcopy(processor, memo) for processor in processors]


def _may_keep_state(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    return kind.__name__ in _WITH_STATE or getattr(logits_process, kind.__name__, None) is not kind
