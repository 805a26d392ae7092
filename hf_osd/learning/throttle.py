"""`Throttle`: keeps a worker to its share of the time while somebody is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hf_osd.system.forks import released

# Seconds between two looks at whether anybody is still served: the end of a generate call wakes nobody.
_LOOK = 0.02


class Stopped(BaseException):
    """Ends an update in its middle. No `Exception`, for an update that is stopped has not failed."""


class Throttle:
    """Makes a worker wait, after each piece of work, until that piece was no more than its share of the time.

    Args:
        share (`float`): of the time, above 0 up to 1.
        busy (`Callable[[], bool]`): tells whether somebody is served. While nobody is, there is no waiting.
        clock (`Callable[[], float]`, *optional*): measures the work, in seconds; wall time by default.
    """

    def __init__(self, share: float, busy: Callable[[], bool], clock: Callable[[], float] | None = None):
        self.share, self._busy, self._clock = share, busy, clock or time.monotonic
        self._since = self._clock()
        self._unthrottled, self._lock = threading.Event(), released(threading.Lock())
        self._waiting = 0  # how many wait for the work
        self.stopped = False

    def begin(self):
        """Start a piece of work."""
        self._since = self._clock()

    def pause(self):
        """End a piece of work, and wait for as long as it asks for.

        Raises:
            Stopped: if `stop` was called.
        """
        until = time.monotonic() + (self._clock() - self._since) * (1 / self.share - 1)
        while not self._unthrottled.is_set() and (left := until - time.monotonic()) > 0 and self._busy():
            self._unthrottled.wait(min(left, _LOOK))
        if self.stopped:
            raise Stopped
        self._since = self._clock()

    def unthrottle(self, whether: bool = True):
        """Let nobody wait: somebody needs the work done. With `False`, one of those does no more."""
        with self._lock:
            self._waiting += 1 if whether else -1
            if self._waiting or self.stopped:
                self._unthrottled.set()
            else:
                self._unthrottled.clear()

    def stop(self):
        """Let the next `pause` raise."""
        self.stopped = True
        self._unthrottled.set()
