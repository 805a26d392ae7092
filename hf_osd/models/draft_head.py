"""`DraftHead`: which rows of its LM head an assistant's draft computes, by the config: all, those of recent traffic, or those that a low-rank
projection chooses; and the view of a draft that has such a head.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.draft_vocab import DraftVocab, LowRank, LowRankHead, RowsHead
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

# A prompt's tokens are at hand in its own call anyway; to the next calls they say less than what the target answered.
_PROMPT_WEIGHT = 0.25
# Rows that the low-rank projection chooses at each step, to those that are kept for the traffic as a whole.
_LOW_RANK_SHARE = 8
_RANK = 64  # of the projection
# A projection is made once so many hidden states were seen, and once more: it is worth little without them, and takes a second.
_STATES = (2048, 8192)

# Their forward reads rows or logits by token id.
_READ_BY_ID = {"chameleon", "gemma4_assistant", "gemma4_unified_assistant"}


class DraftHead:
    """The head of an assistant's calls. Made by `of`; thread-safe.

    Args:
        rows (`int`): of the whole head.
        size (`int`): how many the traffic's set has.
        rank (`int`, *optional*): of the low-rank projection that takes the set's place once enough hidden states were seen.
    """

    def __init__(self, rows: int, size: int, rank: int | None = None):
        self.vocabulary = DraftVocab(rows, size)
        self._rank, self._chosen = rank, max(size // _LOW_RANK_SHARE, 1)
        self._moment: Tensor | None = None  # Σ h hᵀ, float32 (d, d)
        self._states = 0
        self._projection: LowRank | None = None
        self._made_of = 0  # the states that `_projection` was made of
        self._lock = released(threading.Lock())

    @classmethod
    def of(cls, draft: PreTrainedModel, config: OnlineConfig) -> DraftHead | None:
        """The head that `config` asks for, `None` for the draft's own whole one, which is also what a draft keeps whose head is not a plain
        linear layer, or has no more rows than that."""
        kind, size = config.draft_head, config.draft_vocab_size
        if kind == "full" or not can_select_rows(draft):
            return None
        rows = draft.get_output_embeddings().weight.shape[0]
        if size >= rows or (kind == "auto" and rows < 4 * size):
            return None
        return cls(rows, size, _RANK if kind == "low_rank" else None)

    def view(self, model: PreTrainedModel, text: Tensor) -> tuple[RowsHead | LowRankHead, PreTrainedModel]:
        """The head of one call, and `model` with it: `text` `(L,)` is what the draft reads first."""
        full = model.get_output_embeddings()
        if self._rank is not None:
            self._project(full)
        if self._projection is not None:
            head = LowRankHead(full, self._projection, self._chosen)
        else:
            head = self.vocabulary.head(full, text)
        if self._rank is not None and self._states < _STATES[-1]:
            head.register_forward_pre_hook(self._collect)
        return head, with_head(model, head)

    def could_say(self, prompt: Tensor, answer: Sequence[int]) -> Tensor:
        """Which tokens of an answer a call's head has when they are due, bool `(N,)`: those of the set, of the prompt, and said before."""
        if self._projection is not None:
            return torch.ones(len(answer), dtype=torch.bool, device="cpu")
        known = {*self.vocabulary.ids.tolist(), *prompt.tolist()}
        could = []
        for token in answer:
            could.append(token in known)
            known.add(token)
        return torch.tensor(could, dtype=torch.bool, device="cpu")

    def observe(self, prompt: Tensor, answer: Sequence[int], likely: tuple[Tensor, Tensor] | None):
        """The tokens of a call that is over, in the draft's ids, and what else the target found likely in it, tokens and how likely, `(N,)`
        each: after few requests that covers the words of the next ones better than what was said."""
        self.vocabulary.observe(prompt, _PROMPT_WEIGHT)
        self.vocabulary.observe(answer)
        if likely is not None:
            self.vocabulary.observe(*likely)

    def _collect(self, head: nn.Module, inputs: tuple[Tensor, ...]):
        hidden = inputs[0].detach().flatten(0, -2).float()  # (n, d)
        with self._lock:
            self._moment = hidden.T @ hidden if self._moment is None else self._moment + hidden.T @ hidden
            self._states += len(hidden)

    def _project(self, full: nn.Linear):
        with self._lock:
            due = [states for states in _STATES if self._made_of < states <= self._states]
            if due:
                with torch.inference_mode(False), torch.no_grad():
                    self._projection = LowRank(full, self._rank, self._moment.clone() / self._states)
                self._made_of = self._states


def with_head(model: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """A view of `model` that computes `head` in place of its LM head. It shares every weight and every other module, and `model` stays as
    it is; its forward then works on logits of as many columns as `head` gives.

    Raises:
        ValueError: if the model has no LM head in its module tree.
    """
    old = model.get_output_embeddings()
    view = model if old is None else _replaced(model, old, head)
    if view is model:
        raise ValueError(f"{type(model).__name__} has no LM head among its modules; choose a draft that has one.")
    return view


def can_select_rows(model: PreTrainedModel) -> bool:
    """Whether `with_head` can restrict the model's LM head: a plain `nn.Linear` of float weights in its module tree, whose logits the
    model's forward treats one by one (scaled or capped, but not biased, cut or read by token id)."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return False
    weight = head.weight
    # Quantised weights are often subclasses of Tensor; offloaded ones are on the meta device.
    if type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point() or weight.is_meta:
        return False
    modules = dict(model.named_modules())
    name = next((name for name, module in modules.items() if module is head), "")
    if not name:
        return False
    if any("final_logits_bias" in module._buffers for module in modules.values()):  # (1, W), added to the logits
        return False
    if any(getattr(getattr(m, "config", None), "model_type", None) in _READ_BY_ID for m in modules.values()):
        return False
    # A forward patched into an instance, as accelerate and torch.compile do, is bound to it: a view would run the original's.
    parts = name.split(".")
    if any("forward" in vars(modules[".".join(parts[:i])]) for i in range(len(parts) + 1)):
        return False
    return _logit_width(model) in (None, weight.shape[0])  # some cut padding off


def _logit_width(model: PreTrainedModel) -> int | None:
    """Counts the logits that a model gives for a token, by trying; `None` if it cannot read a token alone."""
    training = model.training
    model.eval()
    try:
        name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        with torch.inference_mode(False), torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            return model(**{name: token}, use_cache=False).logits.shape[-1]
    except Exception:
        return None
    finally:
        model.train(training)


def _replaced(module: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`module` with `new` for `old`: itself where `old` is not in it, else a shallow copy."""
    if module is old:
        return new
    children = {name: c if c is None else _replaced(c, old, new) for name, c in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view
