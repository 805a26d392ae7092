"""`SharedFlags`: shares two bytes of memory between a serving process and its learning process: whether a call runs, and a pulse."""

from __future__ import annotations

import mmap
from pathlib import Path

BUSY = "busy"


class SharedFlags:
    """Maps the two bytes of `folder/busy`. Access takes no lock, and the mapping outlives the file.

    Args:
        folder (`Path`): shared by the two processes.

    Raises:
        OSError: if the file does not exist.
    """

    def __init__(self, folder: Path):
        with (folder / BUSY).open("r+b") as file:
            self._bytes = mmap.mmap(file.fileno(), 2)

    @classmethod
    def create(cls, folder: Path) -> SharedFlags:
        """Make the file, with both bytes 0, and map it."""
        (folder / BUSY).write_bytes(bytes(2))
        return cls(folder)

    @property
    def busy(self) -> bool:
        """Whether a call runs, which the serving process sets."""
        return self._bytes[0] != 0

    @busy.setter
    def busy(self, value: bool):
        self._bytes[0] = value

    @property
    def pulse(self) -> int:
        """Number that changes as long as the learning process lives; 0 until it has begun."""
        return self._bytes[1]

    def beat(self):
        """Change the pulse."""
        self._bytes[1] = self._bytes[1] % 255 + 1
