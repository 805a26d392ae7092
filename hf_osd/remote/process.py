"""The process of `OnlineConfig(learn="process")`: a [`BackgroundLearner`] that reads feedback from a pipe and writes weights into another.

[`hf_osd.remote.worker.Worker`] starts it, as `python -m hf_osd.remote.process FOLDER PARENT`; the folder holds the draft and what else it needs to begin. It
ends when it is told to, when its input ends, and when the process PARENT is gone, however that went.
"""

# ruff: noqa: E402 (signals come before imports that take seconds)
from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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

from hf_osd.config import OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.trace import unpack
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.metrics.intervals import figures_to_json
from hf_osd.models.copies import check_weights
from hf_osd.models.lora import Adapter
from hf_osd.remote.frames import ADAPTER, BASE, BEGIN, BUSY, DRAFT, END, FrameWriter, read_frame

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Below whoever serves, where they share a CPU: enough to be let in between, not to be in the way.
_NICENESS = 10
# Where memory is short, this process is to go before the one that serves: of 1000.
_OOM_SCORE = 500
# Seconds between two signs of life, and from the end of whoever serves to the end of this one, wherever it is then.
_PULSE, _PATIENCE = 0.5, 5.0


class LearnerProcess:
    """Does what the frames say, until they end.

    Args:
        folder (`Path`): holds the draft, `begin.json` and `busy`: a byte that is 1 while somebody is served, and one that is this process's pulse.
        frames (`FrameWriter`): where weights, figures and answers go.
    """

    def __init__(self, folder: Path, frames: FrameWriter):
        import transformers

        begin = json.loads((folder / BEGIN).read_text(encoding="utf-8"))
        config = OnlineConfig.from_dict(begin["config"])
        draft = getattr(transformers, begin["class"]).from_pretrained(
            folder / DRAFT, dtype=getattr(torch, begin["dtype"]), local_files_only=True
        )
        draft.to(begin["device"])
        self._base = begin["base"]
        if begin["adapter"] is not None:
            draft = _with_adapter(draft, folder / ADAPTER, **begin["adapter"])
        self._busy = _shared(folder)
        self._frames = frames
        self._served = {name: p for name, p in draft.named_parameters() if name in begin["trainable"]}
        self._buffer = FeedbackBuffer(config.buffer_bytes, config.buffer_age)
        student = make_student(draft, set(begin["trainable"]), config)
        self.learner = BackgroundLearner(
            Learner(student, self._buffer, self._serve, alone=False),
            busy=lambda: self._busy[0] == 1,
            after_update=lambda: self._send("figures"),
            clock=time.process_time,  # of a core; at a low priority it may stretch over much more time than that
        )
        self.learner.prepare()

    def run(self, stream: BinaryIO):
        """Read frames until there are no more."""
        while (frame := read_frame(stream)) is not None:
            kind, tensors, values = frame
            if kind == END:
                return
            if kind == "feedback":
                for feedback in unpack(tensors):
                    self.learner.add(feedback)
            elif kind == "replay":
                requests = unpack(tensors)
                for feedback in requests:
                    self._buffer.add(feedback)
                self._buffer.mark_seen(requests)
            elif kind == "take":
                self._take(tensors, values)
            elif kind in ("flush", "state", "load"):
                answer, said = getattr(self, f"_{kind}")(tensors, values)
                self._send("answer", answer, {**said, "asked": values["asked"]})
            else:
                raise ValueError(f"A frame of kind {kind!r}: both processes must run one version of hf_osd.")

    def _take(self, tensors: dict[str, Tensor], values: dict):
        base = {name.removeprefix(BASE): tensor for name, tensor in tensors.items() if name.startswith(BASE)}
        self.learner.load_weights(tensors, base or None)
        self._base = values["base"]

    def _flush(self, tensors: dict[str, Tensor], values: dict) -> tuple[dict, dict]:
        return {}, {"refreshed": self.learner.update(wait=True)}

    def _state(self, tensors: dict[str, Tensor], values: dict) -> tuple[dict, dict]:
        tensors, state = self.learner.state()
        return tensors, {"state": state}

    def _load(self, tensors: dict[str, Tensor], values: dict) -> tuple[dict, dict]:
        try:
            self.learner.load_state(tensors, values["state"])
        except ValueError as error:
            return {}, {"refused": str(error)}
        self.learner.serve()
        return {}, {}

    def _serve(self, weights: Mapping[str, Tensor]):
        check_weights(weights, self._served)
        self._send("weights", {name: tensor.to(self._served[name].dtype) for name, tensor in weights.items()})

    def _send(self, kind: str, tensors: dict | None = None, values: dict | None = None):
        figures = figures_to_json(self.learner.metrics())
        self._frames.write(kind, tensors, {**(values or {}), "figures": figures, "base": self._base})


def _with_adapter(draft: PreTrainedModel, weights: Path, rank: int, modules: list[str]) -> PreTrainedModel:
    """The draft with the adapter that whoever serves has on it, as it has been learnt so far."""
    from safetensors.torch import load_file

    return Adapter(draft, rank, trainable={f"{module}.weight" for module in modules}).with_weights(load_file(weights))


def _shared(folder: Path) -> mmap.mmap:
    with (folder / BUSY).open("r+b") as file:
        return mmap.mmap(file.fileno(), 2)


def _live(parent: int, folder: Path, shared: mmap.mmap, begun: threading.Event):
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
            shared[1] = shared[1] % 255 + 1
            time.sleep(_PULSE)
    time.sleep(_PATIENCE)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main(argv: list[str]) -> int:
    """Run the process; the exit status."""
    folder = Path(argv[1])
    begun = threading.Event()
    threading.Thread(target=_live, args=(int(argv[2]), folder, _shared(folder), begun), daemon=True).start()
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
