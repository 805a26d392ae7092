"""`default_device`: others' code makes its tensors where they belong, whatever a program has set with `torch.set_default_device`. hf_osd's own say where
they lie; those of generate's loop, of trainers and of adapters do not."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def default_device(device: torch.device | str) -> AbstractContextManager:
    """While open, in this thread, tensors that nobody has given a device are made on this one, if a program has set another; else nothing changes. "meta", which
    is where offloaded weights are said to lie, counts as the CPU."""
    device = torch.device("cpu" if torch.device(device).type == "meta" else device)
    current = torch.get_default_device()
    return contextlib.nullcontext() if current.type == "cpu" or current == device else device
