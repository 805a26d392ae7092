"""`ResumableAssistant`: what a restart needs beyond the draft: the learner, the statistics, and how far its caller has come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hf_osd.metrics.stats import Stats
from hf_osd.system.files import new_state, newest_state, states
from hf_osd.system.strict_json import dumps, loads

_LEARNER, _VALUES = "learner.safetensors", "state.json"
_BUFFER = "buffer.safetensors"
_VERSION = 3  # 1 was files beside each other, without statistics; 2 had requests held back


class ResumableAssistant:
    """The part of [`OnlineAssistant`] that stops and goes on."""

    closed = False

    def save_state(self, directory: str | os.PathLike, with_buffer: bool = False, progress: Any = None):
        """Write what a restart needs beyond the draft: the learner's float32 weights, their average and its optimizer, and the statistics.

        It becomes the newest state in `directory` at once, so that a process that is killed resumes from this one or from the one before, which
        stays beside it (see [`hf_osd.system.files.new_state`]). Left out, and begun anew by a restart: the suffix cache, what was measured to choose γ
        by, and the rows of a draft head that follow traffic. Of an assistant that does not learn (`learn="off"`, or no room to) it is statistics and
        `progress`.

        Args:
            directory: where the states lie.
            with_buffer: also write the feedback, which holds the prompts as token ids, readable by their owner alone. Without it, states that hold it do
                not stay.
            progress: what `load_state` is to give back, as JSON has it: the position in a stream, say.

        Raises:
            OSError: if it cannot be written; the older states are then unchanged.
            ValueError: if the assistant is closed.
        """
        from safetensors.torch import save_file

        self._needs_open("save")
        self.collect()
        tensors, values = self.learner.state() if self.learner is not None else ({}, None)
        with self._lock:
            stats = self._stats.state()
        values = {"version": _VERSION, "learner": values, "stats": stats, "progress": progress}
        if self.adapter is not None:
            values["adapter"] = {"lora": self.adapter.rank, "base": self.adapter.base_fingerprint()}
        # An older state with prompts, which nobody asks to keep any more, does not stay beside this one.
        asked = any((folder / _BUFFER).exists() for folder in states(directory))
        with new_state(directory, keep=1 if asked and not with_buffer else 2) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _LEARNER)
            (folder / _VALUES).write_text(dumps(values, exact=True), encoding="utf-8")
            if with_buffer:
                self.buffer.save(folder / _BUFFER)

    def load_state(self, directory: str | os.PathLike) -> Any:
        """Go on from `save_state`: learner and statistics, and with them the serving draft, are as they were. Returns its `progress`.

        A state that is not as it was written is passed over for the one before it, with a warning.

        Raises:
            OSError: if there is no state in `directory`.
            ValueError: if none is whole, or it is that of another draft, adapter or version, or of one that learnt where this one does not, or the other
                way round.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._needs_open("load")
        folder = newest_state(directory)
        values = _values(folder)
        self._check_learns(values, folder)
        self._check_adapter(values.get("adapter"), folder)
        try:
            stats = Stats.of_state(values["stats"])
            if self.learner is not None:
                self.learner.load_state(load_file(folder / _LEARNER), values["learner"])
                self.learner.serve()
            if (folder / _BUFFER).is_file():
                self.buffer.restore(folder / _BUFFER)
                self.seen_texts.replace([request.tokens for request in self.buffer.requests()])
        except (SafetensorError, json.JSONDecodeError, LookupError, TypeError) as error:
            raise ValueError(
                f"The state in {folder} is of another version ({error!r}); delete {directory} to start afresh."
            ) from error
        with self._lock:
            self._stats = stats
        return values["progress"]

    def _needs_open(self, what: str):
        if self.closed:
            raise ValueError(f"This assistant is closed, so there is no state to {what}; do so before it is.")

    def _check_learns(self, values: dict, folder: Path):
        """See that both learn, or neither."""
        learnt, learns = values.get("learner", values) is not None, self.learner is not None
        if learnt and not learns:
            raise ValueError(
                f"The state in {folder} is that of an assistant that learns, and this one does not; make it so that it does (not with learn='off')."
            )
        if learns and not learnt:
            raise ValueError(
                f"The state in {folder} is that of an assistant that did not learn, and this one does; make it with learn='off', or start anew."
            )

    def _check_adapter(self, saved: dict | None, folder: Path):
        """See that what learns here is what learnt there: all weights, or an adapter of the same rank over the same weights."""
        here = self.adapter
        then, now = (saved or {}).get("lora"), here.rank if here is not None else None
        if then != now:
            raise ValueError(
                f"The learner's state in {folder} is that of another draft: there {_what_learns(then)} learnt, and here {_what_learns(now)} does. Make the "
                f"assistant with {_as_asked(then)} to go on from it."
            )
        if here is not None and saved["base"] != here.base_fingerprint():
            raise ValueError(
                f"The learner's state in {folder} is that of another draft: its LoRA adapter (lora={then}) was learnt over other weights. Make the assistant "
                "with the draft that it began with, or was refreshed to; a checkpoint of save_pretrained has the adapter in its weights already."
            )


def _what_learns(lora: int | None) -> str:
    return "all weights" if lora is None else f"a LoRA adapter of rank {lora}"


def _as_asked(lora: int | None) -> str:
    return "adapter='off'" if lora is None else f"adapter='lora', lora={lora}"


def saved_progress(directory: str | os.PathLike) -> Any:
    """The `progress` of the state that `load_state` would go on from, without an assistant.

    Raises:
        OSError, ValueError: as `load_state`.
    """
    return _values(newest_state(directory))["progress"]


def _values(folder: Path) -> dict:
    values = loads((folder / _VALUES).read_bytes()) if (folder / _VALUES).is_file() else {}
    if values.get("version") != _VERSION:
        raise ValueError(
            f"The state in {folder} is of another version of hf_osd ({values.get('version')} in place of {_VERSION}); delete {folder.parent} "
            "to start afresh."
        )
    return values
