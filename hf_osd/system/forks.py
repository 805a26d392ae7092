"""Prepares locks and objects for forks. A forked child has only the thread that forked: the other threads' work stops there, and locks that they held
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
# Seconds that a fork waits for imports to finish.
_PATIENCE = 30.0
_importing, _forking = threading.RLock(), threading.local()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Have forks wait while slow imports run inside this context; otherwise the child would keep half-imported modules."""
    _heed_forks()
    with _importing:
        yield


class Forked(Protocol):
    """Marks objects that must react to forks."""

    def after_fork(self):
        """Run in the child before anything else does; must not block."""


def released(lock: Any) -> Any:
    """Return this `threading.Lock` or `RLock`, which from now on is free in every forked child."""
    _heed_forks()
    _locks.add(lock)
    return lock


def on_fork(owner: Forked):
    """Call `owner.after_fork()` in each forked child, before its locks are freed."""
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
        lock._at_fork_reinit()  # as the standard library does with its own locks
