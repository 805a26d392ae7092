"""`PromptStates` captures the target's hidden states at prompt positions. generate computes logits only after the prompt; the target's predictions at the
prompt's own positions then cost its LM head there, and no extra forward."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.models.properties import is_compiled
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

# Positions that pass through the LM head at once: all logits of a long prompt would take gigabytes. Each pass reads the whole head.
_ROWS_AT_ONCE = 128
# Of these on a CPU so many are reduced to their top k at once, which stay in its cache meanwhile.
_ROWS_REDUCED = 16
# Largest difference, as a share of the largest logit, between the head's output for the captured states and the logits that generate had: matrix products
# of other shapes round differently. Where a model scales or caps its logits after the head, they differ by more.
_ROUNDING = 0.03
_REMEMBERED = 32  # texts
# Heads whose output was the target's logits when last compared. It is compared in every call, but for these along with other rows: one row alone takes as long as
# thirty more.
_matching: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class PromptStates:
    """Captures the last hidden states of the target's next forward in this thread.

    Args:
        target (`PreTrainedModel`): a decoder for which `can_capture` holds.
        max_positions (`int`): how many positions of a prompt to keep, its last ones.

    Attributes:
        head_mismatch (`bool`): whether the LM head's output was found to differ from the target's logits; models may scale or cap them.
    """

    def __init__(self, target: PreTrainedModel, max_positions: int):
        self._head, self._max_positions = target.get_output_embeddings(), max_positions
        self._captured: Tensor | None = None  # (B, T, d), until the first forward has ended,
        self._states: Tensor | None = None  # and the part of it that is needed then
        self.head_mismatch = False
        self._num_drafted = 0
        self._last_logits: Tensor | None = None  # (V,)
        self._thread = threading.get_ident()  # the target may serve others meanwhile
        self._handle = target.base_model.register_forward_hook(self._keep)

    @classmethod
    def for_call(
        cls, target: PreTrainedModel, draft: PreTrainedModel, max_positions: int, mask: Tensor | None, num_read: int
    ) -> PromptStates | None:
        """Capture the prompt of one call; `None` if `max_positions` is 0, or its states cannot be captured.

        Args:
            mask (`Tensor` `(1, L)`, *optional*): the attention mask; a prompt with padding after it is not captured.
            num_read (`int`): how many prompt tokens the mask keeps.
        """
        # A target that drafts for itself would run the hooked body for its drafts as well.
        if not max_positions or draft.base_model is target.base_model or not cls.can_capture(target):
            return None
        # The states kept are the last ones, which padding after the prompt would be.
        return cls(target, max_positions) if mask is None or bool(mask[0, -num_read:].all()) else None

    @staticmethod
    def can_capture(target: PreTrainedModel) -> bool:
        """Tell whether the states of this target can be captured.

        It must have a body and an LM head. It must not be compiled: compiled code ignores a new hook, or is compiled again for it. The LM head must not be
        sharded: gathering it would need other ranks at the same moment, and they end their calls at other times.
        """
        body, head = target.base_model, target.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if body is target or type(weight) not in (torch.nn.Parameter, Tensor) or weight.is_meta or not weight.numel():
            return False
        # Tensor parallel; ZeRO-3.
        sharded = getattr(target, "_tp_size", None) not in (None, 1) or hasattr(weight, "ds_id")
        return not sharded and not any(map(is_compiled, (target, body)))

    def _keep(self, body, inputs, output):
        if threading.get_ident() != self._thread:
            return
        self._handle.remove()
        states = output[0]
        if isinstance(states, Tensor) and states.ndim == 3:
            self._captured = states.detach()

    def finish_prefill(self, num_drafted: int, logits: Tensor):
        """Keep the states of the first forward, which has ended.

        Args:
            num_drafted (`int`): candidate tokens in that forward, after the prompt.
            logits (`Tensor` `(V,)`): the target's logits at the last prompt position, in the first row.
        """
        self.close()
        if self._captured is not None:
            # A view would keep all of it in memory.
            self._states = self._captured[:, -(self._max_positions + num_drafted + 1) :].clone()
            self._captured, self._num_drafted, self._last_logits = None, num_drafted, logits.clone()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore forwards in this context: they are not part of the call."""
        thread, self._thread = self._thread, None
        try:
            yield
        finally:
            self._thread = thread

    def close(self):
        """Remove the hook."""
        self._handle.remove()

    @torch.no_grad()
    def rows(
        self, count: int, top_k: int, dtype: torch.dtype, row: int = 0, columns: Callable | None = None
    ) -> SparseLogits | None:
        """Compute the target's predictions at the last `count` positions of the prompt in this row, or at as many of them as were captured.
        `None` if there are none, or on a `head_mismatch`.

        Args:
            top_k, dtype: passed to [`SparseLogits.from_logits`].
            columns (`Callable[[torch.device], Tensor | None]`, *optional*): returns the columns that may be kept, on a device.
        """
        if self._states is None:
            return None
        states = self._states[row]
        states = states[: len(states) - self._num_drafted]  # the last of them predicts the first token of the answer
        count = min(count, len(states) - 1, self._max_positions)
        if count < 1:
            return None
        if self._last_logits is not None and self._head not in _matching:
            self._check_head(self._logits(self._states[:1, -1 - self._num_drafted])[0])
        if self.head_mismatch:
            return None
        states, parts = states[-1 - count : -1], []
        if self._last_logits is not None:
            states = torch.cat([self._states[:1, -1 - self._num_drafted], states])
        for part in states.split(_ROWS_AT_ONCE):
            logits = self._logits(part)
            if self._last_logits is not None:
                self._check_head(logits[0])
                logits = logits[1:]
                if self.head_mismatch:
                    return None
            among = None if columns is None else columns(logits.device)
            for rows in logits.split(_ROWS_REDUCED if logits.device.type == "cpu" else _ROWS_AT_ONCE):
                parts.append(SparseLogits.from_logits(rows.float(), top_k, dtype, among).cpu())
        return SparseLogits.cat(parts)

    def _check_head(self, ours: Tensor):
        """Check once, at the prompt's last position in the first row, that the head's output `(V',)` equals the target's logits."""
        logits, self._last_logits = self._last_logits.float(), None
        ours = ours.float().to(logits.device)
        same = ours.shape == logits.shape and bool((ours - logits).abs().max() <= _ROUNDING * logits.abs().max())
        self.head_mismatch = not same
        (_matching.add if same else _matching.discard)(self._head)

    def _logits(self, states: Tensor) -> Tensor:
        """Apply the LM head: `(n, d)` to `(n, V)`, in its dtype."""
        weight = getattr(self._head, "weight", None)
        if weight is not None and weight.is_floating_point():  # a user's autocast may have given them another dtype
            states = states.to(weight.dtype)
        return self._head(states)


class SeenTexts:
    """Remembers the texts of recent requests, to find the part of a prompt that is new: a template or an earlier conversation is learnt once, and text that was
    kept from learning is not learnt as part of the next prompt. Thread-safe."""

    def __init__(self):
        self._texts: deque[Tensor] = deque(maxlen=_REMEMBERED)
        self._lock = released(threading.Lock())

    def add(self, tokens: Tensor):
        """Remember a request's prompt and answer, `(T,)`."""
        with self._lock:
            self._texts.append(tokens)

    def replace(self, texts: Sequence[Tensor]):
        """Remember these texts in place of all others."""
        with self._lock:
            self._texts = deque(texts, maxlen=_REMEMBERED)

    def only_new(self, feedback: Feedback, max_rows: int) -> Feedback:
        """Remember a request with `prompt_rows` for all of its prompt; return it with only those that serving would have kept, at most `max_rows`."""
        new = feedback.prompt_length - max(self.shared_prefix(feedback.tokens[: feedback.prompt_length]), 1)
        self.add(feedback.tokens)
        return feedback.with_prompt_rows(min(new, max_rows))

    def shared_prefix(self, prompt: Tensor) -> int:
        """Measure the longest prefix, in tokens, that `prompt` `(L,)` shares with one of these texts."""
        with self._lock:
            texts = list(self._texts)
        return max((_common_prefix(prompt, text) for text in texts), default=0)


def _common_prefix(a: Tensor, b: Tensor) -> int:
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n
