"""`random_texts`: what a target reads to show how large its states are, and how they show which token they are of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.models.clean_copy import execution_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = 32


@contextmanager
def random_texts(target: PreTrainedModel, count: int) -> Iterator[Tensor]:
    """Yield `count` texts of 32 random tokens, int64 `(count, 32)`, the same each time, where the target reads them; it is in eval mode meanwhile."""
    random, training = torch.Generator().manual_seed(0), [m for m in target.modules() if m.training]
    vocabulary, home = target.get_output_embeddings().weight.shape[0], execution_device(target.get_input_embeddings())
    try:
        target.eval()
        yield torch.randint(vocabulary, (count, _LENGTH), generator=random, device="cpu").to(home)
    finally:
        for module in training:
            module.training = True
