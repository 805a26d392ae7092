"""Bounds that the recipes' flags have beside those of `hf_osd.system.bounds`, from which a flag's check and its help come."""

from __future__ import annotations

import math
from typing import Any

from hf_osd.system.bounds import Bound, is_number

# What people and YAML write for every switch. Of a text that may be left out, the first ones leave it out, and the others do not say what it is to be.
_OFF, _ON = ("false", "no", "off", "none", "null", ""), ("true", "yes", "on")


def string() -> Bound:
    """Accept any text."""
    return Bound("give a text", lambda value: isinstance(value, str))


def optional_string() -> Bound:
    """Accept any text and `None`, which flags and YAML also write as `false`, `no`, `off`, `none` or `null`."""
    return Bound(
        "give a text, or none to leave it out",
        lambda value: value is None or (isinstance(value, str) and value.strip().lower() not in _ON),
        lambda value: None if is_off(value) else value,
    )


def sampling_temperature() -> Bound:
    """Accept a finite temperature to sample at; 0 means not to."""
    return Bound(
        "give a temperature such as 0.7, or 0 for none", lambda value: is_number(value) and 0 <= value < math.inf
    )


def is_off(value: Any) -> bool:
    """Tell whether a value is a word, or a `False`, by which something is left out."""
    return str(value).strip().lower() in _OFF
