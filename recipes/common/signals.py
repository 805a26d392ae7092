"""Signals that end a run: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed. They come as an exception, so that what was learnt can be saved."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

logger = logging.getLogger("hf_osd.recipes.signals")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# While what was learnt is saved, launchers and people repeat themselves: this many are let pass.
_LET_PASS = 2


class Ended(KeyboardInterrupt):
    """A signal wants the run to end.

    Args:
        number (`int`): of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """What has come."""

    def __init__(self):
        self.came: list[int] = []
        self.held: int | None = None  # how many of them had come as saving began

    def come(self, number: int, frame):
        self.came.append(number)
        if self.held is None or len(self.came) > self.held + _LET_PASS:
            raise Ended(number)
        logger.warning("%s: what was learnt is being saved.", signal.Signals(number).name)


_current: _Signals | None = None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In here signals raise [`Ended`] in the main thread. Those that were ignored before, as under nohup, are still. Not for other threads, which get none."""
    global _current
    if threading.current_thread() is not threading.main_thread() or _current is not None:
        yield
        return
    _current, before = _Signals(), {}
    try:
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _current.come)
        yield
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)


def hold_signals():
    """From now on signals are let pass, but for somebody who insists: what was learnt is being saved."""
    if _current is not None:
        _current.held = len(_current.came)


def check_signals():
    """Raise [`Ended`] if a signal has come that was not heeded: what a finalizer raises, Python only prints."""
    if _current is not None and _current.came and _current.held is None:
        raise Ended(_current.came[-1])


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """As shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + getattr(interrupt, "number", signal.SIGINT)
