"""`Worker`: one process that learns, as whoever serves holds it: how it begins, what is said to it, and how it ends. When to have one, and what to tell it,
is [`hf_osd.remote.learner.RemoteLearner`]'s."""

from __future__ import annotations

import functools
import json
import logging
import mmap
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import LAUNCH_VARIABLES
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.trace import pack
from hf_osd.remote.frames import ADAPTER, BEGIN, BUSY, DRAFT, END, FrameWriter, read_frame
from hf_osd.system.threads import start_thread

if TYPE_CHECKING:
    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# Seconds that a process is given to end by itself.
PATIENCE = 10.0
# Seconds without a sign of life, before it has begun and after, in which somebody waits for an answer; and between two looks for one.
_BEGINNING, _SILENCE, _LOOK = 300.0, 20.0, 0.5
# Seconds that anybody waits for an answer.
_ANSWER = 3600.0


class Worker:
    """A process, with a thread that writes to it and one that reads. Its owner is held weakly, or a forgotten one would never end.

    It is in a session of its own: a terminal's Ctrl-C or hang-up comes to whoever serves, who may still want its state.

    Args:
        serving (`HotSwapDraft`): the draft to begin with.
        config (`OnlineConfig`): of the learner.
        came (`WeakMethod`): given kind, tensors and values of each frame, in a thread.
        died (`WeakMethod`): given the exit status, in a thread, if it has not been told to end.
        base (`int`): how often the weights under an adapter were others.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(
        self,
        serving: HotSwapDraft,
        config: OnlineConfig,
        came: weakref.WeakMethod,
        died: weakref.WeakMethod,
        base: int = 0,
    ):
        self.dead, ending = threading.Event(), threading.Event()
        folder = Path(tempfile.mkdtemp(prefix="hf_osd-"))
        try:
            lay_out(folder, serving, config, base)
            with (folder / BUSY).open("r+b") as file:
                self._shared = mmap.mmap(file.fileno(), 2)
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
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._asking, self._asked = threading.Lock(), 0
        stop = functools.partial(_stop, process, self._shared, self._out, ending)
        self._end = weakref.finalize(self, stop)
        self.pid = process.pid
        # The other process would see the end of this one, but maybe in the middle of an update.
        self._reader = start_thread(
            _read,
            (process, folder, self._answers, self.dead, ending, came, died),
            stop,
            process.kill,
            PATIENCE,
        )
        threading.Thread(target=_write, args=(process, self._out, ending), name="hf_osd learner", daemon=True).start()

    def send(
        self,
        kind: str,
        feedback: list[Feedback] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
    ):
        """Have a frame written, soon."""
        self._out.put((kind, feedback, tensors, values))

    @property
    def waiting(self) -> int:
        """Frames that are not written yet."""
        return self._out.qsize()

    def ask(self, kind: str, tensors: Mapping[str, Tensor] | None, values: dict | None) -> tuple[dict, dict] | None:
        """The answer to a frame; `None` if the process dies before it comes, or shows no sign of life, for which it is ended."""
        with self._asking:
            self._asked += 1
            self.send(kind, None, tensors, {**(values or {}), "asked": self._asked})
            while (answer := self._answer()) is not None:
                if answer[1]["asked"] == self._asked:  # else that of a call that was interrupted
                    return answer
            self._answers.put(None)  # for whoever asks next
            return None

    @property
    def has_begun(self) -> bool:
        """Whether it can have learnt anything yet."""
        return self._shared[1] != 0

    def note_busy(self, busy: bool):
        """Whether somebody is served, for the process to see. Takes no lock."""
        self._shared[0] = busy

    def end(self):
        """End the process, and wait for that."""
        self._end()
        self._reader.join(PATIENCE)
        if self._reader.is_alive():  # it does not read, stopped maybe
            self._process.kill()
            self._reader.join(PATIENCE)

    def forget(self):
        """Let it be another process's, off which this one was forked."""
        self._end.detach()

    def _answer(self) -> tuple[dict, dict] | None:
        began = lived = time.monotonic()
        pulse = self._shared[1]
        while True:
            with suppress(queue.Empty):
                return self._answers.get(timeout=_LOOK)
            now = time.monotonic()
            if self._shared[1] != pulse:
                pulse, lived = self._shared[1], now
            if now - lived > (_SILENCE if pulse else _BEGINNING) or now - began > _ANSWER:
                logger.error("The process that learns (%d) does not answer, and is ended.", self.pid)
                self._process.kill()
                with suppress(queue.Empty):
                    return self._answers.get(timeout=PATIENCE)
                return None


def lay_out(folder: Path, serving: HotSwapDraft, config: OnlineConfig, base: int = 0):
    """Write what a process needs to begin: the draft that serves, or the one without its adapter, and the adapter's weights."""
    from safetensors.torch import save_file, save_model

    leased = serving.lease()
    try:
        draft, weights = serving.for_learner()
        draft.config.save_pretrained(folder / DRAFT)
        save_model(draft, str(folder / DRAFT / "model.safetensors"), metadata={"format": "pt"})
    finally:
        serving.release(leased)
    adapter = None
    if serving.adapter is not None:
        adapter = {"rank": serving.adapter.rank, "modules": serving.adapter.modules}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / ADAPTER)
    begin = {
        "class": type(draft).__name__,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "device": config.learner_device or str(draft.device),
        "trainable": sorted(serving.trainable),
        "adapter": adapter,
        "base": base,
        "config": config.to_dict(),
    }
    (folder / BEGIN).write_text(json.dumps(begin), encoding="utf-8")
    (folder / BUSY).write_bytes(bytes(2))


def _write(process: subprocess.Popen, out: queue.SimpleQueue, ending: threading.Event):
    frames = FrameWriter(process.stdin)
    try:
        while (item := out.get()) is not None and not ending.is_set():  # else what waits is not learnt any more
            kind, feedback, tensors, values = item
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
    answers: queue.SimpleQueue,
    dead: threading.Event,
    ending: threading.Event,
    came: weakref.WeakMethod,
    died: weakref.WeakMethod,
):
    try:
        while (frame := read_frame(process.stdout)) is not None:
            take = came()
            if take is not None:
                try:
                    take(*frame)
                except Exception:
                    logger.exception("What the learning process sent cannot serve; the serving draft is as it was.")
            if frame[0] == "answer":
                answers.put(frame[1:])
            del take
    except Exception:  # whatever is wrong with it
        logger.exception("The learning process cannot be understood, and is ended.")
        process.kill()
    status = _wait_for(process)
    process.stdout.close()
    shutil.rmtree(folder, ignore_errors=True)
    tell = died()
    if tell is not None and not ending.is_set():
        tell(status)
    dead.set()
    answers.put(None)  # for whoever waits


def _wait_for(process: subprocess.Popen) -> int:
    """The exit status of a process that is to end, and is made to if it does not."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _stop(process: subprocess.Popen, shared: mmap.mmap, out: queue.SimpleQueue, ending: threading.Event):
    """Also called by garbage collection, which comes anywhere, under any lock: it waits for nothing."""
    ending.set()
    out.put(None)
    if not shared[1]:  # it has not begun, which takes seconds, and has nothing to lose
        process.kill()
