"""Frames: tensors and plain values from one process to another, as safetensors in length-prefixed pieces. Nothing that is read can run.

| kind | from whoever serves | holds |
|---|---|---|
| `feedback`, `replay` | | requests: to be learnt; to be replayed alone |
| `take` | | weights that were trained elsewhere, with those under an adapter, and the number of these |
| `flush`, `state`, `load` | | a question: learn all that is new; give your state; go on from this state |
| **kind** | **from the learner** | |
| `weights` | | what is to serve, and figures |
| `figures` | | figures alone |
| `answer` | | a question's answer, with its number (`asked`), and figures |
| `end` | from either | nothing: no frame follows |
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import BinaryIO

from torch import Tensor

END = "end"  # the last frame
BASE = "base."  # begins the names of what a frame has of the plain draft under an adapter
_MAGIC = b"hf_osd 1"  # each frame begins with it: what somebody else printed must not be read as a length
_LENGTH = 8  # bytes


class BadFrame(ValueError):
    """What came is no frame, or none that this end can use."""


class FrameWriter:
    """Writes frames to a stream. Thread-safe.

    Args:
        stream (`BinaryIO`): a pipe's or socket's end.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._lock = stream, threading.Lock()

    def write(self, kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None):
        """One frame: its kind, tensors of any device and dtype, and values as JSON has them.

        Raises:
            OSError: if nobody reads any more.
        """
        data = to_bytes(kind, tensors, values)
        with self._lock:
            self._stream.write(_MAGIC + len(data).to_bytes(_LENGTH, "little"))
            self._stream.write(data)
            self._stream.flush()


def to_bytes(kind: str, tensors: Mapping[str, Tensor] | None = None, values: dict | None = None) -> bytes:
    """A frame without its length."""
    from safetensors.torch import save

    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    return save(parts, metadata={"kind": kind, "values": json.dumps(values or {})})


def from_bytes(data: bytes) -> tuple[str, dict[str, Tensor], dict]:
    """Kind, tensors and values of `to_bytes`.

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
    """The next frame; `None` at the end of the stream, also in the middle of a frame: whoever wrote it has died.

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
