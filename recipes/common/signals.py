"""Signals that end a run: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal. They raise an exception, so that what was learnt can be saved."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

logger = logging.getLogger("hf_osd.recipes.signals")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# Launchers and people repeat signals while what was learnt is saved: so many are ignored.
_IGNORED = 2


class Ended(KeyboardInterrupt):
    """Raised when a signal ends the run.

    Args:
        number (`int`): the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """Remembers the signals that came, and raises [`Ended`] for them."""

    def __init__(self):
        self.came: list[int] = []
        self.held: int | None = None  # how many had come when saving began

    def come(self, number: int, frame):
        self.came.append(number)
        # The first one's exception may still be on its way to whoever saves: a second one, raised in the midst of that, would get past them.
        held = 1 if self.held is None else self.held
        if len(self.came) == 1 or len(self.came) > held + _IGNORED:
            raise Ended(number)
        logger.warning("%s: what was learnt is being saved.", signal.Signals(number).name)


_current: _Signals | None = None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block signals raise [`Ended`] in the main thread. Signals that were ignored before, as under nohup, still are. In other threads, which get no
    signals, the block does nothing."""
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
    """From now on ignore two more signals, while what was learnt is saved; the third one ends the run."""
    if _current is not None:
        _current.held = len(_current.came)


def check_signals():
    """Raise [`Ended`] if a signal came whose exception was lost: Python only prints those raised within a finalizer."""
    if _current is not None and _current.came and _current.held is None:
        raise Ended(_current.came[-1])


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return the exit status that shells use: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + getattr(interrupt, "number", signal.SIGINT)
