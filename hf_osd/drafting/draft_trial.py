"""`try_draft`: has a draft read a few tokens as it will while serving, before it is trusted: whether it can, how far it reads, and that it is itself that runs."""

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
from hf_osd.models.properties import encoder_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reads(NamedTuple):
    """What a trial has shown of a draft: the longest text and source that it has positions for, in tokens, and how many logits it gives; `None` where
    that did not show."""

    window: int | None = None
    source: int | None = None
    width: int | None = None


def try_draft(own: PreTrainedModel, given: nn.Module) -> Reads:
    """Have a copy read a few tokens as it will while serving, and see that `given`, which it is a copy of, computes nothing meanwhile.

    Raises:
        ValueError: if it cannot read tokens alone, or keeps nothing in its cache, or what runs is `given`.
    """
    training, seen = own.training, _Lookups(own)
    own.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _uncompiled(), _watched(given) as ran:
            try:
                reads = _read(own, seen)
            except Exception as error:
                if ran:
                    raise _patched(given, ran) from error
                encodes = own.config.is_encoder_decoder
                if own.main_input_name != "input_ids" if encodes else encoder_parameters(own):
                    return Reads()  # it may need what an encoder says, of features or of the target
                raise ValueError(
                    f"`draft` is a {type(own).__name__}, which could not read tokens alone ({type(error).__name__}: {error}). A draft gets token ids and its own "
                    "cache, no image, no features and no mask: choose a causal LM that runs on those."
                ) from error
    finally:
        own.train(training)
    if ran:
        raise _patched(given, ran)
    return reads


def _read(own: PreTrainedModel, seen: _Lookups) -> Reads:
    """Two tokens, one more, and one after it was taken back."""
    config, encoded, mask, source = own.config, None, None, None
    high, low = _plain_tokens(own)
    ids = torch.tensor([[high, low, high]], device=own.device)  # not one after the other, as positions are
    if config.is_encoder_decoder and own.main_input_name == "input_ids":
        with seen:
            encoded, mask = own.get_encoder()(input_ids=ids), torch.ones_like(ids)
        source = seen.positions([3])
    elif config.is_encoder_decoder:  # of features, whose shape is not known here: as if they were encoded
        width = config.get_text_config(decoder=True).hidden_size
        encoded = BaseModelOutput(torch.zeros(1, 1, width, device=own.device, dtype=own.dtype))
    with seen:
        context = DraftContext(own, ids[0, :2], encoded, mask)
        said = context.catch_up(0)
        if context.unread:
            raise NotImplementedError("it kept nothing in the cache that it was given")
        context.step(ids[:, 2:])
    context.crop(0)
    context.extend(ids[:, 2:], [1])
    context.catch_up(0)
    return Reads(seen.positions([2, 1]), source, said.logits.shape[-1])


def _plain_tokens(own: PreTrainedModel) -> tuple[int, int]:
    """The last one and the first that say nothing else: neither padding nor an image's place."""
    config = own.config.get_text_config(decoder=True)
    special = set()
    for name, value in [*vars(own.config).items(), *vars(config).items()]:
        if name.endswith(("token_id", "token_ids", "token_index")):
            special.update(value if isinstance(value, (list, tuple)) else [value])
    rows = min(config.vocab_size, own.get_input_embeddings().weight.shape[0])
    plain = [i for i in range(rows) if i not in special] or list(range(rows))
    return plain[-1], plain[0]


class _Lookups(TorchDispatchMode):
    """Notes which rows of which of a model's tensors are looked up."""

    def __init__(self, model: nn.Module):
        super().__init__()
        plain = (t for t in (*model.parameters(), *model.buffers()) if type(t) in (Tensor, nn.Parameter))
        self._tables = {t.data_ptr() for t in plain if t.dim() and t.numel()}
        self._seen: dict[int, tuple[int, list[list[int]]]] = {}  # rows of the table, and those asked for, a forward

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
        """How many positions there are, by tables of which a row a token was asked for, one after the other, in forwards over so many tokens (or more,
        with padding); the fewest of several. Forgets what was noted."""
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
def _watched(given: nn.Module) -> Iterator[list[str]]:
    """Which of its modules this thread has run."""
    ran: list[str] = []
    here = threading.get_ident()

    def note(name: str, module: nn.Module, inputs: tuple):
        if threading.get_ident() == here:
            ran.append(name)

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name)) for name, module in given.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled code does not see hooks. Where nothing is compiled dynamo is not imported, which takes seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _patched(given: nn.Module, ran: list[str]) -> ValueError:
    where = f"its part {ran[-1]!r}" if ran[-1] else "it"
    return ValueError(
        f"`draft` is a {type(given).__name__} whose forward, or a hook on it, is patched in the instance: a copy would go on running {where}, and what is "
        "learnt would never be used. Load the draft anew with from_pretrained, or undo the patch (`del model.forward`), and pass that."
    )
