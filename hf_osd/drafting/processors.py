"""The logits processors of one generate call, on both sides of a verification.

Assisted generation asks the target's processors about γ+1 positions at once, of which those after a rejection never come true, and
gives the same objects to the draft. A processor that keeps state is misled by both, and one that knows only what can be said fails on what cannot. Here each
of these sees, in the order of plain decoding, the positions that were verified, and no others; and the draft works on copies.
"""

from __future__ import annotations

import copy
import gc
import logging
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import logits_process

logger = logging.getLogger(__name__)

# transformers' own keep no state between calls, but for these.
_WITH_STATE = ("SynthIDTextWatermarkLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor")
# Of these what is read after the call is what they saw of the target, once; they leave scores as they are.
_WATCHES = ("WhisperNoSpeechDetection",)
# A function of the tokens, of which a user's function need not know those that it has not allowed.
_PARTIAL = ("PrefixConstrainedLogitsProcessor",)
# What a copy may share with the original, and what need not be looked into.
_SHARED = (nn.Module, PreTrainedTokenizerBase, types.ModuleType, type)


class VerifiedProcessors(LogitsProcessor):
    """Stands in the target's list for all its processors, and keeps each row of logits before they change it.

    Where one of them may keep state, it is settled as each row comes whether the candidate there is accepted, and nothing is asked about positions that cannot
    come true. Greedy, the row says so. Sampled, the draw of speculative sampling is made here (arXiv 2211.17192, algorithm 1), and the row that generate
    gets is certain of what was drawn, so that its own draw can have no other end; `settle` writes back what the row was.

    Args:
        processors (`list`): the target's, in order.
        sampled (`bool`): whether the call samples.
        eos (`set[int]`): token ids that end the text.
        warn (`Callable[[str], None]`, *optional*): takes what a user is to be told once.

    Attributes:
        in_turn (`bool`): whether positions are settled here, one by one.
        can_be_copied (`bool`): whether the draft can have copies of those that may keep state, as far as is known.
    """

    def __init__(
        self,
        processors: list[LogitsProcessor],
        sampled: bool,
        eos: set[int],
        warn: Callable[[str], None] = logger.warning,
    ):
        self.processors = LogitsProcessorList(processors)
        self._stateful = [p for p in processors if _may_keep_state(p)]
        self.in_turn = bool(self._stateful) or any(type(p).__name__ in _PARTIAL for p in processors)
        self._sampled, self._eos, self._warn = sampled, eos, warn
        self._rows: list[Tensor] = []  # (1, V) each
        self._drawn: dict[int, Tensor] = {}  # by row, those that generate did not get, (1, V) each
        self._drafted: list[int] = []
        self._draft_scores: Tensor | None = None  # (n, V) that they were drawn from; None if they are certain
        self._said: int | None = None  # the token that the round's last row leads to, if it is known
        self._over = False  # a draft was rejected, or the text has ended: no later row counts
        self.can_be_copied = True
        self.for_drafting()  # what cannot be copied is mostly known at once

    @property
    def has_state(self) -> bool:
        return bool(self._stateful)

    @property
    def allows_drafts(self) -> bool:
        """Whether the draft may propose anything: sampled, not without the processors that it is sampled through."""
        return self.can_be_copied or not self._sampled

    def expect(self, drafted: list[int], scores: Tensor | None):
        """A round begins, of these candidates, drawn from `scores` `(n, V)`, or certain."""
        self._drafted, self._draft_scores = drafted, scores

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.append(scores.clone())
        if not self.in_turn:
            return self.processors(input_ids, scores)
        if self._said is not None:
            candidate = int(input_ids[0, -1])
            self._over = self._over or candidate != self._said or candidate in self._eos
        if self._over:
            return scores
        row, self._said = len(self._rows) - 1, None
        scores = self.processors(input_ids, scores)
        if not self._sampled:
            self._said = int(scores.argmax(-1))
        elif row < len(self._drafted):
            self._drawn[row] = scores.clone()  # it may be a view of what generate writes into
            self._said = self._draw(row, scores)
            scores = torch.full_like(scores, -torch.inf)
            scores[0, self._said] = 0.0
        return scores

    def settle(self, verified: int, scores: Tensor | None = None) -> Tensor:
        """End the round: the raw rows of its verified positions, `(verified, V)`; processors are as after these.

        Args:
            scores (`Tensor` `(1, n+1, V)`, *optional*): what generate has of the round; written into, where it is not what the processors said.
        """
        rows = torch.cat(self._rows[:verified])
        for row, said in self._drawn.items() if scores is not None else ():
            scores[0, row] = said[0].to(scores)
        self._rows, self._drawn, self._over, self._said = [], {}, False, None
        self._drafted, self._draft_scores = [], None
        return rows

    def _draw(self, row: int, scores: Tensor) -> int:
        """The candidate of this row, or what is said in its place."""
        drafted, p = self._drafted[row], scores[0].softmax(-1)
        if self._draft_scores is None:
            q = torch.zeros_like(p)
            q[drafted] = 1.0
        else:
            q = self._draft_scores[row].to(p).softmax(-1)
        if bool(torch.rand((), device=p.device, dtype=p.dtype) * q[drafted] < p[drafted]):
            return drafted
        rest = (p - q).clamp_min(0.0)
        return int(torch.multinomial(rest if bool(rest.any()) else p, 1))

    def for_drafting(self) -> LogitsProcessorList:
        """The processors for one round of drafts: copies of those that may keep state, or none of them if they cannot be copied (see `allows_drafts`)."""
        kept = [p for p in self.processors if type(p).__name__ not in _WATCHES]
        stateful = [p for p in self._stateful if type(p).__name__ not in _WATCHES]
        if stateful and self.can_be_copied:
            try:
                copies = dict(zip(map(id, stateful), _copies(stateful), strict=True))
                return LogitsProcessorList(copies.get(id(p), p) for p in kept)
            except Exception as error:  # whatever a user's __deepcopy__ raises
                self.can_be_copied = False
                names = ", ".join(dict.fromkeys(getattr(p, "__name__", type(p).__name__) for p in stateful))
                follows = (
                    "nothing more is drafted in calls that sample through it"
                    if self._sampled
                    else "the draft goes without it, and is right less often"
                )
                self._warn(
                    f"A logits processor of this call ({names}) may keep state and cannot be copied for the draft ({error}): {follows}. The output is exact. Keep "
                    "its state in attributes of its own that copy.deepcopy copies."
                )
        return LogitsProcessorList(p for p in kept if not any(p is s for s in stateful))


def _copies(processors: list[LogitsProcessor]) -> list[LogitsProcessor]:
    """Copies that share nothing with the originals that changes.

    Raises:
        ValueError: if they would.
    """
    # One memo, so that what two of them share stays shared; models and tokenizers are not state, and cost seconds.
    memo = {
        id(value): value
        for processor in processors
        for value in getattr(processor, "__dict__", {}).values()
        if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
    }
    copies = [copy.deepcopy(processor, memo) for processor in processors]
    for processor, own in zip(processors, copies, strict=True):
        if own is processor:
            raise ValueError("its copy is itself")
    if shared := _shared(processors, memo):
        raise ValueError(shared)
    return copies


def _shared(roots: list, memo: dict) -> str | None:
    """What a copy, with this memo of [`copy.deepcopy`], still reaches the originals by, in words: deepcopy takes functions, weak references and methods of
    built-in objects for constants."""
    waiting, seen = list(roots), set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _SHARED):
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            if one.__closure__ or one.__dict__ or not _are_constant(one.__defaults__, one.__kwdefaults__):
                return f"it holds the function {one.__qualname__}, which has variables of its own"
        elif isinstance(one, types.BuiltinFunctionType):
            if not isinstance(one.__self__, (*_SHARED, types.NoneType)):
                return f"it holds the method {one.__name__} of a {type(one.__self__).__name__}"
        elif isinstance(one, weakref.ref):
            if not isinstance(one(), (*_SHARED, types.NoneType)):
                return f"it holds a weak reference to a {type(one()).__name__}"
        elif isinstance(one, types.MethodType):
            waiting.append(one.__self__)
        elif isinstance(one, (dict, list, tuple, set, frozenset)) or memo.get(id(one), one) is not one:
            waiting += gc.get_referents(one)
    return None


def _are_constant(*defaults) -> bool:
    values = [value for some in defaults if some for value in (some.values() if isinstance(some, dict) else some)]
    return all(isinstance(value, (int, float, complex, str, bytes, types.NoneType, *_SHARED)) for value in values)


def _may_keep_state(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    stock = getattr(logits_process, kind.__name__, None) is kind
    return not stock or kind.__name__ in (*_WITH_STATE, *_WATCHES)
