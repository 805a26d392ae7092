"""`isolated_random_state`: work that draws random numbers, and leaves no trace of that."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Give back Python's, NumPy's and torch's random states as they were: learning must not change what a user samples."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
