"""`isolated_random_state` lets code draw random numbers without changing the process's random state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's random states when the block ends: learning must not change what a user samples."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
