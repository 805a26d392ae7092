"""`Forwards`: counts a model's forwards and times them."""

from __future__ import annotations

import time

import torch
from torch import nn


class Forwards:
    """Counts the forwards of a model and their seconds, while open.

    Args:
        model (`nn.Module`): the model.
        wait (`bool`): wait for the accelerator after each forward, which otherwise returns before it is done.
    """

    def __init__(self, model: nn.Module, wait: bool = False):
        self._model, self._wait = model, wait
        self.count, self.seconds = 0, 0.0

    def __enter__(self) -> Forwards:
        begin, end = self._model.register_forward_pre_hook(self._begin), self._model.register_forward_hook(self._end)
        self._handles = (begin, end)
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()

    def _begin(self, module, inputs):
        self.count += 1
        self._started = time.perf_counter()

    def _end(self, module, inputs, output):
        if self._wait:
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self._started
