"""`PromptStates`: what a target makes of a prompt as it reads it. generate asks only for what follows the prompt; what the target would have said at the
prompt's own positions costs its LM head there, and no forward."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

# Rows of the LM head at once: a long prompt's logits, of all the vocabulary, would take gigabytes.
_ROWS_AT_ONCE = 64
# What the head says of the kept states and the logits that generate had of them may differ by this share of the largest logit: they were rounded in
# matrix products of other shapes. Where a model scales or caps its logits after the head, they differ by more.
_ROUNDING = 0.03
_REMEMBERED = 32


class PromptStates:
    """The hidden states with which a target ends its first forward, in this thread, from now on.

    Args:
        target (`PreTrainedModel`): a decoder that `offers` them.
        most (`int`): positions of a prompt to keep, its last ones.
    """

    def __init__(self, target: PreTrainedModel, most: int):
        self._head, self._most = target.get_output_embeddings(), most
        self._heard: Tensor | None = None  # (B, T, d), until the round is over,
        self._states: Tensor | None = None  # and what is needed of it then
        self.differs = (
            False  # whether what the head alone says was found to be another thing than what the target says
        )
        self._drafted = 0  # columns after the prompt's
        self._said: Tensor | None = None  # (V,)
        self._thread = threading.get_ident()  # the target may serve others meanwhile
        self._handle = target.base_model.register_forward_hook(self._keep)

    @classmethod
    def of_call(
        cls, target: PreTrainedModel, draft: PreTrainedModel, most: int, mask: Tensor | None, read: int
    ) -> PromptStates | None:
        """For the prompt of one call, whose `read` tokens are those that `mask` `(1, L)` says; `None` where nothing is asked for, or can be had."""
        # A target that drafts for itself would draft with the body that is listened to.
        if not most or draft.base_model is target.base_model or not cls.offers(target):
            return None
        # The states kept are the last ones, which padding after the prompt would be.
        return cls(target, most) if mask is None or bool(mask[0, -read:].all()) else None

    @staticmethod
    def offers(target: PreTrainedModel) -> bool:
        """Whether they can be had: of a model in two parts, body and head, that is not compiled, for then a hook is not seen, or compiles it anew; and of
        which this process has the whole head, for to gather it takes others, who seal this call at another time or never."""
        body, head = target.base_model, target.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if body is target or type(weight) not in (torch.nn.Parameter, Tensor) or weight.is_meta or not weight.numel():
            return False
        parted = getattr(target, "_tp_size", None) not in (None, 1) or hasattr(
            weight, "ds_id"
        )  # tensor parallel; ZeRO-3
        return not parted and not any(map(is_compiled, (target, body)))

    def _keep(self, body, inputs, output):
        if threading.get_ident() != self._thread:
            return
        self._handle.remove()
        states = output[0]
        if isinstance(states, Tensor) and states.ndim == 3:
            self._heard = states.detach()

    def settle(self, drafted: int, said: Tensor):
        """The first forward is over: `drafted` columns of it came after the prompt's, and `said` `(V,)` are the logits that generate had of the last
        position of the prompt, in the first row."""
        self.close()
        if self._heard is not None:
            self._states = self._heard[:, -(self._most + drafted + 1) :].clone()  # a view would keep it all
            self._heard, self._drafted, self._said = None, drafted, said.clone()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen to forwards that are no part of the call."""
        thread, self._thread = self._thread, None
        try:
            yield
        finally:
            self._thread = thread

    def close(self):
        """Listen no longer."""
        self._handle.remove()

    @torch.no_grad()
    def rows(
        self, count: int, top_k: int, dtype: torch.dtype, row: int = 0, columns: Callable | None = None
    ) -> SparseLogits | None:
        """What the target would have said at the last `count` positions of the prompt in this row, or at as many of them as there are states for.
        `None` if it is none, or if the head alone does not say what the target does.

        Args:
            top_k, dtype: as of [`SparseLogits.from_logits`].
            columns (`Callable[[torch.device], Tensor | None]`, *optional*): gives the columns that may be kept, on a device.
        """
        if self._states is None:
            return None
        states = self._states[row]
        states = states[: len(states) - self._drafted]  # the last of them says the first token of the answer
        count = min(count, len(states) - 1, self._most)
        if count < 1:
            return None
        if self._said is not None:
            self._compare()
        if self.differs:
            return None
        states = states[-1 - count : -1]
        parts = []
        for part in states.split(_ROWS_AT_ONCE):
            logits = self._logits(part)
            among = None if columns is None else columns(logits.device)
            parts.append(SparseLogits.from_logits(logits, top_k, dtype, among).cpu())
        return SparseLogits.cat(parts)

    def _compare(self):
        """See once whether the head alone says of the prompt's last state, in the first row, what the target said of it."""
        said, self._said = self._said.float(), None
        mine = self._logits(self._states[:1, -1 - self._drafted])[0].to(said.device)
        same = mine.shape == said.shape and bool((mine - said).abs().max() <= _ROUNDING * said.abs().max())
        self.differs = not same

    def _logits(self, states: Tensor) -> Tensor:
        """`(n, d)` to float32 `(n, V)`."""
        weight = getattr(self._head, "weight", None)
        if (
            weight is not None and weight.is_floating_point()
        ):  # under a user's autocast they may have come in another dtype
            states = states.to(weight.dtype)
        return self._head(states).float()


class SeenTexts:
    """The last texts that were taken in, by which to tell what of a prompt is new: a template, or the conversation so far, teaches once; and what was held
    back from learning is not learnt as a part of the next prompt. Thread-safe."""

    def __init__(self):
        self._texts: deque[Tensor] = deque(maxlen=_REMEMBERED)
        self._lock = released(threading.Lock())

    def add(self, tokens: Tensor):
        """A request's prompt and answer, `(T,)`."""
        with self._lock:
            self._texts.append(tokens)

    def replace(self, texts: Sequence[Tensor]):
        """Know these in place of all others."""
        with self._lock:
            self._texts = deque(texts, maxlen=_REMEMBERED)

    def only_new(self, feedback: Feedback, most: int) -> Feedback:
        """Take in a request of which all prompt rows are known: the same with those that serving would have kept, `most` at most."""
        new = feedback.prompt_length - max(self.shared(feedback.tokens[: feedback.prompt_length]), 1)
        self.add(feedback.tokens)
        return feedback.with_prompt_rows(min(new, most))

    def shared(self, prompt: Tensor) -> int:
        """How many tokens `prompt` `(L,)` begins with that one of these texts begins with, too."""
        with self._lock:
            texts = list(self._texts)
        return max((_common(prompt, text) for text in texts), default=0)


def _common(a: Tensor, b: Tensor) -> int:
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def is_compiled(module) -> bool:
    """Whether a module, or its forward, went through `torch.compile`."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    )
