"""`RowLog`: a JSONL file to which runs of a recipe append rows, also several runs at once."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from hf_osd.system.output_paths import check_writable
from hf_osd.system.strict_json import dumps, loads

logger = logging.getLogger("hf_osd.recipes.row_log")


class RowLog:
    """Reads the rows of a file, as `rows`, and appends to it. Without a path there are none, and appended rows are dropped.

    Args:
        path (`str`, *optional*): the file; the first row creates it.
        fields (`tuple[str, ...]`): fields that every row must have; a file without them belongs to something else.

    Raises:
        ValueError: if a line is not such a row; the message names file and line. An incomplete last row, of a process that was killed, is skipped.
        OSError: if the file cannot be read or written.
    """

    def __init__(self, path: str | None, fields: tuple[str, ...]):
        self.path = None if path is None else Path(path)
        self.rows: list[dict] = []
        if self.path is None:
            return
        check_writable("--log", self.path)
        if self.path.is_file():
            self.rows = list(self._read(fields))

    def append(self, row: dict):
        """Append a row, in place of an incomplete last one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            last = data[data.rfind(b"\n") + 1 :]
            if last and not _is_row(last):
                os.truncate(file.fileno(), len(data) - len(last))
                last = b""
            file.write((b"\n" if last else b"") + dumps(row).encode() + b"\n")

    def _read(self, fields: tuple[str, ...]) -> Iterator[dict]:
        lines = self.path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if not _is_row(line):
                if number == len(lines) and not line.endswith(b"\n"):
                    logger.warning("%s, line %d: half a row, left out.", self.path, number)
                    return
                raise ValueError(
                    f"--log {self.path}, line {number}: no JSON object; correct or remove it, or choose another --log."
                )
            row = loads(line)
            if lacking := [name for name in fields if name not in row]:
                raise ValueError(
                    f"--log {self.path}, line {number}: a row without `{lacking[0]}`, so the file belongs to something else; choose another --log."
                )
            yield row


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
