"""`RunFolder`: an output folder that belongs to one run unless the user says otherwise; and the lock that keeps a second job out."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from hf_osd.system.files import discard_states, states
from hf_osd.system.output_paths import check_writable

logger = logging.getLogger("hf_osd.recipes.run_folder")

CHECKPOINT, DRAFT = "checkpoint", "draft"
SERVICES = ("service", "straight")  # of recipes/checks/kill.py
# Files and folders that recipes write into an output folder.
RUN_FILES = (
    "metrics*.jsonl",
    "lossless.jsonl",
    "summary.json",
    "curves.png",
    "kills.json",
    CHECKPOINT,
    DRAFT,
    *SERVICES,
)
LOCK = ".lock"
_LONGEST = 120  # bytes of a folder's name


class RunFolder:
    """A folder for one run. Entering it locks it against other jobs; nothing in it is touched before `clear`.

    Args:
        directory: the folder; entering creates it.
        resume (`bool`): go on with the run in it.
        overwrite (`bool`): start anew; `clear` then removes what the earlier run left.

    Raises:
        ValueError: if it has a run and neither flag is set, or both are, or the run has no checkpoint to resume from; on entering, if another process has
            the folder.
        OSError: if it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, resume: bool = False, overwrite: bool = False):
        if resume and overwrite:
            raise ValueError(
                "`resume` and `overwrite` are both set; go on with the run with one, or start anew with the other."
            )
        self.path, self._resume, self._overwrite = Path(directory), resume, overwrite
        self.check()
        self._stack = contextlib.ExitStack()

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    def check(self):
        """Check that the folder may be used, without touching it."""
        check_writable("--output_dir", self.path, folder=True)
        found = self._found()
        if not found or self._overwrite:
            return
        names = ", ".join(path.name for path in found)
        if not self._resume:
            raise ValueError(
                f"{self.path} has a run in it already ({names}): go on with it with --resume, start anew in its place with --overwrite, or choose "
                "another --output_dir."
            )
        if not states(self.checkpoint) and any(path.suffix != ".jsonl" for path in found):
            raise ValueError(
                f"{self.path} has a run in it ({names}) and no checkpoint to go on from: start anew in its place with --overwrite, or choose "
                "another --output_dir."
            )

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(locked(self.path / LOCK, f"--output_dir {self.path}"))
        try:
            self.check()  # again: a job that has just ended may have left a run
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def clear(self):
        """With `overwrite`, remove rows, figures and checkpoints of the earlier run. Its draft stays until another one replaces it."""
        if not self._overwrite:
            return
        discard_states(self.checkpoint)
        for path in self._found():
            if path.is_file():
                path.unlink()

    def _found(self) -> list[Path]:
        """List what an earlier run has left and is not empty."""
        paths = [path for name in RUN_FILES for path in sorted(self.path.glob(name))]
        return [path for path in paths if (any(path.iterdir()) if path.is_dir() else path.stat().st_size)]


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on a file, which is created and stays. The system releases the lock with the process, however that ends.

    Args:
        what (`str`): names what is locked, for messages.

    Raises:
        ValueError: if another process holds the lock.
        OSError: if the file cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"{what} is in use by another process; wait for that one to end, or choose another."
        ) from error
    except NotImplementedError:  # a file system without locks
        logger.warning("%s: its file system has no locks; make sure that no other job writes to it.", what)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def folder_name(name: str) -> str:
    """Turn a name that comes from data into a folder's name, a different one for each name.

    Characters that a path cannot have, or that mean something in one, are written as %2F; names longer than 120 bytes are cut and end with a digest.
    """
    unsafe = set('%/\\:*?"<>|')
    letters = [_escaped(letter) if letter in unsafe or not letter.isprintable() else letter for letter in name]
    if letters[0] == ".":
        letters[0] = _escaped(".")
    if letters[-1] in (".", " "):
        letters[-1] = _escaped(letters[-1])
    safe = "".join(letters)
    if len(safe.encode()) <= _LONGEST:
        return safe
    start = safe.encode()[: _LONGEST // 2].decode("utf-8", "ignore")
    return f"{start}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))
