"""`start_thread`: threads that a process, when it ends, has end first."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Seconds that a process which ends waits for a thread to end.
PATIENCE = 30.0


def start_thread(
    target: Callable,
    args: tuple,
    stop: Callable[[], None],
    force: Callable[[], None] | None = None,
    patience: float | None = None,
) -> threading.Thread:
    """Start a thread that keeps no process alive. At its end the process calls `stop`, which must have the thread end, and waits for it, though not for ever:
    an interpreter must not go in the middle of an optimizer step.

    Args:
        force (`Callable`, *optional*): called where `stop` was not enough, and that is waited for too.
        patience (`float`, *optional*): seconds of each wait; `PATIENCE` if left out.
    """
    process = os.getpid()

    def run():
        try:
            target(*args)
        finally:
            atexit.unregister(end)

    thread = threading.Thread(target=run, name="hf_osd learner", daemon=True)

    def end():
        if os.getpid() != process:  # a fork of it, where the thread is not
            return
        for ask in (stop, force):
            if ask is not None:
                ask()
                thread.join(PATIENCE if patience is None else patience)
        if thread.is_alive():
            logger.warning("What learns does not stop, and the process ends without it.")

    atexit.register(end)
    thread.start()
    return thread
