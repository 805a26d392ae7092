"""`RemoteLearner`: a learner in a process of its own, as whoever serves sees it. If the process dies, the serving draft stays and another one is
started."""

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
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hf_osd.buffer import FeedbackBuffer
from hf_osd.config import OnlineConfig
from hf_osd.distributed import LAUNCH_VARIABLES
from hf_osd.feedback import Feedback
from hf_osd.intervals import figures_from_json
from hf_osd.learner_process import ADAPTER, BASE, BEGIN, BUSY, DRAFT
from hf_osd.threads import start_thread
from hf_osd.trace import pack
from hf_osd.wire import FrameWriter, read_frame

if TYPE_CHECKING:
    from hf_osd.serving import ServingDraft

logger = logging.getLogger(__name__)

# Seconds that a process is given to end by itself.
_PATIENCE = 10.0
# After n deaths in a row, the next process waits for 2ⁿ updates' requests, at most for this many.
_LONGEST_WAIT = 64
# What is summed up over processes.
_COUNTS = (
    "updates",
    "failed_updates",
    "rejected_updates",
    "accepted_updates",
    "learned_tokens",
    "learning_seconds",
    "learner_restarts",
)


class RemoteLearner:
    """Sends feedback to a process that learns, and serves the weights that come back.

    The process has a gate and a buffer of its own; the buffer here holds the same feedback, for a process that has to be started anew. What the dead one
    knew of its candidate is lost.

    Args:
        serving (`ServingDraft`): the draft to start from, and to refresh.
        buffer (`FeedbackBuffer`), config (`OnlineConfig`): as [`hf_osd.learner.Learner`] takes them.

    Raises:
        ValueError: if the draft is not a class of transformers, or serves with an adapter: another process could not load it.
    """

    def __init__(self, serving: ServingDraft, buffer: FeedbackBuffer, config: OnlineConfig):
        draft = serving.active
        if not type(draft).__module__.startswith("transformers."):
            raise ValueError(
                f"learn='process' loads the draft in another process, and {type(draft).__name__} is no class of transformers. Pass learn='background', which "
                "learns in a thread."
            )
        if getattr(draft, "peft_config", None):
            raise ValueError(
                "learn='process' loads the draft in another process as a plain checkpoint, and this one serves with an adapter that is not in its weights. Pass "
                "learn='background', which learns in a thread."
            )
        self._serving, self.buffer, self.config = serving, buffer, config
        self.restarts = 0
        self._base = 0  # how often the weights under an adapter were others
        self._figures: dict = {}  # of this process
        self._before = dict.fromkeys(_COUNTS, 0)  # of those that have died
        self._worker: _Worker | None = None
        self._deaths = self._offered = 0  # in a row; since the last death
        self._lock = threading.Lock()
        self._closed = False

    # What an assistant asks of every learner.

    def offer(self, feedback: Feedback):
        """Send a request to the process."""
        with self._lock:
            self._offered += 1
            worker = self._running()
        self.buffer.add(feedback)
        self.buffer.mark_seen([feedback])
        if worker is not None:
            worker.send("feedback", [feedback])

    def due(self) -> bool:
        """Never: the process sees to that."""
        return False

    def update(self, wait: bool = True) -> bool:
        """With `wait`, have the process learn from all that is new and wait for it. `True` if the serving draft was refreshed; `False` also if
        the process died over it."""
        if not wait:
            return False
        try:
            _, values = self._ask("flush")
        except RuntimeError as error:
            logger.error("%s", error)
            return False
        return values["refreshed"]

    def note_served(self, seconds: float):
        """Nothing to the process, which learns beside serving."""

    def figures(self) -> dict:
        counts = {name: before + self._figures.get(name, 0) for name, before in self._before.items()}
        counts["learner_restarts"] += self.restarts
        return self._figures | counts

    def trouble(self) -> str | None:
        """What the process says is wrong, if learning goes on and changes nothing."""
        return self._figures.get("trouble")

    def take(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Go on learning from weights that were trained elsewhere; with `base`, in an adapter over other weights of the plain draft, by its names."""
        with self._lock:
            worker = self._running()
            self._base += base is not None
        if worker is not None:
            # Copies: they are written some time later, and whoever trains them goes on.
            tensors = {name: weights[name].detach().clone() for name in self._serving.trainable}
            tensors |= {f"{BASE}{name}": tensor.detach().clone() for name, tensor in (base or {}).items()}
            worker.send("take", tensors=tensors, values={"base": self._base})

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """As [`hf_osd.learner.Learner.state`].

        Raises:
            RuntimeError: if the process dies over it.
        """
        tensors, values = self._ask("state")
        return tensors, values["state"]

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`; the serving draft with it.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
            RuntimeError: if the process dies over it.
        """
        _, answer = self._ask("load", tensors, {"state": values})
        if "refused" in answer:
            raise ValueError(answer["refused"])

    def serve(self):
        """Done by the process itself."""

    def note_busy(self, busy: bool):
        """Whether somebody is served, for the process to see. May be called anywhere, and takes no lock."""
        worker = self._worker
        if worker is not None:
            worker.note_busy(busy)

    def close(self):
        """End the process."""
        with self._lock:
            self._closed, worker = True, self._worker
        if worker is not None:
            worker.end()

    # The process.

    def _running(self) -> _Worker | None:
        """The process, started if it was not, or if it has died and enough requests have come since."""
        if self._closed:
            return None
        if self._worker is not None and not self._worker.dead.is_set():
            return self._worker
        if self._deaths:
            if self._offered < self._wait:
                return None
            self.restarts += 1
        self._worker = None
        try:
            self._worker = _Worker(
                self._serving, self.config, weakref.WeakMethod(self._came), weakref.WeakMethod(self._died), self._base
            )
        except Exception:  # the disk is full, say: no reason to break the user's call
            self._count_death()
            logger.exception(
                "The process that learns could not be started. The draft serves as it is; it is tried again after %d more requests.",
                self._wait,
            )
            return None
        if self._deaths and len(self.buffer):
            self._worker.send("replay", self.buffer.sample(len(self.buffer)))
        return self._worker

    @property
    def _wait(self) -> int:
        """Requests that must come after a death."""
        return self.config.update_interval * min(2**self._deaths, _LONGEST_WAIT)

    def _count_death(self):
        self._deaths, self._offered = self._deaths + 1, 0
        for name in _COUNTS:
            self._before[name] += self._figures.pop(name, 0)

    def _ask(
        self, kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None
    ) -> tuple[dict, dict]:
        with self._lock:
            worker = self._running()
        answer = None if worker is None else worker.ask(kind, tensors, values)
        if answer is None:
            raise RuntimeError(
                f"The process that learns is dead, so it cannot answer ({kind}). The draft goes on serving, and another process is started after more "
                "requests; what the dead one said is on stderr."
            )
        return answer

    def _came(self, kind: str, tensors: dict[str, Tensor], values: dict):
        """A frame of the process."""
        if values.get("figures") is not None:
            self._figures = figures_from_json(values["figures"])
        # An adapter that was learnt over the weights before is nothing to those of now.
        if kind == "weights" and values.get("base", self._base) == self._base:
            self._serving.refresh(tensors)
            self._deaths = 0

    def _died(self, status: int | None):
        with self._lock:
            self._count_death()
        logger.error(
            "The process that learns has died (exit status %s). The serving draft is as it was; another process is started after %d more requests.",
            status,
            self._wait,
        )


class _Worker:
    """One process, with a thread that writes to it and one that reads. Its owner is held weakly, or a forgotten one would never end."""

    def __init__(
        self,
        serving: ServingDraft,
        config: OnlineConfig,
        came: weakref.WeakMethod,
        died: weakref.WeakMethod,
        base: int = 0,
    ):
        self.dead, ending = threading.Event(), threading.Event()
        folder = Path(tempfile.mkdtemp(prefix="hf_osd-"))
        try:
            _lay_out(folder, serving, config, base)
            with (folder / BUSY).open("r+b") as file:
                self._busy = mmap.mmap(file.fileno(), 1)
            threads = str(config.learner_threads)
            # Under a launcher it would take itself for one of the job's processes.
            alone = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
            process = subprocess.Popen(
                [sys.executable, "-m", "hf_osd.learner_process", str(folder), threads],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**alone, "OMP_NUM_THREADS": threads},
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._asking, self._asked = threading.Lock(), 0
        self._end = weakref.finalize(self, _stop, self._out, ending)
        self.pid = process.pid
        # The other process would see the end of this one, but maybe in the middle of an update.
        self._reader = start_thread(
            _read,
            (process, folder, self._answers, self.dead, ending, came, died),
            functools.partial(_stop, self._out, ending),
        )
        threading.Thread(target=_write, args=(process, self._out), name="hf_osd learner", daemon=True).start()

    def send(
        self,
        kind: str,
        feedback: list[Feedback] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        values: dict | None = None,
    ):
        """Have a frame written, soon."""
        self._out.put((kind, feedback, tensors, values))

    def ask(self, kind: str, tensors: Mapping[str, Tensor] | None, values: dict | None) -> tuple[dict, dict] | None:
        """The answer to a frame; `None` if the process dies before it comes."""
        with self._asking:
            self._asked += 1
            self.send(kind, None, tensors, {**(values or {}), "asked": self._asked})
            while (answer := self._answers.get()) is not None:
                if answer[1]["asked"] == self._asked:  # else that of a call that was interrupted
                    return answer
            self._answers.put(None)  # for whoever asks next
            return None

    def note_busy(self, busy: bool):
        self._busy[0] = busy

    def end(self):
        """End the process, and wait for that."""
        self._end()
        self._reader.join()


def _lay_out(folder: Path, serving: ServingDraft, config: OnlineConfig, base: int = 0):
    """What the process needs to begin: the draft that serves, or the one without its adapter, and the adapter's weights."""
    from safetensors.torch import save_file, save_model

    leased = serving.lease()
    try:
        draft, weights = serving.begin()
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
    (folder / BUSY).write_bytes(b"\0")


def _write(process: subprocess.Popen, out: queue.SimpleQueue):
    frames = FrameWriter(process.stdin)
    try:
        while (item := out.get()) is not None:
            kind, feedback, tensors, values = item
            frames.write(kind, pack(feedback) if feedback else tensors, values)
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
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _stop(out: queue.SimpleQueue, ending: threading.Event):
    """Also called by garbage collection, which comes anywhere, under any lock: it waits for nothing."""
    ending.set()
    out.put(None)
