"""`OpenCalls`: the generate calls that have not come back. generate has no hook at its end, so their end is noticed afterwards."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from hf_osd.generation.running import running_calls
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from hf_osd.generation.call import Call


class OpenCalls:
    """The calls that run, and those that are over and not taken in yet. Thread-safe.

    Args:
        on_change (`Callable[[bool], None]`, *optional*): told whether any call runs, as calls begin and end. It may be called anywhere, in the middle of
            anything, and must take no lock.
    """

    def __init__(self, on_change: Callable[[bool], None] | None = None):
        self.on_change = on_change
        self._open: set[Call] = set()
        # What finalizers append to: they may run anywhere, so they take no lock.
        self._ended: deque[Call] = deque()
        self._lock = released(threading.Lock())

    def add(self, call: Call, generator: object):
        """A call begins; it is over when its candidate generator is gone."""
        with self._lock:
            self._open.add(call)
        if self.on_change is not None:
            self.on_change(True)
        weakref.finalize(generator, self._over, call).atexit = False

    def any(self) -> bool:
        """Whether a call runs, as far as is known. Takes no lock."""
        return len(self._open) > len(self._ended)

    def _over(self, call: Call):
        if call in self._open:  # else it was taken in as one that had come back, and would be counted twice
            self._ended.append(call)
        if self.on_change is not None and not self.any():
            self.on_change(False)
            if self.any():  # one began in between, and may have said so before
                self.on_change(True)

    def pop_finished(self, here: bool = False) -> list[Call]:
        """Those that are over, each once: their generator is gone. And, with `here`, those of this thread that have come back, though a
        traceback may still hold the generator; statistics alone may be read in mid-call, from a streamer say."""
        thread, ended = threading.get_ident() if here else None, set()
        running = running_calls() if here else []
        with suppress(IndexError):
            while True:
                ended.add(self._ended.popleft())
        with self._lock:
            over = [
                call for call in self._open if call in ended or (call.thread == thread and call.running not in running)
            ]
            self._open.difference_update(over)
        return over
