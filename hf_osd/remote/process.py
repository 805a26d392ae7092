"""Runs in the process of `OnlineConfig(learn="process")`: a [`BackgroundLearner`] reads feedback from a pipe and writes weights into another.

[`hf_osd.remote.pipe.Pipe`] starts it, as `python -m hf_osd.remote.process FOLDER PARENT`; FOLDER is a draft folder. It ends on an `end` frame, when its input
ends, and when the process PARENT is gone, however that ended.
"""

# ruff: noqa: E402 (signals come before imports that take seconds)
from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

# Seconds from a SIGTERM to the end: all processes of a service may have got it, and the serving one wants the learner's state first.
_GRACE = 5.0


def _leave_later(number: int, frame):
    timer = threading.Timer(_GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


# Before imports that take seconds. Ctrl-C and the end of a terminal are for the serving process to handle.
if __name__ == "__main__":
    for _name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)
    # What they make stays, and looking it over again and again takes a fifth of their time.
    gc.disable()

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.learning.memory import buffer_bytes
from hf_osd.models.copies import check_weights
from hf_osd.remote.draft_folder import read_draft_folder
from hf_osd.remote.frames import END, FrameWriter, read_frame
from hf_osd.remote.service import LearnerService
from hf_osd.remote.shared_flags import SharedFlags

# Below the serving process, where they share a CPU: enough to get a share, not to be in the way.
_NICENESS = 10
# Of 1000: where memory is short, the system is to kill this process before the serving one.
_OOM_SCORE = 500
# Seconds between two beats of the pulse, and from the end of the serving process to the end of this one, in the middle of whatever it does.
_PULSE, _PATIENCE = 0.5, 5.0


class LearnerProcess:
    """Learns from the frames of a stream, and writes weights, figures and answers.

    Args:
        folder (`Path`): a draft folder, with the file of [`SharedFlags`].
        frames (`FrameWriter`): writes to the serving process.
    """

    def __init__(self, folder: Path, frames: FrameWriter):
        begin, flags = read_draft_folder(folder), SharedFlags(folder)
        self._frames = frames
        self._served = {name: p for name, p in begin.draft.named_parameters() if name in begin.trainable}
        buffer = FeedbackBuffer(buffer_bytes(begin.draft, begin.config), begin.config.buffer_age)
        student = make_student(begin.draft, begin.trainable, begin.config)
        self.learner = BackgroundLearner(
            Learner(student, buffer, self._serve, alone=False),
            busy=lambda: flags.busy,
            after_update=lambda: self._send("figures"),
            clock=time.process_time,  # of a core; at a low priority it may stretch over much more time than that
        )
        self.learner.prepare()
        self.service = LearnerService(self.learner, flush=self.learner.update)

    def run(self, stream: BinaryIO):
        """Handle frames until the stream ends."""
        while (frame := read_frame(stream)) is not None and frame[0] != END:
            answer = self.service.handle(*frame)
            if answer is not None:
                self._send("answer", *answer)

    def _serve(self, weights: Mapping[str, Tensor]):
        check_weights(weights, self._served)
        self._send("weights", {name: tensor.to(self._served[name].dtype) for name, tensor in weights.items()})

    def _send(self, kind: str, tensors: dict | None = None, values: dict | None = None):
        self._frames.write(kind, tensors, {**(values or {}), **self.service.report()})


def _live(parent: int, folder: Path, flags: SharedFlags, begun: threading.Event):
    """Beat the pulse, from when frames are read until the parent is gone; then end this process. To wait for the end of its input is not enough:
    forks of the parent hold the other end too."""
    if os.name != "posix":  # where nobody else becomes the parent
        parent = os.getppid()
    elif os.getppid() != parent:
        with suppress(OSError):
            os.kill(parent, 0)  # if that raises it is gone already
            parent = os.getppid()  # a script that starts Python, say
    while os.getppid() == parent:
        if begun.wait(_PULSE):
            flags.beat()
            time.sleep(_PULSE)
    time.sleep(_PATIENCE)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(argv: list[str]) -> int:
    """Run the process. Returns the exit status."""
    folder = Path(argv[1])
    begun = threading.Event()
    threading.Thread(target=_live, args=(int(argv[2]), folder, SharedFlags(folder), begun), daemon=True).start()
    frames = FrameWriter(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # nothing must print into a frame
    with suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    with suppress(OSError):  # no Linux
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    torch.set_num_threads(1)
    disable_progress_bar()
    process = LearnerProcess(folder, frames)
    begun.set()
    shutil.rmtree(folder, ignore_errors=True)  # all of it is loaded; and the serving process may not live to remove it
    with suppress(OSError):  # the serving process has ended
        process.run(sys.stdin.buffer)
    process.learner.close()
    return 0


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    _status = main(sys.argv)
    sys.stderr.flush()
    os._exit(_status)  # somebody waits, and an interpreter with torch in it takes its time to end
