"""What a fork leaves behind. In the child there is one thread, the one that forked: what the others did is not done there, and the locks that they held
would be held for ever."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

_locks: weakref.WeakSet = weakref.WeakSet()
_owners: weakref.WeakSet = weakref.WeakSet()
# Seconds that a fork waits for imports to end.
_PATIENCE = 30.0
_importing, _forking = threading.RLock(), threading.local()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import what takes seconds in here: a fork waits for it, or modules would be half imported in the child for ever."""
    _heed_forks()
    with _importing:
        yield


class Forked(Protocol):
    """What is to hear of forks."""

    def after_fork(self):
        """Called in the child, before anything else runs there; waits for nothing."""


def released(lock: Any) -> Any:
    """A `threading.Lock` or `RLock` that in a forked child nobody holds."""
    _heed_forks()
    _locks.add(lock)
    return lock


def on_fork(owner: Forked):
    """Have `owner.after_fork()` called in each forked child, while locks are still as they were."""
    _heed_forks()
    _owners.add(owner)


@functools.cache
def _heed_forks():
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def _before():
    _forking.waited = _importing.acquire(timeout=_PATIENCE)


def _in_parent():
    if _forking.waited:
        _importing.release()


def _in_child():
    _importing._at_fork_reinit()
    for owner in list(_owners):
        owner.after_fork()
    for lock in list(_locks):
        lock._at_fork_reinit()  # as the standard library has it for its own
