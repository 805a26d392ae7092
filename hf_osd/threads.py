"""`start_thread`: threads that a process, when it ends, has end first."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable


def start_thread(target: Callable, args: tuple, stop: Callable[[], None]) -> threading.Thread:
    """Start a thread that keeps no process alive. At its end the process calls `stop`, which must have the thread end, and waits for it: an interpreter
    must not go in the middle of an optimizer step."""

    def run():
        try:
            target(*args)
        finally:
            atexit.unregister(end)

    thread = threading.Thread(target=run, name="hf_osd learner", daemon=True)

    def end():
        stop()
        thread.join()

    atexit.register(end)
    thread.start()
    return thread
