"""`DraftHead` chooses which rows of its LM head a draft computes, by the config: all, those of recent traffic, or those that a low-rank projection
chooses. `with_head` makes the view of a draft that has such a head.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.copies import embedding_names
from hf_osd.models.draft_vocab import DraftVocab, LowRank, LowRankHead, RowsHead
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

# A prompt's tokens have rows in their own call anyway; they predict the tokens of the next calls less well than answers do.
_PROMPT_WEIGHT = 0.25
# Rows computed by default; the fewer where the rows take much of a step. There the time saved is worth more than the acceptance lost, at 2,048 it is not
# (docs/experiments.md).
_SIZE, _FEWER = 8192, 4096
# The low-rank projection chooses this many times fewer rows at each step than are kept for recent traffic.
_LOW_RANK_SHARE = 8
_RANK = 64  # of the projection
# Numbers of hidden states after which a projection is made: it needs them to be of use, and takes a second to make.
_STATES = (2048, 8192)

# Model types whose forward reads rows or logits by token id.
_READ_BY_ID = {"chameleon", "gemma4_assistant", "gemma4_unified_assistant"}


class DraftHead:
    """Makes the reduced head of each call of an assistant. Made by `from_config`; thread-safe.

    Args:
        rows (`int`): how many rows the full head has.
        size (`int`): how many tokens the draft vocabulary has.
        rank (`int`, *optional*): rank of the low-rank projection that replaces the draft vocabulary once enough hidden states were seen.
    """

    def __init__(self, rows: int, size: int, rank: int | None = None):
        self.vocabulary = DraftVocab(rows, size)
        self._rank, self._chosen = rank, max(size // _LOW_RANK_SHARE, 1)
        self._moment: Tensor | None = None  # Σ h hᵀ, float32 (d, d)
        self._states = 0
        self._projection: LowRank | None = None
        self._projected_states = 0  # how many states `_projection` was made from
        self._lock = released(threading.Lock())

    @classmethod
    def from_config(cls, draft: PreTrainedModel, config: OnlineConfig) -> DraftHead | None:
        """Make the head that `config` asks for; `None` if the draft keeps its full one, as it also does where that is not a plain linear layer, or has no more
        rows than `draft_vocab_size`."""
        kind = config.draft_head
        if kind == "full" or not can_select_rows(draft):
            return None
        size = config.draft_vocab_size or (_SIZE if kind == "low_rank" else default_size(draft))
        rows = draft.get_output_embeddings().weight.shape[0]
        if size >= rows or (kind == "auto" and rows < 4 * size):
            return None
        return cls(rows, size, _RANK if kind == "low_rank" else None)

    def view(self, model: PreTrainedModel, text: Tensor) -> tuple[RowsHead | LowRankHead, PreTrainedModel]:
        """Make the head of one call, and the view of `model` that has it. `text`, int64 `(L,)`, is the prompt in the draft's tokens."""
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

    def covers(self, prompt: Tensor, answer: Sequence[int]) -> Tensor:
        """Mark the tokens of an answer that have a row when the draft would predict them, bool `(N,)`: those of the draft vocabulary, of the prompt, and of
        the answer before that position."""
        if self._projection is not None:
            return torch.ones(len(answer), dtype=torch.bool, device="cpu")
        known = {*self.vocabulary.ids.tolist(), *prompt.tolist()}
        covered = []
        for token in answer:
            covered.append(token in known)
            known.add(token)
        return torch.tensor(covered, dtype=torch.bool, device="cpu")

    def observe(self, prompt: Tensor, answer: Sequence[int], likely: tuple[Tensor, Tensor] | None):
        """Count the tokens of an ended call, in the draft's ids, and other tokens that the target found likely, `(ids, probabilities)`, `(N,)` each: after few
        requests these cover the tokens of the next ones better than answers alone."""
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
            due = [states for states in _STATES if self._projected_states < states <= self._states]
            if due:
                with torch.inference_mode(False), torch.no_grad():
                    self._projection = LowRank(full, self._rank, self._moment.clone() / self._states)
                self._projected_states = self._states


def default_size(draft: PreTrainedModel) -> int:
    """Choose how many rows of its head a draft computes where the config does not say: fewer for a draft whose layers are small beside them."""
    ends = embedding_names(draft)
    layers = sum(p.numel() for name, p in draft.named_parameters() if name not in ends)
    return _FEWER if 2 * _SIZE * draft.get_output_embeddings().weight.shape[1] > layers else _SIZE


def with_head(model: PreTrainedModel, head: nn.Module) -> PreTrainedModel:
    """Make a view of `model` that computes `head` in place of its LM head. It shares every weight and every other module, and `model` stays as
    it is; the view's forward then returns logits with as many columns as `head` has.

    Raises:
        ValueError: if the model has no LM head in its module tree.
    """
    old = model.get_output_embeddings()
    view = model if old is None else _replaced(model, old, head)
    if view is model:
        raise ValueError(f"{type(model).__name__} has no LM head among its modules; choose a draft that has one.")
    return view


def can_select_rows(model: PreTrainedModel) -> bool:
    """Tell whether `with_head` can restrict the model's LM head: it must be a plain `nn.Linear` of float weights in the module tree, and the model's forward
    must treat its logits one by one (scaled or capped, but not biased, cut or read by token id)."""
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
    # accelerate and torch.compile patch an instance's forward, which stays bound to it: a view would run the original.
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
    """Replace `old` by `new` in a shallow copy of `module`; return `module` itself where `old` is not in it."""
    if module is old:
        return new
    children = {name: c if c is None else _replaced(c, old, new) for name, c in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view
