"""`try_draft` runs a draft over a few tokens as while serving. It shows that the draft can read them, how many positions it has, and that no part of the
user's own model runs."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import BaseModelOutput

from hf_osd.drafting.context import DraftContext
from hf_osd.models.properties import encoder_parameters, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrialResult(NamedTuple):
    """Holds what a trial has shown of a draft: the longest text and source that it has positions for, in tokens, and how many logits it gives for a token;
    each `None` if it was not seen."""

    window: int | None = None
    source: int | None = None
    width: int | None = None


def try_draft(draft: PreTrainedModel, original: nn.Module) -> TrialResult:
    """Runs `draft` over a few tokens as while serving, and checks that the user's model `original`, of which it is a copy, does not run.

    Raises:
        ValueError: if `draft` cannot read tokens alone, or keeps nothing in its cache, or runs parts of `original`.
    """
    training, seen = draft.training, _Lookups(draft)
    draft.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _uncompiled(), _watched(original) as ran:
            try:
                result = _read(draft, seen)
            except Exception as error:
                if ran:
                    raise _patched(original, ran) from error
                encodes = draft.config.is_encoder_decoder
                if draft.main_input_name != "input_ids" if encodes else encoder_parameters(draft):
                    return TrialResult()  # it may need encoder states, of features or of the target
                raise ValueError(
                    f"`draft` is a {type(draft).__name__}, which could not read tokens alone ({type(error).__name__}: {error}). A draft gets token ids and its own "
                    "cache, no image, no features and no mask: choose a causal LM that runs on those."
                ) from error
    finally:
        draft.train(training)
    if ran:
        raise _patched(original, ran)
    return result


def _read(draft: PreTrainedModel, seen: _Lookups) -> TrialResult:
    """Reads two tokens, then a third, and that one again after the cache was cropped."""
    config, encoded, mask, source = draft.config, None, None, None
    high, low = _plain_tokens(draft)
    # Not consecutive ids, which `_Lookups` would take for positions.
    ids = torch.tensor([[high, low, high]], device=draft.device)
    if config.is_encoder_decoder and draft.main_input_name == "input_ids":
        with seen:
            encoded, mask = draft.get_encoder()(input_ids=ids), torch.ones_like(ids)
        source = seen.positions([3])
    elif config.is_encoder_decoder:  # it reads features, whose shape is not known here: begin with encoded ones
        width = config.get_text_config(decoder=True).hidden_size
        encoded = BaseModelOutput(torch.zeros(1, 1, width, device=draft.device, dtype=draft.dtype))
    with seen:
        context = DraftContext(draft, ids[0, :2], encoded, mask)
        logits = context.catch_up(0)
        if context.unread:
            raise NotImplementedError("it kept nothing in the cache that it was given")
        context.step(ids[:, 2:])
    context.crop(0)
    context.extend(ids[:, 2:], [1])
    context.catch_up(0)
    return TrialResult(seen.positions([2, 1]), source, logits.logits.shape[-1])


def _plain_tokens(draft: PreTrainedModel) -> tuple[int, int]:
    """Returns the last and the first ordinary token: neither padding nor an image placeholder."""
    special = special_ids(draft)
    rows = min(draft.config.get_text_config(decoder=True).vocab_size, draft.get_input_embeddings().weight.shape[0])
    plain = [i for i in range(rows) if i not in special] or list(range(rows))
    return plain[-1], plain[0]


class _Lookups(TorchDispatchMode):
    """Records which rows of a model's tensors are looked up."""

    def __init__(self, model: nn.Module):
        super().__init__()
        plain = (t for t in (*model.parameters(), *model.buffers()) if type(t) in (Tensor, nn.Parameter))
        self._tables = {t.data_ptr() for t in plain if t.dim() and t.numel()}
        # For each table its number of rows, and the rows looked up in each forward.
        self._seen: dict[int, tuple[int, list[list[int]]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, table, index = torch.ops.aten, None, None
        if func is aten.embedding.default:
            table, index = args[:2]
        elif func is aten.index.Tensor and len(args[1]) == 1:
            table, index = args[0], args[1][0]
        elif func is aten.index_select.default and args[1] == 0:
            table, index = args[0], args[2]
        plain = type(table) in (Tensor, nn.Parameter) and index.dtype in (torch.int32, torch.int64)
        if plain and table.data_ptr() in self._tables:
            self._seen.setdefault(table.data_ptr(), (table.shape[0], []))[1].append(index.flatten().tolist())
        return func(*args, **(kwargs or {}))

    def positions(self, lengths: list[int]) -> int | None:
        """Counts positions by the tables in which consecutive rows were looked up, one for each token, in forwards over `lengths` tokens (or more, with
        padding); the smallest count of several tables, `None` without one. Clears the record."""
        seen, found = list(self._seen.values()), []
        self._seen.clear()
        for size, asked in seen:
            at = first = asked[0][0] if asked[0] else 0
            for rows, length in zip(asked, lengths, strict=False):
                if len(rows) < length or rows != list(range(at, at + len(rows))):
                    break
                at += length
            else:
                if len(asked) == len(lengths):
                    found.append(size - first)
        return min(found, default=None)


@contextlib.contextmanager
def _watched(original: nn.Module) -> Iterator[list[str]]:
    """Lists the modules of `original` that this thread runs meanwhile."""
    ran: list[str] = []
    here = threading.get_ident()

    def note(name: str, module: nn.Module, inputs: tuple):
        if threading.get_ident() == here:
            ran.append(name)

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name)) for name, module in original.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> contextlib.AbstractContextManager:
    """Turns compilation off, since compiled code skips hooks. Unless dynamo is imported already, nothing can be compiled; importing it takes seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _patched(original: nn.Module, ran: list[str]) -> ValueError:
    where = f"its part {ran[-1]!r}" if ran[-1] else "it"
    return ValueError(
        f"`draft` is a {type(original).__name__} whose forward, or a hook on it, is patched in the instance: a copy would go on running {where}, and what is "
        "learnt would never be used. Load the draft anew with from_pretrained, or undo the patch (`del model.forward`), and pass that."
    )
