"""Files that are whole or absent: everything hf_osd writes is staged beside its place and then renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into; when the block ends well, its files replace those of the same name in `directory`.

    When it does not (a full disk, an interrupt), `directory` is as it was.

    Raises:
        OSError: if `directory` cannot be made or written; the message names it and says that nothing was changed.
    """
    directory = Path(directory)
    staging = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Inside `directory`, so that the renames cannot cross a file system.
        staging = Path(tempfile.mkdtemp(prefix=".staged-", dir=directory))
        yield staging
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                _sync(path)
        for path in sorted(staging.rglob("*")):
            place = directory / path.relative_to(staging)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(path, place)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot save to {directory}: {error.strerror or error}. What was there before is unchanged; free space or choose another "
            "directory",
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
