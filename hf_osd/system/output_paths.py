"""Where a command may write: never over, into or around what it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def check_apart(
    outputs: Mapping[str, str | os.PathLike], inputs: Mapping[str, str | os.PathLike], around: bool = False
):
    """See that no output is an input, by whatever path either is given: links, relative paths, another name of the same file.

    Args:
        outputs, inputs: paths by what to call them, a flag's name say. Inputs that are not on this machine (a Hub id), or empty, are passed over.
        around (`bool`): an output may be a folder that holds an input: what is written into it has other names.

    Raises:
        ValueError: if one is the other, or a folder of one lies within the other.
    """
    for out_name, out in outputs.items():
        for name, given in inputs.items():
            how = _meets(Path(out), Path(given)) if given else None
            if how is not None and not (around and how == "holds"):
                raise ValueError(
                    f"{out_name} {out} {how} {name} {given}, which would be written over; choose another place for {out_name}."
                )


def check_writable(name: str, path: str | os.PathLike, folder: bool = False):
    """See that a file, or with `folder` a folder, can be written at `path`, before any work is done for it. Nothing is made.

    Raises:
        OSError: if it cannot; the message names it.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        kinds = ("folder", "file") if folder else ("file", "folder")
        raise FileExistsError(f"{name} {path} is a {kinds[1]}; give the path of a {kinds[0]}.")
    place = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if not path.exists() and not place.is_dir():
        raise NotADirectoryError(f"{name} {path} cannot be made: {place} is a file; choose another place.")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{name} {path} cannot be written: {place} is not yours to write; choose another place.")


def _meets(output: Path, given: Path) -> str | None:
    """How the two meet, in words that stand between their names; `None` if they do not, or `given` is not there."""
    if not given.exists():
        return None
    if output.exists() and output.samefile(given):
        return "is"
    output, given = output.resolve(), given.resolve()
    if output == given:
        return "is"
    if given.is_dir() and _within(output, given):
        return "lies within"
    # A file in a folder of outputs is nobody's unless it has the name of one, which is then an output too.
    return "holds" if given.is_dir() and _within(given, output) else None


def _within(path: Path, folder: Path) -> bool:
    """Whether `folder` is one of the parents of `path`, by what they are: file systems may not tell case apart."""
    if folder in path.parents:
        return True
    return folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in path.parents)
