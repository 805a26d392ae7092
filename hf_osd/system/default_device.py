"""`default_device` has library code make its tensors where they belong, whatever a program has set with `torch.set_default_device`. hf_osd names the device
of its own tensors; generate's loop, trainers and adapters do not."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def default_device(device: torch.device | str) -> AbstractContextManager:
    """Make tensors without a named device on this one, in this thread, while the context is open and the program has set another default; else change nothing.
    "meta", the device of offloaded weights, counts as the CPU."""
    device = torch.device("cpu" if torch.device(device).type == "meta" else device)
    current = torch.get_default_device()
    return contextlib.nullcontext() if current.type == "cpu" or current == device else device
