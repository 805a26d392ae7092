"""`Pipe`: a process that learns, at the other end of two pipes: how it is started, sent frames, listened to and ended."""

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
from hf_osd.remote.transport import LONGEST_ANSWER, OnFrame
from hf_osd.system.threads import start_thread

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd.feedback.buffer import FeedbackBuffer
    from hf_osd.feedback.feedback import Feedback

logger = logging.getLogger(__name__)

# Seconds that a process is given to end by itself.
PATIENCE = 10.0
# Seconds without a sign of life, before it has begun and after, in which somebody waits for an answer.
_BEGINNING, _SILENCE = 300.0, 20.0


class Pipe:
    """A [`hf_osd.remote.transport.Connection`] to a process that this starts, with a thread that writes to it and one that reads. The process ends with
    this object; neither thread holds it.

    The process is in a session of its own: a terminal's Ctrl-C or hang-up comes to whoever serves, who may still want its state.

    Args:
        lay_out (`Callable[[Path], None]`): writes what the process begins with into a new folder.
        on_frame (`OnFrame`): called for each frame, in a thread.
        on_death (`Callable[[int], None]`): called with the exit status, in a thread, unless the process was to end.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(self, lay_out: Callable[[Path], None], on_frame: OnFrame, on_death: Callable[[int], None]):
        self.dead, ending = threading.Event(), threading.Event()  # dead once `on_death` has returned
        folder = Path(tempfile.mkdtemp(prefix="hf_osd-"))
        try:
            lay_out(folder)
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
            PATIENCE,
        )
        threading.Thread(target=_write, args=(process, self._out, ending), name="hf_osd learner", daemon=True).start()

    def send(
        self,
        kind: str,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
        feedback: Sequence[Feedback] = (),
    ):
        """Have a frame written, soon; requests are packed by the thread that writes."""
        self._out.put((kind, tensors, values, feedback))

    @property
    def waiting(self) -> int:
        """Frames that are not written yet."""
        return self._out.qsize()

    def has_room(self, buffer: FeedbackBuffer) -> bool:
        """Tell whether no more frames wait than `buffer` has requests."""
        return self.waiting <= len(buffer)

    def watch(self) -> Callable[[], bool]:
        """Begin to wait for an answer. The function tells whether one may still come; a process that shows no sign of life, or takes longer than anybody
        waits, it kills."""
        began = lived = time.monotonic()
        pulse = self._flags.pulse

        def may_answer() -> bool:
            nonlocal pulse, lived
            if self.dead.is_set():
                return False
            now = time.monotonic()
            if self._flags.pulse != pulse:
                pulse, lived = self._flags.pulse, now
            if now - lived <= (_SILENCE if pulse else _BEGINNING) and now - began <= LONGEST_ANSWER:
                return True
            logger.error("The process that learns (%d) does not answer, and is ended.", self.pid)
            self._process.kill()
            self.dead.wait(PATIENCE)
            return False

        return may_answer

    @property
    def has_begun(self) -> bool:
        """Whether the process may have learnt anything yet."""
        return self._flags.pulse != 0

    def note_busy(self, busy: bool):
        """Let the process see whether somebody is served. Takes no lock."""
        self._flags.busy = busy

    def close(self):
        """End the process, and wait for that."""
        self._end()
        self._reader.join(PATIENCE)
        if self._reader.is_alive():  # it does not read, stopped maybe
            self._process.kill()
            self._reader.join(PATIENCE)

    def forget(self):
        """Leave the process to the parent of this one, which was forked."""
        self._end.detach()


def _write(process: subprocess.Popen, out: queue.SimpleQueue, ending: threading.Event):
    frames = FrameWriter(process.stdin)
    try:
        while (item := out.get()) is not None and not ending.is_set():  # else what waits is not learnt any more
            kind, tensors, values, feedback = item
            frames.write(kind, pack(feedback) if feedback else tensors, values)
        frames.write(END)  # a process forked off this one may hold the pipe open
    except OSError:
        pass  # dead: whoever reads notices
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
    """Wait for a process that is to end, kill it if it does not, and return its exit status."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _stop(process: subprocess.Popen, flags: SharedFlags, out: queue.SimpleQueue, ending: threading.Event):
    """End the process, and wait for nothing: garbage collection calls this too, anywhere and under any lock."""
    ending.set()
    out.put(None)
    if not flags.pulse:  # it has not begun, which takes seconds, and has nothing to lose
        process.kill()
