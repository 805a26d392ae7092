"""`ResumableAssistant` saves and loads what a restart needs beyond the draft: the learner, the statistics, and the caller's progress."""

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
_VERSION = 3  # 1 had files beside each other and no statistics; 2 had held-out requests


class ResumableAssistant:
    """Gives [`OnlineAssistant`] its methods to stop and resume."""

    closed = False

    def save_state(self, directory: str | os.PathLike, with_buffer: bool = False, progress: Any = None):
        """Write what a restart needs beyond the draft: the learner's float32 weights, their average, its optimizer, and the statistics.

        The files become the newest state in `directory` at once, so that a killed process resumes from this state or from the one before, which stays
        beside it (see [`hf_osd.system.files.new_state`]). Not saved, and started anew after a restart: the suffix cache, the measurements by which γ is
        chosen, and the draft vocabulary. An assistant that does not learn (`learn="off"`, or no memory for it) saves its statistics and `progress`.

        Args:
            directory: the folder of the states.
            with_buffer: also write the feedback. It holds prompts as token ids; only the file's owner may read it. With `False`, older states that hold
                feedback are deleted.
            progress: a JSON value that `load_state` will return, such as the position in a stream.

        Raises:
            OSError: if the state cannot be written; the older states are then unchanged.
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
        # An older state with prompts goes if this one is saved without.
        asked = any((folder / _BUFFER).exists() for folder in states(directory))
        with new_state(directory, keep=1 if asked and not with_buffer else 2) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _LEARNER)
            (folder / _VALUES).write_text(dumps(values, exact=True), encoding="utf-8")
            if with_buffer:
                self.buffer.save(folder / _BUFFER)

    def load_state(self, directory: str | os.PathLike) -> Any:
        """Resume from `save_state`: restore learner, statistics and, with them, the weights that serve. Returns the saved `progress`.

        A damaged state is passed over for the one before it, with a warning.

        Raises:
            OSError: if there is no state in `directory`.
            ValueError: if all states are damaged; if the state belongs to another draft, adapter or version; if only one of the two assistants learns; or if
                this assistant is closed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        self._needs_open("load")
        folder = newest_state(directory)
        values = _values(folder)
        self._check_learns(values, folder)
        self._check_adapter(values.get("adapter"), folder)
        try:
            stats = Stats.from_state(values["stats"])
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
        self.count_from(stats)
        return values["progress"]

    def count_from(self, stats: Stats):
        """Go on counting from earlier statistics."""
        with self._lock:
            self._stats = stats
            if self._static is not None:  # they count together
                self._static._stats = stats

    def _needs_open(self, what: str):
        if self.closed:
            raise ValueError(f"This assistant is closed, so there is no state to {what}; {what} before you close it.")

    def _check_learns(self, values: dict, folder: Path):
        """Raise `ValueError` unless both assistants learn, or neither."""
        learnt, learns = values.get("learner", values) is not None, self.learner is not None
        if learnt and not learns:
            raise ValueError(
                f"The state in {folder} belongs to an assistant that learns, and this one does not; make it without learn='off', and with memory to learn in."
            )
        if learns and not learnt:
            raise ValueError(
                f"The state in {folder} belongs to an assistant that did not learn, and this one does; make it with learn='off', or start anew."
            )

    def _check_adapter(self, saved: dict | None, folder: Path):
        """Raise `ValueError` unless the same weights learn as in the saved state: all, or an adapter of the same rank over the same base."""
        here = self.adapter
        then, now = (saved or {}).get("lora"), here.rank if here is not None else None
        if then != now:
            raise ValueError(
                f"The learner's state in {folder} belongs to another draft: there {_what_learns(then)} learnt, and here {_what_learns(now)} does. Make the "
                f"assistant with {_as_asked(then)} to resume from it."
            )
        if here is not None and saved["base"] != here.base_fingerprint():
            raise ValueError(
                f"The learner's state in {folder} belongs to another draft: its LoRA adapter (lora={then}) was learnt over other weights. Make the assistant "
                "with the draft that it started from, or was last refreshed with; in a checkpoint of save_pretrained the adapter is merged already."
            )


def _what_learns(lora: int | None) -> str:
    return "all weights" if lora is None else f"a LoRA adapter of rank {lora}"


def _as_asked(lora: int | None) -> str:
    return "adapter='off'" if lora is None else f"adapter='lora', lora={lora}"


def saved_progress(directory: str | os.PathLike) -> Any:
    """Return the `progress` of the state from which `load_state` would resume; no assistant is needed.

    Raises:
        OSError: if there is no state in `directory`.
        ValueError: if all states are damaged, or the newest is of another version.
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
