"""The process of `OnlineConfig(learn="process")`: a [`BackgroundLearner`] that reads feedback from a pipe and writes weights into another.

[`hf_osd.remote.pipe.Pipe`] starts it, as `python -m hf_osd.remote.process FOLDER PARENT`; FOLDER is a
draft folder. It ends when it is told to, when its input ends, and when the process PARENT is gone, however that went.
"""

# ruff: noqa: E402 (signals come before imports that take seconds)
from __future__ import annotations

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

# Seconds from a SIGTERM to the end: it may have come to all processes of a service, of which one wants the learner's state first.
_GRACE = 5.0


def _leave_later(number: int, frame):
    timer = threading.Timer(_GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


# Before imports that take seconds. Ctrl-C and the end of a terminal are for whoever serves to answer.
if __name__ == "__main__":
    for _name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.background import BackgroundLearner
from hf_osd.models.copies import check_weights
from hf_osd.remote.draft_folder import read_draft_folder
from hf_osd.remote.frames import END, FrameWriter, read_frame
from hf_osd.remote.service import LearnerService
from hf_osd.remote.shared_flags import SharedFlags

# Below whoever serves, where they share a CPU: enough to be let in between, not to be in the way.
_NICENESS = 10
# Where memory is short, this process is to go before the one that serves: of 1000.
_OOM_SCORE = 500
# Seconds between two signs of life, and from the end of whoever serves to the end of this one, wherever it is then.
_PULSE, _PATIENCE = 0.5, 5.0


class LearnerProcess:
    """Learns as the frames ask, until they end.

    Args:
        folder (`Path`): a draft folder, with the flags.
        frames (`FrameWriter`): where weights, figures and answers go.
    """

    def __init__(self, folder: Path, frames: FrameWriter):
        begin, flags = read_draft_folder(folder), SharedFlags(folder)
        self._frames = frames
        self._served = {name: p for name, p in begin.draft.named_parameters() if name in begin.trainable}
        self.learner = BackgroundLearner(
            begin.draft,
            begin.trainable,
            FeedbackBuffer(begin.config.buffer_bytes, begin.config.buffer_age),
            begin.config,
            serve=self._serve,
            busy=lambda: flags.busy,
            after_update=lambda: self._send("figures"),
            worked=time.process_time,  # of a core; at a low priority it may stretch over much more time than that
        )
        self.learner.prepare()
        self.service = LearnerService(self.learner, flush=self.learner.update)

    def run(self, stream: BinaryIO):
        """Handle frames until there are no more."""
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
    """The pulse, from when frames are read and for as long as whoever started this process is there. That its input ends is not enough: processes that were
    forked off there hold the other end too."""
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
    """Run the process; the exit status."""
    folder = Path(argv[1])
    begun = threading.Event()
    threading.Thread(target=_live, args=(int(argv[2]), folder, SharedFlags(folder), begun), daemon=True).start()
    frames = FrameWriter(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # whoever prints must not print into a frame
    with suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    with suppress(OSError):  # no Linux
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    torch.set_num_threads(1)
    disable_progress_bar()
    process = LearnerProcess(folder, frames)
    begun.set()
    shutil.rmtree(folder, ignore_errors=True)  # it is all here; and whoever serves may not live to do it
    with suppress(OSError):  # nobody reads any more: the other process has ended
        process.run(sys.stdin.buffer)
    process.learner.close()
    return 0


if __name__ == "__main__":
    _status = main(sys.argv)
    sys.stderr.flush()
    os._exit(_status)  # somebody waits, and an interpreter with torch in it takes its time to end
