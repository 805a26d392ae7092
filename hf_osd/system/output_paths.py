"""Checks that a command writes neither over, into nor around what it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def check_apart(
    outputs: Mapping[str, str | os.PathLike], inputs: Mapping[str, str | os.PathLike], around: bool = False
):
    """Check that no output is an input, however the paths are spelled: as links, as relative paths, as other names of the same file.

    Args:
        outputs, inputs: paths by their name in messages, such as a flag's. Inputs that are empty or not on this machine (a Hub id) are passed over.
        around (`bool`): allow an output folder that holds an input; the files written into it must have other names.

    Raises:
        ValueError: if an output is an input, or one lies within the other.
    """
    for out_name, out in outputs.items():
        for name, given in inputs.items():
            how = _overlap(Path(out), Path(given)) if given else None
            if how is not None and not (around and how == "holds"):
                raise ValueError(
                    f"{out_name} {out} {how} {name} {given}, which would be written over; choose another place for {out_name}."
                )


def check_writable(name: str, path: str | os.PathLike, folder: bool = False):
    """Check that a file, or with `folder` a folder, can be written at `path`, before any work is done for it. Nothing is made.

    Raises:
        OSError: if it cannot; the message has `name` and `path`.
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


def _overlap(output: Path, given: Path) -> str | None:
    """Describe how the two overlap, in words that fit between their names; `None` if they do not, or `given` does not exist."""
    if not given.exists():
        return None
    if output.exists() and output.samefile(given):
        return "is"
    output, given = output.resolve(), given.resolve()
    if output == given:
        return "is"
    if given.is_dir() and _within(output, given):
        return "lies within"
    # A file in a folder of outputs is in danger only if an output has its name, which is then checked by itself.
    return "holds" if given.is_dir() and _within(given, output) else None


def _within(path: Path, folder: Path) -> bool:
    """Tell whether `folder` is a parent of `path`, by the files themselves: file systems may ignore case."""
    if folder in path.parents:
        return True
    return folder.exists() and any(parent.exists() and parent.samefile(folder) for parent in path.parents)
