"""What LM heads need to be quick. It knows modules, and nothing of drafts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """While open, the LM head of `model` reads contiguous rows. Without gradients torch makes a batched product of a head over the last
    columns of several requests, and copies the head once a request: five to two hundred times the work on CPUs."""
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    try:
        yield
    finally:
        handle.remove()
