"""Writes and reads frames, which carry tensors and plain values from one process to another as length-prefixed safetensors. Nothing that is read can run.

| from | kind | holds |
|---|---|---|
| the serving process | `feedback`, `replay` | requests: to be learnt; to be replayed alone |
| | `take` | weights that somebody else trained; with those under an adapter, whose number is `base` |
| | `flush`, `state`, `load` | a question, numbered by `asked`: learn all that is new; return your state; continue from this state |
| the learner | `weights` | weights that are to serve, `base` and figures |
| | `figures` | figures |
| | `answer` | the answer to the question `asked`, and figures |
| both | `end` | nothing; it is the last frame |
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import BinaryIO

from torch import Tensor

END = "end"
BASE = "base."  # prefix of the names of weights under an adapter
_MAGIC = b"hf_osd 1"  # begins each frame: text that something printed must not be read as a length
_LENGTH = 8  # bytes


class BadFrame(ValueError):
    """Is raised for bytes that are no frame, and for a frame that this end cannot use."""


class FrameWriter:
    """Writes frames to a stream. Thread-safe.

    Args:
        stream (`BinaryIO`): a pipe's or socket's end.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._lock = stream, threading.Lock()

    def write(self, kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None):
        """Write one frame: its kind, tensors of any device and dtype, and values that JSON can represent.

        Raises:
            OSError: if the other end is closed.
        """
        data = to_bytes(kind, tensors, values)
        with self._lock:
            self._stream.write(_MAGIC + len(data).to_bytes(_LENGTH, "little"))
            self._stream.write(data)
            self._stream.flush()


def to_bytes(kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None) -> bytes:
    """Return a frame's bytes, without its length."""
    from safetensors.torch import save

    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    return save(parts, metadata={"kind": kind, "values": json.dumps(values or {})})


def from_bytes(data: bytes) -> tuple[str, dict[str, Tensor], dict]:
    """Return kind, tensors and values of a frame that `to_bytes` made.

    Raises:
        BadFrame: if it is no frame.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        header = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header])["__metadata__"]
        return metadata["kind"], load(data), json.loads(metadata["values"])
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadFrame(f"What came is no frame of hf_osd ({error}); both ends must be of one version.") from error


def read_frame(stream: BinaryIO) -> tuple[str, dict[str, Tensor], dict] | None:
    """Return the next frame; `None` at the end of the stream, also in the middle of a frame, whose writer has then died.

    Raises:
        BadFrame: if what comes is no frame.
    """
    begin = stream.read(len(_MAGIC) + _LENGTH)
    if not begin.startswith(_MAGIC[: len(begin)]):
        raise BadFrame(f"What came is no frame of hf_osd: it begins with {begin!r}.")
    if len(begin) < len(_MAGIC) + _LENGTH:
        return None
    size = int.from_bytes(begin[len(_MAGIC) :], "little")
    data = stream.read(size)
    return from_bytes(data) if len(data) == size else None
