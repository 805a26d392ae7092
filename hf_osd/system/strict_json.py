"""Writes JSON that every reader accepts: numbers that are not finite become `null`, or are tagged as in transformers' configs where they must be read back."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hf_osd.system.files import staged

_TAG = "__float__"
_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def dumps(value: Any, indent: int | None = None, exact: bool = False) -> str:
    """Return `value` as JSON without NaN or Infinity, which `json` writes and most readers refuse.

    Args:
        value: anything that `json` can write.
        indent (`int`, *optional*): passed to `json.dumps`.
        exact (`bool`): write NaN and ±Infinity as `{"__float__": "NaN"}`, which `loads` reads back; else they are null.
    """
    return json.dumps(_finite(value, exact), indent=indent, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """Read what `dumps` or another writer wrote; NaN and a byte order mark are accepted. `ValueError` if it is not JSON."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    return json.loads(text.removeprefix("\ufeff"), object_hook=_tagged)


def write_json(path: str | os.PathLike, value: Any):
    """Write an indented JSON file, whole or not at all; its folder is made if need be. `OSError` if it cannot be written."""
    path, text = Path(path), dumps(value, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a terminal or a pipe: nothing can be renamed into it
        path.write_text(text, encoding="utf-8")
        return
    with staged(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")


def _finite(value: Any, exact: bool) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        if not exact:
            return None
        return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _finite(one, exact) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one, exact) for one in value]
    return value


def _tagged(value: dict) -> Any:
    if set(value) == {_TAG} and value[_TAG] in _SPECIAL:
        return _SPECIAL[value[_TAG]]
    return value
