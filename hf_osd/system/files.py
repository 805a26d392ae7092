"""Writes files that are whole or absent, whenever the process ends. Independent files are written beside their place and renamed into it (`staged`);
files that belong together form a numbered folder, which appears by one rename (`new_state`, `newest_state`)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where a folder can be neither locked nor written through
    fcntl = None

logger = logging.getLogger(__name__)

_STAGED, _STATE, _MANIFEST = ".staged-", "state-", "manifest.json"


@contextlib.contextmanager
def staged(directory: str | os.PathLike) -> Iterator[Path]:
    """Yield a folder to write into; when the block succeeds, its files replace those of the same name in `directory`, one after the other.

    If the block fails (a full disk, an interrupt), `directory` is unchanged. Each file is whole at any moment, but a process that is killed between two
    renames leaves new files beside old ones; use `new_state` for files that must not be mixed.

    Raises:
        OSError: if `directory` cannot be made or written; the message names it and lists the files that were replaced.
    """
    directory, replaced = Path(directory), []
    with _naming(directory, replaced), _staging(directory) as staging:
        yield staging
        paths = sorted(staging.rglob("*"))
        for path in paths:
            _sync(path)
        places = [directory / path.relative_to(staging) for path in paths]
        for path, place in zip(paths, places, strict=True):
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(path, place)
                replaced.append(place.name)
        for folder in {place.parent for place in places}:
            _sync(folder)


@contextlib.contextmanager
def new_state(directory: str | os.PathLike, keep: int = 2) -> Iterator[Path]:
    """Yield a folder to write into; when the block succeeds, it becomes the newest state in `directory`, all files at once.

    The states are the folders `state-00000001` and so on, each with the lengths and SHA-256 of its files in `manifest.json`, and readable by their
    owner alone. A process that is killed leaves the states either unchanged or with the new one added; the next save removes its unfinished files.

    Args:
        directory: the folder of the states.
        keep (`int`): how many states to keep, the new one included.

    Raises:
        OSError: if the state cannot be written; the message names `directory`, whose states are then unchanged.
    """
    directory = Path(directory)
    with _naming(directory), _staging(directory) as staging:
        yield staging
        facts = {path.name: _facts(path) for path in sorted(staging.iterdir())}
        (staging / _MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (*staging.iterdir(), staging):
            _sync(path)
        before = states(directory)
        number = int(before[0].name.removeprefix(_STATE)) + 1 if before else 1
        os.rename(staging, directory / f"{_STATE}{number:08d}")
        _sync(directory)
    for old in states(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)  # it is tried again at the next save


def states(directory: str | os.PathLike) -> list[Path]:
    """List the states in `directory`, newest first, damaged ones included."""
    found = [path for path in Path(directory).glob(f"{_STATE}*") if path.name.removeprefix(_STATE).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_STATE)), reverse=True)


def newest_state(directory: str | os.PathLike) -> Path:
    """Return the newest intact state. A damaged one (a truncated file, a flipped bit) is passed over for the one before it, with a warning.

    Raises:
        FileNotFoundError: if there is no state.
        ValueError: if all are damaged; the message names the file.
    """
    found, damages = states(directory), []
    if not found:
        raise FileNotFoundError(f"There is no saved state in {directory}.")
    for folder in found:
        if (damage := _damage(folder)) is None:
            for passed_over in damages:
                logger.warning("%s. Continuing from the state before it, %s.", passed_over, folder)
            return folder
        damages.append(damage)
    raise ValueError(
        f"{damages[0]}, and no older state there is whole; put it back from a copy, or delete {directory} to start afresh."
    )


def discard_states(directory: str | os.PathLike):
    """Delete all states in `directory`; `OSError` if one cannot be deleted."""
    for folder in states(directory):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _naming(directory: Path, replaced: list[str] | None = None) -> Iterator[None]:
    """Raise failed writes as an `OSError` that names `directory`; safetensors raises an error of its own on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, (OSError, SafetensorError)) else error
        code = re.search(r"os error (\d+)", str(cause))
        became = f"New are {', '.join(replaced)}; the rest" if replaced else "What was there before"
        raise OSError(
            getattr(cause, "errno", None) or (int(code[1]) if code else errno.EIO),
            f"Cannot save to {directory}: {getattr(cause, 'strerror', None) or cause}. {became} is unchanged; free space or choose "
            "another directory",
        ) from cause


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """Yield an empty folder inside `directory`, so that no rename crosses a file system. Delete it afterwards, and first those that killed saves left."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{_STAGED}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGED, dir=directory))
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks: leftovers stay there
                stack.enter_context(_locked(staging))
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock `folder`, so that no other save deletes it as a leftover of a killed one; the system frees the lock when the process ends.

    Raises:
        OSError: if another save holds the lock, or the file system has no locks.
    """
    if fcntl is None:
        raise OSError("no locks on folders")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sync(path: Path):
    """Flush a file's bytes, or a folder's entries, to disk, so that they survive a power failure."""
    if fcntl is None and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(folder: Path) -> str | None:
    """Describe the damage of a state; `None` if it is intact."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{path} is damaged: it has {path.stat().st_size} bytes in place of {facts['bytes']}"
            if _facts(path) != facts:
                return f"{path} is damaged: its bytes are not those that were written"
    except OSError as error:
        return f"{path} is damaged: it cannot be read ({error.strerror or error})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{folder / _MANIFEST} is damaged: it is no list of files ({error})"
    return None
