"""`Pipe`: starts a learning process, exchanges frames with it over its standard input and output, and ends it."""

from __future__ import annotations

import functools
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hf_osd.distill.ranks import LAUNCH_VARIABLES
from hf_osd.feedback.trace import pack
from hf_osd.remote.frames import END, FrameWriter, read_frame
from hf_osd.remote.shared_flags import SharedFlags
from hf_osd.remote.transport import ANSWER_TIMEOUT, OnFrame
from hf_osd.system.threads import start_thread

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# Seconds that a process is given to end by itself.
EXIT_TIMEOUT = 10.0
# Seconds without a sign of life, before the process has begun and after, before whoever waits for an answer kills it.
_START_TIMEOUT, _PULSE_TIMEOUT = 300.0, 20.0


class Pipe:
    """Starts a process and connects to it: a [`hf_osd.remote.transport.Connection`], with a thread that writes and one that reads. The process ends when
    this object does, which neither thread keeps alive.

    The process has its own session: a terminal's Ctrl-C or hang-up reaches the serving process alone, which may still want the learner's state.

    Args:
        write_folder (`Callable[[Path], None]`): writes the files that the process begins with into a new folder.
        on_frame (`OnFrame`): called for each frame, in a thread.
        on_death (`Callable[[int], None]`): called with the exit status, in a thread, unless the process was told to end.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self, write_folder: Callable[[Path], None], on_frame: OnFrame, on_death: Callable[[int], None]):
        self.dead, ending = threading.Event(), threading.Event()  # dead once `on_death` has returned
        folder = Path(tempfile.mkdtemp(prefix="hf_osd-"))
        try:
            write_folder(folder)
            self._flags = SharedFlags.create(folder)
            # Under a launcher it would take itself for one of the job's processes.
            alone = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "hf_osd.remote.process", str(folder), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**alone, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows the same
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        stop = functools.partial(_stop, process, self._flags, self._out, ending)
        self._end = weakref.finalize(self, stop)
        self.pid = process.pid
        # The other process would see the end of this one, but maybe in the middle of an update.
        self._reader = start_thread(
            _read,
            (process, folder, self.dead, ending, on_frame, on_death),
            stop,
            process.kill,
            EXIT_TIMEOUT,
        )
        threading.Thread(target=_write, args=(process, self._out, ending), name="hf_osd learner", daemon=True).start()

    def send(
        self,
        kind: str,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
        feedback: Sequence[Feedback] = (),
    ):
        """Queue a frame; the thread that writes packs its requests."""
        self._out.put((kind, tensors, values, feedback))

    @property
    def waiting(self) -> int:
        """Number of frames that are not written yet."""
        return self._out.qsize()

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Return whether at most as many frames wait as `buffer` has requests."""
        return self.waiting <= len(buffer)

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function returned says whether one may still come; it kills a process that shows no sign of life, or that has
        not answered within `ANSWER_TIMEOUT`."""
        began = lived = time.monotonic()
        pulse = self._flags.pulse

        def may_answer() -> bool:
            nonlocal pulse, lived
            if self.dead.is_set():
                return False
            now = time.monotonic()
            if self._flags.pulse != pulse:
                pulse, lived = self._flags.pulse, now
            if now - lived <= (_PULSE_TIMEOUT if pulse else _START_TIMEOUT) and now - began <= ANSWER_TIMEOUT:
                return True
            logger.error("The process that learns (%d) does not answer, and is ended.", self.pid)
            self._process.kill()
            self.dead.wait(EXIT_TIMEOUT)
            return False

        return may_answer

    @property
    def has_begun(self) -> bool:
        """Whether the process has begun, and may have learnt."""
        return self._flags.pulse != 0

    def note_busy(self, busy: bool):
        """Show the process whether a call runs. Takes no lock."""
        self._flags.busy = busy

    def close(self):
        """End the process and wait until it has ended."""
        self._end()
        self._reader.join(EXIT_TIMEOUT)
        if self._reader.is_alive():  # it does not read, stopped maybe
            self._process.kill()
            self._reader.join(EXIT_TIMEOUT)

    def forget(self):
        """Never end the process: it belongs to the parent that this process was forked off."""
        self._end.detach()


def _write(process: subprocess.Popen, out: queue.SimpleQueue, ending: threading.Event):
    frames = FrameWriter(process.stdin)
    try:
        while (item := out.get()) is not None and not ending.is_set():  # at the end what waits is not learnt
            kind, tensors, values, feedback = item
            frames.write(kind, pack(feedback) if feedback else tensors, values)
        frames.write(END)  # a process forked off this one may hold the pipe open
    except OSError:
        pass  # dead, which the reading thread notices
    except Exception:
        logger.exception("What is to be learnt could not be sent to the process that learns, which is ended.")
    with suppress(OSError):
        process.stdin.close()
    _wait_for(process)


def _read(
    process: subprocess.Popen,
    folder: Path,
    dead: threading.Event,
    ending: threading.Event,
    on_frame: OnFrame,
    on_death: Callable[[int], None],
):
    try:
        while (frame := read_frame(process.stdout)) is not None:
            try:
                on_frame(*frame)
            except Exception:
                logger.exception("What the learning process sent cannot serve; the serving draft is as it was.")
    except Exception:  # whatever is wrong with it
        logger.exception("The learning process cannot be understood, and is ended.")
        process.kill()
    status = _wait_for(process)
    process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if not ending.is_set():
            on_death(status)
    finally:
        dead.set()


def _wait_for(process: subprocess.Popen) -> int:
    """Wait until a process ends, kill it if it does not, and return its exit status."""
    try:
        return process.wait(EXIT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _stop(process: subprocess.Popen, flags: SharedFlags, out: queue.SimpleQueue, ending: threading.Event):
    """Tell the process to end, without waiting: garbage collection calls this too, anywhere and under any lock."""
    ending.set()
    out.put(None)
    if not flags.pulse:  # it has not begun, which takes seconds, and has nothing to lose
        process.kill()
