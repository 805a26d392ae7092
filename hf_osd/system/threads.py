"""`start_thread` starts threads that end before their process does."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Seconds that a process waits for a thread before it ends.
PATIENCE = 30.0


def start_thread(
    target: Callable,
    args: tuple,
    stop: Callable[[], None],
    force: Callable[[], None] | None = None,
    patience: float | None = None,
) -> threading.Thread:
    """Start a daemon thread, and have the process stop it before it ends: an interpreter must not go in the middle of an optimizer step.

    Args:
        target (`Callable`), args (`tuple`): the function that the thread runs, and its arguments.
        stop (`Callable`): asks the thread to end; the process calls it when it ends, and then waits.
        force (`Callable`, *optional*): called where that wait was too short; the process then waits once more.
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
            logger.warning("The learner does not stop; the process ends all the same.")

    atexit.register(end)
    thread.start()
    return thread
