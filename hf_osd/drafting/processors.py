"""`VerifiedProcessors` applies the logits processors of one generate call, for the target and for the draft.

Assisted generation applies the target's processors at γ+1 positions, also at those after a rejection, which are discarded, and gives the same objects to
the draft. Both corrupt a processor that keeps state, and one that accepts only allowed text (a grammar) fails on rejected drafts. Here such a processor
sees the verified positions only, in the order of plain decoding; and the draft works on copies.
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

# transformers' processors keep no state between calls, except these.
_STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor")
# These leave scores unchanged; after the call, what they saw of the target is read from them, and they may see it once only.
_OBSERVERS = ("WhisperNoSpeechDetection",)
# These call a user's function of the tokens, which may fail on tokens that it has not allowed.
_PARTIAL = ("PrefixConstrainedLogitsProcessor",)
# Objects that a copy may share with the original; they are not searched for shared state.
_SHAREABLE = (nn.Module, PreTrainedTokenizerBase, types.ModuleType, type)


class VerifiedProcessors(LogitsProcessor):
    """Replaces all processors in the target's list by one that applies them, and keeps each row of logits as it was before.

    If one of them may keep state, or fail on text that it has not allowed, then each candidate is accepted or rejected here as its row comes, and after a
    rejection no processor is called. In greedy decoding the row decides. In sampling the draw of speculative sampling is made here (arXiv 2211.17192,
    algorithm 1), and generate gets a row in which the drawn token has probability 1, so that its own draw has the same result; `finish_round` restores
    the row.

    Args:
        processors (`list`): the target's processors, in order.
        sampled (`bool`): `True` if the call samples.
        eos (`set[int]`): token ids that end the text.
        warn (`Callable[[str], None]`, *optional*): gives the user a warning, once.

    Attributes:
        in_turn (`bool`): `True` if candidates are accepted or rejected here, one by one.
        can_be_copied (`bool`): `False` once a processor that may keep state could not be copied for the draft.
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
        self._drawn: dict[int, Tensor] = {}  # by row, the processed scores that generate did not get, (1, V) each
        self._drafted: list[int] = []
        self._draft_scores: Tensor | None = (
            None  # (n, V), from which they were sampled; None if all came from the cache
        )
        self._next_token: int | None = None  # chosen at the last row, if it was chosen here
        self._has_ended = False  # a draft was rejected or the text ended: the next rows are discarded
        self.can_be_copied = True
        self.for_drafting()  # finds most processors that cannot be copied at once

    @property
    def has_state(self) -> bool:
        return bool(self._stateful)

    @property
    def allows_drafts(self) -> bool:
        """Is `True` if the draft may propose: when sampling it needs copies of all processors, for q must be what it is sampled from."""
        return self.can_be_copied or not self._sampled

    def begin_round(self, drafted: list[int], scores: Tensor | None):
        """Begins a round with the candidates `drafted`, sampled from `scores` `(n, V)`; `None` if they were not sampled."""
        self._drafted, self._draft_scores = drafted, scores

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.append(scores.clone())
        if not self.in_turn:
            return self.processors(input_ids, scores)
        if self._next_token is not None:
            candidate = int(input_ids[0, -1])
            self._has_ended = self._has_ended or candidate != self._next_token or candidate in self._eos
        if self._has_ended:
            return scores
        row, self._next_token = len(self._rows) - 1, None
        scores = self.processors(input_ids, scores)
        if not self._sampled:
            self._next_token = int(scores.argmax(-1))
        elif row < len(self._drafted):
            self._drawn[row] = scores.clone()  # it may be a view of a tensor that generate writes into
            self._next_token = self._draw(row, scores)
            scores = torch.full_like(scores, -torch.inf)
            scores[0, self._next_token] = 0.0
        return scores

    def finish_round(self, verified: int, scores: Tensor | None = None) -> Tensor:
        """Ends the round and returns the logits of its verified positions before any processor, `(verified, V)`.

        Args:
            scores (`Tensor` `(1, n+1, V)`, *optional*): generate's scores of the round; processed scores are written into it where it got others.
        """
        rows = torch.cat(self._rows[:verified])
        for row, processed in self._drawn.items() if scores is not None else ():
            scores[0, row] = processed[0].to(scores)
        self._rows, self._drawn, self._has_ended, self._next_token = [], {}, False, None
        self._drafted, self._draft_scores = [], None
        return rows

    def _draw(self, row: int, scores: Tensor) -> int:
        """Accepts the candidate of this row, or draws a token from the residual distribution in its place."""
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
        """Returns the processors for one round of drafts. Those that may keep state are copied, or left out if they cannot be (see `allows_drafts`)."""
        kept = [p for p in self.processors if type(p).__name__ not in _OBSERVERS]
        stateful = [p for p in self._stateful if type(p).__name__ not in _OBSERVERS]
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
    """Copies processors so that the copies share no mutable state with the originals.

    Raises:
        ValueError: if they would share some.
    """
    # One memo for all, so that they go on sharing among themselves; models and tokenizers are not state, and copying them takes seconds.
    memo = {
        id(value): value
        for processor in processors
        for value in getattr(processor, "__dict__", {}).values()
        if isinstance(value, (nn.Module, PreTrainedTokenizerBase))
    }
    copies = [copy.deepcopy(processor, memo) for processor in processors]
    for processor, copied in zip(processors, copies, strict=True):
        if copied is processor:
            raise ValueError("its copy is itself")
    if shared := _find_shared(processors, memo):
        raise ValueError(shared)
    return copies


def _find_shared(roots: list, memo: dict) -> str | None:
    """Describes a reference by which copies made with this memo of [`copy.deepcopy`] still reach state of the originals, `None` if there is none: deepcopy
    does not copy functions, weak references and methods of built-in objects."""
    waiting, seen = list(roots), set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _SHAREABLE):
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            if one.__closure__ or one.__dict__ or not _are_constant(one.__defaults__, one.__kwdefaults__):
                return f"it holds the function {one.__qualname__}, which has variables of its own"
        elif isinstance(one, types.BuiltinFunctionType):
            if not isinstance(one.__self__, (*_SHAREABLE, types.NoneType)):
                return f"it holds the method {one.__name__} of a {type(one.__self__).__name__}"
        elif isinstance(one, weakref.ref):
            if not isinstance(one(), (*_SHAREABLE, types.NoneType)):
                return f"it holds a weak reference to a {type(one()).__name__}"
        elif isinstance(one, types.MethodType):
            waiting.append(one.__self__)
        elif isinstance(one, (dict, list, tuple, set, frozenset)) or memo.get(id(one), one) is not one:
            waiting += gc.get_referents(one)
    return None


def _are_constant(*defaults) -> bool:
    values = [value for some in defaults if some for value in (some.values() if isinstance(some, dict) else some)]
    return all(isinstance(value, (int, float, complex, str, bytes, types.NoneType, *_SHAREABLE)) for value in values)


def _may_keep_state(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    stock = getattr(logits_process, kind.__name__, None) is kind
    return not stock or kind.__name__ in (*_STATEFUL, *_OBSERVERS)
