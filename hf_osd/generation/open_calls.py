"""`OpenCalls` keeps the generate calls that run, and finds those that have ended: generate has no hook at its end."""

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
    """Holds the calls that run, and those that have ended and were not collected yet. Thread-safe.

    Args:
        on_change (`Callable[[bool], None]`, *optional*): called as calls begin and end, with `True` if any call runs. A garbage collection may call it at any
            point of any code, so it must take no lock.
    """

    def __init__(self, on_change: Callable[[bool], None] | None = None):
        self.on_change = on_change
        self._open: set[Call] = set()
        # Finalizers append here; they may run at any point, so they take no lock.
        self._ended: deque[Call] = deque()
        self._lock = released(threading.Lock())

    def add(self, call: Call, generator: object):
        """Adds a call that begins; it ends when its candidate generator is garbage-collected."""
        with self._lock:
            self._open.add(call)
        if self.on_change is not None:
            self.on_change(True)
        weakref.finalize(generator, self._end, call).atexit = False

    def any(self) -> bool:
        """Returns `True` if a call runs, as far as is known. It takes no lock."""
        return len(self._open) > len(self._ended)

    def _end(self, call: Call):
        if call in self._open:  # otherwise it was popped when it came back, and would be counted twice
            self._ended.append(call)
        if self.on_change is not None and not self.any():
            self.on_change(False)
            if self.any():  # one began in between, perhaps before the line above
                self.on_change(True)

    def pop_finished(self, this_thread: bool = False) -> list[Call]:
        """Removes and returns the calls whose generator is gone. With `this_thread` also the calls that this thread has come back from, even if a traceback
        still holds the generator; leave it out in the middle of a call, for example in a streamer that reads statistics."""
        thread, ended = threading.get_ident() if this_thread else None, set()
        running = running_calls() if this_thread else []
        with suppress(IndexError):
            while True:
                ended.add(self._ended.popleft())
        with self._lock:
            finished = [
                call for call in self._open if call in ended or (call.thread == thread and call.running not in running)
            ]
            self._open.difference_update(finished)
        return finished
